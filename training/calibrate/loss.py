"""Calibration: the spiking network at `calib_T` timesteps against its ANN, with the parts of the loss by site.

The teacher is the same model at T = 0. Its activation at each neuron site is the target of the time average that the
site emits, and its logits are the target of the spiking logits. Only `fine_threshold` and `initial_potential` train.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F

from configuration_fas import here

from ..layout import auto_class, pooled, predicts_next, turn_off_dropout
from ..results import write_json


RECORD_FILE = "calibration.json"
REDUCTIONS = ("tokens", "published")
# Of the variance over time beside the squared error of the time average: measured, see docs/calibration.md.
VARIANCE_WEIGHT = 0.1


@dataclass
class CalibrationLoss:
    """Loss of one batch and its parts.

    `loss = site_weight · Σ (sites + variance_weight · variances) + output_weight · output`.

    Attributes:
        loss: The scalar to minimise.
        sites: Alignment error of every site, by name, in the order they run in.
        variances: Variance over time of what every site emits, in the same way; 0 in layerwise mode.
        output: Error of the logits, or of the hidden states of a model without a head.
        logits: Of the spiking network, detached; hidden states of a model without a head.
        teacher_logits: Of the ANN.
    """

    loss: torch.Tensor
    sites: dict[str, torch.Tensor]
    variances: dict[str, torch.Tensor]
    output: torch.Tensor
    logits: torch.Tensor
    teacher_logits: torch.Tensor


def calibration_loss(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    site_weight: float = 1.0,
    output_weight: float = 1.0,
    variance_weight: float | None = None,
    reduction: str = "tokens",
    num_rows: torch.Tensor | int | None = None,
    num_tokens: torch.Tensor | int | None = None,
) -> CalibrationLoss:
    """Compare the spiking network at `config.calib_T` with the ANN, site by site and at the output.

    Leaves the model at `calib_T`, as the backward pass of gradient checkpointing needs it, and no hook or tensor on
    its modules. Dropout must be off, or the target is noise: [`freeze_for_calibration`] sees to it.

    Args:
        model: A FAS model with fine parameters; may be wrapped for data-parallel training.
        inputs: Of the model, `(B, S)`; `labels` are dropped.
        site_weight: Weight of the sum of the site errors; 1 is published.
        output_weight: Weight of the output error; at 0 it is reported and takes no part.
        variance_weight: Weight of the variance over time of a site, beside 1 for its error: what fluctuates from step
            to step costs in LayerNorm and softmax, though its average be right. 0.1 by default; 0 for the published
            reduction, which knows no such term.
        reduction: `"tokens"`: means over what is not padding: the squared error of a site, the KL divergence of the
            ANN's distribution from the spiking one (causal: where a next token follows), the squared error of a
            regression, the relative one of hidden states. `"published"`: as the published code has it: padding counts,
            and the divergence of a causal model is summed over positions and divided by the batch. (Its weight of the
            output is 0 for encoders.)
        num_rows: Rows of the accumulated batch, where this is a part of it; B by default.
        num_tokens: Its tokens without padding, in the same way.

    Raises:
        ValueError: for an unknown reduction, a model without fine parameters, a folded one, or reentrant gradient
            checkpointing, which loses the gradient of the site errors.

    Source: Chen et al. 2025, Sec. 3; differs in that padding takes no part and both terms are means.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")
    if variance_weight is None:
        variance_weight = 0.0 if reduction == "published" else VARIANCE_WEIGHT
    core = extract_model_from_parallel(model)
    check_calibratable(core)
    given: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
    if "use_cache" in inspect.signature(core.forward).parameters:
        given["use_cache"] = False

    with torch.no_grad(), core.running(0), recorded(core) as targets:
        teacher_logits = answer(model(**given))
    core.set_timesteps(core.config.calib_T)
    with recorded(core) as averages:
        logits = answer(model(**given))
    if torch.is_grad_enabled() and any(
        neuron.fine_threshold.requires_grad and not averages[name].average.requires_grad
        for name, neuron in core.neurons()
    ):
        raise ValueError(
            "`model` must not use reentrant gradient checkpointing, which loses the gradient of the site errors. "
            'Enable it with gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )

    tokens = real_tokens(inputs, logits)
    mask = tokens if reduction == "tokens" else None
    if mask is not None:
        num_rows = len(logits) if num_rows is None else num_rows
        num_tokens = mask.sum() if num_tokens is None else num_tokens
    sites, variances, whole = {}, {}, pooled(core)
    for name, _ in core.neurons():
        rows = None if name in whole else tokens.shape
        average, spread = averages[name].average.float(), averages[name].variance().float()
        errors = (average - targets[name].average.float()).square()
        sites[name] = _mean_of_site(errors, rows, mask, num_rows, num_tokens)
        variances[name] = _mean_of_site(spread, rows, mask, num_rows, num_tokens)
    output = error_of_output(core, logits, teacher_logits, mask, num_rows, num_tokens)
    loss = site_weight * torch.stack(list(sites.values())).sum()
    if variance_weight:
        loss = loss + site_weight * variance_weight * torch.stack(list(variances.values())).sum()
    if output_weight:
        loss = loss + output_weight * output
    return CalibrationLoss(
        loss, _detached(sites), _detached(variances), output.detach(), logits.detach(), teacher_logits
    )


def _detached(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def freeze_for_calibration(model: nn.Module) -> list[nn.Parameter]:
    """Make fine thresholds, initial potentials and gains alone trainable, and turn dropout off, for good.

    Everything before the first site then runs without a graph by itself, and no weight keeps an activation for its
    gradient.

    Returns:
        The trainable parameters.
    """
    core = extract_model_from_parallel(model)
    check_calibratable(core)
    trainable = []
    for name, parameter in core.named_parameters():
        parameter.requires_grad_(name.endswith(("fine_threshold", "initial_potential", ".gain")))
        if parameter.requires_grad:
            trainable.append(parameter)
    turn_off_dropout(core)
    return trainable


@torch.no_grad()
def describe_sites(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Say of every site how its thresholds stand to the scalar one, where it starts, and its error on a batch.

    Returns:
        By site: `scale` and `initial_potential`, means over its neurons, with `scale_min` and `scale_max`; `error`,
        the mean squared distance of its time average from the ANN's activation.
    """
    errors = calibration_loss(model, inputs).sites
    described = {}
    for name, neuron in extract_model_from_parallel(model).neurons():
        scale = neuron.fine_threshold / neuron.threshold
        described[name] = {
            "scale": scale.mean().item(),
            "scale_min": scale.min().item(),
            "scale_max": scale.max().item(),
            "initial_potential": neuron.initial_potential.mean().item(),
            "error": errors[name].item(),
        }
    return described


def save_record(folder: str | os.PathLike, model: Any, stages: Mapping[str, Any], **more: Any) -> None:
    """Write `calibration.json` beside a checkpoint: its settings, and [`describe_sites`] after every stage.

    Args:
        folder: Of the checkpoint.
        model: That was calibrated.
        stages: What [`describe_sites`] said, by name, such as `uncalibrated`, `coarse` and `fine`.
        **more: Further fields, such as the settings of the training.
    """
    config = extract_model_from_parallel(model).config
    settings = {"T": config.calib_T, "L": config.L, "schedule": config.schedule, "granularity": config.granularity}
    write_json(Path(folder) / RECORD_FILE, {**settings, **more, "stages": stages})


@contextmanager
def uncalibrated(model: Any) -> Iterator[None]:
    """Inside, a network with fine parameters runs as it would without them."""
    neurons = [neuron for _, neuron in model.neurons()]
    kept = [(neuron.fine_threshold.detach().clone(), neuron.initial_potential.detach().clone()) for neuron in neurons]
    with torch.no_grad():
        for neuron in neurons:
            neuron.fine_threshold.copy_(neuron.threshold.expand_as(neuron.fine_threshold))
            neuron.initial_potential.fill_(0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for neuron, (threshold, potential) in zip(neurons, kept, strict=True):
                neuron.fine_threshold.copy_(threshold)
                neuron.initial_potential.copy_(potential)


def check_calibratable(model: Any) -> None:
    """Raise for a model that has no fine parameters, or whose thresholds went into its weights."""
    if model.config.calib_T is None:
        raise ValueError("`model` must have fine thresholds to calibrate. Call model.begin_calibration(T) first.")
    if model.config.folded:
        raise ValueError("`model` must not be folded: calibrate before its thresholds go into its weights.")
    if auto_class(model) == "AutoModelForQuestionAnswering":
        raise ValueError(f"`model` must have one output to compare, got {type(model).__name__}, which has two.")


@dataclass
class Emitted:
    """What a site emitted in one call, averaged over time.

    Attributes:
        average: `(B, …)`; its gradient is that of the site.
        threshold: That the site ran with, as a function, so that a hook saves nothing for the gradient.
        mean_square: `(B, …)`, detached, where spikes both ways may cancel in the average; else the threshold times the
            average is the mean of the squares. `None` where nothing varies over time.
    """

    average: torch.Tensor
    threshold: Callable[[], torch.Tensor] | None = None
    mean_square: torch.Tensor | None = None

    def variance(self) -> torch.Tensor:
        """Variance over the timesteps; 0 in layerwise mode. Spikes that cancel count, and have no gradient."""
        if self.threshold is None:
            return torch.zeros_like(self.average)
        if self.mean_square is None:
            return self.average * (self.threshold() - self.average)
        square = self.threshold() * self.average.abs()
        return square + (self.mean_square - square).detach() - self.average.square()


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Emitted]]:
    """Record what every site emits, by name."""
    record: dict[str, Emitted] = {}

    def hook(name):
        def keep(neuron, _inputs, output):
            # Saves no tensor for its gradient: recomputing a checkpointed block without the hook sees the same graph.
            if not neuron.stepwise:
                record[name] = Emitted(output)
                return
            steps, positions = output.unflatten(0, (neuron.T, -1)), getattr(here, "positions", None)
            square = steps.detach().square().mean(0) if neuron.signed else None
            record[name] = Emitted(steps.mean(0), partial(_threshold, neuron, output.shape[-2], positions), square)

        return keep

    handles = [neuron.register_forward_hook(hook(name)) for name, neuron in model.neurons()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _threshold(neuron: Any, length: int, positions: Any) -> torch.Tensor:
    """The threshold of a site in the call that had these positions."""
    here.positions = positions
    return neuron.thresholds(length)[0]


def real_tokens(inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """`(B, S)`: True where there is no padding."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool().flatten(0, -2)
    ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=logits.device)


def _mean_of_site(values, rows, mask, num_rows, num_tokens) -> torch.Tensor:
    """Mean over the elements of a site, or over those of real tokens where there is a mask; `rows` is `(B, S)`.

    A site without rows of its own is pooled, one value a sequence.
    """
    if mask is None:
        return values.mean()
    if rows is None:
        return values.mean(-1).sum() / num_rows
    return values.mean(-1).view(rows).masked_fill(~mask, 0).sum() / num_tokens


def answer(output: Any) -> torch.Tensor:
    """What the output of a network is judged by: its logits, or without a head its last hidden states."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def error_of_output(core: Any, given: torch.Tensor, wanted: torch.Tensor, mask: Any, *counts: Any) -> torch.Tensor:
    """[`output_error`] of logits; of hidden states the squared error over the square, a mean over real tokens."""
    if auto_class(core) != "AutoModel":
        return output_error(given, wanted, predicts_next(core), mask, *counts)
    given, wanted = given.float(), wanted.float()
    errors = (given - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
    if mask is None:
        return errors.mean()
    tokens = counts[1] if len(counts) > 1 and counts[1] is not None else mask.sum()
    return errors.masked_fill(~mask, 0).sum() / tokens


def output_error(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None = None,
    num_rows: torch.Tensor | int | None = None,
    num_tokens: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """KL(ANN ‖ spiking), by position where logits have positions; the squared error of a regression.

    Args:
        logits: `(B, classes)`, or `(B, S, vocabulary)`, which is judged where a next token follows if `causal`.
        teacher: The ANN's, of the same shape.
        causal: Whether position s speaks of token s + 1.
        mask: `(B, S)`, true where there is no padding; without it, the published sum over positions.
        num_rows: To divide by, of the accumulated batch; those at hand by default.
        num_tokens: In the same way.
    """
    logits, teacher = logits.float(), teacher.float()
    rows = len(logits) if num_rows is None else num_rows
    if logits.dim() == 2 and logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher, reduction="sum") / (len(logits) if mask is None else rows)
    if causal:
        logits, teacher = logits[:, :-1], teacher[:, :-1]
    target = teacher.log_softmax(-1)
    divergence = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
    if mask is None:
        return divergence.sum() / len(logits)
    if divergence.dim() == 1:
        return divergence.sum() / rows
    tokens = mask.sum() if num_tokens is None else num_tokens
    if causal:
        mask, tokens = mask[:, :-1] & mask[:, 1:], tokens - rows
    return divergence.masked_fill(~mask, 0).sum() / tokens
