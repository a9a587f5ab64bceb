"""The tables of rivals.md, and the short one of docs/comparison.md: `python -m benchmarks.rivals_tables [--check]`."""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from benchmarks.spike_tables import code_of
from training.results import markdown_table, read_results


PAGE, SHORT = "benchmarks/rivals.md", "docs/comparison.md"
MISSING = "Not measured yet."
KEYS = ("sites", "code", "T", "code_base")


def parts() -> Iterator[Part]:
    yield Part(PAGE, "spikingjelly", spikingjelly())
    yield Part(PAGE, "tried", tried())
    yield Part(PAGE, "las", las())
    yield Part(SHORT, "spikingjelly", spikingjelly(short=True))
    yield Part(SHORT, "las", las(short=True))


def record_of(name: str) -> dict[str, Any] | None:
    path = RESULTS / "rivals" / f"{name}.json"
    return read_results(path) if path.is_file() else None


def by_whom(row: dict[str, Any], rival: str) -> str:
    return row["code"] if row["code"] in ("stock", rival) else "FAS"


def spikingjelly(short: bool = False) -> str:
    """Perplexity over T, spikes, time over stock's and memory, of the recipe and of ours."""
    record = record_of("spikingjelly_qwen2")
    if record is None:
        return MISSING
    stock = record["metrics"][0]["perplexity"]
    ours = read_results(RESULTS / "spike_driven" / "smollm2.json")["metrics"]
    table = []
    for row in sorted(record["metrics"], key=lambda row: (row["code"] != "stock", row["code"], row.get("T", 0))):
        own = next((each for each in ours if "T" in row and all(each.get(key) == row.get(key) for key in KEYS)), None)
        line = {
            "by": by_whom(row, "SpikingJelly"),
            "code": code_of(row) if own else "signed rate" if row["code"] != "stock" else None,
            "T": row.get("T"),
            "perplexity": row["perplexity"],
            "over stock": row["perplexity"] / stock,
            "spikes a neuron": row.get("spikes", own["spikes"] if own else None),
            "time over stock": row.get("time"),
        }
        if not short:
            spread = row.get("time_spread")
            line |= {
                "(lowest to highest)": f"{spread[0]:.1f} to {spread[1]:.1f}" if spread else None,
                "ms a token": 1000 * row["seconds_a_token"] if "seconds_a_token" in row else None,
                "memory, GB": row.get("peak_gb"),
            }
        table.append(line)
    settings = record["configuration"]
    about = f"{settings['windows']} windows of {settings['length']} tokens of WikiText-103 validation; time of one."
    if not short:
        about += (
            f" Both calibrated on {settings['calibration']}. {', '.join(settings['packages'][:1])}. {source(record)}"
        )
    return f"{markdown_table(table, digits=2)}\n\n{wrapped(about)}"


def tried() -> str:
    """The settings of the recipe that were tried, each T's best first window both ways."""
    record = record_of("spikingjelly_qwen2")
    if record is None:
        return MISSING
    table = []
    for row in record["metrics"]:
        if row["code"] == "SpikingJelly":
            line: dict[str, Any] = {"T": row["T"]}
            for each in row["tried"]:
                chosen = "**" if (each["levels"], each["quantile"]) == (row["levels"], row["quantile"]) else ""
                part = row["T"] // each["levels"]
                column = f"{'T' if part == 1 else f'T / {part}'}, {each['quantile']}"
                line[column] = f"{chosen}{each['choice']:.1f}{chosen}"
            line["first window"] = f"{row['first_window']:.2f}"
            spiking = row.get("first_window_spiking")
            table.append(line | {"in spikes": f"{spiking:.2f}" if spiking else None})
    columns = dict.fromkeys(name for line in table for name in line)
    settings = sorted((name for name in columns if name.startswith("T") and name != "T"), reverse=True)
    return markdown_table(table, ["T", *settings, "first window", "in spikes"])


def las(short: bool = False) -> str:
    record = record_of("las_bert")
    if record is None:
        return MISSING
    table = [
        {
            "by": by_whom(row, "LAS"),
            "code": {"stock": None, "LAS": "16 weighted steps"}.get(row["code"], code_of(row)),
            "T": row.get("T"),
            "accuracy %": f"{row['accuracy']:.1f}",
            "answers of the stock model %": f"{row['as_stock']:.1f}",
            "error of the logits": f"{row['error']:.4f}",
            "time over stock": row.get("time"),
        }
        for row in record["metrics"]
    ]
    settings = record["configuration"]
    about = (
        f"all-MiniLM-L6-v2 fine-tuned on SST-2; {settings['judged']}. The error is over the norm of the stock logits."
    )
    if not short:
        about += (
            f" Calibration: {settings['calibration']}. LAS {settings['las'][:7]}, {', '.join(settings['packages'])}. "
        )
        about += source(record)
    return f"{markdown_table(table, digits=1)}\n\n{wrapped(about)}"


if __name__ == "__main__":
    sys.exit(command(parts))
