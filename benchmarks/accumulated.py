"""The accumulated schedule against stepwise and layerwise: FAS (QCFS) models, uncalibrated, and searched at T = 4.

    python -m benchmarks.accumulated [--task prose] [--seed 0 1 2] [--T 2 4 8]

Judges each schedule by its score and by the divergence of its logits from those of QCFS: Kullback-Leibler, or the
squared error of a regression. Classifiers are those of `benchmarks/trained_out.py`, the language model that of
`benchmarks/calibration_quality.py`; SST-2 is among the tasks of `benchmarks/glue.py`. A row is saved as it ends; the
same command goes on from there.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers.utils import logging

from training.calibrate import coarse_search
from training.calibrate.loss import output_error
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from ._calibration_tasks import Prose
from .trained_out import TASKS as TRAINED_OUT


RESULTS = Path(__file__).parent / "results" / "accumulated"
SEARCH_ROWS = 64
TASKS = {"prose": Prose, **TRAINED_OUT}


@torch.no_grad()
def logits(task, model, limit=8):
    """Logits of the judged rows, and, for texts, of the first windows."""
    if task.kind == "glue":
        score, found = task.evaluate(model)
        return score, found
    windows = task.evaluation["prose"][:limit]
    return task.evaluate(model)[0], torch.cat([model(input_ids=each[None]).logits for each in windows])


def divergence(found, target):
    mask = torch.ones(found.shape[:2], dtype=torch.bool)
    return output_error(found, target, found.dim() == 3, mask).item()


def rows_of(task, seed, timesteps, done):
    """Every row that is not done yet."""
    model = task.qcfs(seed)
    with model.running(0):
        score, target = logits(task, model)
    settings = [(T, schedule, False) for T in timesteps for schedule in model.config.schedules]
    for T, schedule, searched in [*settings, (4, "accumulated", True)]:
        row = {"seed": seed, "T": T, "schedule": schedule, "searched": searched}
        if matching(done, row):
            continue
        judged = model
        if searched:
            judged = task.qcfs(seed).begin_calibration(T)
            judged.set_timesteps(T, schedule)
            coarse_search(judged, task.calibration_batches(1, SEARCH_ROWS, seed)[0], progress=False)
        with judged.running(T, schedule):
            found_score, found = logits(task, judged)
        qcfs = {f"{name}, QCFS": value for name, value in score.items()}
        yield (
            row | found_score | qcfs | {"divergence": divergence(found, target), "weights_sha256": fingerprint(judged)}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--T", nargs="+", type=int, default=[2, 4, 8])
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for name in args.task:
        task = TASKS[name]()
        output = RESULTS / f"{name}.json"
        done = read_results(output)["metrics"] if output.is_file() else []
        for seed in args.seed:
            for row in rows_of(task, seed, args.T, done):
                done.append(row | origin())
                write_results(output, metrics=done, configuration=task.describe() | {"search_rows": SEARCH_ROWS})
                print(name, markdown_table(done[-1:]), flush=True)


if __name__ == "__main__":
    main()
