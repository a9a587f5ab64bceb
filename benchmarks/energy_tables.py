"""The energy of GPT-2 small in three documents, from results/energy_gpt2_small.json.

python -m benchmarks.energy_tables [--check]
"""

import sys
from collections.abc import Iterator

from benchmarks.pages import RESULTS, Part, command, wrapped
from training.results import markdown_table, read_results


def parts() -> Iterator[Part]:
    rows = read_results(RESULTS / "energy_gpt2_small.json")["metrics"]
    long, short = (
        {(row["execution"], row["T"]): row for row in rows if row["length"] == length} for length in (1024, 128)
    )
    table, published, costs = energy(long)
    yield Part("benchmarks/energy.md", "energy", f"{table}\n\n{published}\n\n{costs}")
    yield Part("docs/measurement.md", "energy", costs)
    left = {T: short["stepwise", T]["dense, M"] / short["replicated", T]["dense, M"] for T in (4, 8)}
    yield Part(
        "docs/speed.md",
        "products",
        f"Of the products of GPT-2 small at 128 tokens, {100 * left[4]:.0f} % of naive remain at T = 4 and "
        f"{100 * left[8]:.0f} % at T = 8.",
    )


def energy(found: dict) -> tuple[str, str, str]:
    """The table, and what it says of stepwise execution: as published, and its cost."""
    columns = [column for column in next(iter(found.values())) if column != "length"]
    ratio = {key: row["ratio"] for key, row in found.items()}
    ann = found["ann", 0]["effective macs, M"]
    stay = {T: found["stepwise", T]["effective macs, M"] / ann for T in (2, 4)}
    saved = 1 - found["layerwise", 1]["effective macs, M"] / ann
    published = (
        "`replicated` is stepwise execution as published: embeddings replicated, every layer and the head run T "
        f"times, for {ratio['replicated', 4]:.2f} (T = 4) and {ratio['replicated', 8]:.2f} (T = 8) times the energy "
        f"of the ANN. This code computes the same logits for {ratio['stepwise', 4]:.2f} and "
        f"{ratio['stepwise', 8]:.2f}, since what is before the first site and the head runs once. At T = 1 all three "
        "are one thing."
    )
    costs = (
        "With neurons in the MLPs only, stepwise execution costs more than the ANN from T = 2 on, at any spike rate: "
        f"the products that stay MACs alone are {stay[2]:.2f} times those of the ANN at T = 2, {stay[4]:.2f} times at "
        "T = 4 (GPT-2 small, 1,024 tokens). No more than the product after the neurons can be saved, "
        f"{100 * saved:.0f} %."
    )
    return markdown_table(found.values(), columns, digits=2), wrapped(published), wrapped(costs)


if __name__ == "__main__":
    sys.exit(command(parts))
