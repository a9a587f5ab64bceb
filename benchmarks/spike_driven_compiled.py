"""As `spike_driven_speed`, all models under `torch.compile`, decoding with a static cache; takes many minutes.

Decoding goes on without the guards that `torch.compile` checks at every call.

SMOLLM2=FOLDER python -m benchmarks.spike_driven_compiled
"""

from functools import partial
from typing import Any

import torch
from torch._inductor import config as inductor
from transformers import StaticCache

from benchmarks.common import arguments, compared, gathered, interleave, report
from benchmarks.decoding import PROMPT, Decoder, in_turn
from benchmarks.decoding_compiled import SETTINGS as INDUCTOR
from benchmarks.spike_driven_speed import NEW, SHAPES, TOGETHER, prepare, suffix


TARGETS: dict[str, float | None] = {"forward": 1.10, "decoding": 1.05, "unguarded": None}


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__.splitlines()[0], models=tuple(SHAPES))
    models, ids = prepare(args)
    batch = args.batch[0]
    forward: dict[Any, Any] = {}
    decoders: dict[Any, Decoder] = {}
    for name, model in models.items():
        forward[name] = partial(torch.compile(model, fullgraph=True), ids, use_cache=False)
        for kind in ("eager", "compiled"):
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + 2 * NEW)
            decoders[name, kind] = Decoder(model, ids[:, :PROMPT], cache)
        decoders[name, "compiled"].model = torch.compile(model, fullgraph=True)
    eager = {(name, "eager"): partial(model, ids, use_cache=False) for name, model in models.items()}
    with inductor.patch(INDUCTOR):
        times = {"forward": interleave(eager | {(name, "compiled"): each for name, each in forward.items()}, args, 2)}
        samples = in_turn(decoders, NEW, args.device)
        changed = {name: int((decoders[name, "eager"].ids != decoders[name, "compiled"].ids).sum()) for name in models}
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            unguarded = in_turn(decoders, NEW, args.device)
    times["decoding"] = gathered(samples, TOGETHER)
    times["unguarded"] = gathered(unguarded, TOGETHER)
    case = {
        "forward": f"forward, {ids.shape[1]} tokens: time",
        "decoding": "decoding, static cache: time of a token",
        "unguarded": "decoding, static cache, no guards: time of a token",
    }
    rows = [
        compared(
            f"{args.title}, batch {batch}, {name}, compiled, over stock {kind}, {case[part]}",
            TARGETS[part] if kind == "compiled" else None,
            times[part],
            (name, "compiled"),
            ("stock", kind),
        )
        for name in models
        if name != "stock"
        for part in TARGETS
        for kind in ("compiled", "eager")
    ]
    for name in models:
        measure = f"{args.title}, {name}, tokens of {batch * NEW} that compiling changed"
        rows.append({"measure": measure, "target": None, "got": changed[name]})
    named = {part: {" ".join(name): each for name, each in found.items()} for part, found in times.items()}
    compiling = {" ".join(name): sum(each[:TOGETHER]) for name, each in samples.items()}
    report(
        f"spike_driven_compiled{suffix(args)}",
        rows,
        args,
        settings=INDUCTOR,
        first_tokens_seconds=compiling,
        samples=named,
    )


if __name__ == "__main__":
    main()
