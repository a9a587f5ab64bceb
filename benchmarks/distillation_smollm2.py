"""Short distillation of SmolLM2-135M, fully spike-driven: perplexity over stock before and after, spikes, energy.

    SMOLLM2=FOLDER python -m benchmarks.distillation_smollm2 [--steps 100] [--only 0] [--keep FOLDER]

FOLDER is what `benchmarks/smollm2.py` makes. Of WikiText-103 we have the validation text only: its first windows are
judged; calibration, the choice of rates and training have later ones, each window for one use. A row is
saved as it ends; a killed training goes on from its last checkpoint.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fas import convert_to_spiking
from training.distillation import FASDistillationTrainer
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from .distillation import _Log, arguments, trained
from .spike_driven import MODELS, SHARED, perplexity, rows_of, spiking_cost, windows


OUTPUT = Path(__file__).parent / "results" / "distillation_smollm2.json"
MODEL, TEXT, _, LENGTH = MODELS["smollm2"]
BATCH, JUDGED, CALIBRATION, HELD_OUT = 2, 24, 3, 8
PARTS = {"judged": (JUDGED, 0), "calibration": (CALIBRATION, 44), "held_out": (HELD_OUT, 60), "train": (400, 80)}
SETTINGS: list[dict[str, Any]] = [
    {"code": "phase", "T": 5},
    {"code": "first_spike", "T": 16, "code_base": 1.2},
]
# Of weights and of thresholds. With (1e-4, 3e-3) 12 steps are better than with any of these; later the loss explodes.
RATES = {
    "phase": ((1e-5, 5e-4), (3e-5, 1e-3), (5e-5, 1e-4), (1e-4, 1e-4)),
    "first_spike": ((5e-5, 1e-4),),
}
TRIED_STEPS = 12
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def converted(settings: dict[str, Any], calibration: torch.Tensor):
    return convert_to_spiking(str(MODEL), calibration, sites="all", progress=False, **settings)


def distil(model, stock, rows: torch.Tensor, steps: int, rates: tuple[float, float], folder: Path) -> float:
    """Train a model in place; returns seconds a step."""
    options = arguments(
        folder,
        rates,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=5,
        save_steps=20,
    )
    data = [{"input_ids": row, "labels": row} for row in rows[: steps * BATCH]]
    trainer = FASDistillationTrainer(model, options, teacher=stock, train_dataset=data, callbacks=[_Log()])
    start = time.perf_counter()
    trained(trainer, folder)
    return (time.perf_counter() - start) / steps


def measured(model, rows: torch.Tensor, stock: dict[str, float]) -> dict[str, Any]:
    found = perplexity(model, rows)
    return {
        "perplexity": found,
        "over_stock": found / stock["perplexity"],
        **spiking_cost(model, rows_of(rows[:8]))[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", type=int, help="Number of the only setting to measure.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--keep", type=Path, help="folder that trained models are saved in, by code and steps")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fas-distillation-smollm2"))
    args = parser.parse_args()
    if not 1 <= args.steps * BATCH <= PARTS["train"][0]:
        parser.error(f"--steps must be from 1 to {PARTS['train'][0] // BATCH}, got {args.steps}")
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = {name: windows(tokenizer, SHARED / TEXT, LENGTH, *part) for name, part in PARTS.items()}
    configuration = {
        "model": "SmolLM2-135M-Instruct",
        "text": TEXT,
        "windows": {name: f"{count} from number {skip} on" for name, (count, skip) in PARTS.items()},
        "length": LENGTH,
        "batch": BATCH,
        "tried_steps": TRIED_STEPS,
        "schedule": "cosine, 5 steps of warm-up, gradients clipped to norm 1",
    }
    done = read_results(args.output)["metrics"] if args.output.is_file() else []

    def found(wanted: dict[str, Any]) -> list[dict[str, Any]]:
        return matching(done, wanted)

    def keep(row: dict[str, Any]) -> None:
        done.append(row | ORIGIN)
        write_results(args.output, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)

    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    if not found({"kind": "stock"}):
        keep(
            {"kind": "stock"}
            | {f: perplexity(stock, data[n]) for n, f in (("judged", "perplexity"), ("held_out",) * 2)}
        )
    before = found({"kind": "stock"})[0]
    for settings in SETTINGS if args.only is None else [SETTINGS[args.only]]:
        if not found({"kind": "converted", **settings}):
            model = converted(settings, data["calibration"])
            held_out = perplexity(model, data["held_out"])
            keep({"kind": "converted", **settings} | measured(model, data["judged"], before) | {"held_out": held_out})
        for rates in RATES[settings["code"]]:
            row = {"kind": "trial", **settings, "steps": TRIED_STEPS, "rates": list(rates)}
            if not found(row):
                model = converted(settings, data["calibration"])
                distil(model, stock, data["train"], TRIED_STEPS, rates, args.work / f"{settings['code']}-{rates[0]}")
                keep(row | {"held_out": perplexity(model, data["held_out"])})
        row = {"kind": "distilled", **settings, "steps": args.steps}
        if not found(row):
            tried = [row for row in found({"kind": "trial", **settings}) if tuple(row["rates"]) in RATES[row["code"]]]
            rates = tuple(min(tried, key=lambda each: each["held_out"])["rates"])
            model = converted(settings, data["calibration"])
            seconds = distil(
                model, stock, data["train"], args.steps, rates, args.work / f"{settings['code']}-{args.steps}"
            )
            if args.keep:
                model.save_pretrained(args.keep / f"{settings['code']}-{args.steps}")
            after = measured(model, data["judged"], before) | {"held_out": perplexity(model, data["held_out"])}
            keep(
                row | {"rates": list(rates), "step_seconds": seconds} | after | {"weights_sha256": fingerprint(model)}
            )


if __name__ == "__main__":
    main()
