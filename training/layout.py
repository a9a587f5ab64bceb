"""Where the products and the neuron sites of a model are, read from the table of its backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from configuration_fas import Product, Site
from modeling_fas import FASMixin
from sites_fas import find, trunk


# What spikes in a product of attention, where anything does.
MEETS = {"scores": "query", "values": "value"}


@dataclass(frozen=True)
class Placed:
    """A neuron site of a model: in which block, its name and neuron, and the linear layers that take what it emits."""

    layer: int | None
    name: str
    site: Site
    neuron: Any
    targets: list[Any]


@dataclass(frozen=True)
class Weighed:
    """A product of a model: in which block, its linear layers, and the name of the site whose spikes they take."""

    layer: int | None
    product: Product
    weights: list[Any]
    site: str | None


def spikes_by_itself(config: Any) -> bool:
    """Whether a configuration describes a network that spikes without QCFS before it, as conversion makes them.

    Its T and its schedule are what it is trained and judged at; all others are trained at T = 0.
    """
    return config.code != "rate" or config.L is None or config.sites != "mlp"


def schedule_to_train(config: Any) -> str:
    """Schedule to calibrate by: stepwise, unless the network spikes by itself, in one of its own."""
    if spikes_by_itself(config):
        return config.schedule if config.schedule in config.schedules else config.schedules[0]
    return "stepwise"


def is_untrained(model: Any) -> bool:
    """Whether a QCFS network was never fine-tuned: it has every threshold where it started."""
    start = model.config.initial_threshold
    fresh = all(bool((neuron.threshold == start).all()) for _, neuron in model.neurons())
    return fresh and not spikes_by_itself(model.config)


def core_of(model: Any) -> Any:
    """The FAS model itself, below whatever wraps it.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, FASMixin) or hasattr(module, "neurons"):
            return module
    raise ValueError(f"`model` must be a FAS model, got {type(model).__name__}, which has no neuron sites.")


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode inside; training mode as before afterwards. None is no model."""
    before = [(model, model.training) for model in models if model is not None]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)


def turn_off_dropout(model: nn.Module) -> None:
    """For good, in the modules of a model; its configuration keeps what it says."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # handed to functions: of attention, and of OPT's blocks
                setattr(module, name, 0.0)


def auto_class(model: Any) -> str:
    """The Auto class that loads models of its kind, which sharding may have given a class of its own below."""
    names = {each.__name__ for each in type(model).__mro__}
    return next(auto for auto, name in model.config.table.models.items() if name in names)


def label(site: str) -> str:
    """What people are told a site is called, from its name: its block and its module, `3 mlp.act`; else its module."""
    parts = site.removesuffix(".site").split(".")
    if len(parts) > 1 and parts[-1].startswith(parts[-2]):  # intermediate.intermediate_act_fn
        del parts[-2]
    block = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if block is None:
        return ".".join(parts[-2:])
    return " ".join([parts[block], ".".join(parts[block + 1 :])])


def predicts_next(model: Any) -> bool:
    """Whether the logits at a position speak of the next token."""
    return auto_class(model) == "AutoModelForCausalLM"


def pooled(model: Any) -> set[str]:
    """Names of the sites that run once a sequence, not once a token."""
    return {each.name for each in sites(model) if each.layer is None and not each.site.per_position}


def sites(model: Any) -> list[Placed]:
    """Every neuron site, in the order they run in."""
    names = {id(neuron): name for name, neuron in model.neurons()}
    inner, outer = model.config.placed
    wanted: list[tuple[int | None, Any, Site]] = [
        (layer, block, site) for layer, block in _blocks(model) for site in inner
    ]
    wanted += [(None, None, site) for site in outer]
    placed = []
    for layer, parent, site in wanted:
        leaf = {"activation": "", "input": ".site"}.get(site.at, f".{site.at}_site")
        neuron = _at(model, parent, site.path + leaf)
        if id(neuron) in names:
            targets = [target for path in site.targets if (target := _at(model, parent, path)) is not None]
            placed.append(Placed(layer, names[id(neuron)], site, neuron, targets))
    return placed


def products(model: Any) -> Iterator[Weighed]:
    """Every product of the blocks, block by block, then those of what follows; what a model lacks is left out."""
    table = model.config.table
    placed = sites(model)
    fed: dict[Any, str] = {id(target): each.name for each in placed for target in each.targets}
    fed |= {(each.layer, each.site.at): each.name for each in placed}
    wanted: list[tuple[int | None, Any, Product]] = [
        (layer, block, product) for layer, block in _blocks(model) for product in table.products
    ]
    wanted += [(None, None, product) for product in table.outer_products]
    for layer, parent, product in wanted:
        weights = [_at(model, parent, path) for path in product.weights]
        weights = [each for each in weights if hasattr(each, "weight") and each.weight.dim() == 2]
        if weights or not product.weights:
            site = fed.get(id(weights[0])) if weights else fed.get((layer, MEETS[product.name]))
            yield Weighed(layer, product, weights, site)


def _blocks(model: Any) -> Iterator[tuple[int, Any]]:
    yield from enumerate(trunk(model).get_submodule(model.config.table.blocks))


def _at(model: Any, parent: Any, path: str) -> Any:
    """What is at a path of a block, or outside of blocks in the model or its trunk."""
    if parent is not None:
        return find(parent, path)
    found = find(model, path)
    return find(model.base_model, path) if found is None else found
