"""Stepwise GPT-2 small against the naive algorithm: time and peak memory."""

import torch

from benchmarks.common import arguments, fas, interleave, peak_bytes, ratio, report, stock, token_ids, weight_bytes
from benchmarks.naive import NaiveModel


TIME_TARGET = {4: 0.70, 8: 0.65}


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__)
    model = fas("gpt2", args, schedule="stepwise")
    plain = stock("gpt2", args)
    rows, times = [], {}
    for batch in (1, 4) if args.device == "cpu" else (8, 32):
        ids = token_ids(batch, 128, args)
        for T in (4, 8):
            naive = NaiveModel(model, T)
            model.set_timesteps(T)
            functions = {
                "naive": lambda: naive(ids, use_cache=False),
                "stepwise": lambda: model(ids, use_cache=False).logits,
                "stock": lambda: plain(ids, use_cache=False).logits,
            }
            peaks = {name: peak_bytes(function, args.device) for name, function in functions.items()}
            measured = interleave(functions, args, warmup=0)
            weights = weight_bytes(model)
            case = f"GPT-2 small, batch {batch}, T = {T}, stepwise over naive"
            times[f"batch {batch}, T = {T}"] = {
                "times": measured,
                "peak_bytes": peaks,
                "stepwise_over_stock": ratio(measured, "stepwise", "stock"),
                "peak_ratio_weights_included": (peaks["stepwise"] + weights) / (peaks["naive"] + weights),
            }
            rows += [
                {"measure": f"{case}: time", "target": TIME_TARGET[T], "got": ratio(measured, "stepwise", "naive")},
                {"measure": f"{case}: peak memory", "target": 0.8, "got": peaks["stepwise"] / peaks["naive"]},
            ]
    report("stepwise", rows, args, samples=times)


if __name__ == "__main__":
    main()
