"""GLUE metrics over scikit-learn and scipy, with the interface of `evaluate` and nothing fetched at run time."""

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == references).mean())}


def _accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {**_accuracy(predictions, references), "f1": float(f1_score(references, predictions, zero_division=0))}


def _matthews(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def _correlations(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}  # undefined for a constant; as scikit-learn's Matthews does
    return {
        "pearson": float(pearsonr(predictions, references).statistic),
        "spearmanr": float(spearmanr(predictions, references).statistic),
    }


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "cola": _matthews,
    "sst2": _accuracy,
    "mrpc": _accuracy_and_f1,
    "stsb": _correlations,
    "qqp": _accuracy_and_f1,
    "mnli": _accuracy,
    "qnli": _accuracy,
    "rte": _accuracy,
    "wnli": _accuracy,
    "classification": _accuracy,
    "regression": _correlations,
}


class GlueMetric(evaluate.Metric):
    """The metric of a GLUE task, or of any `classification` or `regression`, chosen by `config_name`.

    ```python
    >>> GlueMetric("mrpc").compute(predictions=[0, 1], references=[0, 1])
    {'accuracy': 1.0, 'f1': 1.0}
    ```
    """

    def _info(self):
        if self.config_name not in METRICS:
            raise ValueError(f"`config_name` must be one of {', '.join(METRICS)}, got {self.config_name!r}.")
        kind = "float32" if METRICS[self.config_name] is _correlations else "int64"
        return evaluate.MetricInfo(
            description="GLUE metrics: Matthews correlation, accuracy, accuracy and F1, or Pearson and Spearman.",
            citation="Wang et al. 2019, GLUE.",
            inputs_description="predictions: class numbers, or values; references: the same.",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions, references):
        return METRICS[self.config_name](np.asarray(predictions), np.asarray(references))
