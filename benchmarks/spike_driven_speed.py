"""SmolLM2-135M, fully spike-driven, layerwise, against the stock model: forward at 256 tokens, and decoding.

    SMOLLM2=FOLDER python -m benchmarks.spike_driven_speed

FOLDER is what `benchmarks/smollm2.py` makes; without it weights and tokens are random, and spikes not those of a real
model. Thresholds are fitted to 128 tokens, other ones than those that are timed.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.common import arguments, compared, gathered, interleave, report
from benchmarks.decoding import PROMPT, Decoder, in_turn
from benchmarks.spike_driven import MODELS, SHARED, windows
from fas import convert_to_spiking
from modeling_fas import FASMixin


SETTINGS: dict[str, dict[str, Any]] = {
    "phase, T = 5": {"code": "phase", "T": 5},
    "first spike, T = 16": {"code": "first_spike", "T": 16, "code_base": 1.2},
}
TARGETS = {"forward": 1.25, "decoding": 1.25}
FOLDER, TEXT, _, LENGTH = MODELS["smollm2"]
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CALIBRATION = 128  # tokens
NEW, TOGETHER = 64, 8  # tokens that are decoded, and those that make a round


def prepare(args: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The stock model and its spiking forms by name, and the tokens to time them on; says in `args` whose weights."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.weights = "pretrained" if (Path(FOLDER) / "config.json").is_file() else "random"
    batch = args.batch[0]
    if args.weights == "pretrained":
        rows = windows(AutoTokenizer.from_pretrained(FOLDER), SHARED / TEXT, LENGTH, batch + 1, 44)
    else:
        rows = torch.randint(0, SHAPE["vocab_size"], (batch + 1, LENGTH))
    models = {"stock": _stock(args.weights)}
    for name, settings in SETTINGS.items():
        model = _stock(args.weights)
        models[name] = convert_to_spiking(model, rows[-1:, :CALIBRATION], sites="all", progress=False, **settings)
    for model in models.values():
        model.to(args.device, getattr(torch, args.dtype))
    return models, rows[:batch].to(args.device)


def _stock(weights: str) -> Any:
    if weights == "pretrained":
        return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def answering(model: FASMixin, ids: torch.Tensor) -> float:
    """Share of the neurons that answer with another value than 0."""
    nonzero, count = 0, 0

    def look(module: Any, inputs: Any, emitted: torch.Tensor) -> None:
        nonlocal nonzero, count
        nonzero, count = nonzero + int(emitted.count_nonzero()), count + emitted.numel()

    handles = [neuron.register_forward_hook(look) for _, neuron in model.neurons()]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return nonzero / count


def operations(model: Any, ids: torch.Tensor, most: int = 12) -> dict[str, float]:
    """Milliseconds of CPU time of a forward by operation, what they call left out; the costliest ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(ids, use_cache=False)
    found = {event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()}
    return dict(sorted(found.items(), key=lambda each: -each[1])[:most])


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    models, ids = prepare(args)
    batch = args.batch[0]
    times = {"forward": interleave({name: partial(each, ids, use_cache=False) for name, each in models.items()}, args)}
    decoders = {name: Decoder(model, ids[:, :PROMPT]) for name, model in models.items()}
    times["decoding"] = gathered(in_turn(decoders, NEW, args.device), TOGETHER)
    case = {"forward": f"forward, {ids.shape[1]} tokens: time", "decoding": "decoding: time of a token"}
    rows = [
        compared(
            f"SmolLM2-135M, batch {batch}, {name}, over stock, {case[part]}", TARGETS[part], times[part], name, "stock"
        )
        for name in SETTINGS
        for part in TARGETS
    ]
    for name in SETTINGS:
        measure = f"SmolLM2-135M, {name}: share of the neurons that answer with another value than 0"
        rows.append({"measure": measure, "target": None, "got": answering(models[name], ids)})
    profiles = {name: operations(model, ids) for name, model in models.items()} if args.device == "cpu" else {}
    report("spike_driven", rows, args, samples=times, operations_ms=profiles)


if __name__ == "__main__":
    main()
