"""Run Python where this repository cannot be imported: no working directory, no editable install, no module cache."""

import os
import subprocess
import sys
from pathlib import Path


SITE_PACKAGES = "import os, sysconfig as s; print(os.pathsep.join({s.get_path('purelib'), s.get_path('platlib')}))"


def run_outside(args: list[str], folder: Path, python: str = sys.executable) -> str:
    """
    Run `python *args` in `folder` and return what it printed; raise with its stderr if it fails.

    Only the interpreter's site-packages are importable (`-S` skips the .pth files through which an editable install
    reaches the repository), and remote code is copied to a module cache inside `folder`.
    """
    site_packages = subprocess.run([python, "-c", SITE_PACKAGES], capture_output=True, text=True, check=True).stdout
    env = os.environ | {
        "PYTHONPATH": site_packages.strip(),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [python, "-S", *args], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{python} {args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout
