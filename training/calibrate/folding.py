"""Folding: thresholds into the weights that follow them, so that what travels between layers is 0 or 1."""

from typing import Any

import torch
from torch import nn

from modeling_fas import MIN_THRESHOLD


@torch.no_grad()
def fold_thresholds(model: Any) -> None:
    """Multiply every (fine) threshold into the weight that follows its site, in place: what travels is then 0 or 1.

    `W · (θ s) = (W θ) s`, so the outputs stay what they were, up to rounding, in every mode. The transform of the
    masked language modelling head keeps its threshold, since a norm follows it.

    Raises:
        ValueError: at granularity `"position"`, where a weight would have to know the position; for a model that is
            folded already; or for a bare BERT with a pooler, whose head is elsewhere.
    """
    if model.config.folded:
        raise ValueError("`model` must not be folded already.")
    if model.config.calib_T is not None and model.config.granularity == "position":
        raise ValueError(
            "`granularity` must be 'neuron' or 'layer' to fold, got 'position': a weight serves all positions. "
            "Calibrate with granularity 'neuron'."
        )
    if model.config.backbone == "bert" and not hasattr(model, "cls") and not hasattr(model, "classifier"):
        raise ValueError(f"`model` must have its head, which the pooler folds into, got {type(model).__name__}.")
    for name, neuron in model.neurons():
        weight, inputs_first = _following(model, name)
        if weight is None:
            continue
        threshold = neuron.threshold if neuron.fine_threshold is None else neuron.fine_threshold
        threshold = threshold.clamp(MIN_THRESHOLD)
        weight.mul_(threshold[:, None] if inputs_first and len(threshold) > 1 else threshold)
        neuron.folded = True
    model.config.folded = True


def _following(model: Any, name: str) -> tuple[nn.Parameter | None, bool]:
    """Weight that follows a site, and whether its inputs come first; none where a norm follows."""
    if name.endswith("mlp.act"):
        return model.get_submodule(name.removesuffix("act") + "c_proj").weight, True
    if name.endswith("intermediate_act_fn"):
        layer = name.removesuffix(".intermediate.intermediate_act_fn")
        return model.get_submodule(f"{layer}.output.dense").weight, False
    return (model.classifier.weight if name.endswith("pooler.activation") else None), False
