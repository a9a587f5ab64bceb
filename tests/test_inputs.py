"""Inputs that cannot run, and settings beyond what can: refused with the argument, what was required and what came."""

import logging

import pytest
import torch

import backbones
import tiny
from backbones import CASES, CAUSAL, FEW, HEADS, VOCABULARY, named, some
from configuration_fas import BACKBONES, MOST_LEVELS, FASConfig


STOCK = {"activation": "stock", "L": None}
MODES = [
    {"T": 0},
    *({"T": 2, "schedule": schedule} for schedule in ("stepwise", "layerwise", "accumulated")),
    *({"T": 2, "schedule": "layerwise", "sites": "all", "code": code, **STOCK} for code in ("phase", "first_spike")),
]
GPT2 = ("gpt2", "AutoModelForCausalLM")


@pytest.mark.parametrize(
    "case, settings",
    some(
        lambda case, settings: case == GPT2 or (case in FEW and settings is MODES[1]),
        CASES,
        MODES,
    ),
    ids=named,
)
def test_ids_of_another_shape_or_beyond_the_vocabulary_are_refused(case, settings):
    model, ids = backbones.model(*case, **settings), backbones.batch(*case)["input_ids"]
    choice = case[1] == "AutoModelForMultipleChoice"  # which flattens its choices by itself
    for value in (VOCABULARY, -3):
        wrong = ids.clone()
        wrong.view(-1)[4] = value
        with pytest.raises(ValueError, match=f"`input_ids` must be from 0 to {VOCABULARY - 1}.* got {value}"):
            model(wrong)
    if not choice:
        with pytest.raises(
            ValueError, match=r"`input_ids` must have the shape \(batch, tokens\), got \(9,\).*\[None\]"
        ):
            model(ids[0])
        with pytest.raises(
            ValueError, match=r"`inputs_embeds` must have the shape \(batch, tokens, width\), got \(9, "
        ):
            model(inputs_embeds=model.get_input_embeddings()(ids[0]))
    with pytest.raises(ValueError, match=r"`input_ids` must be integers, got torch.float32"):
        model(ids.float())


@pytest.mark.parametrize(
    "case, T", some(lambda case, T: case == GPT2 or (case in FEW and T > 0), HEADS, [0, 2]), ids=named
)
def test_labels_that_are_no_class_of_the_head_are_refused(case, T):
    if case[1] == "AutoModelForQuestionAnswering":
        pytest.skip("the stock model takes what is beyond the text for no answer")
    model, inputs = backbones.model(*case, T=T), backbones.batch(*case)
    language = model.get_output_embeddings() is not None
    count = VOCABULARY if language else 2 if case[1] == "AutoModelForMultipleChoice" else 3
    by_token = language or case[1] == "AutoModelForTokenClassification"
    labels = torch.zeros(inputs["input_ids"].shape if by_token else (3,), dtype=torch.long)
    labels.view(-1)[1] = count - 1
    assert model(**inputs, labels=labels).loss.isfinite()
    if by_token:
        labels[:, 2] = -100
        assert model(**inputs, labels=labels).loss.isfinite()
    for wrong in (count, -1):
        labels.view(-1)[1] = wrong
        with pytest.raises(ValueError, match=f"`labels` must be from 0 to {count - 1}.* got {wrong}"):
            model(**inputs, labels=labels)


def test_labels_of_other_problems_are_the_stock_models_affair():
    inputs = backbones.batch("bert", "AutoModelForSequenceClassification")
    regression = backbones.model("bert", "AutoModelForSequenceClassification", num_labels=1)
    assert regression(**inputs, labels=torch.tensor([7.0, -3.0, 2.0])).loss.isfinite()
    many = backbones.model("bert", "AutoModelForSequenceClassification", problem_type="multi_label_classification")
    assert many(**inputs, labels=torch.ones(3, 3)).loss.isfinite()


@pytest.mark.parametrize("backbone", CAUSAL)
def test_negative_positions_are_refused(backbone):
    model = backbones.model(backbone, "AutoModelForCausalLM", T=2)
    with pytest.raises(ValueError, match=r"`position_ids` must not be negative, got -1"):
        model(torch.ones(1, 3, dtype=torch.long), position_ids=torch.tensor([[-1, 0, 1]]))


@pytest.mark.parametrize(
    "backbone, schedule, T",
    some(
        lambda backbone, schedule, T: backbone == "gpt2" or (schedule == "stepwise" and T == 33),
        BACKBONES,
        ["stepwise", "layerwise", "accumulated"],
        [33, 10**6],
    ),
)
def test_more_timesteps_than_fit_are_refused_before_they_take_memory(backbone, schedule, T, tmp_path):
    case = (backbone, "AutoModelForSequenceClassification")
    model, inputs = backbones.model(*case), backbones.batch(*case)
    said = f"`T` must be at most 32 with code 'rate', got {T}"
    with pytest.raises(ValueError, match=said):
        model.set_timesteps(T, schedule)
    with pytest.raises(ValueError, match=said), model.running(T, schedule):
        pass
    if schedule != "layerwise":
        with pytest.raises(ValueError, match=said):
            model.early_exit(T, schedule, **inputs)
    with pytest.raises(ValueError, match=f"`calib_T` must be at most 32 with code 'rate', got {T}"):
        model.begin_calibration(T)
    assert (model.config.T, model.config.schedule, model.config.calib_T) == (0, "stepwise", None)
    with pytest.raises(ValueError, match=said):
        backbones.model(*case, T=T, schedule=schedule)
    model.config.T = T  # by hand
    with pytest.raises(ValueError, match=said):
        model(**inputs)
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, most", [("phase", 16), ("first_spike", 32)])
def test_every_code_has_its_limit(code, most):
    settings = {"sites": "all", "schedule": "layerwise", "code": code, **STOCK}
    assert backbones.model(*GPT2, T=most, **settings)(**backbones.batch(*GPT2)).logits.isfinite().all()
    for T in (most + 1, 10**6):
        with pytest.raises(ValueError, match=f"`T` must be at most {most} with code '{code}', got {T}"):
            backbones.model(*GPT2, T=T, **settings)


def test_levels_and_lengths_have_limits():
    assert backbones.model(*GPT2, L=MOST_LEVELS)(**backbones.batch(*GPT2)).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"`L` must be at most {MOST_LEVELS}, got 1000000000"):
        backbones.model(*GPT2, L=10**9)
    for length in (backbones.POSITIONS + 1, 10**12):
        with pytest.raises(ValueError, match=f"`calib_length` must be at most the {backbones.POSITIONS} positions"):
            backbones.model(*GPT2).begin_calibration(4, "position", length)
        with pytest.raises(ValueError, match=f"`calib_length` must be at most the {backbones.POSITIONS} positions"):
            backbones.model(*GPT2, calib_T=4, granularity="position", calib_length=length)


def test_there_is_nothing_to_exit_from_without_timesteps():
    model, inputs = backbones.model(*GPT2), backbones.batch(*GPT2)
    with pytest.raises(ValueError, match="`schedule` must be 'stepwise' or 'accumulated' to exit early"):
        model.early_exit(4, "layerwise", **inputs)
    with pytest.raises(ValueError, match="`T` must be at least 1 to exit early, got 0"):
        model.early_exit(0, **inputs)


FAILING = [
    {"T": 0},
    {"T": 2.5},
    {"T": 10**6},
    {"T": 4, "granularity": "head"},
    {"T": 4, "granularity": "position", "length": 0},
    {"T": 4, "granularity": "position", "length": 1.5},
    {"T": 4, "granularity": "position", "length": 10**15},  # where positions have no end, memory has
]


@pytest.mark.parametrize(
    "backbone, before, arguments",
    some(
        lambda backbone, before, arguments: backbone == "gpt2" or arguments is FAILING[-1],
        ["gpt2", "llama", "bert"],
        [None, "neuron"],
        FAILING,
    ),
    ids=str,
)
def test_a_calibration_that_cannot_begin_changes_nothing(backbone, before, arguments):
    model = backbones.model(backbone, "AutoModelForSequenceClassification", T=3)
    if before:
        model.begin_calibration(3, before)
    state, settings = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises((ValueError, RuntimeError)):
        model.begin_calibration(**arguments)
    assert model.config.to_dict() == settings
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(**backbones.batch(backbone, "AutoModelForSequenceClassification"))


EDITS = [
    ({}, "folded", True),
    ({}, "calib_T", 4),
    ({"calib_T": 4}, "calib_T", None),
    ({"calib_T": 4}, "granularity", "layer"),
    ({}, "sites", "all"),
    ({"sites": "all", **STOCK}, "sites", "linear"),
    ({"sites": "all", **STOCK}, "gain", "token"),
]


@pytest.mark.parametrize(
    "backbone, edit",
    some(lambda backbone, edit: backbone == "gpt2" or edit is EDITS[-1], BACKBONES, EDITS),
    ids=str,
)
def test_a_configuration_that_no_longer_fits_its_model_is_found_out(backbone, edit, tmp_path):
    settings, name, value = edit
    case = (backbone, "AutoModelForSequenceClassification")
    model, inputs = backbones.model(*case, **settings), backbones.batch(*case)
    before, expected = getattr(model.config, name), backbones.first_output(model(**inputs))
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"`config.{name}` must not be edited on a model that is made.*Set it back"):
        model(**inputs)
    with pytest.raises(ValueError, match=f"`config.{name}` must not be edited"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    setattr(model.config, name, before)
    assert torch.equal(backbones.first_output(model(**inputs)), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(backbones.first_output(type(model).from_pretrained(tmp_path)(**inputs)), expected)


def test_other_timesteps_than_calibrated_for_warn_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny.model("gpt2").begin_calibration(4)
    for T in (0, 4, 16, 0, 16):
        model.set_timesteps(T)
    said = [record.message for record in caplog.records if "calibrated" in record.message]
    assert len(said) == 1 and "`T` should be 4, which this model is calibrated for, or 0, got 16" in said[0]
    tiny.model("gpt2").set_timesteps(13)
    assert len([record for record in caplog.records if "calibrated" in record.message]) == 1


@pytest.mark.parametrize("version, newer", [("0.0.1", 0), ("99.0", 1), ("0.2.0", 0), (None, 0), ("junk", 0)])
def test_a_checkpoint_of_newer_code_warns(version, newer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = FASConfig(backbone="gpt2", fas_version=version)
    assert caplog.text.count("`fas_version` must be at most") == newer
    assert config.fas_version != version or version == "0.2.0"
