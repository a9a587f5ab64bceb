"""The calibration forward: T spiking copies of a batch against the ANN, with the parts of the loss by site."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import unwrap_model


@dataclass
class CalibrationLoss:
    """Loss of one batch: `loss` is the sum of `output` and of the parts in `sites`."""

    loss: torch.Tensor
    output: torch.Tensor
    sites: dict[str, torch.Tensor]


def calibration_loss(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    *,
    num_rows: torch.Tensor | int | None = None,
    num_tokens: torch.Tensor | int | None = None,
) -> CalibrationLoss:
    """Compare the spiking network at `config.calib_T` with the ANN, site by site and at the output.

    Args:
        model: Calibrated; may be wrapped for data-parallel training.
        inputs: Of the model; `labels` are ignored.
        num_rows: Rows of the accumulated batch, where this is a part of it; its own by default.
        num_tokens: Its tokens without padding, in the same way.
    """
    core: Any = unwrap_model(model)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    num_rows = ids.shape[0] if num_rows is None else num_rows
    num_tokens = mask.sum() if num_tokens is None else num_tokens

    with torch.no_grad(), _recorded(core, 0) as teacher:
        teacher_logits = model(**inputs)["logits"]
    with _recorded(core, core.config.calib_T) as student:
        logits = model(**inputs)["logits"]

    sites = {}
    for name, target in teacher.items():
        error = (student[name].unflatten(0, (-1, ids.shape[0])).mean(0) - target).float().square().mean(-1)
        sites[name] = (error * mask).sum() / num_tokens if error.dim() == 2 else error.sum() / num_rows
    if logits.dim() == 3:
        divergence = _divergence(teacher_logits[:, :-1], logits[:, :-1]) * mask[:, 1:]
        output = divergence.sum() / num_tokens
    elif logits.shape[-1] == 1:
        output = F.mse_loss(logits, teacher_logits, reduction="sum") / num_rows
    else:
        output = _divergence(teacher_logits, logits).sum() / num_rows
    return CalibrationLoss(loss=torch.stack([output, *sites.values()]).sum(), output=output, sites=sites)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) of the distributions the logits stand for, over the last dimension."""
    teacher, student = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


@contextmanager
def _recorded(model: Any, T: int) -> Iterator[dict[str, torch.Tensor]]:
    """Run the model at T timesteps and record what every site emits."""
    record: dict[str, torch.Tensor] = {}
    handles = [
        neuron.register_forward_hook(lambda _module, _inputs, output, name=name: record.__setitem__(name, output))
        for name, neuron in model.neurons()
    ]
    model.set_timesteps(T, "stepwise")
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
