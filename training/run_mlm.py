"""Masked language modelling: QCFS fine-tuning of an encoder on a large corpus, before its task.

python -m training.run_mlm --model_name_or_path MODEL --dataset_name wikitext …
python -m training.run_mlm settings.yaml
"""

import sys
from collections.abc import Sequence
from typing import Any

from .commands import run_command, show_messages
from .data import MaskingCollator, load_raw, text_splits
from .evaluate.rows import Perplexity, for_trainer
from .runner import Run, check_vocabulary, load_model, start, text_blocks, text_length, train_and_evaluate
from .tokenization import load_tokenizer


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stage; returns the rows of its evaluation."""
    with start("mlm", argv) as run:
        return run_stage(run)


def run_stage(run: Run) -> list[dict[str, Any]]:
    """Train and evaluate as a checked command line says; returns the rows."""
    args, data = run.training, run.data
    size = text_length(run, "max_seq_length")
    raw = text_splits(load_raw(data), data, args.do_train, args.do_eval)
    tokenizer = load_tokenizer(run.model, causal=False)
    if tokenizer.mask_token is None:
        raise ValueError("`--tokenizer_name` must have a mask token for masked language modelling, got none.")
    settings = {} if run.model.model_name_or_path else {"vocab_size": len(tokenizer)}
    model = load_model(run, **settings)
    check_vocabulary(tokenizer, model.config)
    splits = text_blocks(run, raw, tokenizer, size)
    trainer = run.trainer(
        model=model,
        train_dataset=splits.pop("train", None),
        processing_class=tokenizer,
        data_collator=MaskingCollator(tokenizer, data.mlm_probability, seed=args.seed),
        **for_trainer(Perplexity(causal=False)),
    )
    return train_and_evaluate(run, trainer, tokenizer, splits)


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Not run"))
