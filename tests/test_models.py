"""The networks: against the published algorithm run plainly, and against what stock models do."""

import copy

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel

import naive
import tiny
from backbones import some


STOCK = {"gpt2": GPT2LMHeadModel, "mlm": BertForMaskedLM, "classify": BertForSequenceClassification}
EXACT = {"atol": 1e-12, "rtol": 0}  # float64: no level can flip by rounding


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("granularity", [None, "neuron"])
def test_stepwise_equals_the_published_algorithm(kind, granularity):
    T, inputs = 4, tiny.batch(kind)
    model = tiny.model(kind, T=T).double()
    if granularity:
        model.begin_calibration(T, granularity)
        for _, neuron in model.neurons():
            torch.nn.init.uniform_(neuron.fine_threshold, 0.3, 1.2)
            torch.nn.init.uniform_(neuron.initial_potential, -0.2, 1.2)
    plain = naive.logits(naive.network(model, T), T, inputs)
    expected = gradients(model, plain.square().mean())
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, plain, **EXACT)
    actual = gradients(model, logits.square().mean())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "key.bias" in name or "pooler" in name, name
        torch.testing.assert_close(actual[name], gradient, **EXACT, msg=name)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("L", [1, 5, 16])
def test_layerwise_with_T_equal_to_L_is_the_quantised_network_bit_for_bit(kind, L):
    model, inputs = tiny.model(kind, L=L), tiny.batch(kind)
    quantised = model(**inputs)
    spiking = model.set_timesteps(L, "layerwise")(**inputs)
    assert torch.equal(spiking.logits, quantised.logits)
    assert torch.equal(spiking.loss, quantised.loss)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", tiny.MODES)
def test_sites_emit_spikes_stepwise_and_rates_layerwise(kind, T, schedule):
    model, inputs, emitted = tiny.model(kind, T=T, schedule=schedule), tiny.batch(kind), {}
    for name, neuron in model.neurons():
        neuron.register_forward_hook(lambda _m, _a, output, name=name: emitted.update({name: output}))
    model(**inputs)
    names = {
        "gpt2": [f"transformer.h.{i}.mlp.act" for i in range(3)],
        "mlm": [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(3)]
        + ["cls.predictions.transform.transform_act_fn"],
        "classify": [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(3)]
        + ["bert.pooler.activation"],
    }
    assert list(emitted) == names[kind]
    for name, output in emitted.items():
        threshold = model.get_parameter(f"{name}.threshold")
        assert threshold.shape == (1,)
        levels = output / threshold * (1 if schedule == "stepwise" and T else T or model.config.L)
        torch.testing.assert_close(levels, levels.round(), atol=1e-5, rtol=0)
        assert output.shape[0] == (3 * T if schedule == "stepwise" and T else 3)
        assert 0 < levels.mean() < levels.max()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", tiny.MODES)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(kind, T, schedule, padding):
    if padding == "left" and kind != "gpt2":
        pytest.skip("BERT has absolute positions and no position_ids in its tokenizers' output")
    model = tiny.model(kind, T=T, schedule=schedule).double()
    inputs = tiny.batch(kind, padding)
    logits = model(**inputs).logits
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(input_ids=inputs["input_ids"][row : row + 1, mask]).logits  # no mask at all
        together = logits[row] if kind == "classify" else logits[row, mask]
        torch.testing.assert_close(together, alone[0], **EXACT)


@pytest.mark.parametrize(
    "kind, mode, attention",
    some(
        lambda kind, mode, attention: mode == (4, "stepwise") or (kind, attention) == ("mlm", "eager"),
        tiny.KINDS,
        tiny.MODES,
        ["eager", "sdpa"],
    ),
)
def test_outputs_have_the_stock_form(kind, mode, attention):
    T, schedule = mode
    inputs = tiny.batch(kind) | {"output_hidden_states": True, "output_attentions": attention == "eager"}
    model = tiny.model(kind, T=T, schedule=schedule, attn_implementation=attention)
    stock = STOCK[kind](model.config).eval()(**inputs)
    output = model(**inputs)
    assert output.keys() == stock.keys()
    for key in ("hidden_states", "attentions"):
        assert [each.shape for each in output.get(key, ())] == [each.shape for each in stock.get(key, ())]
    assert output.logits.shape == stock.logits.shape
    unnamed = model(**inputs, return_dict=False)
    assert isinstance(unnamed, tuple)
    assert torch.equal(unnamed[0], output.loss)
    assert torch.equal(unnamed[1], output.logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(kind):
    inputs = tiny.batch(kind)
    logits = [tiny.model(kind, T=4, attn_implementation=each).double()(**inputs).logits for each in ("eager", "sdpa")]
    torch.testing.assert_close(*logits, **EXACT)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_without_sites_replaced_the_weights_are_the_stock_model(kind, tmp_path):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    stock = STOCK[kind](model.config).eval()
    stock.config.model_type = model.config.backbone
    stock.save_pretrained(tmp_path)
    loaded = tiny.CLASSES[kind].from_pretrained(tmp_path)
    activations = dict(stock.named_modules())
    for name, neuron in loaded.neurons():
        assert neuron.threshold.item() == pytest.approx(loaded.config.initial_threshold)
        parent, _, leaf = name.rpartition(".")
        activations[name].stepwise = False  # what the masked-LM head asks its site
        setattr(loaded.get_submodule(parent), leaf, activations[name])
    assert torch.equal(loaded(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
def test_gradient_checkpointing_changes_no_gradient(kind, T, schedule):
    inputs, model = tiny.batch(kind), tiny.model(kind, T=T, schedule=schedule).double().train()
    plain = gradients(model, model(**inputs).loss)
    # transformers 5.23 renames it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    checkpointed = gradients(model, model(**inputs).loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, **EXACT)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
def test_gradient_checkpointing_in_the_configuration_runs_blocks_again(kind, T, schedule):
    found = []
    for setting in (False, True):
        model = tiny.model(kind, T=T, schedule=schedule, gradient_checkpointing=setting).double().train()
        flags = ("is_activation_checkpointing", "is_gradient_checkpointing")  # transformers 5.23 renames it
        assert getattr(model, next(name for name in flags if hasattr(type(model), name))) == setting
        runs = []
        model.neurons()[1][1].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        found.append(gradients(model, model(**tiny.batch(kind)).loss))
        assert len(runs) == 1 + setting
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T", [0, 4])
def test_every_parameter_moves(kind, T):
    model, inputs = tiny.model(kind, T=T).train(), tiny.batch(kind)
    moved = gradients(model, model(**inputs).loss)
    still = {name for name, _ in model.named_parameters() if name not in moved or not moved[name].any()}
    assert {name for name in still if "key.bias" not in name} == set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
def test_the_whole_model_compiles_without_a_graph_break(kind, T, schedule):
    torch._dynamo.reset()
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 2}
    model, inputs = tiny.model(kind, T=T, schedule=schedule, **layers).double(), tiny.batch(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_default_compiler_agrees(kind):
    torch._dynamo.reset()
    model, inputs = tiny.model(kind, T=4).double(), tiny.batch(kind)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
@pytest.mark.parametrize("dtype", some(lambda dtype: dtype == torch.bfloat16, [torch.bfloat16, torch.float16]))
@torch.no_grad()
def test_half_precision_weights_run(kind, T, schedule, dtype):
    model, inputs = tiny.model(kind, T=T, schedule=schedule), tiny.batch(kind)
    exact = model(**inputs).logits
    low = model.to(dtype)(**inputs).logits
    assert low.dtype == dtype
    # Levels flip where rounding crosses a step, so the bound is on the whole: 8 bits of bfloat16 and some flips.
    assert (low.float() - exact).norm() / exact.norm() < 0.25


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (8, "stepwise"), (8, "layerwise")])
@pytest.mark.parametrize("granularity", [None, "neuron"])
@torch.no_grad()
def test_neurons_of_a_bfloat16_model_count_as_in_float32(kind, T, schedule, granularity):
    model = tiny.model(kind, T=T, schedule=schedule)
    if granularity:
        model.begin_calibration(8, granularity)
        for _, neuron in model.neurons():
            torch.nn.init.uniform_(neuron.fine_threshold, 0.4, 1.2)
            torch.nn.init.uniform_(neuron.initial_potential, 0.1, 0.9)
    compared = []

    def compare(neuron, arguments, output):
        exact = copy.deepcopy(neuron).float().forward(arguments[0].float())
        compared.append(torch.equal(output, exact.bfloat16()))  # a threshold of the model rounds to itself
        assert output.dtype == torch.bfloat16 and 0.01 < output.ne(0).float().mean() < 0.99

    model.bfloat16()
    for _, neuron in model.neurons():
        neuron.register_forward_hook(compare)
    model(**tiny.batch(kind))
    assert compared == [True] * len(model.neurons())


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("sizes", [{"n_layer": 1}, {"n_layer": 13}, {"n_embd": 20, "n_inner": 7, "n_head": 2}])
@torch.no_grad()
def test_any_number_of_layers_and_any_width(kind, sizes):
    if kind != "gpt2":
        renamed = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_inner": "intermediate_size"}
        sizes = {renamed.get(key, "num_attention_heads"): value for key, value in sizes.items()}
    model, inputs = tiny.model(kind, T=3, **sizes).double(), tiny.batch(kind)
    assert len(model.neurons()) == model.config.num_hidden_layers + (kind != "gpt2")
    plain = naive.logits(naive.network(model, 3), 3, inputs)
    torch.testing.assert_close(model(**inputs).logits, plain, **EXACT)


@pytest.mark.parametrize("length", [1, 2, tiny.POSITIONS])
@torch.no_grad()
def test_any_length_up_to_the_positions(length):
    ids = torch.randint(1, tiny.VOCABULARY, (2, length))
    for kind in tiny.KINDS:
        model = tiny.model(kind, T=4).begin_calibration(4)
        assert model(ids).logits.shape[:1] == (2,)


@torch.no_grad()
def test_base_models_average_over_time():
    ids = tiny.batch("classify")["input_ids"]
    for kind in ("gpt2", "classify"):
        base = AutoModel.from_config(tiny.config(kind, T=4)).eval()
        output = base(ids)
        assert output.last_hidden_state.shape == (3, 9, 32)
        assert kind == "gpt2" or output.pooler_output.shape == (3, 32)


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    for kind in tiny.KINDS:
        model, inputs = tiny.model(kind, T=4), tiny.batch(kind)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        without_ids = {key: value for key, value in inputs.items() if key != "input_ids"}
        assert torch.equal(model(inputs_embeds=embeds, **without_ids).logits, model(**inputs).logits)


def test_a_model_can_be_copied_after_a_training_step():
    model, inputs = tiny.model("gpt2", T=4).begin_calibration(4).train(), tiny.batch("gpt2")
    model(**inputs).loss.backward()
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_a_copied_site_follows_the_configuration():
    # What PEFT does for `modules_to_save`: the copy must not keep the timesteps of the moment it was made.
    model, inputs = tiny.model("gpt2"), tiny.batch("gpt2")
    for block in model.transformer.h:
        block.mlp.act = copy.deepcopy(block.mlp.act)
    spiking = model.set_timesteps(4)(**inputs).logits
    model.config.T = 0
    quantised = model(**inputs).logits
    assert torch.equal(quantised, tiny.model("gpt2")(**inputs).logits)
    assert torch.equal(spiking, tiny.model("gpt2", T=4)(**inputs).logits)
    assert not torch.equal(spiking, quantised)


def test_thresholds_stay_positive_through_training_and_saving(tmp_path):
    model, inputs = tiny.model("classify").train(), tiny.batch("classify")
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    for _ in range(8):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert any(neuron.threshold.item() <= 0 for _, neuron in model.neurons())
    logits = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    assert all(neuron.threshold.item() > 0 for _, neuron in model.neurons())
    assert torch.equal(tiny.CLASSES["classify"].from_pretrained(tmp_path)(**inputs).logits, logits)


@pytest.mark.parametrize("granularity", ["layer", "neuron", "position"])
@torch.no_grad()
def test_fine_thresholds_are_saved_positive(granularity, tmp_path):
    model, inputs = (
        tiny.model("classify", T=2).begin_calibration(2, granularity, tiny.POSITIONS),
        tiny.batch("classify"),
    )
    for i, (_, neuron) in enumerate(model.neurons()):
        neuron.fine_threshold.flatten()[0] = -0.3 * i  # 0 is none either
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = tiny.CLASSES["classify"].from_pretrained(tmp_path)
    assert all(neuron.fine_threshold.min() > 0 for _, neuron in loaded.neurons())
    assert torch.equal(loaded(**inputs).logits, logits)
