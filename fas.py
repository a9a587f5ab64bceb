"""The public face of FAS: what a notebook needs, from one place.

```python
import fas

model = fas.convert_to_spiking("openai-community/gpt2", texts)
fas.evaluate(model, more_texts).report("report")
```

Names are imported when they are first used, so that `import fas` itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from configuration_fas import FASConfig, __version__
    from modeling_fas import FASMixin
    from training.calibrate.conversion import convert_to_spiking
    from training.calibrate.texts import Calibration, calibrate
    from training.evaluate.energy import Energy, energy, energy_report
    from training.evaluate.evaluation import Evaluation
    from training.evaluate.measurement import evaluate
    from training.evaluate.monitors import SpikeMonitor
    from training.evaluate.recorder import SpikeRecorder

__all__ = [
    "Calibration",
    "Energy",
    "Evaluation",
    "FASConfig",
    "FASMixin",
    "SpikeMonitor",
    "SpikeRecorder",
    "__version__",
    "calibrate",
    "convert_to_spiking",
    "energy",
    "energy_report",
    "evaluate",
]

_MODULES = {
    "configuration_fas": ("FASConfig", "__version__"),
    "modeling_fas": ("FASMixin",),
    "training.calibrate.conversion": ("convert_to_spiking",),
    "training.calibrate.texts": ("Calibration", "calibrate"),
    "training.evaluate.energy": ("Energy", "energy", "energy_report"),
    "training.evaluate.evaluation": ("Evaluation",),
    "training.evaluate.measurement": ("evaluate",),
    "training.evaluate.monitors": ("SpikeMonitor",),
    "training.evaluate.recorder": ("SpikeRecorder",),
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'fas' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
