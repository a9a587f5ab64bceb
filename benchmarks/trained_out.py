"""GLUE tasks on all-MiniLM-L6-v2, trained out: GELU at a rate chosen on held-out training rows, then QCFS by seed."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _calibration_tasks import CACHE, MINILM, Glue, _save, finetune
from transformers import BertForSequenceClassification, set_seed

from modeling_fas import FASBertForSequenceClassification
from training.results import write_json


# What `benchmarks/distillation_sst2.py` trains, of the same rows, is not trained again.
ALREADY = {"sst2": Path("/tmp/fas-distillation-sst2/gelu-0")}


class TrainedOut(Glue):
    """As `Glue`, on all training rows but a held-out tenth, embeddings trained too, for several epochs."""

    epochs = {"sst2": 2, "cola": 5, "stsb": 5}
    qcfs_epochs = {"sst2": 1, "cola": 3, "stsb": 3}
    qcfs_most = {"sst2": 16000, "cola": None, "stsb": None}  # rows an epoch
    tried = {"gelu": (1e-4, 2e-4), "qcfs": (5e-5, 1e-4)}
    sizes = {"sst2": (None, None, None), "cola": (None, None, None), "stsb": (None, None, None)}

    @cached_property
    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training rows, and the tenth of them that no training sees."""
        rows = self.rows("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [rows[i] for i in order[len(rows) // 10 :]], [rows[i] for i in order[: len(rows) // 10]]

    def calibration_batches(self, steps, size, seed, length=None):
        rows = self._shuffled(100 + seed)[: steps * size]
        batches = self.batches(rows, size, seed, length)
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

    def describe(self):
        epochs, most = self.qcfs_epochs[self.name], self.qcfs_most[self.name]
        return {
            "model": "all-MiniLM-L6-v2",
            "evaluation_rows": len(self.evaluation),
            "held_out": f"{len(self.parts[1])} training rows, to choose rates; no training sees them",
            "gelu": f"{self.epochs[self.name]} epochs on {len(self.parts[0])} rows, the same for every seed",
            "qcfs": f"{epochs} epoch(s) on {most or len(self.parts[0])} rows from the GELU model; order by seed",
            "rates": {kind: self.rate(kind) for kind in self.tried if kind != "gelu" or self.name not in ALREADY},
            "stock": self.stock_score,
        }

    def gelu(self):
        path = ALREADY.get(self.name, self._folder / "gelu")
        if not path.exists():
            path = self._folder / "gelu"
        if not path.exists():
            _save(self._gelu(self.rate("gelu"), self.epochs[self.name]), path)
        return BertForSequenceClassification.from_pretrained(path).eval()

    def qcfs(self, seed, L=8):
        path = self._folder / f"qcfs_L{L}_s{seed}"
        if not path.exists():
            _save(self._qcfs(self.rate("qcfs"), self.qcfs_epochs[self.name], seed, L), path)
        return FASBertForSequenceClassification.from_pretrained(path).eval()

    def rate(self, kind: str) -> float:
        """The rate that was best on the held-out rows after one epoch (QCFS: of seed 0)."""
        path = self._folder / "rates.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        for rate in self.tried[kind]:
            if f"{kind} {rate}" not in found:
                model = self._gelu(rate, 1) if kind == "gelu" else self._qcfs(rate, 1, 0)
                found[f"{kind} {rate}"] = self._score(model, self.parts[1])
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
                print(self.name, found, flush=True)
        return max(self.tried[kind], key=lambda rate: found[f"{kind} {rate}"])

    @cached_property
    def stock_score(self) -> dict[str, float]:
        return self.evaluate(self.gelu())[0]

    def _score(self, model, rows):
        kept, self.evaluation = self.evaluation, rows
        try:
            return next(iter(self.evaluate(model)[0].values()))
        finally:
            self.evaluation = kept

    @property
    def _folder(self):
        return CACHE / f"{self.name}-trained-out"

    def _shuffled(self, seed):
        rows = self.parts[0]
        return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]

    def _gelu(self, rate, epochs):
        set_seed(0)
        model = BertForSequenceClassification.from_pretrained(MINILM, num_labels=1 if self.regression else 2)
        batches = [batch for epoch in range(epochs) for batch in self.batches(self.parts[0], seed=epoch)]
        return finetune(model, batches, rate, 0.0, embeddings=True)

    def _qcfs(self, rate, epochs, seed, L=8):
        stock = self.gelu().config.name_or_path
        set_seed(seed)
        model = FASBertForSequenceClassification.from_pretrained(stock, L=L)
        rows = self._shuffled(seed)[: self.qcfs_most[self.name]]
        batches = [batch for epoch in range(epochs) for batch in self.batches(rows, seed=100 * seed + epoch)]
        return finetune(model, batches, rate, 1e-2, embeddings=True)


TASKS = {name: lambda name=name: TrainedOut(name) for name in TrainedOut.epochs}
