"""Whole models against the published algorithm written plainly, and under `torch.compile`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.naive import NaiveModel
from configuration_fas import FASBertConfig, FASGPT2Config
from modeling_fas import FASBertForMaskedLM, FASBertForSequenceClassification, FASGPT2LMHeadModel


GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 50}
BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": 50,
}
MODELS = {
    "gpt2": (FASGPT2LMHeadModel, lambda **settings: FASGPT2Config(**GPT2, **settings)),
    "bert_mlm": (FASBertForMaskedLM, lambda **settings: FASBertConfig(**BERT, **settings)),
    "bert_classify": (FASBertForSequenceClassification, lambda **settings: FASBertConfig(**BERT, **settings)),
}


def build(kind, **settings):
    """Tiny model whose weights are large enough for its neurons to fire."""
    torch.manual_seed(0)
    model_class, config = MODELS[kind]
    model = model_class(config(initial_threshold=0.4, initializer_range=0.3, **settings)).eval()
    return model


def batch(rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, (rows, length), generator=generator)


@pytest.mark.parametrize("calibrated", [False, True], ids=["scalar", "calibrated"])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_stepwise_logits_equal_the_naive_ones(kind, T, calibrated):
    """In float64: what differs is the order of sums, and a spike that it flips would show."""
    model = build(kind, T=T, schedule="stepwise").double()
    if calibrated:
        model.begin_calibration(T, granularity="position", length=9)
        for _, neuron in model.neurons():
            neuron.fine_threshold.mul_(0.5 + torch.rand_like(neuron.fine_threshold))
            neuron.initial_potential.uniform_(0, 1)
    ids = batch()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ours = model(ids, attention_mask=mask).logits
    naive = NaiveModel(model, T)(ids, attention_mask=mask)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-12)
    assert not torch.allclose(ours, model.set_timesteps(0)(ids, attention_mask=mask).logits, atol=1e-3)


def call_compiled(kind, lengths, steps, schedule):
    """Graphs compiled after every call, with the default `dynamic=None`, whole graphs only."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build(kind, schedule=schedule)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    with torch.no_grad():
        for T in steps:
            model.set_timesteps(T)
            for length in lengths:
                ids = batch(length=length)
                expected = model(ids, **{"use_cache": False} if kind == "gpt2" else {}).logits
                actual = compiled(ids, **{"use_cache": False} if kind == "gpt2" else {}).logits
                torch.testing.assert_close(actual, expected)
                graphs.append(counter.frame_count)
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("kind", MODELS)
def test_compiles_whole_and_not_for_every_length(kind, schedule):
    graphs = call_compiled(kind, [8, 16, 32, 48], [4], schedule)
    assert graphs[1] == graphs[-1] <= 2, graphs


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_compiles_once_for_every_number_of_timesteps(schedule):
    graphs = call_compiled("gpt2", [8, 16], [1, 2, 4, 8, 2, 4], schedule)
    assert graphs[-1] == graphs[7], graphs  # nothing new for what was there before
    assert graphs[-1] <= 8, graphs
