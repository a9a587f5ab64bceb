"""How much of the gap calibration closes: GELU, QCFS, and stepwise runs before and after calibration.

    python -m benchmarks.calibration_quality --tasks sst2 cola stsb prose --seeds 0 1 2

Every (task, seed) has a results file of its own, rewritten after each row; rows that are there are not run again.
"""

import argparse
import copy
import functools
import os
import time
from pathlib import Path

import torch
from transformers.utils import logging

from training.arguments import CALIBRATION_SETTINGS, THRESHOLD_LEARNING_RATES
from training.calibrate.coarse import PUBLISHED_PAIR, coarse_search, set_pair
from training.calibrate.loss import calibration_loss, freeze_for_calibration, output_error
from training.results import origin, read_results, write_results

from ._calibration_tasks import ROOT, TASKS


RESULTS = ROOT / "benchmarks" / "results" / "calibration"
SETTINGS = {
    "rows": {"glue": 64, "prose": 8},  # of the batch that the searches see
    "fine": {
        kind: {
            "lr": CALIBRATION_SETTINGS[script][0],
            "site_weight": CALIBRATION_SETTINGS[script][1],
            "output_weight": 1.0,
        }
        for kind, script in (("glue", "glue"), ("prose", "clm"))
    },
    # The published recipe: position granularity at one padded length, fixed pair, its losses, rates and decay.
    "published": {
        "lr_gpt2": THRESHOLD_LEARNING_RATES["clm", "calibrate"],
        "lr_bert": THRESHOLD_LEARNING_RATES["glue", "calibrate"],
    },
    "steps": 60,
    "batch_size": {"glue": 16, "prose": 4},
}


def train(model, batches, lr, **loss):
    """Gradient calibration: Adam, linear decay to zero."""
    trainable = freeze_for_calibration(model)
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        calibration_loss(model, batch, **loss).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        model.clamp_thresholds_()


def calibrate(model, task, variant, T, seed):
    """Calibrate in place; returns what is needed to evaluate and to report."""
    kind = task.kind
    length = task.max_length if variant == "published" else None
    batches = task.calibration_batches(SETTINGS["steps"], SETTINGS["batch_size"][kind], seed, length)
    if variant == "published":
        model.begin_calibration(T, "position", length)
        for _, neuron in model.neurons():
            set_pair(neuron, *PUBLISHED_PAIR)
        rate = SETTINGS["published"]["lr_gpt2" if kind == "prose" else "lr_bert"]
        train(model, batches, rate, reduction="published", site_weight=1.0, output_weight=float(kind == "prose"))
        return {"length": length, "steps": len(batches)}
    searched, sites = search(task, T, seed, variant != "coarse")
    model.begin_calibration(T).load_state_dict(searched)
    if variant == "fine":
        train(model, batches, **SETTINGS["fine"][kind])
    return {"sites": sites} | ({"steps": len(batches)} if variant == "fine" else {})


@functools.lru_cache(maxsize=1)
def search(task, T, seed, per_neuron):
    """Weights after the coarse search, and what it found."""
    model = copy.deepcopy(task.qcfs(seed)).begin_calibration(T)
    batch = task.calibration_batches(1, SETTINGS["rows"][task.kind], seed)[0]
    sites = coarse_search(model, batch, per_neuron=per_neuron, progress=False)
    return model.state_dict(), sites


@functools.cache
def teacher_logits(_cell, task, seed):
    return task.evaluate(task.qcfs(seed))[1]


def run_cell(name, seed, variants, timesteps, folder):
    """Run the rows of one task and seed that its results file lacks."""
    task, path = TASKS[name](), folder / f"{name}_s{seed}.json"
    rows = read_results(path)["metrics"] if path.exists() else []
    wanted = [("gelu", None), ("qcfs", None), *((v, T) for T in timesteps for v in variants)]
    for variant, T in wanted:
        if any(row["variant"] == variant and row["T"] == T for row in rows):
            continue
        start, more = time.perf_counter(), {}
        if variant == "gelu":
            model = task.gelu()
        else:
            model = copy.deepcopy(task.qcfs(seed))
            if T:
                more = {} if variant == "uncalibrated" else calibrate(model, task, variant, T, seed)
                model.set_timesteps(T)
        calibrated = time.perf_counter()
        scores, logits = task.evaluate(model)
        seconds = {"calibration_s": calibrated - start, "evaluation_s": time.perf_counter() - calibrated}
        if logits is not None and variant != "gelu":
            teacher = logits if variant == "qcfs" else teacher_logits(path.stem, task, seed)
            scores["divergence_from_qcfs"] = float(output_error(logits, teacher, causal=False))
        rows.append({"variant": variant, "T": T, **scores, **seconds, **origin(), **more})
        write_results(
            path,
            metrics=rows,
            configuration={"task": name, "seed": seed, "settings": SETTINGS, **task.describe()},
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--T", nargs="+", type=int, default=[4, 8, 2, 1])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["uncalibrated", "coarse", "neuron", "fine", "published"],
        help="`coarse`: a pair by site; `neuron`: by neuron",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for seed in options.seeds:
        for name in options.tasks:
            run_cell(name, seed, options.variants, options.T, options.output)


if __name__ == "__main__":
    main()
