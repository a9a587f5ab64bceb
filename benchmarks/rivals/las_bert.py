"""LAS and our conversion, both without training, of one BERT on SST-2.

    python -m benchmarks.rivals.las_bert [--model FOLDER] [--source GIT] [--rows 872]

The model is the ANN of `benchmarks.glue --tasks sst2`. LAS's code is cloned into the cache, runs in an environment of
its own, and is not ours to copy; its tables are pickles, which that environment alone opens. A row is a batch. Time is
over the stock model's, row by row in the same process. A row of results is saved as it ends. GPT-2, of LAS's paper, is
not in its code.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from fas import convert_to_spiking
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from .._calibration_tasks import CACHE
from ..glue import SPIKE_DRIVEN, Task
from .environment import FOLDER, python_of


OUTPUT = Path(__file__).resolve().parents[1] / "results" / "rivals" / "las_bert.json"
OURS = [*SPIKE_DRIVEN, {"code": "phase", "T": 6}]
PACKAGES = ("torch==2.13.0", "transformers==4.40.2", "numpy==1.26.4")
SOURCE, COMMIT = "https://github.com/lc783/LAS", "0d237d449870733a429d04386d6c129610cc8b55"


def checkout(source: str) -> Path:
    """LAS at its commit, in the cache."""
    folder = FOLDER / f"las-{COMMIT[:7]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=FOLDER) as part:
            clone = Path(part) / "las"
            subprocess.run(["git", "clone", "--quiet", "--no-checkout", source, clone], check=True)
            subprocess.run(["git", "-C", clone, "checkout", "--quiet", COMMIT], check=True)
            clone.rename(folder)
    return folder


def las(model: Path, rows: list[list[int]], source: str) -> dict[str, Any]:
    """Logits and seconds of LAS's model and the stock one, in LAS's environment."""
    python = python_of("las", PACKAGES, beside_ours=False)
    worker = Path(__file__).with_name("las_worker.py")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "rows.json", Path(folder) / "found.json"
        given.write_text(json.dumps(rows))
        subprocess.run(
            [python, worker, model.resolve(), given, found],
            cwd=checkout(source),
            env=variables | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
            check=True,
        )
        return json.loads(found.read_text())


@torch.inference_mode()
def side_by_side(stock: Any, spiking: Any, rows: list[list[int]]) -> tuple[torch.Tensor, float]:
    """Logits of the spiking model, and its time over the stock one's, row by row in turn."""
    seconds, logits = [0.0, 0.0], []
    models = (stock, spiking)
    for model in models:
        model(input_ids=torch.tensor([rows[0]]))
    for row in rows:
        for i, model in enumerate(models):
            start = time.process_time()
            found = model(input_ids=torch.tensor([row])).logits[0]
            seconds[i] += time.process_time() - start
        logits.append(found)
    return torch.stack(logits), seconds[1] / seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CACHE / "glue" / "sst2" / "gelu-0", help="a BERT of SST-2")
    parser.add_argument("--source", default=SOURCE, help="of LAS: an address or folder that git can clone")
    parser.add_argument("--rows", type=int, default=872, help="of validation, the first ones")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"--model must be a folder, got {args.model}: `python -m benchmarks.glue --tasks sst2` makes it")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    task = Task("sst2", CACHE / "glue")
    judged = task.validation[: args.rows]
    rows, labels = [row["input_ids"] for row in judged], torch.tensor([row["labels"] for row in judged])
    stock = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    configuration = {
        "las": COMMIT,
        "packages": list(PACKAGES),
        "model": "all-MiniLM-L6-v2, SST-2",
        "weights_sha256": fingerprint(stock),
        "judged": f"the first {len(rows)} rows of validation, one at a time",
        "tokens": sum(map(len, rows)),
        "calibration": "ours: 64 rows of training; LAS: none",
    }

    with torch.inference_mode():
        reference = torch.cat([stock(input_ids=torch.tensor([row])).logits for row in rows])
    done = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []

    def save(row: dict[str, Any], logits: torch.Tensor, **more: Any) -> None:
        answers = logits.argmax(-1)
        row |= {
            "accuracy": 100 * (answers == labels).double().mean().item(),
            "as_stock": 100 * (answers == reference.argmax(-1)).double().mean().item(),
            "error": ((logits - reference).norm() / reference.norm()).item(),
        }
        done.append(row | more | origin())
        write_results(OUTPUT, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)

    if not matching(done, {"code": "stock"}):
        save({"code": "stock"}, reference)
    if not matching(done, {"code": "LAS"}):
        found = las(args.model, rows, args.source)
        logits = torch.tensor(found["LAS"]["logits"])
        torch.testing.assert_close(torch.tensor(found["stock"]["logits"]), reference, atol=1e-4, rtol=1e-4)
        save({"code": "LAS", "T": 16}, logits, time=found["LAS"]["seconds"] / found["stock"]["seconds"])
    batch = task.calibration_batches(1, 64, 0)[0]
    for settings in OURS:
        if not matching(done, {"sites": "all"} | settings):
            spiking = convert_to_spiking(str(args.model), batch, sites="all", progress=False, **settings).eval()
            logits, ratio = side_by_side(stock, spiking, rows)
            save({"sites": "all"} | settings, logits, time=ratio)


if __name__ == "__main__":
    main()
