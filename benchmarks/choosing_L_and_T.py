"""How the choice of L and T matters: perplexity of gpt2-prose-mini on prose, for both schedules.

    python -m benchmarks.choosing_L_and_T --L 4 8 16 32 --T 1 2 4 8 16

One QCFS fine-tuning per L from the stock model, of the same steps on the same windows. Rows that are there are
not run again.
"""

import argparse
import copy
import os

import torch
from transformers.utils import logging

from training.calibrate import coarse_search
from training.results import read_results, write_results

from ._calibration_tasks import ROOT, Prose


RESULTS = ROOT / "benchmarks" / "results" / "choosing_L_and_T.json"
MODES = ("stepwise", "stepwise, calibrated", "layerwise")


def modes(task, L, T):
    """Models of every mode, made one at a time."""
    for mode in MODES:
        model = copy.deepcopy(task.qcfs(0, L))
        if mode == "stepwise, calibrated":
            model.begin_calibration(T)
            coarse_search(model, task.calibration_batches(1, 8, 0)[0], per_neuron=True, progress=False)
        yield mode, model.set_timesteps(T, mode.split(",")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--L", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--T", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=40, help="of 8 x 128 tokens of QCFS fine-tuning")
    parser.add_argument("--windows", type=int, default=16, help="of 128 tokens of prose to evaluate on")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    task = Prose(steps=options.steps, windows=options.windows, evaluate_on=["prose"])
    rows = read_results(RESULTS)["metrics"] if RESULTS.exists() else []

    def add(L, T, mode, model):
        rows.append({"L": L, "T": T, "mode": mode, **task.evaluate(model)[0]})
        write_results(RESULTS, metrics=rows, configuration=vars(options) | task.describe())

    for L in options.L:
        done = {(row["T"], row["mode"]) for row in rows if row["L"] == L}
        if (0, "QCFS") not in done:
            add(L, 0, "QCFS", task.qcfs(0, L))
        for T in options.T:
            if any((T, mode) not in done for mode in MODES):
                for mode, model in modes(task, L, T):
                    if (T, mode) not in done:
                        add(L, T, mode, model)


if __name__ == "__main__":
    main()
