"""The accumulated schedule over stepwise, one GPT-2 small in both: forward at 128 tokens, decoding, peak memory."""

import torch

from benchmarks.common import (
    arguments,
    compared,
    fas,
    gathered,
    interleave,
    peak_bytes,
    report,
    timed,
    token_ids,
    weight_bytes,
)
from benchmarks.decoding import PROMPT, Decoder


T = 4
SCHEDULES = ("stepwise", "accumulated")
NEW, TOGETHER = 64, 8  # tokens that are decoded, and those that make a round


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=5)
    model = fas("gpt2", args, T=T)
    rows, samples = [], {}
    for batch in args.batch:
        ids = token_ids(batch, PROMPT, args)
        functions = {
            name: lambda name=name, ids=ids: model.set_timesteps(T, name)(ids, use_cache=False) for name in SCHEDULES
        }
        peaks = {name: peak_bytes(function, args.device) for name, function in functions.items()}
        forward = interleave(functions, args)
        tokens: dict[str, list[float]] = {name: [] for name in SCHEDULES}
        decoders = {name: Decoder(model.set_timesteps(T, name), ids) for name in SCHEDULES}
        for _ in range(NEW):
            for name, decoder in decoders.items():
                model.set_timesteps(T, name)
                tokens[name].append(timed(decoder.cached, args.device)["seconds"])
        decoding = gathered(tokens, TOGETHER)
        case = f"GPT-2 small, batch {batch}, T = {T}, accumulated over stepwise"
        whole = {name: peak + weight_bytes(model) for name, peak in peaks.items()}
        memory = whole["accumulated"] / whole["stepwise"]
        rows += [
            compared(f"{case}, forward, {PROMPT} tokens: time", 1.2, forward, *reversed(SCHEDULES)),
            compared(f"{case}, decoding: time of a token", 1.2, decoding, *reversed(SCHEDULES)),
            {"measure": f"{case}: peak memory", "target": None, "got": peaks["accumulated"] / peaks["stepwise"]},
            {"measure": f"{case}: peak memory with the weights", "target": None, "got": memory},
        ]
        samples[f"batch {batch}"] = {"forward": forward, "decoding": decoding, "peak_bytes": peaks}
    report("accumulated", rows, args, samples=samples)


if __name__ == "__main__":
    main()
