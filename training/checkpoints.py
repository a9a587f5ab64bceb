"""Checkpoints that are whole: which one to resume from, and none that a killed process left half-written."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import FASTrainingArguments


logger = logging.getLogger(__name__)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: the trainer state is the last file of it."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders, whole or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoint_to_resume(args: FASTrainingArguments) -> str | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: the one named, or the last complete one.

    Raises:
        ValueError: if the one named is not complete.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    if isinstance(wanted, str):
        if not is_complete(Path(wanted)):
            raise ValueError(
                f"`--resume_from_checkpoint` must be a complete checkpoint, got {wanted!r} without a readable "
                f"{TRAINER_STATE_NAME}. --resume_from_checkpoint true takes the last complete one of --output_dir."
            )
        return wanted
    complete = [path for path in checkpoints(args.output_dir or "") if is_complete(path)]
    if not complete:
        logger.warning(f"No complete checkpoint in {args.output_dir!r}: training starts from the beginning.")
        return None
    return str(complete[-1])


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run, their mark of completeness first."""
    for path in checkpoints(output_dir):
        unmark(path)
        shutil.rmtree(path)


def unmark(checkpoint: Path) -> None:
    """Make a checkpoint count as incomplete, before it is written again or deleted."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[str]:
    """Yield a scratch folder to save a model into, which then replaces the one in `folder`.

    Raises:
        OSError: if it cannot be written, with what was in `folder` before still there and nothing added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            yield scratch
            files = {path.relative_to(scratch): path for path in Path(scratch).rglob("*") if path.is_file()}
            for weights in folder.glob("model*.safetensors*"):
                if weights.relative_to(folder) not in files:
                    weights.unlink()
            for name, path in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"`output_dir` must be a folder with room for the model, got {str(folder)!r}: {error}. What was in it "
            "before is unchanged. Free some space, then save again."
        ) from error
