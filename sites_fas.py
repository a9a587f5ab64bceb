"""Neuron sites: the modules that hold thresholds, where they stand in a stock model, and how time passes through it.

This file travels to the Hub inside every checkpoint, between `neurons_fas.py` and `modeling_fas.py`. Shapes: `T`
timesteps (leading), `B` batch, `S` sequence, `D` neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D


try:
    from .configuration_fas import Site, here, mode, positions_of, running  # type: ignore[import-not-found]
    from .events_fas import receive_events  # type: ignore[import-not-found]
    from .neurons_fas import (  # type: ignore[import-not-found]
        at_least,
        encode,
        integrate_and_fire,
        spike_count,
        spike_rate,
        spike_train,
    )
except ImportError:
    from configuration_fas import Site, here, mode, positions_of, running
    from events_fas import receive_events
    from neurons_fas import at_least, encode, integrate_and_fire, spike_count, spike_rate, spike_train


class FASNeuron(nn.Module):
    """A neuron site: a quantiser at T = 0 (QCFS, where unsigned), integrate-and-fire or another code at T > 0.

    Holds `threshold` of shape `(1,)`; once calibrated `fine_threshold` and `initial_potential` (a fraction of the
    threshold), of shape `(1,)`, `(D,)` or `(S, D)` by granularity, which take its place at T > 0; with gain `"token"`
    also `gain`, `(1,)`. No state survives a call. `L`, `T`, `schedule`, `code` and `code_base` are those of the
    configuration.

    Args:
        config ([`FASConfig`])
        width (`int`): neurons of the site, D.
        site ([`Site`], *optional*): its entry in the table.
    """

    def __init__(self, config, width: int, site: Site | None = None):
        super().__init__()
        site = Site("", feeds="") if site is None else site
        self.width, self.signed = width, site.signed
        self.foldable = bool(site.targets) or site.feeds == ""
        self.per_position, self.after_time = site.per_position, site.after_time
        self.initial_threshold = config.initial_threshold
        self.read(config)
        # What follows holds the threshold: emit spikes, not threshold · spikes.
        self.folded = config.folded and self.foldable
        self.threshold = nn.Parameter(torch.full((1,), config.initial_threshold))
        self.register_parameter("fine_threshold", None)
        self.register_parameter("initial_potential", None)
        self.refined: tuple[int, ...] | None = None
        self.gain: nn.Parameter | None
        self.register_parameter("gain", nn.Parameter(torch.ones(1)) if config.gain == "token" else None)
        if config.calib_T is not None:
            self.refine(config.granularity, config.calib_length)

    T = property(lambda self: self.mode[0])
    schedule = property(lambda self: self.mode[1])
    L = property(lambda self: self.settings[2])
    code = property(lambda self: self.settings[3])
    code_base = property(lambda self: self.settings[4])

    def read(self, config) -> None:
        """Take over a configuration, whose own attributes are slow; in one, since a compiled call checks them all."""
        self.config = config
        self.settings = config.T, config.schedule, config.L, config.code, config.code_base, self.signed

    @property
    def mode(self) -> tuple[int, str]:
        """T and schedule, in this thread."""
        own = running(self.config)
        return self.settings[:2] if own is None else (own["T"], own["schedule"])

    @property
    def stepwise(self) -> bool:
        """Whether the site emits spike trains, `(T·B, …)`, rather than one value per input."""
        T, schedule = self.mode
        return T > 0 and schedule != "layerwise" and not self.after_time

    def fine_shape(self, granularity: str, length: int | None = None) -> tuple[int, ...]:
        """Shape of the fine thresholds."""
        by_position = granularity == "position" and self.per_position
        return (*[length or 1] * by_position, 1 if granularity == "layer" else self.width)

    def refine(self, granularity: str, length: int | None = None) -> None:
        """Give the site fine thresholds, equal to its threshold, and initial potentials of 1/2."""
        self.refined = shape = self.fine_shape(granularity, length)
        self.fine_threshold = nn.Parameter(self.threshold.detach().expand(shape).clone())
        self.initial_potential = nn.Parameter(torch.full_like(self.fine_threshold, 0.5))

    def reset_parameters(self) -> None:
        """Set every parameter that no checkpoint provides to its initial value."""
        nn.init.constant_(self.threshold, self.initial_threshold)
        if self.fine_threshold is not None:
            nn.init.constant_(self.fine_threshold, self.initial_threshold)  # `from_pretrained` knows better
            nn.init.constant_(self.initial_potential, 0.5)
        if self.gain is not None:
            nn.init.constant_(self.gain, 1.0)

    def thresholds(self, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Threshold and initial potential (`None`: 1/2), `(1,)`, `(D,)`, `(S, D)` or `(B, S, D)`, for S columns."""
        fine = self._parameters["fine_threshold"]
        if fine is None or self.mode[0] == 0:
            return self.threshold, None
        if fine.dim() < 2:
            return fine, self._parameters["initial_potential"]
        rows = getattr(here, "positions", None)
        rows = slice(0, length) if rows is None else rows
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
        return (emitted / at_least(threshold)).to(emitted.dtype)

    def before_all(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """As a hook of the module that hands one input to several layers: encode it once for all."""
        hidden_states = _hidden_states(args, kwargs)
        emitted = self(hidden_states)
        given = {name: emitted if each is hidden_states else each for name, each in kwargs.items()}
        return tuple(emitted if each is hidden_states else each for each in args), given

    def after(self, layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """As a hook of a layer: encode what it gives."""
        return self(output)

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
        return (emitted / at_least(threshold)).round()

    def _running(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Threshold and initial potential for an input; the threshold is `(B, S, D)` where it goes by token."""
        threshold, potential = self.thresholds(hidden_states.shape[-2])
        gain = self._parameters["gain"]
        if gain is None:
            return threshold, potential
        given, least = hidden_states, threshold
        if torch.is_grad_enabled():  # the range has no gradient
            given, least = given.detach(), least.detach()
        largest = (given / at_least(least)).abs_().amax(-1, keepdim=True)
        if largest.dtype != threshold.dtype:
            largest = largest.to(threshold.dtype)
        return threshold * gain * largest, potential

    def _emit(self, hidden_states: torch.Tensor, threshold: torch.Tensor, potential: Any) -> torch.Tensor:
        T, schedule = self.mode
        _, _, L, code, base, signed = self.settings
        if T == 0 and L is None:
            return hidden_states
        if T > 0 and schedule != "layerwise" and not self.after_time:
            potential = torch.full_like(threshold, 0.5) if potential is None else potential
            steps = hidden_states.unflatten(0, (T, -1))
            return integrate_and_fire(steps, threshold, potential, T, signed).flatten(0, 1)
        if T == 0 or code == "rate":
            return spike_rate(hidden_states, threshold, potential, T or L, signed)
        return encode(hidden_states, threshold, T, code, base, signed)

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
    for layer in fed_layers(model):
        if isinstance(layer, Conv1D):  # others need a copy of their weight: `read_events`
            receive_events(layer)
    for module in model.modules():
        # transformers asks every pretrained part of a model to initialise what is below it.
        if isinstance(module, PreTrainedModel) and module is not model:
            vars(module)["_init_weights"] = functools.partial(_init_weights, module._init_weights)


def fed_layers(model: Any) -> Iterator[Any]:
    """The linear layers that take what a site emits."""
    inner, outer = model.config.placed
    blocks = trunk(model).get_submodule(model.config.table.blocks)
    for parent, sites in (*((block, inner) for block in blocks), (model, outer), (model.base_model, outer)):
        for path in (path for site in sites for path in site.targets):
            layer = find(parent, path)
            if hasattr(layer, "weight"):
                yield layer


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
            parent.get_submodule(site.through).register_forward_pre_hook(layer.site.before_all, with_kwargs=True)
    else:
        _place_in_attention(model, parent, site)


def _place_in_attention(model: Any, parent: Any, site: Site) -> None:
    """Encode what a projection gives; queries after their rotation, where they have one."""
    table, core = model.config.table, parent.get_submodule(site.path)
    layers = [parent.get_submodule(path) for path in next(each.weights for each in table.products if each.weights)]
    index = 0 if site.at == "query" else 2
    layer, parts = (layers[index], 1) if len(layers) > 1 else (layers[0], 3)
    outputs = layer.weight.shape[not isinstance(layer, nn.Linear)] // parts
    neuron = FASNeuron(model.config, outputs, site)
    core.add_module(f"{site.at}_site", neuron)
    if site.at == "query" and table.positions is None:
        vars(core)["config"] = _AttentionConfig(core.config)
    elif parts == 1:
        layer.register_forward_hook(neuron.after)
    else:
        layer.register_forward_hook(functools.partial(_emit_part, neuron, index, parts))


def _emit_input(layer: Any, args: tuple) -> tuple:
    return (layer.site(args[0]), *args[1:])


def _emit_part(site: FASNeuron, index: int, parts: int, layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    chunks = list(output.chunk(parts, dim=-1))
    chunks[index] = site(chunks[index])
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
    site, by_token = module.query_site, query.transpose(1, 2)
    flat, (T, schedule) = by_token.flatten(2), site.mode
    accumulates = schedule == "accumulated" and T > 1
    flat = running_mean(site(difference(flat, T)), T) if accumulates else site(flat)
    query = flat.view(by_token.shape).transpose(1, 2)
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


@contextmanager
def state(config: Any, **settings: Any) -> Iterator[None]:
    """Run as a configuration with other settings, in this thread, for the duration of a `with` block."""
    here.running = [*getattr(here, "running", ()), (config, settings)]
    try:
        yield
    finally:
        here.running = [each for each in here.running if each[1] is not settings]


def checkpoint_call(checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint a block such that it runs again as in the call at hand, in whatever thread its gradient needs it."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args)
    kept = dict(vars(here))

    def run(*args: Any) -> Any:
        before = dict(vars(here))
        try:
            vars(here).update(kept)
            return function(*args)
        finally:
            vars(here).clear()
            vars(here).update(before)

    return checkpoint(run, *args)


class Time:
    """The hooks of one model: a batch enters the first block T times, and leaves the trunk as its time average."""

    def __init__(self, config, neurons: list[FASNeuron]):
        self.config, self.neurons = config, neurons
        self.built = self._structure()
        self.calibrations = 0  # begun so far
        self.set_by: dict[Any, tuple] = {}  # what threads set it to, the last one last
        self.hooks: Callable | None = None  # to be set where a schedule has rows for timesteps

    @property
    def every_step(self) -> bool:
        """Whether the batch comes as T·B rows, and leaves as many: averages of the first 1, 2 … T timesteps."""
        return (running(self.config) or {}).get("every_step", False)

    @property
    def steps(self) -> int:
        """Timesteps that a batch holds as rows."""
        T, schedule = mode(self.config)
        return T if T and schedule != "layerwise" else 1

    @property
    def accumulates(self) -> bool:
        """Whether what is not linear sees running means, and emits differences."""
        T, schedule = mode(self.config)
        return schedule == "accumulated" and T > 1

    def set_here(self) -> None:
        """Remember what this thread set the model to."""
        vars(here).setdefault("thread", object())
        self.set_by.pop(here.thread, None)
        self.set_by[here.thread] = self.config.T, self.config.schedule

    def check_thread(self) -> None:
        """Raise if another thread has set the model to something else since this one did."""
        thread = getattr(here, "thread", None)
        mine, now = self.set_by.get(thread), (self.config.T, self.config.schedule)
        if mine not in (None, now) and thread is not next(reversed(self.set_by)):
            raise ValueError(
                f"`set_timesteps` must not be called with other values in two threads: this one set {mine}, another "
                f"one then {now}. Use `with model.running(T, schedule):`, which holds for one thread only."
            )

    def hook(self) -> None:
        """Hook what rows for timesteps need, once, where a schedule has them: a token pays for every hook."""
        if self.hooks is not None and len(self.config.schedules) > 1:
            hooks, self.hooks = self.hooks, None
            hooks()

    def _structure(self) -> dict[str, Any]:
        activation = self.config._renamed.get("activation", "activation")
        return {name: getattr(self.config, name) for name in ("sites", activation, "gain")}

    def check_structure(self) -> None:
        """Raise if the configuration no longer says what the model was made as: it would load as something else."""
        config = self.config
        pairs = [(name, value, getattr(config, name)) for name, value in self.built.items()]
        pairs += [("folded", each.folded, config.folded) for each in self.neurons if each.foldable]
        for each in self.neurons:
            shape = None if config.calib_T is None else each.fine_shape(config.granularity, config.calib_length)
            if None in (shape, each.refined):
                pairs.append(("calib_T", each.refined and "fine thresholds", config.calib_T))
            else:
                pairs.append(("granularity", each.refined, shape))
        for name, made, now in pairs:
            if made != now:
                raise ValueError(
                    f"`config.{name}` must not be edited on a model that is made: it has {made}, the configuration "
                    f"now asks for {now}, and its checkpoint would load as another network. Set it back; "
                    "`begin_calibration` and `fold_thresholds` change the model too."
                )

    def enter_trunk(self, trunk: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the neurons, and check what no stock model checks."""
        sync(trunk)
        inputs = _inputs(args, kwargs)
        if inputs is None:
            return  # the stock model says what is missing
        check_inputs(inputs, inputs is kwargs.get("inputs_embeds"), trunk.config.vocab_size)
        if trunk.config._attn_implementation == "flex_attention":
            raise ValueError(
                "`attn_implementation` must not be 'flex_attention': its masks know one number of rows. Use 'sdpa'."
            )
        if self.steps > 1 and kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "`cu_seq_lens_q` must not be given in stepwise mode, whose batch has T times the rows it speaks of. "
                "Give `position_ids` alone, or use the layerwise schedule."
            )
        cache = _cache((*args, *kwargs.values()))
        if cache is not None and not torch.compiler.is_compiling():
            self.take_cache(cache, len(inputs))
        past = 0 if cache is None else cache.get_seq_length()
        self._find_positions(kwargs.get("position_ids"), past, inputs.shape[1])

    def _find_positions(self, position_ids: torch.Tensor | None, past: Any, length: int) -> None:
        config, first = self.config, self.config.table.positions or 0  # RoBERTa numbers tokens from 2 on
        reached, limit, name = past + length, positions_of(config), "input_ids"
        if position_ids is not None:
            lowest, highest = _ends(position_ids) or (0, -1)
            if lowest < 0:
                raise ValueError(f"`position_ids` must not be negative, got {lowest}.")
            reached, limit, name = highest + 1, limit - first, "position_ids"
        if config.table.positions is not None and isinstance(reached, int) and reached > limit:
            raise ValueError(
                f"`{name}` must not be longer than the {limit} positions of the model, got {reached} (cached tokens "
                "included). Truncate the input, or generate fewer tokens."
            )
        if config.granularity == "position":
            here.positions = slice(past, past + length) if position_ids is None else position_ids + first

    def _stamp(self) -> dict[str, Any]:
        """What the keys and values of a call depend on, but for the text."""
        config = self.config
        own: dict[str, Any] = {"T": config.T, "sites": config.sites}
        if config.T:
            own |= {name: getattr(config, name) for name in ("schedule", "code", "code_base", "gain", "calib_T")}
        else:
            own["L"] = config.L
        parameters = [each for neuron in self.neurons for each in neuron._parameters.values() if each is not None]
        try:
            versions = sum([each._version for each in parameters])
        except RuntimeError:  # one made in inference mode has no version
            versions = sum(0 if each.is_inference() else each._version for each in parameters)
        return own | {"calibration": (id(self), self.calibrations, versions)}

    def take_cache(self, cache: Any, batch: int) -> None:
        """Let a cache remember how it came to be; one of another mode is refused, one of B rows gets those of T."""
        stamp, known = self._stamp(), getattr(cache, "made_by", None)
        if known == stamp:
            return
        if known is None:
            self._fit_rows(cache, batch // self.steps if self.every_step else batch)
        elif int(cache.get_seq_length()) == 0:
            for layer in cache.layers:
                layer.is_initialized = False  # allocated for other rows
        elif names := self._differing(known, stamp):
            name, *_ = names
            was, now = (f"`{name}` {each.get(name)!r}" for each in (known, stamp))
            if name == "calibration":
                was, now = "the thresholds of then", "others"
            raise ValueError(
                f"`past_key_values` must come from the mode that the model runs in, got one made with {was} where the "
                f"model has {now}. Start again without it."
            )
        cache.made_by = stamp
        if self.steps > 1 and not isinstance(cache, _Timed):
            cache.__class__ = _timed(type(cache))  # type: ignore[arg-type]

    def _differing(self, known: dict[str, Any], stamp: dict[str, Any]) -> list[str]:
        """Names of what differs; thresholds are compared where they are those of one model."""
        names = [name for name in {**known, **stamp} if known.get(name) != stamp.get(name)]
        return [name for name in names if name != "calibration" or known[name][0] == stamp[name][0]]

    def _fit_rows(self, cache: Any, batch: int) -> None:
        """Give what a prefix or an early initialisation put in a cache the rows of every timestep."""
        for index, layer in enumerate(getattr(cache, "layers", ())):
            wanted = batch * (1 if index == 0 and self.config.sites == "mlp" else self.steps)
            if not layer.is_initialized or layer.keys.dim() < 2 or len(layer.keys) == wanted:
                continue
            if len(layer.keys) != batch:
                raise ValueError(
                    f"`past_key_values` must hold {batch} rows, or {wanted} in layer {index} (rows times timesteps), "
                    f"got {len(layer.keys)}. Give a cache of the same batch."
                )
            layer.keys, layer.values = (
                each.repeat(wanted // batch, *[1] * (each.dim() - 1)) for each in (layer.keys, layer.values)
            )
            if hasattr(layer, "batch_size"):
                layer.batch_size = wanted

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
        inputs: Any = _inputs(args, kwargs)
        cache = _cache(outputs if isinstance(outputs, tuple) else outputs.values())
        if cache is not None and not torch.compiler.is_compiling() and not hasattr(cache, "made_by"):
            self.take_cache(cache, len(inputs))
        if self.steps == 1:
            return None
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


class _Timed:
    """Of a cache that holds rows for every timestep, time-major: what chooses among rows does so at each."""

    layers: list[Any]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these texts."""
        for layer, rows in self._rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices):
            layer.batch_select_indices(rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put these texts in the place of all."""
        for layer, rows in self._rows(beam_idx):
            layer.reorder_cache(rows)

    def _rows(self, texts: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
        made_by: Any = self.made_by  # type: ignore[attr-defined]
        batch = len(self.layers[0].keys) // (1 if made_by["sites"] == "mlp" else made_by["T"])
        for layer in self.layers:
            yield layer, at_every_timestep(texts, batch, len(layer.keys))


def at_every_timestep(texts: torch.Tensor, batch: int, rows: int) -> torch.Tensor:
    """Rows that these texts of a batch have in as many rows, time-major."""
    return (torch.arange(0, rows, batch, device=texts.device)[:, None] + texts).flatten()


@functools.cache
def _timed(kind: type) -> type:
    return type(kind.__name__, (_Timed, kind), {})


def carry_time(model: Any, time: Time) -> None:
    """Hook the trunk, and what is below where a schedule needs it."""
    table = model.config.table
    whole = trunk(model)
    whole._synced, whole._time = None, time
    whole.register_forward_pre_hook(time.enter_trunk, with_kwargs=True)
    last = find(model, table.time_ends) if table.time_ends else None
    but = "last_hidden_state" if last is not None else ""
    whole.register_forward_hook(functools.partial(time.leave_trunk, but), with_kwargs=True)
    time.hooks = functools.partial(_carry_rows, model, time, last)
    time.hook()


def _carry_rows(model: Any, time: Time, last: Any) -> None:
    """Hook the blocks, what is the same at all timesteps, what is not linear, and where time ends."""
    table, whole = model.config.table, trunk(model)
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


def _cache(values: Any) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _ends(ids: torch.Tensor) -> tuple[int, int] | None:
    """Least and greatest, where looking neither breaks a compiled graph nor waits for an accelerator."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return None
    least, greatest = ids.aminmax()
    return int(least), int(greatest)


def check_inputs(inputs: torch.Tensor, embedded: bool, vocabulary: int) -> None:
    """Raise for what a stock model takes for something else, or answers from inside of PyTorch."""
    name, dimensions = ("inputs_embeds", 3) if embedded else ("input_ids", 2)
    if not embedded and inputs.is_floating_point():
        raise ValueError(f"`input_ids` must be integers, got {inputs.dtype}. Embeddings go to `inputs_embeds`.")
    if inputs.dim() != dimensions:
        shape = "(batch, tokens, width)" if embedded else "(batch, tokens)"
        raise ValueError(
            f"`{name}` must have the shape {shape}, got {tuple(inputs.shape)}. One text is a batch too: "
            f"`{name}[None]`."
        )
    if 0 in inputs.shape[:2]:
        raise ValueError(f"`{name}` must hold at least one token, got shape {tuple(inputs.shape[:2])}.")
    if not embedded:
        check_range("input_ids", inputs, vocabulary, "tokens of the vocabulary")


def check_range(name: str, ids: torch.Tensor, count: int, what: str) -> None:
    """Raise for ids that are none of so many."""
    ends = _ends(ids)
    if ends and not 0 <= ends[0] <= ends[1] < count:
        found = ends[ends[0] >= 0]
        raise ValueError(f"`{name}` must be from 0 to {count - 1}, the {what}, got {found}.")


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
        here.positions = None


def sync(module: Any, *_: Any) -> None:
    """Check a configuration where it has changed, and let every neuron, copies made by adapters included, read it."""
    config = module.config
    settings: tuple = (config.L, config.T, config.schedule, config.code, config.code_base, config.gain, config.sites)
    settings += (config.folded, config.calib_T, config.granularity, config.calib_length)
    if module._synced != settings:
        config.check()
        module._time.check_structure()
        module._time.hook()
        for each in module.modules():
            if isinstance(each, FASNeuron):
                each.read(config)
            elif "_synced" in vars(each):
                each._synced = settings  # the trunk too, so that a compiled call has nothing left to change
