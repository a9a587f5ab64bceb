"""GLUE tasks on all-MiniLM-L6-v2, trained longer than calibration's: all training rows, several epochs of GELU."""

from transformers import BertForSequenceClassification, set_seed

from modeling_fas import FASBertForSequenceClassification

from ._calibration_tasks import CACHE, MINILM, Glue, _save, finetune


class TrainedOut(Glue):
    """As `Glue`, at its rates, but on all training rows and for more epochs."""

    epochs = {"cola": 4, "stsb": 3}
    sizes = {"cola": (None, None, None), "stsb": (None, None, None)}

    def describe(self):
        return {
            "model": "all-MiniLM-L6-v2",
            "evaluation_rows": len(self.evaluation),
            "gelu": f"{self.epochs[self.name]} epochs on all training rows, one for all seeds",
            "qcfs": f"one epoch on {self.qcfs_rows or 'all'} rows from the GELU model; rows and order by seed",
            "rates": {kind: rates[self.name] for kind, rates in self.rates.items()},
            "stock": self.evaluate(self.gelu())[0],
        }

    def gelu(self):
        path = CACHE / f"{self.name}-trained-out" / "gelu"
        if not path.exists():
            set_seed(0)
            model = BertForSequenceClassification.from_pretrained(MINILM, num_labels=1 if self.regression else 2)
            rows = self.rows("train")
            batches = [batch for epoch in range(self.epochs[self.name]) for batch in self.batches(rows, seed=epoch)]
            _save(finetune(model, batches, self.rates["gelu"][self.name], 0.0), path)
        return BertForSequenceClassification.from_pretrained(path).eval()

    def qcfs(self, seed, L=8):
        path = CACHE / f"{self.name}-trained-out" / f"qcfs_L{L}_s{seed}"
        if not path.exists():
            stock = self.gelu().config.name_or_path
            set_seed(seed)
            model = FASBertForSequenceClassification.from_pretrained(stock, L=L)
            rows = self.rows("train", self.qcfs_rows, seed)
            _save(finetune(model, self.batches(rows, seed=seed), self.rates["qcfs"][self.name], 1e-2), path)
        return FASBertForSequenceClassification.from_pretrained(path).eval()


TASKS = {name: lambda name=name: TrainedOut(name) for name in TrainedOut.epochs}
