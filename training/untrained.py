"""Conversion without training, on the command line: fit thresholds, save, and compare with the stock model.

`fas convert MODEL --sites all --code phase --T 5 --calibration_file FILE --output_dir OUT` comes here.
"""

import argparse
import logging
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer

from configuration_fas import SCHEDULES, FASConfig

from .arguments import FILE_TYPES, DataArguments, check_writable, require_model_type
from .calibrate.conversion import TOKENS, convert_and_report, summary
from .checkpoints import remove_scratch, whole_or_nothing
from .commands import is_first_process, only_run
from .data import check_texts, load_raw, require_columns, text_column
from .evaluate import SpikeMonitor, energy_report, evaluate
from .evaluate.examples import load_examples, make_batches, windows
from .evaluate.measurement import ROWS_ALONE
from .evaluate.rows import PERPLEXITY
from .layout import auto_class, predicts_next
from .results import fingerprint, markdown_table, write_results


logger = logging.getLogger("training.convert")

SUMMARY_FILE = "conversion.json"
LENGTH = 256  # of the rows, and of the sequence that energy is counted at
USAGE = """
  fas convert MODEL --sites all --code phase --T 5 --calibration_file FILE --output_dir OUT
      without training: thresholds are fitted to a few hundred tokens (minutes)
  fas convert MODEL --train_file FILE --validation_file FILE --output_dir OUT [--flag value] [--step.flag value]
      fine-tuning with QCFS on one's own data or a --task_name, then calibration
  fas convert RECIPE --output_dir OUT [--model_name_or_path MODEL] [--flag value] [--step.flag value]
      all steps of a recipe; of encoder and decoder 100,000 on a large corpus first (days without a GPU)"""
EXAMPLE = """
example:
  fas convert openai-community/gpt2 --sites all --code phase --T 5 --calibration_file notes.txt --output_dir spiking
"""
RECIPES = """
with training, the published method:
  RECIPE                a YAML file, or one of
{recipes}
                        Without one, steps downstream and calibrate of that for the kind of model. Finished steps are
                        skipped, one that was killed goes on from its last checkpoint.
  --steps NAME …        only these steps of the recipe
  --flag value          for every step: the flags of `fas train --help`
  --STEP.flag value     for one step
  --debug               show the traceback of an error
  docs/training.md says more.
"""


def is_meant(argv: Sequence[str]) -> bool:
    """Whether a command line asks for a conversion without training."""
    return any(each.partition("=")[0] in ("--sites", "--code", "--calibration_file") for each in argv)


def make_parser(recipes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The flags, and as help one page on both ways to convert."""
    parser = argparse.ArgumentParser(
        prog="fas convert",
        usage=USAGE,
        description="Turn a stock model into a spiking one. With --calibration_file: without training.",
        epilog=RECIPES.format(
            recipes=textwrap.fill(", ".join(recipes), 96, initial_indent=" " * 24, subsequent_indent=" " * 24)
        )
        + EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("without training").add_argument
    add("model", metavar="MODEL", help="stock model: a folder, or a name on the Hub")
    add("--sites", choices=("linear", "all", "mlp"), default="all", help="where neurons sit (default: all)")
    add("--code", choices=("phase", "first_spike", "rate"), default="phase", help="of the spikes (default: phase)")
    add("--T", metavar="T", type=int, help="timesteps (default: 5 for phase, else 16)")
    add("--schedule", choices=SCHEDULES, help="layerwise (the default); a rate code may have another")
    add(
        "--gain", choices=("static", "token"), help="thresholds for all tokens, or by token (default: by architecture)"
    )
    add(
        "--code_base",
        metavar="B",
        type=float,
        help="of a first spike (default: 1.2 from 12 timesteps on, else the root of 2)",
    )
    add(
        "--calibration_file",
        metavar="FILE",
        required=True,
        help="text to fit the thresholds to: parquet, csv, json(l) or txt",
    )
    add("--calibration_column", metavar="COLUMN", help="its column (default: text, or the first one)")
    add("--tokens", metavar="N", type=int, default=TOKENS, help=f"tokens of it that are used (default: {TOKENS})")
    add(
        "--output_dir",
        metavar="OUT",
        required=True,
        help="folder for the spiking model and conversion.json; made if need be",
    )
    add(
        "--validation_file",
        metavar="FILE",
        help="data to judge both models on (default: what calibration leaves of its text)",
    )
    add("--validation_column", metavar="COLUMN", help="column of its text (default: text, or the first one)")
    add(
        "--label_column",
        metavar="COLUMN",
        default="label",
        help="column of its labels, for a classifier (default: label)",
    )
    add("--task_name", metavar="TASK", help="GLUE task of a classifier; finds its columns and metric")
    add(
        "--limit",
        metavar="N",
        type=int,
        default=16,
        help=f"windows of {LENGTH} tokens, or examples, to judge on (default: 16)",
    )
    return parser


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Convert, save, judge; returns the rows of the stock and the spiking model.

    Under a launcher its first process does this; the others return no rows.

    Raises:
        ValueError: for settings, files or a model that cannot be used.
    """
    args = make_parser().parse_args(argv)
    for name in ("tokens", "limit"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if args.validation_file:
        _check_file(args.validation_file, "validation_file")
    texts = read_texts(args.calibration_file, args.calibration_column, "calibration")
    config, tokenizer = _config_and_tokenizer(args.model)
    if Path(args.output_dir).resolve() == Path(args.model).resolve():
        raise ValueError(f"`--output_dir` must not be the folder of the stock model, got {args.output_dir!r}.")
    check_writable(args.output_dir)
    if not is_first_process():
        logger.info("Converting takes one process: this one has nothing to do.")
        return []
    with only_run(args.output_dir):
        return _convert(args, texts, config, tokenizer, argv)


def _convert(
    args: argparse.Namespace, texts: list[str], config: Any, tokenizer: Any, argv: Sequence[str]
) -> list[dict[str, Any]]:
    """Convert, save whole or not at all, judge; returns the rows."""
    out = Path(args.output_dir)
    remove_scratch(out)
    length = min(LENGTH, config.max_position_embeddings)
    calibration, left = split_texts(texts, tokenizer, config.table.causal, args.tokens, length, args.limit)
    start = time.perf_counter()
    names = ("sites", "code", "T", "schedule", "gain", "code_base", "tokens")
    settings = {name: getattr(args, name) for name in names}
    model, found = convert_and_report(args.model, calibration, tokenizer=tokenizer, length=length, **settings)
    seconds = time.perf_counter() - start
    (out / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier model
    with whole_or_nothing(out) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    rows, judged = judge(model, tokenizer, args, left, calibration)
    kinds = summary(model, found)
    configuration = {**vars(args), "judged_on": judged, "config": model.config.to_diff_dict()}
    write_results(
        out / SUMMARY_FILE,
        metrics={"rows": rows, "kinds": kinds, "sites": found, "conversion_seconds": seconds},
        configuration={**configuration, "weights_sha256": fingerprint(model)},
        command=["python", "-m", "training.convert", *argv],
    )
    tables = f"{markdown_table(cells(rows))}\n\nBy kind of site, on the calibration:\n\n{markdown_table(kinds)}"
    logger.info("\nJudged on %s.\n\n%s\n", judged, tables)
    logger.info("Thresholds took %.0f s. The model is in %s", seconds, args.output_dir)
    return rows


def read_texts(path: str, column: str | None, name: str) -> list[str]:
    """The texts of a file that are not empty.

    Args:
        path: Of the file.
        column: Of the texts; found if not given.
        name: What the flags of the file and the column begin with.
    """
    _check_file(path, f"{name}_file")
    disable_progress_bar()
    data = DataArguments(validation_file=path)
    dataset: Any = load_raw(data)["validation"]
    if column is not None:
        require_columns(dataset, [column], f"{name}_column", "of the file")
    column = column or text_column(dataset, data, "validation")
    check_texts(dataset[column], data, "validation", column, range(len(dataset)), f"{name}_column")
    texts = [text for text in dataset[column] if text.strip()]
    if not texts:
        raise ValueError(f"`--{name}_file` must hold text, got none in {path!r}. --{name}_column names its column.")
    return texts


def _check_file(path: str, flag: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"`--{flag}` must be a file that exists, got {path!r}.")
    if Path(path).suffix not in FILE_TYPES:
        raise ValueError(f"`--{flag}` must be one of {', '.join(FILE_TYPES)}, got {path!r}.")
    if not Path(path).stat().st_size:
        raise ValueError(f"`--{flag}` must hold text, got the empty file {path!r}.")


def _config_and_tokenizer(source: str) -> tuple[FASConfig, Any]:
    try:
        require_model_type(FASConfig.get_config_dict(source)[0])
        config = FASConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`MODEL` must be a checkpoint that can spike, got {source!r}: {error}") from error
    try:
        return config, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`MODEL` must hold its tokenizer, got {source!r}: {error}") from error


def split_texts(
    texts: list[str], tokenizer: Any, causal: bool, tokens: int, length: int, limit: int
) -> tuple[Any, list[dict[str, Any]]]:
    """What to calibrate on, and as tokenized examples what that leaves of the texts to judge on.

    Returns:
        Token ids in rows of equal length for a causal model, else texts; and the examples, at most `limit`.
    """
    if causal:
        ids: list[int] = []
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= tokens + limit * length:
                break
        length = min(length, tokens)
        used = min(len(ids), tokens)
        used = used // length * length or used
        calibration: Any = torch.tensor(ids[:used]).view(-1, min(length, used) or 1)
        end = min(len(ids), used + limit * length) if len(ids) > tokens else used  # what fills no row judges nothing
        starts = range(used, end, length)
        rows = [ids[start : start + length] for start in starts]
    else:
        encoded = (tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts)
        count = seen = 0
        rows = []
        for ids in encoded:
            if seen < tokens:
                count, seen = count + 1, seen + len(ids)
            elif len(rows) < limit:
                rows.append(ids)
            else:
                break
        calibration = texts[:count]
    return calibration, [{"input_ids": row, "labels": row} for row in rows if len(row) > 1]


def judge(
    model: Any, tokenizer: Any, args: argparse.Namespace, left: list[dict[str, Any]], calibration: Any
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the stock model (T = 0) and the spiking one, and in words what they were judged on."""
    kind, metric, examples = auto_class(model), None, left
    judged = f"what calibration left of {args.calibration_file}"
    if args.validation_file and kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        examples, metric = _validation(model, tokenizer, args)
        judged = args.validation_file
    elif args.validation_file:
        texts = read_texts(args.validation_file, args.validation_column, "validation")
        examples = split_texts(texts, tokenizer, model.config.table.causal, 0, _length(model), args.limit)[1]
        judged = args.validation_file
    elif not left:
        logger.warning(
            "`--calibration_file` leaves no text to judge the models on: they are judged on the calibration itself, "
            "which flatters the spiking one. Give --validation_file, or a longer text."
        )
        texts_seen = calibration if isinstance(calibration, list) else calibration.tolist()
        rows = [tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in texts_seen]
        examples = [{"input_ids": row[: _length(model)], "labels": row[: _length(model)]} for row in rows]
        judged = f"the calibration itself, {args.calibration_file}"
    if predicts_next(model):
        metric = PERPLEXITY
    rows = _measured(model, examples, metric, tokenizer) if metric else _compared(model, examples, tokenizer)
    return rows, f"{judged} ({len(examples)} {'windows' if predicts_next(model) else 'examples'})"


def _length(model: Any) -> int:
    return min(LENGTH, model.config.max_position_embeddings)


def _validation(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Any, str]:
    if predicts_next(model):
        texts = read_texts(args.validation_file, args.validation_column, "validation")
        return windows(texts, tokenizer, _length(model), _length(model), args.limit), PERPLEXITY
    columns = [args.validation_column] if args.validation_column else []
    names = dict.fromkeys(("dataset_name", "dataset_config_name", "window", "stride", "max_seq_length"))
    names |= {"eval_split": "validation", "text_columns": columns, "add_eos": False}
    found = load_examples(argparse.Namespace(**{**vars(args), **names}), model, tokenizer)
    return found.rows, found.metric


def _measured(model: Any, examples: Any, metric: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with quality, one window of a vocabulary at a time."""
    T, schedule = model.config.T, model.config.schedule
    metrics = evaluate(
        model,
        examples,
        metric=metric,
        timesteps=[T],
        schedules=[schedule],
        batch_size=1 if predicts_next(model) else 8,
        pad_token_id=tokenizer.pad_token_id or 0,
        finished=ROWS_ALONE,
        configuration={},  # nobody asks: it has a checksum of all weights
    )
    model.set_timesteps(T, schedule)
    stock, spiking = metrics["rows"]
    rates = {site["site"]: site["spike_rate"] for site in spiking["sites"]}
    return _with_energy(model, {**stock, "mode": "stock"}, spiking, rates)


@torch.no_grad()
def _compared(model: Any, examples: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of a model that has no measure of quality here: how far it is from the stock model."""
    T, schedule = model.config.T, model.config.schedule
    unlabelled = [{"input_ids": each["input_ids"], "labels": 0} for each in examples]
    monitor, error, norm, start = SpikeMonitor(model), 0.0, 0.0, time.perf_counter()
    for batch in make_batches(unlabelled, 8, tokenizer.pad_token_id or 0, model.device):
        del batch["labels"]
        with model.running(0):
            wanted = model(**batch)[0].double()
        with monitor:
            given = model(**batch)[0].double()
        if given.shape[:2] == batch["attention_mask"].shape:
            wanted, given = (each[batch["attention_mask"].bool()] for each in (wanted, given))
        error += (given - wanted).square().sum().item()
        norm += wanted.square().sum().item()
    base = {"split": "validation", "spike_rate": None, "seconds": time.perf_counter() - start}
    stock = {"mode": "stock", "T": 0, "schedule": None, **base, "quality": {"output_error": 0.0}}
    spiking = {"mode": "spiking", "T": T, "schedule": schedule, **base, "spike_rate": monitor.spike_rate}
    spiking |= monitor.silent_sites()
    spiking["quality"] = {"output_error": (error / max(norm, 1e-30)) ** 0.5}
    return _with_energy(model, stock, spiking, monitor.spike_rates())


def _with_energy(model: Any, stock: Any, spiking: Any, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The rows with spikes an input and energy at `LENGTH` tokens, in sum."""
    settings: dict[str, Any] = {"length": _length(model), "causal": model.config.table.causal}
    T = model.config.T
    reports = (
        energy_report(model, execution="ann", **settings),
        energy_report(model, execution=model.config.schedule, T=T, spike_rates=rates, **settings),
    )
    rows = []
    for row, report in zip((stock, spiking), reports, strict=True):
        del report["operations"]
        rows.append({**row, "spikes_an_input": row["T"] * row["spike_rate"] if row["T"] else None, "energy": report})
    return rows


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table that is printed."""
    return [
        {
            "model": f"spiking, T = {row['T']}" if row["T"] else "stock",
            **{name.replace("_", " "): value for name, value in row["quality"].items()},
            "spikes an input": row["spikes_an_input"],
            "energy": row["energy"]["ratio"],
            "synaptic reads": row["energy"]["reads_ratio"],
        }
        for row in rows
    ]
