"""Neurons: signed and unsigned integrate-and-fire, its closed forms, its gradients; `kernels_fas.py` has its kernels.

This file travels to the Hub inside every checkpoint, next to `modeling_fas.py`. Shapes: `T` timesteps (leading), `B`
batch, `S` sequence, `D` neurons. Source of the method: Chen et al. 2025 (arXiv 2502.04405).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from transformers.utils import logging


try:
    from .kernels_fas import (  # type: ignore[import-not-found]
        differentiate_by_kernel,
        encode_by_kernel,
        fire_by_kernel,
        kernels,
    )
except ImportError:
    from kernels_fas import differentiate_by_kernel, encode_by_kernel, fire_by_kernel, kernels


__all__ = ["MIN_THRESHOLD", "encode", "integrate_and_fire", "qcfs", "spike_count", "spike_rate", "spike_train"]

logger = logging.get_logger(__name__)

# A threshold below this counts as this much; keeps x / threshold finite in every dtype.
MIN_THRESHOLD = 1e-4
# Neurons whose state a CPU core keeps in its cache while it runs their timesteps.
BLOCK_SIZE = 1 << 17
# Inputs from which on the level of a first spike is reckoned, not searched.
SEARCHED = 1 << 13


# ---------------------------------------------------------------------------------------------------------------------
# The neuron
# ---------------------------------------------------------------------------------------------------------------------


def _state(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision that membrane potentials are kept in: float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _blocks(like: torch.Tensor, *others: torch.Tensor | None):
    """Views of rows (dimension -2) of the tensors, in blocks of about `BLOCK_SIZE` elements; all, for a compiler."""
    if like.numel() <= BLOCK_SIZE or like.dim() < 2 or like.device.type != "cpu" or torch.compiler.is_compiling():
        return [(like, *others)]
    rows = max(1, BLOCK_SIZE * like.shape[-2] // like.numel())
    count = -(-like.shape[-2] // rows)
    split = [
        each.split(rows, dim=-2) if each is not None and each.dim() > 1 and each.shape[-2] > 1 else (each,) * count
        for each in (like, *others)
    ]
    return zip(*split, strict=True)


def at_least(threshold: torch.Tensor) -> torch.Tensor:
    """The threshold, or `MIN_THRESHOLD` where it is below."""
    return threshold.clamp_min(MIN_THRESHOLD)


def _numbers(like: torch.Tensor, *values: float) -> tuple[torch.Tensor, ...]:
    """Numbers as tensors, which a CPU reckons with in half the time; kept, but for a compiler.

    By a plain number, PyTorch would also divide through its reciprocal on CUDA, which rounds otherwise.
    """
    if type(like) is torch.Tensor and not torch.compiler.is_compiling():
        return _kept_numbers(values, like.dtype, like.device)
    return tuple(like.new_full((), value) for value in values)


@functools.cache
def _kept_numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(torch.full((), value, dtype=dtype, device=device) for value in values)


def _rate(z: torch.Tensor, initial_potential: torch.Tensor | None, T: int, signed: bool) -> torch.Tensor:
    """Spikes a step, less negative ones, of a neuron in T steps of the constant input z, in units of its threshold.

    `clip(floor(T·z + v0), 0, T) / T` for v0 in [0, 1], from -T on if signed; `None` is 1/2. Above 1 an unsigned neuron
    with negative input fires only while its start lasts; below 0 one with input above its threshold starts late and
    then fires at every step.
    """
    steps, half = _numbers(z, T, 0.5)
    count = (z * steps).add_(half if initial_potential is None else initial_potential).floor_()
    if initial_potential is not None and not signed:
        early = (initial_potential > 1) & (z < 0)
        late = (initial_potential < 0) & (z > 1)
        count = torch.where(early, torch.floor(initial_potential / (1 - z)), count)
        count = torch.where(late, T + 1 - torch.ceil((1 - initial_potential) / z), count)
    return count.clamp_(-T if signed else 0, T).div_(steps)


def _start(initial_potential: torch.Tensor | None, signed: bool) -> Any:
    """The initial potential in the precision of the state; a signed neuron starts between its two thresholds."""
    if initial_potential is None:
        return None
    return _state(initial_potential).clamp(0, 1) if signed else _state(initial_potential)


def _most(T: int, code: str) -> int:
    """What T steps of a code count to, in units of its least level; of a first spike, the steps."""
    return 2**T - 1 if code == "phase" else T


def _level(z, potential, T: int, signed: bool, code: str, base) -> torch.Tensor:
    """What T steps make of the constant input z, both in units of the threshold: from 0, or -1 if signed, to 1."""
    if code == "first_spike":
        return _first_spike(z, T, signed, base)
    return _rate(z, potential, _most(T, code), signed)


def _first_spike(z, T: int, signed: bool, base) -> torch.Tensor:
    """The level of the step at which a neuron fires, `± base^(1 - step)`; 0: never."""
    if torch.compiler.is_compiling():
        return _first_spike_compiled(z, T, signed, base)
    if z.numel() < SEARCHED or z.device.type != "cpu":
        edges, levels = _kept(_edges, T, base, z, signed)
        return levels.take(torch.bucketize(z, edges))
    levels, between = _kept(_levels, T, base, z)
    index = _reached(z.abs() if signed else z.clamp(min=0), between, T, float(base))
    level = levels.index_select(0, index.flatten()).view(z.shape)
    return level.mul_(z.sign()) if signed else level


def _first_spike_compiled(z, T: int, signed: bool, base) -> torch.Tensor:
    """The same in one pass, one comparison a level."""
    if isinstance(base, float):  # a compiler may take a number for a variable, but not its digits, nor a length
        levels, between = _constants(len([None] * T), base.hex(), z.dtype, z.device)
    else:
        levels, between = first_spike_levels(T, base, z)
    size = z.abs() if signed else z.clamp(min=0)
    level = torch.zeros_like(size)
    for reached, higher in zip(between, levels[1:], strict=True):
        level = torch.where(size >= reached, higher, level)
    return torch.where(z.isnan(), z, level * z.sign() if signed else level)


def _reached(size: torch.Tensor, between: torch.Tensor, T: int, base: float) -> torch.Tensor:
    """How many of `between` a first spike reaches, from logarithms, which is faster for many than a search.

    All but the first of `between` are powers of the base, times a constant. The logarithm, less what rounding may add,
    is the answer or one less; a comparison says which.
    """
    scale = 1 / math.log(base)
    margin = 1e-3 + scale * math.log((1 + 1 / base) / 2)
    index = size.log().mul_(scale).add_(T - margin).clamp_(0, T).nan_to_num_(T + 1).int()
    return index.add_(size >= between.index_select(0, index.flatten()).view(size.shape))


def first_spike_levels(T: int, base, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels of a first spike, ascending from 0, `(T + 1,)`, and the inputs from which on each is emitted."""
    levels, between = _kept(_levels, T, base, like)
    return levels[: T + 1], between[:T]


def _levels(T: int, base, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, followed by what NaN has, and by what is never reached."""
    steps = torch.arange(T - 1, -1, -1, device=device, dtype=dtype)
    powers = torch.as_tensor(base, device=device, dtype=dtype) ** -steps
    levels = torch.cat([steps.new_zeros(1), powers, steps.new_full((2,), torch.nan)])
    return levels, (levels[1:] + levels[:-1]) / 2


@torch.compiler.assume_constant_result
def _constants(T: int, base: str, dtype: torch.dtype, device: torch.device) -> tuple[list[float], list[float]]:
    """As `first_spike_levels`, in numbers, which a compiled loop holds in registers."""
    levels, between = _levels(T, float.fromhex(base), dtype, device)
    return levels[: T + 1].tolist(), between[:T].tolist()


def _edges(T: int, base, dtype: torch.dtype, device: torch.device, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending, for a search: the greatest inputs that a level still has, and the levels; NaN, above all, has NaN.

    Zero has two levels where it has a sign, which the spikes of `_reached` and of the kernels have too.
    """
    levels, between = _levels(T, base, dtype, device)
    levels, nan, between = levels[: T + 1], levels[T + 1 : T + 2], between[:T]
    infinite = torch.full_like(nan, torch.inf)
    edges, found = [between.nextafter(-infinite), infinite], [levels, nan]
    if signed:
        edges = [-between.flip(0), levels[:1].nextafter(-infinite), *edges]
        found = [-levels.flip(0), *found]
    return torch.cat(edges), torch.cat(found)


def _kept(make: Any, T: int, base, like: torch.Tensor, *more: Any) -> Any:
    """What `make` makes for tensors like this one; kept, but for a compiler and for a base that is learned."""
    if isinstance(base, float) and type(like) is torch.Tensor and not torch.compiler.is_compiling():
        return _kept_tables(make, T, base, like.dtype, like.device, *more)
    return make(T, base, like.dtype, like.device, *more)


@functools.cache
def _kept_tables(make: Any, *of: Any) -> Any:
    with torch.inference_mode(False):
        return make(*of)


class _Encode(torch.autograd.Function):
    """What a neuron emits for a constant input, on average or in all, straight-through gradient; keeps the input."""

    @staticmethod
    def forward(ctx, x, threshold, initial_potential, base, T, signed, code):
        ctx.save_for_backward(x, threshold, initial_potential, base)
        ctx.settings = T, signed, code
        return _emit(x, threshold, initial_potential, base, T, signed, code)

    @staticmethod
    def backward(ctx, grad):
        x, threshold, initial_potential, base = ctx.saved_tensors
        T, signed, code = ctx.settings
        theta = at_least(_state(threshold))
        potential = _start(initial_potential, signed)
        by_kernel = _has_kernels(x, signed, code, theta, potential)
        differentiate = _differentiate_code_by_kernel if by_kernel else _differentiate_code
        needs = (*ctx.needs_input_grad[1:3], ctx.needs_input_grad[3] and code == "first_spike")
        grad_x, *others = differentiate(x, theta, potential, base, T, signed, code, grad, needs)
        of = threshold, initial_potential, base
        others = [None if each is None else each.to(its.dtype) for each, its in zip(others, of, strict=True)]
        return grad_x, *others, None, None, None


class _IntegrateAndFire(torch.autograd.Function):
    """T steps of integrate-and-fire; keeps the input only and integrates again for the surrogate gradient."""

    @staticmethod
    def forward(ctx, x, threshold, initial_potential, T, signed):
        ctx.save_for_backward(x, threshold, initial_potential)
        ctx.signed = signed
        theta = at_least(_state(threshold))
        start = _start(initial_potential, signed) * theta
        emitted = x.new_empty((T, *x.shape[1:]))
        (fire_by_kernel if _has_kernels(x, signed, "steps") else _fire)(x, theta, start, emitted, signed)
        return emitted

    @staticmethod
    def backward(ctx, grad):
        x, threshold, initial_potential = ctx.saved_tensors
        theta = at_least(_state(threshold))
        potential = _start(initial_potential, ctx.signed)
        differentiate = differentiate_by_kernel if _has_kernels(x, ctx.signed, "steps") else _differentiate
        grad_x, grad_theta, grad_start = differentiate(x, theta, potential * theta, grad, ctx.signed)
        grad_theta += (grad_start * potential).sum_to_size(theta.shape)
        grad_potential = (grad_start * theta).sum_to_size(potential.shape).to(initial_potential.dtype)
        return grad_x.to(x.dtype), grad_theta.to(threshold.dtype), grad_potential, None, None


def _emit(x, threshold, initial_potential, base, T, signed, code) -> torch.Tensor:
    """What `_Encode` computes forward."""
    theta = at_least(_state(threshold))
    potential = _start(initial_potential, signed)
    encode_ = _encode_by_kernel if _has_kernels(x, signed, code, theta, potential) else _encode
    return encode_(x, theta, potential, base, T, signed, code)


def _emit_or_learn(x, threshold, initial_potential, base, T, signed, code) -> torch.Tensor:
    if torch.is_grad_enabled():
        base = None if base is None else torch.as_tensor(base, dtype=_state(x).dtype, device=x.device)
        return _Encode.apply(x, threshold, initial_potential, base, T, signed, code)
    return _emit(x, threshold, initial_potential, base, T, signed, code)


def _encode(x, theta, potential, base, T, signed, code) -> torch.Tensor:
    """As [`encode`], of a threshold and a potential in the precision of the state."""
    if x.numel() <= BLOCK_SIZE:
        emitted = _level(_state(x) / theta, potential, T, signed, code, base).mul_(theta)
        return emitted if emitted.dtype == x.dtype else emitted.to(x.dtype)
    emitted = torch.empty_like(x)
    for x_, theta_, potential_, emitted_ in _blocks(x, theta, potential, emitted):
        emitted_.copy_(_level(_state(x_) / theta_, potential_, T, signed, code, base).mul_(theta_))
    return emitted


def _differentiate_code(x, theta, potential, base, T, signed, code, grad, needs) -> list[torch.Tensor | None]:
    """Gradients of the input, and of threshold, potential and base where `needs` says so."""
    least = -1 if signed else 0
    grad_x = torch.empty_like(x)
    of = zip((theta, potential, base), needs, strict=True)
    grad_theta, grad_potential, grad_base = [torch.zeros_like(each) if need else None for each, need in of]
    whole = x, grad, grad_x, theta, grad_theta, potential, grad_potential
    for x_, grad_, grad_x_, theta_, grad_theta_, potential_, grad_potential_ in _blocks(*whole):
        z = _state(x_) / theta_
        inside = z.clamp(least, 1).eq_(z).mul_(grad_)
        grad_x_.copy_(inside)
        if grad_theta_ is not None:
            level = _level(z, potential_, T, signed, code, base)
            grad_theta_ += level.mul_(grad_).sub_(z.mul(inside)).sum_to_size(theta_.shape)
        if grad_potential_ is not None:
            grad_potential_ += inside.mul_(theta_ / T).sum_to_size(potential_.shape)
        if grad_base is not None:
            level = _first_spike(z, T, signed, base)
            grad_base += (torch.xlogy(level, level.abs()) * theta_ * grad_).sum() / (base * base.log())
    return [grad_x, grad_theta, grad_potential, grad_base]


def _fire(x, theta, start, emitted, signed, membrane=None) -> None:
    """Write the T steps of integrate-and-fire from the membrane potential `start` to `emitted`, `(T, …)`.

    NaN stays NaN. `membrane` gets the potentials before each reset, where it is given; `emitted` may be None then.
    """
    for _, x_, emitted_, theta_, start_, membrane_ in _blocks(x[0], x, emitted, theta, start, membrane):
        v = start_.expand(x_.shape[1:]).clone()
        for t in range(len(membrane if emitted is None else emitted)):
            v += x_[min(t, len(x) - 1)]
            if membrane_ is not None:
                membrane_[t] = v
            if signed:
                spikes = (v / theta_).floor_().clamp_(-1, 1).mul_(theta_)
            else:
                spikes = v.clone().ge_(theta_).mul_(theta_).add_(v, alpha=0)
            v -= spikes
            if emitted_ is not None:
                emitted_[t] = spikes


def _differentiate(x, theta, start, grad, signed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the threshold and the first membrane potential for those of the output, `(T, …)`."""
    grad_x = torch.zeros_like(x, dtype=theta.dtype)
    grad_theta, grad_start = torch.zeros_like(theta), torch.zeros_like(start)
    whole = x[0], x, grad, grad_x, theta, grad_theta, start, grad_start
    for _, x_, grad_, grad_x_, theta_, grad_theta_, start_, grad_start_ in _blocks(*whole):
        membrane = torch.empty_like(grad_, dtype=theta.dtype)
        _fire(x_, theta_, start_, None, signed, membrane)
        grad_v, at_spikes = torch.zeros_like(membrane[0]), torch.zeros_like(membrane[0])
        for t in reversed(range(len(grad))):
            grad_emitted = grad_[t] - grad_v
            if signed:
                at_spikes.addcmul_(grad_emitted, (membrane[t] / theta_).floor_().clamp_(-1, 1))
                below = (1 - membrane[t].abs()).clamp_(min=0).mul_(grad_emitted).mul_(theta_)
                grad_v += below
                at_spikes += below  # what the threshold has no part in, taken off with grad_v at the end
            u = membrane[t].sub_(theta_)
            surrogate = (1 - u.abs()).clamp_(min=0)
            if not signed:
                at_spikes.addcmul_(grad_emitted, u.ge_(0))
            grad_v.addcmul_(grad_emitted.mul_(theta_), surrogate)
            grad_x_[min(t, len(x) - 1)] += grad_v
        # Through v - theta the threshold gets minus what its steps added to grad_v: minus grad_v, in all.
        grad_theta_ += at_spikes.sub_(grad_v).sum_to_size(theta_.shape)
        grad_start_ += grad_v.sum_to_size(start_.shape)
    return grad_x, grad_theta, grad_start


# ---------------------------------------------------------------------------------------------------------------------
# The choice between this and the same by Triton
# ---------------------------------------------------------------------------------------------------------------------


def _encode_by_kernel(x, theta, potential, base, T, signed, code) -> torch.Tensor:
    return encode_by_kernel(x, theta, potential, _table(theta, base, T, code), _most(T, code), signed)[0]


def _differentiate_code_by_kernel(x, theta, potential, base, T, signed, code, grad, needs) -> list[Any]:
    made = encode_by_kernel(x, theta, potential, _table(theta, base, T, code), _most(T, code), signed, grad, needs)
    grad_x, *others = made
    of = theta, potential, base
    others = [None if each is None else each.sum_to_size(its.shape) for each, its in zip(others, of, strict=True)]
    return [grad_x, *others[:2], None if others[2] is None else others[2] / base]


def _table(theta, base, T: int, code: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return first_spike_levels(T, base, theta) if code == "first_spike" else (None, None)


def _has_kernels(x: torch.Tensor, signed: bool, code: str, *state: torch.Tensor | None) -> bool:
    """Whether Triton runs the neuron: on CUDA, outside `torch.compile`, which fuses the plain form by itself."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    precision = torch.promote_types(x.dtype, torch.float32)
    fits = all(each is None or each.dtype == precision for each in state)
    return fits and _agree(x.device, x.dtype, signed, code)


@functools.cache
def _agree(device: torch.device, dtype: torch.dtype, signed: bool, code: str) -> bool:
    """Whether Triton is there, runs, and gives on a trial input what a code's plain form, or the loop, gives."""
    if not kernels():
        return False
    # Ties between levels, what is beside them or beyond the range, and NaN.
    theta = _state(torch.linspace(0.3, 1.7, 16, device=device, dtype=dtype))[:, None]
    x = (torch.arange(-200, 201, device=device) / 168 * theta).to(dtype)
    spoilt = x.clone()
    spoilt[0, 0] = torch.nan
    equal: list[Any] = []
    close: list[Any] = []
    try:
        if code == "steps":
            emitted, expected = x.new_empty((2, 3, *x.shape))
            _fire(spoilt[None], theta, theta / 2, expected, signed)
            fire_by_kernel(spoilt[None], theta, theta / 2, emitted, signed)
            equal.append((emitted, expected))
        for potential in {"steps": (), "rate": (None, theta / 2)}.get(code, (None,)):
            neuron = theta, potential, theta.new_tensor(2.0), 3, signed, code
            equal.append((_encode_by_kernel(spoilt, *neuron), _encode(spoilt, *neuron)))
            gradients = x, (True, potential is not None, code == "first_spike")
            found = _differentiate_code_by_kernel(x, *neuron, *gradients)
            close += zip(found, _differentiate_code(x, *neuron, *gradients), strict=True)
        agree = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in equal)
        agree &= all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in close if a is not None)
    except Exception:
        # An old GPU, no C compiler, no place for a cache: the plain form needs none of them.
        logger.warning("Triton is installed but does not run: the neurons do without, slower.", exc_info=True)
        return False
    if not agree:
        logger.warning("Triton's spikes are not those of the plain form on this GPU: the neurons do without, slower.")
    return agree


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def qcfs(x: torch.Tensor, threshold: torch.Tensor, L: int, signed: bool = False) -> torch.Tensor:
    """Quantised clipped ReLU: `threshold · floor(clip(x / threshold, 0, 1) · L + 1/2) / L`.

    Signed, the clip is to [-1, 1]: a quantiser. The gradient passes the floor unchanged and the clip inside its closed
    interval; the threshold gets one through both places it stands in. Computed in float32 at least.

    Args:
        x (`torch.Tensor`): pre-activations of any shape.
        threshold (`torch.Tensor` broadcastable to `x`): upper end of the range; below 1e-4 it counts as 1e-4.
        L (`int`): quantisation levels above zero.
        signed (`bool`, defaults to `False`): whether there are as many below zero.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.

    Source: Bu et al. 2022 (arXiv 2303.04347), Eq. 8, with shift 1/2.
    """
    return _emit_or_learn(x, threshold, None, None, L, signed, "rate")


def spike_rate(
    x: torch.Tensor, threshold: torch.Tensor, initial_potential: torch.Tensor | None, T: int, signed: bool = False
) -> torch.Tensor:
    """Time average of what a neuron emits in T steps of a constant input, in closed form.

    Equals `integrate_and_fire(x[None], threshold, initial_potential, T, signed).mean(0)` up to rounding at exact ties,
    and [`qcfs`] with L = T, bit for bit, for an initial potential of 1/2 (`None`); so does the gradient.

    Args:
        x (`torch.Tensor` of shape `(B, …, D)`): the constant input.
        threshold (`torch.Tensor` broadcastable to `x`)
        initial_potential (`torch.Tensor` broadcastable to `x`, *optional*): fraction of the threshold, 1/2 if `None`.
        T (`int`): timesteps, at least 1.
        signed (`bool`, defaults to `False`): as in [`integrate_and_fire`].

    Returns:
        `torch.Tensor`: shape and dtype of `x`.
    """
    return _emit_or_learn(x, threshold, initial_potential, None, T, signed, "rate")


def encode(
    x: torch.Tensor,
    threshold: torch.Tensor,
    T: int,
    code: str,
    base: float | torch.Tensor = 2**0.5,
    signed: bool = True,
) -> torch.Tensor:
    """The value that T steps of a code make of a constant input, in closed form.

    `"rate"`: `threshold · clip(floor(T·z + 1/2), -T, T) / T` with z = x / threshold. `"phase"`: the same with 2^T - 1
    for T. `"first_spike"`: the nearest of 0 and `± threshold · base^(1 - t)`, t = 1 … T. Equals the spikes of
    [`spike_train`] times their weights. The gradient is straight through the rounding, inside the range; the
    threshold, and a base that is a tensor, get theirs too.

    Args:
        x (`torch.Tensor` of shape `(B, …, D)`): the constant input.
        threshold (`torch.Tensor` broadcastable to `x`): end of the range.
        T (`int`): timesteps, at least 1.
        code (`str`): `"rate"`, `"phase"` or `"first_spike"`.
        base (`float` or `torch.Tensor`, defaults to the root of 2): of a first spike, above 1.
        signed (`bool`, defaults to `True`): whether the range goes below 0.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.
    """
    return _emit_or_learn(x, threshold, None, base, T, signed, code)


def spike_count(emitted: torch.Tensor, threshold: torch.Tensor, T: int, code: str) -> torch.Tensor:
    """Spikes that a value of [`encode`] is made of, whole numbers of the shape of `emitted`."""
    level = (_state(emitted) / at_least(_state(threshold))).abs()
    if code == "rate":
        return level.mul_(T).round_()
    if code == "first_spike":
        return level.sign()
    bits = level.mul_(2**T - 1).round_().long()
    count = torch.zeros_like(level)
    for bit in range(T):
        count += (bits >> bit) & 1
    return count


def spike_train(
    x: torch.Tensor, threshold: torch.Tensor, T: int, code: str, base: float = 2**0.5, signed: bool = True
) -> torch.Tensor:
    """The spikes behind [`encode`], step by step: -1, 0 or 1, `(T, B, …, D)`; plain, and the oracle of all else.

    At step t a neuron fires where what it holds reaches the step's weight, less half of the last one, which is taken
    off. A rate gets its input anew at every step; a first spike is the only one.
    """
    z = _state(x) / at_least(_state(threshold))
    if code == "first_spike":
        _, between = first_spike_levels(T, base, z)
        spikes, fired = [], torch.zeros_like(z, dtype=torch.bool)
        for reached in between.flip(0):
            fires = (z.abs() >= reached) & ~fired & ((z > 0) | signed)
            fired |= fires
            spikes.append(fires * z.sign())
        return torch.stack(spikes)
    weights = [1] * T if code == "rate" else [2 ** (T - t) for t in range(1, T + 1)]
    held = z if code == "rate" else z * (2**T - 1)
    v, spikes = torch.full_like(z, 0.5), []
    for t, weight in enumerate(weights):
        v = v + held if code == "rate" or t == 0 else v
        spike = (v >= weight).to(z.dtype) - (signed & (v < 1 - weight)).to(z.dtype)
        v = v - weight * spike
        spikes.append(spike)
    return torch.stack(spikes)


def integrate_and_fire(
    x: torch.Tensor, threshold: torch.Tensor, initial_potential: torch.Tensor, T: int, signed: bool = False
) -> torch.Tensor:
    """T steps of integrate-and-fire with soft reset, from the membrane potential `initial_potential · threshold`.

    `v += x[t]`; emit `threshold` where `v >= threshold`, and `-threshold` where `v < 0` if signed, else 0; `v -=` what
    was emitted. No leak, no lower bound, at most one spike a step. From the potential 1/2 a signed neuron so fires
    where what it holds differs by half a threshold from what it emitted. The state is kept in float32 at least, inside
    this call. The gradient of a spike is the triangle `max(0, 1 - |v - threshold|)`, of a negative one `max(0, 1 -
    |v|)`; everything else is differentiated as written, through time and reset. NaN stays NaN.

    Args:
        x (`torch.Tensor` of shape `(T, B, …, D)`, or `(1, B, …, D)` for a constant input)
        threshold (`torch.Tensor` broadcastable to `(B, …, D)`): below 1e-4 it counts as 1e-4.
        initial_potential (`torch.Tensor` broadcastable to `(B, …, D)`): fraction of the threshold; if signed, counts
            as 0 below 0 and as 1 above 1.
        T (`int`): timesteps, at least 1.
        signed (`bool`, defaults to `False`): whether the neuron spikes both ways.

    Returns:
        `torch.Tensor` of shape `(T, B, …, D)`: the threshold where a neuron fired, less where negatively, else 0;
        dtype of `x`.

    Raises:
        ValueError: if `x` holds neither one nor T timesteps.

    Source: Chen et al. 2025, Sec. 3; differs in that thresholds get a gradient here too.
    """
    if len(x) not in (1, T):
        raise ValueError(f"`x` must hold 1 or `T` = {T} timesteps in its first dimension, got shape {tuple(x.shape)}.")
    return _IntegrateAndFire.apply(x, threshold, initial_potential, T, signed)
