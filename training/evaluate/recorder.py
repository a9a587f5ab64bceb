"""Spike trains of chosen neurons, around any call of a model: as arrays, in a file, and as a picture over words."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..layout import core_of, label
from ..tokenization import tokenizer_of
from .monitors import _SiteHooks


NEURONS = 32  # of a site, where nothing is said
MOST_BYTES = 2**28
WORDS = 24  # that a picture has room for
COLOURS = {1: "tab:blue", -1: "tab:orange"}


class SpikeRecorder(_SiteHooks):
    """Keeps the spike trains of some neurons of some sites, around one call or one generation.

    ```python
    >>> with SpikeRecorder(model, sites="3 ", neurons=16) as recorder:
    ...     model(**tokenizer("The sea was calm.", return_tensors="pt"))
    >>> recorder.trains  # by site, (T, B, S, N) of -1, 0 and 1
    >>> recorder.raster().figure.savefig("raster.png")
    ```

    Nothing the model computes changes. In the layerwise schedule the trains are those behind each time average; what
    comes before `generate()`'s new tokens and they themselves are joined along S. A site that runs once a sequence has
    S = 1. Trains of padding are kept: `mask` says what is padding.

    Args:
        model: A FAS model that runs at T > 0 inside the context.
        sites: Names of sites, or parts of them or of their labels (`"mlp"`; `"3 "` is block 3); all by default.
        neurons: How many of a site, evenly spaced over it; or which, as indices.
        most_bytes: What all trains together may take: one byte a neuron, token and timestep.

    Attributes:
        neurons: By site the indices of its neurons, `(N,)`.
        T: Timesteps.

    Raises:
        ValueError: for a name that no site has, an index that a site has not, and, in the context, for a call at
            T = 0, for calls that cannot be joined, or for trains that take more than `most_bytes`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Sequence[str] | None = None,
        neurons: int | Sequence[int] = NEURONS,
        *,
        most_bytes: int = MOST_BYTES,
    ):
        super().__init__(model)
        wanted = [sites] if isinstance(sites, str) else sites
        every = [name for name, _ in self._neurons]
        for each in wanted or ():
            if not any(_called(name, each) for name in every):
                raise ValueError(
                    f"`sites` must be names of sites or parts of them, got {each!r}; this model has "
                    f"{', '.join(every[:4])}{' …' if len(every) > 4 else ''}."
                )
        if wanted is not None:
            self._neurons = [each for each in self._neurons if any(_called(each[0], part) for part in wanted)]
        self.neurons = {name: _chosen(neuron.width, neurons, name) for name, neuron in self._neurons}
        self.T: int | None = None
        self._even = isinstance(neurons, int)
        self._model, self._most, self._bytes = core_of(model), most_bytes, 0
        self._parts: dict[str, list[np.ndarray]] = {}
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []

    @property
    def trains(self) -> dict[str, np.ndarray]:
        """By site, `(T, B, S, N)`: 1 where a neuron spikes, -1 where it spikes the other way, else 0."""
        if not self._parts:
            raise ValueError("`model` must run inside the context before there are trains, got no call.")
        return {name: np.concatenate(parts, axis=2) for name, parts in self._parts.items()}

    @property
    def input_ids(self) -> np.ndarray:
        """Token ids that the model read, `(B, S)`."""
        return np.concatenate(self._ids, axis=1)

    @property
    def mask(self) -> np.ndarray:
        """Where they are no padding, `(B, S)`."""
        return np.concatenate(self._masks, axis=1)

    def rates(self) -> dict[str, np.ndarray]:
        """By site the spikes of each neuron a timestep, `(N,)`, padding left out."""
        found = {}
        for name, train in self.trains.items():
            spikes = np.abs(train).astype(np.float64)
            counted = self.mask if spikes.shape[2] == self.mask.shape[1] else np.ones(spikes.shape[1:3])
            found[name] = (spikes * counted[None, :, :, None]).sum((0, 1, 2)) / max(len(train) * counted.sum(), 1)
        return found

    def save_npz(self, path: str | os.PathLike) -> None:
        """Write everything into one compressed file of arrays, without pickle.

        Holds `SITE` (the trains) and `SITE/neurons` for each site, `input_ids`, `mask`, `T` and `schedule`.
        """
        arrays: dict[str, Any] = {**self.trains}
        arrays |= {f"{name}/neurons": np.asarray(self.neurons[name]) for name in self._parts}
        arrays |= {"input_ids": self.input_ids, "mask": self.mask, "T": self.T, "schedule": self._schedule}
        np.savez_compressed(path, **arrays)

    def raster(
        self, site: str | None = None, *, row: int = 0, tokenizer: Any = None, words: int = WORDS, axes: Any = None
    ) -> Any:
        """Draw neurons over words, with the timesteps of each word inside its column.

        Args:
            site: Its name or a part of it; the first one by default.
            row: Of the batch.
            tokenizer: To name tokens with; by default that of the folder of the model, if it has one, else ids.
            words: Draw the first so many tokens that are no padding.
            axes: Of matplotlib, to draw into; new ones by default.

        Returns:
            The axes. Their title says which neurons are shown.
        """
        return draw_raster(self.picture(site, row=row, tokenizer=tokenizer, words=words), axes)

    def picture(
        self, site: str | None = None, *, row: int = 0, tokenizer: Any = None, words: int = WORDS
    ) -> dict[str, Any]:
        """What [`raster`] draws, as plain values: `spikes` has a line for each neuron, a character for each timestep.

        The arguments are those of [`raster`].
        """
        trains = self.trains
        name = next((each for each in trains if site is None or _called(each, site)), None)
        if name is None:
            raise ValueError(f"`site` must be one that was recorded, got {site!r}; these were: {', '.join(trains)}.")
        train = trains[name][:, row]
        if train.shape[1] == self.mask.shape[1]:
            kept = np.flatnonzero(self.mask[row])[:words]
            shown = _named(self.input_ids[row, kept], self._model, tokenizer)
        else:
            kept, shown = np.arange(train.shape[1])[:words], ["the whole sequence"][: train.shape[1]]
        lines = train[:, kept].transpose(2, 1, 0).reshape(train.shape[2], -1)
        width = dict(self._neurons)[name].width
        return {
            "site": name,
            "T": self.T,
            "schedule": self._schedule,
            "words": shown,
            "neurons": [int(each) for each in self.neurons[name]],
            "of": width,
            "which": "evenly spaced" if self._even else "chosen",
            "spike_rate": float(np.abs(lines).mean()),
            "spikes": ["".join(".+-"[value] for value in line) for line in lines.tolist()],
        }

    def _see_call(self, given: Mapping[str, Any]) -> None:
        ids = given.get("input_ids")
        ids = torch.zeros_like(given["inputs_embeds"][..., 0], dtype=torch.long) if ids is None else ids
        mask = torch.ones_like(ids) if self._mask is None else self._mask
        self._ids.append(ids.cpu().numpy())
        self._masks.append(mask.bool().cpu().numpy())

    def _see(self, name: str, neuron: Any, output: torch.Tensor, given: torch.Tensor) -> None:
        if neuron.T == 0:
            raise ValueError("`model` must run at T > 0 to spike, got T = 0. `model.set_timesteps(T)` sets it.")
        chosen = torch.as_tensor(self.neurons[name], device=given.device)
        train = neuron.trains(given)[..., chosen].to(torch.int8).cpu().numpy()
        train = train[:, :, None] if train.ndim == 3 else train
        before = self._parts.setdefault(name, [])
        if before and before[0].shape[:2] != train.shape[:2]:
            raise ValueError(
                f"`model` must be called with the same batch and T in one recording, got (T, B) = {train.shape[:2]} "
                f"after {before[0].shape[:2]}. Record each call with a recorder of its own."
            )
        self._bytes += train.nbytes
        if self._bytes > self._most:
            raise ValueError(
                f"`most_bytes` must hold all trains, got {self._most} for more. Choose fewer `sites` or `neurons`."
            )
        before.append(train)
        self.T, self._schedule = neuron.T, neuron.schedule


def draw_raster(picture: Mapping[str, Any], axes: Any = None) -> Any:
    """Draw what [`SpikeRecorder.picture`] says; returns the axes."""
    T, words, lines = picture["T"], picture["words"], picture["spikes"]
    if axes is None:
        from .figure import Figure  # which imports matplotlib

        size = (max(5.0, 1.5 + 0.42 * len(words)), max(3.0, 1.6 + 0.09 * len(lines)))
        axes = Figure(figsize=size, layout="constrained").add_subplot()
    for sign, character in ((1, "+"), (-1, "-")):
        times = [[(i + 0.5) / T for i, each in enumerate(line) if each == character] for line in lines]
        if any(times):
            axes.eventplot(times, colors=COLOURS[sign], linelengths=0.85, linewidths=1.3)
    for edge in range(1, len(words)):
        axes.axvline(edge, color="0.6", linewidth=0.4)
    places, plain = [i + 0.5 for i in range(len(words))], {"rotation_mode": "anchor", "parse_math": False}
    axes.set_xticks(places, words, rotation=60, ha="right", **plain)
    axes.set_yticks([0, len(lines) - 1], [f"{picture['neurons'][0]}", f"{picture['neurons'][-1]}"])
    axes.set(xlim=(0, len(words)), ylim=(-0.8, len(lines) - 0.2), ylabel="neuron")
    signs = "; blue: spikes, orange: negative ones" if any("-" in line for line in lines) else ""
    axes.set_xlabel(f"each token is {T} timesteps wide ({picture['schedule']}){signs}")
    share = "all" if len(lines) == picture["of"] else f"{len(lines)} ({picture['which']}) of {picture['of']:,}"
    title = (
        f"{label(picture['site'])}: {share} neurons,\nwhich spike in {100 * picture['spike_rate']:.1f} % of timesteps"
    )
    axes.set_title(title, size=10, loc="left")
    return axes


def _called(name: str, part: str) -> bool:
    return part in name or f" {part}" in f" {label(name)}"


def _chosen(width: int, neurons: int | Sequence[int], site: str) -> list[int]:
    if isinstance(neurons, int):
        if neurons < 1:
            raise ValueError(f"`neurons` must be at least 1, or indices, got {neurons}.")
        return [int(i) for i in np.linspace(0, width - 1, min(neurons, width)).round()]
    indices = [int(i) for i in neurons]
    wrong = [i for i in indices if not 0 <= i < width]
    if wrong or not indices:
        raise ValueError(f"`neurons` must be from 0 to {width - 1} at {site!r}, got {wrong or 'none'}.")
    return indices


def _named(ids: np.ndarray, model: Any, tokenizer: Any) -> list[str]:
    try:
        tokenizer = tokenizer_of(model, tokenizer)
    except ValueError:
        return [str(each) for each in ids]
    return [tokenizer.decode([int(each)]).strip() or "·" for each in ids]
