"""The bare neuron: identities at exact boundaries, closed form against the loop, state and precision."""

import pytest
import torch

import naive
import tiny
from configuration_fas import Site
from neurons_fas import integrate_and_fire, qcfs, spike_rate
from sites_fas import FASNeuron


THRESHOLDS = [0.1, 0.5, 1.0, 1.3, 2.7]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_constant_input_for_T_equals_L_steps_fires_the_qcfs_level(threshold):
    # 16 × 5 × 131,072 = 10.5 million inputs; float64, so that the loop's own rounding decides no tie.
    x = torch.randn(131_072, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * threshold * 1.5
    theta, half = torch.tensor([threshold], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    for L in range(1, 17):
        levels = (qcfs(x, theta, L) / theta * L).round()
        spikes = (integrate_and_fire(x[None], theta, half, L) > 0).sum(0)
        assert torch.equal(levels, spikes.double()), L
        assert torch.equal(spike_rate(x.float(), theta.float(), None, L), qcfs(x.float(), theta.float(), L)), L


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_round_up_and_equality_fires(dtype):
    # Powers of two, so that every value is exact: θ = 2, L = 4, steps of 1/2.
    theta = torch.tensor([2.0], dtype=dtype)
    x = torch.tensor([-1.0, 0.0, 0.2490, 0.25, 0.75, 1.75, 2.0, 9.0], dtype=dtype)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 2.0, 2.0], dtype=dtype)
    assert torch.equal(qcfs(x, theta, 4), expected)
    steps = torch.tensor([[1.0], [-1.0], [3.0]], dtype=dtype)
    emitted = integrate_and_fire(steps, theta, torch.tensor([0.5], dtype=dtype), 3)
    assert torch.equal(emitted, torch.tensor([[2.0], [0.0], [2.0]], dtype=dtype))


@pytest.mark.parametrize("T", [1, 3, 8])
def test_closed_form_counts_what_the_loop_fires_from_any_start(T):
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(4096, 8, dtype=torch.float64, generator=generator) * 2
    theta = torch.rand(8, dtype=torch.float64, generator=generator) + 0.5
    start = torch.linspace(-2, 3, 8, dtype=torch.float64)
    looped = naive.fire(x[None], theta, start, T).mean(0)
    torch.testing.assert_close(spike_rate(x, theta, start, T), looped, atol=1e-12, rtol=0)


def test_gradient_of_the_closed_form_is_straight_through():
    x = torch.tensor([-0.3, 0.0, 0.3, 1.0, 1.7], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    spike_rate(x, theta, start, 4).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    # level / T - m·z: 0, 0, 1/4 - 0.3, 1 - 1, 1 - 0
    torch.testing.assert_close(theta.grad, torch.tensor([0.95], dtype=torch.float64))
    torch.testing.assert_close(start.grad, torch.tensor([0.75], dtype=torch.float64))


def test_membrane_state_is_float32_for_bfloat16_inputs():
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    theta, half = torch.tensor([1.3]).bfloat16(), torch.tensor([0.5]).bfloat16()
    low = integrate_and_fire(x, theta, half, 8)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low > 0, integrate_and_fire(x.float(), theta.float(), half.float(), 8) > 0)
    rate = spike_rate(x, theta, None, 8)
    assert rate.dtype == torch.bfloat16
    assert torch.equal(rate, spike_rate(x.float(), theta.float(), None, 8).bfloat16())


def test_a_threshold_that_left_the_positive_range_counts_as_the_least_one_and_can_come_back():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    theta = torch.tensor([-0.5], requires_grad=True)
    y = qcfs(x, theta, 4)
    assert y.tolist() == pytest.approx([0.0, 1e-4])
    y.sum().backward()
    assert theta.grad.item() == pytest.approx(1.0)


def test_timesteps_of_the_input_are_checked():
    with pytest.raises(ValueError, match="`x` must hold 1 or `T` = 4 timesteps"):
        integrate_and_fire(torch.zeros(3, 2), torch.ones(1), torch.ones(1), 4)


@pytest.mark.parametrize("granularity, shape", [("layer", (1,)), ("neuron", (6,)), ("position", (5, 6))])
def test_fine_thresholds_start_where_the_threshold_is(granularity, shape):
    neuron = FASNeuron(tiny.config("gpt2", T=4), 6)
    x = torch.randn(8, 5, 6)
    before = neuron(x)
    neuron.refine(granularity, 5)
    assert neuron.fine_threshold.shape == neuron.initial_potential.shape == shape
    assert torch.equal(neuron(x), before)


def test_no_state_survives_a_call():
    neuron = FASNeuron(tiny.config("gpt2", T=4), 6)
    x = torch.randn(8, 5, 6)
    assert torch.equal(neuron(x), neuron(x))
    assert not list(neuron.buffers())
    assert {name for name, value in vars(neuron).items() if isinstance(value, torch.Tensor)} == set()


def test_a_signed_neuron_fires_up_at_the_threshold_and_down_below_zero():
    x, theta = torch.tensor([0.5, -0.5, 0.0, 1.0, -0.75]), torch.ones(1)
    emitted = integrate_and_fire(x[None], theta, theta / 2, 2, signed=True)
    assert emitted.tolist() == [[1, 0, 0, 1, -1], [0, -1, 0, 1, 0]]
    assert torch.equal(spike_rate(x, theta, None, 2, signed=True), emitted.mean(0))


def test_a_gain_by_token_ends_the_range_at_the_largest_input_of_the_token():
    settings = {"sites": "linear", "activation": "stock", "L": None, "code": "phase", "T": 6, "gain": "token"}
    neuron = FASNeuron(tiny.config("gpt2", schedule="layerwise", **settings), 5, Site("", at="input", signed=True))
    x = torch.randn(2, 3, 5) * torch.tensor([0.1, 1.0, 40.0])[:, None]
    emitted, largest = neuron(x), x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(emitted.abs().amax(-1, keepdim=True), largest)
    assert ((emitted - x).abs() <= largest / 63 / 2 * (1 + 1e-5)).all()
