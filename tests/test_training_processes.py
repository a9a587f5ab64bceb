"""Whole processes: two against one, killed runs, the demo, every GLUE task on made-up rows."""

import os
import random
import shutil

import pytest
from datasets import ClassLabel, Dataset

from benchmarks import training_processes as processes
from fas import convert_to_spiking
from training import convert, demo, run_clm, run_glue
from training.evaluate import command as evaluate_command
from training.results import fingerprint, read_results
from training.tasks import GLUE_COLUMNS
from training_helpers import (
    in_two_processes,
    is_good,
    largest_difference,
    save_bert,
    save_gpt2,
    sentences,
    tensors,
    write_corpus,
    write_reviews,
)


METRICS = {"cola": {"matthews_correlation"}, "stsb": {"pearson", "spearmanr"}}
METRICS |= dict.fromkeys(("mrpc", "qqp"), frozenset({"accuracy", "f1"}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_reviews(folder / "train.json", 256)
    write_reviews(folder / "test.json", 32, seed=1)
    write_corpus(folder / "corpus.json", 1000)
    write_corpus(folder / "held_out.json", 200, seed=1)
    save_bert(folder / "bert", dropout=0.0)
    save_gpt2(folder / "gpt2", dropout=0.0)
    return folder


@pytest.mark.parametrize(
    ("backbone", "launched"), [("bert", False), pytest.param("gpt2", True, marks=pytest.mark.slow)]
)
def test_two_processes_equal_one_with_the_same_global_batch(backbone, launched, inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    script = {"bert": run_glue, "gpt2": run_clm}[backbone]
    held_out = inputs / ("held_out.json" if backbone == "gpt2" else "test.json")
    evaluation = f"--do_eval --T 2 --validation_file {held_out} --per_device_eval_batch_size 5".split()
    evaluation += ["--max_eval_samples", "31"]  # the last batches of two processes repeat rows: they must not count
    script.main([*processes.command(backbone, "downstream", inputs, one, 8, 8)[1:], *evaluation])
    command = [*processes.command(backbone, "downstream", inputs, two, 4, 8), *evaluation]
    if launched:
        processes.run(processes.TWO, command)
    else:
        in_two_processes(script.main, command[1:])
    results = read_results(two / "evaluation.json")
    assert results["configuration"]["training"]["ddp_find_unused_parameters"] is False
    rows = read_results(one / "evaluation.json")["metrics"]["rows"]
    for row, other in zip(rows, results["metrics"]["rows"], strict=True):
        assert other["quality"].get("tokens", 31) == row["quality"].get("tokens", 31)
        assert other["quality"].get("examples", 31) == 31
        assert other["quality"] == pytest.approx(row["quality"], rel=1e-3)
        assert row["T"] == 0 or other["spike_rate"] == pytest.approx(
            row["spike_rate"], rel=0.05
        )  # repeated rows count
    assert not (two / ".lock").exists(), "one run, of two processes"
    found = processes.difference(one, two)
    assert found["thresholds"] < 1e-5
    assert found["weights"] < 1e-4


@pytest.mark.slow
def test_a_conversion_in_two_processes_is_that_of_one_written_once(inputs, tmp_path):
    flags = f"--sites all --calibration_file {inputs / 'corpus.json'} --tokens 128 --limit 2 --output_dir".split()
    convert.main([str(inputs / "gpt2"), *flags, str(tmp_path / "one")])

    def twice(argv):
        convert.main(argv)
        spiking = convert_to_spiking(str(inputs / "gpt2"), sentences(40), progress=False)  # by each process
        (tmp_path / os.environ["RANK"]).write_text(fingerprint(spiking))

    in_two_processes(twice, [str(inputs / "gpt2"), *flags, str(tmp_path / "two")])
    assert largest_difference(tensors(tmp_path / "one"), tensors(tmp_path / "two")) == 0
    assert processes.results(tmp_path / "two") == processes.results(tmp_path / "one")
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def test_a_launcher_around_a_command_that_is_no_training(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = ["--validation_file", str(inputs / "test.json"), "--output_dir", str(tmp_path / "out")]
    assert evaluate_command.main(["nowhere", *out]) == {}, "the first process does it"
    with pytest.raises(ValueError, match="`fas convert` must be started once for a recipe, got a launcher around it"):
        convert.main([str(inputs / "bert"), "--train_file", str(inputs / "train.json"), *out])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_commands_killed_by_sigkill_end_bit_for_bit_as_if_they_had_not_been(inputs, tmp_path):
    for name in ("bert", "gpt2"):
        shutil.copytree(inputs / name, tmp_path / name)
    for name in ("train", "corpus"):
        shutil.copy(inputs / f"{name}.json", tmp_path)
    save_bert(tmp_path / "bert", dropout=0.1)
    processes.run(processes.ONE, processes.command("bert", "downstream", tmp_path, tmp_path / "bert-qcfs", 8, 4))
    for found in processes.kill_all(tmp_path, 4, random.Random(0)):
        assert found["thresholds"] == found["weights"] == found["key biases"] == found["half models"] == 0
        assert found["same results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GLUE_COLUMNS)
def test_every_task_runs_through_downstream_and_calibrate(name, inputs, tmp_path):
    columns = {column: sentences(32, seed=i) for i, column in enumerate(GLUE_COLUMNS[name])}
    good = [is_good(text) for text in next(iter(columns.values()))]
    dataset = Dataset.from_dict({**columns, "label": [float(each) for each in good] if name == "stsb" else good})
    if name != "stsb":
        classes = ["entailment", "neutral", "contradiction"] if name == "mnli" else ["no", "yes"]
        dataset = dataset.cast_column("label", ClassLabel(names=classes))
    (tmp_path / name).mkdir()
    splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    for split in ("train", *splits):
        dataset.to_parquet(tmp_path / name / f"{split}.parquet")
    common = (
        f"--task_name {name} --dataset_name {tmp_path} --do_train --do_eval --T 2 --max_steps 2 --save_strategy no"
    )
    common += " --report_to none --disable_tqdm true --use_cpu"
    downstream = f"--model_name_or_path {inputs}/bert --output_dir {tmp_path}/out {common}"
    calibrate = f"--stage calibrate --calib_T 2 --model_name_or_path {tmp_path}/out --output_dir {tmp_path}/calibrated"
    for line in (downstream, f"{calibrate} {common}"):
        rows = run_glue.main(line.split())
        assert [row["split"] for row in rows] == splits * 3
        for row in rows:
            measured = row["quality"].keys() - {"loss", "examples"}
            assert measured == METRICS.get(name, {"accuracy"})


@pytest.mark.slow
def test_the_demo_runs_on_any_model_and_data_and_loads_what_it_saved(inputs, tmp_path, capsys):
    flags = f"--model_name_or_path {inputs}/bert --train_file {inputs}/train.json --validation_file {inputs}/test.json"
    demo.main([*flags.split(), "--output_dir", str(tmp_path / "demo"), "--max_steps", "4", "--use_cpu"])
    printed = capsys.readouterr().out
    assert "largest difference of logits: 0.0" in printed
    rows = read_results(tmp_path / "demo" / "conversion.json")["metrics"]["rows"]
    ran = {(row["step"], row["mode"], row["T"]) for row in rows}
    assert ran >= {("gelu", "stock", 0), ("qcfs", "qcfs", 0), ("qcfs", "spiking", 8), ("calibrated", "spiking", 2)}
    assert (rows[-1]["step"], rows[-1]["T"], rows[-1]["energy"]["ratio"] < 1) == ("spike_driven", 4, True)
    assert all(f"| {row['mode']} |" in printed for row in rows)
