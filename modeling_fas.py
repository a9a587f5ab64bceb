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
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging


# Every sibling by its name: of a checkpoint in a folder, transformers 4 takes along what this file imports, no more.
try:
    from .configuration_fas import BACKBONES, CONFIGURATIONS, __version__, running  # type: ignore[import-not-found]
    from .events_fas import receive_events  # type: ignore[import-not-found]
    from .kernels_fas import kernels  # type: ignore[import-not-found]
    from .neurons_fas import MIN_THRESHOLD  # type: ignore[import-not-found]
    from .sites_fas import (  # type: ignore[import-not-found]
        FASNeuron,
        Time,
        at_every_timestep,
        carry_time,
        check_range,
        checkpoint_call,
        fed_layers,
        forget_positions,
        place_sites,
        state,
        sync,
    )
except ImportError:
    from configuration_fas import BACKBONES, CONFIGURATIONS, __version__, running
    from events_fas import receive_events
    from kernels_fas import kernels  # noqa: F401
    from neurons_fas import MIN_THRESHOLD
    from sites_fas import (
        FASNeuron,
        Time,
        at_every_timestep,
        carry_time,
        check_range,
        checkpoint_call,
        fed_layers,
        forget_positions,
        place_sites,
        state,
        sync,
    )


logger = logging.get_logger(__name__)

__all__ = ["FASMixin", "__version__"]  # and all models of the table


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
        config: Any = self.config
        own: Any = self.config_class
        if type(config).__name__ == own.__name__:
            # Loaded as remote code, a configuration comes from another copy of its file, with other threads' state.
            config.__class__ = own
        if getattr(config, "add_cross_attention", False):
            raise ValueError("`add_cross_attention` must be False: a spiking model has no encoder, got True.")
        if getattr(config, "layerdrop", 0.0):
            raise ValueError(f"`layerdrop` must be 0: every block holds neurons, got {config.layerdrop}.")
        self._synced = None
        config.check()
        place_sites(self)
        self._time = Time(config, [neuron for _, neuron in self.neurons()])
        carry_time(self, self._time)
        self.register_forward_pre_hook(sync)
        self.register_forward_pre_hook(_check_labels, with_kwargs=True)
        self.register_forward_hook(forget_positions)
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
            schedule (`str`, *optional*): `"stepwise"`, `"accumulated"` or `"layerwise"`; stays as it is if not given.

        Raises:
            ValueError: for a value the configuration refuses; the model then stays as it was.
        """
        before = self.config.T, self.config.schedule
        try:
            self.config.schedule = before[1] if schedule is None else schedule
            self.config.T = T
            sync(self)
        except ValueError:
            self.config.T, self.config.schedule = before
            raise
        if running(self.config) is None:
            self._time.set_here()
            if T and self.config.calib_T not in (None, T):
                logger.warning_once(
                    f"`T` should be {self.config.calib_T}, which this model is calibrated for, or 0, got {T}: its "
                    "fine thresholds may do worse there than none. Calibrate for the T that is to run."
                )
        return self

    @contextmanager
    def running(self, T: int, schedule: str | None = None, **more: Any) -> Iterator[Any]:
        """As [`set_timesteps`], for the duration of a `with` block, whatever happens in it, in this thread only."""
        try:
            with state(self.config, T=self.config.T, schedule=self.config.schedule, **more):
                yield self.set_timesteps(T, schedule)
        finally:
            sync(self)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or running(self.config) is not None:
            return super().__call__(*args, **kwargs)
        self._time.check_thread()
        settings = vars(self).get("_replicated") or {"T": self.config.T, "schedule": self.config.schedule}
        with state(self.config, **settings):  # another thread may set the model meanwhile
            return super().__call__(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._replicated = running(self.config)  # it runs in a thread of its own
        return replica

    def early_exit(self, T: int, schedule: str = "stepwise", **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the first 1, 2 … T timesteps of one run, `(T, B, …)`; the last are those of T.

        Without a head they are the last hidden states.

        Args:
            T (`int`): timesteps, at least 1.
            schedule (`str`, defaults to `"stepwise"`): or `"accumulated"`; layerwise there is nothing to exit from.
            **inputs: of the model, by name; `labels` are dropped.

        Raises:
            ValueError: for a value the configuration refuses, T = 0 or the layerwise schedule.
        """
        if schedule == "layerwise":
            raise ValueError("`schedule` must be 'stepwise' or 'accumulated' to exit early, got 'layerwise'.")
        if T == 0:
            raise ValueError("`T` must be at least 1 to exit early, got 0.")
        with self.running(T, schedule, every_step=True):
            repeated = {name: value.repeat(T, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
            repeated.pop("labels", None)
            outputs = self(**repeated, return_dict=True)
            found = outputs.logits if "logits" in outputs else outputs.last_hidden_state
            return found.unflatten(0, (T, -1))

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
        wanted = {
            "granularity": granularity,
            "calib_T": T,
            "calib_length": length if granularity == "position" else None,
        }
        before = {name: getattr(config, name) for name in wanted}
        neurons = [neuron for _, neuron in self.neurons()]
        fine = [(each.refined, each.fine_threshold, each.initial_potential) for each in neurons]
        try:
            for name, value in wanted.items():
                setattr(config, name, value)
            config.check()
            for neuron in neurons:
                neuron.refine(granularity, length)
            self._time.calibrations += 1
        except (ValueError, RuntimeError, TypeError):
            for name, value in before.items():
                setattr(config, name, value)
            for neuron, (refined, threshold, potential) in zip(neurons, fine, strict=True):
                neuron.refined, neuron.fine_threshold, neuron.initial_potential = refined, threshold, potential
            raise
        return self

    def read_events(self):
        """Let every linear layer that spikes feed read the weights of the neurons that fire only; returns the model.

        This pays in decoding on a CPU where few neurons fire, and happens only there: after ReLU or GELU, not after a
        gate. GPT-2's layers do it as they are; others then keep a transposed copy of their weight, made at first use,
        and made again where the weight has changed since.
        """
        for layer in fed_layers(self):
            receive_events(layer)
        return self

    @torch.no_grad()
    def clamp_thresholds_(self) -> None:
        """Lift every threshold and gain that training moved below 1e-4 to 1e-4, in place."""
        for _, neuron in self.neurons():
            neuron.threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.fine_threshold is not None:
                neuron.fine_threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.gain is not None:
                neuron.gain.clamp_(min=MIN_THRESHOLD)

    def save_pretrained(self, *args, **kwargs):
        sync(self)
        self.clamp_thresholds_()
        if not kwargs.setdefault("safe_serialization", True):
            raise ValueError("`safe_serialization` must be True: weights are written as safetensors only, got False.")
        # FSDP2 puts a class of torch's in the place of the model's own, and its file would travel for this one.
        kind = type(self)
        self.__class__ = next(each for each in kind.__mro__ if not each.__module__.startswith("torch."))
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = kind

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("`use_safetensors` must be True: pickled weights can run code and are not read.")
        with_report = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # safetensors itself may not be imported here
                raise
            raise OSError(
                f"`model.safetensors` of {str(pretrained_model_name_or_path)!r} is truncated or damaged: {error}. "
                "Download or save it again."
            ) from error
        model, report = loaded
        model._refine_missing([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
        for name, parameter in model.named_parameters():
            if name.endswith(("threshold", "initial_potential", ".gain")) and not parameter.is_meta:
                valid = parameter.isfinite() & ((parameter > 0) | name.endswith("initial_potential"))
                if not valid.all():
                    raise ValueError(
                        f"`{name}` must be finite and, if a threshold, above 0, got {parameter[~valid][0].item()} in "
                        f"the checkpoint {str(pretrained_model_name_or_path)!r}. Such a network divides by zero or "
                        "fires all the time: train it again, or set the value to a positive one."
                    )
        return (model, report) if with_report else model

    @torch.no_grad()
    def _refine_missing(self, missing: Any) -> None:
        """Give fine thresholds that a checkpoint lacks the value of their site's own threshold."""
        lacking = sorted(name for name in missing if name.endswith(("fine_threshold", "initial_potential")))
        for name in lacking:
            neuron: Any = self.get_submodule(name.rpartition(".")[0])
            if name.endswith("fine_threshold"):
                neuron.fine_threshold.copy_(neuron.threshold)
        if lacking:
            logger.warning(
                f"The checkpoint must hold fine thresholds for `calib_T` = {self.config.calib_T}, but lacks "
                f"{', '.join(lacking)}: these sites take their own threshold, and potentials of 1/2. Calibrate again."
            )

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        in_call = functools.partial(checkpoint_call, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, in_call, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FASNeuron):
            module.reset_parameters()

    def _reorder_cache(self, past_key_values, beam_idx):
        """Reorder the rows of a cache by beam; after the first attention they come T times, time-major."""
        for layer in past_key_values.layers:
            layer.reorder_cache(at_every_timestep(beam_idx, len(beam_idx), len(layer.keys)))
        return past_key_values


def _check_labels(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for labels that are no class of a head; -100 stands for none."""
    labels, config, ids = kwargs.get("labels"), model.config, kwargs.get("input_ids", *args[:1])
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or torch.compiler.is_compiling():
        return
    if model.get_output_embeddings() is not None:
        count, what = config.vocab_size, "tokens of the vocabulary (-100: none)"
    elif isinstance(ids, torch.Tensor) and ids.dim() == 3:
        count, what = ids.shape[1], "choices"
    elif config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
        count, what = config.num_labels, "labels of the head (-100: none)"
    else:
        return
    check_range("labels", labels[labels != -100], count, what)


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
