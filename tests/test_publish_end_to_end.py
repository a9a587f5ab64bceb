"""Publishing through the real client in processes of its own: to the server of `hub_server`, and read by `olah`."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from checkpoints import tiny_checkpoint
from configuration_fas import __version__
from hub_server import WRITE_TOKEN, Fault, local_client, running_hub
from training.publish import publish
from training.publish.clean_load import probe_logits


REPOSITORY = Path(__file__).resolve().parents[1]
OLAH = Path(os.environ.get("FAS_OLAH", "/work/env/olah/bin/olah-cli"))
OLD_PYTHON = Path(os.environ.get("FAS_TRANSFORMERS4_PYTHON", "/work/env/tf457/bin/python"))
AUTO = {
    "gpt2": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
}
READ = """
import sys, huggingface_hub, torch, transformers
from safetensors.torch import save_file
folder, auto, revision, output, snapshot = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, revision=revision, trust_remote_code=True)
if snapshot == "True":
    folder = huggingface_hub.snapshot_download(folder, revision=revision)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=True)
assert tokenizer("the cat sat")["input_ids"], "no tokens"
siblings = {"configuration_fas", "events_fas", "kernels_fas", "modeling_fas", "neurons_fas", "sites_fas"}
assert not (siblings | {"training"}) & sys.modules.keys()
ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids); mask[1, 7:] = 0
with torch.no_grad():
    runs = {f"T={T} {s}": model.set_timesteps(T, s)(input_ids=ids, attention_mask=mask)[0]
            for T, s in [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")]}
save_file({k: v.contiguous() for k, v in runs.items()}, output)
print(type(model).__module__, model.config.fas_version)
"""
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and resource limits")


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def environment(hub, home, token=WRITE_TOKEN, **more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | hub.environment(home, token) | more


def cli(hub, tmp_path, *args, token=WRITE_TOKEN, **options):
    """Run `python -m training.publish`; the process, with everything it said in `stdout`."""
    command = [sys.executable, "-m", "training.publish", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = environment(hub, tmp_path / "home", token, TMPDIR=str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return subprocess.run(command, env=env, cwd=tmp_path, timeout=300, **pipes, **options)


def read(env, tmp_path, repo_id, auto, revision="main", python=sys.executable, snapshot=False):
    """Load a repository by remote code in a process that cannot import this project; logits, and what it printed."""
    script, output = tmp_path / "read.py", tmp_path / "read.safetensors"
    script.write_text(READ)
    env = {k: v for k, v in env.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [str(python), "-I", str(script), repo_id, auto, revision, str(output), str(snapshot)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(output), done.stdout


def assert_same(expected, found):
    assert found.keys() <= expected.keys() and len(found) == 3
    for run, logits in found.items():
        assert torch.equal(expected[run], logits), run


def unanswered(hub):
    return [request for request in hub.requests if request[2] == -404]


def test_published_logits_are_those_of_the_model_in_memory(tmp_path, monkeypatch, outside):
    """The quick one: publishing in this process, verification in forks of a clean one, reading in a clean one."""
    with running_hub() as hub, local_client(hub, monkeypatch):
        model = tiny_checkpoint(tmp_path / "made", "classifier")
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", outside.run)
            url = publish(tmp_path / "made", "tester/tiny", model=model, api=HfApi(hub.url, WRITE_TOKEN))
        env = environment(hub, tmp_path / "other", None)
        found, _ = read(env, tmp_path, "tester/tiny", AUTO["classifier"], url.rpartition("/")[2])
        assert_same(probe_logits(model), found)
        assert unanswered(hub) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTO)
def test_round_trip_gives_the_logits_of_the_model_in_memory(kind, hub, tmp_path):
    model = tiny_checkpoint(tmp_path / "made", kind)
    repo_id = f"tester/tiny-{kind}"
    done = cli(hub, tmp_path, tmp_path / "made", repo_id, "--license", "mit")
    assert done.returncode == 0, done.stdout
    commit = re.search(r"/commit/(\w+)", done.stdout)[1]
    found, said = read(environment(hub, tmp_path / "other", None), tmp_path, repo_id, AUTO[kind], commit)
    assert_same(probe_logits(model), found)
    assert said.startswith("transformers_modules.") and said.endswith(f" {__version__}\n")
    assert unanswered(hub) == []
    assert list((tmp_path / "tmp").glob(".fas-*")) == []
    published = b"".join(hub.files(repo_id).values())
    assert WRITE_TOKEN not in done.stdout and WRITE_TOKEN.encode() not in published
    assert all(WRITE_TOKEN not in message for _, message, _ in hub.repositories[repo_id].commits)


@pytest.mark.slow
def test_private_repositories_need_the_token(hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    assert cli(hub, tmp_path, tmp_path / "made", "tester/secret", "--private").returncode == 0
    assert hub.repositories["tester/secret"].private
    read(environment(hub, tmp_path / "a"), tmp_path, "tester/secret", AUTO["gpt2"])
    with pytest.raises(AssertionError, match="secret"):
        read(environment(hub, tmp_path / "b", None), tmp_path, "tester/secret", AUTO["gpt2"])


@pytest.mark.slow
def test_dry_run_writes_what_an_upload_would_hold(hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny", "--dry-run", token=None)
    assert done.returncode == 0, done.stdout
    assert hub.requests == []
    assert cli(hub, tmp_path, tmp_path / "made", "tester/tiny").returncode == 0
    first = hub.repositories["tester/tiny"].commits[1][2]
    written = {path.name: path.read_bytes() for path in (tmp_path / "made-to-publish").iterdir()}
    assert written == {name: data for name, data in first.items() if name != ".gitattributes"}


@pytest.mark.slow
@pytest.mark.parametrize("push", ["model", "trainer", "publishing-trainer"])
def test_push_to_hub_of_models_and_trainers(push, hub, tmp_path):
    script = tmp_path / "push.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from pathlib import Path
from transformers import Trainer, TrainingArguments
from checkpoints import tiny_checkpoint, tiny_tokenizer, tiny_results
from training.publish.clean_load import probe_logits
from training.publish import publish
from training.publish import PublishMixin
from safetensors.torch import save_file

class PublishingTrainer(PublishMixin, Trainer):
    pass

folder = Path("run")
model = tiny_checkpoint(folder, "gpt2")
if "{push}" == "model":
    model.push_to_hub("tester/pushed")
else:
    args = TrainingArguments("run", max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[],
                             use_cpu=True, push_to_hub=True, hub_model_id="tester/pushed", disable_tqdm=True)
    rows = [{{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}}] * 4
    trainer_class = Trainer if "{push}" == "trainer" else PublishingTrainer
    trainer = trainer_class(model, args, train_dataset=rows, processing_class=tiny_tokenizer("gpt2", folder))
    trainer.train()
    tiny_results(folder, "gpt2", model=model)  # those from before are of other weights
    trainer.push_to_hub()
save_file({{k: v.detach() for k, v in probe_logits(model).items()}}, "expected.safetensors")
""")
    env = environment(hub, tmp_path / "home")
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = hub.files("tester/pushed").keys()
    assert {"model.safetensors", "config.json", "configuration_fas.py", "modeling_fas.py", "neurons_fas.py"} <= names
    assert ("training_args.bin" in names) == (push == "trainer")
    assert ("evaluation.json" in names) == (push != "model")
    if push == "model":
        hub.repositories["tester/pushed"].commits[-1][2].update(
            {n: (tmp_path / "run" / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
        )
    found, _ = read(environment(hub, tmp_path / "other", None), tmp_path, "tester/pushed", AUTO["gpt2"])
    assert_same(load_file(tmp_path / "expected.safetensors"), found)
    assert unanswered(hub) == []


@pytest.mark.slow
def test_a_spoiled_folder_uploads_nothing(hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    code = tmp_path / "made" / "neurons_fas.py"
    spoilt = "\n_exact = spike_rate\n\n\ndef spike_rate(*args):\n    return 1.01 * _exact(*args)\n"
    code.write_text(code.read_text() + spoilt)
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny")
    assert done.returncode == 1 and "`neurons_fas.py` must be, byte for byte" in done.stdout
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny", "--allow-changed-code")
    assert done.returncode == 1 and re.search(r"its logits at T=\d \w+ differ from the reference", done.stdout)
    code.write_text("import training\n" + code.read_text())
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny", "--allow-changed-code", "--debug")
    assert done.returncode == 1 and "line 1" in done.stdout and "Traceback" in done.stdout
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404, 409, 500, 0], ids=lambda status: str(status or "dropped"))
def test_faults_of_the_server_are_explained_in_one_line(status, hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    hub.faults.append(Fault("/commit/", status))
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny")
    assert done.returncode == 1 and "Traceback" not in done.stdout and WRITE_TOKEN not in done.stdout
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith("Not published: The ")
    print(f"{status}: {said}")
    assert list(hub.files("tester/tiny")) == [".gitattributes"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["verifying", "uploading"])
def test_ctrl_c_leaves_nothing_half_written(when, hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    hub.faults.append(Fault("PUT /lfs", -1))
    (tmp_path / "tmp").mkdir()
    env = environment(hub, tmp_path / "home", TMPDIR=str(tmp_path / "tmp"))
    command = [sys.executable, "-m", "training.publish", str(tmp_path / "made"), "tester/tiny"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  background jobs ignore it
    with subprocess.Popen(
        command, env=env, cwd=tmp_path, start_new_session=True, preexec_fn=listen, **pipes
    ) as process:
        reached = {
            "verifying": lambda: list((tmp_path / "tmp").glob("fas-verify-*")),
            "uploading": lambda: hub.objects or hub.faults[0].times != 1_000,
        }[when]
        wait_for(reached)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=90)[0]
    assert process.returncode == 130, said
    assert re.search(r"Interrupted\. \S", said) and "Traceback" not in said
    print(f"{when}: {re.search('Interrupted.*', said)[0]}")
    assert "tester/tiny" not in hub.repositories or list(hub.files("tester/tiny")) == [".gitattributes"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_explained_and_leaves_nothing(hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    limit = None
    if mounted.returncode:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    try:
        done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny", "--dry-run", small / "out", preexec_fn=limit)
        print(done.stdout.strip().splitlines()[-1])
        assert done.returncode == 1 and "no half-written folder" in done.stdout and "Traceback" not in done.stdout
        assert list(small.iterdir()) == []
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_names_from_a_repository_cannot_escape_the_folder(hub, tmp_path):
    tiny_checkpoint(tmp_path / "made", "gpt2")
    assert cli(hub, tmp_path, tmp_path / "made", "tester/tiny").returncode == 0
    hub.repositories["tester/tiny"].commits[-1][2]["../../escaped.py"] = b"evil"
    code = "import huggingface_hub as h; h.snapshot_download('tester/tiny', local_dir='a/b/target')"
    env = environment(hub, tmp_path / "deep" / "home", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    print(done.stderr.strip().splitlines()[-1])
    assert not list(tmp_path.rglob("escaped.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTO)
def test_olah_serves_what_was_published(kind, hub, tmp_path):
    """An independent implementation of the reading side, on a git repository of the published folder."""
    if not OLAH.exists():
        pytest.skip(f"needs olah in its own environment, {OLAH} (or FAS_OLAH)")
    model = tiny_checkpoint(tmp_path / "made", kind)
    target = tmp_path / "mirror" / "models" / "tester" / "tiny"
    done = cli(hub, tmp_path, tmp_path / "made", "tester/tiny", "--dry-run", target, token=None)
    assert done.returncode == 0, done.stdout
    git = ["git", "-C", str(target), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for step in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "published"]):
        subprocess.run([*git, *step], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/repos"\n'
        f'mirrors-path = ["{tmp_path}/mirror"]\n[accessibility]\noffline = true\n'
        '[[accessibility.proxy]]\nrepo = "*/*"\nallow = true\n'
    )
    log = (tmp_path / "olah.log").open("w")
    server = subprocess.Popen(
        [str(OLAH), "-c", str(tmp_path / "olah.toml")], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: is_open(port))
        env = environment(hub, tmp_path / "reader", None) | {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}
        # It answers 401 where the Hub says 404 for a missing folder, which AutoTokenizer looks for: so, a snapshot.
        found, _ = read(env, tmp_path, "tester/tiny", AUTO[kind], snapshot=True)
    finally:
        server.terminate()
        server.wait()
        log.close()
    assert_same(probe_logits(model), found)
    requests = re.findall(r'"(\w+ /\S* HTTP[^"]*" \d+)', (tmp_path / "olah.log").read_text())
    print(json.dumps(requests, indent=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTO)
def test_transformers_4_loads_what_transformers_5_published(kind, hub, tmp_path):
    if not OLD_PYTHON.exists():
        pytest.skip(f"needs transformers 4 in its own environment, {OLD_PYTHON} (or FAS_TRANSFORMERS4_PYTHON)")
    model = tiny_checkpoint(tmp_path / "made", kind)
    assert cli(hub, tmp_path, tmp_path / "made", "tester/tiny").returncode == 0
    env = environment(hub, tmp_path / "old", None)
    found, _ = read(env, tmp_path, "tester/tiny", AUTO[kind], python=OLD_PYTHON)
    for run, logits in found.items():
        # Another release may order its sums otherwise; 1e-5 is far below one spike (about 0.1 here).
        torch.testing.assert_close(logits, probe_logits(model)[run], atol=1e-5, rtol=0, msg=run)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
