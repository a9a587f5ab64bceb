"""The table of the demo in docs/results.md, and that of README.md.

python -m benchmarks.readme [--check] [RESULTS]     RESULTS replaces benchmarks/results/demo.json first

The results are those of one run, or of several by `benchmarks.demo_spread`, whose cells are the mean and the range.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source
from training.results import flat, markdown_table, read_results


COLUMNS = ["step", "mode", "T", "schedule", "accuracy", "spike_rate", "energy_ratio"]


def parts() -> Iterator[Part]:
    """The rows of the demo, and what they were measured on."""
    record = read_results(RESULTS / "demo.json")
    runs = record["metrics"].get("runs") or [{"rows": [flat(row) for row in record["metrics"]["rows"]]}]
    table = markdown_table([spread(rows) for rows in zip(*(run["rows"] for run in runs), strict=True)], COLUMNS)
    examples = sorted({row["examples"] for run in runs for row in run["rows"]})
    said = f"n = {', '.join(map(str, examples))}. "
    if len(runs) > 1:
        settings = ", ".join(f"{run['seed']} / {run['threads']}" for run in runs)
        said += f"Mean of {len(runs)} runs (lowest to highest), seed / threads: {settings}. "
    yield Part("docs/results.md", "demo", f"{table}\n\n{said}{source(record)}")


def spread(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several runs: what differs as the mean, and its range behind it; of one run as it is.

    Raises:
        ValueError: if they are not the same row.
    """
    names = ("step", "mode", "T", "schedule")
    if len({tuple(row.get(name) for name in names) for row in rows}) != 1:
        raise ValueError(f"`rows` must be of one step, T and schedule, got {[row.get('step') for row in rows]}.")
    if len(rows) == 1:
        return dict(rows[0])
    found: dict[str, Any] = {name: rows[0].get(name) for name in names}
    for name in COLUMNS:
        values = [row[name] for row in rows if row.get(name) is not None and name not in names]
        if values:
            found[name] = f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    return found


if __name__ == "__main__":
    given = [each for each in sys.argv[1:] if not each.startswith("--")]
    if given:
        shutil.copyfile(given[0], RESULTS / "demo.json")
    sys.exit(command(parts, [each for each in sys.argv[1:] if each.startswith("--")]))
