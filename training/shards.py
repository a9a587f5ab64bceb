"""Sharded weights: the index of a folder names safetensors of that folder, nothing else."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from .results import read_results


def check_shards(source: str | Path) -> None:
    """Raise for an index through which transformers would read a pickle, or a file outside of the folder.

    Args:
        source: A folder; of a name on the Hub nothing is known before it is downloaded.

    Raises:
        ValueError: naming the index and what it names.
    """
    for index in sorted(Path(source).glob("*.index.json")):
        shards = read_results(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"`weight_map` in {index.name} must be a mapping, got {shards!r:.60}.")
        for name in shards.values():
            if not is_plain_name(name) or not name.endswith(".safetensors") or not (index.parent / name).is_file():
                raise ValueError(
                    f"`weight_map` in {index.name} must name safetensors files of the folder, got {name!r:.60}: "
                    "another file would be read as a pickle, or from outside. Save the model again."
                )


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file name with no way out of its folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and not re.search(r"[\\:\x00-\x1f]", name)
    )
