"""Zero-shot answers of language models to SST-2, RTE and MNLI, by lm-evaluation-harness.

    python -m benchmarks.zero_shot smollm2|prose|fas [--rows 100] [--only 0 3 4] [--distilled FOLDER]

`smollm2` and `prose` are the models of `benchmarks.spike_driven` and its thresholds, which saw no row of a task; `fas`
is gpt2-prose-mini with QCFS, spikes in its MLPs. Asked are the first rows of each validation file of
`$FAS_SHARED/data/glue`, with the prompts of `benchmarks/tasks`. An answer is the likelier word. Beside the accuracy
stands how many answers are those of the stock model: where that one guesses, it says more of a conversion. A row is
saved as it ends; the same command goes on from there.
"""

import argparse
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from ._calibration_tasks import Prose
from .spike_driven import FAS, MODELS, SETTINGS, SHARED, calibration_text, converted, distilled_row, spiking_cost


RESULTS = Path(__file__).parent / "results" / "zero_shot"
PROMPTS = Path(__file__).parent / "tasks"
TASKS = ("sst2", "rte", "mnli")
STOCK = {"sites": "–", "code": "stock"}
QCFS = {"sites": "mlp", "code": "QCFS"}
SPIKING = [row for row in SETTINGS if row["sites"] == "all" and row["T"] > 3]
BATCH, COUNTED = 8, 8  # rows in a batch; prompts that spikes are counted on
INSTALL = (
    "lm-evaluation-harness must be there: `pip install lm-eval` in a virtual environment of its own, with a .pth file "
    "to the site-packages of this one, then run that environment's Python."
)
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def task_of(name: str) -> dict[str, Any]:
    """A task as the harness takes it, with the file where the data is."""
    task = yaml.safe_load((PROMPTS / f"{name}.yaml").read_text())
    files = task["dataset_kwargs"]["data_files"]
    task["dataset_kwargs"]["data_files"] = {split: str(SHARED / path) for split, path in files.items()}
    return task


def ask(model: Any, tokenizer: Any, name: str, rows: int) -> tuple[str, str, list[str], float]:
    """The answers of a model to the first rows of a task, a digit each, the labels, the prompts, and the accuracy."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    asked = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=BATCH)
    task = task_of(name)
    found = lm_eval.simple_evaluate(asked, tasks=[task], limit=rows, bootstrap_iters=0)
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    answers = ""
    for sample in samples:
        likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        answers += str(likelihoods.index(max(likelihoods)))
    prompts = [sample["arguments"][0][0] for sample in samples]
    accuracy = found["results"][task["task"]]["acc,none"]
    return answers, "".join(str(sample["target"]) for sample in samples), prompts, accuracy


def summary(answers: str, labels: str, stock: str) -> dict[str, float]:
    """Percentages of the answers to a task: right ones, their sampling error, those of the stock model."""

    def share(other: str) -> float:
        return sum(answer == each for answer, each in zip(answers, other, strict=True)) / len(answers)

    right = share(labels)
    error = (right * (1 - right) / (len(labels) - 1)) ** 0.5
    return {"accuracy": 100 * right, "sampling_error": 100 * error, "as_stock": 100 * share(stock)}


def settings_of(name: str, only: list[int] | None, distilled: Path | None) -> list[dict[str, Any]]:
    """Rows of settings, that of the stock model first."""
    rows = [QCFS, *FAS] if name == "fas" else SPIKING
    rows = rows if only is None else [rows[number] for number in only]
    return [STOCK, *rows, *([distilled_row(distilled)] if distilled else [])]


def build(name: str, row: dict[str, Any], tokenizer: Any, distilled: Path | None) -> Any:
    """The model of a row of settings."""
    path = MODELS[name_of(name)][0]
    if row == STOCK or "distilled" in row:
        return AutoModelForCausalLM.from_pretrained(distilled if "distilled" in row else path, dtype="float32").eval()
    if name == "fas":
        return Prose().qcfs(0).set_timesteps(row.get("T", 0), row.get("schedule"))
    return converted(path, row, calibration_text(name, tokenizer)[0])


def name_of(name: str) -> str:
    return "prose" if name == "fas" else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*MODELS, "fas"])
    parser.add_argument("--rows", type=int, default=100, help="of each task; by default 100")
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of the only settings, from 0; stock is always one"
    )
    parser.add_argument("--distilled", type=Path, help="folder of a distilled model, which is one more row")
    args = parser.parse_args()
    if find_spec("lm_eval") is None:
        parser.error(INSTALL)
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    path = MODELS[name_of(args.model)][0]
    tokenizer = AutoTokenizer.from_pretrained(path)
    output = RESULTS / f"{args.model}.json"
    trained = f"{Prose().describe()['qcfs']}, seed 0"
    configuration = {
        "model": path.name,
        "tasks": {name: (PROMPTS / f"{name}.yaml").read_text() for name in TASKS},
        "judged": "the first rows of each validation file",
        "calibration": trained if args.model == "fas" else calibration_text(args.model, tokenizer)[1],
        "batch": BATCH,
        "spikes_counted_on": f"the first {COUNTED} prompts of a task, at the mean length of all",
        "lm_eval": version("lm_eval"),
    }
    done = read_results(output)["metrics"] if output.is_file() else []
    for settings in settings_of(args.model, args.only, args.distilled):
        model = None
        for task in TASKS:
            row = settings | {"task": task, "asked": args.rows}
            if matching(done, row):
                continue
            model = build(args.model, settings, tokenizer, args.distilled) if model is None else model
            answers, labels, prompts, accuracy = ask(model, tokenizer, task, args.rows)
            stock = STOCK | {"task": task, "asked": args.rows}
            of_stock = next((each["answers"] for each in matching(done, stock)), answers)
            row |= {"n": len(answers), **summary(answers, labels, of_stock), "answers": answers, "labels": labels}
            if abs(row["accuracy"] - 100 * accuracy) > 1e-6:
                raise RuntimeError(
                    f"accuracy of {task} must be the harness's {accuracy}, got {row['accuracy'] / 100}."
                )
            if settings.get("T"):
                tokens = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
                length = sum(each["input_ids"].shape[1] for each in tokens) / len(tokens)
                batches = [{"input_ids": each["input_ids"]} for each in tokens[:COUNTED]]
                row |= {"length": length} | spiking_cost(model, batches, length)[0]
            done.append(row | {"weights_sha256": fingerprint(model), **ORIGIN})
            write_results(output, metrics=done, configuration=configuration)
            shown = [{key: value for key, value in row.items() if key not in ("answers", "labels")}]
            print(markdown_table(shown), flush=True)


if __name__ == "__main__":
    main()
