"""What can be set on a command line or in a YAML file, and the checks that need no model and no data."""

import argparse
import difflib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .commands import LOCK_FILE, UsageError


STAGES = ("baseline", "full", "downstream", "calibrate")
SCRIPT_STAGES = {"clm": STAGES, "mlm": ("full", "baseline"), "glue": ("baseline", "downstream", "calibrate")}
# Head that a script trains.
AUTO_CLASSES = {
    "clm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "glue": "AutoModelForSequenceClassification",
}
# Learning rate of the thresholds by script and stage: those of the published code.
THRESHOLD_LEARNING_RATES = {
    ("clm", "full"): 1e-3,
    ("clm", "downstream"): 5e-3,
    ("clm", "calibrate"): 3e-3,
    ("mlm", "full"): 5e-3,
    ("glue", "downstream"): 0.05,
    ("glue", "calibrate"): 0.07,
}
# Of calibration by layer or neuron, measured (docs/calibration.md): learning rate, and weight of the site errors.
CALIBRATION_SETTINGS = {"clm": (0.05, 0.1), "glue": (0.05, 1.0)}
# Initial threshold by script, where neither the flag nor the checkpoint has one: those of the published code.
INITIAL_THRESHOLDS = {"clm": 2.0, "mlm": 1.24, "glue": 2.5}
MOST_LEVELS = 256
# Settings of training that are numbers of at least so much.
LEAST = {
    "learning_rate": 0,
    "threshold_learning_rate": 0,
    "site_weight": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
}
# Flags of TrainingArguments that a short help names.
MOST_USED = {"output_dir", "do_train", "do_eval", "learning_rate", "num_train_epochs", "max_steps", "warmup_steps"}
MOST_USED |= {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed"}
MOST_USED |= {"logging_steps", "report_to", "save_steps", "save_total_limit", "bf16", "use_cpu"}
MOST_USED |= {"resume_from_checkpoint", "gradient_checkpointing"}
# What says where data comes from, and with it what says how to read that: only as a whole do they make sense.
DATA_SOURCES = {"dataset_name", "train_file", "validation_file"}
DATA_SETTINGS = DATA_SOURCES | {"dataset_config_name", "task_name", "text_columns", "label_column", "eval_split"}
FILE_TYPES = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """Which model, and what makes it spiking."""

    stage: str = field(
        default="",
        metadata={
            "help": "baseline: the stock model as it is; full: QCFS on a large corpus; downstream: QCFS on the task; "
            "calibrate: fine thresholds for T timesteps.",
            "choices": ["", *STAGES],
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from: a stock or FAS one, a folder or a name on the Hub."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch with this configuration (folder, file or name on the Hub)."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to --config_name, as in n_embd=128,n_layer=2,n_head=4."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if not that of the model; may be a SentencePiece .model file."}
    )
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Accepted for published command lines."})
    L: int | None = field(default=None, metadata={"help": "Quantisation levels; the checkpoint's, or 8."})
    T: list[int] = field(
        default_factory=list, metadata={"help": "Timesteps to evaluate the spiking network at; several are allowed."}
    )
    calib_T: int | None = field(default=None, metadata={"help": "Timesteps to calibrate for."})
    granularity: str = field(
        default="neuron",
        metadata={"help": "Who shares a fine threshold.", "choices": ["layer", "neuron", "position"]},
    )
    coarse: str = field(
        default="search",
        metadata={
            "help": "Where calibration starts: search: thresholds and initial potentials found site by site on 64 "
            "rows of the training data; published: 0.6 and 0.2 of the threshold; none: as before calibration.",
            "choices": ["search", "published", "none"],
        },
    )
    initial_threshold: float | None = field(
        default=None, metadata={"help": "Threshold of a site for which the checkpoint has none."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Model that the spiking one learns from, at --stage full and downstream: a checkpoint with the "
            "same vocabulary or labels, the stock model as a rule. Its logits take the place of the labels."
        },
    )

    def check(self, script: str, do_eval: bool) -> None:
        """Raise for settings that contradict each other."""
        stages = SCRIPT_STAGES[script]
        self.stage = self.stage or ("full" if script == "mlm" else "downstream")
        if self.stage not in stages:
            raise ValueError(f"`--stage` must be one of {', '.join(stages)} for run_{script}, got {self.stage!r}.")
        if self.model_name_or_path is None and (self.config_name is None or self.stage == "calibrate"):
            raise ValueError(
                "`--model_name_or_path` is required: a checkpoint to start from. To train from scratch give "
                "--config_name and --tokenizer_name instead."
            )
        for name, value in (("L", self.L), ("calib_T", self.calib_T)):
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")
        if self.L is not None and self.L > MOST_LEVELS:
            raise ValueError(f"`--L` must be at most {MOST_LEVELS}, got {self.L}. Fewer do: 8 to 16, as a rule.")
        if any(T < 0 for T in self.T):
            raise ValueError(f"`--T` must hold numbers of timesteps, 0 or more, got {self.T}.")
        if any(self.T) and not do_eval:
            raise ValueError(
                f"`--T` names the timesteps of the spiking evaluation, got {self.T} without one. Add --do_eval, "
                "or drop --T."
            )
        if any(self.T) and self.stage == "baseline":
            raise ValueError(f"`--T` has no meaning at --stage baseline, which trains a stock model, got {self.T}.")
        if self.teacher and self.stage not in ("full", "downstream"):
            raise ValueError(
                f"`--teacher` is for --stage full and downstream, where a spiking model trains, got it at --stage "
                f"{self.stage}."
            )
        if self.stage == "calibrate" and self.calib_T is None:
            raise ValueError("`--calib_T` is required at --stage calibrate: the timesteps to calibrate for.")


@dataclass
class DataArguments:
    """Which data, and how much of it."""

    task_name: str | None = field(default=None, metadata={"help": "GLUE task."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset: a name on the Hub, or a local folder of parquet, csv or json files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration, or sub-folder, of it."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: txt, csv, json(l) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same type."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "Column of the text, or the two of a pair, if not the usual one."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest input in tokens; run_glue: 128."})
    block_size: int | None = field(default=None, metadata={"help": "Length of a training text; run_clm: up to 1024."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every input to --max_seq_length rather than to the longest of its batch."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to mask."})
    add_eos: bool = field(default=False, metadata={"help": "End every document with the end-of-text token."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training data to evaluate on where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training samples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many validation samples."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def check(self, script: str, do_train: bool, do_eval: bool) -> None:
        """Raise for a source that is missing, ambiguous, or no file."""
        files = {"train_file": self.train_file, "validation_file": self.validation_file}
        if not (self.dataset_name or self.task_name or any(files.values())):
            raise ValueError(
                "`--dataset_name` is required, or --train_file and --validation_file"
                + (", or --task_name." if script == "glue" else ".")
            )
        for name, value in files.items():
            if value is None:
                continue
            if Path(value).suffix not in FILE_TYPES:
                raise ValueError(f"`--{name}` must end in one of {', '.join(FILE_TYPES)}, got {value!r}.")
            if not Path(value).is_file():
                raise ValueError(f"`--{name}` must be a file that exists, got {value!r}.")
            if not Path(value).stat().st_size:
                raise ValueError(f"`--{name}` must hold rows, got the empty file {value!r}.")
        if any(files.values()):
            if self.dataset_name:
                raise ValueError(
                    f"`--dataset_name` and files exclude each other, got {self.dataset_name!r} and {files}."
                )
            for wanted, name in ((do_train, "train_file"), (do_eval and script == "glue", "validation_file")):
                if wanted and files[name] is None:
                    raise ValueError(f"`--{name}` is required beside the other file, for what is to be done.")
            if len({Path(value).suffix for value in files.values() if value}) > 1:
                raise ValueError(f"`--validation_file` must be of the same type as --train_file, got {files}.")
        source = self.dataset_name
        if source and re.match(r"[./~]", source) and not Path(source).expanduser().is_dir():
            raise ValueError(f"`--dataset_name` must be a folder that exists, got {source!r}.")
        if self.streaming and script == "glue":
            raise ValueError("`--streaming` is for run_clm and run_mlm; a GLUE task fits into memory.")
        for limit, least in (
            ("max_train_samples", 1),
            ("max_eval_samples", 1),
            ("max_seq_length", 2),
            ("block_size", 2),
        ):
            value = getattr(self, limit)
            if value is not None and value < least:
                raise ValueError(f"`--{limit}` must be at least {least}, got {value}.")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"`--mlm_probability` must be between 0 and 1, got {self.mlm_probability}.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"`--validation_split_percentage` must be between 0 and 100, got {self.validation_split_percentage}."
            )


@dataclass
class FASTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with what spiking models need and what transformers 5 dropped."""

    threshold_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of thresholds and initial potentials; by default by stage."}
    )
    site_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the error of the sites in the loss of --stage calibrate, beside 1 for that of the "
            "output; by default 0.1 for run_clm, 1 for run_glue."
        },
    )
    distillation_temperature: float | None = field(
        default=None, metadata={"help": "With --teacher: divides the logits of both models; 1 by default."}
    )
    distillation_alpha: float | None = field(
        default=None,
        metadata={"help": "With --teacher: weight of the loss of the task, beside 1 for the divergence from it; 0."},
    )
    hidden_weight: float | None = field(
        default=None,
        metadata={"help": "With --teacher: weight of the squared error of the hidden states; 0 by default."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in an output folder that is not empty; its checkpoints are deleted."},
    )
    allow_changed_resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from a checkpoint with other settings or data, or without its optimizer or random states. "
            "The result is then that of no uninterrupted run."
        },
    )
    group_by_length: bool = field(
        default=False, metadata={"help": "Make batches of rows of about the same length, so that little is padded."}
    )

    def __post_init__(self):
        for name in ("resume_from_checkpoint", "fsdp"):  # a path or options, or whether at all
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() in ("true", "false"):
                setattr(self, name, value.lower() == "true")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if self.group_by_length and hasattr(self, "train_sampling_strategy"):
            self.train_sampling_strategy = "group_by_length"
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()

    def check(self, streaming: bool) -> None:
        """Raise for a run that does nothing, has no end, or names no folder."""
        for name, least in LEAST.items():
            check_number(f"--{name}", getattr(self, name), least)
        if not (self.do_train or self.do_eval):
            raise ValueError("`--do_train` or `--do_eval` is required: there is nothing to do.")
        if streaming and self.do_train and self.max_steps <= 0:
            raise ValueError(
                "`--max_steps` is required with --streaming, whose length is not known, "
                f"got --max_steps {self.max_steps}."
            )
        if not self.output_dir or self.output_dir == "trainer_output":
            raise ValueError("`--output_dir` is required: the folder for the model, its checkpoints and results.")


def check_number(name: str, value: float | None, least: float) -> None:
    """Raise for a number that is not finite or too small; None is none."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ValueError(f"`{name}` must be {least} or more, got {value}.")


def check_empty(args: FASTrainingArguments) -> None:
    """Raise for an output folder that holds something and was not said to be used."""
    if args.do_train and not (args.overwrite_output_dir or args.resume_from_checkpoint):
        found = sorted(entry.name for entry in Path(args.output_dir or "").iterdir() if entry.name != LOCK_FILE)
        if found:
            raise ValueError(
                f"`--output_dir` must be empty, got {args.output_dir!r} with {', '.join(found[:3])}"
                f"{', …' if len(found) > 3 else ''}. Add --resume_from_checkpoint true to go on with the last "
                "complete checkpoint in it, --overwrite_output_dir to start anew, or choose another folder."
            )


def check_writable(folder: str) -> None:
    """Make the output folder; raise if it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`--output_dir` must be a folder that can be written to, got {folder!r}: {error.strerror}."
        ) from error


def require_model_type(config: dict[str, Any]) -> None:
    """Raise for what is read of a folder without a configuration, or one that does not say of what model."""
    if config.get("model_type") is None:
        raise ValueError(
            "it has no config.json that names its `model_type`. Give the folder that save_pretrained wrote, or a name "
            "on the Hub."
        )


class _HelpAll(argparse.Action):
    """Prints the help with every flag, and leaves."""

    def __call__(self, parser: Any, *_: Any) -> None:
        sys.stdout.write(HfArgumentParser.format_help(parser))
        parser.exit()


class Parser(HfArgumentParser):
    """All flags of the stages of training; what it cannot read is a [`UsageError`], without a page of usage.

    Its help leaves out those flags of `TrainingArguments` that are seldom needed; `--help_all` has them too.
    """

    def __init__(self, **settings: Any):
        kinds: Any = [ModelArguments, DataArguments, FASTrainingArguments]
        super().__init__(kinds, **settings)
        self.add_argument("--help_all", nargs=0, action=_HelpAll, help="this page with all of TrainingArguments")

    def format_help(self) -> str:
        page = argparse.ArgumentParser(
            prog=self.prog,
            usage=f"{self.prog} [SETTINGS.yaml] --flag value …",
            description=self.description,
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        groups = (
            ("model", _names(ModelArguments)),
            ("data", _names(DataArguments)),
            ("training", MOST_USED | (_names(FASTrainingArguments) - _names(TrainingArguments)) | {"help_all"}),
        )
        for title, names in groups:
            group = page.add_argument_group(title)
            for action in self._actions:
                if action.dest in names and not action.option_strings[0].startswith("--no_"):
                    group._add_action(action)
        return page.format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `fas train --help` names the flags.")


def _names(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Read flags, or one YAML file and flags that take precedence over it.

    Raises:
        UsageError: for a flag that does not exist, or a value of another kind.
    """
    found, unknown = Parser().parse_known_args(expand_yaml(argv))
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(flag, [f"--{name}" for name in vars(found)], n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        what = "a flag that exists" if flag.startswith("-") else "flags that begin with --"
        raise UsageError(f"The arguments must be {what}, got {unknown[0]!r}. {meant}`fas train --help` names them.")
    return found


def read_fields(kind: Any, flags: argparse.Namespace) -> Any:
    """One of the dataclasses of flags, from all of them."""
    return kind(**{each.name: getattr(flags, each.name) for each in fields(kind) if each.init})


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, FASTrainingArguments]:
    """As [`parse_flags`], by default those of this process; returns the three groups."""
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    kinds = (ModelArguments, DataArguments, FASTrainingArguments)
    model, data, training = (read_fields(kind, flags) for kind in kinds)
    return model, data, training


def expand_yaml(argv: Sequence[str]) -> list[str]:
    """Replace a leading YAML file by its flags, so that both are read in the same way (9e-5 is a number in both)."""
    if not argv or Path(argv[0]).suffix not in (".yaml", ".yml"):
        return list(argv)
    given = {token[2:].partition("=")[0].replace("-", "_") for token in argv[1:] if token.startswith("--")}
    return [*to_flags(without_other_data(read_yaml(argv[0]), given)), *argv[1:]]


def without_other_data(settings: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The settings of a recipe, without its data where the flags `given` beside it name other data."""
    if not DATA_SOURCES & {*given}:
        return settings
    return {name: value for name, value in settings.items() if name not in DATA_SETTINGS}


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping."""
    if not Path(path).is_file():
        raise ValueError(f"The YAML file must exist, got {str(path)!r}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The YAML file must be readable, got {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"A YAML file must map flags to values, got {type(content).__name__} in {str(path)!r}.")
    return content


def to_flags(settings: dict[str, Any]) -> list[str]:
    """Turn a mapping into command-line flags; a key without a value is left out."""
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return flags
