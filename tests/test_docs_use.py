"""Every example of docs/use.md runs: in a process that cannot import this repository, but for those that need it."""

import importlib.util
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from checkpoints import tiny_checkpoint, tiny_tokenizer


TEXT = (Path(__file__).parents[1] / "docs" / "use.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- example: ([\w-]+)( peft| project)? -->\n```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_of_python_is_tested():
    assert len(EXAMPLES) == TEXT.count("```python") == 7


def test_the_examples_with_the_project_run(tmp_path, monkeypatch):
    folder = tmp_path / "user" / "gpt2-stock"
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tiny_tokenizer("gpt2", folder).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    chosen = [code for _, needs, code in EXAMPLES if needs == " project"]
    assert len(chosen) == 2
    for code in chosen:
        exec(code, {})
    assert AutoModelForCausalLM.from_pretrained("spiking").config.T == 5


@pytest.mark.slow
def test_the_examples_run(tmp_path, run_outside):
    for kind in ("gpt2", "mlm", "classifier"):
        tiny_checkpoint(tmp_path / "user" / kind, kind, results=False)
    outside = [(needs, code) for _, needs, code in EXAMPLES if needs != " project"]
    chosen = [code for needs, code in outside if not needs or importlib.util.find_spec("peft")]
    script = tmp_path / "examples.py"
    script.write_text("\n".join(f"exec({code!r}, {{}}); print('ran')" for code in chosen))
    assert run_outside([str(script)]).count("ran\n") == len(chosen)
