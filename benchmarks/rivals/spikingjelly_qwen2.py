"""SpikingJelly's Qwen2 recipe and our conversion, both without training, of one model on one text.

    SMOLLM2=FOLDER python -m benchmarks.rivals.spikingjelly_qwen2 [--timesteps 8 16 32 64 160]

The recipe takes Qwen2 only: SmolLM2 becomes one of the same function, the biases that Qwen2 adds being zero. Windows,
and the text of calibration, are those of `benchmarks.spike_driven`. Levels and quantile of the recipe are chosen for
each T, on windows that are neither. Quality is of its own `qcfs_sg` mode with a time axis of one, the sum over time of
its spiking mode: layers agree to 1e-7 until a value falls on the other side of a level. The first window is judged in
both. A row's time and memory are of a process of its own, on that window: the spiking model and the stock one in turn.
A row is saved as it ends.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module, metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from training.results import markdown_table, matching, origin, read_results, write_results

from ..spike_driven import MODELS, SHARED, WINDOWS, calibration_text, converted, perplexity, windows
from .environment import enter


OUTPUT = Path(__file__).resolve().parents[1] / "results" / "rivals" / "spikingjelly_qwen2.json"
PACKAGES = ("spikingjelly==2.0.0", "loguru==0.7.3", "h5py==3.16.0", "SciencePlots==2.2.2")
MODEL, TEXT, _, LENGTH = MODELS["smollm2"]
JUDGED = WINDOWS["smollm2"]
CHOSEN_ON = 8  # windows after those that are judged
QUANTILES = (0.99, 0.999, 0.9999, 1.0)
OURS: list[dict[str, Any]] = [
    {"sites": "all", "code": "phase", "T": 6},
    {"sites": "all", "code": "phase", "T": 7},
    {"sites": "all", "code": "first_spike", "T": 24, "code_base": 1.2},
]
ROUNDS, SLOW = 3, 16  # more rounds of timing, up to a T
COUNTED = 64  # tokens that spikes are counted on


def as_qwen2(path: Path) -> Qwen2ForCausalLM:
    """A Llama as the Qwen2 that computes the same."""
    llama = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    settings = {
        name: value for name, value in llama.config.to_dict().items() if name not in ("model_type", "head_dim")
    }
    model = Qwen2ForCausalLM(Qwen2Config(**settings | {"architectures": None})).eval()
    for name in model.load_state_dict(llama.state_dict(), strict=False).missing_keys:
        model.get_parameter(name).data.zero_()
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, llama.eval()(ids).logits)
    return model


class Rival:
    """The recipe's model of a T, levels and a quantile."""

    def __init__(self, stock: Qwen2ForCausalLM, calibration: torch.Tensor, T: int, levels: int, quantile: float):
        ann2snn = import_module("spikingjelly.activation_based.ann2snn")
        recipe = import_module("spikingjelly.activation_based.ann2snn.recipes.qwen2")
        self.functional = import_module("spikingjelly.activation_based.functional")
        settings = ann2snn.Qwen2SNNConfig(time_steps=T, calibration_levels=levels, calibration_quantile=quantile)
        batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
        found = recipe.calibrate_qwen2_snn(stock, batches, settings)
        self.model = ann2snn.ModuleConverter(recipe=ann2snn.Qwen2SNNRecipe(found, settings)).convert(stock)
        self.T = T

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, collapsed: bool = False) -> torch.Tensor:
        """Of a window, `(1, length)`, through all of T, or collapsed: the sum over time at once."""
        self.functional.reset_net(self.model)
        steps = [self.model, *self.model.layers]
        for each in steps:
            each.time_steps = 1 if collapsed else self.T
        return self.model(input_ids=ids, encoding_mode="qcfs_sg" if collapsed else "signed_if").logits.float()

    def perplexity(self, rows: torch.Tensor) -> float:
        """Collapsed, as [`benchmarks.spike_driven.perplexity`] of ours."""
        return math.prod(perplexity_of(self.logits(row[None], collapsed=True), row) ** (1 / len(rows)) for row in rows)

    def spikes(self, ids: torch.Tensor) -> float:
        """Spikes of either sign a neuron and token."""
        self.model.set_collect_statistics(True)
        self.logits(ids)
        self.model.set_collect_statistics(False)
        counts = [encoder.statistics() for encoder in self.model.signed_encoders()]
        fired = sum(each["positive_spike_count"] + each["negative_spike_count"] for each in counts)
        return self.T * fired / sum(each["spike_value_count"] for each in counts)


def perplexity_of(logits: torch.Tensor, row: torch.Tensor) -> float:
    """Of one window."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]).exp().item()


def timed(function, ids: torch.Tensor) -> tuple[float, Any]:
    start = time.process_time()
    with torch.inference_mode():
        found = function(ids)
    return time.process_time() - start, found


def peak() -> float:
    """Largest resident set of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """Time, memory and, of the rival, the spikes and the first window in both modes: of this process."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = windows(tokenizer, SHARED / TEXT, LENGTH, 1)
    calibration = calibration_text("smollm2", tokenizer)[0]
    found: dict[str, Any] = {}
    if row["code"] == "SpikingJelly":
        rival = Rival(as_qwen2(MODEL), calibration, row["T"], row["levels"], row["quantile"])
        rival.model.set_collect_statistics(False)
        run: Any = rival.logits
    else:
        run = converted(MODEL, row, calibration)
    seconds, logits = timed(run, ids)
    found["peak_gb"] = peak()
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    timed(stock, ids)
    pairs = [(seconds, timed(stock, ids)[0])]
    for _ in range(ROUNDS if row["T"] <= SLOW else 0):
        pairs.append((timed(run, ids)[0], timed(stock, ids)[0]))
    ratios = [one / other for one, other in pairs]
    found |= {"seconds_a_token": statistics.median(one for one, _ in pairs) / LENGTH}
    found |= {"time": statistics.median(ratios), "time_spread": [min(ratios), max(ratios)]}
    if row["code"] == "SpikingJelly":
        found |= {"first_window": rival.perplexity(ids), "first_window_spiking": perplexity_of(logits, ids[0])}
        found["spikes"] = rival.spikes(ids[:, :COUNTED])
    return found


def in_process(row: dict[str, Any]) -> dict[str, Any]:
    """[`measured`] in a process of its own."""
    found = subprocess.check_output([sys.executable, "-m", __spec__.name, "--measure", json.dumps(row)], text=True)
    return json.loads(found.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[8, 16, 32, 64, 160])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    enter("spikingjelly", PACKAGES, __spec__.name)
    if args.measure:
        print(json.dumps(measured(json.loads(args.measure))))
        return
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    every = windows(tokenizer, SHARED / TEXT, LENGTH, JUDGED + CHOSEN_ON)
    judged, choice = every[:JUDGED], every[JUDGED:]
    calibration, about = calibration_text("smollm2", tokenizer)
    stock = as_qwen2(MODEL)
    done = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []
    configuration = {
        "packages": list(PACKAGES),
        "transformers": metadata.version("transformers"),
        "model": MODEL.name,
        "judged": TEXT,
        "windows": JUDGED,
        "length": LENGTH,
        "calibration": about,
        "chosen_on": f"{CHOSEN_ON} windows from number {JUDGED} on",
        "quantiles": QUANTILES,
        "levels": "T / 4, T / 2 and T",
    }

    def save(row: dict[str, Any]) -> None:
        done.append(row | origin())
        write_results(OUTPUT, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)

    if not matching(done, {"code": "stock"}):
        save({"code": "stock", "perplexity": perplexity(stock, judged)})
    for row in OURS:
        if not matching(done, row):
            model = converted(MODEL, row, calibration)
            save(row | {"perplexity": perplexity(model, judged)} | in_process(row))
    for T in args.timesteps:
        if matching(done, {"code": "SpikingJelly", "T": T}):
            continue
        tried = [
            {"levels": levels, "quantile": quantile}
            | {"choice": Rival(stock, calibration, T, levels, quantile).perplexity(choice)}
            for levels, quantile in product((T // 4, T // 2, T), QUANTILES)
        ]
        best = min(tried, key=lambda each: each["choice"])
        row = {"code": "SpikingJelly", "T": T, "levels": best["levels"], "quantile": best["quantile"], "tried": tried}
        rival = Rival(stock, calibration, T, row["levels"], row["quantile"])
        save(row | {"perplexity": rival.perplexity(judged)} | in_process(row))


if __name__ == "__main__":
    main()
