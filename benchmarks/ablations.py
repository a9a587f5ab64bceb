"""What each choice of a conversion is worth: thresholds, sites, training, schedule; gpt2-prose-mini on prose.

    python -m benchmarks.ablations

Judged as `benchmarks.spike_driven prose` judges, whose rows answer for code and T; `benchmarks.rotation` answers for
rotation. A row is saved as it ends; the same command goes on from there.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fas import calibrate, convert_to_spiking
from training import layout
from training.calibrate import conversion
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from .spike_driven import MODELS, SHARED, calibration_text, perplexity, rows_of, spiking_cost, windows


OUTPUT = Path(__file__).parent / "results" / "ablations.json"
MODEL, JUDGED, TEXT, LENGTH = MODELS["prose"]
CODES: tuple[dict[str, Any], ...] = (
    {"code": "phase", "T": 4},
    {"code": "first_spike", "T": 8, "code_base": 2**0.5},
)
RATE = {"code": "rate", "T": 16, "sites": "linear", "gain": "static"}
GROUPS = ("qkv", "query", "value", "attention output", "mlp in", "mlp out", "head")
STEPS, RATE_OF_THRESHOLDS = 100, 5e-3  # of calibration; 0.05, the default, gained nothing on held-out training text
ORIGIN = origin()


def _one_threshold(placed: Any, values: torch.Tensor) -> dict[str, float]:
    """In the place of `conversion._fit`: the best threshold that all neurons of a site share."""
    neuron, values = placed.neuron, values.float()
    scale = values.square().mean().sqrt().clamp(min=1e-4)

    def error(factor: float) -> float:
        neuron.fine_threshold.fill_(scale * factor)
        return (conversion._emitted(neuron, values) - values).square().mean().item()

    neuron.fine_threshold.fill_(scale * min(conversion.SCALES, key=error))
    return {"error": 0.0, "spikes": 0.0, "dead": 0}


def settings() -> Iterator[dict[str, Any]]:
    for code in CODES:
        for threshold in ("site", "neuron", "token"):
            yield {"question": "a threshold for each", "answer": threshold, **code}
        for group in GROUPS:
            yield {"question": "no spikes at", "answer": group, **code}
        yield {"question": "training", "answer": f"thresholds alone, {STEPS} steps", **code}
    for schedule in ("layerwise", "accumulated", "stepwise"):
        yield {"question": "schedule", "answer": schedule, **RATE}


def converted(row: dict[str, Any], ids: torch.Tensor) -> Any:
    kept = {name: row[name] for name in ("code", "T", "code_base", "sites", "gain") if name in row}
    if row["question"] == "schedule":
        kept["schedule"] = row["answer"]
    if row["question"] == "a threshold for each":
        kept["gain"] = "token" if row["answer"] == "token" else "static"
    with ExitStack() as stack:
        if row["answer"] == "site":
            stack.enter_context(mock.patch.object(conversion, "_fit", _one_threshold))
        model = convert_to_spiking(str(MODEL), ids, progress=False, **kept)
    if row["question"] == "training":
        texts = pq.read_table(SHARED / TEXT).column(0).to_pylist()[-400:]
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        settings: dict[str, Any] = {"steps": STEPS, "threshold_learning_rate": RATE_OF_THRESHOLDS, "progress": False}
        calibrate(model, texts, row["T"], tokenizer=tokenizer, **settings)
        model.set_timesteps(row["T"], "layerwise")
    return model.eval()


def measured(row: dict[str, Any], ids: torch.Tensor, judged: torch.Tensor) -> dict[str, Any]:
    model = converted(row, ids)
    hashed = {"weights_sha256": fingerprint(model)}
    if row["question"] != "no spikes at":
        return {"perplexity": perplexity(model, judged)} | spiking_cost(model, rows_of(judged[:8]))[0] | hashed
    for placed in layout.sites(model):
        if placed.site.group == row["answer"]:
            placed.neuron.register_forward_hook(lambda neuron, args, output: args[0])
    return {"perplexity": perplexity(model, judged)} | hashed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    judged = windows(tokenizer, SHARED / JUDGED, LENGTH, args.windows)
    ids, about = calibration_text("prose", tokenizer)
    done = read_results(args.output)["metrics"] if args.output.is_file() else []
    if not done:
        stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
        done = [{"question": "stock", "perplexity": perplexity(stock, judged), **ORIGIN}]
    configuration = {
        "model": MODEL.name,
        "judged": f"{JUDGED}, {len(judged)} windows of {LENGTH} tokens",
        "calibration": about,
        "calibration_steps": f"{STEPS} at the rate {RATE_OF_THRESHOLDS}, on the last 400 paragraphs of {TEXT}",
        "energy_length": 256,
    }
    for row in settings():
        if not matching(done, row):
            done.append(row | measured(row, ids, judged) | ORIGIN)
            done[-1]["over_stock"] = done[-1]["perplexity"] / done[0]["perplexity"]
            write_results(args.output, metrics=done, configuration=configuration)
            print(markdown_table(done[-1:]), flush=True)


if __name__ == "__main__":
    main()
