"""How far a figure moves with the number of threads: conversion and evaluation of gpt2-prose-mini, prose.

    python -m benchmarks.threads

Another number of threads adds in another order, and a value between two levels may then fall to the other one. What a
training makes of it is in `benchmarks.demo_spread`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from fas import convert_to_spiking
from training.results import fingerprint, markdown_table, write_results

from .ablations import CODES
from .spike_driven import MODELS, SHARED, perplexity, rows_of, spiking_cost, windows


OUTPUT = Path(__file__).parent / "results" / "threads.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    logging.set_verbosity_error()
    path, judged, text, length = MODELS["prose"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = windows(tokenizer, SHARED / judged, length, args.windows)
    ids = windows(tokenizer, SHARED / str(text), length, 768 // length, 1000)
    found = []
    for settings in CODES:
        for threads in args.threads:
            torch.set_num_threads(threads)
            model = convert_to_spiking(str(path), ids, progress=False, **settings)
            measured = {"perplexity": perplexity(model, rows)} | spiking_cost(model, rows_of(rows[:8]))[0]
            found.append(settings | {"threads": threads} | measured | {"weights_sha256": fingerprint(model)})
            print(markdown_table(found[-1:], digits=6), flush=True)
    configuration = {"model": path.name, "windows": len(rows), "length": length, "judged": judged}
    write_results(args.output, metrics=found, configuration=configuration)


if __name__ == "__main__":
    main()
