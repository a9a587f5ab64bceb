"""The three steps of FAS as scripts over small parts: arguments, data, metrics, trainers, evaluation."""

from importlib.util import find_spec
from pathlib import Path


# `python -m training.publish .` in a checkpoint folder would run the code files of that folder instead.
for _name in ("configuration_fas", "events_fas", "kernels_fas", "modeling_fas", "neurons_fas", "sites_fas"):
    _spec = find_spec(_name)
    if _spec is not None and Path(_spec.origin or "").resolve().parent != Path(__file__).resolve().parents[1]:
        raise ImportError(
            f"`{_name}` must be the module beside this package, in {Path(__file__).resolve().parents[1]}, got "
            f"{_spec.origin}. Run the command from a folder that is no checkpoint."
        )
