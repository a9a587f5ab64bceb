"""Event-driven products against dense ones, by rows and by share of neurons that fire: where they begin to pay.

    python -m benchmarks.events

Each is timed over 24 layers with weights of their own, as in decoding, so that none stays in a core's cache: the stock
layer, event-driven whatever fires, and as a model chooses. What looking costs where it does not pay is over all such
shares, its spread without the outer tenths.
"""

from functools import partial
from statistics import median, quantiles
from unittest import mock

import matplotlib
import torch
from transformers.pytorch_utils import Conv1D

import events_fas
from benchmarks.common import arguments, compared, interleave, ratios, report, results_name
from events_fas import MOST_FIRED, receive_events


# Kind of layer, neurons, outputs.
SHAPES = {
    "GPT-2 small, 3072 × 768": (lambda neurons, outputs: Conv1D(outputs, neurons), 3072, 768),
    "OPT-125M, 3072 × 768": (torch.nn.Linear, 3072, 768),
}
ROWS, SHARES = (1, 2, 4, 8), (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LAYERS = 24
WORST = 1.03  # over the stock layer, of what a model chooses


def run(layers: list, inputs: list[torch.Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)


def whatever_fires(function) -> None:
    with mock.patch.dict(events_fas.MOST_FIRED, dict.fromkeys(MOST_FIRED, 1)):
        function()


def plot(points: list[dict], path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(9, 3.5), sharey=True)
    for axis, name in zip(axes, SHAPES, strict=True):
        for index, rows in enumerate(ROWS):
            found = [each["events"] for each in points if each["layer"] == name and each["rows"] == rows]
            axis.plot(SHARES, found, "o-", ms=3, color=f"C{index}", label=str(rows))
            axis.axvline(MOST_FIRED[rows], color=f"C{index}", lw=0.8, ls="--")
        axis.axhline(1, ls=":", color="grey")
        axis.set(xlabel="share of neurons that fire", title=name, ylim=(0, 2))
    axes[0].set_ylabel("time over the dense product")
    axes[0].legend(title="rows; dashed: chosen up to", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=5)
    measures, points = [], []
    for name, (make, neurons, outputs) in SHAPES.items():
        stock, spiking = ([make(neurons, outputs) for _ in range(LAYERS)] for _ in range(2))
        for layer in spiking:
            receive_events(layer)
        for rows in ROWS:
            declined: list[float] = []
            for share in SHARES:
                inputs = [torch.randn(rows, neurons) * (torch.rand(rows, neurons) < share) for _ in range(LAYERS)]
                events = partial(run, spiking, inputs)
                functions = {
                    "dense": partial(run, stock, inputs),
                    "events": partial(whatever_fires, events),
                    "chosen": events,
                }
                times = interleave(functions, args)
                case = f"{name}, {rows} rows, {share:.0%} fire"
                always = compared(f"{case}: event-driven over dense", None, times, "events", "dense")
                chosen = ratios(times, "chosen", "dense")
                declined += chosen if share > 1.2 * MOST_FIRED[rows] else []
                points.append(
                    {"layer": name, "rows": rows, "share": share}
                    | {"events": always["got"], "chosen": median(chosen), "spread": always["spread"]}
                )
                print(points[-1], flush=True)
                if share == 0.05:
                    measures.append(always)
            dearest = f"{name}, {rows} rows, more fire than pay: looking and the dense product, over it alone"
            found = {"got": median(declined), "spread": quantiles(declined, n=10)[::8]}
            measures.append({"measure": dearest, "target": WORST} | found)
    report("events", measures, args, points=points)
    plot(points, args.output / f"{results_name('events', args)}.png")


if __name__ == "__main__":
    main()
