"""Spiking language models: the stock models of transformers with integrate-and-fire neurons at the sites of a table.

This file travels to the Hub inside every checkpoint, next to `configuration_fas.py` and `neurons_fas.py`. A model is
its stock class, built as it is; `place_sites` puts the neurons where `BACKBONES` says, `carry_time` hooks what runs T
timesteps as T·B rows of a batch, time-major. Shapes: `T` timesteps (leading), `B` batch, `S` sequence, `D` neurons.
Source of the method: Chen et al. 2025 (arXiv 2502.04405).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel


__all__ = ["FASMixin", "__version__", "carry_time", "find", "place_sites", "trunk"]  # and all models of the table

try:
    from .configuration_fas import BACKBONES, CONFIGURATIONS, Backbone, Site, __version__  # type: ignore[import-not-found]
    from .neurons_fas import MIN_THRESHOLD, FASNeuron, call  # type: ignore[import-not-found]
except ImportError:
    from configuration_fas import BACKBONES, CONFIGURATIONS, Backbone, Site, __version__
    from neurons_fas import MIN_THRESHOLD, FASNeuron, call


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
        if isinstance(module, PreTrainedModel) and not isinstance(module, FASMixin):
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
    return model.base_model.get_submodule(BACKBONES[model.config.backbone].trunk)


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


def _forget_positions(*_: Any) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# What all models share
# ---------------------------------------------------------------------------------------------------------------------


class FASMixin(PreTrainedModel):
    """What every spiking model adds to its stock class, whose call and outputs it keeps.

    Everything it returns has B rows, but for the cache: T·B after the attention of the first block. `generate()` works
    in every mode where the stock class has it.
    """

    _supports_flex_attn = False  # its masks are no tensors, and know one number of rows

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._make_spiking()

    def _make_spiking(self) -> None:
        config = self.config
        if getattr(config, "add_cross_attention", False):
            raise ValueError("`add_cross_attention` must be False: a spiking model has no encoder, got True.")
        if getattr(config, "layerdrop", 0.0):
            raise ValueError(f"`layerdrop` must be 0: every block holds neurons, got {config.layerdrop}.")
        self._synced = None
        self._time = Time(config)
        table = BACKBONES[config.backbone]
        place_sites(self, table)
        carry_time(self, table, self._time)
        self.register_forward_pre_hook(sync)
        self.register_forward_hook(_forget_positions)
        if isinstance(self, GenerationMixin):
            self.loss_type = "ForCausalLM"

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by `num_items_in_batch`; where it does not, the Trainer must average itself."""
        return isinstance(self, GenerationMixin)

    def neurons(self) -> list[tuple[str, FASNeuron]]:
        """Names and modules of the neuron sites, in the order they run in."""
        found = [(name, module) for name, module in self.named_modules() if isinstance(module, FASNeuron)]
        return sorted(found, key=lambda each: not each[0].startswith(f"{self.base_model_prefix}."))

    def set_timesteps(self, T: int, schedule: str | None = None):
        """Run the model with T timesteps from now on (0: the quantised ANN); returns the model.

        Args:
            T (`int`): timesteps.
            schedule (`str`, *optional*): `"stepwise"` or `"layerwise"`; stays as it is if not given.

        Raises:
            ValueError: for a value the configuration refuses; the model then stays as it was.
        """
        previous = self.config.schedule
        self.config.schedule = previous if schedule is None else schedule
        try:
            self.config.T = T
        except ValueError:
            self.config.schedule = previous
            raise
        sync(self)
        return self

    @contextmanager
    def running(self, T: int, schedule: str | None = None) -> Iterator[Any]:
        """As [`set_timesteps`], for the duration of a `with` block, whatever happens in it."""
        before = self.config.T, self.config.schedule
        self.set_timesteps(T, schedule)
        try:
            yield self
        finally:
            self.set_timesteps(*before)

    def early_exit(self, T: int, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the first 1, 2 … T timesteps of one stepwise run, `(T, B, …)`; the last are those of T.

        Args:
            T (`int`): timesteps.
            **inputs: of the model, by name; `labels` are dropped.
        """
        repeated = {name: value.repeat(T, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        repeated.pop("labels", None)
        with self.running(T, "stepwise"):
            self._time.every_step = True
            try:
                return self(**repeated, return_dict=True).logits.unflatten(0, (T, -1))
            finally:
                self._time.every_step = False

    def begin_calibration(self, T: int, granularity: str = "neuron", length: int | None = None):
        """Give every site fine thresholds equal to its threshold and initial potentials of 1/2; returns the model.

        Called again, it starts again.

        Args:
            T (`int`): timesteps to calibrate for; `config.calib_T`.
            granularity (`str`, defaults to `"neuron"`): `"layer"`, `"neuron"` or `"position"`.
            length (`int`, *optional*): the longest sequence, required by granularity `"position"`.

        Raises:
            ValueError: for a value the configuration refuses, a missing `length`, or a model that has no positions to
                calibrate by.
        """
        config = self.config
        if granularity == "position" and length is None:
            raise ValueError("`length` must be the longest sequence length at granularity 'position', got None.")
        if config.folded:
            raise ValueError("`model` must not be folded: calibrate before its thresholds go into its weights.")
        if granularity == "position" and getattr(config, "chunk_size_feed_forward", None):
            raise ValueError("`granularity` must not be 'position' where `config.chunk_size_feed_forward` is set.")
        if granularity == "position" and not all(site.per_position for site in config.table.sites):
            raise ValueError(
                f"`granularity` must be 'neuron' or 'layer' for {config.table.title}, whose blocks flatten positions, "
                "got 'position'."
            )
        config.granularity = granularity
        config.calib_T = T
        config.calib_length = length if granularity == "position" else None
        for _, neuron in self.neurons():
            neuron.refine(granularity, length)
        return self

    @torch.no_grad()
    def clamp_thresholds_(self) -> None:
        """Lift every threshold that training moved below 1e-4 to 1e-4, in place; the forward pass does not change."""
        for _, neuron in self.neurons():
            neuron.threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.fine_threshold is not None:
                neuron.fine_threshold.clamp_(min=MIN_THRESHOLD)

    def save_pretrained(self, *args, **kwargs):
        self.clamp_thresholds_()
        if not kwargs.setdefault("safe_serialization", True):
            raise ValueError("`safe_serialization` must be True: weights are written as safetensors only, got False.")
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("`use_safetensors` must be True: pickled weights can run code and are not read.")
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # safetensors itself may not be imported here
                raise
            raise OSError(
                f"`model.safetensors` of {str(pretrained_model_name_or_path)!r} is truncated or damaged: {error}. "
                "Download or save it again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, parameter in model.named_parameters():
            if name.endswith(("threshold", "initial_potential")) and not parameter.is_meta:
                valid = parameter.isfinite() & ((parameter > 0) | name.endswith("initial_potential"))
                if not valid.all():
                    raise ValueError(
                        f"`{name}` must be finite and, if a threshold, above 0, got {parameter[~valid][0].item()} in "
                        f"the checkpoint {str(pretrained_model_name_or_path)!r}. Such a network divides by zero or "
                        "fires all the time: train it again, or set the value to a positive one."
                    )
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super()._init_weights, module)

    def _reorder_cache(self, past_key_values, beam_idx):
        """Reorder the rows of a cache by beam; after the first attention they come T times, time-major."""
        beams = beam_idx.shape[0]
        for layer in past_key_values.layers:
            first = torch.arange(0, layer.keys.shape[0], beams, device=beam_idx.device)
            layer.reorder_cache((first[:, None] + beam_idx).flatten())
        return past_key_values


class _FASPooledMixin(FASMixin):
    """Builds what transformers' generic classifier looks up in its Auto classes, which know no remote code."""

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = getattr(transformers, config.table.models["AutoModel"].removeprefix("FAS"))(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
        self._make_spiking()


# ---------------------------------------------------------------------------------------------------------------------
# The models: stock classes, spiking; called, and documented, as those are
# ---------------------------------------------------------------------------------------------------------------------


class FASGPT2Model(FASMixin, transformers.GPT2Model): ...


class FASGPT2LMHeadModel(FASMixin, transformers.GPT2LMHeadModel): ...


class FASGPT2ForSequenceClassification(FASMixin, transformers.GPT2ForSequenceClassification): ...


class FASGPT2ForTokenClassification(FASMixin, transformers.GPT2ForTokenClassification): ...


class FASBertModel(FASMixin, transformers.BertModel): ...


class FASBertForMaskedLM(FASMixin, transformers.BertForMaskedLM): ...


class FASBertForSequenceClassification(FASMixin, transformers.BertForSequenceClassification): ...


class FASBertForTokenClassification(FASMixin, transformers.BertForTokenClassification): ...


class FASBertForQuestionAnswering(FASMixin, transformers.BertForQuestionAnswering): ...


class FASBertForMultipleChoice(FASMixin, transformers.BertForMultipleChoice): ...


class FASRobertaModel(FASMixin, transformers.RobertaModel): ...


class FASRobertaForMaskedLM(FASMixin, transformers.RobertaForMaskedLM): ...


class FASRobertaForSequenceClassification(FASMixin, transformers.RobertaForSequenceClassification): ...


class FASRobertaForTokenClassification(FASMixin, transformers.RobertaForTokenClassification): ...


class FASRobertaForQuestionAnswering(FASMixin, transformers.RobertaForQuestionAnswering): ...


class FASDistilBertModel(FASMixin, transformers.DistilBertModel): ...


class FASDistilBertForMaskedLM(FASMixin, transformers.DistilBertForMaskedLM): ...


class FASDistilBertForSequenceClassification(FASMixin, transformers.DistilBertForSequenceClassification): ...


class FASDistilBertForTokenClassification(FASMixin, transformers.DistilBertForTokenClassification): ...


class FASDistilBertForQuestionAnswering(FASMixin, transformers.DistilBertForQuestionAnswering): ...


class FASOPTModel(FASMixin, transformers.OPTModel): ...


class FASOPTForCausalLM(FASMixin, transformers.OPTForCausalLM): ...


class FASOPTForSequenceClassification(FASMixin, transformers.OPTForSequenceClassification): ...


class FASLlamaModel(FASMixin, transformers.LlamaModel): ...


class FASLlamaForCausalLM(FASMixin, transformers.LlamaForCausalLM): ...


class FASLlamaForSequenceClassification(_FASPooledMixin, transformers.LlamaForSequenceClassification): ...


class FASQwen2Model(FASMixin, transformers.Qwen2Model): ...


class FASQwen2ForCausalLM(FASMixin, transformers.Qwen2ForCausalLM): ...


class FASQwen2ForSequenceClassification(_FASPooledMixin, transformers.Qwen2ForSequenceClassification): ...


class FASQwen3Model(FASMixin, transformers.Qwen3Model): ...


class FASQwen3ForCausalLM(FASMixin, transformers.Qwen3ForCausalLM): ...


class FASQwen3ForSequenceClassification(_FASPooledMixin, transformers.Qwen3ForSequenceClassification): ...


for _config_class in CONFIGURATIONS:
    _table = BACKBONES[_config_class.backbone]
    for _auto_class, _name in _table.models.items():
        _model: Any = vars()[_name]
        _model.config_class = _config_class
        _model.__doc__ = f"Spiking {_table.title}: `{_name.removeprefix('FAS')}` with neurons at its sites."
        _model.register_for_auto_class(_auto_class)
        # Registering from remote code would make the first checkpoint's classes serve all later ones.
        if not __name__.startswith("transformers_modules."):
            getattr(transformers, _auto_class).register(_config_class, _model, exist_ok=True)
