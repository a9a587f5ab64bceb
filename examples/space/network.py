"""A checkpoint, its spikes, site by site, and what they cost: all that the page knows of the network."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import transformers


SHOWN_TOKENS, SHOWN_NEURONS = 12, 64
MAC_PJ, AC_PJ = 4.6, 0.9  # a 32-bit multiply-accumulate, and an accumulate, at 45 nm (Horowitz 2014)
HEADS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForMaskedLM")


@dataclass
class Site:
    """What one neuron site did.

    Attributes:
        layer: Index of its block, or `None` outside of blocks.
        kind: What it feeds, as the table of backbones calls it.
        width: Its neurons, D.
        rates: `(S,)` share of its neurons and timesteps with a spike, by token; `(1,)` where it runs once a text.
        sample: `(T, S', N)` spikes, -1, 0 or 1, of N of its neurons, evenly spaced, at the last S' tokens.
    """

    name: str
    layer: int | None
    kind: str
    width: int
    rates: torch.Tensor
    sample: torch.Tensor

    @property
    def rate(self) -> float:
        """Spikes per neuron and timestep."""
        return self.rates.mean().item()


def load(checkpoint: str, revision: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint, by the Auto class that its configuration names for its own weights.

    Raises:
        ValueError: for what is no FAS checkpoint, or has a head that the page has no answer for.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=True)
    references = getattr(config, "auto_map", None) or {}
    architecture = (config.architectures or ["none"])[0]
    auto = next((name for name, each in references.items() if each.endswith(architecture)), None)
    if auto is None:
        raise ValueError(f"`checkpoint` must be a FAS checkpoint, got {checkpoint!r} of type {config.model_type!r}.")
    if not architecture.endswith(HEADS):
        raise ValueError(f"`checkpoint` must generate, classify or fill a mask, got {architecture}.")
    options = {"revision": revision, "trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, **options)
    return getattr(transformers, auto).from_pretrained(checkpoint, **options).eval(), tokenizer


def reference(model: Any) -> str:
    """What the model is at T = 0."""
    return "stock network" if model.config.L is None else "quantised ANN"


@torch.no_grad()
def watch(model: Any, inputs: dict[str, torch.Tensor]) -> list[Site]:
    """Run the spiking network once on one text, and return what every site did, in the order they run in."""
    found: list[Site] = []
    placed = {id(neuron): (layer, site.group) for layer, site, neuron, _ in sites(model)}

    def record(name: str, neuron: Any, arguments: tuple, output: torch.Tensor) -> None:
        trains = neuron.trains(arguments[0]).reshape(neuron.T, -1, neuron.width)  # one text
        shown = torch.arange(min(SHOWN_NEURONS, neuron.width)) * neuron.width // min(SHOWN_NEURONS, neuron.width)
        sample = trains[:, -SHOWN_TOKENS:, shown].to(torch.int8)
        rates = trains.ne(0).float().mean((0, 2))
        found.append(Site(name, *placed[id(neuron)], neuron.width, rates, sample))

    hooks = [neuron.register_forward_hook(partial(record, name)) for name, neuron in model.neurons()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def sites(model: Any) -> Iterator[tuple[int | None, Any, Any, list[Any]]]:
    """Block, table entry, neuron and the layers it feeds, of every site of the table that the model has."""
    inner, outer = model.config.placed
    leaves = {"activation": "", "input": ".site", "query": ".query_site", "value": ".value_site"}
    neurons = {id(neuron) for _, neuron in model.neurons()}
    wanted = [(layer, block, site) for layer, block in _blocks(model) for site in inner]
    for layer, parent, site in [*wanted, *((None, None, site) for site in outer)]:
        neuron = _at(model, parent, site.path + leaves[site.at])
        if id(neuron) in neurons:
            yield layer, site, neuron, [_at(model, parent, path) for path in site.targets]


def cost(model: Any, found: list[Site], length: int, T: int, schedule: str) -> tuple[float, float]:
    """Energy and weights read of all products, a token, over those of the network at T = 0.

    A product of spikes is an accumulate for each spike and weight, any other a multiply-accumulate each time it runs;
    a membrane update costs an accumulate. As `fas.energy_report` of the project counts, with attention as the mask
    leaves it.
    """
    rates = {site.name: site.rate for site in found}
    names = {id(neuron): name for name, neuron in model.neurons()}
    fed: dict[Any, str] = {}
    updates, plain, plain_reads, energy, reads, spiked = 0.0, 0.0, 0.0, 0.0, 0.0, False
    for layer, site, neuron, targets in sites(model):
        fed |= {id(target): names[id(neuron)] for target in targets} | {(layer, site.at): names[id(neuron)]}
        per = 1 if site.per_position or layer is not None else length
        updates += neuron.width * T * (1 + rates[names[id(neuron)]]) / per
    for layer, product, weights, per in _products(model, length):
        meets = {"scores": "query", "values": "value"}.get(product.name)
        name = fed.get((layer, meets)) if meets else fed.get(id(weights[0]))
        spiked |= name is not None
        macs = sum(each.weight.numel() for each in weights) / per if weights else _attention(model, length)
        times = T if schedule != "layerwise" and spiked and not product.once else 1
        spikes = name is not None and not (meets and schedule == "accumulated")
        operations = macs * T * rates[name] if spikes else macs * times
        energy += operations * (AC_PJ if spikes else MAC_PJ)
        plain += macs * MAC_PJ
        reads += operations if weights else 0
        plain_reads += macs if weights else 0
    return (energy + updates * AC_PJ) / plain, reads / plain_reads


def _attention(model: Any, length: int) -> float:
    """Multiply-accumulates a token of QKᵀ, or of the product with the values."""
    config = model.config
    heads = config.num_attention_heads
    keys = (length + 1) / 2 if config.table.causal else length
    return keys * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _products(model: Any, length: int) -> Iterator[tuple[int | None, Any, list[Any], int]]:
    table = model.config.table
    pools = not type(model).__name__.endswith("ForTokenClassification")
    wanted = [(layer, block, product) for layer, block in _blocks(model) for product in table.products]
    for layer, parent, product in [*wanted, *((None, None, product) for product in table.outer_products)]:
        weights = [_at(model, parent, path) for path in product.weights]
        weights = [each for each in weights if hasattr(each, "weight") and each.weight.dim() == 2]
        if weights or not product.weights:
            yield layer, product, weights, length if product.pooled and pools else 1


def _blocks(model: Any) -> Iterator[tuple[int, Any]]:
    table = model.config.table
    yield from enumerate(model.base_model.get_submodule(table.trunk).get_submodule(table.blocks))


def _at(model: Any, parent: Any, path: str) -> Any:
    """What is at a path of a block, or outside of blocks in the model or its trunk; None where nothing is."""
    for start in (model, model.base_model) if parent is None else (parent,):
        found = reduce(lambda module, name: getattr(module, name, None), path.split("."), start)
        if found is not None:
            return found
    return None
