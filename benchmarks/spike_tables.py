"""The tables of spike-driven.md and docs/results.md: `python -m benchmarks.spike_tables [--check]`."""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from training.results import markdown_table, read_results


PAGE = "benchmarks/spike-driven.md"
SHORT = "docs/results.md"
# Of the training-free codes, those that the short tables show.
CHOSEN = {
    "prose": {("phase", 4), ("phase", 5), ("first_spike", 16)},
    "smollm2": {("phase", 5), ("phase", 6), ("phase", 7)},
}
ORDER = ("all", "linear", "phase", "first_spike", "rate")  # of rows
MODELS = {"prose": "gpt2-prose-mini, prose", "smollm2": "SmolLM2-135M, WikiText-103"}


def parts() -> Iterator[Part]:
    yield Part(PAGE, "training-free", "\n\n".join(training_free(name, title) for name, title in MODELS.items()))
    yield Part(PAGE, "distilled", distilled())
    yield Part(PAGE, "accumulated", accumulated())
    yield Part(SHORT, "training-free", in_short())
    yield Part(SHORT, "distilled", markdown_table(distilled_in_short(), digits=2))
    yield Part(SHORT, "accumulated", markdown_table([row for row in accumulated_rows() if row["T"] == 4]))
    yield Part(PAGE, "rotation", rotation())
    yield Part(PAGE, "neurobench", neurobench())
    yield Part(PAGE, "threads", threads())
    yield Part(PAGE, "processors", processors())


def code_of(row: dict[str, Any]) -> str:
    """A code with its base, its schedule where it is no layerwise one, and its gain where it is not the default."""
    base = f", b = {row['code_base']:.2g}" if row.get("code_base") else ""
    schedule = row.get("schedule")
    gain = f", {row['gain']} gain" if row.get("gain") else ""
    return (
        row["code"].replace("_", " ") + base + (f", {schedule}" if schedule not in (None, "layerwise") else "") + gain
    )


def training_free(name: str, title: str) -> str:
    record = read_results(RESULTS / "spike_driven" / f"{name}.json")
    stock, *rows = record["metrics"]
    rows.sort(key=lambda row: [ORDER.index(row[key]) if key != "T" else row["T"] for key in ("sites", "code", "T")])
    table = [
        {"sites": row["sites"], "code": code_of(row), "T": row["T"], "perplexity": row["perplexity"]}
        | {"over stock": row["over_stock"], "spikes an input": row["spikes"]}
        | {"energy": row["energy"], "reads": row["reads"]}
        for row in rows
    ]
    settings = record["configuration"]
    about = (
        f"Stock {stock['perplexity']:.2f}. {settings['windows']} windows of {settings['length']} tokens of "
        f"`{settings['judged']}`; thresholds from {settings['calibration']}. {source(record)}"
    )
    return "\n\n".join([f"**{title}**", markdown_table(table, digits=3), wrapped(about)])


def chosen() -> list[dict[str, Any]]:
    """One row for each model and code that a newcomer should see first, training-free."""
    table = []
    for name, title in MODELS.items():
        record = read_results(RESULTS / "spike_driven" / f"{name}.json")
        stock, *rows = record["metrics"]
        table += [
            {"model, data": title, "code": code_of(row)}
            | {"T": row["T"], "perplexity, stock": stock["perplexity"], "spiking": row["perplexity"]}
            | {"over stock": row["over_stock"], "energy": row["energy"], "reads": row["reads"]}
            for row in rows
            if row["sites"] == "all" and (row["code"], row["T"]) in CHOSEN[name]
        ]
    return table


def in_short() -> str:
    settings = [read_results(RESULTS / "spike_driven" / f"{name}.json")["configuration"] for name in MODELS]
    windows = ", ".join(f"{each['windows']} windows of {each['length']} tokens" for each in settings)
    return f"{markdown_table(chosen(), digits=2)}\n\n{windows}; one calibration text."


def rotation() -> str:
    record = read_results(RESULTS / "rotation.json")
    _, *rows = record["metrics"]
    table = [
        {"rotation": row["rotation"], "T": row["T"], "perplexity": row["perplexity"], "over stock": row["over_stock"]}
        | {"spikes an input": row["spikes"], "energy": row["energy"], "reads": row["reads"]}
        for row in rows
    ]
    settings = record["configuration"]
    about = f"{settings['windows']} windows of {settings['length']} tokens of `{settings['judged']}`. {source(record)}"
    return "\n\n".join([markdown_table(table, digits=3), wrapped(about)])


def distilled() -> str:
    tables = []
    record = read_results(RESULTS / "distillation.json")
    table = [
        {"model": MODELS["prose"], "code": code_of(row), "T": row["T"], "steps": row["steps"]}
        | {"before": row["before_over_stock"], "after": row["after_over_stock"]}
        | {"spikes an input": row["after"]["spikes"], "energy": row["after"]["energy"], "reads": row["after"]["reads"]}
        for row in longest(record["metrics"])
    ]
    settings = record["configuration"]
    about = f"Perplexity over stock; {settings['judged'].partition(';')[0]}. {source(record)}"
    tables += [markdown_table(table, digits=3), wrapped(about)]
    record = read_results(RESULTS / "distillation_smollm2.json")
    before = {row["code"]: row["over_stock"] for row in record["metrics"] if row["kind"] == "converted"}
    table = [
        {"model": MODELS["smollm2"], "code": code_of(row), "T": row["T"], "steps": row["steps"]}
        | {"before": before[row["code"]], "after": row["over_stock"]}
        | {"spikes an input": row["spikes"], "energy": row["energy"], "reads": row["reads"]}
        for row in record["metrics"]
        if row["kind"] == "distilled"
    ]
    settings = record["configuration"]
    about = f"Perplexity over stock; windows of {settings['length']} tokens: {settings['windows']['judged']}; "
    about += f"{settings['batch']} windows a step. {source(record)}"
    tables += [markdown_table(table, digits=3), wrapped(about)]
    path = RESULTS / "distillation_sst2.json"
    if path.is_file():
        record = read_results(path)
        rows = [row for row in record["metrics"] if row["kind"] in ("trained", "converted", "distilled")]
        table = [
            {"model": "MiniLM, SST-2", "code": "stock (GELU)" if row["code"] == "gelu" else code_of(row)}
            | {"T": row.get("T"), "steps": row.get("steps", "no training" if row["kind"] == "converted" else None)}
            | {"accuracy": row["accuracy"], "spikes an input": row.get("spikes")}
            | {"energy": row.get("energy"), "reads": row.get("reads")}
            for row in rows
        ]
        about = f"{record['configuration']['judged'].capitalize()}. {source(record)}"
        tables += [markdown_table(table, digits=3), wrapped(about)]
    return "\n\n".join(tables)


def distilled_in_short() -> Iterator[dict[str, Any]]:
    """Quality before and after distillation; perplexity, but of SST-2 accuracy."""

    def line(model: str, row: dict[str, Any], found: dict[str, Any], *quality: float) -> dict[str, Any]:
        first = {"model, data": model, "code": row["code"].replace("_", " "), "T": row["T"], "steps": row["steps"]}
        return first | dict(zip(("stock", "before", "after"), quality, strict=True)) | pick(found, "energy", "reads")

    for name in ("distillation", "distillation_smollm2"):
        rows = read_results(RESULTS / f"{name}.json")["metrics"]
        stock = next(row["perplexity"] for row in rows if row["kind"] == "stock")
        before = {row["code"]: row["perplexity"] for row in rows if row["kind"] == "converted"}
        for row in longest(rows):
            model = MODELS["smollm2" if "smollm2" in name else "prose"]
            if "after" in row:
                perplexities = (row["before"]["perplexity"], row["after"]["perplexity"])
                yield line(model, row, row["after"], stock, *perplexities)
            else:
                yield line(model, row, row, stock, before[row["code"]], row["perplexity"])
    rows = read_results(RESULTS / "distillation_sst2.json")["metrics"]
    stock = next(row["accuracy"] for row in rows if row["kind"] == "trained")
    before = {row["code"]: row["accuracy"] for row in rows if row["kind"] == "converted"}
    for row in longest(rows):
        yield line("MiniLM, SST-2 (accuracy %)", row, row, stock, before[row["code"]], row["accuracy"])


def longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the distilled rows, for each code and T the one with the most steps."""
    taught = sorted((row for row in rows if row["kind"] == "distilled"), key=lambda row: row["steps"])
    found = {(row["code"], row["T"]): row for row in taught}
    return [found[key] for key in sorted(found, reverse=True)]


def pick(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def accumulated() -> str:
    tables = []
    for path in accumulated_files():
        if table := list(accumulated_rows(path)):
            tables += [markdown_table(table, digits=4), wrapped(source(read_results(path)))]
    return "\n\n".join(tables)


def accumulated_files() -> list[Path]:
    """Results of the schedules: of `accumulated.py`; for other tasks of `glue.py`. In WNLI none differ."""
    own = sorted((RESULTS / "accumulated").glob("*.json"))
    known = {path.name for path in own} | {"wnli.json"}
    return own + [path for path in sorted((RESULTS / "glue").glob("*.json")) if path.name not in known]


def accumulated_rows(*paths: Path) -> Iterator[dict[str, Any]]:
    """Mean divergence from QCFS by schedule, a row for each task and T that all seeds have."""
    for path in paths or accumulated_files():
        record = read_results(path)
        rows = [
            row
            for row in record["metrics"]
            if row.get("model", "fas") == "fas"
            and row.get("calibration", "none") == "none"
            and not row.get("searched")
        ]
        seeds = sorted({row["seed"] for row in rows})
        by = {(row["seed"], row["T"], row["schedule"]): row["divergence"] for row in rows}
        for T in sorted({row["T"] for row in rows}):
            found = {
                schedule: [by[seed, T, schedule] for seed in seeds if (seed, T, schedule) in by]
                for schedule in ("stepwise", "layerwise", "accumulated")
            }
            if not all(len(each) == len(seeds) for each in found.values()):
                continue
            means = {schedule: statistics.mean(each) for schedule, each in found.items()}
            yield (
                {"task": path.stem, "T": T, "seeds": len(seeds)}
                | means
                | {"gap of stepwise closed": f"{100 * (1 - means['accumulated'] / means['stepwise']):.1f} %"}
            )


def threads() -> str:
    """Every way of rounding by model, and how far each setting moves: its spread over its mean."""
    record = read_results(RESULTS / "threads.json")
    found: dict[tuple, dict[str, Any]] = {}
    table: list[dict[str, Any]] = []
    for row in record["metrics"]:
        key = (row["model"], code_of(row), row["T"])
        line = found.setdefault(key, dict(zip(("model", "code", "T"), key, strict=True)))
        line[moved(row)] = row["perplexity"]
    for line in found.values():
        values = [value for name, value in line.items() if name not in ("model", "code", "T")]
        spread = f"{100 * (max(values) - min(values)) / (sum(values) / len(values)):.2g} %"
        table.append(line | {"spread": spread})
    columns = dict.fromkeys(name for line in table for name in line if name != "spread")
    return "\n\n".join([markdown_table(table, [*columns, "spread"], digits=4), wrapped(source(record))])


def moved(row: dict[str, Any]) -> str:
    turned = f", turned by {row['turned']}" if row["turned"] else ""
    return f"{row['threads']} thread{'s' * (row['threads'] != 1)}{turned}"


def processors() -> str:
    """SmolLM2 on the two processors that its rows were measured on."""
    here, there = (read_results(RESULTS / "spike_driven" / f"smollm2{each}.json") for each in ("", "_xeon"))
    keys = ("code", "T", "sites", "code_base")
    others = {tuple(row.get(key) for key in keys): row["perplexity"] for row in there["metrics"]}
    names = [record["hardware"]["processor"].replace("(R)", "").removesuffix(" Processor") for record in (here, there)]
    table = []
    for row in here["metrics"]:
        key = tuple(row.get(name) for name in keys)
        if key in others and row.get("T"):
            pair = (row["perplexity"], others[key])
            line = {"code": code_of(row), "T": row["T"]} | dict(zip(names, pair, strict=True))
            table.append(line | {"apart": f"{100 * abs(pair[0] - pair[1]) / pair[0]:.2f} %"})
    return markdown_table(table, digits=3)


def neurobench() -> str:
    record = read_results(RESULTS / "neurobench.json")
    millions = (
        "effective ACs, NeuroBench",
        "effective ACs, ours",
        "effective MACs, NeuroBench",
        "effective MACs, ours",
    )
    table = [
        {"code": code_of(row), "T": row["T"], "logits differ by": f"{row['logits differ by']:.1g}"}
        | {f"{name}, M": row[name] / 1e6 for name in millions}
        for row in record["metrics"]
    ]
    return "\n\n".join([markdown_table(table, digits=4), wrapped(source(record))])


if __name__ == "__main__":
    sys.exit(command(parts))
