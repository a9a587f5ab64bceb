"""The tables of docs/speed.md, from results/speed: `python -m benchmarks.speed_tables [--check]`."""

import sys
from collections.abc import Iterator

from benchmarks.pages import RESULTS, Part, command, source
from training.results import markdown_table, read_results


def parts() -> Iterator[Part]:
    yield Part("docs/speed.md", "speed", tables())


def tables() -> str:
    """One table of measure, target and what came out for every JSON file, with what it was run on."""
    parts = []
    for path in sorted((RESULTS / "speed").glob("*.json")):
        record = read_results(path)
        rows = [
            {"measure": row["measure"], "target": row["target"] and f"≤ {row['target']:.2f}", "got": row["got"]}
            | ({} if row["target"] is None else {"met": "yes" if row["got"] <= row["target"] else "**no**"})
            for row in record["metrics"]
        ]
        settings = record["configuration"]
        made = source(record, settings["dtype"], f"{settings['rounds']} rounds", settings["clock"])
        parts += [
            f"### `{path.stem}`",
            markdown_table(rows, columns=["measure", "target", "got", "met"], digits=3),
            f"`{record['command']}`, {made}",
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(command(parts))
