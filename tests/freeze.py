"""Freeze tiny checkpoints of the version at hand under `tests/frozen/`, with the code they were saved by.

Run once, when a version is released: `PYTHONPATH=. python tests/freeze.py`. What stands there is never changed again.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

import backbones
from checkpoints import tiny_checkpoint
from configuration_fas import __version__
from training.publish.clean_load import probe_logits
from training.publish.code import RELEASED, digests
from training.results import write_json


SMALL = {
    "gpt2": {"vocab_size": 32, "n_positions": 16},
    "mlm": {"vocab_size": 32, "max_position_embeddings": 16},
    "classifier": {"vocab_size": 32, "max_position_embeddings": 16},
}
# Since 0.2.0: the other backbones, and spikes into every product.
EVERYWHERE = {"sites": "all", "activation": "stock", "L": None, "T": 4, "schedule": "layerwise"}
MORE = {
    "roberta": (("roberta", "AutoModelForSequenceClassification"), {}),
    "distilbert": (("distilbert", "AutoModelForMaskedLM"), {}),
    "opt": (("opt", "AutoModelForCausalLM"), {}),
    "llama": (("llama", "AutoModelForCausalLM"), {}),
    "qwen2": (("qwen2", "AutoModelForSequenceClassification"), {}),
    "qwen3": (("qwen3", "AutoModelForCausalLM"), {}),
    "gpt2_phase": (("gpt2", "AutoModelForCausalLM"), EVERYWHERE | {"code": "phase"}),
    "llama_first_spike": (("llama", "AutoModelForCausalLM"), EVERYWHERE | {"code": "first_spike", "gain": "token"}),
    "bert_accumulated": (("bert", "AutoModelForSequenceClassification"), {"T": 4, "schedule": "accumulated"}),
}


def freeze(target: Path) -> None:
    for seed, (kind, settings) in enumerate(SMALL.items()):
        folder = target / f"fas_{kind}"
        model = tiny_checkpoint(folder, kind, results=False, seed=seed, **settings)
        save_file(probe_logits(model), folder / "logits.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        keep_code(folder, target)
    for name, (case, settings) in MORE.items():
        model = backbones.model(*case, **settings)
        model.save_pretrained(target / f"fas_{name}")
        save_file(probe_logits(model), target / f"fas_{name}" / "logits.safetensors")
        keep_code(target / f"fas_{name}", target)


def keep_code(folder: Path, target: Path) -> None:
    for code in folder.glob("*.py"):
        shutil.move(code, target / f"{code.name}.txt")  # out of reach of formatters


def released(frozen: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of the code files of every version that was frozen before this one, and is final with it."""
    folders = sorted(path for path in frozen.iterdir() if path.is_dir() and path.name != __version__)
    files = {each.name: {code.stem: code.read_bytes() for code in each.glob("*.py.txt")} for each in folders}
    return {version: digests(each) for version, each in files.items()}


if __name__ == "__main__":
    target = Path(__file__).parent / "frozen" / __version__
    if target.exists() and "--again" not in sys.argv:
        raise SystemExit(f"{target} exists: what was released is not frozen again. (--again, before the release)")
    shutil.rmtree(target, ignore_errors=True)
    freeze(target)
    write_json(RELEASED, released(target.parent))
