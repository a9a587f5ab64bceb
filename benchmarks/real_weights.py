"""What holds on real weights: all-MiniLM-L6-v2, gpt2-prose-mini, SmolLM2-135M, this one in a Qwen2 model too.

    python -m benchmarks.real_weights [--smollm2 FOLDER] [--gpt2 FOLDER] [--only NAME ...]

`benchmarks/smollm2.py` makes the first folder. Differences are the largest of any logit; of any hidden state, and of
what is pooled, where there is no head. Thresholds are, but where said, the 99.9 % quantile of what reaches a site.
Ends with 1 if a figure is above its limit.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DataCollatorWithFlattening
from transformers.utils import logging

import modeling_fas
from configuration_fas import FASConfig
from tests import naive
from tests.outside import run_outside
from training.demo import minilm
from training.layout import auto_class
from training.results import markdown_table, write_results


ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "real_weights.json"
TEXTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "The capital of France is",
)
T, L, MANY_LEVELS, NEW_TOKENS = 4, 8, 2**40, 20
MODES = ((0, "stepwise"), (T, "stepwise"), (T, "layerwise"))
LOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, auto, inputs, output = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
found = {}
for T, schedule in [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")]:
    with torch.no_grad():
        made = model.set_timesteps(T, schedule)(**load_file(inputs))
    whole = torch.cat([made.pooler_output[:, None], made[0]], 1) if "pooler_output" in made else made[0]
    found[f"{T} {schedule}"] = whole.contiguous()
assert not [name for name in sys.modules if name.endswith("_fas") and "." not in name]
save_file(found, output)
"""


class Checks:
    """The rows of one model, printed as they come."""

    def __init__(self, name: str, rows: list[dict[str, Any]]):
        self.name, self.rows = name, rows

    def add(self, check: str, figure: float, limit: float | None = 0) -> None:
        """A figure that may be up to `limit`; None: it is for reading only."""
        self.rows.append({"model": self.name, "check": check, "figure": figure, "limit": limit})
        print(f"{self.name}: {check}: {figure:.3g}{' TOO MUCH' if too_much(self.rows[-1]) else ''}", flush=True)


def too_much(row: dict[str, Any]) -> bool:
    return row["limit"] is not None and not row["figure"] <= row["limit"]


def rounding(model: Any, limit: float = 1e-11) -> float:
    """Limit of a difference in float64; more where norms compute in float32 whatever the model holds."""
    return 1e-4 if hasattr(model.config, "rms_norm_eps") else limit


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits; without a head what is pooled, as if a token, and the hidden states of all tokens."""
    made = model(**inputs)
    return torch.cat([made.pooler_output[:, None], made[0]], 1) if "pooler_output" in made else made[0]


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def batch(tokenizer: Any, side: str) -> dict[str, torch.Tensor]:
    """The texts as one batch."""
    made = tokenizer(list(TEXTS), padding=True, padding_side=side, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def stock_of(model: Any) -> Any:
    """The stock model of the same weights."""
    stock_class = getattr(transformers, type(model).__name__.removeprefix("FAS"))
    settings = model.config.to_dict()
    settings.pop("model_type")
    stock = stock_class(stock_class.config_class(**settings)).eval()
    report = stock.load_state_dict(model.state_dict(), strict=False)
    if report.missing_keys or not all(name.endswith(".threshold") for name in report.unexpected_keys):
        raise RuntimeError(f"{stock_class.__name__} has other weights: {report}")
    return stock


def put(model: Any, name: str, activation: Any) -> None:
    """Put an activation where a neuron is, or is in a spiking model."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules.pop(leaf, None)
    setattr(model.get_submodule(path), leaf, activation)


def with_activations_of(stock: Any, model: Any) -> Any:
    """A copy of a spiking model that has at its sites what stands there in a stock one; at an input, the identity."""
    model = copy.deepcopy(model)
    for name, _ in model.neurons():
        path, _, leaf = name.rpartition(".")
        put(model, name, getattr(stock.get_submodule(path), leaf, torch.nn.Identity()))
    return model


def set_thresholds(model: Any, inputs: dict[str, torch.Tensor], quantile: float) -> None:
    """The quantile of what reaches a site before anything is quantised; of the absolute values where it is signed."""
    found = {}

    def hook(neuron: Any, args: tuple) -> None:
        values = (args[0].abs() if neuron.signed else args[0]).flatten().sort().values
        neuron.threshold.fill_(values[-1])
        found[neuron] = values[round(quantile * (len(values) - 1))]

    hooks = [neuron.register_forward_pre_hook(hook) for _, neuron in model.neurons()]
    levels, model.config.L = model.config.L, MANY_LEVELS
    with model.running(0):
        model(**inputs)
    model.config.L = levels
    for each in hooks:
        each.remove()
    for neuron, threshold in found.items():
        neuron.threshold.fill_(threshold)


def spike_rate(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Spikes per neuron and timestep, padding included."""
    counted = []
    hooks = [
        neuron.register_forward_hook(lambda _n, _a, emitted: counted.append((emitted != 0).double().mean().item()))
        for _, neuron in model.neurons()
    ]
    with model.running(T, "stepwise"):
        model(**inputs)
    for each in hooks:
        each.remove()
    return sum(counted) / len(counted)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def loading(checks: Checks, model_class: Any, folder: Path) -> Any:
    """The model; only thresholds may be missing, but for what the stock class misses too."""
    torch.manual_seed(0)
    model, report = model_class.from_pretrained(folder, output_loading_info=True, L=L, dtype=torch.float32)
    stock_class = getattr(transformers, model_class.__name__.removeprefix("FAS"))
    _, stock = stock_class.from_pretrained(folder, output_loading_info=True)
    missing = set(report["missing_keys"]) - set(stock["missing_keys"])
    thresholds = {name for name, _ in model.named_parameters() if name.endswith(".threshold")}
    checks.add("missing keys that are thresholds", len(missing & thresholds), None)
    checks.add("missing keys that are none, and that the stock class does not miss", len(missing - thresholds))
    checks.add("thresholds that are not reported as missing", len(thresholds - missing))
    checks.add("missing keys that the stock class misses too", len(stock["missing_keys"]), None)
    unexpected = set(report["unexpected_keys"]) ^ set(stock["unexpected_keys"])
    checks.add("unexpected keys, where the stock class has others", len(unexpected))
    checks.add("mismatched keys", len(report["mismatched_keys"]))
    return model.eval()


def without_neurons(checks: Checks, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    stock = stock_of(model)
    found = output(with_activations_of(stock, model), inputs)
    what = "identity" if all(neuron.signed for _, neuron in model.neurons()) else "stock activation"
    checks.add(f"{what} at every site, T = 0, float32: difference to stock", largest(found, output(stock, inputs)))
    stock, model = stock.double(), copy.deepcopy(model).double()
    carried = with_activations_of(stock, model).set_timesteps(T, "stepwise")
    difference = largest(output(carried, inputs), output(stock, inputs))
    checks.add(f"{what} at every site, T = {T} stepwise, float64: difference to stock", difference, rounding(model))

    model.config.L = MANY_LEVELS
    set_thresholds(model, inputs, 1.0)
    for name, neuron in model.neurons():
        if not neuron.signed:
            put(stock, name, torch.nn.ReLU())
    difference = largest(output(model, inputs), output(stock, inputs))
    other = "stock" if what == "identity" else "stock with ReLU as every activation"
    checks.add(
        f"threshold of the largest input, L = 2^40, T = 0, float64: difference to {other}",
        difference,
        rounding(model, 1e-9),
    )


def against_copies(checks: Checks, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """In float64: T copies of the stock network with plain neurons; a padded row and the row alone."""
    model = copy.deepcopy(model).double()
    plain = output(naive.network(model, T), naive.copies(T, inputs)).unflatten(0, (T, -1)).mean(0)
    with model.running(T, "stepwise"):
        found = output(model, inputs)
        checks.add(f"T = {T} stepwise, float64: difference to {T} naive copies", largest(found, plain), 1e-11)
        length = int(inputs["attention_mask"][1].sum())
        alone = output(model, {name: value[1:, :length] for name, value in inputs.items()})
        row = found[1:, : alone.shape[1]]
        name = f"T = {T} stepwise, float64: padded row, difference to the row alone"
        checks.add(name, largest(row, alone), rounding(model))
    with model.running(0):
        checks.add(f"for scale: T = {T} stepwise, difference to T = 0", largest(found, output(model, inputs)), None)
    checks.add("for scale: largest", found.abs().max().item(), None)


def levels_are_steps(checks: Checks, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    quantised = output(model, inputs)
    with model.running(L, "layerwise"):
        checks.add(f"T = L = {L} layerwise, float32: difference to T = 0", largest(output(model, inputs), quantised))


def new_process(checks: Checks, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "saved")
        save_file({name: value.contiguous() for name, value in inputs.items()}, place / "inputs.safetensors")
        files = [str(place / name) for name in ("saved", "inputs.safetensors", "found.safetensors")]
        run_outside(["-c", LOAD, files[0], auto_class(model), *files[1:]], place)
        found = load_file(files[2])
    for steps, schedule in MODES:
        with model.running(steps, schedule):
            difference = largest(found[f"{steps} {schedule}"], output(model, inputs))
        checks.add(f"saved, new process, {auto_class(model)}, T = {steps} {schedule}, float32: difference", difference)


def generation(checks: Checks, model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Greedy, two rows padded on the left. In float32 a sum in another order can move a value across a level."""
    limit = 0 if dtype == torch.float64 else None
    model = copy.deepcopy(model).to(dtype)
    for steps, schedule in MODES:
        with model.running(steps, schedule):
            _generation(checks, f"T = {steps} {schedule}, {str(dtype)[6:]}", model, inputs, limit)
    if dtype == torch.float32:
        _generation(checks, "for scale, stock, float32", stock_of(model), inputs, limit)


def _generation(checks: Checks, name: str, model: Any, inputs: dict[str, torch.Tensor], limit: float | None) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": model.config.pad_token_id}
    start, length = inputs["input_ids"].shape[1], int(inputs["attention_mask"][1].sum())
    cached, again = (model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False))
    alone = model.generate(inputs["input_ids"][1:, start - length :], **settings)
    differ = (cached.sequences != again.sequences).sum().item()
    checks.add(f"generated, {name}: tokens of {2 * NEW_TOKENS} that differ without a cache", differ, limit)
    differ = (cached.sequences[1, start:] != alone.sequences[0, length:]).sum().item()
    checks.add(f"generated, {name}: tokens of {NEW_TOKENS} that differ without padding", differ, limit)
    if limit is not None:
        difference = largest(torch.stack(cached.logits), torch.stack(again.logits))
        checks.add(f"generated, {name}: difference of logits without a cache", difference, 1e-5)
        kinds = len(cached.sequences[:, start:].unique())
        checks.add(f"for scale, generated, {name}: different tokens of {2 * NEW_TOKENS}", kinds, None)


def packing(checks: Checks, model: Any, tokenizer: Any) -> None:
    """Two texts in one row of transformers' own collator, and as rows of their own."""
    model = copy.deepcopy(model).double()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    packed = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    packed.pop("labels")
    for steps, schedule in MODES:
        with model.running(steps, schedule):
            found = model(**packed, use_cache=False).logits[0].split([len(row) for row in rows])
            alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
        name = f"packed by DataCollatorWithFlattening, T = {steps} {schedule}, float64: difference to separate rows"
        checks.add(name, max(map(largest, found, alone)), rounding(model))


def as_qwen2(checks: Checks, llama: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The same function with zero biases."""
    settings = llama.config.to_dict()
    for name in (
        "model_type",
        "backbone",
        "auto_map",
        "attention_bias",
        "mlp_bias",
        "architectures",
        "pretraining_tp",
    ):
        settings.pop(name, None)
    qwen2 = modeling_fas.FASQwen2ForCausalLM(FASConfig(backbone="qwen2", **settings)).eval()
    report = qwen2.load_state_dict(llama.state_dict(), strict=False)
    biases = [name for name, _ in qwen2.named_parameters() if name.endswith("_proj.bias")]
    other = {*report.missing_keys} ^ {*biases} | {*report.unexpected_keys}
    checks.add("keys that a FASLlamaForCausalLM lacks or has too much, but for biases", len(other))
    for name in biases:
        qwen2.get_parameter(name).zero_()
    for steps, schedule in MODES:
        with llama.running(steps, schedule), qwen2.running(steps, schedule):
            difference = largest(output(qwen2, inputs), output(llama, inputs))
        checks.add(f"T = {steps} {schedule}, float32: difference to FASLlamaForCausalLM", difference)
    return qwen2


# ---------------------------------------------------------------------------------------------------------------------


def check(name: str, model_class: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
    """All checks of a model."""
    checks = Checks(f"{name}, {model_class.__name__}", rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = batch(tokenizer, "right")
    model = loading(checks, model_class, folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    set_thresholds(model, inputs, 0.999)
    without_neurons(checks, model, inputs)
    checks.add(f"for scale: spikes per neuron and timestep, T = {T} stepwise", spike_rate(model, inputs), None)
    against_copies(checks, model, inputs)
    levels_are_steps(checks, model, inputs)
    new_process(checks, model, inputs)
    if auto_class(model) == "AutoModelForCausalLM":
        packing(checks, model, tokenizer)
        for dtype in (torch.float64, torch.float32):
            generation(checks, model, batch(tokenizer, "left"), dtype)
    if model_class is modeling_fas.FASLlamaForCausalLM:
        checks = Checks(f"{name}, FASQwen2ForCausalLM", rows)
        qwen2 = as_qwen2(checks, model, inputs)
        against_copies(checks, qwen2, inputs)
        new_process(checks, qwen2, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, default=ROOT.parent / "real-models" / "smollm2")
    parser.add_argument("--gpt2", type=Path, default=ROOT.parent / "shared" / "models" / "gpt2-prose-mini")
    parser.add_argument("--only", nargs="+", help="model classes; all by default")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    models = [
        ("all-MiniLM-L6-v2", minilm(), ("FASBertModel", "FASBertForSequenceClassification")),
        ("gpt2-prose-mini", options.gpt2, ("FASGPT2LMHeadModel", "FASGPT2ForSequenceClassification")),
        ("SmolLM2-135M", options.smollm2, ("FASLlamaForCausalLM", "FASLlamaForSequenceClassification")),
    ]
    rows: list[dict[str, Any]] = []
    for name, folder, classes in models:
        for each in classes:
            if not options.only or each in options.only:
                begun = time.perf_counter()
                check(name, getattr(modeling_fas, each), folder, rows)
                print(f"{name}, {each}: {time.perf_counter() - begun:.0f} s", flush=True)
    settings = {"texts": TEXTS, "T": T, "L": L, "threshold_quantile": 0.999, "new_tokens": NEW_TOKENS}
    write_results(options.output, metrics=rows, configuration=settings | {"models": [each[::2] for each in models]})
    above = [row for row in rows if too_much(row)]
    print(markdown_table(above or rows, digits=12))
    sys.exit(bool(above))


if __name__ == "__main__":
    main()
