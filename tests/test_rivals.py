"""Rivals, as far as they can be tested without them: environments, processes, the models they are given."""

import sys

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.rivals import environment, las_bert, spikingjelly_qwen2


ROWS = [[5, 6, 7], [8, 9]]
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# A module as LAS has it: its model is the stock one, with doubled logits.
STANDS_IN = """
from transformers import AutoModelForSequenceClassification

class SNNAutoModelForSequenceClassification:
    def from_pretrained(folder):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model.classifier.weight.data *= 2
        model.classifier.bias.data *= 2
        return model
"""


def test_an_environment_is_made_once_and_again_for_other_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "FOLDER", tmp_path)
    made, installed = [], []

    def create(folder, **options):
        made.append((folder, options))
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environment.venv, "create", create)
    monkeypatch.setattr(environment.subprocess, "check_output", lambda *args, **more: f"{tmp_path}\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda words, check: installed.append(words[4:]))
    python = environment.python_of("one", ["a==1", "b==2"], beside_ours=True)
    assert environment.python_of("one", ["a==1", "b==2"], beside_ours=True) == python == tmp_path / "one/bin/python"
    assert made == [(tmp_path / "one", {"with_pip": True, "clear": True})]
    assert installed == [["--quiet", "--no-deps", "a==1", "b==2"]]
    assert (tmp_path / "ours.pth").read_text().strip() in sys.path
    environment.python_of("one", ["a==3"], beside_ours=False)
    assert len(made) == 2 and installed[1] == ["--quiet", "a==3"]


def test_a_failed_installation_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "FOLDER", tmp_path)
    monkeypatch.setattr(environment.venv, "create", lambda folder, **options: folder.mkdir(exist_ok=True))
    tries = []

    def run(words, check):
        tries.append(words)
        if len(tries) == 1:
            raise OSError("no network")

    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(OSError, match="no network"):
        environment.python_of("one", ["a==1"], beside_ours=False)
    environment.python_of("one", ["a==1"], beside_ours=False)
    assert len(tries) == 2


def test_las_runs_in_its_own_process_on_the_rows_and_the_model_it_is_given(tmp_path, monkeypatch):
    torch.manual_seed(0)
    stock = BertForSequenceClassification(BertConfig(**SMALL, initializer_range=0.5)).eval()
    stock.save_pretrained(tmp_path / "model")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "bert_SNN_LAS.py").write_text(STANDS_IN)
    monkeypatch.setattr(las_bert, "python_of", lambda *args, **more: sys.executable)
    monkeypatch.setattr(las_bert, "checkout", lambda source: tmp_path / "source")
    found = las_bert.las(tmp_path / "model", ROWS, "")
    with torch.inference_mode():
        wanted = [stock(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    torch.testing.assert_close(torch.tensor(found["stock"]["logits"]), torch.stack(wanted))
    torch.testing.assert_close(torch.tensor(found["LAS"]["logits"]), 2 * torch.stack(wanted))
    assert found["LAS"]["seconds"] > 0 < found["stock"]["seconds"]


def test_a_llama_becomes_the_qwen2_of_the_same_function(tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.5)).eval()
    llama.save_pretrained(tmp_path)
    qwen2 = spikingjelly_qwen2.as_qwen2(tmp_path)
    assert qwen2.config.model_type == "qwen2"
    ids = torch.arange(2, 14)[None]
    with torch.inference_mode():
        torch.testing.assert_close(qwen2(ids).logits, llama(ids).logits)
