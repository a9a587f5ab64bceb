"""The tables of glue.md and ablations.md: `python -m benchmarks.glue_tables [--check]`."""

import statistics
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from benchmarks.spike_tables import code_of
from training.results import markdown_table, read_results


PAGE, ABLATIONS, SHORT = "benchmarks/glue.md", "benchmarks/ablations.md", "docs/results.md"
ORDER = ("sst2", "cola", "stsb", "rte", "wnli", "qqp", "mnli")
MEASURES = {"cola": "matthews_correlation", "stsb": "pearson"}  # else accuracy
UNLEARNED = "wnli"  # in no mean
CHOSEN_ON = ("sst2", "cola", "stsb")  # settings of calibration
ANN = "ANN (GELU)"
QCFS, PHASE, FIRST = (
    "QCFS, distilled",
    "all spikes, phase, T = 4, distilled",
    "all spikes, first spike, b = 1.4, T = 8, distilled",
)
# Model, what its score is compared with (None: no score), what is measured (None: the score), the most it may be.
GOALS: tuple[tuple[str, str | None, str | None, float], ...] = (
    (QCFS, ANN, None, 0.7),
    ("FAS, accumulated, T = 4", QCFS, None, 0.3),
    (PHASE, ANN, None, 1.0),
    (PHASE, None, "energy", 0.28),
    (FIRST, ANN, None, 1.0),
    (FIRST, None, "energy", 0.19),
)
IN_SHORT = (ANN, QCFS, "FAS, layerwise, T = 8", "FAS, accumulated, T = 4", PHASE, FIRST)
CALIBRATIONS = {"none": "", "neuron": ", searched", "fine": ", calibrated", "published": ", published calibration"}


def parts() -> Iterator[Part]:
    records, noisy = (
        {name: read_results(path) for name in ORDER if (path := RESULTS / folder / f"{name}.json").is_file()}
        for folder in ("glue", "glue_dropout")
    )
    yield Part(PAGE, "scores", scores(records))
    yield Part(PAGE, "costs", markdown_table(costs(records), digits=2))
    yield Part(PAGE, "goals", goals(records))
    yield Part(PAGE, "goals-dropout", goals(noisy))
    yield Part(PAGE, "scores-dropout", scores(noisy))
    yield Part(PAGE, "calibrated", calibrated(records))
    yield Part(PAGE, "calibrated-dropout", calibrated(noisy))
    yield Part(PAGE, "budgets", budgets())
    yield Part(PAGE, "levels", levels())
    yield Part(SHORT, "glue", short(records))
    yield Part(ABLATIONS, "ablations", ablations())


def name_of(row: dict[str, Any]) -> str:
    """What a row is of, in words; empty for a trial of a rate."""
    if row["model"] == "trial":
        return ""
    if row["model"] == "gelu":
        return ANN
    taught = ", distilled" if row.get("distilled") else ""
    if row["model"] == "qcfs":
        return f"QCFS{taught or ', labels alone'}"
    if row["model"] == "spike-driven":
        return f"all spikes, {code_of(row)}, T = {row['T']}{taught or ', no training'}"
    return f"FAS, {row['schedule']}, T = {row['T']}{CALIBRATIONS[row['calibration']]}"


def by_name(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["metrics"]:
        if name := name_of(row):
            found.setdefault(name, []).append(row)
    return found


def lost(named: dict[str, list[dict[str, Any]]], model: str, over: str, measure: str) -> list[float]:
    """Points of a model's rows below another model's of the same seed, or the only one there is."""
    others = {row["seed"]: row[measure] for row in named.get(over, [])}
    only = next(iter(others.values())) if len(others) == 1 else None
    pairs = [(others.get(row["seed"], only), row[measure]) for row in named.get(model, [])]
    return [other - own for other, own in pairs if other is not None]


def names_in(records: dict[str, Any]) -> list[str]:
    """Of all tasks: the ANN, QCFS, through time, then spikes in every product."""
    names = dict.fromkeys(name for record in records.values() for name in by_name(record))
    kinds = (ANN, "QCFS", "FAS, layer", "FAS, step", "FAS, acc", "all")
    return sorted(names, key=lambda name: (next(i for i, kind in enumerate(kinds) if name.startswith(kind)), name))


def scores_of(records: dict[str, Any], name: str) -> dict[str, Any]:
    """A model's score by task, the mean of its seeds, and how far it is over its ANNs, the mean of the tasks."""
    row: dict[str, Any] = {"model": name}
    over = []
    for task, record in records.items():
        named, measure = by_name(record), MEASURES.get(task, "accuracy")
        values = [each[measure] for each in named.get(name, [])]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        row[task] = f"{statistics.mean(values):.1f}{spread}" if values else None
        below = lost(named, name, ANN, measure)
        if below and task != UNLEARNED:
            over.append(-statistics.mean(below))
    row["mean over the ANN, but for wnli (tasks)"] = f"{statistics.mean(over):+.2f} ({len(over)})" if over else None
    return row


def short(records: dict[str, Any]) -> str:
    """The models that most will ask for: scores and costs."""
    cost = {row["model"]: row for row in costs(records)}
    return markdown_table(
        [
            scores_of(records, name) | {key: cost.get(name, {}).get(key) for key in ("energy", "reads")}
            for name in IN_SHORT
        ],
        digits=2,
    )


def scores(records: dict[str, Any]) -> str:
    rows = [scores_of(records, name) for name in names_in(records)]
    settings = {task: record["configuration"] for task, record in records.items()}
    notes = [
        f"{task}: {each['judged']}, {each['train'].partition(',')[0]} of training" for task, each in settings.items()
    ]
    about = f"{'; '.join(notes)}. ± is the deviation over seeds; without it one seed. – was not run. "
    about += " ".join(f"{task}: {source(record)}" for task, record in records.items())
    return f"{markdown_table(rows)}\n\n{wrapped(about)}"


def costs(records: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Spikes, energy and reads over the ANN's, the mean over tasks."""
    for name in names_in(records):
        found = [row for record in records.values() for row in by_name(record).get(name, []) if "energy" in row]
        if found:
            means = {key: statistics.mean(row[key] for row in found) for key in ("spikes", "energy", "reads")}
            yield {"model": name, "spikes an input": means["spikes"]} | {
                key: means[key] for key in ("energy", "reads")
            }


def calibrated(records: dict[str, Any]) -> str:
    """What calibration closes of the divergence of stepwise runs from QCFS, by task and T, the mean of the seeds."""
    rows = []
    for task, record in records.items():
        stepwise = [row for row in record["metrics"] if row.get("schedule") == "stepwise" and task != UNLEARNED]
        gaps = {(row["T"], row["calibration"], row["seed"]): row["divergence"] for row in stepwise}
        for T in sorted({T for T, how, _ in gaps if how != "none"}):
            row = {"task": task, "settings chosen on it": "yes" if task in CHOSEN_ON else "no", "T": T}
            for how, name in CALIBRATIONS.items():
                closed = [1 - gap / gaps[T, "none", seed] for (t, h, seed), gap in gaps.items() if (t, h) == (T, how)]
                if how != "none":
                    row[name.removeprefix(", ")] = f"{100 * statistics.mean(closed):.0f} %" if closed else None
            rows.append(row)
    return markdown_table(rows)


def budgets() -> str:
    """What more steps and dropout do, on held-out rows: distilled networks, by task, seed, model and steps."""
    record = read_results(RESULTS / "glue_budget.json")
    kinds = {"ann": ANN, "qcfs": QCFS, "phase": PHASE, "first_spike": FIRST}
    order = ("task", "seed", "model", "steps", "rate", "dropout")
    trials = [row for row in record["metrics"] if row.get("L", 8) == 8 and not row.get("T")]
    keys = [{**row, "model": list(kinds).index(row["model"])} for row in trials]
    found = sorted(zip(keys, trials, strict=True), key=lambda pair: [pair[0][name] for name in order])
    rows = []
    for _, row in found:
        settings = {"rate": f"{row['rate']:g}", "dropout": f"{row['dropout']:g}" if row["dropout"] else "off"}
        rows.append(
            {"task": row["task"], "seed": row["seed"], "model": kinds[row["model"]].removesuffix(", distilled")}
            | {"steps of distillation": None if row["model"] == "ann" else row["steps"]}
            | (settings if row["steps"] else dict.fromkeys(settings))
            | {"score": f"{row['held_out']:.1f}", "divergence": f"{row['divergence']:.3f}"}
        )
    return f"{markdown_table(rows)}\n\n{wrapped(source(record))}"


def levels() -> str:
    """Held-out score of QCFS by its levels, and what accumulated steps leave of it; tasks with both."""
    record = read_results(RESULTS / "glue_budget.json")
    rows = [row for row in record["metrics"] if row["model"] == "qcfs"]
    settings = ("task", "seed", "steps", "rate", "dropout", "L")
    found = {tuple(row[name] for name in settings) for row in rows if row["T"]}
    ann = {(row["task"], row["seed"]): row["held_out"] for row in record["metrics"] if row["model"] == "ann"}
    table = []
    for key in sorted(found):
        own = {(row["T"], row["calibration"]): row for row in rows if tuple(row[name] for name in settings) == key}
        table.append(
            {"task": key[0], ANN: f"{ann[key[:2]]:.1f}", "L": key[-1], "QCFS": f"{own[0, 'none']['held_out']:.1f}"}
            | {
                f"accumulated, T = {T}{CALIBRATIONS[how]}": f"{row['held_out']:.1f}"
                for (T, how), row in sorted(own.items(), reverse=True)
                if T
            }
        )
    return markdown_table(table)


def goals(records: dict[str, Any]) -> str:
    """What was to be reached and what came out, the mean over the tasks that have both models, but for WNLI."""
    tasks = {name: by_name(record) for name, record in records.items() if name != UNLEARNED}
    rows = []
    for model, over, key, most in GOALS:
        found = {}
        for task, named in tasks.items():
            measure = key or MEASURES.get(task, "accuracy")
            values = lost(named, model, over, measure) if over else [row[measure] for row in named.get(model, [])]
            if values:
                found[task] = statistics.mean(values)
        if not found:
            continue
        got, digits = statistics.mean(found.values()), 2 if over else 3
        worst = max(found, key=lambda task: found[task])
        rows.append(
            {
                "model": model,
                "": "energy" if over is None else f"points below {over}",
                "at most": f"{most:.{digits}f}",
                "got": f"{got:.{digits}f}",
                "met": "yes" if got <= most else "**no**",
                "tasks": len(found),
                "worst": f"{found[worst]:.{digits}f} ({worst})",
            }
        )
    return markdown_table(rows)


def ablations() -> str:
    record = read_results(RESULTS / "ablations.json")
    rows: list[dict[str, Any]] = []

    def add(question: str, answer: str, row: dict[str, Any], model: str = "GPT-2, prose") -> None:
        code = code_of({name: value for name, value in row.items() if name not in ("schedule", "gain")})
        rows.append(
            {"what": question, "choice": answer, "model": model, "code": code, "T": row["T"]}
            | {"over stock": row["over_stock"], "spikes an input": row.get("spikes")}
            | {"energy": row.get("energy"), "reads": row.get("reads")}
        )

    for row in record["metrics"][1:]:
        add(row["question"], row["answer"], row)
    for row in read_results(RESULTS / "spike_driven" / "prose.json")["metrics"][1:]:
        if row["sites"] == "all" and row.get("length", 128) == 128:
            add("code and T", code_of(row), row)
    for row in read_results(RESULTS / "distillation.json")["metrics"]:
        if row["kind"] == "distilled":
            for when, steps in (("before", "none"), ("after", f"distilled, {row['steps']} steps")):
                add("training", steps, row | row[when] | {"over_stock": row[f"{when}_over_stock"]})
    for row in read_results(RESULTS / "rotation.json")["metrics"][1:]:
        add("rotation", row["rotation"], {"code": "phase", **row}, "SmolLM2, WikiText")
    rows.sort(key=lambda row: row["what"])
    about = f"Perplexity over the stock model's. {record['configuration']['judged']}; thresholds from "
    about += f"{record['configuration']['calibration']}. {source(record)}"
    return f"{markdown_table(rows, digits=3)}\n\n{wrapped(about)}"


if __name__ == "__main__":
    sys.exit(command(parts))
