"""Checkpoints keep their behaviour beside others of another version, and under newer code than they were saved by."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import modeling_fas
from checkpoints import MODELS, tiny_checkpoint
from configuration_fas import __version__
from training.publish.clean_load import auto_class_name, probe_logits


FROZEN = Path(__file__).parent / "frozen"
RELEASES = sorted(path.name for path in FROZEN.iterdir() if path.is_dir())
CASES = [(release, path.name) for release in RELEASES for path in sorted((FROZEN / release).glob("fas_*"))]


def assemble(release, name, target):
    """A frozen checkpoint with the code files of its release, as it was published."""
    shutil.copytree(FROZEN / release / name, target)
    for path in (FROZEN / release).glob("*.py.txt"):
        shutil.copy(path, target / path.stem)
    return target


def expected(release, name):
    return load_file(FROZEN / release / name / "logits.safetensors")


@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_checkpoint_of_every_release_runs_on_the_code_of_today(release, name):
    folder = FROZEN / release / name
    config = json.loads((folder / "config.json").read_text())
    assert config["fas_version"] == release
    model, report = getattr(modeling_fas, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__ == "modeling_fas"
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for run, logits in probe_logits(model).items():
        # Another machine may order its sums otherwise; 1e-5 is far below one spike (about 0.1 here).
        torch.testing.assert_close(logits, expected(release, name)[run], atol=1e-5, rtol=0, msg=run)


LOAD_ALL = """
import importlib.util, json, sys, torch, transformers
from safetensors.torch import save_file
spec = importlib.util.spec_from_file_location("clean_load", sys.argv[1])
clean_load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_load)
models = {}
for folder in sys.argv[2:]:
    config = json.load(open(folder + "/config.json"))
    auto = getattr(transformers, clean_load.auto_class_name(config))
    models[folder] = auto.from_pretrained(folder, trust_remote_code=True)
for folder, model in models.items():
    save_file(clean_load.probe_logits(model), folder + "/found.safetensors")
    print(folder, model.config.fas_version, sys.modules[type(model).__module__].__version__)
"""


@torch.no_grad()
def test_the_code_of_today_gives_what_the_code_of_every_release_gives_here(tmp_path, run_outside):
    """Bit for bit: on one machine, and so with sums in one order."""
    from training.publish import clean_load

    folders = {case: assemble(*case, tmp_path / "-".join(case)) for case in CASES}
    said = run_outside(["-c", LOAD_ALL, clean_load.__file__, *map(str, folders.values())])
    assert [line.split()[2] for line in said.splitlines()] == [release for release, _ in CASES]
    for (release, name), folder in folders.items():
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        found = load_file(folder / "found.safetensors")
        assert found.keys() == expected(release, name).keys()
        for run, logits in probe_logits(
            getattr(modeling_fas, architecture).from_pretrained(FROZEN / release / name)
        ).items():
            assert torch.equal(logits, found[run]), f"{name} {run}"


@pytest.mark.slow
def test_two_versions_in_one_process_keep_their_own_behaviour(tmp_path, run_outside):
    """The older one takes every threshold for 0.9 at least; it is loaded before and after the other."""
    from training.publish import clean_load

    model = tiny_checkpoint(tmp_path / "new", "classifier", results=False)
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    change(old / "neurons_fas.py", "MIN_THRESHOLD = 1e-4", "MIN_THRESHOLD = 0.9")
    change(old / "configuration_fas.py", f'__version__ = "{__version__}"', '__version__ = "0.0.1"')
    shutil.copytree(tmp_path / "new", tmp_path / "new2")
    shutil.copytree(old, tmp_path / "old2")
    frozen = [str(assemble(release, name, tmp_path / f"{release}-{name}")) for release, name in CASES]
    order = [str(tmp_path / name) for name in ("old", "new", "old2", "new2")] + frozen
    said = run_outside(["-c", LOAD_ALL, clean_load.__file__, *order])

    assert [line.split()[1:] for line in said.splitlines()[:4]] == [["0.0.1"] * 2, [__version__] * 2] * 2
    logits = {name: load_file(tmp_path / name / "found.safetensors") for name in ("old", "new", "old2", "new2")}
    for run, reference in probe_logits(model).items():
        assert torch.equal(logits["new"][run], reference) and torch.equal(logits["new2"][run], reference)
        assert torch.equal(logits["old"][run], logits["old2"][run])
    assert not torch.equal(logits["old"]["T=0 stepwise"], logits["new"]["T=0 stepwise"])
    for release, name in CASES:
        found = load_file(tmp_path / f"{release}-{name}" / "found.safetensors")
        for run, reference in expected(release, name).items():
            torch.testing.assert_close(found[run], reference, atol=1e-5, rtol=0, msg=f"{name} {run}")


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_every_architecture_names_its_auto_class(tmp_path):
    for kind, model_class in MODELS.items():
        tiny_checkpoint(tmp_path / kind, kind, results=False)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        mapping = getattr(transformers, auto_class_name(config))._model_mapping
        assert mapping[model_class.config_class] is model_class
