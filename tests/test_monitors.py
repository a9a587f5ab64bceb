"""Monitors against counts from all activations kept, in every mode; and that they change and keep nothing."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from backbones import some
from training.evaluate import monitors
from training.evaluate.monitors import RATE_BINS, SiteErrors, SpikeMonitor


TOKENS = 9 + 6 + 4  # of the batch, without padding


def every_output(model, **inputs):
    """What every site emits, kept."""
    kept = {}
    handles = [
        neuron.register_forward_hook(lambda module, args, output, name=name: kept.setdefault(name, output))
        for name, neuron in model.neurons()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return kept


def calibrate(model, granularity):
    """Fine thresholds and initial potentials that all differ."""
    model.begin_calibration(3, granularity, length=9)
    for _, neuron in model.neurons():
        neuron.fine_threshold.data.uniform_(0.3, 1.0)
        neuron.initial_potential.data.uniform_(0.2, 0.8)


@pytest.mark.parametrize(
    "kind, schedule, granularity",
    some(
        lambda kind, schedule, granularity: kind == "classify" or granularity == "neuron",
        tiny.KINDS,
        ["stepwise", "layerwise"],
        [None, "layer", "neuron", "position"],
    ),
)
def test_counts_are_those_of_all_activations(kind, granularity, schedule, monkeypatch):
    monkeypatch.setitem(monitors.CHUNK, "cpu", 100)  # several chunks
    model, batch, T = tiny.model(kind), tiny.batch(kind), 3
    if granularity:
        calibrate(model, granularity)
    kept = every_output(model.set_timesteps(T, schedule), **batch)
    with SpikeMonitor(model, densities=True) as monitor, torch.no_grad():
        model(**batch)
    real = batch["attention_mask"].bool()
    assert list(monitor.sites) == [name for name, _ in model.neurons()]
    for name, neuron in model.neurons():
        threshold = neuron.threshold if granularity is None else neuron.fine_threshold  # 9 positions, 9 rows
        values = kept[name].unflatten(0, (-1, 3)) / threshold  # (T, B, …); layerwise (1, B, …), the average over T
        values = values[:, real] if values.dim() == 4 else values
        spikes = (values * (1 if schedule == "stepwise" else T)).round()
        site = monitor.sites[name]
        assert torch.equal(site.spikes, spikes.sum((0, 1)).double())
        assert torch.equal(site.active, (spikes > 0).sum((0, 1)).double())
        assert (site.steps, site.values) == (T * spikes.shape[1], spikes.shape[0] * spikes.shape[1])
        assert 0 < site.rate < 1


def test_totals():
    model, batch = tiny.model("classify").set_timesteps(4), tiny.batch("classify")
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(**batch)
    spikes = sum(site.spikes.sum() for site in monitor.sites.values())
    assert monitor.spike_rate == pytest.approx(spikes.item() / (4 * (3 * TOKENS * 48 + 3 * 32)))


def test_densities_only_if_asked_for():
    model = tiny.model("gpt2")
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(tiny.batch("gpt2")["input_ids"])
    assert set(monitor.densities().values()) == {None}
    assert monitor.spike_rate > 0


def test_ann_counts_as_layerwise_at_T_equal_L():
    model, batch = tiny.model("gpt2", L=4), tiny.batch("gpt2")
    ann, layerwise = SpikeMonitor(model, densities=True), SpikeMonitor(model, densities=True)
    with torch.no_grad():
        with ann:
            model(**batch)
        with layerwise:
            model.set_timesteps(4, "layerwise")(**batch)
    assert ann.spike_rates() == layerwise.spike_rates()
    assert ann.densities() == layerwise.densities()
    assert all(ann.densities()[name] >= rate for name, rate in ann.spike_rates().items())


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_around_generate(schedule):
    """Left-padded rows, a cache: the prompt counts without its padding, and every token fed back once."""
    model = tiny.model("gpt2").set_timesteps(3, schedule)
    ids = torch.randint(1, tiny.VOCABULARY, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, **settings)
    with SpikeMonitor(model) as monitor:
        watched = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(plain, watched)
    assert {site.steps for site in monitor.sites.values()} == {3 * (8 + 2 * 3)}
    with SpikeMonitor(model) as beams:
        model.generate(ids, attention_mask=mask, num_beams=2, **settings)
    assert {site.steps for site in beams.sites.values()} == {3 * 2 * (8 + 2 * 3)}


def hooks_of(module):
    return list(module._forward_hooks), list(module._forward_pre_hooks)


def test_calls_add_up_and_nothing_stays():
    model, batch = tiny.model("gpt2").set_timesteps(3), tiny.batch("gpt2")
    before, hooks = model(**batch).logits, [*map(hooks_of, model.modules())]
    monitor = SpikeMonitor(model)
    for expected in (3 * TOKENS, 6 * TOKENS):
        with monitor, torch.no_grad():
            assert torch.equal(model(**batch).logits, before)
        assert {site.steps for site in monitor.sites.values()} == {expected}
    with pytest.raises(RuntimeError, match="on purpose"), monitor:
        raise RuntimeError("on purpose")
    assert [*map(hooks_of, model.modules())] == hooks
    held = [value for site in monitor.sites.values() for value in vars(site).values() if torch.is_tensor(value)]
    assert all(value.numel() == 4 * 32 for value in held)


def test_gradients_pass():
    model, batch = tiny.model("classify").set_timesteps(2), tiny.batch("classify")
    model(**batch).logits.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with SpikeMonitor(model):
        model(**batch).logits.sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, batch = tiny.model("gpt2").to(dtype).set_timesteps(3, "layerwise"), tiny.batch("gpt2")
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(**batch)
    for site in monitor.sites.values():
        assert torch.equal(site.spikes, site.spikes.round())
        assert (site.spikes <= site.steps).all()


def test_summary_of_dead_and_saturated_neurons():
    model, batch = tiny.model("gpt2"), tiny.batch("gpt2")
    calibrate(model, "neuron")
    for _, neuron in model.neurons():
        neuron.fine_threshold.data[:10] = 1e3
        neuron.fine_threshold.data[10:20] = 1e-4
        neuron.initial_potential.data[10:20] = 1e6  # fires whatever comes
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model.set_timesteps(3)(**batch)
    for site in monitor.sites.values():
        summary = site.summary()
        assert summary["neurons"] == sum(summary["histogram"]) == 4 * 32
        assert summary["dead"] == summary["histogram"][0] >= 10
        assert 10 <= summary["saturated"] <= summary["histogram"][-1]
        assert len(summary["histogram"]) == len(RATE_BINS)


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_site_errors(schedule):
    model, batch, T = tiny.model("classify", L=4), tiny.batch("classify"), 3
    calibrate(model, "neuron")
    with SiteErrors(model) as errors, torch.no_grad():
        model.set_timesteps(0)(**batch)
        model.set_timesteps(T, schedule)(**batch)
    expected = every_output(model.set_timesteps(0), **batch)
    found = every_output(model.set_timesteps(T, schedule), **batch)
    real = batch["attention_mask"].bool()
    for name, target in expected.items():
        average = found[name].unflatten(0, (-1, 3)).mean(0)
        chosen = real if target.dim() == 3 else slice(None)
        relative = (average - target)[chosen].norm() / target[chosen].norm()
        assert errors.relative()[name] == pytest.approx(relative.item(), rel=1e-4)


def test_site_errors_vanish_layerwise_at_T_equal_L():
    model, batch = tiny.model("classify", L=4), tiny.batch("classify")
    with SiteErrors(model) as errors, torch.no_grad():
        for T in (0, 4):
            model.set_timesteps(T, "layerwise")(**batch)
    assert set(errors.relative().values()) == {0.0}


def test_site_errors_need_the_ann_first():
    model = tiny.model("classify").set_timesteps(2)
    with pytest.raises(ValueError, match="T = 0 first"), SiteErrors(model):
        model(**tiny.batch("classify"))


def test_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="`model` must be a FAS model, got GPT2LMHeadModel"):
        SpikeMonitor(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30)))
