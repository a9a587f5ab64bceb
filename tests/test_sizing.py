"""What a conversion takes on paper: the arithmetic is that of the models themselves."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import sizing
from benchmarks.sizing import LENGTH, TOKENS, Shape, dry_run, fit, peak_of, sites_of
from fas import convert_to_spiking
from training.trainers import is_threshold


SHAPE = Shape(width=64, layers=2, heads=4, kv_heads=2, intermediate=176, vocabulary=61)


def test_the_arithmetic_is_that_of_a_dry_run_and_of_a_converted_model():
    dry = dry_run(SHAPE)
    assert (dry["weights"], dry["threshold_bytes"]) == (SHAPE.weights, SHAPE.threshold_bytes)
    assert dry["pass_bytes"] == {name: peak_of(sites_of(SHAPE, TOKENS), name) for name in sizing.DTYPES}
    ids = torch.randint(2, SHAPE.vocabulary, (1, LENGTH))
    model = convert_to_spiking(LlamaForCausalLM(LlamaConfig(**SHAPE.settings())), ids, progress=False)
    named = dict(model.named_parameters())
    assert sum(each.nbytes for name, each in named.items() if is_threshold(name)) == SHAPE.threshold_bytes
    assert sum(each.numel() for name, each in named.items() if not is_threshold(name)) == SHAPE.weights
    assert len(model.neurons()) == dry["sites"]


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [61, 8000], ids=["input", "head"])
def test_a_pass_takes_the_memory_that_the_formula_gives(vocabulary):
    shape = replace(SHAPE, vocabulary=vocabulary)
    ids = torch.randint(2, 61, (1, LENGTH))
    model = convert_to_spiking(LlamaForCausalLM(LlamaConfig(**shape.settings())), ids, progress=False)
    for name, dtype in sizing.DTYPES.items():
        peak = sizing.peak_bytes(fit(model.to(dtype), ids), "cpu")
        assert peak == pytest.approx(peak_of(sites_of(shape, LENGTH), name), rel=0.1)
