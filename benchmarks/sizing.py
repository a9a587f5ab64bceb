"""What a conversion without training takes at 7 and 70 billion weights: memory, time, and what breaks first. On paper.

    python -m benchmarks.sizing [--gpus 8] [--gpu_memory 80] …

1. Small random models of Llama's shape are converted on one CPU thread: seconds of the pass through the model and of
   the fit of thresholds, and the most memory that it takes over the weights.
2. From these: bytes and hours of large models, by arithmetic, on GPUs and disks whose speed is an assumption (flags).
3. A dry run on the meta device makes the large models through their FAS class and lets tokens through: bytes of
   weights and thresholds, and the input of every site. It checks the memory of step 2.

Nothing runs on a GPU. Writes benchmarks/results/sizing.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.common import peak_bytes
from configuration_fas import FASConfig
from fas import convert_to_spiking
from modeling_fas import FASLlamaForCausalLM
from training.calibrate.conversion import TOKENS, fit_thresholds
from training.layout import sites
from training.results import write_results
from training.trainers import is_threshold


OUTPUT = Path(__file__).parent / "results" / "sizing.json"
T, LENGTH = 5, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPIKES = {"sites": "all", "activation": "stock", "L": None, "code": "phase", "gain": "token", "T": T}
SPIKES |= {"schedule": "layerwise"}


@dataclass(frozen=True)
class Shape:
    """A Llama: its widths and counts."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def block_weights(self) -> int:
        """Of a block, that tokens are multiplied with."""
        return 2 * self.width * (self.width + self.kv_width) + 3 * self.width * self.intermediate

    @property
    def weights(self) -> int:
        """All of the stock model, norms included."""
        return self.layers * (self.block_weights + 2 * self.width) + (2 * self.vocabulary + 1) * self.width

    @property
    def neurons(self) -> int:
        """At the inputs of q k v, o, gate and up, down; of queries and values; of the head."""
        return self.layers * (4 * self.width + self.kv_width + self.intermediate) + self.width

    @property
    def threshold_bytes(self) -> int:
        """Fine thresholds and initial potentials by neuron; threshold and gain by site."""
        return 4 * 2 * (self.neurons + 6 * self.layers + 1)

    def settings(self) -> dict[str, Any]:
        """Of a configuration."""
        named = {"hidden_size": self.width, "num_hidden_layers": self.layers, "intermediate_size": self.intermediate}
        named |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        named |= {"vocab_size": self.vocabulary, "max_position_embeddings": 4096}
        return {**named, "tie_word_embeddings": False}


# With tokens: two depths, widths, vocabularies and lengths, so that each shows what it costs.
SMALL = (
    (Shape(256, 2, 4, 2, 688, 1000), 768),
    (Shape(512, 4, 8, 2, 1376, 1000), 768),
    (Shape(512, 4, 8, 2, 1376, 16000), 256),
)
LARGE = {
    "Llama-2-7B": Shape(4096, 32, 32, 32, 11008, 32000),
    "Llama-2-70B": Shape(8192, 80, 64, 8, 28672, 32000),
    "Llama-3-70B": Shape(8192, 80, 64, 8, 28672, 128256),
}


def seconds(function: Callable[[], Any]) -> float:
    """Of this process, as others on the machine do not count."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    """Costs of a small conversion: the medians of a few rounds, and the most memory of a pass."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**shape.settings())).eval()
    ids = torch.randint(2, shape.vocabulary, (tokens // LENGTH, LENGTH))
    model = convert_to_spiking(stock, ids, code="phase", T=T, progress=False)
    with torch.inference_mode(), model.running(0):
        forward = statistics.median(seconds(lambda: model.model(ids, use_cache=False)) for _ in range(rounds))
    convert = statistics.median(seconds(fit(model, ids)) for _ in range(rounds))
    peaks = {name: peak_bytes(fit(model.to(dtype), ids), "cpu") for name, dtype in DTYPES.items()}
    return {
        **asdict(shape),
        "tokens": tokens,
        "seconds": {"conversion": convert, "forward": forward},
        "fit_ns": 1e9 * (convert - forward) / (tokens * shape.neurons),
        "gflops": 2e-9 * tokens * shape.layers * shape.block_weights / forward,
        "peak_bytes": peaks,
        "peak_by_formula": {name: peak_of(sites_of(shape, tokens), name) for name in DTYPES},
    }


def fit(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: fit_thresholds(model, {"input_ids": ids}, T, progress=False)


def sites_of(shape: Shape, tokens: int) -> list[tuple[int, int, int]]:
    """Tokens, neurons and weights of the largest layer that follows, of every kind of site, by arithmetic."""
    outputs = {"qkv": shape.width, "o": shape.width, "gate and up": shape.intermediate, "head": shape.vocabulary}
    return [(tokens, shape.width, shape.width * each) for each in outputs.values()] + [
        (tokens, shape.intermediate, shape.intermediate * shape.width)
    ]


def peak_of(placed: list[tuple[int, int, int]], dtype: str) -> int:
    """Bytes that the pass takes over the weights: of the site that takes the most, float32 all of it.

    The fit of a site first squares the weights of what follows, a layer at a time, in float32 (of bfloat16 there is a
    float32 copy too); then holds so many tensors of the size of its input, most of them inside the encoding.
    """
    copies, inputs = {"float32": (1, 14), "bfloat16": (2, 13)}[dtype]
    return max(4 * max(inputs * tokens * neurons, copies * weights) for tokens, neurons, weights in placed)


def stream_ns() -> float:
    """Nanoseconds that one product of float32 tensors takes on this thread, an element."""
    x, y = torch.rand(2, 1 << 24)
    z = torch.empty_like(x)
    return 1e9 * statistics.median(seconds(lambda: torch.mul(x, y, out=z)) for _ in range(5)) / x.numel()


def costs_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Costs on this thread: of the fit by token and neuron, of products, of an element of a simple operation."""
    return {
        "fit_ns": statistics.median(row["fit_ns"] for row in rows),
        "gflops": max(rows, key=lambda row: row["width"])["gflops"],
        "stream_ns": stream_ns(),
    }


def on_paper(shape: Shape, costs: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Memory and hours of a conversion from `TOKENS` tokens, by arithmetic from the costs."""
    placed, work = sites_of(shape, TOKENS), TOKENS * shape.neurons
    products = 2 * TOKENS * shape.layers * shape.block_weights
    bytes_of = {name: shape.weights * dtype.itemsize for name, dtype in DTYPES.items()}
    over = {name: peak_of(placed, name) for name in DTYPES}
    thread = {"forward": products / costs["gflops"] / 1e9, "fit": work * costs["fit_ns"] / 1e9}
    operations = costs["fit_ns"] / costs["stream_ns"]  # on the input of a site, each with two reads and a write
    gpus = {
        "forward": products / args.gpu_tflops / 1e12,
        "fit": operations * 12 * work / args.gpu_bandwidth / 1e9,
    }
    files = {name: 2 * each / args.disk / 1e9 for name, each in bytes_of.items()}  # read and written
    rest = {name: shape.threshold_bytes + over[name] for name in DTYPES}
    needs = {
        "host": bytes_of["float32"] + rest["float32"],
        "hosts of a launcher": args.gpus * (bytes_of["float32"] + rest["float32"]),
        "one GPU": bytes_of["bfloat16"] + rest["bfloat16"],
        "each GPU": bytes_of["bfloat16"] / args.gpus + rest["bfloat16"],
    }
    return {
        "weights": shape.weights,
        "weights_bytes": bytes_of,
        "threshold_bytes": shape.threshold_bytes,
        "pass_bytes": over,
        "needs": needs,
        "seconds": {"one thread": thread, "GPUs": gpus, "files": files},
    }


@torch.no_grad()
def dry_run(shape: Shape) -> dict[str, Any]:
    """Bytes of a large model that is made on the meta device, and of a pass through it."""
    config = FASConfig(backbone="llama", **shape.settings(), **SPIKES)
    inputs: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = FASLlamaForCausalLM(config).eval().begin_calibration(T)
        ids = torch.zeros(TOKENS // LENGTH, LENGTH, dtype=torch.long)
        mask = torch.zeros(len(ids), 1, LENGTH, LENGTH)  # nothing asks a mask of four dimensions for its values
    placed = sites(model)
    for each in placed:
        each.neuron.register_forward_pre_hook(
            lambda neuron, given, name=each.name: inputs.__setitem__(name, given[0].shape)
        )
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    seen = [
        (
            inputs[each.name].numel() // inputs[each.name][-1],
            inputs[each.name][-1],
            max((target.weight.numel() for target in each.targets), default=0),
        )
        for each in placed
    ]
    thresholds = sum(each.nbytes for name, each in model.named_parameters() if is_threshold(name))
    weights = sum(each.numel() for name, each in model.named_parameters() if not is_threshold(name))
    return {
        "weights": weights,
        "threshold_bytes": thresholds,
        "sites": len(inputs),
        "pass_bytes": {name: peak_of(seen, name) for name in DTYPES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="of each small conversion; seconds are medians (default: 3)")
    add("--gpus", type=int, default=8, help="that hold the model together (default: 8)")
    add("--gpu_memory", type=float, default=80, metavar="GB", help="of one (default: 80)")
    add("--gpu_tflops", type=float, default=100, help="assumed, that products reach in bfloat16 (default: 100)")
    add("--gpu_bandwidth", type=float, default=1000, metavar="GB/S", help="assumed, of its memory (default: 1000)")
    add(
        "--disk", type=float, default=1, metavar="GB/S", help="assumed, where weights come from and go to (default: 1)"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    measured = []
    for shape, tokens in SMALL:
        measured.append(measure(shape, tokens, args.rounds))
        print(measured[-1], flush=True)
    costs = costs_of(measured)
    models = []
    for name, shape in LARGE.items():
        models.append({"model": name, **on_paper(shape, costs, args), "dry_run": dry_run(shape)})
        print(models[-1], flush=True)
    configuration = {**vars(args), "T": T, "code": "phase", "tokens": TOKENS, "length": LENGTH, "seed": 0}
    configuration["shapes"] = {name: asdict(shape) for name, shape in LARGE.items()}
    metrics = {"measured": measured, "costs": costs, "models": models}
    write_results(OUTPUT, metrics=metrics, configuration=configuration)


if __name__ == "__main__":
    main()
