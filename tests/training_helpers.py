"""Tiny checkpoints, tokenizers and data for the tests of training."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)


WORDS = ["the", "a", "film", "movie", "plot", "actor", "is", "was", "not", "very", "good", "bad", "fine", "dull"]
WORDS += ["bright", "sad", "happy", "long", "short", "and", "but"]
GOOD = {"good", "fine", "bright", "happy"}


def sentences(count: int, length: int = 8, seed: int = 0) -> list[str]:
    """Random sentences of 2 to `length` words."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = int(torch.randint(2, length + 1, (1,), generator=generator))
        found.append(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator)))
    return found


def is_good(sentence: str) -> int:
    return int(bool(GOOD & set(sentence.split())))


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_corpus(path: Path, count: int = 200, seed: int = 0) -> str:
    return write_lines(path, [{"text": text} for text in sentences(count, seed=seed)])


def write_reviews(path: Path, count: int = 64, seed: int = 0) -> str:
    return write_lines(path, [{"sentence": text, "label": is_good(text)} for text in sentences(count, seed=seed)])


def save_bert(folder: Path, dropout: float = 0.1) -> str:
    """A stock BERT of 2 layers with a WordPiece tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def save_gpt2(folder: Path, dropout: float = 0.1) -> str:
    """A stock GPT-2 of 2 layers with a byte-level BPE tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(200), vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = GPT2Tokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def in_two_processes(main: Callable[[list[str]], Any], argv: list[str]) -> None:
    """Run `main` in two processes as torchrun does, but by forking this one, which has imported all they need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_one_of_two, (port, main, argv), nprocs=2, start_method="fork")


def _one_of_two(rank: int, port: int, main: Callable[[list[str]], Any], argv: list[str]) -> None:
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= size | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    AcceleratorState._reset_state(reset_partial_state=True)
    main(argv)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors of two equal sets of names."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
