"""Layerwise forward against the stock model; T enters a closed form, so that any T costs the same."""

from functools import partial

import torch

from benchmarks.common import arguments, compared, fas, interleave, report, stock, token_ids


TITLES = {"gpt2": "GPT-2 small", "bert": "BERT-base"}
T = 8


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=2, batch=(8,))
    rows, samples = [], {}
    for kind, title in TITLES.items():
        plain, model = stock(kind, args), fas(kind, args, T=T, schedule="layerwise")
        for each in (plain, model):
            each(token_ids(1, 8, args))  # a warm-up
        for batch in args.batch:
            ids = token_ids(batch, 128, args)
            functions = {"stock": partial(plain, ids), "layerwise": partial(model, ids)}
            times = interleave(functions, args, warmup=0)
            measure = f"{title}, batch {batch}, T = {T}, layerwise over stock: time"
            rows.append(compared(measure, 1.10, times, "layerwise", "stock"))
            samples[f"{kind}, batch {batch}"] = times
    report("layerwise", rows, args, samples=samples)


if __name__ == "__main__":
    main()
