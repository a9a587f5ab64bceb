"""The products of one layer of GPT-2 small, four rows over one: where decoding at T = 4 spends its time."""

from functools import partial

import torch

from benchmarks.common import arguments, interleave, ratio, report


SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
ROWS, COPIES = 4, 16


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=9)
    factory = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    def run(x: torch.Tensor, bias: torch.Tensor, weights: list[torch.Tensor]) -> None:
        for weight in weights:
            torch.addmm(bias, x, weight)

    rows, samples = [], {}
    for inner, outer in SHAPES:
        # So many weights that they come from memory, as in a model.
        weights = [torch.randn(inner, outer, **factory) for _ in range(COPIES)]
        bias = torch.randn(outer, **factory)
        functions = {n: partial(run, torch.randn(n, inner, **factory), bias, weights) for n in (1, ROWS)}
        times = interleave(functions, args)
        measure = f"Product with a {inner} × {outer} weight, {ROWS} rows over one: time"
        rows.append({"measure": measure, "target": None, "got": ratio(times, ROWS, 1)})
        samples[f"{inner} × {outer}"] = times
    report("products", rows, args, samples=samples)


if __name__ == "__main__":
    main()
