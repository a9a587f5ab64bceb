"""The table of the demo in docs/results.md, and that of README.md.

python -m benchmarks.readme [--check] [RESULTS]     RESULTS replaces benchmarks/results/demo.json first
"""

import shutil
import sys
from collections.abc import Iterator

from benchmarks.pages import RESULTS, Part, command, source
from training.results import flat, markdown_table, read_results


COLUMNS = ["step", "mode", "T", "schedule", "accuracy", "spike_rate", "energy_ratio"]


def parts() -> Iterator[Part]:
    """The rows of the demo, and what they were measured on."""
    record = read_results(RESULTS / "demo.json")
    table = markdown_table(map(flat, record["metrics"]["rows"]), COLUMNS)
    examples = {row["quality"]["examples"] for row in record["metrics"]["rows"] if "quality" in row}
    yield Part("docs/results.md", "demo", f"{table}\n\nn = {', '.join(map(str, sorted(examples)))}. {source(record)}")


if __name__ == "__main__":
    given = [each for each in sys.argv[1:] if not each.startswith("--")]
    if given:
        shutil.copyfile(given[0], RESULTS / "demo.json")
    sys.exit(command(parts, [each for each in sys.argv[1:] if each.startswith("--")]))
