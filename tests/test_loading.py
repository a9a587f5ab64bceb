"""Saving and loading: round trips, a process without this repository, and everything that can be wrong with a file."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import backbones
import tiny
from configuration_fas import BACKBONES
from modeling_fas import FASBertForMaskedLM, FASGPT2LMHeadModel


AUTO = {
    "gpt2": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "classify": AutoModelForSequenceClassification,
}

# One process for the three task classes: importing torch and transformers is what takes the time.
REMOTE = """
import importlib.util, sys, torch, transformers
assert importlib.util.find_spec("modeling_fas") is None, "the repository is on the path"
for arguments in sys.argv[1:]:
    folder, auto, T, schedule = arguments.split()
    load = lambda folder, **settings: getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, **settings
    ).eval()
    model = load(folder, T=int(T), schedule=schedule)
    assert (model.config.T, model.config.schedule) == (int(T), schedule)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    logits = model(**inputs).logits
    with model.running(1, "layerwise"):
        assert {(neuron.T, neuron.schedule) for _, neuron in model.neurons()} == {(1, "layerwise")}
        assert not torch.equal(model(**inputs).logits, logits)
    assert (model.config.T, model.config.schedule) == (int(T), schedule)
    torch.save(logits, folder + "/logits.pt")
    model.save_pretrained(folder + "/again")
    assert torch.equal(load(folder + "/again")(**inputs).logits, logits)
"""


def test_a_new_process_without_the_repository_gives_equal_logits(tmp_path, run_outside):
    modes = {"gpt2": (4, "stepwise"), "mlm": (3, "stepwise"), "classify": (2, "layerwise")}
    expected, arguments = {}, []
    for kind, (T, schedule) in modes.items():
        model, inputs, folder = tiny.model(kind), tiny.batch(kind), tmp_path / kind
        if kind == "gpt2":
            model.begin_calibration(4)
            torch.nn.init.uniform_(model.transformer.h[1].mlp.act.fine_threshold, 0.4, 1.2)
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        arguments.append(f"{folder} {AUTO[kind].__name__} {T} {schedule}")
        expected[folder] = model.set_timesteps(T, schedule)(**inputs).logits
    run_outside(["-c", REMOTE, *arguments])
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits)


# A checkpoint's configuration comes from another copy of its file than the model's own: transformers keeps them apart.
RUNNING = """
import sys, torch, transformers
def load(folder, auto, own_config):
    arguments = {"trust_remote_code": True}
    if own_config:
        arguments["config"] = transformers.AutoConfig.from_pretrained(folder, **arguments)
    return getattr(transformers, auto).from_pretrained(folder, **arguments).eval()
ids, pairs = torch.arange(8)[None], []
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    pairs += [(folder, *[load(folder, auto, own_config) for _ in range(2)]) for own_config in (False, True)]
for folder, model, other in pairs:  # all of them beside each other
    assert type(model.config) is type(model).config_class
    before = model(ids).logits
    for schedule in ("layerwise", "stepwise", "accumulated"):
        where = folder, schedule
        with model.running(3, schedule):
            assert (model.config.T, model.neurons()[0][1].T) == (3, 3), where
            found = model(ids).logits
        expected = other.set_timesteps(3, schedule)(ids).logits
        assert torch.equal(found, expected) and not torch.equal(found, before), where
        assert (model.config.T, model.config.schedule) == (0, "stepwise"), where
        assert torch.equal(model(ids).logits, before), where
        if schedule != "layerwise":
            exits = model.early_exit(3, schedule, input_ids=ids)
            torch.testing.assert_close(exits[-1], expected)
            assert exits.shape == (3, *before.shape), where
            assert model.config.T == 0 and torch.equal(model(ids).logits, before), where
"""


def test_remote_code_runs_for_a_while_as_asked(tmp_path, run_outside):
    tiny.model("gpt2").save_pretrained(tmp_path / "one")
    tiny.model("gpt2", L=4).save_pretrained(tmp_path / "other")
    # Its class is made otherwise: transformers' generic classifier looks in its Auto classes.
    classifier = backbones.model("llama", "AutoModelForSequenceClassification")
    classifier.save_pretrained(tmp_path / "classifier")
    autos = {"one": "AutoModelForCausalLM", "other": "AutoModelForCausalLM"}
    autos["classifier"] = "AutoModelForSequenceClassification"
    run_outside(["-c", RUNNING, *(part for name, auto in autos.items() for part in (str(tmp_path / name), auto))])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("granularity", [None, "layer", "neuron", "position"])
def test_auto_classes_load_what_was_saved(kind, granularity, tmp_path):
    model, inputs = tiny.model(kind, T=4), tiny.batch(kind)
    if granularity:
        model.begin_calibration(4, granularity, 9)
        for _, neuron in model.neurons():
            torch.nn.init.uniform_(neuron.fine_threshold, 0.4, 1.2)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "configuration_fas.py",
        "events_fas.py",
        "kernels_fas.py",
        "modeling_fas.py",
        "neurons_fas.py",
        "sites_fas.py",
        "model.safetensors",
    }
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *BACKBONES[model.config.backbone].models}
    loaded = AUTO[kind].from_pretrained(tmp_path)
    assert type(loaded) is tiny.CLASSES[kind]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    state, saved = loaded.state_dict(), model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    assert AutoModel.from_pretrained(tmp_path).config.T == 4


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_is_uninitialised_after_loading_a_stock_checkpoint(kind, tmp_path):
    stock = (GPT2LMHeadModel if kind == "gpt2" else BertForMaskedLM)(stock_config(kind))
    stock.save_pretrained(tmp_path)
    for calibrated in (None, 4):
        model = tiny.CLASSES[kind].from_pretrained(tmp_path, initial_threshold=1.7, calib_T=calibrated)
        for _, neuron in model.neurons():
            assert neuron.threshold.item() == pytest.approx(1.7)
            if calibrated:
                assert torch.all(neuron.fine_threshold == neuron.threshold)
                assert torch.all(neuron.initial_potential == 0.5)


def stock_config(kind):
    if kind == "gpt2":
        return GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return BertConfig(**sizes, vocab_size=64, max_position_embeddings=32)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    GPT2LMHeadModel(stock_config("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a 'bert' or 'fas_bert' checkpoint.*got one of type 'gpt2'"):
        FASBertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [0.0, -0.3, float("nan")])
@pytest.mark.parametrize("fine", [False, True])
def test_a_threshold_that_cannot_fire_is_refused(value, fine, tmp_path):
    model = tiny.model("gpt2", T=2)
    if fine:
        model.begin_calibration(2)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = f"transformer.h.1.mlp.act.{'fine_' if fine else ''}threshold"
    weights[key][0] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"`{key}` must be finite and, if a threshold, above 0, got {value}"):
        FASGPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_initial_potential_that_is_no_number_is_refused(value, tmp_path):
    model = tiny.model("gpt2", T=2).begin_calibration(2)
    key = "transformer.h.1.mlp.act.initial_potential"
    with torch.no_grad():
        model.get_parameter(key)[3] = -0.25  # this is none that must be refused
    model.save_pretrained(tmp_path)
    assert FASGPT2LMHeadModel.from_pretrained(tmp_path).get_parameter(key)[3] == -0.25
    weights = load_file(tmp_path / "model.safetensors")
    weights[key][5] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"`{key}` must be finite.*got {value}"):
        FASGPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model.safetensors.*(truncated|incomplete)"):
        FASGPT2LMHeadModel.from_pretrained(tmp_path)


def test_pickled_weights_are_neither_read_nor_written(tmp_path):
    with pytest.raises(ValueError, match=r"`use_safetensors` must be True"):
        FASGPT2LMHeadModel.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match=r"`safe_serialization` must be True"):
        tiny.model("gpt2").save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    model = tiny.model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model.safetensors"):
        FASGPT2LMHeadModel.from_pretrained(tmp_path)


def changed(folder, change):
    """Change the tensors of a checkpoint, by name, in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "backbone, dropped, granularity",
    backbones.some(
        lambda backbone, dropped, granularity: backbone == "gpt2" or (dropped, granularity) == ("one", "neuron"),
        ["gpt2", "bert", "llama", "opt"],
        ["all", "one"],
        ["layer", "neuron", "position"],
    ),
)
def test_fine_thresholds_that_are_missing_take_the_sites_own(
    backbone, dropped, granularity, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if backbone == "opt" and granularity == "position":
        pytest.skip("has no positions to calibrate by")
    model = backbones.model(backbone, "AutoModelForSequenceClassification")
    for index, (_, neuron) in enumerate(model.neurons()):
        torch.nn.init.constant_(neuron.threshold, 0.5 + 0.1 * index)
    model.begin_calibration(4, granularity, 9)
    for _, neuron in model.neurons():
        torch.nn.init.uniform_(neuron.fine_threshold, 2, 3)
        torch.nn.init.uniform_(neuron.initial_potential, 0.1, 0.2)
    model.save_pretrained(tmp_path)
    names = [name for name, _ in model.neurons()]
    lacking = names if dropped == "all" else names[1:2]
    changed(tmp_path, lambda w: [w.pop(f"{n}.{p}") for n in lacking for p in ("fine_threshold", "initial_potential")])
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {
        f"{name}.{part}" for name in lacking for part in ("fine_threshold", "initial_potential")
    }
    said = next(record.message for record in caplog.records if "take their own threshold" in record.message)
    for (name, neuron), (_, saved) in zip(loaded.neurons(), model.neurons(), strict=True):
        assert torch.equal(neuron.threshold, saved.threshold)
        if name in lacking:
            assert f"{name}.fine_threshold" in said and f"{name}.initial_potential" in said
            assert (neuron.fine_threshold == saved.threshold).all() and (neuron.initial_potential == 0.5).all()
        else:
            assert f"{name}." not in said and torch.equal(neuron.fine_threshold, saved.fine_threshold)
            assert torch.equal(neuron.initial_potential, saved.initial_potential)


def test_a_missing_potential_leaves_its_threshold_alone(tmp_path):
    model = tiny.model("gpt2").begin_calibration(4)
    neuron = model.neurons()[0][1]
    torch.nn.init.uniform_(neuron.fine_threshold, 2, 3)
    model.save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.pop("transformer.h.0.mlp.act.initial_potential"))
    loaded = FASGPT2LMHeadModel.from_pretrained(tmp_path).neurons()[0][1]
    assert torch.equal(loaded.fine_threshold, neuron.fine_threshold) and (loaded.initial_potential == 0.5).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_missing_and_unexpected_keys_warn_by_name(backbone, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = backbones.model(backbone, "AutoModelForSequenceClassification", calib_T=4)
    model.save_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters() if "threshold" not in name and "potential" not in name]
    missing = [names[2], names[-3], f"{model.neurons()[1][0]}.threshold"]

    def change(weights):
        for name in missing:
            del weights[name]
        weights["of_no_use.weight"] = torch.zeros(3)

    changed(tmp_path, change)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(missing) and set(report["unexpected_keys"]) == {"of_no_use.weight"}
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(any(name in message for message in said) for name in [*missing, "of_no_use.weight"])
    caplog.clear()
    model.config.calib_T = None
    model.config.save_pretrained(tmp_path)  # thresholds that the configuration does not know
    type(model).from_pretrained(tmp_path)
    said = " ".join(record.message for record in caplog.records if record.levelno >= logging.WARNING).lower()
    assert all(part in said for part in ("unexpected", "fine_threshold", "initial_potential"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mismatched_keys_are_refused_by_name(backbone, tmp_path):
    model = backbones.model(backbone, "AutoModelForSequenceClassification", calib_T=4)
    torch.nn.init.constant_(model.neurons()[1][1].threshold, 0.6)
    model.save_pretrained(tmp_path)
    name = f"{model.neurons()[1][0]}.fine_threshold"
    changed(tmp_path, lambda weights: weights.update({name: torch.ones(7)}))
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|size mismatch"):
        type(model).from_pretrained(tmp_path)
    if transformers.__version__ < "5":
        return  # which makes all of a site anew then
    loaded = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    neuron = loaded.get_submodule(name.rpartition(".")[0])
    assert neuron.threshold.item() == pytest.approx(0.6) and (neuron.fine_threshold == neuron.threshold).all()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T", [0, 4])
def test_inputs_that_cannot_run_are_refused(kind, T):
    model = tiny.model(kind, T=T)
    with pytest.raises(ValueError, match=f"must not be longer than the {tiny.POSITIONS} positions.*got 33"):
        model(torch.ones(1, 33, dtype=torch.long))
    for shape in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match=r"`input_ids` must hold at least one token, got shape \(\d, \d\)"):
            model(torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
@torch.no_grad()
def test_cached_tokens_count_as_positions(T, schedule):
    model = tiny.model("gpt2", T=T, schedule=schedule)
    ids = torch.ones(1, tiny.POSITIONS - 2, dtype=torch.long)
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :2], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=f"{tiny.POSITIONS} positions.*got {tiny.POSITIONS + 1}"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cross_attention_is_refused(kind):
    decoder = {} if kind == "gpt2" else {"is_decoder": True}  # which the stock BERT asks for
    with pytest.raises(ValueError, match=r"`add_cross_attention` must be False"):
        tiny.model(kind, add_cross_attention=True, **decoder)


@pytest.mark.parametrize("kind", ["mlm", "classify"])
def test_thresholds_by_position_are_refused_where_the_feed_forward_layer_sees_chunks(kind):
    model, inputs = tiny.model(kind, chunk_size_feed_forward=3), tiny.batch(kind)
    with pytest.raises(ValueError, match=r"'position'.*`config.chunk_size_feed_forward`"):
        model.begin_calibration(4, "position", tiny.POSITIONS)
    assert model.config.calib_T is None and all(neuron.fine_threshold is None for _, neuron in model.neurons())
    chunked = model.begin_calibration(4, "neuron").double().set_timesteps(4)(**inputs).logits
    whole = tiny.model(kind).begin_calibration(4, "neuron").double().set_timesteps(4)(**inputs).logits
    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=0)  # float64: no level can flip by rounding


def test_a_wrong_setting_stops_loading(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path)
    for wrong in ({"T": -1}, {"T": 2.5}, {"L": 0}, {"schedule": "sideways"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **wrong)
