"""The report on a results file of `training.evaluate`: Markdown, plots, and one HTML file with all of it.

python -m training.evaluate.report report/results.json
"""

import argparse
import base64
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..commands import command_parser
from ..layout import label
from ..results import code, escaped, escaped_row, fault_of, markdown_table, read_results, without_paths, write_json
from .energy import NOT_COUNTED
from .evaluation import LOWER_IS_BETTER, RESULTS_FILE, Evaluation, headline, run_name, told
from .plots import figures, image


NOTES = {
    "QCFS ANN": "is the quantisation baseline: the same network with its activations plainly quantised to L levels, "
    "and no spikes. Uncalibrated, the layerwise schedule at T = L computes exactly the same numbers, and at any "
    "other T those of a network quantised to T levels: it is a quantised activation, run as a spiking layer. Only "
    "the stepwise schedule passes spike trains from layer to layer. Of a network without levels it is called ANN, "
    "which is not quantised: converted and not trained, it is the stock model.",
    "Agreement": "is the share of predictions (of text: of next tokens) that are those of the ANN; output error "
    "is the norm of the difference to its outputs, over their norm; the error of a site is the same for what it "
    "emits, on average over time. Cosine is that of sentence vectors, to the stock model's where it was given.",
    "Spike rate": "is spikes per neuron and timestep, padding left out. Dead neurons never spike on this data; "
    "saturated ones do at more than 95 % of all timesteps.",
    "Energy": "counts every product as multiply-accumulates (MACs) but those that take spikes, after a neuron site: "
    "they are accumulates (ACs), one for each spike and weight it meets. A ratio above 1 means that spiking costs "
    "more than the same ANN. The zero-skipping ANN is the QCFS ANN on hardware that skips activations that are 0, "
    "which quantisation alone provides. The last column is the stepwise ratio as published, with everything run T "
    "times; here, what is the same at all timesteps runs once, and so does the head.",
    "Latency": "is that of this code on the machine named below, which is no neuromorphic hardware.",
}
# Decimals of a column; 3 where it is not named.
DIGITS = {"perplexity": 2, "milliseconds": 1, "µJ": 2, "run": 0} | dict.fromkeys(
    ("dense, M", "effective MACs, M", "effective ACs, M", "membrane updates, M", "floating point, M"), 2
)
WIDE = ("raster",)
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f3f4f6 }
@media (prefers-color-scheme: dark) { :root { --ink: #d8dade; --paper: #16181c; --line: #3a3e45; --soft: #20242a } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2rem }
.head { background: var(--soft); border-left: .3rem solid #2f7ed8; padding: .6rem 1rem; margin: 1rem 0 }
.head p { margin: .3rem 0 } .small { font-size: .85rem }
code { overflow-wrap: anywhere } .wide { overflow-x: auto }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)) }
figure { margin: 0 } img { width: 100%; height: auto; display: block }
figure.wide { grid-column: 1 / -1 } figure.wide img { min-width: 44rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0;
  background: var(--paper) }
summary { cursor: pointer; margin-top: .5rem }
"""


def write_report(results: str | Path | Evaluation, folder: str | os.PathLike | None = None) -> Path:
    """Write `report.md`, the plots and `report.html` on results, whole or partial; returns the HTML's path.

    Args:
        results: A results file, beside which the report goes; or what [`evaluate`] returned.
        folder: For the latter: where `results.json` and the report go; made if need be.

    Raises:
        ValueError: if it is no results file of `training.evaluate`, holds no rows, or lacks what the report says; then
            nothing is written.
    """
    if isinstance(results, Evaluation):
        if folder is None:
            raise ValueError("`folder` must be given for what `evaluate` returned, got None.")
        path = Path(folder) / RESULTS_FILE
        write_json(path, results.results)
    else:
        path = Path(results)
    found = _read(path)
    try:
        if fault := next(filter(None, map(fault_of, found["metrics"]["rows"])), None):
            raise ValueError(fault)
        text, _ = markdown(found), html(found, {})  # what is missing is found before anything is drawn
        drawn = {
            name: (image(draw, found), image(draw, found, dark=True), alt)
            for name, (draw, alt) in figures(found).items()
        }
        page = html(found, drawn)
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"`path` must be a results file with all that docs/results-schema.md names, got {str(path)!r} with "
            f"{wrong}. Measure the checkpoint again with training.evaluate."
        ) from error
    for name, (light, _, _) in drawn.items():
        path.with_name(f"{name}.png").write_bytes(light)
    path.with_name("report.md").write_text(text, encoding="utf-8")
    path.with_name("report.html").write_text(page, encoding="utf-8")
    return path.with_name("report.html")


def _read(path: Path) -> dict[str, Any]:
    try:
        results = read_results(path)
        rows = results["metrics"]["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = error if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(f"`path` must be a results file of training.evaluate, got {str(path)!r}: {wrong}") from error
    if not rows:
        raise ValueError(f"`path` must hold at least one finished row, got none in {str(path)!r}.")
    return results


def headlines(results: Mapping[str, Any]) -> list[str]:
    """What the report says first: the best spiking run beside the ANN, what calibration closed, what is wrong."""
    metrics = results["metrics"]
    rows, metric = metrics["rows"], headline(metrics["rows"])
    spiking = [row for row in rows if row["T"]]
    lines = []
    if results.get("status") != "complete":
        lines.append("Partial: the run was interrupted, rows are missing.")
    if spiking:
        sign = 1 if metric in LOWER_IS_BETTER else -1
        best = min(spiking, key=lambda row: (sign * row["quality"][metric], row["T"]))
        digits = DIGITS.get(metric, 3)
        others = ", ".join(f"{run_name(row)} {row['quality'][metric]:.{digits}f}" for row in rows if not row["T"])
        line = f"{run_name(best)}: {metric.replace('_', ' ')} {best['quality'][metric]:.{digits}f} ({others})"
        line += f", {100 * best['agreement']:.1f} % of the ANN's answers" if best["agreement"] is not None else ""
        line += f"; a neuron spikes in {100 * best['spike_rate']:.1f} % of the timesteps"
        line += f"; {best['energy']['ratio']:.2f} of the ANN's energy" if "energy" in best else ""
        lines.append(f"{line}.")
    if metrics.get("gap"):
        lines.append(told(metrics["gap"]))
    for kind in ("dead", "saturated"):
        for row in rows:
            if row.get(f"{kind}_sites"):
                lines.append(
                    f"All neurons are {kind}, {run_name(row)}: {', '.join(map(label, row[f'{kind}_sites']))}."
                )
    return lines


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables of a report by title, as rows of cells."""
    metrics = results["metrics"]
    found = {"Quality": [_quality_cells(row) for row in metrics["rows"]]}
    found["Energy per token"] = [_energy_cells(row) for row in metrics["rows"] if "energy" in row]
    found["Latency"] = [
        {"run": run_name(row), "milliseconds": row["milliseconds"], "ratio": row["ratio"], "tokens": row["tokens"]}
        for row in metrics.get("latency") or ()
    ]
    if exits := metrics.get("early_exit"):
        found[f"Early exit from the {exits['schedule']} run with T = {exits['T']}"] = exits["curve"]
    for row in metrics["rows"]:
        if row["T"]:
            found[f"Sites, {run_name(row)}"] = [_site_cells(site) for site in row["sites"]]
    return {title: rows for title, rows in found.items() if rows}


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# {escaped(_title(results))}", *map(escaped, headlines(results))]
    for title, rows in tables(results).items():
        shown = [escaped_row(row) for row in rows]
        parts += [f"## {escaped(title)}", markdown_table(shown, list(_digits(shown)), _digits(shown))]
    parts += ["## How to read it", "\n".join(f"- **{term}** {text}" for term, text in NOTES.items())]
    parts += ["## Not counted in the energy", "\n".join(f"- {item}" for item in NOT_COUNTED)]
    parts += ["## Where it comes from", *map(escaped, _provenance(results)), code(_command(results))]
    return "\n\n".join(parts) + "\n"


def html(results: Mapping[str, Any], drawn: Mapping[str, tuple[bytes, bytes, str]]) -> str:
    """The report as one file that needs no other.

    Args:
        results: Of a results file.
        drawn: By name the figures, for light and dark pages, and what they show.
    """
    lines = "".join(f"<p>{escape(line)}</p>" for line in headlines(results))
    parts = [f"<h1>{escape(_title(results))}</h1>", f'<div class="head">{lines}</div>']
    found = tables(results)
    parts += [_html_table(found.pop("Quality")), '<div class="figures">']
    for name, (light, dark, alt) in drawn.items():
        wide = ' class="wide"' if name in WIDE else ""
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        picture = f'<picture>{source}<img alt="{escape(alt)}" src="{_inline(light)}"></picture>'
        parts.append(f"<figure{wide}>{picture}</figure>")
    parts.append("</div>")
    for title, rows in found.items():
        if title.startswith("Sites"):
            parts.append(f"<details><summary>{escape(title)}</summary>{_html_table(rows)}</details>")
        else:
            parts.append(f"<h2>{escape(title)}</h2>{_html_table(rows)}")
    notes = "".join(f"<li><b>{escape(term)}</b> {escape(text)}</li>" for term, text in NOTES.items())
    parts.append(f"<h2>How to read it</h2><ul>{notes}</ul>")
    items = "".join(f"<li>{escape(item)}</li>" for item in NOT_COUNTED)
    parts.append(f"<h2>Not counted in the energy</h2><ul>{items}</ul>")
    parts.append('<h2>Where it comes from</h2><div class="small">')
    parts += [f"<p>{escape(line)}</p>" for line in _provenance(results)]
    parts.append(f"<p><code>{escape(_command(results))}</code></p></div>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(_title(results))}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    digits = _digits(rows)

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return "–"
        return f"{value:,.{digits[name]}f}" if isinstance(value, float) else escape(str(value))

    names = list(digits)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell(row, name)}</td>' for name in names)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _digits(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Decimals by column, in their order; what no row has is left out."""
    return {
        name: DIGITS.get(name, 3) for row in rows for name in row if any(each.get(name) is not None for each in rows)
    }


def _quality_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"run": run_name(row)} | {name.replace("_", " "): value for name, value in row["quality"].items()}
    cells |= {"agreement": row["agreement"], "output error": row["logit_error"], "spike rate": row.get("spike_rate")}
    for name in ("dead", "saturated"):
        cells[f"{name} neurons"] = sum(site[name] for site in row["sites"]) if row["T"] else None
    return cells | {"energy, of ANN": row["energy"]["ratio"] if "energy" in row else None}


def _energy_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    energy = row["energy"]
    millions = {
        name.replace("_", " ").replace("macs", "MACs").replace("acs", "ACs") + ", M": energy[name] / 1e6
        for name in ("dense", "effective_macs", "effective_acs", "membrane_updates")
    }
    cells = {
        "run": run_name(row),
        **millions,
        "µJ": energy["energy_pj"] / 1e6,
        "ratio to ANN": energy["ratio"],
        "weights read, of ANN": energy.get("reads_ratio"),
        "floating point, M": sum(energy.get("floating_point", {}).values()) / 1e6 or None,
        "ratio with floating point": energy.get("ratio_with_floating_point"),
        "ratio to zero-skipping ANN": energy.get("ratio_to_zero_skipping_ann"),
        "ratio as published": energy.get("ratio_replicated"),
    }
    return cells


def _site_cells(site: Mapping[str, Any]) -> dict[str, Any]:
    names = {"spike_rate": "spike rate", "error": "error", "dead": "dead", "saturated": "saturated"}
    state = next((kind for kind in ("dead", "saturated") if site[kind] == site["neurons"]), None)
    name = label(site["site"]) + (f" ({state})" if state else "")
    return {"site": name, "neurons": site["neurons"], **{title: site[key] for key, title in names.items()}}


def _title(results: Mapping[str, Any]) -> str:
    return f"What {Path(results['configuration']['checkpoint']).name} spikes, costs and achieves"


def _command(results: Mapping[str, Any]) -> str:
    return without_paths(results["command"])


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from."""
    configuration, hardware, versions = results["configuration"], results["hardware"], results["versions"]
    settings = {name: value for name, value in configuration["data"].items() if value}
    data = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else without_paths(str(value))}"
        for name, value in settings.items()
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
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = command_parser("fas report", (__doc__ or "").split("\n")[0], "fas report report/results.json")
    parser.add_argument("results", help="results.json of `fas evaluate`")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report on the results file given, and say where it is."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        page = write_report(args.results)
    except (ValueError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        parser.exit(1, f"No report: {error}\n")
    sys.stdout.write(f"The report is {page}\n")
    return page


if __name__ == "__main__":
    main()
