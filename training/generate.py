"""Continue a prompt with a spiking language model.

fas generate CHECKPOINT "The sea" --T 4 --schedule layerwise --max_new_tokens 40
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import set_seed

import modeling_fas
from configuration_fas import SCHEDULES, FASConfig, positions_of

from .arguments import check_number, require_model_type
from .commands import command_parser, run_command, show_messages
from .evaluate.command import load_tokenizer, load_whole


logger = logging.getLogger("training.generate")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    example = 'fas generate outputs/gpt2-spiking "The sea" --T 4 --max_new_tokens 40'
    parser = command_parser("fas generate", (__doc__ or "").split("\n")[0], example)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="FAS causal language model: a folder, or a name on the Hub")
    add("prompt", metavar="PROMPT", help="text to continue; for a model with a chat template, a message to it")
    add("--T", type=int, help="timesteps; 0 is the model without spikes (default: that of the checkpoint)")
    add("--schedule", choices=SCHEDULES, help="default: that of the checkpoint")
    add("--max_new_tokens", metavar="N", type=int, default=40, help="default: 40")
    add("--temperature", type=float, default=0.0, help="of sampling; 0, the default, takes the likeliest token")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--plain", action="store_true", help="continue the prompt as it stands, without a chat template")
    add("--device", default="cpu", help="default: cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> str:
    """Print the continuation, and how it came about; returns it.

    Raises:
        ValueError: for a checkpoint that is not FAS, cannot continue text or lacks weights, or settings out of range.
    """
    args = make_parser().parse_args(argv)
    check_number("--max_new_tokens", args.max_new_tokens, 1)
    check_number("--temperature", args.temperature, 0)
    model = load_model(args.checkpoint).to(args.device)
    tokenizer = load_tokenizer(args.checkpoint)
    ids = prompt_ids(tokenizer, args.prompt, plain=args.plain)
    positions = positions_of(model.config)
    if not 1 <= len(ids) <= positions - args.max_new_tokens:
        raise ValueError(
            f"`PROMPT` must hold a token, and fit with --max_new_tokens into the {positions} positions of the model, "
            f"got {len(ids)} and {args.max_new_tokens}."
        )
    if args.T is not None or args.schedule:
        model.set_timesteps(model.config.T if args.T is None else args.T, args.schedule or model.config.schedule)
    set_seed(args.seed)
    start = time.perf_counter()
    found = generate(model, ids, args.max_new_tokens, args.temperature)
    speed = len(found) / (time.perf_counter() - start)
    text = tokenizer.decode(found, skip_special_tokens=True)
    sys.stdout.write(text.strip("\n") + "\n")
    config = model.config
    how = (
        f"T = {config.T}, {config.code} code, {config.schedule}" if config.T else "T = 0: nothing spikes (--T 4 does)"
    )
    logger.info("(%s; %d tokens, %.1f a second)", how, len(found), speed)
    return text


def load_model(source: str) -> Any:
    """Load a checkpoint that continues text, in float32.

    Raises:
        ValueError: for one that is not FAS, has another head, or lacks weights, with the way out.
    """
    try:
        config, _ = FASConfig.get_config_dict(source)
        require_model_type(config)
        table = FASConfig(**config).table
    except (OSError, ValueError) as error:
        raise ValueError(f"`CHECKPOINT` must be a FAS checkpoint, got {source!r}: {error}") from error
    if not str(config["model_type"]).startswith("fas_"):
        raise ValueError(
            f"`CHECKPOINT` must be a FAS checkpoint, got {source!r} of type {config['model_type']!r}. Make it spike: "
            f"fas convert {source} --sites all --code phase --calibration_file FILE --output_dir spiking"
        )
    wanted, architecture = table.models.get("AutoModelForCausalLM"), (config.get("architectures") or [None])[0]
    if wanted is None or architecture != wanted:
        kind = "an encoder, which reads in both directions" if wanted is None else "no language model"
        raise ValueError(
            f"`CHECKPOINT` must be a causal language model, got {source!r} of {architecture}, {kind}. `fas evaluate` "
            "measures it; a pipeline of transformers answers with it (docs/use.md)."
        )
    return load_whole(getattr(modeling_fas, wanted), source, "CHECKPOINT").eval()


def prompt_ids(tokenizer: Any, prompt: str, plain: bool = False) -> list[int]:
    """Ids of the prompt, as a message of the chat template, where there is one, or as it stands."""
    if plain or tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def generate(model: Any, ids: list[int], count: int, temperature: float = 0.0) -> list[int]:
    """The ids that follow, at most `count`: the likeliest ones, or sampled at a temperature."""
    settings = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    given = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(given)
    return model.generate(given, attention_mask=mask, max_new_tokens=count, **settings)[0, len(ids) :].tolist()


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Nothing generated"))
