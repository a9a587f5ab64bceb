"""The table of results in README.md, and that of the demo in docs/results.md and benchmarks/demo.md.

python -m benchmarks.readme [--check] [RESULTS]     RESULTS replaces benchmarks/results/demo.json first

The demo's results are those of one run, or of several by `benchmarks.demo_spread`, whose cells are the mean and the
range.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from benchmarks.spike_tables import MODELS, longest
from training.results import flat, markdown_table, read_results


COLUMNS = ["step", "mode", "T", "schedule", "accuracy", "spike_rate", "energy_ratio"]
BRIEF = ["step", "T", "schedule", "accuracy", "energy_ratio"]
LEFT_OUT = {(2, "layerwise"), (8, "stepwise"), (8, "layerwise")}  # of the demo, in docs/results.md
# Of the training-free rows (model: code and T), those that README shows, a miss among them.
SHOWN = {
    "prose": [("phase", 4), ("first_spike", 16)],
    "smollm2": [("phase", 5), ("phase", 7), ("first_spike", 24)],
}


def parts() -> Iterator[Part]:
    """Results for README, and the rows of the demo with what they were measured on."""
    yield Part("README.md", "results", f"{markdown_table(results(), digits=2)}\n\n{wrapped(about_results())}")
    record = read_results(RESULTS / "demo.json")
    runs = record["metrics"].get("runs") or [{"rows": [flat(row) for row in record["metrics"]["rows"]]}]
    rows = [spread(rows) for rows in zip(*(run["rows"] for run in runs), strict=True)]
    yield Part("benchmarks/demo.md", "demo", f"{markdown_table(rows, COLUMNS)}\n\n{about_demo(record, runs)}")
    short = [row for row in rows if (row["T"], row["schedule"]) not in LEFT_OUT]
    yield Part("docs/results.md", "demo", f"{markdown_table(short, BRIEF)}\n\n{about_demo(record, runs)}")


def results() -> list[dict[str, Any]]:
    """A row for each model, code and training that a newcomer should see first."""
    table = [*sst2()]
    for name, model in MODELS.items():
        record = read_results(RESULTS / "spike_driven" / f"{name}.json")
        stock, *rows = record["metrics"]
        found = {(row["code"], row["T"]): row for row in rows if row["sites"] == "all"}
        table += [line(model, found[key], stock["perplexity"], found[key]["perplexity"]) for key in SHOWN[name]]
    record = read_results(RESULTS / "distillation_smollm2.json")
    stock = next(row for row in record["metrics"] if row["kind"] == "stock")
    return table + [line(model, row, stock["perplexity"], row["perplexity"]) for row in longest(record["metrics"])]


def sst2() -> Iterator[dict[str, Any]]:
    """The rows of MiniLM on SST-2."""
    rows = read_results(RESULTS / "distillation_sst2.json")["metrics"]
    stock = next(row["accuracy"] for row in rows if row["kind"] == "trained")
    for row in rows:
        if row["kind"] in ("converted", "distilled"):
            yield line("MiniLM, SST-2", row, stock, row["accuracy"])


def line(model: str, row: dict[str, Any], stock: float, spiking: float) -> dict[str, Any]:
    """One row of README's table."""
    training = f"{row['steps']} steps" if row.get("kind") == "distilled" else "–"
    found = {"model, data": model, "code": row["code"].replace("_", " "), "T": row["T"], "training": training}
    return found | {"stock": stock, "spiking": spiking, "energy": row["energy"], "reads": row["reads"]}


def about_results() -> str:
    """What README's table counts, on how much."""
    judged = read_results(RESULTS / "distillation_sst2.json")["configuration"]["judged"]
    sentences = int(re.findall(r"\d+", judged)[0])
    share = next(row["stock"] for row in sst2()) / 100
    error = 100 * (share * (1 - share) / sentences) ** 0.5
    settings = [read_results(RESULTS / "spike_driven" / f"{name}.json")["configuration"] for name in SHOWN]
    prose, wiki = (f"{each['windows']} windows of {each['length']} tokens" for each in settings)
    return (
        f"SST-2: accuracy in %, all {sentences} sentences of validation (sampling error ± {error:.1f}). Prose, "
        f"WikiText-103: perplexity, lower is better; {prose}, {wiki}. All sites spike, layerwise; training is "
        "distillation from the stock model. Energy and weight reads, of all products, are over the stock model's. One "
        "seed."
    )


def about_demo(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """How many sentences and runs stand behind the rows of the demo, and where they ran."""
    examples = sorted({row["examples"] for run in runs for row in run["rows"]})
    said = f"n = {', '.join(map(str, examples))}. "
    if len(runs) > 1:
        settings = ", ".join(f"{run['seed']} / {run['threads']}" for run in runs)
        said += f"Mean of {len(runs)} runs (lowest to highest), seed / threads: {settings}. "
    return said + source(record)


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
