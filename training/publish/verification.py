"""What is checked before a checkpoint folder leaves this machine: its files, its code, and that it works elsewhere.

Nothing of the folder runs in this process, which may hold a token: two others load it, without token and home.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

import modeling_fas

from . import clean_load
from .code import VerificationError, check_code_files
from .files import check_files, check_weights


# All that a process gets of the environment; the rest may hold secrets.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
ROOT = Path(modeling_fas.__file__).resolve().parent


@dataclass
class Found:
    """What a process found in a folder.

    Attributes:
        logits: By run, from [`clean_load.probe_logits`].
        token_ids: Of a text, if there is a tokenizer.
        faults: Names of weights by what is wrong with them.
        fingerprint: [`training.results.fingerprint`] of the weights in float32; of the project's own classes only.
    """

    logits: dict[str, torch.Tensor]
    token_ids: list[int] | None
    faults: dict[str, list[str]]
    fingerprint: str | None


@dataclass
class Verified:
    """What is known of a folder that passed.

    Attributes:
        fingerprint: `weights_sha256` of its weights.
        difference: Between its code files and the installed ones; empty if they are those of a release.
    """

    fingerprint: str
    difference: str


def verify(
    folder: str | os.PathLike,
    model=None,
    tokenizer_folder: str | Path | None = None,
    allow_changed_code: bool = False,
) -> Verified:
    """Raise unless a folder is safe to publish and loads anywhere with the same results.

    Args:
        folder: The exact folder to be published.
        model: The model in memory whose logits the folder must give; by default what this project's own classes
            load from the folder.
        tokenizer_folder: Where the tokenizer was before it was staged.
        allow_changed_code: Whether the code files may be others than those of a release.

    Raises:
        VerificationError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    check_files(folder)
    difference = check_code_files(folder, allow_changed_code)
    return Verified(check_clean_load(folder, model, tokenizer_folder or folder), difference)


def check_clean_load(folder: Path, model=None, tokenizer_folder: str | Path | None = None) -> str:
    """Raise unless two fresh processes, one without this repository, get the same logits and ids, bit for bit.

    Returns:
        The fingerprint of the weights.
    """
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(_load_apart, folder, tokenizer_folder or folder, ROOT), pool.submit(_load_apart, folder)
        own, clean = [each.result() for each in loading]
    for what, names in clean.faults.items():
        raise VerificationError(
            f"`model.safetensors` must hold all weights of the model, finite, and no others, got {len(names)} {what}: "
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}. Save the model again with `save_pretrained`."
        )
    expected = own.logits if model is None else clean_load.probe_logits(_on_cpu(model))
    if expected.keys() != clean.logits.keys():
        raise VerificationError(
            f"`config.json` must agree with the model in memory, which runs at {', '.join(expected)}; the folder "
            f"runs at {', '.join(clean.logits)}. Save the model again."
        )
    for run, reference in expected.items():
        if not torch.equal(reference, clean.logits[run]):
            gap = (reference.double() - clean.logits[run].double()).abs().max().item()
            raise VerificationError(
                f"`{folder.name}`: loaded by remote code, its logits at {run} differ from the reference by {gap:.3g}. "
                "Its weights or code files are not those of the model: save the model again."
            )
    if own.token_ids != clean.token_ids:
        raise VerificationError(
            f"`tokenizer_config.json`: the published tokenizer must give the ids {own.token_ids}, got "
            f"{clean.token_ids}."
        )
    return str(own.fingerprint)


def weights_sha256(folder: Path) -> str:
    """The fingerprint of the weights in a folder, which this project's own classes load in a process apart."""
    check_weights(folder)
    return str(_load_apart(folder, folder, ROOT).fingerprint)


def _on_cpu(model):
    if model.device.type == "cpu":
        return model
    import copy

    return copy.deepcopy(model).cpu()


def _load_apart(folder: Path, tokenizer_folder: str | Path | None = None, project: Path | None = None) -> Found:
    """Load a folder in a process without token, home and network.

    Args:
        folder: The checkpoint.
        tokenizer_folder: Where the tokenizer is; the checkpoint by default.
        project: Load it with the classes of the project in this folder, and no remote code.
    """
    with tempfile.TemporaryDirectory(prefix="fas-verify-") as scratch:
        home, output = Path(scratch, "home"), Path(scratch, "logits.safetensors")
        home.mkdir()
        paths = [str(Path(each).resolve()) for each in (tokenizer_folder or folder, folder)]
        command = [sys.executable, "-I", clean_load.__file__, str(project or ""), *paths, str(output)]
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | {
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "TMPDIR": scratch,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            where = "with this project's classes" if project else "in a process that does not know this repository"
            raise VerificationError(f"`{folder.name}` must load {where}, got: {lines[-1]}")
        with safe_open(output, framework="pt") as file:
            said = {name: json.loads(value) for name, value in file.metadata().items()}
            return Found({name: file.get_tensor(name) for name in file.keys()}, **said)  # noqa: SIM118
