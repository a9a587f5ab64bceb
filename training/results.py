"""Results files: one JSON per measurement, written atomically; the tables of the documentation come from them.

`docs/results-schema.md` says what is in them, and which command writes which.
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


PACKAGES = (
    "fas-snn", "torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "scipy", "triton",
)  # fmt: skip
# Of a row, what has no place in a cell of a table as it is.
NOT_CELLS = ("quality", "energy", "sites", "L", "dead_sites", "saturated_sites")
# What a row of an evaluation was measured in, and how a reader is told.
MODES = {"stock": "stock model", "qcfs": "QCFS ANN", "spiking": "spiking"}
# Flags and settings whose value is a secret: hub_token, api_key, but not pad_token.
SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:(?:hub|hf|auth|access|api|bearer|github|wandb)[_-]?(?:token|key)|password|passwd|secret(?:[_-]?key)?)$"
    r"|(?:^|\.)token$",
    re.IGNORECASE,
)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def write_results(
    path: str | os.PathLike,
    *,
    metrics: Any,
    configuration: Any,
    command: str | Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write one measurement as JSON, whole or not at all, and return what was written; secrets are left out.

    Args:
        path: The file; its folder is made. An existing file is replaced.
        metrics: What was measured, for example a list of rows or a mapping of names to numbers.
        configuration: Everything the measurement depends on: a mapping or a dataclass.
        command: The command line that repeats it; that of this process by default.
        **more: Further top-level fields.
    """
    record = results_of(metrics, configuration, command, **more)
    write_json(path, record)
    return record


def results_of(
    metrics: Any, configuration: Any, command: str | Sequence[str] | None = None, **more: Any
) -> dict[str, Any]:
    """What [`write_results`] writes."""
    if command is None:
        command = [os.path.basename(sys.executable), *_python_command()]
    record = {
        "command": without_secrets(command if isinstance(command, str) else shlex.join(command)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "configuration": plain(configuration),
        "metrics": plain(metrics),
        **plain(more),
    }
    record["sha256"] = checksum(record)
    return record


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 2) -> None:
    """Write JSON to a temporary file beside `path`, then rename it, so that a killed process leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(plain(content), indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"`{path}` must be a file that can be written, on a disk with room, got: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Read a results file.

    Raises:
        OSError: if there is none.
        ValueError: if it is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` must be readable JSON, got {error}. Write it again, or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got {type(content).__name__}.")
    return content


def matching(rows: Iterable[Mapping[str, Any]], wanted: Mapping[str, Any]) -> list[Any]:
    """The rows that say all that is wanted: of a file that goes on from its last row, what is there already."""
    return [row for row in rows if wanted.items() <= row.items()]


def fault_of(row: Mapping[str, Any]) -> str | None:
    """What a row of an evaluation has that `docs/results-schema.md` does not allow, or None."""
    missing = [name for name in ("mode", "T", "schedule", "split", "quality") if name not in row]
    if missing or not isinstance(row["quality"], Mapping):
        return f"one without {missing[0] if missing else 'a mapping'} (of an earlier version?)"
    if row["mode"] not in [*MODES] or type(row["T"]) is not int:
        return f"mode {row['mode']!r:.40} with T = {row['T']!r:.40}"
    energy = row.get("energy", {"ratio": 1})
    numbers = {**row["quality"], "energy.ratio": energy.get("ratio") if isinstance(energy, Mapping) else energy}
    numbers |= {name: row[name] for name in ("agreement", "spike_rate") if row.get(name) is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"`{name}` {value!r:.40}, no finite number, at T = {row['T']}"
    return None


def mode_name(row: Mapping[str, Any]) -> str:
    """What a reader is told of the mode of a row; the ANN of a network without levels is not quantised."""
    plain = row["mode"] == "qcfs" and "L" in row and row["L"] is None
    return "ANN" if plain else MODES[row["mode"]]


def checksum(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a results file says was measured, and on what: `metrics` and `configuration`."""
    said = {name: plain(record[name]) for name in ("configuration", "metrics")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def without_secrets(command: str) -> str:
    """Return a command line with the values of the flags of [`SECRET_NAME`] replaced by their names."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command  # prose, not a command line
    shown, name = [], ""
    for word in words:
        flag, equals, value = word.partition("=")
        if name and not word.startswith("--"):
            word = _masked(name)
        elif flag.startswith("-") and value:
            word = flag + equals + _hidden(flag.lstrip("-"), value)
        shown.append(word)
        name = flag.lstrip("-") if flag.startswith("-") and not equals and SECRET_NAME.search(flag.lstrip("-")) else ""
    return command if shown == words else shlex.join(shown)


def without_paths(text: str) -> str:
    """Text, such as a command line, whose paths are cut to the last name in them; secrets are left out."""
    return re.sub(r"(?<![\w.:/])(?:~|\.{0,2})/(?:[^\s/'\"]+/)*", "", without_secrets(text))


def _hidden(name: str, value: Any) -> Any:
    """The value of a setting, unless it is a secret; what was hidden before stays as it is."""
    if isinstance(value, str) and value and SECRET_NAME.search(name):
        return _masked(name)
    return without_secrets(value) if name == "command" and isinstance(value, str) else value


def _masked(name: str) -> str:
    return f"<{name.rpartition('.')[2].upper()}>"


def gap_closed(whole: float, before: float, after: float) -> float | None:
    """Share of a loss of quality that was won back, 1 for all of it; None where there was no difference.

    Args:
        whole: Quality without the loss, of the QCFS ANN as a rule.
        before: With it, of the spiking network before calibration.
        after: Of that network after calibration.
    """
    return None if whole == before else (after - before) / (whole - before)


def escaped(text: Any) -> str:
    """A name out of a checkpoint, a data set or a results file as Markdown that is neither markup nor HTML."""
    text = _CONTROLS.sub(" ", str(text))
    marks = r"[\\`*\[\]<>&$|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(marks, lambda found: f"&#{ord(found[0])};", text)


def escaped_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table with its names and texts [`escaped`]."""
    return {escaped(key): escaped(value) if isinstance(value, str) else value for key, value in row.items()}


def code(text: Any) -> str:
    """Any text as a code span of Markdown, which it cannot end."""
    text = _CONTROLS.sub(" ", str(text))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an evaluation as cells of a table: its quality spelt out, the ratio of its energy, nothing by site."""
    cells = {name: value for name, value in row.items() if name not in NOT_CELLS}
    ratio = {"energy_ratio": row["energy"]["ratio"]} if "energy" in row else {}
    last = ("agreement", "logit_error", "spike_rate", "seconds")
    first = {name: value for name, value in cells.items() if name not in last}
    return first | row["quality"] | {name: cells[name] for name in last if name in cells} | ratio


def markdown_table(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, digits: int | Mapping[str, int] = 4
) -> str:
    """Return `rows` as a Markdown table.

    Args:
        rows: One mapping per line.
        columns: Their order; by default every key, in the order of first appearance.
        digits: Decimals of floats, for all columns or by column. A missing value is shown as an en dash.

    Cells may hold Markdown: what comes from elsewhere goes through [`escaped`] or [`code`] first.
    """
    rows = list(rows)
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(row: Mapping[str, Any], column: str) -> str:
        value = row.get(column)
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.{digits.get(column, 4) if isinstance(digits, Mapping) else digits}f}"
        return " ".join(str(value).replace("|", "\\|").splitlines())

    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    lines = [
        [str(column).replace("|", "\\|") for column in columns],
        ["---:" if right else "---" for right in numeric],
    ]
    lines += [[cell(row, column) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(value: Any) -> Any:
    """Turn dataclasses, tensors, numpy numbers, paths and sets into what JSON can hold; secrets are left out."""
    if isinstance(value, Mapping):
        return {str(key): _hidden(str(key), plain(item)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return getattr(value, "value", value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return str(value)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return what the measurement ran on."""
    import torch

    found = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def fingerprint(model: Any) -> str:
    """Return the SHA-256 of all weights of a model, over names and values; if sharded, in all processes at once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def commit() -> str | None:
    """Return the commit of the source tree, with `+changes` when it has uncommitted ones; None outside a clone."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py"]
        changes = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


def origin() -> dict[str, str | None]:
    """What a row of a file that several runs may write says of its own: the commit, and the processor."""
    return {"commit": commit(), "processor": _processor()}


def _python_command() -> list[str]:
    """Return the arguments of this Python process, `-m module` where it was started so."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if Path(sys.argv[0]).name == "fas":
        return ["-m", "training.cli", *sys.argv[1:]]  # where the command lies says something of the machine
    return sys.argv


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
