"""Spikes into every product without training: quality, spikes, energy and reads of each code, beside the stock model.

    python -m benchmarks.spike_driven prose|smollm2|fas [--length 128] [--only 2 3] [--distilled FOLDER]

Thresholds are fitted to training text (prose) or to a later part of the validation text (WikiText, of which we have no
other part), never to the windows that are judged, and to the same text whatever `--length` is judged. `fas` is
gpt2-prose-mini as FAS has it: trained with QCFS, spikes in its MLPs. A row is saved as it ends; the same command goes
on from there.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fas import SpikeMonitor, convert_to_spiking, energy_report
from training import layout
from training.results import fingerprint, markdown_table, matching, origin, read_results, write_results

from ._calibration_tasks import Prose


SHARED = Path(os.environ.get("FAS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
RESULTS = Path(__file__).parent / "results" / "spike_driven"
MODELS = {
    "prose": (SHARED / "models" / "gpt2-prose-mini", "data/prose/validation.parquet", "data/prose/train.parquet", 128),
    "smollm2": (Path(os.environ.get("SMOLLM2", "smollm2")), "data/wikitext-103/validation.parquet", None, 256),
}
SETTINGS = [
    {"sites": "all", "code": "phase", "T": 3},
    {"sites": "all", "code": "phase", "T": 4},
    {"sites": "all", "code": "phase", "T": 5},
    {"sites": "all", "code": "phase", "T": 6},
    {"sites": "all", "code": "phase", "T": 7},
    {"sites": "all", "code": "phase", "T": 8},
    {"sites": "all", "code": "first_spike", "T": 8, "code_base": 2**0.5},
    {"sites": "all", "code": "first_spike", "T": 16, "code_base": 1.2},
    {"sites": "all", "code": "first_spike", "T": 24, "code_base": 1.2},
    {"sites": "linear", "code": "phase", "T": 5},
    {"sites": "linear", "code": "rate", "T": 16, "schedule": "layerwise", "gain": "static"},
    {"sites": "linear", "code": "rate", "T": 16, "schedule": "accumulated", "gain": "static"},
    # More of each for the curves.
    {"sites": "all", "code": "first_spike", "T": 6, "code_base": 2**0.5},
    {"sites": "all", "code": "first_spike", "T": 12, "code_base": 2**0.5},
    {"sites": "linear", "code": "phase", "T": 4},
    {"sites": "linear", "code": "phase", "T": 6},
    {"sites": "linear", "code": "rate", "T": 8, "schedule": "layerwise", "gain": "static"},
    {"sites": "linear", "code": "rate", "T": 32, "schedule": "layerwise", "gain": "static"},
]
WINDOWS = {"prose": 200, "smollm2": 24}  # judged, of the usual length
SKIPPED = {"prose": 1000, "smollm2": 44}  # windows before those of calibration
FAS: list[dict[str, Any]] = [
    {"sites": "mlp", "code": "rate", "T": T, "schedule": schedule}
    for T in (4, 8)
    for schedule in ("stepwise", "accumulated", "layerwise")
]
LENGTH = 256  # tokens that energy is counted at, where no longer windows are judged
ORIGIN = origin()  # of the code that runs, which may be edited meanwhile


def windows(tokenizer, path: Path, length: int, count: int, skip: int = 0) -> torch.Tensor:
    """Rows of running text, `(count, length)`."""
    ids: list[int] = []
    separator = tokenizer.eos_token if path.parent.name == "prose" else ""
    for text in pq.read_table(path).column(0).to_pylist():
        ids += tokenizer(text + separator, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= (skip + count) * length:
            break
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[skip : skip + count]


def calibration_text(name: str, tokenizer: Any) -> tuple[torch.Tensor, str]:
    """Windows that thresholds are fitted to, and what they are: never any that are judged."""
    _, judged, other, length = MODELS[name]
    text, count, skip = other or judged, 768 // length, SKIPPED[name]
    about = f"{text}, {count} windows of {length} tokens from number {skip} on"
    return windows(tokenizer, SHARED / text, length, count, skip), about


@torch.inference_mode()
def perplexity(model, rows: torch.Tensor) -> float:
    losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def spiking_cost(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], length: float = LENGTH, causal: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """Spikes an input, energy and reads over the stock model's, at a length; and the spike rate of each site."""
    with torch.inference_mode(), SpikeMonitor(model) as monitor:
        for batch in batches:
            model(**batch)
    T, rates = model.config.T, monitor.spike_rates()
    settings: dict[str, Any] = {"execution": model.config.schedule, "T": T, "spike_rates": rates, "causal": causal}
    report = energy_report(model, length, **settings)
    return {"spikes": monitor.spike_rate * T, "energy": report["ratio"], "reads": report["reads_ratio"]}, rates


def rows_of(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Windows as batches of one."""
    return [{"input_ids": row[None]} for row in windows]


def converted(path: Path, row: Mapping[str, Any], calibration: torch.Tensor) -> Any:
    """The model by a row of settings, without training."""
    return convert_to_spiking(
        path, calibration, progress=False, **{name: value for name, value in row.items() if value is not None}
    )


def distilled_row(folder: Path) -> dict[str, Any]:
    """The settings of a distilled model, and its name."""
    config = AutoConfig.from_pretrained(folder)
    names = ["sites", "code", "T", *(["code_base"] if config.code == "first_spike" else [])]
    return {name: getattr(config, name) for name in names} | {"distilled": folder.name}


def judge(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What is measured of a spiking model."""
    measured, length = {"perplexity": perplexity(model, rows)}, rows.shape[1]
    T = model.config.T
    costs, rates = spiking_cost(model, rows_of(rows[: min(8, 2048 // length)]), max(LENGTH, length))
    by_group: dict[str, list[tuple[float, int]]] = {}
    for placed in layout.sites(model):
        by_group.setdefault(placed.site.group, []).append((rates[placed.name], placed.neuron.width))
    groups = {
        f"spikes, {group}": T * sum(rate * width for rate, width in entries) / sum(width for _, width in entries)
        for group, entries in by_group.items()
    }
    return measured | costs | {"weights_sha256": fingerprint(model), **ORIGIN, **groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*MODELS, "fas"])
    parser.add_argument("--length", type=int, help="tokens of a window that is judged; by default 256, of prose 128")
    parser.add_argument("--windows", type=int, help="how many; by default 24 of 256 tokens, of prose 200 of 128")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the only settings to measure, from 0")
    parser.add_argument("--distilled", type=Path, help="folder of a distilled model, which is one more row")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    fas = args.model == "fas"
    name = "prose" if fas else args.model
    path, judged, other, usual = MODELS[name]
    length = args.length or usual
    count = args.windows or WINDOWS[name] * usual // length
    if not other and count * length > SKIPPED[name] * usual:
        most = SKIPPED[name] * usual // length
        parser.error(f"--windows must be at most {most} of {length} tokens: later ones calibrate; got {args.windows}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = windows(tokenizer, SHARED / judged, length, count)
    calibration, about = calibration_text(name, tokenizer)
    output = RESULTS / f"{args.model}{f'_{length}' if length != usual else ''}.json"
    configuration = {
        "model": path.name,
        "judged": judged,
        "windows": len(rows),
        "length": length,
        "calibration": about,
        "energy_length": max(LENGTH, length),
    }
    if fas:
        task = Prose()
        configuration["calibration"] = f"{task.describe()['qcfs']}, seed 0"
    done = read_results(output)["metrics"] if output.is_file() else []
    if not done:
        stock = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        done = [{"sites": "–", "code": "stock", "perplexity": perplexity(stock, rows), **ORIGIN}]
        if fas:
            with task.qcfs(0).running(0) as model:
                done.append({"sites": "mlp", "code": "QCFS", "perplexity": perplexity(model, rows), **ORIGIN})
    settings = FAS if fas else SETTINGS
    settings = settings if args.only is None else [settings[number] for number in args.only]
    for each in [*settings, *([distilled_row(args.distilled)] if args.distilled else [])]:
        row = {"schedule": "layerwise", "code_base": None, "gain": None} | each
        if matching(done, row):
            continue
        start = time.perf_counter()
        if "distilled" in row:
            model = AutoModelForCausalLM.from_pretrained(args.distilled, dtype="float32").eval()
        elif fas:
            model = task.qcfs(0).set_timesteps(row["T"], row["schedule"])
        else:
            model = converted(path, row, calibration)
        seconds = time.perf_counter() - start
        done.append(row | judge(model, rows) | ({} if fas else {"conversion_seconds": seconds}))
        done[-1]["over_stock"] = done[-1]["perplexity"] / done[0]["perplexity"]
        write_results(output, metrics=done, configuration=configuration)
        print(markdown_table(done[-1:]), flush=True)


if __name__ == "__main__":
    main()
