"""Growth of cost over timesteps, length, width and depth, stepwise and fully spike-driven layerwise; fits, and a plot.

Timesteps are those of GPT-2 small at 128 tokens, the other axes those of small GPT-2 models. A fit is that of least
relative squares; only its constant may be negative (stepwise, much of the first block runs once). Its residual is the
largest, over the time itself.
"""

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.optimize import nnls
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import arguments, compared, fas, interleave, ratios, report, results_name, stock, token_ids
from configuration_fas import FASGPT2Config
from modeling_fas import FASGPT2LMHeadModel


T, PHASE_T, LENGTH = 4, 5, 128
FULLY = {"schedule": "layerwise", "sites": "all", "code": "phase", "activation": "stock", "L": None}
MODES: dict[str, dict[str, Any]] = {
    f"stepwise, T = {T}": {"schedule": "stepwise", "T": T},
    f"fully spike-driven layerwise, phase, T = {PHASE_T}": {"T": PHASE_T, **FULLY},
}
STEPS = {"stepwise": (1, 2, 4, 8, 16, 32), "fully spike-driven layerwise, phase": (1, 2, 4, 8, 16)}
VOCABULARY = 1000
# By axis: the sizes, and the powers that time is made of: attention is quadratic in length, products are in width.
AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tokens": ((32, 64, 128, 256, 512, 1024), (0, 1, 2)),
    "width": ((256, 512, 1024, 2048), (0, 1, 2)),
    "layers": ((1, 2, 4, 8, 16), (0, 1)),
}
STEADY = 1.05  # of the last doubling: a term of a higher order than the stock model's would come near 2


def fit(sizes: tuple[int, ...], seconds: list[float], powers: tuple[int, ...]) -> tuple[dict[int, float], float]:
    """Coefficients by power, in seconds, and the largest relative residual."""
    columns = np.array([[size**power for power in powers] + [-1] for size in sizes], dtype=float)
    scale = abs(columns).max(0)
    relative = columns / scale / np.array(seconds)[:, None]
    found, _ = nnls(relative, np.ones(len(sizes)))
    *terms, less = (found / scale).tolist()
    terms[0] -= less
    return dict(zip(powers, terms, strict=True)), float(abs(relative @ found - 1).max())


def small(axis: str, size: int, args: Any) -> dict[str, Any]:
    """Calls of the small models of one size, by mode."""
    shape = {"n_embd": 256, "n_layer": 2, "vocab_size": VOCABULARY, "n_positions": 1024}
    shape |= {"bos_token_id": None, "eos_token_id": None}
    shape |= {"width": {"n_embd": size}, "layers": {"n_layer": size}}.get(axis, {})
    shape["n_head"] = shape["n_embd"] // 64
    ids = torch.randint(0, VOCABULARY, (1, size if axis == "tokens" else LENGTH), device=args.device)
    models = {"stock": GPT2LMHeadModel(GPT2Config(**shape))}
    models |= {name: FASGPT2LMHeadModel(FASGPT2Config(**shape, **settings)) for name, settings in MODES.items()}
    return {
        name: partial(model.to(args.device, getattr(torch, args.dtype)).eval(), ids, use_cache=False)
        for name, model in models.items()
    }


def over_timesteps(args: Any) -> dict[Any, dict]:
    plain = stock("gpt2", args)
    models = dict(zip(STEPS, (fas("gpt2", args, schedule="stepwise"), fas("gpt2", args, **FULLY)), strict=True))

    def run(name: str, steps: int, ids: torch.Tensor) -> None:
        models[name].set_timesteps(steps)(ids, use_cache=False)

    def functions(length: int) -> dict:
        ids = token_ids(1, length, args)
        spiking = {(name, steps): partial(run, name, steps, ids) for name in STEPS for steps in STEPS[name]}
        return {"stock": partial(plain, ids, use_cache=False)} | spiking

    for warm_up in functions(8).values():
        warm_up()
    return interleave(functions(LENGTH), args, warmup=0)


def growth(times: Mapping[Any, dict], names: Any, sizes: tuple[int, ...], powers: tuple[int, ...]) -> list[dict]:
    """A fit of each of the names, whose times are those of `(name, size)`."""
    fits = []
    for name in names:
        coefficients, residual = fit(sizes, [times[name, size]["median"] for size in sizes], powers)
        fits.append({"of": name, "sizes": sizes, "terms_seconds": coefficients, "residual": residual})
    return fits


def last_doubling(axis: str, times: Mapping[Any, dict], name: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """A row: what the time over stock grows by from half of the largest size to it."""
    half, whole = sizes[-2:]
    pairs = zip(*(ratios(times, (name, size), ("stock", size)) for size in (whole, half)), strict=True)
    found = [each / other for each, other in pairs]
    measure = f"Growth over {axis}, {name}: time over stock at {whole} over that at {half}"
    return {"measure": measure, "target": STEADY, "got": median(found), "spread": [min(found), max(found)]}


def plot(lines: Mapping[str, Mapping[str, Any]], path: Any) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(lines), figsize=(13, 3.4))
    for axis, (label, each) in zip(axes, lines.items(), strict=True):
        for name, (sizes, over) in each.items():
            axis.plot(sizes, over, "o-", label=name.removeprefix("fully spike-driven "))
        sizes = max((sizes for sizes, _ in each.values()), key=len)
        axis.set(xlabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=7)
    axes[0].set(yscale="log", ylim=(0.5, None), ylabel="time over the stock model")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=2)
    samples, rows, lines, fits = {}, [], {}, []
    times = over_timesteps(args)
    samples["timesteps"] = {" ".join(map(str, key)) if key != "stock" else key: each for key, each in times.items()}
    for name, sizes in STEPS.items():
        measure = f"GPT-2 small, batch 1, {name} over stock, T = {{}}, {LENGTH} tokens: time"
        found = [compared(measure.format(steps), None, times, (name, steps), "stock") for steps in sizes]
        rows += found
        lines.setdefault(f"timesteps T ({LENGTH} tokens)", {})[name] = sizes, [row["got"] for row in found]
        fits += [{"over": "timesteps", **each} for each in growth(times, [name], sizes, (0, 1))]
    args.rounds *= 3  # short calls are noisy
    for axis, (sizes, powers) in AXES.items():
        functions = {(name, size): run for size in sizes for name, run in small(axis, size, args).items()}
        times = interleave(functions, args)
        samples[axis] = {f"{name}, {size}": each["median"] for (name, size), each in times.items()}
        fits += [{"over": axis, **each} for each in growth(times, ("stock", *MODES), sizes, powers)]
        rows += [last_doubling(axis, times, name, sizes) for name in MODES]
        over = {name: [median(ratios(times, (name, size), ("stock", size))) for size in sizes] for name in MODES}
        lines[axis] = {name: (sizes, each) for name, each in over.items()}
    report("scaling", rows, args, fits=fits, samples=samples)
    plot(lines, args.output / f"{results_name('scaling', args)}.png")


if __name__ == "__main__":
    main()
