"""How far a figure moves by rounding alone: threads, and the order of the rows that thresholds are fitted to.

    python -m benchmarks.threads [prose|smollm2]

Other threads add in another order, and a value between two levels may then fall to the other one; another of the few
powers may be chosen for a gain by token. The rows of calibration are turned by so many: the same tokens, in another
order. What a training makes of it is in `benchmarks.demo_spread`. A row is saved as it ends.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from .ablations import CODES
from .spike_driven import (
    MODELS,
    SHARED,
    WINDOWS,
    calibration_text,
    converted,
    perplexity,
    rows_of,
    spiking_cost,
    windows,
)


OUTPUT = Path(__file__).parent / "results" / "threads.json"
SETTINGS = {"prose": CODES, "smollm2": [{"sites": "all", "code": "phase", "T": T} for T in (5, 6)]}
MOVED = (
    {"threads": 1, "turned": 0},
    {"threads": 2, "turned": 0},
    {"threads": 1, "turned": 1},
    {"threads": 1, "turned": 2},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=SETTINGS, default="prose")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    logging.set_verbosity_error()
    path, judged, _, length = MODELS[args.model]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = windows(tokenizer, SHARED / judged, length, WINDOWS[args.model])
    ids = calibration_text(args.model, tokenizer)[0]
    found = read_results(args.output)["metrics"] if args.output.is_file() else []
    for settings in SETTINGS[args.model]:
        for moved in MOVED:
            row = {"model": args.model, **settings, **moved}
            if matching(found, row):
                continue
            torch.set_num_threads(moved["threads"])
            model = converted(path, settings, ids.roll(moved["turned"], 0))
            row |= {"perplexity": perplexity(model, rows)} | spiking_cost(model, rows_of(rows[:8]))[0]
            found.append(row | {"weights_sha256": fingerprint(model), **origin()})
            configuration = {"windows": WINDOWS, "lengths": {name: each[3] for name, each in MODELS.items()}}
            write_results(args.output, metrics=found, configuration=configuration)
            print(markdown_table(found[-1:], digits=6), flush=True)


if __name__ == "__main__":
    main()
