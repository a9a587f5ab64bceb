"""Energy of GPT-2 small at a spike rate of 0.1, analytic: nothing runs, no weights are needed."""

from pathlib import Path

import torch

from configuration_fas import FASGPT2Config
from modeling_fas import FASGPT2LMHeadModel
from training.evaluate import energy_report
from training.results import markdown_table, write_results


LENGTHS, SPIKE_RATE = (1024, 128), 0.1
EXECUTIONS = ["ann", "layerwise", "stepwise", "replicated"]
OUTPUT = Path(__file__).parent / "results" / "energy_gpt2_small.json"


def rows(length: int) -> list[dict]:
    """One row for each execution and T: millions of operations per token, and the ratio to the ANN."""
    with torch.device("meta"):
        model = FASGPT2LMHeadModel(FASGPT2Config())
    found = []
    for execution in EXECUTIONS:
        for T in (1, 2, 4, 8) if execution != "ann" else (0,):
            settings = {"execution": execution, "T": T, "spike_rates": SPIKE_RATE}
            full, causal = (energy_report(model, length, causal=causal, **settings) for causal in (False, True))
            counts = ("dense", "effective_macs", "effective_acs", "membrane_updates")
            found.append(
                {"length": length, "execution": execution, "T": T}
                | {name.replace("_", " ") + ", M": full[name] / 1e6 for name in counts}
                | {"µJ": full["energy_pj"] / 1e6, "ratio": full["ratio"], "ratio, causal": causal["ratio"]}
            )
    return found


def main() -> None:
    found = [row for length in LENGTHS for row in rows(length)]
    configuration = {"model": "GPT-2 small", "lengths": LENGTHS, "spike_rate": SPIKE_RATE}
    write_results(OUTPUT, metrics=found, configuration=configuration)
    print(markdown_table(found, digits=2))


if __name__ == "__main__":
    main()
