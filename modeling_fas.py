"""Spiking GPT-2 and BERT: the stock models of transformers with integrate-and-fire neurons in their MLPs.

This file travels to the Hub inside every checkpoint, next to `configuration_fas.py`. Shapes: `T` timesteps (leading),
`B` batch, `S` sequence, `D` neurons. Source of the method: Chen et al. 2025 (arXiv 2502.04405).
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertOutput, BertPredictionHeadTransform
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.utils import can_return_tuple, logging


try:
    from .configuration_fas import FASBertConfig, FASGPT2Config, __version__  # type: ignore[import-not-found]
except ImportError:
    from configuration_fas import FASBertConfig, FASGPT2Config, __version__


__all__ = [
    "FASBertForMaskedLM",
    "FASBertForSequenceClassification",
    "FASBertModel",
    "FASGPT2LMHeadModel",
    "FASGPT2Model",
    "FASNeuron",
    "__version__",
    "integrate_and_fire",
    "qcfs",
    "spike_rate",
]

logger = logging.get_logger(__name__)
tl: Any = None  # triton.language, from the first use of a kernel on

# A threshold below this counts as this much; keeps x / threshold finite in every dtype.
MIN_THRESHOLD = 1e-4
# Neurons whose state a CPU core keeps in its cache while it runs their timesteps.
BLOCK_SIZE = 1 << 17


# ---------------------------------------------------------------------------------------------------------------------
# The neuron
# ---------------------------------------------------------------------------------------------------------------------


def _state(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision that membrane potentials are kept in: float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(like: torch.Tensor, *others: torch.Tensor | None):
    """Views of rows (dimension -2) of all the tensors, in blocks of at most about `BLOCK_SIZE` elements of the first.

    What has no rows to split comes whole with every block. On an accelerator, and for the compiler, one block is all.
    """
    if like.numel() <= BLOCK_SIZE or like.dim() < 2 or like.device.type != "cpu" or torch.compiler.is_compiling():
        return [(like, *others)]
    rows = max(1, BLOCK_SIZE * like.shape[-2] // like.numel())
    count = -(-like.shape[-2] // rows)
    split = [
        each.split(rows, dim=-2) if each is not None and each.dim() > 1 and each.shape[-2] > 1 else (each,) * count
        for each in (like, *others)
    ]
    return zip(*split, strict=True)


def _spike_count(z: torch.Tensor, initial_potential: torch.Tensor | None, T: int) -> torch.Tensor:
    """Spikes of a neuron after T steps of the constant input z, both in units of its threshold.

    `clip(floor(T·z + v0), 0, T)` for v0 in [0, 1]; `None` is 1/2. Above 1 a neuron with negative input fires only
    while its start lasts; below 0 one with input above its threshold starts late and then fires at every step.
    """
    count = (T * z).add_(0.5 if initial_potential is None else initial_potential).floor_()
    if initial_potential is not None:
        early = (initial_potential > 1) & (z < 0)
        late = (initial_potential < 0) & (z > 1)
        count = torch.where(early, torch.floor(initial_potential / (1 - z)), count)
        count = torch.where(late, T + 1 - torch.ceil((1 - initial_potential) / z), count)
    return count.clamp_(0, T)


# Comparisons below write 0 and 1 into floats, in place: on a CPU several times as fast as making bool tensors.


class _SpikeRate(torch.autograd.Function):
    """Threshold times the firing rate for a constant input, straight-through gradient; keeps the input only."""

    @staticmethod
    def forward(ctx, x, threshold, initial_potential, T):
        ctx.save_for_backward(x, threshold, initial_potential)
        ctx.T = T
        theta = _state(threshold).clamp(min=MIN_THRESHOLD)
        potential = None if initial_potential is None else _state(initial_potential)
        emitted = torch.empty_like(x)
        for x_, theta_, potential_, emitted_ in _blocks(x, theta, potential, emitted):
            emitted_.copy_(_spike_count(_state(x_) / theta_, potential_, T).div_(T).mul_(theta_))
        return emitted

    @staticmethod
    def backward(ctx, grad):
        x, threshold, initial_potential = ctx.saved_tensors
        theta = _state(threshold).clamp(min=MIN_THRESHOLD)
        potential = None if initial_potential is None else _state(initial_potential)
        grad_x, grad_theta = torch.empty_like(x), torch.zeros_like(theta)
        grad_potential = None if potential is None else torch.zeros_like(potential)
        whole = x, grad, grad_x, theta, grad_theta, potential, grad_potential
        for x_, grad_, grad_x_, theta_, grad_theta_, potential_, grad_potential_ in _blocks(*whole):
            z = _state(x_) / theta_
            inside = z.clamp(0, 1).eq_(z).mul_(grad_)
            grad_x_.copy_(inside)
            if ctx.needs_input_grad[1]:
                level = _spike_count(z, potential_, ctx.T).div_(ctx.T)
                grad_theta_ += level.mul_(grad_).sub_(z.mul_(inside)).sum_to_size(theta_.shape)
            if ctx.needs_input_grad[2]:
                grad_potential_ += inside.mul_(theta_ / ctx.T).sum_to_size(potential_.shape)
        if grad_potential is not None:
            grad_potential = grad_potential.to(initial_potential.dtype)
        return grad_x, grad_theta.to(threshold.dtype), grad_potential, None


class _IntegrateAndFire(torch.autograd.Function):
    """T steps of integrate-and-fire; keeps the input only and integrates again for the surrogate gradient."""

    @staticmethod
    def forward(ctx, x, threshold, initial_potential, T):
        ctx.save_for_backward(x, threshold, initial_potential)
        theta = _state(threshold).clamp(min=MIN_THRESHOLD)
        start = _state(initial_potential) * theta
        emitted = x.new_empty((T, *x.shape[1:]))
        (_fire_by_kernel if _has_kernels(x) else _fire)(x, theta, start, emitted)
        return emitted

    @staticmethod
    def backward(ctx, grad):
        x, threshold, initial_potential = ctx.saved_tensors
        theta = _state(threshold).clamp(min=MIN_THRESHOLD)
        potential = _state(initial_potential)
        differentiate = _differentiate_by_kernel if _has_kernels(x) else _differentiate
        grad_x, grad_theta, grad_start = differentiate(x, theta, potential * theta, grad)
        grad_theta += (grad_start * potential).sum_to_size(theta.shape)
        grad_potential = (grad_start * theta).sum_to_size(potential.shape)
        return grad_x.to(x.dtype), grad_theta.to(threshold.dtype), grad_potential.to(initial_potential.dtype), None


def _fire(x, theta, start, emitted) -> None:
    """Write the T steps of integrate-and-fire from the membrane potential `start` to `emitted`, `(T, …)`."""
    for _, x_, emitted_, theta_, start_ in _blocks(x[0], x, emitted, theta, start):
        v = start_.expand(x_.shape[1:]).clone()
        for t in range(len(emitted)):
            v += x_[min(t, len(x) - 1)]
            spikes = v.clone().ge_(theta_).mul_(theta_)
            v -= spikes
            emitted_[t] = spikes


def _differentiate(x, theta, start, grad) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the threshold and the first membrane potential for those of the output, `(T, …)`."""
    grad_x = torch.zeros_like(x, dtype=theta.dtype)
    grad_theta, grad_start = torch.zeros_like(theta), torch.zeros_like(start)
    whole = x[0], x, grad, grad_x, theta, grad_theta, start, grad_start
    for _, x_, grad_, grad_x_, theta_, grad_theta_, start_, grad_start_ in _blocks(*whole):
        v = start_.expand(x_.shape[1:]).clone()
        distances = []
        for t in range(len(grad)):
            v += x_[min(t, len(x) - 1)]
            distances.append(v - theta_)
            v -= v.clone().ge_(theta_).mul_(theta_)

        grad_v, at_spikes = torch.zeros_like(v), torch.zeros_like(v)
        for t in reversed(range(len(grad))):
            u = distances.pop()
            surrogate = (1 - u.abs()).clamp_(min=0)
            grad_emitted = grad_[t] - grad_v
            at_spikes.addcmul_(grad_emitted, u.ge_(0))
            grad_v.addcmul_(grad_emitted.mul_(theta_), surrogate)
            grad_x_[min(t, len(x) - 1)] += grad_v
        # Through v - theta the threshold gets minus what its steps added to grad_v: minus grad_v, in all.
        grad_theta_ += at_spikes.sub_(grad_v).sum_to_size(theta_.shape)
        grad_start_ += grad_v.sum_to_size(start_.shape)
    return grad_x, grad_theta, grad_start


# ---------------------------------------------------------------------------------------------------------------------
# The same by Triton, which comes with PyTorch for CUDA and is never required
# ---------------------------------------------------------------------------------------------------------------------


def _fire_kernel(x, theta, start, emitted, size, columns, x_step, T, BLOCK: tl.constexpr):
    """As `_fire`; a program runs all T steps of `BLOCK` of the `columns` neurons that have thresholds of their own."""
    blocks = (columns + BLOCK - 1) // BLOCK
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * columns + column
    inside = column < columns
    threshold = tl.load(theta + column, mask=inside)
    v = tl.load(start + column, mask=inside)
    for _ in range(T):
        v = (v + tl.load(x + at, mask=inside)).to(threshold.dtype)
        spikes = tl.where(v >= threshold, threshold, 0.0)
        v -= spikes
        tl.store(emitted + at, spikes, mask=inside)
        x += x_step
        emitted += size


def _differentiate_kernel(
    x, theta, start, grad, grad_x, grad_theta, grad_start, size, columns, x_step, T, BLOCK: tl.constexpr
):
    """As `_differentiate`; `grad_x` holds the distances to the threshold until the way back fills it."""
    blocks = (columns + BLOCK - 1) // BLOCK
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * columns + column
    inside = column < columns
    threshold = tl.load(theta + column, mask=inside)
    v = tl.load(start + column, mask=inside)
    for _ in range(T):
        v = (v + tl.load(x + at, mask=inside)).to(threshold.dtype)
        tl.store(grad_x + at, v - threshold, mask=inside)
        v -= tl.where(v >= threshold, threshold, 0.0)
        x += x_step
        grad += size
        grad_x += size
    tl.debug_barrier()  # a thread may read back what another one of its program wrote
    grad_v, at_spikes = threshold * 0.0, threshold * 0.0
    for _ in range(T):
        grad -= size
        grad_x -= size
        u = tl.load(grad_x + at, mask=inside)
        surrogate = tl.where(tl.abs(u) > 1.0, 0.0, 1.0 - tl.abs(u))
        grad_emitted = (tl.load(grad + at, mask=inside) - grad_v).to(threshold.dtype)
        at_spikes += tl.where(u >= 0.0, grad_emitted, 0.0)
        grad_v += grad_emitted * threshold * surrogate
        tl.store(grad_x + at, grad_v, mask=inside)
    tl.store(grad_theta + at, at_spikes - grad_v, mask=inside)
    tl.store(grad_start + at, grad_v, mask=inside)


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether Triton runs the neuron: on CUDA, outside `torch.compile`, which fuses the plain loop by itself."""
    return x.is_cuda and not torch.compiler.is_compiling() and x.numel() > 0 and bool(_kernels(x.device, x.dtype))


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> tuple:
    """The two kernels; none where Triton is missing or does not run."""
    global tl
    try:
        import triton
        from triton import language as tl
    except ImportError:
        return ()
    kernels = triton.jit(_fire_kernel), triton.jit(_differentiate_kernel)
    x = torch.linspace(-1, 2, 64, device=device, dtype=dtype)[None]
    theta = torch.ones(64, device=device, dtype=_state(x).dtype)
    emitted, expected = x.new_empty((2, 4, 64))
    _fire(x, theta, theta / 2, expected)
    try:
        with torch.cuda.device_of(x):
            kernels[0][1,](x, theta, theta / 2, emitted, 64, 64, 0, 4, BLOCK=64)
        agree = torch.equal(emitted, expected)
    except Exception:
        # An old GPU, no C compiler, no place for a cache: the plain loop needs none of them.
        logger.warning("Triton is installed but does not run: the neurons do without, slower.", exc_info=True)
        return ()
    if not agree:
        logger.warning("Triton's spikes are not those of the plain loop on this GPU: the neurons do without, slower.")
        return ()
    return kernels


def _launch(kernel: int, T: int, x, theta, start, *tensors) -> None:
    """Run a kernel on all rows of neurons, between which thresholds do not differ."""
    theta, start = theta.expand(x.shape[1:]), start.expand(x.shape[1:])
    while theta.dim() > 1 and theta.stride(0) == start.stride(0) == 0:
        theta, start = theta[0], start[0]
    size, columns = x[0].numel(), theta.numel()
    block = min(1024, 1 << (columns - 1).bit_length())
    grid = (size // columns * -(-columns // block),)
    tensors = tuple(each.contiguous() for each in (x, theta, start, *tensors))
    with torch.cuda.device_of(x):
        _kernels(x.device, x.dtype)[kernel][grid](*tensors, size, columns, size * (len(x) > 1), T, BLOCK=block)


def _fire_by_kernel(x, theta, start, emitted) -> None:
    _launch(0, len(emitted), x, theta, start, emitted)


def _differentiate_by_kernel(x, theta, start, grad) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = theta.new_empty(grad.shape)
    grad_theta, grad_start = theta.new_empty((2, *x.shape[1:]))
    _launch(1, len(grad), x, theta, start, grad, grad_x, grad_theta, grad_start)
    if len(x) == 1:
        grad_x = grad_x.sum(0, keepdim=True)
    return grad_x, grad_theta.sum_to_size(theta.shape), grad_start.sum_to_size(start.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Functions and module
# ---------------------------------------------------------------------------------------------------------------------


def qcfs(x: torch.Tensor, threshold: torch.Tensor, L: int) -> torch.Tensor:
    """Quantised clipped ReLU: `threshold · floor(clip(x / threshold, 0, 1) · L + 1/2) / L`.

    The gradient passes the floor unchanged and the clip inside its closed interval; the threshold gets one through
    both places it stands in. Computed in float32 at least.

    Args:
        x (`torch.Tensor`): pre-activations of any shape.
        threshold (`torch.Tensor` broadcastable to `x`): upper end of the range; below 1e-4 it counts as 1e-4.
        L (`int`): quantisation levels above zero.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.

    Source: Bu et al. 2022 (arXiv 2303.04347), Eq. 8, with shift 1/2.
    """
    return _SpikeRate.apply(x, threshold, None, L)


def spike_rate(
    x: torch.Tensor, threshold: torch.Tensor, initial_potential: torch.Tensor | None, T: int
) -> torch.Tensor:
    """Time average of what a neuron emits in T steps of a constant input, in closed form.

    Equals `integrate_and_fire(x[None], threshold, initial_potential, T).mean(0)` up to rounding at exact ties, and
    [`qcfs`] with L = T, bit for bit, for an initial potential of 1/2 (given as `None`). The gradient is that of
    [`qcfs`], straight through the floor.

    Args:
        x (`torch.Tensor` of shape `(B, …, D)`): the constant input.
        threshold (`torch.Tensor` broadcastable to `x`)
        initial_potential (`torch.Tensor` broadcastable to `x`, *optional*): fraction of the threshold, 1/2 if `None`.
        T (`int`): timesteps, at least 1.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.
    """
    return _SpikeRate.apply(x, threshold, initial_potential, T)


def integrate_and_fire(
    x: torch.Tensor, threshold: torch.Tensor, initial_potential: torch.Tensor, T: int
) -> torch.Tensor:
    """T steps of integrate-and-fire with soft reset, from the membrane potential `initial_potential · threshold`.

    `v += x[t]`; emit `threshold` where `v >= threshold`, else 0; `v -=` what was emitted. No leak, no lower bound, at
    most one spike a step. The state is kept in float32 at least, inside this call. The gradient of a spike is the
    triangle `max(0, 1 - |v - threshold|)`, everything else is differentiated as written, through time and reset.

    Args:
        x (`torch.Tensor` of shape `(T, B, …, D)`, or `(1, B, …, D)` for a constant input)
        threshold (`torch.Tensor` broadcastable to `(B, …, D)`): below 1e-4 it counts as 1e-4.
        initial_potential (`torch.Tensor` broadcastable to `(B, …, D)`): fraction of the threshold.
        T (`int`): timesteps, at least 1.

    Returns:
        `torch.Tensor` of shape `(T, B, …, D)`: the threshold where a neuron fired, else 0; dtype of `x`.

    Raises:
        ValueError: if `x` holds neither one nor T timesteps.

    Source: Chen et al. 2025, Sec. 3; differs in that thresholds get a gradient here too.
    """
    if len(x) not in (1, T):
        raise ValueError(f"`x` must hold 1 or `T` = {T} timesteps in its first dimension, got shape {tuple(x.shape)}.")
    return _IntegrateAndFire.apply(x, threshold, initial_potential, T)


class FASNeuron(nn.Module):
    """A neuron site, in place of an activation: QCFS at T = 0, integrate-and-fire at T > 0.

    Holds `threshold` of shape `(1,)`; once calibrated `fine_threshold` and `initial_potential` (a fraction of the
    threshold), of shape `(1,)`, `(D,)` or `(S, D)` by granularity, which take its place at T > 0. No state survives a
    call. The model keeps `L`, `T` and `schedule` as its configuration says.

    Args:
        config ([`FASGPT2Config`] or [`FASBertConfig`])
        width (`int`): neurons of the site, D.
        per_position (`bool`): whether the input has a sequence dimension (the pooler's has none).
    """

    def __init__(self, config, width: int, per_position: bool = True):
        super().__init__()
        self.width, self.per_position = width, per_position
        self.initial_threshold = config.initial_threshold
        self.L, self.T, self.schedule = config.L, config.T, config.schedule
        self.folded = config.folded  # the weights that follow hold the threshold: emit spikes, not threshold · spikes
        self.expands_time = False  # the first site of a model: all before it is the same at every timestep
        self.position = 0  # of the first column of the input, for thresholds by position
        self.threshold = nn.Parameter(torch.full((1,), config.initial_threshold))
        self.register_parameter("fine_threshold", None)
        self.register_parameter("initial_potential", None)
        if config.calib_T is not None:
            self.refine(config.granularity, config.calib_length)

    @property
    def stepwise(self) -> bool:
        """Whether the site emits spike trains, `(T·B, …)`, rather than one value per input."""
        return self.T > 0 and self.schedule == "stepwise"

    def refine(self, granularity: str, length: int | None = None) -> None:
        """Give the site fine thresholds, equal to its threshold, and initial potentials of 1/2."""
        by_position = granularity == "position" and self.per_position
        shape = [length or 1] * by_position + [1 if granularity == "layer" else self.width]
        self.fine_threshold = nn.Parameter(self.threshold.detach().expand(shape).clone())
        self.initial_potential = nn.Parameter(torch.full_like(self.fine_threshold, 0.5))

    def reset_parameters(self) -> None:
        """Set every parameter that no checkpoint provides to its initial value."""
        nn.init.constant_(self.threshold, self.initial_threshold)
        if self.fine_threshold is not None:
            nn.init.constant_(self.fine_threshold, self.initial_threshold)
            nn.init.constant_(self.initial_potential, 0.5)

    def _spiking_thresholds(self, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Threshold and initial potential (`None`: 1/2) at T > 0, for `length` columns of input."""
        if self.fine_threshold is None:
            return self.threshold, None
        if self.fine_threshold.dim() < 2:
            return self.fine_threshold, self.initial_potential
        rows = slice(self.position, self.position + length)
        if rows.stop > len(self.fine_threshold):
            raise ValueError(
                f"`input_ids` must not reach beyond the {len(self.fine_threshold)} positions that the fine thresholds "
                f"were calibrated for, got {rows.stop}. Shorten the input, or calibrate with granularity 'neuron', "
                "which has no such limit."
            )
        return self.fine_threshold[rows], self.initial_potential[rows]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)` or `(B, D)`, `(T·B, …)` in stepwise mode after the
                first site): pre-activations.

        Returns:
            `torch.Tensor`: threshold times spikes, `(T·B, …)`, time-major, in stepwise mode; their time average,
            `(B, …)`, in layerwise mode; the QCFS activation, `(B, …)`, at T = 0. All divided by the (fine) threshold
            where that is folded into the weights that follow.
        """
        emitted = self._emit(hidden_states)
        if not self.folded:
            return emitted
        threshold = self.threshold if self.fine_threshold is None else self.fine_threshold
        return (emitted / threshold.clamp(min=MIN_THRESHOLD)).to(emitted.dtype)

    def _emit(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.T == 0:
            return qcfs(hidden_states, self.threshold, self.L)
        threshold, potential = self._spiking_thresholds(hidden_states.shape[-2])
        if not self.stepwise:
            return spike_rate(hidden_states, threshold, potential, self.T)
        if potential is None:
            potential = torch.full_like(threshold, 0.5)
        steps = hidden_states[None] if self.expands_time else hidden_states.unflatten(0, (self.T, -1))
        return integrate_and_fire(steps, threshold, potential, self.T).flatten(0, 1)

    def extra_repr(self) -> str:
        fine = "" if self.fine_threshold is None else f", fine={tuple(self.fine_threshold.shape)}"
        return f"{self.width}, L={self.L}, T={self.T}, schedule={self.schedule}{fine}"


# ---------------------------------------------------------------------------------------------------------------------
# What all models share
# ---------------------------------------------------------------------------------------------------------------------


def _mean_over_time(hidden_states: torch.Tensor, batch: int) -> torch.Tensor:
    """`(T·B, …)` to `(B, …)`; leaves what has B rows."""
    if hidden_states.shape[0] == batch:
        return hidden_states
    return hidden_states.unflatten(0, (-1, batch)).mean(0)


def _repeat_over_time(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`(B, …)` to `(rows, …)`, time-major; a view where one row serves all."""
    if tensor.shape[0] == rows:
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor.repeat(rows // tensor.shape[0], *[1] * (tensor.dim() - 1))


def _mask_index(block: type[nn.Module]) -> int:
    """Where a stock block takes `attention_mask`, counted after `hidden_states` (it moves between versions)."""
    return list(inspect.signature(block.forward).parameters).index("attention_mask") - 2


def _with_mask_rows(index: int, rows: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block, with an attention mask of B rows repeated for all `rows` of the block's input."""
    if isinstance(kwargs.get("attention_mask"), torch.Tensor):
        kwargs = kwargs | {"attention_mask": _repeat_over_time(kwargs["attention_mask"], rows)}
    elif len(args) > index and isinstance(args[index], torch.Tensor):
        args = (*args[:index], _repeat_over_time(args[index], rows), *args[index + 1 :])
    return args, kwargs


class _FASMixin(PreTrainedModel):
    """What every spiking model adds to its stock class."""

    _synced: tuple[int, int, str, int] | None = None

    def neurons(self) -> list[tuple[str, FASNeuron]]:
        """Names and modules of the neuron sites, in the order they run in."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, FASNeuron)]

    def set_timesteps(self, T: int, schedule: str | None = None):
        """Run the model with T timesteps from now on (0: the quantised ANN); returns the model.

        Args:
            T (`int`): timesteps.
            schedule (`str`, *optional*): `"stepwise"` or `"layerwise"`; stays as it is if not given.

        Raises:
            ValueError: for a value the configuration refuses; the model then stays as it was.
        """
        previous = self.config.schedule
        self.config.schedule = previous if schedule is None else schedule
        try:
            self.config.T = T
        except ValueError:
            self.config.schedule = previous
            raise
        self._sync_neurons()
        return self

    @contextmanager
    def running(self, T: int, schedule: str | None = None):
        """Run the model with T timesteps inside the context; after it, also after an error, as before.

        Args:
            T (`int`): timesteps, 0 for the quantised ANN.
            schedule (`str`, *optional*): as in [`set_timesteps`].

        Yields:
            The model.

        Raises:
            ValueError: as [`set_timesteps`].
        """
        before = self.config.T, self.config.schedule
        self.set_timesteps(T, schedule)
        try:
            yield self
        finally:
            self.set_timesteps(*before)

    def begin_calibration(self, T: int, granularity: str = "neuron", length: int | None = None):
        """Give every site fine thresholds equal to its threshold and initial potentials of 1/2; returns the model.

        Called again, it starts again.

        Args:
            T (`int`): timesteps to calibrate for; `config.calib_T`.
            granularity (`str`, defaults to `"neuron"`): `"layer"`, `"neuron"` or `"position"`.
            length (`int`, *optional*): the longest sequence, required by granularity `"position"`.

        Raises:
            ValueError: for a value the configuration refuses, or a missing `length`.
        """
        if granularity == "position" and length is None:
            raise ValueError("`length` must be the longest sequence length at granularity 'position', got None.")
        if self.config.folded:
            raise ValueError("`model` must not be folded: calibrate before its thresholds go into its weights.")
        if granularity == "position" and self.config.chunk_size_feed_forward:
            raise ValueError("`granularity` must not be 'position' where `config.chunk_size_feed_forward` is set.")
        self.config.granularity = granularity
        self.config.calib_T = T
        self.config.calib_length = length if granularity == "position" else None
        for _, neuron in self.neurons():
            neuron.refine(granularity, length)
        return self

    @torch.no_grad()
    def clamp_thresholds_(self) -> None:
        """Lift every threshold that training moved below 1e-4 to 1e-4, in place; the forward pass does not change."""
        for _, neuron in self.neurons():
            neuron.threshold.clamp_(min=MIN_THRESHOLD)
            if neuron.fine_threshold is not None:
                neuron.fine_threshold.clamp_(min=MIN_THRESHOLD)

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
            if name.endswith(("threshold", "initial_potential")) and not parameter.is_meta:
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

    def _sync_neurons(self, position: int = 0) -> None:
        """Make every site, copies made by adapters included, run as the configuration says."""
        settings = (self.config.L, self.config.T, self.config.schedule, position)
        if self._synced != settings:
            for module in self.modules():
                if isinstance(module, FASNeuron):
                    module.L, module.T, module.schedule, module.position = settings
                elif isinstance(module, _FASMixin):
                    module._synced = settings  # the trunk too, so that a compiled call has nothing left to change


class _FASTrunkMixin(_FASMixin):
    """What the two base models share: they run everything before the first site once, and average over time last."""

    averages_last_hidden_state = True

    def _prepare_neurons(self) -> None:
        if self.config.add_cross_attention:
            raise ValueError("`add_cross_attention` must be False: a spiking model has no encoder, got True.")
        if neurons := self.neurons():
            neurons[0][1].expands_time = True
        self.post_init()

    def _batch(self, inputs: torch.Tensor | None, past: int = 0) -> int:
        """Batch size of ids or embeddings, after a check of their shape."""
        if inputs is None:
            return 0  # the stock model says what is missing
        batch, length = inputs.shape[:2]
        if batch == 0 or length == 0:
            raise ValueError(f"`input_ids` must hold at least one token, got shape {tuple(inputs.shape)}.")
        limit = self.config.max_position_embeddings
        if isinstance(past, int) and past + length > limit:
            raise ValueError(
                f"`input_ids` must not be longer than the {limit} positions of the model, got {past + length} "
                "(cached tokens included). Truncate the input, or generate fewer tokens."
            )
        return batch

    def _average(self, outputs, batch: int):
        """Batch-shaped outputs: the time average of everything that has T·B rows."""
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor) and (self.averages_last_hidden_state or name != "last_hidden_state"):
                outputs[name] = _mean_over_time(value, batch)
            elif isinstance(value, tuple):
                outputs[name] = tuple(each if each is None else _mean_over_time(each, batch) for each in value)
        return outputs


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2
# ---------------------------------------------------------------------------------------------------------------------


class FASGPT2MLP(GPT2MLP):
    """Stock MLP with a neuron site; where that expands time, `(B, S, H)` becomes `(T, B, S, H)`."""

    def __init__(self, intermediate_size: int, config):
        super().__init__(intermediate_size, config)
        self.act = FASNeuron(config, intermediate_size)

    def forward(self, hidden_states):
        output = super().forward(hidden_states)
        if output.shape[0] == hidden_states.shape[0]:
            return output
        return output.unflatten(0, (-1, hidden_states.shape[0]))


class FASGPT2Block(GPT2Block):
    """Stock block with a neuron site; the one that expands time adds its residual to every timestep."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.mlp = FASGPT2MLP(4 * config.n_embd if config.n_inner is None else config.n_inner, config)

    def forward(self, hidden_states, *args, **kwargs):
        args, kwargs = _with_mask_rows(_GPT2_MASK, hidden_states.shape[0], args, kwargs)
        output = super().forward(hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0].flatten(0, -3), *output[1:])
        return output.flatten(0, -3)


_GPT2_MASK = _mask_index(GPT2Block)


class FASGPT2Model(_FASTrunkMixin, GPT2Model):
    """Spiking GPT-2 without a head. Everything it returns has B rows, but for the cache: T·B after the first block."""

    config_class = FASGPT2Config
    _no_split_modules = ["FASGPT2Block"]

    def __init__(self, config):
        super().__init__(config)
        self.h = nn.ModuleList(FASGPT2Block(config, layer_idx=i) for i in range(config.n_layer))
        self._prepare_neurons()

    @can_return_tuple
    @functools.wraps(GPT2Model.forward)
    def forward(self, input_ids=None, past_key_values=None, *args, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch = self._batch(kwargs.get("inputs_embeds") if input_ids is None else input_ids, past)
        self._sync_neurons(past if self.config.granularity == "position" else 0)
        kwargs["return_dict"] = True
        return self._average(super().forward(input_ids, past_key_values, *args, **kwargs), batch)


class FASGPT2LMHeadModel(_FASMixin, GPT2LMHeadModel):
    """Spiking GPT-2 with a language modelling head, applied once to the time average of the hidden states.

    Call and outputs are those of `GPT2LMHeadModel`; `generate()` works in every mode.
    """

    config_class = FASGPT2Config
    _no_split_modules = ["FASGPT2Block"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = FASGPT2Model(config)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def _reorder_cache(self, past_key_values, beam_idx):
        """Reorder the rows of a cache by beam; after the first block they come T times, time-major."""
        beams = beam_idx.shape[0]
        for layer in past_key_values.layers:
            first = torch.arange(0, layer.keys.shape[0], beams, device=beam_idx.device)
            layer.reorder_cache((first[:, None] + beam_idx).flatten())
        return past_key_values


# ---------------------------------------------------------------------------------------------------------------------
# BERT
# ---------------------------------------------------------------------------------------------------------------------


class FASBertOutput(BertOutput):
    """Stock output of a layer; adds the residual to every timestep."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states, _repeat_over_time(input_tensor, hidden_states.shape[0]))


class FASBertLayer(BertLayer):
    """Stock layer with a neuron site."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.intermediate.intermediate_act_fn = FASNeuron(config, config.intermediate_size)
        self.output = FASBertOutput(config)

    def forward(self, hidden_states, *args, **kwargs):
        args, kwargs = _with_mask_rows(_BERT_MASK, hidden_states.shape[0], args, kwargs)
        return super().forward(hidden_states, *args, **kwargs)


_BERT_MASK = _mask_index(BertLayer)


class FASBertPredictionHeadTransform(BertPredictionHeadTransform):
    """Stock transform with a neuron site; averages over time, as all that follows it is linear."""

    def __init__(self, config):
        super().__init__(config)
        self.transform_act_fn = FASNeuron(config, config.hidden_size)
        self.transform_act_fn.folded = False  # a norm follows, which no threshold folds into

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = super().forward(hidden_states)
        neuron = self.transform_act_fn
        return output.unflatten(0, (neuron.T, -1)).mean(0) if neuron.stepwise else output


class FASBertModel(_FASTrunkMixin, BertModel):
    """Spiking BERT without a head; a neuron site replaces the pooler's tanh. Everything it returns has B rows."""

    config_class = FASBertConfig
    _no_split_modules = ["BertEmbeddings", "FASBertLayer"]

    def __init__(self, config, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.encoder.layer = nn.ModuleList(FASBertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        if self.pooler is not None:
            self.pooler.register_module("activation", FASNeuron(config, config.hidden_size, per_position=False))
        self._prepare_neurons()

    @can_return_tuple
    @functools.wraps(BertModel.forward)
    def forward(self, input_ids=None, *args, **kwargs):
        batch = self._batch(kwargs.get("inputs_embeds") if input_ids is None else input_ids)
        self._sync_neurons()
        kwargs["return_dict"] = True
        return self._average(super().forward(input_ids, *args, **kwargs), batch)


class FASBertForMaskedLM(_FASMixin, BertForMaskedLM):
    """Spiking BERT with a masked language modelling head, whose transform spikes too.

    Call and outputs are those of `BertForMaskedLM`.
    """

    config_class = FASBertConfig
    _no_split_modules = ["BertEmbeddings", "FASBertLayer"]
    # Stock BERT ignores `num_items_in_batch`; saying so makes the Trainer divide by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.bert = FASBertModel(config, add_pooling_layer=False)
        self.bert.averages_last_hidden_state = False
        self.cls.predictions.transform = FASBertPredictionHeadTransform(config)
        self.post_init()

    @functools.wraps(BertForMaskedLM.forward)
    def forward(self, *args, **kwargs):  # type: ignore[override]
        self._sync_neurons()
        return super().forward(*args, **kwargs)


class FASBertForSequenceClassification(_FASMixin, BertForSequenceClassification):
    """Spiking BERT with a classification or regression head, applied to the time average of the pooled output.

    Call and outputs are those of `BertForSequenceClassification`.
    """

    config_class = FASBertConfig
    _no_split_modules = ["BertEmbeddings", "FASBertLayer"]
    accepts_loss_kwargs = False  # as above

    def __init__(self, config):
        super().__init__(config)
        self.bert = FASBertModel(config)
        self.post_init()


_AUTO_CLASSES = {
    AutoModel: (FASGPT2Model, FASBertModel),
    AutoModelForCausalLM: (FASGPT2LMHeadModel,),
    AutoModelForMaskedLM: (FASBertForMaskedLM,),
    AutoModelForSequenceClassification: (FASBertForSequenceClassification,),
}
for _auto_class, _models in _AUTO_CLASSES.items():
    for _model in _models:
        _model.register_for_auto_class(_auto_class.__name__)
        # Registering from remote code would make the first checkpoint's classes serve all later ones.
        if not __name__.startswith("transformers_modules."):
            _auto_class.register(_model.config_class, _model, exist_ok=True)
