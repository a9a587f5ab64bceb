"""The results files of a checkpoint folder: read, and held against the weights they claim to be of."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results import checksum, fault_of, read_results, without_paths
from .files import REPORT, VerificationError, read_json


CALIBRATION = "calibration.json"
GENERIC_NAMES = {"model", "checkpoint", "main", "final"}  # of folders, that say nothing of what is in them
AGAIN = "Evaluate the checkpoint again (`--do_eval` of its script, or training.evaluate), or remove the file."


@dataclass
class Record:
    """A results file of a checkpoint, as the training scripts or `training.evaluate` write it."""

    file: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its rows, as `docs/results-schema.md` says.

        Raises:
            VerificationError: for rows of an earlier version, or with numbers that are none.
        """
        metrics = self.content["metrics"]
        rows = metrics.get("rows", ()) if isinstance(metrics, Mapping) else metrics
        if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
            raise VerificationError(f"`{self.file}` must hold a list of rows, got {rows!r:.60}. {AGAIN}")
        rows = [row for row in rows if "T" in row]
        if fault := next(filter(None, map(fault_of, rows)), None):
            raise VerificationError(
                f"`{self.file}` must hold rows as docs/results-schema.md says, got {fault}. If training diverged, "
                f"train again with a lower rate. {AGAIN}"
            )
        return rows

    @property
    def is_conversion(self) -> bool:
        """Whether it is of a conversion without training (`training.convert MODEL --sites …`)."""
        return "calibration_file" in self.content["configuration"]

    def setting(self, part: str, name: str) -> Any:
        """One setting of the run, or None."""
        settings = self.content["configuration"].get(part)
        return settings.get(name) if isinstance(settings, Mapping) else None

    def check(self, weights: str, folder: Path) -> None:
        """Raise unless its rows were measured on the weights of a folder, and stand as they were written.

        Args:
            weights: `weights_sha256` of the folder.
            folder: Named in the message.
        """
        if not self.rows:
            return
        measured = self.content["configuration"].get("weights_sha256")
        if measured != weights:
            raise VerificationError(
                f"`{self.file}` must be measured on the weights in {str(folder)!r}, which have the `weights_sha256` "
                f"{weights}, got a report of {measured or 'weights it does not name'}. {AGAIN}"
            )
        self.check_unedited()
        if "sha256" not in self.content:
            raise VerificationError(f"`{self.file}` must have the `sha256` of what it says, got none. {AGAIN}")

    def check_unedited(self) -> None:
        """Raise if what it says is not what its `sha256`, if it has one, was taken of."""
        said = self.content.get("sha256")
        if said not in (None, found := checksum(self.content)):
            raise VerificationError(
                f"`{self.file}` must stand as it was written, with the `sha256` {said}, got {found}: it was edited "
                f"since. {AGAIN}"
            )


@dataclass
class Sources:
    """All that the figures of a card come from.

    Args:
        config: `config.json`.
        records: Results files of the checkpoint; a report comes first.
        earlier: Training records of the checkpoints it started from, newest first.
        calibration: `calibration.json`, if there is one.
        code: What sets its code files apart from those of a release, if anything does.
    """

    config: dict[str, Any]
    records: list[Record]
    earlier: list[Record] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    code: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Sources":
        """What `write_json` made of one.

        Raises:
            VerificationError: if a record in it was edited since.
        """
        try:
            records, earlier = ([Record(**each) for each in content[name]] for name in ("records", "earlier"))
            sources = cls(content["config"], records, earlier, content["calibration"], content.get("code"))
            for record in [*sources.records, *sources.earlier]:
                record.check_unedited()
        except (KeyError, TypeError, AttributeError) as error:
            raise VerificationError(
                f"`sources` must be those that training.publish.cards writes beside a card, got {error!r}. "
                "Write the card again from its checkpoint folder."
            ) from error
        return sources

    def forget_paths(self) -> None:
        """Cut the paths of this machine out of all records."""
        for record in (*self.records, *self.earlier):
            record.content = portable(record.content)

    @property
    def history(self) -> list[Record]:
        """The training records, newest first."""
        own = training_record(self.records)
        return [own, *self.earlier] if own else []

    @property
    def conversion(self) -> "Record | None":
        """The record of the conversion without training that made the checkpoint, if that did."""
        return None if self.history else next((each for each in self.records if each.is_conversion), None)


def portable(content: Mapping[str, Any]) -> dict[str, Any]:
    """A results file without the paths of this machine, cut to the last names in them; its `sha256` is taken anew."""
    cut = {
        name: _cut(value) if name in ("command", "configuration", "training") else value
        for name, value in content.items()
    }
    return cut | {"sha256": checksum(cut)} if "sha256" in cut else cut


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut(each) for each in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(/|~|\.\.?/)[^\s]*$", value):  # nothing but a path; the mark keeps it from being a name on the Hub
        parts = Path(value).parts
        return "/".join(("…", *parts[-2 if parts[-1] in GENERIC_NAMES else -1 :]))
    return without_paths(value)


def read_records(folder: Path) -> list[Record]:
    """The results files of a folder: JSON objects with `metrics` and `configuration`; a report comes first.

    A list is none: other libraries write those beside a model.
    """
    records = []
    for path in [folder / REPORT, *sorted(folder.glob("*.json"))]:
        if path.is_file() and not path.read_bytes().lstrip().startswith(b"["):
            content = _read(path)
            if {"metrics", "configuration"} <= content.keys():
                name = path.relative_to(folder).as_posix()
                if not isinstance(content["configuration"], Mapping):
                    raise VerificationError(
                        f"`configuration` in {name} must be a mapping, got {content['configuration']!r:.60}. {AGAIN}"
                    )
                records.append(Record(name, content))
    return records


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_results(path)
    except ValueError as error:
        raise VerificationError(str(error)) from error


def training_record(records: list[Record]) -> Record | None:
    """The one that a training script wrote, if any."""
    return next((record for record in records if record.setting("training", "seed") is not None), None)


def lineage(folder: Path) -> Iterator[tuple[Path, Record]]:
    """The training record of a folder and of those it started from, newest first, as far as they are on this disk."""
    seen = set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        record = training_record(read_records(folder))
        if record is None:
            return
        yield folder, record
        base = Path(str(record.setting("model", "model_name_or_path") or ""))
        folder = base if base.is_dir() else folder.parent / base.name


def read_sources(folder: Path) -> Sources:
    """Read all that the card of a checkpoint folder is made from."""
    calibration = folder / CALIBRATION
    return Sources(
        config=read_json(folder / "config.json"),
        records=read_records(folder),
        earlier=[record for _, record in lineage(folder)][1:],
        calibration=_read(calibration) if calibration.is_file() else None,
    )
