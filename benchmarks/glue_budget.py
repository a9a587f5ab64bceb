"""What steps, rates and levels do for the networks of `benchmarks.glue`, on the held-out tenth of the training rows.

    python -m benchmarks.glue_budget --tasks cola stsb --model qcfs --steps 480 --rates 0.5 1
    python -m benchmarks.glue_budget --model qcfs --steps 300 --rates 1 --seed 1 --levels 4 8 --accumulated 4

`--rates` are of the weights: of QCFS over the ANN's own, of a code as they are. Starts from the ANNs of
`benchmarks.glue`, which must be there. Zero steps judge the ANN, or a conversion without training. A row is saved as
it ends; the same command goes on from there.
"""

import argparse
import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from training.calibrate.loss import output_error
from training.results import markdown_table, matching, origin, read_results, write_results

from ._calibration_tasks import CACHE
from .glue import DISTILLED, QCFS, RESULTS, SPIKE_DRIVEN, Task, check_weights, search_accumulated


OUTPUT = RESULTS.parent / "glue_budget.json"
CODES = {each["code"]: each for each in SPIKE_DRIVEN}
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def model_of(task: Task, kind: str, steps: int, rate: float, seed: int, levels: int):
    """Distilled for so many steps; saved, and loaded the next time."""
    name = f"budget-{kind}-{steps}-{rate:g}-{seed}" + ("" if levels == QCFS["L"] else f"-L{levels}")
    if (task.folder / name).is_dir():
        return task.spiking(name)
    if kind == "qcfs":
        model, rates = task.quantised(seed, levels), (rate * task.rate, QCFS["threshold_rate"])
    else:
        model, rates = task.spike_driven(seed, CODES[kind], False), (rate, DISTILLED["rates"][1])
    return task.short_training(name, model, seed, steps, rates) if steps else model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("cola", "sst2", "stsb"), default=["cola", "stsb"])
    parser.add_argument("--model", choices=("ann", "qcfs", *CODES), required=True)
    parser.add_argument("--steps", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=CACHE / "glue", help="folder of the trained models")
    parser.add_argument("--levels", nargs="+", type=int, default=[QCFS["L"]], help="L of QCFS")
    parser.add_argument(
        "--accumulated",
        metavar="T",
        type=int,
        help="judge QCFS through time too: accumulated over T steps, without and with a search of thresholds",
    )
    args = parser.parse_args()
    if args.model != "qcfs" and (args.accumulated or args.levels != [QCFS["L"]]):
        parser.error(f"`--levels` and `--accumulated` need `--model qcfs`, got `--model {args.model}`.")
    runs = [(0, "none")] + ([(args.accumulated, how) for how in ("none", "neuron")] if args.accumulated else [])
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for name in args.tasks:
        task = Task(name, args.work)
        wanted = {"model": "gelu", "seed": task.ann_of(args.seed)}
        trained = matching(read_results(RESULTS / f"{name}.json")["metrics"], wanted)
        if not trained:
            raise SystemExit(
                f"`--seed` must have an ANN, got {args.seed}. Run `python -m benchmarks.glue` for it first."
            )
        task.rate, ann = trained[0]["rate"], task.gelu(wanted["seed"])
        check_weights(task, trained, wanted, ann)
        target = task.judged(ann, task.held_out)[1]
        for steps, rate, levels in itertools.product(args.steps, args.rates, args.levels):
            row: dict[str, Any] = {"task": name, "model": args.model, "steps": steps, "rate": rate}
            row |= {"seed": args.seed, "dropout": 0.0}
            if args.model == "qcfs":
                row["L"] = levels
            for T, how in runs:
                if args.model == "qcfs":
                    row |= {"T": T, "calibration": how}
                done = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []
                if matching(done, row):
                    continue
                model = ann if args.model == "ann" else model_of(task, args.model, steps, rate, args.seed, levels)
                if how != "none":
                    search_accumulated(task, model, T, args.seed)
                with model.running(T, "accumulated") if T else nullcontext():
                    scores, logits = task.judged(model, task.held_out)
                found = {
                    "held_out": scores[task.measure],
                    "divergence": output_error(logits, target, causal=False).item(),
                }
                done = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []  # another task may run beside this
                write_results(OUTPUT, metrics=[*done, row | found | ORIGIN], configuration={"batch": 32})
                print(markdown_table([row | found]), flush=True)


if __name__ == "__main__":
    main()
