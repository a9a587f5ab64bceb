"""Blocks of README and docs run as printed, page by page, in the order of the page.

Names that stand for checkpoints on the Hub are folders with tiny models here. `NOT_RUN` says which blocks do not run,
and why. A block after `<!-- needs: NAMES -->` runs where these packages are installed.
"""

import importlib.util
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
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import configuration_fas
import modeling_fas
from checkpoints import tiny_checkpoint, tiny_tokenizer
from configuration_fas import BACKBONES


ROOT = Path(__file__).parents[1]
# What a block that does not run contains, and why.
NOT_RUN = {
    "pip install": "installs, from the network",
    "publish user/classifier your-name/classifier --license mit\n": "uploads; test_publish_end_to_end.py does",
    "serve --trust-remote-code": "a server does not end; test_conventions.py starts one",
    "-k neox": "tests of a backbone that is not there",
}
# Pages whose blocks are parts of modules, and these.
INSIDE = {"docs/add-a-backbone.md": (configuration_fas, modeling_fas)}
# Pages for those who do not have the project: what imports nothing of it runs where it cannot be imported.
OUTSIDE = ("docs/use.md",)
OURS = r"^\s*(from|import) (fas|training|modeling_fas|configuration_fas)\b"
# Other programs warn of what is theirs.
IGNORED = {"docs/ecosystem.md": [pytest.mark.filterwarnings("ignore")]}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """By block the packages that it needs, its language and its code."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"(?:<!-- needs: ([\w ]+) -->\n)?```(python|bash)\n(.*?)```", text, re.DOTALL)


PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if blocks(path)
}


def test_every_exception_is_needed():
    text = "".join(code for page in PAGES.values() for _, _, code in blocks(page))
    assert [mark for mark in NOT_RUN if mark not in text] == []
    assert {*INSIDE, *OUTSIDE, *IGNORED} <= {*PAGES} and len(PAGES) > 9


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like that of a clone, with checkpoints under the names that pages use, and the command `fas`."""
    gpt2, bert = tmp_path / "openai-community" / "gpt2", tmp_path / "google-bert" / "bert-base-cased"
    minilm, llama = (
        tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2",
        tmp_path / "outputs" / "demo-llm" / "stock",
    )
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 256, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(gpt2)
    sizes = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(bert)
    BertModel(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(minilm)
    sizes |= {"num_hidden_layers": 11, "bos_token_id": 0, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(llama)
    for kind, folder in (("gpt2", gpt2), ("bert-base", bert), ("bert-base", minilm), ("gpt2", llama)):
        tiny_tokenizer(kind, folder).save_pretrained(folder)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    for kind in ("gpt2", "mlm"):
        tiny_checkpoint(tmp_path / "user" / kind, kind, results=False, calibrated=False)
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


@pytest.fixture
def backbones():
    """The table, as it was before."""
    before = dict(BACKBONES)
    yield
    BACKBONES.clear()
    BACKBONES.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, marks=IGNORED.get(page, ())) for page in PAGES])
def test_blocks_run_as_printed(page, place, backbones, run_outside):
    names = {name: value for module in INSIDE.get(page, ()) for name, value in vars(module).items()}
    for needs, language, code in blocks(PAGES[page]):
        missing = [name for name in needs.split() if importlib.util.find_spec(name) is None]
        if missing or any(mark in code for mark in NOT_RUN):
            continue
        if language == "bash":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        elif page in OUTSIDE and not re.search(OURS, code, re.MULTILINE):
            run_outside(["-c", code])
        else:
            exec(compile(code, page, "exec"), names)
