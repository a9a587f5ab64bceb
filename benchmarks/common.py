"""What the benchmarks share: the command line, models with random weights, interleaved timing, peak memory."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from configuration_fas import FASBertConfig, FASGPT2Config
from modeling_fas import FASBertForMaskedLM, FASGPT2LMHeadModel
from training.results import write_results


RESULTS = Path(__file__).parent / "results" / "speed"
CLASSES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, FASGPT2LMHeadModel, FASGPT2Config),
    "bert": (BertForMaskedLM, BertConfig, FASBertForMaskedLM, FASBertConfig),
}
VOCABULARY = 30000


def arguments(
    description: str,
    rounds: int = 3,
    batch: tuple[int, ...] = (1,),
    models: tuple[str, ...] = (),
    training: bool = False,
) -> argparse.Namespace:
    """Command line of a benchmark, with its defaults; sets one CPU thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds; medians are over them")
    parser.add_argument("--batch", type=int, nargs="+", default=list(batch))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON results")
    if models:
        parser.add_argument("--model", default=models[0], choices=models)
    if training:
        parser.add_argument("--training", action="store_true", help="a training step, and nothing else")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return parsed


def stock(kind: str, args: argparse.Namespace) -> torch.nn.Module:
    """Stock model of GPT-2 small or BERT-base size, random weights."""
    model, config, _, _ = CLASSES[kind]
    return model(config()).to(args.device, getattr(torch, args.dtype)).eval()


def fas(kind: str, args: argparse.Namespace, **settings) -> torch.nn.Module:
    """Spiking model of the same size."""
    _, _, model, config = CLASSES[kind]
    return model(config(**settings)).to(args.device, getattr(torch, args.dtype)).eval()


def token_ids(batch: int, length: int, args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), device=args.device)


def timed(function: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of one call: of this process on a CPU (others on the machine do not count), and on the wall."""
    if device != "cpu":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return {"seconds": time.process_time() - cpu if device == "cpu" else wall, "wall_seconds": wall}


def interleave(
    functions: Mapping[Any, Callable[[], object]], args: argparse.Namespace, warmup: int = 1
) -> dict[Any, dict]:
    """Run all functions in turn, `--rounds` times after `warmup` rounds that do not count; medians and all samples."""
    samples: dict[Any, list] = {name: [] for name in functions}
    for turn in range(args.rounds + warmup):
        for name, function in functions.items():
            seconds = timed(function, args.device)
            if turn >= warmup:
                samples[name].append(seconds)
    return {
        name: {"median": statistics.median(each["seconds"] for each in runs), "samples": runs}
        for name, runs in samples.items()
    }


def gathered(samples: Mapping[Any, list[float]], size: int) -> dict[Any, dict]:
    """Seconds of single tokens as `interleave` gives times: `size` tokens a round, without the first round."""
    rounds = {name: [sum(each[i : i + size]) for i in range(size, len(each), size)] for name, each in samples.items()}
    return {
        name: {"median": statistics.median(each), "samples": [{"seconds": seconds} for seconds in each]}
        for name, each in rounds.items()
    }


def ratios(times: Mapping, name: Any, base: Any) -> list[float]:
    """Of the rounds: what disturbed a round disturbed both of its parts."""
    pairs = zip(times[name]["samples"], times[base]["samples"], strict=True)
    return [each["seconds"] / other["seconds"] for each, other in pairs]


def compared(measure: str, target: float | None, times: Mapping, name: Any, base: Any) -> dict[str, Any]:
    """A row for `report`: the median of the ratios of the rounds, and their spread from smallest to largest."""
    found = ratios(times, name, base)
    spread = [min(found), max(found)]
    return {"measure": measure, "target": target, "got": statistics.median(found), "spread": spread}


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes of tensors alive at once that the call allocated, the loaded model not counted."""
    if device != "cpu":
        function()  # what a first call leaves behind, workspaces and compiled kernels, is not the measure
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def results_name(name: str, args: argparse.Namespace) -> str:
    """Name of a result without its ending: that of a GPU stands beside that of a CPU."""
    return name if args.device == "cpu" else f"{name}_{args.device}_{args.dtype}"


def report(name: str, rows: list[dict], args: argparse.Namespace, **more) -> None:
    """Print one line per measure and write them all as `<name>.json`; a row holds measure, target, got, and spread."""
    for row in rows:
        spread = f" [{row['spread'][0]:.3f}, {row['spread'][1]:.3f}]" if row.get("spread") else ""
        target = "" if row["target"] is None else f"  (target <= {row['target']})"
        print(f"{row['measure']}: {row['got']:.3f}{spread}{target}", flush=True)
    configuration = {key: value for key, value in vars(args).items() if key != "output"}
    clock = "process CPU time" if args.device == "cpu" else "wall"
    path = args.output / f"{results_name(name, args)}.json"
    write_results(path, metrics=rows, configuration=configuration | {"clock": clock}, **more)
