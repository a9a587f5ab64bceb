"""Causal language modelling: QCFS on a large corpus (full), on the task (downstream), calibration (calibrate).

python -m training.run_clm --stage downstream --model_name_or_path MODEL --dataset_name wikitext …
python -m training.run_clm settings.yaml
"""

import sys
from collections.abc import Sequence
from typing import Any

from .commands import run_command, show_messages
from .data import causal_collator, load_raw, text_splits
from .evaluate.rows import Perplexity, for_trainer
from .runner import Run, check_vocabulary, load_model, start, text_blocks, text_length, train_and_evaluate
from .tokenization import load_tokenizer


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run one stage; returns the rows of its evaluation."""
    with start("clm", argv) as run:
        return run_stage(run)


def run_stage(run: Run) -> list[dict[str, Any]]:
    """Train and evaluate as a checked command line says; returns the rows."""
    args, data = run.training, run.data
    size = text_length(run, "block_size")
    raw = text_splits(load_raw(data), data, args.do_train, args.do_eval)
    tokenizer = load_tokenizer(run.model, causal=True)
    model = load_model(run, **from_scratch(run, tokenizer))
    model.loss_type = "ForCausalLM"
    check_vocabulary(tokenizer, model.config)
    splits = text_blocks(run, raw, tokenizer, size)
    trainer = run.trainer(
        model=model,
        train_dataset=splits.pop("train", None),
        processing_class=tokenizer,
        data_collator=causal_collator,
        **for_trainer(Perplexity()),
    )
    return train_and_evaluate(run, trainer, tokenizer, splits)


def from_scratch(run: Run, tokenizer) -> dict[str, Any]:
    """Return what the tokenizer says about a model that has no checkpoint."""
    if run.model.model_name_or_path:
        return {}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids}


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Not run"))
