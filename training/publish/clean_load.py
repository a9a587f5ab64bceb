"""Probe logits of a checkpoint; as a script, those of a folder loaded by remote code alone.

`verification` runs this file by its path in a fresh process that knows neither the repository nor a token: it may
import nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


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


def token_ids(folder: str | Path) -> list[int] | None:
    """Ids of the probe text with the tokenizer of a folder, if it has one."""
    from transformers import AutoTokenizer

    if not Path(folder, "tokenizer_config.json").exists():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return tokenizer(PROBE_TEXT, truncation=True, max_length=64)["input_ids"]


def main(folder: str, output: str) -> None:
    import transformers
    from safetensors.torch import save_file

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    auto_class = getattr(transformers, auto_class_name(config))
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    local = {"configuration_fas", "modeling_fas", "neurons_fas", "sites_fas", "training"} & sys.modules.keys()
    if local:
        raise RuntimeError(f"the folder needs modules that are not in it: {', '.join(sorted(local))}")
    save_file(probe_logits(model), output, metadata={"token_ids": json.dumps(token_ids(folder))})


if __name__ == "__main__":
    main(*sys.argv[1:])
