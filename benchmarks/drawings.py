"""The drawings of docs/method.md, as SVG: `python -m benchmarks.drawings [--check]`.

Spikes are those of `neurons_fas.spike_train`; nothing is drawn that it does not return.
"""

import sys
from collections.abc import Iterator

import torch

from benchmarks.pages import Part, command
from neurons_fas import spike_train
from training.evaluate.neurobench import step_weights


INK, GREY, FAINT, PALE, SPIKE, WARM = "#24292f", "#6e7781", "#c4ccd4", "#eaeef2", "#d9480f", "#ffe8d9"
T, BASE, SCALE = 4, 2**0.5, 80
CODES = {
    "rate": "every step weighs 1/T",
    "phase": "a step weighs half of the one before",
    "first_spike": "one spike: the earlier, the larger",
}
VALUES = (0.62, -0.28)


def parts() -> Iterator[Part]:
    yield Part("docs/sites.svg", None, sites())
    yield Part("docs/schedules.svg", None, schedules())
    yield Part("docs/codes.svg", None, codes())


def card(width: int, height: int, title: str, shapes: list[str]) -> str:
    """A picture on white, so that it reads the same on a dark page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    head += 'font-family="Helvetica, Arial, sans-serif" font-size="15" role="img">'
    arrow = f'<path d="M0 0 8 4 0 8z" fill="{GREY}"/>'
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    marker = f'<defs><marker id="to" {size} orient="auto">{arrow}'
    frame = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" fill="#fff" stroke="#d0d7de"/>'
    return "\n".join([head, f"<title>{title}</title>", f"{marker}</marker></defs>", frame, *shapes, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle", **style: object) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{more}>{words}</text>'


def heading(x: float, y: float, name: str, words: str, anchor: str = "start") -> str:
    bold = f'<tspan font-weight="bold" font-family="Menlo, Consolas, monospace">{name}</tspan>'
    return text(x, y, f'{bold}<tspan dx="10" fill="{GREY}">{words}</tspan>', anchor=anchor)


def rect(x: float, y: float, width: float, height: float, fill: str, edge: str, **style: object) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{edge}" rx="3"{more}/>'
    )


def box(x: float, y: float, label: str, kind: str, width: float = 62, height: float = 28) -> str:
    """A station of the block, around (x, y): a product of `spikes` or in `float`, or `other`, no product."""
    fill, edge, style = {
        "spikes": (WARM, SPIKE, {"stroke_width": 2}),
        "float": (PALE, GREY, {}),
        "other": ("#fff", GREY, {"stroke_dasharray": "4 3"}),
    }[kind]
    shape = rect(x - width / 2, y - height / 2, width, height, fill, edge, **style)
    return shape + text(x, y + 5, label, font_size=14)


def line(*points: float, arrow: bool = True) -> str:
    steps = " ".join(f"{x:g},{y:g}" for x, y in zip(points[::2], points[1::2], strict=True))
    end = ' marker-end="url(#to)"' if arrow else ""
    return f'<polyline points="{steps}" fill="none" stroke="{GREY}"{end}/>'


def neuron(x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="6" fill="{SPIKE}" stroke="#fff"/>'


def sites() -> str:
    """Which products of a block get spikes, for each value of `sites`."""
    rows = {
        "mlp": "spikes into one product: the neuron stands in the activation's place",
        "linear": "spikes into every linear layer of the block",
        "all": "queries, values and the head spike too",
    }
    shapes: list[str] = []
    for row, (name, words) in enumerate(rows.items()):
        shapes += [heading(24, 40 + 150 * row, f'sites="{name}"', words)]
        shapes += block(name, 105 + 150 * row)
    y = 504
    shapes += [line(24, y - 30, 936, y - 30, arrow=False), neuron(34, y), text(46, y + 5, "neuron", anchor="start")]
    for x, kind, words in (
        (130, "spikes", "product of spikes: additions"),
        (390, "float", "product in floating point"),
        (630, "other", "no product: always in floating point"),
    ):
        shapes += [box(x, y, "", kind, 34, 20), text(x + 26, y + 5, words, anchor="start")]
    return card(960, 532, "Where neurons stand in a Transformer block, for each value of sites", shapes)


def block(name: str, y: float) -> list[str]:
    linear, everything = name != "mlp", name == "all"
    x = [58 + 84.4 * station for station in range(11)]
    product = "spikes" if linear else "float"
    attention = "spikes" if everything else "float"
    shapes = [box(x[0] - 2, y, "norm", "other")]
    fork = x[1] - 36
    shapes += [line(x[0] + 29, y, fork, y, arrow=False), line(fork, y - 34, fork, y + 34, arrow=False)]
    for offset, label in ((-34, "Q"), (0, "K"), (34, "V")):
        shapes += [line(fork, y + offset, x[1] - 24, y + offset), box(x[1], y + offset, label, product, 48)]
    shapes += [line(x[1] + 24, y - 34, x[2], y - 34, x[2], y - 14), line(x[1] + 24, y, x[2] - 31, y)]
    shapes += [line(x[1] + 24, y + 34, x[4], y + 34, x[4], y + 14)]
    stations = [
        ("Q Kᵀ", attention), ("softmax", "other"), ("P V", attention), ("output", product), ("norm", "other"),
        ("up", product), ("act.", "other"), ("down", "spikes"), ("head", attention),
    ]  # fmt: skip
    follows = False
    for at, (label, kind) in enumerate(stations, start=2):
        instead = label == "act." and not linear
        if at > 2:
            shapes += [
                line(x[at - 1] + (0 if follows else 31), y, x[at] - (0 if instead else 31), y, arrow=not instead)
            ]
        shapes += [neuron(x[at], y) if instead else box(x[at], y, label, kind)]
        follows = instead
    if not linear:
        return shapes
    between = [x[0] + 42, *((x[at] + x[at + 1]) / 2 for at in (4, 6, 8))]
    shapes += [neuron(at - 3, y) for at in between]
    if everything:
        shapes += [neuron(x[1] + 48, y - 34), neuron(x[1] + 48, y + 34), neuron((x[9] + x[10]) / 2 - 3, y)]
    return shapes


def schedules() -> str:
    """Time across, layers upward: what moves when."""
    about = {
        "stepwise": ("Each step climbs the whole network.", "A norm sees that step alone.", "one answer: the mean"),
        "layerwise": ("Each layer takes all steps, and hands", "on their mean. No step leaves a layer.", "one answer"),
        "accumulated": (
            "Each step climbs the whole network.",
            "A norm sees the mean so far.",
            "four answers, ever closer",
        ),
    }
    values, y, top = (0.62, 0.4, 0.8), (302, 226, 150), 118
    trains = [spike_train(torch.tensor([value]), torch.tensor(1.0), T, "rate")[:, 0].tolist() for value in values]
    shapes: list[str] = []
    for panel, (name, words) in enumerate(about.items()):
        left = 24 + 312 * panel
        x = [left + 84 + 50 * t for t in range(T)]
        shapes += [heading(left, 36, f'"{name}"', "")]
        shapes += [text(left, 60 + 19 * at, each, GREY, "start", font_size=14) for at, each in enumerate(words[:2])]
        shapes += [text((x[0] + x[-1]) / 2, top - 8, words[2], SPIKE, font_size=14)]
        for layer, (height, fired) in enumerate(zip(y, trains, strict=True)):
            above = y[layer + 1] + 20 if layer < 2 else top
            shapes += [text(left, height + 5, f"layer {layer + 1}", anchor="start", font_size=14)]
            if name == "layerwise":
                middle = (x[0] + x[-1]) / 2
                shapes += [line(x[0] - 18, height - 26, x[-1] + 18, height - 26, arrow=False)]
                shapes += [line(middle, height - 26, middle, above)]
                shapes += [level(middle + 16, height - 26 - (height - 26 - above) / 2, sum(fired) / T, 24)] * (
                    layer < 2
                )
            else:
                shapes += [line(at, height - 20, at, above) for at in x]
            for t, at in enumerate(x):
                shapes += cell(at, height, fired[t], sum(fired[: t + 1]) / (t + 1) if name == "accumulated" else None)
        shapes += [text(at, 342, f"t = {t}", GREY, font_size=13) for t, at in enumerate(x, start=1)]
    shapes += [line(24, 360, 936, 360, arrow=False)]
    shapes += [*cell(44, 394, 1, None), text(74, 399, "a step with a spike", anchor="start")]
    shapes += [*cell(268, 394, 0, None), text(298, 399, "one without", anchor="start")]
    shapes += [level(436, 394, 0.5), text(454, 399, "the mean, as a norm sees it", anchor="start")]
    return card(960, 428, "How time passes in each schedule: time to the right, layers upward", shapes)


def cell(x: float, y: float, fired: float, mean: float | None) -> list[str]:
    """One layer at one timestep: its spike, and where norms see it the mean so far."""
    shapes = [rect(x - 18, y - 20, 36, 40, WARM if fired else "#fff", SPIKE if fired else "#d0d7de")]
    if fired:
        shapes += [bar(x - (7 if mean is not None else 0), y + 14, 28)]
    return shapes if mean is None else [*shapes, level(x + 8, y, mean)]


def bar(x: float, y: float, height: float) -> str:
    return f'<path d="M{x:g} {y:g}v-{height:g}" stroke="{SPIKE}" stroke-width="3"/>'


def level(x: float, y: float, share: float, height: float = 28) -> str:
    empty = rect(x - 5, y - height / 2, 10, height, "#fff", GREY)
    return empty + rect(x - 5, y + height * (0.5 - share), 10, height * share, GREY, GREY)


def sent(value: float, code: str) -> tuple[list[float], list[float]]:
    """The spikes of a value, and what one at each step is worth, of a threshold of 1."""
    spikes = spike_train(torch.tensor([value]), torch.tensor(1.0), T, code, BASE)[:, 0].tolist()
    return spikes, step_weights(code, T, BASE)


def codes() -> str:
    """Two values, their spikes in each code, and what the spikes add up to."""
    shapes: list[str] = []
    for row, (value, base) in enumerate(zip(VALUES, (182, 240), strict=True)):
        shapes += [text(24, base - SCALE * value / 2 + 6, signed(value, "+"), anchor="start", font_size=20)]
        for column, (code, words) in enumerate(CODES.items()):
            left = 104 + 286 * column
            if row == 0:
                shapes += [heading(left, 36, f'"{code}"', "")]
                shapes += [text(left, 60, words, GREY, "start", font_size=14)]
                shapes += [text(left + 24 + 30 * t, 216, f"{t + 1}", GREY, font_size=13) for t in range(T)]
            shapes += train(left, base, *sent(value, code), value)
    shapes += [text(24, 216, "timestep", GREY, "start", font_size=13)]
    y = 370
    shapes += [line(24, y - 28, 936, y - 28, arrow=False)]
    legend = (
        (SPIKE, SPIKE, "a spike, as high as it counts"),
        ("#fff", FAINT, "a step without one"),
        (WARM, SPIKE, "the sum"),
    )
    for x, (fill, edge, words) in zip((34, 290, 480), legend, strict=True):
        shapes += [rect(x, y - 10, 14, 20, fill, edge), text(x + 24, y + 5, words, anchor="start")]
    shapes += [dashed(604, 632, y), text(642, y + 5, "the value", anchor="start")]
    return card(960, 402, "Two values in each code: their spikes over four timesteps, and the sum", shapes)


def signed(value: float, plus: str = "") -> str:
    return f"{'−' if value < 0 else plus}{abs(value):.2f}"


def dashed(x: float, to: float, y: float) -> str:
    return f'<path d="M{x:g} {y:g}H{to:g}" stroke="{INK}" stroke-width="1.5" stroke-dasharray="5 3"/>'


def train(left: float, base: float, spikes: list[float], worth: list[float], value: float) -> list[str]:
    """A bar for each step, their sum, and the value as a dashed line."""

    def upright(x: float, start: float, size: float, width: float, fill: str, edge: str) -> str:
        top = base - SCALE * (start + size) if value > 0 else base + SCALE * start
        return rect(x, top, width, SCALE * size, fill, edge)

    shapes, total = [], 0.0
    for t, (fired, weight) in enumerate(zip(spikes, worth, strict=True)):
        shapes += [upright(left + 14 + 30 * t, 0, weight, 20, *((SPIKE, SPIKE) if fired else ("#fff", FAINT)))]
        if fired:
            shapes += [upright(left + 156, total, weight, 34, WARM, SPIKE)]
            total += weight
    shapes += [dashed(left, left + 196, base - SCALE * value), line(left, base, left + 196, base, arrow=False)]
    count, y = round(sum(map(abs, spikes))), base - (24 if value > 0 else -18)
    shapes += [text(left + 202, y, signed(total if value > 0 else -total), anchor="start", font_weight="bold")]
    return [*shapes, text(left + 202, y + 18, f"{count} spike{'s' * (count != 1)}", GREY, "start", font_size=14)]


if __name__ == "__main__":
    sys.exit(command(parts))
