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
from transformers import AttentionInterface, PreTrainedModel


try:
    from .configuration_fas import Site  # type: ignore[import-not-found]
    from .neurons_fas import (  # type: ignore[import-not-found]
        MIN_THRESHOLD,
        encode,
        integrate_and_fire,
        spike_count,
        spike_rate,
        spike_train,
    )
except ImportError:
    from configuration_fas import Site
    from neurons_fas import MIN_THRESHOLD, encode, integrate_and_fire, spike_count, spike_rate, spike_train


class _Call(threading.local):
    """Of the call that runs in this thread: the positions of its tokens, `(B, S)` or a slice; None: the first ones."""

    positions: Any = None


call = _Call()


class FASNeuron(nn.Module):
    """A neuron site: a quantiser at T = 0 (QCFS, where unsigned), integrate-and-fire or another code at T > 0.

    Holds `threshold` of shape `(1,)`; once calibrated `fine_threshold` and `initial_potential` (a fraction of the
    threshold), of shape `(1,)`, `(D,)` or `(S, D)` by granularity, which take its place at T > 0; with gain `"token"`
    also `gain`, `(1,)`. No state survives a call. The model keeps `L`, `T`, `schedule`, `code` and `code_base` as its
    configuration says.

    Args:
        config ([`FASConfig`])
        width (`int`): neurons of the site, D.
        site ([`Site`], *optional*): its entry in the table.
    """

    def __init__(self, config, width: int, site: Site | None = None):
        super().__init__()
        site = Site("", feeds="") if site is None else site
        self.width, self.signed = width, site.signed
        self.per_position, self.after_time = site.per_position, site.after_time
        self.initial_threshold = config.initial_threshold
        self.follow(config)
        # What follows holds the threshold: emit spikes, not threshold · spikes.
        self.folded = config.folded and (bool(site.targets) or site.feeds == "")
        self.threshold = nn.Parameter(torch.full((1,), config.initial_threshold))
        self.register_parameter("fine_threshold", None)
        self.register_parameter("initial_potential", None)
        self.gain: nn.Parameter | None
        self.register_parameter("gain", nn.Parameter(torch.ones(1)) if config.gain == "token" else None)
        if config.calib_T is not None:
            self.refine(config.granularity, config.calib_length)

    def follow(self, config) -> None:
        """Run as a configuration says from now on."""
        self.L, self.T, self.schedule = config.L, config.T, config.schedule
        self.code, self.code_base = config.code, config.code_base

    @property
    def stepwise(self) -> bool:
        """Whether the site emits spike trains, `(T·B, …)`, rather than one value per input."""
        return self.T > 0 and self.schedule != "layerwise" and not self.after_time

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
        if self.gain is not None:
            nn.init.constant_(self.gain, 1.0)

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
            `torch.Tensor`: threshold times spikes, `(T·B, …)`, time-major, in stepwise mode; their time average (or
            weighted sum, by code), `(B, …)`, in layerwise mode; the quantised input, `(B, …)`, at T = 0, and the
            input itself without levels. All divided by the (fine) threshold where that is folded into the weights
            that follow.
        """
        emitted = self._emit(hidden_states, *self._running(hidden_states))
        if not self.folded:
            return emitted
        threshold = self.threshold if self.fine_threshold is None else self.fine_threshold
        return (emitted / threshold.clamp(min=MIN_THRESHOLD)).to(emitted.dtype)

    @torch.no_grad()
    def count_spikes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Spikes that the site answers with, of either sign: whole numbers of the shape of what it emits."""
        threshold, potential = self._running(hidden_states)
        emitted = self._emit(hidden_states, threshold, potential)
        if self.stepwise:
            return spike_count(emitted.unflatten(0, (self.T, -1)), threshold, 1, "rate").flatten(0, 1)
        return spike_count(emitted, threshold, self.T or self.L or 1, self.code if self.T else "rate")

    @torch.no_grad()
    def trains(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Spikes that the site answers with, step by step, `(T, B, …, D)`: -1, 0 or 1."""
        threshold, potential = self._running(hidden_states)
        if not self.stepwise and self.code != "rate":
            return spike_train(hidden_states, threshold, self.T, self.code, self.code_base, self.signed)
        steps = hidden_states.unflatten(0, (self.T, -1)) if self.stepwise else hidden_states[None]
        start = torch.full_like(threshold, 0.5) if potential is None else potential
        emitted = integrate_and_fire(steps, threshold, start, self.T, self.signed)
        return (emitted / threshold.clamp(min=MIN_THRESHOLD)).round()

    def _running(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Threshold and initial potential for an input; the threshold is `(B, S, D)` where it goes by token."""
        threshold, potential = self.thresholds(hidden_states.shape[-2])
        if self.gain is None:
            return threshold, potential
        largest = (hidden_states.detach() / threshold.detach().clamp(min=MIN_THRESHOLD)).abs().amax(-1, keepdim=True)
        return threshold * self.gain * largest.to(threshold.dtype), potential

    def _emit(self, hidden_states: torch.Tensor, threshold: torch.Tensor, potential: Any) -> torch.Tensor:
        if self.T == 0 and self.L is None:
            return hidden_states
        if self.stepwise:
            potential = torch.full_like(threshold, 0.5) if potential is None else potential
            steps = hidden_states.unflatten(0, (self.T, -1))
            return integrate_and_fire(steps, threshold, potential, self.T, self.signed).flatten(0, 1)
        if self.T == 0 or self.code == "rate":
            return spike_rate(hidden_states, threshold, potential, self.T or self.L, self.signed)
        return encode(hidden_states, threshold, self.T, self.code, self.code_base, self.signed)

    def extra_repr(self) -> str:
        fine = "" if self.fine_threshold is None else f", fine={tuple(self.fine_threshold.shape)}"
        signed = ", signed" if self.signed else ""
        return f"{self.width}, L={self.L}, T={self.T}, schedule={self.schedule}{signed}{fine}"


# ---------------------------------------------------------------------------------------------------------------------
# Sites
# ---------------------------------------------------------------------------------------------------------------------


def place_sites(model: Any) -> None:
    """Put a neuron at every site that the configuration asks for, and let the model's parts initialise neurons."""
    inner, outer = model.config.placed
    for block in trunk(model).get_submodule(model.config.table.blocks):
        for site in inner:
            _place(model, block, site)
    for site in outer:
        for parent in (model, model.base_model):
            if find(parent, site.path) is not None:
                _place(model, parent, site)
                break
    for module in model.modules():
        # transformers asks every pretrained part of a model to initialise what is below it.
        if isinstance(module, PreTrainedModel) and module is not model:
            vars(module)["_init_weights"] = functools.partial(_init_weights, module._init_weights)


def _place(model: Any, parent: Any, site: Site) -> None:
    config = model.config
    if site.at == "activation":
        path, _, leaf = site.path.rpartition(".")
        owner = parent.get_submodule(path)
        owner.__dict__.pop(leaf, None)  # a plain function
        owner.register_module(leaf, FASNeuron(config, getattr(config, site.width), site))
    elif site.at == "input":
        layer = parent.get_submodule(site.path)
        if not hasattr(layer, "weight"):
            return  # a head of several layers, the last of which has an entry of its own
        layer.add_module("site", FASNeuron(config, layer.weight.shape[isinstance(layer, nn.Linear)], site))
        if site.through is None:
            layer.register_forward_pre_hook(_emit_input)
        else:
            emit = functools.partial(_emit_shared, layer)
            parent.get_submodule(site.through).register_forward_pre_hook(emit, with_kwargs=True)
    else:
        _place_in_attention(model, parent, site)


def _place_in_attention(model: Any, parent: Any, site: Site) -> None:
    """Encode what a projection gives; queries after their rotation, where they have one."""
    table, core = model.config.table, parent.get_submodule(site.path)
    layers = [parent.get_submodule(path) for path in next(each.weights for each in table.products if each.weights)]
    index = 0 if site.at == "query" else 2
    layer, parts = (layers[index], 1) if len(layers) > 1 else (layers[0], 3)
    outputs = layer.weight.shape[not isinstance(layer, nn.Linear)] // parts
    core.add_module(f"{site.at}_site", FASNeuron(model.config, outputs, site))
    if site.at == "query" and table.positions is None:
        vars(core)["config"] = _AttentionConfig(core.config)
    else:
        layer.register_forward_hook(functools.partial(_emit_output, core, f"{site.at}_site", index, parts))


def _emit_input(layer: Any, args: tuple) -> tuple:
    return (layer.site(args[0]), *args[1:])


def _emit_shared(layer: Any, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    hidden_states = _hidden_states(args, kwargs)
    emitted = layer.site(hidden_states)
    return _map(lambda each: emitted if each is hidden_states else each, (args, kwargs))


def _emit_output(core: Any, name: str, index: int, parts: int, layer: Any, args: tuple, output: torch.Tensor) -> Any:
    if parts == 1:
        return getattr(core, name)(output)
    chunks = list(output.chunk(parts, dim=-1))
    chunks[index] = getattr(core, name)(chunks[index])
    return torch.cat(chunks, dim=-1)


class _AttentionConfig:
    """The configuration of an attention module, but for the attention it asks for: one that encodes queries."""

    def __init__(self, config):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    @property
    def _attn_implementation(self) -> str:
        return f"fas_{self.config._attn_implementation}"


def _spiking_attention(name: str, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    site = module.query_site
    flat = query.transpose(1, 2).flatten(2)
    if site.schedule == "accumulated" and site.T > 1:
        flat = running_mean(site(difference(flat, site.T)), site.T)
    else:
        flat = site(flat)
    query = flat.view(query.transpose(1, 2).shape).transpose(1, 2)
    attention = _eager_attention if name == "eager" else AttentionInterface()[name]
    return attention(module, query, *args, **kwargs)


def _eager_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if mask is None else scores + mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


for _name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3"):
    AttentionInterface.register(f"fas_{_name}", functools.partial(_spiking_attention, _name))


def _init_weights(stock: Callable, module: nn.Module) -> None:
    stock(module)
    if isinstance(module, FASNeuron):
        module.reset_parameters()


def find(parent: Any, path: str) -> Any:
    """The module or function at a path, or None."""
    for name in path.split("."):
        parent = getattr(parent, name, None)
    return parent


def trunk(model: Any) -> Any:
    """The module, under every head, that a batch runs through."""
    return model.base_model.get_submodule(model.config.table.trunk)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def running_mean(hidden_states: torch.Tensor, T: int) -> torch.Tensor:
    """The mean over the first t of T timesteps, for t = 1 … T: `(T·B, …)`, time-major."""
    steps = hidden_states.unflatten(0, (T, -1))
    return (steps.cumsum(0) / _count(steps)).flatten(0, 1)


def difference(means: torch.Tensor, T: int) -> torch.Tensor:
    """What has these running means: `t · mean_t - (t - 1) · mean_(t-1)`, `(T·B, …)`, time-major."""
    steps = means.unflatten(0, (T, -1))
    sums = steps * _count(steps)
    return torch.cat([sums[:1], sums[1:] - sums[:-1]]).flatten(0, 1)


def _count(steps: torch.Tensor) -> torch.Tensor:
    count = torch.arange(1, len(steps) + 1, device=steps.device, dtype=steps.dtype)
    return count.view(-1, *[1] * (steps.dim() - 1))


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
        return self.config.T if self.config.schedule != "layerwise" and self.config.T else 1

    @property
    def accumulates(self) -> bool:
        """Whether what is not linear sees running means, and emits differences."""
        return self.config.schedule == "accumulated" and self.config.T > 1

    def enter_trunk(self, trunk: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the neurons, and check what no stock model checks."""
        sync(trunk)
        inputs = _inputs(args, kwargs)
        if inputs is None:
            return  # the stock model says what is missing
        if 0 in inputs.shape[:2]:
            raise ValueError(f"`input_ids` must hold at least one token, got shape {tuple(inputs.shape[:2])}.")
        if trunk.config._attn_implementation == "flex_attention":
            raise ValueError(
                "`attn_implementation` must not be 'flex_attention': its masks know one number of rows. Use 'sdpa'."
            )
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
            first = config.table.positions or 0  # RoBERTa numbers tokens from 2 on
            call.positions = slice(past, past + length) if position_ids is None else position_ids + first

    def enter_first_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Repeat a batch for every timestep."""
        repeats = 1 if self.every_step else self.steps
        return self._with_rows(repeats * len(_hidden_states(args, kwargs)), args, kwargs)

    def enter_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Repeat what a block gets for B rows: masks and positions."""
        return self._with_rows(len(_hidden_states(args, kwargs)), args, kwargs)

    def _with_rows(self, rows: int, args: tuple, kwargs: dict[str, Any]) -> Any:
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
        if self.every_step:
            return running_mean(hidden_states, self.steps)
        return hidden_states.unflatten(0, (self.steps, -1)).mean(0)

    def mean_before(self, module: Any, args: tuple) -> Any:
        """Hand on the running mean of the input."""
        return (running_mean(args[0], self.config.T), *args[1:]) if self.accumulates else None

    def mean_after(self, module: Any, args: tuple, output: torch.Tensor) -> Any:
        """Hand on the running mean of the output."""
        return running_mean(output, self.config.T) if self.accumulates else None

    def difference_before(self, module: Any, args: tuple) -> Any:
        """Hand on what has the input for its running mean."""
        return (difference(args[0], self.config.T), *args[1:]) if self.accumulates else None

    def difference_after(self, module: Any, args: tuple, output: torch.Tensor) -> Any:
        """Hand on what has the output for its running mean."""
        return difference(output, self.config.T) if self.accumulates else None

    def leave_head(self, module: Any, args: tuple, output: torch.Tensor) -> Any:
        """Average over time where a head has a site of its own."""
        return None if self.steps == 1 else self.average(output)


def carry_time(model: Any, time: Time) -> None:
    """Hook the trunk, its blocks, what is the same at all timesteps, what is not linear, and where time ends."""
    table = model.config.table
    whole = trunk(model)
    whole._synced = None
    whole.register_forward_pre_hook(time.enter_trunk, with_kwargs=True)
    last = find(model, table.time_ends) if table.time_ends else None
    but = "last_hidden_state" if last is not None else ""
    whole.register_forward_hook(functools.partial(time.leave_trunk, but), with_kwargs=True)
    for path in (*table.outer_norms, *table.outer_activations):
        module = find(model, path) or find(model.base_model, path)
        if module is not None and not isinstance(module, FASNeuron):
            _accumulate_around(module, time)
    if last is not None:
        last.register_forward_hook(time.leave_head)
    first, *others = whole.get_submodule(table.blocks)
    first.register_forward_pre_hook(time.enter_first_block, with_kwargs=True)
    for block in others:
        block.register_forward_pre_hook(time.enter_block, with_kwargs=True)
    same = table.first_products if model.config.sites == "mlp" else ()
    for path in same:
        first.get_submodule(path).register_forward_pre_hook(time.enter_same, with_kwargs=True)
        first.get_submodule(path).register_forward_hook(time.leave_same, with_kwargs=True)
    _accumulate(first, model.config, time, same)
    for block in others:
        _accumulate(block, model.config, time)


def _accumulate(block: Any, config: Any, time: Time, same: tuple[str, ...] = ()) -> None:
    """Hook norms, attention and activation of a block, but for what runs for one timestep, which needs no mean."""
    table = config.table
    layers = {product.name: product.weights for product in table.products}
    for path in table.norms:
        if not path.startswith(tuple(f"{each}." for each in same)):
            _accumulate_around(block.get_submodule(path), time)
    spans = [("qkv", "attention output")]
    if not any(site.at == "activation" for site in config.placed[0]):
        spans.append(("mlp in", "mlp out"))
    for entering, leaving in spans:
        if not any(layers[entering][0] == each or layers[entering][0].startswith(f"{each}.") for each in same):
            for path in layers[entering]:
                block.get_submodule(path).register_forward_hook(time.mean_after)
            block.get_submodule(layers[leaving][0]).register_forward_pre_hook(time.difference_before, prepend=True)


def _accumulate_around(module: nn.Module, time: Time) -> None:
    module.register_forward_pre_hook(time.mean_before)
    module.register_forward_hook(time.difference_after)


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
    if not torch.is_grad_enabled():  # else blocks may run again, for their gradient
        call.positions = None


def sync(module: Any, *_: Any) -> None:
    """Make every neuron in a module, copies made by adapters included, run as its configuration says."""
    config = module.config
    settings = (config.L, config.T, config.schedule, config.code, config.code_base)
    if module._synced != settings:
        config.check()
        for each in module.modules():
            if isinstance(each, FASNeuron):
                each.follow(config)
            elif "_synced" in vars(each):
                each._synced = settings  # the trunk too, so that a compiled call has nothing left to change
