"""Triton kernels of the neurons: integrate-and-fire and the codes, forward and backward.

This file travels to the Hub inside every checkpoint, next to `neurons_fas.py`, which has the same in plain PyTorch and
compares. Triton comes with PyTorch for CUDA and is never required. Shapes as there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


__all__ = ["differentiate_by_kernel", "encode_by_kernel", "fire_by_kernel", "kernels"]

tl: Any = None  # triton.language, from the first use of a kernel on
divide: Any = None  # `_divide` for use in kernels, likewise


def _fire_kernel(x, theta, start, emitted, size, columns, x_step, T, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
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
        if SIGNED:
            spikes = tl.where(v < 0.0, -threshold, spikes)
        spikes = tl.where(v == v, spikes, v)  # NaN stays NaN
        v -= spikes
        tl.store(emitted + at, spikes, mask=inside)
        x += x_step
        emitted += size


def _differentiate_kernel(
    x,
    theta,
    start,
    grad,
    grad_x,
    grad_theta,
    grad_start,
    size,
    columns,
    x_step,
    T,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_differentiate`; `grad_x` holds the membrane potentials until the way back fills it."""
    blocks = (columns + BLOCK - 1) // BLOCK
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * columns + column
    inside = column < columns
    threshold = tl.load(theta + column, mask=inside)
    v = tl.load(start + column, mask=inside)
    for _ in range(T):
        v = (v + tl.load(x + at, mask=inside)).to(threshold.dtype)
        tl.store(grad_x + at, v, mask=inside)
        spikes = tl.where(v >= threshold, threshold, 0.0)
        if SIGNED:
            spikes = tl.where(v < 0.0, -threshold, spikes)
        v -= tl.where(v == v, spikes, v)
        x += x_step
        grad += size
        grad_x += size
    tl.debug_barrier()  # a thread may read back what another one of its program wrote
    grad_v, grad_here = threshold * 0.0, threshold * 0.0
    for _ in range(T):
        grad -= size
        grad_x -= size
        v = tl.load(grad_x + at, mask=inside)
        u = v - threshold
        grad_emitted = (tl.load(grad + at, mask=inside) - grad_v).to(threshold.dtype)
        upper = tl.where(tl.abs(u) > 1.0, 0.0, 1.0 - tl.abs(u)) * grad_emitted * threshold
        grad_here += tl.where(v >= threshold, grad_emitted, 0.0) - upper
        grad_v += upper
        if SIGNED:
            grad_here -= tl.where(v < 0.0, grad_emitted, 0.0)
            grad_v += tl.where(tl.abs(v) > 1.0, 0.0, 1.0 - tl.abs(v)) * grad_emitted * threshold
        tl.store(grad_x + at, grad_v, mask=inside)
    tl.store(grad_theta + at, grad_here, mask=inside)
    tl.store(grad_start + at, grad_v, mask=inside)


def _divide(a, b):
    """Rounded to nearest, as PyTorch does; `/` is not, in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


def _encode_kernel(
    x,
    theta,
    potential,
    levels,
    between,
    grad,
    emitted,
    grad_theta,
    grad_potential,
    grad_base,
    columns,
    theta_rows,
    theta_width,
    potential_rows,
    potential_width,
    most,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `most` levels make of a row's `BLOCK` inputs, or the `levels` of a first spike; with `grad` its gradients.

    Written to `emitted`, or the input's there, the others' to where they are asked for: one an element, to be summed.
    """
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    at_theta = row % theta_rows * theta_width + tl.minimum(column, theta_width - 1)
    threshold = tl.load(theta + at_theta, mask=inside, other=1.0)
    z = divide(tl.load(x + at, mask=inside).to(threshold.dtype), threshold)
    zero = (column * 0).to(threshold.dtype)
    top = zero + most
    if levels is not None:
        level, left = zero, zero
        size = tl.where(z < 0.0, -z if SIGNED else 0.0, z)
        for t in range(most):
            reached = size >= tl.load(between + t)
            level = tl.where(reached, tl.load(levels + t + 1), level)
            left += reached.to(threshold.dtype)
        if SIGNED:
            level *= (z > 0.0).to(threshold.dtype) - (z < 0.0).to(threshold.dtype)
        level = tl.where(z == z, level, z)  # NaN stays NaN
    else:
        if potential is None:
            level = tl.floor(z * top + 0.5)
        else:
            at_potential = row % potential_rows * potential_width + tl.minimum(column, potential_width - 1)
            start = tl.load(potential + at_potential, mask=inside)
            reached = z * top + start
            level = tl.floor(reached)
            level = tl.where(level > reached, level - 1.0, level)  # a GPU's floor takes -1e-40 for 0
            if not SIGNED:
                level = tl.where((start > 1.0) & (z < 0.0), tl.floor(divide(start, 1.0 - z)), level)
                late = top + 1.0 - tl.ceil(divide(1.0 - start, z))
                level = tl.where((start < 0.0) & (z > 1.0), late, level)
        level = tl.where(level > top, top, level)
        level = divide(tl.where(level < (-top if SIGNED else 0.0), -top if SIGNED else 0.0, level), top)
    if grad is None:
        tl.store(emitted + at, level * threshold, mask=inside)
    else:
        upstream = tl.load(grad + at, mask=inside).to(threshold.dtype)
        within = ((z <= 1.0) & (z >= (-1.0 if SIGNED else 0.0))).to(threshold.dtype) * upstream
        tl.store(emitted + at, within, mask=inside)
        if grad_theta is not None:
            tl.store(grad_theta + at, level * upstream - z * within, mask=inside)
        if grad_potential is not None:
            tl.store(grad_potential + at, within * divide(threshold, top), mask=inside)
        if grad_base is not None:
            tl.store(grad_base + at, (left - top) * level * threshold * upstream, mask=inside)


@functools.cache
def kernels() -> dict[str, Any]:
    """The kernels by name; none where Triton is missing."""
    global tl, divide
    try:
        import triton
        from triton import language as tl
    except ImportError:
        return {}
    divide = triton.jit(_divide)
    made = {"fire": _fire_kernel, "differentiate": _differentiate_kernel, "encode": _encode_kernel}
    return {name: triton.jit(kernel) for name, kernel in made.items()}


def _run(name: str, rows: int, columns: int, x: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on rows of neurons, in blocks of columns; PyTorch rounds products and sums apart, so do kernels."""
    block = min(1024, 1 << (columns - 1).bit_length())
    with torch.cuda.device_of(x):
        kernels()[name][rows * -(-columns // block),](x, *args, **constants, BLOCK=block, enable_fp_fusion=False)


def _step(name: str, T: int, signed: bool, x, theta, start, *tensors) -> None:
    """Run T steps on all rows of neurons, between which thresholds do not differ."""
    theta, start = theta.expand(x.shape[1:]), start.expand(x.shape[1:])
    while theta.dim() > 1 and theta.stride(0) == start.stride(0) == 0:
        theta, start = theta[0], start[0]
    size, columns = x[0].numel(), theta.numel()
    tensors = tuple(each.contiguous() for each in (x, theta, start, *tensors))
    steps = size, columns, size * (len(x) > 1), T
    _run(name, size // columns, columns, *tensors, *steps, SIGNED=signed)


def fire_by_kernel(x, theta, start, emitted, signed) -> None:
    _step("fire", len(emitted), signed, x, theta, start, emitted)


def differentiate_by_kernel(x, theta, start, grad, signed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = theta.new_empty(grad.shape)
    grad_theta, grad_start = theta.new_empty((2, *x.shape[1:]))
    _step("differentiate", len(grad), signed, x, theta, start, grad, grad_x, grad_theta, grad_start)
    if len(x) == 1:
        grad_x = grad_x.sum(0, keepdim=True)
    return grad_x, grad_theta.sum_to_size(theta.shape), grad_start.sum_to_size(start.shape)


def encode_by_kernel(x, theta, potential, table, most: int, signed: bool, grad=None, needs=(False,) * 3) -> list[Any]:
    """What is emitted; with `grad` the gradient of x, and of threshold, potential, base where needed, not yet summed.

    Args:
        table (`tuple`): levels of a first spike and what is between them, or `(None, None)`.
        most (`int`): levels above zero; of a first spike its timesteps.
    """
    columns = x.shape[-1] if x.dim() else 1
    made = [x.new_empty(x.shape), *(theta.new_empty(x.shape) if need else None for need in needs)]
    theta, *theta_shape = _repeated(theta, x.shape)
    potential, *potential_shape = (None, 1, 1) if potential is None else _repeated(potential, x.shape)
    tensors = x.contiguous(), theta, potential, *table, None if grad is None else grad.contiguous(), *made
    sizes = columns, *theta_shape, *potential_shape, most
    _run("encode", x.numel() // columns, columns, *tensors, *sizes, SIGNED=signed)
    return made


def _repeated(parameter: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int, int]:
    """A parameter, contiguous, how many rows of it repeat along the rows of a shape, and their width: D or 1."""
    whole = parameter.expand(shape)
    while parameter.dim() > 1 and len(parameter) == 1:
        parameter = parameter[0]
    if parameter.dim() > 1 and parameter.shape[:-1] != shape[-parameter.dim() : -1]:
        parameter = whole
    width = parameter.shape[-1] if parameter.dim() else 1
    return parameter.contiguous(), parameter.numel() // width, width
