"""Coarse calibration: scales of the thresholds and initial potentials by search, front to back, no gradient."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_fas import FASNeuron, integrate_and_fire, spike_rate

from .calibration import check_calibratable, real_tokens, recorded


PUBLISHED_PAIR = (0.6, 0.2)
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)
POTENTIALS = (0.2, 0.35, 0.5, 0.65, 0.8)
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
    max_tokens: int = 512,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Choose for every site the pair (scale of the threshold, initial potential) with the least squared error.

    One forward pass of the ANN records the activation that each site should have. One pass of the spiking network
    then stops before each site: with what the calibrated sites before it deliver, every pair of the grid is run, and
    the one whose time average is nearest to the ANN's activation is set before the pass goes on.

    Args:
        model: With fine parameters; left at `calib_T`.
        inputs: Of the model, `(B, S)`, without labels or with: they are not used. A few dozen rows will do.
        per_neuron: Whether every neuron has a pair of its own: that with the least error of its own tokens and of 16
            more at the site's average. By default, unless the granularity is `"layer"`.
        scales: Of the threshold, to try.
        potentials: To try.
        max_tokens: Real tokens, evenly spaced, that a site is judged by.
        progress: Whether to show a progress bar.

    Returns:
        By site: `scale` and `initial_potential` (the mean over neurons), `error_before` (mean squared error at scale 1
        and potential 1/2, given the calibrated sites before it) and `error`.

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
    with recorded(model, 0) as targets:
        logits = model(**inputs)["logits"]
    rows = real_tokens(inputs, logits).flatten().nonzero().squeeze(-1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(max_tokens, len(rows)), device=rows.device).long()]
    pairs = torch.tensor(list(product(scales, potentials)), device=logits.device)
    found: dict[str, dict[str, float]] = {}

    def before(name):
        def search(neuron, args):
            steps, target = _of_tokens(neuron, args[0], targets.pop(name), rows)
            errors = torch.stack([_errors(neuron, steps, target, *pair) for pair in pairs])
            best = errors.mean(1).argmin()
            if per_neuron:
                best = (len(target) * errors + PRIOR_TOKENS * errors.mean(1, keepdim=True)).argmin(0)
            set_pair(neuron, *pairs[best].unbind(-1))
            error = errors[best].mean() if best.dim() == 0 else errors.gather(0, best[None]).mean()
            found[name] = {
                "scale": pairs[best, 0].mean().item(),
                "initial_potential": pairs[best, 1].mean().item(),
                "error_before": _errors(neuron, steps, target, *pairs.new_tensor((1.0, 0.5))).mean().item(),
                "error": error.item(),
            }
            bar.update()

        return search

    handles = [neuron.register_forward_pre_hook(before(name)) for name, neuron in model.neurons()]
    model.set_timesteps(model.config.calib_T)
    try:
        with tqdm(total=len(handles), desc="coarse search", unit="site", disable=not progress) as bar:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_tokens(neuron, hidden_states, target, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What a site reads, `(T or 1, N, D)`, and should emit, `(N, D)`, at N tokens (for a pooler, in every row)."""
    constant = neuron.expands_time or not neuron.stepwise
    steps, target = hidden_states.float().unflatten(0, (1 if constant else neuron.T, -1)), target.float()
    if target.dim() == 2:
        return steps, target
    return steps.flatten(1, 2)[:, rows], target.flatten(0, 1)[rows]


def _errors(neuron, steps, target, scale, potential) -> torch.Tensor:
    """Mean squared error of every neuron's time average, `(D,)`, for one pair."""
    threshold = scale * neuron.threshold
    start = potential.expand_as(threshold)
    if neuron.stepwise:
        average = integrate_and_fire(steps, threshold, start, neuron.T).mean(0)
    else:
        average = spike_rate(steps[0], threshold, start, neuron.T)
    return (average - target).square().mean(0)
