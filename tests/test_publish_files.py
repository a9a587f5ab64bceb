"""Files of a checkpoint folder: each is what its name says, nothing in it is secret, and nothing runs code."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from hub_server import WRITE_TOKEN
from training.publish import upload as publishing
from training.publish import verification
from training.publish.code import VerificationError
from training.publish.files import check_weights, find_secret
from training.publish.upload import publish
from training.results import write_results


HF_OAUTH = "hf_oauth_" + "AbCd1234-EfGh5678_IjKl"
HF_JWT = "hf_jwt_" + "MnOp1234.QrSt5678.UvWx"
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_json(path, content):
    path.write_text(json.dumps(content))


def zipped_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps([1]))


def png(path, behind=b"", **texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text, zip=True)
    Image.new("L", (8, 8)).save(path, pnginfo=chunks)
    path.write_bytes(path.read_bytes() + behind)


def index(folder, name):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})


def weights_metadata(folder, **metadata):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", **metadata})


def outside(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index(folder, "../outside.safetensors")


def pickled_shard(folder):
    torch.save({"x": torch.ones(1)}, folder / "x.bin")
    index(folder, "x.bin")


OLD_PICKLE = b"cos\nsystem\n(S'true'\ntR."  # protocol 0: no mark at its beginning
CLASSIFIER = "FASBertForSequenceClassification"
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
SPOILED = {
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"anything"), "must not be a pickle"),
    "pickle-by-content": (lambda f: (f / "model-notes.dat").write_bytes(pickle.dumps([1])), "must not be a pickle"),
    "pickle-as-weights": (lambda f: zipped_pickle(f / "model.safetensors"), "must not be a pickle"),
    "pickle-as-vocabulary": (lambda f: (f / "spiece.model").write_bytes(pickle.dumps([1])), "must not be a pickle"),
    "old-pickle-as-vocabulary": (
        lambda f: (f / "spiece.model").write_bytes(OLD_PICKLE),
        "must be a whole .model file",
    ),
    "pickle-as-plot": (lambda f: (f / "x.png").write_bytes(pickle.dumps([1])), "must not be a pickle"),
    "old-pickle-as-plot": (lambda f: (f / "x.png").write_bytes(OLD_PICKLE), "must be a whole .png file"),
    "pickle-behind-a-plot": (lambda f: png(f / "x.png", pickle.dumps([1])), "bytes behind the end"),
    "old-pickle-as-text": (lambda f: (f / "merges.txt").write_bytes(OLD_PICKLE + b"\0"), "bytes that are no text"),
    "latin-1": (lambda f: (f / "vocab.txt").write_bytes("é".encode("latin-1")), "must be a whole .txt file.*utf-8"),
    "half-written-weights": (
        lambda f: os.truncate(f / "model.safetensors", 3000),
        "must be a whole .safetensors file",
    ),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "must hold weights as safetensors"),
    "no-code": (lambda f: (f / "modeling_fas.py").unlink(), "`modeling_fas.py` must be in"),
    "no-config": (lambda f: (f / CONFIG).unlink(), "`config.json` must be in"),
    "broken-config": (lambda f: (f / CONFIG).write_text('{"model_type": '), "`config.json` must be readable JSON"),
    "config-of-a-list": (lambda f: (f / CONFIG).write_text("[]"), "`config.json` must hold a JSON object, got list"),
    "deep-config": (lambda f: (f / CONFIG).write_text('{"x":' * 99_999), "`config.json` must be readable JSON"),
    "stock-config": (lambda f: edit_json(f / CONFIG, model_type="bert"), "`model_type` in config.json must be"),
    "no-architecture": (lambda f: edit_json(f / CONFIG, architectures=3), "`architectures` in config.json must"),
    "no-auto-map": (lambda f: edit_json(f / CONFIG, auto_map={}), "`auto_map` in config.json must"),
    "broken-tokenizer": (lambda f: (f / TOKENIZER).write_text("{"), f"`{TOKENIZER}` must be readable JSON"),
    "broken-vocabulary": (lambda f: (f / "tokenizer.json").write_text("x"), "`tokenizer.json` must be readable JSON"),
    "broken-results": (lambda f: (f / "evaluation.json").write_text("x"), "`evaluation.json` must be readable JSON"),
    "broken-calibration": (lambda f: (f / "calibration.json").write_text("x"), "`calibration.json` must be readable"),
    "broken-index": (lambda f: (f / "model.safetensors.index.json").write_text("x"), "must be readable JSON"),
    "broken-record": (lambda f: (f / "trainer_state.json").write_text("x"), "trainer_state.json` must be readable"),
    "broken-card": (lambda f: (f / "README.md").write_text("---\nlicense: [\n---\n"), "`README.md` in .* model card"),
    "link": (lambda f: (f / "vocab.txt").symlink_to("/etc/passwd"), "must be a file of its own, got a link"),
    "escaping-shard": (outside, r"`weight_map` .* got '\.\./outside.safetensors'"),
    "pickled-shard": (pickled_shard, "`weight_map` .* got 'x.bin'|must not be a pickle"),
    "shard-of-a-list": (lambda f: index(f, ["x"]), r"`weight_map` .* got \['x'\]"),
    "index-of-a-list": (
        lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": 3}),
        "a mapping, got 3",
    ),
    "foreign-code": (
        lambda f: edit_json(f / CONFIG, auto_map={"AutoModel": "a/b--modeling_fas.FASBertModel"}),
        "`auto_map` in config.json",
    ),
    "foreign-module": (
        lambda f: edit_json(f / CONFIG, auto_map={"AutoModel": "helpers.Model"}),
        "got 'helpers.Model'",
    ),
    "foreign-class": (lambda f: edit_json(f / CONFIG, auto_map={"AutoModel": "modeling_fas.os.x"}), "`auto_map` in"),
    "foreign-key": (
        lambda f: edit_json(f / CONFIG, auto_map={"pipeline": f"modeling_fas.{CLASSIFIER}"}),
        "`auto_map` in config.json must map Auto classes of models",
    ),
    "nested-auto-map": (
        lambda f: edit_json(f / CONFIG, text_config={"auto_map": {"AutoModel": "x.Y"}}),
        "`auto_map` in config.json",
    ),
    "tokenizer-code": (
        lambda f: edit_json(f / TOKENIZER, auto_map={"AutoTokenizer": ["modeling_fas.Tok", None]}),
        f"`auto_map` in {TOKENIZER} must map Auto classes of models",
    ),
    "old-tokenizer-code": (lambda f: edit_json(f / TOKENIZER, auto_map=["x.Tok", None]), f"`auto_map` in {TOKENIZER}"),
    "generation-code": (
        lambda f: write_json(f / "generation_config.json", {"auto_map": {"AutoModel": "helpers.X"}}),
        "`auto_map` in generation_config.json",
    ),
    "pipeline-code": (
        lambda f: edit_json(f / CONFIG, custom_pipelines={"x": {"impl": "pipe.P"}}),
        "`custom_pipelines` in config.json",
    ),
    "token": (lambda f: edit_json(f / "evaluation.json", command=f"run {WRITE_TOKEN}"), "a Hugging Face access token"),
    "token-of-a-flag": (
        lambda f: edit_json(f / "evaluation.json", command="run --hub_token abc"),
        "setting that is secr",
    ),
    "token-of-a-setting": (
        lambda f: edit_json(f / "evaluation.json", x={"hub_token": "abc"}),
        "setting that is secret",
    ),
    "token-in-escapes": (
        lambda f: (f / TOKENIZER).write_text(json.dumps({"x": GITHUB}).replace("ghp_", "\\u0067hp_")),
        "a GitHub Token",
    ),
    "token-in-weights": (lambda f: weights_metadata(f, note=HF_OAUTH), "`model.safetensors` must not hold a secret"),
    "token-in-a-plot": (lambda f: png(f / "x.png", Comment=f"by {GITHUB}"), "`x.png` must not hold a secret"),
    "token-in-code": (lambda f: (f / "sites_fas.py").open("a").write(f"# {HF_JWT}\n"), "`sites_fas.py` must not hold"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_refuses_a_spoiled_folder_before_anything_is_loaded_or_uploaded(spoil, message, folder, monkeypatch):
    monkeypatch.setattr(publishing, "upload", lambda *args: pytest.fail("uploaded"))
    monkeypatch.setattr(verification, "_load_apart", lambda *args: pytest.fail("loaded"))
    spoil(folder)
    with pytest.raises(VerificationError, match=message) as error:
        publish(folder, "tester/tiny", api=HfApi(token=WRITE_TOKEN))
    assert not any(secret in str(error.value) for secret in (WRITE_TOKEN, GITHUB, HF_OAUTH, HF_JWT, "abc"))


def test_a_token_of_the_vocabulary_may_be_called_auto_map(folder, monkeypatch):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"auto_map": 60, "hub_token": 61}
    write_json(folder / "tokenizer.json", content)
    publishing.stage(folder, folder.parent / "staged")


@pytest.mark.parametrize(
    "text",
    [
        *(f"x={WRITE_TOKEN}", HF_OAUTH, HF_JWT, GITHUB, AWS, "github_pat_" + "a" * 30, "sk_live_" + "a1B2" * 6),
        *("https://me:s3cret-word@example.org/x", "-----BEGIN RSA PRIVATE KEY-----"),
        "xoxb-" + "123456789012-abcdefghijkl",
    ],
)
def test_secrets_are_known_by_their_form(text):
    assert find_secret(f"before {text} after")


def test_secrets_of_this_session_are_found_whatever_their_form(monkeypatch):
    assert find_secret("nothing-special-at-all") is None
    monkeypatch.setenv("MY_API_KEY", "nothing-special-at-all")
    assert find_secret("x nothing-special-at-all y") == "an access token of this session"


@pytest.mark.parametrize("text", ["hf_modules_cache", "hf_hub_download(repo)", '"##hf": 1', "ghp_ and sk_", "a@b.org"])
def test_ordinary_text_is_no_secret(text):
    assert find_secret(text) is None


@pytest.mark.parametrize(
    "flag", ["--hub_token", "--calibrated.hub_token", "--push_to_hub_token", "--api-key", "--token"]
)
@pytest.mark.parametrize("join", [" ", "="])
def test_the_value_of_a_secret_flag_is_never_recorded(flag, join, tmp_path):
    command = ["python", "x.py", *f"{flag}{join}s3cret words".split(" ", 1), "--seed", "1"]
    if join == "=":
        command = ["python", "x.py", f"{flag}=s3cret words", "--seed", "1"]
    configuration = {"steps": {"a": {flag.lstrip("-"): "s3cret words"}}, "pad_token": "<pad>", "gain": "token"}
    write_results(tmp_path / "results.json", metrics=[], configuration=configuration, command=command)
    text = (tmp_path / "results.json").read_text()
    assert "s3cret" not in text and "--seed 1" in text
    assert '"pad_token": "<pad>"' in text and '"gain": "token"' in text


@pytest.mark.parametrize("spoil", ["escaping-shard", "pickled-shard", "no-config"])
def test_a_card_needs_weights_that_stay_in_the_folder_too(spoil, folder):
    check_weights(folder)
    SPOILED[spoil][0](folder)
    with pytest.raises(VerificationError):
        check_weights(folder)
