"""Run the benchmarks of speed, one CPU thread, one process to import torch once; write the tables of the two speed.md.

What takes longer is a script of its own: `decoding_compiled`, `spike_driven_compiled`, `distillation_step`,
`conversion_cost`, `densities`, and `stepwise --batch 4`.
"""

import os
import runpy
import time


SCRIPTS = (
    "neuron",
    "products",
    "events",
    "layerwise",
    "decoding",
    "training_step",
    "stepwise",
    "accumulated_speed",
    "spike_driven_speed",
    "scaling",
)


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported
    begin = time.perf_counter()
    for script in SCRIPTS:
        start = time.perf_counter()
        runpy.run_module(f"benchmarks.{script}", run_name="__main__", alter_sys=True)
        now = time.perf_counter()
        print(f"{script}: {now - start:.0f} s, {(now - begin) / 60:.1f} min in all", flush=True)

    from benchmarks import pages, speed_tables

    pages.update(speed_tables.parts())


if __name__ == "__main__":
    main()
