"""Layerwise forward against the stock model; the number of timesteps makes no difference."""

import torch

from benchmarks.common import arguments, fas, interleave, ratio, report, stock, token_ids


TITLES = {"gpt2": "GPT-2 small", "bert": "BERT-base"}


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__)
    rows, times = [], {}
    for kind, title in TITLES.items():
        ids = token_ids(8, 128, args)
        plain, model = stock(kind, args), fas(kind, args, schedule="layerwise")
        functions = {
            "stock": lambda: plain(ids),
            "T4": lambda: model.set_timesteps(4)(ids),
            "T16": lambda: model.set_timesteps(16)(ids),
        }
        times[kind] = interleave(functions, args)
        rows += [
            {
                "measure": f"{title}, batch 8, T = {T}, layerwise over stock: time",
                "target": 1.10,
                "got": ratio(times[kind], f"T{T}", "stock"),
            }
            for T in (4, 16)
        ]
    report("layerwise", rows, args, samples=times)


if __name__ == "__main__":
    main()
