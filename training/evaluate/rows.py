"""What an evaluation measures: the modes a model can run in, and how good what it says is, row by row of a batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ..metrics import METRICS
from ..results import MODES


PERPLEXITY, AGREEMENT, COSINE = "perplexity", "agreement", "cosine"
# Measured where nothing is said; "accumulated" is asked for by name, or is the schedule of the model.
DEFAULT_SCHEDULES = ("stepwise", "layerwise")


def schedules_of(model: Any) -> list[str]:
    """Of [`DEFAULT_SCHEDULES`], those that a model can run in; and its own, if it is set to T > 0."""
    config = model.config
    own = (config.schedule,) if config.T else ()
    return [each for each in dict.fromkeys(DEFAULT_SCHEDULES + own) if each in config.schedules]


@dataclass(frozen=True)
class Mode:
    """One way to run: the stock model, the QCFS ANN, or the spiking network with T timesteps of a schedule."""

    name: str
    T: int = 0
    schedule: str | None = None

    def __str__(self) -> str:
        return f"{self.schedule} T = {self.T}" if self.T else MODES[self.name]

    @property
    def tag(self) -> str:
        """What trackers are told it is called."""
        return f"{self.schedule}_T{self.T}" if self.T else self.name

    def row(self) -> dict[str, Any]:
        """What a row of results begins with."""
        return {"mode": self.name, "T": self.T, "schedule": self.schedule}

    def of(self, model: Any, stock: Any = None) -> AbstractContextManager[Any]:
        """Context manager that yields the model to call; a FAS model is as before afterwards."""
        return nullcontext(stock) if self.name == "stock" else model.running(self.T, self.schedule)


def modes(
    timesteps: Sequence[int], schedules: Sequence[str] = DEFAULT_SCHEDULES, *, stock: bool = False, fas: bool = True
) -> list[Mode]:
    """Every mode to measure, in the order of the rows: stock model, QCFS ANN, spiking network by schedule and T.

    Args:
        timesteps: Of the spiking network; 0, which is the ANN, is left out.
        schedules: Of the spiking network.
        stock: Whether there is a stock model.
        fas: Whether there is a FAS model.
    """
    found = [Mode("stock")] if stock else []
    if not fas:
        return found
    spiking = [Mode("spiking", T, schedule) for schedule in schedules for T in dict.fromkeys(timesteps) if T]
    return [*found, Mode("qcfs"), *spiking]


class Quality(Protocol):
    """How good logits are: a few numbers for each row of a batch, and the measures of all rows together.

    So batches, processes and timesteps may come in any order.
    """

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Numbers of each row, `(B, …)`; without labels, `labels` is what the reference says in place of `logits`."""

    def result(self, rows: np.ndarray) -> dict[str, float]:
        """Measures over the numbers of all rows, `(N, …)`."""


class Perplexity:
    """Perplexity over all tokens that have a label, each predicted from those before it in its row.

    Args:
        causal: Else a token is predicted in its own place, as a masked language model does.
    """

    def __init__(self, causal: bool = True):
        self.causal = causal

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = [  # row by row: a copy of all logits in float32 would double the memory
            F.cross_entropy(row.float(), wanted, reduction="sum") for row, wanted in zip(logits, labels, strict=True)
        ]
        return torch.stack([torch.stack(losses), labels.ne(-100).sum(-1).float()], dim=-1)

    def result(self, rows: np.ndarray) -> dict[str, float]:
        total, tokens = rows.sum(0, dtype=np.float64).tolist()
        loss = total / tokens if tokens else math.inf
        return {PERPLEXITY: math.exp(min(loss, 700.0)), "loss": loss, "tokens": int(tokens)}


class TaskMetric:
    """Metric of a classification or regression task, and the loss: cross entropy, or squared error.

    Args:
        metric: Name in `training.metrics.METRICS`.
    """

    def __init__(self, metric: str):
        self.metric = metric

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if logits.shape[-1] == 1:
            predictions = logits.squeeze(-1)
            losses = (predictions - labels).square()
        else:
            predictions, losses = logits.argmax(-1), F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([predictions.float(), labels.float(), losses.float()], dim=-1)

    def result(self, rows: np.ndarray) -> dict[str, float]:
        predictions, labels, losses = rows.T
        loss = float(losses.mean(dtype=np.float64))
        return {**METRICS[self.metric](predictions, labels), "loss": loss, "examples": len(rows)}


class Agreement:
    """Share of examples that a classifier judges as its reference does; needs no labels."""

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1).eq(labels.argmax(-1)).float()

    def result(self, rows: np.ndarray) -> dict[str, float]:
        return {AGREEMENT: float(rows.mean(dtype=np.float64)), "examples": len(rows)}


class Cosine:
    """Cosine between sentence vectors and those of a reference, mean and least; needs no labels."""

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(logits.float(), labels.float(), dim=-1)

    def result(self, rows: np.ndarray) -> dict[str, float]:
        return {COSINE: float(rows.mean(dtype=np.float64)), "least_cosine": float(rows.min()), "examples": len(rows)}


# What is measured against a reference, not labels: the stock model where there is one, else the network at T = 0.
UNLABELLED: dict[str, Callable[[], Quality]] = {AGREEMENT: Agreement, COSINE: Cosine}


def quality_of(metric: str, causal: bool = True) -> Quality:
    """The quality by its name: `"perplexity"` of a language model, `"cosine"`, `"agreement"`, or the metric of a task.

    Args:
        metric: Its name.
        causal: Of a language model, whether a position speaks of the next token.
    """
    if metric in UNLABELLED:
        return UNLABELLED[metric]()
    return Perplexity(causal) if metric == PERPLEXITY else TaskMetric(metric)


def for_trainer(quality: Quality) -> dict[str, Callable]:
    """Arguments that make a Trainer measure a quality: it then gathers the numbers of each row, no logits."""

    def preprocess(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return quality.of(logits[0] if isinstance(logits, tuple) else logits, labels)

    def compute(prediction: Any) -> dict[str, float]:
        return quality.result(prediction.predictions)

    return {"preprocess_logits_for_metrics": preprocess, "compute_metrics": compute}
