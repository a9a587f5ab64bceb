"""Evaluation against the model called by hand, its command line, and what it says to bad input."""

import json
import math
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import tiny
from modeling_fas import FASBertForMaskedLM, FASBertForSequenceClassification, FASBertModel, FASGPT2LMHeadModel
from training.evaluate import SpikeMonitor, energy_report, measurement
from training.evaluate.command import main
from training.evaluate.examples import make_batches, windows
from training.evaluate.measurement import early_exit_curve, evaluate, measure_latency
from training.evaluate.rows import Mode, quality_of
from training_helpers import save_bert, save_gpt2, write_corpus, write_lines, write_reviews


def texts(count=7):
    """Windows of different lengths, the first tokens of some of them context."""
    rows = [torch.randint(1, tiny.VOCABULARY, (length,)).tolist() for length in range(4, 4 + count)]
    return [{"input_ids": ids, "labels": [-100] * (i % 2) * 2 + ids[(i % 2) * 2 :]} for i, ids in enumerate(rows)]


def sentences(count=7):
    return [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(texts(count))]


def calibrated(kind):
    """In float64, where no rounding difference flips a spike."""
    model = tiny.model(kind, L=4).double()
    model.begin_calibration(3)
    for _, neuron in model.neurons():
        neuron.fine_threshold.data.uniform_(0.3, 1.0)
        neuron.initial_potential.data.uniform_(0.2, 0.8)
    return model


def row_of(results, **wanted):
    return next(row for row in results["rows"] if wanted.items() <= row.items())


def test_perplexity_is_that_of_single_windows():
    model, examples = calibrated("gpt2"), texts()
    results = evaluate(model, examples, metric="perplexity", timesteps=[3], batch_size=3)
    for row in results["rows"]:
        model.set_timesteps(row["T"], row["schedule"])
        losses, tokens, same, sums = 0.0, 0, 0, torch.zeros(2)
        for example in examples:
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            with torch.no_grad():
                output = model(ids, labels=labels)
                ann = tiny_ann(model, ids)
                model.set_timesteps(row["T"], row["schedule"])
            scored = labels[0, 1:] != -100
            losses += output.loss.item() * int(scored.sum())
            tokens += int(scored.sum())
            left, right = output.logits[0, :-1][scored], ann[0, :-1][scored]
            same += int((left.argmax(-1) == right.argmax(-1)).sum())
            sums += torch.tensor([(left - right).square().sum(), right.square().sum()])
        assert row["quality"]["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)
        assert row["quality"]["tokens"] == tokens
        assert row["agreement"] == same / tokens
        assert row["logit_error"] == pytest.approx((sums[0] / sums[1]).sqrt().item(), rel=1e-4)


def tiny_ann(model, ids):
    return model.set_timesteps(0)(ids).logits


@pytest.mark.parametrize("metric", ["accuracy", "regression"])
def test_task_metrics_are_those_of_single_sentences(metric):
    regression = metric == "regression"
    model = tiny.model("classify", num_labels=1 if regression else 3).double()
    examples = [row | {"labels": float(row["labels"])} if regression else row for row in sentences()]
    results = evaluate(
        model,
        examples,
        metric="regression" if regression else "mnli",
        timesteps=[2],
        schedules=["stepwise"],
        batch_size=3,
    )
    labels = torch.tensor([row["labels"] for row in examples])
    for row in results["rows"]:
        model.set_timesteps(row["T"], row["schedule"])
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([each["input_ids"]])).logits for each in examples])
        if regression:
            expected = torch.corrcoef(torch.stack([logits[:, 0], labels.double()]))[0, 1].item()
            assert row["quality"]["pearson"] == pytest.approx(expected, abs=1e-5)
            assert row["agreement"] is None
        else:
            assert row["quality"]["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()


@pytest.mark.parametrize("kind", ["gpt2", "classify"])
def test_early_exit_equals_shorter_runs(kind):
    model, metric = calibrated(kind), "perplexity" if kind == "gpt2" else "mnli"
    examples = texts() if kind == "gpt2" else sentences()
    curve = early_exit_curve(model, make_batches(examples, 3), 4, quality=quality_of(metric), progress=False)
    shorter = evaluate(model, examples, metric=metric, timesteps=[1, 2, 3, 4], schedules=["stepwise"], batch_size=3)
    assert shorter["early_exit"] == {"schedule": "stepwise", "T": 4, "curve": curve}
    assert [point["t"] for point in curve] == [1, 2, 3, 4]
    for point in curve:
        quality = row_of(shorter, T=point["t"])["quality"]
        assert quality == {name: pytest.approx(point[name], rel=1e-6) for name in quality}


def test_layerwise_at_T_equal_L_is_the_quantisation_baseline():
    results = evaluate(tiny.model("classify", L=4), sentences(), metric="mnli", timesteps=[4])
    ann, spiking = row_of(results, mode="qcfs"), row_of(results, schedule="layerwise")
    assert spiking["quality"] == ann["quality"]
    assert (spiking["agreement"], spiking["logit_error"]) == (1.0, 0.0)
    assert {site["error"] for site in spiking["sites"]} == {0.0}
    assert row_of(results, schedule="stepwise")["logit_error"] > 0


def test_energy_is_that_of_the_measured_rates():
    model, examples = tiny.model("gpt2"), [row | {"labels": row["input_ids"]} for row in texts()]
    results = evaluate(model, examples, metric="perplexity", timesteps=[2], batch_size=2, mac_pj=2.0, ac_pj=1.0)
    with SpikeMonitor(model.set_timesteps(2, "stepwise")) as monitor, torch.no_grad():
        for example in examples:
            model(torch.tensor([example["input_ids"]]))
    prices = {"mac_pj": 2.0, "ac_pj": 1.0}
    expected = energy_report(model, 7.0, execution="stepwise", T=2, spike_rates=monitor.spike_rates(), **prices)
    row = row_of(results, schedule="stepwise")
    assert row["spike_rate"] == pytest.approx(monitor.spike_rate, rel=1e-3)
    assert row["energy"]["length"] == 7.0
    assert row["energy"]["energy_pj"] == pytest.approx(expected["energy_pj"], rel=1e-3)
    assert row["energy"]["ratio"] > 1 > row_of(results, schedule="layerwise")["energy"]["ratio"]
    assert row["energy"]["ratio_replicated"] > row["energy"]["ratio"]
    assert row_of(results, mode="qcfs")["energy"]["ratio"] == 1


def test_latency_of_every_mode():
    results = evaluate(tiny.model("classify"), sentences(), metric="mnli", timesteps=[2], batch_size=2)
    found = {(row["mode"], row["schedule"]): row for row in results["latency"]}
    assert found.keys() == {("qcfs", None), ("spiking", "stepwise"), ("spiking", "layerwise")}
    assert found["qcfs", None]["ratio"] == 1
    assert all(0 < row["fastest"] <= row["milliseconds"] <= row["slowest"] for row in results["latency"])


def test_latency_leaves_the_warm_up_out(monkeypatch):
    """By a clock that the model alone moves: 100 s for the first pass in a mode, then 3, 1 and 2."""
    model, now, passes = tiny.model("classify"), [0.0], Counter()

    def tick(*_):
        mode = model.config.T, model.config.T and model.config.schedule
        now[0] += (100.0, 3.0, 1.0, 2.0)[passes[mode]]
        passes[mode] += 1

    model.register_forward_pre_hook(tick)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    modes = [Mode("qcfs"), Mode("fas", 2, "stepwise"), Mode("fas", 2, "layerwise")]
    found = measure_latency(model, make_batches(sentences(), 2), modes, progress=False)
    assert list(passes.values()) == [4, 4, 4]
    for row in found:
        assert [row[name] for name in ("fastest", "milliseconds", "slowest", "ratio")] == [1000, 2000, 3000, 1]
        assert row["microseconds_per_token"] == 2e6 / row["tokens"]


def test_interrupted_it_goes_on_with_what_is_missing(monkeypatch):
    model, settings = tiny.model("classify"), {"metric": "mnli", "timesteps": [1, 2], "batch_size": 4}
    examples = sentences()
    whole = evaluate(model, examples, **settings)
    saved = []

    def interrupt(results):
        saved.append(json.loads(json.dumps(results)))
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, examples, **settings, on_result=interrupt)
    measured = []
    measure = measurement._measure
    monkeypatch.setattr(measurement, "_measure", lambda *args: measured.append(args[1]) or measure(*args))
    rest = evaluate(model, examples, **settings, finished=saved[-1])
    assert [str(mode) for mode in measured] == ["layerwise T = 1", "layerwise T = 2"]
    untimed = [[{**row, "seconds": None} for row in results["rows"]] for results in (rest, whole)]
    assert untimed[0] == untimed[1]
    assert rest["rows"][:3] == saved[-1]["rows"]


def test_the_model_is_left_as_it_was():
    model = tiny.model("classify").set_timesteps(5, "layerwise").train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(list(each._forward_hooks), list(each._forward_pre_hooks)) for each in model.modules()]
    evaluate(model, sentences(), metric="mnli", timesteps=[2], stock=tiny.model("classify"))
    assert (model.config.T, model.config.schedule, model.training) == (5, "layerwise", True)
    assert [(list(each._forward_hooks), list(each._forward_pre_hooks)) for each in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_batches_of_similar_length():
    rows = [{"input_ids": [1] * length, "token_type_ids": [1] * length, "labels": length} for length in (2, 5, 3)]
    first, second = make_batches(rows, 2, pad_token_id=9)
    assert first["input_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 9, 9]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert first["token_type_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([5, 3], [2])
    padded = make_batches([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}], 2)[0]
    assert padded["labels"].tolist() == [[1, 2], [3, -100]]


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, text, **settings):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize("window, stride", [(4, 4), (4, 2), (4, 1), (5, 3), (20, 20)])
def test_windows_score_every_token_once(window, stride):
    text = "abcdefghijk"
    rows = windows([text[:3], text[3:]], Letters(), window, stride)
    scored = [token for row in rows for token in row["labels"] if token != -100]
    assert "".join(map(chr, scored)) == text
    for i, row in enumerate(rows):
        assert "".join(map(chr, row["input_ids"])) == text[i * stride : i * stride + window]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    # The first label of a window is no target: with an overlap only that of the text is lost.
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert targets == len(text) - (len(rows) if stride == window else 1)


def test_windows_to_a_limit():
    assert windows(["abcdefghijk"], Letters(), 4, 2, 2) == windows(["abcdefghijk"], Letters(), 4, 2)[:2]
    assert windows(["abcde"], Letters(), 4, 4) == windows(["abcd"], Letters(), 4, 4)  # nothing to predict "e" from


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"timesteps": [0, 4]}, r"`timesteps` must be different integers of at least 1, got \[0, 4\]"),
        ({"timesteps": [4, -1]}, "`timesteps` must be"),
        ({"timesteps": [4, 4]}, "`timesteps` must be"),
        ({"timesteps": []}, "`timesteps` must be"),
        ({"schedules": ["sideways"]}, "`schedules` must be some of stepwise, layerwise"),
        ({"metric": "perplexity"}, "`metric` must be one of cola"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"data": []}, "`data` must be texts, a data set or tokenized examples, at least one"),
        ({"data": [*sentences(1), {"input_ids": [1, 2]}]}, "input_ids and labels, got number 1 without"),
        ({"model": torch.nn.Linear(2, 2)}, "`model` must be a FAS model, got Linear"),
        ({"model": tiny.model("mlm")}, "`metric` must be one of perplexity for FASBertForMaskedLM"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(
            **{"model": tiny.model("classify"), "data": sentences(), "metric": "mnli", "timesteps": [2]} | settings
        )


def test_logits_that_are_no_numbers():
    model = tiny.model("classify")
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="`model` must give finite logits, got others in the mode 'QCFS ANN'"):
        evaluate(model, sentences(), metric="mnli", timesteps=[2])


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and data: `bert`, `mlm` and `gpt2` of FAS; `stock`; `reviews.jsonl`, `corpus.jsonl`."""
    folder = tmp_path_factory.mktemp("evaluate")
    stock = save_bert(folder / "stock")
    text = save_gpt2(folder / "stock_gpt2")
    for name, source, model_class in (
        ("bert", stock, FASBertForSequenceClassification),
        ("mlm", stock, FASBertForMaskedLM),
        ("base", stock, FASBertModel),
        ("gpt2", text, FASGPT2LMHeadModel),
    ):
        model_class.from_pretrained(source, initial_threshold=0.5).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    write_reviews(folder / "reviews.jsonl", count=12)
    write_corpus(folder / "corpus.jsonl", count=20)
    write_lines(folder / "unlabelled.jsonl", [{"sentence": "good"}])
    write_lines(folder / "wrong.jsonl", [{"sentence": "good", "label": 5}])
    (folder / "empty.jsonl").write_text("")
    (folder / "file").write_text("in the way")
    return folder


def run(folder, line, **more):
    return main(line.format(folder, **more).split())


CLASSIFIER = "{0}/bert --stock {0}/stock --validation_file {0}/reviews.jsonl --T 2 --output_dir {out}"


@pytest.mark.usefixtures("undrawn")
def test_command_line_for_a_classifier(folder, tmp_path):
    results = run(folder, CLASSIFIER, out=tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "complete"
    rows = results["metrics"]["rows"]
    assert [row["mode"] for row in rows] == ["stock", "qcfs", "spiking", "spiking"]
    assert rows[0]["quality"]["examples"] == 12
    assert "sites" not in rows[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "report.md", "report.html", "quality.png", "spike_rate.png", "energy.png"),
        *("raster.png", "spike_rate_histogram.png"),
    }
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match="`--output_dir` must be empty or hold an interrupted run"):
        run(folder, CLASSIFIER + " --limit 3", out=tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    replaced = run(folder, CLASSIFIER + " --limit 3 --overwrite_output_dir", out=tmp_path)
    assert replaced["metrics"]["rows"][0]["quality"]["examples"] == 3


@pytest.mark.usefixtures("undrawn")
def test_the_command_ends_with_its_table_and_the_report(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="training"):
        run(folder, CLASSIFIER + " --limit 3", out=tmp_path)
    said = caplog.records[-1].getMessage()
    assert "| stepwise T = 2 |" in said and said.endswith(f"The report is {tmp_path / 'report.html'}")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["mlm", "base"])
def test_command_line_for_a_masked_model_and_one_without_a_head(folder, tmp_path, kind):
    line = "{0}/" + kind + " --validation_file {0}/corpus.jsonl --T 2 --limit 12 --output_dir {out}"
    rows = run(folder, line, out=tmp_path)["metrics"]["rows"]
    assert [row["mode"] for row in rows] == ["qcfs", "spiking", "spiking"]
    assert all(("perplexity" if kind == "mlm" else "cosine") in row["quality"] for row in rows)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_command_line_for_a_language_model(folder, tmp_path):
    line = "{0}/gpt2 --validation_file {0}/corpus.jsonl --T 1 --schedule layerwise --window 8 --stride 4 --limit 5 "
    results = run(folder, line + "--add_eos --output_dir {out}", out=tmp_path)
    assert results["metrics"]["rows"][0]["quality"]["tokens"] == 7 + 4 * 4
    assert results["configuration"]["data"]["window"] == 8
    assert results["configuration"]["data"]["stride"] == 4
    assert "early_exit" not in results["metrics"]


@pytest.mark.usefixtures("undrawn")
def test_interrupted_command_line_keeps_rows(folder, tmp_path, monkeypatch):
    measure = measurement._measure

    def interrupted(run, mode):
        if mode.schedule == "layerwise":
            raise KeyboardInterrupt
        return measure(run, mode)

    monkeypatch.setattr(measurement, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, CLASSIFIER, out=tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["status"] == "partial"
    assert len(kept["metrics"]["rows"]) == 3
    monkeypatch.setattr(measurement, "_measure", measure)
    results = run(folder, CLASSIFIER, out=tmp_path)
    assert results["status"] == "complete"
    assert results["metrics"]["rows"][:3] == kept["metrics"]["rows"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{0}/stock", "`checkpoint` must be a FAS checkpoint, got .* of type 'bert'"),
        ("{0}/nowhere", "`checkpoint` must be a FAS checkpoint"),
        ("{0}/bert --T 0 2", r"`timesteps` must be .*, got \[0, 2\]"),
        ("{0}/bert --T -3", r"`timesteps` must be .*, got \[-3\]"),
        ("{0}/bert --stock {0}/nowhere", "`--stock` must be a checkpoint that can be read"),
        ("{0}/bert --validation_file {0}/empty.jsonl", "`--validation_file` must hold rows, got the empty file"),
        ("{0}/bert --validation_file {0}/unlabelled.jsonl", r"`--label_column` must name columns of the data"),
        (
            "{0}/bert --validation_file {0}/wrong.jsonl",
            r"`--label_column` must hold class numbers 0 to 1, got .*5",
        ),
        ("{0}/bert --validation_file {0}/nowhere.jsonl", "`--validation_file` must be a file that exists"),
        ("{0}/bert --limit 0", "`--limit` must be at least 1"),
        ("{0}/bert --batch_size 0", "`batch_size` must be at least 1"),
        ("{0}/gpt2 --validation_file {0}/corpus.jsonl --window 33", "`--window` must be from 2 to the 32 positions"),
        (
            "{0}/gpt2 --validation_file {0}/corpus.jsonl --window 8 --stride 9",
            "`--stride` from 1 to the window, got 8 and 9",
        ),
        ("{0}/bert --output_dir {0}/file/below", "`--output_dir` must be a folder that can be written to"),
    ],
)
def test_bad_command_lines(folder, tmp_path, flags, message):
    line = "--validation_file {0}/reviews.jsonl --output_dir {out} " + flags
    with pytest.raises(ValueError, match=message):
        run(folder, line, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stock_model_without_a_head(folder, tmp_path):
    BertForSequenceClassification.from_pretrained(folder / "stock").bert.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"`--stock` must hold all weights, got .* without .*classifier"):
        run(folder, CLASSIFIER + " --stock {out}/trunk", out=tmp_path)


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: CORPUS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.mark.slow
def test_lm_eval_takes_T_as_a_model_argument(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval, which is not among the dependencies")
    (tmp_path / "letters.yaml").write_text(TASK.replace("CORPUS", str(folder / "corpus.jsonl")))
    found = {}
    for T in (0, 1, 4):
        arguments = f"pretrained={folder}/gpt2,trust_remote_code=True,dtype=float32,T={T}"
        command = [
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            arguments,
            "--device",
            "cpu",
            "--tasks",
            "letters",
        ]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / str(T))]
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
        (path,) = (tmp_path / str(T)).rglob("results_*.json")
        found[T] = json.loads(path.read_text())["results"]["letters"]["word_perplexity,none"]
    assert len(set(found.values())) == 3
