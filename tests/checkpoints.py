"""Tiny checkpoint folders for the tests of publishing: random weights, a tokenizer, made-up results."""

from pathlib import Path

import torch
from transformers import BertTokenizer, GPT2Tokenizer, set_seed

from configuration_fas import FASConfig
from modeling_fas import (
    FASBertForMaskedLM,
    FASBertForSequenceClassification,
    FASBertModel,
    FASGPT2LMHeadModel,
    FASGPT2Model,
)
from training.results import fingerprint, write_results


WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "it", "was", "late", "good", "bad", "not"]
MODELS = {
    "gpt2": FASGPT2LMHeadModel,
    "gpt2-base": FASGPT2Model,
    "mlm": FASBertForMaskedLM,
    "classifier": FASBertForSequenceClassification,
    "bert-base": FASBertModel,
}


def tiny_config(kind: str, **settings):
    """A configuration of two layers of width 16 over 64 tokens and 32 positions."""
    if kind.startswith("gpt2"):
        stock = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        stock |= {"pad_token_id": 0}
    else:
        stock = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
        stock |= {"max_position_embeddings": 32}
    backbone = "gpt2" if kind.startswith("gpt2") else "bert"
    return FASConfig(backbone=backbone, **(stock | {"vocab_size": 64, "L": 8, "initial_threshold": 0.5} | settings))


def tiny_model(kind: str, seed: int = 0, calibrated: bool = True, **settings):
    """A random model whose weights are large enough for its logits to depend on every part of it."""
    set_seed(seed)
    model = MODELS[kind](tiny_config(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        if calibrated:
            model.begin_calibration(4)
            for _, neuron in model.neurons():
                neuron.fine_threshold.uniform_(0.3, 0.7)
                neuron.initial_potential.uniform_(0.2, 0.8)
    return model.eval()


def tiny_tokenizer(kind: str, folder: Path):
    """A tokenizer of 64 tokens, of the class of the backbone."""
    if kind.startswith("gpt2"):
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        kept = [letter for letter in letters if letter.isascii() and (letter.islower() or letter in ".,!?'")]
        merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "t"), ("Ġ", "c"), ("Ġc", "at")]
        tokens = ["<|endoftext|>", "Ġ", *kept, *("".join(merge) for merge in merges)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return GPT2Tokenizer(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", model_max_length=32)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.,!?"]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=32)


def tiny_results(folder: Path, kind: str, base: str = "someone/base", model=None) -> None:
    """`evaluation.json` as a training run writes it, with numbers that stand nowhere else."""
    task = {"task_name": "sst2"} if kind == "classifier" else {"dataset_name": "someone/text"}
    metric = "accuracy" if kind == "classifier" else "perplexity"
    rows = [{"mode": "qcfs", "T": 0, "schedule": None, "quality": {metric: 0.8461, "loss": 0.4127}}]
    rows += [
        {"mode": "spiking", "T": T, "schedule": schedule, "quality": {metric: 0.8 + T / 1000 + 0.00017, "loss": 0.5}}
        | {"spike_rate": 0.0312 + T / 10000, "seconds": 1.5}
        for T in (1, 4)
        for schedule in ("stepwise", "layerwise")
    ]
    write_results(
        folder / "evaluation.json",
        metrics={"rows": [row | {"split": "validation"} for row in rows]},
        configuration={
            "model": {"stage": "calibrate", "model_name_or_path": base},
            "data": task,
            "training": {"seed": 43, "learning_rate": 3.7e-5, "max_steps": 29, "per_device_train_batch_size": 17},
            "weights_sha256": model and fingerprint(model),
            "config": model and model.config.to_dict(),
        },
        command=f"python -m training.run_glue --model_name_or_path /home/someone/secret/place --output_dir {folder}",
    )


def tiny_checkpoint(folder: Path, kind: str, results: bool = True, seed: int = 0, **settings):
    """Write a whole checkpoint folder and return its model."""
    model = tiny_model(kind, seed, **settings)
    model.save_pretrained(folder)
    tiny_tokenizer(kind, folder).save_pretrained(folder)
    if results:
        tiny_results(folder, kind, model=model)
    return model
