"""Streaming statistics of neuron sites: spikes per neuron, and errors against the ANN, around any call of a model."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neurons_fas import MIN_THRESHOLD
from sites_fas import trunk

from ..layout import core_of, pooled


logger = logging.getLogger(__name__)

# Values handled at a time: what a monitor needs beside its counts, four bytes each.
CHUNK = {"cpu": 2**20, "cuda": 2**24}
# A neuron that fires in a larger share of all timesteps counts as saturated; one that never fires as dead.
SATURATED_RATE = 0.95
# Upper ends of the bins of the histogram of spike rates; the first bin holds the dead neurons.
RATE_BINS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass
class SiteStatistics:
    """Counts of one neuron site.

    At T = 0 nothing spikes: the counts are those of the layerwise schedule at T = L, which emits the same values.

    Attributes:
        spikes: `(D,)` spikes of each neuron.
        active: `(D,)` values other than 0 it emitted: spikes, in stepwise mode; else time averages above 0. `None`
            where they are not counted.
        steps: Timesteps it was observed for, over all positions.
        values: Values it emitted: one a timestep in stepwise mode, else one a position.
    """

    spikes: torch.Tensor
    active: torch.Tensor | None = None
    steps: int = 0
    values: int = 0

    @property
    def rates(self) -> torch.Tensor:
        """Spike rate of each neuron, `(D,)`: spikes per timestep."""
        return self.spikes / max(self.steps, 1)

    @property
    def rate(self) -> float:
        """Spike rate of the site: spikes per neuron and timestep."""
        return self.rates.mean().item()

    @property
    def density(self) -> float | None:
        """Share of the emitted values that are not 0; `None` where they are not counted."""
        if self.active is None or not self.values:
            return None
        return (self.active / max(self.values, 1)).mean().item()

    def summary(self) -> dict[str, Any]:
        """What a results file keeps of a site."""
        rates = self.rates
        bins = torch.bucketize(rates, torch.tensor(RATE_BINS, dtype=rates.dtype, device=rates.device))
        return {
            "neurons": len(rates),
            "spike_rate": self.rate,
            "density": self.density,
            "dead": int((self.spikes == 0).sum()),
            "saturated": int((rates > SATURATED_RATE).sum()),
            "histogram": torch.bincount(bins, minlength=len(RATE_BINS)).tolist(),
        }


def silent_sites(sites: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the sites whose neurons are all dead, and all saturated, as a row of results has them.

    Args:
        sites: With `site`, `neurons`, `dead` and `saturated`, as rows have them.
    """
    found = list(sites)
    return {
        f"{kind}_sites": [each["site"] for each in found if each[kind] == each["neurons"]]
        for kind in ("dead", "saturated")
    }


def warn_of_silent_sites(found: Mapping[str, list[str]], where: str) -> None:
    """Warn of sites that say the same whatever they are given.

    Args:
        found: From [`silent_sites`].
        where: What ran, such as `"stepwise T = 4"`.
    """
    for kind, meaning in (("dead", "no neuron ever fires"), ("saturated", "every neuron fires all the time")):
        names = found[f"{kind}_sites"]
        if names:
            logger.warning(
                f"{where}: {meaning} in {', '.join(names)}. What follows learns nothing from the input there. Train "
                "with a lower --threshold_learning_rate, or another --initial_threshold."
            )


class _SiteHooks:
    """Context manager that sees what every site emits, with the weight of each position: 0 for padding, else 1."""

    def __init__(self, model: nn.Module):
        core = core_of(model)
        self._neurons: list[tuple[str, Any]] = core.neurons()
        self._pooled = pooled(core)
        self._trunk = trunk(core)
        self._mask: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self):
        if self._handles:
            raise RuntimeError(f"This {type(self).__name__} is already around a call. Make another one.")
        self._handles = [self._trunk.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        self._handles += [neuron.register_forward_hook(self._hook(name)) for name, neuron in self._neurons]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._mask = [], None

    def _hook(self, name: str) -> Callable:
        @torch.no_grad()
        def hook(neuron, inputs, output):
            self._see(name, neuron, output, inputs[0])

        return hook

    def _see_mask(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(trunk.forward).bind_partial(*args, **kwargs).arguments
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        length = (given["inputs_embeds"] if ids is None else ids).shape[1]
        self._mask = mask[:, -length:] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self._see_call(given)

    def _see_call(self, given: Mapping[str, Any]) -> None:
        """See what the trunk is called with."""

    def _weights(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Weight of each row and position, `output.shape[:-1]`; a pooled site has rows only."""
        if self._mask is None or name in self._pooled:
            return output.new_ones(output.shape[:-1], dtype=torch.float32)
        mask = self._mask.to(output.device, torch.float32)
        return mask.repeat(output.shape[:-1].numel() // mask.numel(), 1).view(output.shape[:-1])

    def _see(self, name: str, neuron: Any, output: torch.Tensor, given: torch.Tensor) -> None:
        raise NotImplementedError


class SpikeMonitor(_SiteHooks):
    """Counts the spikes of every neuron in constant memory, around any call; counts of several calls add up.

    ```python
    >>> with SpikeMonitor(model) as monitor:
    ...     model.generate(**inputs, max_new_tokens=20)
    >>> monitor.spike_rate
    ```

    Positions that a two-dimensional attention mask marks as padding do not count; with a mask of any other shape, or
    none, all positions do. Nothing the model computes changes.

    Args:
        model: A FAS model, in any mode.
        densities: Count values other than 0 as well, which takes a copy and another sum of what is no spike train.

    Raises:
        ValueError: if the model has no neuron sites.
    """

    def __init__(self, model: nn.Module, densities: bool = False):
        super().__init__(model)
        self.count_densities = densities
        self.sites: dict[str, SiteStatistics] = {}

    @property
    def spike_rate(self) -> float:
        """Spikes per neuron and timestep, over all neurons of all sites."""
        spikes, chances = self.counts()
        return spikes / max(chances, 1)

    def counts(self) -> tuple[float, float]:
        """Spikes of all neurons, and how many there could have been: one a neuron and timestep."""
        sites = self.sites.values()
        return sum(site.spikes.sum().item() for site in sites), sum(site.steps * len(site.spikes) for site in sites)

    def silent_sites(self) -> dict[str, list[str]]:
        """Names of the sites whose neurons are all dead, and all saturated; sites that encode nothing are neither."""
        counted = [(name, site) for name, site in self.sites.items() if site.steps]
        return silent_sites({"site": name, **site.summary()} for name, site in counted)

    def spike_rates(self) -> dict[str, float]:
        """Spike rate of each site."""
        return {name: site.rate for name, site in self.sites.items()}

    def densities(self) -> dict[str, float | None]:
        """Share of values other than 0 of each site; `None` where they are not counted."""
        return {name: site.density for name, site in self.sites.items()}

    def _see(self, name: str, neuron: Any, output: torch.Tensor, given: torch.Tensor) -> None:
        width = output.shape[-1]
        site = self.sites.get(name)
        if site is None:
            rows = 2 if self.count_densities else 1
            counts = torch.zeros(rows, width, dtype=torch.float64, device=output.device)
            site = self.sites[name] = SiteStatistics(*counts)
        weights = self._weights(name, output)
        steps = 1 if neuron.stepwise else neuron.T or neuron.L
        if steps is None:  # T = 0 of the stock network: nothing is encoded
            return
        simple = neuron.code == "rate" and neuron.gain is None
        threshold = neuron.thresholds(output.shape[-2])[0].float().clamp(min=MIN_THRESHOLD)
        scale = steps / (torch.ones_like(threshold) if neuron.folded else threshold)
        # Sums of float32 values round to exact counts; half precision, thresholds by position and codes that are no
        # rates need each value's.
        summable = simple and output.dtype in (torch.float32, torch.float64) and scale.dim() < 2
        rows = max(1, CHUNK.get(output.device.type, CHUNK["cuda"]) // max(output[0].numel(), 1))
        counts = output if summable else neuron.count_spikes(given)
        for part, weight in zip(counts.split(rows), weights.split(rows), strict=True):
            part = part.abs() if neuron.signed else part
            weight = weight.to(part.dtype)
            seen = torch.tensordot(weight, part, weight.dim())
            seen = (seen * scale).round_() if summable else seen
            site.spikes += seen
            if site.active is not None:
                site.active += seen if neuron.stepwise else torch.tensordot(weight, part.sign(), weight.dim())
        values = int(weights.sum().item())
        site.values += values
        site.steps += values * steps


class SiteErrors(_SiteHooks):
    """Errors of what the sites of a spiking network emit, on average over time, against its ANN.

    Inside the context every batch runs at T = 0 first, then at T > 0. Holds the activations of one batch.

    Raises:
        ValueError: at a batch that did not run at T = 0 before.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._reference: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def relative(self) -> dict[str, float]:
        """Norm of the error of each site over the norm of its ANN activation."""
        return {name: (error / norm.clamp(min=1e-30)).sqrt().item() for name, (error, norm) in self._sums.items()}

    def _see(self, name: str, neuron: Any, output: torch.Tensor, given: torch.Tensor) -> None:
        if neuron.T == 0:
            self._reference[name] = output
            return
        reference = self._reference.pop(name, None)
        if reference is None or reference.shape[1:] != output.shape[1:]:
            raise ValueError(f"`model` must run the same batch at T = 0 first, got T = {neuron.T} at {name!r}.")
        weights = self._weights(name, reference)
        averages = output.unflatten(0, (-1, reference.shape[0]))
        sums = self._sums.setdefault(name, torch.zeros(2, dtype=torch.float64, device=output.device))
        for row, weight in enumerate(weights):
            target = reference[row].float()
            error = averages[:, row].float().mean(0) - target
            sums += torch.stack([(each.square().sum(-1) * weight).sum() for each in (error, target)])
