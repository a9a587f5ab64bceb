"""What a spike monitor costs: time and peak memory of a forward pass with one over without, interleaved."""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import peak_bytes, weight_bytes
from configuration_fas import FASBertConfig, FASGPT2Config
from modeling_fas import FASBertForSequenceClassification, FASGPT2LMHeadModel
from training.evaluate import SpikeMonitor
from training.results import write_results


MODELS = {  # random weights; thresholds at which about a tenth of the neurons fire
    "MiniLM-L6, 8 × 64 tokens": (
        FASBertForSequenceClassification,
        FASBertConfig(
            num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536, initial_threshold=0.5
        ),
        (8, 64),
    ),
    "GPT-2 small, 1 × 128 tokens": (FASGPT2LMHeadModel, FASGPT2Config(initial_threshold=0.5), (1, 128)),
}
MODES = [(0, "stepwise"), (4, "layerwise"), (4, "stepwise")]
TARGETS = {"time": 1.05, "peak_memory": 1.01}


def compare(model: torch.nn.Module, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Medians over the rounds of process time and wall time, and peak memory, with a monitor over without."""

    def without() -> None:
        model(ids)

    def watched() -> None:
        with SpikeMonitor(model):
            model(ids)

    without()
    ratios: dict[str, list[float]] = {"process_time": [], "wall_time": []}
    seconds = []
    for turn in range(rounds):
        spent = {}
        for function in (without, watched) if turn % 2 else (watched, without):
            start = time.process_time(), time.perf_counter()
            function()
            spent[function] = time.process_time() - start[0], time.perf_counter() - start[1]
        seconds.append(spent[without][0])
        for ratio, with_monitor, alone in zip(ratios.values(), spent[watched], spent[without], strict=True):
            ratio.append(with_monitor / alone)
    peaks = [peak_bytes(function, "cpu") for function in (without, watched)]
    weights = weight_bytes(model)
    return {
        **{name: statistics.median(values) for name, values in ratios.items()},
        "process_time_quartiles": statistics.quantiles(ratios["process_time"], n=4),
        "peak_memory": (weights + peaks[1]) / (weights + peaks[0]),
        "peak_memory_without_weights": peaks[1] / peaks[0],
        "peak_bytes_without": weights + peaks[0],
        "seconds_without": statistics.median(seconds),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "monitor_overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (model_class, config, shape) in MODELS.items():
        model = model_class(config).eval()
        ids = torch.randint(1, 30000, shape)
        for T, schedule in MODES:
            model.set_timesteps(T, schedule)
            mode = f"{schedule} T = {T}" if T else "QCFS ANN"
            rows.append({"model": name, "mode": mode, **compare(model, ids, args.rounds)})
            row = rows[-1]
            print(
                f"{name}, {mode}: time {row['process_time']:.3f} (target {TARGETS['time']}), wall "
                f"{row['wall_time']:.3f}, peak memory {row['peak_memory']:.4f} (target {TARGETS['peak_memory']})",
                flush=True,
            )
    configuration = {"rounds": args.rounds, "targets": TARGETS, "time": "process CPU time, one thread"}
    write_results(args.output, metrics=rows, configuration=configuration)


if __name__ == "__main__":
    main()
