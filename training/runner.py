"""What the three scripts share: checks, models, training, evaluation, results."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

import modeling_fas
from configuration_fas import BACKBONES, MOST_TIMESTEPS, FASConfig, positions_of

from .arguments import (
    AUTO_CLASSES,
    CALIBRATION_SETTINGS,
    INITIAL_THRESHOLDS,
    THRESHOLD_LEARNING_RATES,
    DataArguments,
    FASTrainingArguments,
    ModelArguments,
    check_empty,
    check_writable,
    parse_arguments,
    require_model_type,
)
from .calibrate.coarse import start_calibration
from .calibrate.loss import RECORD_FILE, describe_sites, save_record
from .checkpoints import remove_checkpoints, remove_scratch
from .commands import only_run
from .data import AnyDataset, blocks
from .distillation import FASDistillationTrainer, check_settings
from .evaluate.trainer import evaluate_trainer, warn_after_training
from .layout import is_untrained, schedule_to_train, spikes_by_itself
from .results import fingerprint, flat, markdown_table, read_results, write_results
from .resume import checkpoint_to_resume, settings_of
from .shards import check_shards
from .tasks import check_task_name
from .trainers import FASCalibrationTrainer, FASTrainer


logger = logging.getLogger(__name__)

RESULTS_FILE = "evaluation.json"
# Rows of training data that the coarse search, the calibration record and the warning of dead sites look at.
COARSE_ROWS = 64


@dataclass
class Run:
    """One stage of one script, checked: nothing was loaded or downloaded yet but the configuration of the model."""

    script: str
    model: ModelArguments
    data: DataArguments
    training: FASTrainingArguments
    config: Any
    command: list[str]
    starts_calibration: bool = False

    def __post_init__(self):
        """Write the defaults of the stage into the arguments, so that the results record what was used."""
        rate = THRESHOLD_LEARNING_RATES.get((self.script, self.stage))
        weight = None
        if self.stage == "calibrate":
            measured, weight = CALIBRATION_SETTINGS[self.script]
            rate = rate if self.model.granularity == "position" else measured
        if self.training.threshold_learning_rate is None:
            self.training.threshold_learning_rate = rate
        if self.training.site_weight is None:
            self.training.site_weight = weight

    @property
    def stage(self) -> str:
        return self.model.stage

    @property
    def causal(self) -> bool:
        """Whether the model reads from left to right."""
        return BACKBONES[self.config.model_type.removeprefix("fas_")].causal

    @property
    def spiking(self) -> bool:
        return self.stage != "baseline"

    @property
    def trainer(self) -> Any:
        """Trainer of the stage, but for the model, the data and what goes with them."""
        if self.model.teacher and self.training.do_train:
            return partial(FASDistillationTrainer, args=self.training, teacher=load_teacher(self))
        return partial(FASCalibrationTrainer if self.stage == "calibrate" else FASTrainer, args=self.training)


def text_length(run: Run, flag: str) -> int:
    """Return the tokens of a text: as asked for by `flag` or else its twin, by default the positions, at most 1024."""
    positions = positions_of(run.config)
    size = getattr(run.data, flag) or run.data.block_size or run.data.max_seq_length or min(positions, 1024)
    if size > positions:
        raise ValueError(f"`--{flag}` must be at most the {positions} positions of the model, got {size}.")
    return size


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Raise for a tokenizer that gives token ids the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`--tokenizer_name` must have at most the {config.vocab_size} tokens of the model, got {len(tokenizer)}."
        )


def text_blocks(run: Run, raw: dict[str, AnyDataset], tokenizer: Any, size: int) -> dict[str, AnyDataset]:
    """Tokenize every split and cut it into blocks of `size` tokens, the main process first."""
    seeds = {"train": run.training.seed}
    with run.training.main_process_first(desc="tokenizing"):
        return {
            split: blocks(dataset, tokenizer, run.data, size, split=split, seed=seeds.get(split))
            for split, dataset in raw.items()
        }


def check_arguments(script: str, model: ModelArguments, data: DataArguments, training: FASTrainingArguments) -> None:
    """Raise for what can be known to be wrong before anything is loaded."""
    model.check(script, training.do_eval)
    data.check(script, training.do_train, training.do_eval)
    check_task_name(data.task_name)
    training.check(data.streaming)
    check_distillation(model, training)


@contextmanager
def start(script: str, argv: Sequence[str] | None) -> Iterator[Run]:
    """Parse and check the arguments of a script, read the configuration of the model, seed everything.

    Within the context no other run can have the output folder.
    """
    given = sys.argv[1:] if argv is None else argv
    model, data, training = parse_arguments(given)
    check_arguments(script, model, data, training)
    check_writable(training.output_dir or "")
    with only_run(training.output_dir or "", training.should_save):
        check_empty(training)
        if training.should_save:
            remove_scratch(Path(training.output_dir or ""))
        if training.fp16 and training.device.type == "cpu":
            logger.warning("--fp16 has no effect on a CPU: the run is in float32. --bf16 would have one.")
        config = read_config(model, script, training.do_train)
        if model.teacher and training.do_train:
            read_teacher(model.teacher, script)
        set_seed(training.seed)
        yield Run(script, model, data, training, config, ["-m", f"training.run_{script}", *given])


def kinds(script: str) -> list[str]:
    """The backbones that have the head of a script."""
    return [name for name, table in BACKBONES.items() if AUTO_CLASSES[script] in table.models]


def read_config(model: ModelArguments, script: str, do_train: bool = False) -> Any:
    """Read the configuration of the checkpoint, or of the model to train from scratch, and check that it fits.

    Raises:
        ValueError: for a checkpoint of another architecture, one to calibrate that never was a QCFS network, one that
            was calibrated where weights are to train, or timesteps that its code does not have.
    """
    *others, last = kinds(script)
    known = f"{', '.join(others)} or {last}"
    source = model.model_name_or_path or model.config_name or ""
    flag = "model_name_or_path" if model.model_name_or_path else "config_name"
    options: dict[str, Any] = {"revision": model.model_revision}
    try:
        raw_type, _ = FASConfig.get_config_dict(source, **options)
        require_model_type(raw_type)
        config = (AutoConfig if model.stage == "baseline" else FASConfig).from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--{flag}` must be a {known} checkpoint (a folder, or a name on the Hub), got {source!r}: {error}"
        ) from error
    kind = raw_type.get("model_type")
    stock = str(kind).removeprefix("fas_") if model.stage != "baseline" else kind
    if stock not in kinds(script):
        raise ValueError(f"`--{flag}` must be a {known} checkpoint for run_{script}, got one of type {kind!r}.")
    if model.stage == "calibrate" and not str(kind).startswith("fas_"):
        raise ValueError(
            f"`--model_name_or_path` must be fine-tuned with QCFS before --stage calibrate, got the stock checkpoint "
            f"{source!r}. Run --stage downstream first."
        )
    if model.config_overrides and not model.model_name_or_path:
        config.update_from_string(model.config_overrides)
    if model.stage != "baseline":
        keeps_time = str(kind).startswith("fas_") and spikes_by_itself(config)
        config.T = config.T if keeps_time else 0
        _check_timesteps(model, config)
        _check_calibrated(model, config, source, trains_weights=do_train and model.stage != "calibrate")
        config.L = model.L or config.L
        if keeps_time and config.T == 0 and config.L is None and model.stage != "calibrate":
            logger.warning(
                f"`--{flag}` is the stock network at T = 0, got {source!r}: nothing spikes in training. Convert with "
                "`convert_to_spiking`, or save the model after `set_timesteps`, to train it at that T."
            )
        if model.initial_threshold is not None:
            config.initial_threshold = model.initial_threshold
        elif not str(kind).startswith("fas_"):
            config.initial_threshold = INITIAL_THRESHOLDS[script]
    return config


def _check_timesteps(model: ModelArguments, config: Any) -> None:
    most = MOST_TIMESTEPS[config.code]
    for name, values in (("T", model.T), ("calib_T", [model.calib_T or 0])):
        if max(values, default=0) > most:
            raise ValueError(
                f"`--{name}` must be at most {most} with code {config.code!r}, got {max(values)}. Fewer do: 4 to 8, "
                "as a rule."
            )


def _check_calibrated(model: ModelArguments, config: Any, source: str, trains_weights: bool) -> None:
    """Raise for a calibration that a stage would make stale."""
    if config.calib_T is None:
        return
    before = f"from_pretrained({source!r}, calib_T=None), saved in another folder"
    if trains_weights and config.T == 0 and config.L is not None:
        raise ValueError(
            f"`--model_name_or_path` must not be calibrated at --stage {model.stage}, which trains the weights and "
            f"leaves its fine thresholds behind, got {source!r}, calibrated for T = {config.calib_T}. Start from the "
            f"checkpoint before calibration: {before}, is that."
        )
    if model.stage == "calibrate" and model.L not in (None, config.L):
        raise ValueError(
            f"`--L` must be that of the calibration, {config.L}, got {model.L}. Leave it out, or start from the "
            f"checkpoint before calibration: {before}, is that."
        )


def check_distillation(model: ModelArguments, training: FASTrainingArguments) -> None:
    """Raise for settings of distillation that are out of range, or that nothing would read."""
    settings = {
        "distillation_temperature": training.distillation_temperature,
        "distillation_alpha": training.distillation_alpha,
        "hidden_weight": training.hidden_weight,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if given and not model.teacher:
        raise ValueError(f"`--teacher` is required for {', '.join(f'--{name}' for name in given)}, got none.")
    defaults = {"distillation_temperature": 1.0, "distillation_alpha": 0.0, "hidden_weight": 0.0}
    check_settings(*(defaults | given).values())


def read_teacher(source: str, script: str) -> Any:
    """Read the configuration of a teacher.

    Raises:
        ValueError: if it cannot be read, has another kind of head, or was never fine-tuned on a task.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--teacher` must be a checkpoint (a folder, or a name on the Hub), got {source!r}: {error}"
        ) from error
    if script == "glue" and not any("SequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"`--teacher` must be fine-tuned on the task, got {source!r}, a checkpoint of "
            f"{', '.join(config.architectures or ['no class'])}. Run --stage baseline --do_train on it first."
        )
    return config


def load_teacher(run: Run) -> Any:
    """Load the teacher of a run in float32.

    Raises:
        ValueError: for another vocabulary, or another number of labels, than the model has.
    """
    source = run.model.teacher or ""
    config = read_teacher(source, run.script)
    what = "num_labels" if run.script == "glue" else "vocab_size"
    if getattr(config, what, None) != getattr(run.config, what):
        raise ValueError(
            f"`--teacher` must have the `{what}` of the model, {getattr(run.config, what)}, got {source!r} with "
            f"{getattr(config, what, None)}."
        )
    return _read_weights(getattr(transformers, AUTO_CLASSES[run.script]), source, "teacher")


def _read_weights(model_class: Any, source: str, flag: str, **settings: Any) -> Any:
    check_shards(source)
    try:
        return model_class.from_pretrained(source, dtype="float32", **settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"`--{flag}` must be a checkpoint that can be read, got {source!r}: {error}") from error


def load_model(run: Run, **settings: Any) -> Any:
    """Load the model of a run in float32 (parameters are trained in it), or build it from a configuration.

    Args:
        run: The run.
        **settings: Of the configuration.
    """
    auto_class = AUTO_CLASSES[run.script]
    if run.spiking:
        model_class = getattr(modeling_fas, run.config.table.models[auto_class])
    else:
        model_class = getattr(transformers, BACKBONES[run.config.model_type].models[auto_class].removeprefix("FAS"))
    labels = run.config.num_labels
    for name, value in settings.items():
        setattr(run.config, name, value)
    if run.model.model_name_or_path is None:
        return model_class(run.config)
    model = _read_weights(
        model_class,
        run.model.model_name_or_path,
        "model_name_or_path",
        config=run.config,
        revision=run.model.model_revision,
        ignore_mismatched_sizes=run.config.num_labels != labels,  # the head starts anew, with a warning
    )
    if run.stage == "calibrate":
        _begin_calibration(run, model)
    return model


def _begin_calibration(run: Run, model: Any) -> None:
    """Give a model fine thresholds; one that has them goes on from where it is."""
    if is_untrained(model):
        raise ValueError(
            "`--model_name_or_path` must be fine-tuned with QCFS before --stage calibrate, got "
            f"{run.model.model_name_or_path!r} with every threshold at its start. Run --stage downstream first."
        )
    wanted = (run.model.calib_T, run.model.granularity)
    if spikes_by_itself(model.config) and model.config.schedule not in model.config.schedules:
        model.config.schedule = schedule_to_train(model.config)
    if model.config.calib_T is None:
        length = positions_of(model.config)
        length = min(length, run.data.block_size or run.data.max_seq_length or length)
        model.begin_calibration(*wanted, length=length if run.model.granularity == "position" else None)
        run.starts_calibration = True
    elif (model.config.calib_T, model.config.granularity) != wanted:
        raise ValueError(
            f"`--calib_T` and --granularity must be those the checkpoint was calibrated with, "
            f"{model.config.calib_T} and {model.config.granularity!r}, got {wanted[0]} and {wanted[1]!r}. "
            "Start from the checkpoint before calibration instead."
        )


def train_and_evaluate(
    run: Run,
    trainer: FASTrainer,
    tokenizer: PreTrainedTokenizerBase,
    eval_splits: dict[str, AnyDataset],
) -> list[dict[str, Any]]:
    """Train, save the model, evaluate it in every mode, and write the results beside it; returns the rows."""
    args, output_dir = run.training, Path(run.training.output_dir or "")
    model: Any = trainer.model
    summary: dict[str, Any] = {}
    if args.do_train:
        trainer.run_settings = settings_of(run.model, run.data, args, model.config, trainer.train_dataset)
        checkpoint = checkpoint_to_resume(args, trainer.run_settings)
        if args.should_save:
            (output_dir / RESULTS_FILE).unlink(missing_ok=True)
            if checkpoint is None and args.overwrite_output_dir:
                remove_checkpoints(output_dir)
        trainer.accelerator.wait_for_everyone()
        if run.starts_calibration and checkpoint is None:
            _record_calibration(trainer, start_calibration(model, _probe(trainer), run.model.coarse))
        summary = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_state()
        if run.stage == "calibrate":
            _record_calibration(trainer, {"fine": describe_sites(model, _probe(trainer))})
        if run.spiking and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            summary |= warn_after_training(trainer, _first_rows(trainer))
    if run.stage == "calibrate":
        model.set_timesteps(run.model.calib_T, schedule_to_train(model.config))
    if args.do_train:
        trainer.save_model()
        tokenizer.save_pretrained(output_dir) if args.should_save else None
    timesteps = run.model.T or ([model.config.T] if run.spiking and run.stage != "calibrate" else [])
    rows = evaluate_trainer(trainer, eval_splits, timesteps) if args.do_eval else []
    weights = fingerprint(model)  # a sharded model needs all processes for it
    if args.should_save:
        write_results(
            output_dir / RESULTS_FILE,
            metrics={"rows": rows},
            configuration={
                "model": asdict(run.model),
                "data": asdict(run.data),
                "training": args.to_dict(),
                "config": model.config.to_dict(),
                "weights_sha256": weights,
            },
            command=["python", *run.command],
            training=summary,
        )
        logger.info("\n" + markdown_table([flat(row) for row in rows]))
    if args.push_to_hub:
        trainer.push_to_hub()
    _end(trainer)
    return rows


def _probe(trainer: Any) -> dict[str, Any]:
    """The first rows of the training data as one batch, the same in every process."""
    return trainer._prepare_inputs(trainer.data_collator(_first_rows(trainer)))


def _first_rows(trainer: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in islice(trainer.train_dataset, COARSE_ROWS)]


def _record_calibration(trainer: Any, stages: dict[str, Any]) -> None:
    """Add what stages of calibration did to the record beside the checkpoint."""
    record = Path(trainer.args.output_dir) / RECORD_FILE
    if trainer.args.should_save:
        before = read_results(record)["stages"] if record.is_file() and "uncalibrated" not in stages else {}
        save_record(record.parent, trainer.model, {**before, **stages})


def _end(trainer: Any) -> None:
    """Leave the process group, in an order that cannot hang.

    The wrapper of the model must go before the group does: destroyed by the wrapper, which holds Python's lock, gloo
    waits for a thread that waits for that lock.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
