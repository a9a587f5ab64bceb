"""A GLUE task, or own classification or regression data: QCFS fine-tuning (downstream), calibration (calibrate).

python -m training.run_glue --stage downstream --model_name_or_path MODEL --task_name sst2 …
python -m training.run_glue settings.yaml
"""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import DataCollatorWithPadding

from configuration_fas import positions_of

from .commands import run_command, show_messages
from .data import columns_of, load_raw
from .evaluate.rows import TaskMetric, for_trainer
from .runner import Run, check_vocabulary, load_model, start, train_and_evaluate
from .tasks import Task, encode, find_task, select_splits
from .tokenization import load_tokenizer


DEFAULT_LENGTH = 128


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run one stage; returns the rows of its evaluation."""
    with start("glue", argv) as run:
        return run_stage(run)


def run_stage(run: Run) -> list[dict[str, Any]]:
    """Train and evaluate as a checked command line says; returns the rows."""
    args, data = run.training, run.data
    trained = check_trained(run)
    length = data.max_seq_length = min(data.max_seq_length or DEFAULT_LENGTH, positions_of(run.config))
    data.pad_to_max_length |= run.model.granularity == "position" and run.stage == "calibrate"

    splits = select_splits(load_raw(data), data, args.do_train, args.do_eval)
    labels = list(run.config.id2label.values()) if trained else None
    calibrates = run.stage == "calibrate" and "train" in splits
    unlabelled = ["train"] if calibrates and data.label_column not in columns_of(splits["train"]) else []
    task = find_task(splits, data, labels, unlabelled)
    check_labels(run, task, trained)
    tokenizer = load_tokenizer(run.model, causal=run.causal)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_vocabulary(tokenizer, run.config)
    special = tokenizer.num_special_tokens_to_add(pair=len(task.columns) == 2)
    if length <= special:
        raise ValueError(f"`--max_seq_length` must leave room for text beside {special} special tokens, got {length}.")
    padding = {"pad_token_id": tokenizer.pad_token_id} if run.causal else {}
    model = load_model(run, **padding, **label_settings(task))
    with args.main_process_first(desc="tokenizing"):
        encoded = {split: encode(dataset, tokenizer, task, data, length, split) for split, dataset in splits.items()}
    trainer = run.trainer(
        model=model,
        train_dataset=encoded.pop("train", None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        **for_trainer(TaskMetric(task.metric)),
    )
    return train_and_evaluate(run, trainer, tokenizer, encoded)


def check_trained(run: Run) -> bool:
    """Return whether the checkpoint is a trained classifier, and raise if it is none and must be one."""
    trained = any("SequenceClassification" in name for name in run.config.architectures or ())
    if not trained and (run.stage == "calibrate" or not run.training.do_train):
        wanted = "--stage calibrate" if run.stage == "calibrate" else "evaluation without --do_train"
        raise ValueError(
            f"`--model_name_or_path` must be fine-tuned on the task for {wanted}, got a checkpoint of "
            f"{', '.join(run.config.architectures or ['no class'])}. Run --stage downstream --do_train first."
        )
    return trained and (run.stage == "calibrate" or not run.training.do_train)


def check_labels(run: Run, task: Task, trained: bool) -> None:
    """Raise if a trained classifier is for other labels."""
    if trained and run.config.num_labels != task.num_labels:
        raise ValueError(
            f"`--model_name_or_path` must be fine-tuned on this task, got a checkpoint with {run.config.num_labels} "
            f"labels for data with {task.num_labels}."
        )


def label_settings(task: Task) -> dict[str, Any]:
    """Return the label settings of the configuration."""
    names = task.labels or ["score"]
    return {
        "problem_type": task.problem_type,
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Not run"))
