"""What one token costs: every product of a model as effective MACs and ACs, and the energy they stand for.

The vocabulary is NeuroBench's. *Dense* operations are all multiply-accumulates (MACs) the code executes; *effective*
ones are those that remain where the input is spikes or zeros can be skipped. A product counts as accumulates (ACs)
only where its input is binary spikes, that is after a neuron site: `effective_acs = spike rate · T · MACs`, in both
schedules. All other products are MACs, once per time they run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from configuration_fas import positions_of

from ..layout import MEETS, Placed, auto_class, core_of, evaluating, products, sites
from ..results import markdown_table
from ..tokenization import tokenizer_of
from .examples import make_batches
from .monitors import SpikeMonitor


MAC_PJ = 4.6  # picojoules per 32-bit float multiply-accumulate at 45 nm (Horowitz 2014)
AC_PJ = 0.9  # and per accumulate

# "ann": T = 0, on hardware that multiplies everything. "replicated": stepwise as the paper describes it, every layer
# and the head T times, what is the same at all timesteps included.
EXECUTIONS = ("ann", "stepwise", "layerwise", "accumulated", "replicated")

NOT_COUNTED = (
    "memory traffic (weights, activations, membrane potentials, key-value cache)",
    "static power, control and spike routing",
    "embedding look-ups and biases",
    "multiplying spikes by their threshold, which folds into the weights that follow",
)

# Scalar operations a value (an addition, a product, a comparison, a root, an exponential: one each) of what no spike
# reaches; of a score, scaling included, for the softmax; of an input, for an encoding.
NORM = {True: 7, False: 4}  # with a bias (LayerNorm: mean, difference, square, mean, root's product, scale, shift)
ACTIVATION = {"relu": 1, "tanh": 1, "silu": 4, "gelu": 5, "gelu_new": 9}
SOFTMAX, ROTARY, GATE, RESIDUAL, RUNNING_MEAN, TOKEN_GAIN = 6, 3, 1, 1, 4, 3


@dataclass(frozen=True)
class Operations:
    """Operations of one product, or one neuron site, of the model, per token.

    Attributes:
        part: What it is: "qkv", "scores" (QKᵀ), "values" (AV), "attention output", "mlp in", "mlp out", "pooler",
            "transform" or "head"; or "neurons".
        layer: Index of the block, or `None` outside of the blocks.
        dense: MACs the code executes.
        effective_macs: MACs that remain.
        effective_acs: ACs, one for each spike and weight it meets.
        membrane_updates: Additions to membrane potentials: one a neuron and timestep, one a spike for the reset.
        synaptic_reads: Weights fetched: one for each MAC, or one for each spike and weight it meets.
    """

    part: str
    layer: int | None
    dense: float
    effective_macs: float
    effective_acs: float = 0.0
    membrane_updates: float = 0.0
    synaptic_reads: float = 0.0

    def energy_pj(self, mac_pj: float = MAC_PJ, ac_pj: float = AC_PJ) -> float:
        """Energy in picojoules per token; a membrane update costs an accumulate."""
        return mac_pj * self.effective_macs + ac_pj * (self.effective_acs + self.membrane_updates)


@dataclass(frozen=True)
class _Part:
    """A product, `macs` per token and run, or a neuron site, `neurons` per token."""

    name: str
    layer: int | None
    macs: float = 0.0
    neurons: float = 0.0
    site: str | None = None  # the site whose spikes the product takes, or the site itself
    weighed: bool = False  # has weights
    once: bool = False  # runs once in stepwise mode too: before the first site, or on the time average


def count_operations(
    model: nn.Module,
    length: float,
    *,
    execution: str = "ann",
    T: int = 0,
    spike_rates: float | Mapping[str, float] | None = None,
    densities: float | Mapping[str, float] | None = None,
    past: float = 0,
    causal: bool = False,
) -> list[Operations]:
    """Count the operations of a FAS model per token, from its weights; nothing runs, and it may be on `meta`.

    Args:
        model: FAS model with or without a head.
        length: Tokens of the sequence.
        execution: One of `EXECUTIONS`.
        T: Timesteps, at least 1; has no meaning for "ann".
        spike_rates: Of all sites, or by site as [`SpikeMonitor`] gives them. Required but for "ann".
        densities: For "ann": shares of the activations that are not 0, for an ANN that skips zeros; by default 1.
        past: Tokens in the key-value cache before the sequence.
        causal: Count only the attention a causal mask leaves, rather than the full square that runs.

    Returns:
        One `Operations` for each product and, but for "ann", each neuron site.

    Raises:
        ValueError: for an unknown execution, `T` below 1, a length below 1, or a spike rate missing or outside [0, 1].
    """
    keys = _keys(length, execution, T, past, causal)
    spiking = execution != "ann"
    counted = []
    for part in _parts(core_of(model), length, keys):
        repeated = execution == "replicated" or (execution in ("stepwise", "accumulated") and not part.once)
        dense = part.macs * (T if repeated else 1)
        macs, acs, updates = dense, 0.0, 0.0
        # Accumulated, attention sees running means of what spikes.
        if spiking and part.site is not None and not (execution == "accumulated" and part.name in MEETS):
            spikes = T * _share("spike_rates", spike_rates, part.site)
            macs, acs, updates = 0.0, spikes * part.macs, part.neurons * (T + spikes)
        elif part.site is not None and densities is not None:
            macs = dense * _share("densities", densities, part.site)
        reads = (macs or acs) if part.weighed else 0.0
        if spiking or not part.neurons:
            counted.append(Operations(part.name, part.layer, dense, macs, acs, updates, reads))
    return counted


def floating_point(
    model: nn.Module, length: float, *, execution: str = "ann", T: int = 0, past: float = 0, causal: bool = False
) -> dict[str, float]:
    """Scalar floating-point operations per token of what no spike reaches: an estimate, so many a value of each kind.

    Args:
        model, length, execution, T, past, causal: As for [`count_operations`].

    Returns:
        Operations of `norms`, `softmax`, `activations` (gates included), `rotary`, `residuals` and `encoding`: the
        comparison of each step with its threshold, the gain of a token, or the steps of QCFS. All but the encoding
        run T times where time passes through the network, and accumulated take a running mean and a difference each.
        What runs once a sequence, in a pooler, is left out.
    """
    core: Any = core_of(model)
    config, table = core.config, core.config.table
    times = T if execution in ("stepwise", "accumulated", "replicated") else 1
    more = RUNNING_MEAN if execution == "accumulated" else 0
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    per_head = _per_head(config)
    shared = getattr(config, "num_key_value_heads", None) or heads
    many = {"q_norm": heads, "k_norm": shared}  # of one norm for all heads
    norms = sum(
        each.weight.numel() * many.get(name.rpartition(".")[2], 1) * (NORM[hasattr(each, "bias")] + more)
        for name, each in core.named_modules()
        if "Norm" in type(each).__name__
    )
    placed = sites(core)
    weights = [(each.product.name, each.weights) for each in products(core)]
    hidden = sum(found[0].weight.numel() // width for name, found in weights if name == "mlp out")
    gated = any(name == "mlp in" and len(found) > 1 for name, found in weights)
    function = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or "gelu"
    price = ACTIVATION.get(str(function), max(ACTIVATION.values())) + gated * GATE + more
    replaced = any(each.site.at == "activation" and each.layer is not None for each in placed)
    keys = _keys(length, execution, T, past, causal)
    found = {
        "norms": norms * times,
        "softmax": layers * heads * (keys * SOFTMAX + per_head * more) * times,
        "activations": 0 if replaced else hidden * price * times,
        "rotary": layers * (heads + shared) * per_head * ROTARY * times if table.positions is None else 0,
        "residuals": 2 * layers * width * RESIDUAL * times,
    }
    per_input = 4 if execution == "ann" else T + (TOKEN_GAIN if config.gain == "token" else 0)  # QCFS at T = 0
    encodes = execution != "ann" or config.L is not None
    encoded = sum(each.neuron.width / (1 if each.site.per_position else length) for each in placed)
    return {name: float(value) for name, value in (found | {"encoding": encoded * per_input * encodes}).items()}


def total(operations: Iterable[Operations], mac_pj: float = MAC_PJ, ac_pj: float = AC_PJ) -> dict[str, float]:
    """Sum of operations, and their energy."""
    operations = list(operations)
    names = ("dense", "effective_macs", "effective_acs", "membrane_updates", "synaptic_reads")
    sums = {name: float(sum(getattr(each, name) for each in operations)) for name in names}
    return sums | {"energy_pj": float(sum(each.energy_pj(mac_pj, ac_pj) for each in operations))}


def check_prices(mac_pj: float, ac_pj: float) -> None:
    """Raise for prices that make no ratio."""
    if not (0 < mac_pj < math.inf and 0 <= ac_pj < math.inf):
        raise ValueError(
            f"`mac_pj` must be a finite number above 0, and `ac_pj` one of at least 0, got {mac_pj} and {ac_pj}."
        )


def energy_report(
    model: nn.Module,
    length: float,
    *,
    execution: str,
    T: int = 0,
    spike_rates: float | Mapping[str, float] | None = None,
    densities: float | Mapping[str, float] | None = None,
    past: float = 0,
    causal: bool = False,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
) -> dict[str, Any]:
    """Energy per token, in total and by product, beside the same ANN at the same length.

    Args:
        mac_pj: Picojoules per MAC.
        ac_pj: Picojoules per AC and per membrane update.
        densities: Of the QCFS ANN; adds its energy on hardware that skips zeros. The other arguments are those of
            [`count_operations`].

    Returns:
        The sums, `ratio` to the ANN (above 1: the spiking network costs more), `reads_ratio` in the same way (a
        code of more than one spike an input reads more weights than the ANN), with densities
        `ratio_to_zero_skipping_ann`, and `operations`, one mapping for each product. Beside them what stays floating
        point, `floating_point`, and `ratio_with_floating_point`: the ratio with every such operation, of both
        networks, billed as a MAC.
    """
    check_prices(mac_pj, ac_pj)
    length_settings: dict[str, Any] = {"past": past, "causal": causal}

    def energy(execution: str, **shares: Any) -> tuple[list[Operations], dict[str, float]]:
        operations = count_operations(model, length, execution=execution, T=T, **shares, **length_settings)
        return operations, total(operations, mac_pj, ac_pj)

    shares = {} if execution == "ann" else {"spike_rates": spike_rates}
    operations, sums = energy(execution, **shares)
    plain = energy("ann")[1]
    ann = plain["energy_pj"]
    report: dict[str, Any] = {"execution": execution, "T": T, "length": length, **length_settings, **sums}
    report |= {"mac_pj": mac_pj, "ac_pj": ac_pj, "ann_energy_pj": ann, "ratio": sums["energy_pj"] / ann}
    report |= {"reads_ratio": sums["synaptic_reads"] / plain["synaptic_reads"]}
    floating, of_ann = (
        floating_point(model, length, execution=each, T=T, **length_settings) for each in (execution, "ann")
    )
    extra, extra_ann = (mac_pj * sum(each.values()) for each in (floating, of_ann))
    report |= {"floating_point": floating, "floating_point_energy_pj": extra}
    report |= {"ratio_with_floating_point": (sums["energy_pj"] + extra) / (ann + extra_ann)}
    if densities is not None:
        skipping = energy("ann", densities=densities)[1]["energy_pj"]
        report |= {"zero_skipping_ann_energy_pj": skipping}
        report |= {"ratio_to_zero_skipping_ann": sums["energy_pj"] / skipping}
    details = [asdict(each) | {"energy_pj": each.energy_pj(mac_pj, ac_pj)} for each in operations]
    return report | {"operations": details}


class Energy(dict):
    """What [`energy`] found; shown as a table of products."""

    def __repr__(self) -> str:
        rows: dict[str, dict[str, Any]] = {}
        for each in self["operations"]:
            row = rows.setdefault(each["part"], {"part": each["part"], "MACs, M": 0.0, "ACs, M": 0.0, "µJ": 0.0})
            row["MACs, M"] += each["effective_macs"] / 1e6
            row["ACs, M"] += (each["effective_acs"] + each["membrane_updates"]) / 1e6
            row["µJ"] += each["energy_pj"] / 1e6
        how = f"{self['execution']} T = {self['T']}" if self["execution"] != "ann" else "the ANN"
        head = f"Energy a token, {how}, {self['length']:.4g} tokens: {self['energy_pj'] / 1e6:.4g} µJ, "
        head += f"{self['ratio']:.3f} of the ANN's; weights read: {self['reads_ratio']:.3f} of the ANN's"
        return f"{head}\n\n{markdown_table(list(rows.values()))}"


def energy(
    model: nn.Module,
    inputs: float | Sequence[str] | Mapping[str, Any],
    *,
    T: int | None = None,
    schedule: str | None = None,
    spike_rates: float | Mapping[str, float] | None = None,
    tokenizer: Any = None,
    past: float = 0,
    causal: bool = False,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
) -> Energy:
    """Energy per token of a model as it is set, beside the same ANN, by [`energy_report`].

    Args:
        model: A FAS model.
        inputs: Texts, or a batch of the model, `(B, S)`, to measure spike rates on; or a number of tokens, for
            `spike_rates` that are known.
        T: Timesteps, by default those that the model is set to; 0 is the ANN.
        schedule: By default that of the model.
        spike_rates: Of all sites, or by site; measured on `inputs` by default.
        tokenizer: Of texts; by default that of the folder that the model came from.
        past: Tokens in the key-value cache before the sequence.
        causal: Count only the attention that a causal mask leaves, rather than the full square that runs.
        mac_pj: Picojoules per multiply-accumulate.
        ac_pj: Picojoules per accumulate.

    Returns:
        What [`energy_report`] says, with `spike_rate`, spikes per neuron and timestep; its `repr` is a table.

    Raises:
        ValueError: for a number of tokens without `spike_rates`, texts without a tokenizer, or settings that the
            model refuses.
    """
    core: Any = core_of(model)
    T, schedule = core.config.T if T is None else T, schedule or core.config.schedule
    settings: dict[str, Any] = {"past": past, "causal": causal, "mac_pj": mac_pj, "ac_pj": ac_pj}
    if isinstance(inputs, int | float):
        if T and spike_rates is None:
            raise ValueError(
                f"`spike_rates` must be given for a number of tokens, {inputs}, at T = {T}, got None. Give texts or a "
                "batch as `inputs` to measure them."
            )
        length, rate = float(inputs), spike_rates if isinstance(spike_rates, int | float) else None
    else:
        batch = _batch(core, inputs, tokenizer)
        mask = batch.get("attention_mask")
        length = batch["input_ids"].shape[1] if mask is None else float(mask.sum() / len(mask))
        with evaluating(core), core.running(T, schedule), SpikeMonitor(core) as monitor, torch.no_grad():
            core(**batch)
        rate = monitor.spike_rate if T else None
        spike_rates = monitor.spike_rates() if spike_rates is None else spike_rates
    execution = schedule if T else "ann"
    report = energy_report(core, length, execution=execution, T=T, spike_rates=spike_rates, **settings)
    return Energy({"spike_rate": rate, **report})


def _batch(model: Any, inputs: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Texts, or what is a batch already, as the model takes them."""
    if isinstance(inputs, str):
        raise ValueError("`inputs` must be texts, a batch or a number of tokens, got one text. Put it in a list.")
    if not isinstance(inputs, Mapping):
        tokenizer = tokenizer_of(model, tokenizer)
        most = positions_of(model.config)
        rows = [{"input_ids": tokenizer(text, truncation=True, max_length=most)["input_ids"]} for text in inputs]
        if not any(row["input_ids"] for row in rows):
            raise ValueError("`inputs` must hold texts of at least one token, got none.")
        inputs = make_batches(rows, len(rows), tokenizer.pad_token_id or 0)[0]
    return {name: value.to(model.device) for name, value in inputs.items() if name != "labels"}


def _keys(length: float, execution: str, T: int, past: float, causal: bool) -> float:
    """Keys that a token attends to on average; raises for settings that nothing can be counted for."""
    if execution not in EXECUTIONS:
        raise ValueError(f"`execution` must be one of {', '.join(EXECUTIONS)}, got {execution!r}.")
    if execution != "ann" and T < 1:
        raise ValueError(f"`T` must be at least 1 for execution {execution!r}, got {T}. Use 'ann' for T = 0.")
    if length < 1 or past < 0:
        raise ValueError(f"`length` must be at least 1 and `past` at least 0, got {length} and {past}.")
    return past + ((length + 1) / 2 if causal else length)


def _per_head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _parts(model: Any, length: float, keys: float) -> Iterator[_Part]:
    """Every product and neuron site of a model, for sequences of `length` tokens that attend to `keys` on average."""
    config = model.config
    attention = keys * config.num_attention_heads * _per_head(config)
    pools = auto_class(model) != "AutoModelForTokenClassification"
    placed = {site.name: site for site in sites(model)}
    spiked = False
    for each in products(model):
        product, per = each.product, length if each.product.pooled and pools else 1
        spiked |= each.site is not None
        if each.site is not None and each.layer is not None:
            yield _neurons(placed.pop(each.site))
        macs = sum(weight.weight.numel() for weight in each.weights) / per if each.weights else attention
        once = product.once or not spiked
        yield _Part(product.name, each.layer, macs, site=each.site, weighed=bool(each.weights), once=once)
        for name in [name for name, site in placed.items() if site.layer is None and site.site.group == product.name]:
            yield _neurons(placed.pop(name), per)


def _neurons(placed: Placed, per: float = 1) -> _Part:
    return _Part("neurons", placed.layer, neurons=placed.neuron.width / per, site=placed.name)


def _share(argument: str, shares: float | Mapping[str, float] | None, site: str) -> float:
    """The share of one site, checked."""
    share = shares.get(site) if isinstance(shares, Mapping) else shares
    if share is None or not 0 <= share <= 1:
        raise ValueError(
            f"`{argument}` must hold a number from 0 to 1 for the site {site!r}, got {share!r}. "
            "Measure it with `training.evaluate.SpikeMonitor`."
        )
    return float(share)
