"""Greedy decoding of 128 tokens after 128 with the stock cache, one token of every model in turn."""

import statistics

import torch
from transformers import Cache

from benchmarks.common import arguments, fas, report, stock, timed, token_ids


PROMPT, NEW, T = 128, 128, 4
PARTS = {
    "aten::addmm": "the layers' products",
    "aten::mm": "the head",
    "aten::cat": "growing the cache",
    "aten::scaled_dot_product_attention": "attention",
    "_IntegrateAndFire": "neurons",
}


class Decoder:
    """A model, its cache (by default one that grows) and the tokens so far."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, cache: Cache | None = None):
        self.model, self.ids = model, ids
        self.cache = model(ids, past_key_values=cache, use_cache=True).past_key_values

    def cached(self) -> None:
        logits = self.model(self.ids[:, -1:], past_key_values=self.cache, use_cache=True).logits
        self.ids = torch.cat([self.ids, logits[:, -1:].argmax(-1)], dim=1)

    def uncached(self) -> None:
        self.model(self.ids, use_cache=False, logits_to_keep=1)


def profile(decoder: Decoder, tokens: int = 8) -> dict[str, float]:
    """Shares of a token's CPU time; what is in no part is Python and small operations."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, torch.profiler.record_function("tokens"):
        for _ in range(tokens):
            decoder.cached()
    events = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    return {PARTS[event.key]: event.cpu_time_total / whole for event in events if event.key in PARTS}


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=1)
    batch = args.batch[0]
    ids = token_ids(batch, PROMPT, args)
    models = {
        "stock": stock("gpt2", args),
        "stepwise": fas("gpt2", args, T=T, schedule="stepwise"),
        "layerwise": fas("gpt2", args, T=T, schedule="layerwise"),
    }
    decoders = {name: Decoder(model, ids) for name, model in models.items()}
    samples: dict[str, list] = {name: [] for name in (*decoders, "stepwise, no cache")}
    for token in range(NEW):
        for name, decoder in decoders.items():
            samples[name].append(timed(decoder.cached, args.device)["seconds"])
        if token % 16 == 15:
            samples["stepwise, no cache"].append(timed(decoders["stepwise"].uncached, args.device)["seconds"])
    median = {name: statistics.median(times[1:]) for name, times in samples.items()}
    pairs = (("stepwise", "stock", 1.6), ("stepwise", "stepwise, no cache", 0.1), ("layerwise", "stock", 1.10))
    rows = [
        {
            "measure": f"GPT-2 small, batch {batch}, decoding, T = {T}, per token: {name} over {base}",
            "target": target,
            "got": median[name] / median[base],
        }
        for name, base, target in pairs
    ]
    if args.device == "cpu":
        whose = f"GPT-2 small, batch {batch}, decoding, T = {T}, stepwise, share of a token's time"
        shares = profile(decoders["stepwise"])
        rows += [{"measure": f"{whose}: {part}", "target": None, "got": got} for part, got in shares.items()]
    report("decoding", rows, args, median_seconds=median, samples=samples)


if __name__ == "__main__":
    main()
