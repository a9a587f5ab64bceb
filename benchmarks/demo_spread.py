"""How far runs of the demo differ: seeds 0 and 1, with one thread and two.

    python -m benchmarks.demo_spread [--seeds 0 1] [--threads 1 2] [--output_dir outputs/demo-spread]

writes `benchmarks/results/demo.json`, whose range stands in docs/results.md. Runs that are finished are not run again.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.pages import RESULTS, ROOT
from training.convert import SUMMARY_FILE
from training.demo import SPIKE_DRIVEN
from training.results import flat, read_results, write_results


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-spread"), help="default: %(default)s")
    return parser.parse_args(argv)


def run(seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """One run of the demo, or what it left earlier; returns its rows as cells."""
    path = folder / SUMMARY_FILE
    rows = read_results(path)["metrics"]["rows"] if path.is_file() else [{"step": None}]
    if rows[-1]["step"] != SPIKE_DRIVEN:  # the last one
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "training.cli", "demo", "--seed", str(seed), "--output_dir", str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        rows = read_results(path)["metrics"]["rows"]
    return {"seed": seed, "threads": threads, "rows": [flat(row) for row in rows]}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo for every seed and number of threads, and write the results file."""
    args = parse_arguments(argv)
    folder = args.output_dir.resolve()
    runs = [run(seed, threads, folder / f"{seed}-{threads}") for seed, threads in product(args.seeds, args.threads)]
    configuration = {"seeds": args.seeds, "threads": args.threads}
    command = ["python", "-m", "benchmarks.demo_spread"]
    write_results(RESULTS / "demo.json", metrics={"runs": runs}, configuration=configuration, command=command)


if __name__ == "__main__":
    main()
