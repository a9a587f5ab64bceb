"""Tiny random models and batches, the same for every test."""

import torch

import modeling_fas
from configuration_fas import FASConfig


CLASSES = {
    "gpt2": modeling_fas.FASGPT2LMHeadModel,
    "mlm": modeling_fas.FASBertForMaskedLM,
    "classify": modeling_fas.FASBertForSequenceClassification,
}
KINDS = list(CLASSES)
MODES = [(0, "stepwise"), (1, "stepwise"), (4, "stepwise"), (1, "layerwise"), (4, "layerwise")]
VOCABULARY, POSITIONS = 64, 32


def config(kind: str, **settings):
    """Configuration of a tiny model whose neurons fire about a third of the time."""
    sizes = {
        "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": POSITIONS}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        "bert": {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        | {"max_position_embeddings": POSITIONS, "num_labels": 3, "hidden_dropout_prob": 0.0}
        | {"attention_probs_dropout_prob": 0.0},
    }
    backbone = "gpt2" if kind == "gpt2" else "bert"
    defaults = {"vocab_size": VOCABULARY, "initial_threshold": 0.8, "initializer_range": 0.2}
    return FASConfig(backbone=backbone, **(sizes[backbone] | defaults | settings))


def model(kind: str, seed: int = 0, **settings):
    """A tiny random model in evaluation mode; the same weights for the same seed and sizes."""
    torch.manual_seed(seed)
    return CLASSES[kind](config(kind, **settings)).eval()


def batch(kind: str, padding: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Three sequences of 9, 6 and 4 tokens, padded to 9, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    columns, lengths = torch.arange(9), torch.tensor([[9], [6], [4]])
    mask = (columns < lengths if padding == "right" else columns >= 9 - lengths).long()
    made = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "gpt2":
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    made["labels"] = torch.tensor([0, 2, 1]) if kind == "classify" else torch.where(mask > 0, ids, -100)
    return made
