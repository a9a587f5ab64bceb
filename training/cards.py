"""The model card of a checkpoint, written from its results files and its configuration, never by hand.

`python -m training.cards FOLDER REPO_ID CARD.md` writes one without publishing anything.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.clean_load import auto_class_name
from training.results import markdown_table, read_results


TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}
# Columns of a row of results that are no measure of quality.
NO_METRIC = {"mode", "T", "schedule", "split", "seconds", "epoch", "loss", "samples", "tokens"}
COST = ("spike_rate", "energy_ratio", "energy_pj", "effective_macs", "effective_acs", "latency")
METRIC_NAMES = {
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}
RECORDED = (
    ("per_device_train_batch_size", "batch"),
    ("gradient_accumulation_steps", "accumulation"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "steps"),
    ("learning_rate", "learning rate"),
    ("threshold_learning_rate", "threshold learning rate"),
    ("seed", "seed"),
)
SETTINGS = ("L", "T", "schedule", "calib_T", "granularity", "initial_threshold", "fas_version", "transformers_version")


@dataclass
class CardOptions:
    """What no results file knows; each is taken from an existing card, of the folder or of its base, if not given."""

    license: str | None = None
    language: Sequence[str] | None = None
    base_model: str | None = None


@dataclass
class Record:
    """A results file of a checkpoint."""

    file: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its measurements at one T and schedule each."""
        metrics = self.content.get("metrics")
        if isinstance(metrics, Mapping):
            metrics = metrics.get("rows")
        return [row for row in metrics or [] if isinstance(row, Mapping) and "T" in row]  # type: ignore[misc]

    def setting(self, part: str, name: str) -> Any:
        """One setting of the run, or None."""
        return ((self.content.get("configuration") or {}).get(part) or {}).get(name)


def read_records(folder: Path) -> list[Record]:
    """The results files of a folder: JSON objects with `metrics` and `configuration`."""
    records = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"metrics", "configuration"} <= content.keys():
            records.append(Record(path.name, content))
    return records


def lineage(folder: Path) -> Iterator[Record]:
    """The training record of a folder and of those it started from, newest first, as far as they are on this disk."""
    seen = set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        record = next((each for each in read_records(folder) if each.setting("training", "seed") is not None), None)
        if record is None:
            return
        yield record
        folder = Path(record.setting("model", "model_name_or_path") or "")


def write_card(folder: str | os.PathLike, repo_id: str, options: CardOptions, pinned: str | None = None) -> ModelCard:
    """Write the `README.md` of a checkpoint folder.

    Args:
        folder: With `config.json` and results files.
        repo_id: Where it is to be published.
        options: What no results file knows.
        pinned: Commit that the snippet names, once there is one.
    """
    card = build_card(Path(folder), repo_id, options, pinned)
    card.save(Path(folder) / "README.md")
    return card


def build_card(folder: Path, repo_id: str, options: CardOptions, pinned: str | None = None) -> ModelCard:
    """The card of a checkpoint folder; see [`write_card`]."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    records, history = read_records(folder), list(lineage(folder))
    auto_class = auto_class_name(config)
    backbone = "GPT-2" if config["model_type"] == "fas_gpt2" else "BERT"
    data = card_data(repo_id, config, records, history, options)
    rows = [(record, row) for record in records for row in record.rows]
    position = config.get("granularity") == "position" and config.get("calib_T")
    limit = config["calib_length"] if position else config.get("n_positions") or config["max_position_embeddings"]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        backbone=backbone,
        task=PIPELINES[auto_class].replace("-", " "),
        base=data.base_model,
        auto_class=auto_class,
        revision=pinned or "main",
        pinned=pinned,
        mode=f', T={config["T"]}, schedule="{config["schedule"]}"' if config["T"] else ", T=4",
        sites=_sites(config),
        spikes=_what_spikes(backbone, auto_class),
        head={"GPT-2": "the language modelling head", "BERT": "the output layer"}[backbone],
        quality=_quality_table(rows),
        metrics_note=_sources(records),
        cost=_cost_table(rows),
        energy=_energy_constants(records) if any(row.get("energy_ratio") for _, row in rows) else "",
        calibration=_calibration(config, folder),
        record=_record_tables(history),
        settings=_settings(config),
        limit=f"Inputs of at most {limit} tokens{', generated ones included' if backbone == 'GPT-2' else ''}.",
    )


def card_data(
    repo_id: str, config: Mapping[str, Any], records: list[Record], history: list[Record], options: CardOptions
) -> ModelCardData:
    """The metadata of a card, with one evaluation result for each metric, T and schedule."""
    pipeline = PIPELINES[auto_class_name(dict(config))]
    backbone = config["model_type"].removeprefix("fas_")
    base = options.base_model or _hub_name(history[-1].setting("model", "model_name_or_path") if history else None)
    datasets = dict.fromkeys(name for record in history if (name := dataset_of(record)[0]) and "/" in name)
    results = [
        result
        for record in records
        for row in record.rows
        for result in _eval_results(record, row, pipeline, history[0] if history else record)
    ]
    return ModelCardData(
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        license=options.license,
        language=list(options.language) if options.language else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=list(datasets) or None,
        tags=["fas", "spiking-neural-network", "ann-snn-conversion", backbone, "custom_code"],
    )


def inherited_options(folder: Path, options: CardOptions) -> CardOptions:
    """The options, with what is missing taken from the card in the folder, then from that of its base model."""
    history = list(lineage(folder))
    base = history[-1].setting("model", "model_name_or_path") if history else None
    cards = [path / "README.md" for path in (folder, Path(base or "")) if path != Path()]
    known = [ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() for path in cards if path.is_file()]

    def first(name: str) -> Any:
        return next((data[name] for data in known if data.get(name)), None)

    language = options.language or first("language")
    # The base model named in the card of a base folder is the base of that base.
    own = known[0] if known and cards[0].is_file() else {}
    return CardOptions(
        license=options.license or first("license"),
        language=[language] if isinstance(language, str) else language,
        base_model=options.base_model or own.get("base_model"),
    )


def dataset_of(record: Record) -> tuple[str | None, str | None, str]:
    """Data set of a training record: name on the Hub (or the last part of a local path), configuration, title."""
    task, name = record.setting("data", "task_name"), record.setting("data", "dataset_name")
    config = record.setting("data", "dataset_config_name")
    if task:
        return "nyu-mll/glue", task, f"GLUE {task}"
    name = name or record.setting("data", "train_file") or record.setting("data", "validation_file")
    if not name:
        return None, None, "unnamed data"
    name = _hub_name(name) or Path(name).stem
    return name, config, f"{name} {config}" if config else name


def _hub_name(name: str | None) -> str | None:
    """`name` if it is one on the Hub rather than a path on this machine."""
    plain = name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    return name if plain and not os.path.exists(str(name)) else None


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    measured = {key: value for key, value in row.items() if isinstance(value, int | float) and key not in COST}
    return {key: value for key, value in measured.items() if key not in NO_METRIC} or (
        {"loss": row["loss"]} if "loss" in row else {}
    )


def _eval_results(record: Record, row: Mapping[str, Any], pipeline: str, trained: Record) -> Iterator[EvalResult]:
    dataset, dataset_config, title = dataset_of(record if record.setting("data", "task_name") else trained)
    when = f"T = {row['T']}, {row['schedule']}" if row["T"] else "T = 0, ANN"
    for metric, value in _metrics(row).items():
        yield EvalResult(
            task_type=pipeline,
            dataset_type=dataset or "unnamed",
            dataset_name=title,
            dataset_config=dataset_config,
            dataset_split=row.get("split", "validation"),
            metric_type=metric,
            metric_value=value,
            metric_name=f"{METRIC_NAMES.get(metric, metric)} ({when})",
            metric_args={"T": row["T"], "schedule": row.get("schedule")},
        )


def _quality_table(rows: list[tuple[Record, dict[str, Any]]]) -> str:
    metrics = dict.fromkeys(metric for _, row in rows for metric in _metrics(row))
    splits = {row.get("split") for _, row in rows if _metrics(row)}
    columns = ["mode", "T", "schedule"] + (["split"] if len(splits) > 1 else [])
    table = [{key: row.get(key) for key in (*columns, *metrics)} for _, row in rows if _metrics(row)]
    unique = list({json.dumps(row, sort_keys=True): row for row in table}.values())
    digits = {metric: 2 if metric == "perplexity" else 4 for metric in metrics}
    return markdown_table(unique, [*columns, *metrics], digits) if unique else ""


def _cost_table(rows: list[tuple[Record, dict[str, Any]]]) -> str:
    table: dict[tuple, dict[str, Any]] = {}
    for _, row in rows:
        found = {key: row[key] for key in COST if row.get(key) is not None}
        if row["T"] and found:
            key = (row["T"], row.get("schedule"))
            table[key] = {"T": row["T"], "schedule": row.get("schedule")} | found | table.get(key, {})
    return markdown_table(table.values()) if table else ""


def _sources(records: list[Record]) -> str:
    files = [f"`{record.file}`" for record in records if record.rows]
    return f"From {' and '.join(files)} in this repository, where every figure stands in full." if files else ""


def _energy_constants(records: list[Record]) -> str:
    for record in records:
        constants = (record.content.get("configuration") or {}).get("energy")
        if isinstance(constants, Mapping):
            named = ", ".join(f"{key} {value}" for key, value in constants.items() if isinstance(value, int | float))
            return f"Constants in picojoule: {named}."
    return "The constants stand in the results file."


def _calibration(config: Mapping[str, Any], folder: Path) -> str:
    if config.get("calib_T") is None:
        return ""
    text = f"Calibrated for T = {config['calib_T']} at granularity `{config['granularity']}`."
    path = folder / "calibration.json"
    if not path.is_file():
        return text
    metrics = read_results(path).get("metrics")
    sites = metrics.get("sites") if isinstance(metrics, Mapping) else metrics
    if not isinstance(sites, list) or not all(isinstance(site, Mapping) for site in sites):
        return f"{text} What it did stands in `calibration.json`."
    return f"{text} By site, from `calibration.json`:\n\n{markdown_table(sites)}"


def _record_tables(history: list[Record]) -> str:
    """The stages a checkpoint went through, oldest first, and what the last one ran on."""
    if not history:
        return ""
    stages = []
    for record in reversed(history):
        row = {"stage": record.setting("model", "stage"), "data": dataset_of(record)[2]}
        row |= {title: record.setting("training", name) for name, title in RECORDED}
        stages.append({key: (None if value == -1 else value) for key, value in row.items()})
    last = history[0].content
    versions = ", ".join(f"{name} {version}" for name, version in (last.get("versions") or {}).items())
    hardware = ", ".join(f"{key}: {value}" for key, value in (last.get("hardware") or {}).items())
    lines = [
        markdown_table(_without_empty_columns(stages), digits=6),
        "",
        f"- Commit of the code: {last.get('commit') or 'not recorded'}; date: {last.get('date')}",
        f"- Versions: {versions}",
        f"- Hardware: {hardware}",
        f"- Command: `{_without_paths(last.get('command') or 'not recorded')}`",
    ]
    return "\n".join(lines)


def _without_empty_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    full = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in full} for row in rows]


def _without_paths(command: str) -> str:
    return re.sub(r"(?<![\w.])(?:~|\.{0,2})/(?:[^\s/'\"]+/)*", "", command).replace("`", "'")


def _settings(config: Mapping[str, Any]) -> str:
    settings = (f"`{key}` = {config[key]}" for key in SETTINGS if config.get(key) is not None)
    return f"Configuration: {', '.join(settings)}."


def _sites(config: Mapping[str, Any]) -> int:
    if config["model_type"] == "fas_gpt2":
        return config["n_layer"]
    return config["num_hidden_layers"] + 1  # the pooler, or the head's transform


def _what_spikes(backbone: str, auto_class: str) -> str:
    if backbone == "GPT-2":
        return "the activation in the MLP of every block"
    last = "the masked-LM head's transform" if auto_class == "AutoModelForMaskedLM" else "the pooler"
    return f"the activation in the MLP of every layer and that of {last}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.cards", description="Write the card of a checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo_id")
    parser.add_argument("card", type=Path, help="file to write")
    parser.add_argument("--license")
    parser.add_argument("--language", nargs="+")
    parser.add_argument("--base-model")
    args = parser.parse_args(argv)
    options = CardOptions(license=args.license, language=args.language, base_model=args.base_model)
    build_card(args.folder, args.repo_id, inherited_options(args.folder, options)).save(args.card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
