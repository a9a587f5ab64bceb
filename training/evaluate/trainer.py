"""The rows of an evaluation by the loop of a Trainer: any number of processes, streams, packed data, any precision."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Trainer

from ..data import AnyDataset
from ..layout import evaluating
from .monitors import SpikeMonitor, warn_of_silent_sites
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
            with mode.of(model, stock=model), SpikeMonitor(model) if fas else nullcontext() as monitor:
                prefix = "_".join(["eval", mode.tag, *([split] if len(splits) > 1 else [])])  # a tag of its own
                measured = trainer.evaluate(dataset, metric_key_prefix=prefix)
            row = {
                **mode.row(),
                "split": split,
                "quality": {
                    name.removeprefix(f"{prefix}_"): value
                    for name, value in measured.items()
                    if name.startswith(f"{prefix}_") and not name.endswith(_TIMING)
                },
                "spike_rate": None,
                "seconds": time.perf_counter() - start,
            }
            if monitor:
                _join(monitor, trainer)
                row["spike_rate"] = monitor.spike_rate if mode.T else None
                row |= monitor.silent_sites()
                if trainer.args.should_save:
                    warn_of_silent_sites(row, f"{mode}, {split}")
            rows.append(row)
            logger.info(f"evaluation: {row}")
    return rows


def warn_after_training(trainer: Trainer, rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Warn of sites that rows of data leave dead or saturated, as the model runs now; returns their names.

    Args:
        trainer: Whose model was trained.
        rows: For its collator; they run in batches of the size that it trains with.
    """
    model: Any = trainer.model
    size = trainer.args.per_device_train_batch_size
    with evaluating(model), SpikeMonitor(model) as monitor, torch.no_grad():
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(trainer.data_collator(list(rows[start : start + size])))
            model(**{name: value for name, value in batch.items() if name != "labels"})
    found = monitor.silent_sites()
    if trainer.args.should_save:
        warn_of_silent_sites(found, "After training")
    return found


def _join(monitor: SpikeMonitor, trainer: Trainer) -> None:
    """Add up what the monitors of all processes counted."""
    sites = monitor.sites.values()
    if trainer.args.world_size > 1:
        counts = torch.cat([torch.cat([each.spikes, each.spikes.new_tensor([each.steps])]) for each in sites])
        parts = trainer.accelerator.reduce(counts, "sum").split([len(each.spikes) + 1 for each in sites])
        for each, part in zip(sites, parts, strict=True):
            each.spikes, each.steps = part[:-1], int(part[-1])
