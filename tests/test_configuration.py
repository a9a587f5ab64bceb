"""Configurations: dispatch by backbone, round trips, checked settings, truth after every change."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import AutoConfig, BertConfig, GPT2Config

import backbones
import tiny
from configuration_fas import FASBertConfig, FASConfig, FASGPT2Config


BACKBONES = {"gpt2": (FASGPT2Config, GPT2Config), "bert": (FASBertConfig, BertConfig)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_name_for_both_backbones(backbone, tmp_path):
    ours, stock = BACKBONES[backbone]
    config = FASConfig(backbone=backbone, L=4, T=3, schedule="layerwise", hidden_size=24, num_labels=5)
    assert type(config) is ours
    assert isinstance(config, FASConfig | stock)
    assert (config.L, config.T, config.schedule, config.hidden_size, config.num_labels) == (4, 3, "layerwise", 24, 5)
    assert (ours().L, ours().T, ours().calib_T, ours().schedule, ours().granularity) == (
        (8, 0, None, "stepwise", "neuron")
    )
    config.save_pretrained(tmp_path)
    for loaded in (
        FASConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        ours.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(loaded) is ours
        where_from = {"transformers_version": None, "_name_or_path": None}
        assert loaded.to_dict() | where_from == config.to_dict() | where_from
    assert FASConfig.from_pretrained(tmp_path, T=7).T == 7
    assert AutoConfig.from_pretrained(tmp_path, schedule="stepwise").schedule == "stepwise"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stock_configurations_are_read_without_a_word(backbone, tmp_path, caplog, monkeypatch):
    ours, stock = BACKBONES[backbone]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    stock(num_labels=3, n_ctx=7).save_pretrained(tmp_path)
    for config in (FASConfig.from_pretrained(tmp_path), FASConfig(**stock(num_labels=3).to_dict(), L=4)):
        assert type(config) is ours
        assert (config.model_type, config.num_labels) == (f"fas_{backbone}", 3)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "name, value, required",
    [
        ("T", -1, "an integer of at least 0"),
        ("T", 2.5, "an integer of at least 0"),
        ("T", True, "an integer of at least 0"),
        ("T", "4", "an integer of at least 0"),
        ("T", None, "an integer of at least 0"),
        ("L", 0, "an integer of at least 1"),
        ("calib_T", 0, "an integer of at least 1"),
        ("calib_length", -3, "an integer of at least 1"),
        ("schedule", "sideways", "one of 'stepwise', 'layerwise'"),
        ("granularity", "head", "one of 'layer', 'neuron', 'position'"),
        ("initial_threshold", 0, "a finite number above 0"),
        ("initial_threshold", float("nan"), "a finite number above 0"),
        ("initial_threshold", "2", "a finite number above 0"),
    ],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_wrong_values_are_refused_wherever_they_come_from(backbone, name, value, required, tmp_path):
    message = f"`{name}` must be {required}.*, got {value!r}"
    with pytest.raises(ValueError, match=message):
        FASConfig(backbone=backbone, **{name: value})
    config = FASConfig(backbone=backbone)
    before = getattr(config, name)
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
    assert getattr(config, name) == before
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        FASConfig.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "key, meant",
    [("calib_t", "calib_T"), ("granularty", "granularity"), ("t", "T"), ("num_hidden_layer", "num_hidden_layers")],
)
def test_a_misspelt_key_warns(key, meant, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    FASConfig(backbone="bert", **{key: 3})
    assert f"`{key}` is not a setting of `FASBertConfig`" in caplog.text
    assert f"Did you mean `{meant}`?" in caplog.text


ROTARY = [name for name, table in backbones.BACKBONES.items() if table.positions is None]
ROPE = {
    "transformers 4": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "transformers 5": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("backbone", ROTARY)
@pytest.mark.parametrize("written", ROPE)
def test_settings_of_rotary_positions_go_by_either_name(backbone, written, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = backbones.model(backbone, "AutoModelForCausalLM", **ROPE[written])
    model.config.save_pretrained(tmp_path)
    for each in (model, type(model)(FASConfig.from_pretrained(tmp_path))):
        found = each.base_model.rotary_emb.inv_freq
        torch.testing.assert_close(found, 500.0 ** -torch.arange(0, 1, 1 / len(found)) / 2)
    assert "is not a setting" not in caplog.text


def test_a_backbone_without_rotary_positions_has_no_settings_for_them(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    FASConfig(backbone="bert", rope_theta=500.0)
    assert "`rope_theta` is not a setting of `FASBertConfig`" in caplog.text


def test_a_missing_or_contradicting_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`backbone` must be one of 'gpt2', 'bert', .*'qwen3'.*got None"):
        FASConfig(L=4)
    with pytest.raises(ValueError, match=r"got 't5'"):
        FASConfig(backbone="t5")
    with pytest.raises(ValueError, match=r"is for the backbone 'bert'"):
        FASBertConfig(backbone="gpt2")
    FASGPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a 'bert' or 'fas_bert' checkpoint.*got one of type 'fas_gpt2'"):
        FASBertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_and_its_configuration_never_disagree(kind):
    model = tiny.model(kind)
    assert model.set_timesteps(5, "layerwise") is model
    assert (model.config.T, model.config.schedule) == (5, "layerwise")
    for wrong in ((-1, "stepwise"), (3, "sideways")):
        with pytest.raises(ValueError, match=r"must be"):
            model.set_timesteps(*wrong)
        assert (model.config.T, model.config.schedule) == (5, "layerwise")
        assert {(neuron.T, neuron.schedule) for _, neuron in model.neurons()} == {(5, "layerwise")}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_running_is_for_a_while_also_when_it_fails(kind):
    def settings():
        return {(each.T, each.schedule) for each in (model.config, *(neuron for _, neuron in model.neurons()))}

    model = tiny.model(kind).set_timesteps(5, "layerwise")
    with model.running(2) as running:
        assert running is model and settings() == {(2, "layerwise")}
        with model.running(0, "stepwise"):
            assert settings() == {(0, "stepwise")}
        assert settings() == {(2, "layerwise")}
        model.set_timesteps(7)
    assert settings() == {(5, "layerwise")}
    with pytest.raises(KeyError), model.running(3, "stepwise"):
        raise KeyError
    assert settings() == {(5, "layerwise")}
    with pytest.raises(ValueError, match="must be"), model.running(3, "sideways"):
        pass
    assert settings() == {(5, "layerwise")}
