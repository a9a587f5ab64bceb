"""Two processes against one, and commands killed by SIGKILL against uninterrupted ones.

    PYTHONPATH=. python benchmarks/training_processes.py [--only_kills] [--kills 30] [--steps 20]

Small random models on made-up data, in float32 and without dropout for the comparison of processes (each process draws
its own), with dropout for the killed runs. Those are of four kinds, in turn: training, calibration, conversion without
training, and the recipe of two steps; every second one of a kind is killed while it saves. Writes processes.json and
killed.json in benchmarks/results/training.
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
from pathlib import Path
from typing import Any

import torch

from tests.training_helpers import save_bert, save_gpt2, tensors, write_corpus, write_reviews
from training.checkpoints import SCRATCH, checkpoints, is_complete
from training.commands import LOCK_FILE
from training.results import markdown_table, read_results, write_results


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
STARTING = 5.0  # seconds, about, until a command has its folder
FLAGS = ["--do_train", "--learning_rate=1e-3", "--report_to=none", "--disable_tqdm=true", "--use_cpu"]


def command(backbone: str, stage: str, folder: Path, out: Path, size: int, steps: int) -> list[str]:
    """Arguments of a run, from the module on."""
    model = folder / (f"{backbone}-qcfs" if stage == "calibrate" else backbone)
    script = "run_clm" if backbone == "gpt2" else "run_glue"
    data = ["--train_file", str(folder / ("corpus.json" if backbone == "gpt2" else "train.json"))]
    data += ["--block_size", "16"] if backbone == "gpt2" else []
    stages = ["--stage", stage, *(["--calib_T", "2"] if stage == "calibrate" else [])]
    sizes = ["--per_device_train_batch_size", str(size), "--max_steps", str(steps), "--output_dir", str(out)]
    return [f"training.{script}", *stages, "--model_name_or_path", str(model), *data, *sizes, *FLAGS]


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
        parts = {
            "thresholds" if name.endswith(("threshold", "initial_potential")) else "weights": one[name] - other[name]
        }
        if name.endswith("attn.c_attn.bias"):
            query, key, value = (one[name] - other[name]).chunk(3)
            parts = {"weights": torch.cat([query, value]), "key biases": key}
        elif name.endswith("key.bias"):
            parts = {"key biases": one[name] - other[name]}
        for kind, part in parts.items():
            found[kind] = max(found[kind], part.abs().max().item())
    return found


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
    full = [sys.executable, "-m", *arguments]
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
    run([sys.executable, "-m"], arguments)
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
        run([sys.executable, "-m"], kind.arguments(folder / kind.name))
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
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--only_kills", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_reviews(folder / "train.json", 512)
        write_corpus(folder / "corpus.json", 2000)
        save_bert(folder / "bert", dropout=0.0)
        save_gpt2(folder / "gpt2", dropout=0.0)
        for backbone in ("bert", "gpt2") if not given.only_kills else ():
            run([sys.executable, "-m"], command(backbone, "downstream", folder, folder / f"{backbone}-qcfs", 8, 4))
            for stage in ("downstream", "calibrate"):
                one, two = folder / f"{backbone}-{stage}-1", folder / f"{backbone}-{stage}-2"
                run([sys.executable, "-m"], command(backbone, stage, folder, one, 8, given.steps))
                run(TORCHRUN, command(backbone, stage, folder, two, 4, given.steps))
                rows.append({"model": backbone, "stage": stage, "steps": given.steps, **difference(one, two)})
                print(rows[-1], flush=True)
        save_bert(folder / "bert", dropout=0.1)
        shutil.rmtree(folder / "bert-qcfs", ignore_errors=True)
        run([sys.executable, "-m"], command("bert", "downstream", folder, folder / "bert-qcfs", 8, 4))
        kills = kill_all(folder, given.kills, random.Random(given.seed))
    print(markdown_table(rows, digits=10))
    if rows:
        write_results(RESULTS / "processes.json", metrics=rows, configuration=vars(given))
    write_results(RESULTS / "killed.json", metrics=kills, configuration=vars(given))


if __name__ == "__main__":
    main()
