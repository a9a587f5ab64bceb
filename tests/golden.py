"""The golden vectors of `goldens/` (their README has every convention) and the models they were computed with."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

import modeling_fas
from configuration_fas import FASConfig


FOLDER = Path(__file__).parent / "goldens"
HEADS = {
    "gpt2": modeling_fas.FASGPT2LMHeadModel,
    "mlm": modeling_fas.FASBertForMaskedLM,
    "classify": modeling_fas.FASBertForSequenceClassification,
    "regress": modeling_fas.FASBertForSequenceClassification,
}
LOGITS = {"atol": 2e-5, "rtol": 0}  # goldens/README.md, section 5


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of a golden case."""
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())


def inputs(tensors: dict[str, torch.Tensor], prefix: str = "in.") -> dict[str, torch.Tensor]:
    """The tensors under a prefix, under the names that models call them."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def names(family: str, head: str) -> dict[str, str]:
    """Golden parameter names to those of our models."""
    renamed = {}
    for key, value in load(f"{family}_a.weights")[1]["hf_names"].items():
        key = key.removeprefix("param.")
        if {"regressor": "regress", "classifier": "classify"}.get(key.split(".")[0], head) == head:
            renamed[key] = re.sub(r"\.thresh2?$", ".threshold", value)
    return renamed


def model(family: str, head: str | None = None, **settings):
    """The golden model with a head, in evaluation mode, eager attention, no dropout."""
    head = head or family
    tensors, description = load(f"{family}_a.weights")
    no_dropout = dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        if family == "gpt2"
        else ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        0.0,
    )
    if head in ("classify", "regress"):
        settings["num_labels"] = 3 if head == "classify" else 1
    config = FASConfig(
        backbone=family,
        **description["config"],
        **no_dropout,
        **settings,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    built = HEADS[head](config).eval()
    ours = dict(built.named_parameters())
    with torch.no_grad():
        for golden, name in names(family, head).items():
            if name in ours:
                ours[name].copy_(tensors[f"param.{golden}"])
    return built


def site_names(model) -> dict[str, str]:
    """Our names of the neuron sites by golden name."""
    found = {}
    for name, _ in model.neurons():
        layer = [part for part in name.split(".") if part.isdigit()]
        golden = f"layer.{layer[0]}.mlp" if layer else "pooler" if "pooler" in name else "mlm_head"
        found[golden] = name
    return found


class SiteOutputs:
    """Context manager that keeps what every site emits, under golden names."""

    def __init__(self, model):
        self.model, self.outputs, self.handles = model, {}, []

    def __enter__(self) -> dict[str, torch.Tensor]:
        for golden, name in site_names(self.model).items():
            keep = lambda _module, _args, output, golden=golden: self.outputs.__setitem__(golden, output.detach())  # noqa: E731
            self.handles.append(self.model.get_submodule(name).register_forward_hook(keep))
        return self.outputs

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
