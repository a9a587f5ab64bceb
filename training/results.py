"""Results files: one JSON per measurement, written atomically; the tables of the documentation come from them.

`docs/results-schema.md` says what is in them, and which command writes which.
"""

import hashlib
import json
import os
import platform
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


def write_results(
    path: str | os.PathLike,
    *,
    metrics: Any,
    configuration: Any,
    command: str | Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write one measurement as JSON, whole or not at all, and return what was written.

    Args:
        path: The file; its folder is made. An existing file is replaced.
        metrics: What was measured, for example a list of rows or a mapping of names to numbers.
        configuration: Everything the measurement depends on: a mapping or a dataclass.
        command: The command line that repeats it; that of this process by default.
        **more: Further top-level fields.
    """
    if command is None:
        command = [os.path.basename(sys.executable), *_python_command()]
    record = {
        "command": command if isinstance(command, str) else shlex.join(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "configuration": plain(configuration),
        "metrics": plain(metrics),
        **plain(more),
    }
    write_json(path, record)
    return record


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON to a temporary file beside `path`, then rename it, so that a killed process leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"`{path}` must be a file that can be written, on a disk with room, got: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Read a results file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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
        return str(value).replace("|", "\\|")

    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    lines = [list(columns), ["---:" if right else "---" for right in numeric]]
    lines += [[cell(row, column) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(value: Any) -> Any:
    """Turn dataclasses, tensors, numpy numbers, paths and sets into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
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
    """Return the SHA-256 of all weights of a model, over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
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


def _python_command() -> list[str]:
    """Return the arguments of this Python process, `-m module` where it was started so."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return sys.argv


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
