"""The Triton kernels against the plain loop: on CPU tensors by Triton's interpreter, compiled where there is a GPU."""

import sys

import pytest
import torch

import neurons_fas
import test_goldens
import test_neuron
import test_neuron_fast
import tiny
from neurons_fas import integrate_and_fire
from test_neuron_fast import assert_gradients_close, gradients, plain_integrate_and_fire


B, S, D = 2, 3, 5
SHAPES = {"layer": (1,), "neuron": (D,), "position": (S, D)}
STEPS = (1, 2, 4, 8, 16)


@pytest.fixture
def triton():
    """Triton, which comes with PyTorch for CUDA; else `pip install triton` (690 MB, so in no extra of ours)."""
    yield pytest.importorskip("triton", reason="needs Triton: `pip install triton`")
    neurons_fas._kernels.cache_clear()


@pytest.fixture
def launched(triton, monkeypatch):
    """Runs every neuron by the kernels, interpreted; the numbers of those that ran."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    neurons_fas._kernels.cache_clear()
    launch, numbers = neurons_fas._launch, []
    monkeypatch.setattr(neurons_fas, "_launch", lambda *args: (numbers.append(args[0]), launch(*args)))
    monkeypatch.setattr(neurons_fas, "_has_kernels", lambda x: True)
    return numbers


def inputs(shape, parameters, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = 0.8 * torch.randn(shape, generator=generator) + 0.2
    threshold = 0.4 + torch.rand(parameters, generator=generator)
    potential = 2 * torch.rand(parameters, generator=generator) - 0.5
    return [each.to(device, dtype).requires_grad_() for each in (x, threshold, potential)]


def assert_equal_to_the_plain_loop(arguments, T):
    dtype = arguments[0].dtype
    ours, plain = integrate_and_fire(*arguments, T), plain_integrate_and_fire(*arguments, T)
    assert plain.ne(0).any() and plain.eq(0).any()
    assert ours.dtype == dtype
    assert torch.equal(ours, plain)
    assert_gradients_close(gradients(ours, arguments), gradients(plain, arguments), dtype)


@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("T", STEPS)
def test_kernels_equal_the_plain_loop(T, granularity, constant, launched):
    assert_equal_to_the_plain_loop(inputs((1 if constant else T, B, S, D), SHAPES[granularity]), T)
    assert launched == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", SHAPES)
def test_kernels_in_every_precision(granularity, dtype, launched):
    assert_equal_to_the_plain_loop(inputs((4, B, S, D), SHAPES[granularity], dtype), 4)
    assert launched == [0, 1]


@pytest.mark.parametrize(
    "shape, parameters",
    [((2, 1030), (1,)), ((2, 2, 1030), (1030,)), ((2, 2, 3, 700), (3, 700)), ((2, 2, 2048), (2048,))],
    ids=str,
)
def test_kernels_over_several_blocks(shape, parameters, launched):
    assert_equal_to_the_plain_loop(inputs(shape, parameters), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_at_exact_ties(dtype, launched):
    # Multiples of 1/4: every sum is exact, and many are the threshold or a distance of 1 from it.
    x = (torch.randint(-4, 5, (4, B, S, D), generator=torch.Generator().manual_seed(0)) / 4).to(dtype).requires_grad_()
    threshold, potential = (torch.full((1,), 0.5, dtype=dtype, requires_grad=True) for _ in range(2))
    membrane = 0.25 + x.detach()[0]
    assert (membrane == 0.5).any() and (membrane == -0.5).any()
    assert_equal_to_the_plain_loop([x, threshold, potential], 4)


def test_kernels_keep_their_state_in_float32(launched):
    test_neuron.test_membrane_state_is_float32_for_bfloat16_inputs()
    assert launched == [0, 0]


def test_parameters_in_float32_beside_an_input_in_bfloat16(launched):
    x, _, _ = inputs((4, B, S, D), (D,), torch.bfloat16)
    _, *parameters = inputs((4, B, S, D), (D,))
    ours, plain = (function(x, *parameters, 4) for function in (integrate_and_fire, plain_integrate_and_fire))
    assert torch.equal(ours.ne(0), plain.ne(0))
    torch.testing.assert_close(ours, plain, atol=0, rtol=2**-7)  # where a GPU rounds, the interpreter cuts off
    assert_gradients_close(gradients(ours, [x, *parameters]), gradients(plain, [x, *parameters]), torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (D,), (B, D), (B, 1, D)], ids=str)
def test_kernels_take_any_shape(shape, launched):
    test_neuron_fast.test_any_shape_of_input(shape, None)


def test_kernels_take_what_is_not_contiguous(launched):
    x, threshold, potential = inputs((4, B, S, D), (D,))
    turned, arguments = x.transpose(1, 2), [x, threshold, potential]
    ours = integrate_and_fire(turned, threshold, potential, 4)
    plain = plain_integrate_and_fire(turned, threshold, potential, 4)
    assert torch.equal(ours, plain)
    # The gradient of a sum is one number, expanded.
    assert_gradients_close(
        torch.autograd.grad(ours.sum(), arguments), torch.autograd.grad(plain.sum(), arguments), x.dtype
    )


@pytest.mark.parametrize("case", range(6))
def test_kernels_equal_the_golden_neuron(case, launched):
    test_goldens.test_integrate_and_fire_neuron(case)
    assert launched == [0, 1]


@pytest.mark.parametrize("case", ["random", "exact"])
def test_kernels_equal_the_golden_positional_neuron(case, launched):
    test_goldens.test_positional_neuron(case)
    assert launched == [0, 1] * 3


INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(sys.argv[2])
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
sites = sys.modules[type(model.neurons()[0][1]).__module__]
code = sys.modules[sites.integrate_and_fire.__module__]
ids = torch.arange(6)[None]
expected = model(ids, labels=ids)
expected.loss.backward()
gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
model.zero_grad()
launch, launched = code._launch, []
code._launch = lambda *args: (launched.append(args[0]), launch(*args))
code._has_kernels = lambda x: True
output = model(ids, labels=ids)
output.loss.backward()
assert launched == [0, 0, 0, 1, 1, 1], launched
assert torch.equal(output.logits, expected.logits)
assert sum("fine_threshold" in name for name in gradients) == 3
for name, gradient in gradients.items():
    torch.testing.assert_close(model.get_parameter(name).grad, gradient)
"""


def test_kernels_run_in_remote_code(triton, tmp_path, run_outside):
    tiny.model("gpt2", T=2).begin_calibration(2).save_pretrained(tmp_path / "model")
    run_outside(["-c", INTERPRETED, str(tmp_path / "model"), triton.__path__[0].rpartition("/")[0]])


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_for_a_gpu(dtype, signed, triton, monkeypatch, tmp_path):
    """The interpreter takes what the compiler refuses; the compiler needs no GPU. No spike is rounded otherwise there:
    nothing that a comparison sees is a fused product and sum, or a quotient."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(neurons_fas, "tl", triton.language)
    low = {"x", "grad", "emitted"}
    for kernel in (neurons_fas._fire_kernel, neurons_fas._differentiate_kernel):
        function = triton.jit(kernel)
        kinds = dict.fromkeys(("size", "columns", "x_step", "T"), "i32")
        kinds |= dict.fromkeys(("SIGNED", "BLOCK"), "constexpr")
        signature = {name: kinds.get(name, f"*{dtype if name in low else 'fp32'}") for name in function.arg_names}
        constants = {(len(signature) - 2,): signed, (len(signature) - 1,): 1024}
        made = triton.compile(
            triton.compiler.ASTSource(function, signature, constants), target=GPUTarget("cuda", 80, 32)
        )
        assert made.asm["cubin"] and "div." not in made.asm["ptx"].replace("div.s", "").replace("div.u", "")
        assert kernel is neurons_fas._differentiate_kernel or "fma" not in made.asm["ptx"]


def test_triton_that_does_not_run_is_not_needed(triton, monkeypatch, caplog):
    def broken(x, theta, start, emitted, size, columns, x_step, T, BLOCK):
        raise NotImplementedError

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(neurons_fas, "_fire_kernel", broken)
    monkeypatch.setattr(neurons_fas.logger, "propagate", True)
    neurons_fas._kernels.cache_clear()
    assert neurons_fas._kernels(torch.device("cpu"), torch.float32) == ()
    assert "Triton is installed but does not run" in caplog.text


def test_kernels_with_other_spikes_are_not_taken(triton, monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(neurons_fas.logger, "propagate", True)
    neurons_fas._kernels.cache_clear()
    assert len(neurons_fas._kernels(torch.device("cpu"), torch.float32)) == 2
    monkeypatch.setattr(neurons_fas, "_fire", lambda x, theta, start, emitted, signed: emitted.fill_(1.0))
    neurons_fas._kernels.cache_clear()
    assert neurons_fas._kernels(torch.device("cpu"), torch.float32) == ()
    assert "not those of the plain loop" in caplog.text


def test_triton_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # `import triton` raises ImportError
    neurons_fas._kernels.cache_clear()
    assert neurons_fas._kernels(torch.device("cuda"), torch.float32) == ()
    neurons_fas._kernels.cache_clear()


def test_triton_is_not_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(neurons_fas, "_kernels", lambda *args: pytest.fail("looked for Triton"))
    assert_equal_to_the_plain_loop(inputs((4, B, S, D), (D,)), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("T", STEPS)
def test_compiled_kernels_equal_the_plain_loop(T, granularity, constant, dtype, triton):
    for width in (D, 3072):
        parameters = (*SHAPES[granularity][:-1], 1 if granularity == "layer" else width)
        arguments = inputs((1 if constant else T, B, S, width), parameters, dtype, "cuda")
        assert neurons_fas._has_kernels(arguments[0])
        assert_equal_to_the_plain_loop(arguments, T)
