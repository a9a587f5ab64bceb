"""The public face of FAS: what a notebook needs, from one place."""

from configuration_fas import FASConfig, __version__
from modeling_fas import FASMixin
from training.calibrate.conversion import convert_to_spiking
from training.evaluate import SpikeMonitor, energy_report, evaluate


__all__ = ["FASConfig", "FASMixin", "SpikeMonitor", "__version__", "convert_to_spiking", "energy_report", "evaluate"]
