"""Tiny random models of every backbone and head of the table, with inputs for them."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import transformers

import modeling_fas
from configuration_fas import BACKBONES, FASConfig


VOCABULARY, POSITIONS = 61, 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = SMALL | {"num_key_value_heads": 2}
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "bert": ENCODER,
    "roberta": ENCODER | {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "seq_classif_dropout": 0.0}
    | {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0},
    "opt": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
    | {"word_embed_proj_dim": 16, "init_std": 0.2},
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 16},
}
CASES = [(backbone, auto_class) for backbone, table in BACKBONES.items() for auto_class in table.models]
HEADS = [case for case in CASES if case[1] != "AutoModel"]
CAUSAL = [backbone for backbone, table in BACKBONES.items() if table.causal]
# Every backbone, every head, and what is one of a kind: a default test takes these where all models are one path.
FEW = {
    ("gpt2", "AutoModelForCausalLM"),
    ("gpt2", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForMaskedLM"),  # time ends in its head
    ("bert", "AutoModelForMultipleChoice"),
    ("bert", "AutoModelForSequenceClassification"),  # a pooler with a site
    ("roberta", "AutoModelForSequenceClassification"),  # a head that is not linear
    ("distilbert", "AutoModelForMaskedLM"),
    ("distilbert", "AutoModelForQuestionAnswering"),
    ("opt", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("qwen2", "AutoModelForSequenceClassification"),
    ("qwen3", "AutoModel"),
    ("qwen3", "AutoModelForCausalLM"),
}
# Heads that are not linear in what the trunk gives, and hold no neurons: time ends before them.
NOT_LINEAR = {
    ("roberta", "AutoModelForMaskedLM"),
    ("roberta", "AutoModelForSequenceClassification"),
    ("distilbert", "AutoModelForSequenceClassification"),
}


def config(backbone: str, auto_class: str, **settings):
    """Configuration of a tiny model whose neurons fire about a third of the time."""
    labels = 2 if auto_class == "AutoModelForQuestionAnswering" else 3
    defaults = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "initial_threshold": 0.8}
    defaults |= {
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "num_labels": labels,
    }
    if "init_std" in SIZES[backbone]:
        defaults.pop("initializer_range")
    return FASConfig(backbone=backbone, **(defaults | SIZES[backbone] | settings))


def model(backbone: str, auto_class: str, seed: int = 0, **settings):
    """A tiny random model in evaluation mode; biases and norms are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    made = getattr(modeling_fas, BACKBONES[backbone].models[auto_class])(config(backbone, auto_class, **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 and not name.endswith("threshold"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def named(value: Any) -> Any:
    """The name of a case, as pytest shows it; anything else by its own."""
    is_case = isinstance(value, tuple) and len(value) == 2 and value[0] in BACKBONES
    return f"{value[0]}-{value[1].removeprefix('AutoModel') or 'Model'}" if is_case else None


def some(wanted: Callable[..., bool], *axes: Sequence[Any]) -> list[Any]:
    """The product of axes as parameters: by default those that are wanted run, the rest as slow tests."""
    rest = (pytest.mark.slow, pytest.mark.rest)
    return [pytest.param(*each, marks=() if wanted(*each) else rest) for each in product(*axes)]


def few(cases: Sequence[tuple[str, str]]) -> list[Any]:
    """[`some`] cases, those of `FEW`."""
    return some(lambda case: case in FEW, cases)


def stock_class(backbone: str, auto_class: str):
    return getattr(transformers, BACKBONES[backbone].models[auto_class].removeprefix("FAS"))


def batch(backbone: str, auto_class: str, padding: str = "right") -> dict[str, torch.Tensor]:
    """Three sequences of 9, 6 and 4 tokens, padded to 9; three of two for a choice among texts."""
    generator = torch.Generator().manual_seed(1)
    rows = 6 if auto_class == "AutoModelForMultipleChoice" else 3
    pad = SIZES[backbone].get("pad_token_id", 0)
    ids = torch.randint(2, VOCABULARY, (rows, 9), generator=generator)
    columns, lengths = torch.arange(9), torch.tensor([[9], [6], [4]]).repeat(rows // 3, 1)
    mask = (columns < lengths if padding == "right" else columns >= 9 - lengths).long()
    made = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
    if BACKBONES[backbone].causal:
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {name: value.view(3, 2, 9) for name, value in made.items()} if rows == 6 else made


def first_output(outputs) -> torch.Tensor:
    """Logits; start and end of an answer, stacked; hidden states where there is no head."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)
    return outputs["logits" if "logits" in outputs else "last_hidden_state"]
