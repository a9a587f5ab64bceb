"""The promises of the project around the models: packaging, targets, pins, and what the Hub files may import."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import modeling_fas


tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Triton comes with PyTorch for CUDA and is asked for on first use only: tests/test_triton.py runs without it.
HUB_FILES = {
    "configuration_fas.py": {"transformers"},
    "events_fas.py": {"torch", "transformers"},
    "kernels_fas.py": {"torch", "triton"},
    "neurons_fas.py": {"transformers", "torch"},
    "sites_fas.py": {"transformers", "torch"},
    "modeling_fas.py": {"transformers", "torch"},
}
PRODUCT = sorted(ROOT / name for name in HUB_FILES) + sorted((ROOT / "training").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(tree: ast.Module) -> set[str]:
    """Absolute module names a file imports; relative ones with their leading dots."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == make_targets()


ROOMS = """
import runpy, sys, warnings
warnings.filterwarnings("error", category=RuntimeWarning, module="runpy")
root, *names = sys.argv[1:]
sys.path.insert(0, root)
for name in names:
    for loaded in [each for each in sys.modules if each.partition(".")[0] == "training"]:
        del sys.modules[loaded]
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"training.{name}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def test_every_room_is_a_command(run_outside):
    commands = (
        "evaluate.report",
        "publish.cards",
        "evaluate",
        "publish",
        "calibrate",
        "run_glue",
        "run_clm",
        "run_mlm",
    )
    assert run_outside(["-c", ROOMS, str(ROOT), *commands]).count("usage:") == len(commands)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_only_what_exists(document):
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE)) <= {
        pair for target in make_targets() for pair in ((target, ""), ("", target))
    }


def test_version_is_the_same_everywhere():
    assert modeling_fas.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_only_what_a_checkpoint_may_rely_on(name):
    siblings = {Path(file).stem for file in HUB_FILES} - {Path(name).stem}
    allowed = HUB_FILES[name] | siblings | {f".{sibling}" for sibling in siblings} | sys.stdlib_module_names
    modules = imported_modules(ast.parse((ROOT / name).read_text()))
    assert {module for module in modules if module not in allowed and module.split(".")[0] not in allowed} == set()


def test_the_model_names_every_file_that_travels_with_it():
    # Of a checkpoint in a folder, transformers 4 copies what modeling_fas.py imports, not what that imports.
    modules = imported_modules(ast.parse((ROOT / "modeling_fas.py").read_text()))
    others = {Path(file).stem for file in HUB_FILES} - {"modeling_fas"}
    assert {module for module in modules if module.startswith(".")} == {f".{other}" for other in others}


def private_names(tree: ast.Module) -> set[str]:
    """Names that begin with an underscore and are imported, or reached through `transformers.`, in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("transformers."):
            names.add(ast.unparse(node))
    private = r"(^|\.)_(?!_\w+__$)"
    return {name for name in names if name.startswith("transformers") and re.search(private, name)}


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_no_private_name_of_transformers(name):
    assert private_names(ast.parse((ROOT / name).read_text())) == set()


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.modeling_utils import _load_state_dict_into_model",
        "def late():\n    from transformers._typing import TransformersLogger",
        "import transformers.models._private.thing",
        "import transformers\ntransformers.modeling_utils._init_weights",
        "import transformers\ntransformers._class_to_module['BertModel']()",
    ],
)
def test_a_private_name_of_transformers_would_be_found(code):
    assert len(private_names(ast.parse(code))) == 1


def test_triton_is_imported_inside_one_function_only():
    tree = ast.parse((ROOT / "kernels_fas.py").read_text())
    importing = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("triton" in name for name in imported_modules(node))
    ]
    top = {
        name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in imported_modules(node)
    }
    assert importing == ["kernels"] and "triton" not in top


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_nothing_is_pickled(path):
    tree = ast.parse(path.read_text())
    modules = {module.split(".")[0] for module in imported_modules(tree)}
    assert modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} == set()
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls & {"torch.save", "torch.load"} == set()


@pytest.mark.parametrize("constraints", sorted(ROOT.glob("constraints*.txt")), ids=relative)
def test_pins_satisfy_the_declared_ranges(constraints):
    pins = [Requirement(line) for line in constraints.read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    declared = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    for requirement in declared:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes {version}"


def test_no_large_file_is_tracked():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.stdout.split("\0") if (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 600_000} == {}
