"""The tables of benchmarks/sizing.md, from results/sizing.json: `python -m benchmarks.sizing_tables [--check]`."""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.pages import RESULTS, Part, command, source, wrapped
from training.results import markdown_table, read_results


def parts() -> Iterator[Part]:
    record = read_results(RESULTS / "sizing.json")
    metrics, settings = record["metrics"], record["configuration"]
    yield Part("benchmarks/sizing.md", "large", f"{large(metrics['models'], settings)}\n\n{breaks(metrics, settings)}")
    yield Part("benchmarks/sizing.md", "small", f"{small(metrics['measured'])}\n\n{wrapped(source(record))}")


def large(models: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Memory and time of the large models, a column each."""
    gpus = f"{settings['gpus']} GPUs"
    quantities = {
        "weights, billions": lambda each: each["weights"] / 1e9,
        "the same, dry run": lambda each: each["dry_run"]["weights"] / 1e9,
        "weights in float32, GB": lambda each: each["weights_bytes"]["float32"] / 1e9,
        "weights in bfloat16, GB": lambda each: each["weights_bytes"]["bfloat16"] / 1e9,
        "thresholds, MB": lambda each: each["threshold_bytes"] / 1e6,
        "the same, dry run ": lambda each: each["dry_run"]["threshold_bytes"] / 1e6,
        "pass, over weights in float32, GB": lambda each: each["pass_bytes"]["float32"] / 1e9,
        "the same, dry run  ": lambda each: each["dry_run"]["pass_bytes"]["float32"] / 1e9,
        "pass, over weights in bfloat16, GB": lambda each: each["pass_bytes"]["bfloat16"] / 1e9,
        "the same, dry run   ": lambda each: each["dry_run"]["pass_bytes"]["bfloat16"] / 1e9,
        "**memory: `fas convert`, of the host, GB**": lambda each: each["needs"]["host"] / 1e9,
        "one GPU, bfloat16, GB": lambda each: each["needs"]["one GPU"] / 1e9,
        f"each of {gpus}, bfloat16, GB": lambda each: each["needs"]["each GPU"] / 1e9,
        "**hours: pass on one CPU thread**": lambda each: sum(each["seconds"]["one thread"].values()) / 3600,
        f"pass on {gpus}, one after the other": lambda each: sum(each["seconds"]["GPUs"].values()) / 3600,
        "files read and written, bfloat16": lambda each: each["seconds"]["files"]["bfloat16"] / 3600,
        "files read and written, float32": lambda each: each["seconds"]["files"]["float32"] / 3600,
    }
    rows = [
        {"": name.rstrip(), **{each["model"]: value(each) for each in models}} for name, value in quantities.items()
    ]
    return markdown_table(rows, digits=3)


def breaks(metrics: dict[str, Any], settings: dict[str, Any]) -> str:
    """What the table says: what breaks first, and what would then."""
    least, *others = metrics["models"]
    gpus, memory = settings["gpus"], settings["gpu_memory"]

    def in_gb(model: dict[str, Any], what: str) -> str:
        return f"{model['needs'][what] / 1e9:.0f} GB"

    def span(what: str) -> str:
        return f"{in_gb(others[0], what).removesuffix(' GB')} to {in_gb(others[-1], what)}"

    thresholds = max(each["threshold_bytes"] for each in others) / 1e6
    squares = others[-1]["pass_bytes"]["bfloat16"] / 1e9
    seconds = (
        sum(each["seconds"]["GPUs"].values()) + each["seconds"]["files"]["bfloat16"] for each in metrics["models"]
    )
    hours = [each / 3600 for each in seconds]
    lines = [
        f"Loading breaks first. `fas convert` holds the model in float32 on one host: {in_gb(least, 'host')} at 7 B, "
        f"{span('host')} at 70 B; a script that converts in {gpus} processes holds it {gpus} times. Thresholds "
        f"({thresholds:.0f} MB) are nothing beside it, and the pass is little.",
        f"One GPU of {memory:.0f} GB holds 7 B in bfloat16 ({in_gb(least, 'one GPU')}), not 70 B ({span('one GPU')}). "
        f"Over {gpus}, by `device_map`, converted in place, each has {span('each GPU')}: up to {squares:.0f} GB of "
        "it are squares of the head's weights, in float32. GPUs run one after the other: more hold more, no faster.",
        f"Hours on GPUs: about {hours[0]:.2f} at 7 B and {hours[-1]:.2f} at 70 B, nearly all of it reading and "
        f"writing files at {settings['disk']:g} GB/s.",
    ]
    return "\n".join(wrapped(f"- {line}", "  ") for line in lines)


def small(rows: list[dict[str, Any]]) -> str:
    """What was measured, a row for each small model."""
    return markdown_table(
        [
            {
                "width": row["width"],
                "blocks": row["layers"],
                "vocabulary": row["vocabulary"],
                "tokens": row["tokens"],
                "conversion, s": row["seconds"]["conversion"],
                "one block, s": row["seconds"]["conversion"] / row["layers"],
                "of it forward, s": row["seconds"]["forward"] / row["layers"],
                "fit, ns a token and neuron": row["fit_ns"],
                "GFLOP/s": row["gflops"],
                **{f"pass over {name}, MB": found_and_formula(row, name) for name in row["peak_bytes"]},
            }
            for row in rows
        ],
        digits=3,
    )


def found_and_formula(row: dict[str, Any], dtype: str) -> str:
    found, formula = (row[name][dtype] / 1e6 for name in ("peak_bytes", "peak_by_formula"))
    return f"{found:.1f} ({formula:.1f})"


if __name__ == "__main__":
    sys.exit(command(parts))
