"""Every generated part of README.md and docs/: `python -m benchmarks.tables [--check]`, as `make tables` does."""

import sys
from collections.abc import Iterator

from benchmarks import (
    backbone_tables,
    calibration_tables,
    curves,
    drawings,
    energy_tables,
    glue_tables,
    language_tables,
    readme,
    rivals_tables,
    sizing_tables,
    speed_tables,
    spike_tables,
    training_tables,
)
from benchmarks.pages import Part, command


GENERATORS = (
    readme,
    backbone_tables,
    speed_tables,
    energy_tables,
    calibration_tables,
    training_tables,
    spike_tables,
    glue_tables,
    language_tables,
    rivals_tables,
    sizing_tables,
    drawings,
    curves,
)


def parts() -> Iterator[Part]:
    for generator in GENERATORS:
        yield from generator.parts()


if __name__ == "__main__":
    sys.exit(command(parts))
