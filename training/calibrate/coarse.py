"""Coarse calibration: scales of the thresholds and initial potentials by search, front to back, no gradient."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm

from neurons_fas import MIN_THRESHOLD, integrate_and_fire, spike_rate
from sites_fas import FASNeuron

from ..layout import pooled
from .conversion import fit_thresholds
from .loss import answer, check_calibratable, describe_sites, error_of_output, real_tokens, recorded


PUBLISHED_PAIR = (0.6, 0.2)
SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)
POTENTIALS = (0.2, 0.35, 0.5, 0.65, 0.8)
VARIANCE_WEIGHTS = (0.0, 0.03, 0.1, 0.3)
# A neuron follows its site unless its own tokens say otherwise: so many further ones count as the site's average.
PRIOR_TOKENS = 16


@torch.no_grad()
def set_pair(neuron: FASNeuron, scale: float | torch.Tensor, potential: float | torch.Tensor) -> None:
    """Set the fine thresholds of a site to `scale · threshold` and its initial potentials to `potential`.

    Args:
        neuron: With fine parameters.
        scale: One number, or one per neuron, `(D,)`.
        potential: In the same way.
    """
    neuron.fine_threshold.copy_(scale * neuron.threshold)
    neuron.initial_potential.copy_(torch.as_tensor(potential))


@torch.no_grad()
def coarse_search(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    *,
    per_neuron: bool | None = None,
    scales: Sequence[float] = SCALES,
    potentials: Sequence[float] = POTENTIALS,
    variance_weights: Sequence[float] = VARIANCE_WEIGHTS,
    max_tokens: int = 512,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Choose for every site the pair (scale of the threshold, initial potential) that serves the network best.

    One forward pass of the ANN records the activation that each site should have. One pass of the spiking network
    then stops before each site: with what the calibrated sites before it deliver, every pair of the grid is run, and
    the best one is set before the pass goes on. Best is the least squared error of the time average, plus a weight
    times the variance over time: LayerNorm and softmax see single timesteps, so that an average made of few large
    spikes serves them worse than the same average made of many small ones. How much worse depends on the network: the
    pass is made with each of `variance_weights`, and the thresholds whose output is nearest to the ANN's are kept.

    Args:
        model: With fine parameters; left at `calib_T`.
        inputs: Of the model, `(B, S)`, without labels or with: they are not used. A few dozen rows will do.
        per_neuron: Whether every neuron has a pair of its own: the best for its own tokens and 16 more at the site's
            average. By default, unless the granularity is `"layer"`.
        scales: Of the threshold, to try.
        potentials: To try.
        variance_weights: To try; layerwise there is no variance, and one pass.
        max_tokens: Real tokens, evenly spaced, that a site is judged by.
        progress: Whether to show a progress bar.

    Returns:
        By site: `scale` and `initial_potential` (the mean over neurons), the mean squared error of its time average,
        given the calibrated sites before it: `error_before` at scale 1 and potential 1/2, then `error`; and the
        `variance_weight` that was kept.

    Raises:
        ValueError: for a model without fine parameters, a folded one, or `per_neuron` at granularity `"layer"`.
    """
    check_calibratable(model)
    if per_neuron is None:
        per_neuron = model.config.granularity != "layer"
    if per_neuron and model.config.granularity == "layer":
        raise ValueError("`per_neuron` needs granularity 'neuron' or 'position', got a model calibrated by 'layer'.")
    model.eval()
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with model.running(0), recorded(model) as targets:
        teacher = answer(model(**inputs))
    mask = real_tokens(inputs, teacher)
    rows = mask.flatten().nonzero().squeeze(-1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(max_tokens, len(rows)), device=rows.device).long()]
    whole = pooled(model)
    pairs = torch.tensor(list(product(scales, potentials)), device=teacher.device)
    weights = variance_weights if model.config.schedule == "stepwise" else (0.0,)
    model.set_timesteps(model.config.calib_T)
    best: tuple[float, dict[str, dict[str, float]], Any] = (float("inf"), {}, None)
    with tqdm(
        total=len(weights) * len(model.neurons()), desc="coarse search", unit="site", disable=not progress
    ) as bar:
        for weight in weights:

            def choose(name, neuron, hidden_states, weight=weight):
                judged = None if name in whole else rows
                return _choose(neuron, hidden_states, targets[name].average, judged, pairs, per_neuron, weight)

            found, logits = _search_pass(model, inputs, choose, bar)
            error = error_of_output(model, logits, teacher, mask).item()
            if best[2] is None or error < best[0]:
                best = (error, found, [_fine_parameters(neuron) for _, neuron in model.neurons()])
    for (_, neuron), (threshold, potential) in zip(model.neurons(), best[2], strict=True):
        neuron.fine_threshold.copy_(threshold)
        neuron.initial_potential.copy_(potential)
    return best[1]


def _fine_parameters(neuron) -> tuple[torch.Tensor, torch.Tensor]:
    return neuron.fine_threshold.clone(), neuron.initial_potential.clone()


def _search_pass(model, inputs, choose, bar) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
    """Run the model once and set every site by `choose` before it runs; returns what was found, and the logits."""
    found: dict[str, dict[str, float]] = {}

    def before(name):
        def hook(neuron, args):
            found[name] = choose(name, neuron, args[0])
            bar.update()

        return hook

    handles = [neuron.register_forward_pre_hook(before(name)) for name, neuron in model.neurons()]
    try:
        return found, answer(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()


def _choose(neuron, hidden_states, target, rows, pairs, per_neuron, weight) -> dict[str, float]:
    """Set the best pairs of a site, given what it is about to read."""
    steps, target = _of_tokens(neuron, hidden_states, target, rows)
    tried = [_errors(neuron, steps, target, *pair) for pair in pairs]
    errors, variances = (torch.stack(part) for part in zip(*tried, strict=True))
    costs = errors + weight * variances
    best = costs.mean(1).argmin()
    if per_neuron:
        best = (len(target) * costs + PRIOR_TOKENS * costs.mean(1, keepdim=True)).argmin(0)
    set_pair(neuron, *pairs[best].unbind(-1))
    error = errors[best] if best.dim() == 0 else errors.gather(0, best[None])
    return {
        "scale": pairs[best, 0].mean().item(),
        "initial_potential": pairs[best, 1].mean().item(),
        "error_before": _errors(neuron, steps, target, *pairs.new_tensor((1.0, 0.5)))[0].mean().item(),
        "error": error.mean().item(),
        "variance_weight": weight,
    }


def _of_tokens(neuron, hidden_states, target, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What a site reads, `(T or 1, N, D)`, and should emit, `(N, D)`, at N tokens; in all rows where it is pooled."""
    steps = hidden_states.float().unflatten(0, (neuron.T if neuron.stepwise else 1, -1))
    steps, target = steps.flatten(1, -2), target.float().flatten(0, -2)
    return (steps, target) if rows is None else (steps[:, rows], target[rows])


def _errors(neuron, steps, target, scale, potential) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of every neuron's time average, and its variance over time, `(D,)` each, for one pair."""
    threshold = (scale * neuron.threshold).clamp(min=MIN_THRESHOLD)
    start = potential.expand_as(threshold)
    if not neuron.stepwise:
        error = (spike_rate(steps[0], threshold, start, neuron.T, neuron.signed) - target).square().mean(0)
        return error, torch.zeros_like(error)
    emitted = integrate_and_fire(steps, threshold, start, neuron.T, neuron.signed)
    average = emitted.mean(0)  # `torch.var_mean` takes several times as long on a CPU
    return (average - target).square().mean(0), (emitted - average).square().mean((0, 1))


def start_calibration(
    model: Any, inputs: Mapping[str, torch.Tensor], coarse: str = "search", *, progress: bool = True
) -> dict[str, Any]:
    """Set the start of gradient calibration on one batch.

    Args:
        model: With fresh fine parameters.
        inputs: Of the model, `(B, S)`.
        coarse: `"search"`, `"published"` (0.6 and 0.2 of the threshold, everywhere) or `"none"`.
        progress: Whether to show a progress bar.

    Returns:
        [`describe_sites`] at stage `uncalibrated` and, unless `"none"`, `coarse`: what [`save_record`] takes. The
        search adds the `variance_weight` that it kept.
    """
    config = model.config
    fitted = config.code != "rate" or config.L is None  # no scale of a trained threshold: the best is sought outright
    if fitted and coarse == "search" and config.granularity != "neuron":
        raise ValueError(
            f"`granularity` must be 'neuron' to search thresholds of the code {config.code!r} with L = {config.L}, "
            f"got {config.granularity!r}. With coarse 'none' the gradient alone finds them."
        )
    stages = {"uncalibrated": describe_sites(model, inputs)}
    if coarse == "none":
        return stages
    found: dict[str, dict[str, float]] = {}
    if coarse == "search" and fitted:
        model.eval()
        given = {name: value for name, value in inputs.items() if name != "labels"}
        fit_thresholds(model, given, config.calib_T, progress=progress)
    elif coarse == "search":
        found = coarse_search(model, inputs, progress=progress)
    else:
        for _, neuron in model.neurons():
            set_pair(neuron, *PUBLISHED_PAIR)
    described = describe_sites(model, inputs)
    for name, site in found.items():
        described[name]["variance_weight"] = site["variance_weight"]
    return stages | {"coarse": described}
