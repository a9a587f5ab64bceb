"""`generate()` in every mode: with a cache and without, tokens and logits are equal."""

import pytest
import torch

import tiny
from backbones import some


STRATEGIES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sample": {"do_sample": True, "top_k": 0},
    "beam-sample": {"do_sample": True, "num_beams": 3, "top_k": 0},
}


def generate(model, inputs, use_cache, **strategy):
    torch.manual_seed(0)
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=8,
        min_new_tokens=8,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        **strategy,
    )


def assert_cached_equals_uncached(model, strategy):
    inputs = tiny.batch("gpt2", "left")
    cached, uncached = (generate(model, inputs, use_cache, **STRATEGIES[strategy]) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    # generate() rounds the float64 logits to float32.
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-6, rtol=0)
    assert len(set(cached.sequences[:, -8:].flatten().tolist())) > 1  # not one token for ever


@pytest.mark.parametrize(
    "strategy, mode",
    some(lambda strategy, mode: strategy == "beam" or mode == (4, "stepwise"), STRATEGIES, tiny.MODES),
)
def test_cached_equals_uncached(strategy, mode):
    T, schedule = mode
    assert_cached_equals_uncached(tiny.model("gpt2", T=T, schedule=schedule).double(), strategy)


@pytest.mark.parametrize(
    "strategy, schedule, granularity",
    some(
        lambda strategy, schedule, granularity: (
            (strategy, schedule) == ("beam", "stepwise") or (strategy, granularity) == ("greedy", "position")
        ),
        ["greedy", "beam"],
        ["stepwise", "layerwise"],
        ["layer", "neuron", "position"],
    ),
)
def test_cached_equals_uncached_after_calibration(strategy, schedule, granularity):
    model = tiny.model("gpt2", T=4, schedule=schedule).double().begin_calibration(4, granularity, tiny.POSITIONS)
    for _, neuron in model.neurons():
        torch.nn.init.uniform_(neuron.fine_threshold, 0.4, 1.2)
        torch.nn.init.uniform_(neuron.initial_potential, -0.5, 1.5)
    assert_cached_equals_uncached(model, strategy)


def test_a_static_cache_gives_the_same_tokens():
    model, inputs = tiny.model("gpt2", T=4).double(), tiny.batch("gpt2", "left")
    tokens = [
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            cache_implementation=implementation,
            disable_compile=True,
        )
        for implementation in ("static", None)
    ]
    assert torch.equal(*tokens)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole():
    model = tiny.model("gpt2", T=4).double()
    ids = tiny.batch("gpt2")["input_ids"][:1]
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-12, rtol=0)


def test_the_cache_holds_timesteps_only_after_the_first_site():
    model = tiny.model("gpt2", T=4)
    cache = model(tiny.batch("gpt2")["input_ids"], use_cache=True).past_key_values
    assert [layer.keys.shape[0] for layer in cache.layers] == [3, 12, 12]
