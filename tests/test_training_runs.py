"""The scripts, from a stock checkpoint to a calibrated one: what they write, what they report, how they resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from modeling_fas import FASBertForSequenceClassification, FASGPT2LMHeadModel
from training import convert, run_clm, run_glue, run_mlm
from training.arguments import expand_yaml
from training.calibrate.coarse import VARIANCE_WEIGHTS
from training.calibrate.command import main as calibrate
from training.checkpoints import checkpoints, is_complete
from training.commands import UsageError
from training.results import checksum, fingerprint, flat, read_results
from training.trainers import FASTrainer
from training_helpers import (
    largest_difference,
    save_bert,
    save_gpt2,
    sentences,
    tensors,
    write_corpus,
    write_lines,
    write_reviews,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_reviews(folder / "train.json", 64, seed=1)
    write_reviews(folder / "test.json", 20, seed=2)
    write_corpus(folder / "corpus.json", 200, seed=3)
    write_corpus(folder / "held_out.json", 40, seed=4)
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    return folder


def flags(text: str, folder: Path, out: Path, **more) -> list[str]:
    common = "--report_to none --disable_tqdm true --use_cpu --save_strategy no --per_device_train_batch_size 8"
    extra = [token for name, value in more.items() for token in (f"--{name}", str(value))]
    return f"{text} {common} --output_dir {out}".replace("@", str(folder)).split() + extra


GLUE_DATA = "--train_file @/train.json --validation_file @/test.json"
CLM_DATA = "--train_file @/corpus.json --validation_file @/held_out.json --block_size 16"


def test_a_classifier_through_all_stages(inputs, tmp_path):
    start = "--model_name_or_path @/bert --do_train --do_eval --max_steps 4 " + GLUE_DATA
    stock = run_glue.main(flags("--stage baseline " + start, inputs, tmp_path / "gelu"))
    assert [(row["mode"], row["split"]) for row in stock] == [("stock", "validation")]

    corpus = f"--model_name_or_path @/bert --do_train --do_eval --max_steps 2 {CLM_DATA} --max_seq_length 16"
    masked = run_mlm.main(flags(corpus + " --T 2 --streaming", inputs, tmp_path / "mlm"))
    assert [row["mode"] for row in masked] == ["qcfs", "spiking", "spiking"]
    assert all(row["quality"]["perplexity"] > 1 for row in masked)

    task = start.replace("@/bert", str(tmp_path / "mlm"))
    rows = run_glue.main(flags(task + " --T 0 1 2 --L 4", inputs, tmp_path / "qcfs"))
    modes = [("qcfs", 0, None)] + [("spiking", T, each) for each in ("stepwise", "layerwise") for T in (1, 2)]
    assert [(row["mode"], row["T"], row["schedule"]) for row in rows] == modes
    assert rows[0]["spike_rate"] is None
    assert all(0 < row["spike_rate"] < 1 and 0 <= row["quality"]["accuracy"] <= 1 for row in rows[1:])
    assert rows[0]["quality"]["accuracy"] > 0.5
    trained = FASBertForSequenceClassification.from_pretrained(tmp_path / "qcfs")
    assert (trained.config.L, trained.config.T, trained.config.calib_T) == (4, 0, None)
    pretrained = tensors(tmp_path / "mlm")["bert.encoder.layer.0.intermediate.intermediate_act_fn.threshold"]
    assert 0 < abs(trained.bert.encoder.layer[0].intermediate.intermediate_act_fn.threshold.item() - pretrained) < 0.3

    calibrate = "--stage calibrate --calib_T 2 --T 2 --L 4 --model_name_or_path {} --do_eval " + GLUE_DATA
    text = calibrate.format(tmp_path / "qcfs") + " --do_train --max_steps 4"
    calibrated = run_glue.main(flags(text, inputs, tmp_path / "calibrated"))
    assert flat(calibrated[0]) == pytest.approx(flat(rows[0] | {"seconds": calibrated[0]["seconds"]})), "the ANN stays"
    again = run_glue.main(flags(calibrate.format(tmp_path / "calibrated"), inputs, tmp_path / "again"))
    for row, repeated in zip(calibrated, again, strict=True):
        assert flat(row) | {"seconds": 0} == pytest.approx(flat(repeated) | {"seconds": 0}), "it changes nothing"

    published = AutoModelForSequenceClassification.from_pretrained(tmp_path / "calibrated")
    assert (published.config.T, published.config.schedule, published.config.calib_T) == (2, "stepwise", 2)
    assert {"0", "1"} == set(published.config.label2id)
    assert AutoTokenizer.from_pretrained(tmp_path / "calibrated")("good film").input_ids
    record = read_results(tmp_path / "calibrated" / "evaluation.json")
    assert record["metrics"]["rows"] == calibrated
    weights = fingerprint(FASBertForSequenceClassification.from_pretrained(tmp_path / "calibrated"))
    assert record["configuration"]["weights_sha256"] == weights and record["sha256"] == checksum(record)
    calibration = read_results(tmp_path / "calibrated" / "calibration.json")
    assert {site["variance_weight"] for site in calibration["stages"]["coarse"].values()} <= set(VARIANCE_WEIGHTS)
    assert list(calibration["stages"]) == ["uncalibrated", "coarse", "fine"]
    before, coarse = (
        sum(site["error"] for site in calibration["stages"][s].values()) for s in ("uncalibrated", "coarse")
    )
    assert coarse < before
    assert "--stage calibrate" in record["command"] and record["configuration"]["model"]["calib_T"] == 2


def test_a_language_model_through_all_stages(inputs, tmp_path):
    full = "--stage full --model_name_or_path @/gpt2 --do_train --max_steps 2 --streaming " + CLM_DATA
    assert run_clm.main(flags(full, inputs, tmp_path / "full")) == []
    task = f"--model_name_or_path {tmp_path / 'full'} --do_train --do_eval --T 4 --max_steps 4 " + CLM_DATA
    rows = run_clm.main(flags(task, inputs, tmp_path / "task"))
    assert [row["T"] for row in rows] == [0, 4, 4]
    text = task.replace("full", "task") + " --stage calibrate --calib_T 4 --granularity position"
    calibrated = run_clm.main(flags(text, inputs, tmp_path / "calibrated"))
    assert calibrated[0]["quality"] == pytest.approx(rows[0]["quality"])
    model = FASGPT2LMHeadModel.from_pretrained(tmp_path / "calibrated")
    assert model.transformer.h[0].mlp.act.fine_threshold.shape == (16, 64)


def test_perplexity_and_spike_rate_are_those_of_a_plain_loop(inputs, tmp_path):
    start = f"--stage full --model_name_or_path @/gpt2 --do_train --max_steps 1 {CLM_DATA}"
    rows = run_clm.main(flags(start + " --do_eval --T 3 --per_device_eval_batch_size 3", inputs, tmp_path / "out"))
    model = FASGPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [json.loads(line)["text"] for line in (inputs / "held_out.json").read_text().splitlines()]
    joined = [token for text in texts for token in tokenizer(text).input_ids]
    ids = torch.tensor(joined[: len(joined) // 16 * 16]).view(-1, 16)
    emitted = {}
    for name, neuron in model.neurons():
        neuron.register_forward_hook(
            lambda module, _, output, name=name: emitted.update({name: output / module.threshold})
        )
    for row in rows:
        with torch.no_grad():
            loss = model.set_timesteps(row["T"], row["schedule"])(ids, labels=ids).loss
        assert row["quality"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
        if row["T"]:
            assert row["spike_rate"] == pytest.approx(
                torch.stack([e.mean() for e in emitted.values()]).mean().item(), rel=1e-4
            )


def test_padding_takes_no_part_in_the_spike_rate(inputs, tmp_path):
    run_glue.main(flags(f"--model_name_or_path @/bert --do_train --max_steps 1 {GLUE_DATA}", inputs, tmp_path / "out"))
    evaluate = f"--model_name_or_path {tmp_path / 'out'} --do_eval --T 3 {GLUE_DATA}"
    rows = run_glue.main(flags(evaluate, inputs, tmp_path / "alone", per_device_eval_batch_size=1))
    padded = run_glue.main(flags(evaluate + " --pad_to_max_length", inputs, tmp_path / "padded", max_seq_length=24))
    for row, other in zip(rows[1:], padded[1:], strict=True):
        assert row["spike_rate"] == pytest.approx(other["spike_rate"], rel=1e-3)

    # Over all neurons: the pooler, smaller and run once a sentence, weighs less than a layer.
    model = FASBertForSequenceClassification.from_pretrained(tmp_path / "out").set_timesteps(3, "stepwise").eval()
    emitted = []
    for _, neuron in model.neurons():
        neuron.register_forward_hook(lambda _module, _inputs, output: emitted.append((output > 0).flatten()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in (inputs / "test.json").read_text().splitlines():
        with torch.no_grad():
            model(**tokenizer(json.loads(line)["sentence"], return_tensors="pt"))
    assert rows[1]["schedule"] == "stepwise"
    assert rows[1]["spike_rate"] == pytest.approx(torch.cat(emitted).double().mean().item(), rel=1e-5)


class Killed(Exception):
    """In place of SIGKILL."""


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("clm", "calibrate")]


@pytest.mark.parametrize("script", ["glue", "mlm-stream", *SLOW])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(script, inputs, tmp_path, monkeypatch):
    text = {
        "glue": "--model_name_or_path @/bert --num_train_epochs 2 " + GLUE_DATA,
        "clm": "--model_name_or_path @/gpt2 --max_steps 8 --gradient_accumulation_steps 2 " + CLM_DATA,
        "mlm-stream": f"--model_name_or_path @/bert --max_steps 8 --streaming {CLM_DATA} --max_seq_length 16",
        "calibrate": f"--stage calibrate --calib_T 2 --model_name_or_path @/qcfs --max_steps 8 {GLUE_DATA}",
    }[script]
    main = {"glue": run_glue, "calibrate": run_glue, "clm": run_clm, "mlm-stream": run_mlm}[script].main
    if script == "calibrate" and not (inputs / "qcfs").is_dir():
        first = f"--model_name_or_path @/bert --do_train --max_steps 1 {GLUE_DATA}"
        run_glue.main(flags(first, inputs, inputs / "qcfs"))
    text += " --do_train --learning_rate 1e-3 --save_strategy steps --save_steps 3"
    main([*flags(text, inputs, tmp_path / "whole"), "--save_strategy", "no"])

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    def interrupted(trainer, *args, **kwargs):
        trainer.add_callback(Kill())
        return train(trainer, *args, **kwargs)

    train = FASTrainer.train
    again = [*flags(text, inputs, tmp_path / "cut"), "--save_strategy", "steps"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FASTrainer, "train", interrupted)
        main(again)
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-3"]
    torch.manual_seed(123)
    main([*again, "--resume_from_checkpoint", "true"])
    assert largest_difference(tensors(tmp_path / "whole"), tensors(tmp_path / "cut")) == 0


def test_half_written_checkpoints_are_never_taken(inputs, tmp_path, monkeypatch):
    text = f"--model_name_or_path @/bert --do_train --save_steps 1 --max_steps 3 {GLUE_DATA}"
    out = tmp_path / "out"
    run = [*flags(text, inputs, out), "--save_strategy", "steps"]
    run_glue.main(run)
    expected = tensors(out)
    # As if killed at each file of the last checkpoint in turn: what a truncated one holds is never read.
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    (out / "checkpoint-3" / "trainer_state.json").unlink()
    for name in names:
        (out / "checkpoint-3" / name).write_bytes(b"half")
    (out / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2, "log_')
    assert [is_complete(path) for path in checkpoints(out)] == [True, False, False]
    with pytest.raises(ValueError, match="`--resume_from_checkpoint` must be a complete checkpoint"):
        run_glue.main([*run, "--resume_from_checkpoint", str(out / "checkpoint-3")])
    run_glue.main([*run, "--resume_from_checkpoint", "true"])
    assert largest_difference(expected, tensors(out)) == 0

    def killed(self, folder):
        raise Killed

    # Written again over a complete one: it counts as incomplete from the first byte on.
    shutil.rmtree(out / "checkpoint-3")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FASTrainer, "_save_optimizer_and_scheduler", killed)
        run_glue.main([*run, "--resume_from_checkpoint", str(out / "checkpoint-1")])
    assert [is_complete(path) for path in checkpoints(out)] == [True, False]


def test_bad_checkpoints_to_calibrate_are_named(inputs, tmp_path):
    stage = f"--stage calibrate --calib_T 2 --do_train --max_steps 1 {GLUE_DATA} --model_name_or_path "
    masked = f"--model_name_or_path @/bert --do_train --max_steps 1 {CLM_DATA} --max_seq_length 16"
    run_mlm.main(flags(masked, inputs, tmp_path / "mlm"))
    with pytest.raises(ValueError, match=r"must be fine-tuned on the task for --stage calibrate.*FASBertForMaskedLM"):
        run_glue.main(flags(stage + str(tmp_path / "mlm"), inputs, tmp_path / "out"))
    FASBertForSequenceClassification.from_pretrained(inputs / "bert").save_pretrained(tmp_path / "raw")
    AutoTokenizer.from_pretrained(inputs / "bert").save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="with every threshold at its start"):
        run_glue.main(flags(stage + str(tmp_path / "raw"), inputs, tmp_path / "out"))
    three = [{"sentence": text, "label": i % 3} for i, text in enumerate(sentences(9))]
    data = stage.replace("@/train.json", write_lines(tmp_path / "three.json", three))
    with pytest.raises(ValueError, match=r"`--label_column` must hold class numbers 0 to 1, got 2 in row 2"):
        run_glue.main(flags(data + str(tmp_path / "raw"), inputs, tmp_path / "out"))


def test_convert_runs_all_steps_skips_finished_ones_and_refuses_changed_ones(inputs, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    common = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 2}
    common |= {"train_file": str(inputs / "train.json"), "validation_file": str(inputs / "test.json")}
    steps = {
        "gelu": {"script": "run_glue", "stage": "baseline", "T": 2},
        "qcfs": {"script": "run_glue", "T": [1]},
    }
    recipe.write_text(json.dumps({"shared": common, "steps": steps}))
    argv = [str(recipe), "--model_name_or_path", str(inputs / "bert"), "--output_dir", str(tmp_path / "out")]
    argv += ["--hub_token", "s3cret"]
    rows = convert.main(argv)
    written = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.json")}
    assert {"step.json", "evaluation.json", "conversion.json"} <= written.keys()
    assert not [name for name, text in written.items() if "s3cret" in text]
    assert [row["step"] for row in rows] == ["gelu"] + ["qcfs"] * 3
    assert not checkpoints(tmp_path / "out" / "qcfs")
    start = read_results(tmp_path / "out" / "conversion.json")["configuration"]["qcfs"]["model_name_or_path"]
    assert start == str(tmp_path / "out" / "gelu")

    calls = []
    real = run_glue.main
    monkeypatch.setattr(run_glue, "main", lambda argv: calls.append(argv) or real(argv))
    assert convert.main(argv) == rows
    assert calls == []
    shutil.rmtree(tmp_path / "out" / "qcfs")
    assert len(convert.main(argv)) == len(rows)
    assert len(calls) == 1
    shutil.rmtree(tmp_path / "out" / "gelu")
    with pytest.raises(ValueError, match="must not hold step 'qcfs' from an earlier model"):
        convert.main(argv)
    with pytest.raises(ValueError, match=r"step 'gelu' with other settings, .* where learning_rate differ"):
        convert.main([*argv, "--gelu.learning_rate", "1e-4"])
    interrupt(tmp_path / "out" / "qcfs")
    shutil.rmtree(tmp_path / "out" / "gelu")
    with pytest.raises(ValueError, match="must not hold step 'qcfs' from an earlier model"):
        convert.main(argv)


def test_flags_that_only_evaluate_do_not_train_again(inputs, tmp_path, monkeypatch, caplog):
    line = f"{inputs}/bert --train_file {inputs}/train.json --validation_file {inputs}/test.json --max_steps 2 "
    line += f"--use_cpu --report_to none --disable_tqdm true --output_dir {tmp_path}/out --calibrate.calib_T 2"
    argv = line.split()
    rows = convert.main([*argv, "--T", "2"])
    assert {row["step"] for row in rows} == {"downstream", "calibrate"}, "nothing on a corpus that nobody named"
    before = read_results(tmp_path / "out" / "downstream" / "evaluation.json")
    monkeypatch.setattr(FASTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    again = convert.main([*argv, "--T", "2", "4", "--logging_steps", "1"])
    assert {row["T"] for row in again if row["step"] == "downstream"} == {0, 2, 4}
    same = [(row["step"], row["mode"], row["T"], row["schedule"], row["quality"]) for row in rows]
    assert all(each in [(r["step"], r["mode"], r["T"], r["schedule"], r["quality"]) for r in again] for each in same)
    after = read_results(tmp_path / "out" / "downstream" / "evaluation.json")
    assert after["training"] == before["training"]
    assert after["configuration"]["model"] == {**before["configuration"]["model"], "T": [2, 4]}
    assert after["sha256"] == checksum(after)
    assert not list((tmp_path / "out" / "downstream").glob(".*"))
    assert convert.main([*argv, "--T", "2", "4"]) == again, "finished, and skipped"
    with pytest.raises(ValueError, match="where learning_rate differ"):
        convert.main([*argv, "--T", "2", "--learning_rate", "1e-3"])


def plan_of(line: str, tmp_path: Path) -> dict[str, dict]:
    recipe, given = convert.read_recipe(line.split())
    given.pop("output_dir", None)
    return {step.name: step.settings for step in convert.plan(recipe, given, tmp_path / "out")}


def test_own_data_replaces_that_of_a_recipe_whole(inputs, tmp_path):
    own = plan_of(f"decoder --model_name_or_path {inputs}/gpt2 --train_file {inputs}/corpus.json", tmp_path)
    assert own["full"]["dataset_name"] == "HuggingFaceFW/fineweb-edu"
    for step in ("downstream", "calibrate"):
        assert own[step]["train_file"] == f"{inputs}/corpus.json"
        assert not own[step].keys() & {"dataset_name", "dataset_config_name"}
    folder = plan_of(f"decoder --model_name_or_path {inputs}/gpt2 --dataset-name {inputs}", tmp_path)["downstream"]
    assert folder["dataset_name"] == str(inputs) and "dataset_config_name" not in folder
    corpus = plan_of(f"decoder --full.train_file {inputs}/corpus.json --full.streaming false", tmp_path)
    assert not corpus["full"].keys() & {"dataset_name", "dataset_config_name"}
    assert corpus["downstream"]["dataset_config_name"] == "wikitext-103-raw-v1"
    settings = f"task_name: sst2\nvalidation_file: {inputs}/test.json\ntrain_file: other.json\nL: 4\n"
    (tmp_path / "glue.yaml").write_text(settings)
    expanded = expand_yaml([str(tmp_path / "glue.yaml"), "--train_file", "mine.csv"])
    assert expanded == ["--L", "4", "--train_file", "mine.csv"]


def test_the_long_steps_are_asked_for_by_name(inputs, tmp_path):
    data = f"--train_file {inputs}/corpus.json"
    assert [*plan_of(f"{inputs}/gpt2 {data}", tmp_path)] == ["downstream", "calibrate"]
    assert [*plan_of(f"--model_name_or_path {inputs}/bert --task_name sst2", tmp_path)] == ["downstream", "calibrate"]
    assert [*plan_of(f"{inputs}/gpt2 {data} --full.max_steps 9", tmp_path)] == ["full", "downstream", "calibrate"]
    assert [*plan_of(f"decoder {data}", tmp_path)] == ["full", "downstream", "calibrate"]
    with pytest.raises(UsageError, match=r"`--train_file` and --validation_file, .*`fas convert decoder` takes"):
        convert.read_recipe([str(inputs / "gpt2"), "--output_dir", "out"])
    with pytest.raises(UsageError, match="exclude each other"):
        convert.read_recipe([str(inputs / "gpt2"), "--model_name_or_path", "other", "--task_name", "sst2"])
    with pytest.raises(ValueError, match="--steps downstream calibrate leaves step 'full' out"):
        line = f"decoder --model_name_or_path {inputs}/gpt2 {data} --use_cpu --output_dir {tmp_path}/out"
        convert.main([*line.split(), "--full.dataset_name", "nobody/nothing"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--calibrate.calib_TT 4",
            "Step 'calibrate': The arguments must be a flag that exists, got '--calib_TT'. Did",
        ),
        ("--calibrate.calib_T four", "Step 'calibrate': argument --calib_T/--calib-T: invalid int value: 'four'"),
        ("--calibrate.train_file gone.json", "Step 'calibrate': `--train_file` must be a file that exists"),
        ("--calibrate.learning_rate -1", "Step 'calibrate': `--learning_rate` must be 0 or more"),
    ],
)
def test_flags_of_late_steps_are_checked_before_the_first_starts(flag, message, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_glue, "main", lambda _: pytest.fail("a step began"))
    line = f"{inputs}/bert --train_file {inputs}/train.json --validation_file {inputs}/test.json --use_cpu {flag}"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert.main([*line.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_recipes_leave_a_small_task_with_checkpoints(tmp_path):
    for line in ("encoder --task_name rte", "decoder"):
        for name, settings in plan_of(line, tmp_path).items():
            assert settings["save_steps"] < 1 or settings["max_steps"] > settings["save_steps"], name


def test_calibration_needs_no_labels(inputs, tmp_path):
    start = "--model_name_or_path @/bert --do_train --max_steps 2 " + GLUE_DATA
    run_glue.main(flags(start, inputs, tmp_path / "qcfs"))
    write_lines(tmp_path / "texts.json", [{"sentence": text} for text in sentences(20)])
    calibrated = f"--stage calibrate --calib_T 2 --do_train --max_steps 2 --model_name_or_path {tmp_path}/qcfs "
    calibrated += f"--train_file {tmp_path}/texts.json"
    run_glue.main(flags(calibrated, inputs, tmp_path / "without"))
    assert FASBertForSequenceClassification.from_pretrained(tmp_path / "without").config.calib_T == 2
    judged = f"{calibrated} --validation_file @/test.json --do_eval --T 2"
    rows = run_glue.main(flags(judged, inputs, tmp_path / "judged"))
    assert all(row["quality"]["examples"] == 20 for row in rows)
    assert largest_difference(tensors(tmp_path / "without"), tensors(tmp_path / "judged")) == 0
    with pytest.raises(ValueError, match="`--label_column` must name columns of the data"):
        run_glue.main(flags(judged.replace("@/test.json", f"{tmp_path}/texts.json"), inputs, tmp_path / "blind"))
    with pytest.raises(ValueError, match="`--label_column` must name columns of the data"):
        run_glue.main(
            flags(
                f"--model_name_or_path @/bert --do_train --train_file {tmp_path}/texts.json",
                inputs,
                tmp_path / "untaught",
            )
        )


def interrupt(step: Path) -> None:
    """Make a step one that was killed after a checkpoint."""
    mark = json.loads((step / "step.json").read_text())
    (step / "step.json").write_text(json.dumps({**mark, "finished": False}))
    (step / "checkpoint-1").mkdir()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in convert.RECIPES.glob("*.yaml")))
def test_every_recipe_is_made_of_known_flags(recipe, tmp_path):
    from training.arguments import parse_arguments, read_yaml, to_flags

    content = read_yaml(convert.RECIPES / f"{recipe}.yaml")
    if "steps" not in content:
        parse_arguments([*to_flags(content), "--output_dir", str(tmp_path), "--use_cpu"])
        return
    for _, script, settings in convert.plan(content, {"model_name_or_path": "x"}, tmp_path / "out"):
        model, data, training = parse_arguments([*to_flags(settings), "--use_cpu"])
        model.check(script.removeprefix("run_"), training.do_eval)
        training.check(data.streaming)


@pytest.mark.parametrize(
    ("architectures", "script"), [(["FASBertForSequenceClassification"], run_glue), (["FASGPT2LMHeadModel"], run_clm)]
)
def test_calibrate_runs_the_script_of_the_checkpoint(tmp_path, monkeypatch, architectures, script):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    given = ["--model_name_or_path", str(tmp_path), "--calib_T", "2", "--output_dir", "out"]
    monkeypatch.setattr(script, "main", lambda argv: argv)
    assert calibrate([*given, "--do_train"]) == [*given, "--do_train", "--stage", "calibrate"]
    with pytest.raises(ValueError, match="--model_name_or_path"):
        calibrate(given[2:])
    with pytest.raises(ValueError, match="must be a FAS checkpoint, got 'nowhere'"):
        calibrate(["--model_name_or_path", "nowhere", *given[2:]])
