"""Publishing without a second process: what is staged, what is refused, and what is left when an upload fails."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from checkpoints import tiny_checkpoint
from configuration_fas import __version__
from hub_server import READ_TOKEN, WRITE_TOKEN, Fault, local_client, running_hub
from modeling_fas import FASBertForSequenceClassification
from training.publish import upload as publishing
from training.publish import verification
from training.publish.card import CardOptions, build_card
from training.publish.clean_load import load_by_remote_code, probe_logits, token_ids, weight_faults
from training.publish.code import CODE_FILES, LATER_CODE_FILES, VerificationError
from training.publish.files import check_files
from training.publish.records import read_sources
from training.publish.upload import PublishError, portable_tokenizer_settings, publish, stage, upload
from training.publish.verification import Found
from training.results import checksum, fingerprint, write_results


REPO = "tester/tiny"


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
    Image.new("L", (2, 2)).save(folder / "accuracy.png")
    target = folder.parent / "target"
    stage(folder, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "accuracy.png",
        "config.json",
        "configuration_fas.py",
        "evaluation.json",
        "events_fas.py",
        "kernels_fas.py",
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


# What is refused: the files and the code have tests of their own


def test_file_checks_pass_an_intact_folder(staged):
    check_files(staged)


def test_weights_other_than_the_model_in_memory_are_refused(folder, monkeypatch):
    """The comparison itself; that the other process gives these logits is tested end to end."""

    model = FASBertForSequenceClassification.from_pretrained(folder)
    found = Found(probe_logits(model), token_ids(folder), {}, fingerprint(model))
    runs = ["T=0 stepwise", "T=2 stepwise", "T=2 layerwise", "T=4 stepwise", "T=4 layerwise"]
    assert list(found.logits) == runs
    monkeypatch.setattr(verification, "_load_apart", lambda *args: found)
    assert verification.check_clean_load(folder, model, folder) == fingerprint(model)
    model.neurons()[0][1].fine_threshold.data *= 1.1
    with pytest.raises(VerificationError, match="at T=2 stepwise differ"):
        verification.check_clean_load(folder, model, folder)


@dataclass
class CleanProcess:
    """Stands for the processes that load the folder: keeps how they were started, and answers honestly.

    Attributes:
        commands: Of the processes.
        environment: Theirs.
        answer: What remote code found: logits by run, token ids. Empty: what is in the folder.
    """

    commands: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    answer: tuple[dict[str, torch.Tensor], list[int] | None] | None = None
    lock: Any = field(default_factory=threading.Lock)

    def run(self, command, **options) -> subprocess.CompletedProcess:
        with self.lock:  # from_pretrained of transformers patches its own classes while it runs
            return self._run(command, **options)

    def _run(self, command, **options) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.environment = options["env"]
        project, tokenizer, folder, output = command[-4:]
        model = FASBertForSequenceClassification.from_pretrained(folder)
        logits, ids = (not project and self.answer) or (probe_logits(model), token_ids(tokenizer))
        found = {"token_ids": ids, "faults": weight_faults(model, folder), "fingerprint": fingerprint(model)}
        save_file(logits, output, metadata={name: json.dumps(value) for name, value in found.items()})
        return subprocess.CompletedProcess(command, 0, "", "")

    def interpreter(self, code: str) -> Any:
        """What a line of Python evaluates to where such a process runs its script."""
        command = next(each for each in self.commands if not each[-4])
        script = next(i for i, argument in enumerate(command) if argument.endswith(".py"))
        command = [*command[:script], "-c", f"import json, os, sys; print(json.dumps({code}))"]
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


def test_a_load_that_can_reach_the_project_is_not_clean(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(RuntimeError, match=r"needs modules that are not in it: .*modeling_fas, .*, training$"):
        load_by_remote_code(str(checkpoint), config)


@pytest.mark.parametrize("name", [*CODE_FILES, *LATER_CODE_FILES])
def test_code_that_reaches_beyond_the_model_is_neither_run_nor_published(name, folder, clean_process, tmp_path):
    with (folder / name).open("a") as file:
        file.write("import socket\n")
    for allowed, message in ((False, f"`{name}` must be, byte for byte"), (True, f"`{name}`, .*got `import socket`")):
        with pytest.raises(VerificationError, match=message):
            publish(folder, REPO, dry_run=tmp_path / "new", allow_changed_code=allowed)
    assert clean_process.commands == [] and not (tmp_path / "new").exists()


def test_changed_code_is_published_only_where_asked_for_and_the_card_says_so(folder, clean_process, tmp_path, caplog):
    with (folder / "sites_fas.py").open("a") as file:
        file.write("MINE = 3\n")
    with pytest.raises(VerificationError, match=r"`sites_fas\.py` must be, byte for byte.*--allow-changed-code"):
        publish(folder, REPO, dry_run=tmp_path / "new")
    publish(folder, REPO, dry_run=tmp_path / "new", allow_changed_code=True)
    assert "\n+MINE = 3\n" in caplog.text
    card = (tmp_path / "new" / "README.md").read_text()
    assert "The code files here are of no release" in card and "`sites_fas.py` (1 lines added, 0 removed)" in card
    clean = publish(tiny_folder(tmp_path), REPO, dry_run=tmp_path / "clean")
    assert "no release" not in Path(clean, "README.md").read_text()


def tiny_folder(tmp_path):
    tiny_checkpoint(tmp_path / "made", "classifier")
    return tmp_path / "made"


SECRETS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"]
SECRETS += ["WANDB_API_KEY", "hf_token"]


def test_the_processes_know_neither_secrets_nor_home_nor_this_repository(folder, clean_process, monkeypatch, tmp_path):
    for name in [*SECRETS, "INNOCENT"]:
        monkeypatch.setenv(name, "not for others")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    publish(folder, REPO, dry_run=tmp_path / "new")
    own, clean = sorted(clean_process.commands, key=lambda command: not command[-4])
    assert (own[-4], clean[-4]) == (str(verification.ROOT), "")
    environment = clean_process.environment
    assert "not for others" not in environment.values() and not environment.keys() & {*SECRETS, "PYTHONPATH"}
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["HF_HUB_OFFLINE"] == environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert environment["HF_HOME"].startswith(environment["HOME"]) and environment["HOME"] != os.environ["HOME"]
    monkeypatch.chdir(verification.__file__.rpartition("/")[0])
    assert clean_process.interpreter("sys.flags.isolated") == 1
    assert clean_process.interpreter("os.path.expanduser('~')") == environment["HOME"]
    assert not {"", os.getcwd()} & set(clean_process.interpreter("sys.path"))


def test_the_fingerprint_of_a_folder_is_that_of_its_model(folder, clean_process):
    assert verification.weights_sha256(folder) == fingerprint(FASBertForSequenceClassification.from_pretrained(folder))
    assert [Path(command[-4]) for command in clean_process.commands] == [verification.ROOT]


def test_nothing_of_the_folder_is_loaded_in_this_process(folder, clean_process, monkeypatch, tmp_path):
    """The stand-in loads for the other processes, so it is kept from it here."""
    found = clean_process.run([*["", str(folder), str(folder), str(tmp_path / "found.safetensors")]], env={})
    monkeypatch.setattr(
        clean_process, "run", lambda command, **_: shutil.copy(tmp_path / "found.safetensors", command[-1]) and found
    )
    for loader in (PreTrainedModel, AutoTokenizer, AutoConfig, PretrainedConfig):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    publish(folder, REPO, dry_run=tmp_path / "new")


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


def report(folder, weights=None):
    """A report as `training.evaluate` writes it; by default of the weights in the folder."""
    weights = weights or fingerprint(FASBertForSequenceClassification.from_pretrained(folder))
    row = {"mode": "qcfs", "T": 0, "schedule": None, "split": "test", "quality": {"accuracy": 0.5}}
    configuration = {"weights_sha256": weights, "data": {}}
    write_results(folder / "report" / "results.json", metrics={"rows": [row]}, configuration=configuration)


def test_a_report_travels_along(folder, clean_process, tmp_path):
    report(folder)
    publish(folder, REPO, dry_run=tmp_path / "new")
    assert "`report/results.json`" in (tmp_path / "new" / "README.md").read_text()
    assert (tmp_path / "new" / "report" / "results.json").exists()


def edit_rows(path, edit):
    """Change the first row of a results file, and write it as the project would: with a new checksum, or by hand."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def resealed(edit):
    def both(content):
        edit(content)
        content["sha256"] = checksum(content)

    return both


def quality(**values):
    return lambda content: content["metrics"]["rows"][0]["quality"].update(values)


FALSE_RESULTS = {
    "edited-row": (quality(accuracy=0.99), "must stand as it was written.*edited since"),
    "not-a-number": (
        resealed(quality(accuracy=float("nan"))),
        "`accuracy` nan, no finite number, at T = 0",
    ),
    "infinite": (resealed(quality(loss=float("inf"))), "`loss` inf, no finite number"),
    "text": (resealed(quality(accuracy="good")), "`accuracy` 'good', no finite"),
    "no-checksum": (lambda content: content.pop("sha256"), "must have the `sha256`"),
    "no-weights": (lambda content: content["configuration"].pop("weights_sha256"), "weights it does not name"),
    "other-weights": (
        resealed(lambda content: content["configuration"].update(weights_sha256="0" * 64)),
        "must be measured on the weights in",
    ),
    "bogus-mode": (resealed(lambda content: content["metrics"]["rows"][0].update(mode="magic")), "must hold rows as"),
    "mode-of-a-list": (resealed(lambda content: content["metrics"]["rows"][0].update(mode=[1])), "got mode \\[1\\]"),
    "no-list": (resealed(lambda content: content["metrics"].update(rows=3)), "must hold a list of rows, got 3"),
    "flat-settings": (lambda content: content.update(configuration=[]), "`configuration` in evaluation.json must be"),
    "missing-split": (resealed(lambda content: content["metrics"]["rows"][0].pop("split")), "must hold rows as"),
}


@pytest.mark.parametrize(("edit", "message"), FALSE_RESULTS.values(), ids=FALSE_RESULTS)
def test_results_that_are_not_of_these_weights_as_measured_are_refused(edit, message, folder, clean_process, tmp_path):
    edit_rows(folder / "evaluation.json", edit)
    with pytest.raises(VerificationError, match=message):
        publish(folder, REPO, dry_run=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_report_of_other_weights_is_refused(folder, clean_process, tmp_path):
    report(folder)
    tiny_checkpoint(folder, "classifier", seed=1)
    with pytest.raises(VerificationError, match=r"`report/results.json` must be measured on the weights in"):
        publish(folder, REPO, dry_run=tmp_path / "new")


def drop(*ends):
    def dropped(weights):
        return {name: value for name, value in weights.items() if not name.endswith(ends)}

    return dropped


def half(weights):
    return dict(list(weights.items())[::2])


FAULTY_WEIGHTS = {
    "half": (half, "missing"),
    "no-fine-thresholds": (drop("fine_threshold"), "missing: .*fine_threshold"),
    "one-missing": (drop("classifier.bias"), r"1 missing: classifier\.bias"),
    "one-more": (lambda weights: weights | {"other": torch.ones(1)}, "1 unexpected: other"),
    "not-finite": (lambda weights: weights | {"classifier.bias": torch.full((2,), torch.nan)}, "1 not finite: class"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTY_WEIGHTS.values(), ids=FAULTY_WEIGHTS)
def test_weights_that_are_not_all_there_are_refused(spoil, message, folder, clean_process, tmp_path):
    path = folder / "model.safetensors"
    save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
    (folder / "evaluation.json").unlink()
    with pytest.raises(VerificationError, match=f"`model.safetensors` must hold all weights.*{message}"):
        publish(folder, REPO, dry_run=tmp_path / "new")


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
