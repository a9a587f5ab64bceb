"""A cache knows the mode it was made in, and holds rows for every timestep whoever made it."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import backbones
import tiny
from backbones import CAUSAL, some


STOCK = {"activation": "stock", "L": None}
PHASE = {"sites": "all", "code": "phase", "schedule": "layerwise", "T": 4, **STOCK}
EXACT = {"atol": 1e-12, "rtol": 0}  # float64: no level can flip by rounding


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def causal(backbone="gpt2", **settings):
    return backbones.model(backbone, "AutoModelForCausalLM", **settings).double()


IDS = backbones.batch("gpt2", "AutoModelForCausalLM")["input_ids"]


def made(model, cache=None):
    return model(IDS[:, :6], past_key_values=cache, use_cache=True).past_key_values


CHANGES = {
    "T": (lambda model: model.set_timesteps(2), "made with `T` 4 where the model has `T` 2"),
    "ann": (lambda model: model.set_timesteps(0), "made with `T` 4 where the model has `T` 0"),
    "layerwise": (
        lambda model: model.set_timesteps(4, "layerwise"),
        "`schedule` 'stepwise' where the model has `schedule` 'layerwise'",
    ),
    "accumulated": (
        lambda model: model.set_timesteps(4, "accumulated"),
        "`schedule` 'stepwise' where the model has `schedule` 'accumulated'",
    ),
    "calibrated": (
        lambda model: model.begin_calibration(4),
        "`calib_T` None where the model has `calib_T` 4",
    ),
    "thresholds": (
        lambda model: model.neurons()[0][1].threshold.mul_(2),
        "made with the thresholds of then where the model has others",
    ),
}


@pytest.mark.parametrize(
    "backbone, name", some(lambda backbone, name: backbone == "gpt2" or name == "thresholds", CAUSAL, CHANGES)
)
def test_a_cache_of_another_mode_is_refused(backbone, name):
    change, said = CHANGES[name]
    model = causal(backbone, T=4)
    cache = made(model)
    again = copy.deepcopy(cache)
    model(IDS[:, 6:7], past_key_values=again, use_cache=True)
    change(model)
    with pytest.raises(
        ValueError, match=rf"`past_key_values` must come from the mode.*{said}.*Start again without it"
    ):
        model(IDS[:, 6:7], past_key_values=cache, use_cache=True)
    made(model)


def test_a_cache_of_another_code_or_calibration_is_refused():
    model = causal(**PHASE)
    cache = made(model)
    model.config.code = "first_spike"
    with pytest.raises(ValueError, match="`code` 'phase' where the model has `code` 'first_spike'"):
        model(IDS[:, 6:7], past_key_values=cache, use_cache=True)
    model = causal(T=4).begin_calibration(4)
    cache = made(model)
    model.begin_calibration(4, "layer")
    with pytest.raises(ValueError, match=r"`past_key_values` must come from.*the thresholds of then"):
        model(IDS[:, 6:7], past_key_values=cache, use_cache=True)


def test_a_cache_serves_a_copy_of_the_model():
    model = causal(T=4)
    cache = made(model)
    found = copy.deepcopy(model)(IDS[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(IDS).logits[:, 6:], **EXACT)


def test_an_emptied_cache_serves_any_mode():
    model = causal(T=4)
    cache = StaticCache(config=model.config, max_cache_len=12)
    for T in (4, 2, 0, 4):
        expected = model.set_timesteps(T)(IDS[:, :6]).logits
        cache.reset()
        found = model(IDS[:, :6], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    "backbone, settings, chosen",
    some(
        lambda backbone, settings, chosen: backbone == "gpt2" or (settings["T"] == 3 and chosen == [2, 0]),
        CAUSAL,
        [{"T": 4}, {"T": 3, "sites": "all", "schedule": "accumulated", **STOCK}, PHASE],
        [[2, 0], [True, False, True]],
    ),
)
def test_rows_of_a_cache_are_chosen_at_every_timestep(backbone, settings, chosen):
    chosen = torch.tensor(chosen)
    model = causal(backbone, **settings)
    expected = model(IDS[chosen]).logits[:, 6:]
    cache = made(model)
    cache.batch_select_indices(chosen)
    torch.testing.assert_close(model(IDS[chosen, 6:], past_key_values=cache).logits, expected, **EXACT)
    if chosen.dtype != torch.bool:
        cache = copy.deepcopy(made(model))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        found = model(IDS[[2, 0, 0], 6:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(IDS[[2, 0, 0]]).logits[:, 6:], **EXACT)
        cache = made(model)
        cache.batch_repeat_interleave(2)
        rows = IDS.repeat_interleave(2, 0)
        torch.testing.assert_close(
            model(rows[:, 6:], past_key_values=cache).logits, model(rows).logits[:, 6:], **EXACT
        )


@pytest.mark.parametrize("settings", [{"T": 4}, {"T": 4, "schedule": "layerwise"}, {"T": 0}])
@pytest.mark.parametrize("backbone", CAUSAL)
def test_a_cache_that_was_allocated_before_gets_the_rows_of_every_timestep(backbone, settings):
    model = causal(backbone, **settings)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    cache = StaticCache(config=model.config, max_cache_len=12)
    cache.early_initialization(3, heads, width, torch.float64, torch.device("cpu"))
    found = model(IDS[:, :6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(IDS[:, :6]).logits, **EXACT)


@pytest.mark.parametrize(
    "settings", [{"T": 4}, {"T": 4, "schedule": "accumulated"}, {"T": 4, "schedule": "layerwise"}]
)
@pytest.mark.parametrize("backbone", CAUSAL)
def test_a_prefix_is_the_same_at_every_timestep(backbone, settings):
    """As prefix tuning gives it: keys and values of B rows, for every layer."""
    model = causal(backbone, **settings)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    mask = torch.ones(3, 2 + 9, dtype=torch.long)
    found = []
    for rows in ([0, 1, 2], [0], [1], [2]):
        cache = DynamicCache()
        torch.manual_seed(0)
        prefix = torch.randn(model.config.num_hidden_layers, 2, 1, heads, 2, width, dtype=torch.float64)
        for layer in range(len(prefix)):
            cache.update(*prefix[layer].expand(2, len(rows), heads, 2, width), layer)
        found.append(model(IDS[rows], past_key_values=cache, attention_mask=mask[rows], use_cache=True).logits)
    torch.testing.assert_close(found[0], torch.cat(found[1:]), **EXACT)
    assert not torch.allclose(found[0], model(IDS).logits)


def test_a_cache_of_another_batch_says_so():
    model = causal(T=4)
    cache = DynamicCache()
    for layer in range(3):
        cache.update(*torch.randn(2, 2, 4, 2, 8, dtype=torch.float64), layer)
    with pytest.raises(ValueError, match=r"`past_key_values` must hold 3 rows.*got 2"):
        model(IDS, past_key_values=cache, use_cache=True)


def test_tokens_are_counted_in_a_cache_given_by_place():
    model = tiny.model("gpt2", T=4)
    ids = torch.ones(1, tiny.POSITIONS - 1, dtype=torch.long)
    cache = model.transformer(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"{tiny.POSITIONS} positions.*got {tiny.POSITIONS + 1}"):
        model.transformer(ids[:, :2], cache)
