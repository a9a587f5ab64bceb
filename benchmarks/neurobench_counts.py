"""NeuroBench's own count of a folded spiking model, beside ours: every linear layer gets its spikes step by step.

    python -m venv … && pip install neurobench==2.3.0 && PYTHONPATH=. python -m benchmarks.neurobench_counts

How a code is taken apart into single spikes stands in `training/evaluate/neurobench.py`. The logits must stay.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fas import SpikeMonitor, convert_to_spiking
from training import layout
from training.calibrate import fold_thresholds
from training.evaluate import count_operations
from training.evaluate.neurobench import spike_by_spike, synaptic_operations
from training.results import fingerprint, markdown_table, write_results

from ._calibration_tasks import MINILM, Glue


OUTPUT = Path(__file__).parent / "results" / "neurobench.json"
SETTINGS: list[dict[str, Any]] = [
    {"code": "phase", "T": 4},
    {"code": "first_spike", "T": 8, "code_base": 2**0.5},
    {"code": "rate", "T": 8},
    {"code": "rate", "T": 8, "schedule": "stepwise"},
    {"code": "rate", "T": 8, "schedule": "accumulated"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MINILM))
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    task, tokenizer = Glue("sst2"), AutoTokenizer.from_pretrained(MINILM)
    texts = [row["input_ids"] for row in task.rows("train", 64)]
    calibration = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    batches = task.batches(task.rows("validation")[: args.rows], 1)
    rows = []
    for settings in SETTINGS:
        torch.manual_seed(0)
        stock = AutoModelForSequenceClassification.from_pretrained(args.model)
        model = convert_to_spiking(stock.double(), calibration, sites="all", progress=False, **settings)
        with torch.inference_mode():
            expected = [model(**batch).logits for batch in batches]
            fold_thresholds(model)
            with SpikeMonitor(model) as monitor:
                for batch in batches:
                    model(**batch)
            schedule, T = model.config.schedule, model.config.T
            ours = {"dense": 0.0, "effective_macs": 0.0, "effective_acs": 0.0}
            length = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
            for each in count_operations(model, length, execution=schedule, T=T, spike_rates=monitor.spike_rates()):
                if each.part not in (*layout.MEETS, "neurons"):
                    for name in ours:
                        ours[name] += getattr(each, name) * length
            theirs = synaptic_operations(spike_by_spike(model), batches)
            gap = max(
                (model(**batch).logits - wanted).abs().max().item()
                for batch, wanted in zip(batches, expected, strict=True)
            )
        row = {**settings, "schedule": schedule, "logits differ by": gap}
        row |= {"effective ACs, NeuroBench": theirs["Effective_ACs"], "effective ACs, ours": ours["effective_acs"]}
        row |= {"effective MACs, NeuroBench": theirs["Effective_MACs"], "effective MACs, ours": ours["effective_macs"]}
        rows.append(row | {"weights_sha256": fingerprint(model)})
        print(markdown_table(rows[-1:]), flush=True)
    write_results(
        OUTPUT,
        metrics=rows,
        configuration={"model": Path(args.model).name, "rows": args.rows, "counted": "linear layers, per sequence"},
    )


if __name__ == "__main__":
    main()
