"""`torch.compile` with its defaults: whole graphs, and no new one for every length or every return to a T."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers import CompileConfig

import tiny
from neurons_fas import encode


pytestmark = pytest.mark.slow


def graphs_compiled(kind, calls, schedule):
    """Number of graphs after each of the calls, `(T, length)`."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny.model(kind, schedule=schedule)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for T, length in calls:
        ids = torch.randint(1, tiny.VOCABULARY, (3, length))
        model.set_timesteps(T)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_new_length_compiles_once(kind, schedule):
    graphs = graphs_compiled(kind, [(4, length) for length in (8, 16, 24, 32)], schedule)
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_a_new_number_of_timesteps_compiles_once(schedule):
    graphs = graphs_compiled("gpt2", [(T, length) for T in (1, 2, 4, 2, 4) for length in (8, 16)], schedule)
    assert graphs == [1, 2, 3, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("code", ["rate", "phase", "first_spike"])
def test_a_code_compiles_whole(code):
    torch._dynamo.reset()
    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    x, threshold = torch.randn(3, 5, requires_grad=True), torch.full((5,), 0.7, requires_grad=True)
    ours, plain = (function(x, threshold, 4, code) for function in (compiled, encode))
    assert torch.equal(ours, plain)
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), (x, threshold)) for y in (ours, plain)), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        for T, base in ((4, 1.2), (4, 1.3), (8, 1.3), (6, 1.4), (3, torch.tensor(1.5))):
            assert torch.equal(compiled(x, threshold, T, code, base), encode(x, threshold, T, code, base))


@pytest.mark.parametrize("T, schedule", [(4, "stepwise"), (4, "layerwise")])
def test_decoding_with_a_static_cache_compiles_whole(T, schedule):
    torch._dynamo.reset()
    counters.clear()
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    model = tiny.model("gpt2", T=T, schedule=schedule).double()
    ids = tiny.batch("gpt2")["input_ids"][:1]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", compile_config=compiling, **settings)
    assert counters["stats"]["unique_graphs"] == 1  # one graph for every token after the prompt
    assert torch.equal(static, model.generate(ids, **settings))


def test_decoding_as_the_page_on_speed_compiles_it_changes_no_token():
    torch._dynamo.reset()
    model = tiny.model("gpt2", T=4, schedule="stepwise")
    ids = tiny.batch("gpt2")["input_ids"][:1]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward)
    counters.clear()
    with inductor.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN"):
        compiled = model.generate(ids, **settings)
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(compiled, plain)
