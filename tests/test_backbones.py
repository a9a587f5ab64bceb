"""Every backbone and head of the table against T copies of its stock model, and through save, load and generation."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file

import backbones
import naive
from backbones import CASES, CAUSAL, NOT_LINEAR, few, named, some
from configuration_fas import BACKBONES
from sites_fas import trunk


EXACT = {"atol": 1e-12, "rtol": 1e-12}
CLOSE = {"atol": 1e-10, "rtol": 1e-9}
RMS_NORM = {"atol": 5e-5, "rtol": 1e-5}  # computes in float32, and so do its gradients


def oracle(spiking, T, inputs, case):
    """What T copies of the stock model give on average; the average of its trunk, where its head is not linear."""
    stock = naive.network(spiking, T)
    if case in NOT_LINEAR:
        stock.base_model.register_forward_hook(lambda _m, _a, outputs: average(outputs, T))
    outputs = backbones.first_output(stock(**naive.copies(T, inputs)))
    return outputs if case in NOT_LINEAR else outputs.unflatten(0, (T, -1)).mean(0)


def average(outputs, T):
    outputs["last_hidden_state"] = outputs["last_hidden_state"].unflatten(0, (T, -1)).mean(0)
    return outputs


@pytest.mark.parametrize("case", CASES, ids=named)
def test_stepwise_equals_copies_of_the_stock_model(case):
    model, inputs = backbones.model(*case, T=4).double(), backbones.batch(*case)
    emitted = backbones.first_output(model(**inputs))
    torch.testing.assert_close(emitted, oracle(model, 4, inputs, case), **EXACT)
    assert not torch.allclose(emitted, backbones.first_output(model.set_timesteps(0)(**inputs)))


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_gradients_equal_those_of_copies(case):
    model, inputs = backbones.model(*case, T=3).double(), backbones.batch(*case)
    torch.manual_seed(0)
    weight = torch.randn_like(backbones.first_output(model(**inputs)))
    parameters = list(model.parameters())
    tolerance = RMS_NORM if hasattr(model.config, "rms_norm_eps") else CLOSE
    got = torch.autograd.grad((backbones.first_output(model(**inputs)) * weight).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((oracle(model, 3, inputs, case) * weight).sum(), parameters, allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), got, want, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, **tolerance, msg=name)


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_padded_rows_equal_single_rows(case, schedule):
    model, inputs = backbones.model(*case, T=4, schedule=schedule).double(), backbones.batch(*case)
    whole = backbones.first_output(model(**inputs))
    for row, length in enumerate((9, 6, 4)):
        one = {name: value[row : row + 1, ..., :length] for name, value in inputs.items()}
        if case[1] == "AutoModelForMultipleChoice":
            one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = backbones.first_output(model(**one))[0]
        torch.testing.assert_close(whole[row][: len(alone)], alone, **EXACT)


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_early_exit_equals_shorter_runs(case):
    if case[1] == "AutoModelForQuestionAnswering":
        pytest.skip("has two outputs")
    model, inputs = backbones.model(*case).double(), backbones.batch(*case)
    for t, found in enumerate(model.early_exit(4, **inputs), start=1):
        with model.running(t, "stepwise"):
            torch.testing.assert_close(found, backbones.first_output(model(**inputs)), **EXACT)
    assert (model.config.T, model.config.schedule) == (0, "stepwise")


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_outputs_have_the_shapes_of_the_stock_model(case):
    asked = {"output_hidden_states": True, "output_attentions": True}
    model = backbones.model(*case, T=4, attn_implementation="eager").double()
    inputs = backbones.batch(*case)
    spiking, stock = model(**inputs, **asked), naive.network(model, 1)(**inputs, **asked)
    assert spiking.keys() == stock.keys()
    for name, value in stock.items():
        shapes = [each.shape for each in value] if isinstance(value, tuple) else getattr(value, "shape", None)
        ours = (
            [each.shape for each in spiking[name]] if isinstance(value, tuple) else getattr(spiking[name], "shape", 0)
        )
        assert shapes is None or ours == shapes, name
    plain = model(**inputs, **asked, return_dict=False)
    assert torch.equal(plain[0], next(iter(spiking.values())))
    for given, named_so in zip(plain, spiking.values(), strict=True):
        if isinstance(named_so, tuple):
            assert [each.shape for each in given] == [each.shape for each in named_so]


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_a_stock_checkpoint_loads_whole(case, tmp_path):
    stock = naive.network(backbones.model(*case), 1)
    stock = backbones.stock_class(*case)(stock.config)
    stock.save_pretrained(tmp_path)
    model, report = type(backbones.model(*case)).from_pretrained(
        tmp_path, initial_threshold=1.7, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(name.endswith("threshold") for name in report["missing_keys"])
    assert all(neuron.threshold.item() == pytest.approx(1.7) for _, neuron in model.neurons())
    for name, parameter in stock.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "beams, backbone, mode",
    some(
        lambda beams, backbone, mode: not beams or (backbone in ("gpt2", "qwen3") and mode == (3, "stepwise")),
        [0, 3],
        CAUSAL,
        [(0, "stepwise"), (3, "stepwise"), (3, "layerwise")],
    ),
)
def test_cached_generation_equals_uncached_with_left_padding(backbone, mode, beams):
    T, schedule = mode
    model = backbones.model(backbone, "AutoModelForCausalLM", T=T, schedule=schedule).double()
    inputs = backbones.batch(backbone, "AutoModelForCausalLM", padding="left")
    inputs.pop("position_ids")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams or 1}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **settings)
    again = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), atol=1e-6, rtol=0)
    if not beams:
        for row, length in enumerate((9, 6, 4)):
            alone = model.generate(inputs["input_ids"][row : row + 1, 9 - length :], **settings)
            assert torch.equal(alone.sequences[0, length:], cached.sequences[row, 9:])


LOAD = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if not folder.is_dir() or folder.name == "hf_modules":
        continue
    tensors = load_file(folder / "logits.safetensors")
    model = getattr(transformers, folder.name.split("-")[1]).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    out = model(**{name: value for name, value in tensors.items() if name != "expected"})
    first = torch.stack([out["start_logits"], out["end_logits"]], -1) if "start_logits" in out else out[0]
    assert torch.equal(first, tensors["expected"]), folder.name
    print(folder.name, "equal")
assert not [name for name in sys.modules if name.endswith("_fas") and "." not in name]
"""


def test_every_class_loads_in_a_new_process_by_its_auto_class(tmp_path, run_outside):
    for case in CASES:
        model, inputs = backbones.model(*case, T=3), backbones.batch(*case)
        folder = tmp_path / "-".join(case)
        model.save_pretrained(folder)
        tensors = {**inputs, "expected": backbones.first_output(model(**inputs)).contiguous()}
        save_file({name: value.clone() for name, value in tensors.items()}, folder / "logits.safetensors")
    printed = run_outside(["-c", LOAD, str(tmp_path)])
    assert printed.count("equal") == len(CASES)


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_copies_are_independent_and_run_as_their_own_configuration(case):
    model, inputs = backbones.model(*case, T=4), backbones.batch(*case)
    other = copy.deepcopy(model).set_timesteps(1)
    before = backbones.first_output(model(**inputs))
    backbones.first_output(other(**inputs))
    assert torch.equal(backbones.first_output(model(**inputs)), before)
    assert model.config.T == 4 and all(neuron.T == 4 for _, neuron in model.neurons())


FLEX = {"attn_implementation": "flex_attention"}


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_flexible_attention_is_refused_when_built_loaded_or_set(case, tmp_path):
    model = backbones.model(*case, T=3)
    said = rf"{type(model).__name__} does not support .*flex_attention"
    with pytest.raises(ValueError, match=said):
        backbones.model(*case, T=3, **FLEX)
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation("flex_attention")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        type(model).from_pretrained(tmp_path, T=3, **FLEX)
    # What was refused has changed nothing.
    assert {each.config._attn_implementation for each in (model, model.base_model)} == {"sdpa"}
    assert backbones.first_output(model(**backbones.batch(*case))).isfinite().all()


def test_every_model_of_the_table_is_there_and_no_other():
    import modeling_fas

    named = {name for table in BACKBONES.values() for name in table.models.values()}
    made = {name for name, value in vars(modeling_fas).items() if isinstance(value, type) and name.startswith("FAS")}
    assert made - {"FASMixin", "FASNeuron"} == named
    assert all(
        issubclass(getattr(modeling_fas, name), getattr(transformers, name.removeprefix("FAS"))) for name in named
    )


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_stock_blocks_are_built_once(case, monkeypatch):
    block = type(trunk(backbones.model(*case)).get_submodule(BACKBONES[case[0]].blocks)[0])
    built, init = [], block.__init__
    monkeypatch.setattr(
        block, "__init__", lambda self, *args, **kwargs: (built.append(1), init(self, *args, **kwargs))[1]
    )
    model = backbones.model(*case)
    assert len(built) == model.config.num_hidden_layers == 3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_flexible_attention_is_refused_where_it_was_set_behind_the_model(backbone):
    model = backbones.model(backbone, "AutoModelForSequenceClassification", T=2)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"must not be 'flex_attention'.*'sdpa'"):
        model(**backbones.batch(backbone, "AutoModelForSequenceClassification"))
