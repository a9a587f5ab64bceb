"""The command `fas`: help, exit statuses, what it refuses, and completion."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from modeling_fas import FASBertForMaskedLM, FASBertForSequenceClassification, FASGPT2LMHeadModel
from training import cli, generate, run_clm, run_glue, run_mlm
from training.commands import UsageError, run_command
from training.publish.command import parse_arguments
from training.results import gap_closed
from training.train import script_for
from training_helpers import save_bert, save_gpt2, write_corpus, write_reviews


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Stock and FAS checkpoints, and files."""
    folder = tmp_path_factory.mktemp("inputs")
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    write_corpus(folder / "corpus.json", 20)
    write_reviews(folder / "reviews.json", 20)
    for name, source, model_class in (
        ("decoder", "gpt2", FASGPT2LMHeadModel),
        ("masked", "bert", FASBertForMaskedLM),
        ("classifier", "bert", FASBertForSequenceClassification),
    ):
        model_class.from_pretrained(folder / source, initial_threshold=0.5).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / source).save_pretrained(folder / name)
    return folder


def test_help_is_one_screen_and_imports_no_torch():
    code = "import sys\nfrom training import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert len(lines) <= 30 and max(map(len, lines)) <= 120
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [*([name] for name in cli.COMMANDS), ["demo", "llm"]], ids=" ".join)
def test_every_command_shows_an_example(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage:")
    assert re.search(rf"^example:\n  fas {' '.join(words)} ", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert", "`MODEL` or `--model_name_or_path` is required"),
        ("train --max_stpes 4", "got '--max_stpes'. Did you mean --max_steps?"),
        ("train --L eight", "argument --L: invalid int value: 'eight'"),
        ("calibrate --calib_T 4", "`--model_name_or_path` is required"),
    ],
)
def test_bad_arguments_end_in_a_message_and_status_2(line, message, capsys):
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("line", ["nonsense", "generate", "evaluate --T", "publish folder", "report"])
def test_argparse_refuses_with_the_same_status(line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_usage_error_is_status_2_and_no_command_shows_the_help(capsys):
    def fail(flags):
        raise UsageError("no such flag")

    assert run_command(fail, "Not run", []) == 2
    assert capsys.readouterr().err == "Not run: no such flag\n"
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*cli.COMMANDS, "--calib_T", "--calibration_file", "--max_new_tokens"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_generate_continues_at_the_T_and_schedule_asked_for(inputs, capsys):
    line = ["generate", str(inputs / "decoder"), "the film", "--T", "4", "--schedule", "stepwise"]
    assert cli.main([*line, "--max_new_tokens", "3"]) == 0
    printed = capsys.readouterr().out
    model = FASGPT2LMHeadModel.from_pretrained(inputs / "decoder").eval().set_timesteps(4, "stepwise")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "decoder")
    given = tokenizer("the film", return_tensors="pt")
    found = model.generate(**given, max_new_tokens=3, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert printed == tokenizer.decode(found, skip_special_tokens=True).strip("\n") + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("@/gpt2 x", "must be a FAS checkpoint, got '@/gpt2' of type 'gpt2'. Make it spike: fas convert @/gpt2"),
        ("@/masked x", "FASBertForMaskedLM, an encoder, which reads in both directions. `fas evaluate` measures it"),
        ("@/classifier x", "FASBertForSequenceClassification, an encoder"),
        ("@/nowhere x", "`CHECKPOINT` must be a FAS checkpoint, got '@/nowhere'"),
        ("@/cut x", "`CHECKPOINT` must hold all weights, got '@/cut' without"),
        ("@/decoder x --max_new_tokens 40", "into the 32 positions of the model, got 1 and 40"),
        ("@/decoder x --max_new_tokens 0", "`--max_new_tokens` must be 1 or more, got 0"),
        ("@/decoder x --temperature nan", "`--temperature` must be 0 or more, got nan"),
        ("@/decoder x --T -1 --max_new_tokens 3", "`T` must be"),
    ],
)
def test_generate_refuses_with_the_way_out(line, message, inputs, capsys):
    if "cut" in line and not (inputs / "cut").exists():
        FASGPT2LMHeadModel.from_pretrained(inputs / "decoder").save_pretrained(inputs / "cut")
        weights = load_file(inputs / "cut" / "model.safetensors")
        kept = {name: each for name, each in weights.items() if "h.1.mlp" not in name}
        save_file(kept, inputs / "cut" / "model.safetensors", {"format": "pt"})
    assert run_command(generate.main, "Nothing generated", line.replace("@", str(inputs)).split()) == 1
    assert message in capsys.readouterr().err.replace(str(inputs), "@")


@pytest.mark.parametrize(
    ("line", "script"),
    [
        ("@/gpt2 --train_file @/corpus.json", run_clm),
        ("@/gpt2 --train_file @/reviews.json --label_column label", run_glue),
        ("@/gpt2 --task_name sst2", run_glue),
        ("@/bert --task_name sst2", run_glue),
        ("@/bert --train_file @/reviews.json", run_glue),
        ("@/bert --train_file @/corpus.json", run_mlm),
        ("@/bert --dataset_name somebody/texts", run_mlm),
        ("@/classifier --stage calibrate --calib_T 2 --train_file @/corpus.json", run_glue),
    ],
)
def test_train_takes_the_script_that_fits(line, script, inputs):
    assert script_for(f"--model_name_or_path {line}".replace("@", str(inputs)).split()) is script


def test_a_model_of_another_architecture_is_refused_with_those_that_can_spike(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "text.txt").write_text("some words\n")
    for line in (
        f"convert {tmp_path} --sites all --calibration_file {tmp_path}/text.txt --output_dir out",
        f"convert {tmp_path} --task_name sst2 --output_dir out",
        f"train --model_name_or_path {tmp_path} --task_name sst2 --do_train --output_dir out",
        f"generate {tmp_path} x",
    ):
        assert cli.main(line.split()) == 1
        printed = capsys.readouterr().err
        assert "'gpt2', 'bert'" in printed and "'qwen3'" in printed and "got 't5'" in printed, line
        assert "docs/add-a-backbone.md" in printed


def test_dry_run_before_the_folder_takes_nothing_from_it():
    for line, folder, dry_run in (
        ("--dry-run made user/name", "made", ""),
        ("made user/name --dry-run", "made", ""),
        ("made user/name --dry-run out", "made", "out"),
        ("--dry-run out made user/name", "made", "out"),
        ("made user/name", "made", None),
    ):
        args = parse_arguments(line.split())
        assert (args.folder, args.repo_id, args.dry_run) == (folder, "user/name", dry_run), line


def test_share_of_the_gap_that_calibration_closes():
    assert gap_closed(0.8, 0.5, 0.74) == pytest.approx(0.8)
    assert gap_closed(20.0, 30.0, 24.0) == pytest.approx(0.6), "a perplexity falls"
    assert gap_closed(0.8, 0.5, 0.4) == pytest.approx(-1 / 3)
    assert gap_closed(0.8, 0.8, 0.9) is None
