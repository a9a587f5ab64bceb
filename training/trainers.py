"""Trainers for spiking models: thresholds train on their own terms, and every batch split gives the same gradients."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_fas import FASMixin

from .arguments import check_number
from .calibrate.loss import calibration_loss, freeze_for_calibration
from .checkpoints import is_complete, last_complete, remove, rotate, whole_or_nothing
from .layout import schedule_to_train
from .publish.upload import PublishMixin
from .results import write_json
from .resume import RUN_FILE
from .watching import site_scalars, trackers


THRESHOLD_NAMES = ("threshold", "initial_potential", ".gain")
# Stock heads whose loss is a mean over the labels of one micro-batch.
AVERAGING = re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|MultipleChoice)$")


def is_threshold(name: str) -> bool:
    """Return whether a parameter is a threshold, fine or not, an initial potential or the gain of a site."""
    return name.endswith(THRESHOLD_NAMES)


def idle_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of neurons that take no part at the T, schedule and code the model runs with, and get no gradient."""
    config: Any = getattr(model, "config", None)
    neurons = model.neurons() if isinstance(model, FASMixin) else []
    idle: list[nn.Parameter | None] = []
    for _, neuron in neurons:
        if config.T == 0:
            idle += [neuron.fine_threshold, neuron.initial_potential]
            idle += [neuron.threshold, neuron.gain] if config.L is None else []
        elif neuron.fine_threshold is not None:
            idle.append(neuron.threshold)
            idle += [neuron.initial_potential] if config.code != "rate" else []
    return [each for each in idle if each is not None and each.requires_grad]


def batch_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Loss of a head as a share of the whole accumulated batch: summed here, divided by all of its labels.

    The loss of the stock heads is a mean over one micro-batch; the mean of such means is another number where
    micro-batches hold different numbers of masked tokens.

    Args:
        outputs: With `logits`: `(B, S, vocabulary)`, `(B, classes)` or `(B, 1)` for regression.
        labels: `(B, S)` or `(B,)`; -100 takes no part, and floats make it a regression.
        num_items_in_batch: Labels in all micro-batches and processes of the step; those at hand by default.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if labels.is_floating_point():
        total = F.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction="sum")
        count = torch.tensor(labels.numel(), device=labels.device)
    else:
        total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
        count = labels.ne(-100).sum().clamp(min=1)
    return total / (count if num_items_in_batch is None else num_items_in_batch)


class _AfterEachStep(TrainerCallback):
    """Keeps thresholds positive, and tells the data of the epoch."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.collator, "epoch"):
            self.collator.epoch = int(state.epoch or 0)

    def on_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        if model is None:
            return
        check_finite(args, state.global_step + 1, weights=_sum_of_weights(model))
        if hasattr(model, "clamp_thresholds_"):
            model.clamp_thresholds_()


def _sum_of_weights(model: nn.Module) -> torch.Tensor:
    """A number that is finite if all weights that train are, on their device."""
    return torch.stack([each.detach().float().sum() for each in model.parameters() if each.requires_grad]).sum()


def check_finite(args: TrainingArguments, step: int, **numbers: torch.Tensor) -> None:
    """Raise for a loss or weights, by name, that are no numbers any more.

    Raises:
        FloatingPointError: with the rates that may be to blame, and the checkpoint that is left.
    """
    for name, value in numbers.items():
        if bool(value.isfinite()):
            continue
        threshold_rate = getattr(args, "threshold_learning_rate", None)
        rates = str(args.learning_rate)
        rates += "" if threshold_rate is None else f", --threshold_learning_rate {threshold_rate}"
        last = last_complete(args.output_dir or "")
        kept = "No checkpoint was saved before" if last is None else f"The last good checkpoint is {str(last)!r}"
        raise FloatingPointError(
            f"`--learning_rate` must let training stay finite, got {rates}: the {name} of step {step} "
            f"{'are' if name == 'weights' else 'is'} {value.item()}. {kept}; nothing since was saved. Lower the "
            "rates, or check the data and the model that it started from."
        )


class FASTrainer(PublishMixin, Trainer):  # type: ignore[misc]
    """[`Trainer`] for QCFS fine-tuning; a stock model trains with it as with `Trainer`.

    Thresholds and initial potentials have their own parameter group (own learning rate, no weight decay) and are kept
    positive after every step. Accumulated gradients are those of the large batch, also where stock heads average over
    each micro-batch. A model is saved whole or not at all, and a checkpoint has its `trainer_state.json`
    only when all else of it is written. Training stops at the first loss or weight that is not finite. Trackers, such
    as `--report_to` names, are told spike rate, threshold, dead and saturated shares of every site at logging steps.

    Args:
        threshold_learning_rate: Of that group; by default `args.threshold_learning_rate` or else `args.learning_rate`.

    Raises:
        ValueError: for a negative rate.
        FloatingPointError: when training diverges; the last checkpoint is good.
    """

    # What [`training.resume.settings_of`] says of the run: written into its checkpoints.
    run_settings: dict[str, Any] | None = None
    # Of the last step, for what trackers are told of sites.
    last_inputs: Mapping[str, Any] | None = None
    last_errors: Mapping[str, torch.Tensor] | None = None

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        threshold_learning_rate: float | None = None,
        compute_loss_func: Callable | None = None,
        **kwargs,
    ):
        if compute_loss_func is None and AVERAGING.search(type(model).__name__):
            compute_loss_func = batch_loss
        super().__init__(model, args, compute_loss_func=compute_loss_func, **kwargs)
        check_number("threshold_learning_rate", threshold_learning_rate, 0)
        if self.args.fsdp and not (self.is_fsdp_enabled or self.is_fsdp_xla_enabled):
            raise ValueError(
                f"`fsdp` must be left out on {self.args.device.type}, where accelerate shards nothing, got "
                f"{self.args.fsdp!r}: every process would hold the whole model."
            )
        self.threshold_learning_rate = threshold_learning_rate
        self.add_callback(_AfterEachStep(self.data_collator))

    def train(self, *args, **kwargs):
        model: Any = self.model
        idle = {id(each) for each in idle_parameters(model)}  # data-parallel training waits for all other gradients
        names = [name for name, parameter in model.named_parameters() if id(parameter) in idle]
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        try:
            return super().train(*args, **kwargs)
        finally:
            for name in names:  # sharding has put other tensors in the place of the parameters
                model.get_parameter(name).requires_grad_(True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        named = trained.named_parameters()
        thresholds = [parameter for name, parameter in named if parameter.requires_grad and is_threshold(name)]
        own = {id(parameter) for parameter in thresholds}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        if thresholds:
            rates = (self.threshold_learning_rate, getattr(self.args, "threshold_learning_rate", None))
            rate = next((each for each in rates if each is not None), self.args.learning_rate)
            optimizer.add_param_group({"params": thresholds, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model whole, also where the checkpoints of its training are sharded."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if not _internal_call and plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with whole_or_nothing(Path(output_dir or self.args.output_dir)) as scratch:
            return super()._save(scratch, state_dict)

    def training_step(self, model, inputs, *args, **kwargs):
        self.last_inputs = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_finite(self.args, self.state.global_step + 1, loss=loss)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log; in training, tell trackers (not the console, nor `log_history`) what every site does."""
        super().log(logs, *args, **kwargs)
        told = trackers(self.callback_handler.callbacks)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if "loss" not in logs or not told or sharded or self.last_inputs is None or not hasattr(self.model, "neurons"):
            return
        if self.is_world_process_zero():
            scalars = site_scalars(self.model, self._prepare_inputs(dict(self.last_inputs)), self.last_errors)
            for callback in told:
                callback.on_log(self.args, self.state, self.control, model=self.model, logs=scalars)

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            remove(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer deletes in no order
        try:
            if self.args.should_save and self.run_settings is not None:
                write_json(folder / RUN_FILE, self.run_settings)
            super()._save_checkpoint(model, trial, *args, **kwargs)
        except (OSError, RuntimeError) as error:
            if not self.args.should_save or is_complete(folder):
                raise
            if folder.is_dir():
                remove(folder)
            raise OSError(
                f"`--output_dir` must be a folder with room for checkpoints, got {str(run_dir)!r}: {error}. Those "
                "before are whole. Free some space, or keep fewer with --save_total_limit, then resume."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, kept=[folder, *([Path(best)] if best else [])])

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Load their states; `--allow_changed_resume` keeps the rates and the decay that are set now."""
        if checkpoint is None or not getattr(self.args, "allow_changed_resume", False):
            return super()._load_optimizer_and_scheduler(checkpoint)
        names = ("initial_lr", "weight_decay", "betas", "eps")
        wanted = [{name: group[name] for name in names if name in group} for group in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, settings in zip(self._groups(), wanted, strict=True):
            before, rate = group["initial_lr"], settings["initial_lr"]
            group["lr"] = group["lr"] * rate / before if before else rate
            group.update(settings)
        scheduler: Any = self.lr_scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        optimizer: Any = self.optimizer
        return optimizer.param_groups


class CountingTrainer(FASTrainer):
    """A trainer whose losses are sums over a batch, divided by counts of the whole accumulated batch."""

    loss_is_scaled_for_ga = True

    def counts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the losses of a batch are means over."""
        raise NotImplementedError

    def get_batch_samples(self, *args, **kwargs):
        """Add the counts of the whole accumulated batch, over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        counts = torch.stack([self.counts(batch) for batch in batches]).sum(0).to(self.args.device)
        return batches, self.accelerator.reduce(counts, "sum")

    def share(self, inputs: Mapping[str, torch.Tensor], counts: torch.Tensor | None) -> torch.Tensor:
        """Counts to divide by: of the accumulated batch, whose gradients processes average; else those at hand."""
        return self.counts(inputs) if counts is None else counts / self.accelerator.num_processes


class FASCalibrationTrainer(CountingTrainer):
    """Trains fine thresholds, initial potentials and gains alone, to make the spiking network follow its ANN.

    The model must be calibrated (`model.begin_calibration`). All other parameters are frozen and dropout is off, since
    every timestep and the teacher must see the same network. It runs at `config.calib_T`, by
    [`schedule_to_train`]. Evaluation is that of the spiking network so, never the calibration loss.

    Args:
        loss_settings: Further keyword arguments of [`training.calibrate.calibration_loss`]; the `site_weight` is
            `args.site_weight` where they have none.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        loss_settings: dict[str, Any] | None = None,
        **kwargs,
    ):
        freeze_for_calibration(model)
        model.set_timesteps(model.config.calib_T, schedule_to_train(model.config))
        super().__init__(model, args, **kwargs)
        self.loss_settings = loss_settings or {}

    def counts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Numbers of rows and of tokens that are not padding."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        tokens = torch.tensor(ids.numel()) if mask is None else mask.sum()
        return torch.stack([torch.tensor(ids.shape[0], device=tokens.device), tokens])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = self.share(inputs, num_items_in_batch)
        weight = getattr(self.args, "site_weight", None)
        settings = ({} if weight is None else {"site_weight": weight}) | self.loss_settings
        result = calibration_loss(model, inputs, num_rows=counts[0], num_tokens=counts[1], **settings)
        self.last_errors = result.sites
        return (result.loss, result) if return_outputs else result.loss
