"""Run the notebooks of this folder and keep what they show: `make notebooks`.

    python examples/execute.py [NOTEBOOK ...]

Each runs in a folder of its own, with the data of this one. Where the environment variable SMOLLM2 names a folder with
SmolLM2-135M, it is not taken from PyPI.
"""

import base64
import logging
import os
import shutil
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image


logger = logging.getLogger("execute")

HERE = Path(__file__).resolve().parent
COLOURS = 64  # of a picture
SMOLLM2 = "outputs/stock"  # where training.demo_llm.smollm2("outputs") looks first


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook in a folder; returns it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
    """
    shutil.copytree(HERE / "data", folder / "data")
    if os.environ.get("SMOLLM2") and "smollm2(" in path.read_text(encoding="utf-8"):
        shutil.copytree(os.environ["SMOLLM2"], folder / SMOLLM2)  # not a link, through which a notebook could write
    notebook = nbformat.read(path, as_version=4)
    settings: dict[str, Any] = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    python_path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore:IProgress not found", "PIP_QUIET": "1"}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings)
    client.execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = smaller(output["data"]["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def smaller(picture: str) -> str:
    """A drawing with few colours, PNG in base64, in a fraction of the bytes."""
    buffer = BytesIO()
    with Image.open(BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(COLOURS).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(paths: list[str]) -> None:
    """Run notebooks, all by default, and write their outputs into them."""
    for path in map(Path, paths) if paths else sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="fas-notebook-") as folder:
            nbformat.write(execute(path, Path(folder)), path)
        logger.info("%s: %.0f s", path.name, time.perf_counter() - start)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
