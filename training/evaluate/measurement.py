"""Quality, agreement with the ANN, spikes, energy and latency of one model over timesteps and schedules."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from configuration_fas import MOST_TIMESTEPS

from ..calibrate.loss import uncalibrated
from ..layout import auto_class, evaluating, pooled, predicts_next, spikes_by_itself
from ..metrics import METRICS
from ..results import fingerprint, matching
from .energy import AC_PJ, MAC_PJ, energy_report
from .evaluation import Evaluation, gap_of
from .examples import Batch, examples_of, make_batches
from .monitors import SiteErrors, SpikeMonitor, warn_of_silent_sites
from .recorder import WORDS, SpikeRecorder
from .rows import AGREEMENT, COSINE, PERPLEXITY, UNLABELLED, Mode, Quality, modes, quality_of, schedules_of


MEASURED = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModel")
LATENCY_ROUNDS = 3
# As `finished`, so that nothing but rows is measured.
ROWS_ALONE: dict[str, Any] = dict.fromkeys(("gap", "early_exit", "latency", "raster"))


def evaluate(
    model: Any,
    data: Any,
    labels: Sequence[Any] | None = None,
    *,
    metric: str | None = None,
    timesteps: Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
    stock: Any = None,
    tokenizer: Any = None,
    split: str = "validation",
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    limit: int | None = None,
    length: int | None = None,
    batch_size: int = 8,
    pad_token_id: int | None = None,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
    configuration: Mapping[str, Any] | None = None,
    finished: Mapping[str, Any] | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a FAS model over timesteps and schedules, beside its ANN (T = 0) and, where given, the stock model.

    ```python
    >>> found = fas.evaluate(model, texts)  # perplexity; of a model without a head, cosine to the vectors at T = 0
    >>> found = fas.evaluate(classifier, texts, labels, timesteps=[2, 4], stock=stock)
    ```

    Args:
        model: Language model, causal or masked; classifier or regressor; or model without a head, whose sentence
            vectors (means over tokens) are compared. Left as it was.
        data: Texts; a data set with columns, of `datasets` or as rows or columns; or tokenized examples: `input_ids`
            and `labels`, where tokens with label -100 are context; `token_type_ids`. See [`examples_of`].
        labels: Of texts, for a classifier or regressor: class numbers or names; without them, what is measured is how
            often it agrees with its reference.
        metric: `"perplexity"`, `"cosine"`, `"agreement"` or a name in `training.metrics.METRICS`; by default the
            one that fits.
        timesteps: All at least 1. By default those that the model is set to or calibrated for, else 2, 4 and 8.
        schedules: Of them; by default stepwise and layerwise as far as the model allows, and its own.
        stock: The model before conversion.
        tokenizer: Of texts; by default that of the folder that the model came from.
        split: Name of the examples, for the rows; of a data set with several, the one to take.
        text_columns: Of a data set, where they have no usual name.
        label_column: Of a data set.
        limit: The first so many examples; of running text, windows.
        length: Tokens of a window (by default the positions, at most 1,024), or of a text (128).
        batch_size: Examples in a batch; those of similar length are together.
        pad_token_id: Fills batches up, masked.
        mac_pj: Picojoules per MAC.
        ac_pj: Picojoules per AC.
        configuration: What a results file is to say that the numbers depend on; by default what [`describe`] says.
        finished: What an earlier, interrupted call returned or passed to `on_result`; is not measured again.
        on_result: Called with all results so far whenever one is finished.
        progress: Show bars, on a terminal.

    Returns:
        A mapping of `rows`, `early_exit`, `latency`, `gap` and `raster`, as `docs/results-schema.md` says, that shows
        as a table, writes its report and makes its card.

    Raises:
        ValueError: for anything missing or out of range, before anything runs.
    """
    _check_model(model)
    names = {"tokenizer": tokenizer, "metric": metric, "split": split, "text_columns": text_columns}
    found = examples_of(model, data, labels, **names, label_column=label_column, limit=limit, length=length)
    timesteps = default_timesteps(model) if timesteps is None else timesteps
    _check(model, found.rows, found.metric, timesteps, schedules, batch_size)
    schedules = schedules or schedules_of(model)
    if pad_token_id is None:
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
    if configuration is None:
        settings = {"timesteps": timesteps, "schedules": schedules, "batch_size": batch_size}
        settings |= {"mac_pj": mac_pj, "ac_pj": ac_pj, "split": split, "metric": found.metric}
        configuration = describe(model, {"limit": limit, **found.description}, stock=stock, **settings)
    results = Evaluation({"rows": []} | copy.deepcopy(dict(finished or {})), configuration, _command(timesteps))
    batches = make_batches(found.rows, batch_size, pad_token_id, model.device)
    tokens = sum(len(example["input_ids"]) for example in found.rows)
    energy = {"length": tokens / len(found.rows), "mac_pj": mac_pj, "ac_pj": ac_pj}
    asked = modes(timesteps, schedules, stock=stock is not None)
    quality = quality_of(found.metric, predicts_next(model))
    run = _Run(model, stock, batches, quality, split, progress)

    def save() -> None:
        if on_result is not None:
            on_result(results)

    with evaluating(model, stock):
        for mode in asked:
            if _find(results["rows"], mode) is None:
                row = _measure(run, mode)
                qcfs = row if mode.name == "qcfs" else _find(results["rows"], Mode("qcfs"))
                if mode.name != "stock":
                    row["energy"] = _energy(model, row, qcfs, **energy)
                results["rows"].append(row)
                save()
        if "gap" not in results and (gap := _gap(run, results["rows"])):
            results["gap"] = gap
            save()
        exits = next((each for each in ("stepwise", "accumulated") if each in schedules), None)
        if exits and found.metric not in UNLABELLED and "early_exit" not in results:
            T = max(timesteps)
            curve = early_exit_curve(model, batches, T, quality=quality, schedule=exits, progress=progress)
            results["early_exit"] = {"schedule": exits, "T": T, "curve": curve}
            save()
        if "latency" not in results:
            results["latency"] = measure_latency(model, batches, asked, stock, progress)
            save()
        if "raster" not in results:
            results["raster"] = _raster(run, results["rows"], found.rows, tokenizer)
            save()
    return results


def describe(model: Any, data: Mapping[str, Any], *, stock: Any = None, **settings: Any) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, as a results file has it.

    Args:
        model: That is measured.
        data: What is known of the data.
        stock: The model before conversion.
        **settings: Of the evaluation.
    """
    return {
        "checkpoint": model.name_or_path or type(model).__name__,
        "weights_sha256": fingerprint(model),
        "stock": None if stock is None else stock.name_or_path or type(stock).__name__,
        "config": {**model.config.to_dict(), "architectures": [type(model).__name__]},
        "data": dict(data),
        "device": str(model.device),
        **settings,
    }


def default_timesteps(model: Any) -> list[int]:
    """The T that a model is set to, or calibrated for; else 2, 4 and 8."""
    own = model.config.T or model.config.calib_T
    return [own] if own else [2, 4, 8]


def _command(timesteps: Sequence[int]) -> str:
    return f"fas.evaluate(model, data, timesteps={list(timesteps)})"


def early_exit_curve(
    model: Any,
    batches: Sequence[Batch],
    T: int,
    *,
    quality: Quality,
    schedule: str = "stepwise",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Quality at every t ≤ T of one stepwise or accumulated run, read off the time average of its first t steps.

    Steps do not look ahead, so that t of a longer run equals a run of t steps. Layerwise there is nothing to exit
    from: a layer starts when the one before it has done all its steps.

    Args:
        model: FAS model with a language modelling or classification head.
        batches: From [`make_batches`].
        T: Timesteps of the run.
        quality: From [`quality_of`].
        schedule: `"stepwise"` or `"accumulated"`.

    Returns:
        One mapping for each t: `t` and the quality.
    """
    rows: list[list[torch.Tensor]] = [[] for _ in range(T)]
    with evaluating(model), torch.inference_mode():
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
    with evaluating(model, stock), torch.inference_mode():
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
            **({} if mode.name == "stock" else {"L": model.config.L}),
            **shape,
            "milliseconds": 1e3 * median(times),
            "fastest": 1e3 * min(times),
            "slowest": 1e3 * max(times),
            "microseconds_per_token": 1e6 * median(times) / tokens,
            "ratio": median(times) / ann,
        }
        for mode, times in seconds.items()
    ]


@dataclass
class _Run:
    """What is the same for all rows."""

    model: Any
    stock: Any
    batches: Sequence[Batch]
    quality: Quality
    split: str
    progress: bool


class _Agreement:
    """How much outputs agree with those of the ANN: share of equal argmax, and relative error.

    Args:
        kind: The Auto class of the model.
    """

    def __init__(self, kind: str):
        self.same, self.count, self.sums = 0, 0, np.zeros(2)
        self.causal, self.classes = kind == "AutoModelForCausalLM", kind != "AutoModel"

    def add(self, logits: torch.Tensor, reference: torch.Tensor, batch: Batch) -> None:
        self.classes = self.classes and logits.shape[-1] > 1
        for i, (row, target) in enumerate(zip(logits.float(), reference.float(), strict=True)):
            if row.dim() == 2:
                counted = batch["labels"][i, self.causal :].ne(-100)
                row, target = row[: len(counted)][counted], target[: len(counted)][counted]
            same = row.argmax(-1) == target.argmax(-1)
            self.same += int(same.sum())
            self.count += same.numel()
            self.sums += [(row - target).square().sum().item(), target.square().sum().item()]

    def result(self) -> dict[str, float | None]:
        share = self.same / self.count if self.classes else None
        return {"agreement": share, "logit_error": math.sqrt(self.sums[0] / max(self.sums[1], 1e-30))}


def _measure(run: _Run, mode: Mode) -> dict[str, Any]:
    """One row of results: a pass over the data in one mode, each batch beside the ANN."""
    model = run.model
    agreement, compares = _Agreement(auto_class(model)), type(run.quality) in UNLABELLED.values()
    numbers = []
    monitor, errors = SpikeMonitor(model, densities=True), SiteErrors(model)
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in _bar(run.batches, str(mode), run.progress):
            inputs = _inputs(batch)
            with errors:
                if mode.name != "qcfs":
                    with model.running(0):
                        reference = _answer(model, inputs)
                with mode.of(model, run.stock) as runner, monitor:
                    logits = _answer(runner, inputs)
            if not logits.isfinite().all():
                raise ValueError(f"`model` must give finite logits, got others in the mode {str(mode)!r}.")
            reference = logits if mode.name == "qcfs" else reference
            wanted = batch["labels"] if not compares else reference
            if compares and run.stock is not None:
                wanted = _answer(run.stock, inputs)
            numbers.append(run.quality.of(logits, wanted))
            agreement.add(logits, reference, batch)
    row = {**mode.row(), "split": run.split, "quality": run.quality.result(_joined(numbers)), **agreement.result()}
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


def _answer(model: Any, inputs: Batch) -> torch.Tensor:
    """What is judged: logits; of a model without a head the means over the tokens of its hidden states, `(B, D)`."""
    output = model(**inputs)
    if "logits" in output:
        return output.logits
    hidden = output.last_hidden_state.float()
    mask = inputs.get("attention_mask")
    if mask is None:
        return hidden.mean(1)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _gap(run: _Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What calibration closed, where the network without it is known and `calib_T` was measured."""
    config = run.model.config
    if config.calib_T is None or config.folded or spikes_by_itself(config):
        return None
    measured = [row for row in rows if row["T"] == config.calib_T]
    after = next((row for row in measured if row["schedule"] == "stepwise"), next(iter(measured), None))
    ann = _find(rows, Mode("qcfs"))
    if after is None or ann is None:
        return None
    with uncalibrated(run.model):
        before = _measure(run, Mode("spiking", after["T"], after["schedule"]))
    return gap_of(ann, before, after)


def _raster(
    run: _Run, rows: Sequence[dict[str, Any]], examples: Sequence[Mapping[str, Any]], tokenizer: Any
) -> dict[str, Any] | None:
    """The spikes of a site of median rate over the words of an example, at the most timesteps; None if none spikes."""
    example = max(examples[:50], key=lambda each: min(len(each["input_ids"]), WORDS))
    spiking = [row for row in rows if row["T"]]
    if not spiking:
        return None
    row = max(spiking, key=lambda each: each["T"])
    whole = pooled(run.model)  # has no tokens
    rates = sorted((site["spike_rate"], site["site"]) for site in row["sites"] if site["site"] not in whole)
    rates = [each for each in rates if each[0] > 0]
    if not rates:
        return None
    site = rates[len(rates) // 2][1]
    ids = torch.tensor([list(example["input_ids"])[:WORDS]], device=run.model.device)
    with run.model.running(row["T"], row["schedule"]), SpikeRecorder(run.model, site) as recorder, torch.no_grad():
        run.model(input_ids=ids)
    return recorder.picture(site, tokenizer=tokenizer)


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


def _check_model(model: Any) -> None:
    if not hasattr(model, "neurons"):
        raise ValueError(f"`model` must be a FAS model, got {type(model).__name__}. Pass a stock model as `stock`.")
    if auto_class(model) not in MEASURED:
        raise ValueError(
            "`model` must be a language model, a classifier or without a head to be measured, got "
            f"{type(model).__name__}. `SpikeMonitor` and `energy` take every model."
        )


def _metrics_of(model: Any, labelled: bool) -> list[str]:
    """The metrics that go with a kind of model."""
    kind = auto_class(model)
    if kind in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        return [PERPLEXITY]
    if kind == "AutoModel":
        return [COSINE]
    return [*(METRICS if labelled else ()), *([AGREEMENT] if model.config.num_labels > 1 else ())]


def _check(model: Any, examples: Any, metric: str, timesteps: Any, schedules: Any, batch_size: int) -> None:
    known = _metrics_of(model, examples[0].get("labels") is not None)
    if metric not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(known) or 'none without `labels`'} for {type(model).__name__}, got "
            f"{metric!r}."
        )
    check_timesteps(timesteps, MOST_TIMESTEPS[model.config.code])
    allowed = model.config.schedules
    if schedules is not None and (not schedules or any(schedule not in allowed for schedule in schedules)):
        raise ValueError(f"`schedules` must be some of {', '.join(allowed)}, got {list(schedules)}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    needed = ("input_ids",) if metric in UNLABELLED else ("input_ids", "labels")
    tokens = metric == PERPLEXITY
    for i, example in enumerate(examples):
        missing = [name for name in needed if example.get(name) is None]
        if missing:
            raise ValueError(f"`data` must all have {' and '.join(needed)}, got number {i} without {missing}.")
        _check_range("input_ids", example["input_ids"], model.config.vocab_size, i)
        if "labels" in needed and (tokens or model.config.num_labels > 1):
            labels = [label for label in example["labels"] if label != -100] if tokens else [example["labels"]]
            _check_range("labels", labels, model.config.vocab_size if tokens else model.config.num_labels, i)


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


def _inputs(batch: Batch) -> Batch:
    """What the model sees: no labels, and no mask where nothing is padded, as attention is faster without."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return inputs


def _find(rows: Sequence[dict[str, Any]], mode: Mode) -> dict[str, Any] | None:
    return next(iter(matching(rows, mode.row())), None)


def _joined(numbers: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat(list(numbers)).cpu().numpy()


def _bar(items: Any, description: str, progress: bool) -> Any:
    return tqdm(items, desc=description, leave=False, disable=None if progress else True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
