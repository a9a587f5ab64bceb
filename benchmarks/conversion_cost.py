"""Training-free conversion of SmolLM2-135M: seconds, and memory over the weights, of the whole and of its parts.

    SMOLLM2=FOLDER python -m benchmarks.conversion_cost [--rounds 3] [--threads 2]

Each round is a process of its own: load the libraries, then convert the folder from 768 tokens. Memory is the largest
resident set of the process, less what the libraries took before, over the bytes of the weights on disk in float32.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from training.results import commit, markdown_table, write_results

from .spike_driven import MODELS, SHARED


OUTPUT = Path(__file__).parent / "results" / "conversion_cost.json"
MODEL, TEXT, _, LENGTH = MODELS["smollm2"]
SETTINGS = ({"code": "phase", "T": 5}, {"code": "first_spike", "T": 16, "code_base": 1.2})


def once(settings: dict) -> dict[str, float]:
    """Of this process."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from fas import convert_to_spiking

    from .spike_driven import windows

    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    calibration = windows(AutoTokenizer.from_pretrained(MODEL), SHARED / TEXT, LENGTH, 3, 44)
    import_module("transformers.models.llama.modeling_llama")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model = convert_to_spiking(str(MODEL), calibration, sites="all", progress=False, **settings)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(
        each.numel() * 4 for name, each in model.named_parameters() if not name.endswith(("threshold", "gain"))
    )
    return {"seconds": seconds, "weights_bytes": weights, "before_bytes": before * 1024, "peak_bytes": peak * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(json.loads(args.once))))
        return
    rows = []
    for settings in SETTINGS:
        found = []
        for _ in range(args.rounds):
            command = [sys.executable, "-m", "benchmarks.conversion_cost", "--once", json.dumps(settings)]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(out.splitlines()[-1]))
        seconds = [each["seconds"] for each in found]
        over = [(each["peak_bytes"] - each["before_bytes"]) / each["weights_bytes"] for each in found]
        rows.append(
            settings
            | {"seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)]}
            | {"memory_over_weights": statistics.median(over), "memory_range": [min(over), max(over)]}
            | {"commit": commit()}
        )
        print(markdown_table(rows[-1:]), flush=True)
    write_results(OUTPUT, metrics=rows, configuration={"model": MODEL.name, **vars(args), "tokens": 768})


if __name__ == "__main__":
    main()
