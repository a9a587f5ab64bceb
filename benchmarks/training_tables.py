"""benchmarks/training-results.md, from the results files in results/training.

python -m benchmarks.training_tables [--check]
"""

import re
import sys
from collections.abc import Iterator

from benchmarks.pages import RESULTS, Part, command
from training.results import flat, markdown_table, read_results


HEAD = """# Training: what was run

Generated (`make tables`) from the files in `benchmarks/results/training`.
"""
# File, title, text.
SECTIONS = (
    (
        "published",
        "Published command lines",
        "The six published command lines, short, on the models and data of `../shared`; "
        "[what they printed](results/training/published.txt) begins with each command. "
        "GPT-2 was trained on prose and is evaluated on WikiText-103, so perplexities are high.",
    ),
    ("tasks", "GLUE tasks", "Every task through downstream and calibrate, a few steps: that they run, no more."),
    (
        "processes",
        "Two processes",
        "`accelerate launch` with two processes against one with the same global batch, in float32: the largest "
        "absolute difference of thresholds and weights, the largest relative one of the losses of the steps and of "
        "what an evaluation found afterwards. Sums over a batch are made in another order, so the last digits differ; "
        "the gradient of a key bias is zero but for rounding, which AdamW turns into steps of the learning rate, "
        "0.001. `shard` is downstream with FSDP2; it goes on from its sharded checkpoint bit for bit. Where rows do "
        "not fill the last batches (61), some are repeated: they count in spike rates, not in quality. A conversion "
        "without training takes the first process alone.",
    ),
    (
        "killed",
        "Killed runs",
        "Commands killed by SIGKILL, so many seconds after their third checkpoint (a conversion: after they had their "
        "folder) or after a model began to be written, started again, and compared with the uninterrupted one: "
        "largest absolute differences, and whether the results are the same (those of conversions; the others "
        "evaluate nothing). `checkpoints` counts those that were left, `half models` the folders with a configuration "
        "and not all of a model.",
    ),
    (
        "accumulation",
        "Gradient accumulation",
        "Gradients of one batch of 8, in float64: the largest, and the largest difference to 1 x 8.",
    ),
    (
        "sentencepiece",
        "SentencePiece",
        "A GPT-2 of 2 layers from scratch with a SentencePiece tokenizer of 4,000 pieces, a short run on the prose.",
    ),
)


def section(name: str, title: str, text: str) -> str:
    """One table with where it comes from."""
    record = read_results(RESULTS / "training" / f"{name}.json")
    metrics = record["metrics"]
    found = map(flat, metrics["rows"]) if isinstance(metrics, dict) else metrics
    rows = [{column: _short(value) for column, value in row.items()} for row in found]
    command = re.sub(r"/\S*?/(?=(shared|env)/)", "../", record["command"])  # of the machine it ran on
    source = f"`{command}` at {(record['commit'] or 'unknown')[:12]}, {record['date'][:10]}."
    return f"## {title}\n\n{text}\n\n{markdown_table(rows)}\n\n{source}\n"


def _short(value):
    """Four decimals, or two digits where they would hide it; checkpoints counted."""
    if isinstance(value, list):
        return f"{sum(complete for _, complete in value)} of {len(value)} complete"
    small = isinstance(value, float) and 0 < abs(value) < 1e-3
    return f"{value:.2g}" if small else value


def parts() -> Iterator[Part]:
    sections = [section(*each) for each in SECTIONS if (RESULTS / "training" / f"{each[0]}.json").is_file()]
    yield Part("benchmarks/training-results.md", None, "\n".join([HEAD, *sections]))


if __name__ == "__main__":
    sys.exit(command(parts))
