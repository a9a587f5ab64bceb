"""Raw data from the Hub, folders and files, and blocks of tokens for language modelling."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from .arguments import FILE_TYPES, DataArguments


AnyDataset: TypeAlias = "Dataset | IterableDataset"
SHUFFLE_BUFFER = 10_000  # documents
BATCH = 1000  # documents that are tokenized and cut together
GLUE_REPOSITORY = "nyu-mll/glue"


def load_raw(data: DataArguments) -> dict[str, AnyDataset]:
    """Load the splits the arguments name.

    Raises:
        ValueError: if there is no such data set, or it is empty.
    """
    source: str = data.dataset_name or GLUE_REPOSITORY
    name = data.dataset_config_name or (data.task_name if source == GLUE_REPOSITORY else None)
    files_of_text = [Path(file) for file in (data.train_file, data.validation_file) if file]
    for path in files_of_text if not data.streaming else ():
        fault = fault_of(path, parse=False)  # JSON would load, and fail at some row
        if fault:
            raise ValueError(f"The file must be UTF-8, got {fault}")
    try:
        if data.train_file or data.validation_file:
            source = data.train_file or data.validation_file or ""
            files = {"train": data.train_file, "validation": data.validation_file}
            files = {split: file for split, file in files.items() if file}
            file_type = FILE_TYPES[Path(source).suffix]
            options: dict[str, Any] = {"keep_linebreaks": True} if file_type == "text" else {}
            options |= {"streaming": data.streaming}
            raw = {  # one by one: they need not have the same columns
                split: load_dataset(file_type, data_files={split: file}, **options)[split]
                for split, file in files.items()
            }
        elif Path(source).expanduser().is_dir():
            raw = _load_folder(Path(source).expanduser(), name or data.task_name, data.streaming)
        else:
            raw = load_dataset(source, name, streaming=data.streaming)
    except (DatasetsError, OSError, ValueError) as error:
        wanted = f"{source!r}" + (f" (configuration {name!r})" if name else "")
        faults = [
            fault for file in (data.train_file, data.validation_file) if file and (fault := fault_of(Path(file)))
        ]
        raise ValueError(
            f"`--dataset_name` or the file must be a data set that can be read, got {wanted}: "
            f"{' '.join(faults) or error} Give a folder "
            "or file on this machine, or a name on the Hub (and a connection to it)."
        ) from error
    for split, dataset in raw.items():
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                f"`--dataset_name` or the file must hold rows, got none in split {split!r} of {source!r}."
            )
    return dict(raw)


def fault_of(path: Path, parse: bool = True) -> str | None:
    """What is wrong with a file of text, and in which line; None where nothing is found.

    Args:
        path: Of the file.
        parse: Look for what is no JSON, too, in a file of lines of it.
    """
    lines_of_json = parse and FILE_TYPES[path.suffix] == "json"
    if FILE_TYPES[path.suffix] == "parquet":
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"another encoding in line {number}, byte {error.start + 1}, of {path.name!r}. Save it as UTF-8."
                )
            lines_of_json &= not (number == 1 and text.lstrip().startswith("["))
            try:
                json.loads(text if lines_of_json and text.strip() else "{}")
            except json.JSONDecodeError as error:
                return f"no JSON in line {number}, column {error.colno}, of {path.name!r}: {error.msg}."
    return None


def place(data: DataArguments, split: str, row: int | None, column: str) -> str:
    """Where a value stands: row, split and column, and the line of the file where it comes from one."""
    where = (
        f"row {row} of split {split!r}, column {column!r}"
        if row is not None
        else f"split {split!r}, column {column!r}"
    )
    file = data.train_file if split == "train" else data.validation_file
    line = None if file is None or row is None else _line_of(Path(file), row)
    return where if line is None else f"{where} (line {line} of {file!r})"


def _line_of(path: Path, row: int) -> int | None:
    """The line of a file of text that a row begins in, from 1."""
    kind = FILE_TYPES[path.suffix]
    if kind == "parquet":
        return None
    with path.open(encoding="utf-8", newline="" if kind == "csv" else None) as file:
        if kind == "csv":
            reader = csv.reader(file)
            for _ in range(row + 1):  # the header, and the rows before
                next(reader, None)
            return reader.line_num + 1
        numbers = (number for number, line in enumerate(file, start=1) if line.strip() or kind == "text")
        if kind == "json" and file.read(1) == "[":
            return None
        file.seek(0)
        return next(islice(numbers, row, None), None)


def check_texts(
    texts: Iterable[Any],
    data: DataArguments,
    split: str,
    column: str,
    rows: Sequence[int] | None = None,
    flag: str = "text_columns",
) -> None:
    """Raise for a value that is no text; `rows` are the numbers of the texts, None where nobody knows them."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            where = place(data, split, rows[i] if rows else None, column)
            raise ValueError(
                f"`--{flag}` must hold text, got {text!r} in {where}. Mend or remove that row, or name another column."
            )


def _load_folder(folder: Path, name: str | None, streaming: bool):
    """Load a folder of data files, or the sub-folder or README configuration `name` of it."""
    if name and (folder / name).is_dir():
        folder, name = folder / name, None
    if (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        return {split: each.to_iterable_dataset() for split, each in saved.items()} if streaming else saved
    files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
    if any(split.endswith("matched") for split in files):  # MNLI's: datasets would join them into one split
        return load_dataset("parquet", data_files=files, streaming=streaming)
    described = name if (folder / "README.md").is_file() and "configs:" in (folder / "README.md").read_text() else None
    return load_dataset(str(folder), described, streaming=streaming)


def columns_of(dataset: AnyDataset) -> list[str]:
    """Return the column names, of a stream from its first row where they are not declared."""
    return list(dataset.column_names or next(iter(dataset), {}))


def require_columns(dataset: AnyDataset, columns: list[str], flag: str, split: str) -> None:
    """Raise if the split lacks one of the columns."""
    present = columns_of(dataset)
    missing = [column for column in columns if column not in present]
    if missing:
        raise ValueError(f"`--{flag}` must name columns of the data, got {missing} in split {split!r} with {present}.")


def require_split(raw: dict[str, AnyDataset], split: str) -> AnyDataset:
    """Return a split, or raise naming those that exist."""
    if split not in raw:
        raise ValueError(f"The data must have a split {split!r}, got {', '.join(raw)}. --eval_split chooses another.")
    return raw[split]


def text_splits(
    raw: dict[str, AnyDataset], data: DataArguments, do_train: bool, do_eval: bool
) -> dict[str, AnyDataset]:
    """Return the training and evaluation split of a corpus; evaluation takes a part of training where it has none."""
    splits = {"train": require_split(raw, "train")} if do_train else {}
    if do_eval and (data.eval_split in raw or data.eval_split != "validation"):
        splits[data.eval_split] = require_split(raw, data.eval_split)
    elif do_eval and data.streaming:
        if data.max_eval_samples is None:
            raise ValueError(
                "`--max_eval_samples` is required to evaluate on a stream without a validation split: so many "
                "documents are held out of training."
            )
        train = require_split(raw, "train")
        splits = {"train": train.skip(data.max_eval_samples)} if do_train else {}
        splits["validation"] = train.take(data.max_eval_samples)
    elif do_eval:
        share = data.validation_split_percentage / 100
        parts = require_split(raw, "train").train_test_split(test_size=share, shuffle=False)
        splits = {"train": parts["train"]} if do_train else {}
        splits["validation"] = parts["test"]
    return splits


def text_column(dataset: AnyDataset, data: DataArguments, split: str) -> str:
    """Return the column that holds the text of a corpus."""
    if data.text_columns:
        require_columns(dataset, data.text_columns[:1], "text_columns", split)
        return data.text_columns[0]
    columns = columns_of(dataset)
    return "text" if "text" in columns or not columns else columns[0]


def blocks(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    size: int,
    *,
    split: str,
    seed: int | None = None,
) -> AnyDataset:
    """Tokenize a corpus and cut the joined documents into blocks of `size` tokens; what is left over is dropped.

    Args:
        dataset: Rows of documents.
        tokenizer: Of the model.
        data: Column, sample limit and number of processes.
        size: Tokens in a block.
        split: Its name, for messages.
        seed: Shuffles a stream of documents and repeats it without end (training); None leaves it as it is.
    """
    column = text_column(dataset, data, split)
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    ending = tokenizer.eos_token if data.add_eos and tokenizer.eos_token else ""

    def cut(batch: dict[str, list], rows: list[int] | None = None, first_row: int = 0) -> dict[str, list]:
        check_texts(batch[column], data, split, column, rows and [first_row + row for row in rows])
        texts = [text + ending for text in batch[column] if text]
        joined = list(chain.from_iterable(tokenizer(texts)["input_ids"])) if texts else []
        return {"input_ids": [joined[i : i + size] for i in range(0, len(joined) // size * size, size)]}

    columns = columns_of(dataset)
    if isinstance(dataset, IterableDataset):
        if seed is not None:
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        cut_up = dataset.map(cut, batched=True, remove_columns=columns)
        cut_up = cut_up if limit is None else cut_up.take(limit)
        return cut_up if seed is None else cut_up.repeat(None)
    settings: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
    settings |= {"num_proc": data.preprocessing_num_workers, "desc": f"Tokenizing {split}"}
    cut_up = dataset.map(cut, **settings) if limit is None else _first_blocks(dataset, cut, limit, settings)
    if not len(cut_up):
        raise ValueError(
            f"`--block_size` or --max_seq_length must be shorter than the text, got {size} tokens and a split "
            f"{split!r} with fewer."
        )
    return cut_up


def _first_blocks(dataset: Dataset, cut: Any, limit: int, settings: dict[str, Any]) -> Dataset:
    """The first `limit` blocks, of as few documents as it takes, a whole number of batches at a time."""
    parts: list[Dataset] = []
    found = start = 0
    while found < limit and start < len(dataset):
        wanted = BATCH if not found else math.ceil((limit - found) * start / found / BATCH) * BATCH
        end = min(start + wanted, len(dataset))
        rows = range(start, end)
        numbers = {"fn_kwargs": {"first_row": start}} if start else {}
        parts.append(dataset.select(rows).map(cut, **settings, **numbers))
        found, start = found + len(parts[-1]), end
    return first(concatenate_datasets(parts), limit)


def causal_collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks of the same length; the labels are the inputs, but for the first, which nothing predicts."""
    ids = default_data_collator(rows)["input_ids"]
    labels = ids.clone()
    labels[:, 0] = -100  # transformers 4 would count it
    return {"input_ids": ids, "labels": labels}


class MaskingCollator(DataCollatorForLanguageModeling):
    """Masks each row as a function of its tokens, the seed and the epoch alone.

    So a resumed run, another number of processes or of accumulation steps sees the same masks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.15, seed: int = 0):
        super().__init__(tokenizer=tokenizer, mlm_probability=mlm_probability)
        self.base, self.epoch = seed, 0

    def torch_mask_tokens(self, inputs, special_tokens_mask=None, offset_mapping=None):
        masked, labels = inputs.clone(), torch.full_like(inputs, -100)
        for i, row in enumerate(inputs):
            length = int((row != self.tokenizer.pad_token_id).nonzero().max()) + 1
            key = f"{self.base} {self.epoch} {row[:length].tolist()}".encode()
            digest = hashlib.blake2b(key, digest_size=7).digest()
            self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            masked[i : i + 1, :length], labels[i : i + 1, :length] = super().torch_mask_tokens(
                masked[i : i + 1, :length]
            )
        return masked, labels


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """Return the first `limit` rows, or all."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
