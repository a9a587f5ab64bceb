"""Run Python where this repository cannot be imported: no working directory, no editable install, no module cache."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


SITE_PACKAGES = "import os, sysconfig as s; print(os.pathsep.join({s.get_path('purelib'), s.get_path('platlib')}))"
RUN = subprocess.run  # itself, whatever a test puts in its place
# Imports what takes every process seconds, and forks one for each line it reads.
FORKING = """
import json, os, runpy, sys, traceback
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers import BertModel, DistilBertModel, GPT2Model, LlamaModel, OPTModel
from transformers import Qwen2Model, Qwen3Model, RobertaModel

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 1
    try:
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        dynamic_module_utils.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", asked["output"] + "-modules")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{asked['output']}-{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = asked["args"]
        if sys.argv[0] == "-c":
            exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


def clean_environment(folder: Path, python: str = sys.executable) -> dict[str, str]:
    """Of a process that sees only the site-packages of an interpreter, and copies remote code to `folder`."""
    site_packages = subprocess.run([python, "-c", SITE_PACKAGES], capture_output=True, text=True, check=True).stdout
    own = {"PYTHONPATH": site_packages.strip(), "HF_MODULES_CACHE": str(folder / "hf_modules"), "HF_HUB_OFFLINE": "1"}
    return os.environ | own


def run_outside(args: list[str], folder: Path, python: str = sys.executable) -> str:
    """
    Run `python *args` in `folder` and return what it printed; raise with its stderr if it fails.

    `-S` skips the .pth files through which an editable install reaches the repository.
    """
    settings: dict[str, Any] = {"cwd": folder, "env": clean_environment(folder, python)}
    return output_of(
        subprocess.run([python, "-S", *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, **settings)
    )


def output_of(done: subprocess.CompletedProcess) -> str:
    if done.returncode:
        raise RuntimeError(f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Outside:
    """A process of [`run_outside`] that has imported torch and transformers, whose forks are processes like it.

    Args:
        folder: For what they print.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock, self.count = folder, threading.Lock(), 0
        command = [sys.executable, "-S", "-c", FORKING]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=clean_environment(folder), **pipes)

    def __call__(self, args: list[str], folder: Path) -> str:
        """As [`run_outside`]."""
        return output_of(self.run([sys.executable, *args], folder, self.environment(folder)))

    def environment(self, folder: Path) -> dict[str, str]:
        return os.environ | {"HF_MODULES_CACHE": str(folder / "hf_modules"), "HF_HUB_OFFLINE": "1"}

    def run(self, command: list[str], cwd: Any = None, env: Any = None, **options: Any) -> subprocess.CompletedProcess:
        """As `subprocess.run`, in whose place a test puts it: of this Python, with code or a script; else itself."""
        if command[0] != sys.executable:
            return RUN(command, cwd=cwd, env=env, **options)
        args = [str(each) for each in command[1:] if each != "-I"]
        with self.lock:
            self.count += 1
            output = self.folder / str(self.count)
            asked = {"args": args, "cwd": str(cwd), "env": dict(env), "output": str(output)}
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
        printed = [Path(f"{output}-{name}").read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, status, *printed)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
