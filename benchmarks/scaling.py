"""Cost of stepwise GPT-2 small over timesteps and over length, against the stock model at the same length; a plot."""

import matplotlib
import torch

from benchmarks.common import arguments, fas, interleave, ratio, report, results_name, stock, token_ids


STEPS, LENGTHS = (1, 2, 4, 8, 16), (32, 64, 128, 256, 512)


def plot(over_T: list[float], over_length: list[float], path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    left.plot(STEPS, over_T, "o-")
    left.set(xlabel="timesteps T (128 tokens)", ylabel="time over stock model")
    left.plot(STEPS, STEPS, ":", color="grey", label="T forward passes")
    left.legend(frameon=False)
    right.plot(LENGTHS, over_length, "o-")
    right.set(xlabel="tokens (T = 4)", ylabel="time over stock model", xscale="log", xticks=LENGTHS, ylim=(0, 4.2))
    right.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    right.minorticks_off()
    right.axhline(4, ls=":", color="grey")
    figure.suptitle("GPT-2 small, stepwise, batch 1")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, rounds=2)
    plain, model = stock("gpt2", args), fas("gpt2", args, schedule="stepwise")

    model.config.use_cache = plain.config.use_cache = False

    def functions(length: int, steps: tuple[int, ...]) -> dict:
        ids = token_ids(1, length, args)
        spiking = {f"T = {T}": lambda T=T: model.set_timesteps(T)(ids) for T in steps}
        return {"stock": lambda: plain(ids)} | spiking

    interleave(functions(8, STEPS), args, warmup=0)  # a warm-up
    times = {
        length: interleave(functions(length, STEPS if length == 128 else (4,)), args, warmup=0) for length in LENGTHS
    }
    over_T = [ratio(times[128], f"T = {T}", "stock") for T in STEPS]
    over_length = [ratio(times[length], "T = 4", "stock") for length in LENGTHS]
    labels = [f"T = {T}, 128 tokens" for T in STEPS] + [f"T = 4, {length} tokens" for length in LENGTHS]
    rows = [
        {"measure": f"GPT-2 small, batch 1, stepwise over stock, {label}: time", "target": None, "got": got}
        for label, got in zip(labels, over_T + over_length, strict=True)
    ]
    report("scaling", rows, args, samples=times)
    plot(over_T, over_length, args.output / f"{results_name('scaling', args)}.png")


if __name__ == "__main__":
    main()
