"""What trackers are told of the sites of a network in training, at the steps that are logged and no others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from .evaluate.monitors import SpikeMonitor
from .evaluate.rows import Mode
from .layout import evaluating, label


# Callbacks that show logs on a console, where a line for every site is too much, or that take none.
CONSOLE = {"DefaultFlowCallback", "ProgressCallback", "PrinterCallback", "NotebookProgressCallback", "_AfterEachStep"}


def trackers(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Those that keep what is logged: what `--report_to` names, and a user's own."""
    return [each for each in callbacks if type(each).__name__ not in CONSOLE]


@torch.no_grad()
def site_scalars(
    model: Any, inputs: Mapping[str, torch.Tensor], errors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Numbers by site as the model runs now, on one batch: one more forward pass, without dropout.

    Args:
        model: A FAS model.
        inputs: Of the model; labels are dropped.
        errors: Of the sites against the ANN, where the loss has them.

    Returns:
        `WHAT/MODE/SITE` for the spike rate, the threshold, the initial potential, the shares of dead and of saturated
        neurons, and the error; and the spike rate of all.
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with evaluating(model), SpikeMonitor(model) as monitor:
        model(**given, **({"use_cache": False} if model.config.table.causal else {}))
    T = model.config.T
    mode = (Mode("spiking", T, model.config.schedule) if T else Mode("qcfs")).tag
    found = {f"spike_rate/{mode}/all": monitor.spike_rate}
    for name, neuron in model.neurons():
        fine = neuron.fine_threshold if T else None
        values = {"threshold": (neuron.threshold if fine is None else fine).mean()}
        values |= {} if fine is None else {"initial_potential": neuron.initial_potential.mean()}
        values |= {} if errors is None or name not in errors else {"site_error": errors[name]}
        site = monitor.sites.get(name)
        if site is not None and site.steps:
            said = site.summary()
            values |= {"spike_rate": said["spike_rate"]}
            values |= {f"{kind}_share": said[kind] / said["neurons"] for kind in ("dead", "saturated")}
        found |= {f"{what}/{mode}/{label(name)}": float(value) for what, value in values.items()}
    return found
