"""Every test runs offline, seeded and on one thread; deprecation notices of transformers fail the test."""

import gc
import io
import logging
import os
import resource
import shutil
from pathlib import Path


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch
from PIL import Image
from transformers import set_seed

from outside import Outside


torch.set_num_threads(1)


def pytest_collection_finish():
    """Garbage collection, of which every training asks for several, need not look at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    """transformers announces most deprecations through its logger; warnings are turned to errors in pyproject.toml."""
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    deprecated = [notice for notice in notices if "deprecated" in notice.lower()]
    assert not deprecated, f"transformers calls this deprecated: {deprecated}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, data and models beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """What starts processes that cannot import this repository."""
    started = Outside(tmp_path_factory.mktemp("outside"))
    yield started
    started.end()


@pytest.fixture
def run_outside(outside, tmp_path):
    """`run_outside(["-c", code, ...])`: a new process in `tmp_path` that cannot import this repository; its output."""
    return lambda args: outside(args, tmp_path)


@pytest.fixture
def full_disk():
    """`full_disk(size)`: no file can grow beyond so many bytes from now on; `full_disk()`: they can again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def undrawn(monkeypatch):
    """Reports make their figures, but not the pixels of these, which take two seconds each time."""
    from training.evaluate import report

    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    monkeypatch.setattr(report, "image", lambda draw, results, dark=False: (draw(results), buffer.getvalue())[1])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny classifier with results, not to be changed."""
    from checkpoints import tiny_checkpoint

    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    tiny_checkpoint(folder, "classifier")
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")
