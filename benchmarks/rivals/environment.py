"""A virtual environment for each rival, made where the command first needs it."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from .._calibration_tasks import CACHE


FOLDER = CACHE / "rivals"


def python_of(name: str, packages: Sequence[str], beside_ours: bool) -> Path:
    """The interpreter of a rival's environment.

    `beside_ours` adds the packages of this environment, and takes of the rival's own no dependencies but those listed.
    An environment that is there with other packages is made anew.
    """
    folder = FOLDER / name
    python, listed = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages) + "\n"
    if not listed.is_file() or listed.read_text() != wanted:
        print(f"Installing {', '.join(packages)} in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        if beside_ours:
            own = subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            )
            (Path(own.strip()) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        options = ["--no-deps"] if beside_ours else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, *packages], check=True)
        listed.write_text(wanted)
    return python


def enter(name: str, packages: Sequence[str], module: str) -> None:
    """Go on in the rival's environment, with the same arguments; returns at once where it is that one."""
    python = python_of(name, packages, beside_ours=True)
    if Path(sys.prefix).resolve() != python.parents[1].resolve():
        os.execv(python, [str(python), "-m", module, *sys.argv[1:]])
