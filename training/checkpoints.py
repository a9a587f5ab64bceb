"""Checkpoints that are whole: none that a killed process left half-written, rotated or replaced."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME


SCRATCH = ".saving-"
# Of one process, of FSDP and of DeepSpeed.
WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: it has weights, and the trainer state, its last file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(any(checkpoint.glob(pattern)) for pattern in WEIGHTS)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders, whole or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def last_complete(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint of the latest step, if there is one."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run."""
    for path in checkpoints(output_dir):
        remove(path)


def rotate(output_dir: str | Path, limit: int | None, kept: Collection[Path]) -> None:
    """Delete the oldest checkpoints, by the time they were written, until `limit` are left; never those `kept`."""
    found = sorted(checkpoints(output_dir), key=lambda path: path.stat().st_mtime)
    old = [path for path in found if path not in kept]
    for path in old[: max(len(found) - limit, 0)] if limit and limit > 0 else ():
        remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark of completeness first."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_scratch(folder: Path) -> None:
    """Delete what killed processes left of models that they were saving."""
    for path in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(path)


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[str]:
    """Yield a scratch folder to save a model into, which then replaces the one in `folder`.

    The configuration goes first and comes last, so that no moment leaves weights that load with another one's.

    Raises:
        OSError: if it cannot be written, with what was in `folder` before still there and nothing added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            yield scratch
            files = {path.relative_to(scratch): path for path in Path(scratch).rglob("*") if path.is_file()}
            if Path(CONFIG_NAME) in files:
                (folder / CONFIG_NAME).unlink(missing_ok=True)
            for weights in folder.glob("model*.safetensors*"):
                if weights.relative_to(folder) not in files:
                    weights.unlink()
            for name, path in sorted(files.items(), key=lambda each: each[0] == Path(CONFIG_NAME)):
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"`output_dir` must be a folder with room for the model, got {str(folder)!r}: {error}. What was in it "
            "before is unchanged. Free some space, then save again."
        ) from error
