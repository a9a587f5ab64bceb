"""Quality, agreement with the ANN, spikes, energy and latency of one model over timesteps and schedules."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from configuration_fas import MOST_TIMESTEPS

from ..layout import auto_class, predicts_next
from ..metrics import METRICS
from .energy import AC_PJ, MAC_PJ, energy_report
from .monitors import SiteErrors, SpikeMonitor, warn_of_silent_sites
from .rows import PERPLEXITY, Mode, modes, quality_of, schedules_of


LATENCY_ROUNDS = 3

Batch = dict[str, torch.Tensor]


def evaluate(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    timesteps: Sequence[int],
    schedules: Sequence[str] | None = None,
    stock: Any = None,
    split: str = "validation",
    batch_size: int = 8,
    pad_token_id: int = 0,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
    finished: Mapping[str, Any] | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a FAS model over timesteps and schedules, beside its QCFS ANN and, where given, the stock model.

    Args:
        model: Causal language model, or classifier or regressor. Left as it was.
        examples: Tokenized: `input_ids` and `labels`, where tokens with label -100 are context; `token_type_ids`.
        metric: `"perplexity"`, or a name in `training.metrics.METRICS`.
        timesteps: All at least 1.
        schedules: Of them.
        stock: The model before conversion.
        split: Name of the examples, for the rows.
        batch_size: Examples in a batch; those of similar length are together.
        pad_token_id: Fills batches up, masked.
        mac_pj: Picojoules per MAC.
        ac_pj: Picojoules per AC.
        finished: What an earlier, interrupted call returned or passed to `on_result`; is not measured again.
        on_result: Called with all results so far whenever one is finished.
        progress: Show bars, on a terminal.

    Returns:
        `rows`, `early_exit` and `latency`, as `docs/results-schema.md` says.

    Raises:
        ValueError: for anything missing or out of range, before anything runs.
    """
    _check(model, examples, metric, timesteps, schedules, batch_size)
    schedules = schedules or schedules_of(model)
    results: dict[str, Any] = {"rows": []} | copy.deepcopy(dict(finished or {}))
    batches = make_batches(examples, batch_size, pad_token_id, model.device)
    tokens = sum(len(example["input_ids"]) for example in examples)
    energy = {"length": tokens / len(examples), "mac_pj": mac_pj, "ac_pj": ac_pj}
    asked = modes(timesteps, schedules, stock=stock is not None)

    def save() -> None:
        if on_result is not None:
            on_result(results)

    with _evaluating(model, stock):
        for mode in asked:
            if _find(results["rows"], mode) is None:
                row = _measure(model, batches, mode, metric, split, stock, progress)
                qcfs = row if mode.name == "qcfs" else _find(results["rows"], Mode("qcfs"))
                if mode.name != "stock":
                    row["energy"] = _energy(model, row, qcfs, **energy)
                results["rows"].append(row)
                save()
        exits = next((each for each in ("stepwise", "accumulated") if each in schedules), None)
        if exits and "early_exit" not in results:
            T = max(timesteps)
            curve = early_exit_curve(model, batches, T, metric=metric, schedule=exits, progress=progress)
            results["early_exit"] = {"schedule": exits, "T": T, "curve": curve}
            save()
        if "latency" not in results:
            results["latency"] = measure_latency(model, batches, asked, stock, progress)
            save()
    return results


def early_exit_curve(
    model: Any, batches: Sequence[Batch], T: int, *, metric: str, schedule: str = "stepwise", progress: bool = True
) -> list[dict[str, Any]]:
    """Quality at every t ≤ T of one stepwise or accumulated run, read off the time average of its first t steps.

    Steps do not look ahead, so that t of a longer run equals a run of t steps. Layerwise there is nothing to exit
    from: a layer starts when the one before it has done all its steps.

    Args:
        model: FAS model with a language modelling or classification head.
        batches: From [`make_batches`].
        T: Timesteps of the run.
        metric: As in [`evaluate`].
        schedule: `"stepwise"` or `"accumulated"`.

    Returns:
        One mapping for each t: `t` and the quality.
    """
    quality = quality_of(metric)
    rows: list[list[torch.Tensor]] = [[] for _ in range(T)]
    with _evaluating(model), torch.inference_mode():
        for batch in _bar(batches, f"early exit, T = {T}", progress):
            at_once = max(1, len(batch["labels"]) // T)  # logits of T times as many rows
            for start in range(0, len(batch["labels"]), at_once):
                part = {name: value[start : start + at_once] for name, value in batch.items()}
                for t, logits in enumerate(model.early_exit(T, schedule, **_inputs(part))):
                    rows[t].append(quality.of(logits, part["labels"]))
    return [{"t": t, **quality.result(_joined(found))} for t, found in enumerate(rows, start=1)]


def measure_latency(
    model: Any, batches: Sequence[Batch], asked: Sequence[Mode], stock: Any = None, progress: bool = True
) -> list[dict[str, Any]]:
    """Time of one forward pass, without monitors, interleaved over the modes: median, spread and ratio to the ANN."""
    batch = batches[len(batches) // 2]
    inputs = _inputs(batch)
    tokens = int(batch["attention_mask"].sum())
    seconds: dict[Mode, list[float]] = {mode: [] for mode in asked}
    with _evaluating(model, stock), torch.inference_mode():
        for attempt in _bar(range(LATENCY_ROUNDS + 1), "latency", progress):
            for mode in asked:
                with mode.of(model, stock) as runner:
                    _synchronize(model.device)
                    start = time.perf_counter()
                    runner(**inputs)
                    _synchronize(model.device)
                    if attempt:  # the first round warms up
                        seconds[mode].append(time.perf_counter() - start)
    ann = median(seconds[Mode("qcfs")])
    shape = {"examples": len(batch["input_ids"]), "tokens": tokens}
    return [
        {
            **mode.row(),
            **shape,
            "milliseconds": 1e3 * median(times),
            "fastest": 1e3 * min(times),
            "slowest": 1e3 * max(times),
            "microseconds_per_token": 1e6 * median(times) / tokens,
            "ratio": median(times) / ann,
        }
        for mode, times in seconds.items()
    ]


def make_batches(
    examples: Sequence[Mapping[str, Any]], batch_size: int, pad_token_id: int = 0, device: Any = "cpu"
) -> list[Batch]:
    """Batches of similar length, the longest first, padded on the right; labels of tokens are padded with -100."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    batches = []
    for start in range(0, len(order), batch_size):
        rows = [dict(examples[i]) for i in order[start : start + batch_size]]
        width = len(rows[0]["input_ids"])
        batch: dict[str, Any] = {}
        for name in fill.keys() & ({"attention_mask"} | rows[0].keys()):
            values = [row.get(name, [1] * len(row["input_ids"])) for row in rows]
            if isinstance(values[0], list):
                values = [value + [fill[name]] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values, device=device)
        batches.append(batch)
    return batches


class _Agreement:
    """How much logits agree with those of the ANN: share of equal argmax, and relative error."""

    def __init__(self):
        self.same, self.count, self.sums = 0, 0, np.zeros(2)
        self.classes = 0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, batch: Batch) -> None:
        self.classes = logits.shape[-1]
        for i, (row, target) in enumerate(zip(logits.float(), reference.float(), strict=True)):
            if row.dim() == 2:
                counted = batch["labels"][i, 1:].ne(-100)
                row, target = row[:-1][counted], target[:-1][counted]
            same = row.argmax(-1) == target.argmax(-1)
            self.same += int(same.sum())
            self.count += same.numel()
            self.sums += [(row - target).square().sum().item(), target.square().sum().item()]

    def result(self) -> dict[str, float | None]:
        share = self.same / self.count if self.classes > 1 else None
        return {"agreement": share, "logit_error": math.sqrt(self.sums[0] / max(self.sums[1], 1e-30))}


def _measure(
    model: Any, batches: Sequence[Batch], mode: Mode, metric: str, split: str, stock: Any, progress: bool
) -> dict[str, Any]:
    """One row of results: a pass over the data in one mode, each batch beside the ANN."""
    quality, agreement = quality_of(metric), _Agreement()
    numbers = []
    monitor, errors = SpikeMonitor(model, densities=True), SiteErrors(model)
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in _bar(batches, str(mode), progress):
            inputs = _inputs(batch)
            with errors:
                if mode.name != "qcfs":
                    with model.running(0):
                        reference = model(**inputs).logits
                with mode.of(model, stock) as runner, monitor:
                    logits = runner(**inputs).logits
            if not logits.isfinite().all():
                raise ValueError(f"`model` must give finite logits, got others in the mode {str(mode)!r}.")
            numbers.append(quality.of(logits, batch["labels"]))
            agreement.add(logits, logits if mode.name == "qcfs" else reference, batch)
    row = {**mode.row(), "split": split, "quality": quality.result(_joined(numbers)), **agreement.result()}
    row["spike_rate"] = monitor.spike_rate if mode.T else None
    if mode.name != "stock":
        row["L"] = model.config.L
        relative = errors.relative()
        row["sites"] = [
            {"site": name, **site.summary(), "error": relative.get(name)} for name, site in monitor.sites.items()
        ]
        row |= monitor.silent_sites()
        warn_of_silent_sites(row, str(mode))
    return row | {"seconds": time.perf_counter() - start}


def _energy(model: Any, row: dict[str, Any], qcfs: Any, **settings: Any) -> dict[str, Any]:
    """Energy of a row from its own spike rates, beside the ANN with and without skipping zeros."""
    densities = {site["site"]: site["density"] for site in qcfs["sites"] if site["density"] is not None} or None
    if not row["T"]:
        return energy_report(model, execution="ann", densities=densities, **settings)
    rates = {site["site"]: site["spike_rate"] for site in row["sites"]}
    settings |= {"T": row["T"], "spike_rates": rates, "densities": densities}
    report = energy_report(model, execution=row["schedule"], **settings)
    if row["schedule"] == "stepwise" and model.config.sites == "mlp":
        report["ratio_replicated"] = energy_report(model, execution="replicated", **settings)["ratio"]
    return report


def _check(model: Any, examples: Any, metric: str, timesteps: Any, schedules: Any, batch_size: int) -> None:
    if not hasattr(model, "neurons"):
        raise ValueError(f"`model` must be a FAS model, got {type(model).__name__}. Pass a stock model as `stock`.")
    causal = predicts_next(model)
    if not causal and auto_class(model) != "AutoModelForSequenceClassification":
        raise ValueError(f"`model` must have a language modelling or classification head, got {type(model).__name__}.")
    if metric not in ([PERPLEXITY] if causal else METRICS):
        known = PERPLEXITY if causal else ", ".join(METRICS)
        raise ValueError(f"`metric` must be one of {known} for {type(model).__name__}, got {metric!r}.")
    check_timesteps(timesteps, MOST_TIMESTEPS[model.config.code])
    allowed = model.config.schedules
    if schedules is not None and (not schedules or any(schedule not in allowed for schedule in schedules)):
        raise ValueError(f"`schedules` must be some of {', '.join(allowed)}, got {list(schedules)}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not len(examples):
        raise ValueError("`examples` must not be empty: there is nothing to measure.")
    for i, example in enumerate(examples):
        missing = [name for name in ("input_ids", "labels") if example.get(name) is None]
        if missing:
            raise ValueError(f"`examples` must all have `input_ids` and `labels`, got number {i} without {missing}.")
        _check_range("input_ids", example["input_ids"], model.config.vocab_size, i)
        if causal or model.config.num_labels > 1:
            labels = [label for label in example["labels"] if label != -100] if causal else [example["labels"]]
            _check_range("labels", labels, model.config.vocab_size if causal else model.config.num_labels, i)


def _check_range(name: str, values: Sequence[int], most: int, number: int) -> None:
    wrong = [value for value in values if not 0 <= value < most]
    if wrong:
        raise ValueError(f"`{name}` must be from 0 to {most - 1}, got {wrong[0]} in example {number}.")


def check_timesteps(timesteps: Sequence[int], most: int | None = None) -> None:
    """Raise unless all are at least 1, at most what a code has, and different."""
    if not timesteps or any(not isinstance(T, int) or T < 1 for T in timesteps) or len({*timesteps}) < len(timesteps):
        raise ValueError(
            f"`timesteps` must be different integers of at least 1, got {list(timesteps)}. "
            "The QCFS ANN (T = 0) is always measured."
        )
    if most is not None and max(timesteps) > most:
        raise ValueError(f"`timesteps` must be at most {most}, got {max(timesteps)}. Fewer do: 4 to 8, as a rule.")


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode inside; training mode as before afterwards. None is no model."""
    before = [(model, model.training) for model in models if model is not None]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)


def _inputs(batch: Batch) -> Batch:
    """What the model sees: no labels, and no mask where nothing is padded, as attention is faster without."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return inputs


def _find(rows: Sequence[dict[str, Any]], mode: Mode) -> dict[str, Any] | None:
    return next((row for row in rows if mode.row().items() <= row.items()), None)


def _joined(numbers: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat(list(numbers)).cpu().numpy()


def _bar(items: Any, description: str, progress: bool) -> Any:
    return tqdm(items, desc=description, leave=False, disable=None if progress else True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
