"""Publishing without a second process: what is staged, what is refused, and what is left when an upload fails."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file

from checkpoints import tiny_checkpoint
from configuration_fas import __version__
from hub_server import READ_TOKEN, WRITE_TOKEN, Fault, local_client, running_hub
from modeling_fas import FASBertForSequenceClassification
from training.publish import upload as publishing
from training.publish import verification
from training.publish.card import CardOptions, build_card, read_sources
from training.publish.clean_load import probe_logits, token_ids
from training.publish.upload import PublishError, portable_tokenizer_settings, publish, stage, upload
from training.publish.verification import VerificationError, check_code, check_files, is_plain_name
from training.results import fingerprint, write_results


REPO = "tester/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    tiny_checkpoint(folder, "classifier")
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the checkpoint, to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def staged(checkpoint, tmp_path):
    """What is uploaded of the checkpoint."""
    stage(checkpoint, tmp_path / "staged")
    build_card(read_sources(checkpoint), REPO, CardOptions(license="mit")).save(tmp_path / "staged" / "README.md")
    return tmp_path / "staged"


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as server, local_client(server, monkeypatch):
        yield server


def push(hub, staged, repo_id=REPO, token=WRITE_TOKEN, revision="main"):
    api = HfApi(endpoint=hub.url, token=token)
    return upload(read_sources(staged), staged, repo_id, None, revision, CardOptions(license="mit"), "Publish", api)


# What is staged


def test_stages_what_a_checkpoint_needs_and_nothing_else(folder):
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoint-5").mkdir()
    (folder / "accuracy.png").write_bytes(b"\x89PNG")
    target = folder.parent / "target"
    stage(folder, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "accuracy.png",
        "config.json",
        "configuration_fas.py",
        "evaluation.json",
        "model.safetensors",
        "modeling_fas.py",
        "neurons_fas.py",
        "sites_fas.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tokenizer_settings_speak_the_language_of_transformers_4():
    settings = {"tokenizer_class": "TokenizersBackend", "is_local": True, "backend": "tokenizers"}
    settings |= {"extra_special_tokens": ["<a>"], "local_files_only": True, "pad_token": "<pad>"}
    assert portable_tokenizer_settings(settings) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "pad_token": "<pad>",
    }
    assert portable_tokenizer_settings({"tokenizer_class": "GPT2Tokenizer"}) == {"tokenizer_class": "GPT2Tokenizer"}


def test_config_names_the_version_of_the_code(folder):
    assert json.loads((folder / "config.json").read_text())["fas_version"] == __version__


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            publish(folder, REPO, dry_run=tmp_path / "out" / "published")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "out"]


# What is refused


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "import torch, socket",
        "from subprocess import run",
        "import requests as torch",
        "from ..secrets import key",
        "from .helpers import key",
        "from torch.hub import load",
        "from torch import load",
        "import torch.utils.cpp_extension",
        "import torch as t\nt.load('x')",
        "import torch\ntorch.os.system('true')",
        "open('/etc/passwd')",
        "eval('1')",
        "__import__('os')",
        "().__class__.__base__.__subclasses__()",
        "getattr((), '__subclasses__')",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from torch import *",
        "from triton.runtime import cache",
        "import triton\ntriton.tools.disasm",
        "def half(",
    ],
)
def test_refuses_code_that_reaches_beyond_the_model(line, tmp_path):
    path = tmp_path / "modeling_fas.py"
    path.write_text(f"import math\n{line}\n")
    with pytest.raises(VerificationError, match=r"`modeling_fas\.py`"):
        check_code(path)


def test_accepts_the_code_of_this_project(checkpoint):
    for name in verification.CODE_FILES:
        check_code(checkpoint / name)


def zipped_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps([1]))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILED = {
    "pickle": lambda f: (f / "pytorch_model.bin").write_bytes(b"anything"),
    "pickle-by-content": lambda f: (f / "model-notes.dat").write_bytes(pickle.dumps([1])),
    "pickle-in-safetensors-name": lambda f: zipped_pickle(f / "model.safetensors"),
    "half-written-weights": lambda f: os.truncate(f / "model.safetensors", 3000),
    "no-weights": lambda f: (f / "model.safetensors").unlink(),
    "no-code": lambda f: (f / "modeling_fas.py").unlink(),
    "no-config": lambda f: (f / "config.json").unlink(),
    "broken-config": lambda f: (f / "config.json").write_text('{"model_type": '),
    "link": lambda f: (f / "vocab.txt").symlink_to("/etc/passwd"),
    "foreign-code": lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "a/b--modeling_fas.FASBertModel"}),
    "foreign-module": lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "helpers.Model"}),
    "escaping-shard": lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../../etc/model.safetensors"}})
    ),
    "token": lambda f: edit_json(f / "evaluation.json", command=f"run --hub_token {WRITE_TOKEN}"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_refuses_a_spoiled_folder_before_anything_is_uploaded(spoil, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "upload", lambda *args: pytest.fail("uploaded"))
    monkeypatch.setattr(verification, "check_clean_load", lambda *args: None)
    spoil(folder)
    with pytest.raises(ValueError) as error:
        publish(folder, REPO, api=HfApi(token=WRITE_TOKEN))
    assert WRITE_TOKEN not in str(error.value)


def test_file_checks_pass_an_intact_folder(staged):
    check_files(staged)


def test_weights_other_than_the_model_in_memory_are_refused(folder, monkeypatch):
    """The comparison itself; that the other process gives these logits is tested end to end."""

    model = FASBertForSequenceClassification.from_pretrained(folder)
    found = probe_logits(model), token_ids(folder)
    assert list(found[0]) == ["T=0 stepwise", "T=2 stepwise", "T=2 layerwise", "T=4 stepwise", "T=4 layerwise"]
    monkeypatch.setattr(verification, "_load_elsewhere", lambda *args: found)
    verification.check_clean_load(folder, model, folder)
    model.neurons()[0][1].fine_threshold.data *= 1.1
    with pytest.raises(VerificationError, match="at T=2 stepwise differ"):
        verification.check_clean_load(folder, model, folder)


@dataclass
class CleanProcess:
    """Stands for the process that loads the folder by remote code: keeps how it was started, and answers honestly.

    Attributes:
        command: Of the process; `None` if it was not started.
        environment: Its environment.
        answer: What it found: logits by run, token ids. Empty: what is in the folder.
    """

    command: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    answer: tuple[dict[str, torch.Tensor], list[int] | None] | None = None

    def run(self, command, **options) -> subprocess.CompletedProcess:
        self.command, self.environment = command, options["env"]
        *_, folder, output = command
        model = FASBertForSequenceClassification.from_pretrained(folder)
        logits, ids = self.answer or (probe_logits(model), token_ids(folder))
        save_file(logits, output, metadata={"token_ids": json.dumps(ids)})
        return subprocess.CompletedProcess(command, 0, "", "")

    def interpreter(self, code: str) -> Any:
        """What a line of Python evaluates to where that process runs its script."""
        assert self.command is not None
        script = next(i for i, argument in enumerate(self.command) if argument.endswith(".py"))
        command = [*self.command[:script], "-c", f"import json, sys; print(json.dumps({code}))"]
        return json.loads(subprocess.check_output(command, env=self.environment, text=True))


@pytest.fixture
def clean_process(monkeypatch):
    process, run = CleanProcess(), subprocess.run

    def start(command, **options):
        return process.run(command, **options) if command[-1].endswith(".safetensors") else run(command, **options)

    monkeypatch.setattr(subprocess, "run", start)
    return process


def last_bit(answer):
    """The least change there is, of one run."""
    logits, ids = answer
    run, changed = list(logits.items())[-1]
    return logits | {run: torch.nextafter(changed, torch.tensor(torch.inf))}, ids


UNLIKE = {
    "last-bit": (last_bit, "at T=4 layerwise differ from the reference by"),
    "missing-run": (lambda answer: ({"T=0 stepwise": answer[0]["T=0 stepwise"]}, answer[1]), "runs at T=0 stepwise"),
    "tokens": (lambda answer: (answer[0], [*answer[1][:-1], 0]), "tokenizer must give the ids"),
}


@pytest.mark.parametrize(("change", "message"), UNLIKE.values(), ids=UNLIKE)
def test_what_a_clean_process_finds_otherwise_is_not_published(change, message, folder, clean_process, tmp_path):
    answer = probe_logits(FASBertForSequenceClassification.from_pretrained(folder)), token_ids(folder)
    clean_process.answer = answer
    assert publish(folder, REPO, dry_run=tmp_path / "same") == str(tmp_path / "same")
    clean_process.answer = change(answer)
    with pytest.raises(VerificationError, match=message):
        publish(folder, REPO, dry_run=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [*verification.CODE_FILES, *verification.LATER_CODE_FILES])
def test_code_that_reaches_beyond_the_model_is_neither_run_nor_published(name, folder, clean_process, tmp_path):
    with (folder / name).open("a") as file:
        file.write("import socket\n")
    with pytest.raises(VerificationError, match=f"`{name}`, line .*got `import socket`"):
        publish(folder, REPO, dry_run=tmp_path / "new")
    assert clean_process.command is None and not (tmp_path / "new").exists()


SECRETS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"]
SECRETS += ["WANDB_API_KEY", "hf_token"]


def test_the_clean_process_knows_neither_secrets_nor_this_repository(folder, clean_process, monkeypatch, tmp_path):
    for name in SECRETS:
        monkeypatch.setenv(name, "not for others")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("KEPT", "for all")
    publish(folder, REPO, dry_run=tmp_path / "new")
    environment = clean_process.environment
    assert "not for others" not in environment.values() and not environment.keys() & {*SECRETS, "PYTHONPATH"}
    assert (environment["KEPT"], environment["PATH"]) == ("for all", os.environ["PATH"])
    assert environment["HF_HUB_OFFLINE"] == environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert environment["HF_HOME"] != str(tmp_path)
    monkeypatch.chdir(verification.__file__.rpartition("/")[0])
    assert clean_process.interpreter("sys.flags.isolated") == 1
    assert not {"", os.getcwd()} & set(clean_process.interpreter("sys.path"))


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc/x", "a\\b", "C:x", "x\0y", 3])
def test_plain_names_cannot_leave_their_folder(name):
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "nowhere"}, "`folder` must be a checkpoint folder"),
        ({"repo_id": "tiny"}, "`repo_id` must be of the form user/name"),
        ({"repo_id": "../../x"}, "`repo_id` must be"),
        ({"dry_run": "."}, "`dry_run` must be a new or empty folder"),
    ],
)
def test_bad_arguments_are_named(settings, message, folder):
    with pytest.raises(ValueError, match=message):
        publish(**({"folder": folder, "repo_id": REPO, "dry_run": "new"} | settings))


def test_without_a_token_it_says_how_to_get_one(folder, monkeypatch):
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        publish(folder, REPO)


def test_a_report_of_other_weights_is_refused_before_anything_is_uploaded(folder, monkeypatch):
    """Of the weights in the folder, it travels along; the slow part, the other process, is left out."""
    monkeypatch.setattr(verification, "check_clean_load", lambda *args, **kwargs: None)
    monkeypatch.setattr(publishing, "upload", lambda sources, staged, *args: sorted(staged.rglob("results.json")))
    weights = fingerprint(FASBertForSequenceClassification.from_pretrained(folder))
    configuration = {"weights_sha256": weights, "data": {}}
    write_results(folder / "report" / "results.json", metrics={"rows": []}, configuration=configuration)
    assert len(publish(folder, REPO, api=HfApi(token=WRITE_TOKEN))) == 1
    monkeypatch.setattr(publishing, "upload", lambda *args: pytest.fail("uploaded"))
    tiny_checkpoint(folder, "classifier", seed=1)
    with pytest.raises(
        VerificationError, match=f"must be measured on the weights in.*got a report of {weights}.*Measure"
    ):
        publish(folder, REPO, api=HfApi(token=WRITE_TOKEN))


# What is uploaded


def test_uploads_one_commit_and_names_it_in_the_card(hub, staged):
    url = push(hub, staged)
    repository = hub.repositories[REPO]
    assert [message for _, message, _ in repository.commits] == ["initial commit", "Publish", "Name the commit to pin"]
    files, commit = hub.files(REPO), repository.commits[1][0]
    assert url.endswith(commit)
    assert files.keys() - {".gitattributes"} == {path.name for path in staged.iterdir()}
    assert files["model.safetensors"] == (staged / "model.safetensors").read_bytes()
    readme = files["README.md"].decode()
    assert readme.count(f'revision="{commit}"') == 2
    assert ModelCard(readme).data.license == "mit"
    assert [request for request in hub.requests if request[2] == -404] == []


def test_a_new_upload_replaces_what_would_still_be_loaded(hub, staged):
    push(hub, staged)
    hub.repositories[REPO].commits[-1][2].update({"pytorch_model.bin": b"old", "notes.md": b"theirs"})
    push(hub, staged)
    assert "pytorch_model.bin" not in hub.files(REPO)
    assert hub.files(REPO)["notes.md"] == b"theirs"


def test_a_revision_is_a_branch_of_its_own(hub, staged):
    push(hub, staged, revision="v2")
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert "model.safetensors" in hub.files(REPO, "v2")


FAULTS = {
    "401-token": (Fault("never"), "hf_wrongTokenOfTheTests0003", "401", "hf auth login"),
    "403-read-token": (Fault("never"), READ_TOKEN, "403", "write access"),
    "404-preupload": (Fault("/preupload/", 404), WRITE_TOKEN, "404", "spelling"),
    "409-commit": (Fault("/commit/", 409), WRITE_TOKEN, "409", "run the command again"),
    "412-commit": (Fault("/commit/", 412), WRITE_TOKEN, "412", "run the command again"),
    "500-create": (Fault("repos/create", 500), WRITE_TOKEN, "500", "run the command again"),
    "500-weights": (Fault("PUT /lfs", 500), WRITE_TOKEN, "500", "run the command again"),
    "500-commit": (Fault("/commit/", 500), WRITE_TOKEN, "500", "run the command again"),
    "drop-weights": (Fault("PUT /lfs", 0), WRITE_TOKEN, "connection", "all of the checkpoint or nothing"),
    "drop-commit": (Fault("/commit/", 0), WRITE_TOKEN, "connection", "all of the checkpoint or nothing"),
}


@pytest.mark.parametrize(("fault", "token", "what", "remedy"), FAULTS.values(), ids=FAULTS)
def test_a_fault_leaves_the_repository_as_it_was(fault, token, what, remedy, hub, staged):
    hub.faults.append(fault)
    with pytest.raises(PublishError) as error:
        push(hub, staged, token=token)
    message = str(error.value)
    assert what in message and remedy in message and token not in message
    if REPO in hub.repositories:
        assert list(hub.files(REPO)) == [".gitattributes"]
    fault.times = 0
    push(hub, staged)
    assert "model.safetensors" in hub.files(REPO)


def test_another_namespace_is_refused(hub, staged):
    with pytest.raises(PublishError, match=r"403.*rights"):
        push(hub, staged, repo_id="other/tiny")


def test_a_weak_moment_of_the_server_is_bridged(hub, staged):
    hub.faults.append(Fault("PUT /lfs", 503, times=2))
    push(hub, staged)
    assert "model.safetensors" in hub.files(REPO)


def test_a_fault_after_the_upload_says_that_it_is_complete(hub, staged):
    push(hub, staged, revision="main")
    hub.faults.append(Fault("/commit/", 500))
    (staged / "config.json").write_text((staged / "config.json").read_text() + "\n")
    with pytest.raises(PublishError, match="No file of tester/tiny was changed"):
        push(hub, staged)
    hub.faults.clear()
    real, calls = HfApi.create_commit, []

    def second_fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="complete at http"):
        patch.setattr(HfApi, "create_commit", second_fails)
        push(hub, staged)
