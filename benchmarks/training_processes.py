"""Two processes against one, and commands killed by SIGKILL against uninterrupted ones.

    python -m benchmarks.training_processes [--kills 30] [--steps 20]

Small random models on made-up data, in float32 and without dropout for the comparison of processes (each process draws
its own), with dropout for the killed runs. `accelerate launch` starts the two; they train, calibrate, distil, convert,
evaluate, and train with FSDP2. Killed runs are of four kinds, in turn: training, calibration, conversion without
training, and the recipe of two steps; every second one of a kind is killed while it saves. Writes processes.json and
killed.json in benchmarks/results/training; `--kills 0` or `--steps 0` leaves one alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fas import convert_to_spiking
from tests.training_helpers import save_bert, save_gpt2, sentences, tensors, write_corpus, write_reviews
from training.checkpoints import SCRATCH, checkpoints, is_complete
from training.commands import LOCK_FILE
from training.results import markdown_table, read_results, write_results
from training.runner import RESULTS_FILE
from training.trainers import is_threshold


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training"
ONE = [sys.executable, "-m"]
TWO = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]
TWO += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
STARTING = 5.0  # seconds, about, until a command has its folder
FLAGS = ["--learning_rate=1e-3", "--logging_steps=1", "--report_to=none", "--disable_tqdm=true", "--use_cpu"]
SHARDS = {"transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": "SHARDED_STATE_DICT"}


def command(backbone: str, stage: str, folder: Path, out: Path, size: int, steps: int) -> list[str]:
    """Arguments of a run, from the module on.

    Args:
        backbone: `"bert"` or `"gpt2"`.
        stage: `"downstream"` or `"calibrate"`; `"distil"`, from a converted model; `"shard"`, downstream with FSDP2.
        folder: Of models and data.
        out: Output folder.
        size: Batch of a process.
        steps: Of training; 0 for none.
    """
    model = folder / {"calibrate": f"{backbone}-qcfs", "distil": f"phase-{backbone}"}.get(stage, backbone)
    script = "training.run_clm" if backbone == "gpt2" else "training.run_glue"
    data = ["--train_file", str(folder / ("corpus.json" if backbone == "gpt2" else "train.json"))]
    data += ["--block_size", "16"] if backbone == "gpt2" else []
    stages = ["--stage", "calibrate" if stage == "calibrate" else "downstream"]
    stages += {
        "calibrate": ["--calib_T", "2"],
        "distil": ["--teacher", str(folder / backbone)],
        "shard": ["--fsdp", "true", "--fsdp_config", json.dumps(SHARDS), "--save_steps", str(steps // 2 or 1)],
    }.get(stage, [])
    sizes = ["--per_device_train_batch_size", str(size), "--output_dir", str(out)]
    sizes += ["--do_train", "--max_steps", str(steps)] if steps else []
    module = "benchmarks.sharded" if stage == "shard" else script
    return [module, *stages, "--model_name_or_path", str(model), *data, *sizes, *FLAGS]


def run(launcher: list[str], arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *arguments], cwd=ROOT, env=environment, check=True, capture_output=True)


def difference(left: Path, right: Path) -> dict[str, float]:
    """Largest absolute difference of thresholds (all parameters of a neuron), weights, and biases of keys.

    The gradient of the latter is zero but for rounding, which AdamW turns into steps of the learning rate.
    """
    found = {"thresholds": 0.0, "weights": 0.0, "key biases": 0.0}
    one, other = tensors(left), tensors(right)
    for name in one:
        parts = {"thresholds" if is_threshold(name) else "weights": one[name] - other[name]}
        if name.endswith("attn.c_attn.bias"):
            query, key, value = (one[name] - other[name]).chunk(3)
            parts = {"weights": torch.cat([query, value]), "key biases": key}
        elif name.endswith("key.bias"):
            parts = {"key biases": one[name] - other[name]}
        for kind, part in parts.items():
            found[kind] = max(found[kind], part.abs().max().item())
    return found


def losses(out: Path) -> list[float]:
    """The loss of every step of a training."""
    history = read_results(out / "trainer_state.json")["log_history"]
    return [each["loss"] for each in history if "loss" in each]


def apart(left: list[float], right: list[float]) -> float:
    """The largest relative difference of two lists of numbers."""
    return max((abs(a - b) / abs(b) if b else abs(a) for a, b in zip(left, right, strict=True)), default=0.0)


def measured(out: Path) -> tuple[list[float], list[float]]:
    """Qualities and spike rates of an evaluation."""
    rows = read_results(out / RESULTS_FILE)["metrics"]["rows"]
    return [value for row in rows for value in row["quality"].values()], [row["spike_rate"] or 0.0 for row in rows]


def compare(backbone: str, stage: str, folder: Path, steps: int, evaluated: int = 64) -> dict[str, Any]:
    """Two processes against one in a stage of training and in the evaluation that follows: the largest differences.

    Args:
        backbone: As in [`command`].
        stage: As in [`command`].
        folder: Of models and data, and for what the runs write.
        steps: Of training; 0 to evaluate alone.
        evaluated: Rows to evaluate on.
    """
    one, two = (folder / f"{backbone}-{stage}-{steps}-{evaluated}-{processes}" for processes in (1, 2))
    data = folder / ("held_out.json" if backbone == "gpt2" else "test.json")
    evaluation = ["--do_eval", "--validation_file", str(data), "--max_eval_samples", str(evaluated)]
    evaluation += ["--T", "3" if stage == "distil" else "2"]
    plain = "downstream" if stage == "shard" else stage
    run(ONE, [*command(backbone, plain, folder, one, 8, steps), *evaluation, "--per_device_eval_batch_size", "8"])
    run(TWO, [*command(backbone, stage, folder, two, 4, steps), *evaluation, "--per_device_eval_batch_size", "4"])
    (quality, rates), (other_quality, other_rates) = measured(one), measured(two)
    found = {"quality": apart(other_quality, quality), "spike rate": apart(other_rates, rates)}
    if steps:
        found = {**difference(one, two), "losses": apart(losses(two), losses(one)), **found}
    return {"model": backbone, "stage": stage if steps else f"evaluation, {evaluated} rows", "steps": steps, **found}


def compare_resumed(folder: Path, steps: int) -> dict[str, Any]:
    """Sharded training that goes on from its first checkpoint, against the same uninterrupted."""
    whole, resumed = folder / f"gpt2-shard-{steps}-64-2", folder / "gpt2-resumed"
    first = checkpoints(whole)[0]
    shutil.copytree(first, resumed / first.name)
    run(TWO, [*command("gpt2", "shard", folder, resumed, 4, steps), "--resume_from_checkpoint", "true"])
    found = {**difference(whole, resumed), "losses": apart(losses(resumed), losses(whole))}
    return {"model": "gpt2", "stage": "shard, resumed", "steps": steps, **found}


def compare_conversion(folder: Path) -> dict[str, Any]:
    """Conversion without training under a launcher, against the same in one process."""
    arguments = kinds(folder)[2].arguments
    for launcher, name in ((ONE, "converted-1"), (TWO, "converted-2")):
        run(launcher, arguments(folder / name))
    one, two = folder / "converted-1", folder / "converted-2"
    values = [[value for row in results(out) for value in row["quality"].values()] for out in (two, one)]
    rates = [[row["spike_rate"] or 0.0 for row in results(out)] for out in (two, one)]
    found = {**difference(one, two), "quality": apart(*values), "spike rate": apart(*rates)}
    return {"model": "gpt2", "stage": "conversion", "steps": 0, **found}


def compare_all(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Everything that two processes do, on the inputs in a folder."""
    for backbone in ("bert", "gpt2"):
        run(ONE, command(backbone, "downstream", folder, folder / f"{backbone}-qcfs", 8, 4))
        spiking = convert_to_spiking(str(folder / backbone), sentences(40), code="phase", T=3, progress=False)
        spiking.save_pretrained(folder / f"phase-{backbone}")
        AutoTokenizer.from_pretrained(folder / backbone).save_pretrained(folder / f"phase-{backbone}")
    rows = []
    for backbone, stage in [*product(("bert", "gpt2"), ("downstream", "calibrate", "distil")), ("gpt2", "shard")]:
        rows.append(compare(backbone, stage, folder, steps))
        print(rows[-1], flush=True)
    rows.append(compare_resumed(folder, steps))
    rows += [compare(backbone, "distil", folder, 0, count) for backbone in ("bert", "gpt2") for count in (64, 61)]
    return [*rows, compare_conversion(folder)]


def saved_three(out: Path) -> bool:
    return len(checkpoints(out)) > 2


def begun(out: Path) -> bool:
    return (out / LOCK_FILE).exists()


def saving(out: Path) -> bool:
    """Whether a model is being written, to take the place of another, of a checkpoint or of nothing."""
    return any(out.rglob(f"{SCRATCH}*"))


def half(out: Path) -> list[str]:
    """Folders that look like a model, with a configuration, and are none."""
    folders = [path.parent for path in out.rglob("config.json") if "checkpoint-" not in str(path)]
    whole = ("model.safetensors", "tokenizer_config.json")
    return [folder.name for folder in folders if any(not (folder / name).is_file() for name in whole)]


@dataclass
class Kind:
    """A command to kill: its arguments for an output folder, where its model is then, and what to wait for."""

    name: str
    arguments: Callable[[Path], list[str]]
    ready: Callable[[Path], bool] = saved_three
    model: str = "."
    longest: float = 3.0  # seconds that it takes from there


def kill_and_resume(
    kind: Kind, whole: Path, out: Path, rng: random.Random, while_saving: bool = False
) -> dict[str, Any]:
    """Start a run, kill it with SIGKILL at a random moment, start it again, compare with the uninterrupted one.

    It is killed after `kind.ready`, or within 50 ms after that and after a model began to be written.
    """
    arguments = kind.arguments(out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    full = [*ONE, *arguments]
    process = subprocess.Popen(full, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for ready in (kind.ready, saving) if while_saving else (kind.ready,):
        while not ready(out) and process.poll() is None:
            time.sleep(0.001)
    delay = rng.uniform(0, 0.05 if while_saving else kind.longest)
    time.sleep(delay)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [(path.name, is_complete(path)) for path in sorted(out.rglob("checkpoint-*")) if path.is_dir()]
    halves = half(out)
    run(ONE, arguments)
    same = results(whole) == results(out)
    found = {"killed": killed, "while saving": while_saving, "seconds": delay, "checkpoints": left}
    return {
        **found,
        "half models": len(halves),
        "same results": same,
        **difference(whole / kind.model, out / kind.model),
    }


def results(out: Path) -> Any:
    """The rows of a conversion, without the time they took; None of a run that evaluates nothing."""
    path = out / "conversion.json"
    if not path.is_file():
        return None
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_results(path)["metrics"]["rows"]
    ]


def kinds(folder: Path) -> list[Kind]:
    """What is killed, on the inputs in a folder."""
    save = ["--save_steps", "2", "--save_total_limit", "3", "--resume_from_checkpoint", "true"]
    shared = {"train_file": str(folder / "train.json"), "validation_file": str(folder / "train.json")}
    shared |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_eval_samples": 16, "T": [2]}
    shared |= {"save_steps": 2, "save_total_limit": 3, "max_steps": 20, "learning_rate": 1e-3}
    steps = {"qcfs": {"script": "run_glue"}, "calibrated": {"script": "run_glue", "stage": "calibrate", "calib_T": 2}}
    (folder / "recipe.yaml").write_text(json.dumps({"shared": shared, "steps": steps}), encoding="utf-8")
    recipe = ["training.convert", str(folder / "recipe.yaml"), "--model_name_or_path", str(folder / "bert")]
    untrained = ["training.convert", str(folder / "gpt2"), "--sites", "all", "--code", "phase", "--tokens", "256"]
    untrained += ["--calibration_file", str(folder / "corpus.json"), "--limit", "4"]
    return [
        Kind("training", lambda out: [*command("bert", "downstream", folder, out, 8, 60), *save]),
        Kind("calibration", lambda out: [*command("bert", "calibrate", folder, out, 8, 40), *save]),
        Kind("conversion", lambda out: [*untrained, "--output_dir", str(out)], begun, longest=0.0),
        Kind("recipe", lambda out: [*recipe, "--output_dir", str(out)], begun, "calibrated", longest=0.0),
    ]


def kill_all(folder: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Kill every kind in turn, `count` times in all; a run that was over before it was killed does not count."""
    chosen, kills = kinds(folder), []
    for kind in chosen:
        start = time.perf_counter()
        run(ONE, kind.arguments(folder / kind.name))
        kind.longest = kind.longest or time.perf_counter() - start - STARTING
    while len(kills) < count:
        kind = chosen[len(kills) % len(chosen)]
        with tempfile.TemporaryDirectory(dir=folder) as out:
            odd = len(kills) // len(chosen) % 2 == 1
            found = kill_and_resume(kind, folder / kind.name, Path(out) / "out", rng, odd)
        if found["killed"]:
            del found["killed"]
            kills.append({"kill": len(kills) + 1, "command": kind.name, **found})
            print(kills[-1], flush=True)
        else:
            kind.longest /= 2  # it was timed when the machine had more to do
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_reviews(folder / "train.json", 512)
        write_reviews(folder / "test.json", 64, seed=1)
        write_corpus(folder / "corpus.json", 2000)
        write_corpus(folder / "held_out.json", 400, seed=1)
        save_gpt2(folder / "gpt2", dropout=0.0)
        if given.steps:
            save_bert(folder / "bert", dropout=0.0)
            rows = compare_all(folder, given.steps)
            print(markdown_table(rows, digits=10))
            write_results(RESULTS / "processes.json", metrics=rows, configuration={"steps": given.steps})
        if given.kills:
            save_bert(folder / "bert", dropout=0.1)
            shutil.rmtree(folder / "bert-qcfs", ignore_errors=True)
            run(ONE, command("bert", "downstream", folder, folder / "bert-qcfs", 8, 4))
            kills = kill_all(folder, given.kills, random.Random(given.seed))
            write_results(RESULTS / "killed.json", metrics=kills, configuration=vars(given))


if __name__ == "__main__":
    main()
