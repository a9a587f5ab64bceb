"""Calibrate a QCFS checkpoint: `--stage calibrate` of the script that it was fine-tuned with.

    python -m training.calibrate --model_name_or_path CHECKPOINT --calib_T 4 --do_train --do_eval --T 4 …

takes the flags of `training.run_glue` for a classifier or regressor, else of `training.run_clm`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from configuration_fas import FASConfig

from .. import run_clm, run_glue
from ..arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stage; returns the rows of its evaluation."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or {"-h", "--help"} & {*given}:
        sys.stdout.write(f"{__doc__}\nAll flags:\n\n")
        given = ["--help"]
    source = parse_arguments(given)[0].model_name_or_path
    if source is None:
        raise ValueError("`--model_name_or_path` is required: a checkpoint that was fine-tuned with QCFS.")
    try:
        config, _ = FASConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--model_name_or_path` must be a FAS checkpoint, got {source!r}: {error}") from error
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or ())
    return (run_glue if classifies else run_clm).main([*given, "--stage", "calibrate"])
