"""The products of one layer of GPT-2 small, four rows over one: where decoding at T = 4 spends its time.

One row is multiplied as the model does it. Four rows are also tried with the weight transposed in memory, and with
oneDNN: no layout that the libraries offer may be left out before a target is called out of reach.
"""

import statistics
from functools import partial

import torch

from benchmarks.common import arguments, compared, interleave, report


SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
ROWS, COPIES = 4, 16
LAYOUTS = {
    "as stored": lambda x, bias, weight, _: torch.addmm(bias, x, weight),
    "transposed": lambda x, bias, _, transposed: torch.addmm(bias, x, transposed.t()),
    "oneDNN": lambda x, bias, _, transposed: torch.ops.mkldnn._linear_pointwise(x, transposed, bias, "none", [], ""),
}


def run(product, x: torch.Tensor, bias: torch.Tensor, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for pair in weights:
        product(x, bias, *pair)


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=9)
    factory = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    layouts = {name: LAYOUTS[name] for name in (LAYOUTS if args.device == "cpu" else ("as stored", "transposed"))}
    rows, samples, one, best = [], {}, 0.0, 0.0
    for inner, outer in SHAPES:
        # So many weights that they come from memory, as in a model.
        weights = [torch.randn(inner, outer, **factory) for _ in range(COPIES)]
        weights = [(weight, weight.t().contiguous()) for weight in weights]
        bias = torch.randn(outer, **factory)
        functions = {"one row": partial(run, LAYOUTS["as stored"], torch.randn(1, inner, **factory), bias, weights)}
        for name, product in layouts.items():
            functions[name] = partial(run, product, torch.randn(ROWS, inner, **factory), bias, weights)
        times = samples[f"{inner} × {outer}"] = interleave(functions, args)
        for name in layouts:
            measure = f"Product with a {inner} × {outer} weight, {name}, {ROWS} rows over one: time"
            rows.append(compared(measure, None, times, name, "one row"))
        medians = {name: statistics.median(run["seconds"] for run in each["samples"]) for name, each in times.items()}
        one += medians.pop("one row")
        best += min(medians.values())
    measure = f"The four products of a layer, {ROWS} rows in the fastest layout of each over one row: time"
    report("products", [*rows, {"measure": measure, "target": None, "got": best / one}], args, samples=samples)


if __name__ == "__main__":
    main()
