"""The coarse search as it runs when nothing is said, on networks whose best pair is known."""

import pytest
import torch

import tiny
from training.calibrate.coarse import coarse_search, start_calibration
from training.calibrate.loss import calibration_loss


def constant_sites(inputs: list[torch.Tensor], T: int, granularity: str):
    """A GPT-2 of threshold 1 with a layer for each of `inputs`, `(D,)`, which its neurons read at every token."""
    model = tiny.model("gpt2", n_layer=len(inputs), n_inner=len(inputs[0]), initial_threshold=1.0, L=100)
    with torch.no_grad():
        for block, values in zip(model.transformer.h, inputs, strict=True):
            block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.bias.copy_(values)
    return model.begin_calibration(T, granularity)


def random_model(seed: int, T: int):
    """The same weights for a seed, in whatever order the model makes them."""
    model, generator = tiny.model("gpt2"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.begin_calibration(T)


# Constant inputs, in units of the threshold, to whose value the average of 8 steps comes nearest at this scale alone.
BEST_AT_8_STEPS = {0.1: 0.01, 0.15: 0.13, 0.2: 0.17, 0.25: 0.16, 0.3: 0.27, 0.4: 0.34, 0.5: 0.32, 0.6: 0.55}
BEST_AT_8_STEPS |= {0.8: 0.69, 1.0: 0.98, 1.2: 0.93}


def test_scales_from_a_tenth_to_above_the_threshold_are_found():
    model = constant_sites([torch.full((4,), x) for x in BEST_AT_8_STEPS.values()], 8, "layer")
    found = coarse_search(model, tiny.batch("gpt2"), variance_weights=[0.0], progress=False)
    assert [site["scale"] for site in found.values()] == pytest.approx(list(BEST_AT_8_STEPS))


@pytest.mark.parametrize("seed, T, weight", [(1, 4, 0.0), (20, 6, 0.03), (3, 2, 0.1), (4, 2, 0.3)])
def test_the_weight_of_the_variance_that_serves_the_output_is_kept(seed, T, weight):
    batch, models = tiny.batch("gpt2"), [random_model(seed, T) for _ in range(2)]
    found = coarse_search(models[0], batch, progress=False)
    assert {site["variance_weight"] for site in found.values()} == {weight}
    coarse_search(models[1], batch, variance_weights=[0.0 if weight else 0.3], progress=False)
    with torch.no_grad():
        kept, other = (float(calibration_loss(model, batch).output) for model in models)
    assert kept < other


def test_a_neuron_follows_its_site_until_16_tokens_of_its_own():
    """One neuron of 128 reads half the threshold, the others all of it; a step emits the scaled threshold or nothing.

    The wrong one of two scales costs a neuron 1/4, so that its N tokens outweigh the 16 of the site's average from
    N / 4 > 16 (127 - 1) / (4 · 128), N > 15.75, on.
    """
    for length, scale in ((2, 1.0), (15, 1.0), (16, 0.5)):
        values = torch.ones(128)
        values[0] = 0.5
        model = constant_sites([values], 1, "neuron")
        settings = {"scales": (0.5, 1.0), "potentials": (0.5,), "variance_weights": [0.0], "progress": False}
        coarse_search(model, {"input_ids": torch.arange(1, length + 1)[None]}, **settings)
        ((_, neuron),) = model.neurons()
        assert neuron.fine_threshold.tolist() == [scale] + [1.0] * 127, length


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_published_start_is_six_tenths_of_every_threshold_charged_to_a_fifth(kind):
    model = tiny.model(kind)
    with torch.no_grad():
        for i, (_, neuron) in enumerate(model.neurons()):
            neuron.threshold.fill_(0.7 + i)
    stages = start_calibration(model.begin_calibration(3), tiny.batch(kind), "published")
    assert list(stages) == ["uncalibrated", "coarse"]
    for _, neuron in model.neurons():
        assert torch.equal(neuron.fine_threshold, (0.6 * neuron.threshold).expand(neuron.width))
        assert torch.equal(neuron.initial_potential, torch.full((neuron.width,), 0.2))
