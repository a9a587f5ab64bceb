"""The demo Space without its page: what a visitor may type ends in an answer or a message."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

import backbones
from checkpoints import tiny_model, tiny_tokenizer
from training.evaluate import SpikeMonitor, energy_report


SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
SETTINGS = [
    {"T": 3},
    {"T": 3, "schedule": "accumulated"},
    {"T": 4, "schedule": "layerwise"},
    {"T": 4, "sites": "all", "code": "phase", "activation": "stock", "L": None, "schedule": "layerwise"},
    {"T": 3, "sites": "all", "activation": "stock", "L": None, "schedule": "accumulated"},
]
CASES = [
    ("gpt2", "AutoModelForCausalLM"),
    ("opt", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("bert", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForMaskedLM"),
    ("roberta", "AutoModelForSequenceClassification"),
    ("distilbert", "AutoModelForMaskedLM"),
]


class Refused(Exception):
    """Stands for `gradio.Error`."""


@pytest.fixture
def app(monkeypatch):
    """The module, with a stand-in for gradio, which only the page needs."""
    gradio = ModuleType("gradio")
    gradio.Error, gradio.Blocks = Refused, object
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.syspath_prepend(SPACE)
    for name in ("network", "pictures", "app"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
        importlib.import_module(name)
    return sys.modules["app"]


def made(kind, tmp_path, **settings):
    return tiny_model(kind, **settings), tiny_tokenizer(kind, tmp_path)


def parse(*pages):
    """Every tag is closed, and none is a visitor's."""
    for page in pages:
        tags = {each.tag for each in ElementTree.fromstring(f"<page>{page}</page>").iter()}
        assert not tags & {"script", "img"}


@pytest.mark.parametrize("text", ["$\\foo$", "$$ the $\\cat", "the cat", "<img src=x onerror=alert(1)>"])
def test_a_text_of_any_signs_is_shown(text, app, tmp_path):
    model, tokenizer = made("gpt2", tmp_path)
    answers, summary, numbers, heat, found, tokens = app.run(model, tokenizer, text, 2, "stepwise", 3)
    parse(answers, numbers, heat, *(app.draw(found, tokens, each) for each in found))
    assert "answer is" in summary and "Only the first" not in summary
    assert model.config.T == 0


def test_a_token_that_looks_like_html_is_a_label(app):
    sample = torch.ones(2, 3, 4, dtype=torch.int8)
    site = sys.modules["network"].Site("h.0", 0, "<b>", 4, torch.ones(3), sample)
    outside = sys.modules["network"].Site("x", None, "<i", 4, torch.ones(1), sample[:, :1])
    parse(app.heat([site, outside], ["<b>", "&", "a\nb"]), app.raster(site, ["<b>", "&", "a\nb"]))
    parse(app.raster(outside, ["<b>", "&", "a\nb"]), app.answers("<b>", "<i> a", "<i> b", ("a", "b")))


def test_words_that_differ_are_marked(app):
    shown = app.answers("It", " is a cat", " is a dog", ("Stock", "Spiking"))
    assert shown.count("<mark>") == 2 and "<mark>cat</mark>" in shown and "<mark>dog</mark>" in shown
    shown = app.answers("", {"good": 0.6, "bad": 0.4}, {"bad": 0.7, "good": 0.3}, ("Stock", "Spiking"))
    assert shown.count("<mark>") == 4
    assert "<mark>" not in app.answers("It", " is a", " is a", ("Stock", "Spiking"))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_rates_and_costs_are_those_of_the_project(case, settings, app):
    """The Space cannot import the project; what it counts itself is held to what the project counts."""
    network = sys.modules["network"]
    model = backbones.model(*case, **settings)
    inputs = {name: each[:1] for name, each in backbones.batch(*case).items()}
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        model(**inputs)
    found = network.watch(model, inputs)
    assert {site.name: site.rate for site in found} == pytest.approx(monitor.spike_rates(), abs=1e-6)
    T, schedule, causal = model.config.T, model.config.schedule, model.config.table.causal
    rates = {site.name: site.rate for site in found}
    expected = energy_report(model, 9, execution=schedule, T=T, spike_rates=rates, causal=causal)
    energy, reads = network.cost(model, found, 9, T, schedule)
    assert (energy, reads) == pytest.approx((expected["ratio"], expected["reads_ratio"]), rel=1e-6)


def test_the_neurons_of_a_raster_are_evenly_spaced_not_the_busiest(app, tmp_path):
    model = backbones.model("gpt2", "AutoModelForCausalLM", T=4, n_inner=200)
    found = sys.modules["network"].watch(model, {"input_ids": torch.arange(2, 22)[None]})
    assert found[0].sample.shape == (4, 12, 64) and found[0].rates.shape == (20,)
    assert "64 of 200 neurons, evenly spaced" in app.raster(found[0], ["a"] * 20)


@pytest.mark.parametrize("kind", ["gpt2", "classifier"])
def test_more_tokens_than_positions_are_cut_and_said(kind, app, tmp_path):
    model, tokenizer = made(kind, tmp_path, calibrated=False)
    _, summary, *_ = app.run(model, tokenizer, "the cat sat " * 40, 2, "stepwise", 4 if kind == "gpt2" else 0)
    assert f"Only the first {28 if kind == 'gpt2' else 32} of" in summary


def test_the_length_of_a_calibration_by_position_is_a_limit(app, tmp_path):
    model, tokenizer = made("gpt2", tmp_path, calibrated=False)
    model.begin_calibration(2, "position", length=8)
    assert app.positions(model) == 8
    _, summary, *_ = app.run(model, tokenizer, "the cat sat on the mat", 2, "stepwise", 2)
    assert "Only the first 6 of" in summary


def test_positions_that_begin_late_are_no_room(app):
    model = backbones.model("roberta", "AutoModelForSequenceClassification")
    assert app.positions(model) == model.config.max_position_embeddings + model.config.table.positions


@pytest.mark.parametrize(
    ("text", "new_tokens", "message"),
    [
        ("word " * 1_000_000, 3, "at most 20,000 characters, got 5,000,000"),
        ("the cat", 40, "New tokens must be fewer than the 32 positions of the model, got 40"),
        ("the cat", 32, "New tokens must be fewer than the 32 positions"),
        (" \n", 3, "Write a text first"),
    ],
    ids=["a-million-words", "too-many-new", "no-room", "empty"],
)
def test_what_cannot_be_run_is_a_message(text, new_tokens, message, app, tmp_path):
    model, tokenizer = made("gpt2", tmp_path)
    with pytest.raises(Refused, match=message):
        app.run(model, tokenizer, text, 2, "stepwise", new_tokens)


@pytest.mark.parametrize("kind", ["gpt2", "classifier", "mlm"])
def test_every_example_can_be_run(kind, app, tmp_path):
    model, tokenizer = made(kind, tmp_path)
    for text in app.examples(model, tokenizer):
        app.run(model, tokenizer, text, 2, "stepwise", 3 if kind == "gpt2" else 0)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert", "architectures": ["BertModel"]}'])
def test_a_folder_that_is_no_checkpoint_is_a_message(content, app, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        app.main()
    said = capsys.readouterr().err
    assert "`checkpoint` must be one that loads" in said and "Traceback" not in said
