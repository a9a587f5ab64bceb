"""An index of sharded weights: what transformers would read through it, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_fas import FASBertForSequenceClassification
from training.calibrate.conversion import _loaded
from training.evaluate.command import load_whole
from training.runner import _read_weights
from training.shards import check_shards, is_plain_name


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc/x", "a\\b", "C:x", "x\0y", 3])
def test_plain_names_cannot_leave_their_folder(name):
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["x.bin", "../outside.safetensors", "none.safetensors", "x.safetensors.bin", None])
def test_an_index_that_names_anything_else_is_refused_though_transformers_reads_it(name, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    torch.save(weights, folder / "x.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name in ("x.bin", "../outside.safetensors"):
        FASBertForSequenceClassification.from_pretrained(folder)
    refused(check_shards, folder)
    for load in (load_whole, _read_weights):
        refused(lambda source, load=load: load(FASBertForSequenceClassification, source, "checkpoint"), folder)
    refused(lambda source: _loaded(source, None, FASBertForSequenceClassification), folder)


def refused(refusing, folder):
    with pytest.raises(ValueError, match=r"`weight_map` in model\.safetensors\.index\.json must name safetensors"):
        refusing(folder)


def test_whole_shards_and_names_on_the_hub_pass(folder):
    model = FASBertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder.parent / "sharded", max_shard_size="20KB")
    assert len(list((folder.parent / "sharded").glob("model-*.safetensors"))) > 1
    check_shards(folder.parent / "sharded")
    check_shards("user/name")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        check_shards(tmp_path)
