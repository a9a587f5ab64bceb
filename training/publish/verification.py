"""What is checked before a checkpoint folder leaves this machine: its code, its files, and that it works elsewhere."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..results import fingerprint
from . import clean_load


CODE_FILES = ("configuration_fas.py", "modeling_fas.py")
LATER_CODE_FILES = ("neurons_fas.py", "sites_fas.py")  # since 0.2.0
# Where a report of `training.evaluate` belongs, inside the checkpoint folder.
REPORT = "report/results.json"
SIBLINGS = {name.removesuffix(".py") for name in (*CODE_FILES, *LATER_CODE_FILES)}
# Triton compiles the neuron for a GPU: it comes with PyTorch for CUDA, is tried for, and never required.
ALLOWED_IMPORTS = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "difflib", "enum", "functools",
    "inspect", "itertools", "math", "numbers", "operator", "threading", "torch", "transformers", "triton", "typing",
    "warnings",
}  # fmt: skip
FORBIDDEN_NAMES = {
    "__builtins__", "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "locals",
    "open",
}  # fmt: skip
# Ways from an allowed package to files, the network, pickles or other processes.
FORBIDDEN_PATHS = (
    "torch.classes", "torch.distributed", "torch.hub", "torch.jit", "torch.load", "torch.multiprocessing",
    "torch.ops.load_library", "torch.package", "torch.save", "torch.serialization", "torch.utils.cpp_extension",
    "torch.utils.model_zoo", "transformers.dynamic_module_utils", "transformers.utils.hub",
    "transformers.utils.import_utils", "triton.backends", "triton.compiler", "triton.experimental", "triton.knobs",
    "triton.runtime", "triton.tools",
)  # fmt: skip
# Modules that allowed ones happen to hold, and the interpreter's own doors.
FORBIDDEN_ATTRIBUTES = {
    "__bases__", "__builtins__", "__code__", "__globals__", "__loader__", "__mro__", "__spec__", "__subclasses__",
    "builtins", "ctypes", "from_file", "importlib", "os", "pathlib", "pickle", "shutil", "socket", "subprocess",
    "sys", "tofile",
}  # fmt: skip
FORBIDDEN_STRINGS = {name for name in FORBIDDEN_ATTRIBUTES if name.startswith("__")}
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|^HF_|^HUGGING|^PYTHON|^TRANSFORMERS", re.IGNORECASE)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")


class VerificationError(ValueError):
    """A folder must not be published as it is."""


def verify(folder: str | os.PathLike, model=None, tokenizer_folder: str | Path | None = None) -> None:
    """Raise unless a folder is safe to publish and loads anywhere with the same results.

    Args:
        folder: The exact folder to be published.
        model: The model in memory whose logits the folder must give; by default what this project's own classes
            load from the folder.
        tokenizer_folder: Where the tokenizer was before it was staged.

    Raises:
        VerificationError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    check_files(folder)
    for name in (*CODE_FILES, *LATER_CODE_FILES):
        if name in CODE_FILES or (folder / name).exists():
            check_code(folder / name)
    check_clean_load(folder, model, folder if tokenizer_folder is None else tokenizer_folder)


def check_code(path: Path) -> None:
    """Raise for a code file that imports or calls what a model has no use for.

    It finds accidents and plain tampering. It is no sandbox: who loads remote code trusts its author.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise VerificationError(f"`{path.name}` must be readable Python, got {error}.") from error
    for line, what in _findings(tree):
        raise VerificationError(
            f"`{path.name}`, line {line}: model code may import only torch, transformers, triton, its sibling and "
            f"plain parts of the standard library, and touch no file, network or interpreter internals; got `{what}`."
        )


def _findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if not _import_allowed(alias.name):
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level > 1 or (node.level == 1 and module not in SIBLINGS):
                yield node.lineno, f"from {'.' * node.level}{module} import …"
            for alias in node.names:
                full = f"{module}.{alias.name}"
                names[alias.asname or alias.name] = full
                if node.level == 0 and (alias.name == "*" or not _import_allowed(full)):
                    yield node.lineno, f"from {module} import {alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            owner = _dotted(node.value, names)
            full = f"{owner}.{node.attr}"
            if _forbidden(full) or node.attr in FORBIDDEN_ATTRIBUTES:
                yield node.lineno, full
        elif isinstance(node, ast.Constant) and node.value in FORBIDDEN_STRINGS:
            yield node.lineno, repr(node.value)


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{_dotted(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else "…"


def _forbidden(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in FORBIDDEN_PATHS)


def _import_allowed(path: str) -> bool:
    return path.partition(".")[0] in ALLOWED_IMPORTS | SIBLINGS and not _forbidden(path)


def check_files(folder: Path) -> None:
    """Raise for pickles, links, names that leave the folder, foreign code references, and tokens in text files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise VerificationError(f"`{name}` must be a file of its own, got a link to {os.readlink(path)!r}.")
        if path.is_file():
            _check_file(path, name)
    for name in ("config.json", *CODE_FILES):
        if not (folder / name).is_file():
            raise VerificationError(
                f"`{name}` must be in {str(folder)!r}, which has none. Load the model with this project's classes "
                "and save it with `save_pretrained`, which writes the code files too."
            )
    config = read_json(folder / "config.json")
    for auto_class, reference in (config.get("auto_map") or {}).items():
        if str(reference).partition(".")[0] not in SIBLINGS:
            raise VerificationError(
                f"`auto_map` in config.json must point into the folder's own code files, got {reference!r} for "
                f"{auto_class}: who loads this checkpoint would run code from elsewhere."
            )
    weights = set(folder.glob("*.safetensors"))
    if not weights:
        raise VerificationError(
            f"`folder` must hold weights as safetensors, got none in {str(folder)!r}. Save the model with "
            "`save_pretrained`."
        )
    for index in folder.glob("*.index.json"):
        for name in set(read_json(index).get("weight_map", {}).values()):
            if not is_plain_name(name) or folder / name not in weights:
                raise VerificationError(
                    f"`weight_map` in {index.name} must name safetensors files of the folder, got {name!r}."
                )


def _check_file(path: Path, name: str) -> None:
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"`{name}` must be a whole safetensors file, got {error}.") from error
    elif path.suffix in (".html", ".jinja", ".json", ".md", ".py", ".txt"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (len(own := own_token()) >= 8 and own in text):
            raise VerificationError(
                f"`{name}` must not hold an access token, got one. Remove it there, and revoke it at "
                "https://huggingface.co/settings/tokens if the file was ever shared."
            )


def own_token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""


def refuse_pickle(path: Path) -> None:
    """Raise for a pickle, known by its name or its first bytes (the zip archives of torch included)."""
    with path.open("rb") as file:
        head = file.read(4)
    pickled = path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
    if pickled or head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        raise VerificationError(
            f"`{path.name}` must not be a pickle, which can run code when it is loaded. Save the weights as "
            "safetensors with `model.save_pretrained(folder)`, and delete the old file."
        )


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file name with no way out of its folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and not re.search(r"[\\:\x00-\x1f]", name)
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"`{path.name}` must be readable JSON, got {error}.") from error
    if not isinstance(content, dict):
        raise VerificationError(f"`{path.name}` must hold a JSON object, got {type(content).__name__}.")
    return content


def check_report(folder: Path) -> None:
    """Raise for a report in the folder that was measured on other weights than those in the folder."""
    path = folder / REPORT
    if not path.is_file():
        return
    configuration = read_json(path).get("configuration")
    measured = configuration.get("weights_sha256") if isinstance(configuration, dict) else None
    found = fingerprint(_load_here(folder, dtype="float32"))
    if measured != found:
        raise VerificationError(
            f"`{REPORT}` must be measured on the weights in {str(folder)!r}, which have the `weights_sha256` {found}, "
            f"got a report of {measured or 'weights it does not name'}. Measure these with `python -m "
            f"training.evaluate {folder} … --output_dir {path.parent} --overwrite_output_dir`, or remove that folder."
        )


def _load_here(folder: Path, **settings: Any) -> Any:
    """What this project's own classes load from a folder."""
    import modeling_fas

    architecture = (read_json(folder / "config.json").get("architectures") or ["none"])[0]
    model_class = getattr(modeling_fas, architecture, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise VerificationError(f"`architectures` in config.json must name a FAS model, got {architecture!r}.")
    return model_class.from_pretrained(folder, **settings)


def check_clean_load(folder: Path, model=None, tokenizer_folder: str | Path | None = None) -> None:
    """Raise unless a fresh process without this repository gets the reference logits and token ids, bit for bit."""
    if model is None:
        model = _load_here(folder)
    elif model.device.type != "cpu":
        import copy

        model = copy.deepcopy(model).cpu()
    expected = clean_load.probe_logits(model)
    with tempfile.TemporaryDirectory(prefix="fas-verify-") as scratch:
        logits, ids = _load_elsewhere(folder, Path(scratch))
    if expected.keys() != logits.keys():
        raise VerificationError(
            f"`config.json` must agree with the model in memory, which runs at {', '.join(expected)}; the folder "
            f"runs at {', '.join(logits)}. Save the model again."
        )
    for run, reference in expected.items():
        if not torch.equal(reference, logits[run]):
            gap = (reference.double() - logits[run].double()).abs().max().item()
            raise VerificationError(
                f"`{folder.name}`: loaded by remote code, its logits at {run} differ from the reference by {gap:.3g}. "
                "Its weights or code files are not those of the model: save the model again."
            )
    if tokenizer_folder is not None and ids != (reference_ids := clean_load.token_ids(tokenizer_folder)):
        raise VerificationError(
            f"`tokenizer_config.json`: the published tokenizer must give the ids {reference_ids}, got {ids}."
        )


def _load_elsewhere(folder: Path, scratch: Path) -> tuple[dict[str, torch.Tensor], list[int] | None]:
    output = scratch / "logits.safetensors"
    command = [sys.executable, "-I", clean_load.__file__, str(folder.resolve()), str(output)]
    environment = {key: value for key, value in os.environ.items() if not SECRET_VARIABLE.search(key)} | {
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
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
        raise VerificationError(
            f"`{folder.name}` must load in a process that does not know this repository, got: {lines[-1]}"
        )
    with safe_open(output, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["token_ids"])
