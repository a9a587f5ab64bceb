"""What goes wrong while training: another run resumed, damaged files, divergence, dead sites, two runs, kills."""

import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from modeling_fas import FASBertForSequenceClassification
from test_training_trainers import arguments, build, rows
from training import convert, run_clm, run_glue
from training.checkpoints import checkpoints, is_complete, rotate, whole_or_nothing
from training.commands import LOCK_FILE, only_run, run_command
from training.distillation import FASDistillationTrainer
from training.evaluate.command import main as evaluate
from training.evaluate.monitors import SpikeMonitor
from training.results import read_results
from training.resume import describe, missing_parts
from training.trainers import FASCalibrationTrainer, FASTrainer
from training_helpers import largest_difference, save_bert, save_gpt2, tensors, write_corpus, write_reviews


COMMON = "--report_to none --disable_tqdm true --use_cpu --per_device_train_batch_size 8 --do_train --max_steps 4"
RUN = f"--train_file @/train.json {COMMON} --save_steps 2 --learning_rate 1e-3"
KINDS = {
    "train": "--model_name_or_path @/bert",
    "calibrate": "--model_name_or_path @/qcfs --stage calibrate --calib_T 2",
    "stream": "--model_name_or_path @/gpt2 --streaming --block_size 8",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and data, and in `train-out`, `calibrate-out`, `stream-out` a run of each kind with two checkpoints."""
    folder = tmp_path_factory.mktemp("inputs")
    write_reviews(folder / "train.json", 64, seed=1)
    write_reviews(folder / "other.json", 64, seed=9)
    write_reviews(folder / "test.json", 16, seed=2)
    write_corpus(folder / "corpus.json", 60)
    write_corpus(folder / "other_corpus.json", 60, seed=9)
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    run_glue.main(flags(f"{KINDS['train']} --save_strategy no", folder, folder / "qcfs"))
    for kind in KINDS:
        main_of(kind)(flags(KINDS[kind], folder, folder / f"{kind}-out"))
    return folder


def main_of(kind: str):
    return run_clm.main if kind == "stream" else run_glue.main


def flags(text: str, folder: Path, out: Path) -> list[str]:
    run = RUN.replace("train.json", "corpus.json") if "gpt2" in text else RUN
    return f"{run} {text} --output_dir {out}".replace("@", str(folder)).split()


@pytest.fixture
def interrupted(inputs, tmp_path):
    """`interrupted(kind)`: a copy of a run of which the last checkpoint and what was saved after it are gone."""

    def copy(kind: str = "train") -> Path:
        out = shutil.copytree(inputs / f"{kind}-out", tmp_path / kind)
        shutil.rmtree(out / "checkpoint-4")
        (out / "model.safetensors").unlink()
        return out

    return copy


def resumed(kind: str, text: str, inputs: Path, out: Path) -> list[dict]:
    return main_of(kind)(flags(f"{KINDS[kind]} --resume_from_checkpoint true {text}", inputs, out))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


# In the order in which an error names them.
CHANGES = {
    "--model_name_or_path @/qcfs": "model_name_or_path was '.*bert', now '.*qcfs'",
    "--L 4": "L was 8, now 4",
    "--initial_threshold 1.0": "initial_threshold was 2.5, now 1.0",
    "--seed 7": "seed was 42, now 7",
    "--max_steps 6": "max_steps was 4, now 6",
    "--per_device_train_batch_size 4": "per_device_train_batch_size was 8, now 4",
    "--gradient_accumulation_steps 2": "gradient_accumulation_steps was 1, now 2",
    "--learning_rate 1e-4": "learning_rate was 0.001, now 0.0001",
    "--weight_decay 0.1": "weight_decay was 0.0, now 0.1",
    "--threshold_learning_rate 0.5": "threshold_learning_rate was 0.05, now 0.5",
    "--train_file @/other.json": "training data was '64 rows, .*', now '64 rows, .*'",
}
CALIBRATE_CHANGES = {
    "--calib_T 4": "calib_T was 2, now 4",
    "--granularity layer": "granularity was 'neuron', now 'layer'",
    "--coarse none": "coarse was 'search', now 'none'",
    "--site_weight 3": "site_weight was 1.0, now 3.0",
}
OTHER_DATA = "training data was 'a stream, .*', now 'a stream, .*'"
ANOTHER_RUN = {
    "all": ("train", " ".join(CHANGES), "; ".join(CHANGES.values())),
    "one": ("train", "--seed 7", CHANGES["--seed 7"]),
    "fewer rows": ("train", "--max_train_samples 32", "training data was '64 rows, .*', now '32 rows, .*'"),
    "calibrate": ("calibrate", " ".join(CALIBRATE_CHANGES), "; ".join(CALIBRATE_CHANGES.values())),
    "stream": ("stream", "--train_file @/other_corpus.json", OTHER_DATA),
    "blocks": ("stream", "--block_size 4", OTHER_DATA),
}


@pytest.mark.parametrize("case", ANOTHER_RUN)
def test_another_run_is_not_resumed(case, inputs, interrupted):
    kind, change, message = ANOTHER_RUN[case]
    out = interrupted(kind)
    wanted = rf"must go on with the same run, got '.*checkpoint-2': {message}\. Give the settings it began with"
    with pytest.raises(ValueError, match=wanted):
        resumed(kind, change, inputs, out)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"] and is_complete(out / "checkpoint-2")


@pytest.mark.parametrize("kind", KINDS)
def test_flags_that_only_evaluate_log_or_save_change_no_run(kind, inputs, interrupted, monkeypatch):
    out = interrupted(kind)
    monkeypatch.chdir(inputs)  # a path is another way to say the same
    line = "--do_eval --T 1 2 --validation_file @/test.json --per_device_eval_batch_size 3 --max_eval_samples 8"
    line = line.replace("test.json", "other_corpus.json") if kind == "stream" else line
    model = KINDS[kind].split()[1].removeprefix("@/")
    resumed(kind, f"{line} --logging_steps 1 --save_total_limit 1 --model_name_or_path {model}", inputs, out)
    assert largest_difference(tensors(inputs / f"{kind}-out"), tensors(out)) == 0


def test_a_changed_run_that_is_allowed_uses_what_is_set_now(inputs, interrupted, monkeypatch, caplog):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (
            seen.append([(group["lr"], group["weight_decay"]) for group in self.param_groups]) or step(self, *a, **k)
        ),
    )
    change = "--threshold_learning_rate 0.5 --learning_rate 1e-4 --weight_decay 0.1 --allow_changed_resume"
    resumed("train", change, inputs, interrupted())
    assert "as another run than it began as: learning_rate was 0.001, now 0.0001" in caplog.text
    assert [rate for rate, _ in seen[0]] == pytest.approx([0.5e-4, 0.5e-4, 0.25])  # half the way, linear decay
    assert [rate for rate, _ in seen[1]] == pytest.approx([0.25e-4, 0.25e-4, 0.125])
    assert [decay for _, decay in seen[0]] == [0.1, 0.0, 0.0]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json"])
def test_a_checkpoint_without_all_its_parts_is_refused_by_name(name, inputs, interrupted, caplog):
    out = interrupted()
    (out / "checkpoint-2" / name).unlink()
    with pytest.raises(
        ValueError, match=rf"same run, got '.*checkpoint-2': {name} is missing\. .*--allow_changed_resume"
    ):
        resumed("train", "", inputs, out)
    resumed("train", "--allow_changed_resume", inputs, out)
    assert f"as another run than it began as: {name} is missing" in caplog.text


def test_data_is_told_by_its_rows_not_by_how_it_is_stored():
    ids = [[i, i + 1][: 1 + i % 2] for i in range(30)]
    whole = Dataset.from_dict({"input_ids": ids, "labels": list(range(30))})
    parts = concatenate_datasets([whole.select(range(7)), whole.select(range(7, 30))])
    shuffled = whole.select(range(29, -1, -1))
    assert describe(whole) == describe(parts) == describe(shuffled.select(range(29, -1, -1)))
    others = [shuffled, whole.select(range(29)), Dataset.from_dict({"input_ids": ids, "labels": [*range(29), 0]})]
    assert len({describe(each) for each in [whole, *others]}) == 4
    stream = whole.to_iterable_dataset()
    assert describe(stream) == describe(stream) != describe(shuffled.to_iterable_dataset())


def test_every_process_of_a_launch_needs_its_own_random_states(inputs):
    checkpoint = inputs / "train-out" / "checkpoint-2"
    for size, index, missing in ((1, 0, []), (2, 1, ["rng_state_1.pth is missing"])):
        assert missing_parts(checkpoint, SimpleNamespace(world_size=size, process_index=index)) == missing


DAMAGED = {
    "truncated weights": ("model.safetensors", -50, "must hold weights, got a truncated or damaged file"),
    "junk weights": ("model.safetensors", b"junk" * 10, "must hold weights, got a truncated or damaged file"),
    "junk optimizer": ("optimizer.pt", b"junk", "must be a file of torch.save, got a truncated or damaged one"),
    "truncated optimizer": ("optimizer.pt", -50, "must be a file of torch.save, got a truncated or damaged one"),
    "junk random states": ("rng_state.pth", b"junk", "must be a file of torch.save"),
    "junk scheduler": ("scheduler.pt", b"", "must be a file of torch.save"),
    "state of nothing": ("trainer_state.json", b"{}", "must hold `global_step`, got {}"),
    "state of a list": ("trainer_state.json", b"[]", r"must hold `global_step`, got \[\]"),
    "junk run": ("run.json", b"{", "must be JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_of_a_checkpoint_are_named(case, inputs, interrupted):
    name, content, message = DAMAGED[case]
    out = interrupted()
    path = out / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=rf"`.*checkpoint-2/{name}` {message}.*Delete that checkpoint"):
        resumed("train", "--allow_changed_resume", inputs, out)


# ---------------------------------------------------------------------------------------------------------------------
# Kills, and a full disk
# ---------------------------------------------------------------------------------------------------------------------


def test_no_moment_of_a_rotation_leaves_a_complete_checkpoint_without_weights(tmp_path, monkeypatch):
    def checkpoint(step):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "run.json"):
            (folder / name).touch()
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        return folder

    old, new = checkpoint(1), checkpoint(2)
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path: seen.append((path, is_complete(path))))  # killed before it
    rotate(tmp_path, 1, kept=[new])
    assert seen == [(old, False)] and is_complete(new)
    monkeypatch.undo()
    (new / "model.safetensors").unlink()
    assert not is_complete(new)


def test_the_trainer_rotates_so(inputs, tmp_path, monkeypatch):
    seen = []
    rmtree = shutil.rmtree

    def delete(path, *args, **kwargs):
        seen.extend([(Path(path).name, is_complete(Path(path)))] if "checkpoint-" in Path(path).name else [])
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr("shutil.rmtree", delete)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    FASTrainer(model=build("glue", layers=1), args=args, train_dataset=rows("glue")).train()
    assert seen == [("checkpoint-1", False), ("checkpoint-2", False)]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert args.save_total_limit == 2


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_disk_that_fills_up_leaves_the_checkpoints_before(part, full_disk, inputs, tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    trainer = FASTrainer(model=build("glue", layers=1), args=args, train_dataset=rows("glue"))
    save = getattr(trainer, part)

    def full(folder, *given, **more):
        full_disk(2_000 if "checkpoint-2" in str(folder) else 10**9)
        save(folder, *given, **more)

    setattr(trainer, part, full)
    with pytest.raises(OSError, match=r"`--output_dir` must be a folder with room for checkpoints, .*Free some space"):
        trainer.train()
    full_disk()
    assert [(path.name, is_complete(path)) for path in checkpoints(tmp_path)] == [("checkpoint-1", True)]


def test_a_model_that_is_replaced_has_no_configuration_until_it_is_whole(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).write_text("old")
    moved = []
    replace = shutil.os.replace

    def move(source, target):
        moved.append((Path(target).name, (tmp_path / "config.json").exists()))
        replace(source, target)

    monkeypatch.setattr("os.replace", move)
    with whole_or_nothing(tmp_path) as scratch:
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            Path(scratch, name).write_text("new")
    assert moved[-1] == ("config.json", False) and not any(there for _, there in moved)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


def test_a_conversion_that_is_killed_leaves_no_half_folder(inputs, tmp_path, monkeypatch):
    from training import untrained

    def killed(*args, **kwargs):
        raise SystemExit

    line = (
        f"{inputs}/gpt2 --sites all --code phase --calibration_file {inputs}/corpus.json --output_dir {tmp_path}/out"
    )
    line = [*line.split(), "--tokens", "64", "--limit", "2"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", killed)
        convert.main(line)
    assert not list((tmp_path / "out").iterdir()), "the weights were written, the tokenizer was not"
    (tmp_path / "out" / ".saving-left-by-sigkill").mkdir()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(untrained, "judge", killed)
        convert.main(line)
    assert not (tmp_path / "out" / "conversion.json").exists()
    rows = convert.main(line)
    assert read_results(tmp_path / "out" / "conversion.json")["metrics"]["rows"] == json.loads(json.dumps(rows))
    assert not list((tmp_path / "out").glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# Divergence, dead sites
# ---------------------------------------------------------------------------------------------------------------------


def trainer_of(kind: str, tmp_path: Path, **settings):
    model = build("glue", layers=1)
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    given = {"args": arguments(tmp_path, **defaults | settings), "train_dataset": rows("glue")}
    if kind == "calibration":
        return FASCalibrationTrainer(model.begin_calibration(2), **given)
    return (
        FASDistillationTrainer(model, teacher=build("glue", layers=1), **given)
        if kind == "distillation"
        else FASTrainer(model, **given)
    )


TRAINERS = ("plain", "calibration", "distillation")


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_training_stops_where_it_diverges_and_keeps_the_last_good_checkpoint(what, kind, tmp_path):
    trainer = trainer_of(kind, tmp_path)
    compute, optimizer = trainer.compute_loss, trainer.create_optimizer()

    def diverge(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss * torch.nan if trainer.state.global_step == 3 and what == "loss" else loss

    def poison(*args):
        if trainer.state.global_step == 3 and what == "weights":
            optimizer.param_groups[-1]["params"][0].data.view(-1)[0] = torch.inf

    trainer.compute_loss = diverge
    optimizer.register_step_post_hook(poison)
    message = (
        rf"`--learning_rate` must let training stay finite, got 0.001.*: the {what} of step 4 .*checkpoint-3'; nothing"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert [(path.name, is_complete(path)) for path in checkpoints(tmp_path)] == [
        (f"checkpoint-{step}", True) for step in (1, 2, 3)
    ]
    for name, tensor in tensors(tmp_path / "checkpoint-3").items():
        assert tensor.isfinite().all(), name
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rate_that_is_far_too_large_exits_with_one(process, inputs, tmp_path, capsys):
    line = flags(f"{KINDS['train']} --learning_rate 1e38 --save_steps 1", inputs, tmp_path / "out")
    if process:
        command = [sys.executable, "-m", "training.run_glue", *line]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        code, printed = done.returncode, done.stderr
    else:
        code, printed = run_command(run_glue.main, "Not run", line), capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in printed and "Not run: `--learning_rate` must let training stay finite" in printed
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_negative_rate_is_refused_in_python(tmp_path):
    with pytest.raises(ValueError, match="`threshold_learning_rate` must be 0 or more, got -1"):
        FASTrainer(build("glue"), arguments(tmp_path), threshold_learning_rate=-1)


@pytest.mark.parametrize(("bias", "kind"), [(-100.0, "dead"), (100.0, "saturated")])
def test_a_site_that_always_says_the_same_is_named(bias, kind, inputs, tmp_path, caplog, undrawn):
    model = FASBertForSequenceClassification.from_pretrained(inputs / "bert", initial_threshold=0.5)
    model.bert.pooler.dense.bias.data.fill_(bias)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(inputs / "bert").save_pretrained(tmp_path / "model")
    site = "bert.pooler.activation"
    with caplog.at_level(logging.WARNING, logger="training"):
        line = f"--model_name_or_path {tmp_path}/model --learning_rate 0 --threshold_learning_rate 0"
        line += " --do_eval --T 2 --validation_file @/test.json --save_strategy no"
        found = run_glue.main(flags(line, inputs, tmp_path / "out"))
    meaning = "no neuron ever fires" if kind == "dead" else "every neuron fires all the time"
    for where in ("After training", "QCFS ANN, validation", "stepwise T = 2, validation"):
        assert f"{where}: {meaning} in {site}." in caplog.text
    record = read_results(tmp_path / "out" / "evaluation.json")
    other = "saturated" if kind == "dead" else "dead"
    for row in (*found, *record["metrics"]["rows"], record["training"]):
        assert (row[f"{kind}_sites"], row[f"{other}_sites"]) == ([site], [])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="training"):
        line = f"{tmp_path}/out --validation_file {inputs}/test.json --T 2 --output_dir {tmp_path}/report"
        rows = evaluate(line.split())["metrics"]["rows"]
    assert f"layerwise T = 2: {meaning} in {site}." in caplog.text
    assert all(row[f"{kind}_sites"] == [site] for row in rows)
    for name in ("report.md", "report.html"):
        assert (
            f"All neurons are {kind}, stepwise T = 2: pooler.activation." in (tmp_path / "report" / name).read_text()
        )


def test_sites_that_encode_nothing_or_fire_now_and_then_are_not_named():
    model = build("glue", layers=1).eval()
    with SpikeMonitor(model) as monitor:
        model(torch.arange(5, 15)[None])
    assert monitor.silent_sites() == {"dead_sites": [], "saturated_sites": []}
    for site in monitor.sites.values():
        site.steps = 0
    assert monitor.silent_sites() == {"dead_sites": [], "saturated_sites": []}


# ---------------------------------------------------------------------------------------------------------------------
# Two runs into one folder
# ---------------------------------------------------------------------------------------------------------------------


def hold(folder, ready):
    with only_run(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def held(tmp_path):
    """A folder that another process has, and the process."""
    out = tmp_path / "held"
    out.mkdir()
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=hold, args=(out, ready))
    process.start()
    assert ready.wait(60)
    yield out, process
    process.kill()
    process.join()


def test_the_second_run_into_a_folder_is_refused_while_the_first_lives(held, inputs):
    out, process = held
    message = (
        rf"`--output_dir` must not be that of a run that is still going on, .*in use by process {process.pid} on "
    )
    data = f"--validation_file {inputs}/test.json --output_dir {out}"
    commands = {
        run_glue.main: flags(KINDS["train"], inputs, out),
        run_clm.main: flags(KINDS["stream"], inputs, out),
        evaluate: f"{inputs}/qcfs --T 2 {data}".split(),
        convert.main: f"{inputs}/gpt2 --sites all --calibration_file {inputs}/corpus.json --output_dir {out}".split(),
    }
    for main, line in commands.items():
        with pytest.raises(ValueError, match=message):
            main(line)
    for resume in ("--resume_from_checkpoint true", "--overwrite_output_dir"):
        with pytest.raises(ValueError, match=message):
            run_glue.main(flags(f"{KINDS['train']} {resume}", inputs, out))
    with pytest.raises(ValueError, match=message):
        convert.main(f"encoder --model_name_or_path {inputs}/bert --task_name sst2 --output_dir {out}".split())
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    process.kill()
    process.join()
    assert (out / LOCK_FILE).exists(), "stale"
    run_glue.main(flags(KINDS["train"], inputs, out))
    assert not (out / LOCK_FILE).exists()


def test_processes_that_write_nothing_are_part_of_the_run_and_an_error_frees_the_folder(tmp_path):
    with pytest.raises(RuntimeError), only_run(tmp_path), only_run(tmp_path, writes=False):
        raise RuntimeError
    with only_run(tmp_path), pytest.raises(ValueError, match="still going on"), only_run(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_wait_for_a_folder_ends_with_the_process(held):
    out, process = held
    process.kill()
    process.join()
    start = time.perf_counter()
    with only_run(out):
        assert time.perf_counter() - start < 1
