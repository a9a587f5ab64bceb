"""The report on a results file of `training.evaluate`: Markdown, plots, and one HTML file with all of it.

python -m training.evaluate.report report/results.json
"""

import argparse
import base64
import traceback
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..results import MODES, code, escaped, escaped_row, fault_of, markdown_table, read_results
from .energy import NOT_COUNTED
from .evaluation import headline as headline_of


PARTS = {
    "attention": ("qkv", "scores", "values", "attention output"),
    "mlp in": ("mlp in",),
    "mlp out": ("mlp out",),
    "head": ("pooler", "transform", "head"),
    "membrane": ("neurons",),
}
COLOURS = {"attention": "#4c78a8", "mlp in": "#72b7b2", "mlp out": "#f58518", "head": "#b0b0b0", "membrane": "#b279a2"}
SCHEDULE_COLOURS = {"stepwise": "#d62728", "layerwise": "#1f77b4", "accumulated": "#2ca02c"}

NOTES = {
    "QCFS ANN": "is the quantisation baseline: the same network with its activations plainly quantised to L levels, "
    "and no spikes. Uncalibrated, the layerwise schedule at T = L computes exactly the same numbers, and at any "
    "other T those of a network quantised to T levels: it is a quantised activation, run as a spiking layer. Only "
    "the stepwise schedule passes spike trains from layer to layer.",
    "Agreement": "is the share of predictions (of text: of next tokens) that are those of the QCFS ANN; logit error "
    "is the norm of the difference to its logits, over their norm; the error of a site is the same for what it "
    "emits, on average over time.",
    "Spike rate": "is spikes per neuron and timestep, padding left out. Dead neurons never spike on this data; "
    "saturated ones do at more than 95 % of all timesteps.",
    "Energy": "counts every product as multiply-accumulates (MACs) but those that take spikes, after a neuron site: "
    "they are accumulates (ACs), one for each spike and weight it meets. A ratio above 1 means that spiking costs "
    "more than the same ANN. The zero-skipping ANN is the QCFS ANN on hardware that skips activations that are 0, "
    "which quantisation alone provides. The last column is the stepwise ratio as published, with everything run T "
    "times; here, what is the same at all timesteps runs once, and so does the head.",
    "Latency": "is that of this code on the machine named above, which is no neuromorphic hardware.",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
code { overflow-wrap: anywhere } img { width: 49%; min-width: 24rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
summary { cursor: pointer; margin-top: .5rem }
"""


def write_report(path: str | Path) -> Path:
    """Write `report.md`, the plots and `report.html` beside a results file, whole or partial; returns the HTML's path.

    Raises:
        ValueError: if it is no results file of `training.evaluate`, holds no rows, or lacks what the report says; then
            nothing is written.
    """
    path = Path(path)
    try:
        results = read_results(path)
        rows = results["metrics"]["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = error if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(f"`path` must be a results file of training.evaluate, got {str(path)!r}: {wrong}") from error
    if not rows:
        raise ValueError(f"`path` must hold at least one finished row, got none in {str(path)!r}.")
    makers = {"quality": quality_plot, "spike_rate": spike_rate_plot, "energy": energy_plot}
    try:
        if fault := next(filter(None, map(fault_of, rows)), None):
            raise ValueError(fault)
        plots = {name: _image(make(results)) for name, make in makers.items()}
        text, page = markdown(results), _html(results, plots)
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"`path` must be a results file with all that docs/results-schema.md names, got {str(path)!r} with "
            f"{wrong}. Measure the checkpoint again with training.evaluate."
        ) from error
    for name, image in plots.items():
        path.with_name(f"{name}.png").write_bytes(image)
    path.with_name("report.md").write_text(text, encoding="utf-8")
    path.with_name("report.html").write_text(page, encoding="utf-8")
    return path.with_name("report.html")


def headline(results: Mapping[str, Any]) -> str:
    """Name of the quality that plots show."""
    return headline_of(results["metrics"]["rows"])


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables of a report by title, as rows of cells."""
    metrics = results["metrics"]
    found = {"Quality": [_quality_cells(row) for row in metrics["rows"]]}
    found["Energy per token"] = [_energy_cells(row) for row in metrics["rows"] if "energy" in row]
    latency = [
        {"run": _name(row), "milliseconds": row["milliseconds"], "ratio": row["ratio"], "tokens": row["tokens"]}
        for row in metrics.get("latency", ())
    ]
    if latency:
        found["Latency"] = latency
    if metrics.get("early_exit"):
        found[f"Early exit from the stepwise run with T = {metrics['early_exit']['T']}"] = metrics["early_exit"][
            "curve"
        ]
    for row in metrics["rows"]:
        if row["T"]:
            found[f"Sites, {_name(row)}"] = [
                {name: value for name, value in site.items() if name not in ("histogram", "density")}
                for site in row["sites"]
            ]
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# {escaped(_title(results))}", *map(escaped, _provenance(results)), code(results["command"])]
    for title, rows in tables(results).items():
        parts += [f"## {escaped(title)}", markdown_table(map(escaped_row, rows))]
    parts += ["## How to read it", "\n".join(f"- **{term}** {text}" for term, text in NOTES.items())]
    parts += ["## Not counted in the energy", "\n".join(f"- {item}" for item in NOT_COUNTED)]
    return "\n\n".join(parts) + "\n"


def quality_plot(results: Mapping[str, Any]) -> Figure:
    """Quality over T, with the ANN and the stock model as lines, and the early exits of the longest run."""
    figure, axes = _figure()
    metric = headline(results)
    metrics = results["metrics"]
    for row in metrics["rows"]:
        if not row["T"]:
            style = "--" if row["mode"] == "stock" else "-"
            axes.axhline(row["quality"][metric], color="0.3", linestyle=style, linewidth=1, label=MODES[row["mode"]])
    for schedule, colour in SCHEDULE_COLOURS.items():
        points = sorted((row["T"], row["quality"][metric]) for row in metrics["rows"] if row["schedule"] == schedule)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=schedule)
    if metrics.get("early_exit"):
        curve = [(point["t"], point[metric]) for point in metrics["early_exit"]["curve"]]
        label = f"early exit, T = {metrics['early_exit']['T']}"
        axes.plot(*zip(*curve, strict=True), ".:", color=SCHEDULE_COLOURS["stepwise"], label=label)
    axes.set(xlabel="timesteps", ylabel=metric.replace("_", " "), title=f"{metric.replace('_', ' ')} over timesteps")
    axes.legend()
    return figure


def spike_rate_plot(results: Mapping[str, Any]) -> Figure:
    """Spike rate of each site, from the first to the last."""
    figure, axes = _figure()
    rows = [row for row in results["metrics"]["rows"] if row["T"]]
    most = max((row["T"] for row in rows), default=1)
    for row in rows:
        rates = [site["spike_rate"] for site in row["sites"]]
        colour, shade = SCHEDULE_COLOURS[row["schedule"]], 0.35 + 0.65 * row["T"] / most
        axes.plot(rates, "o-", color=colour, alpha=shade, markersize=4, label=_name(row))
    if rows:
        axes.set_xticks(range(len(rows[0]["sites"])), [_short(site["site"]) for site in rows[0]["sites"]])
        axes.legend(fontsize=8)
    axes.set(xlabel="site", ylabel="spikes per neuron and timestep", title="spike rate by layer", ylim=(0, None))
    return figure


def energy_plot(results: Mapping[str, Any]) -> Figure:
    """Energy per token by part, stacked, over that of the ANN."""
    figure, axes = _figure()
    rows = [row for row in results["metrics"]["rows"] if "energy" in row]
    bottoms = [0.0] * len(rows)
    for part, names in PARTS.items():
        heights = [
            sum(each["energy_pj"] for each in row["energy"]["operations"] if each["part"] in names)
            / row["energy"]["ann_energy_pj"]
            for row in rows
        ]
        axes.bar(range(len(rows)), heights, bottom=bottoms, color=COLOURS[part], label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(1, color="0.3", linewidth=1)
    for row in rows[:1]:
        skipping = row["energy"].get("zero_skipping_ann_energy_pj", 0) / row["energy"]["ann_energy_pj"]
        axes.axhline(skipping, color="0.3", linewidth=1, linestyle=":", label="ANN that skips zeros")
    labels = ["ANN" if not row["T"] else f"{row['schedule']}\nT = {row['T']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set(ylabel="energy per token / ANN", title="energy by part")
    axes.legend(fontsize=8)
    return figure


def _image(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _quality_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"run": _name(row), **row["quality"], "agreement": row["agreement"], "logit error": row["logit_error"]}
    cells["spike rate"] = row.get("spike_rate")
    for name in ("dead", "saturated"):
        cells[name] = sum(site[name] for site in row["sites"]) if row["T"] else None
    return cells


def _energy_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    energy = row["energy"]
    millions = {
        name.replace("_", " ") + ", M": energy[name] / 1e6
        for name in ("dense", "effective_macs", "effective_acs", "membrane_updates")
    }
    return {
        "run": _name(row),
        **millions,
        "energy, µJ": energy["energy_pj"] / 1e6,
        "ratio to ANN": energy["ratio"],
        "floating point, M": sum(energy.get("floating_point", {}).values()) / 1e6 or None,
        "ratio with floating point": energy.get("ratio_with_floating_point"),
        "ratio to zero-skipping ANN": energy.get("ratio_to_zero_skipping_ann"),
        "ratio as published": energy.get("ratio_replicated"),
    }


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['schedule']} T = {row['T']}" if row["T"] else MODES[row["mode"]]


def _short(site: str) -> str:
    """The number of the block in the name of a site; without one, the module that holds it."""
    number = next((part for part in site.split(".") if part.isdigit()), None)
    return number or ("pooler" if "pooler" in site else "head")


def _title(results: Mapping[str, Any]) -> str:
    return f"What {Path(results['configuration']['checkpoint']).name} spikes, costs and achieves"


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from."""
    configuration, hardware, versions = results["configuration"], results["hardware"], results["versions"]
    settings = {name: value for name, value in configuration["data"].items() if value}
    data = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in settings.items()
    )
    lines = [f"Data: {data}."]
    energy = next((row["energy"] for row in results["metrics"]["rows"] if "energy" in row), None)
    if energy is not None:
        prices = f"{energy['mac_pj']} pJ a MAC, {energy['ac_pj']} pJ an AC or membrane update"
        lines.append(f"Energy: {prices}, at {energy['length']:.1f} tokens.")
    lines.append(
        f"Machine: {hardware['processor']}, {hardware['threads']} threads; torch {versions.get('torch')}, "
        f"transformers {versions.get('transformers')}; {results['date']}; commit {results['commit']}."
    )
    for kind in ("dead", "saturated"):
        for row in results["metrics"]["rows"]:
            if row.get(f"{kind}_sites"):
                lines.append(f"All neurons are {kind}, {_name(row)}: {', '.join(row[f'{kind}_sites'])}.")
    if results.get("status") != "complete":
        lines.append("Partial: the run was interrupted, rows are missing.")
    return lines


def _html(results: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The report as one file that needs no other."""
    parts = [f"<h1>{escape(_title(results))}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in _provenance(results)]
    parts.append(f"<p><code>{escape(results['command'])}</code></p>")
    for name, image in plots.items():
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
    for title, rows in tables(results).items():
        frame = pd.DataFrame(rows, dtype=object)
        table = frame.mask(frame.isna(), "–").to_html(index=False, border=0, float_format="{:.4f}".format)
        if title.startswith("Sites"):
            parts.append(f"<details><summary>{escape(title)}</summary>{table}</details>")
        else:
            parts.append(f'<h2>{escape(title)}</h2><div class="wide">{table}</div>')
    notes = "".join(f"<li><b>{escape(term)}</b> {escape(text)}</li>" for term, text in NOTES.items())
    parts.append(f"<h2>How to read it</h2><ul>{notes}</ul>")
    items = "".join(f"<li>{escape(item)}</li>" for item in NOT_COUNTED)
    parts.append(f"<h2>Not counted in the energy</h2><ul>{items}</ul>")
    head = f'<meta charset="utf-8"><title>{escape(_title(results))}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report on the results file given."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", help="results.json of training.evaluate")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        return write_report(args.results)
    except (ValueError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        parser.exit(1, f"No report: {error}\n")


if __name__ == "__main__":
    main()
