"""The tables of speed.md in benchmarks/ and docs/, from results/speed: `benchmarks.speed_tables [--check]`."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from training.results import markdown_table, read_results


SMOLLM2, STEP = "SmolLM2, fully spike-driven", "step of distillation over a plain one: time"
# What is done, over what, results file, end of the measure's name.
SHORT = (
    (
        "layerwise, T = 8, GPT-2, batch 8",
        "stock",
        "layerwise",
        "GPT-2 small, batch 8, T = 8, layerwise over stock: time",
    ),
    ("layerwise, T = 8, BERT, batch 8", "stock", "layerwise", "BERT-base, batch 8, T = 8, layerwise over stock: time"),
    ("stepwise, T = 4, GPT-2, 128 tokens", "stock", "scaling", "stepwise over stock, T = 4, 128 tokens: time"),
    ("stepwise, T = 8, GPT-2, 128 tokens", "stock", "scaling", "stepwise over stock, T = 8, 128 tokens: time"),
    ("accumulated, T = 4, GPT-2, 128 tokens", "stepwise", "accumulated", "forward, 128 tokens: time"),
    (f"{SMOLLM2}, phase, 256 tokens", "stock", "spike_driven", "phase, T = 5, over stock, forward, 256 tokens: time"),
    ("the same, first spike", "stock", "spike_driven", "first spike, T = 16, over stock, forward, 256 tokens: time"),
    (
        "decoding a token, GPT-2, layerwise, T = 4, 5 % of neurons fire",
        "stock",
        "decoding",
        "layerwise, 5% of neurons fire: a token over stock",
    ),
    ("the same, stepwise", "stock", "decoding", "stepwise, 5% of neurons fire: a token over stock"),
    ("the same, random weights", "stock", "decoding", "stepwise, random weights: a token over stock"),
    ("the same, both compiled", "stock", "decoding_compiled", "per token: stepwise compiled over stock compiled"),
    (
        f"decoding a token, {SMOLLM2}, phase",
        "stock",
        "spike_driven",
        "phase, T = 5, over stock, decoding: time of a token",
    ),
    (
        "the same, both compiled",
        "stock",
        "spike_driven_compiled",
        "phase, T = 5, compiled, over stock compiled, decoding, static cache: time of a token",
    ),
    (
        "training step with QCFS, GPT-2",
        "stock",
        "training_step",
        "GPT-2 small, batch 2, training step, QCFS over GELU: time",
    ),
    ("step of distillation, QCFS", "plain step", "distillation_step", f"QCFS, {STEP}"),
    ("step of distillation, phase", "plain step", "distillation_step", f"phase, T = 5, {STEP}"),
)
TERMS = ("constant", "linear", "quadratic")


def parts() -> Iterator[Part]:
    yield Part("benchmarks/speed.md", "speed", tables())
    yield Part("docs/speed.md", "speed in short", in_short())


def in_short() -> str:
    """A line for each thing that a user does, over what it is compared with; what was not measured is left out."""
    records = {path.stem: read_results(path)["metrics"] for path in (RESULTS / "speed").glob("*.json")}
    rows = []
    for what, over, file, measure in SHORT:
        found = [row["got"] for row in records.get(file, ()) if row["measure"].endswith(measure)]
        rows += [{"": what, "over": over, "time": got} for got in found[:1]]
    return markdown_table(rows, digits=2)


def tables() -> str:
    """One table of measure, target and what came out for every JSON file, with what it was run on."""
    parts = []
    for path in sorted((RESULTS / "speed").glob("*.json")):
        record = read_results(path)
        settings = record["configuration"]
        told = [settings["dtype"], f"{settings['rounds']} rounds", settings["clock"]]
        told += [f"{settings['weights']} weights"] if "weights" in settings else []
        parts += section(path.stem, record, record["metrics"], *told)
        if "fits" in record:
            parts += [growth(record["fits"]), wrapped(ABOUT_GROWTH)]
    path = RESULTS / "conversion_cost.json"
    if path.is_file():
        record = read_results(path)
        parts += section(path.stem, record, conversion(record), f"{record['configuration']['rounds']} rounds", "wall")
    return "\n\n".join(parts)


def section(name: str, record: Mapping[str, Any], measures: list[dict[str, Any]], *told: str) -> list[str]:
    """Heading, table and origin of one results file."""
    rows = [
        {"measure": row["measure"], "target": row["target"] and f"≤ {row['target']:.2f}", "got": row["got"]}
        | ({"spread": "{:.3f} to {:.3f}".format(*row["spread"])} if row.get("spread") else {})
        | ({} if row["target"] is None else {"met": "yes" if row["got"] <= row["target"] else "**no**"})
        for row in measures
    ]
    table = markdown_table(rows, columns=["measure", "target", "got", "spread", "met"], digits=3)
    return [f"### `{name}`", table, f"`{record['command']}`, {source(record, *told)}"]


def growth(fits: list[dict[str, Any]]) -> str:
    """What every term of a fit takes at the largest size, and over the stock model's."""
    stock = {fit["over"]: fit["terms_seconds"] for fit in fits if fit["of"] == "stock"}
    rows = []
    for fit in fits:
        largest = fit["sizes"][-1]
        row = {"over": f"{fit['over']}, {fit['sizes'][0]} to {largest}", "of": fit["of"]}
        for power, seconds in fit["terms_seconds"].items():
            base = stock.get(fit["over"], {}).get(power, 0) if fit["of"] != "stock" else 0
            over = f" ({seconds / base:.1f})" if min(base, seconds) > 0 else ""
            row[TERMS[int(power)]] = f"{1000 * seconds * largest ** int(power):.1f}{over}"
        rows.append(row | {"largest residual": f"{100 * fit['residual']:.1f} %"})
    return markdown_table(rows, columns=["over", "of", *TERMS, "largest residual"])


ABOUT_GROWTH = (
    "Fits of the times above, in ms at the largest size, and in parentheses over the stock model's term. Stepwise may "
    "take T times the stock model's. Quadratic are attention (tokens) and products (width); neurons are linear in all."
)


def conversion(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds and memory as measures."""
    rows = []
    for row in record["metrics"]:
        code, threads = row["code"].replace("_", " "), record["configuration"]["threads"]
        case = f"SmolLM2-135M, training-free conversion, {code}, T = {row['T']}, {threads} threads"
        memory = {"target": 1.5, "got": row["memory_over_weights"], "spread": row["memory_range"]}
        rows += [
            {"measure": f"{case}: seconds", "target": 180, "got": row["seconds"], "spread": row["seconds_range"]},
            {"measure": f"{case}: peak memory over the weights", **memory},
        ]
    return rows


if __name__ == "__main__":
    sys.exit(command(parts))
