"""Measure a checkpoint over timesteps and schedules, beside its QCFS ANN and the stock model.

    python -m training.evaluate CHECKPOINT --validation_file sst2.parquet --T 2 4 8 --output_dir report

writes `results.json`, the tables as Markdown, the plots, and one HTML file with all of it. Interrupted, it keeps the
rows that are finished, and the same command goes on from there.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer

import modeling_fas
from configuration_fas import SCHEDULES, FASConfig

from ..arguments import check_writable, require_model_type
from ..commands import command_parser, is_first_process, only_run
from ..results import fingerprint, plain, read_results, write_results
from ..shards import check_shards
from .energy import AC_PJ, MAC_PJ, check_prices
from .evaluation import RESULTS_FILE, summary
from .examples import load_examples
from .measurement import MEASURED, check_timesteps, evaluate
from .report import write_report


logger = logging.getLogger(__name__)


EXAMPLE = """fas evaluate CHECKPOINT --validation_file sst2.parquet --T 2 4 8 --output_dir report

--debug shows the traceback of an error.
"""


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = command_parser("fas evaluate", (__doc__ or "").split("\n")[0], EXAMPLE)
    add = parser.add_argument
    add(
        "checkpoint",
        help="FAS language model (causal or masked), classifier, regressor, or model without a head: a folder, or a "
        "name on the Hub",
    )
    add("--stock", help="the model before conversion, to compare with")
    add("--T", type=int, nargs="+", default=[2, 4, 8], help="timesteps (default: 2 4 8)")
    add(
        "--schedule",
        nargs="+",
        choices=SCHEDULES,
        help="default: stepwise and layerwise, as far as the model's code allows",
    )
    add("--task_name", help="GLUE task; finds the columns and the metric")
    add("--dataset_name", help="data set: a folder of parquet, csv or json files, or a name on the Hub")
    add("--dataset_config_name", help="configuration, or sub-folder, of it")
    add("--validation_file", help="data in one file: parquet, csv, json or txt")
    add("--eval_split", default="validation", help="split to evaluate on (default: validation)")
    add("--text_columns", nargs="+", default=[], help="column of the text, or the two of a pair")
    add("--label_column", default="label", help="column of the label (default: label)")
    add("--limit", type=int, help="use the first so many examples; of a text, so many windows")
    add("--max_seq_length", type=int, help="longest text of what is no causal model (default: 128)")
    add("--window", type=int, help="tokens of a window of text (default: the positions of the model, at most 1024)")
    add("--stride", type=int, help="tokens from one window to the next (default: the window, no overlap)")
    add("--add_eos", action="store_true", help="end every document with the end-of-text token")
    add("--batch_size", type=int, default=8, help="default: 8")
    add("--mac_pj", type=float, default=MAC_PJ, help=f"picojoules per multiply-accumulate (default: {MAC_PJ})")
    add("--ac_pj", type=float, default=AC_PJ, help=f"picojoules per accumulate (default: {AC_PJ})")
    add("--device", default="cpu", help="default: cpu")
    add("--output_dir", required=True, help="folder for the results; made if need be")
    add("--overwrite_output_dir", action="store_true", help="replace results of other settings in it")
    return parser


def load_models(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the checkpoint, and the stock model where given, in float32; raise unless both fit.

    Raises:
        ValueError: for a checkpoint that is not FAS, has another head or lacks weights, or a stock model unlike it.
    """
    try:
        config, _ = FASConfig.get_config_dict(args.checkpoint)
        require_model_type(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"`checkpoint` must be a FAS checkpoint, got {args.checkpoint!r}: {error}") from error
    kind, architecture = config.get("model_type"), (config.get("architectures") or [None])[0]
    if not str(kind).startswith("fas_"):
        raise ValueError(
            f"`checkpoint` must be a FAS checkpoint, got {args.checkpoint!r} of type {kind!r}. Fine-tune it with QCFS "
            "first (`python -m training.convert`); a model that does not spike is given as --stock."
        )
    models = FASConfig(**config).table.models
    found = {models[auto]: auto for auto in MEASURED if auto in models}
    if architecture not in found:
        raise ValueError(f"`checkpoint` must be one of {', '.join(found)}, got {architecture!r}.")
    fas_class, stock_class = getattr(modeling_fas, architecture), getattr(transformers, found[architecture])
    model = load_whole(fas_class, args.checkpoint, "checkpoint")
    stock = load_whole(stock_class, args.stock, "--stock") if args.stock else None
    if stock is not None:
        for name in ("vocab_size", "num_labels"):
            ours, theirs = getattr(model.config, name), getattr(stock.config, name)
            if ours != theirs:
                raise ValueError(f"`--stock` must have the same `{name}` as the checkpoint, {ours}, got {theirs}.")
        stock.to(args.device)
    return model.to(args.device), stock


def load_tokenizer(checkpoint: str) -> Any:
    """Load the tokenizer of a checkpoint."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"`checkpoint` must hold its tokenizer, got {checkpoint!r}: {error}") from error


def load_whole(model_class: Any, source: str, flag: str) -> Any:
    """Load a model in float32; raise unless the checkpoint has all of its weights."""
    check_shards(source)
    try:
        model, info = model_class.from_pretrained(source, dtype="float32", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"`{flag}` must be a checkpoint that can be read, got {source!r}: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"`{flag}` must hold all weights, got {source!r} without {sorted(info['missing_keys'])[:3]}.")
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure a checkpoint, write the results as they come, and the report at the end; returns the results.

    Under a launcher its first process does this; the others return nothing.
    """
    args = make_parser().parse_args(argv)
    check_timesteps(args.T)
    check_prices(args.mac_pj, args.ac_pj)
    check_writable(args.output_dir)
    if not is_first_process():
        logger.info("Measuring takes one process: this one has nothing to do.")
        return {}
    with only_run(args.output_dir):
        return _measured(args, argv)


def _measured(args: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """Measure as checked arguments say; returns the results."""
    model, stock = load_models(args)
    tokenizer = load_tokenizer(args.checkpoint)
    examples = load_examples(args, model, tokenizer)
    path = Path(args.output_dir) / RESULTS_FILE
    configuration = {
        "checkpoint": args.checkpoint,
        "weights_sha256": fingerprint(model),
        "stock": args.stock,
        "config": model.config.to_diff_dict(),
        "data": examples.description,
        "timesteps": args.T,
        "schedules": args.schedule,
        "batch_size": args.batch_size,
        "mac_pj": args.mac_pj,
        "ac_pj": args.ac_pj,
        "device": args.device,
    }
    finished = earlier_results(path, configuration, args.overwrite_output_dir)

    def save(metrics: dict[str, Any], status: str = "partial") -> None:
        write_results(path, metrics=metrics, configuration=configuration, status=status, command=command)

    given = sys.argv[1:] if argv is None else argv
    command = ["python", "-m", "training.evaluate", *given]
    try:
        metrics = evaluate(
            model,
            examples.rows,
            metric=examples.metric,
            timesteps=args.T,
            schedules=args.schedule,
            stock=stock,
            tokenizer=tokenizer,
            configuration=configuration,
            split=args.eval_split,
            batch_size=args.batch_size,
            pad_token_id=tokenizer.pad_token_id or 0,
            mac_pj=args.mac_pj,
            ac_pj=args.ac_pj,
            finished=finished,
            on_result=save,
        )
    except KeyboardInterrupt:
        logger.warning(f"Interrupted: {path} has the rows that were finished. The same command goes on from there.")
        raise
    save(metrics, "complete")
    report = write_report(path)
    logger.info(f"\n{summary(metrics)}\n\nThe report is {report}")
    return read_results(path)


def earlier_results(path: Path, configuration: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return what an earlier run of the same configuration has finished; raise rather than overwrite another's."""
    if not path.exists():
        return None
    try:
        earlier = read_results(path)
        same = earlier["configuration"] == plain(configuration)
        same &= all("mode" in row for row in earlier["metrics"]["rows"])  # of 0.1, other names
    except (ValueError, KeyError, TypeError):
        earlier, same = {}, False
    if same:
        return earlier["metrics"]
    if overwrite:
        return None
    raise ValueError(
        f"`--output_dir` must be empty or hold an interrupted run of the same settings, got {str(path)!r} with "
        "others. Choose another folder, or add --overwrite_output_dir to replace the results in it."
    )
