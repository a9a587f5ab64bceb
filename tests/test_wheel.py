"""The wheel, installed in an environment of its own and run beside a folder `training` that is somebody else's."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from training_helpers import save_gpt2, write_corpus


ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The one that $FAS_WHEEL names, or built here, for which build fetches setuptools."""
    given = os.environ.get("FAS_WHEEL")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def fas(wheel, tmp_path_factory):
    """`fas(*words)`: the installed command, in a folder with a tiny GPT-2 and a foreign package `training`."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    # The dependencies of this environment; what it has installed by .pth files, as this project, is not among them.
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "work"
    (work / "training").mkdir(parents=True)
    (work / "training" / "__init__.py").write_text("raise ImportError('not the training of FAS')\n")
    save_gpt2(work / "gpt2")
    write_corpus(work / "corpus.json", 80)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str, status: int = 0) -> str:
        command = [python.with_name("fas"), *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    return run


def test_it_holds_the_command_the_types_and_the_recipes_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fas.py", "training/py.typed", "training/recipes/encoder.yaml", "training/cli.py"} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples", "docs"))]


def test_its_commands_convert_measure_and_generate_beside_a_foreign_training(fas):
    assert "commands:" in fas("--help")
    convert = "convert gpt2 --sites all --code phase --T 4 --calibration_file corpus.json --tokens 64 --limit 2"
    assert "The model is in spiking" in fas(*convert.split(), "--output_dir", "spiking")
    measure = "evaluate spiking --validation_file corpus.json --T 4 --limit 2 --window 16 --output_dir report"
    fas(*measure.split())
    assert "T = 4, phase code, layerwise; 3 tokens" in fas("generate", "spiking", "the film", "--max_new_tokens", "3")
    assert "must be a FAS checkpoint, got 'gpt2'" in fas("generate", "gpt2", "the film", status=1)
