"""Cost of a calibration step: ours (per neuron, all else frozen) against the published recipe's, on the same model.

    python benchmarks/calibration_cost.py --size mini --rounds 7

The published step is written here from its description: T + 1 copies through everything, plain autograd through time,
thresholds by position and neuron, the head on every copy, a gradient for every parameter. Its loss must equal ours
with `reduction="published"`, or the script stops. Times: one process, steps interleaved. Memory: one process each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from configuration_fas import FASGPT2Config
from modeling_fas import FASGPT2LMHeadModel
from training.calibrate import calibration_loss, freeze_for_calibration
from training.calibrate.coarse import PUBLISHED_PAIR, set_pair
from training.results import write_results


RESULTS = Path(__file__).parent / "results"
SIZES = {
    "mini": {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "n_positions": 512},
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024},
}


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, distance):
        ctx.save_for_backward(distance)
        return (distance >= 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class PublishedNeuron(nn.Module):
    def __init__(self, threshold, length, width, L, T):
        super().__init__()
        self.L, self.T, self.threshold = L, T, threshold
        self.fine_threshold = nn.Parameter(torch.full((length, width), PUBLISHED_PAIR[0] * float(threshold)))
        self.initial_potential = nn.Parameter(torch.full((length, width), PUBLISHED_PAIR[1]))

    def forward(self, x):
        steps = x.unflatten(0, (self.T + 1, -1))
        scaled = (steps[-1] / self.threshold).clamp(0, 1) * self.L
        teacher = self.threshold * (scaled + ((scaled + 0.5).floor() - scaled).detach()) / self.L
        v, emitted = self.initial_potential * self.fine_threshold, []
        for step in steps[:-1]:
            v = v + step
            emitted.append(Spike.apply(v - self.fine_threshold) * self.fine_threshold)
            v = v - emitted[-1]
        emitted = torch.stack(emitted)
        self.error = F.mse_loss(emitted.mean(0), teacher.detach())
        return torch.cat([emitted, teacher[None]]).flatten(0, 1)


def published(model, T, length):
    """A stock model with the weights of ours, and its calibration step."""
    stock = GPT2LMHeadModel(model.config)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if ".act." not in k})
    width = 4 * model.config.n_embd
    for block, (_, neuron) in zip(stock.transformer.h, model.neurons(), strict=True):
        block.mlp.act = PublishedNeuron(neuron.threshold.detach().clone(), length, width, model.config.L, T)
    neurons = [block.mlp.act for block in stock.transformer.h]
    optimizer = torch.optim.AdamW([p for neuron in neurons for p in neuron.parameters()], lr=0.003, weight_decay=0.0)
    stock.eval()

    def step(ids):
        with torch.no_grad():
            copies = stock.transformer.wte(ids).repeat(T + 1, 1, 1)
        logits = stock(inputs_embeds=copies, use_cache=False).logits.unflatten(0, (T + 1, -1))
        student, teacher = logits[:-1].mean(0)[:, :-1], logits[-1][:, :-1]
        loss = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
        loss = loss + sum(neuron.error for neuron in neurons)
        loss.backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        stock.zero_grad()
        return loss.item()

    return step


def ours(model):
    trainable = freeze_for_calibration(model)
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.0)

    def step(ids, **settings):
        loss = calibration_loss(model, {"input_ids": ids}, **settings).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def build(options, granularity="neuron"):
    torch.manual_seed(0)
    config = FASGPT2Config(**SIZES[options.size], initial_threshold=0.5, initializer_range=0.04)
    model = FASGPT2LMHeadModel(config).eval()
    model.begin_calibration(options.T, granularity, options.length)
    return model, torch.randint(0, model.config.vocab_size, (options.batch_size, options.length))


def resident(kind):
    """Resident memory of this process in MB: now (`VmRSS`) or at most (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) / 1024


def peak_memory(options):
    """Peak resident memory of three steps above that of the process with the model, in MB (Linux)."""
    model, ids = build(options)
    step = ours(model) if options.only == "ours" else published(model, options.T, options.length)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building
    loaded = resident("VmRSS")
    for _ in range(3):
        step(ids)
    return resident("VmHWM") - loaded


def measure(options):
    model, ids = build(options, "position")
    for _, neuron in model.neurons():
        set_pair(neuron, *PUBLISHED_PAIR)
    expected = ours(model)(ids, reduction="published", site_weight=1.0)
    model, ids = build(options)
    steps = {"published": published(model, options.T, options.length), "ours": ours(model)}
    if abs((found := steps["published"](ids)) - expected) > 1e-3 * expected:
        raise ValueError(
            f"The loss of the published step must be that of `calibration_loss`, {expected}, got {found}."
        )
    times = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step(ids)
            times[name].append(time.process_time() - start)
    extra = sum(p.numel() for p in model.parameters() if p.requires_grad)
    metrics = {
        "cpu_seconds": {name: statistics.median(each) for name, each in times.items()},
        "all_cpu_seconds": times,
        "peak_memory_mb": {},
        "extra_parameters": extra,
        "extra_parameters_share": extra / (sum(p.numel() for p in model.parameters()) - extra),
    }
    for name in steps:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        metrics["peak_memory_mb"][name] = json.loads(run.stdout.splitlines()[-1])
    for quantity in ("cpu_seconds", "peak_memory_mb"):
        metrics[f"{quantity}_ratio"] = metrics[quantity]["ours"] / metrics[quantity]["published"]
    return metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="mini", choices=SIZES)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["ours", "published"], help="measure the memory of one step (internal)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if options.only:
        print(json.dumps(peak_memory(options)))
        return
    path = RESULTS / f"calibration_cost_{options.size}.json"
    record = write_results(path, metrics=measure(options), configuration=vars(options))
    print(json.dumps(record["metrics"], indent=2))


if __name__ == "__main__":
    main()
