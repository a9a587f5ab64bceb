"""Evaluation side by side: the ANN, and the spiking network at several T in both schedules."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from configuration_fas import SCHEDULES

from .data import AnyDataset
from .evaluate.monitors import SpikeMonitor


logger = logging.getLogger(__name__)


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
            with SpikeMonitor(model) if T else nullcontext() as monitor:
                measured = trainer.evaluate(dataset, metric_key_prefix="eval")
            row: dict[str, Any] = {"mode": mode, "T": T, "schedule": schedule, "split": split}
            row |= {name.removeprefix("eval_"): value for name, value in measured.items() if _is_metric(name)}
            if perplexity:
                row["perplexity"] = math.exp(row["loss"]) if row["loss"] < 700 else math.inf
            row["spike_rate"] = mean_rate(monitor, trainer) if monitor else None
            row["seconds"] = round(time.perf_counter() - start, 2)
            rows.append(row)
            logger.info(f"evaluation: {row}")
    if before:
        model.set_timesteps(*before)
    return rows


def _is_metric(name: str) -> bool:
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return name.startswith("eval_") and not name.endswith(timing)


def mean_rate(monitor: SpikeMonitor, trainer: Trainer) -> float:
    """Return the mean over sites of spikes per neuron and timestep, over all processes."""
    counts = [[site.spikes.sum().item(), site.steps * len(site.spikes)] for site in monitor.sites.values()]
    summed = trainer.accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=trainer.args.device), "sum")
    return (summed[:, 0] / summed[:, 1]).mean().item()
