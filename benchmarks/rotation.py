"""Rotating the residual stream before conversion: does it let SmolLM2 spike better, and at what energy?

    SMOLLM2=FOLDER python -m benchmarks.rotation [--T 5]

The rotation is exact and of weights only: norms that do not centre commute with it once their gains are in the weights
that follow (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). Judged as `benchmarks.spike_driven` judges.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from fas import convert_to_spiking
from training.results import markdown_table, origin, read_results, write_results

from .spike_driven import LENGTH, MODELS, SHARED, perplexity, rows_of, spiking_cost, windows


OUTPUT = Path(__file__).parent / "results" / "rotation.json"
MODEL, TEXT, _, _ = MODELS["smollm2"]
WINDOWS, CALIBRATION = 24, (3, 44)
ROTATIONS = ("none", "orthogonal", "hadamard", "hadamard, heads too")
ORIGIN = origin()


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix of entries of one size, `(size, size)`, for 2^a · 12^b: Sylvester's and Paley's of 12."""
    matrix, rest = torch.ones(1, 1, dtype=torch.float64), size
    while rest % 3 == 0:
        matrix, rest = torch.kron(matrix, _paley12()), rest // 12
    while rest > 1:
        matrix, rest = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)), rest // 2
    if len(matrix) != size:
        raise ValueError(f"`size` must be a product of twos and twelves, got {size}.")
    return matrix / size**0.5


def _paley12() -> torch.Tensor:
    squares = {i * i % 11 for i in range(1, 11)}
    sign = [[0 if i == j else (1 if (i - j) % 11 in squares else -1) for j in range(11)] for i in range(11)]
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, -1, torch.tensor(sign, dtype=torch.float64)
    return matrix + torch.eye(12, dtype=torch.float64)


def orthogonal(size: int) -> torch.Tensor:
    random = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random)[0]


@torch.no_grad()
def rotate(model: LlamaForCausalLM, stream: torch.Tensor, head: torch.Tensor | None) -> LlamaForCausalLM:
    """Rotate the residual stream, and the values of every head, in place; the function stays the same."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())

    def reads(norm: Any, *layers: Any) -> None:
        for layer in layers:
            layer.weight.copy_((layer.weight.double() * norm.weight.double()) @ stream)
        norm.weight.fill_(1.0)

    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.double() @ stream)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        reads(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        reads(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        for layer in (attention.o_proj, mlp.down_proj):
            layer.weight.copy_(stream.T @ layer.weight.double())
        if head is not None:
            values, size = attention.v_proj.weight, len(head)
            values.copy_((head.T @ values.double().unflatten(0, (-1, size))).flatten(0, 1))
            output = attention.o_proj.weight
            output.copy_((output.double().unflatten(1, (-1, size)) @ head).flatten(1))
    reads(model.model.norm, model.lm_head)
    return model


def judge(kind: str, T: int, rows: torch.Tensor, calibration: torch.Tensor) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    with torch.inference_mode():
        before = model(rows[:1]).logits
    if kind != "none":
        config = model.config
        make = orthogonal if kind == "orthogonal" else hadamard
        rotate(model, make(config.hidden_size), hadamard(config.head_dim) if "heads" in kind else None)
    with torch.inference_mode():
        off = (model(rows[:1]).logits - before).abs().max().item()
    spiking = convert_to_spiking(model, calibration, sites="all", code="phase", T=T, progress=False)
    return {
        "largest_logit_difference": off,
        "largest_logit": before.abs().max().item(),
        "perplexity": perplexity(spiking, rows),
        **spiking_cost(spiking, rows_of(rows[:8]))[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", type=int, default=5)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = windows(tokenizer, SHARED / TEXT, LENGTH, WINDOWS)
    calibration = windows(tokenizer, SHARED / TEXT, LENGTH, *CALIBRATION)
    configuration = {"model": MODEL.name, "judged": TEXT, "windows": WINDOWS, "length": LENGTH, "code": "phase"}
    done = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []

    def keep(row: dict[str, Any]) -> None:
        done.append(row | ORIGIN)
        write_results(OUTPUT, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)

    if not done:
        stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
        keep({"rotation": "stock", "perplexity": perplexity(stock, rows)})
    for kind in ROTATIONS:
        if not any(row["rotation"] == kind and row.get("T") == args.T for row in done):
            found = judge(kind, args.T, rows, calibration)
            keep({"rotation": kind, "T": args.T} | found | {"over_stock": found["perplexity"] / done[0]["perplexity"]})


if __name__ == "__main__":
    main()
