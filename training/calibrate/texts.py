"""Calibration from a notebook: texts in, thresholds trained, and how much of the gap that closed out."""

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from transformers import PrinterCallback

from configuration_fas import positions_of

from ..arguments import CALIBRATION_SETTINGS, FASTrainingArguments
from ..evaluate.evaluation import gap_of, told
from ..evaluate.examples import examples_of, make_batches
from ..evaluate.measurement import ROWS_ALONE, evaluate
from ..layout import core_of, is_untrained, predicts_next, schedule_to_train
from ..results import markdown_table
from ..trainers import FASCalibrationTrainer
from .coarse import start_calibration
from .loss import describe_sites, save_record


STEPS = 100
PROBED_ROWS = 64  # that the coarse search and the record look at
HELD_OUT = (0.1, 64)  # share of the rows that the gap is measured on, and the most of them
WINDOW = 256  # tokens of a row of running text


class Calibration(dict):
    """What [`calibrate`] did; its `repr` is a table.

    Holds `T`, `schedule`, `granularity`, `steps`, `rows`, `held_out` (rows), `seconds`; `stages`: what
    [`describe_sites`] says of every site, uncalibrated, after the coarse search and after training; `gap`: what
    [`gap_of`] says on the held-out rows.
    """

    def __init__(self, model: Any, content: dict[str, Any]):
        super().__init__(content)
        self._model = model

    @property
    def gap_closed(self) -> float | None:
        """Share of the gap to the ANN that was closed: in quality where the data tell it, else in the outputs."""
        gap = self["gap"]
        return gap["error_closed"] if gap["closed"] is None else gap["closed"]

    def save(self, folder: str | os.PathLike) -> None:
        """Write `calibration.json` beside the saved model, where its card finds it."""
        more = {name: value for name, value in self.items() if name not in ("T", "schedule", "granularity", "stages")}
        save_record(folder, self._model, self["stages"], **more)

    def __repr__(self) -> str:
        rows = [
            {
                "stage": stage,
                "error of the sites": sum(site["error"] for site in sites.values()) / len(sites),
                "threshold, of before": sum(site["scale"] for site in sites.values()) / len(sites),
                "initial potential": sum(site["initial_potential"] for site in sites.values()) / len(sites),
            }
            for stage, sites in self["stages"].items()
        ]
        return f"{markdown_table(rows)}\n\n{told(self['gap'])}"

    _repr_markdown_ = __repr__


def calibrate(
    model: Any,
    data: Any,
    T: int,
    labels: Sequence[Any] | None = None,
    *,
    granularity: str = "neuron",
    coarse: str = "search",
    steps: int = STEPS,
    batch_size: int | None = None,
    threshold_learning_rate: float | None = None,
    site_weight: float | None = None,
    length: int | None = None,
    tokenizer: Any = None,
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Fit thresholds and initial potentials of a spiking network to T timesteps, on texts without labels.

    As `python -m training.calibrate` does it: a coarse search, site by site, then gradient descent on fine thresholds
    and initial potentials alone, to follow the network at T = 0. A tenth of the texts is held out, and what was closed
    of the gap between the spiking network and its ANN is measured there.

    ```python
    >>> record = fas.calibrate(model, texts, T=4)
    >>> record.gap_closed
    >>> model.save_pretrained("calibrated"), record.save("calibrated")
    ```

    Args:
        model: A FAS model that was fine-tuned with QCFS, or converted: language model, classifier, or without a head.
            Calibrated in place, set to T, in evaluation mode; its other weights do not train any more.
        data: Texts, or whatever [`evaluate`] takes. Several hundred texts, or some ten thousand tokens, are enough.
        T: Timesteps to calibrate for.
        labels: Of texts; they are not trained on: with them the gap is told in the metric of the task.
        granularity: Who shares a threshold: `"neuron"`, `"layer"` or `"position"`.
        coarse: Where training starts: `"search"`, `"published"` or `"none"`.
        steps: Of training; 0 leaves it at the coarse search.
        batch_size: Rows of a step: 16, of a causal language model 4, if not given.
        threshold_learning_rate: By default that of the project's recipes, 0.05.
        site_weight: Of the errors of sites in the loss: 0.1 for a causal language model, else 1, if not given.
        length: Tokens of a row: 256 of running text, else 128, at most.
        tokenizer: By default that of the folder that the model came from.
        text_columns: Of a data set, where they have no usual name.
        label_column: Of a data set.
        seed: Of the order of the rows.
        progress: Show bars.

    Returns:
        The record: a mapping that shows as a table, with `gap_closed` and `save(folder)`.

    Raises:
        ValueError: for a model that cannot be calibrated, or data too few to train and hold out.
    """
    if is_untrained(core_of(model)):
        raise ValueError(
            f"`model` must be fine-tuned with QCFS, or converted, got a {type(model).__name__} with every threshold "
            "at its start. `fas.convert_to_spiking` needs no training; `python -m training.convert` trains."
        )
    causal = predicts_next(model)
    if length is None:
        length = min(WINDOW, positions_of(model.config)) if causal else None
    names: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_columns": text_columns,
        "label_column": label_column,
        "length": length,
    }
    found = examples_of(model, data, labels, **names)
    rows, kept = _split(found.rows)
    start = time.perf_counter()
    schedule = schedule_to_train(model.config)
    model.eval().begin_calibration(T, granularity, length=length or 128 if granularity == "position" else None)
    measured: dict[str, Any] = {
        "metric": found.metric,
        "timesteps": [T],
        "schedules": [schedule],
        "configuration": {},  # nobody asks: it has a checksum of all weights
        "progress": progress,
    }
    before = evaluate(model, kept, finished=ROWS_ALONE, **measured)["rows"]
    pad = getattr(model.config, "pad_token_id", None) or 0
    probe = make_batches(rows[:PROBED_ROWS], PROBED_ROWS, pad, model.device)[0]
    stages = start_calibration(model, probe, coarse, progress=progress)
    if steps:
        script = "clm" if causal else "glue"
        rate, weight = CALIBRATION_SETTINGS[script]
        size = batch_size or (4 if causal else 16)
        rate = rate if threshold_learning_rate is None else threshold_learning_rate
        weight = weight if site_weight is None else site_weight
        _train(model, rows, steps=steps, size=size, rate=rate, weight=weight, pad=pad, seed=seed, progress=progress)
        stages["fine"] = describe_sites(model, probe)
    model.set_timesteps(T, schedule)
    after = evaluate(model, kept, finished=ROWS_ALONE, **measured)["rows"]
    record = {"T": T, "schedule": schedule, "granularity": granularity, "steps": steps, "rows": len(rows)}
    record |= {"held_out": len(kept), "seconds": time.perf_counter() - start, "stages": stages}
    return Calibration(model, {**record, "gap": gap_of(before[0], before[1], after[1])})


def _split(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to calibrate on, and those held out, evenly spaced."""
    share, most = HELD_OUT
    held = min(max(1, int(share * len(rows))), most)
    if len(rows) < 2:
        raise ValueError(
            f"`data` must hold at least 2 rows, one of them to judge by, got {len(rows)}. Give more text."
        )
    out = {len(rows) * (i + 1) // held - 1 for i in range(held)}
    kept = [row for i, row in enumerate(rows) if i in out]
    return [row for i, row in enumerate(rows) if i not in out], kept


def _train(
    model: Any,
    rows: list[dict[str, Any]],
    *,
    steps: int,
    size: int,
    rate: float,
    weight: float,
    pad: int,
    seed: int,
    progress: bool,
) -> None:
    """Train the fine thresholds; the model stays where it is."""
    with tempfile.TemporaryDirectory(prefix="fas-calibrate-") as scratch:
        args = FASTrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=size,
            learning_rate=rate,
            threshold_learning_rate=rate,
            site_weight=weight,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, steps // 10),
            disable_tqdm=not progress,
        )
        device = model.device
        trainer = FASCalibrationTrainer(
            model,
            args,
            train_dataset=_without_labels(rows),
            data_collator=lambda batch: make_batches(batch, len(batch), pad)[0],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.to(device).eval()


def _without_labels(rows: Sequence[dict[str, Any]]) -> Any:
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows]
