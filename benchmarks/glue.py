"""MiniLM on seven GLUE tasks, trained out: the ANN, QCFS, FAS through time, and spikes into every product.

    python -m benchmarks.glue [--tasks rte wnli] [--seeds 0 1 2] [--work FOLDER]

A tenth of the training rows is held out: learning rates and the best epoch are chosen on it, never on the validation
rows, which are judged only. Settings of QCFS, calibration and conversion were chosen on CoLA, SST-2 and STS-B and are
the same for every task. A row is saved as it ends, and a killed training goes on from its last checkpoint.
"""

import argparse
import os
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    set_seed,
)
from transformers.utils import logging

from fas import convert_to_spiking
from modeling_fas import FASBertForSequenceClassification
from training.calibrate.coarse import coarse_search
from training.calibrate.loss import output_error
from training.distillation import FASDistillationTrainer
from training.evaluate.rows import TaskMetric, for_trainer
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results
from training.tasks import GLUE_COLUMNS
from training.trainers import FASTrainer

from ._calibration_tasks import CACHE, MINILM, Glue, _parquet, _save
from .calibration_quality import SETTINGS, calibrate
from .distillation import arguments, trained
from .spike_driven import spiking_cost


RESULTS = Path(__file__).parent / "results" / "glue"
# Most epochs of the ANN, which ends after two without a better score; how many of the seeds train an ANN of their own;
# the most rows of validation that are judged.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"epochs": 2, "batch": 64, "anns": 1},
    "cola": {"epochs": 5, "batch": 32, "anns": 3},
    "stsb": {"epochs": 4, "batch": 32, "anns": 3},
    "rte": {"epochs": 5, "batch": 32, "anns": 3},
    "wnli": {"epochs": 4, "batch": 32, "anns": 3},
    "qqp": {"epochs": 3, "batch": 32, "anns": 3},
    "mnli": {"epochs": 3, "batch": 32, "anns": 3, "judged": 2000},
}
MEASURES = {"cola": "matthews_correlation", "stsb": "pearson"}  # what the best epoch is chosen by; else accuracy
GELU_RATES, TRIED = (1e-4, 3e-4), 240  # steps of a trial, at most an epoch (SST-2, WNLI: 60)
QCFS: dict[str, Any] = {
    "L": 8,
    "epochs": 3,
    "most_steps": 300,
    "rates": {"distilled": 1.0, "plain": 0.5},  # over the ANN's own
    "threshold_rate": 1e-2,
}
SPIKE_DRIVEN: list[dict[str, Any]] = [
    {"code": "phase", "T": 4},
    {"code": "first_spike", "T": 8, "code_base": 2**0.5},
]
DISTILLED: dict[str, Any] = {"steps": {"phase": 60, "first_spike": 240}, "rates": (3e-5, 1e-3)}
THROUGH_TIME = [(T, schedule) for T in (4, 8) for schedule in ("layerwise", "accumulated", "stepwise")]
CALIBRATED = [(T, how) for T in (4, 8) for how in ("neuron", "fine", "published")]
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


class Task(Glue):
    """Rows, models and scores of a task, its batches those of [`Glue`], as `calibration_quality.calibrate` takes it.

    `rate` is the learning rate of the ANN, once it is chosen.
    """

    rate: float
    widest: ClassVar = {1: 64, 2: 128}  # tokens, by number of columns

    def __init__(self, name: str, work: Path):
        self.name, self.folder = name, work / name
        self.columns = GLUE_COLUMNS[name]
        self.max_length = self.widest[len(self.columns)]
        self.regression = name == "stsb"
        self.labels = 1 if self.regression else 3 if name == "mnli" else 2
        self.measure = MEASURES.get(name, "accuracy")
        self.metric = TaskMetric(name)

    def _rows(self, split: str, most: int | None = None) -> list[dict[str, Any]]:
        data = _parquet(f"glue/{self.name}", split)
        data = data.select(range(min(len(data), most or len(data))))
        texts = (data[column][:] for column in self.columns)
        given = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        kind = float if self.regression else int
        return [
            {"input_ids": ids, "token_type_ids": types, "labels": kind(label)}
            for ids, types, label in zip(given["input_ids"], given["token_type_ids"], data["label"][:], strict=True)
        ]

    @cached_property
    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = self._rows("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        tenth = len(rows) // 10
        return [rows[i] for i in order[tenth:]], [rows[i] for i in order[:tenth]]

    @property
    def train(self) -> list[dict[str, Any]]:
        return self._split[0]

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return self._split[1]

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        return self._rows("validation", TASKS[self.name].get("judged"))

    def calibration_batches(self, steps: int, size: int, seed: int, length: int | None = None):
        """Training rows, chosen by seed, without labels."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(100 + seed)).tolist()
        rows = [self.train[order[i % len(order)]] for i in range(steps * size)]
        batches = [self._collate(rows[i : i + size], length) for i in range(0, len(rows), size)]
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

    @torch.inference_mode()
    def judged(self, model, rows: list[dict[str, Any]], loss: bool = False) -> tuple[dict[str, float], torch.Tensor]:
        """Scores in percent, with the loss if it is asked for, and the logits."""
        model.eval()
        found, logits = [], []
        for batch in self.batches(rows, 64):
            logits.append(model(**batch).logits)
            found.append(self.metric.of(logits[-1], batch["labels"]))
        scores = self.metric.result(torch.cat(found).numpy())
        kept = {name: 100 * value for name, value in scores.items() if name not in ("loss", "examples")}
        return kept | ({"loss": scores["loss"]} if loss else {}), torch.cat(logits)

    def cost(self, model) -> dict[str, float]:
        """Spikes an input, energy and reads over the ANN's, at the mean length of 64 rows."""
        rows = self.validation[:64]
        length = sum(len(row["input_ids"]) for row in rows) / len(rows)
        return {"length": length, **spiking_cost(model, self.batches(rows, 1), length, causal=False)[0]}

    def settings(self, name: str, rates: tuple[float, float | None], batch: int, **more: Any):
        return arguments(
            self.folder / f"{name}-run",
            rates,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=64,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            **({"save_steps": 100} | more),
        )

    def fit(self, name: str, model, settings, trainer_class=FASTrainer, **more: Any):
        """Train and save under a name."""
        collator = DataCollatorWithPadding(self.tokenizer)
        trainer = trainer_class(model, settings, train_dataset=self.train, data_collator=collator, **more)
        trained(trainer, Path(settings.output_dir))
        self.folder.mkdir(parents=True, exist_ok=True)
        _save(trainer.model, self.folder / name)
        return trainer.model

    # Models. One that is there is loaded.

    def start(self, seed: int):
        set_seed(seed)
        kind = "regression" if self.regression else "single_label_classification"
        return AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=self.labels, problem_type=kind)

    def tried(self, rate: float) -> dict[str, float]:
        """Score and loss of the held-out rows after some steps."""
        batch = TASKS[self.name]["batch"]
        steps = min(TRIED, len(self.train) // batch)
        settings = self.settings(f"try-{rate}", (rate, None), batch, seed=0, max_steps=steps)
        model = self.fit(f"try-{rate}", self.start(0), settings)
        shutil.rmtree(self.folder / f"try-{rate}")
        scores = self.judged(model, self.held_out, loss=True)[0]
        return {"steps": steps, "held_out": scores[self.measure], "held_out_loss": scores["loss"]}

    def gelu_folder(self, seed: int) -> Path:
        """The ANN at its best epoch, trained if it is not there."""
        name, options = f"gelu-{seed}", TASKS[self.name]
        if not (self.folder / name).is_dir():
            settings = self.settings(
                name,
                (self.rate, None),
                options["batch"],
                seed=seed,
                num_train_epochs=options["epochs"],
                eval_strategy="epoch",
                save_strategy="epoch",
                load_best_model_at_end=True,
                metric_for_best_model=self.measure,
            )
            self.fit(
                name,
                self.start(seed),
                settings,
                eval_dataset=self.held_out,
                callbacks=[EarlyStoppingCallback(2)],
                **for_trainer(self.metric),
            )
        return self.folder / name

    def gelu(self, seed: int):
        return AutoModelForSequenceClassification.from_pretrained(self.gelu_folder(seed)).eval()

    def ann_of(self, seed: int) -> int:
        """Seed of the ANN that a seed of everything else starts from."""
        return seed % TASKS[self.name]["anns"]

    def spiking(self, name: str):
        return FASBertForSequenceClassification.from_pretrained(self.folder / name).eval()

    def short_training(self, name: str, model, seed: int, steps: int, rates: tuple[float, float], distilled=True):
        """Train for some steps, after the ANN or by labels alone."""
        settings = self.settings(name, rates, 32, seed=seed, max_steps=steps)
        if not distilled:
            return self.fit(name, model, settings).eval()
        more = {"teacher": self.gelu(self.ann_of(seed)), "hidden_weight": 1.0}
        return self.fit(name, model, settings, FASDistillationTrainer, **more).eval()

    def quantised(self, seed: int, levels: int = QCFS["L"]):
        """The ANN with the levels of QCFS, not trained for them."""
        folder = self.gelu_folder(self.ann_of(seed))
        set_seed(seed)
        return FASBertForSequenceClassification.from_pretrained(folder, L=levels)

    def qcfs(self, seed: int, distilled: bool = True):
        how = "distilled" if distilled else "plain"
        name = f"qcfs-{how}-{seed}"
        if not (self.folder / name).is_dir():
            steps = min(QCFS["most_steps"], int(QCFS["epochs"] * len(self.train) / 32))
            rates = QCFS["rates"][how] * self.rate, QCFS["threshold_rate"]
            self.short_training(name, self.quantised(seed), seed, steps, rates, distilled)
        return self.spiking(name)

    def spike_driven(self, seed: int, code: dict[str, Any], distilled: bool):
        stock = str(self.gelu_folder(self.ann_of(seed)))
        name = f"{code['code']}-{seed}"
        if distilled and (self.folder / name).is_dir():
            return self.spiking(name)
        batch = self.calibration_batches(1, 64, seed)[0]
        model = convert_to_spiking(stock, batch, sites="all", progress=False, **code)
        if not distilled:
            return model.eval()
        return self.short_training(name, model, seed, DISTILLED["steps"][code["code"]], DISTILLED["rates"])


def search_accumulated(task: Task, model, T: int, seed: int) -> None:
    """Thresholds and initial potentials for accumulated steps, from training rows."""
    model.begin_calibration(T).set_timesteps(T, "accumulated")
    coarse_search(model, task.calibration_batches(1, SETTINGS["rows"]["glue"], seed)[0], progress=False)


def check_weights(task: Task, rows: list[dict[str, Any]], wanted: dict[str, Any], model) -> None:
    """Raise for a model that was trained again, and came out otherwise than the one whose row is there."""
    for each in matching(rows, wanted):
        if each["weights_sha256"] != (found := fingerprint(model)):
            raise SystemExit(
                f"{task.name}: {wanted} is of weights {each['weights_sha256'][:8]}, which are gone; trained again on "
                f"this machine they are {found[:8]}. Remove the task's rows from its file, and run it anew."
            )


def rows_of(task: Task, seed: int, done: list[dict[str, Any]], late: bool):
    """Every row of a task and seed that is not done yet; calibrated ones when it is late."""

    def missing(row: dict[str, Any]) -> bool:
        return not matching(done, row)

    def scored(model, **more: Any) -> dict[str, Any]:
        return task.judged(model, task.validation)[0] | more | {"weights_sha256": fingerprint(model)}

    for rate in GELU_RATES:
        row = {"model": "trial", "rate": rate}
        if missing(row):
            yield row | task.tried(rate)
    trials = [each for each in done if each["model"] == "trial"]
    task.rate = max(trials, key=lambda each: (each["held_out"], -each.get("held_out_loss", 0.0)))["rate"]
    own = task.ann_of(seed)
    ann = row = {"model": "gelu", "seed": own}
    if missing(row):
        model = task.gelu(own)
        yield row | {"rate": task.rate} | scored(model, held_out=task.judged(model, task.held_out)[0][task.measure])
    for distilled in (True, False):
        row = {"model": "qcfs", "seed": seed, "distilled": distilled}
        if missing(row):
            check_weights(task, done, ann, task.gelu(own))
            model = task.qcfs(seed, distilled)
            yield row | scored(model, held_out=task.judged(model, task.held_out)[0][task.measure])
    for code in SPIKE_DRIVEN:
        for distilled in (False, True):
            row = {"model": "spike-driven", "seed": seed, "distilled": distilled, **code}
            if missing(row):
                check_weights(task, done, ann, task.gelu(own))
                model = task.spike_driven(seed, code, distilled)
                yield row | scored(model) | task.cost(model)
    settings = [(T, schedule, "none") for T, schedule in THROUGH_TIME]
    settings += [(4, "accumulated", "neuron")]
    settings += [(T, "stepwise", how) for T, how in CALIBRATED] if late else []
    target = None
    for T, schedule, how in settings:
        row = {"model": "fas", "seed": seed, "T": T, "schedule": schedule, "calibration": how}
        if not missing(row):
            continue
        model = task.qcfs(seed)
        if target is None:
            check_weights(task, done, {"model": "qcfs", "seed": seed, "distilled": True}, model)
            target = task.judged(model, task.validation)[1]
        if schedule == "accumulated" and how != "none":
            search_accumulated(task, model, T, seed)
        elif how != "none":
            calibrate(model, task, how, T, seed)
        with model.running(T, schedule):
            score, logits = task.judged(model, task.validation)
            error = output_error(logits, target, causal=False).item()
            yield row | score | task.cost(model) | {"divergence": error, "weights_sha256": fingerprint(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--without_calibration", action="store_true", help="leave the calibrated rows for later")
    parser.add_argument("--work", type=Path, default=CACHE / "glue", help="folder of the trained models")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for seed in args.seeds:
        for name in args.tasks:
            task, path = Task(name, args.work), RESULTS / f"{name}.json"
            done = read_results(path)["metrics"] if path.is_file() else []
            configuration = {
                "task": name,
                "model": "all-MiniLM-L6-v2",
                "train": f"{len(task.train)} rows, {len(task.held_out)} held out to choose rate and epoch",
                "judged": f"{len(task.validation)} rows of validation",
                "length": task.max_length,
                "ann": TASKS[name],
                "qcfs": QCFS | {"batch": 32},
                "spike_driven": DISTILLED | {"batch": 32, "calibration": "64 rows"},
            }
            start = time.perf_counter()
            for row in rows_of(task, seed, done, not args.without_calibration):
                saved = read_results(path)["metrics"] if path.is_file() else []  # another seed may run beside this one
                done[:] = [*saved, row | {"seconds": time.perf_counter() - start} | ORIGIN]
                start = time.perf_counter()
                write_results(path, metrics=done, configuration=configuration)
                print(name, markdown_table(done[-1:]), flush=True)


if __name__ == "__main__":
    main()
