"""Event-driven products: a linear layer that spikes feed reads the weights of the neurons that fired, and no others.

This file travels to the Hub inside every checkpoint, next to `sites_fas.py`, which says what layers these are. The
result is the dense product's up to the order of its sums; a weight that is not finite counts only where its neuron
fires.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


__all__ = ["EventConv1D", "EventLinear", "event_product", "pays", "receive_events"]

# What pays, on one thread: the share of neurons that may fire by rows, judged by one in so many, since a count of all
# takes a core longer than it saves (benchmarks/events.py). Smaller weights stay in a core's cache.
MOST_FIRED = {1: 0.4, 2: 0.4, 3: 0.2, 4: 0.2, 5: 0.12, 6: 0.12, 7: 0.12, 8: 0.12}
ONE_IN = 13
LEAST_WEIGHTS = 1 << 20


class EventConv1D(Conv1D):
    """GPT-2's layer, whose weight has a row for every neuron as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return event_product(x, self.weight, self.bias) if pays(x, self.weight) else super().forward(x)


class EventLinear(nn.Linear):
    """A linear layer that keeps its weight transposed too, from the first time that this pays."""

    transposed: Any = None
    made_from: tuple[Any, int] = (None, 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not pays(input, self.weight):
            return super().forward(input)
        kept, version = self.made_from
        now = 0 if self.weight.is_inference() else self.weight._version
        if kept is None or kept.data_ptr() != self.weight.data_ptr() or version != now:
            # Kept alive, so that no other weight comes to stand at its address.
            self.transposed, self.made_from = self.weight.t().contiguous(), (self.weight.detach(), now)
        return event_product(input, self.transposed, self.bias)


def receive_events(layer: Any) -> None:
    """Let a layer look for spikes in its input."""
    kinds = {Conv1D: EventConv1D, nn.Linear: EventLinear}
    layer.__class__ = kinds.get(type(layer), type(layer))


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether few enough neurons of few enough rows fire, on a CPU, without gradient, compiler, tracer, autocast."""
    if torch.is_grad_enabled() or type(x) is not torch.Tensor:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    rows = x.numel() // x.shape[-1]
    if rows not in MOST_FIRED or weight.numel() < LEAST_WEIGHTS or x.device.type != "cpu":
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    some = x.contiguous().as_strided((-(-x.numel() // ONE_IN),), (ONE_IN,))
    return some.count_nonzero().item() <= MOST_FIRED[rows] / torch.get_num_threads() * some.numel()


def event_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight + bias` from the rows of `weight` where `x` is not 0.

    Args:
        x (`torch.Tensor` of shape `(…, D)`): what a site emits.
        weight (`torch.Tensor` of shape `(D, outputs)`)
        bias (`torch.Tensor` of shape `(outputs,)`, *optional*)

    Returns:
        `torch.Tensor` of shape `(…, outputs)`.
    """
    flat = x.reshape(-1, x.shape[-1])
    row, neuron = flat.nonzero().unbind(1)
    first = row.new_zeros(1) if len(flat) == 1 else torch.searchsorted(row, torch.arange(len(flat)))
    product = F.embedding_bag(neuron, weight, first, mode="sum", per_sample_weights=flat[row, neuron])
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
