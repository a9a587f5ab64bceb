"""Greedy decoding of 128 tokens after 128 with the stock cache, one token of every model in turn.

Thresholds are set such that as many neurons of a site fire as in a trained model, 2 to 10 %, at a timestep or over all
that a value stands for. A share of None leaves random weights as they are.
"""

import statistics
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

import events_fas
from benchmarks.common import arguments, compared, fas, gathered, report, stock, timed, token_ids


PROMPT, NEW, T = 128, 128, 4
TOGETHER = 16  # tokens of a round
SHARES = {"stepwise": (0.05, None), "layerwise": (0.02, 0.05, 0.1, None)}
PARTS = {
    "aten::addmm": "the layers' products",
    "aten::embedding_bag": "event-driven products",
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


def in_turn(decoders: Mapping[Any, Decoder], tokens: int, device: str) -> dict[Any, list[float]]:
    """Seconds of so many tokens of each, one of every decoder after another."""
    seconds: dict[Any, list[float]] = {name: [] for name in decoders}
    for _ in range(tokens):
        for name, decoder in decoders.items():
            seconds[name].append(timed(decoder.cached, device)["seconds"])
    return seconds


@contextmanager
def hooked(model: torch.nn.Module, hook):
    handles = [neuron.register_forward_hook(hook) for _, neuron in model.neurons()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def let_fire(model: torch.nn.Module, ids: torch.Tensor, share: float) -> None:
    """Set the threshold of every site, in the order they run in, such that this share of what it emits is not 0."""

    def search(neuron, args, emitted):
        least, most = 1e-3, 1e3
        for _ in range(40):
            neuron.threshold.fill_((least * most) ** 0.5)
            emitted = neuron.forward(*args)
            if emitted.count_nonzero() > share * emitted.numel():
                least = neuron.threshold.item()
            else:
                most = neuron.threshold.item()
        return emitted

    with hooked(model, search):
        model(ids)


def share_that_fires(decoder: "Decoder") -> float:
    shares: list[float] = []
    with hooked(decoder.model, lambda neuron, args, emitted: shares.append((emitted != 0).double().mean().item())):
        decoder.cached()
    return statistics.mean(shares)


@contextmanager
def dense():
    """No event-driven products."""
    least, events_fas.LEAST_WEIGHTS = events_fas.LEAST_WEIGHTS, 1 << 62
    try:
        yield
    finally:
        events_fas.LEAST_WEIGHTS = least


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
    decoders = {("stock", None): Decoder(stock("gpt2", args), ids)}
    for schedule, shares in SHARES.items():
        for share in shares:
            model = fas("gpt2", args, T=T, schedule=schedule)
            if share is not None:
                let_fire(model, ids, share)
            decoders[schedule, share] = Decoder(model, ids)
    samples: dict[tuple, list] = {name: [] for name in (*decoders, ("no cache", None))}
    for token in range(NEW):
        for name, decoder in decoders.items():
            samples[name].append(timed(decoder.cached, args.device)["seconds"])
        if token % TOGETHER == TOGETHER - 1:
            samples["no cache", None].append(timed(decoders["stepwise", None].uncached, args.device)["seconds"])
    median = {name: statistics.median(times[1:]) for name, times in samples.items()}
    rounds = gathered({name: times for name, times in samples.items() if len(times) == NEW}, TOGETHER)
    case = f"GPT-2 small, batch {batch}, decoding, T = {T}"
    rows = []
    for schedule, shares in SHARES.items():
        for share in shares:
            fire = f"{case}, {schedule}, " + ("random weights" if share is None else f"{share:.0%} of neurons fire")
            target = 1.6 if schedule == "stepwise" else 1.1 if share is None else 0.85
            fired = share_that_fires(decoders[schedule, share])
            rows += [
                compared(f"{fire}: a token over stock", target, rounds, (schedule, share), ("stock", None)),
                {"measure": f"{fire}: share that fires", "target": None, "got": fired},
            ]
    over = median["stepwise", None] / median["no cache", None]
    rows.append({"measure": f"{case}, stepwise: a token over the same without a cache", "target": 0.1, "got": over})
    if args.device == "cpu":
        for schedule in SHARES:
            decoder = decoders[schedule, 0.05]
            with dense():
                before = profile(decoder)
            for products, shares in (("dense", before), ("event-driven", profile(decoder))):
                whose = f"{case}, {schedule}, {products} products, share of a token's time"
                rows += [{"measure": f"{whose}: {part}", "target": None, "got": got} for part, got in shares.items()]
    named = {f"{schedule}, {share}": value for (schedule, share), value in samples.items()}
    medians = {f"{schedule}, {share}": value for (schedule, share), value in median.items()}
    report("decoding", rows, args, median_seconds=medians, samples=named)


if __name__ == "__main__":
    main()
