"""One regression test for each fault of the published code listed in `method.md` (shared) that the models can share.

1 (calibration of BERT) and the rest of 5 are in `test_calibration.py` and `test_training_trainers.py`; 7, loading
without the training scripts, is `test_loading.py::test_a_new_process_without_the_repository_gives_equal_logits`.
"""

import pytest
import torch

import tiny


@pytest.mark.parametrize("T, schedule", tiny.MODES)
def test_2_gpt2_runs_without_an_attention_mask(T, schedule):
    model, ids = tiny.model("gpt2", T=T, schedule=schedule).double(), tiny.batch("gpt2")["input_ids"][:1]
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_3_position_thresholds_serve_shorter_inputs_and_refuse_longer_ones():
    model = tiny.model("gpt2", T=4).double().begin_calibration(4, "position", 9)
    for _, neuron in model.neurons():
        torch.nn.init.uniform_(neuron.fine_threshold, 0.4, 1.2)
    ids = tiny.batch("gpt2")["input_ids"][:1]
    whole = model(ids).logits
    for length in (1, 5):
        logits = model(ids[:, :length]).logits
        assert logits.shape == (1, length, tiny.VOCABULARY)  # the published code broadcasts length 1 to all rows
        torch.testing.assert_close(logits, whole[:, :length], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"must not reach beyond the 9 positions.*got 10"):
        model(torch.ones(1, 10, dtype=torch.long))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"must not reach beyond the 9 positions.*got 10"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("granularity", ["neuron", "position"])
@torch.no_grad()
def test_4_no_size_is_hard_coded(kind, granularity):
    sizes = {"n_layer": 14, "n_inner": 11} if kind == "gpt2" else {"num_hidden_layers": 14, "intermediate_size": 11}
    model = tiny.model(kind, T=2, **sizes).begin_calibration(2, granularity, 9)
    assert len(model.neurons()) == 14 + (kind != "gpt2")
    assert model(**tiny.batch(kind)).logits.isfinite().all()


@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_5_a_threshold_trained_to_zero_or_below_gives_neither_nan_nor_negative_spikes(T, schedule, value):
    model, inputs, emitted = tiny.model("gpt2", T=T, schedule=schedule), tiny.batch("gpt2"), []
    with torch.no_grad():
        model.transformer.h[0].mlp.act.threshold.fill_(value)
    model.transformer.h[0].mlp.act.register_forward_hook(lambda _m, _a, output: emitted.append(output))
    output = model(**inputs)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert emitted[0].min() >= 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("granularity", ["neuron", "position"])
def test_6_a_calibrated_model_generates_from_a_left_padded_batch_with_a_cache_and_beams(granularity):
    model, inputs = tiny.model("gpt2", T=4).double(), tiny.batch("gpt2", "left")
    model.begin_calibration(4, granularity, tiny.POSITIONS)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached, uncached = (model.generate(**given, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.shape == (3, 15)
