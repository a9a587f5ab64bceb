"""What a checkpoint is measured on: texts with labels, or windows of running text."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configuration_fas import positions_of

from ..arguments import DataArguments
from ..data import check_texts, first, load_raw, require_split, text_column
from ..layout import predicts_next
from ..tasks import check_task_name, encode, find_task
from .rows import PERPLEXITY


@dataclass
class Examples:
    """Tokenized data, the metric for it, and what the results say of it."""

    rows: Sequence[dict[str, Any]]
    metric: str
    description: dict[str, Any]


def load_examples(args: Namespace, model: Any, tokenizer: Any) -> Examples:
    """Load and tokenize the data: windows of text for a language model, else texts with labels."""
    check_task_name(args.task_name)
    names = ("task_name", "dataset_name", "dataset_config_name", "validation_file", "eval_split", "text_columns")
    data = DataArguments(**{name: getattr(args, name) for name in (*names, "label_column", "add_eos")})
    data.check("evaluate", do_train=False, do_eval=True)
    dataset: Any = require_split(load_raw(data), args.eval_split)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`--limit` must be at least 1, got {args.limit}.")
    source = {name: getattr(data, name) for name in names} | {"limit": args.limit}
    limit = positions_of(model.config)
    if predicts_next(model):
        window = args.window or min(limit, 1024)
        stride = args.stride or window
        if not 2 <= window <= limit or not 1 <= stride <= window:
            raise ValueError(
                f"`--window` must be from 2 to the {limit} positions of the model, `--stride` from 1 to the window, "
                f"got {window} and {stride}."
            )
        column = text_column(dataset, data, args.eval_split)
        check_texts(dataset[column], data, args.eval_split, column, range(len(dataset)))
        ending = tokenizer.eos_token if args.add_eos else ""
        rows = windows((text + ending for text in dataset[column] if text), tokenizer, window, stride, args.limit)
        return Examples(
            rows, PERPLEXITY, source | {"column": column, "window": window, "stride": stride, "add_eos": args.add_eos}
        )
    length = args.max_seq_length or min(limit, 128)
    classes = model.config.num_labels
    labels = [model.config.id2label[i] for i in range(classes)] if classes > 1 else None
    dataset = first(dataset, args.limit)
    task = find_task({args.eval_split: dataset}, data, labels)
    if task.num_labels != classes:
        raise ValueError(
            f"`--label_column` must hold the {classes} classes of the checkpoint (1: regression), "
            f"got {task.num_labels} in column {args.label_column!r}."
        )
    rows = encode(dataset, tokenizer, task, data, length, args.eval_split).to_list()
    return Examples(rows, task.metric, source | {"columns": task.columns, "max_seq_length": length})


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
