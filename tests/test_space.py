"""The demo Space without its page: what a visitor may type ends in an answer or a message."""

import importlib.util
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

import backbones
from checkpoints import tiny_model, tiny_tokenizer


APP = Path(__file__).resolve().parents[1] / "examples" / "space" / "app.py"


class Refused(Exception):
    """Stands for `gradio.Error`."""


@pytest.fixture
def app(monkeypatch):
    """The module, with a stand-in for gradio, which only the page needs."""
    monkeypatch.setitem(matplotlib.rcParams, "text.parse_math", True)
    gradio = ModuleType("gradio")
    gradio.Error, gradio.Blocks = Refused, object
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "space_app", module)
    spec.loader.exec_module(module)
    return module


def made(kind, tmp_path, **settings):
    return tiny_model(kind, **settings), tiny_tokenizer(kind, tmp_path)


def draw(*figures):
    for figure in figures:
        figure.savefig(BytesIO())


@pytest.mark.parametrize("text", ["$\\foo$", "$$ the $\\cat", "the cat", "<img src=x onerror=alert(1)>"])
def test_a_text_of_any_signs_is_drawn(text, app, tmp_path):
    model, tokenizer = made("gpt2", tmp_path)
    ann, spiking, *figures, summary = app.run(model, tokenizer, text, 2, "stepwise", 3)
    draw(*figures)
    assert isinstance(ann, str) and isinstance(spiking, str)
    assert "spikes" in summary and "Only the first" not in summary


def test_a_token_that_looks_like_mathematics_is_a_label(app):
    sites = [app.Site("h.0.mlp.act", app.torch.ones(2, 3, 4)), app.Site("$\\foo$", app.torch.ones(2, 3, 4))]
    draw(app.raster(sites, ["$\\foo$", "$", "a\nb"], 2), app.rates(sites))


@pytest.mark.parametrize("kind", ["gpt2", "classifier"])
def test_more_tokens_than_positions_are_cut_and_said(kind, app, tmp_path):
    model, tokenizer = made(kind, tmp_path, calibrated=False)
    *_, summary = app.run(model, tokenizer, "the cat sat " * 40, 2, "stepwise", 4 if kind == "gpt2" else 0)
    assert f"Only the first {28 if kind == 'gpt2' else 32} of" in summary


def test_the_length_of_a_calibration_by_position_is_a_limit(app, tmp_path):
    model, tokenizer = made("gpt2", tmp_path, calibrated=False)
    model.begin_calibration(2, "position", length=8)
    assert app.positions(model) == 8
    *_, summary = app.run(model, tokenizer, "the cat sat on the mat", 2, "stepwise", 2)
    assert "Only the first 6 of" in summary


def test_positions_that_begin_late_are_no_room(app):
    model = backbones.model("roberta", "AutoModelForSequenceClassification")
    assert app.positions(model) == model.config.max_position_embeddings + model.config.table.positions
    assert model.config.table.positions < 0


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


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert", "architectures": ["BertModel"]}'])
def test_a_folder_that_is_no_checkpoint_is_a_message(content, app, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        app.main()
    said = capsys.readouterr().err
    assert "`checkpoint` must be one that loads" in said and "Traceback" not in said
