"""Blocks of README and docs run as printed, page by page, in the order of the page.

Names that stand for checkpoints on the Hub are folders with tiny models here. `NOT_RUN` says which blocks do not run,
and why; pages that are not in `PAGES` have tests of their own (`OWN`) or none yet (`NOT_YET`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from checkpoints import tiny_checkpoint, tiny_tokenizer


ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/start.md", "docs/convert.md", "docs/calibration.md")
OWN = {"docs/use.md": "tests/test_docs_use.py", "docs/ecosystem.md": "tests/test_ecosystem.py"}
NOT_YET = {"docs/training.md", "docs/measurement.md", "docs/publishing.md", "docs/speed.md", "docs/add-a-backbone.md"}
# What a block that does not run contains, and why.
NOT_RUN = {
    "pip install": "installs, from the network",
}


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(python|bash)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_every_page_with_blocks_is_accounted_for():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if blocks(page)} == {*PAGES, *OWN, *NOT_YET}
    assert all((ROOT / test).is_file() for test in OWN.values())


def test_every_reason_not_to_run_a_block_is_needed():
    text = "".join(code for page in PAGES for _, code in blocks(page))
    assert [mark for mark in NOT_RUN if mark not in text] == []


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like that of a clone, with checkpoints under the names that pages use, and the command `fas`."""
    gpt2, bert = tmp_path / "openai-community" / "gpt2", tmp_path / "google-bert" / "bert-base-cased"
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 256, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(gpt2)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=64)).save_pretrained(bert)
    llama = tmp_path / "outputs" / "demo-llm" / "stock"
    sizes = {"num_hidden_layers": 11, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, bos_token_id=0, eos_token_id=0)).save_pretrained(llama)
    for kind, folder in (("gpt2", gpt2), ("bert-base", bert), ("gpt2", llama)):
        tiny_tokenizer(kind, folder).save_pretrained(folder)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    tiny_checkpoint(tmp_path / "user" / "name", "gpt2", results=False, calibrated=False)
    folder = tmp_path / "user" / "classifier"
    model = tiny_checkpoint(folder, "classifier", results=False, calibrated=False, **labels)
    with torch.no_grad():
        for _, neuron in model.neurons():
            neuron.threshold.mul_(1.1)  # as if it were trained
    model.save_pretrained(folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = tmp_path / "bin" / "fas"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m training.cli "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_as_printed(page, place):
    names: dict = {}
    for language, code in blocks(page):
        if any(mark in code for mark in NOT_RUN):
            continue
        if language == "python":
            exec(compile(code, page, "exec"), names)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
