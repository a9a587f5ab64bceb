"""What a spiking language model is made of: the settings of its neurons, and the table of backbones.

This file travels to the Hub inside every checkpoint, next to `modeling_fas.py` and `neurons_fas.py`. A new backbone is
an entry of `BACKBONES` and a configuration class here, and its classes there.
"""

import math
import threading
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.utils import logging


__version__ = "0.2.0"

logger = logging.get_logger(__name__)

# State of the calls that run in this thread: `running`, settings that hold for a while, and `positions` of the tokens
# of a call, `(B, S)` or a slice (None: the first ones). A plain `threading.local`: a compiler looks into no class made
# from it.
here = threading.local()


@dataclass(frozen=True)
class Site:
    """Where neurons sit: in place of an activation, or at the input of a linear layer, as its child `site`.

    Attributes:
        path: Of the activation, or of the linear layer; in a block, or (outside of blocks) in the model or its trunk.
            Of the attention, for `query` and `value`.
        width: Neurons, as the name of a setting of the configuration; for what is no activation, the layer says it.
        at: `"activation"`, `"input"`, `"query"` (what meets the keys) or `"value"` (before the cache).
        feeds: Path of the linear layer that takes what the site emits, hence what a threshold folds into. `None`
            where a norm follows. A site at an input feeds its own layer.
        shared: Paths of the linear layers that have the same input, its own among them.
        through: Path of the module that hands this input to all of them; its own layer if `None`.
        signed: Whether the neurons spike both ways.
        group: What the site is called in figures by kind of site.
        per_position: Whether its input has a sequence dimension.
        after_time: Whether time has ended before it, so that it encodes one value in every schedule.
    """

    path: str
    width: str = ""
    at: str = "activation"
    feeds: str | None = None
    shared: tuple[str, ...] = ()
    through: str | None = None
    signed: bool = False
    group: str = "mlp out"
    per_position: bool = True
    after_time: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the linear layers that take what the site emits."""
        if self.at == "input":
            return self.shared or (self.path,)
        return (self.feeds,) if self.feeds else ()


@dataclass(frozen=True)
class Product:
    """Matrix products that a figure counts as one: linear layers of one input, or a product of attention.

    Attributes:
        name: In reports.
        weights: Paths of the linear layers, as in [`Site`]; none for `scores` and `values`.
        through: As in [`Site`].
        pooled: Runs once a sequence, not once a token, where the head judges whole sequences.
        once: Runs once in the stepwise schedule too, before time begins or when it has ended.
    """

    name: str
    weights: tuple[str, ...] = ()
    through: str | None = None
    pooled: bool = False
    once: bool = False


@dataclass(frozen=True)
class Backbone:
    """What an architecture is, for all that needs to know: models, conversion, calibration, energy, cards, scripts.

    Attributes:
        title: In cards and reports.
        models: Name of the model class by the Auto class that loads it.
        blocks: Path of the list of blocks, in the trunk that runs.
        attention: Path of the attention, in a block, with its output layer.
        core: Path of its part that has the queries, keys and values.
        norms: Paths of the norms of a block.
        sites: Of every block, in the order they run in, where neurons sit in the MLPs only.
        products: Of every block, in the order they run in.
        trunk: Path, in the base model, of the module that every head calls.
        outer_sites: Outside of blocks; a path that a model lacks is passed over.
        outer_products: In the same way.
        outer_norms: Of what runs at every timestep after the blocks.
        outer_activations: In the same way.
        time_ends: Module of a head that still sees every timestep, and whose output is averaged over time in place of
            the trunk's; where a model lacks it, time ends with the trunk.
        causal: Whether position s speaks of token s + 1.
        positions: Positions that can be learned, as an amount to add to `max_position_embeddings`; `None` where they
            are rotary and have no end.
        initial_threshold: Of a site that no checkpoint has a threshold for.
    """

    title: str
    models: dict[str, str]
    blocks: str
    attention: str
    core: str
    norms: tuple[str, ...]
    sites: tuple[Site, ...]
    products: tuple[Product, ...]
    trunk: str = ""
    outer_sites: tuple[Site, ...] = ()
    outer_products: tuple[Product, ...] = ()
    outer_norms: tuple[str, ...] = ()
    outer_activations: tuple[str, ...] = ()
    time_ends: str | None = None
    causal: bool = False
    positions: int | None = 0
    initial_threshold: float = 2.0

    @property
    def first_products(self) -> tuple[str, ...]:
        """Paths, in a block, of what runs before its first site: in the first block, the same at every timestep."""
        fed = {target for site in self.sites for target in site.targets}
        before = [path for product in self.products for path in product.weights if path not in fed]
        return (self.attention, *(path for path in before if not path.startswith(f"{self.attention}.")))

    def placed(self, sites: str, activation: str) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """The sites of every block, and those outside of blocks, for two settings of a configuration."""
        if sites == "mlp":
            return self.sites, self.outer_sites
        trained = {site.feeds: site for site in self.sites if site.at == "activation" and activation == "qcfs"}
        blocks: list[Site] = []
        for product in self.products:
            if product.name == "qkv" and sites == "all":
                blocks += [Site(self.core, at=at, signed=True, group=at) for at in ("query", "value")]
            if product.weights:
                own = Site(
                    product.weights[0],
                    at="input",
                    shared=product.weights,
                    through=product.through,
                    signed=True,
                    group=product.name,
                    per_position=self.sites[0].per_position or product.name not in ("mlp in", "mlp out"),
                )
                blocks.append(trained.get(product.weights[0], own))
        heads = [
            Site(
                product.weights[0],
                at="input",
                signed=True,
                group="head",
                per_position=not product.pooled,
                after_time=True,
            )
            for product in self.outer_products
            if product.name == "head"
        ]
        outer = self.outer_sites if activation == "qcfs" else ()
        return tuple(blocks), (*outer, *(heads if sites == "all" else ()))


def _models(prefix: str, *auto_classes: str, **exceptions: str) -> dict[str, str]:
    """`{"AutoModel": "FASXModel", "AutoModelForY": "FASXForY", …}`."""
    names = {f"AutoModelFor{name}": exceptions.get(name, f"FAS{prefix}For{name}") for name in auto_classes}
    return {"AutoModel": f"FAS{prefix}Model"} | names


_ENCODER_HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_DECODER_HEADS = ("CausalLM", "SequenceClassification")
_ATTENTION = (Product("scores"), Product("values"))
_HEADS = (
    Product("head", ("lm_head",), once=True),
    Product("head", ("score",), once=True),
    Product("head", ("qa_outputs",), once=True),
)


def _bert(title: str, prefix: str, *more_heads: str, **differences: Any) -> Backbone:
    """BERT and what is built like it."""
    own = Backbone(
        title=title,
        models=_models(prefix, *_ENCODER_HEADS, *more_heads),
        blocks="encoder.layer",
        attention="attention",
        core="attention.self",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        sites=(Site("intermediate.intermediate_act_fn", "intermediate_size", feeds="output.dense"),),
        products=(
            Product("qkv", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.self"),
            *_ATTENTION,
            Product("attention output", ("attention.output.dense",)),
            Product("mlp in", ("intermediate.dense",)),
            Product("mlp out", ("output.dense",)),
        ),
        initial_threshold=2.5,
    )
    return Backbone(**{**vars(own), **differences})


def _llama(title: str, prefix: str) -> Backbone:
    """Llama and what is built like it. A gate takes the place of the activation, so the site stands after it."""
    return Backbone(
        title=title,
        models=_models(prefix, *_DECODER_HEADS),
        blocks="layers",
        attention="self_attn",
        core="self_attn",
        norms=("input_layernorm", "post_attention_layernorm"),
        sites=(Site("mlp.down_proj", "intermediate_size", at="input", signed=True),),
        products=(
            Product("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
            *_ATTENTION,
            Product("attention output", ("self_attn.o_proj",)),
            Product("mlp in", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
            Product("mlp out", ("mlp.down_proj",)),
        ),
        outer_products=_HEADS,
        outer_norms=("norm",),
        causal=True,
        positions=None,
    )


BACKBONES: dict[str, Backbone] = {
    "gpt2": Backbone(
        title="GPT-2",
        models=_models("GPT2", *_DECODER_HEADS, "TokenClassification", CausalLM="FASGPT2LMHeadModel"),
        blocks="h",
        attention="attn",
        core="attn",
        norms=("ln_1", "ln_2"),
        sites=(Site("mlp.act", "intermediate_size", feeds="mlp.c_proj"),),
        products=(
            Product("qkv", ("attn.c_attn",)),
            *_ATTENTION,
            Product("attention output", ("attn.c_proj",)),
            Product("mlp in", ("mlp.c_fc",)),
            Product("mlp out", ("mlp.c_proj",)),
        ),
        outer_products=(*_HEADS, Product("head", ("classifier",), once=True)),
        outer_norms=("ln_f",),
        causal=True,
    ),
    "bert": _bert(
        "BERT",
        "Bert",
        "MultipleChoice",
        outer_sites=(
            Site("pooler.activation", "hidden_size", feeds="classifier", group="pooler", per_position=False),
            Site("cls.predictions.transform.transform_act_fn", "hidden_size", group="transform"),
        ),
        outer_products=(
            Product("pooler", ("pooler.dense",), pooled=True),
            Product("transform", ("cls.predictions.transform.dense",)),
            Product("head", ("cls.predictions.decoder",), once=True),
            Product("head", ("classifier",), pooled=True, once=True),
            *_HEADS,
        ),
        outer_norms=("cls.predictions.transform.LayerNorm",),
        outer_activations=("pooler.activation", "cls.predictions.transform.transform_act_fn"),
        time_ends="cls.predictions.transform",
    ),
    "roberta": _bert(
        "RoBERTa",
        "Roberta",
        outer_products=(
            Product("pooler", ("pooler.dense",), pooled=True),
            Product("transform", ("classifier.dense",), pooled=True, once=True),
            Product("transform", ("lm_head.dense",), once=True),
            Product("head", ("lm_head.decoder",), once=True),
            Product("head", ("classifier.out_proj",), pooled=True, once=True),
            Product("head", ("classifier",), pooled=True, once=True),
            *_HEADS[2:],
        ),
        outer_activations=("pooler.activation",),
        positions=-2,
    ),
    "distilbert": Backbone(
        title="DistilBERT",
        models=_models("DistilBert", *_ENCODER_HEADS),
        blocks="transformer.layer",
        attention="attention",
        core="attention",
        norms=("sa_layer_norm", "output_layer_norm"),
        sites=(Site("ffn.activation", "hidden_dim", feeds="ffn.lin2"),),
        products=(
            Product("qkv", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention"),
            *_ATTENTION,
            Product("attention output", ("attention.out_lin",)),
            Product("mlp in", ("ffn.lin1",)),
            Product("mlp out", ("ffn.lin2",)),
        ),
        outer_sites=(Site("activation", "hidden_size", group="transform"),),
        outer_products=(
            Product("transform", ("vocab_transform",)),
            Product("head", ("vocab_projector",), once=True),
            Product("transform", ("pre_classifier",), pooled=True, once=True),
            Product("head", ("classifier",), pooled=True, once=True),
            *_HEADS,
        ),
        outer_norms=("vocab_layer_norm",),
        outer_activations=("activation",),
        time_ends="vocab_layer_norm",
        initial_threshold=2.5,
    ),
    "opt": Backbone(
        title="OPT",
        models=_models("OPT", *_DECODER_HEADS),
        blocks="layers",
        attention="self_attn",
        core="self_attn",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        sites=(Site("activation_fn", "ffn_dim", feeds="fc2", per_position=False),),
        products=(
            Product("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
            *_ATTENTION,
            Product("attention output", ("self_attn.out_proj",)),
            Product("mlp in", ("fc1",)),
            Product("mlp out", ("fc2",)),
        ),
        trunk="decoder",
        outer_norms=("decoder.final_layer_norm",),
        outer_products=(
            Product("project in", ("decoder.project_in",), once=True),
            Product("project out", ("decoder.project_out",)),
            *_HEADS,
        ),
        causal=True,
    ),
    "llama": _llama("Llama", "Llama"),
    "qwen2": _llama("Qwen2", "Qwen2"),
    "qwen3": _llama("Qwen3", "Qwen3"),
}

SCHEDULES = ("stepwise", "layerwise", "accumulated")
GRANULARITIES = ("layer", "neuron", "position")

# Least value of the integer settings; `None` is allowed where it is the default.
_INTEGERS = {"L": 1, "T": 0, "calib_T": 1, "calib_length": 1}
_OPTIONAL = ("L", "calib_T", "calib_length")
_CHOICES = {
    "schedule": SCHEDULES,
    "granularity": GRANULARITIES,
    "sites": ("mlp", "linear", "all"),
    "activation": ("qcfs", "stock"),
    "code": ("rate", "phase", "first_spike"),
    "gain": ("static", "token"),
}
# Most timesteps; the levels of a phase code double with each.
MOST_TIMESTEPS = {"rate": 32, "phase": 16, "first_spike": 32}
MOST_LEVELS = 1 << 16
_DEFAULTS: dict[str, Any] = {
    "L": 8,
    "T": 0,
    "calib_T": None,
    "calib_length": None,
    "schedule": "stepwise",
    "granularity": "neuron",
    "folded": False,
    "sites": "mlp",
    "activation": "qcfs",
    "code": "rate",
    "code_base": 2**0.5,
    "gain": "static",
}
# Keys of every configuration that are no attribute of a fresh one.
_GENERIC_KEYS = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "gradient_checkpointing",
    "name_or_path",
    "num_labels",
    "torch_dtype",
}
# Settings of rotary positions in transformers 5, and in 4; either reads both.
_ROPE_KEYS = {"rope_parameters", "rope_scaling", "rope_theta"}


def _checked(name: str, value: Any) -> Any:
    """The value of a FAS setting in its canonical type, or a `ValueError` that says what would be right."""
    if name in _INTEGERS:
        least = _INTEGERS[name]
        if value is None and name in _OPTIONAL:
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
    least, start = (1, "1.2 with 16 timesteps, 1.4 with 8") if name == "code_base" else (0, "2.0")
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value <= least:
        raise ValueError(f"`{name}` must be a finite number above {least} ({start} is a good start), got {value!r}.")
    return float(value)


def running(config: Any) -> dict[str, Any] | None:
    """What holds for a configuration in this thread for a while, in place of its own values; None: nothing."""
    for each, settings in reversed(getattr(here, "running", ())):
        if each is config:
            return settings
    return None


def mode(config: Any) -> tuple[int, str]:
    """T and schedule of a configuration in this thread. Every hook asks; attributes of a configuration are slow."""
    own = running(config)
    return (config.T, config.schedule) if own is None else (own["T"], own["schedule"])


def _for_a_while(name: str) -> property:
    """A setting that a thread can have a value of its own for; what is saved is that of all threads."""

    def get(config: Any) -> Any:
        own = running(config)
        if own is None and name not in vars(config):
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")
        return (vars(config) if own is None else own)[name]

    def put(config: Any, value: Any) -> None:
        own = running(config)
        (vars(config) if own is None else own)[name] = value

    return property(get, put)


class FASConfig(PretrainedConfig):
    """Configuration of a spiking language model; builds the one of its backbone, a key of `BACKBONES`.

    `FASConfig(backbone="gpt2", …)` gives a [`FASGPT2Config`], and so on; each takes every setting of its stock
    configuration too. `FASConfig.from_pretrained` reads stock and FAS checkpoints alike. Settings are checked whenever
    they are set, so a configuration never holds a value that cannot run.

    Args:
        L (`int`, *optional*, defaults to 8): quantisation levels of a site at T = 0; `None` makes T = 0 the stock
            network, where no activation was replaced.
        T (`int`, defaults to 0): timesteps; 0 runs the quantised ANN.
        calib_T (`int`, *optional*): timesteps the model was calibrated for. Set exactly when the model has fine
            thresholds; `model.begin_calibration` sets it.
        calib_length (`int`, *optional*): rows of the fine thresholds at granularity `"position"`.
        schedule (`str`, defaults to `"stepwise"`): `"stepwise"` passes every timestep through the whole network;
            `"accumulated"` does too, but all that is not linear sees the running mean of its input and emits
            differences; `"layerwise"` integrates a constant input for T steps at each site and passes on the time
            average.
        granularity (`str`, defaults to `"neuron"`): who shares a fine threshold: `"layer"`, `"neuron"`, `"position"`.
        folded (`bool`, defaults to `False`): whether the thresholds are part of the weights that follow the sites, so
            that what travels is 0 or 1.
        sites (`str`, defaults to `"mlp"`): where neurons sit. `"mlp"`: in place of the MLP's activation, or at the
            input of a gated MLP's last layer. `"linear"`: at the input of every linear layer of the blocks. `"all"`:
            at queries, values and the input of the head as well.
        activation (`str`, defaults to `"qcfs"`): (`fas_activation` in a DistilBERT, whose own `activation` is that of
            its MLP) `"stock"` leaves activations as they are, where `sites` is not
            `"mlp"`; else the trained neurons that replace them serve the layers after them.
        code (`str`, defaults to `"rate"`): how T steps make a value: `"rate"` weighs spikes equally, `"phase"` by
            powers of 2, `"first_spike"` by the step of the only one.
        code_base (`float`, defaults to the root of 2): what a first spike loses in weight a step.
        gain (`str`, defaults to `"static"`): `"token"` multiplies thresholds by the largest input of the token.
        initial_threshold (`float`): threshold of a site that no checkpoint has one for. Defaults to 2.0 for decoders
            and 2.5 for encoders (the published code; 1.24 in its masked-LM step).

    Raises:
        ValueError: for a value of the wrong type or out of range, an unknown backbone, or a checkpoint of another
            architecture. An unknown key is kept, as in every configuration, with a warning.
    """

    model_type = "fas"
    backbone = ""
    T = _for_a_while("T")
    schedule = _for_a_while("schedule")
    _stock_class: ClassVar[Any] = None
    # Settings whose name the stock configuration has for something else, with the name they get there.
    _renamed: ClassVar[dict[str, str]] = {}

    def __new__(cls, *args, **kwargs):
        return super().__new__(_config_class(kwargs) if cls is FASConfig and kwargs else cls)

    def __init__(self, **kwargs):
        backbone = kwargs.pop("backbone", self.backbone)
        model_type = kwargs.pop("model_type", self.model_type)
        self._warn_about_newer(kwargs.pop("fas_version", None))
        self.fas_version = __version__  # of the code that runs, hence of the code files saved beside it
        if self.backbone and (backbone != self.backbone or not self._reads(model_type)):
            raise ValueError(
                f"`{type(self).__name__}` is for the backbone {self.backbone!r}, got backbone {backbone!r} and "
                f"`model_type` {model_type!r}. `FASConfig` chooses the class by itself."
            )
        table = BACKBONES.get(self.backbone)
        for name, default in (_DEFAULTS | {"initial_threshold": table.initial_threshold if table else 2.0}).items():
            name = self._renamed.get(name, name)
            setattr(self, name, kwargs.pop(name, default))
        self._warn_about_unknown_keys(kwargs, from_file="transformers_version" in kwargs or "architectures" in kwargs)
        super().__init__(**self._with_rope(kwargs))
        if table:
            self.auto_map = {"AutoConfig": f"configuration_fas.{type(self).__name__}"} | {
                auto: f"modeling_fas.{model}" for auto, model in table.models.items()
            }
            _show_architectures(table)

    @property
    def table(self) -> Backbone:
        """What the backbone is."""
        return BACKBONES[self.backbone]

    @property
    def placed(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """The sites of every block, and those outside of blocks."""
        return self.table.placed(self.sites, getattr(self, self._renamed.get("activation", "activation")))

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that the code and the gain allow."""
        return SCHEDULES if self.code == "rate" and self.gain == "static" else ("layerwise",)

    def check(self) -> None:
        """Raise for settings that do not go together; called whenever a model is made or set to run otherwise.

        Raises:
            ValueError: says which, and what would work.
        """
        replaced = any(site.at == "activation" for part in self.placed for site in part)
        most = MOST_TIMESTEPS[self.code]
        for name in ("T", "calib_T"):
            value = getattr(self, name) or 0
            if most < value:
                raise ValueError(
                    f"`{name}` must be at most {most} with code {self.code!r}, got {value}. Fewer do: 4 to 8, as "
                    "a rule."
                )
        if (self.L or 0) > MOST_LEVELS:
            raise ValueError(f"`L` must be at most {MOST_LEVELS}, got {self.L}. Fewer do: 8 to 16, as a rule.")
        if self.table.positions is not None and positions_of(self) < (self.calib_length or 0):
            raise ValueError(
                f"`calib_length` must be at most the {positions_of(self)} positions of the model, got "
                f"{self.calib_length}."
            )
        activation = getattr(self, self._renamed.get("activation", "activation"))
        if self.sites == "mlp" and activation == "stock" and replaced:
            raise ValueError(
                "`activation` must be 'qcfs' where `sites` is 'mlp', since neurons sit in its place, got 'stock'. Use "
                "`sites` 'linear' or 'all' to keep the stock activation."
            )
        if self.L is None and replaced:
            raise ValueError(
                "`L` must be an integer where neurons replace an activation, got None. Give `activation` 'stock' and "
                "`sites` 'linear' or 'all' for a model that is the stock network at T = 0."
            )
        for name, plain in (("code", "rate"), ("gain", "static")):
            if self.T and getattr(self, name) != plain and self.schedule != "layerwise":
                raise ValueError(
                    f"`schedule` must be 'layerwise' with {name} {getattr(self, name)!r}, which encodes each layer's "
                    f"input anew, got {self.schedule!r}. With {name} {plain!r} every schedule works."
                )
        if self.folded and self.gain == "token":
            raise ValueError("`gain` must be 'static' to be folded: no weight knows the token, got 'token'.")
        if self.folded and self.L is None and self.T == 0:
            raise ValueError(
                "`T` must be at least 1 once thresholds are folded, where `L` is None, got 0: the stock network does "
                "not fit these weights. Load the checkpoint it was made from for that."
            )

    @classmethod
    def _with_rope(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Settings of rotary positions that transformers 5 wrote, under the names that transformers 4 reads."""
        rope = kwargs.get("rope_parameters")
        if not isinstance(rope, dict) or "rope_theta" not in vars(cls._stock_class()):
            return kwargs
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default"
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        return {"rope_scaling": None if plain else scaling} | theta | kwargs

    def __setattr__(self, name: str, value: Any) -> None:
        own = {renamed: plain for plain, renamed in self._renamed.items()}.get(name, name)
        if (own in _DEFAULTS or own == "initial_threshold") and name not in self._renamed:
            value = _checked(own, value)
        super().__setattr__(name, value)

    @classmethod
    def _reads(cls, model_type: str | None) -> bool:
        return model_type in (cls.backbone, cls.model_type)

    @staticmethod
    def _warn_about_newer(version: Any) -> None:
        """Warn where a newer version than this wrote a configuration: what it has added is not known here."""
        numbers = [[int(part) for part in str(each).split(".") if part.isdigit()] for each in (version, __version__)]
        if numbers[0] > numbers[1]:
            logger.warning(
                f"`fas_version` must be at most {__version__}, that of the code at hand, got {version}: the "
                "checkpoint may run otherwise here than where it was saved. Update this project, or load "
                "the checkpoint with its own code (`trust_remote_code=True`, where this project is not imported)."
            )

    def _warn_about_unknown_keys(self, kwargs: dict[str, Any], from_file: bool) -> None:
        """Warn about every unknown key that was written by hand, and in a file about those close to one of ours.

        Files of older versions carry stale keys that concern nobody.
        """
        own = [*(self._renamed.get(name, name) for name in _DEFAULTS), "initial_threshold"]
        stock = set(vars(self._stock_class())) | set(self.attribute_map) if self._stock_class else set()
        stock |= _ROPE_KEYS if stock & _ROPE_KEYS else set()
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

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @property
    def intermediate_size(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


class FASBertConfig(FASConfig, BertConfig):
    """[`FASConfig`] of a BERT backbone; every setting of `BertConfig` besides."""

    model_type = "fas_bert"
    backbone = "bert"
    _stock_class = BertConfig

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASRobertaConfig(FASConfig, RobertaConfig):
    """[`FASConfig`] of a RoBERTa backbone; every setting of `RobertaConfig` besides."""

    model_type = "fas_roberta"
    backbone = "roberta"
    _stock_class = RobertaConfig

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASDistilBertConfig(FASConfig, DistilBertConfig):
    """[`FASConfig`] of a DistilBERT backbone; every setting of `DistilBertConfig` besides."""

    model_type = "fas_distilbert"
    backbone = "distilbert"
    _stock_class = DistilBertConfig
    _renamed = {"activation": "fas_activation"}

    def __init__(self, **kwargs):
        if kwargs.get("activation") in _CHOICES["activation"]:
            kwargs["fas_activation"] = kwargs.pop("activation")
        super().__init__(**kwargs)


class FASOPTConfig(FASConfig, OPTConfig):
    """[`FASConfig`] of an OPT backbone; every setting of `OPTConfig` besides."""

    model_type = "fas_opt"
    backbone = "opt"
    _stock_class = OPTConfig

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASLlamaConfig(FASConfig, LlamaConfig):
    """[`FASConfig`] of a Llama backbone; every setting of `LlamaConfig` besides."""

    model_type = "fas_llama"
    backbone = "llama"
    _stock_class = LlamaConfig

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASQwen2Config(FASConfig, Qwen2Config):
    """[`FASConfig`] of a Qwen2 backbone; every setting of `Qwen2Config` besides."""

    model_type = "fas_qwen2"
    backbone = "qwen2"
    _stock_class = Qwen2Config

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FASQwen3Config(FASConfig, Qwen3Config):
    """[`FASConfig`] of a Qwen3 backbone; every setting of `Qwen3Config` besides."""

    model_type = "fas_qwen3"
    backbone = "qwen3"
    _stock_class = Qwen3Config

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


CONFIGURATIONS: tuple[type[FASConfig], ...] = (
    FASGPT2Config,
    FASBertConfig,
    FASRobertaConfig,
    FASDistilBertConfig,
    FASOPTConfig,
    FASLlamaConfig,
    FASQwen2Config,
    FASQwen3Config,
)


def positions_of(config: Any) -> int:
    """Tokens that a model of the table has positions for, from its configuration, stock or FAS."""
    return config.max_position_embeddings + (BACKBONES[config.model_type.removeprefix("fas_")].positions or 0)


def _show_architectures(table: Backbone) -> None:
    """Let transformers find architectures in itself, as its pipelines and its server do: what loads any version."""
    import transformers  # at every call, since it may make itself anew when a part of it is imported

    for auto_class, name in table.models.items():
        setattr(transformers, name, getattr(transformers, auto_class))


def _config_class(config_dict: dict[str, Any]) -> type[FASConfig]:
    """The configuration class for a `backbone` or, failing that, a `model_type`."""
    name = config_dict.get("backbone", config_dict.get("model_type"))
    for config_class in CONFIGURATIONS:
        if config_class._reads(name):
            return config_class
    known = ", ".join(map(repr, BACKBONES))
    raise ValueError(
        f"`backbone` must be one of {known} (or come with a checkpoint of that type), got {name!r}. Another one is a "
        "table entry and a few empty classes: docs/add-a-backbone.md of the project."
    )


for _class in CONFIGURATIONS:
    _class.register_for_auto_class()
    # Registering from remote code would make the first checkpoint's classes serve all later ones.
    if not __name__.startswith("transformers_modules."):
        AutoConfig.register(_class.model_type, _class, exist_ok=True)
