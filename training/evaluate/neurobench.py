"""NeuroBench's own metrics of a spiking model: every linear layer gets its spikes step by step.

NeuroBench calls a layer's input spikes where all of it is -1, 0 or 1, and counts from what a layer is called on. Rate
codes hand that over as they run. A layerwise phase or first-spike code computes its weighted sum at once: here it is
taken apart, each layer runs T times on the spikes of one step, and the soma weighs and adds. The logits stay.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sites_fas

from .. import layout
from ..calibrate.folding import fold_thresholds


class SpikeBySpike(nn.Module):
    """A folded linear layer that runs on -1, 0 and 1, once a timestep, and adds what comes of it by weight.

    Takes over the layer's hooks: NeuroBench counts with copies of a layer, which must not spike anew.
    """

    def __init__(self, layer: nn.Linear, neuron: Any):
        super().__init__()
        self.layer, self.encode = _bare(layer), neuron.forward
        self.neuron = [neuron]
        before = {key: hook for key, hook in layer._forward_pre_hooks.items() if hook is not sites_fas._emit_input}
        self._forward_pre_hooks.update(before)
        self._forward_hooks.update(layer._forward_hooks)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        neuron, bias = self.neuron[0], self.layer.bias
        if neuron.stepwise:
            return self.layer(self.encode(values))
        weights = step_weights(neuron.code, neuron.T, neuron.code_base)
        total: Any = 0
        for weight, spikes in zip(weights, neuron.trains(values), strict=True):
            current = self.layer(spikes)
            total = total + weight * (current if bias is None else current - bias)
        return total if bias is None else total + bias


def _bare(layer: Any) -> nn.Linear:
    """A layer of the same weights as NeuroBench knows them: `nn.Linear`, with nothing inside."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T  # a Conv1D of transformers
    bare = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    bare.weight, bare.bias = nn.Parameter(weight), layer.bias
    return bare


def step_weights(code: str, T: int, base: float) -> list[float]:
    """What the spike of each step is worth, of a threshold."""
    if code == "phase":
        return [2 ** (T - t) / (2**T - 1) for t in range(1, T + 1)]
    return [base ** (1 - t) if code == "first_spike" else 1 / T for t in range(1, T + 1)]


def spike_by_spike(model: Any) -> Any:
    """Make the linear layers of a folded model run on single spikes, in place."""
    for placed in layout.sites(model):
        if placed.site.at != "input":
            continue
        for target in placed.targets:
            model.set_submodule(_name_of(model, target), SpikeBySpike(target, placed.neuron))
        placed.neuron.forward = lambda hidden_states: hidden_states
    for layer in [module for module in model.modules() if isinstance(module, Conv1D)]:
        model.set_submodule(_name_of(model, layer), _bare(layer))
    return model


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@torch.no_grad()
def neurobench_metrics(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """NeuroBench's metrics of a FAS model as it is set, by NeuroBench's own code; a copy of the model is measured.

    Args:
        model: At T > 0, with gain `"static"` and thresholds that do not know the position: they are folded. With
            sites `"linear"` or `"all"`, the counts are ours; with `"mlp"`, a head that takes time averages is not
            accumulates to NeuroBench.
        batches: Inputs of the model, one text each.

    Returns:
        `footprint` in bytes, `connection_sparsity`, `parameter_count`; and of the linear layers, a text:
        `effective_macs`, `effective_acs` and `dense` synaptic operations.

    Raises:
        ImportError: where the package neurobench is not installed: `pip install -e ".[neurobench]"`.
        ValueError: at T = 0, without batches, or for what [`fold_thresholds`] refuses.
    """
    from neurobench.metrics.static import ConnectionSparsity, Footprint, ParameterCount

    core = layout.core_of(model)
    if core.config.T == 0:
        raise ValueError("`model` must run at T > 0 to spike, got T = 0. `model.set_timesteps(T)` sets it.")
    if not len(batches):
        raise ValueError("`batches` must hold at least one, got none.")
    wrapped = _wrapped(core)
    found = {"footprint": float(Footprint()(wrapped)), "parameter_count": float(ParameterCount()(wrapped))}
    folded = copy.deepcopy(core).eval()
    if not folded.config.folded:
        fold_thresholds(folded)
    spike_by_spike(folded)
    found["connection_sparsity"] = float(ConnectionSparsity()(_wrapped(folded)))
    counted = synaptic_operations(folded, batches)
    names = {"effective_macs": "Effective_MACs", "effective_acs": "Effective_ACs", "dense": "Dense"}
    return found | {name: float(counted[theirs]) for name, theirs in names.items()}


def synaptic_operations(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """NeuroBench's count of a model from [`spike_by_spike`], a sequence."""
    from neurobench.hooks.layer import LayerHook
    from neurobench.metrics.workload.synaptic_operations import SynapticOperations

    wrapped, metric = _wrapped(model), SynapticOperations()
    wrapped.connection_hooks = [LayerHook(layer) for layer in wrapped.connection_layers()]
    found: dict[str, float] = {}
    for batch in batches:
        found = metric(wrapped, wrapped(batch), (batch["input_ids"], batch["input_ids"][:, 0]))
        wrapped.reset_hooks()
    for hook in wrapped.connection_hooks:
        hook.close()
    return found


def _wrapped(model: Any) -> Any:
    from neurobench.models import NeuroBenchModel

    class Wrapped(NeuroBenchModel):
        def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return model(**batch)[0]

        def __net__(self) -> Any:
            return model

    return Wrapped()
