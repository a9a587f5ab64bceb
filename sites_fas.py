"""Neuron sites: the modules that hold thresholds, where they stand in a stock model, and how time passes through it.

This file travels to the Hub inside every checkpoint, between `neurons_fas.py` and `modeling_fas.py`. Shapes: `T`
timesteps (leading), `B` batch, `S` sequence, `D` neurons.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


try:
    from .configuration_fas import Backbone, Site  # type: ignore[import-not-found]
    from .neurons_fas import MIN_THRESHOLD, integrate_and_fire, spike_rate  # type: ignore[import-not-found]
except ImportError:
    from configuration_fas import Backbone, Site
    from neurons_fas import MIN_THRESHOLD, integrate_and_fire, spike_rate


class _Call(threading.local):
    """Of the call that runs in this thread: the positions of its tokens, `(B, S)` or a slice; None: the first ones."""

    positions: Any = None


call = _Call()


class FASNeuron(nn.Module):
    """A neuron site: QCFS at T = 0, integrate-and-fire at T > 0.

    Holds `threshold` of shape `(1,)`; once calibrated `fine_threshold` and `initial_potential` (a fraction of the
    threshold), of shape `(1,)`, `(D,)` or `(S, D)` by granularity, which take its place at T > 0. No state survives a
    call. The model keeps `L`, `T` and `schedule` as its configuration says.

    Args:
        config ([`FASConfig`])
        width (`int`): neurons of the site, D.
        per_position (`bool`, defaults to `True`): whether the input has a sequence dimension (a pooler's has none).
        signed (`bool`, defaults to `False`): whether the neurons spike both ways.
        folds (`bool`, defaults to `True`): whether a linear layer follows, which the threshold can fold into.
    """

    def __init__(self, config, width: int, per_position: bool = True, signed: bool = False, folds: bool = True):
        super().__init__()
        self.width, self.per_position, self.signed = width, per_position, signed
        self.initial_threshold = config.initial_threshold
        self.L, self.T, self.schedule = config.L, config.T, config.schedule
        self.folded = config.folded and folds  # what follows holds the threshold: emit spikes, not threshold · spikes
        self.threshold = nn.Parameter(torch.full((1,), config.initial_threshold))
        self.register_parameter("fine_threshold", None)
        self.register_parameter("initial_potential", None)
        if config.calib_T is not None:
            self.refine(config.granularity, config.calib_length)

    @property
    def stepwise(self) -> bool:
        """Whether the site emits spike trains, `(T·B, …)`, rather than one value per input."""
        return self.T > 0 and self.schedule == "stepwise"

    def refine(self, granularity: str, length: int | None = None) -> None:
        """Give the site fine thresholds, equal to its threshold, and initial potentials of 1/2."""
        by_position = granularity == "position" and self.per_position
        shape = [length or 1] * by_position + [1 if granularity == "layer" else self.width]
        self.fine_threshold = nn.Parameter(self.threshold.detach().expand(shape).clone())
        self.initial_potential = nn.Parameter(torch.full_like(self.fine_threshold, 0.5))

    def reset_parameters(self) -> None:
        """Set every parameter that no checkpoint provides to its initial value."""
        nn.init.constant_(self.threshold, self.initial_threshold)
        if self.fine_threshold is not None:
            nn.init.constant_(self.fine_threshold, self.initial_threshold)
            nn.init.constant_(self.initial_potential, 0.5)

    def thresholds(self, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Threshold and initial potential (`None`: 1/2), `(1,)`, `(D,)`, `(S, D)` or `(B, S, D)`, for S columns."""
        if self.fine_threshold is None or self.T == 0:
            return self.threshold, None
        if self.fine_threshold.dim() < 2:
            return self.fine_threshold, self.initial_potential
        rows = slice(0, length) if call.positions is None else call.positions
        reached = rows.stop if isinstance(rows, slice) else int(rows.max()) + 1
        if reached > len(self.fine_threshold):
            raise ValueError(
                f"`input_ids` must not reach beyond the {len(self.fine_threshold)} positions that the fine thresholds "
                f"were calibrated for, got {reached}. Shorten the input, or calibrate with granularity 'neuron', "
                "which has no such limit."
            )
        return self.fine_threshold[rows], self.initial_potential[rows]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)` or `(B, D)`, `(T·B, …)` in stepwise mode): the input
                currents.

        Returns:
            `torch.Tensor`: threshold times spikes, `(T·B, …)`, time-major, in stepwise mode; their time average,
            `(B, …)`, in layerwise mode; the QCFS activation, `(B, …)`, at T = 0. All divided by the (fine) threshold
            where that is folded into the weights that follow.
        """
        emitted = self._emit(hidden_states)
        if not self.folded:
            return emitted
        threshold = self.threshold if self.fine_threshold is None else self.fine_threshold
        return (emitted / threshold.clamp(min=MIN_THRESHOLD)).to(emitted.dtype)

    def _emit(self, hidden_states: torch.Tensor) -> torch.Tensor:
        threshold, potential = self.thresholds(hidden_states.shape[-2])
        if not self.stepwise:
            return spike_rate(hidden_states, threshold, potential, self.T or self.L, self.signed)
        if potential is None:
            potential = torch.full_like(threshold, 0.5)
        steps = hidden_states.unflatten(0, (self.T, -1))
        return integrate_and_fire(steps, threshold, potential, self.T, self.signed).flatten(0, 1)

    def extra_repr(self) -> str:
        fine = "" if self.fine_threshold is None else f", fine={tuple(self.fine_threshold.shape)}"
        signed = ", signed" if self.signed else ""
        return f"{self.width}, L={self.L}, T={self.T}, schedule={self.schedule}{signed}{fine}"


# ---------------------------------------------------------------------------------------------------------------------
# Sites
# ---------------------------------------------------------------------------------------------------------------------


def place_sites(model: PreTrainedModel, table: Backbone) -> None:
    """Put a neuron at every site of the table that the model has, and let its parts initialise neurons."""
    for block in trunk(model).get_submodule(table.blocks):
        for site in table.sites:
            _place(model, block, site)
    for site in table.outer_sites:
        for parent in (model, model.base_model):
            if find(parent, site.path) is not None:
                _place(model, parent, site)
                break
    for module in model.modules():
        # transformers asks every pretrained part of a model to initialise what is below it.
        if isinstance(module, PreTrainedModel) and module is not model:
            vars(module)["_init_weights"] = functools.partial(_init_weights, module._init_weights)


def _place(model: PreTrainedModel, parent: nn.Module, site: Site) -> None:
    width = getattr(model.config, site.width)
    neuron = FASNeuron(model.config, width, site.per_position, site.signed, folds=site.target is not None)
    if site.at == "input":
        layer = parent.get_submodule(site.path)
        layer.add_module("site", neuron)
        layer.register_forward_pre_hook(_emit)
        return
    path, _, leaf = site.path.rpartition(".")
    owner = parent.get_submodule(path)
    owner.__dict__.pop(leaf, None)  # a plain function
    owner.register_module(leaf, neuron)


def _emit(layer: Any, args: tuple) -> tuple:
    return (layer.site(args[0]), *args[1:])


def _init_weights(stock: Callable, module: nn.Module) -> None:
    stock(module)
    if isinstance(module, FASNeuron):
        module.reset_parameters()


def find(parent: Any, path: str) -> Any:
    """The module or function at a path, or None."""
    for name in path.split("."):
        parent = getattr(parent, name, None)
    return parent


def trunk(model: PreTrainedModel) -> Any:
    """The module, under every head, that a batch runs through."""
    return model.base_model.get_submodule(model.config.table.trunk)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


class Time:
    """The hooks of one model: a batch enters the first block T times, and leaves the trunk as its time average.

    Attributes:
        every_step: The batch comes as T·B rows, and leaves as many: averages of the first 1, 2 … T timesteps.
    """

    def __init__(self, config):
        self.config = config
        self.every_step = False

    @property
    def steps(self) -> int:
        """Timesteps that a batch holds as rows."""
        return self.config.T if self.config.schedule == "stepwise" and self.config.T else 1

    def enter_trunk(self, trunk: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the neurons, and check what no stock model checks."""
        sync(trunk)
        inputs = _inputs(args, kwargs)
        if inputs is None:
            return  # the stock model says what is missing
        if 0 in inputs.shape[:2]:
            raise ValueError(f"`input_ids` must hold at least one token, got shape {tuple(inputs.shape[:2])}.")
        if self.steps > 1 and kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "`cu_seq_lens_q` must not be given in stepwise mode, whose batch has T times the rows it speaks of. "
                "Give `position_ids` alone, or use the layerwise schedule."
            )
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        self._check_positions(kwargs.get("position_ids"), past, inputs.shape[1])

    def _check_positions(self, position_ids: torch.Tensor | None, past: Any, length: int) -> None:
        config = self.config
        limit = None if config.table.positions is None else config.max_position_embeddings + config.table.positions
        reached, name = past + length, "input_ids"
        if position_ids is not None and limit is not None:
            # Looking at values would break a compiled graph, and wait for an accelerator.
            cheap = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
            reached, name = int(position_ids.max()) + 1 if cheap else 0, "position_ids"
            limit = config.max_position_embeddings
        if limit is not None and isinstance(reached, int) and reached > limit:
            raise ValueError(
                f"`{name}` must not be longer than the {limit} positions of the model, got {reached} (cached tokens "
                "included). Truncate the input, or generate fewer tokens."
            )
        if config.granularity == "position":
            call.positions = slice(past, past + length) if position_ids is None else position_ids

    def enter_first_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Repeat a batch for every timestep."""
        repeats = 1 if self.every_step else self.steps
        return self._with_rows(repeats * len(_hidden_states(args, kwargs)), args, kwargs)

    def enter_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Repeat what a block gets for B rows: masks and positions."""
        return self._with_rows(len(_hidden_states(args, kwargs)), args, kwargs)

    def _with_rows(self, rows: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.config.granularity == "position" and kwargs.get("position_ids") is not None:
            call.positions = kwargs["position_ids"]  # again, for a block that gradient checkpointing runs by itself
        steps = self.steps
        if steps == 1:
            return None

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() < 2 or steps * len(tensor) != rows:
                return tensor
            return tensor.repeat(steps, *[1] * (tensor.dim() - 1))

        return _map(repeat, args), _map(repeat, kwargs)

    def enter_same(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Keep the rows of one timestep, where all are the same: before the first site."""
        steps = self.steps
        if steps == 1:
            return None
        rows = len(_hidden_states(args, kwargs))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[: rows // steps] if tensor.dim() > 1 and len(tensor) == rows else tensor

        return _map(keep, args), _map(keep, kwargs)

    def leave_same(self, module: Any, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Give every timestep what the one had."""
        if self.steps == 1:
            return None
        return _map(lambda tensor: tensor.repeat(self.steps, *[1] * (tensor.dim() - 1)), outputs)

    def leave_trunk(self, but: str, trunk: Any, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Average over time all that has T·B rows, the output named `but` excepted."""
        if self.steps == 1:
            return None
        inputs: Any = _inputs(args, kwargs)
        rows = len(inputs) * (1 if self.every_step else self.steps)

        def average(tensor: torch.Tensor) -> torch.Tensor:
            return self.average(tensor) if len(tensor) == rows else tensor

        if isinstance(outputs, tuple):
            return (outputs[0] if but else average(outputs[0]), *_map(average, outputs[1:]))
        for name, value in list(outputs.items()):
            if name != but:
                outputs[name] = _map(average, value)
        return outputs

    def average(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(T·B, …)` to `(B, …)`, or to as many averages of the first t timesteps."""
        steps = hidden_states.unflatten(0, (self.steps, -1))
        if not self.every_step:
            return steps.mean(0)
        count = torch.arange(1, len(steps) + 1, device=steps.device, dtype=steps.dtype)
        return (steps.cumsum(0) / count.view(-1, *[1] * (steps.dim() - 1))).flatten(0, 1)

    def leave_head(self, module: Any, args: tuple, output: torch.Tensor) -> Any:
        """Average over time where a head has a site of its own."""
        return None if self.steps == 1 else self.average(output)


def carry_time(model: PreTrainedModel, table: Backbone, time: Time) -> None:
    """Hook the trunk, its blocks, what is the same at all timesteps, and where time ends."""
    whole = trunk(model)
    whole._synced = None
    whole.register_forward_pre_hook(time.enter_trunk, with_kwargs=True)
    last = find(model, table.time_ends) if table.time_ends else None
    but = "last_hidden_state" if last is not None else ""
    whole.register_forward_hook(functools.partial(time.leave_trunk, but), with_kwargs=True)
    if last is not None:
        last.register_forward_hook(time.leave_head)
    first, *others = whole.get_submodule(table.blocks)
    first.register_forward_pre_hook(time.enter_first_block, with_kwargs=True)
    for block in others:
        block.register_forward_pre_hook(time.enter_block, with_kwargs=True)
    for path in table.first_products:
        first.get_submodule(path).register_forward_pre_hook(time.enter_same, with_kwargs=True)
        first.get_submodule(path).register_forward_hook(time.leave_same, with_kwargs=True)


def _inputs(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a trunk is called on: ids, or embeddings."""
    ids = args[0] if args and args[0] is not None else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a stock module is called on: its first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _map(function: Callable, value: Any) -> Any:
    """The value with `function` applied to all tensors in its tuples and mappings."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_map(function, each) for each in value)
    if type(value) is dict:
        return {name: _map(function, each) for name, each in value.items()}
    return value


def forget_positions(*_: Any) -> None:
    call.positions = None


def sync(module: Any, *_: Any) -> None:
    """Make every neuron in a module, copies made by adapters included, run as its configuration says."""
    settings = (module.config.L, module.config.T, module.config.schedule)
    if module._synced != settings:
        for each in module.modules():
            if isinstance(each, FASNeuron):
                each.L, each.T, each.schedule = settings
            elif "_synced" in vars(each):
                each._synced = settings  # the trunk too, so that a compiled call has nothing left to change
