"""Calibrated at one length, evaluated at others: perplexity of gpt2-prose-mini on prose, and generation with a cache.

python -m benchmarks.calibration_lengths --calibrate_at 64 --evaluate_at 64 128 256
"""

import argparse
import copy
import os

import torch
from transformers.utils import logging

from training.calibrate import coarse_search
from training.results import write_results

from ._calibration_tasks import ROOT, Prose, perplexity
from .calibration_quality import SETTINGS, train


RESULTS = ROOT / "benchmarks" / "results" / "calibration_lengths.json"
TOKENS = 4096  # to evaluate on, whatever the length


def calibrated(task, T, length, seed=0):
    """The QCFS model of a seed, calibrated coarse to fine on windows of one length."""
    model = copy.deepcopy(task.qcfs(seed)).begin_calibration(T)
    steps, size = SETTINGS["steps"], SETTINGS["batch_size"]["prose"] * task.max_length // length
    batches = task.calibration_batches(steps + 2, size, seed, length)
    coarse_search(model, {"input_ids": torch.cat([batch["input_ids"] for batch in batches[:2]])}, progress=False)
    train(model, batches[2:], **SETTINGS["fine"]["prose"])
    return model.set_timesteps(T).eval()


def generations_differ(model, prompts):
    """How many tokens of greedy generation differ with a cache from those without."""
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompts, use_cache=each, **settings) for each in (True, False))
    return int((cached != plain).sum()), cached.numel() - prompts.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--calibrate_at", type=int, default=64)
    parser.add_argument("--evaluate_at", nargs="+", type=int, default=[64, 128, 256])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    task = Prose(evaluate_on=["prose"])
    qcfs, model = task.qcfs(0), calibrated(task, options.T, options.calibrate_at)
    rows = []
    for length in options.evaluate_at:
        windows = task.windows("prose", "validation", TOKENS // length, 0, length)
        row = {"length": length, "qcfs": perplexity(qcfs.set_timesteps(0), windows)}
        row["uncalibrated"] = perplexity(qcfs.set_timesteps(options.T), windows)
        rows.append(row | {"calibrated": perplexity(model, windows)})
    prompts = task.windows("prose", "validation", 4, 1, 32)
    differ, of = generations_differ(model, prompts)
    write_results(
        RESULTS,
        metrics={"perplexity": rows, "generated_tokens": of, "differ_with_cache": differ},
        configuration=vars(options) | task.describe() | {"settings": SETTINGS["fine"]["prose"]},
    )


if __name__ == "__main__":
    main()
