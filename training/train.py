"""One stage of training, by the script that fits: run_glue for a task, run_clm or run_mlm for running text.

    fas train --model_name_or_path bert-base-cased --task_name sst2 --do_train --do_eval --T 4 --output_dir out

A task is what --task_name or --label_column names, a checkpoint with a classifier's head, or, for an encoder, data
with a column of labels. The same as `python -m training.run_glue` and the like, whose name is printed first.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from configuration_fas import FASConfig

from . import run_clm, run_glue, run_mlm
from .arguments import (
    DataArguments,
    ModelArguments,
    Parser,
    expand_yaml,
    parse_flags,
    read_fields,
    require_model_type,
)
from .commands import UsageError
from .data import columns_of, load_raw


logger = logging.getLogger("training.train")

EXAMPLE = """
example:
  fas train --model_name_or_path google-bert/bert-base-cased --task_name sst2 --do_train --do_eval --T 4 \\
      --output_dir outputs/sst2
"""


def make_parser(prog: str = "fas train", description: str = "", example: str = EXAMPLE) -> Parser:
    """The flags of the command."""
    description = description or (__doc__ or "").split("\n")[0]
    return Parser(prog=prog, description=description, epilog=example)


def show_help(argv: Sequence[str], parser: Parser) -> None:
    """Print the help, and leave, where it is asked for, or nothing is."""
    asked = [flag for flag in ("--help_all", "-h", "--help") if flag in argv]
    if asked or not argv:
        parser.parse_args(asked[:1] or ["--help"])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stage; returns the rows of its evaluation."""
    given = list(sys.argv[1:] if argv is None else argv)
    show_help(given, make_parser())
    script = script_for(given)
    logger.info("%s: %s", script.__name__.rpartition(".")[2], (script.__doc__ or "").partition(":")[0])
    return script.main(given)


def script_for(argv: Sequence[str]) -> Any:
    """The module that runs a command line.

    Raises:
        UsageError: for flags that cannot be read, or name no model.
        ValueError: for a model or data that cannot be read.
    """
    flags = parse_flags(argv)
    model, data = read_fields(ModelArguments, flags), read_fields(DataArguments, flags)
    source = model.model_name_or_path or model.config_name
    if source is None:
        raise UsageError(
            "`--model_name_or_path` is required: a checkpoint to start from. `fas train --help` says more."
        )
    try:
        found, _ = FASConfig.get_config_dict(source, revision=model.model_revision)
        require_model_type(found)
        causal = FASConfig.from_pretrained(source, revision=model.model_revision).table.causal
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--model_name_or_path` must be a checkpoint that can spike, got {source!r}: {error}"
        ) from error
    named = {token.partition("=")[0] for token in expand_yaml(argv)}
    classifies = any("SequenceClassification" in name for name in found.get("architectures") or ())
    if data.task_name or "--label_column" in named or (classifies and model.stage == "calibrate"):
        return run_glue
    if causal:
        return run_glue if classifies else run_clm
    return run_glue if _has_labels(data) else run_mlm


def _has_labels(data: DataArguments) -> bool:
    """Whether files on this machine have the column of labels; of a name on the Hub nothing is known."""
    data.check("glue", do_train=False, do_eval=False)
    if not (data.train_file or data.validation_file):
        return False
    return any(data.label_column in columns_of(split) for split in load_raw(data).values())


if __name__ == "__main__":
    from .commands import run_command, show_messages

    show_messages()
    sys.exit(run_command(main, "Not trained"))
