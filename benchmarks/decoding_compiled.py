"""Greedy decoding as in `decoding`, with a static cache and `torch.compile`; compiling takes minutes."""

import statistics

import torch
from torch._inductor import config as inductor
from transformers import StaticCache

from benchmarks.common import arguments, fas, report, stock, token_ids
from benchmarks.decoding import NEW, PROMPT, Decoder, T, in_turn


# Freezing packs the weights for a product of so many rows, and the tuner then prefers a kernel generated for them.
# As a context, not as `options` of torch.compile: Dynamo asks for freezing before it has read those.
SETTINGS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
WARM_UP = 4  # tokens: a first graph, then one for every position


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, rounds=1)
    batch = args.batch[0]
    ids = token_ids(batch, PROMPT, args)
    models = {
        "stock": stock("gpt2", args),
        "stepwise": fas("gpt2", args, T=T, schedule="stepwise"),
        "layerwise": fas("gpt2", args, T=T, schedule="layerwise"),
    }
    decoders = {}
    for name, model in models.items():
        for kind in ("eager", "compiled"):
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
            decoders[name, kind] = Decoder(model, ids, cache)
        decoders[name, "compiled"].model = torch.compile(model, fullgraph=True)
    with inductor.patch(SETTINGS):
        samples = in_turn(decoders, NEW, args.device)
    median = {name: statistics.median(times[WARM_UP:]) for name, times in samples.items()}
    what = f"GPT-2 small, batch {batch}, decoding, T = {T}, static cache, per token"
    rows = [
        {
            "measure": f"{what}: {name} compiled over stock {kind}",
            "target": target if kind == "compiled" else None,
            "got": median[name, "compiled"] / median["stock", kind],
        }
        for name, target in (("stepwise", 1.6), ("layerwise", 1.10))
        for kind in ("compiled", "eager")
    ]
    for name in models:
        changed = int((decoders[name, "eager"].ids != decoders[name, "compiled"].ids).sum())
        tokens = f"{name}, tokens of {batch * NEW} (random weights) that compiling changed"
        rows.append({"measure": tokens, "target": 0, "got": changed})
    report(
        "decoding_compiled",
        rows,
        args,
        settings=SETTINGS,
        median_seconds={" ".join(name): seconds for name, seconds in median.items()},
        compile_seconds={" ".join(name): sum(times[:WARM_UP]) for name, times in samples.items()},
        samples={" ".join(name): times for name, times in samples.items()},
    )


if __name__ == "__main__":
    main()
