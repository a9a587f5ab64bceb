"""10,000 calls and generations of tiny models, every backbone, schedule and code in turn: does memory stay flat?"""

import argparse
import ctypes
import gc
import itertools
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import modeling_fas  # noqa: F401  registers the classes
from configuration_fas import BACKBONES, FASConfig
from training.results import write_results


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
MORE = {
    "gpt2": {},
    "distilbert": {"hidden_dim": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {"intermediate_size": 48},
    "roberta": {"intermediate_size": 48},
}
ROTARY = {"intermediate_size": 48, "num_key_value_heads": 2}
EVERYWHERE = {"sites": "all", "activation": "stock", "L": None, "schedule": "layerwise"}
MODES = {
    "qcfs": {"T": 0},
    "stepwise": {"T": 4, "schedule": "stepwise"},
    "accumulated": {"T": 4, "schedule": "accumulated"},
    "layerwise": {"T": 4, "schedule": "layerwise"},
    "calibrated": {"T": 4, "schedule": "stepwise", "calib_T": 4},
    "phase": {"T": 4, "code": "phase", **EVERYWHERE},
    "first spike": {"T": 4, "code": "first_spike", "gain": "token", **EVERYWHERE},
}


def resident_bytes() -> int:
    """Memory of this process, what its allocator keeps for later given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def models() -> dict[tuple[str, str], torch.nn.Module]:
    made = {}
    for backbone, (mode, settings) in itertools.product(BACKBONES, MODES.items()):
        auto = AutoModelForCausalLM if BACKBONES[backbone].causal else AutoModelForMaskedLM
        config = FASConfig(backbone=backbone, **SIZES, **MORE.get(backbone, ROTARY), **settings)
        made[backbone, mode] = auto.from_config(config).eval()
    return made


def call(model: torch.nn.Module, turn: int, counts: Counter) -> None:
    """A forward pass; every fifth time tokens with a cache, every seventh another T, every ninth gradients."""
    ids = torch.randint(2, 61, (1 + turn % 3, 4 + turn % 9))
    if turn % 5 == 0 and model.can_generate():
        counts["generations"] += 1
        beams = 1 + turn % 2
        model.generate(
            ids, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0, attention_mask=ids * 0 + 1
        )
    elif turn % 7 == 0:
        counts["calls at another T"] += 1
        with torch.no_grad(), model.running(1 + turn % 4):
            model(ids)
    elif turn % 9 == 0:
        counts["calls with gradients"] += 1
        model(ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
    else:
        counts["calls"] += 1
        with torch.no_grad():
            model(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made, counts, rows = models(), Counter(), []
    warmup = 3 * len(made)  # first calls of every kind fill caches that stay
    marks = {0: "start", args.calls // 2: "middle", args.calls: "end"}
    start = time.monotonic()
    for turn, model in zip(range(-warmup, args.calls + 1), itertools.cycle(made.values())):
        if turn in marks:
            rows.append({"at": marks[turn], "calls": turn, "rss_bytes": resident_bytes(), "tensors": tensors()})
            print(rows[-1])
        if turn == 0:
            counts.clear()
        if turn < args.calls:
            call(model, turn, counts)
    ratio = rows[-1]["rss_bytes"] / rows[0]["rss_bytes"]
    print(f"{dict(counts)}, {time.monotonic() - start:.0f} s, memory at the end over that at the start: {ratio:.4f}")
    write_results(
        args.output,
        metrics={
            "rows": rows,
            "rss_end_over_start": ratio,
            "new_tensors": rows[-1]["tensors"] - rows[0]["tensors"],
            "counts": counts,
        },
        configuration={"calls": args.calls, "backbones": list(BACKBONES), "modes": MODES, "sizes": SIZES},
    )


if __name__ == "__main__":
    main()
