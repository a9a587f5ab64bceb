"""Language models in spike-driven.md and docs/results.md: longer windows, FAS, answers without examples.

`python -m benchmarks.language_tables [--check]`
"""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from benchmarks.spike_tables import MODELS, PAGE, SHORT, code_of
from training.results import markdown_table, read_results


LENGTHS = {"smollm2": (256, 1024), "prose": (128, 512), "fas": (128, 512)}
TITLES = MODELS | {"fas": "gpt2-prose-mini with QCFS, prose"}
TASKS = {"sst2": ("SST-2", 2), "rte": ("RTE", 2), "mnli": ("MNLI", 3)}
KEYS = ("sites", "code", "T", "schedule", "code_base", "gain")


def parts() -> Iterator[Part]:
    yield Part(PAGE, "lengths", "\n\n".join(lengths(name) for name in LENGTHS))
    yield Part(PAGE, "zero-shot", "\n\n".join(zero_shot(name) for name in LENGTHS))
    yield Part(SHORT, "zero-shot", zero_shot("smollm2", short=True))


def identity(row: dict[str, Any]) -> tuple:
    """What a row is of: settings, or the name of a distilled model."""
    return (row["distilled"],) if row.get("distilled") else tuple(row.get(key) for key in KEYS)


def named(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "sites": row["sites"],
        "code": code_of(row) + (", distilled" if row.get("distilled") else ""),
        "T": row.get("T"),
    }


def distilled(name: str) -> dict[tuple, dict[str, Any]]:
    """The rows of a model's distillation, each under the name that its folder has."""
    path = RESULTS / f"distillation_{name}.json"
    rows = read_results(path)["metrics"] if path.is_file() else []
    return {(f"{row['code']}-{row['steps']}",): row for row in rows if row["kind"] == "distilled"}


def lengths(name: str) -> str:
    """Perplexity of a model at two lengths of window, on the same text: rows that have both."""
    usual, longer = LENGTHS[name]
    if not (RESULTS / "spike_driven" / f"{name}_{longer}.json").is_file():
        return missing(name)
    short, long = (read_results(RESULTS / "spike_driven" / f"{name}{each}.json") for each in ("", f"_{longer}"))
    found = {identity(row): row for row in short["metrics"]} | distilled(name)
    table = []
    for row in long["metrics"]:
        if identity(row) in found:
            pair = {usual: found[identity(row)], longer: row}
            stock = {usual: short["metrics"][0]["perplexity"], longer: long["metrics"][0]["perplexity"]}
            line = named(row)
            line |= {f"perplexity, {length}": each["perplexity"] for length, each in pair.items()}
            line |= {f"over stock, {length}": each["perplexity"] / stock[length] for length, each in pair.items()}
            table.append(line | {f"{cost}, {longer}": row.get(cost) for cost in ("energy", "reads")})
    settings = long["configuration"]
    about = f"{short['configuration']['windows']} windows of {usual} tokens, {settings['windows']} of {longer}. "
    about += f"Calibration: {settings['calibration']}. {source(long)}"
    return "\n\n".join([f"**{TITLES[name]}**", markdown_table(table, digits=3), wrapped(about)])


def zero_shot(name: str, short: bool = False) -> str:
    """Accuracy of each task ± its sampling error, and how many answers are the stock model's; chance first."""
    path = RESULTS / "zero_shot" / f"{name}.json"
    if not path.is_file():
        return missing(name)
    record = read_results(path)
    asked = max(row["asked"] for row in record["metrics"])
    rows = [row for row in record["metrics"] if row["asked"] == asked]
    rows.sort(key=lambda row: (row["code"] != "stock", row["code"] == "first_spike", row.get("T") or 0))
    of_stock = {row["task"]: row for row in rows if row["code"] == "stock"}
    tasks = {task: about for task, about in TASKS.items() if task in of_stock}
    table = [
        {"sites": "–", "code": "chance", "T": None} | {title: f"{100 / count:.1f}" for title, count in tasks.values()},
        {"sites": "–", "code": "always the commonest label", "T": None}
        | {title: f"{commonest(of_stock[task]['labels']):.1f}" for task, (title, _) in tasks.items()},
    ]
    for each in dict.fromkeys(identity(row) for row in rows):
        found = {row["task"]: row for row in rows if identity(row) == each}
        line = named(next(iter(found.values())))
        for task, (title, _) in tasks.items():
            if task in found:
                row = found[task]
                line[title] = f"{row['accuracy']:.1f} ± {row['sampling_error']:.1f}"
                line[f"{title}, as stock"] = f"{row['as_stock']:.1f}" if row["code"] != "stock" else None
        for cost in ("energy", "reads"):
            costs = [row[cost] for row in found.values() if cost in row]
            line[cost] = sum(costs) / len(costs) if costs else None
        table.append(line)
    columns = ["code", "T"] if short else ["sites", "code", "T"]
    columns += [column for title, _ in tasks.values() for column in (title, f"{title}, as stock")]
    columns += ["energy", "reads"]
    settings = record["configuration"]
    numbers = ", ".join(f"{of_stock[task]['n']} rows of {title}" for task, (title, _) in tasks.items())
    about = (
        f"The first {numbers}; accuracy in % ± sampling error; answers that are the stock model's in %; energy and "
    )
    about += "reads over the stock model's, mean of the tasks."
    if not short:
        about += f" Calibration: {settings['calibration']}. lm-eval {settings['lm_eval']}. {source(record)}"
    title = [] if short else [f"**{TITLES[name].partition(',')[0]}**"]
    return "\n\n".join([*title, markdown_table(table, columns, digits=2), wrapped(about)])


def missing(name: str) -> str:
    return f"**{TITLES[name].partition(',')[0]}**: not measured yet."


def commonest(labels: str) -> float:
    return 100 * max(labels.count(label) for label in set(labels)) / len(labels)


if __name__ == "__main__":
    sys.exit(command(parts))
