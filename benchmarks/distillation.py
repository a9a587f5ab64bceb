"""Short distillation of a converted model: perplexity before and after, spikes, energy, and what a step costs.

    python -m benchmarks.distillation [--steps 300] [--only 0]

gpt2-prose-mini is converted with thresholds from training text, then follows the stock model on other training text.
The learning rates are chosen on training text that neither saw. A row is saved as it ends; the same command goes on
from there.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from fas import convert_to_spiking
from training.arguments import FASTrainingArguments
from training.checkpoints import last_complete
from training.distillation import FASDistillationTrainer
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results
from training.trainers import FASTrainer

from .spike_driven import SHARED, perplexity, rows_of, spiking_cost, windows


OUTPUT = Path(__file__).parent / "results" / "distillation.json"
MODEL = SHARED / "models" / "gpt2-prose-mini"
TRAIN, JUDGED = (SHARED / "data" / "prose" / f"{split}.parquet" for split in ("train", "validation"))
LENGTH, BATCH, ENERGY_LENGTH = 128, 8, 256
CALIBRATION = 24  # windows
HELD_OUT = 48
SETTINGS: list[dict[str, Any]] = [
    {"code": "phase", "T": 3},
    {"code": "first_spike", "T": 8, "code_base": 2**0.5},
]
MOST_STEPS = 300  # no run has more: so many batches are set aside for training
# Learning rates of weights and of thresholds, tried for so many steps, the best of which train to the end.
RATES = {
    "phase": ((1e-4, 1e-3), (3e-4, 3e-3), (1e-3, 3e-3)),
    "first_spike": ((1e-4, 1e-3), (3e-4, 3e-3)),
}
TRIED_STEPS = 25
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def converted(settings: dict[str, Any], calibration: torch.Tensor):
    return convert_to_spiking(str(MODEL), calibration, sites="all", progress=False, **settings)


def stock():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()


def arguments(folder: str | Path, rates: tuple[float, float | None], **settings: Any) -> FASTrainingArguments:
    """Those of every run here: rates of weights and of thresholds, and checkpoints to go on from."""
    return FASTrainingArguments(
        str(folder),
        learning_rate=rates[0],
        threshold_learning_rate=rates[1],
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "steps"} | settings),
    )


def prose_arguments(folder: str | Path, steps: int, rates: tuple[float, float]) -> FASTrainingArguments:
    return arguments(
        folder,
        rates,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 4),
        weight_decay=0.0,
        logging_steps=20,
        save_steps=25,
    )


def trained(trainer: FASTrainer, folder: Path) -> float:
    """Train, from the last checkpoint of a killed run on, if there is one; returns the loss. The folder is removed."""
    last = last_complete(folder)
    loss = trainer.train(resume_from_checkpoint=None if last is None else str(last)).training_loss
    trainer.model.eval()
    shutil.rmtree(folder, ignore_errors=True)
    return loss


class _Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print(state.global_step, logs, flush=True)


def distil(model, rows: torch.Tensor, steps: int, rates: tuple[float, float], folder: Path) -> dict[str, Any]:
    """Train a model in place; a killed run goes on from its last checkpoint in the folder, which is then removed."""
    data = [{"input_ids": row, "labels": row} for row in rows[: steps * BATCH]]
    args = prose_arguments(folder, steps, rates)
    trainer = FASDistillationTrainer(model, args, teacher=stock(), train_dataset=data, callbacks=[_Log()])
    loss = trained(trainer, folder)
    return {"training_loss": loss, "training_seconds": trainer.state.log_history[-1]["train_runtime"]}


def cost(settings: dict[str, Any], calibration: torch.Tensor, rows: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Median seconds of a step: forward, backward, optimizer; the two kinds in turn."""
    with tempfile.TemporaryDirectory() as folder:
        args = prose_arguments(folder, 1, (1e-5, 1e-5))
        plain, model = stock(), converted(settings, calibration)
        trainers = {
            "plain": FASTrainer(plain, args),
            "distillation": FASDistillationTrainer(model, args, teacher=stock()),
        }
        for trainer in trainers.values():
            trainer.create_optimizer()
            trainer.current_gradient_accumulation_steps = 1
        batch = rows[:BATCH]
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for repeat in range(repeats + 1):
            for name, trainer in trainers.items():
                start = time.perf_counter()
                trainer.training_step(trainer.model, {"input_ids": batch, "labels": batch})
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    plain_step, own = (statistics.median(seconds[name]) for name in ("plain", "distillation"))
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["distillation"], strict=True)]
    return {
        "plain_step_seconds": plain_step,
        "distillation_step_seconds": own,
        "step_ratio": own / plain_step,
        "step_ratio_pairs": [min(ratios), statistics.median(ratios), max(ratios)],
        "repeats": repeats,
    }


def measured(model, rows: torch.Tensor) -> dict[str, Any]:
    """Perplexity of the first 16 windows and of all, spikes an input, energy over the stock model's, weights read."""
    found = {"perplexity_16": perplexity(model, rows[:16]), "perplexity": perplexity(model, rows)}
    return found | spiking_cost(model, rows_of(rows[:16]), ENERGY_LENGTH)[0]


def judge(
    settings, steps: int, data: dict[str, torch.Tensor], before: dict[str, Any], tried: list, folder: Path
) -> dict[str, Any]:
    """Choose learning rates, distil to the end, and measure."""
    best = min(tried, key=lambda each: each["held_out"])["rates"]
    model = converted(settings, data["calibration"])
    first = measured(model, data["judged"])
    trained = distil(model, data["train"], steps, tuple(best), folder)
    last = measured(model, data["judged"])
    over = {
        f"{name}_over_stock{end}": found[f"perplexity{end}"] / before[f"perplexity{end}"]
        for name, found in (("before", first), ("after", last))
        for end in ("", "_16")
    }
    return {
        "rates": best,
        "before": first,
        "after": last,
        **over,
        "held_out": perplexity(model, data["held_out"]),
        **trained,
        "weights_sha256": fingerprint(model),
        **ORIGIN,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=MOST_STEPS)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--only", type=int, help="Number of the only row to measure.")
    parser.add_argument("--repeats", type=int, default=10, help="Of a step, to time it.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fas-distillation")
    args = parser.parse_args()
    if not 1 <= args.steps <= MOST_STEPS:
        parser.error(f"--steps must be from 1 to {MOST_STEPS}, got {args.steps}")
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = windows(tokenizer, TRAIN, LENGTH, MOST_STEPS * BATCH + HELD_OUT + CALIBRATION)
    data = {
        "train": text[: MOST_STEPS * BATCH],
        "held_out": text[MOST_STEPS * BATCH :][:HELD_OUT],
        "calibration": text[-CALIBRATION:],
        "judged": windows(tokenizer, JUDGED, LENGTH, args.windows),
    }
    configuration = {
        "model": MODEL.name,
        "train": f"{TRAIN.name}, the first 8 × steps windows, each once",
        "held_out": f"{HELD_OUT} windows from number {MOST_STEPS * BATCH} on",
        "calibration": f"the {CALIBRATION} windows after those",
        "judged": f"{JUDGED.name}, the first {len(data['judged'])} windows; _16: the first 16",
        "length": LENGTH,
        "batch": BATCH,
        "tried_steps": TRIED_STEPS,
        "energy_length": ENERGY_LENGTH,
    }
    done = read_results(args.output)["metrics"] if args.output.is_file() else []

    def keep(row: dict[str, Any]) -> None:
        done[:] = [*(read_results(args.output)["metrics"] if args.output.is_file() else []), row]
        write_results(args.output, metrics=done, configuration=configuration)
        flat = {name: value for name, value in row.items() if not isinstance(value, dict | list | tuple)}
        print(markdown_table([flat]), flush=True)

    def found(wanted: dict[str, Any]) -> list[dict[str, Any]]:
        return matching(done, wanted)

    if not found({"kind": "stock"}):
        model = stock()
        judged = {"perplexity_16": perplexity(model, data["judged"][:16])}
        judged |= {"perplexity": perplexity(model, data["judged"]), "held_out": perplexity(model, data["held_out"])}
        keep({"kind": "stock"} | judged)
    for settings in SETTINGS if args.only is None else [SETTINGS[args.only]]:
        for rates in RATES[settings["code"]]:
            trial = {"kind": "trial", **settings, "steps": TRIED_STEPS, "rates": list(rates)}
            if not found(trial):
                model = converted(settings, data["calibration"])
                distil(model, data["train"], TRIED_STEPS, rates, args.work / f"{settings['code']}-{rates[0]}")
                keep(trial | {"held_out": perplexity(model, data["held_out"]), **ORIGIN})
        tried = found({"kind": "trial", **settings})
        row = {"kind": "distilled", "sites": "all", **settings, "steps": args.steps}
        folder = args.work / f"{settings['code']}-{args.steps}"
        if not found(row):
            keep(row | judge(settings, args.steps, data, found({"kind": "stock"})[0], tried, folder))
        timing = {"kind": "step", **settings}
        if not found(timing):
            keep(timing | cost(settings, data["calibration"], data["train"], args.repeats))


if __name__ == "__main__":
    main()
