"""The figure of docs/results.md, quality over cost for every code: `python -m benchmarks.curves [--check]`.

Every point is a row of a results file; lines join rows that differ in T alone.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.drawings import FAINT, GREY, INK, SPIKE, card, line, text
from benchmarks.pages import RESULTS, Part, command
from benchmarks.spike_tables import longest
from training.results import read_results


BLUE, GREEN, PURPLE = "#1864ab", "#2b8a3e", "#862e9c"
MODELS = {"smollm2": "SmolLM2-135M, WikiText-103", "prose": "gpt2-prose-mini, prose"}
AXES = {"energy": (0.125, 0.25, 0.5, 1, 2, 4), "reads": (0.5, 1, 2, 4), "T": (3, 4, 6, 8, 12, 16, 24)}
LABELS = {"energy": "energy, of the stock model's", "reads": "weights read, of the stock model's", "T": "timesteps T"}
LOSSES = (0.0001, 0.001, 0.01, 0.1, 1, 10)  # of perplexity over the stock model's; ticks, and the ends of the axis
LEFT, TOP, WIDTH, HEIGHT, STEP, APART = 84, 66, 240, 210, 300, 310


class Kind(NamedTuple):
    """What a line is of: how it is drawn, and what it is called."""

    colour: str
    mark: str
    words: str


KINDS = {
    ("all", "phase", "layerwise"): Kind(SPIKE, "circle", "phase, every product"),
    ("all", "first_spike", "layerwise"): Kind(BLUE, "circle", "first spike, every product"),
    ("linear", "phase", "layerwise"): Kind(SPIKE, "square", "phase, linear layers"),
    ("linear", "rate", "layerwise"): Kind(GREEN, "circle", "rate, linear layers"),
    ("linear", "rate", "accumulated"): Kind(GREEN, "square", "rate, linear layers, accumulated"),
    ("mlp", "rate", "stepwise"): Kind(PURPLE, "triangle", "FAS (MLPs), stepwise"),
    ("mlp", "rate", "accumulated"): Kind(PURPLE, "square", "FAS (MLPs), accumulated"),
    ("mlp", "rate", "layerwise"): Kind(PURPLE, "circle", "FAS (MLPs), layerwise"),
}


def parts() -> Iterator[Part]:
    yield Part("docs/curves.svg", None, curves())


def rows_of(name: str) -> list[dict[str, Any]]:
    """Spiking rows of a model: not trained, FAS, distilled; `loss` is perplexity over the stock model's, less 1."""
    found = []
    for file in (name, "fas") if name == "prose" else (name,):
        path = RESULTS / "spike_driven" / f"{file}.json"
        rows = read_results(path)["metrics"] if path.is_file() else []
        found += [row | {"loss": row["over_stock"] - 1} for row in rows if "energy" in row]
    rows = read_results(RESULTS / f"distillation{'_smollm2' if name == 'smollm2' else ''}.json")["metrics"]
    for row in longest(rows):
        after = row.get("after", row)
        loss = row.get("after_over_stock", row.get("over_stock")) - 1
        found.append(
            {"sites": "all", "schedule": "layerwise", "code": row["code"], "T": row["T"], "distilled": True}
            | {"code_base": row.get("code_base"), "energy": after["energy"], "reads": after["reads"], "loss": loss}
        )
    return found


def lines_of(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows by all but T, in the order of T."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["T"]):
        key = (row["sites"], row["code"], row["schedule"], row.get("code_base"), row.get("distilled", False))
        found.setdefault(key, []).append(row)
    return found


def along(value: float, ticks: tuple[float, ...]) -> float:
    """Where a value stands on an axis of logarithms, 0 to 1; what lies outside stands at its end."""
    ends = math.log(ticks[0]), math.log(ticks[-1])
    place = math.log(max(value, ticks[0])) - ends[0]
    return min(place / (ends[1] - ends[0]), 1.0)


def curves() -> str:
    shapes: list[str] = []
    for at, (name, title) in enumerate(MODELS.items()):
        top, rows = TOP + at * APART, rows_of(name)
        shapes += [text(24, top - 34, title, anchor="start", font_weight="bold", font_size=16)]
        shapes += [text(24, top - 14, "perplexity above the stock model's", GREY, "start", font_size=13)]
        for column, axis in enumerate(AXES):
            shapes += panel(LEFT + STEP * column, top, axis, rows, numbered=column == 0)
    shapes += legend(TOP + 2 * APART - 24)
    return card(960, TOP + 2 * APART + 90, "Loss of perplexity over energy, weights read and timesteps", shapes)


def panel(left: float, top: float, axis: str, rows: list[dict[str, Any]], numbered: bool) -> list[str]:
    """One model over one cost."""
    bottom, ticks = top + HEIGHT, AXES[axis]
    shapes = []
    for tick in LOSSES:
        y = bottom - HEIGHT * along(tick, LOSSES)
        shapes += [f'<path d="M{left} {y:g}h{WIDTH}" stroke="{FAINT}" stroke-width="0.6"/>']
        shapes += [text(left - 8, y + 5, f"{100 * tick:g} %", GREY, "end", font_size=13)] if numbered else []
    for tick in ticks:
        x = left + WIDTH * along(tick, ticks)
        width = 1.4 if tick == 1 else 0.6
        shapes += [f'<path d="M{x:g} {top}v{HEIGHT}" stroke="{FAINT}" stroke-width="{width}"/>']
        shapes += [text(x, bottom + 18, f"{tick:g}", GREY, font_size=13)]
    shapes += [text(left + WIDTH / 2, bottom + 38, LABELS[axis], font_size=14)]
    for (sites, code, schedule, _, distilled), members in lines_of(rows).items():
        kind = KINDS[sites, code, schedule]
        points = [
            (left + WIDTH * along(row[axis], ticks), bottom - HEIGHT * along(row["loss"], LOSSES)) for row in members
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes += [f'<polyline points="{path}" fill="none" stroke="{kind.colour}" stroke-width="1.6"/>']
        shapes += [mark(x, y, kind, distilled) for x, y in points]
    return shapes


def mark(x: float, y: float, kind: Kind, hollow: bool = False) -> str:
    fill = "#fff" if hollow else kind.colour
    style = f'fill="{fill}" stroke="{kind.colour}" stroke-width="1.6"'
    if kind.mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'
    if kind.mark == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" {style}/>'


def legend(y: float) -> list[str]:
    shapes = [line(24, y, 936, y, arrow=False)]
    entries = [*((kind, False) for kind in KINDS.values()), (Kind(INK, "circle", "hollow: distilled"), True)]
    for at, (kind, hollow) in enumerate(entries):
        x, height = 36 + 306 * (at // 3), y + 28 + 26 * (at % 3)
        shapes += [mark(x, height - 5, kind, hollow), text(x + 14, height, kind.words, anchor="start", font_size=14)]
    return shapes


if __name__ == "__main__":
    sys.exit(command(parts))
