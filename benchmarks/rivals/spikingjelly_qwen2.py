"""SpikingJelly 2.0's Qwen2 recipe and our training-free conversion of one model, on the same text.

    pip install spikingjelly==2.0.0                              (beside this project, in an environment of its own)
    SMOLLM2=FOLDER python -m benchmarks.rivals.spikingjelly_qwen2 [--windows 4] [--timesteps 8]

The recipe takes Qwen2 only. SmolLM2 becomes one that computes the same function: the biases that Qwen2 adds are zero.
"""

import argparse
import time
from importlib import metadata
from pathlib import Path

import torch
from spikingjelly.activation_based import ann2snn, functional
from spikingjelly.activation_based.ann2snn.recipes.qwen2 import calibrate_qwen2_snn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from benchmarks.spike_driven import MODELS, SHARED, judge, windows
from training.results import commit, markdown_table, write_results


OUTPUT = Path(__file__).resolve().parents[1] / "results" / "rivals" / "spikingjelly_qwen2.json"
QUANTILE = 0.999


def as_qwen2(path: Path) -> Qwen2ForCausalLM:
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


@torch.inference_mode()
def perplexity(model, rows: torch.Tensor) -> float:
    losses = []
    for row in rows:
        functional.reset_net(model)
        logits = model(input_ids=row[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]))
    return torch.stack(losses).mean().exp().item()


def spikingjelly(stock: Qwen2ForCausalLM, T: int, rows: torch.Tensor, calibration: torch.Tensor) -> dict[str, float]:
    """Convert with as many levels as timesteps, at most 16, and measure."""
    settings = ann2snn.Qwen2SNNConfig(time_steps=T, calibration_levels=min(T, 16), calibration_quantile=QUANTILE)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    recipe = ann2snn.Qwen2SNNRecipe(calibrate_qwen2_snn(stock, batches, settings), settings)
    model = ann2snn.ModuleConverter(recipe=recipe).convert(stock)
    start = time.process_time()
    quality = perplexity(model, rows)
    seconds = time.process_time() - start
    model.set_collect_statistics(True)
    perplexity(model, rows[:1])
    counts = [encoder.statistics() for encoder in model.signed_encoders()]
    spikes = sum(each["positive_spike_count"] + each["negative_spike_count"] for each in counts)
    values = sum(each["spike_value_count"] for each in counts)
    return {"code": "SpikingJelly", "T": T, "perplexity": quality, "spikes": T * spikes / values, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[8])
    args = parser.parse_args()
    logging.set_verbosity_error()
    path, judged, _, length = MODELS["smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = windows(tokenizer, SHARED / judged, length, args.windows)
    calibration = windows(tokenizer, SHARED / judged, length, 768 // length, args.windows + 20)
    stock = as_qwen2(path)
    start = time.process_time()
    done = [{"code": "stock", "T": 0, "perplexity": perplexity(stock, rows), "seconds": time.process_time() - start}]
    ours = {"sites": "all", "code": "phase", "T": 7}
    done.append(ours | judge(path, ours, rows, calibration))
    configuration = {
        "spikingjelly": metadata.version("spikingjelly"),
        "model": path.name,
        "judged": judged,
        "windows": len(rows),
        "length": length,
        "calibration": f"{judged}, {len(calibration)} windows from number {args.windows + 20} on",
        "levels": "T, at most 16",
        "quantile": QUANTILE,
    }
    for T in args.timesteps:
        done.append(spikingjelly(stock, T, rows, calibration) | {"commit": commit()})
        write_results(OUTPUT, metrics=done, configuration=configuration)
        print(markdown_table(done), flush=True)


if __name__ == "__main__":
    main()
