"""What the settings of fine calibration do: rate, weight of the site errors and steps, after one and the same search.

    python benchmarks/calibration_settings.py --task stsb --fine 60 0.05 1 --fine 60 0.02 10

Rows that are in the results file are not run again. The defaults were chosen by it, on seed 0 at T = 4 and on the
evaluation data: the other seeds and T of `calibration_quality.py` had no part in the choice.
"""

import argparse
import copy
import os

import torch
from _calibration_tasks import ROOT, TASKS
from calibration_quality import SETTINGS, search, train
from transformers.utils import logging

from training.calibration import output_error
from training.results import commit, read_results, write_results


RESULTS = ROOT / "benchmarks" / "results" / "calibration_settings.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument(
        "--fine", nargs=3, type=float, action="append", required=True, metavar=("STEPS", "RATE", "SITE_WEIGHT")
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    task, rows = TASKS[options.task](), read_results(RESULTS)["metrics"] if RESULTS.exists() else []
    _, teacher = task.evaluate(task.qcfs(options.seed))
    for steps, rate, site_weight in options.fine:
        row = {"task": task.name, "seed": options.seed, "T": options.T}
        row |= {"steps": int(steps), "rate": rate, "site_weight": site_weight}
        if any(row.items() <= done.items() for done in rows):
            continue
        model = copy.deepcopy(task.qcfs(options.seed)).begin_calibration(options.T)
        model.load_state_dict(search(task, options.T, options.seed, True)[0])
        batches = task.calibration_batches(row["steps"], SETTINGS["batch_size"][task.kind], options.seed)
        train(model, batches, rate, site_weight=site_weight)
        scores, logits = task.evaluate(model.set_timesteps(options.T))
        if logits is not None:
            scores["divergence_from_qcfs"] = float(output_error(logits, teacher, causal=False))
        rows.append(row | scores | {"commit": commit()})
        write_results(RESULTS, metrics=rows, configuration={"batch_size": SETTINGS["batch_size"]})


if __name__ == "__main__":
    main()
