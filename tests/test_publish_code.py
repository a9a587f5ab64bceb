"""Code files of a checkpoint: those of a release, or what the scan finds in others."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import freeze
import modeling_fas
from configuration_fas import __version__
from training.publish import code
from training.publish.code import (
    CODE_FILES,
    LATER_CODE_FILES,
    RELEASED,
    VerificationError,
    check_code,
    check_code_files,
    describe,
    installed_code,
    read_code,
    release_of,
)


FROZEN = Path(__file__).parent / "frozen"
PASSED_IN_0_1 = {
    "from-import": "from torch import os",
    "from-import-renamed": "from transformers.modeling_utils import sys as s",
    "from-import-unloaded": "from transformers.models.fuyu.modeling_fuyu import os",
    "remote-code-flag": "object(trust_remote_code=True)",
    "builtins": "from inspect import builtins as b",
    "joined-strings": 'import torch\ngetattr(torch, "hub").__dict__["o" + "s"]',
    "renamed-module": "import torch\nt = torch\nt.load('x')",
    "attrgetter": "import operator, torch\noperator.attrgetter('hub.os.system')(torch)('true')",
    "type-hints": "import typing\nclass A:\n    x: '__import__(\"os\")'\ntyping.get_type_hints(A)",
    "remote-code": "from transformers import AutoModel\nAutoModel.from_pretrained('evil/x', trust_remote_code=True)",
    "remote-code-in-a-mapping": "f = object()\nf(**{'trust_remote_code': True})",
    "coding-line": "# -*- coding: raw_unicode_escape -*-\n# \\u000aimport os",
    "renamed-submodule": "from torch import nn\nn = nn",
    "module-in-a-list": "import torch\n[torch][0].load('x')",
    "module-as-argument": "import torch\n(lambda t: t.load('x'))(torch)",
    "getattr-renamed": "g = getattr\n",
    "getattr-computed": "import torch\ngetattr(torch.nn, 'fun' + 'ctional')",
    "getattr-hub": "import torch\ngetattr(torch, 'hub')",
    "vars": "import torch\nvars(torch.nn)",
    "held-module": "import dataclasses\ndataclasses.types",
    "make-dataclass": "import dataclasses\ndataclasses.make_dataclass('A', [])",
    "frames": "import inspect\ninspect.currentframe().f_back",
    "utils": "from transformers.utils import import_utils",
    "invisible": "x = 1  # \u202e hidden",
    "carriage-return": "# comment\rimport os",
    "byte-order-mark": "\ufeffx = 1",
    "null": "x = 1\0",
    "deep": "x = " + "(" * 500 + ")" * 500,
}
ALWAYS_FOUND = [
    "import os",
    "import torch, socket",
    "from subprocess import run",
    "import requests as torch",
    "from ..secrets import key",
    "from .helpers import key",
    "from torch.hub import load",
    "from torch import load",
    "import torch.utils.cpp_extension",
    "import torch as t\nt.load('x')",
    "import torch\ntorch.os.system('true')",
    "open('/etc/passwd')",
    "eval('1')",
    "__import__('os')",
    "().__class__.__base__.__subclasses__()",
    "getattr((), '__subclasses__')",
    "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
    "from torch import *",
    "from triton.runtime import cache",
    "import triton\ntriton.tools.disasm",
    "def half(",
]


@pytest.mark.parametrize("text", [*PASSED_IN_0_1.values(), *ALWAYS_FOUND], ids=[*PASSED_IN_0_1, *ALWAYS_FOUND])
def test_the_scan_finds_code_that_reaches_beyond_the_model(text, tmp_path):
    path = tmp_path / "modeling_fas.py"
    path.write_text(f"{text}\n", encoding="utf-8", newline="")
    with pytest.raises(VerificationError, match=r"`modeling_fas\.py`"):
        check_code(path)


def test_the_scan_refuses_what_is_no_utf_8(tmp_path):
    (tmp_path / "modeling_fas.py").write_bytes("é = 1\n".encode("latin-1"))
    with pytest.raises(VerificationError, match="must be readable Python in plain UTF-8"):
        check_code(tmp_path / "modeling_fas.py")


@pytest.mark.parametrize("name", [*CODE_FILES, *LATER_CODE_FILES])
def test_the_scan_passes_a_harmless_change_of_the_installed_code(name, tmp_path):
    (tmp_path / name).write_bytes(installed_code()[name] + b"\nMINE = [each for each in range(3)]\n")
    check_code(tmp_path / name)


def test_the_code_of_a_checkpoint_saved_now_is_that_of_the_installed_version(checkpoint):
    assert release_of(read_code(checkpoint)) == __version__
    assert check_code_files(checkpoint) == ""


def released_folder(version, target):
    target.mkdir()
    for path in (FROZEN / version).glob("*.py.txt"):
        shutil.copy(path, target / path.stem)
    return target


@pytest.mark.parametrize("version", json.loads(RELEASED.read_text()))
def test_the_code_of_a_release_is_known(version, tmp_path):
    folder = released_folder(version, tmp_path / version)
    assert release_of(read_code(folder)) == version
    with (folder / "modeling_fas.py").open("a") as file:
        file.write("\n")
    with pytest.raises(VerificationError, match=f"`.*_fas.py` must be, byte for byte, that of version {version}"):
        check_code_files(folder)


def test_files_of_two_versions_are_no_release(tmp_path):
    folder = released_folder("0.1.0", tmp_path / "mixed")
    (folder / "modeling_fas.py").write_bytes(installed_code()["modeling_fas.py"])
    assert release_of(read_code(folder)) is None


def test_every_final_release_is_in_the_table_and_no_other():
    """`tests/freeze.py` writes it; the version at hand is compared with the files themselves."""
    assert json.loads(RELEASED.read_text()) == freeze.released(FROZEN)
    assert __version__ not in json.loads(RELEASED.read_text())


def test_a_difference_is_shown_and_described(folder, caplog):
    path = folder / "modeling_fas.py"
    path.write_text(path.read_text().replace("import torch\n", "import torch\n\n\nMINE = 3\n", 1))
    difference = check_code_files(folder, allow_changed=True)
    assert "+MINE = 3\n" in difference and difference in caplog.text
    assert "`modeling_fas.py` (3 lines added, 0 removed)" in str(describe(difference))
    assert describe("") is None


def test_every_code_file_is_listed_where_it_must_be():
    root = Path(modeling_fas.__file__).parent
    assert {path.stem for path in root.glob("*_fas.py")} == code.SIBLINGS
    packaged = re.search(r"^py-modules = (.*)$", (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert {*json.loads(packaged[1])} == code.SIBLINGS | {"fas"}


@pytest.mark.parametrize("name", sorted(code.SIBLINGS))
def test_a_command_started_in_a_checkpoint_folder_does_not_run_its_code(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("print('ran')\n")
    root = Path(modeling_fas.__file__).parent
    run = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; import training.publish"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "ran" not in done.stdout
    assert f"`{name}` must be the module beside this package" in done.stderr.splitlines()[-1]


def test_nothing_is_imported_by_looking_at_names():
    before = set(sys.modules)
    assert not code._leads_out("torch.nn") and code._leads_out("dataclasses.types")
    assert code._module("transformers.models.fuyu.modeling_fuyu.os") is None
    assert set(sys.modules) == before
