"""The neuron alone, forward and backward, against the plain loop."""

import torch

import neurons_fas
from benchmarks.common import arguments, compared, interleave, peak_bytes, report
from tests import naive


SHAPE = (8, 8, 128, 3072)


def main() -> None:
    args = arguments(__doc__, rounds=5)
    factory = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = torch.randn(SHAPE, **factory).requires_grad_()
    threshold = torch.full(SHAPE[-1:], 0.8, **factory).requires_grad_()
    potential = torch.full_like(threshold, 0.5).requires_grad_()
    upstream = torch.randn(SHAPE, **factory)

    def run(function):
        return torch.autograd.grad(function(x, threshold, potential, SHAPE[0]), (x, threshold, potential), upstream)

    functions = {
        "loop": lambda: run(naive.fire),
        "ours": lambda: run(neurons_fas.integrate_and_fire),
    }
    peaks = {name: peak_bytes(function, args.device) for name, function in functions.items()}
    times = interleave(functions, args, warmup=0)
    case = f"Neuron {SHAPE}, forward and backward, over the plain loop"
    rows = [
        compared(f"{case}: time", 0.5, times, "ours", "loop"),
        {"measure": f"{case}: peak memory", "target": None, "got": peaks["ours"] / peaks["loop"]},
    ]
    report("neuron", rows, args, samples={"times": times, "peak_bytes": peaks})


if __name__ == "__main__":
    main()
