"""Stepwise GPT-2 small against the naive algorithm: time and peak memory."""

from functools import partial

import torch

from benchmarks.common import arguments, compared, fas, interleave, peak_bytes, report, stock, token_ids, weight_bytes
from tests import naive


TIME_TARGET = {4: 0.70, 8: 0.65}


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=2)
    model = fas("gpt2", args, schedule="stepwise")
    plain = stock("gpt2", args)
    model.config.use_cache = plain.config.use_cache = False
    weights, rounds = weight_bytes(model), args.rounds
    plain(token_ids(1, 8, args))  # a warm-up; the others have theirs when their peak is measured
    for batch in args.batch:
        args.rounds = 2 * rounds if batch == 1 else rounds  # short calls are noisy
        ids = token_ids(batch, 128, args)
        rows, samples = [], {}
        for T in TIME_TARGET:
            copies = naive.network(model, T)
            model.set_timesteps(T)
            functions = {
                "naive": partial(naive.logits, copies, T, {"input_ids": ids}),
                "stepwise": partial(model, ids),
                "stock": partial(plain, ids),
            }
            peaks = {name: peak_bytes(functions[name], args.device) for name in ("naive", "stepwise")}
            times = interleave(functions, args, warmup=0)
            case = f"GPT-2 small, batch {batch}, T = {T}, stepwise over"
            whole = (peaks["stepwise"] + weights) / (peaks["naive"] + weights)
            rows += [
                compared(f"{case} naive: time", TIME_TARGET[T], times, "stepwise", "naive"),
                {"measure": f"{case} naive: peak memory", "target": 0.8, "got": peaks["stepwise"] / peaks["naive"]},
                {"measure": f"{case} naive: peak memory with the weights", "target": None, "got": whole},
                compared(f"{case} stock: time", None, times, "stepwise", "stock"),
            ]
            samples[T] = {"times": times, "peak_bytes": peaks}
        report(f"stepwise_batch{batch}", rows, args, samples=samples)


if __name__ == "__main__":
    main()
