"""What a model spikes, costs and achieves: measurement, monitors, energy, and a report on them."""

from .energy import count_operations, energy_report
from .measurement import evaluate
from .monitors import SiteErrors, SpikeMonitor


__all__ = ["SiteErrors", "SpikeMonitor", "count_operations", "energy_report", "evaluate"]
