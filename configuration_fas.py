"""What a spiking language model is made of: quantisation levels, timesteps, schedule, fine thresholds.

This file travels to the Hub inside every checkpoint, next to `modeling_fas.py`.
"""

import math
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar

from transformers import AutoConfig, BertConfig, GPT2Config, PretrainedConfig
from transformers.utils import logging


__version__ = "0.1.0"

logger = logging.get_logger(__name__)

SCHEDULES = ("stepwise", "layerwise")
GRANULARITIES = ("layer", "neuron", "position")

# Least value of the integer settings; `None` is allowed where it is the default.
_INTEGERS = {"L": 1, "T": 0, "calib_T": 1, "calib_length": 1}
_CHOICES = {"schedule": SCHEDULES, "granularity": GRANULARITIES}
_DEFAULTS: dict[str, Any] = {
    "L": 8,
    "T": 0,
    "calib_T": None,
    "calib_length": None,
    "schedule": "stepwise",
    "granularity": "neuron",
    "folded": False,
}
# Keys of every configuration that are no attribute of a fresh one.
_GENERIC_KEYS = {"attn_implementation", "auto_map", "dtype", "name_or_path", "num_labels", "torch_dtype"}


def _checked(name: str, value: Any) -> Any:
    """The value of a FAS setting in its canonical type, or a `ValueError` that says what would be right."""
    if name in _INTEGERS:
        least = _INTEGERS[name]
        if value is None and _DEFAULTS[name] is None:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            hint = " (0 runs the quantised ANN, 1 or more the spiking network)" if name == "T" else ""
            raise ValueError(f"`{name}` must be an integer of at least {least}{hint}, got {value!r}.")
        return int(value)
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}.")
        return value
    if name == "folded":
        if not isinstance(value, bool):
            raise ValueError(f"`folded` must be True or False, got {value!r}.")
        return value
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` must be a finite number above 0 (2.0 is a good start), got {value!r}.")
    return float(value)


class FASConfig(PretrainedConfig):
    """Configuration of a spiking language model; builds the one of its backbone.

    `FASConfig(backbone="gpt2", …)` gives a [`FASGPT2Config`], `backbone="bert"` a [`FASBertConfig`]; both take
    every setting of the stock configuration too. `FASConfig.from_pretrained` reads stock and FAS checkpoints alike.
    Settings are checked whenever they are set, so a configuration never holds a value that cannot run.

    Args:
        L (`int`, defaults to 8): quantisation levels of the activation in ANN mode.
        T (`int`, defaults to 0): timesteps; 0 runs the quantised ANN.
        calib_T (`int`, *optional*): timesteps the model was calibrated for. Set exactly when the model has fine
            thresholds; `model.begin_calibration` sets it.
        calib_length (`int`, *optional*): rows of the fine thresholds at granularity `"position"`.
        schedule (`str`, defaults to `"stepwise"`): `"stepwise"` passes every timestep through the whole network,
            `"layerwise"` integrates a constant input for T steps at each site and passes on the time average.
        granularity (`str`, defaults to `"neuron"`): who shares a fine threshold: `"layer"`, `"neuron"`, `"position"`.
        folded (`bool`, defaults to `False`): whether the thresholds are part of the weights that follow the sites, so
            that what travels is 0 or 1.
        initial_threshold (`float`): threshold of a site that no checkpoint has one for. Defaults to 2.0 for GPT-2
            and 2.5 for BERT (the published code; 1.24 in its masked-LM step).

    Raises:
        ValueError: for a value of the wrong type or out of range, an unknown backbone, or a checkpoint of another
            architecture. An unknown key is kept, as in every configuration, with a warning.
    """

    model_type = "fas"
    backbone = ""
    _stock_class: ClassVar[Any] = None
    _auto_models: ClassVar[dict[str, str]] = {}
    _initial_threshold = 2.0

    def __new__(cls, *args, **kwargs):
        return super().__new__(_config_class(kwargs) if cls is FASConfig and kwargs else cls)

    def __init__(self, **kwargs):
        backbone = kwargs.pop("backbone", self.backbone)
        model_type = kwargs.pop("model_type", self.model_type)
        kwargs.pop("fas_version", None)
        self.fas_version = __version__  # of the code that runs, hence of the code files saved beside it
        if self.backbone and (backbone != self.backbone or not self._reads(model_type)):
            raise ValueError(
                f"`{type(self).__name__}` is for the backbone {self.backbone!r}, got backbone {backbone!r} and "
                f"`model_type` {model_type!r}. `FASConfig` chooses the class by itself."
            )
        for name, default in (_DEFAULTS | {"initial_threshold": self._initial_threshold}).items():
            setattr(self, name, kwargs.pop(name, default))
        self._warn_about_unknown_keys(kwargs, from_file="transformers_version" in kwargs or "architectures" in kwargs)
        super().__init__(**kwargs)
        if self._auto_models:
            self.auto_map = {"AutoConfig": f"configuration_fas.{type(self).__name__}"} | {
                auto: f"modeling_fas.{model}" for auto, model in self._auto_models.items()
            }

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DEFAULTS or name == "initial_threshold":
            value = _checked(name, value)
        super().__setattr__(name, value)

    @classmethod
    def _reads(cls, model_type: str | None) -> bool:
        return model_type in (cls.backbone, cls.model_type)

    def _warn_about_unknown_keys(self, kwargs: dict[str, Any], from_file: bool) -> None:
        """Warn about every unknown key that was written by hand, and in a file about those close to one of ours.

        Files of older versions carry stale keys that concern nobody.
        """
        own = [*_DEFAULTS, "initial_threshold"]
        stock = set(vars(self._stock_class())) | set(self.attribute_map) if self._stock_class else set()
        for key in kwargs.keys() - stock - _GENERIC_KEYS:
            near = [name for name in own if name.lower() == key.lower()] or get_close_matches(key, own, 1, 0.75)
            near = near or ([] if from_file else get_close_matches(key, [*own, *stock], 1, 0.75))
            if near or not (from_file or key.startswith("_")):
                meant = f" Did you mean `{near[0]}`?" if near else ""
                logger.warning(f"`{key}` is not a setting of `{type(self).__name__}` and has no effect.{meant}")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if cls is not FASConfig:
            model_type = config_dict.get("model_type", cls.model_type)
            if not cls._reads(model_type):
                raise ValueError(
                    f"`pretrained_model_name_or_path` must hold a {cls.backbone!r} or {cls.model_type!r} checkpoint "
                    f"for `{cls.__name__}`, got one of type {model_type!r} at {str(pretrained_model_name_or_path)!r}."
                )
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        if cls is not FASConfig:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config_dict, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _config_class(config_dict).from_pretrained(pretrained_model_name_or_path, **kwargs)


class FASGPT2Config(FASConfig, GPT2Config):
    """[`FASConfig`] of a GPT-2 backbone; every setting of `GPT2Config` besides."""

    model_type = "fas_gpt2"
    backbone = "gpt2"
    _stock_class = GPT2Config
    _auto_models = {"AutoModel": "FASGPT2Model", "AutoModelForCausalLM": "FASGPT2LMHeadModel"}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASBertConfig(FASConfig, BertConfig):
    """[`FASConfig`] of a BERT backbone; every setting of `BertConfig` besides."""

    model_type = "fas_bert"
    backbone = "bert"
    _stock_class = BertConfig
    _auto_models = {
        "AutoModel": "FASBertModel",
        "AutoModelForMaskedLM": "FASBertForMaskedLM",
        "AutoModelForSequenceClassification": "FASBertForSequenceClassification",
    }
    _initial_threshold = 2.5

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def _config_class(config_dict: dict[str, Any]) -> type[FASConfig]:
    """The configuration class for a `backbone` or, failing that, a `model_type`."""
    name = config_dict.get("backbone", config_dict.get("model_type"))
    for config_class in (FASGPT2Config, FASBertConfig):
        if config_class._reads(name):
            return config_class
    raise ValueError(f"`backbone` must be 'gpt2' or 'bert' (or come with a checkpoint of that type), got {name!r}.")


FASGPT2Config.register_for_auto_class()
FASBertConfig.register_for_auto_class()
# Registering from remote code would make the first checkpoint's classes serve all later ones.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(FASGPT2Config.model_type, FASGPT2Config, exist_ok=True)
    AutoConfig.register(FASBertConfig.model_type, FASBertConfig, exist_ok=True)
