"""Command lines: the published ones are read as they are, YAML equals flags, and bad input is named."""

import shlex

import pytest

from training import run_clm, run_glue, run_mlm
from training.arguments import DataArguments, FASTrainingArguments, ModelArguments, parse_arguments
from training.runner import Run
from training.trainers import FASCalibrationTrainer
from training_helpers import save_bert, save_gpt2, write_corpus, write_reviews


# The six command lines of the published README, from the name of the script on.
PUBLISHED = {
    "gpt2_full": """--model_name_or_path /src/gpt2 --dataset_name HuggingFaceFW/fineweb-edu
        --dataset_config_name sample-10BT --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --L 8
        --max_steps 100000 --use_fast_tokenizer --learning_rate 9e-5 --streaming --save_steps 3000 --fp16 --do_train
        --output_dir {out}""",
    "gpt2_downstream": """--model_name_or_path /src/gpt2-pretrain --dataset_name wikitext
        --dataset_config_name wikitext-103-raw-v1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4
        --L 8 --T 8 --use_fast_tokenizer --learning_rate 9e-5 --save_steps 2000 --do_train --do_eval --fp16
        --overwrite_output_dir --output_dir {out}""",
    "gpt2_calibrate": """--model_name_or_path /src/gpt2-pretrain-fitune --dataset_name wikitext
        --dataset_config_name wikitext-103-raw-v1 --per_device_train_batch_size 1 --per_device_eval_batch_size 4
        --gradient_accumulation_steps 4 --L 8 --T 8 --calib_T 8 --use_fast_tokenizer --learning_rate 6e-5
        --save_steps 1500 --do_train --do_eval --overwrite_output_dir --output_dir {out}""",
    "bert_mlm": """--model_name_or_path bert-base-cased --dataset_name wikitext
        --dataset_config_name wikitext-103-raw-v1 --per_device_train_batch_size 8 --per_device_eval_batch_size 8
        --L 8 --max_steps 100000 --use_fast_tokenizer --learning_rate 9e-5 --streaming --save_steps 3000 --fp16
        --do_train --logging_step 100 --output_dir {out}""",
    "bert_glue": """--model_name_or_path /src/bert-FF --task_name sst2 --L 8 --T 4 --do_train --do_eval
        --max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 3e-5 --num_train_epochs 3 --fp16
        --logging_step 10 --save_steps 50000 --overwrite_output_dir --output_dir {out}""",
    "bert_glue_calibrate": """--model_name_or_path /src/bert-FF-DT --task_name stsb --do_train --do_eval --L 8 --T 4
        --calib_T 4 --max_seq_length 128 --per_device_train_batch_size 8 --learning_rate 2e-5 --num_train_epochs 3
        --fp16 --save_steps 500 --overwrite_output_dir --logging_step 10 --output_dir {out}""",
}
ALIASES = {"logging_step": "logging_steps"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_flag_of_the_published_command_lines_keeps_its_name_and_meaning(name, tmp_path):
    flags = shlex.split(PUBLISHED[name].format(out=tmp_path))
    groups = parse_arguments(flags)
    for position, token in enumerate(flags):
        if not token.startswith("--"):
            continue
        given = ALIASES.get(token[2:], token[2:])
        (value,) = [getattr(group, given) for group in groups if hasattr(group, given)]
        following = flags[position + 1] if position + 1 < len(flags) else "--"
        if following.startswith("--"):
            assert value is True, given
        else:
            assert value == type(value)([int(following)] if isinstance(value, list) else following), given


def test_a_yaml_file_equals_its_flags_and_flags_win(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 9e-5\nT: [1, 4]\nlogging_step: 7\nstreaming: true\ndo_train: false\nL:\n")
    out = ["--output_dir", str(tmp_path)]
    from_file = parse_arguments([str(file), *out])
    from_flags = parse_arguments(
        ["--learning_rate", "9e-5", "--T", "1", "4", "--logging_step", "7", "--streaming", "--do_train", "false", *out]
    )
    assert from_file == from_flags
    assert from_file[2].learning_rate == 9e-5
    assert parse_arguments([str(file), *out, "--learning_rate", "1e-3"])[2].learning_rate == 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("kept")
    (folder / "a_file").write_text("")
    write_reviews(folder / "reviews.json")
    write_corpus(folder / "corpus.json")
    (folder / "labels.json").write_text('{"sentence": "good", "label": 0}\n{"sentence": "bad", "label": -1}\n')
    (folder / "damaged.json").write_text('{"sentence": "good", "label"')
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    return folder


GLUE = "--model_name_or_path {}/bert --train_file {}/reviews.json --do_train --output_dir {}/out"
CLM = "--model_name_or_path {}/gpt2 --train_file {}/corpus.json --do_train --output_dir {}/out"
BAD = {
    "missing data set": (run_glue, GLUE.replace("reviews", "absent"), "`--train_file` must be a file that exists"),
    "missing folder": (run_clm, CLM.replace("--train_file", "--dataset_name"), "`--dataset_name` must be a folder"),
    "no such Hub name": (
        run_clm,
        CLM.replace("--train_file {}/corpus.json", "--dataset_name nobody/nothing"),
        "`--dataset_name` or the file must be a data set that can be read",
    ),
    "damaged file": (
        run_glue,
        GLUE.replace("reviews", "damaged"),
        "`--dataset_name` or the file must be a data set that can be read",
    ),
    "no data": (run_glue, GLUE.replace("--train_file {}/reviews.json", ""), "`--dataset_name` is required"),
    "missing column": (run_glue, GLUE + " --text_columns review", "`--text_columns` must name columns"),
    "missing label": (run_glue, GLUE + " --label_column stars", "`--label_column` must name columns"),
    "label outside": (run_glue, GLUE.replace("reviews", "labels"), "`--label_column` must hold class numbers"),
    "unknown task": (run_glue, GLUE + " --task_name sst3", "`--task_name` must be one of cola"),
    "T alone": (run_glue, GLUE + " --T 4", "`--T` names the timesteps of the spiking evaluation"),
    "negative T": (run_clm, CLM + " --do_eval --T -1", "`--T` must hold numbers of timesteps"),
    "L of zero": (run_mlm, GLUE + " --L 0", "`--L` must be at least 1"),
    "negative weight": (run_glue, GLUE + " --site_weight -1", "`--site_weight` must be 0 or more"),
    "calibrate without T": (run_clm, CLM + " --stage calibrate", "`--calib_T` is required"),
    "calibrate stock": (run_clm, CLM + " --stage calibrate --calib_T 2", "must be fine-tuned with QCFS"),
    "endless stream": (run_clm, CLM + " --streaming", "`--max_steps` is required with --streaming"),
    "other architecture": (run_clm, CLM.replace("gpt2", "bert"), "must be a gpt2, opt, .* or .* checkpoint"),
    "no checkpoint": (run_clm, CLM.replace("gpt2", "absent"), "must be a gpt2, opt, .* or .* checkpoint"),
    "unknown stage": (run_glue, GLUE + " --stage full", "`--stage` must be one of baseline, downstream, calibrate"),
    "folder in use": (run_glue, GLUE.replace("/out", "/full"), "`--output_dir` must be empty"),
    "not a folder": (run_glue, GLUE.replace("/out", "/a_file/out"), "must be a folder that can be written to"),
    "no output": (run_glue, GLUE.replace("--output_dir {}/out", ""), "`--output_dir` is required"),
    "nothing to do": (run_glue, GLUE.replace("--do_train", ""), "`--do_train` or `--do_eval` is required"),
    "block too long": (run_clm, CLM + " --block_size 4096", "`--block_size` must be at most the 32 positions"),
    "evaluate untrained": (
        run_glue,
        GLUE.replace("--do_train", "--do_eval --validation_file {}/reviews.json").replace("bert", "gpt2"),
        "must be fine-tuned on the task for evaluation",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_training(case, inputs, monkeypatch):
    script, flags, message = BAD[case]
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        script.main(flags.replace("{}", str(inputs)).split())
    assert not list((inputs / "out").glob("*"))
    assert [path.name for path in (inputs / "full").iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("script", "granularity", "flags", "rate", "weight"),
    [
        ("clm", "neuron", {}, 0.05, 0.1),
        ("glue", "layer", {}, 0.05, 1.0),
        ("glue", "position", {}, 0.07, 1.0),
        ("glue", "neuron", {"threshold_learning_rate": 0.5, "site_weight": 0.0}, 0.5, 0.0),
    ],
)
def test_calibration_by_neuron_has_its_own_settings_and_flags_win(script, granularity, flags, rate, weight, tmp_path):
    model = ModelArguments(stage="calibrate", granularity=granularity)
    run = Run(script, model, DataArguments(), FASTrainingArguments(output_dir=str(tmp_path), **flags), None, [])
    assert run.trainer.func is FASCalibrationTrainer
    given = run.trainer.keywords["args"]
    assert run.trainer.keywords == {"args": given}, "the trainer reads them"
    assert (given.threshold_learning_rate, given.site_weight) == (rate, weight)
    recorded = run.training.to_dict()
    assert (recorded["threshold_learning_rate"], recorded["site_weight"]) == (rate, weight)
