"""Spikes into every product: `sites`, `activation`, `code`, `gain`, `L = None`, and the accumulated schedule."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import backbones
import naive
from backbones import CASES, CAUSAL, FEW, HEADS, few, named, some
from configuration_fas import BACKBONES, FASConfig
from neurons_fas import integrate_and_fire
from sites_fas import difference, running_mean, trunk
from training import layout
from training.calibrate import fold_thresholds
from training.evaluate import SpikeMonitor, count_operations


EXACT = {"atol": 1e-12, "rtol": 1e-12}
STOCK = {"activation": "stock", "L": None}
CODES_AND_GAINS = [
    {"code": code, "T": T, "gain": gain}
    for code, T in (("rate", 4), ("phase", 3), ("first_spike", 6))
    for gain in ("static", "token")
]
FEW_CODES = [each for each in CODES_AND_GAINS if (each["gain"] == "static") == (each["code"] == "phase")]


def reference(model):
    """The stock model with the weights of a spiking one."""
    return naive.network(model, 1, neurons=False)


@pytest.mark.parametrize(
    "case, sites, gain",
    some(
        lambda case, sites, gain: (
            (sites, gain) == ("all", "static") or (case in FEW and (sites, gain) == ("linear", "token"))
        ),
        CASES,
        ["linear", "all"],
        ["static", "token"],
    ),
    ids=named,
)
def test_at_t_0_without_levels_it_is_the_stock_network_bit_for_bit(case, sites, gain):
    model, inputs = backbones.model(*case, sites=sites, gain=gain, **STOCK), backbones.batch(*case)
    assert torch.equal(backbones.first_output(model(**inputs)), backbones.first_output(reference(model)(**inputs)))


@pytest.mark.parametrize(
    "case, sites", some(lambda case, sites: sites == "all" or case in FEW, HEADS, ["linear", "all"]), ids=named
)
def test_every_linear_layer_gets_spikes(case, sites):
    """Layerwise with a phase code their inputs are whole numbers of least steps; with all, the head's too."""
    model = backbones.model(
        *case, sites=sites, code="phase", T=3, schedule="layerwise", initial_threshold=1.0, **STOCK
    )
    wanted = {
        id(weight)
        for each in layout.products(model)
        if each.layer is not None or (sites == "all" and each.product.name == "head")
        for weight in each.weights
    }
    seen = set()

    def check(layer, args):
        levels = args[0] * 7
        assert torch.allclose(levels, levels.round(), atol=1e-4), layer
        seen.add(id(layer))

    for module in model.modules():
        if id(module) in wanted and isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(check)
    model(**backbones.batch(*case))
    assert seen == wanted


@pytest.mark.parametrize(
    "case, coded", some(lambda case, coded: case in FEW and coded in FEW_CODES, HEADS, CODES_AND_GAINS), ids=named
)
def test_layerwise_rows_do_not_depend_on_padding(case, coded):
    if case[1] == "AutoModelForMultipleChoice":
        pytest.skip("rows are choices")
    model = backbones.model(*case, sites="all", schedule="layerwise", **coded, **STOCK).double()
    inputs = backbones.batch(*case)
    whole = backbones.first_output(model(**inputs))
    for row, length in enumerate((9, 6, 4)):
        alone = backbones.first_output(model(**{k: v[row : row + 1, :length] for k, v in inputs.items()}))[0]
        torch.testing.assert_close(whole[row][: len(alone)], alone, **EXACT)
    assert not torch.allclose(whole, backbones.first_output(model.set_timesteps(0)(**inputs)))


def fit(model, inputs):
    """Set every threshold a little above the largest input of its site in the stock network."""
    largest = {}
    handles = [
        neuron.register_forward_pre_hook(lambda n, given: largest.__setitem__(n, given[0].abs().max()))
        for _, neuron in model.neurons()
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for neuron, value in largest.items():
            neuron.threshold.fill_(1.1 * value)


@pytest.mark.parametrize(
    "case, sites",
    some(lambda case, sites: case in FEW and sites != "linear", CASES, ["mlp", "linear", "all"]),
    ids=named,
)
def test_accumulated_converges_to_the_ann(case, sites):
    """The error falls with the number of timesteps, as 1 / T, and nothing was calibrated for any of them."""
    settings = {"L": 64} if sites == "mlp" else STOCK
    model, inputs = backbones.model(*case, sites=sites, **settings).double(), backbones.batch(*case)
    if sites != "mlp":
        fit(model, inputs)
    ann = backbones.first_output(model(**inputs))
    errors = []
    for T in (4, 16, 32):
        with torch.no_grad(), model.running(T, "accumulated"):
            errors.append((backbones.first_output(model(**inputs)) - ann).abs().mean().item())
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.45 * errors[0]


def test_the_sum_of_spikes_stays_within_half_a_threshold_of_the_sum_of_currents():
    torch.manual_seed(0)
    theta = torch.tensor([0.7], dtype=torch.float64)
    means = torch.randn(16, 5000, dtype=torch.float64).mul(0.1).cumsum(0) / torch.arange(1, 17)[:, None]
    currents = difference(means, 16)
    inside = (currents.abs() < theta / 2).all(0)  # no step that one spike cannot answer
    assert inside.sum() > 1000
    emitted = integrate_and_fire(currents, theta, torch.full_like(theta, 0.5), 16, signed=True)
    distance = (emitted.cumsum(0) - currents.cumsum(0))[:, inside].abs()
    assert distance.max() <= theta / 2 + 1e-12
    torch.testing.assert_close(running_mean(currents, 16), means)


@pytest.mark.parametrize("sites", ["mlp", "linear", "all"])
@pytest.mark.parametrize("case", few(HEADS), ids=named)
def test_accumulated_exits_early_with_the_answer_of_fewer_steps(case, sites):
    if case[1] == "AutoModelForQuestionAnswering":
        pytest.skip("has two outputs")
    model = backbones.model(*case, sites=sites, **({} if sites == "mlp" else STOCK)).double()
    inputs = backbones.batch(*case)
    if sites == "all":  # the head encodes the average with as many levels as there are steps
        logits = model.early_exit(3, "accumulated", **inputs)
        with model.running(3, "accumulated"):
            torch.testing.assert_close(logits[-1], model(**inputs).logits, **EXACT)
        return
    for t, logits in enumerate(model.early_exit(3, "accumulated", **inputs), start=1):
        with model.running(t, "accumulated"):
            torch.testing.assert_close(logits, model(**inputs).logits, **EXACT)


GENERATING = {
    "accumulated-mlp": {"T": 3, "schedule": "accumulated"},
    "accumulated-all": {"T": 3, "schedule": "accumulated", "sites": "all", **STOCK},
    "stepwise-all": {"T": 3, "schedule": "stepwise", "sites": "all", **STOCK},
    "phase-all": {"T": 4, "schedule": "layerwise", "sites": "all", "code": "phase", **STOCK},
    "first-spike-all": {
        "T": 6,
        "schedule": "layerwise",
        "sites": "all",
        "code": "first_spike",
        "gain": "token",
        **STOCK,
    },
}


@pytest.mark.parametrize(
    "backbone, settings, beams",
    some(
        lambda backbone, settings, beams: backbone in ("gpt2", "qwen3") or (settings, beams) == ("accumulated-all", 1),
        CAUSAL,
        GENERATING,
        [1, 3],
    ),
)
def test_cached_generation_equals_uncached_with_left_padding(backbone, settings, beams):
    model = backbones.model(backbone, "AutoModelForCausalLM", **GENERATING[settings]).double()
    inputs = backbones.batch(backbone, "AutoModelForCausalLM", padding="left")
    inputs.pop("position_ids")
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    cached, again = model.generate(**inputs, **asked), model.generate(**inputs, **asked, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", CAUSAL)
def test_queries_are_encoded_by_every_attention(backbone, implementation):
    settings = {"sites": "all", "code": "phase", "T": 3, "schedule": "layerwise", **STOCK}
    model = backbones.model(backbone, "AutoModelForCausalLM", attn_implementation=implementation, **settings).double()
    inputs = backbones.batch(backbone, "AutoModelForCausalLM")
    other = backbones.model(backbone, "AutoModelForCausalLM", attn_implementation="eager", **settings).double()
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        difference = (model(**inputs).logits - other(**inputs).logits).abs()
    # A norm in float32 rounds otherwise, and some level flips.
    assert (difference < 1e-6).double().mean() > 0.8 and difference.max() < 2
    assert monitor.sites.keys() == {name for name, _ in model.neurons()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_queries_and_values_are_encoded_and_keys_are_not(backbone):
    model, inputs = (
        backbones.model(backbone, "AutoModel", sites="all", **STOCK),
        backbones.batch(backbone, "AutoModel"),
    )
    table, seen, projected = BACKBONES[backbone], {}, []
    block = trunk(model).get_submodule(table.blocks)[1]
    for name in ("query_site", "value_site"):
        site = getattr(block.get_submodule(table.core), name)
        site.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0]))
    for path in table.products[0].weights:
        block.get_submodule(path).register_forward_hook(lambda _layer, _given, output: projected.append(output))
    model(**inputs)
    query, _, value = projected if len(projected) > 1 else projected[0].chunk(3, dim=-1)
    assert torch.equal(seen["value_site"], value) and seen["query_site"].shape == query.shape
    if backbone != "qwen3":  # which norms its queries
        tokens = 1 if table.positions is None else None  # rotation leaves the first one as it is
        assert torch.equal(seen["query_site"][:, :tokens], query[:, :tokens])


@pytest.mark.parametrize("coded", some(lambda coded: coded in FEW_CODES, CODES_AND_GAINS))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_monitors_count_the_spikes_of_every_code(backbone, coded):
    case = (backbone, "AutoModelForSequenceClassification")
    model = backbones.model(*case, sites="all", schedule="layerwise", **coded, **STOCK)
    inputs = backbones.batch(*case)
    inputs = {name: value[:1] for name, value in inputs.items()}  # without padding
    counted = {}
    for name, neuron in model.neurons():
        neuron.register_forward_hook(
            lambda neuron, given, _out, name=name: counted.__setitem__(name, neuron.count_spikes(given[0]).sum())
        )
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        model(**inputs)
    for name, site in monitor.sites.items():
        assert site.spikes.sum().item() == counted[name].item() > 0
        assert site.rates.max() <= (1 / coded["T"] if coded["code"] == "first_spike" else 1)


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_gradients_reach_every_threshold(case):
    for settings in (
        {"T": 3, "schedule": "accumulated"},
        {"T": 3, "schedule": "layerwise", "code": "phase"},
        {"T": 6, "schedule": "layerwise", "code": "first_spike", "gain": "token"},
    ):
        model = backbones.model(*case, sites="all", **STOCK, **settings)
        backbones.first_output(model(**backbones.batch(*case))).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("threshold", "gain")):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_energy_counts_as_accumulates_what_gets_spikes_only(backbone):
    case = (backbone, "AutoModelForSequenceClassification")
    for sites in ("mlp", "linear", "all"):
        model = backbones.model(*case, sites=sites, **({} if sites == "mlp" else STOCK))
        fed = {(each.layer, each.product.name) for each in layout.products(model) if each.site is not None}
        operations = count_operations(model, 5, execution="layerwise", T=4, spike_rates=0.1)
        for each in operations:
            spiking = (each.layer, each.part) in fed or each.part == "neurons"
            assert (each.effective_macs == 0) == spiking or each.dense == 0
            assert (each.effective_acs > 0) == (spiking and each.part != "neurons")
        blocks = {name for layer, name in fed if layer == 1}
        everything = {"qkv", "attention output", "mlp in", "mlp out"}
        assert blocks == {"mlp": {"mlp out"}, "linear": everything, "all": everything | {"scores", "values"}}[sites]


def test_folding_feeds_every_layer_of_a_shared_site():
    model = backbones.model("llama", "AutoModelForCausalLM", sites="linear", L=8, T=4, schedule="stepwise").double()
    with torch.no_grad():
        for _, neuron in model.neurons():
            neuron.threshold.uniform_(0.5, 1.5)
    inputs = backbones.batch("llama", "AutoModelForCausalLM")
    before = model(**inputs).logits
    fold_thresholds(model)
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"T": 33}, "`T` must be at most 32 with code 'rate', got 33"),
        ({"T": 17, "code": "phase", "schedule": "layerwise"}, "`T` must be at most 16 with code 'phase', got 17"),
        ({"T": 4, "code": "phase"}, "`schedule` must be 'layerwise' with code 'phase'.*got 'stepwise'"),
        ({"T": 4, "gain": "token", "schedule": "accumulated"}, "`schedule` must be 'layerwise' with gain 'token'"),
        ({"activation": "stock"}, "`activation` must be 'qcfs' where `sites` is 'mlp'.*'linear' or 'all'"),
        ({"L": None}, "`L` must be an integer where neurons replace an activation.*`activation` 'stock'"),
        ({"code_base": 1}, "`code_base` must be a finite number above 1"),
        ({"sites": "everywhere"}, "`sites` must be one of 'mlp', 'linear', 'all', got 'everywhere'"),
        ({"schedule": "accumulate"}, "`schedule` must be one of 'stepwise', 'layerwise', 'accumulated'"),
    ],
)
def test_settings_that_do_not_go_together_say_what_would(settings, message):
    with pytest.raises(ValueError, match=message):
        backbones.model("gpt2", "AutoModelForCausalLM", **settings)


def test_a_model_stays_as_it_was_when_a_mode_is_refused():
    model = backbones.model(
        "gpt2", "AutoModelForCausalLM", sites="all", code="phase", T=4, schedule="layerwise", **STOCK
    )
    with pytest.raises(ValueError, match="layerwise"):
        model.set_timesteps(5, "stepwise")
    assert (model.config.T, model.config.schedule) == (4, "layerwise")


def test_the_settings_survive_saving(tmp_path):
    for backbone in BACKBONES:
        settings = {"sites": "all", "code": "first_spike", "code_base": 1.2, "gain": "token", "T": 6, **STOCK}
        model = backbones.model(backbone, "AutoModelForSequenceClassification", schedule="layerwise", **settings)
        model.save_pretrained(tmp_path / backbone)
        again = FASConfig.from_pretrained(tmp_path / backbone)
        loaded = type(model).from_pretrained(tmp_path / backbone)
        inputs = backbones.batch(backbone, "AutoModelForSequenceClassification")
        assert (again.L, again.code, again.placed) == (None, "first_spike", model.config.placed)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"T": 4, "schedule": "stepwise"},
        {"T": 4, "schedule": "accumulated"},
        {"T": 4, "schedule": "layerwise"},
        {"T": 3, "schedule": "layerwise", "code": "phase", "gain": "token"},
        {"T": 6, "schedule": "layerwise", "code": "first_spike"},
    ],
    ids=["stepwise", "accumulated", "layerwise", "phase", "first-spike"],
)
def test_the_trains_of_a_site_are_the_spikes_it_counts(settings):
    model = backbones.model("llama", "AutoModelForCausalLM", sites="all", **STOCK, **settings)
    seen = []
    for _, neuron in model.neurons():
        neuron.register_forward_hook(
            lambda neuron, given, _out: seen.append((neuron.trains(given[0]), neuron.count_spikes(given[0])))
        )
    with torch.no_grad():
        model(**backbones.batch("llama", "AutoModelForCausalLM"))
    assert len(seen) == len(model.neurons())
    for trains, counts in seen:
        assert set(trains.unique().tolist()) <= {-1, 0, 1} and trains.any()
        total = trains.abs().flatten(0, 1) if len(counts) == len(trains.flatten(0, 1)) else trains.abs().sum(0)
        assert torch.equal(total, counts)


@pytest.mark.parametrize(
    "backbone, settings",
    some(
        lambda backbone, settings: backbone in ("gpt2", "llama") or settings["schedule"] == "accumulated",
        ["gpt2", "bert", "opt", "llama", "qwen3"],
        [
            {"code": "phase", "T": 4, "schedule": "layerwise"},
            {"code": "first_spike", "T": 6, "schedule": "layerwise"},
            {"T": 5, "schedule": "layerwise"},
            {"T": 5, "schedule": "stepwise"},
            {"T": 5, "schedule": "accumulated"},
        ],
    ),
)
def test_folding_every_product_changes_nothing_but_what_travels(backbone, settings, tmp_path):
    case = (backbone, "AutoModelForSequenceClassification" if backbone == "bert" else "AutoModelForCausalLM")
    made = {"sites": "all", "activation": "stock", "L": None, "tie_word_embeddings": True}
    model = backbones.model(*case, **made, **settings).double()
    model.begin_calibration(settings["T"])
    with torch.no_grad():
        for _, neuron in model.neurons():
            neuron.fine_threshold.uniform_(0.5, 1.5)
    inputs = backbones.batch(*case)
    before, embeddings = model(**inputs).logits, model.get_input_embeddings().weight.clone()
    with SpikeMonitor(model) as unfolded:
        model(**inputs)
    fold_thresholds(model)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    with SpikeMonitor(model) as monitor:
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-9, rtol=1e-9)
    assert monitor.spike_rates() == pytest.approx(unfolded.spike_rates())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="float64").eval()
    torch.testing.assert_close(again(**inputs).logits, before, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="`T` must be at least 1 once thresholds are folded"):
        again.set_timesteps(0)


def test_folding_a_stock_network_asks_for_timesteps():
    model = backbones.model("gpt2", "AutoModelForCausalLM", sites="all", activation="stock", L=None)
    with pytest.raises(ValueError, match="`T` must be at least 1 to fold a model without levels"):
        fold_thresholds(model)


@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_a_network_has_the_hooks_of_rows_where_its_code_has_such_schedules(case):
    """A token in a phase code pays for none; a network whose code becomes a rate gets them, once."""
    inputs = backbones.batch(*case)
    settings = {"sites": "all", "initial_threshold": 1.0, **STOCK}

    def hooks(model):
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())

    phase, rate = (backbones.model(*case, code=code, schedule="layerwise", **settings) for code in ("phase", "rate"))
    assert hooks(phase) < hooks(rate)
    copied = copy.deepcopy(phase)
    for model in (phase, copied):
        model.config.code = "rate"
        for T, schedule in ((4, "accumulated"), (3, "stepwise"), (4, "layerwise")):
            expected, found = (each.set_timesteps(T, schedule)(**inputs) for each in (rate, model))
            assert torch.equal(backbones.first_output(found), backbones.first_output(expected))
        assert hooks(model) == hooks(rate)


@torch.no_grad()
@pytest.mark.parametrize("case", few(CASES), ids=named)
def test_every_site_of_a_copy_is_its_own(case):
    inputs, settings = backbones.batch(*case), {"code": "phase", "schedule": "layerwise", "sites": "all", **STOCK}
    model = backbones.model(*case, T=4, initial_threshold=1.0, **settings)
    before = backbones.first_output(model(**inputs))
    copied = copy.deepcopy(model)
    for name, neuron in copied.neurons():
        neuron.threshold.mul_(3)
        assert not torch.equal(backbones.first_output(copied(**inputs)), before), name
        neuron.threshold.div_(3)
    assert torch.equal(backbones.first_output(copied(**inputs)), before)
    assert torch.equal(backbones.first_output(model(**inputs)), before)
