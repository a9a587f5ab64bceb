"""Coarse calibration: one scale of the threshold and one initial potential per site, by search, front to back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_fas import FASNeuron, integrate_and_fire, spike_rate

from .calibration import check_calibratable, real_tokens, recorded


PUBLISHED_PAIR = (0.6, 0.2)
SCALES = tuple(i / 20 for i in range(4, 31))
POTENTIALS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@torch.no_grad()
def set_pair(neuron: FASNeuron, scale: float, potential: float) -> None:
    """Set the fine thresholds of a site to `scale · threshold` and its initial potentials to `potential`."""
    neuron.fine_threshold.copy_((scale * neuron.threshold).expand_as(neuron.fine_threshold))
    neuron.initial_potential.fill_(potential)


@torch.no_grad()
def coarse_search(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    *,
    scales: Sequence[float] = SCALES,
    potentials: Sequence[float] = POTENTIALS,
    max_tokens: int = 256,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Choose for every site the pair (scale of the threshold, initial potential) with the least squared error.

    One forward pass of the ANN records the activation that each site should have. One pass of the spiking network
    then stops before each site: with what the calibrated sites before it deliver, every pair of the grid is run, and
    the one whose time average is nearest to the ANN's activation is set before the pass goes on.

    Args:
        model: With fine parameters of any granularity; left at `calib_T`.
        inputs: Of the model, `(B, S)`, without labels or with: they are not used. A few dozen rows will do.
        scales: Of the threshold, to try.
        potentials: To try.
        max_tokens: Real tokens, evenly spaced, that a site is judged by.
        progress: Whether to show a progress bar.

    Returns:
        By site: `scale`, `initial_potential`, `error_before` (mean squared error at scale 1 and potential 1/2, given
        the calibrated sites before it) and `error`.
    """
    check_calibratable(model)
    model.eval()
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with recorded(model, 0) as targets:
        logits = model(**inputs)["logits"]
    mask = real_tokens(inputs, logits)
    rows = mask.flatten().nonzero().squeeze(-1)
    rows = rows[:: max(1, len(rows) // max_tokens)]
    found: dict[str, dict[str, float]] = {}

    def search(name):
        def before(neuron, args):
            constant = neuron.expands_time or not neuron.stepwise
            steps = args[0].float().unflatten(0, (1 if constant else neuron.T, -1))
            target = targets[name].float()
            if target.dim() == 3:
                steps, target = steps.flatten(1, 2)[:, rows], target.flatten(0, 1)[rows]

            def error(scale, potential):
                threshold = scale * neuron.threshold
                start = torch.full_like(threshold, potential)
                if neuron.stepwise:
                    average = integrate_and_fire(steps, threshold, start, neuron.T).mean(0)
                else:
                    average = spike_rate(steps[0], threshold, start, neuron.T)
                return (average - target).square().mean().item()

            errors = {(scale, potential): error(scale, potential) for scale in scales for potential in potentials}
            best = min(errors, key=errors.__getitem__)
            set_pair(neuron, *best)
            found[name] = {
                "scale": best[0],
                "initial_potential": best[1],
                "error_before": error(1.0, 0.5),
                "error": errors[best],
            }
            bar.update()

        return before

    handles = [neuron.register_forward_pre_hook(search(name)) for name, neuron in model.neurons()]
    model.set_timesteps(model.config.calib_T)
    try:
        with tqdm(total=len(handles), desc="coarse search", unit="site", disable=not progress) as bar:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
