"""The three codes: closed form, spikes step by step, and the quantiser that each is, equal to the last bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import neurons_fas
from neurons_fas import encode, first_spike_levels, qcfs, spike_count, spike_train


CODES = ["rate", "phase", "first_spike"]
THRESHOLDS = [1.0, 0.7, 1.3, 3e-3, 41.0]


def values(T, code, threshold, base=2**0.5):
    """Random inputs, beyond the range as well, and the points between levels, with their neighbours."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(T)) * threshold
    if code == "first_spike":
        levels = torch.tensor([0.0] + [base**-t for t in range(T - 1, -1, -1)])
        ties = (levels[1:] + levels[:-1]) / 2 * threshold
    else:
        L = T if code == "rate" else 2**T - 1
        ties = (torch.arange(min(L, 1000)) + 0.5) / L * threshold
    ties = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)])
    return torch.cat([x, ties, -ties, torch.tensor([0.0, threshold, -threshold, 100 * threshold, -100 * threshold])])


def weights(T, code, base=2**0.5):
    if code == "rate":
        return torch.ones(T) / T
    if code == "phase":
        return 2.0 ** torch.arange(T - 1, -1, -1)
    return torch.tensor(base) ** -torch.arange(T, dtype=torch.float32)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("code", ["phase", "first_spike"])
def test_closed_form_equals_the_spikes_step_by_step(code, T, signed):
    for threshold in THRESHOLDS:
        x, theta = values(T, code, threshold), torch.tensor([threshold])
        spikes = spike_train(x, theta, T, code, signed=signed)
        assert set(spikes.unique().tolist()) <= ({-1, 0, 1} if signed else {0, 1})
        total = (spikes * weights(T, code)[:, None]).sum(0)
        total = total / (2**T - 1) if code == "phase" else total
        closed = encode(x, theta, T, code, signed=signed)
        assert torch.equal(total * theta, closed)
        assert torch.equal(spike_count(closed, theta, T, code), spikes.abs().sum(0))
        if code == "first_spike":
            assert spikes.abs().sum(0).max() == 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("T", [1, 2, 4, 8, 16, 32])
def test_a_rate_equals_its_spikes_in_float64(T, signed):
    for threshold in THRESHOLDS:
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(T), dtype=torch.float64) * threshold
        theta = torch.tensor([threshold], dtype=torch.float64)
        spikes = spike_train(x, theta, T, "rate", signed=signed)
        closed = encode(x, theta, T, "rate", signed=signed)
        assert torch.equal(spikes.sum(0) / T * theta, closed)
        assert torch.equal(spike_count(closed, theta, T, "rate"), spikes.abs().sum(0))


@pytest.mark.parametrize("signed", [True, False])
def test_phase_and_rate_are_uniform_quantisers(signed):
    x, theta = values(5, "phase", 0.7), torch.tensor([0.7])
    for T in (1, 3, 5):
        assert torch.equal(encode(x, theta, T, "rate", signed=signed), qcfs(x, theta, T, signed))
        assert torch.equal(encode(x, theta, T, "phase", signed=signed), qcfs(x, theta, 2**T - 1, signed))
    least = -0.7 if signed else 0.0
    nearest = encode(x, theta, 5, "phase", signed=signed)
    assert (nearest - x.clamp(least, 0.7)).abs().max() <= 0.7 / 31 / 2 * (1 + 1e-5)


@pytest.mark.parametrize("base, T", [(2**0.5, 8), (1.2, 16), (2.0, 4)])
def test_a_first_spike_is_the_nearest_power_of_the_base(base, T):
    x, theta = values(T, "first_spike", 1.3, base), torch.tensor([1.3])
    levels = torch.tensor([0.0] + [1.3 * base**-t for t in range(T)])
    levels = torch.cat([levels, -levels])
    emitted = encode(x, theta, T, "first_spike", base)
    nearest = (x.clamp(-1.3, 1.3)[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((x.clamp(-1.3, 1.3) - emitted).abs(), nearest, atol=3e-7, rtol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [1.0001, 1.01, 1.2, 2**0.5, 2.0, 8.0])
def test_a_first_spike_by_logarithm_or_compiled_is_that_by_search(base, dtype, signed, monkeypatch):
    """At every tie, beside it, at the ends of the numbers, and between."""
    for T in (1, 2, 3, 16, 31, 32):
        levels, between = first_spike_levels(T, base, torch.zeros((), dtype=dtype))
        z = torch.cat([between, levels, torch.logspace(-9, 2, 500, dtype=dtype)])
        z = torch.cat([z, z.nextafter(z * 2), z.nextafter(z * 0), z.new_tensor([5e-324, 1e-40, torch.inf, torch.nan])])
        z = torch.cat([z, -z])
        found = []
        for searched in (1 << 30, 0):
            monkeypatch.setattr(neurons_fas, "SEARCHED", searched)
            found.append(neurons_fas._first_spike(z, T, signed, base))
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
            found.append(neurons_fas._first_spike(z, T, signed, base))
        number = ~z.isnan()
        reached = torch.where(((z > 0) | signed) & (z.abs() >= between[0]), z.abs(), 0)  # by a plain count
        plain = levels[(reached[:, None] >= between).sum(1)] * z.sign()
        for level in found:
            torch.testing.assert_close(level, torch.where(z.isnan(), z, plain), rtol=0, atol=0, equal_nan=True)
            assert not signed or torch.equal(level.signbit()[number], plain.signbit()[number])


@torch.no_grad()
def test_a_compiled_first_spike_takes_other_timesteps_and_bases():
    """From the second call on, a compiler makes variables of them."""
    torch._dynamo.reset()
    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    x, theta = torch.linspace(-2, 2, 99), torch.tensor([0.7])
    for T, base in ((4, 1.2), (4, 1.3), (8, 1.3), (6, 1.4), (3, torch.tensor(1.5))):
        assert torch.equal(compiled(x, theta, T, "first_spike", base), encode(x, theta, T, "first_spike", base))


@pytest.mark.parametrize("base", [1.3, torch.tensor(1.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("code", CODES)
def test_without_a_gradient_the_answer_is_the_same(code, dtype, base):
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    theta = torch.linspace(0.3, 2, 40, dtype=dtype).requires_grad_()
    for each, T in ((x, 4), (x, 16), (x[:1], 4)):
        learns = encode(each, theta, T, code, base)
        assert learns.requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = encode(each, theta, T, code, base)
            assert found.dtype == dtype and not found.requires_grad and torch.equal(found, learns)


@pytest.mark.parametrize("code", CODES)
def test_nan_stays_nan_and_half_precision_counts_as_float32(code):
    x = torch.tensor([float("nan"), 0.3, -0.4])
    emitted = encode(x, torch.ones(1), 4, code)
    assert emitted.isnan().tolist() == [True, False, False]
    low = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    theta = torch.tensor([1.3]).bfloat16()
    assert torch.equal(encode(low, theta, 8, code), encode(low.float(), theta.float(), 8, code).bfloat16())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("code", CODES)
def test_gradients_are_straight_through(code, signed):
    """d/dx is 1 inside the range; d/dθ is level - z inside, the level outside (learned step size quantisation)."""
    torch.manual_seed(0)
    x = (2 * torch.randn(64, 6, dtype=torch.float64)).requires_grad_()
    theta = torch.rand(6, dtype=torch.float64).add(0.5).requires_grad_()
    base = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 6, dtype=torch.float64)
    (encode(x, theta, 4, code, base, signed) * weight).sum().backward()
    z = (x / theta).detach()
    level = encode(x, theta, 4, code, base, signed).detach() / theta.detach()
    inside = (z <= 1) & (z >= (-1 if signed else 0))
    torch.testing.assert_close(x.grad, weight * inside)
    torch.testing.assert_close(theta.grad, (weight * (level - z * inside)).sum(0))
    if code == "first_spike":
        b = base.detach().clone().requires_grad_()
        steps = (-(level.abs().clamp(min=1e-9).log() / base.detach().log())).round().clamp(max=3)
        emitted = torch.where(level == 0, level, level.sign() * b**-steps) * theta.detach()
        (emitted * weight).sum().backward()
        torch.testing.assert_close(base.grad, b.grad)
    else:
        assert base.grad is None  # no code but a first spike has one


class Divisors(TorchDispatchMode):
    """What tensors are divided by."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.found.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("code", CODES)
def test_values_are_divided_as_on_a_gpu(code):
    """PyTorch divides by a number through its reciprocal there, so that levels would differ from those of a CPU."""
    with Divisors() as divisors:
        encode(torch.randn(4, 6), torch.ones(6), 3, code)
    assert divisors.found
    halves = {2} if code == "first_spike" else set()  # exact either way
    assert {each for each in divisors.found if not isinstance(each, torch.Tensor)} <= halves
