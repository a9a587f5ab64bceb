"""NeuroBench's own count of a folded spiking model, beside ours: every linear layer gets its spikes step by step.

    python -m venv … && pip install neurobench==2.3.0 && PYTHONPATH=. python -m benchmarks.neurobench_counts

NeuroBench calls a layer's input spikes where all of it is -1, 0 or 1, and counts from what a layer is called on. Rate
codes hand that over as they run. A layerwise phase or first-spike code computes its weighted sum at once: here it is
taken apart, each layer runs T times on the spikes of one step, and the soma weighs and adds. The logits must stay.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sites_fas
from fas import SpikeMonitor, convert_to_spiking
from training import layout
from training.calibrate import fold_thresholds
from training.evaluate import count_operations
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


class SpikeBySpike(nn.Module):
    """A folded linear layer that runs on -1, 0 and 1, once a timestep, and adds what comes of it by weight.

    Takes over the layer's hooks: NeuroBench counts with copies of a layer, which must not spike anew.
    """

    def __init__(self, layer: nn.Linear, neuron: Any):
        super().__init__()
        self.layer, self.encode = layer, neuron.forward
        self.neuron = [neuron]
        before = {key: hook for key, hook in layer._forward_pre_hooks.items() if hook is not sites_fas._emit_input}
        self._forward_pre_hooks.update(before)
        self._forward_hooks.update(layer._forward_hooks)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        neuron, bias = self.neuron[0], self.layer.bias
        if neuron.stepwise:
            return self.layer(self.encode(values))
        weights = step_weights(neuron.code, neuron.T, neuron.code_base)
        total: Any = 0
        for weight, spikes in zip(weights, neuron.trains(values), strict=True):
            current = self.layer(spikes)
            total = total + weight * (current if bias is None else current - bias)
        return total if bias is None else total + bias


def step_weights(code: str, T: int, base: float) -> list[float]:
    """What the spike of each step is worth, of a threshold."""
    if code == "phase":
        return [2 ** (T - t) / (2**T - 1) for t in range(1, T + 1)]
    return [base ** (1 - t) if code == "first_spike" else 1 / T for t in range(1, T + 1)]


def spike_by_spike(model: Any) -> Any:
    """Make the linear layers of a folded model run on single spikes, in place."""
    for placed in layout.sites(model):
        if placed.site.at != "input":
            continue
        for target in placed.targets:
            name = next(name for name, module in model.named_modules() if module is target)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SpikeBySpike(target, placed.neuron))
        placed.neuron.forward = lambda hidden_states: hidden_states
    return model


def counted_by_neurobench(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Its classification metric, per sequence."""
    from neurobench.metrics.workload.synaptic_operations import SynapticOperations
    from neurobench.models import NeuroBenchModel

    class Wrapped(NeuroBenchModel):
        def __call__(self, batch):
            return model(**batch).logits

        def __net__(self):
            return model

    from neurobench.hooks.layer import LayerHook

    wrapped, metric = Wrapped(), SynapticOperations()
    wrapped.connection_hooks = [LayerHook(layer) for layer in wrapped.connection_layers()]
    found = {}
    for batch in batches:
        found = metric(wrapped, wrapped(batch), (batch["input_ids"], batch["labels"]))
        wrapped.reset_hooks()
    for hook in wrapped.connection_hooks:
        hook.close()
    return found


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
            theirs = counted_by_neurobench(spike_by_spike(model), batches)
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
