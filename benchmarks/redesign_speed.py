"""Speed of this tree beside that of an older one: the same scripts, alone, by turns, medians of what they report.

    git worktree add /tmp/before COMMIT
    PYTHONPATH=. python benchmarks/redesign_speed.py --before /tmp/before [--scripts layerwise decoding] [--turns 3]

Rows of the scripts named take the place of their old ones in benchmarks/results/redesign_speed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training.results import read_results, write_results


HERE = Path(__file__).resolve().parent.parent
OUTPUT = HERE / "benchmarks" / "results" / "redesign_speed.json"
SCRIPTS = ("layerwise", "stepwise", "neuron", "training_step", "decoding")


def measured(tree: Path, script: str) -> dict[str, float]:
    """What a script reports in a tree, by measure."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, str(tree / "benchmarks" / f"{script}.py"), "--output", output]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
        files = [json.loads(path.read_text()) for path in sorted(Path(output).glob("*.json"))]
    return {row["measure"]: row["got"] for each in files for row in each["metrics"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="worktree of the older commit")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "after": HERE}
    kept = read_results(OUTPUT)["metrics"] if OUTPUT.is_file() else []
    for script in args.scripts:
        found: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
        for _ in range(args.turns):
            for name, tree in trees.items():
                for measure, got in measured(tree, script).items():
                    found[name].setdefault(measure, []).append(got)
        rows = []
        for measure in found["before"].keys() & found["after"].keys():
            row = {name: statistics.median(found[name][measure]) for name in trees}
            rows.append(
                {"script": script, "measure": measure, **row, "ratio": row["after"] / row["before"]}
                | {f"{name} (turns)": found[name][measure] for name in trees}
            )
        measures = {row["measure"] for row in rows}
        kept = [row for row in kept if row["measure"] not in measures] + sorted(rows, key=lambda row: row["measure"])
        before = subprocess.check_output(["git", "-C", args.before, "rev-parse", "--short", "HEAD"], text=True).strip()
        write_results(
            OUTPUT,
            metrics=kept,
            configuration={"before": before, "after": "the commit of this file", "turns": args.turns, "threads": 1},
        )
        for row in rows:
            print(f"{row['measure']}: {row['before']:.3f}, {row['after']:.3f}, ratio {row['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
