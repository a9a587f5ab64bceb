"""GLUE tasks and any own classification or regression data: columns, labels and inputs of the model."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .data import check_texts, columns_of, first, place, require_columns, require_split


GLUE_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
TEXT_COLUMNS = (["sentence"], ["text"], *(pair for pair in GLUE_COLUMNS.values() if len(pair) == 2))
STSB_RANGE = (0.0, 5.0)


@dataclass
class Task:
    """What is learned: text columns, label names (None: regression) and the name of the metric."""

    columns: list[str]
    labels: list[str] | None
    metric: str
    label_column: str

    @property
    def num_labels(self) -> int:
        return len(self.labels) if self.labels else 1

    @property
    def problem_type(self) -> str:
        return "single_label_classification" if self.labels else "regression"


def check_task_name(name: str | None) -> None:
    """Raise for a task that GLUE does not have."""
    if name is not None and name not in GLUE_COLUMNS:
        raise ValueError(f"`--task_name` must be one of {', '.join(GLUE_COLUMNS)}, got {name!r}.")


def select_splits(raw: dict[str, Dataset], data: DataArguments, do_train: bool, do_eval: bool) -> dict[str, Dataset]:
    """Return the training split and those to evaluate on (MNLI: matched and mismatched, as far as there are)."""
    splits = {"train": first(require_split(raw, "train"), data.max_train_samples)} if do_train else {}
    if do_eval:
        variants = [f"{data.eval_split}_{kind}" for kind in ("matched", "mismatched")]
        names = [name for name in variants if name in raw] if data.task_name == "mnli" else []
        for name in names or [data.eval_split]:
            splits[name] = first(require_split(raw, name), data.max_eval_samples)
    return splits


def find_task(
    splits: dict[str, Dataset],
    data: DataArguments,
    labels: list[str] | None = None,
    unlabelled: Collection[str] = (),
) -> Task:
    """Find columns and labels in the data, and check every label.

    Args:
        splits: Of the data.
        data: Task and columns, where given.
        labels: Of the checkpoint, where it was trained on this task already.
        unlabelled: Splits whose labels nobody needs.
    """
    present = columns_of(next(iter(splits.values())))
    columns = data.text_columns or GLUE_COLUMNS.get(data.task_name or "")
    columns = columns or next((known for known in TEXT_COLUMNS if set(known) <= set(present)), ["sentence"])
    if len(columns) > 2:
        raise ValueError(f"`--text_columns` must name one column or two, got {columns}.")
    for split, dataset in splits.items():
        require_columns(dataset, columns, "text_columns", split)
    splits = {split: dataset for split, dataset in splits.items() if split not in unlabelled}
    for split, dataset in splits.items():
        require_columns(dataset, [data.label_column], "label_column", split)
    if not splits:
        names = labels if labels and len(labels) > 1 else None
        metric = data.task_name or ("classification" if names else "regression")
        return Task(columns, names, metric, data.label_column)

    for split, dataset in splits.items():
        _check_one_label(dataset[data.label_column][:], data, split)
    values = {split: np.asarray(dataset[data.label_column][:]) for split, dataset in splits.items()}
    feature = next(iter(splits.values())).features[data.label_column]
    every = np.concatenate(list(values.values()))
    if data.task_name == "stsb" or (data.task_name is None and every.dtype.kind == "f"):
        _check_values(values, STSB_RANGE if data.task_name == "stsb" else (-np.inf, np.inf), data)
        return Task(columns, None, data.task_name or "regression", data.label_column)
    named = feature.names if isinstance(feature, ClassLabel) else None
    if named is None:
        named = labels or [str(value) for value in sorted(set(values.get("train", every).tolist()) - {None})]
    _check_classes(values, named, data)
    return Task(columns, list(named), data.task_name or "classification", data.label_column)


def _check_one_label(labels: list[Any], data: DataArguments, split: str) -> None:
    """Raise for a row with several labels, or with none."""
    for row, label in enumerate(labels):
        if label is None or isinstance(label, list | dict):
            raise ValueError(
                f"`--label_column` must hold one label a row, got {label!r} in "
                f"{place(data, split, row, data.label_column)}. --label_column names another one."
            )


def _check_values(values: dict[str, np.ndarray], bounds: tuple[float, float], data: DataArguments) -> None:
    for split, found in values.items():
        wrong = ~np.isfinite(found) | (found < bounds[0]) | (found > bounds[1])
        if wrong.any():
            raise ValueError(
                f"`--label_column` must hold finite numbers from {bounds[0]} to {bounds[1]}, got "
                f"{found[wrong].tolist()[0]} in {place(data, split, int(wrong.argmax()), data.label_column)}."
            )


def _check_classes(values: dict[str, np.ndarray], names: list[str], data: DataArguments) -> None:
    """Raise unless every label is a class number, or a class name, of the `names`."""
    for split, found in values.items():
        if found.dtype.kind in "iub":
            wrong = (found < 0) | (found >= len(names))
            allowed = f"class numbers 0 to {len(names) - 1}"
        else:
            wrong = ~np.isin(found.astype(str), names)
            allowed = f"one of {', '.join(names)}"
        if wrong.any():
            raise ValueError(
                f"`--label_column` must hold {allowed}, got {found[wrong].tolist()[0]!r} in "
                f"{place(data, split, int(wrong.argmax()), data.label_column)}. (The test splits of GLUE have no "
                "labels.)"
            )


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, data: DataArguments, length: int, split: str
) -> Dataset:
    """Tokenize a split into the inputs of the model and `labels`, where it has any.

    Splits to evaluate on are sorted by length. Then little is padded, and a padded row gives what it gives alone.
    """
    padding = "max_length" if data.pad_to_max_length else False

    def convert(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        for column in task.columns:
            check_texts(batch[column], data, split, column, rows)
        texts = [batch[column] for column in task.columns]
        encoded = tokenizer(*texts, truncation=True, max_length=length, padding=padding)
        if task.label_column not in batch:
            return dict(encoded)
        labels = batch[task.label_column]
        if task.labels and isinstance(labels[0], str):
            labels = [task.labels.index(label) for label in labels]
        convert_label = int if task.labels else float
        return {**encoded, "labels": [convert_label(label) for label in labels]}

    encoded = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=data.preprocessing_num_workers,
        desc=f"Tokenizing {split}",
    )
    if split == "train" or data.pad_to_max_length:
        return encoded
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return encoded.select(sorted(range(len(encoded)), key=lengths.__getitem__))
