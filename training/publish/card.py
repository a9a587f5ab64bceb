"""The model card of a checkpoint, written from its results files and its configuration, never by hand."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_fas import BACKBONES, Backbone

from ..results import MODES, code, escaped, escaped_row, flat, markdown_table, without_paths
from .clean_load import auto_class_name
from .files import VerificationError
from .records import Record, Sources, lineage


TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
}
# What `quality` holds beside measures; the loss is one where there is no other.
NO_METRIC = {"loss", "examples", "tokens"}
COST = ("spike_rate", "energy_ratio")
METRIC_NAMES = {
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}
RECORDED = {
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "learning_rate": "learning rate",
    "threshold_learning_rate": "threshold learning rate",
    "site_weight": "site weight",
    "seed": "seed",
}
SETTINGS = ("L", "T", "schedule", "calib_T", "granularity", "initial_threshold", "fas_version", "transformers_version")


# Sites outside of blocks, by their group: what a card calls them, and the Auto classes whose models have them.
OUTER_SITES = {
    "pooler": ("the pooler", ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMultipleChoice")),
    "transform": ("the masked-LM head's transform", ("AutoModelForMaskedLM",)),
}


@dataclass
class CardOptions:
    """What no results file knows; each is taken from an existing card, of the folder or of its base, if not given."""

    license: str | None = None
    language: Sequence[str] | None = None
    base_model: str | None = None


def build_card(sources: Sources, repo_id: str, options: CardOptions, pinned: str | None = None) -> ModelCard:
    """The card of a checkpoint.

    Args:
        sources: Where its figures come from.
        repo_id: Where it is to be published.
        options: What no results file knows.
        pinned: Commit that the snippet names, once there is one.

    Raises:
        VerificationError: if a file does not hold what the card is made from.
    """
    try:
        return _build_card(sources, repo_id, options, pinned)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise VerificationError(
            f"`config.json` and the results files must hold what a card is made from, got {error!r}. Save the model "
            "and evaluate it again."
        ) from error


def _build_card(sources: Sources, repo_id: str, options: CardOptions, pinned: str | None) -> ModelCard:
    config, history = sources.config, sources.history
    measured = next((record for record in sources.records if record.rows), None)
    rows = measured.rows if measured else []
    auto_class = auto_class_name(config)
    table = BACKBONES[config["model_type"].removeprefix("fas_")]
    data = card_data(repo_id, config, rows, history, options)
    position = config.get("granularity") == "position" and config.get("calib_T")
    limit = config.get("n_positions") or config["max_position_embeddings"] + (table.positions or 0)
    limit = config["calib_length"] if position else limit
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        backbone=table.title,
        task=PIPELINES[auto_class].replace("-", " "),
        base=data.base_model,
        auto_class=auto_class,
        revision=pinned or "main",
        pinned=pinned,
        mode=f', T={config["T"]}, schedule="{config["schedule"]}"' if config["T"] else ", T=4",
        sites=_sites(config, table, auto_class),
        spikes=_what_spikes(table, auto_class),
        head="the language modelling head" if auto_class == "AutoModelForCausalLM" else "the output layer",
        quality=_quality_table(rows),
        source=measured.file if measured else "",
        cost=_cost_table(rows),
        energy=_energy_constants(measured) if any("energy" in row for row in rows) else "",
        calibration=_calibration(config, sources.calibration),
        record=_record_tables(history),
        settings=_settings(config),
        code=sources.code,
        limit=f"Inputs of at most {limit} tokens{', generated ones included' if table.causal else ''}.",
    )


def card_data(
    repo_id: str,
    config: Mapping[str, Any],
    rows: list[dict[str, Any]],
    history: list[Record],
    options: CardOptions,
) -> ModelCardData:
    """The metadata of a card, with one evaluation result for each metric, T and schedule."""
    pipeline = PIPELINES[auto_class_name(dict(config))]
    base = options.base_model or _hub_name(history[-1].setting("model", "model_name_or_path") if history else None)
    datasets = dict.fromkeys(name for record in history if (name := dataset_of(record)[0]) and "/" in name)
    dataset = dataset_of(history[0]) if history else (None, None, "unnamed data")
    results = [result for row in rows for result in _eval_results(row, pipeline, *dataset)]
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
        tags=[
            "fas",
            "spiking-neural-network",
            "ann-snn-conversion",
            config["model_type"].removeprefix("fas_"),
            "custom_code",
        ],
    )


def inherited_options(folder: Path, options: CardOptions) -> CardOptions:
    """The options, with what is missing taken from the card in the folder, then from that of its base model."""
    history = list(lineage(folder))
    base = Path(str(history[-1][1].setting("model", "model_name_or_path") or "")) if history else Path()
    own, others = _card_of(folder), [_card_of(base)] if base != Path() else []

    def first(name: str) -> Any:
        return next((data[name] for data in (own, *others) if data.get(name)), None)

    language = options.language or first("language")
    return CardOptions(
        license=options.license or first("license"),
        language=[language] if isinstance(language, str) else language,
        base_model=options.base_model or own.get("base_model"),  # the base of the base is another
    )


def _card_of(folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except (ValueError, OSError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise VerificationError(
            f"`README.md` in {str(folder)!r} must be a model card, got {' '.join(str(error).split())}. Mend its "
            "head, or remove it: a new one is written."
        ) from error


def dataset_of(record: Record) -> tuple[str | None, str | None, str]:
    """Data set of a training record: name on the Hub (or of the local folder), configuration, title."""
    names = ("task_name", "dataset_name", "dataset_config_name")
    task, name, config = (None if (found := record.setting("data", each)) is None else str(found) for each in names)
    if task:
        return "nyu-mll/glue", task, f"GLUE {task}"
    name = name or record.setting("data", "train_file") or record.setting("data", "validation_file")
    if not name:
        return None, None, "unnamed data"
    if _hub_name(name):
        return name, config, f"{name} {config}" if config else name
    path = Path(str(name))
    name = path.parent.name if path.suffix else path.name
    return name, config, f"{name} {config} (local files)" if config else f"{name} (local files)"


def _hub_name(name: Any) -> str | None:
    """`name` if it is one on the Hub rather than a path on this machine."""
    plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    return name if plain and not os.path.exists(str(name)) else None


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The measures of quality in a row; the loss only where there is nothing else."""
    quality = row["quality"]
    chosen = {name: value for name, value in quality.items() if name not in NO_METRIC}
    chosen = chosen or {name: quality[name] for name in ("loss",) if name in quality}
    return chosen | ({"agreement": row["agreement"]} if row.get("agreement") is not None else {})


def _eval_results(
    row: Mapping[str, Any], pipeline: str, dataset: str | None, dataset_config: str | None, title: str
) -> Iterator[EvalResult]:
    if row["mode"] == "stock":
        return
    when = f"T = {row['T']}, {row['schedule']}" if row["T"] else "T = 0, ANN"
    for metric, value in _metrics(row).items():
        yield EvalResult(
            task_type=pipeline,
            dataset_type=dataset or "unnamed",
            dataset_name=title,
            dataset_config=dataset_config,
            dataset_split=row["split"],
            metric_type=metric,
            metric_value=value,
            metric_name=f"{METRIC_NAMES.get(metric, metric)} ({when})",
            metric_args={"T": row["T"], "schedule": row["schedule"]},
        )


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return escaped_row(flat(row) | {"mode": MODES[row["mode"]]})


def _quality_table(rows: list[dict[str, Any]]) -> str:
    metrics = list(dict.fromkeys(escaped(metric) for row in rows for metric in _metrics(row)))
    split = ["split"] if len({row["split"] for row in rows}) > 1 else []
    digits = {metric: 2 if metric == "perplexity" else 4 for metric in metrics}
    return markdown_table(map(_cells, rows), ["mode", "T", "schedule", *split, *metrics], digits) if metrics else ""


def _cost_table(rows: list[dict[str, Any]]) -> str:
    cells = [_cells(row) for row in rows]
    columns = [name for name in COST if any(row.get(name) is not None for row in cells)]
    table = [
        {key.replace("_", " "): row.get(key) for key in ("mode", "T", "schedule", *columns)}
        for row in cells
        if any(row.get(name) is not None for name in columns)
    ]
    return markdown_table(table) if table else ""


def _energy_constants(record: Record | None) -> str:
    configuration = record.content["configuration"] if record else {}
    if "mac_pj" not in configuration:
        return "The constants stand in the results file."
    prices = [escaped(configuration.get(name)) for name in ("mac_pj", "ac_pj")]
    return f"A multiply-accumulate counts {prices[0]} pJ, an accumulate {prices[1]} pJ."


def _calibration(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    if config.get("calib_T") is None:
        return ""
    text = f"Calibrated for T = {config['calib_T']} at granularity `{config['granularity']}`."
    own = {"T": config["calib_T"], "granularity": config["granularity"]}
    if record and (other := {name: record.get(name) for name in own}) != own:
        raise VerificationError(
            f"`calibration.json` must be of the calibration in config.json, {own}, got {other}. Calibrate again, or "
            "remove the file."
        )
    stages = record.get("stages") if record else None
    if not stages:
        return text
    last = list(stages.values())[-1]
    rows = [
        {"site": code(site)}
        | {f"error, {escaped(stage)}": sites[site]["error"] for stage, sites in stages.items()}
        | {"scale": last[site]["scale"], "initial potential": last[site]["initial_potential"]}
        for site in last
    ]
    return (
        f"{text} From `calibration.json`: the mean squared error of every site against the ANN after each stage, and "
        f"the mean of its fine thresholds (over the threshold) and of its initial potentials.\n\n"
        f"{markdown_table(rows, digits=5)}"
    )


def _record_tables(history: list[Record]) -> str:
    """The stages a checkpoint went through, oldest first, and what the last one ran on."""
    if not history:
        return ""
    stages = []
    for record in reversed(history):
        row = {"stage": record.setting("model", "stage"), "data": dataset_of(record)[2]}
        row |= {title: record.setting("training", name) for name, title in RECORDED.items()}
        if row["stage"] == "calibrate":
            row[RECORDED["learning_rate"]] = None  # of the weights, which are frozen
        stages.append(escaped_row({key: None if value == -1 else _short(value) for key, value in row.items()}))
    last = history[0].content
    versions = ", ".join(escaped(f"{name} {version}") for name, version in (last.get("versions") or {}).items())
    hardware = ", ".join(escaped(f"{key}: {value}") for key, value in (last.get("hardware") or {}).items())
    lines = [
        markdown_table(_without_empty_columns(stages)),
        "",
        f"- Commit of the code: {escaped(last.get('commit') or 'not recorded')}; date: {escaped(last.get('date'))}",
        f"- Versions: {versions}",
        f"- Hardware: {hardware}",
        f"- Command: {code(without_paths(str(last.get('command') or 'not recorded')))}",
    ]
    return "\n".join(lines)


def _short(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _without_empty_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    full = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in full} for row in rows]


def _settings(config: Mapping[str, Any]) -> str:
    settings = (f"`{key}` = {escaped(config[key])}" for key in SETTINGS if config.get(key) is not None)
    return f"Configuration: {', '.join(settings)}."


def _outer_sites(table: Backbone, auto_class: str) -> list[str]:
    """What the sites of a model outside of its blocks are called."""
    return [OUTER_SITES[site.group][0] for site in table.outer_sites if auto_class in OUTER_SITES[site.group][1]]


def _sites(config: Mapping[str, Any], table: Backbone, auto_class: str) -> int:
    blocks = next(config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config)
    return blocks * len(table.sites) + len(_outer_sites(table, auto_class))


def _what_spikes(table: Backbone, auto_class: str) -> str:
    """What the neurons stand in for."""
    site = table.sites[0]
    inner = "in place of the activation in the MLP of every block"
    if site.at == "input":
        inner = f"at the input of `{site.path}` in every block{', with spikes of both signs' if site.signed else ''}"
    return " and ".join([inner, *(f"of that of {name}" for name in _outer_sites(table, auto_class))])
