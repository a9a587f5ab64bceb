"""What every command does: errors end in their message, and a folder has one run at a time."""

import argparse
import logging
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What data, files, settings and the machine can cause; anything else is a fault of this code, with its traceback.
EXPECTED = (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError, SafetensorError, CalledProcessError)


class UsageError(ValueError):
    """A command line that cannot be read: an unknown flag, a value of another kind. Exit status 2, as of argparse."""


def command_parser(prog: str, description: str, example: str, **settings: Any) -> argparse.ArgumentParser:
    """A parser of flags whose help ends with an example; lines stay as they are written."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def show_messages() -> None:
    """Print what the modules of this package report; nothing of other libraries below a warning."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)


def run_command(
    main: Callable[[list[str]], Any],
    failed: str,
    argv: Sequence[str] | None = None,
    *,
    memory: str = "A smaller batch, shorter texts or a smaller model need less.",
) -> int:
    """Run a command and return its exit status: with a message 1 for an error, 2 for bad flags, 130 for Ctrl-C.

    Args:
        main: Takes the flags, but for `--debug`, which adds the traceback to the message.
        failed: What the message begins with, such as `"Not trained"`.
        argv: Flags; those of this process by default.
        memory: What to do when memory runs out.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    following = [*given[1:], "--"]
    flags = [flag for flag, after in zip(given, following, strict=False) if not _is_switch(flag, after)]
    try:
        main(flags)
    except EXPECTED as error:
        if len(flags) < len(given):
            traceback.print_exc()
        text = f"memory ran out. {memory}" if out_of_memory(error) else str(error)
        if not isinstance(error, (ValueError, OSError, ArithmeticError)) and not out_of_memory(error):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        sys.stderr.write(f"{failed}: {text}\n")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{failed}: interrupted.\n")
        return 130
    return 0


def _is_switch(flag: str, after: str) -> bool:
    """Whether a token is `--debug` alone; with a value it is transformers' own."""
    return flag == "--debug" and after.startswith("--")


def is_first_process() -> bool:
    """Whether no launcher started this process, or as the first: a command for one process leaves all to that one."""
    return os.environ.get("RANK", "0") == "0"


def shell_name() -> str:
    """How the command `fas` is called in the shell that this process came from."""
    beside = Path(sys.executable).with_name("fas")
    if shutil.which("fas"):
        return "fas"
    if not beside.is_file():
        return "python -m training.cli"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in words)


@contextmanager
def only_run(folder: str | Path, writes: bool = True) -> Iterator[None]:
    """Hold the lock of an output folder, which ends with the process, however that ends.

    Args:
        folder: It exists.
        writes: False for the processes of a launch that write nothing: they are part of the run that does.

    Raises:
        ValueError: while another run writes into the folder.
    """
    if not writes:
        yield
        return
    path = Path(folder) / LOCK_FILE
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"`--output_dir` must not be that of a run that is still going on, got {str(folder)!r}, in use by "
            f"{_holder(path)}. Wait for it, or choose another folder."
        ) from error
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # held: who waits for it looks again
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
