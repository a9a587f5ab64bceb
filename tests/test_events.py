"""Event-driven products are the dense ones up to the order of sums, and run where they pay and nowhere else."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import backbones
import events_fas
import tiny
from events_fas import MOST_FIRED, ONE_IN, EventConv1D, EventLinear, event_product, pays


CLOSE = {"rtol": 0, "atol": 1e-12}  # float64: other orders of some hundred sums
SIZES = {
    "gpt2": {"n_inner": 2048, "n_embd": 64},
    "opt": {"ffn_dim": 2048, "hidden_size": 64, "word_embed_proj_dim": 64},
}


@pytest.fixture(autouse=True)
def small_products_without_gradient(monkeypatch):
    monkeypatch.setattr(events_fas, "LEAST_WEIGHTS", 1 << 17)
    with torch.no_grad():
        yield


@pytest.fixture
def products(monkeypatch):
    """Shapes of the inputs of the event-driven products that ran."""
    shapes = []

    def counted(x, weight, bias):
        shapes.append(tuple(x.shape))
        return event_product(x, weight, bias)

    monkeypatch.setattr(events_fas, "event_product", counted)
    return shapes


def spikes(*shape, share=0.1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    fired = torch.rand(shape, generator=generator) < share
    return torch.randn(shape, generator=generator, dtype=dtype) * fired


def model_of(backbone, T=4, **settings):
    """A tenth of its neurons fire, or less."""
    made = backbones.model(backbone, "AutoModelForCausalLM", T=T, **SIZES[backbone], **settings).double()
    for _, neuron in made.neurons():
        neuron.threshold.fill_(6.0)
    return made


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 3), (8,), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_an_event_driven_product_is_the_dense_one(shape, share, biased):
    x = spikes(*shape, 64, share=share)
    weight, bias = torch.randn(64, 32, dtype=x.dtype), torch.randn(32, dtype=x.dtype) if biased else None
    expected = x @ weight + (bias if biased else 0)
    torch.testing.assert_close(event_product(x, weight, bias), expected, **CLOSE)


def test_a_row_without_spikes_between_others_gets_the_bias_alone():
    x = spikes(3, 64, share=1)
    x[1] = 0
    weight, bias = torch.randn(64, 32, dtype=x.dtype), torch.randn(32, dtype=x.dtype)
    found = event_product(x, weight, bias)
    assert torch.equal(found[1], bias)
    torch.testing.assert_close(found, x @ weight + bias, **CLOSE)


def test_an_input_in_other_order_of_memory_and_half_precision():
    x = spikes(64, 4, share=0.3).t()
    weight = torch.randn(64, 32, dtype=x.dtype)
    torch.testing.assert_close(event_product(x, weight, None), x @ weight, **CLOSE)
    half = event_product(x.bfloat16(), weight.bfloat16(), None)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), x @ weight, rtol=0, atol=0.1)


def test_nan_stays_nan():
    x = spikes(2, 64)
    x[1, 5] = torch.nan
    found = event_product(x, torch.randn(64, 32, dtype=x.dtype), None)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", MOST_FIRED)
def test_what_pays_goes_by_the_share_that_fires(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = torch.zeros(1300, 1024), torch.zeros(rows, 1300)
    looked_at = x.view(-1)[::ONE_IN]
    most = int(MOST_FIRED[rows] / threads * looked_at.numel())
    looked_at[:most] = torch.nan
    assert pays(x, weight)
    looked_at[most] = 1
    assert not pays(x, weight)
    assert not pays(torch.cat([x, x])[rows:], weight)
    assert not pays(x.t().contiguous().t(), weight)


def test_what_never_pays(monkeypatch):
    monkeypatch.setattr(events_fas, "LEAST_WEIGHTS", 1 << 20)
    x, weight = torch.zeros(1, 1024), torch.zeros(1024, 1024)
    assert pays(x, weight) and pays(x[None], weight)
    assert not pays(x, weight[:, :1023])
    assert not pays(x.expand(9, -1), weight)
    assert not pays(x[:0], weight)
    assert not pays(x.double(), weight)
    assert not pays(x.to("meta"), weight)
    assert not pays(nn.Parameter(x), weight)
    with torch.autocast("cpu"):
        assert not pays(x, weight)
    with torch.enable_grad():
        assert not pays(x, weight)
    for module, name in ((torch.compiler, "is_compiling"), (torch.jit, "is_tracing")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda: True)
            assert not pays(x, weight)
    assert pays(x, weight)


@pytest.mark.slow
def test_a_compiled_model_takes_the_dense_product(products):
    layer = nn.Linear(1024, 128)
    events_fas.receive_events(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.zeros(1, 1024))
    assert not products


@pytest.mark.parametrize("schedule", ["stepwise", "accumulated", "layerwise"])
@pytest.mark.parametrize("backbone", SIZES)
def test_decoding_reads_the_weights_of_what_fires(backbone, schedule, products, monkeypatch):
    model = model_of(backbone, schedule=schedule).read_events()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])

    def decode():
        cache = model(ids, use_cache=True).past_key_values
        tokens = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(3)]
        return torch.cat(tokens)

    found = decode()
    rows = {int(torch.tensor(shape[:-1]).prod()) for shape in products}
    assert len(products) >= 3 * len(model.neurons()) and rows == {1 if schedule == "layerwise" else 4}
    monkeypatch.setattr(events_fas, "pays", lambda x, weight: False)
    torch.testing.assert_close(found, decode(), **CLOSE)


def test_only_layers_that_spikes_feed_look_for_them():
    gpt2, opt = model_of("gpt2"), model_of("opt")
    found = {name.rpartition(".h.")[2] for name, each in gpt2.named_modules() if type(each) is EventConv1D}
    assert found == {f"{block}.mlp.c_proj" for block in range(3)}
    assert type(gpt2.transformer.h[0].mlp.c_fc) is Conv1D and type(gpt2.transformer.h[0].attn.c_proj) is Conv1D
    assert not any(type(each) is EventLinear for each in opt.modules())
    found = {name.rpartition(".")[2] for name, each in opt.read_events().named_modules() if type(each) is EventLinear}
    assert found == {"fc2"}
    everywhere = backbones.model("gpt2", "AutoModelForCausalLM", sites="all", activation="stock", L=None, code="phase")
    assert type(everywhere.transformer.h[0].attn.c_attn) is EventConv1D


def test_a_transposed_weight_follows_its_weight(tmp_path):
    model = model_of("opt", schedule="layerwise").read_events()
    layer = model.model.decoder.layers[0].fc2
    x = spikes(1, 2048)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)
    copied, kept = copy.deepcopy(layer), layer.transposed
    layer(x)
    assert layer.transposed is kept
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)
    layer.load_state_dict(copied.state_dict())
    torch.testing.assert_close(layer(x), copied(x), **CLOSE)
    layer.float()
    assert layer(x.float()).dtype == torch.float32 and layer.transposed.dtype == torch.float32
    assert not [name for name in model.state_dict() if "transposed" in name]
    model.save_pretrained(tmp_path)
    assert type(model_of("opt").from_pretrained(tmp_path).model.decoder.layers[0].fc2) is nn.Linear


def test_no_weight_comes_to_stand_where_the_one_stood_that_a_transposed_one_is_of():
    """An address and a version would not tell them apart."""
    layer = nn.Linear(2048, 64).double()
    events_fas.receive_events(layer)
    x = spikes(1, 2048)
    layer(x)
    layer.weight = nn.Parameter(torch.randn(64, 2048, dtype=x.dtype))
    assert layer.made_from[0].untyped_storage().data_ptr() != layer.weight.data_ptr()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)
    assert layer.made_from[0].data_ptr() == layer.weight.data_ptr()


def test_weights_of_inference_mode_are_read_too():
    with torch.inference_mode():
        layer = nn.Linear(2048, 64).double()
        events_fas.receive_events(layer)
        x = spikes(1, 2048)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)
        assert layer.transposed is not None


def test_texts_are_generated_as_without(monkeypatch):
    model = model_of("gpt2", schedule="stepwise")
    ids = tiny.batch("gpt2")["input_ids"][:1, :6]
    made = []
    for _ in range(2):
        made.append(model.generate(ids, max_new_tokens=8, do_sample=False))
        monkeypatch.setattr(events_fas, "pays", lambda x, weight: False)
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(made))
