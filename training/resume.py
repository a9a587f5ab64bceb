"""Going on from a checkpoint: which one, whether all of it is there, and whether the run is still the same."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from .arguments import DataArguments, FASTrainingArguments, ModelArguments
from .checkpoints import checkpoints, is_complete, last_complete
from .results import plain, read_results


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# What a training is a function of, beside the model and the data: no flags that only evaluate, log or save.
TRAINING_SETTINGS = (
    *("seed", "data_seed", "full_determinism", "bf16", "fp16", "tf32", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "dataloader_drop_last"),
    *("group_by_length", "train_sampling_strategy", "ignore_data_skip", "label_smoothing_factor"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("neftune_noise_alpha", "threshold_learning_rate", "site_weight"),
    *("distillation_temperature", "distillation_alpha", "hidden_weight"),
)
MODEL_SETTINGS = (
    *("stage", "model_name_or_path", "model_revision", "config_name", "config_overrides", "tokenizer_name", "teacher"),
    *("L", "calib_T", "granularity", "coarse", "initial_threshold"),
)
# Rows that stand for a stream.
STREAM_ROWS = 8
ROWS_AT_A_TIME = 10_000


def settings_of(
    model: ModelArguments, data: DataArguments, training: FASTrainingArguments, config: Any, dataset: Any
) -> dict[str, Any]:
    """All that the weights at a step depend on, by name, as JSON holds it.

    Args:
        model: Of the run.
        data: Of the run.
        training: Of the run.
        config: Of the model.
        dataset: Tokenized training data.
    """
    found = {name: _absolute(getattr(model, name)) for name in MODEL_SETTINGS}
    found |= {name: getattr(training, name) for name in TRAINING_SETTINGS if hasattr(training, name)}
    found |= {"L": getattr(config, "L", None), "initial_threshold": getattr(config, "initial_threshold", None)}
    found |= {"processes": training.world_size, "mlm_probability": data.mlm_probability}
    return json.loads(json.dumps(plain(found | {"training data": describe(dataset)})))


def _absolute(value: Any) -> Any:
    """A path that exists in the form that does not depend on where a command is given."""
    return str(Path(value).resolve()) if isinstance(value, str) and value and Path(value).exists() else value


def describe(dataset: Any) -> str:
    """Number of rows and digest of a data set; of a stream, the digest of its first rows."""
    digest = hashlib.sha256()
    if not isinstance(dataset, Dataset):
        digest.update(json.dumps(plain(list(islice(dataset, STREAM_ROWS)))).encode())
        return f"a stream, {digest.hexdigest()[:12]}"
    for table in dataset.with_format("arrow").iter(ROWS_AT_A_TIME):
        sink = pa.BufferOutputStream()
        bare = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(sink, bare.schema) as stream:
            stream.write_table(bare)
        digest.update(sink.getvalue())
    return f"{len(dataset)} rows, {digest.hexdigest()[:12]}"


def checkpoint_to_resume(args: FASTrainingArguments, settings: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: the one named, or the last complete one.

    Args:
        args: Of the run.
        settings: From [`settings_of`].

    Raises:
        ValueError: if the one named is not complete, or the one found is damaged or from another run, unless
            `--allow_changed_resume` says that it may be.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    found = Path(wanted) if isinstance(wanted, str) else last_complete(args.output_dir or "")
    if found is None:
        logger.warning(f"No complete checkpoint in {args.output_dir!r}: training starts from the beginning.")
        return None
    if not is_complete(found):
        raise ValueError(
            f"`--resume_from_checkpoint` must be a complete checkpoint, got {wanted!r} without a readable "
            f"{TRAINER_STATE_NAME} and weights. --resume_from_checkpoint true takes the last complete one of "
            "--output_dir."
        )
    skipped = [path.name for path in checkpoints(found.parent) if isinstance(wanted, bool) and not is_complete(path)]
    if skipped:
        logger.warning(f"Not complete, and not used: {', '.join(skipped)}.")
    check_readable(found)
    problems = missing_parts(found, args) + differences(found, settings)
    if problems and not args.allow_changed_resume:
        raise ValueError(
            f"`--resume_from_checkpoint` must go on with the same run, got {str(found)!r}: {'; '.join(problems)}. "
            "Give the settings it began with, start anew in another folder, or go on all the same with "
            "--allow_changed_resume."
        )
    if problems:
        logger.warning(f"Going on from {str(found)!r} as another run than it began as: {'; '.join(problems)}.")
    return str(found)


def missing_parts(checkpoint: Path, args: FASTrainingArguments) -> list[str]:
    """What a checkpoint lacks, of all that a run needs to go on as if nothing had happened."""
    random_states = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    wanted = [RUN_FILE, SCHEDULER_NAME, random_states]
    sharded = any(any(checkpoint.glob(pattern)) for pattern in ("optimizer.bin", "optimizer_*", "global_step*"))
    wanted += [] if sharded else [OPTIMIZER_NAME]
    return [f"{name} is missing" for name in wanted if not (checkpoint / name).exists()]


def differences(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of the run that wrote a checkpoint and those given now."""
    record = checkpoint / RUN_FILE
    if not record.is_file():
        return []
    before = read_results(record)
    return [
        f"{name} was {before[name]!r}, now {settings[name]!r}"
        for name in settings
        if name in before and before[name] != settings[name]
    ]


def check_readable(checkpoint: Path) -> None:
    """Raise for a file of a complete checkpoint that is truncated, or holds something else."""
    way_out = "Delete that checkpoint: --resume_from_checkpoint true then takes the one before it."
    for path in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"`{path}` must hold weights, got a truncated or damaged file: {error}. {way_out}"
            ) from error
    for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"`{path}` must be a file of torch.save, got a truncated or damaged one. {way_out}")
    for name, needed in ((TRAINER_STATE_NAME, "global_step"), (RUN_FILE, "seed")):
        path = checkpoint / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {needed: 0}
        except ValueError as error:
            raise ValueError(f"`{path}` must be JSON, got {error}. {way_out}") from error
        if not isinstance(content, dict) or needed not in content:
            raise ValueError(f"`{path}` must hold `{needed}`, got {str(content)[:80]}. {way_out}")
