"""Trainers for spiking models: thresholds train on their own terms, and every batch split gives the same gradients."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .calibrate.loss import calibration_loss, freeze_for_calibration
from .checkpoints import unmark, whole_or_nothing
from .publish.upload import PublishMixin


THRESHOLD_NAMES = ("threshold", "initial_potential")
# Stock heads whose loss is a mean over the labels of one micro-batch.
AVERAGING = re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|MultipleChoice)$")


def is_threshold(name: str) -> bool:
    """Return whether a parameter is a threshold, a fine threshold or an initial potential."""
    return name.endswith(THRESHOLD_NAMES)


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
        if model is not None and hasattr(model, "clamp_thresholds_"):
            model.clamp_thresholds_()


class FASTrainer(PublishMixin, Trainer):  # type: ignore[misc]
    """[`Trainer`] for QCFS fine-tuning; a stock model trains with it as with `Trainer`.

    Thresholds and initial potentials have their own parameter group (own learning rate, no weight decay) and are kept
    positive after every step. Accumulated gradients are those of the large batch, also where stock heads average over
    each micro-batch. A model is saved whole or not at all, and a checkpoint has its `trainer_state.json`
    only when all else of it is written.

    Args:
        threshold_learning_rate: Of that group; by default `args.threshold_learning_rate` or else `args.learning_rate`.
    """

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
        self.threshold_learning_rate = threshold_learning_rate
        self.add_callback(_AfterEachStep(self.data_collator))

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with whole_or_nothing(Path(output_dir or self.args.output_dir)) as scratch:
            return super()._save(scratch, state_dict)

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            unmark(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial, *args, **kwargs)


class FASCalibrationTrainer(FASTrainer):
    """Trains fine thresholds and initial potentials alone, to make the spiking network follow its ANN.

    The model must be calibrated (`model.begin_calibration`). All other parameters are frozen and dropout is off, since
    every timestep and the teacher must see the same network. Evaluation is that of the spiking network at
    `config.calib_T`, never the calibration loss.

    Args:
        loss_settings: Further keyword arguments of [`training.calibrate.calibration_loss`]; the `site_weight` is
            `args.site_weight` where they have none.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        loss_settings: dict[str, Any] | None = None,
        **kwargs,
    ):
        freeze_for_calibration(model)
        model.set_timesteps(model.config.calib_T, "stepwise")
        super().__init__(model, args, **kwargs)
        self.loss_settings = loss_settings or {}

    def get_batch_samples(self, *args, **kwargs):
        """Add rows and tokens of the whole accumulated batch, over all processes: what the loss is a mean over."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        counts = torch.stack([_counts(batch) for batch in batches]).sum(0).to(self.args.device)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = _counts(inputs) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        weight = getattr(self.args, "site_weight", None)
        settings = ({} if weight is None else {"site_weight": weight}) | self.loss_settings
        result = calibration_loss(model, inputs, num_rows=counts[0], num_tokens=counts[1], **settings)
        return (result.loss, result) if return_outputs else result.loss


def _counts(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the numbers of rows and of tokens that are not padding."""
    ids = inputs["input_ids"]
    tokens = inputs["attention_mask"].sum() if inputs.get("attention_mask") is not None else torch.tensor(ids.numel())
    return torch.stack([torch.tensor(ids.shape[0], device=tokens.device), tokens])
