"""Event-driven products against dense ones, by rows and by share of neurons that fire: where they begin to pay.

    python -m benchmarks.events

Each is timed over 24 layers with weights of their own, as in decoding, so that none stays in a core's cache: dense as
stored, dense with the weight's transpose in memory, event-driven whatever fires, and as the model chooses.
"""

from functools import partial

import matplotlib
import torch

import events_fas
from benchmarks.common import arguments, interleave, ratio, report, results_name
from events_fas import EventLinear


SHAPES = {(3072, 768): "GPT-2 small", (1536, 576): "SmolLM2"}
ROWS, SHARES = (1, 2, 4, 8), (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LAYERS = 24
WORST = 1.03  # over dense, of what the model chooses


def layers_of(neurons: int, outputs: int) -> dict[str, list]:
    stored = [torch.nn.Linear(neurons, outputs) for _ in range(LAYERS)]
    transposed = [EventLinear(neurons, outputs) for _ in range(LAYERS)]
    for layer in transposed:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    return {"dense": stored, "transposed": transposed}


def run(layers: list, inputs: list[torch.Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)


def unlimited(function) -> None:
    """Event-driven whatever fires."""
    chosen, events_fas.most_read = events_fas.most_read, lambda rows: rows
    try:
        function()
    finally:
        events_fas.most_read = chosen


def dense(layers: list, inputs: list[torch.Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        torch.nn.functional.linear(x, layer.weight, layer.bias)


def plot(found: dict, path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(9, 3.5), sharey=True)
    for axis, (shape, whose) in zip(axes, SHAPES.items(), strict=True):
        for rows, color in zip(ROWS, ("C0", "C1", "C2", "C3"), strict=True):
            axis.plot(SHARES, [found[shape, rows, share][0] for share in SHARES], "o-", ms=3, color=color, label=rows)
        axis.axhline(1, ls=":", color="grey")
        axis.set(xlabel="share of neurons that fire", title=f"{whose}, {shape[0]} × {shape[1]}", ylim=(0, 2))
    axes[0].set_ylabel("event-driven over dense")
    axes[0].legend(title="rows", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, rounds=9)
    rows_, samples, found = [], {}, {}
    for shape, whose in SHAPES.items():
        made = layers_of(*shape)
        for rows in ROWS:
            for share in SHARES:
                inputs = [torch.randn(rows, shape[0]) * (torch.rand(rows, shape[0]) < share) for _ in range(LAYERS)]
                events = partial(run, made["transposed"], inputs)
                times = interleave(
                    {
                        "dense": partial(run, made["dense"], inputs),
                        "transposed": partial(dense, made["transposed"], inputs),
                        "events": partial(unlimited, events),
                        "chosen": events,
                    },
                    args,
                )
                got = [ratio(times, name, "dense") for name in ("events", "chosen", "transposed")]
                found[shape, rows, share] = got
                print(whose, rows, share, *(f"{each:.3f}" for each in got), flush=True)
                samples[f"{whose}, {rows} rows, {share:.0%}"] = times
    rows_ = [
        {"measure": f"{whose}, {rows} rows, {share:.0%} fire, {what} over dense", "target": target, "got": got}
        for (shape, rows, share), values in found.items()
        for whose in (SHAPES[shape],)
        for what, target, got in zip(
            ("event-driven", "chosen", "dense, transposed"), (None, WORST, None), values, strict=True
        )
    ]
    report("events", rows_, args, samples=samples)
    plot(found, args.output / f"{results_name('events', args)}.png")


if __name__ == "__main__":
    main()
