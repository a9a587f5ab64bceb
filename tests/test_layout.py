"""What reads the table, on every backbone: products, energy, monitors, calibration, folding."""

import pytest
import torch
import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

import backbones
from backbones import CASES, HEADS, few, named
from configuration_fas import BACKBONES
from training import layout
from training.calibrate import calibration_loss, coarse_search, fold_thresholds
from training.calibrate.loss import recorded
from training.convert import RECIPES
from training.evaluate import SpikeMonitor, count_operations


ONE_OUTPUT = [case for case in HEADS if case[1] != "AutoModelForQuestionAnswering"]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_products_are_all_linear_layers_of_the_model(case):
    model = backbones.model(*case)
    listed = [id(weight) for product in layout.products(model) for weight in product.weights]
    assert len(listed) == len({*listed})
    assert {*listed} == {id(module) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}


@pytest.mark.parametrize("case", CASES, ids=named)
def test_sites_are_all_neurons_of_the_model(case):
    model = backbones.model(*case)
    assert [site.name for site in layout.sites(model)] == [name for name, _ in model.neurons()]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_two_sites_have_the_same_label(backbone):
    model = backbones.model(backbone, "AutoModel", sites="all", activation="stock", L=None)
    labels = [layout.label(name) for name, _ in model.neurons()]
    assert len({*labels}) == len(labels) > 6


@pytest.mark.parametrize("case", CASES, ids=named)
def test_energy_counts_every_weight_once_a_token(case):
    """With one token and one key, dense MACs are the weights and two products of attention a block."""
    model = backbones.model(*case)
    counted = sum(each.dense for each in count_operations(model, 1))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    heads = model.config.num_attention_heads * getattr(model.config, "head_dim", None) if case[0] == "qwen3" else 32
    assert counted == weights + 3 * 2 * heads
    # Stepwise: the attention and the first products of block 0 run once, and so does what follows the average.
    stepwise = count_operations(model, 1, execution="stepwise", T=4, spike_rates=0.5)
    once = [each for each in stepwise if each.layer == 0 and each.part not in ("mlp out", "neurons")]
    assert once and all(each.effective_acs == 0 for each in once)
    plain = {(each.part, each.layer): each.dense for each in count_operations(model, 1)}
    assert all(each.dense == plain[each.part, each.layer] for each in once)
    assert all(each.dense == 4 * plain[each.part, each.layer] for each in stepwise if each.layer == 1 and each.dense)
    assert all(each.effective_macs == 0 for each in stepwise if each.part == "mlp out")


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_monitored_spikes_are_those_that_hooks_count(case, schedule):
    model, inputs = backbones.model(*case, T=4, schedule=schedule), backbones.batch(*case)
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    counts = {}

    def count(name, pooled):
        def hook(neuron, _inputs, output):
            spikes = (output.detach() / neuron.threshold).abs() * (1 if neuron.stepwise else 4)
            spikes = spikes.view(-1, *(spikes.shape[-1:] if pooled else (*mask.shape, spikes.shape[-1])))
            counts[name] = spikes.sum() if pooled else spikes[:, mask].sum()

        return hook

    pooled = layout.pooled(model)
    for name, neuron in model.neurons():
        neuron.register_forward_hook(count(name, name in pooled))
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        model(**inputs)
    for name, site in monitor.sites.items():
        assert site.spikes.sum().item() == pytest.approx(round(counts[name].item()), abs=0.5)
        assert site.spikes.sum() > 0


@pytest.mark.parametrize("case", few(ONE_OUTPUT), ids=named)
def test_the_search_brings_every_model_nearer_to_its_ann(case):
    model, inputs = backbones.model(*case, L=8), backbones.batch(*case)
    model.begin_calibration(3)
    with torch.no_grad():
        before = calibration_loss(model, inputs)
        coarse_search(model, inputs, progress=False, scales=(0.5, 0.75, 1.0), potentials=(0.35, 0.5))
        after = calibration_loss(model, inputs)
    assert after.loss < before.loss
    loss = calibration_loss(model, inputs).loss
    loss.backward()
    moved = [name for name, each in model.named_parameters() if name.endswith("fine_threshold") and each.grad.any()]
    assert len(moved) == len(model.neurons())


@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
@pytest.mark.parametrize("case", few(HEADS), ids=named)
def test_folding_changes_nothing_but_what_travels(case, T, schedule):
    model, inputs = backbones.model(*case).double(), backbones.batch(*case)
    with torch.no_grad():
        for _, neuron in model.neurons():
            neuron.threshold.uniform_(0.5, 1.5)
    model.set_timesteps(T, schedule)
    before = backbones.first_output(model(**inputs))
    fold_thresholds(model)
    emitted = []
    for placed in layout.sites(model):
        if placed.targets:
            placed.neuron.register_forward_hook(lambda _n, _i, output: emitted.append(output))
    torch.testing.assert_close(backbones.first_output(model(**inputs)), before, atol=1e-5, rtol=1e-5)
    if T and schedule == "stepwise":
        assert all(each.unique().tolist() in ([0, 1], [-1, 0, 1]) for each in map(torch.round, emitted))
        assert all(torch.allclose(each, each.round()) for each in emitted)


@pytest.mark.parametrize("granularity", ["neuron", "position"])
@pytest.mark.parametrize("backbone", ["gpt2", "bert", "llama", "qwen3"])
def test_the_variance_over_time_is_that_of_the_spikes(backbone, granularity):
    """Of sites that spike both ways too, whose spikes may cancel in the average."""
    case = (backbone, "AutoModelForSequenceClassification")
    model, inputs = backbones.model(*case).double(), backbones.batch(*case)
    model.begin_calibration(5, granularity, 9)
    with torch.no_grad():
        for _, neuron in model.neurons():
            neuron.fine_threshold.uniform_(0.4, 1.2)
    trains = {}
    with torch.no_grad(), model.running(5, "stepwise"), recorded(model) as emitted:
        for name, neuron in model.neurons():
            neuron.register_forward_hook(
                lambda neuron, _inputs, output, name=name: trains.__setitem__(name, output.unflatten(0, (5, -1)))
            )
        model(**inputs)
        for name, train in trains.items():
            torch.testing.assert_close(emitted[name].average, train.mean(0))
            torch.testing.assert_close(emitted[name].variance(), train.var(0, correction=0))


def test_the_recipe_that_shards_names_the_blocks_that_there_are():
    settings = yaml.safe_load((RECIPES / "gpt2_full_fsdp.yaml").read_text())["fsdp_config"]
    blocks = {type(block).__name__ for block in backbones.model("gpt2", "AutoModelForCausalLM").transformer.h}
    assert set(settings["transformer_layer_cls_to_wrap"]) == blocks


@pytest.mark.parametrize("case", CASES, ids=named)
def test_dropout_is_off_wherever_a_model_keeps_it(case):
    names = [name for name in backbones.config(*case).to_dict() if "drop" in name and name != "layerdrop"]
    model, inputs = backbones.model(*case, **dict.fromkeys(names, 0.5)), backbones.batch(*case)
    expected, model = backbones.first_output(model(**inputs)), model.train()
    assert not torch.equal(backbones.first_output(model(**inputs)), expected)
    layout.turn_off_dropout(model)
    torch.testing.assert_close(backbones.first_output(model(**inputs)), expected)
    assert {getattr(model.config, name) for name in names} == {0.5}
