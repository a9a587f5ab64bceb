"""Spiking language models: the stock models of transformers with integrate-and-fire neurons at the sites of a table.

This file travels to the Hub inside every checkpoint, next to `configuration_fas.py` and `neurons_fas.py`. A model is
its stock class, built as it is; `place_sites` puts the neurons where `BACKBONES` says, `carry_time` hooks what runs T
timesteps as T·B rows of a batch, time-major. Shapes: `T` timesteps (leading), `B` batch, `S` sequence, `D` neurons.
Source of the method: Chen et al. 2025 (arXiv 2502.04405).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel


try:
    from .configuration_fas import BACKBONES, CONFIGURATIONS, __version__  # type: ignore[import-not-found]
    from .neurons_fas import MIN_THRESHOLD  # type: ignore[import-not-found]
    from .sites_fas import FASNeuron, Time, carry_time, forget_positions, place_sites, sync  # type: ignore[import-not-found]
except ImportError:
    from configuration_fas import BACKBONES, CONFIGURATIONS, __version__
    from neurons_fas import MIN_THRESHOLD
    from sites_fas import FASNeuron, Time, carry_time, forget_positions, place_sites, sync


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
        config = self.config
        if getattr(config, "add_cross_attention", False):
            raise ValueError("`add_cross_attention` must be False: a spiking model has no encoder, got True.")
        if getattr(config, "layerdrop", 0.0):
            raise ValueError(f"`layerdrop` must be 0: every block holds neurons, got {config.layerdrop}.")
        self._synced = None
        self._time = Time(config)
        config.check()
        place_sites(self)
        carry_time(self, self._time)
        self.register_forward_pre_hook(sync)
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

    def early_exit(self, T: int, schedule: str = "stepwise", **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the first 1, 2 … T timesteps of one run, `(T, B, …)`; the last are those of T.

        Args:
            T (`int`): timesteps.
            schedule (`str`, defaults to `"stepwise"`): or `"accumulated"`; layerwise there is nothing to exit from.
            **inputs: of the model, by name; `labels` are dropped.
        """
        repeated = {name: value.repeat(T, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        repeated.pop("labels", None)
        with self.running(T, schedule):
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
        """Lift every threshold and gain that training moved below 1e-4 to 1e-4, in place."""
        for _, neuron in self.neurons():
            neuron.threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.fine_threshold is not None:
                neuron.fine_threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.gain is not None:
                neuron.gain.clamp_(min=MIN_THRESHOLD)

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
            if name.endswith(("threshold", "initial_potential", ".gain")) and not parameter.is_meta:
                valid = parameter.isfinite() & ((parameter > 0) | name.endswith("initial_potential"))
                if not valid.all():
                    raise ValueError(
                        f"`{name}` must be finite and, if a threshold, above 0, got {parameter[~valid][0].item()} in "
                        f"the checkpoint {str(pretrained_model_name_or_path)!r}. Such a network divides by zero or "
                        "fires all the time: train it again, or set the value to a positive one."
                    )
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FASNeuron):
            module.reset_parameters()

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
