"""What an evaluation found, and what one does with it: a table, a report, a card."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results import escaped_row, gap_closed, markdown_table, mode_name, results_of


RESULTS_FILE = "results.json"
# The quality to plot and to compare by: the first of these that was measured.
HEADLINES = (
    "perplexity",
    "matthews_correlation",
    "spearmanr",
    "f1",
    "accuracy",
    "cosine",
    "agreement",
    "output_error",
)
LOWER_IS_BETTER = {"perplexity", "loss", "output_error"}
# What `quality` holds beside measures; the loss is one where there is no other.
NO_METRIC = {"loss", "examples", "tokens"}


class Evaluation(dict):
    """What [`evaluate`] measured, `rows` and more as `docs/results-schema.md` says; its `repr` is a table.

    ```python
    >>> found = fas.evaluate(model, texts)
    >>> found.report("report")  # results.json, report.html, plots
    >>> found.card("my-spiking-model", license="mit")  # README.md, in the folder where the model was saved
    ```

    Attributes:
        configuration: All that the numbers depend on.
        command: What measured them.
    """

    def __init__(
        self, metrics: Mapping[str, Any], configuration: Mapping[str, Any] | None = None, command: str | Sequence = ""
    ):
        super().__init__(metrics)
        self.configuration, self.command = dict(configuration or {}), command

    @property
    def gap_closed(self) -> float | None:
        """Share of the gap between the uncalibrated network and its ANN that calibration closed, where it is known."""
        gap = self.get("gap")
        return None if gap is None else gap["closed"]

    @property
    def results(self) -> dict[str, Any]:
        """As a results file has it."""
        return results_of(dict(self), self.configuration, self.command, status="complete")

    def plot(self, name: str = "quality") -> Any:
        """Draw one figure of the report.

        Args:
            name: `"quality"`, `"energy"`, `"raster"`, `"spike_rate"` or `"spike_rate_histogram"`.

        Returns:
            A figure of matplotlib, which a notebook shows.

        Raises:
            ValueError: for a figure that was not measured.
        """
        from .plots import figures

        results = {"metrics": self}
        known = figures(results)
        if name not in known:
            raise ValueError(f"`name` must be one of {', '.join(known)}, got {name!r}.")
        draw, _ = known[name]
        return draw(results)

    def report(self, folder: str | os.PathLike) -> Path:
        """Write `results.json`, `report.html`, `report.md` and the plots into a folder; returns the page's path.

        Args:
            folder: Made if need be; files of an earlier report are replaced.
        """
        from .report import write_report  # which takes a second to import, for matplotlib

        return write_report(self, folder)

    def card(
        self,
        folder: str | os.PathLike | None = None,
        repo_id: str | None = None,
        *,
        license: str | None = None,
        language: Sequence[str] | None = None,
        base_model: str | None = None,
    ) -> Any:
        """Make the model card; with a folder, write it as `README.md` there, and its figures as `report/results.json`.

        Args:
            folder: Where the model was saved: what else it holds (training records, calibration) stands in the card.
            repo_id: `user/name` on the Hub, for the card's snippet; by default `your-name/` and the folder's name.
            license: Of the weights, `license` in the card's head; by default that of a card that is there.
            language: ISO codes.
            base_model: Name of the base model on the Hub, where no record has one.

        Returns:
            A `huggingface_hub.ModelCard`.

        Raises:
            ValueError: for a folder that is no checkpoint, or holds other weights than those that were measured.
        """
        from ..publish.card import CardOptions, build_card
        from ..publish.cards import card_beside
        from ..publish.records import Record, Sources

        options = CardOptions(license=license, language=language, base_model=base_model)
        if folder is not None:
            repo_id = repo_id or f"your-name/{Path(folder).resolve().name}"
            return card_beside(Path(folder), self.results, repo_id, options)
        sources = Sources(self.configuration["config"], [Record(RESULTS_FILE, self.results)])
        return build_card(sources, repo_id or "your-name/your-model", options)

    def __repr__(self) -> str:
        return summary(self)

    _repr_markdown_ = __repr__


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Name of the quality that plots show and gaps are told in.

    Raises:
        ValueError: for a quality of no known name.
    """
    known = [name for name in HEADLINES if name in rows[0]["quality"]]
    if not known:
        raise ValueError(f"a quality of none of {', '.join(HEADLINES)}")
    return known[0]


def run_name(row: Mapping[str, Any]) -> str:
    """What a row is called in tables."""
    return f"{row['schedule']} T = {row['T']}" if row["T"] else mode_name(row)


def gap_of(ann: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What calibration closed of the gap between a spiking network and its ANN.

    Args:
        ann: Row of the ANN.
        before: Row of the network without calibration, at the T and schedule of `after`.
        after: Row of the calibrated network.

    Returns:
        `metric`, the qualities `ann`, `uncalibrated` and `calibrated`, and `closed`, the share of the gap: None where
        the uncalibrated network is no worse than the ANN; and the same of the error of the outputs, which is 0 for the
        ANN: `error_uncalibrated`, `error_calibrated`, `error_closed`.
    """
    metric = headline([ann])
    wanted, first, last = (row["quality"][metric] for row in (ann, before, after))
    worse = first > wanted if metric in LOWER_IS_BETTER else first < wanted
    errors = before["logit_error"], after["logit_error"]
    return {
        "T": after["T"],
        "schedule": after["schedule"],
        "metric": metric,
        "ann": wanted,
        "uncalibrated": first,
        "calibrated": last,
        "closed": gap_closed(wanted, first, last) if worse else None,
        "error_uncalibrated": errors[0],
        "error_calibrated": errors[1],
        "error_closed": 1 - errors[1] / errors[0] if errors[0] > 0 else None,
    }


def told(gap: Mapping[str, Any]) -> str:
    """A gap in a sentence."""
    metric = gap["metric"].replace("_", " ")
    values = f"ANN {gap['ann']:.4g}, uncalibrated {gap['uncalibrated']:.4g}, calibrated {gap['calibrated']:.4g}"
    closed = "has no gap to close" if gap["closed"] is None else f"closes {100 * gap['closed']:.0f} % of the gap"
    errors = f"error of the outputs {gap['error_uncalibrated']:.3f}, then {gap['error_calibrated']:.3f}"
    return f"Calibration ({gap['schedule']}, T = {gap['T']}) {closed} in {metric} ({values}; {errors})."


def summary(metrics: Mapping[str, Any]) -> str:
    """The rows as a table of what matters, and the gap where it is known."""
    rows = []
    for row in metrics["rows"]:
        quality = {name: value for name, value in row["quality"].items() if name not in NO_METRIC}
        cells = {"run": run_name(row), **{name.replace("_", " "): value for name, value in quality.items()}}
        energy = row.get("energy", {})
        rate = {
            "agreement": row.get("agreement"),
            "spike rate": row.get("spike_rate"),
            "energy, of ANN": energy.get("ratio"),
            "weights read, of ANN": energy.get("reads_ratio"),
        }
        rows.append(escaped_row({**cells, **{name: value for name, value in rate.items() if name not in cells}}))
    digits = {name: 2 if name == "perplexity" else 3 for row in rows for name in row}
    shown = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row[name] is not None for row in rows)
    ]
    table = markdown_table(rows, shown, digits)
    return f"{table}\n\n{told(metrics['gap'])}" if metrics.get("gap") else table
