"""The recipes of `model_cards/`: commands that exist, cards that name them, and runs that go on where they stopped."""

import json

import pytest
import yaml

from benchmarks import checkpoints
from training import untrained
from training.arguments import DataArguments, FASTrainingArguments, ModelArguments, parse_flags, read_fields
from training.evaluate.command import make_parser


RECIPES = sorted(checkpoints.CARDS.glob("*.yaml"))
KNOWN = {"OUT": "out", "DATA": "data", "MODELS": "models", "MINILM": "minilm", "SMOLLM2": "smollm2"}
RECIPE = """
repo_id: someone/tiny
license: mit
language: [en]
base_model: their/base
steps:
  - convert $SMOLLM2 --output_dir $OUT/spiking
  - evaluate
    $OUT/spiking
"""


def recipe(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_step_of_a_recipe_is_a_command_that_is_understood(path):
    steps = [checkpoints.command(step, KNOWN) for step in recipe(path)["steps"]]
    for name, *flags in steps:
        if name == "train":
            parsed = parse_flags(flags)
            model = read_fields(ModelArguments, parsed)
            assert read_fields(FASTrainingArguments, parsed).output_dir.startswith("out/")
            assert read_fields(DataArguments, parsed).train_file and model.model_name_or_path
        else:
            parser = {"convert": untrained.make_parser, "evaluate": make_parser}[name]()
            assert parser.parse_args(flags).output_dir.startswith("out/spiking" if name == "evaluate" else "out/")
    assert steps[-1][0] == "evaluate" and steps[-1][1] == "out/spiking"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_card_names_the_recipe_and_the_weights_that_it_made(path):
    if not path.with_suffix(".json").is_file():
        pytest.skip(f"{path.stem} was not made yet")
    content, card = json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()
    commands = [f"fas {' '.join(step.split())}" for step in recipe(path)["steps"]]
    assert content["options"]["commands"] == commands and content["repo_id"] == recipe(path)["repo_id"]
    assert all(command in card for command in commands)
    assert content["sources"]["records"][0]["content"]["configuration"]["weights_sha256"] in card


def test_a_variable_that_stands_for_nothing_is_named():
    with pytest.raises(ValueError, match=r"`\$SMOLLM2` must be known, .* step 'convert'"):
        checkpoints.command("convert $SMOLLM2", KNOWN | {"SMOLLM2": ""})


def test_finished_steps_are_skipped_and_another_recipe_is_refused(tmp_path, monkeypatch):
    ran, cards = [], []
    monkeypatch.setattr(checkpoints, "CARDS", tmp_path)
    monkeypatch.setenv("SMOLLM2", "/models/smol")
    monkeypatch.setattr(checkpoints, "write_card", lambda *args: cards.append(args))

    def run(words, check):
        ran.append(words[3:])
        if len(ran) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.subprocess, "run", run)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.make("tiny", tmp_path / "out")
    assert not cards
    checkpoints.make("tiny", tmp_path / "out")
    out = tmp_path / "out" / "tiny"
    convert = ["convert", "/models/smol", "--output_dir", f"{out}/spiking"]
    evaluate = ["evaluate", f"{out}/spiking"]
    assert ran == [convert, evaluate, evaluate]
    ((folder, repo_id, options, path),) = cards
    assert (folder, repo_id, path) == (out / "spiking", "someone/tiny", tmp_path / "tiny.md")
    assert options.commands == ["fas convert $SMOLLM2 --output_dir $OUT/spiking", "fas evaluate $OUT/spiking"]
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("convert $SMOLLM2", "convert $MINILM"))
    with pytest.raises(ValueError, match="must not hold tiny by another recipe"):
        checkpoints.make("tiny", tmp_path / "out")
