"""Probe logits of a checkpoint; as a script, all that `verification` wants to know of a folder.

`verification` runs this file by its path in fresh processes that know no token and no home: it may import nothing of
the project, but for what it is told to load the folder with.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


OPTIONS: dict[str, Any] = {"ignore_mismatched_sizes": True}  # `weight_faults` names them
PROBE_TEXT = "The café sold 1,024 spikes – not one was late, it's said."


def auto_class_name(config: dict[str, Any]) -> str:
    """The Auto class that a checkpoint's `config.json` maps its own architecture to."""
    architectures = config.get("architectures") or ["none"]
    for auto_class, reference in (config.get("auto_map") or {}).items():
        if reference.rsplit(".", 1)[-1] == architectures[0]:
            return auto_class
    raise ValueError(
        f"`auto_map` in config.json must name the class of the weights, {architectures[0]!r}, got "
        f"{config.get('auto_map')!r}. Load the model with this project's classes and save it again."
    )


@torch.no_grad()
def probe_logits(model) -> dict[str, torch.Tensor]:
    """Logits on two seeded rows, one of them padded, at T = 0 and in both schedules at the timesteps of the model."""
    config, training = model.config, model.training
    length = min(12, config.max_position_embeddings, config.calib_length or 12)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    runs = [(0, "stepwise")] + [
        (T, schedule)
        for T in sorted({2, config.T, config.calib_T or 2} - {0})
        for schedule in ("stepwise", "layerwise")
        if schedule in getattr(config, "schedules", ("stepwise", "layerwise"))  # code of 0.1 knows both
    ]
    before = config.T, config.schedule
    model.eval()
    try:
        return {
            f"T={T} {schedule}": model.set_timesteps(T, schedule)(input_ids=ids, attention_mask=mask)[0].contiguous()
            for T, schedule in runs
        }
    finally:
        model.set_timesteps(*before).train(training)


def token_ids(folder: str | Path, trust_remote_code: bool = False) -> list[int] | None:
    """Ids of the probe text with the tokenizer of a folder, if it has one."""
    from transformers import AutoTokenizer

    if not Path(folder, "tokenizer_config.json").exists():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return tokenizer(PROBE_TEXT, truncation=True, max_length=64)["input_ids"]


def weight_faults(model, folder: str | Path) -> dict[str, list[str]]:
    """Names of weights by what is wrong with them in the safetensors files of a folder: nothing, if all is well."""
    from safetensors import safe_open

    saved: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = model.state_dict()
    held = {wanted[name].data_ptr() for name in saved if name in wanted}  # tied weights are saved once
    faults = {
        "missing": [name for name, value in wanted.items() if name not in saved and value.data_ptr() not in held],
        "unexpected": [name for name in saved if name not in wanted],
        "of another shape": [name for name in saved if name in wanted and saved[name] != tuple(wanted[name].shape)],
        "not finite": [name for name, value in wanted.items() if not value.isfinite().all()],
    }
    return {what: names for what, names in faults.items() if names}


def load_by_remote_code(folder: str, config: dict[str, Any]):
    """The model of a folder by the code in it alone."""
    import transformers

    auto_class = getattr(transformers, auto_class_name(config))
    model = auto_class.from_pretrained(folder, trust_remote_code=True, **OPTIONS)
    local = [name for name in sys.modules if name == "training" or ("." not in name and name.endswith("_fas"))]
    if local:
        raise RuntimeError(f"the folder needs modules that are not in it: {', '.join(sorted(local))}")
    return model


def load_by_project(folder: str, config: dict[str, Any], project: str):
    """The model of a folder by the classes of the project, and no code of the folder."""
    sys.path.insert(0, project)
    import modeling_fas

    name = config["architectures"][0]
    model_class = getattr(modeling_fas, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, modeling_fas.FASMixin)):
        raise ValueError(f"`architectures` in config.json must name a FAS model, got {name!r}.")
    return model_class.from_pretrained(folder, **OPTIONS)


def main(project: str, tokenizer_folder: str, folder: str, output: str) -> None:
    """Write the logits of a folder, and in the metadata what else `verification.Found` holds.

    Args:
        project: Root of the project whose classes are to load it; empty for remote code.
        tokenizer_folder: Where its tokenizer is.
        folder: The checkpoint.
        output: The safetensors file to write.
    """
    from safetensors.torch import save_file

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    model = load_by_project(folder, config, project) if project else load_by_remote_code(folder, config)
    faults, ids = weight_faults(model, folder), token_ids(tokenizer_folder, trust_remote_code=not project)
    found: dict[str, Any] = {"faults": faults, "token_ids": ids, "fingerprint": None}
    logits = probe_logits(model)
    if project:
        from training.results import fingerprint

        found["fingerprint"] = fingerprint(model.float())
    save_file(logits, output, metadata={name: json.dumps(value) for name, value in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
