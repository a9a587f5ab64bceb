"""The figures of a report: quality over timesteps, spikes over words, spike rates by site and by neuron, energy."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..layout import label
from .evaluation import headline, run_name
from .figure import Figure
from .monitors import RATE_BINS
from .recorder import draw_raster


PARTS = {
    "attention": ("qkv", "scores", "values", "attention output"),
    "mlp in": ("mlp in",),
    "mlp out": ("mlp out",),
    "head": ("pooler", "transform", "head"),
    "membrane": ("neurons",),
}
COLOURS = {"attention": "#4c78a8", "mlp in": "#72b7b2", "mlp out": "#f58518", "head": "#9a9a9a", "membrane": "#b279a2"}
SCHEDULE_COLOURS = {"stepwise": "#e4572e", "layerwise": "#2f7ed8", "accumulated": "#2ca02c"}
KINDS = ("#2f7ed8", "#e4572e", "#2ca02c", "#b279a2", "#f5a518", "#17a2a8", "#8c6d5a", "#9a9a9a")
# More sites than this are drawn by block, a mark for each kind of site.
MOST_SITES = 16
INK = {False: "#222222", True: "#d8dade"}
PAPER = {False: "#ffffff", True: "#16181c"}


def figures(results: Mapping[str, Any]) -> dict[str, tuple[Callable[[Mapping[str, Any]], Figure], str]]:
    """What draws each figure of a report, and what it shows, for those who do not see it; by name, in their order."""
    metrics = results["metrics"]
    measure = headline(metrics["rows"]).replace("_", " ")
    found: dict[str, tuple[Callable[[Mapping[str, Any]], Figure], str]] = {}
    found["quality"] = (quality_plot, f"{measure} over timesteps")
    if any("energy" in row for row in metrics["rows"]):
        found["energy"] = (energy_plot, "energy per token by part, over that of the ANN")
    if metrics.get("raster"):
        found["raster"] = (raster_plot, "spikes of neurons over the tokens of a text")
    if any(row["T"] for row in metrics["rows"]):
        found["spike_rate"] = (spike_rate_plot, "spike rate of every site")
        found["spike_rate_histogram"] = (histogram_plot, "share of the neurons by spike rate")
    return found


def image(draw: Callable[[Mapping[str, Any]], Figure], results: Mapping[str, Any], dark: bool = False) -> bytes:
    """A figure as PNG, for a light or a dark page."""
    ink, paper = INK[dark], PAPER[dark]
    colours: Any = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
    )
    colours |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper)
    with matplotlib.rc_context(
        {**colours, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    ):
        buffer = BytesIO()
        draw(results).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def quality_plot(results: Mapping[str, Any]) -> Figure:
    """Quality over T, with the ANN and the stock model as lines, and the early exits of the longest run."""
    figure, axes = _figure()
    metrics = results["metrics"]
    metric = headline(metrics["rows"])
    ticks = {row["T"] for row in metrics["rows"] if row["T"]}
    for row in metrics["rows"]:
        if not row["T"]:
            style = "--" if row["mode"] == "stock" else "-"
            axes.axhline(row["quality"][metric], color="0.5", linestyle=style, linewidth=1.2, label=run_name(row))
    for schedule in dict.fromkeys(row["schedule"] for row in metrics["rows"] if row["T"]):
        points = sorted((row["T"], row["quality"][metric]) for row in metrics["rows"] if row["schedule"] == schedule)
        axes.plot(*zip(*points, strict=True), "o-", color=SCHEDULE_COLOURS[schedule], label=schedule)
    if metrics.get("gap"):
        gap = metrics["gap"]
        colour = SCHEDULE_COLOURS[gap["schedule"]]
        axes.plot(gap["T"], gap["uncalibrated"], "x", color=colour, label=f"{gap['schedule']}, uncalibrated")
    if metrics.get("early_exit"):
        exits = metrics["early_exit"]
        curve = [(point["t"], point[metric]) for point in exits["curve"]]
        ticks |= {t for t, _ in curve} if len(curve) <= 16 else set()
        colour = SCHEDULE_COLOURS[exits["schedule"]]
        axes.plot(
            *zip(*curve, strict=True), ".:", color=colour, label=f"early exit of {exits['schedule']} T = {exits['T']}"
        )
    axes.set_xticks(sorted(ticks), [str(T) for T in sorted(ticks)])
    axes.set(xlabel="timesteps", ylabel=metric.replace("_", " "), title=f"{metric.replace('_', ' ')} over timesteps")
    axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


def raster_plot(results: Mapping[str, Any]) -> Figure:
    """The spikes of one site over the words of one text."""
    figure, axes = _figure(11.0, 5.2)
    draw_raster(results["metrics"]["raster"], axes)
    return figure


def spike_rate_plot(results: Mapping[str, Any]) -> Figure:
    """Spike rate of each site, one beside the other; dead and saturated ones are marked."""
    rows = [row for row in results["metrics"]["rows"] if row["T"]]
    names = [site["site"] for site in rows[0]["sites"]]
    few = len(names) <= MOST_SITES
    figure, axes = _figure(height=4.4)
    if few:
        places, ticks = {name: i for i, name in enumerate(names)}, [label(name) for name in names]
        _rates_by_run(axes, rows, places)
        title = "spike rate by site"
    else:
        blocks = list(dict.fromkeys(_block(name) for name in names))
        places, ticks = {name: blocks.index(_block(name)) for name in names}, blocks
        rows = [max(rows, key=lambda row: row["T"])]
        _rates_by_kind(axes, rows[0], places)
        title = f"spike rate by block, {run_name(rows[0])}"
    for kind, mark, colour in (("dead", "x", "#d62728"), ("saturated", "s", "#d62728")):
        silent = [(places[name], rate) for row in rows for name, rate in _silent(row, kind)]
        if silent:
            how = {"dead": "dead: none of its neurons spikes", "saturated": "saturated: all of them, always"}[kind]
            axes.plot(*zip(*silent, strict=True), mark, color=colour, markersize=9, linestyle="", label=how, zorder=5)
    long = few and max(map(len, ticks), default=0) > 3
    shown = range(0, len(ticks), 1 + len(ticks) // 32)
    axes.set_xticks(list(shown), [ticks[i] for i in shown], fontsize=9)
    if long:
        axes.tick_params(axis="x", rotation=35)
        for each in axes.get_xticklabels():
            each.set(ha="right", rotation_mode="anchor")
    axes.set(xlabel="site" if few else "block", ylabel="spikes per neuron and timestep", title=title, ylim=(0, None))
    _legend(figure)
    return figure


def histogram_plot(results: Mapping[str, Any]) -> Figure:
    """Share of the neurons by spike rate, for the longest run of each schedule."""
    rows = [row for row in results["metrics"]["rows"] if row["T"]]
    longest = {row["schedule"]: row for row in sorted(rows, key=lambda row: row["T"])}
    figure, axes = _figure()
    width = 0.8 / len(longest)
    for i, (schedule, row) in enumerate(longest.items()):
        counts = [sum(site["histogram"][j] for site in row["sites"]) for j in range(len(RATE_BINS))]
        places = [j + (i - (len(longest) - 1) / 2) * width for j in range(len(RATE_BINS))]
        shares = [count / max(sum(counts), 1) for count in counts]
        axes.bar(places, shares, width, color=SCHEDULE_COLOURS[schedule], label=run_name(row))
    axes.set_xticks(range(len(RATE_BINS)), ["0 (dead)", *(f"≤ {high:g}" for high in RATE_BINS[1:])], fontsize=9)
    axes.tick_params(axis="x", rotation=35)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="spikes per timestep", ylabel="share of all neurons", title="neurons by spike rate")
    _legend(figure)
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
        axes.bar(range(len(rows)), heights, 0.7, bottom=bottoms, color=COLOURS[part], label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, height in enumerate(bottoms):
        axes.annotate(f"{height:.2f}", (place, height), ha="center", va="bottom", fontsize=9)
    axes.axhline(1, color="0.5", linewidth=1)
    if rows and "zero_skipping_ann_energy_pj" in rows[0]["energy"]:
        skipping = rows[0]["energy"]["zero_skipping_ann_energy_pj"] / rows[0]["energy"]["ann_energy_pj"]
        axes.axhline(skipping, color="0.5", linewidth=1.2, linestyle=":", label="ANN that skips zeros")
    labels = ["ANN" if not row["T"] else f"{row['schedule']}\nT = {row['T']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set(ylabel="energy per token / ANN", title="energy by part", ylim=(0, 1.12 * max([1.0, *bottoms])))
    _legend(figure)
    return figure


def _figure(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure) -> None:
    """Below the axes, where it covers no line."""
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _rates_by_run(axes: Any, rows: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> None:
    most = max(row["T"] for row in rows)
    for row in rows:
        points = [(places[site["site"]], site["spike_rate"]) for site in row["sites"]]
        shade = 0.35 + 0.65 * row["T"] / most
        colour = SCHEDULE_COLOURS[row["schedule"]]
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=shade, markersize=6, label=run_name(row))


def _rates_by_kind(axes: Any, row: Mapping[str, Any], places: Mapping[str, int]) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for site in row["sites"]:
        kinds.setdefault(label(site["site"]).split(" ")[-1], []).append((places[site["site"]], site["spike_rate"]))
    for i, (kind, points) in enumerate(kinds.items()):
        axes.plot(*zip(*points, strict=True), "o", color=KINDS[i % len(KINDS)], markersize=5, label=kind)


def _silent(row: Mapping[str, Any], kind: str) -> list[tuple[str, float]]:
    return [(site["site"], site["spike_rate"]) for site in row["sites"] if site[kind] == site["neurons"]]


def _block(site: str) -> str:
    """The number of its block; outside of blocks its module."""
    first = label(site).split(" ")[0]
    return first if first.isdigit() else first.split(".")[0]
