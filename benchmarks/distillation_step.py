"""A step of distillation, the teacher's forward included, against a plain training step of the same student.

Both are steps of the trainers themselves, optimiser (AdamW) included. Memory is all that the step needs: weights of
the student and of the teacher where there is one, the optimiser's state, and the most bytes alive at once.
"""

import tempfile
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.common import arguments, compared, fas, interleave, peak_bytes, report, stock, token_ids, weight_bytes
from training.arguments import FASTrainingArguments
from training.distillation import FASDistillationTrainer
from training.trainers import FASTrainer


STUDENTS: dict[str, dict[str, Any]] = {
    "spiking MLPs, QCFS": {"T": 0},
    "fully spike-driven, phase, T = 5": {"T": 5, "schedule": "layerwise", "sites": "all", "code": "phase"},
}
FULLY = {"activation": "stock", "L": None}


def step(trainer: FASTrainer, ids: torch.Tensor) -> None:
    batches, count = trainer.get_batch_samples(iter([{"input_ids": ids, "labels": ids}]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], count)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def trainers(student: Any, teacher: Any, folder: str, args: Any) -> dict[str, FASTrainer]:
    """Of one student and one optimiser."""
    options = FASTrainingArguments(
        folder, learning_rate=1e-5, report_to="none", disable_tqdm=True, use_cpu=args.device == "cpu"
    )
    plain = FASTrainer(student, options)
    plain.create_optimizer()
    optimizers = plain.optimizer, None
    found = {
        "plain": plain,
        "distillation": FASDistillationTrainer(student, options, teacher=teacher, optimizers=optimizers),
    }
    for trainer in found.values():
        trainer.current_gradient_accumulation_steps = 1
    return found


def state_bytes(optimizer: Any) -> int:
    return sum(each.nbytes for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each))


def main() -> None:
    args = arguments(__doc__.splitlines()[0], batch=(2,))
    logging.set_verbosity_error()
    rows, samples = [], {}
    for name, settings in STUDENTS.items():
        student = fas("gpt2", args, **settings, **(FULLY if "sites" in settings else {}))
        teacher = stock("gpt2", args)
        for batch in args.batch:
            ids = token_ids(batch, 128, args)
            with tempfile.TemporaryDirectory() as folder:
                found = trainers(student, teacher, folder, args)
                functions = {kind: partial(step, trainer, ids) for kind, trainer in found.items()}
                functions["plain"]()  # makes the optimiser's state
                kept = weight_bytes(student) + state_bytes(found["plain"].optimizer)
                peaks = {kind: peak_bytes(function, args.device) for kind, function in functions.items()}
                whole = {"plain": kept + peaks["plain"]}
                whole["distillation"] = kept + weight_bytes(teacher) + peaks["distillation"]
                times = interleave(functions, args, warmup=0)
            case = f"GPT-2 small, batch {batch}, {name}, step of distillation over a plain one"
            memory = whole["distillation"] / whole["plain"]
            alone = peaks["distillation"] / peaks["plain"]
            rows += [
                compared(f"{case}: time", 1.6, times, "distillation", "plain"),
                {"measure": f"{case}: peak memory", "target": 1.35, "got": memory},
                {"measure": f"{case}: peak memory without weights and optimiser", "target": None, "got": alone},
            ]
            samples[f"{name}, batch {batch}"] = {"times": times, "peak_bytes": peaks, "whole_bytes": whole}
    report("distillation_step", rows, args, samples=samples)


if __name__ == "__main__":
    main()
