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

from ..evaluate.evaluation import NO_METRIC
from ..results import code, escaped, escaped_row, flat, markdown_table, mode_name, without_paths
from .clean_load import auto_class_name
from .files import VerificationError
from .records import GENERIC_NAMES, Record, Sources, read_sources


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
COST = ("spike_rate", "energy_ratio", "reads_ratio")
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
    commands: Sequence[str] = ()  # that make the checkpoint again


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
    data = card_data(repo_id, sources, measured, options)
    position = config.get("granularity") == "position" and config.get("calib_T")
    limit = config.get("n_positions") or config["max_position_embeddings"] + (table.positions or 0)
    limit = config["calib_length"] if position else limit
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        converted=bool(sources.conversion),
        levels=config.get("L"),
        rate=config.get("code", "rate") == "rate",
        repo_id=repo_id,
        backbone=table.title,
        task=PIPELINES[auto_class].replace("-", " "),
        base=data.base_model or _local_base(sources),
        auto_class=auto_class,
        revision=pinned or "main",
        pinned=pinned,
        mode=f', T={config["T"]}, schedule="{config["schedule"]}"' if config["T"] else ", T=4",
        spikes=_what_spikes(config, table, auto_class),
        rest=_what_does_not(config, auto_class),
        quality=_quality_table(measured, bool(sources.conversion)),
        source=measured.file if measured else "",
        cost=_cost_table(rows),
        energy=_energy_constants(rows),
        reads=any("reads_ratio" in row.get("energy", {}) for row in rows),
        calibration=_calibration(config, sources.calibration),
        record=_record_tables(history) or _conversion(sources.conversion),
        settings=_settings(config),
        weights=measured and measured.content["configuration"].get("weights_sha256"),
        commands=options.commands,
        code=sources.code,
        limit=f"Inputs of at most {limit} tokens{', generated ones included' if table.causal else ''}.",
    )


def card_data(repo_id: str, sources: Sources, measured: Record | None, options: CardOptions) -> ModelCardData:
    """The metadata of a card, with one evaluation result for each metric, T and schedule.

    Args:
        repo_id: Where it is to be published.
        sources: Where its figures come from.
        measured: The record whose rows it shows.
        options: What no results file knows.
    """
    config, history = sources.config, sources.history
    pipeline = PIPELINES[auto_class_name(dict(config))]
    base = options.base_model or _hub_name(_base(sources))
    datasets = dict.fromkeys(name for record in history if (name := dataset_of(record)[0]) and "/" in name)
    results = []
    if measured:
        results = [each for row in measured.rows for each in _eval_results(row, pipeline, *measured_on(measured))]
    return ModelCardData(
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        license=options.license,
        language=list(options.language) if options.language else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=base,
        base_model_relation=("quantized" if sources.conversion else "finetune") if base else None,
        datasets=list(datasets) or None,
        tags=[
            "fas",
            "spiking-neural-network",
            "ann-snn-conversion",
            config["model_type"].removeprefix("fas_"),
            "custom_code",
        ],
    )


def _base(sources: Sources) -> Any:
    """The model that the first stage started from, or that was converted: a name on the Hub, or a path."""
    if sources.conversion:
        return sources.conversion.content["configuration"].get("model")
    return sources.history[-1].setting("model", "model_name_or_path") if sources.history else None


def _local_base(sources: Sources) -> str | None:
    """What a base model that is a local folder is called: its name, with the one above where that says little."""
    base = _base(sources)
    if not isinstance(base, str) or not base.strip("./…"):
        return None
    parts = [part for part in Path(base).parts if part not in ("/", "..", ".", "~", "…")]
    return f"{code('/'.join(parts[-2:] if parts[-1] in GENERIC_NAMES else parts[-1:]))} (a local folder)"


def inherited_options(folder: Path, options: CardOptions) -> CardOptions:
    """The options, with what is missing taken from the card in the folder, then from that of its base model."""
    base = Path(str(_base(read_sources(folder)) or ""))
    own, others = _card_of(folder), [_card_of(base)] if base != Path() else []

    def first(name: str) -> Any:
        return next((data[name] for data in (own, *others) if data.get(name)), None)

    language = options.language or first("language")
    return CardOptions(
        license=options.license or first("license"),
        language=[language] if isinstance(language, str) else language,
        base_model=options.base_model or own.get("base_model"),  # the base of the base is another
        commands=options.commands,
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
    """Data set that a record trained on: name on the Hub (or of the local file), configuration, title."""
    return _dataset(record, "train_file", "validation_file")


def measured_on(record: Record) -> tuple[str | None, str | None, str]:
    """Data set that the rows of a record were measured on, in the same way."""
    return _dataset(record, "validation_file", "train_file")


def _dataset(record: Record, *files: str) -> tuple[str | None, str | None, str]:
    names = ("task_name", "dataset_name", "dataset_config_name", *files)
    data = record.content["configuration"].get("data")
    if not isinstance(data, Mapping):
        data = record.content["configuration"] if record.is_conversion else {}
    found = {name: None if data.get(name) is None else str(data[name]) for name in names}
    file = next((found[name] for name in files if found[name]), None)
    if found["task_name"] and not file and not found["dataset_name"]:
        return "nyu-mll/glue", found["task_name"], f"GLUE {found['task_name']}"
    name, config = found["dataset_name"] or file, found["dataset_config_name"]
    if not name and record.is_conversion:
        return _dataset_name(str(data.get("calibration_file")), None)
    return _dataset_name(name, config) if name else (None, None, "unnamed data")


def _dataset_name(name: str, config: str | None) -> tuple[str, str | None, str]:
    if _hub_name(name):
        return name, config, f"{name} {config}" if config else name
    name = Path(name).name
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
    count = _count(row)
    for metric, value in _metrics(row).items():
        yield EvalResult(
            task_type=pipeline,
            dataset_type=dataset or "unnamed",
            dataset_name=title,
            dataset_config=dataset_config,
            dataset_split=row["split"],
            dataset_args={"rows": count} if count else None,
            metric_type=metric,
            metric_value=value,
            metric_name=f"{METRIC_NAMES.get(metric, metric)} ({when})",
            metric_args={"T": row["T"], "schedule": row["schedule"]},
        )


def _count(row: Mapping[str, Any]) -> str | None:
    """What a row was measured on, in numbers."""
    quality = row["quality"]
    return next((f"{quality[name]} {name}" for name in ("examples", "tokens") if name in quality), None)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    reads = row.get("energy", {}).get("reads_ratio")
    return escaped_row(flat(row) | {"mode": mode_name(row), "reads_ratio": reads})


def _quality_table(measured: Record | None, converted: bool) -> str:
    rows = measured.rows if measured else []
    if converted and any(row["mode"] == "stock" for row in rows):
        rows = [row for row in rows if row["mode"] != "qcfs"]  # the same network again
    metrics = list(dict.fromkeys(escaped(metric) for row in rows for metric in _metrics(row)))
    if measured is None or not metrics:
        return ""
    digits = {metric: 2 if metric == "perplexity" else 4 for metric in metrics}
    title = escaped(measured_on(measured)[2])
    cells = [_cells(row) | {"data": title, "measured on": _count(row)} for row in rows]
    columns = ["mode", "T", "schedule", *metrics, "data", "split", "measured on"]
    return markdown_table(
        _without_empty_columns([{name: row.get(name) for name in columns} for row in cells]), None, digits
    )


def _cost_table(rows: list[dict[str, Any]]) -> str:
    cells = [_cells(row) for row in rows]
    columns = [name for name in COST if any(row.get(name) is not None for row in cells)]
    table = [
        {key.replace("_", " "): row.get(key) for key in ("mode", "T", "schedule", *columns)}
        for row in cells
        if any(row.get(name) is not None for name in columns)
    ]
    return markdown_table(table) if table else ""


def _energy_constants(rows: Sequence[Mapping[str, Any]]) -> str:
    energy = next((row["energy"] for row in rows if "energy" in row), None)
    if energy is None:
        return ""
    if "mac_pj" not in energy:
        return "The constants stand in the results file."
    return f"A multiply-accumulate counts {energy['mac_pj']} pJ, an accumulate {energy['ac_pj']} pJ."


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
        trained = record.content.get("training")
        if isinstance(trained, Mapping) and trained.get("epoch") is not None:
            row[RECORDED["num_train_epochs"]] = round(float(trained["epoch"]), 2)  # those trained, not those asked for
        stages.append(escaped_row({key: None if value == -1 else _short(value) for key, value in row.items()}))
    return "\n".join([markdown_table(_without_empty_columns(stages)), "", *_made_with(history[0].content)])


def _conversion(record: Record | None) -> str:
    """How a network was converted without training, and what that ran on."""
    if record is None:
        return ""
    settings, metrics = record.content["configuration"], record.content["metrics"]
    seconds = metrics.get("conversion_seconds")
    took = f", in {seconds:.2f} s" if isinstance(seconds, int | float) else ""
    text = f"Converted without training: thresholds of least squared error on {escaped(settings['tokens'])} tokens of "
    text += f"{escaped(Path(str(settings['calibration_file'])).name)}{took}."
    kinds = [escaped_row({str(key): value for key, value in row.items()}) for row in metrics.get("kinds") or ()]
    table = [f"By kind of site, on the calibration:\n\n{markdown_table(kinds)}"] if kinds else []
    return "\n\n".join([text, *table, "\n".join(_made_with(record.content))])


def _made_with(last: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(escaped(f"{name} {version}") for name, version in (last.get("versions") or {}).items())
    hardware = ", ".join(escaped(f"{key}: {value}") for key, value in (last.get("hardware") or {}).items())
    return [
        f"- Commit of the code: {escaped(last.get('commit') or 'not recorded')}; date: {escaped(last.get('date'))}",
        f"- Versions: {versions}",
        f"- Hardware: {hardware}",
        f"- Command: {code(without_paths(str(last.get('command') or 'not recorded')))}",
    ]


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


def _what_spikes(config: Mapping[str, Any], table: Backbone, auto_class: str) -> str:
    """Where the neurons stand, and what they send, in a sentence or two."""
    where = config.get("sites", "mlp")
    if where != "mlp":
        text = "Integrate-and-fire neuron sites stand at the input of every linear layer of every block"
        text += ", at the queries and the values of every attention" if where == "all" else ""
        text += " and at the input of the head" if auto_class != "AutoModel" else ""
        base = f" with base {config['code_base']:.4g}" if config.get("code") == "first_spike" else ""
        return (
            f"{text}. Their output is a train of spikes of both signs, in the code `{escaped(config.get('code'))}`"
            f"{base}, and the matrix product after each of them can be done by additions."
        )
    site = table.sites[0]
    inner = "in place of the activation in the MLP of every block"
    if site.at == "input":
        inner = f"at the input of `{site.path}` in every block{', with spikes of both signs' if site.signed else ''}"
    places = " and ".join([inner, *(f"of that of {name}" for name in _outer_sites(table, auto_class))])
    return (
        f"{_sites(config, table, auto_class)} integrate-and-fire neuron sites stand {places}. Their output is a train "
        "of spikes, each worth one threshold, and the matrix product after them can be done by additions."
    )


def _what_does_not(config: Mapping[str, Any], auto_class: str) -> str:
    """What works on real numbers, and when it runs."""
    if config.get("sites", "mlp") != "mlp":
        everything = "embeddings, the softmax of attention, layer norms, activations and residual connections"
    else:
        head = "the language modelling head" if auto_class == "AutoModelForCausalLM" else "the output layer"
        everything = (
            "embeddings, attention with its projections and its softmax, layer norms, residual connections and "
        )
        everything += head
    return f"Everything else works on real numbers as in the stock model: {everything}."
