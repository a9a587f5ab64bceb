"""What the settings of fine calibration do: rate, weight of the site errors and steps, after one and the same search.

    python -m benchmarks.calibration_settings --task stsb --fine 60 0.05 1 --fine 60 0.02 10
    python -m benchmarks.calibration_settings --task sst2 --unseen 3000 --seeds 0 1 2 --T 4 8 --fine 60 0.05 1

Rows that are in the results file are not run again. Those without `unseen` were judged on the validation rows, on seed
0 at T = 4: the other seeds and T of `calibration_quality.py` had no part in the choice.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
from transformers.utils import logging

from training.calibrate.loss import output_error
from training.results import matching, origin, read_results, write_results

from ._calibration_tasks import ROOT, TASKS, Glue
from .calibration_quality import SETTINGS, search, train


RESULTS = ROOT / "benchmarks" / "results" / "calibration_settings.json"


def judged(task, model, teacher=None):
    scores, logits = task.evaluate(model)
    if logits is not None and teacher is not None:
        scores["divergence_from_qcfs"] = float(output_error(logits, teacher, causal=False))
    return scores, logits


def settings(task, seed, T, wanted, done):
    """Yield a row for every one of `wanted` that is not done, with its two ends: QCFS, and not calibrated at all."""
    cell = {"task": task.name, "seed": seed, "T": T, "unseen": getattr(task, "unseen", 0)}
    wanted = [cell | {"steps": int(steps), "rate": rate, "site_weight": weight} for steps, rate, weight in wanted]
    wanted = [row for row in wanted if not matching([{"unseen": 0} | old for old in done], row)]
    if not wanted:
        return
    ann = task.qcfs(seed)
    ends = {}
    ends["qcfs"], teacher = judged(task, ann)
    ends["uncalibrated"], _ = judged(task, copy.deepcopy(ann).set_timesteps(T), teacher)
    for row in wanted:
        model = copy.deepcopy(ann).begin_calibration(T)
        model.load_state_dict(search(task, T, seed, True)[0])
        batches = task.calibration_batches(row["steps"], SETTINGS["batch_size"][task.kind], seed)
        train(model, batches, row["rate"], site_weight=row["site_weight"])
        yield row | judged(task, model.set_timesteps(T), teacher)[0] | {"ends": ends, **origin()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--T", nargs="+", type=int, default=[4])
    parser.add_argument("--unseen", type=int, default=0, help="judge SST-2 on so many training rows (0: validation)")
    parser.add_argument(
        "--fine", nargs=3, type=float, action="append", required=True, metavar=("STEPS", "RATE", "SITE_WEIGHT")
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.unseen and options.task != "sst2":
        parser.error(f"--unseen needs training rows that the GELU model never saw: --task sst2, got {options.task}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    task = Glue(options.task, options.unseen) if options.unseen else TASKS[options.task]()
    rows = read_results(options.output)["metrics"] if options.output.exists() else []
    for seed in options.seeds:
        for T in options.T:
            for row in settings(task, seed, T, options.fine, rows):
                rows.append(row)
                write_results(options.output, metrics=rows, configuration={"batch_size": SETTINGS["batch_size"]})


if __name__ == "__main__":
    main()
