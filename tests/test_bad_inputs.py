"""Bad inputs of the commands of training: a message that names what is wrong and the way out, and nothing is lost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification

from modeling_fas import FASBertForSequenceClassification, FASGPT2LMHeadModel
from training import convert, run_clm, run_glue, run_mlm
from training.calibrate.command import main as calibrate
from training.commands import run_command
from training.evaluate.command import main as evaluate
from training_helpers import save_bert, save_gpt2, sentences, write_corpus, write_lines, write_reviews


MAINS = {"glue": run_glue.main, "clm": run_clm.main, "mlm": run_mlm.main, "calibrate": calibrate}
MAINS |= {"evaluate": evaluate, "convert": convert.main}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_reviews(folder / "reviews.jsonl", 16)
    write_corpus(folder / "corpus.jsonl", 40)
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    for name, source, model_class in (
        ("qcfs", "bert", FASBertForSequenceClassification),
        ("calibrated", "bert", FASBertForSequenceClassification),
        ("fas_gpt2", "gpt2", FASGPT2LMHeadModel),
    ):
        model = model_class.from_pretrained(folder / source, initial_threshold=0.5)
        for _, neuron in model.neurons():
            neuron.threshold.data += 0.1
        model = model.begin_calibration(4) if name == "calibrated" else model
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / source).save_pretrained(folder / name)
    broken_models(folder)
    broken_data(folder)
    return folder


def broken_models(folder):
    for name in ("empty", "no_config", "untyped", "truncated", "junk", "small"):
        save_bert(folder / name)
    for path in (folder / "empty").iterdir():
        path.unlink()
    (folder / "no_config" / "config.json").unlink()
    config = json.loads((folder / "untyped" / "config.json").read_text())
    del config["model_type"]
    (folder / "untyped" / "config.json").write_text(json.dumps(config))
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "junk" / "config.json").write_text("{")
    model = BertForSequenceClassification.from_pretrained(folder / "small")
    model.resize_token_embeddings(10)
    model.save_pretrained(folder / "small")
    broken = load_file(folder / "qcfs" / "model.safetensors")
    FASBertForSequenceClassification.from_pretrained(folder / "qcfs").save_pretrained(folder / "cut")
    AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(folder / "cut")
    save_file(
        {name: each for name, each in broken.items() if "classifier" not in name}, folder / "cut" / "model.safetensors"
    )


def broken_data(folder):
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(sentences(6))]
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(
        '{"sentence": "good", "label": 0}\n{"sentence": "café", "label": 1}\n'.encode("latin-1")
    )
    (folder / "latin.csv").write_bytes("sentence,label\ngood,0\ncafé,1\n".encode("latin-1"))
    (folder / "latin.txt").write_bytes("good\ncafé\n".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"sentence": "good", "label": 0}\n{"sentence": "bad" "label": 1}\n')
    write_lines(folder / "lists.jsonl", [{"sentence": "good", "label": [0, 1]}, {"sentence": "bad", "label": [1]}])
    write_lines(folder / "null.jsonl", [*rows[:3], {"sentence": None, "label": 1}, *rows[3:]])
    write_lines(folder / "no_label.jsonl", [*rows[:2], {"sentence": "bad", "label": None}])
    write_lines(folder / "numbers.jsonl", [{"sentence": 7, "label": 0}, {"sentence": 8, "label": 1}])
    write_lines(folder / "label5.jsonl", [*rows, {"sentence": "bad", "label": 5}])
    write_lines(folder / "label_below.jsonl", [*rows, {"sentence": "bad", "label": -1}])
    write_lines(folder / "null_text.jsonl", [{"text": "good film"}, {"text": None}, {"text": "bad film"}])
    (folder / "quoted.csv").write_text('sentence,label\n"good\nfilm",0\nbad,1\n,1\n')
    (folder / "recipe.yaml").write_text("steps:\n  ../../outside: {script: run_glue}\n")
    (folder / "broken.yaml").write_text("steps: [a, b\n")
    (folder / "absolute.yaml").write_text("steps:\n  /tmp/outside: {script: run_glue}\n")


GLUE = "glue --model_name_or_path @/bert --train_file @/reviews.jsonl --do_train --max_steps 1"
CLM = "clm --model_name_or_path @/gpt2 --train_file @/corpus.jsonl --block_size 8 --do_train --max_steps 1"
MLM = CLM.replace("clm", "mlm").replace("gpt2", "bert").replace("block_size", "max_seq_length")
CALIBRATE = "calibrate --model_name_or_path @/qcfs --train_file @/reviews.jsonl --do_train --max_steps 1 --calib_T 4"
EVALUATE = "evaluate @/qcfs --validation_file @/reviews.jsonl --T 2"
CONVERT = "convert @/gpt2 --sites all --code phase --calibration_file @/corpus.jsonl"


def data(line: str, file: str) -> str:
    return line.replace("reviews.jsonl", file).replace("corpus.jsonl", file)


BAD = {
    # data
    "empty jsonl": (data(GLUE, "empty.jsonl"), "`--train_file` must hold rows, got the empty file '@/empty.jsonl'"),
    "empty jsonl, evaluate": (data(EVALUATE, "empty.jsonl"), "`--validation_file` must hold rows, got the empty file"),
    "latin-1 jsonl": (
        data(GLUE, "latin.jsonl"),
        "The file must be UTF-8, got another encoding in line 2, byte 18, of 'latin.jsonl'. Save it as UTF-8",
    ),
    "latin-1 csv": (data(GLUE, "latin.csv"), "in line 3, byte 4, of 'latin.csv'"),
    "latin-1 txt": (data(CLM, "latin.txt"), "in line 2, byte 4, of 'latin.txt'"),
    "latin-1, convert": (data(CONVERT, "latin.txt"), "in line 2, byte 4, of 'latin.txt'"),
    "broken json": (
        data(GLUE, "broken.jsonl"),
        "got '@/broken.jsonl': no JSON in line 2, column 20, of 'broken.jsonl': Expecting ',' delimiter.",
    ),
    "list labels": (
        data(GLUE, "lists.jsonl"),
        "`--label_column` must hold one label a row, got [0, 1] in row 0.*column 'label' (line 1 of '@/lists.jsonl')",
    ),
    "list labels, evaluate": (
        data(EVALUATE, "lists.jsonl"),
        "`--label_column` must hold one label a row, got [0, 1] in row 0",
    ),
    "null text": (
        data(GLUE, "null.jsonl"),
        "`--text_columns` must hold text, got None in row 3.*column 'sentence' (line 4 of '@/null.jsonl')",
    ),
    "null text, csv": (
        data(GLUE, "quoted.csv"),
        "got None in row 2 of split 'train', column 'sentence' (line 5 of '@/quoted.csv')",
    ),
    "null text, evaluate": (
        data(EVALUATE, "null.jsonl"),
        "got None in row 3 of split 'validation', column 'sentence' (line 4 of",
    ),
    "null text, corpus": (
        data(CLM, "null_text.jsonl"),
        "got None in row 1 of split 'train', column 'text' (line 2 of '@/null_text.jsonl')",
    ),
    "null text, stream": (data(CLM, "null_text.jsonl") + " --streaming", "got None in split 'train', column 'text'"),
    "null text, convert": (
        data(CONVERT, "null_text.jsonl"),
        "`--calibration_column` must hold text, got None in row 1",
    ),
    "null label": (
        data(GLUE, "no_label.jsonl"),
        "must hold one label a row, got None in row 2 of split 'train', column 'label' (line 3 of",
    ),
    "numbers for text": (data(GLUE, "numbers.jsonl"), "`--text_columns` must hold text, got 7 in row 0"),
    "label beyond, evaluate": (
        data(EVALUATE, "label5.jsonl"),
        "`--label_column` must hold class numbers 0 to 1, got 5 in row 6.*column 'label' (line 7 of '@/label5.jsonl'",
    ),
    "label beyond, calibrate": (
        data(CALIBRATE, "label5.jsonl"),
        "`--label_column` must hold class numbers 0 to 1, got 5 in row 6",
    ),
    "label below": (data(GLUE, "label_below.jsonl"), "got -1 in row 6"),
    # models
    "folder without config.json": (
        GLUE.replace("@/bert", "@/no_config"),
        "`--model_name_or_path` must be a .*, got '@/no_config': it has no config.json that names its `model_type`",
    ),
    "empty folder": (GLUE.replace("@/bert", "@/empty"), "`--model_name_or_path` must be a .*checkpoint"),
    "folder without config.json, evaluate": (
        EVALUATE.replace("@/qcfs", "@/no_config"),
        "got '@/no_config': it has no config.json that names its `model_type`",
    ),
    "folder without config.json, calibrate": (
        CALIBRATE.replace("@/qcfs", "@/no_config"),
        "got '@/no_config': it has no config.json that names its `model_type`",
    ),
    "folder without config.json, convert": (
        CONVERT.replace("@/gpt2", "@/no_config"),
        "`MODEL` must be a checkpoint that can spike, got '@/no_config': it has no config.json that",
    ),
    "folder without config.json, recipe": (
        "convert --model_name_or_path @/no_config --task_name sst2",
        "got '@/no_config': it has no config.json that names its `model_type`",
    ),
    "no model_type": (
        GLUE.replace("@/bert", "@/untyped"),
        "got '@/untyped': it has no config.json that names its `model_type`",
    ),
    "broken config.json": (GLUE.replace("@/bert", "@/junk"), "`--model_name_or_path` must be a .* checkpoint"),
    "truncated weights": (
        GLUE.replace("@/bert", "@/truncated"),
        "`--model_name_or_path` must be a checkpoint that can be read, got '@/truncated'",
    ),
    "truncated stock weights": (
        GLUE.replace("@/bert", "@/truncated") + " --stage baseline",
        "`--model_name_or_path` must be a checkpoint that can be read, got '@/truncated'",
    ),
    "truncated weights, convert": (CONVERT.replace("@/gpt2", "@/truncated"), "@/truncated"),
    "truncated teacher": (
        GLUE + " --teacher @/truncated",
        "`--teacher` must be a checkpoint that can be read, got '@/truncated'",
    ),
    "missing weights, evaluate": (
        EVALUATE.replace("@/qcfs", "@/cut"),
        "must hold all weights, got '@/cut' without ['classifier.bias'",
    ),
    "ids beyond the embedding": (
        GLUE.replace("@/bert", "@/small"),
        "`--tokenizer_name` must have at most the 10 tokens of the model, got 26",
    ),
    "ids beyond, masked": (
        MLM.replace("@/bert", "@/small"),
        "`--tokenizer_name` must have at most the 10 tokens of the model, got 26",
    ),
    "downstream on calibrated": (
        GLUE.replace("@/bert", "@/calibrated"),
        "must not be calibrated at --stage downstream.*got '@/calibrated', calibrated for T = 4.*"
        "from_pretrained('@/calibrated', calib_T=None)",
    ),
    "other L than calibrated": (
        CALIBRATE.replace("@/qcfs", "@/calibrated") + " --L 4",
        "`--L` must be that of the calibration, 8, got 4. Leave it out, or start from the checkpoint before",
    ),
    "other calib_T": (
        CALIBRATE.replace("@/qcfs", "@/calibrated").replace("--calib_T 4", "--calib_T 2"),
        "`--calib_T` and --granularity must be those",
    ),
    # numbers
    "negative rate": (GLUE + " --learning_rate -1", "`--learning_rate` must be 0 or more, got -1.0"),
    "rate of nan": (GLUE + " --learning_rate nan", "`--learning_rate` must be 0 or more, got nan"),
    "negative threshold rate": (
        GLUE + " --threshold_learning_rate -0.1",
        "`--threshold_learning_rate` must be 0 or more, got -0.1",
    ),
    "site_weight of nan": (CALIBRATE + " --site_weight nan", "`--site_weight` must be 0 or more, got nan"),
    "negative decay": (GLUE + " --weight_decay -1", "`--weight_decay` must be 0 or more"),
    "block of 1": (CLM + " --block_size 1", "`--block_size` must be at least 2, got 1"),
    "sequence of 1": (GLUE + " --max_seq_length 1", "`--max_seq_length` must be at least 2, got 1"),
    "sequence of special tokens": (
        GLUE + " --max_seq_length 2",
        "`--max_seq_length` must leave room for text beside 2 special tokens, got 2",
    ),
    "price of nan": (
        EVALUATE + " --mac_pj nan",
        "`mac_pj` must be a finite number above 0, and `ac_pj` one of at least 0, got nan and 0.9",
    ),
    "price of nothing": (EVALUATE + " --mac_pj 0", "`mac_pj` must be a finite number above 0"),
    "infinite price": (EVALUATE + " --ac_pj inf", "`ac_pj` one of at least 0, got 4.6 and inf"),
    "T beyond": (
        GLUE + " --do_eval --validation_file @/reviews.jsonl --T 1000000",
        "`--T` must be at most 32 with code 'rate', got 1000000",
    ),
    "T beyond, evaluate": (EVALUATE + " 1000000", "`timesteps` must be at most 32, got 1000000"),
    "calib_T beyond": (
        CALIBRATE.replace("--calib_T 4", "--calib_T 1000000"),
        "`--calib_T` must be at most 32 with code 'rate', got 1000000",
    ),
    "T beyond, convert": (CONVERT + " --T 1000000", "`T` must be at most 16 with code 'phase', got 1000000"),
    "L beyond": (GLUE + " --L 1000000", "`--L` must be at most 256, got 1000000"),
    "mask all": (MLM + " --mlm_probability 1.5", "`--mlm_probability` must be between 0 and 1, got 1.5"),
    "hold out all": (
        MLM + " --do_eval --validation_split_percentage 100",
        "`--validation_split_percentage` must be between 0 and 100",
    ),
    "no batch": (
        GLUE + " --per_device_train_batch_size 0",
        "`--per_device_train_batch_size` must be 1 or more, got 0",
    ),
    "no accumulation": (
        GLUE + " --gradient_accumulation_steps 0",
        "`--gradient_accumulation_steps` must be 1 or more, got 0",
    ),
    "negative seed": (GLUE + " --seed -1", "`--seed` must be 0 or more, got -1"),
    "negative threshold": (GLUE + " --initial_threshold -1", "`initial_threshold` must be a finite number above 0"),
    # recipes
    "step that leaves the folder": (
        "convert @/recipe.yaml --model_name_or_path @/bert",
        "`steps` must have names of letters, digits, _ and -, each a folder below --output_dir, got '../../outside'",
    ),
    "step with an absolute path": ("convert @/absolute.yaml --model_name_or_path @/bert", "got '/tmp/outside'"),
    "broken recipe": (
        "convert @/broken.yaml --model_name_or_path @/bert",
        "The YAML file must be readable, got '@/broken.yaml'",
    ),
    "no recipe": ("convert nowhere.yaml", "The YAML file must exist, got 'nowhere.yaml'"),
}


def failed(line, folder, out, capsys) -> str:
    """Run a command that must fail; the message it ends in."""
    name, *flags = line.replace("@", str(folder)).split()
    common = [] if name in ("evaluate", "convert") else ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    assert run_command(MAINS[name], "Not run", [*flags, *common, "--output_dir", str(out)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.index("Not run: ") :].replace(str(folder), "@")


@pytest.mark.parametrize("case", BAD)
def test_it_ends_in_a_message_and_nothing_is_left(case, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("training began"))
    line, message = BAD[case]
    printed = failed(line, inputs, tmp_path / "out", capsys)
    for part in message.split(".*"):
        assert part in printed
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback(inputs, tmp_path, capsys):
    line = (GLUE + " --learning_rate -1").replace("@", str(inputs)).split()[1:]
    assert run_command(run_glue.main, "Not run", ["--debug", *line, "--output_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.splitlines()[-1].startswith("Not run: `--learning_rate`")


def test_what_a_message_says_of_other_errors(capsys):
    def fail(error):
        def main(flags):
            raise error

        return main

    assert run_command(fail(RuntimeError("CUDA out of memory. Tried")), "Not run", []) == 1
    assert "Not run: memory ran out. A smaller batch" in capsys.readouterr().err
    assert run_command(fail(RuntimeError("shapes differ")), "Not run", []) == 1
    assert "Not run: RuntimeError: shapes differ (--debug shows where)" in capsys.readouterr().err
    assert run_command(fail(KeyboardInterrupt()), "Not run", []) == 130
    with pytest.raises(TypeError):
        run_command(fail(TypeError("a fault of this code")), "Not run", [])
    assert run_command(lambda flags: None, "Not run", []) == 0
    assert (
        run_command(lambda flags: pytest.fail(str(flags)) if flags != ["--debug", "x"] else 0, "", ["--debug", "x"])
        == 0
    )


def test_ids_and_labels_out_of_range_of_python(inputs):
    from training.evaluate import evaluate as measure

    model = FASBertForSequenceClassification.from_pretrained(inputs / "qcfs")
    for example, message in (
        ({"input_ids": [1, 26], "labels": 0}, "`input_ids` must be from 0 to 25, got 26 in example 1"),
        ({"input_ids": [1, -1], "labels": 0}, "`input_ids` must be from 0 to 25, got -1 in example 1"),
        ({"input_ids": [1, 2], "labels": 2}, "`labels` must be from 0 to 1, got 2 in example 1"),
        ({"input_ids": [1, 2], "labels": -100}, "`labels` must be from 0 to 1, got -100 in example 1"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, [{"input_ids": [1], "labels": 1}, example], metric="sst2", timesteps=[2])
    causal = FASGPT2LMHeadModel.from_pretrained(inputs / "fas_gpt2")
    with pytest.raises(ValueError, match=r"`labels` must be from 0 to .* in example 0"):
        measure(causal, [{"input_ids": [1, 2], "labels": [-100, 10**6]}], metric="perplexity", timesteps=[2])


def test_a_checkpoint_before_calibration_comes_back_as_the_message_says(inputs, tmp_path):
    before = FASBertForSequenceClassification.from_pretrained(inputs / "qcfs").eval()
    again = FASBertForSequenceClassification.from_pretrained(inputs / "calibrated", calib_T=None)
    again.save_pretrained(tmp_path)
    loaded = FASBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.calib_T is None and {*loaded.state_dict()} == {*before.state_dict()}
    ids = torch.tensor([[2, 5, 6, 3]])
    assert torch.equal(loaded(ids).logits, before(ids).logits)
