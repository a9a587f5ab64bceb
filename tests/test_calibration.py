"""Calibration: what its loss sees, what trains, the coarse search, folding."""

import copy
import inspect
import json

import pytest
import torch

import backbones
import tiny
from modeling_fas import FASBertModel
from training.calibrate.coarse import coarse_search, set_pair
from training.calibrate.folding import fold_thresholds
from training.calibrate.loss import (
    calibration_loss,
    describe_sites,
    freeze_for_calibration,
    save_record,
)


GRANULARITIES = ("layer", "neuron", "position")


def calibrated(kind: str, T: int = 4, granularity: str = "neuron", seed: int = 0, **settings):
    """A tiny model with fine parameters away from their start, differing between neurons and positions."""
    model = tiny.model(kind, seed, **settings)
    model.begin_calibration(T, granularity, tiny.POSITIONS if granularity == "position" else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, neuron in model.neurons():
            noise = torch.rand(neuron.fine_threshold.shape, generator=generator)
            neuron.fine_threshold.mul_(0.6 + 0.8 * noise)
            neuron.initial_potential.add_(0.4 * noise - 0.2)
    return model


def gradients(model, inputs, **settings):
    model.zero_grad()
    parts = calibration_loss(model, inputs, **settings)
    parts.loss.backward()
    return parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def checkpoint(model, use_reentrant: bool) -> None:
    """Turn gradient checkpointing on; transformers 5.23 renames it, arguments included or not."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    name = next(each for each in inspect.signature(enable).parameters if each.endswith("checkpointing_kwargs"))
    enable(**{name: {"use_reentrant": use_reentrant}})


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fine_parameters_alone_train_and_all_of_them(kind, granularity):
    model = calibrated(kind, granularity=granularity)
    trainable = freeze_for_calibration(model)
    before = copy.deepcopy(model.state_dict())
    assert len(trainable) == 2 * len(model.neurons())
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    gradients(model, tiny.batch(kind))
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.endswith(("fine_threshold", "_potential"))}
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_padding_takes_no_part(kind, schedule):
    model = calibrated(kind, schedule=schedule).double()
    freeze_for_calibration(model)
    batch = tiny.batch(kind)
    longer = {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}
    garbage = torch.randint(1, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(5))
    longer["input_ids"] = torch.cat([longer["input_ids"], garbage], 1)
    longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.zeros_like(garbage)], 1)
    parts, expected = gradients(model, batch)
    padded, actual = gradients(model, longer)
    # float64, as a rounding difference must not cross a threshold
    torch.testing.assert_close(padded.sites | {"output": padded.output}, parts.sites | {"output": parts.output})
    torch.testing.assert_close(actual, expected)
    rows = [{name: value[i : i + 1, :n] for name, value in longer.items()} for i, n in enumerate((9, 6, 4))]
    split = sum(float(calibration_loss(model, row, num_rows=3, num_tokens=19).loss) for row in rows)
    assert split == pytest.approx(float(parts.loss), rel=1e-6)  # its parts are summed in float32


def test_output_of_a_causal_model_is_judged_where_a_next_token_follows():
    model = calibrated("gpt2")
    inputs = tiny.batch("gpt2", padding="left")
    with torch.no_grad():
        parts = calibration_loss(model, inputs)
        teacher, student = parts.teacher_logits.softmax(-1), parts.logits.softmax(-1)
        divergence = (teacher * (teacher / student).log()).sum(-1)
        expected = torch.cat([divergence[0, :8], divergence[1, 3:8], divergence[2, 5:8]]).mean()
    assert float(parts.output) == pytest.approx(float(expected), rel=1e-4)


def test_regression_compares_outputs():
    model = calibrated("classify", num_labels=1)
    with torch.no_grad():
        parts = calibration_loss(model, tiny.batch("classify"))
    assert float(parts.output) == pytest.approx(float((parts.logits - parts.teacher_logits).square().mean()))


def test_weights_scale_the_parts_and_a_weight_of_zero_keeps_nan_out():
    model = calibrated("classify")
    batch = tiny.batch("classify")
    with torch.no_grad():
        parts = calibration_loss(model, batch, site_weight=3.0, output_weight=0.5)
        sites, variances = sum(parts.sites.values()), sum(parts.variances.values())
        assert float(parts.loss) == pytest.approx(float(3 * (sites + 0.1 * variances) + 0.5 * parts.output))
        parts = calibration_loss(model, batch, site_weight=10.0, variance_weight=0.5)
        assert float(parts.loss) == pytest.approx(float(10 * (sites + 0.5 * variances) + parts.output))
        parts = calibration_loss(model, batch, reduction="published")
        assert float(parts.loss) == pytest.approx(float(sum(parts.sites.values()) + parts.output))
        model.classifier.bias.fill_(torch.nan)
        assert calibration_loss(model, batch, output_weight=0).loss.isfinite()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    model = calibrated(kind)
    freeze_for_calibration(model)
    plain, expected = gradients(model.train(), tiny.batch(kind))
    checkpoint(model, use_reentrant=False)
    checkpointed, actual = gradients(model.train(), tiny.batch(kind))
    assert torch.equal(plain.loss, checkpointed.loss)
    torch.testing.assert_close(actual, expected)


def test_reentrant_checkpointing_is_refused():
    model = calibrated("gpt2")
    freeze_for_calibration(model)
    checkpoint(model, use_reentrant=True)
    model.train().enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        calibration_loss(model, tiny.batch("gpt2"))


def hooks(model):
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]


def test_nothing_stays_on_the_modules():
    model = calibrated("gpt2")
    freeze_for_calibration(model)
    before = hooks(model)
    gradients(model, tiny.batch("gpt2"))
    copy.deepcopy(model)
    assert hooks(model) == before
    assert model.config.T == 4
    model.transformer.h[1].attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration_loss(model, tiny.batch("gpt2"))
    assert not any(neuron._forward_hooks for _, neuron in model.neurons())


def test_dropout_is_off():
    model = tiny.model("classify", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model.begin_calibration(2)
    freeze_for_calibration(model)
    losses = {calibration_loss(model.train(), tiny.batch("classify")).loss.item() for _ in range(3)}
    assert losses == {calibration_loss(model.eval(), tiny.batch("classify")).loss.item()}


def test_graph_starts_at_the_first_site():
    model = calibrated("gpt2")
    freeze_for_calibration(model)
    seen = {}
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *args: seen.update(before=args[2].requires_grad))
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda *args: seen.update(after=args[2].requires_grad))
    calibration_loss(model, tiny.batch("gpt2"))
    assert seen == {"before": False, "after": True}


@pytest.mark.parametrize("act", [calibration_loss, coarse_search, lambda model, _: freeze_for_calibration(model)])
def test_a_model_without_fine_parameters_is_refused(act):
    with pytest.raises(ValueError, match="begin_calibration"):
        act(tiny.model("gpt2"), tiny.batch("gpt2"))


@pytest.mark.parametrize(
    "kind, schedule, granularity",
    [
        ("gpt2", "stepwise", "neuron"),
        ("mlm", "stepwise", "layer"),
        ("classify", "stepwise", "position"),
        ("classify", "layerwise", "neuron"),
    ],
)
def test_coarse_search_reports_the_error_it_leaves(kind, schedule, granularity):
    model = tiny.model(kind, schedule=schedule)
    model.begin_calibration(3, granularity, tiny.POSITIONS if granularity == "position" else None)
    batch = tiny.batch(kind)
    found = coarse_search(
        model, batch, per_neuron=False, scales=(0.5, 0.75, 1.0), potentials=(0.2, 0.5), progress=False
    )
    assert list(found) == [name for name, _ in model.neurons()]
    with torch.no_grad():
        sites = calibration_loss(model, batch).sites
    for name, neuron in model.neurons():
        assert torch.allclose(neuron.fine_threshold, found[name]["scale"] * neuron.threshold)
        assert neuron.initial_potential.unique().item() == pytest.approx(found[name]["initial_potential"])
        assert float(sites[name]) == pytest.approx(found[name]["error"], rel=1e-5)
        assert found[name]["error"] <= found[name]["error_before"]


@pytest.mark.parametrize("granularity", ["layer", "neuron", "position"])
def test_variance_is_that_of_the_spike_trains(granularity):
    model, batch, spread = calibrated("gpt2", granularity=granularity), tiny.batch("gpt2"), {}

    def keep(neuron, _inputs, output):
        if neuron.T:
            steps = output.unflatten(0, (neuron.T, -1))
            spread[neuron] = steps.var(0, unbiased=False)[batch["attention_mask"].bool()].mean()

    with torch.no_grad():
        handles = [neuron.register_forward_hook(keep) for _, neuron in model.neurons()]
        variances = calibration_loss(model, batch).variances
        for name, neuron in model.neurons():
            assert float(variances[name]) == pytest.approx(float(spread[neuron]), rel=1e-5)
            assert variances[name] > 0
        for handle in handles:
            handle.remove()
        model.config.schedule = "layerwise"
        model.set_timesteps(2, "layerwise")
        assert not any(calibration_loss(model, batch).variances.values())


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_coarse_search_finds_the_best_pair_of_every_site_in_turn(weight):
    model = tiny.model("gpt2")
    model.begin_calibration(3)
    batch, grid = tiny.batch("gpt2"), [(scale, start) for scale in (0.5, 0.7, 1.0) for start in (0.2, 0.5)]
    expected = copy.deepcopy(model)
    for name, neuron in expected.neurons():
        errors = {}
        for pair in grid:
            set_pair(neuron, *pair)
            with torch.no_grad():
                parts = calibration_loss(expected, batch)
            errors[pair] = float(parts.sites[name] + weight * parts.variances[name])
        set_pair(neuron, *min(errors, key=errors.__getitem__))
    settings = {"scales": (0.5, 0.7, 1.0), "potentials": (0.2, 0.5), "variance_weights": [weight], "progress": False}
    coarse_search(model, batch, per_neuron=False, **settings)
    for (_, neuron), (_, other) in zip(model.neurons(), expected.neurons(), strict=True):
        assert torch.equal(neuron.fine_threshold, other.fine_threshold)
        assert torch.equal(neuron.initial_potential, other.initial_potential)


@pytest.mark.parametrize("kind", backbones.some(lambda kind: kind == "classify", tiny.KINDS))
def test_coarse_search_keeps_the_variance_weight_of_the_nearest_output(kind):
    batch, weights, tried = tiny.batch(kind), (0.0, 0.1, 1.0, 10.0), {}
    for weight in weights:
        model = tiny.model(kind).begin_calibration(3)
        coarse_search(model, batch, variance_weights=[weight], progress=False)
        with torch.no_grad():
            tried[weight] = float(calibration_loss(model, batch).output), model
    best = min(tried, key=lambda weight: tried[weight][0])
    assert len({error for error, _ in tried.values()}) > 1
    for order in (weights, weights[::-1]):
        model = tiny.model(kind).begin_calibration(3)
        found = coarse_search(model, batch, variance_weights=order, progress=False)
        assert {site["variance_weight"] for site in found.values()} == {best}
        for (_, neuron), (_, other) in zip(model.neurons(), tried[best][1].neurons(), strict=True):
            assert torch.equal(neuron.fine_threshold, other.fine_threshold)
            assert torch.equal(neuron.initial_potential, other.initial_potential)


@pytest.mark.parametrize(
    "T, schedule, granularity",
    [
        (4, "stepwise", "neuron"),
        (4, "stepwise", "layer"),
        (4, "stepwise", None),
        (0, "stepwise", "neuron"),
        (1, "layerwise", "neuron"),
    ],
)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_folding_leaves_outputs_and_sends_zeros_and_ones(kind, T, schedule, granularity, tmp_path):
    model = calibrated(kind, granularity=granularity) if granularity else tiny.model(kind)
    model = model.double().set_timesteps(T, schedule)
    batch = tiny.batch(kind)
    with torch.no_grad():
        expected = model(**batch).logits
        fold_thresholds(model)
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        sent = {}
        for name, neuron in model.neurons():
            neuron.register_forward_hook(lambda _m, _i, output, name=name: sent.__setitem__(name, output))
        torch.testing.assert_close(model(**batch).logits, expected)
    assert model.config.folded
    for name, output in sent.items():
        if T and schedule == "stepwise" and not name.startswith("cls."):
            assert output.unique().tolist() == [0.0, 1.0], name


def test_what_cannot_be_folded_says_why():
    with pytest.raises(ValueError, match="position"):
        fold_thresholds(calibrated("gpt2", granularity="position"))
    model = calibrated("gpt2")
    fold_thresholds(model)
    with pytest.raises(ValueError, match="folded"):
        fold_thresholds(model)
    with pytest.raises(ValueError, match="folded"):
        calibration_loss(model, tiny.batch("gpt2"))
    with pytest.raises(ValueError, match="folded"):
        model.begin_calibration(2)
    with pytest.raises(ValueError, match="head"):
        fold_thresholds(FASBertModel(tiny.config("classify")))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_generation_after_calibration_is_the_same_with_a_cache(schedule, granularity):
    model = calibrated("gpt2", granularity=granularity, schedule=schedule).double()
    coarse_search(model, tiny.batch("gpt2"), scales=(0.5, 0.8), potentials=(0.3,), progress=False)
    prompt = {name: tiny.batch("gpt2", padding="left")[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**prompt, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits, plain.logits)


def test_what_one_length_calibrated_serves_every_other():
    model = tiny.model("gpt2")
    model.begin_calibration(4)
    batch = tiny.batch("gpt2")
    coarse_search(model, batch, scales=(0.5, 0.8, 1.0), potentials=(0.2, 0.5), progress=False)
    ids = torch.randint(1, tiny.VOCABULARY, (2, tiny.POSITIONS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model.double()(input_ids=ids).logits
        for length in (1, 5, 16):
            torch.testing.assert_close(model(input_ids=ids[:, :length]).logits, whole[:, :length])


def test_the_record_says_what_was_done_to_every_site(tmp_path):
    model, batch = tiny.model("classify"), tiny.batch("classify")
    model.begin_calibration(4)
    stages = {"uncalibrated": describe_sites(model, batch)}
    found = coarse_search(model, batch, scales=(0.5, 0.8, 1.0), potentials=(0.2, 0.5), progress=False)
    stages["coarse"] = describe_sites(model, batch)
    save_record(tmp_path, model, stages)
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert (record["T"], record["granularity"], record["schedule"]) == (4, "neuron", "stepwise")
    assert list(record["stages"]) == ["uncalibrated", "coarse"]
    for name, site in record["stages"]["coarse"].items():
        assert site["scale"] == pytest.approx(found[name]["scale"])
        assert site["initial_potential"] == pytest.approx(found[name]["initial_potential"])
        assert site["error"] == pytest.approx(found[name]["error"], rel=1e-5)
        assert record["stages"]["uncalibrated"][name]["scale"] == 1


def test_search_by_neuron_gives_each_its_own_pair_and_silent_ones_that_of_their_site():
    model, by_site = tiny.model("gpt2"), tiny.model("gpt2")
    ids = torch.randint(1, tiny.VOCABULARY, (8, tiny.POSITIONS), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids}
    settings = {"scales": (0.5, 0.7, 1.0), "potentials": (0.2, 0.5), "variance_weights": [0.0], "progress": False}
    for each in (model, by_site):
        with torch.no_grad():
            bias = each.transformer.h[0].mlp.c_fc.bias
            bias.copy_(torch.linspace(-1, 3, len(bias)))  # of different ranges
            each.transformer.h[0].mlp.c_fc.weight.mul_(torch.linspace(0.1, 1, len(bias)))
            bias[:4] = -100.0  # silent neurons
    model.begin_calibration(3)
    found = coarse_search(model, batch, **settings)
    coarse_search(by_site.begin_calibration(3), batch, per_neuron=False, **settings)
    neuron, other = model.transformer.h[0].mlp.act, by_site.transformer.h[0].mlp.act
    assert torch.equal(neuron.fine_threshold[:4], other.fine_threshold[:4])
    assert torch.equal(neuron.initial_potential[:4], other.initial_potential[:4])
    assert any(len(each.fine_threshold.unique()) > 1 for _, each in model.neurons())
    with torch.no_grad():
        sites = calibration_loss(model, batch).sites
        first = next(iter(sites))
        assert float(sites[first]) <= float(calibration_loss(by_site, batch).sites[first])
    for name, error in sites.items():
        assert float(error) == pytest.approx(found[name]["error"], rel=1e-5)
    with pytest.raises(ValueError, match="per_neuron"):
        coarse_search(tiny.model("gpt2").begin_calibration(3, "layer"), batch, per_neuron=True)
