"""Folding: thresholds into the weights that follow them, so that what travels between layers is 0 or 1."""

from typing import Any

import torch
from torch import nn

from neurons_fas import MIN_THRESHOLD

from ..layout import sites


@torch.no_grad()
def fold_thresholds(model: Any) -> None:
    """Multiply every (fine) threshold into the weight that follows its site, in place: what travels is then 0 or 1.

    `W · (θ s) = (W θ) s`, so the outputs stay what they were, up to rounding, in every mode. The transform of the
    masked language modelling head keeps its threshold, since a norm follows it; so do queries and values. A head with
    a site of its own gets weights of its own. A layerwise phase or first-spike code hands on the weighted sum of its
    spikes, from -1 to 1.

    Raises:
        ValueError: at granularity `"position"`, where a weight would have to know the position; for a model that is
            folded already; or for one whose pooler has no head to fold into.
    """
    if model.config.folded:
        raise ValueError("`model` must not be folded already.")
    if model.config.gain == "token":
        raise ValueError("`gain` must be 'static' to fold, got 'token': no weight knows the token.")
    if model.config.L is None and model.config.T == 0:
        raise ValueError(
            "`T` must be at least 1 to fold a model without levels, got 0, the stock network, which folded "
            "weights do not fit. Set T with `set_timesteps`."
        )
    if model.config.calib_T is not None and model.config.granularity == "position":
        raise ValueError(
            "`granularity` must be 'neuron' or 'layer' to fold, got 'position': a weight serves all positions. "
            "Calibrate with granularity 'neuron'."
        )
    placed = sites(model)
    for each in placed:
        if len(each.targets) < len(each.site.targets):
            raise ValueError(
                f"`model` must have its head, which {each.name} folds into, got {type(model).__name__} without one."
            )
    for each in placed:
        if not each.targets:
            continue
        neuron = each.neuron
        threshold = neuron.threshold if neuron.fine_threshold is None else neuron.fine_threshold
        threshold = threshold.clamp(MIN_THRESHOLD)
        for target in each.targets:
            if target.weight is model.get_input_embeddings().weight:
                target.weight = nn.Parameter(target.weight.clone())
                model.config.tie_word_embeddings = False
            inputs_first = not isinstance(target, nn.Linear)  # a Conv1D of transformers
            target.weight.mul_(threshold[:, None] if inputs_first and len(threshold) > 1 else threshold)
        neuron.folded = True
    model.config.folded = True
