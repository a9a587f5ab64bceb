"""How many neurons fire on real text: what event-driven products live on.

    SMOLLM2=FOLDER python -m benchmarks.densities

Mean over the sites of a kind of the share of what they emit that is not 0, on validation text. Trained FAS models are
those of `benchmarks/accumulated.py`; SmolLM2 is converted without training.
"""

import statistics

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.common import arguments, report
from benchmarks.spike_driven import MODELS, SHARED, windows
from fas import convert_to_spiking

from ._calibration_tasks import Prose
from .trained_out import TASKS


MODEL, TEXT, _, LENGTH = MODELS["smollm2"]
RUNS = ((4, "layerwise"), (8, "layerwise"), (4, "stepwise"), (4, "accumulated"))
SETTINGS = (
    {"sites": "mlp", "code": "rate", "T": 8},
    {"sites": "all", "code": "phase", "T": 5},
    {"sites": "all", "code": "first_spike", "T": 16, "code_base": 1.2},
)


@torch.no_grad()
def shares(model: torch.nn.Module, batch: dict[str, torch.Tensor], T: int, schedule: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    groups = {site.path: site.group for sites in model.config.placed for site in sites}
    groups |= {f"{site.path}.{site.at}_site": site.group for sites in model.config.placed for site in sites}

    def note(group, neuron, args, emitted):
        found.setdefault(group, []).append((emitted != 0).double().mean().item())

    handles = []
    for name, neuron in model.neurons():
        group = next(group for path, group in groups.items() if name.removesuffix(".site").endswith(path))
        handles.append(neuron.register_forward_hook(lambda *given, group=group: note(group, *given)))
    with model.running(T, schedule):
        model(**batch)
    for handle in handles:
        handle.remove()
    return {group: statistics.mean(values) for group, values in found.items()}


def main() -> None:
    args = arguments(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []

    def add(title: str, model: torch.nn.Module, batch: dict[str, torch.Tensor], T: int, schedule: str) -> None:
        for group, share in shares(model, batch, T, schedule).items():
            rows.append({"measure": f"{title}, T = {T}, {schedule}: {group}", "target": None, "got": share})
            print(rows[-1], flush=True)

    prose, stsb = Prose(), TASKS["stsb"]()
    pairs = {name: each for name, each in stsb.batches(stsb.evaluation, seed=None)[0].items() if name != "labels"}
    for T, schedule in RUNS:
        add("GPT-2 on prose, FAS", prose.qcfs(0), {"input_ids": prose.evaluation["prose"][:8]}, T, schedule)
        add("MiniLM on STS-B, FAS", stsb.qcfs(0), pairs, T, schedule)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    calibration, judged = (windows(tokenizer, SHARED / TEXT, LENGTH, count, at) for count, at in ((3, 44), (2, 0)))
    for settings in SETTINGS:
        model = convert_to_spiking(str(MODEL), calibration, progress=False, **settings)
        title = f"SmolLM2 on WikiText-103, {settings['sites']}, {settings['code'].replace('_', ' ')}"
        add(title, model, {"input_ids": judged}, settings["T"], "layerwise")
    report("densities", rows, args)


if __name__ == "__main__":
    main()
