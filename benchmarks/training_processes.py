"""Two processes against one, and runs killed by SIGKILL against uninterrupted ones.

    PYTHONPATH=. python benchmarks/training_processes.py [--backbone gpt2|bert] [--steps 20]

Small random models on made-up data, in float32 and without dropout for the comparison of processes (each process draws
its own), with dropout for the killed runs. Writes processes.json and killed.json in benchmarks/results/training.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.training_helpers import save_bert, save_gpt2, tensors, write_corpus, write_reviews
from training.checkpoints import checkpoints, is_complete
from training.results import markdown_table, write_results


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
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


def kill_and_resume(arguments: list[str], whole: Path, out: Path, rng: random.Random, longest: float) -> dict:
    """Start a run, kill it with SIGKILL at a random moment after its third checkpoint began, resume it, compare."""
    save = ["--save_steps", "2", "--resume_from_checkpoint", "true"]
    full = [sys.executable, "-m", *arguments, *save]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(full, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(checkpoints(out)) < 3 and process.poll() is None:
        time.sleep(0.001)
    delay = rng.uniform(0, longest)
    time.sleep(delay)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [(path.name, is_complete(path)) for path in checkpoints(out)]
    run([sys.executable, "-m"], [*arguments, *save])
    return {"delay": delay, "killed": killed, "found": left, **difference(whole, out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds after the first checkpoint")
    parser.add_argument("--only_kills", action="store_true")
    given = parser.parse_args()
    rows, kills, rng = [], [], random.Random(given.seed)
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
        whole = folder / "whole"
        run([sys.executable, "-m"], command("bert", "downstream", folder, whole, 8, 60))
        for i in range(given.kills):
            out = folder / f"killed-{i}"
            arguments = command("bert", "downstream", folder, out, 8, 60)
            longest = given.longest if i % 2 == 0 else 0.1  # every second one while a checkpoint is being written
            kills.append({"kill": i, **kill_and_resume(arguments, whole, out, rng, longest)})
            print(kills[-1], flush=True)
    print(markdown_table(rows, digits=10))
    if rows:
        write_results(RESULTS / "processes.json", metrics=rows, configuration=vars(given))
    write_results(RESULTS / "killed.json", metrics=kills, configuration=vars(given))


if __name__ == "__main__":
    main()
