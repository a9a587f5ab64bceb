"""What a model spikes, costs and achieves: measurement, monitors, spike trains, energy, and a report on them."""

from .energy import count_operations, energy_report
from .evaluation import Evaluation
from .measurement import evaluate
from .monitors import SiteErrors, SpikeMonitor
from .recorder import SpikeRecorder


__all__ = [
    "Evaluation",
    "SiteErrors",
    "SpikeMonitor",
    "SpikeRecorder",
    "count_operations",
    "energy_report",
    "evaluate",
]
