"""The MLP of a block as a graph of NIR, the Neuromorphic Intermediate Representation.

NIR has no attention and no norm, so that no whole block of a transformer can be a graph of it: its MLP can. Its
integrate-and-fire neuron resets to a value, ours subtracts the threshold: the graph has an integrator, a threshold
and a connection back in its place, which is the same neuron.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from neurons_fas import MIN_THRESHOLD

from ..layout import core_of, products, sites


if TYPE_CHECKING:
    import nir


@torch.no_grad()
def mlp_to_nir(model: Any, layer: int = 0) -> "nir.NIRGraph":
    """The MLP of one block, linear layers and neurons, as it runs in the stepwise schedule.

    `up` (affine) → `membrane` (integrator) → `fire` (threshold) → `down` (affine), and back from `fire` over `reset`
    (scale) to `membrane`, where a spike arrives at the next timestep: `v[t] = v[t-1] + x[t] - θ s[t-1]`. The membrane
    starts at 0, the threshold is θ less the initial potential, and `down` holds θ. A timestep is a time of 1.

    Args:
        model: A FAS model with unsigned neurons in place of the activation (`sites="mlp"`), of a rate code.
        layer: Index of the block.

    Returns:
        A `nir.NIRGraph`, to be written by `nir.write`.

    Raises:
        ImportError: where the package nir is not installed.
        ValueError: for a block that does not exist, a gated MLP or other sites, a code that is no rate, or thresholds
            by position.
    """
    import nir

    core = core_of(model)
    config = core.config
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"`layer` must be from 0 to {config.num_hidden_layers - 1}, got {layer}.")
    found = [each for each in sites(core) if each.layer == layer and each.site.at == "activation"]
    if not found or config.code != "rate" or config.granularity == "position":
        raise ValueError(
            "`model` must have neurons of a rate code in place of the activation of its MLPs, and thresholds that do "
            f"not know the position, got sites={config.sites!r}, code={config.code!r}, "
            f"granularity={config.granularity!r} of {type(core).__name__}. "
            "NIR has no signed neuron, and no other code."
        )
    neuron, (down,) = found[0].neuron, found[0].targets
    up = next(each.weights[0] for each in products(core) if each.layer == layer and each.product.name == "mlp in")
    refined = neuron.fine_threshold is not None
    ones = torch.ones(neuron.width, dtype=down.weight.dtype)
    threshold = (neuron.fine_threshold if refined else neuron.threshold).clamp(min=MIN_THRESHOLD) * ones
    start = threshold * (neuron.initial_potential if refined else 0.5)
    weight, bias = _affine(down)
    nodes = {
        "input": nir.Input({"input": np.array([_affine(up)[0].shape[1]])}),
        "up": nir.Affine(*_affine(up)),
        "membrane": nir.I(r=ones.numpy()),
        "fire": nir.Threshold(np.nextafter((threshold - start).numpy(), -np.inf)),  # ours is >=, NIR's is >
        "reset": nir.Scale(-threshold.numpy()),
        "down": nir.Affine(weight if neuron.folded else weight * threshold.numpy(), bias),
        "output": nir.Output({"output": np.array([len(weight)])}),
    }
    path = ["input", "up", "membrane", "fire", "down", "output"]
    edges = [*pairwise(path), ("fire", "reset"), ("reset", "membrane")]
    return nir.NIRGraph(nodes=nodes, edges=edges)


def _affine(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight, `(outputs, inputs)`, and bias of a linear layer or of transformers' Conv1D."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return weight.detach().cpu().numpy().copy(), bias.detach().cpu().numpy().copy()
