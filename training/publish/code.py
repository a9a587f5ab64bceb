"""The code files of a checkpoint: those of a release byte for byte, or changed ones that somebody looked at."""

import ast
import difflib
import hashlib
import importlib.util
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from configuration_fas import __version__


logger = logging.getLogger(__name__)

CODE_FILES = ("configuration_fas.py", "modeling_fas.py")
LATER_CODE_FILES = ("events_fas.py", "kernels_fas.py", "neurons_fas.py", "sites_fas.py")  # since 0.2.0
SIBLINGS = {name.removesuffix(".py") for name in (*CODE_FILES, *LATER_CODE_FILES)}
# SHA-256 of the code files of every final release: written by tests/freeze.py when the next one is frozen.
RELEASED = Path(__file__).with_name("released.json")
# Triton compiles the neuron for a GPU: it comes with PyTorch for CUDA, is tried for, and never required.
ALLOWED_IMPORTS = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "difflib", "enum", "functools",
    "inspect", "itertools", "math", "numbers", "operator", "threading", "torch", "transformers", "triton", "typing",
    "warnings",
}  # fmt: skip
# Names that are found wherever they stand, called or not.
FORBIDDEN_NAMES = {
    "__builtins__", "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "locals",
    "open",
}  # fmt: skip
# Names by which a string becomes an attribute: allowed with a constant that is.
BY_STRING = {"getattr", "hasattr", "setattr"}
# Ways from an allowed package to files, the network, pickles, other processes, or from text to code.
FORBIDDEN_PATHS = (
    "dataclasses.make_dataclass", "functools.singledispatch", "functools.singledispatchmethod",
    "inspect.currentframe", "inspect.get_annotations", "inspect.getmodule", "inspect.signature", "inspect.stack",
    "inspect.trace", "operator.attrgetter", "operator.methodcaller", "torch._C", "torch._dynamo", "torch._inductor",
    "torch.classes", "torch.distributed", "torch.export", "torch.fx", "torch.hub", "torch.jit", "torch.library",
    "torch.load", "torch.multiprocessing", "torch.onnx", "torch.ops.load_library", "torch.package", "torch.profiler",
    "torch.save", "torch.serialization", "torch.storage", "torch.testing", "torch.utils", "transformers.AutoModel",
    "transformers.AutoTokenizer", "transformers.commands", "transformers.dynamic_module_utils",
    "transformers.pipeline", "transformers.pipelines", "transformers.utils.hub", "transformers.utils.import_utils",
    "triton.backends", "triton.compiler", "triton.experimental", "triton.knobs", "triton.runtime", "triton.tools",
    "typing.ForwardRef", "typing.evaluate_forward_ref", "typing.get_type_hints",
)  # fmt: skip
# Modules that allowed ones happen to hold, the interpreter's own doors, and what loads other people's code.
FORBIDDEN_ATTRIBUTES = {
    "__base__", "__bases__", "__builtins__", "__closure__", "__code__", "__dict__", "__getattribute__", "__globals__",
    "__import__", "__loader__", "__mro__", "__reduce__", "__reduce_ex__", "__spec__", "__subclasses__", "ast",
    "builtins", "codecs", "ctypes", "f_back", "f_builtins", "f_globals", "from_config", "from_file", "from_pretrained",
    "gi_frame", "importlib", "io", "linecache", "marshal", "os", "pathlib", "pickle", "push_to_hub", "runpy", "shutil",
    "socket", "subprocess", "sys", "tb_frame", "tempfile", "tofile", "trust_remote_code", "urllib",
}  # fmt: skip
FORBIDDEN_STRINGS = {name for name in FORBIDDEN_ATTRIBUTES if name.startswith("__")} | {"trust_remote_code"}
CODING_LINE = re.compile(rb"^[ \t\f]*#.*?coding[:=]")


class VerificationError(ValueError):
    """A folder must not be published as it is."""


def installed_code() -> dict[str, bytes]:
    """The code files of the version at hand."""
    specs = {name: importlib.util.find_spec(name.removesuffix(".py")) for name in (*CODE_FILES, *LATER_CODE_FILES)}
    return {name: Path(spec.origin).read_bytes() for name, spec in specs.items() if spec and spec.origin}


def read_code(folder: Path) -> dict[str, bytes]:
    """The code files in a folder."""
    return {
        name: (folder / name).read_bytes()
        for name in (*CODE_FILES, *LATER_CODE_FILES)
        if name in CODE_FILES or (folder / name).exists()
    }


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}


def release_of(files: Mapping[str, bytes]) -> str | None:
    """The version whose code files these are, all of them and byte for byte: the installed one, or a final release."""
    if files == installed_code():
        return __version__
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    return next((version for version, known in released.items() if known == digests(files)), None)


def check_code_files(folder: Path, allow_changed: bool = False) -> str:
    """Raise unless the code files of a folder are those of a release; logs and returns how they differ, if they do.

    Args:
        folder: With the code files.
        allow_changed: Let others pass too, if the scan finds nothing in them.

    Raises:
        VerificationError: naming the files that differ, or what was found in one.
    """
    files, own = read_code(folder), installed_code()
    if release_of(files):
        return ""
    differing = [name for name in own if files.get(name) != own[name]]
    if not allow_changed:
        known = " or ".join([*json.loads(RELEASED.read_text(encoding="utf-8")), f"{__version__} (installed)"])
        raise VerificationError(
            f"`{differing[0]}` must be, byte for byte, that of version {known}, with the other code files of "
            f"it, got {', '.join(differing)} of none of them. Load the model with this project's classes and save "
            "it again, or add --allow-changed-code, which shows the difference and says so in the card."
        )
    for name in files:
        check_code(folder / name)
    difference = "".join(_difference(name, own[name], files.get(name, b"")) for name in differing)
    logger.warning("The code files differ from the installed ones:\n%s", difference)
    return difference


def _difference(name: str, own: bytes, other: bytes) -> str:
    before, after = (each.decode("utf-8").splitlines() for each in (own, other))
    found = difflib.unified_diff(before, after, f"{__version__}/{name}", f"folder/{name}", lineterm="")
    return "".join(f"{line}\n" for line in found)


def describe(difference: str) -> str | None:
    """What a card says of a difference that [`check_code_files`] returned."""
    lines = difference.splitlines()
    names = [f"`{line.rpartition('/')[2]}`" for line in lines if line.startswith("+++ folder/")]
    added, removed = (sum(line.startswith(sign) for line in lines) - len(names) for sign in "+-")
    return (
        f"**The code files here are of no release of FAS.** They differ from version {__version__} in "
        f"{', '.join(names)} ({added} lines added, {removed} removed): compare before you run them."
        if difference
        else None
    )


def check_code(path: Path) -> None:
    """Raise for a code file that imports or calls what a model has no use for, and the installed one has not.

    It finds accidents and plain tampering. It is no sandbox: who loads remote code trusts its author.
    """
    known = {what for _, what in _findings(ast.parse(installed_code().get(path.name, b"")))}
    for line, what in _findings(_parse(path)):
        if what not in known:
            raise VerificationError(
                f"`{path.name}`, line {line}: model code may import only torch, transformers, triton, its siblings "
                "and plain parts of the standard library, and touch no file, network or interpreter internals; got "
                f"`{what}`."
            )


def _parse(path: Path) -> ast.AST:
    """The syntax tree of a file in plain UTF-8: what a reader sees is what runs."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
        if any(CODING_LINE.match(line) for line in raw.splitlines()[:2]):
            raise ValueError("a line that names an encoding")
        hidden = {unicodedata.category(each) for each in set(text) - {"\n", "\t"}} & {"Cc", "Cf"}
        if hidden:
            raise ValueError("invisible or control characters")
        return ast.parse(text, filename=str(path))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise VerificationError(f"`{path.name}` must be readable Python in plain UTF-8, got {error}.") from error


def _findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
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
    within = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        for what in _finding(node, within.get(id(node)), names):
            yield getattr(node, "lineno", 0), what


def _finding(node: ast.AST, parent: ast.AST | None, names: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Name):
        called = isinstance(parent, ast.Call) and parent.func is node
        if node.id in FORBIDDEN_NAMES or (node.id in {*BY_STRING, "vars"} and not called):
            yield node.id
        elif _is_module(names.get(node.id, "")) and not isinstance(parent, ast.Attribute):
            yield ast.unparse(parent) if parent is not None else node.id
    elif isinstance(node, ast.Attribute):
        full = f"{_dotted(node.value, names)}.{node.attr}"
        if _forbidden(full) or node.attr in FORBIDDEN_ATTRIBUTES or _leads_out(full):
            yield full
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "vars" or (node.func.id in BY_STRING and not _harmless(node, names)):
            yield ast.unparse(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FORBIDDEN_STRINGS:
        yield repr(node.value)
    elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_STRINGS:
        yield f"{node.arg}="


def _harmless(call: ast.Call, names: Mapping[str, str]) -> bool:
    """Whether `getattr` and its like name their attribute, and it is one that may be reached."""
    if len(call.args) < 2 or not isinstance(call.args[1], ast.Constant):
        return False
    name = str(call.args[1].value)
    full = f"{_dotted(call.args[0], names)}.{name}"
    return not (_forbidden(full) or name in FORBIDDEN_ATTRIBUTES or _leads_out(full))


def _dotted(node: ast.AST, names: Mapping[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{_dotted(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else "…"


def _forbidden(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in FORBIDDEN_PATHS)


def _import_allowed(path: str) -> bool:
    parts = path.split(".")
    allowed = parts[0] in ALLOWED_IMPORTS | SIBLINGS and not FORBIDDEN_ATTRIBUTES & {*parts}
    return allowed and not _forbidden(path) and not _leads_out(path)


def _module(path: str) -> ModuleType | None:
    """The module at a dotted path, among those that are loaded; nothing is imported."""
    found = sys.modules.get(path)
    if found is None and "." in path:
        owner, _, name = path.rpartition(".")
        found = vars(_module(owner) or ModuleType("none")).get(name)
    return found if isinstance(found, ModuleType) else None


def _is_module(path: str) -> bool:
    return path in ALLOWED_IMPORTS or _module(path) is not None


def _leads_out(path: str) -> bool:
    """Whether a dotted path is a module that an allowed one happens to hold."""
    found = _module(path)
    return found is not None and found.__name__.partition(".")[0] not in ALLOWED_IMPORTS | SIBLINGS
