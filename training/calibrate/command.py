"""Calibrate a checkpoint: `--stage calibrate` of the script that it was fine-tuned with.

    fas calibrate --model_name_or_path CHECKPOINT --calib_T 4 --train_file texts.csv --do_train --output_dir out

takes the flags of `training.run_glue` for a classifier or regressor, else of `training.run_clm`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from configuration_fas import FASConfig

from .. import run_clm, run_glue
from ..arguments import Parser, parse_arguments
from ..commands import UsageError
from ..train import make_parser as training_parser
from ..train import show_help


EXAMPLE = """
example:
  fas calibrate --model_name_or_path outputs/sst2 --calib_T 4 --train_file texts.csv --do_train --max_steps 200 \\
      --output_dir outputs/sst2-spiking
"""


def make_parser() -> Parser:
    """The flags of the command."""
    return training_parser("fas calibrate", (__doc__ or "").split("\n")[0], EXAMPLE)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stage; returns the rows of its evaluation."""
    given = list(sys.argv[1:] if argv is None else argv)
    show_help(given, make_parser())
    source = parse_arguments(given)[0].model_name_or_path
    if source is None:
        raise UsageError("`--model_name_or_path` is required: a checkpoint that was fine-tuned with QCFS.")
    try:
        config, _ = FASConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--model_name_or_path` must be a FAS checkpoint, got {source!r}: {error}") from error
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or ())
    return (run_glue if classifies else run_clm).main([*given, "--stage", "calibrate"])
