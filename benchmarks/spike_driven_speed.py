"""A fully spike-driven model, layerwise, against the stock one: forward at 256 tokens, and decoding.

    SMOLLM2=FOLDER python -m benchmarks.spike_driven_speed [--model smollm2|gpt2|qwen2-1.5b] [--training]

FOLDER is what `benchmarks/smollm2.py` makes; without it, and of the other models, weights and tokens are random, and
spikes not those of a real model. Thresholds are fitted to 128 tokens, other ones than those that are timed. All models
share one copy of the weights.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from benchmarks.common import arguments, compared, gathered, interleave, report
from benchmarks.decoding import PROMPT, Decoder, in_turn
from benchmarks.spike_driven import MODELS, SHARED, windows
from benchmarks.training_step import step
from fas import convert_to_spiking
from modeling_fas import FASMixin


SETTINGS: dict[str, dict[str, Any]] = {
    "phase, T = 5": {"code": "phase", "T": 5},
    "first spike, T = 16": {"code": "first_spike", "T": 16, "code_base": 1.2},
}
TARGETS = {"forward": 1.25, "decoding": 1.25}
FOLDER, TEXT, _, LENGTH = MODELS["smollm2"]
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "smollm2": ("SmolLM2-135M", LlamaForCausalLM, LlamaConfig, SMOLLM2),
    "gpt2": ("GPT-2 small", GPT2LMHeadModel, GPT2Config, {}),
    "qwen2-1.5b": ("Qwen2 of 1.5B", Qwen2ForCausalLM, Qwen2Config, QWEN2),
}
CALIBRATION = 128  # tokens
NEW, TOGETHER = 64, 8  # tokens that are decoded, and those that make a round


def prepare(args: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The stock model and its spiking forms by name, and the tokens to time them on; says in `args` whose weights."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    batch, name = args.batch[0], args.model
    args.title, model_class, config_class, shape = SHAPES[name]
    args.weights = "pretrained" if name == "smollm2" and (Path(FOLDER) / "config.json").is_file() else "random"
    if args.weights == "pretrained":
        rows = windows(AutoTokenizer.from_pretrained(FOLDER), SHARED / TEXT, LENGTH, batch + 1, 44)
        stock = model_class.from_pretrained(FOLDER, dtype=torch.float32).eval()
    else:
        torch.manual_seed(0)
        stock = model_class(config_class(**shape)).eval()
        rows = torch.randint(0, stock.config.vocab_size, (batch + 1, LENGTH))
    stock.to(args.device, getattr(torch, args.dtype))
    rows, models = rows.to(args.device), {"stock": stock}
    for code, settings in SETTINGS.items():
        twin = copy.deepcopy(stock, {id(each): each for each in stock.parameters()})
        models[code] = convert_to_spiking(twin, rows[-1:, :CALIBRATION], sites="all", progress=False, **settings)
    return models, rows[:batch]


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


def training(args: Any, models: dict[str, Any], ids: torch.Tensor) -> None:
    """Forward and backward with labels, without the optimiser's part."""
    times = interleave({name: partial(step, model.train(), ids) for name, model in models.items()}, args)
    measure = f"{args.title}, batch {len(ids)}, {{}}, over stock, training step, {ids.shape[1]} tokens: time"
    rows = [compared(measure.format(name), None, times, name, "stock") for name in SETTINGS]
    report(f"spike_driven_training{suffix(args)}", rows, args, samples=times)


@torch.inference_mode()
def inference(args: Any, models: dict[str, Any], ids: torch.Tensor) -> None:
    """Forward and decoding."""
    times = {"forward": interleave({name: partial(each, ids, use_cache=False) for name, each in models.items()}, args)}
    decoders = {name: Decoder(model, ids[:, :PROMPT]) for name, model in models.items()}
    times["decoding"] = gathered(in_turn(decoders, NEW, args.device), TOGETHER)
    case = {"forward": f"forward, {ids.shape[1]} tokens: time", "decoding": "decoding: time of a token"}
    rows = [
        compared(
            f"{args.title}, batch {len(ids)}, {name}, over stock, {case[part]}",
            TARGETS[part],
            times[part],
            name,
            "stock",
        )
        for name in SETTINGS
        for part in TARGETS
    ]
    for name in SETTINGS:
        measure = f"{args.title}, {name}: share of the neurons that answer with another value than 0"
        rows.append({"measure": measure, "target": None, "got": answering(models[name], ids)})
    profiles = {name: operations(model, ids) for name, model in models.items()} if args.device == "cpu" else {}
    report(f"spike_driven{suffix(args)}", rows, args, samples=times, operations_ms=profiles)


def suffix(args: Any) -> str:
    return "" if args.model == "smollm2" else f"_{args.model}"


def main() -> None:
    args = arguments(__doc__.splitlines()[0], models=tuple(SHAPES), training=True)
    models, ids = prepare(args)
    (training if args.training else inference)(args, models, ids)


if __name__ == "__main__":
    main()
