"""Every block of Python in docs/use.md runs as printed; where it needs no project, without this repository."""

import importlib.util
import re
from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint


TEXT = (Path(__file__).parents[1] / "docs" / "use.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_with_the_project_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = [code for code in EXAMPLES if "from fas import" in code]
    assert len(chosen) == 1
    for code in chosen:
        exec(code, {})
    assert (tmp_path / "outputs" / "llama" / "config.json").is_file()


@pytest.mark.slow
def test_the_examples_run(tmp_path, run_outside):
    for kind in ("gpt2", "mlm", "classifier"):
        tiny_checkpoint(tmp_path / "user" / kind, kind, results=False)
    outside = [code for code in EXAMPLES if "from fas import" not in code]
    assert len(outside) == 3
    chosen = [code for code in outside if "from peft" not in code or importlib.util.find_spec("peft")]
    script = tmp_path / "examples.py"
    script.write_text("\n".join(f"exec({code!r}, {{}}); print('ran')" for code in chosen))
    assert run_outside([str(script)]).count("ran\n") == len(chosen)
