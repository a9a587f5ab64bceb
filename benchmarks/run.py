"""Run every benchmark in a process of its own, with one CPU thread, then write the table of `docs/speed.md`."""

import os
import subprocess
import sys


SCRIPTS = ("neuron", "products", "layerwise", "decoding", "training_step", "stepwise", "scaling")


def main() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for script in SCRIPTS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *sys.argv[1:]], check=True, env=environment)
    subprocess.run([sys.executable, "-m", "benchmarks.table"], check=True, env=environment)


if __name__ == "__main__":
    main()
