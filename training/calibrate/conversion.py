"""Conversion without training: a stock model becomes a spiking one, its thresholds fitted to a few hundred tokens."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as logging_of_transformers

import modeling_fas
from configuration_fas import FASConfig, positions_of
from neurons_fas import spike_count
from sites_fas import FASNeuron

from ..layout import Placed, auto_class, pooled, products, sites
from ..shards import check_shards


logger = logging.getLogger(__name__)

# Thresholds tried, over the root mean square of a neuron's input: 40 from half of it to thirty times.
SCALES = torch.logspace(-0.3, 1.5, 40).tolist()
# With gain "token": ends of the range, over the largest input of a token; and what power of its root mean square a
# neuron's threshold is. Below 1, steps are finer where inputs are large: massive activations are few and matter much.
GAINS = (1.0, 0.85, 0.7, 0.5, 0.3)
POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# A neuron's root mean square counts as at least this share of its site's.
LEAST_SHARE = {"static": 0.1, "token": 0.05}
FEW_TOKENS = 128
TOKENS = 768


def convert_to_spiking(
    model: PreTrainedModel | str | os.PathLike,
    calibration: Sequence[str] | Mapping[str, torch.Tensor] | torch.Tensor,
    *,
    sites: str = "all",
    code: str = "phase",
    T: int | None = None,
    schedule: str | None = None,
    gain: str | None = None,
    code_base: float | None = None,
    tokenizer: Any = None,
    tokens: int = TOKENS,
    length: int = 256,
    progress: bool = True,
) -> Any:
    """Turn a pretrained stock model into a spiking one, without training.

    Neurons are placed at the inputs of linear layers, activations stay, and every neuron gets the threshold of least
    squared error over the calibration tokens, site by site in one forward pass, in which each site sees what the ones
    before it deliver. At T = 0 the model is the stock network, bit for bit.

    Args:
        model: A folder or a name on the Hub; or a stock model, which is converted in place and shares its weights.
        calibration: Texts, for the tokenizer of the model; or a batch of inputs, or token ids `(B, S)`.
        sites: `"linear"` or `"all"`; `"mlp"` for a gated MLP.
        code: `"phase"`, `"first_spike"` or `"rate"`.
        T: Timesteps; 5 for a phase code, 16 for the others, if not given.
        schedule: `"layerwise"` by default; a rate code may be `"stepwise"` or `"accumulated"`.
        gain: `"token"` by default where norms do not centre (the Llama family, whose few massive activations need
            it), else `"static"`.
        code_base: Of a first spike: 1.2 from 12 timesteps on, else the root of 2, if not given.
        tokenizer: Of the texts, if not that of the folder.
        tokens: At most so many are used.
        length: Of the rows that texts of a causal model are cut into.
        progress: Show a bar.

    Returns:
        The spiking model, set to T, in evaluation mode.

    Raises:
        ValueError: for a model that spikes already or has no entry in the table, settings that do not go together, or
            a calibration without tokens.
    """
    return convert_and_report(
        model,
        calibration,
        sites=sites,
        code=code,
        T=T,
        schedule=schedule,
        gain=gain,
        code_base=code_base,
        tokenizer=tokenizer,
        tokens=tokens,
        length=length,
        progress=progress,
    )[0]


def convert_and_report(
    model: PreTrainedModel | str | os.PathLike,
    calibration: Sequence[str] | Mapping[str, torch.Tensor] | torch.Tensor,
    *,
    sites: str,
    code: str,
    T: int | None = None,
    schedule: str | None = None,
    gain: str | None = None,
    code_base: float | None = None,
    tokenizer: Any = None,
    tokens: int = TOKENS,
    length: int = 256,
    progress: bool = True,
) -> tuple[Any, dict[str, dict[str, float]]]:
    """As [`convert_to_spiking`]; returns what [`fit_thresholds`] found by site, too.

    Settings and calibration are checked before the model is touched.
    """
    if T is None:
        T = {"phase": 5}.get(code, 16)
    if isinstance(T, int) and T < 1:
        raise ValueError(f"`T` must be at least 1, got {T}. The spiking model is the stock one at `set_timesteps(0)`.")
    if code_base is None:
        code_base = 1.2 if T >= 12 else 2**0.5
    schedule = schedule or "layerwise"
    settings = {"sites": sites, "code": code, "code_base": code_base, "T": T, "schedule": schedule, "gain": gain}
    stock = model if isinstance(model, PreTrainedModel) else None
    raw = FASConfig.get_config_dict(model)[0] if stock is None else stock.config.to_dict()
    _refuse_spiking(raw, type(stock).__name__ if stock is not None else model)
    config = FASConfig.from_pretrained(model) if stock is None else _config_of(stock)
    model_class = _class_for(
        config, (raw.get("architectures") or ["none"])[0] if stock is None else type(stock).__name__
    )
    for name, value in {**settings, "activation": "stock", "L": None, "gain": gain or _gain(config)}.items():
        setattr(config, config._renamed.get(name, name), value)
    config.check()
    if stock is None and tokenizer is None and _are_texts(calibration):
        tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = _inputs(config, calibration, tokenizer, tokens, length)
    spiking = (_loaded(model, config, model_class) if stock is None else _in_place(stock, config, model_class)).eval()
    inputs = {name: value.to(spiking.device) for name, value in inputs.items()}
    found = fit_thresholds(spiking, inputs, T, progress=progress)
    return spiking.set_timesteps(T, schedule), found


def _gain(config: Any) -> str:
    return "token" if hasattr(config, "rms_norm_eps") else "static"


def _config_of(stock: Any) -> FASConfig:
    config = FASConfig(**{**stock.config.to_dict(), "backbone": stock.config.model_type})
    config._attn_implementation = stock.config._attn_implementation
    return config


def _loaded(source: Any, config: FASConfig, model_class: Any) -> Any:
    check_shards(source)
    verbosity = logging_of_transformers.get_verbosity()
    logging_of_transformers.set_verbosity_error()  # its report of what is missing would name every new threshold
    try:
        model, report = model_class.from_pretrained(source, config=config, dtype="float32", output_loading_info=True)
    finally:
        logging_of_transformers.set_verbosity(verbosity)
    lost = [name for name in report["missing_keys"] if not name.endswith(("threshold", "gain"))]
    if lost:
        raise ValueError(f"`model` must hold all weights, got {str(source)!r} without {sorted(lost)[:3]}.")
    return model


def _in_place(model: PreTrainedModel, config: FASConfig, model_class: Any) -> Any:
    stock = model.config
    for module in model.modules():
        if getattr(module, "config", None) is stock:
            vars(module)["config"] = config
    model.__class__ = model_class
    spiking: Any = model
    dtype = model.dtype
    spiking._make_spiking()
    for name, neuron in spiking.neurons():  # a model may stand on several devices
        beside = spiking.get_submodule(name.rpartition(".")[0]).parameters()
        neuron.to(dtype=dtype, device=next(each.device for each in beside if each.dim() > 1))
    return spiking


def _refuse_spiking(config: Mapping[str, Any], source: Any) -> None:
    if str(config.get("model_type")).startswith("fas_"):
        raise ValueError(
            f"`model` must be a stock model, got {str(source)!r}, which spikes already. Start from the checkpoint it "
            "was made from; `set_timesteps` changes T."
        )


def _class_for(config: Any, architecture: str) -> Any:
    name = f"FAS{architecture}"
    if name not in config.table.models.values():
        known = ", ".join(each.removeprefix("FAS") for each in config.table.models.values())
        raise ValueError(f"`model` must be one of {known}, got {architecture!r}.")
    return getattr(modeling_fas, name)


def _are_texts(calibration: Any) -> bool:
    return isinstance(calibration, Sequence) and all(isinstance(each, str) for each in calibration)


def _inputs(config: Any, calibration: Any, tokenizer: Any, tokens: int, length: int) -> dict[str, torch.Tensor]:
    """The calibration as one batch."""
    if isinstance(calibration, str):
        raise ValueError("`calibration` must be a sequence of texts, got one text. Put it in a list.")
    if isinstance(calibration, torch.Tensor):
        calibration = {"input_ids": calibration}
    if _are_texts(calibration):
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given for texts, where the model does not come from a folder.")
        calibration = _tokenized(config, calibration, tokenizer, tokens, length)
    batch = {name: value for name, value in calibration.items() if name != "labels"}
    ids = batch.get("input_ids")
    if ids is None or not ids.numel():
        raise ValueError("`calibration` must hold at least one token, got none.")
    mask = batch.get("attention_mask")
    count = int(mask.sum()) if mask is not None else ids.numel()
    if count < FEW_TOKENS:
        logger.warning(
            f"`calibration` holds {count} tokens: thresholds fitted to so few may not suit other texts. A few hundred "
            "are enough."
        )
    return batch


def _tokenized(config: Any, texts: Sequence[str], tokenizer: Any, tokens: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of equal length for a causal model; else one text a row, padded."""
    length = min(length, positions_of(config), tokens)
    if not config.table.causal:
        kept, used = [], 0
        for text in texts:
            kept.append(tokenizer(text, truncation=True, max_length=length)["input_ids"])
            used += len(kept[-1])
            if used >= tokens:
                break
        return dict(tokenizer.pad({"input_ids": kept}, return_tensors="pt")) if kept else {}
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    rows = len(ids[:tokens]) // length or 1
    return {"input_ids": torch.tensor(ids[: rows * length]).view(rows, -1)} if ids else {}


@torch.no_grad()
def fit_thresholds(
    model: Any, inputs: Mapping[str, torch.Tensor], T: int, *, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Give every site fine thresholds of least squared error for T timesteps, front to back in one layerwise pass.

    Args:
        model: A FAS model, in evaluation mode.
        inputs: Of the model, one batch; padding takes no part.
        T: Timesteps; `config.calib_T`.
        progress: Show a bar.

    Returns:
        By site: `error`, squared, over the mean square of its input; `spikes`, mean over its inputs; `dead`, neurons
        that never fire.
    """
    model.begin_calibration(T)
    found: dict[str, dict[str, float]] = {}
    whole = pooled(model)
    mask = inputs.get("attention_mask")
    tokens = None if mask is None else mask.flatten().bool().cpu()  # which chooses on every device
    handles = []
    bar = tqdm(total=len(model.neurons()), desc="thresholds", unit="site", disable=not progress)
    for placed in sites(model):

        def choose(neuron: Any, given: tuple, placed: Placed = placed) -> None:
            name, values = placed.name, given[0].flatten(0, -2)
            values = values if tokens is None or name in whole or len(values) != len(tokens) else values[tokens]
            found[name] = _fit(placed, values)
            bar.update()

        handles.append(placed.neuron.register_forward_pre_hook(choose))
    handles += [layer.register_forward_pre_hook(_first_position) for layer in _vocabulary_heads(model)]
    try:
        with model.running(T, "layerwise"):
            model(**inputs, **({"use_cache": False} if model.config.table.causal else {}))
    finally:
        bar.close()
        for handle in handles:
            handle.remove()
    silent = [name for name, site in found.items() if site["dead"] == model.get_submodule(name).width]
    if silent:
        logger.warning(f"No calibration text makes these sites fire: {', '.join(silent)}.")
    return found


def _vocabulary_heads(model: Any) -> list[Any]:
    if auto_class(model) not in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        return []
    return [layer for each in products(model) if each.product.name == "head" for layer in each.weights]


def _first_position(layer: Any, args: tuple) -> tuple:
    """Nobody reads the logits, which would take as much memory as a large part of the weights."""
    return (args[0][:, :1], *args[1:])


def _weight(placed: Placed) -> torch.Tensor | None:
    """What an error of each neuron weighs in what follows: the squares of its weights, `(D,)`; None: all the same."""
    if placed.site.at != "input" or not placed.targets:
        return None
    squares = (each.weight.float().square() for each in placed.targets)
    layers = zip(squares, placed.targets, strict=True)
    return sum(square.sum(0 if isinstance(layer, nn.Linear) else 1) for square, layer in layers)


def _fit(placed: Placed, values: torch.Tensor) -> dict[str, float]:
    """Set the fine thresholds of a site (and its gain) to the best for the values `(N, D)` that it reads."""
    neuron, values = placed.neuron, values.float()
    scale = values.square().mean(0).sqrt()
    least_share = LEAST_SHARE["static" if neuron.gain is None else "token"]
    scale = scale.clamp(min=least_share * values.square().mean().sqrt()).clamp(min=1e-4)
    fine: Any = neuron.fine_threshold
    if neuron.gain is not None:
        weight = _weight(placed)
        tried: list[tuple[float, float, float]] = []
        for power in POWERS:
            fine.copy_(scale**power)
            for gain in GAINS:
                neuron.gain.fill_(gain)
                error = (_emitted(neuron, values) - values) ** 2
                tried.append(((error if weight is None else error * weight).mean().item(), power, gain))
        _, power, gain = min(tried)
        fine.copy_(scale**power)
        neuron.gain.fill_(gain)
    else:
        best, least = scale.clone(), torch.full_like(scale, float("inf"))
        for each in SCALES:
            fine.copy_(scale * each)
            error = ((_emitted(neuron, values) - values) ** 2).mean(0)
            better = error < least
            best[better], least[better] = fine[better].float(), error[better]
        fine.copy_(best)
    threshold, _ = neuron._running(values)
    emitted = _emitted(neuron, values)
    counts = spike_count(emitted, threshold, neuron.T, neuron.code)
    return {
        "error": ((emitted - values).square().mean() / values.square().mean().clamp(min=1e-30)).item(),
        "spikes": counts.mean().item(),
        "dead": int((counts.sum(0) == 0).sum()),
    }


def _emitted(neuron: FASNeuron, values: torch.Tensor) -> torch.Tensor:
    return neuron._emit(values, *neuron._running(values))


def summary(model: nn.Module, found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Error, spikes an input and dead neurons by kind of site, as rows of a table."""
    rows: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for placed in sites(model):
        rows.setdefault(placed.site.group, []).append((placed.neuron.width, found[placed.name]))
    table = []
    for group, entries in rows.items():
        neurons = sum(width for width, _ in entries)
        table.append(
            {
                "sites": group,
                "neurons": neurons,
                "relative error": sum(width * site["error"] for width, site in entries) / neurons,
                "spikes an input": sum(width * site["spikes"] for width, site in entries) / neurons,
                "dead": sum(int(site["dead"]) for _, site in entries),
            }
        )
    return table
