"""The fast neurons against a plain loop with ordinary autograd: equal spikes, equal gradients."""

import pytest
import torch

import naive
import neurons_fas
from neurons_fas import integrate_and_fire, qcfs, spike_rate


B, S, D, L = 3, 7, 10, 6
SHAPES = {"layer": (1,), "neuron": (D,), "position": (S, D)}


class PlainFloor(torch.autograd.Function):
    """Floor with its gradient passed straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.floor()

    @staticmethod
    def backward(ctx, grad):
        return grad


def plain_integrate_and_fire(x, threshold, initial_potential, T):
    state = torch.promote_types(x.dtype, torch.float32)
    return naive.fire(x.to(state), threshold.to(state), initial_potential.to(state), T).to(x.dtype)


def plain_qcfs(x, threshold, levels):
    state = torch.promote_types(x.dtype, torch.float32)
    theta = threshold.to(state)
    return (PlainFloor.apply((x.to(state) / theta).clamp(0, 1) * levels + 0.5) / levels * theta).to(x.dtype)


@pytest.fixture(params=[1 << 16, 40], ids=["one_block", "blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(neurons_fas, "BLOCK_SIZE", request.param)
    return request.param


def inputs(granularity, dtype, steps, *, wide_start=False, seed=0):
    """Input of `(steps, B, S, D)`, threshold and initial potential, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.8 * torch.randn(steps, B, S, D, generator=generator) + 0.2
    threshold = 0.4 + torch.rand(SHAPES[granularity], generator=generator)
    potential = torch.rand(SHAPES[granularity], generator=generator)
    if wide_start:
        potential = 4 * potential - 1.5
    return [each.to(dtype).requires_grad_() for each in (x, threshold, potential)]


def gradients(output, arguments, seed=1):
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(output.shape, generator=generator).to(output.dtype)
    return torch.autograd.grad(output, arguments, upstream)


def assert_gradients_close(actual, expected, dtype):
    """Sums of up to a thousand terms of either sign, in another order; float64 shows the formulas to be the same."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("wide_start", [False, True], ids=["start_inside", "start_anywhere"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", SHAPES)
def test_integrate_and_fire_equals_the_plain_loop(granularity, dtype, constant, wide_start, block_size):
    T = 5
    arguments = inputs(granularity, dtype, 1 if constant else T, wide_start=wide_start)
    ours = integrate_and_fire(*arguments, T)
    plain = plain_integrate_and_fire(*arguments, T)
    assert 0.05 < plain.ne(0).float().mean() < 0.95
    assert ours.dtype == dtype
    assert torch.equal(ours, plain)
    assert_gradients_close(gradients(ours, arguments), gradients(plain, arguments), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", SHAPES)
def test_qcfs_equals_its_definition(granularity, dtype, block_size):
    x, threshold, _ = inputs(granularity, dtype, 1)
    ours, plain = qcfs(x, threshold, L), plain_qcfs(x, threshold, L)
    assert torch.equal(ours, plain)
    assert_gradients_close(gradients(ours, [x, threshold]), gradients(plain, [x, threshold]), dtype)


@pytest.mark.parametrize("wide_start", [False, True], ids=["start_inside", "start_anywhere"])
@pytest.mark.parametrize("granularity", SHAPES)
def test_spike_rate_counts_as_the_plain_loop(granularity, wide_start, block_size):
    T = 6
    x, threshold, potential = inputs(granularity, torch.float64, 1, wide_start=wide_start)
    ours = spike_rate(x[0], threshold, potential, T)
    plain = plain_integrate_and_fire(x, threshold, potential, T).mean(0)
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("granularity", SHAPES)
def test_spike_rate_gradients(granularity, block_size):
    T = 6
    arguments = inputs(granularity, torch.float64, 1)
    x, threshold, potential = arguments
    z = x / threshold
    plain = threshold * PlainFloor.apply(z.clamp(0, 1) * T + potential).clamp(0, T) / T
    ours = spike_rate(*arguments, T)
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)
    # The start counts where the input is inside the range, however far the start alone carries the count.
    inside = ((z >= 0) & (z <= 1)).double()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected_x = upstream * inside
    expected_threshold = (upstream * (ours / threshold - inside * z)).sum_to_size(threshold.shape)
    expected_potential = (upstream * inside * threshold / T).sum_to_size(potential.shape)
    actual = torch.autograd.grad(ours, arguments, upstream)
    assert_gradients_close(actual, (expected_x, expected_threshold, expected_potential), torch.float64)


@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_equals_qcfs_bit_for_bit(T, dtype, block_size):
    x, threshold, _ = inputs("neuron", dtype, 1)
    assert torch.equal(spike_rate(x, threshold, None, T), qcfs(x, threshold, T))
    assert torch.equal(spike_rate(x, threshold, torch.full_like(threshold, 0.5), T), qcfs(x, threshold, T))


def test_ties_fire():
    """At exact multiples the comparison is `>=` and rounding goes up, in float arithmetic as in bool."""
    theta = torch.tensor([0.5])
    x = torch.tensor([[[0.25, 0.2499, -0.0, 0.5]]]).expand(2, 1, 4)
    assert integrate_and_fire(x, theta, torch.tensor([0.5]), 2).ne(0).tolist() == [
        [[True, False, False, True]],
        [[False, True, False, True]],
    ]
    assert qcfs(torch.tensor([0.125, 0.375, 0.5, 9.0, -1.0]), theta, 2).tolist() == [0.25, 0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("shape", [(), (D,), (B, D), (B, 1, D), (B, 2, S, D)], ids=str)
def test_any_shape_of_input(shape, block_size):
    T = 3
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    threshold = torch.tensor([0.6] if shape else 0.6, dtype=torch.float64, requires_grad=True)
    potential = torch.full_like(threshold, 0.3).requires_grad_()
    arguments = [x, threshold, potential]
    ours, plain = integrate_and_fire(*arguments, T), plain_integrate_and_fire(*arguments, T)
    assert torch.equal(ours, plain)
    assert_gradients_close(gradients(ours, arguments), gradients(plain, arguments), torch.float64)
    assert_gradients_close(
        gradients(qcfs(x, threshold, L), [x, threshold]),
        gradients(plain_qcfs(x, threshold, L), [x, threshold]),
        x.dtype,
    )


def test_input_that_is_not_contiguous(block_size):
    T = 4
    x, threshold, potential = inputs("neuron", torch.float32, T)
    turned = x.transpose(1, 2)
    assert torch.equal(
        integrate_and_fire(turned, threshold, potential, T),
        integrate_and_fire(turned.contiguous(), threshold, potential, T),
    )
    assert torch.equal(qcfs(turned, threshold, L), qcfs(turned.contiguous(), threshold, L))


def test_bfloat16_counts_equal_float32_ones():
    T = 8
    x, threshold, potential = inputs("neuron", torch.bfloat16, T)
    half = integrate_and_fire(x, threshold, potential, T)
    full = integrate_and_fire(x.float(), threshold.float(), potential.float(), T)
    assert torch.equal(half.ne(0), full.ne(0))


def saved_for_backward(function, x):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.__setitem__(tensor.untyped_storage().data_ptr(), tensor) or tensor, lambda tensor: tensor
    ):
        function(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("granularity", SHAPES)
def test_training_keeps_no_more_than_gelu(granularity):
    x, threshold, potential = inputs(granularity, torch.float32, 4)
    parameters = threshold.nbytes + potential.nbytes
    gelu = saved_for_backward(torch.nn.functional.gelu, x)
    assert gelu == x.nbytes
    assert saved_for_backward(lambda x: qcfs(x, threshold, L), x) <= gelu + parameters
    assert saved_for_backward(lambda x: spike_rate(x, threshold, potential, L), x) <= gelu + parameters
    assert saved_for_backward(lambda x: integrate_and_fire(x, threshold, potential, 4), x) <= gelu + parameters
