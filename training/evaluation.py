"""Evaluation side by side: the ANN, and the spiking network at several T in both schedules."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .data import AnyDataset


logger = logging.getLogger(__name__)

SCHEDULES = ("stepwise", "layerwise")


def modes(model: nn.Module, timesteps: Sequence[int]) -> list[tuple[str, int, str | None]]:
    """Return `(name, T, schedule)` of every row to report: one for a stock model, else QCFS and the spiking ones."""
    if not hasattr(model, "set_timesteps"):
        return [
            (str(getattr(model.config, "hidden_act", getattr(model.config, "activation_function", "ann"))), 0, None)
        ]
    spiking = [("spiking", T, schedule) for T in dict.fromkeys(timesteps) if T > 0 for schedule in SCHEDULES]
    return [("qcfs", 0, None), *spiking]


def evaluate_modes(
    trainer: Trainer, splits: dict[str, AnyDataset], timesteps: Sequence[int], *, perplexity: bool = False
) -> list[dict[str, Any]]:
    """Evaluate `trainer.model` in every mode on every split; the model keeps its own T and schedule afterwards.

    Args:
        trainer: Its `compute_metrics` gives the task metric.
        splits: To evaluate on.
        timesteps: T of the spiking network, 0 left out.
        perplexity: Report the exponential of the loss, for language models.

    Returns:
        One row per mode and split: `mode`, `T`, `schedule`, `split`, metrics, `loss`, `spike_rate` (spikes per neuron
        and timestep, mean over sites; None for the ANN) and `seconds`.
    """
    model: Any = trainer.model
    before = (model.config.T, model.config.schedule) if hasattr(model, "set_timesteps") else None
    rows = []
    for mode, T, schedule in modes(model, timesteps):
        if before:
            model.set_timesteps(T, schedule)
        for split, dataset in splits.items():
            start = time.perf_counter()
            with spike_rates(model) as rates:
                measured = trainer.evaluate(dataset, metric_key_prefix="eval")
            row: dict[str, Any] = {"mode": mode, "T": T, "schedule": schedule, "split": split}
            row |= {name.removeprefix("eval_"): value for name, value in measured.items() if _is_metric(name)}
            if perplexity:
                row["perplexity"] = math.exp(row["loss"]) if row["loss"] < 700 else math.inf
            row["spike_rate"] = mean_rate(rates, trainer) if T else None
            row["seconds"] = round(time.perf_counter() - start, 2)
            rows.append(row)
            logger.info(f"evaluation: {row}")
    if before:
        model.set_timesteps(*before)
    return rows


def _is_metric(name: str) -> bool:
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return name.startswith("eval_") and not name.endswith(timing)


@contextmanager
def spike_rates(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Count what every site of a spiking model emits; yields spikes and neuron-timesteps by site, `(2,)` each.

    Padding takes no part. Nothing is kept but the counts.
    """
    counts: dict[str, torch.Tensor] = {}
    mask: list[torch.Tensor | None] = [None]
    handles = []

    def remember_mask(_module, _args, kwargs):
        mask[0] = kwargs.get("attention_mask")

    def count(name: str, neuron: Any):
        def hook(_module, _inputs, output):
            counts[name] = counts.get(name, 0) + _spikes(neuron, output, mask[0])

        return hook

    if hasattr(model, "neurons"):
        handles.append(model.register_forward_pre_hook(remember_mask, with_kwargs=True))
        handles += [neuron.register_forward_hook(count(name, neuron)) for name, neuron in model.neurons() if neuron.T]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _spikes(neuron: Any, output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Spikes and neuron-timesteps in the output of a site, `(T·B, …)` stepwise or `(B, …)` layerwise."""
    if neuron.stepwise:
        spikes = (output != 0).float().mean(-1)
    else:
        threshold = neuron.threshold if neuron.fine_threshold is None else neuron.fine_threshold
        threshold = threshold[: output.shape[1]] if threshold.dim() == 2 else threshold
        spikes = (output.float() / threshold).mean(-1)
    if mask is not None and spikes.dim() == 2:
        valid = mask.repeat(spikes.shape[0] // mask.shape[0], 1).to(spikes.dtype)
        total, neurons = (spikes * valid).sum(), valid.sum()
    else:
        total, neurons = spikes.sum(), torch.tensor(float(spikes.numel()), device=spikes.device)
    return torch.stack([total, neurons]).double()


def mean_rate(counts: dict[str, torch.Tensor], trainer: Trainer) -> float | None:
    """Return the mean over sites of spikes per neuron and timestep, over all processes."""
    if not counts:
        return None
    summed = trainer.accelerator.reduce(torch.stack(list(counts.values())), "sum")
    return (summed[:, 0] / summed[:, 1]).mean().item()
