"""The tables of speed.md in benchmarks/ and docs/, from results/speed: `benchmarks.speed_tables [--check]`."""

import sys
from collections.abc import Iterator

from benchmarks.pages import RESULTS, Part, command, source
from training.results import markdown_table, read_results


# What is done, results file, end of the measure's name.
SHORT = (
    ("layerwise, T = 8, GPT-2, batch 8", "layerwise", "GPT-2 small, batch 8, T = 8, layerwise over stock: time"),
    ("layerwise, T = 8, BERT, batch 8", "layerwise", "BERT-base, batch 8, T = 8, layerwise over stock: time"),
    ("stepwise, T = 4, GPT-2, 128 tokens", "scaling", "stepwise over stock, T = 4, 128 tokens: time"),
    ("stepwise, T = 8, GPT-2, 128 tokens", "scaling", "stepwise over stock, T = 8, 128 tokens: time"),
    ("decoding a token, layerwise, T = 4", "decoding", "per token: layerwise over stock"),
    ("decoding a token, stepwise, T = 4", "decoding", "per token: stepwise over stock"),
    ("the same, both compiled", "decoding_compiled", "per token: stepwise compiled over stock compiled"),
    ("training step with QCFS, GPT-2", "training_step", "GPT-2 small, batch 2, training step, QCFS over GELU: time"),
)


def parts() -> Iterator[Part]:
    yield Part("benchmarks/speed.md", "speed", tables())
    yield Part("docs/speed.md", "speed in short", in_short())


def in_short() -> str:
    """A line for each thing that a user does, over the stock model."""
    records = {path.stem: read_results(path) for path in (RESULTS / "speed").glob("*.json")}
    rows = []
    for what, file, measure in SHORT:
        got = next(row["got"] for row in records[file]["metrics"] if row["measure"].endswith(measure))
        rows.append({"": what, "over stock": got})
    return markdown_table(rows, digits=2)


def tables() -> str:
    """One table of measure, target and what came out for every JSON file, with what it was run on."""
    parts = []
    for path in sorted((RESULTS / "speed").glob("*.json")):
        record = read_results(path)
        rows = [
            {"measure": row["measure"], "target": row["target"] and f"≤ {row['target']:.2f}", "got": row["got"]}
            | ({"spread": "{:.3f} to {:.3f}".format(*row["spread"])} if row.get("spread") else {})
            | ({} if row["target"] is None else {"met": "yes" if row["got"] <= row["target"] else "**no**"})
            for row in record["metrics"]
        ]
        settings = record["configuration"]
        made = source(record, settings["dtype"], f"{settings['rounds']} rounds", settings["clock"])
        parts += [
            f"### `{path.stem}`",
            markdown_table(rows, columns=["measure", "target", "got", "spread", "met"], digits=3),
            f"`{record['command']}`, {made}",
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(command(parts))
