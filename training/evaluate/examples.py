"""What a checkpoint is measured on: texts with labels, windows of running text, masked texts, or texts alone."""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from configuration_fas import positions_of

from ..arguments import DataArguments
from ..data import MaskingCollator, check_texts, columns_of, first, load_raw, require_split, text_column
from ..layout import auto_class, predicts_next
from ..tasks import check_task_name, encode, find_task
from ..tokenization import tokenizer_of
from .rows import AGREEMENT, COSINE, PERPLEXITY


SENTENCE = 128  # tokens of a text that is no running text, where nothing is said
MASKED_SHARE = 0.15

Batch = dict[str, torch.Tensor]


@dataclass
class Examples:
    """Tokenized data, the metric for it, and what the results say of it."""

    rows: Sequence[dict[str, Any]]
    metric: str
    description: dict[str, Any]


def load_examples(args: Namespace, model: Any, tokenizer: Any) -> Examples:
    """Load and tokenize the data that a command line names."""
    check_task_name(args.task_name)
    names = ("task_name", "dataset_name", "dataset_config_name", "validation_file", "eval_split", "text_columns")
    data = DataArguments(**{name: getattr(args, name) for name in (*names, "label_column", "add_eos")})
    data.check("evaluate", do_train=False, do_eval=True)
    dataset: Any = require_split(load_raw(data), args.eval_split)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`--limit` must be at least 1, got {args.limit}.")
    source = {name: getattr(data, name) for name in names} | {"limit": args.limit}
    wanted = {"window": args.window, "stride": args.stride, "length": args.max_seq_length, "limit": args.limit}
    found = _encoded(dataset, data, model, tokenizer, **wanted)
    return Examples(found.rows, found.metric, source | found.description)


def examples_of(
    model: Any,
    data: Any,
    labels: Sequence[Any] | None = None,
    *,
    tokenizer: Any = None,
    metric: str | None = None,
    split: str = "validation",
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    limit: int | None = None,
    length: int | None = None,
) -> Examples:
    """Tokenize whatever data a notebook holds for a model.

    Args:
        model: A FAS model, which says what is done: running text is cut into windows for a causal one, texts are
            masked for a masked one, have labels (or none) for a classifier, and stand alone for one without a head.
        data: Texts; or a data set (of `datasets`; or columns, or rows) with a column of texts, or two of pairs, and
            perhaps one of labels; or examples that are tokenized, with `input_ids` and `labels`.
        labels: Of texts.
        tokenizer: By default that of the folder that the model came from.
        metric: By default the one of the kind of model and data: `"perplexity"`, `"classification"`, `"regression"`,
            `"agreement"` where a classifier's texts have no labels, `"cosine"` without a head.
        split: Of a data set with several.
        text_columns: Of a data set, where they have no usual name.
        label_column: Of a data set.
        limit: Take the first so many examples; of running text, so many windows.
        length: Of a window, by default the positions of the model, at most 1,024; or of a text, by default 128.

    Raises:
        ValueError: for data that are none of these, or do not fit the model.
    """
    if isinstance(data, str) or not hasattr(data, "__len__") or not len(data):
        raise ValueError(
            f"`data` must be texts, a data set or tokenized examples, at least one, got {type(data).__name__} "
            f"{str(data)[:40]!r}. Put one text in a list."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    if isinstance(data, Sequence) and isinstance(data[0], Mapping) and "input_ids" in data[0]:
        rows = list(data[:limit])
        return Examples(rows, metric or _metric_of(model, "labels" in rows[0]), {"examples": "tokenized"})
    arguments = DataArguments(eval_split=split, text_columns=list(text_columns), label_column=label_column)
    dataset = _dataset(data, labels, arguments)
    found = _encoded(dataset, arguments, model, tokenizer_of(model, tokenizer), length=length, limit=limit)
    return Examples(found.rows, metric or found.metric, found.description)


def _dataset(data: Any, labels: Sequence[Any] | None, arguments: DataArguments) -> Dataset:
    """The data as a data set with columns."""
    if isinstance(data, DatasetDict):
        data = require_split(dict(data), arguments.eval_split)
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        return Dataset.from_dict(dict(data))
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return Dataset.from_pandas(data, preserve_index=False)
    if all(isinstance(row, Mapping) for row in data):
        return Dataset.from_list(list(data))
    if not all(isinstance(text, str) for text in data):
        wrong = next(each for each in data if not isinstance(each, str))
        raise ValueError(f"`data` must hold texts, or rows with columns, got {wrong!r:.60} in it.")
    columns = {"text": list(data)}
    if labels is not None:
        if len(labels) != len(data):
            raise ValueError(f"`labels` must be as many as the texts, {len(data)}, got {len(labels)}.")
        columns[arguments.label_column] = list(labels)
    return Dataset.from_dict(columns)


def _metric_of(model: Any, labelled: bool) -> str:
    """The metric of a kind of model, where nothing else says it."""
    kind = auto_class(model)
    if kind in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        return PERPLEXITY
    if kind == "AutoModel":
        return COSINE
    if not labelled:
        return AGREEMENT
    return "classification" if model.config.num_labels > 1 else "regression"


def _encoded(
    dataset: Dataset,
    data: DataArguments,
    model: Any,
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    length: int | None = None,
    limit: int | None = None,
) -> Examples:
    """A data set as a kind of model takes it."""
    positions = positions_of(model.config)
    if predicts_next(model):
        window = window or length or min(positions, 1024)
        stride = stride or window
        if not 2 <= window <= positions or not 1 <= stride <= window:
            raise ValueError(
                f"`--window` must be from 2 to the {positions} positions of the model, `--stride` from 1 to the "
                f"window, got {window} and {stride}."
            )
        column = text_column(dataset, data, data.eval_split)
        check_texts(dataset[column], data, data.eval_split, column, range(len(dataset)))
        ending = tokenizer.eos_token if data.add_eos else ""
        rows = windows((text + ending for text in dataset[column] if text), tokenizer, window, stride, limit)
        settings = {"column": column, "window": window, "stride": stride, "add_eos": data.add_eos}
        return Examples(rows, PERPLEXITY, settings)
    length = min(length or SENTENCE, positions)
    dataset = first(dataset, limit)
    judges = auto_class(model) == "AutoModelForSequenceClassification"
    if judges and (data.label_column in columns_of(dataset) or not _is_notebook(data)):
        return _labelled(dataset, data, model, tokenizer, length)
    column = text_column(dataset, data, data.eval_split)
    check_texts(dataset[column], data, data.eval_split, column, range(len(dataset)))
    texts = (tokenizer(text, truncation=True, max_length=length) for text in dataset[column] if text.strip())
    names = ("input_ids", "token_type_ids")
    rows = [{name: each[name] for name in names if name in each} for each in texts]
    settings = {"column": column, "max_seq_length": length}
    if auto_class(model) == "AutoModelForMaskedLM":
        return Examples(masked(rows, tokenizer), PERPLEXITY, settings | {"mlm_probability": MASKED_SHARE})
    return Examples(rows, _metric_of(model, False), settings)


def _is_notebook(data: DataArguments) -> bool:
    """Whether the data came from memory, so that nothing was said to hold labels."""
    return not (data.task_name or data.dataset_name or data.validation_file)


def _labelled(dataset: Dataset, data: DataArguments, model: Any, tokenizer: Any, length: int) -> Examples:
    classes = model.config.num_labels
    labels = [model.config.id2label[i] for i in range(classes)] if classes > 1 else None
    task = find_task({data.eval_split: dataset}, data, labels)
    if task.num_labels != classes:
        raise ValueError(
            f"`--label_column` must hold the {classes} classes of the checkpoint (1: regression), "
            f"got {task.num_labels} in column {data.label_column!r}."
        )
    rows = encode(dataset, tokenizer, task, data, length, data.eval_split).to_list()
    return Examples(rows, task.metric, {"columns": task.columns, "max_seq_length": length})


def masked(rows: Sequence[Mapping[str, Any]], tokenizer: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a share of their tokens masked, which alone have labels; the same masks for the same rows and seed.

    Raises:
        ValueError: for a tokenizer without a mask, or texts so short that none of their tokens is masked.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(f"`tokenizer` must have a mask token for a masked language model, got {tokenizer!r:.60}.")
    collator = MaskingCollator(tokenizer, MASKED_SHARE, seed)
    found = []
    for row in rows:
        made = collator([dict(row)])
        found.append({**row, "input_ids": made["input_ids"][0].tolist(), "labels": made["labels"][0].tolist()})
    found = [row for row in found if any(label != -100 for label in row["labels"])]
    if not found:
        raise ValueError("`data` must hold texts long enough that some of their tokens are masked, got none masked.")
    return found


def windows(
    texts: Iterable[str], tokenizer: Any, window: int, stride: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """Cut running text into windows that start every `stride` tokens.

    Each token is scored once, in the first window it is in; tokens of an overlap are context, with label -100. With a
    stride shorter than the window all tokens but the first of the text are scored, else all but the first of each
    window.

    Args:
        texts: Joined in their order.
        tokenizer: Of the model; adds no special tokens.
        window: Tokens of a window; the last one may be shorter.
        stride: Tokens from one start to the next, at most `window`.
        limit: Stop after so many windows.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= window + stride * (limit - 1):
            break
    rows: list[dict[str, Any]] = []
    scored = 0
    for start in range(0, len(ids), stride):
        tokens = ids[start : start + window]
        if scored >= len(ids) or len(tokens) < 2 or len(rows) == limit:
            break
        context = scored - start
        rows.append({"input_ids": tokens, "labels": [-100] * context + tokens[context:]})
        scored = start + len(tokens)
    return rows


def make_batches(
    examples: Sequence[Mapping[str, Any]], batch_size: int, pad_token_id: int = 0, device: Any = "cpu"
) -> list[Batch]:
    """Batches of similar length, the longest first, padded on the right; labels of tokens are padded with -100."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    batches = []
    for start in range(0, len(order), batch_size):
        rows = [dict(examples[i]) for i in order[start : start + batch_size]]
        width = len(rows[0]["input_ids"])
        batch: dict[str, Any] = {}
        for name in fill.keys() & ({"attention_mask"} | rows[0].keys()):
            values = [row.get(name, [1] * len(row["input_ids"])) for row in rows]
            if isinstance(values[0], list):
                values = [value + [fill[name]] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values, device=device)
        batches.append(batch)
    return batches
