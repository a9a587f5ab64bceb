"""The rows of an evaluation by the loop of a Trainer: any number of processes, streams, packed data, any precision."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Trainer

from ..data import AnyDataset
from .monitors import SpikeMonitor
from .rows import modes, schedules_of


logger = logging.getLogger(__name__)

_TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate_trainer(
    trainer: Trainer, splits: Mapping[str, AnyDataset], timesteps: Sequence[int]
) -> list[dict[str, Any]]:
    """Evaluate `trainer.model` in every mode on every split; it keeps its own T and schedule afterwards.

    Args:
        trainer: Made with [`training.evaluate.rows.for_trainer`], which says what quality is.
        splits: To evaluate on.
        timesteps: T of the spiking network, 0 left out.

    Returns:
        One row per mode and split, as `docs/results-schema.md` says.
    """
    model: Any = trainer.model
    fas = hasattr(model, "neurons")
    rows = []
    for mode in modes(timesteps, schedules_of(model) if fas else (), stock=not fas, fas=fas):
        for split, dataset in splits.items():
            start = time.perf_counter()
            with mode.of(model, stock=model), SpikeMonitor(model) if mode.T else nullcontext() as monitor:
                measured = trainer.evaluate(dataset, metric_key_prefix="eval")
            row = {
                **mode.row(),
                "split": split,
                "quality": {
                    name.removeprefix("eval_"): value
                    for name, value in measured.items()
                    if name.startswith("eval_") and not name.endswith(_TIMING)
                },
                "spike_rate": _spike_rate(monitor, trainer) if monitor else None,
                "seconds": time.perf_counter() - start,
            }
            rows.append(row)
            logger.info(f"evaluation: {row}")
    return rows


def _spike_rate(monitor: SpikeMonitor, trainer: Trainer) -> float:
    """Spikes per neuron and timestep, over all neurons of all sites, in all processes."""
    counts = torch.tensor(monitor.counts(), dtype=torch.float64, device=trainer.args.device)
    spikes, chances = trainer.accelerator.reduce(counts, "sum").tolist()
    return spikes / max(chances, 1)
