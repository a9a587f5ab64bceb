"""Tokenizers: what AutoTokenizer loads, and bare SentencePiece models."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BertGenerationTokenizer, BigBirdTokenizer, PreTrainedTokenizerBase

from .arguments import ModelArguments


SENTENCEPIECE_FILE = "spiece.model"
_PROBE = "The quick brown fox, 12 times: “naïve”  Übermut & co."


def load_tokenizer(model: ModelArguments, causal: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: byte-level BPE, WordPiece, or SentencePiece.

    A SentencePiece model is given as a `.model` file, or as a folder with a `spiece.model` and no tokenizer
    configuration, in `--tokenizer_name`.

    Args:
        model: Where it is.
        causal: Whether the model reads from left to right: then no special tokens are added.
    """
    name = model.tokenizer_name or model.model_name_or_path or model.config_name
    if name is None:
        raise ValueError("`--tokenizer_name` is required to train from scratch.")
    path = Path(name)
    if path.is_dir() and (path / SENTENCEPIECE_FILE).is_file() and not (path / "tokenizer_config.json").is_file():
        path = path / SENTENCEPIECE_FILE
    if path.suffix == ".model":
        if not path.is_file():
            raise ValueError(f"`--tokenizer_name` must be a SentencePiece model that exists, got {name!r}.")
        return sentencepiece_tokenizer(path, causal)
    try:
        return AutoTokenizer.from_pretrained(name, revision=model.model_revision, use_fast=model.use_fast_tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--tokenizer_name` must hold a tokenizer, got {name!r}: {error}") from error


def sentencepiece_tokenizer(path: Path, causal: bool) -> PreTrainedTokenizerBase:
    """Wrap a SentencePiece model in a class that `AutoTokenizer` loads again, with exactly its token ids."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def piece(number: int) -> str | None:
        return pieces.id_to_piece(number) if number >= 0 else None

    tokens: dict[str, Any] = {
        "bos_token": piece(pieces.bos_id()),
        "eos_token": piece(pieces.eos_id()),
        "unk_token": piece(pieces.unk_id()),
        "pad_token": piece(pieces.pad_id()),
    }
    if causal:
        tokenizer = BertGenerationTokenizer(vocab_file=str(path), sep_token=None, **tokens)
    else:
        missing = [token for token in ("[CLS]", "[SEP]", "[MASK]") if pieces.piece_to_id(token) == pieces.unk_id()]
        if missing or tokens["pad_token"] is None:
            raise ValueError(
                "`--tokenizer_name` must hold [CLS], [SEP], [MASK] and padding for a model that is not causal, "
                f"got {str(path)!r} without {', '.join(missing) or 'padding'}. Train it with "
                "user_defined_symbols=[CLS],[SEP],[MASK] and pad_id=0."
            )
        tokenizer = BigBirdTokenizer.from_pretrained(str(path.parent), vocab_file=str(path), **tokens)
    protocol: Any = sentencepiece_model_pb2
    kind = protocol.ModelProto.FromString(pieces.serialized_model_proto()).trainer_spec.model_type
    reproduced = tokenizer(_PROBE, add_special_tokens=False).input_ids == pieces.encode(_PROBE)
    if not reproduced or (not causal and kind != protocol.TrainerSpec.UNIGRAM):
        raise ValueError(
            f"`--tokenizer_name` must be a SentencePiece model{'' if causal else ' of type unigram'} for a model "
            f"that is {'' if causal else 'not '}causal, got {str(path)!r}, whose tokens transformers cannot reproduce."
        )
    return tokenizer


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or that of the folder or name that a model came from.

    Raises:
        ValueError: if there is none.
    """
    if tokenizer is not None:
        return tokenizer
    source = getattr(model, "name_or_path", "")
    try:
        if not source:
            raise ValueError("it comes from no folder")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer` must be given for this model, got None: {error}.") from error
