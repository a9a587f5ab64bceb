"""The Triton kernels against the plain forms: on the CPU by Triton's interpreter, compiled where there is a GPU."""

import functools
import math
import re
import sys
import types

import pytest
import torch

import kernels_fas
import neurons_fas
import test_codes
import test_goldens
import test_neuron
import test_neuron_fast
import tiny
from neurons_fas import encode, integrate_and_fire, spike_rate
from test_codes import CODES
from test_neuron_fast import assert_gradients_close, gradients, plain_integrate_and_fire


B, S, D = 2, 3, 5
SHAPES = {"layer": (1,), "neuron": (D,), "position": (S, D)}
STEPS = (1, 2, 4, 8, 16)
LOOP, CODE = ["fire", "differentiate"], ["encode", "encode"]


@pytest.fixture
def triton():
    """Triton, which comes with PyTorch for CUDA; else `pip install triton` (690 MB, so in no extra of ours)."""
    yield pytest.importorskip("triton", reason="needs Triton: `pip install triton`")
    forget()


@pytest.fixture
def interpreted(triton, monkeypatch):
    """Triton runs kernels on the CPU, line by line."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(neurons_fas.logger, "propagate", True)
    forget()


@pytest.fixture
def launched(interpreted, monkeypatch):
    """Runs every neuron by the kernels, interpreted; the names of those that ran."""
    run, names = kernels_fas._run, []
    monkeypatch.setattr(kernels_fas, "_run", lambda *args, **kwargs: (names.append(args[0]), run(*args, **kwargs)))
    monkeypatch.setattr(neurons_fas, "_has_kernels", lambda *args: True)
    return names


def forget():
    kernels_fas.kernels.cache_clear()
    neurons_fas._agree.cache_clear()


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
    assert launched == LOOP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", SHAPES)
def test_kernels_in_every_precision(granularity, dtype, launched):
    assert_equal_to_the_plain_loop(inputs((4, B, S, D), SHAPES[granularity], dtype), 4)
    assert launched == LOOP


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


def test_kernels_keep_their_state_in_float32(launched, monkeypatch):
    monkeypatch.setattr(neurons_fas, "_encode_by_kernel", neurons_fas._encode)  # interpreted, bfloat16 is cut off
    test_neuron.test_membrane_state_is_float32_for_bfloat16_inputs()
    assert launched == ["fire", "fire"]


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
    assert launched == LOOP


@pytest.mark.parametrize("case", ["random", "exact"])
def test_kernels_equal_the_golden_positional_neuron(case, launched):
    test_goldens.test_positional_neuron(case)
    assert [name for name in launched if name != "encode"] == LOOP * 3
    assert launched.count("encode") == 2 * 2  # QCFS, with its gradient


ROWS = SHAPES | {"token": (B, S, 1), "text": (B, 1, D), "all": (B, S, D)}


def code_inputs(shape, parameters, dtype=torch.float32, device="cpu"):
    """Inputs around and beyond the range, thresholds and a base; the threshold itself and 0 among the inputs."""
    x, threshold, _ = inputs(shape, parameters, torch.float64, device)
    x = (1.5 * x.detach()).to(dtype)
    x[..., 0], x[..., 1] = 0, threshold.detach().expand(shape)[..., 1]
    base = torch.tensor(1.3, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_(), threshold.detach().to(dtype).requires_grad_(), base.requires_grad_()]


def low(emitted, dtype):
    """Numbers in a lower precision, as the interpreter makes them: it cuts bfloat16 off where a GPU rounds."""
    if dtype != torch.bfloat16:
        return emitted.to(dtype)
    return (emitted.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def assert_equal_to_the_plain_form(function, arguments, monkeypatch, interpreted=True):
    """The value to the last bit, the gradients too but for the order of sums."""
    dtype = arguments[0].dtype
    ours = function(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(neurons_fas, "_has_kernels", lambda *args: False)
        plain = function(*arguments)
        if interpreted and dtype == torch.bfloat16:
            plain_ = function(*(each.float() for each in arguments)).detach()
            assert torch.equal(ours, low(plain_, dtype))
        else:
            assert torch.equal(ours, plain) and torch.equal(ours.signbit(), plain.signbit())
        theirs = torch.autograd.grad(plain, arguments, upstream(plain), allow_unused=True)
    mine = torch.autograd.grad(ours, arguments, upstream(ours), allow_unused=True)
    assert [each is None for each in mine] == [each is None for each in theirs]
    assert torch.equal(mine[0], theirs[0])
    pairs = [pair for pair in zip(mine, theirs, strict=True) if pair[0] is not None]
    assert_gradients_close(*zip(*pairs, strict=True), dtype)
    return mine


def upstream(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("parameters", ROWS)
@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_equal_their_plain_form(code, parameters, signed, launched, monkeypatch):
    for T in (1, 3, 8, 32):
        function = functools.partial(code_of, T=T, code=code, signed=signed)
        assert_equal_to_the_plain_form(function, code_inputs((B, S, D), ROWS[parameters]), monkeypatch)
    assert launched == CODE * 4


def code_of(x, threshold, base, T, code, signed):
    return encode(x, threshold, T, code, base, signed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_in_every_precision(code, dtype, launched, monkeypatch):
    for parameters in ((D,), (B, S, 1)):
        function = functools.partial(code_of, T=5, code=code, signed=True)
        assert_equal_to_the_plain_form(function, code_inputs((B, S, D), parameters, dtype), monkeypatch)
    assert launched == CODE * 2


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("T", [1, 2, 5, 8, 16, 24, 32])
def test_codes_by_kernel_at_exact_ties(T, code, signed, launched, monkeypatch):
    """Phase with T = 32 counts to 2^32 - 1, which is no float32."""
    for dtype in (torch.float32, torch.float64):
        x = test_codes.values(T, code, 0.7).to(dtype)
        x = torch.cat([x, x.new_tensor([-0.0, 1e-40, -1e-40, torch.inf, -torch.inf])]).requires_grad_()
        theta = torch.tensor([0.7], dtype=dtype, requires_grad=True)
        function = functools.partial(encode, T=T, code=code, signed=signed)
        with torch.no_grad():
            ours = function(x, theta)
            monkeypatch.setattr(neurons_fas, "_has_kernels", lambda *args: False)
            plain = function(x, theta)
            monkeypatch.setattr(neurons_fas, "_has_kernels", lambda *args: True)
        assert torch.equal(ours, plain) and torch.equal(ours.signbit(), plain.signbit())


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("parameters", ROWS)
def test_rates_by_kernel_from_any_potential(parameters, signed, launched, monkeypatch):
    x, threshold, _ = code_inputs((B, S, D), ROWS[parameters])
    x = 3 * x.detach()
    x[0] = -0.3 * threshold.detach().expand(x.shape)[0]
    x.requires_grad_()
    for shape in (ROWS[parameters], (D,)):
        potential = torch.linspace(-1.5, 2.5, math.prod(shape)).view(shape).requires_grad_()
        function = functools.partial(spike_rate, T=6, signed=signed)
        assert_equal_to_the_plain_form(function, [x, threshold, potential], monkeypatch)
    assert launched == CODE * 2


@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_keep_nan(code, launched):
    x, threshold, _ = (each.detach() for each in code_inputs((B, S, D), (D,)))
    x[1, 2, 3] = torch.nan
    for signed in (False, True):
        assert torch.equal(encode(x, threshold, 4, code, signed=signed).isnan(), x.isnan())


@pytest.mark.parametrize(
    "shape, parameters",
    [((2, 1030), (1,)), ((2, 1030), (1030,)), ((2, 1030), (2, 1)), ((2, 3, 1100), (3, 1100)), ((2, 2048), (2048,))],
    ids=str,
)
@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_over_several_blocks(code, shape, parameters, launched, monkeypatch):
    function = functools.partial(code_of, T=3, code=code, signed=True)
    assert_equal_to_the_plain_form(function, code_inputs(shape, parameters), monkeypatch)


@pytest.mark.parametrize("shape", [(), (D,), (B, D), (B, 1, D), (B, 1, S, D)], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_take_any_shape(code, shape, launched, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    threshold = torch.tensor([0.6] if shape else 0.6, requires_grad=True)
    function = functools.partial(code_of, T=3, code=code, signed=True)
    assert_equal_to_the_plain_form(function, [x, threshold, torch.tensor(1.3, requires_grad=True)], monkeypatch)


@pytest.mark.parametrize("code", CODES)
def test_codes_by_kernel_take_what_is_not_contiguous(code, launched, monkeypatch):
    x, _, base = code_inputs((B, S, D), (D,))
    threshold = (torch.rand(D, S, generator=torch.Generator().manual_seed(0)) + 0.4).requires_grad_()
    function = functools.partial(code_of, T=3, code=code, signed=True)
    turned = [x.transpose(0, 1)[..., 1:4], threshold.T[:, None, 1:4], base]
    assert_equal_to_the_plain_form(function, turned, monkeypatch)
    encode(turned[0], threshold.T[:, None, 1:4], 3, code).sum().backward()  # its gradient is one number, expanded
    inside = (x.detach().transpose(0, 1)[..., 1:4].abs() <= threshold.detach().T[:, None, 1:4]).float()
    assert torch.equal(x.grad.transpose(0, 1)[..., 1:4], inside)


@pytest.mark.parametrize("code", CODES)
def test_a_threshold_that_does_not_fit_is_refused_as_without_kernels(code, launched):
    with pytest.raises(RuntimeError, match="size"):
        encode(torch.randn(B, S, D), torch.ones(D - 1), 3, code)


def test_kernels_are_for_a_state_of_one_precision(monkeypatch):
    x = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"), numel=lambda: 1)
    monkeypatch.setattr(neurons_fas, "_agree", lambda *args: True)
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert neurons_fas._has_kernels(x, True, "rate", single, None)
    assert not neurons_fas._has_kernels(x, True, "rate", single, double)
    x.dtype = torch.float64
    assert neurons_fas._has_kernels(x, True, "rate", double)
    assert not neurons_fas._has_kernels(x, True, "rate", single)


INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(sys.argv.pop())
import torch, transformers
for folder, names in zip(sys.argv[1:], (("fire", "differentiate"), ("encode", "encode")), strict=True):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    sites = sys.modules[type(model.neurons()[0][1]).__module__]
    code = sys.modules[sites.integrate_and_fire.__module__]
    kernels = sys.modules[code.kernels.__module__]
    ids = torch.arange(6)[None]
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    run, runs = kernels._run, []
    kernels._run = lambda *args, **kwargs: (runs.append(args[0]), run(*args, **kwargs))
    code._has_kernels = lambda *args: True
    output = model(ids, labels=ids)
    output.loss.backward()
    assert runs == [name for name in names for _ in model.neurons()], runs
    assert torch.equal(output.logits, expected.logits)
    assert sum("threshold" in name for name in gradients) == len(runs) // 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
"""


def test_kernels_run_in_remote_code(triton, tmp_path, run_outside):
    tiny.model("gpt2", T=2).begin_calibration(2).save_pretrained(tmp_path / "loop")
    coded = {"sites": "all", "code": "first_spike", "gain": "token", "T": 3, "schedule": "layerwise"}
    tiny.model("gpt2", **coded).save_pretrained(tmp_path / "code")
    folders = [str(tmp_path / name) for name in ("loop", "code")]
    run_outside(["-c", INTERPRETED, *folders, triton.__path__[0].rpartition("/")[0]])


def compiled(triton, name, low, constants):
    """A kernel's PTX for sm_80, from the state in float32, or in what x has above; the compiler needs no GPU."""
    from triton.backends.compiler import GPUTarget

    function = kernels_fas.kernels()[name]
    kinds = dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("x", "grad", "emitted"), f"*{low}") | kinds
    numbers = ("size", "columns", "x_step", "T", "theta_rows", "theta_width", "potential_rows", "potential_width")
    kinds |= dict.fromkeys(numbers, "i32") | {"most": "i64"}
    state = "*fp64" if low == "fp64" else "*fp32"
    signature = {each: kinds.get(each, state) for each in function.arg_names}
    values = {(function.arg_names.index(each),): value for each, value in constants.items()}
    source = triton.compiler.ASTSource(function, signature, values)
    # As `_run` asks for it.
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    assert made.asm["cubin"]
    return made.asm["ptx"]


@pytest.fixture
def compiler(triton, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    return functools.partial(compiled, triton)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_for_a_gpu(dtype, signed, compiler):
    """The interpreter takes what the compiler refuses. No spike is rounded otherwise there: nothing that a comparison
    sees is a fused product and sum, or a quotient."""
    for name in LOOP:
        ptx = compiler(name, dtype, {"SIGNED": signed, "BLOCK": 1024})
        assert "div." not in ptx.replace("div.s", "").replace("div.u", "") and "fma" not in ptx


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("code", CODES)
def test_codes_compile_for_a_gpu(code, dtype, signed, compiler):
    """Levels are those of a CPU: quotients are rounded to nearest, and so is every product, and every sum after it."""
    table, potential = ("levels", "between", "grad_base"), ("potential", "grad_potential")
    gradients = ("grad", "grad_theta", "grad_potential", "grad_base")
    absent = (table if code != "first_spike" else ()) + (potential if code != "rate" else ())
    for missing in ((*absent, *gradients), absent):
        constants = {"SIGNED": signed, "BLOCK": 1024} | dict.fromkeys(missing)
        ptx = compiler("encode", dtype, constants)
        operations = set(re.findall(r"\b((?:div|fma|mul|add|sub|rcp|cvt)\.[a-z0-9_.]*f(?:16|32|64)[a-z0-9_.]*)", ptx))
        kind = "f64" if dtype == "fp64" else "f32"
        assert f"div.rn.{kind}" in operations and f"mul.rn.{kind}" in operations
        arithmetic = {f"{each}.rn.{kind}" for each in ("div", "mul", "add", "sub")}
        assert {each for each in operations if not each.startswith("cvt.")} <= arithmetic
        if kind != f"f{dtype[2:]}":
            assert f"cvt.rn.{dtype.replace('fp', 'f')}.f32" in operations


@pytest.mark.parametrize("code", ["steps", *CODES])
def test_triton_that_does_not_run_is_not_needed(code, interpreted, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(kernels_fas, "_run", broken)
    assert not neurons_fas._agree(torch.device("cpu"), torch.float32, True, code)
    assert "Triton is installed but does not run" in caplog.text


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("code", ["steps", *CODES])
def test_kernels_with_other_spikes_are_not_taken(code, signed, interpreted, monkeypatch, caplog):
    assert neurons_fas._agree(torch.device("cpu"), torch.float32, signed, code)
    forget()
    if code == "steps":
        monkeypatch.setattr(neurons_fas, "_fire", lambda x, theta, start, emitted, signed: emitted.fill_(1.0))
    else:
        kernels_fas.kernels()
        monkeypatch.setattr(kernels_fas, "divide", lambda a, b: a * (1.0 / b))  # as a GPU divides by default
    assert not neurons_fas._agree(torch.device("cpu"), torch.float32, signed, code)
    assert "not those of the plain form" in caplog.text


@pytest.mark.parametrize("code", CODES)
def test_kernels_with_other_gradients_are_not_taken(code, interpreted, monkeypatch, caplog):
    plain = neurons_fas._differentiate_code
    monkeypatch.setattr(
        neurons_fas, "_differentiate_code", lambda *args: [*plain(*args)[:1], *plain(*args)[:1], None, None]
    )
    assert not neurons_fas._agree(torch.device("cpu"), torch.float32, True, code)


def test_triton_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # `import triton` raises ImportError
    forget()
    assert not neurons_fas._agree(torch.device("cuda"), torch.float32, True, "steps")
    forget()


def test_triton_is_not_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(neurons_fas, "_agree", lambda *args: pytest.fail("looked for Triton"))
    assert_equal_to_the_plain_loop(inputs((4, B, S, D), (D,)), 4)
    encode(torch.randn(3, D, requires_grad=True), torch.ones(D), 4, "phase").sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("T", STEPS)
def test_compiled_kernels_equal_the_plain_loop(T, granularity, constant, dtype, triton):
    for width in (D, 3072):
        parameters = (*SHAPES[granularity][:-1], 1 if granularity == "layer" else width)
        arguments = inputs((1 if constant else T, B, S, width), parameters, dtype, "cuda")
        assert neurons_fas._has_kernels(arguments[0], False, "steps")
        assert_equal_to_the_plain_loop(arguments, T)


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", ROWS)
@pytest.mark.parametrize("code", CODES)
def test_compiled_codes_equal_their_plain_form(code, parameters, dtype, signed, triton, monkeypatch):
    for T in (1, 3, 8, 32):
        for width in (D, 3072):
            shape = tuple(width if size == D else size for size in ROWS[parameters])
            arguments = code_inputs((B, S, width), shape, dtype, "cuda")
            assert neurons_fas._has_kernels(arguments[0], signed, code)
            function = functools.partial(code_of, T=T, code=code, signed=signed)
            assert_equal_to_the_plain_form(function, arguments, monkeypatch, interpreted=False)
