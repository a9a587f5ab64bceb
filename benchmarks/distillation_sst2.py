"""MiniLM on SST-2, trained out, then fully spike-driven and distilled: accuracy, spikes, energy, beside GELU.

    python -m benchmarks.distillation_sst2 [--epochs 2] [--steps 600]

Learning rates are chosen on a tenth of the training rows that no training sees; the validation rows are judged only.
A row is saved as it ends, and a killed training goes on from its last checkpoint.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging

from fas import convert_to_spiking
from training.distillation import FASDistillationTrainer
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results
from training.trainers import FASTrainer

from ._calibration_tasks import MINILM, Glue
from .distillation import arguments, trained
from .spike_driven import spiking_cost


OUTPUT = Path(__file__).parent / "results" / "distillation_sst2.json"
GELU_RATES = (5e-5, 1e-4, 2e-4)
SETTINGS: list[dict[str, Any]] = [
    {"code": "phase", "T": 4},
    {"code": "first_spike", "T": 8, "code_base": 2**0.5},
]
RATES = ((3e-5, 1e-3), (1e-4, 3e-3))  # of weights and of thresholds
GELU_TRIED, TRIED = 150, 60
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def sst2_arguments(folder: Path, batch: int, rate: float, threshold_rate: float | None = None, **length: Any):
    return arguments(
        folder,
        (rate, threshold_rate),
        per_device_train_batch_size=batch,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_steps=100,
        **length,
    )


@torch.inference_mode()
def accuracy(task: Glue, model, rows: list[dict[str, Any]]) -> float:
    right = sum((model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in task.batches(rows, 64))
    return 100 * right / len(rows)


def spikes(task: Glue, model, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Spikes an input and energy over the GELU model's, at the mean length of the rows."""
    length = sum(len(row["input_ids"]) for row in rows[:200]) / len(rows[:200])
    return {"length": length, **spiking_cost(model, task.batches(rows[:200], 1), length, causal=False)[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=2.0, help="of the GELU model")
    parser.add_argument("--steps", type=int, default=600, help="of distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--work", type=Path, default=Path("/tmp/fas-distillation-sst2"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    task = Glue("sst2")
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    collator = DataCollatorWithPadding(tokenizer)
    rows = task.rows("train", 10**6)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = [rows[i] for i in order[: len(rows) // 10]]
    train = [rows[i] for i in order[len(rows) // 10 :]]
    calibration = tokenizer.pad([{"input_ids": row["input_ids"]} for row in train[:64]], return_tensors="pt")
    validation = task.rows("validation")
    done = read_results(args.output)["metrics"] if args.output.is_file() else []
    configuration = {
        "model": "all-MiniLM-L6-v2",
        "train": f"{len(train)} rows of SST-2; {len(held_out)} held out to choose learning rates",
        "calibration": "64 rows of train",
        "judged": f"all {len(validation)} rows of validation",
        "batch": "64 (GELU), 32 (distillation)",
        "energy": "at the mean length of the first 200 rows of validation",
    }

    def keep(row: dict[str, Any]) -> None:
        done.append(row | ORIGIN)
        write_results(args.output, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)

    def best(wanted: dict[str, Any]) -> Any:
        return max(matching(done, wanted), key=lambda row: row["held_out"])["rates"]

    def missing(wanted: dict[str, Any]) -> bool:
        return not matching(done, wanted)

    def gelu(rate: float, name: str, **length: Any):
        set_seed(args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
        settings = sst2_arguments(args.work / name, 64, rate, seed=args.seed, **length)
        trainer = FASTrainer(model, settings, train_dataset=train, data_collator=collator)
        trained(trainer, args.work / name)
        return model

    for rate in GELU_RATES:
        row = {"kind": "trial", "code": "gelu", "seed": args.seed, "steps": GELU_TRIED, "rates": rate}
        if missing(row):
            keep(row | {"held_out": accuracy(task, gelu(rate, f"try-{rate}", max_steps=GELU_TRIED), held_out)})
    teacher = args.work / f"gelu-{args.seed}"
    row = {"kind": "trained", "code": "gelu", "seed": args.seed, "epochs": args.epochs}
    if missing(row):
        rate = best({"kind": "trial", "code": "gelu", "seed": args.seed})
        model = gelu(rate, "gelu-run", num_train_epochs=args.epochs)
        model.save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
        scores = {"held_out": accuracy(task, model, held_out), "accuracy": accuracy(task, model, validation)}
        keep(row | {"rates": rate} | scores | {"weights_sha256": fingerprint(model)})
    stock = AutoModelForSequenceClassification.from_pretrained(teacher).eval()

    def distilled(settings: dict[str, Any], rates: tuple[float, float], steps: int, name: str):
        set_seed(args.seed)
        model = convert_to_spiking(str(teacher), calibration, sites="all", progress=False, **settings)
        options = sst2_arguments(args.work / name, 32, *rates, seed=args.seed, max_steps=steps)
        trainer = FASDistillationTrainer(
            model, options, teacher=stock, train_dataset=train, data_collator=collator, hidden_weight=1.0
        )
        trained(trainer, args.work / name)
        return model

    for settings in SETTINGS:
        same = {**settings, "seed": args.seed, "sites": "all"}
        if missing({"kind": "converted", **same}):
            model = convert_to_spiking(str(teacher), calibration, sites="all", progress=False, **settings)
            scores = {"held_out": accuracy(task, model, held_out), "accuracy": accuracy(task, model, validation)}
            keep({"kind": "converted", **same} | scores | spikes(task, model, validation))
        for rates in RATES:
            row = {"kind": "trial", **same, "steps": TRIED, "rates": list(rates)}
            if missing(row):
                model = distilled(settings, rates, TRIED, f"try-{settings['code']}-{rates[0]}")
                keep(row | {"held_out": accuracy(task, model, held_out)})
        row = {"kind": "distilled", **same, "steps": args.steps}
        if missing(row):
            chosen = best({"kind": "trial", **same})
            model = distilled(settings, chosen, args.steps, f"{settings['code']}-run")
            scores = {"held_out": accuracy(task, model, held_out), "accuracy": accuracy(task, model, validation)}
            hashed = {"weights_sha256": fingerprint(model)}
            keep(row | {"rates": chosen} | scores | spikes(task, model, validation) | hashed)


if __name__ == "__main__":
    main()
