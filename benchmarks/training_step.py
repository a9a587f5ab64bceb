"""QCFS forward and backward against GELU, without the optimiser's part, which is the same in both."""

from functools import partial

import torch

from benchmarks.common import arguments, compared, fas, interleave, peak_bytes, report, stock, token_ids
from benchmarks.layerwise import TITLES


def step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    args = arguments(__doc__, batch=(2,))
    rows, samples = [], {}
    for kind, title in TITLES.items():
        models = {"gelu": stock(kind, args), "qcfs": fas(kind, args, T=0)}
        for batch in args.batch:
            ids = token_ids(batch, 128, args)
            functions = {name: partial(step, model.train(), ids) for name, model in models.items()}
            peaks = {name: peak_bytes(function, args.device) for name, function in functions.items()}
            times = interleave(functions, args, warmup=0)
            case = f"{title}, batch {batch}, training step, QCFS over GELU"
            rows += [
                compared(f"{case}: time", 1.10, times, "qcfs", "gelu"),
                {"measure": f"{case}: peak memory", "target": 1.05, "got": peaks["qcfs"] / peaks["gelu"]},
            ]
            samples[f"{kind}, batch {batch}"] = {"times": times, "peak_bytes": peaks}
    report("training_step", rows, args, samples=samples)


if __name__ == "__main__":
    main()
