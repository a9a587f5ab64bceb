"""
Exchange checkpoints between environments: `python tests/matrix.py PYTHON [PYTHON ...]`.

Each interpreter saves tiny random models with the logits they give; each interpreter then loads every one of them by
remote code, in a process that cannot import this repository, and must reproduce the logits in every mode. Weights and
logits are float64: in float32 a rounding difference between versions can flip a quantisation level.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from outside import run_outside


MODES = [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")]
TOLERANCE = 1e-9
COMPARED = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")


def build_models():
    import backbones

    models = {f"{case[1]}-{case[0]}": backbones.model(*case) for case in backbones.HEADS if case[1] in COMPARED}
    rope = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    for backbone, table in backbones.BACKBONES.items():
        if table.positions is None:
            made = backbones.model(backbone, "AutoModelForCausalLM", **rope)
            models[f"AutoModelForCausalLM-{backbone}-rope"] = made
    models["AutoModelForCausalLM-calibrated"] = backbones.model("gpt2", "AutoModelForCausalLM").begin_calibration(T=4)
    return models


def all_logits(model):
    import torch

    input_ids = torch.arange(24).view(3, 8) * 7 % 61
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    logits = {}
    for timesteps, schedule in MODES:
        model.set_timesteps(timesteps, schedule=schedule)
        with torch.no_grad():
            output = model(input_ids=input_ids, attention_mask=attention_mask)
        logits[f"{timesteps}-{schedule}"] = output.logits.contiguous()
    return logits


def save(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for name, model in build_models().items():
        model = model.double().eval()
        model.save_pretrained(folder / name)
        logits = all_logits(model)
        if torch.equal(logits["0-stepwise"], logits["4-stepwise"]):
            raise RuntimeError(f"{name}: spiking changes nothing, so that this comparison would see nothing")
        save_file(logits, folder / f"{name}.safetensors")


def load(folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith("Auto")):
        auto_class = getattr(transformers, checkpoint.name.split("-")[0])
        model = auto_class.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float64).eval()
        if not type(model).__module__.startswith("transformers_modules.") or "modeling_fas" in sys.modules:
            raise RuntimeError(f"{checkpoint.name} was loaded by installed code: {type(model).__module__}")
        expected = load_file(folder / f"{checkpoint.name}.safetensors")
        difference = max((value - expected[mode]).abs().max().item() for mode, value in all_logits(model).items())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{checkpoint.name}: logits differ by {difference:.3g}, allowed {TOLERANCE}")
        print(f"{checkpoint.name:40} largest difference {difference:.1e}")


def main(pythons: list[str]) -> None:
    script = Path(__file__).resolve()
    repository = str(script.parents[1])
    version = ["-c", "import transformers; print('transformers', transformers.__version__)"]
    for writer in pythons:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [writer, str(script), "save", folder], check=True, env=os.environ | {"PYTHONPATH": repository}
            )
            for reader in pythons:
                names = [subprocess.check_output([p, *version], text=True).strip() for p in (writer, reader)]
                print(f"saved by {names[0]}, loaded by {names[1]}")
                print(run_outside([str(script), "load", folder], Path(folder), str(Path(reader).absolute())))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["save", folder]:
            save(Path(folder))
        case ["load", folder]:
            load(Path(folder))
        case []:
            sys.exit(__doc__)
        case pythons:
            main(pythons)
