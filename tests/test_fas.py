"""The public face: everything a notebook does, with texts, on tiny checkpoints, against what is done by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import fas
import tiny
from modeling_fas import (
    FASBertForMaskedLM,
    FASBertForQuestionAnswering,
    FASBertForSequenceClassification,
    FASBertModel,
    FASGPT2LMHeadModel,
)
from training.evaluate.energy import energy_report
from training.evaluate.examples import masked, windows
from training.evaluate.measurement import ROWS_ALONE
from training.publish import cards
from training.results import fingerprint
from training.watching import site_scalars
from training_helpers import is_good, save_bert, save_gpt2, sentences


TEXTS = sentences(40)
LABELS = [is_good(text) for text in TEXTS]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    return {"bert": save_bert(folder / "bert", dropout=0.0), "gpt2": save_gpt2(folder / "gpt2", dropout=0.0)}


def load(folders, model_class, **settings):
    source = folders["gpt2" if "GPT2" in model_class.__name__ else "bert"]
    torch.manual_seed(0)
    model = model_class.from_pretrained(source, initial_threshold=0.8, **settings).eval()
    for _, neuron in model.neurons():
        neuron.threshold.data.fill_(0.75)  # as if trained
    return model


def test_importing_it_imports_nothing_else_and_every_name_is_there():
    code = "import fas, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert sorted(dir(fas)) == sorted(fas.__all__) and all(hasattr(fas, name) for name in fas.__all__)
    with pytest.raises(AttributeError, match=r"has no attribute 'convert'; it has .*convert_to_spiking"):
        fas.convert  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------


def test_texts_of_a_causal_model_are_running_text(folders):
    model, tokenizer = load(folders, FASGPT2LMHeadModel), AutoTokenizer.from_pretrained(folders["gpt2"])
    settings = {"timesteps": [2], "finished": ROWS_ALONE, **QUIET}
    found = fas.evaluate(model, TEXTS, length=16, limit=5, **settings)
    by_hand = fas.evaluate(model, windows(TEXTS, tokenizer, 16, 16, 5), metric="perplexity", **settings)
    assert [row["quality"] for row in found["rows"]] == [row["quality"] for row in by_hand["rows"]]
    assert "| stepwise T = 2 |" in repr(found) and found.configuration["data"]["window"] == 16


def test_a_masked_model_is_scored_at_its_masks(folders):
    model, tokenizer = load(folders, FASBertForMaskedLM), AutoTokenizer.from_pretrained(folders["bert"])
    found = fas.evaluate(model, TEXTS, timesteps=[2], batch_size=5, **QUIET)
    losses, count = 0.0, 0
    for row in masked([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS], tokenizer):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits
        losses += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += int(labels.ne(-100).sum())
    ann = found["rows"][0]["quality"]
    assert ann["tokens"] == count > 10
    assert ann["loss"] == pytest.approx(losses / count, rel=1e-4)
    assert found["early_exit"]["curve"][-1]["loss"] == pytest.approx(found["rows"][1]["quality"]["loss"], rel=1e-4)
    assert 0 < found["rows"][1]["agreement"] <= 1


@pytest.mark.parametrize("with_stock", [False, True])
def test_sentence_vectors_are_compared_by_their_cosine(folders, with_stock):
    model = load(folders, FASBertModel)
    stock = load(folders, FASBertModel, L=None, activation="stock", sites="linear") if with_stock else None
    found = fas.evaluate(model, TEXTS, timesteps=[3], stock=stock, schedules=["layerwise"], batch_size=7, **QUIET)
    tokenizer, cosines = AutoTokenizer.from_pretrained(folders["bert"]), []
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            wanted = (model.set_timesteps(0) if stock is None else stock)(**batch)[0].mean(1)
            given = model.set_timesteps(3, "layerwise")(**batch)[0].mean(1)
        cosines.append(torch.cosine_similarity(given, wanted).item())
    quality = found["rows"][-1]["quality"]
    assert quality["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert quality["least_cosine"] == pytest.approx(min(cosines), abs=1e-5)
    assert found["rows"][0]["quality"]["cosine"] == pytest.approx(1.0) and "early_exit" not in found


def test_a_classifier_with_labels_in_every_form(folders):
    model = load(folders, FASBertForSequenceClassification)
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    forms = [rows, {"text": TEXTS, "label": LABELS}, Dataset.from_list(rows)]
    settings = {"timesteps": [2], "finished": ROWS_ALONE, **QUIET}
    wanted = fas.evaluate(model, TEXTS, LABELS, **settings)
    assert wanted["rows"][0]["quality"]["examples"] == len(TEXTS)
    for form in forms:
        found = fas.evaluate(model, form, **settings)
        assert [row["quality"] for row in found["rows"]] == [row["quality"] for row in wanted["rows"]]


def test_a_classifier_without_labels_is_asked_how_often_it_agrees(folders):
    model = load(folders, FASBertForSequenceClassification)
    found = fas.evaluate(model, TEXTS, timesteps=[2], **QUIET)
    for row in found["rows"]:
        assert row["quality"] == {"agreement": row["agreement"], "examples": len(TEXTS)}


def test_what_calibration_closed_is_told_of_a_calibrated_model(folders):
    model = load(folders, FASBertForSequenceClassification)
    settings = {"schedules": ["stepwise"], "finished": {"latency": None, "early_exit": None}, **QUIET}
    before = fas.evaluate(model, TEXTS, LABELS, timesteps=[2], **settings)
    fas.calibrate(model, TEXTS, 2, steps=0, **QUIET)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    after = fas.evaluate(model, TEXTS, LABELS, **settings)  # at the T it is calibrated for
    gap = after["gap"]
    assert (gap["T"], gap["schedule"], gap["metric"]) == (2, "stepwise", "accuracy")
    assert gap["uncalibrated"] == before["rows"][1]["quality"]["accuracy"]
    assert gap["error_uncalibrated"] == pytest.approx(before["rows"][1]["logit_error"])
    assert gap["calibrated"] == after["rows"][1]["quality"]["accuracy"]
    assert gap["error_closed"] == 1 - gap["error_calibrated"] / gap["error_uncalibrated"]
    assert "Calibration (stepwise, T = 2)" in repr(after)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("one text", {}, r"`data` must be texts, .* got str 'one text'. Put one text in a list"),
        ([], {}, "`data` must be texts"),
        ([1, 2], {}, "`data` must hold texts, or rows with columns, got 1"),
        (TEXTS, {"labels": [0]}, "`labels` must be as many as the texts, 40, got 1"),
        (TEXTS, {"metric": "sst2"}, "`metric` must be one of agreement for FASBert"),
        (TEXTS, {"limit": 0}, "`limit` must be at least 1, got 0"),
    ],
)
def test_bad_data(folders, data, settings, message):
    with pytest.raises(ValueError, match=message):
        fas.evaluate(load(folders, FASBertForSequenceClassification), data, **settings)


def test_heads_that_are_not_measured_and_a_model_without_a_folder(folders):
    with pytest.raises(ValueError, match="`model` must be a language model, a classifier or without a head"):
        fas.evaluate(load(folders, FASBertForQuestionAnswering), TEXTS)
    with pytest.raises(ValueError, match="`tokenizer` must be given for this model"):
        fas.evaluate(tiny.model("classify"), TEXTS)


def test_the_report_and_the_card_of_what_was_measured(folders, tmp_path, monkeypatch, undrawn):
    def weights(folder):  # in a process apart, which other tests start
        return fingerprint(FASBertForSequenceClassification.from_pretrained(folder))

    monkeypatch.setattr(cards, "weights_sha256", weights)
    model = load(folders, FASBertForSequenceClassification).set_timesteps(2, "layerwise")
    found = fas.evaluate(model, TEXTS, LABELS, **QUIET)
    page = found.report(tmp_path / "report")
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
    assert found.plot("energy").axes[0].get_title() == "energy by part"
    with pytest.raises(ValueError, match=r"`name` must be one of quality, energy, raster, .*, got 'rates'"):
        found.plot("rates")
    reads = f"{found['rows'][-1]['energy']['reads_ratio']:.3f}"
    assert repr(found).splitlines()[0].endswith("| weights read, of ANN |")
    assert repr(found).splitlines()[-1].endswith(f"| {reads} |")
    assert page.name == "report.html" and (tmp_path / "report" / "results.json").is_file()
    accuracy = f"{found['rows'][-1]['quality']['accuracy']:.4f}"
    assert accuracy in found.card().content
    model.save_pretrained(tmp_path / "saved")
    card = found.card(tmp_path / "saved", license="mit", base_model="someone/base")
    assert accuracy in card.content and (card.data.license, card.data.base_model) == ("mit", "someone/base")
    assert (tmp_path / "saved" / "README.md").read_text() == str(card)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`report/results.json` must be measured on the weights"):
        found.card(tmp_path / "saved")


# ---------------------------------------------------------------------------------------------------------------------
# calibrate
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_class", [FASBertForSequenceClassification, FASBertForMaskedLM, FASBertModel, FASGPT2LMHeadModel]
)
def test_calibration_on_texts_alone_closes_a_part_of_the_gap(folders, model_class, tmp_path):
    model = load(folders, model_class)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "bias" in name}
    coarse = "published" if hasattr(model, "lm_head") or hasattr(model, "cls") else "search"  # which takes longer
    record = fas.calibrate(model, TEXTS, 2, coarse=coarse, steps=6, length=16, **QUIET)
    assert (model.config.T, model.config.calib_T, model.training) == (2, 2, False)
    assert list(record["stages"]) == ["uncalibrated", "coarse", "fine"]
    errors = {stage: sum(site["error"] for site in sites.values()) for stage, sites in record["stages"].items()}
    assert record["rows"] + record["held_out"] > 10 and errors["fine"] != errors["coarse"]
    gap = record["gap"]
    assert gap["error_closed"] == 1 - gap["error_calibrated"] / gap["error_uncalibrated"]
    assert record.gap_closed == (gap["error_closed"] if gap["closed"] is None else gap["closed"])
    if model_class is FASBertModel:  # of random weights, the one whose output is no gamble
        assert errors["fine"] < errors["uncalibrated"] and gap["error_closed"] > 0.1
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)
    assert "| fine |" in repr(record)
    record.save(tmp_path)
    assert (tmp_path / "calibration.json").is_file()


def test_labels_make_no_difference_to_what_is_calibrated(folders):
    with_labels, without = (load(folders, FASBertForSequenceClassification) for _ in range(2))
    told = fas.calibrate(with_labels, TEXTS, 2, LABELS, steps=2, **QUIET)
    untold = fas.calibrate(without, TEXTS, 2, steps=2, **QUIET)
    assert (told["gap"]["metric"], untold["gap"]["metric"]) == ("accuracy", "agreement")
    assert told["gap"]["error_calibrated"] == pytest.approx(untold["gap"]["error_calibrated"], rel=0.2)


def test_what_cannot_be_calibrated(folders):
    with pytest.raises(ValueError, match="must be fine-tuned with QCFS, or converted, got a FASBert"):
        fas.calibrate(FASBertForSequenceClassification.from_pretrained(folders["bert"]), TEXTS, 2)
    with pytest.raises(ValueError, match="`data` must hold at least 2 rows"):
        fas.calibrate(load(folders, FASBertForSequenceClassification), TEXTS[:1], 2)


# ---------------------------------------------------------------------------------------------------------------------
# SpikeRecorder and energy
# ---------------------------------------------------------------------------------------------------------------------

RUNS = {
    "stepwise": {"T": 3, "schedule": "stepwise"},
    "layerwise": {"T": 3, "schedule": "layerwise"},
    "accumulated": {"T": 3, "schedule": "accumulated", "sites": "linear", "activation": "stock", "L": None},
    "phase": {"T": 4, "schedule": "layerwise", "sites": "all", "activation": "stock", "L": None, "code": "phase"},
    "first_spike": {"T": 4, "schedule": "layerwise", "sites": "all", "activation": "stock", "code": "first_spike"},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("kind", ["gpt2", "classify"])
def test_recorded_trains_are_the_spikes_that_a_monitor_counts(kind, settings):
    model, batch = tiny.model(kind, **settings), tiny.batch(kind)
    del batch["labels"]
    with torch.no_grad(), fas.SpikeRecorder(model, neurons=10**6) as recorder, fas.SpikeMonitor(model) as monitor:
        model(**batch)
    assert recorder.trains.keys() == monitor.sites.keys()
    for name, rates in recorder.rates().items():
        train = recorder.trains[name]
        assert train.dtype == np.int8 and train.shape[:2] == (settings["T"], 3) and set(np.unique(train)) <= {-1, 0, 1}
        assert rates == pytest.approx(monitor.sites[name].rates.numpy())


def test_a_generation_is_one_recording_and_a_file_holds_all_of_it(tmp_path):
    model = tiny.model("gpt2", T=3)
    ids = tiny.batch("gpt2")["input_ids"][:1]
    with fas.SpikeRecorder(model, sites=["1 mlp"], neurons=[5, 7]) as recorder:
        made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert recorder.input_ids.tolist() == made[:, :-1].tolist()  # the last token is not read
    (name,) = recorder.trains
    with torch.no_grad(), fas.SpikeRecorder(model, sites=name, neurons=[5, 7]) as whole:
        model(made[:, :-1])
    assert np.array_equal(recorder.trains[name], whole.trains[name])
    recorder.save_npz(tmp_path / "spikes.npz")
    with np.load(tmp_path / "spikes.npz") as file:
        assert np.array_equal(file[name], recorder.trains[name]) and file[f"{name}/neurons"].tolist() == [5, 7]
        assert (int(file["T"]), str(file["schedule"])) == (3, "stepwise") and file["mask"].all()


def test_a_raster_says_what_it_shows(folders):
    model, tokenizer = load(folders, FASBertModel).set_timesteps(4), AutoTokenizer.from_pretrained(folders["bert"])
    batch = tokenizer(["the film was very good", "a dull plot"], padding=True, return_tensors="pt")
    with torch.no_grad(), fas.SpikeRecorder(model, "1 intermediate", neurons=8) as recorder:
        model(**batch)
    axes = recorder.raster(row=1)
    assert [each.get_text() for each in axes.get_xticklabels()] == ["[CLS]", "a", "dull", "plot", "[SEP]"]
    assert "1 intermediate_act_fn: 8 (evenly spaced) of 32 neurons" in axes.get_title("left")
    assert "4 timesteps wide (stepwise)" in axes.get_xlabel()
    picture = recorder.picture(row=1)
    drawn = sum(len(each.get_positions()) for each in axes.collections if hasattr(each, "get_positions"))
    assert drawn == sum(line.count("+") + line.count("-") for line in picture["spikes"]) > 0


def test_what_cannot_be_recorded():
    model, batch = tiny.model("gpt2"), tiny.batch("gpt2")
    with pytest.raises(ValueError, match=r"`sites` must be names of sites .* got 'nowhere'; this model has transf"):
        fas.SpikeRecorder(model, "nowhere")
    with pytest.raises(ValueError, match=r"`neurons` must be from 0 to 127 .* got \[128\]"):
        fas.SpikeRecorder(model, neurons=[128])
    with pytest.raises(ValueError, match="at least 1, or indices, got 0"):
        fas.SpikeRecorder(model, neurons=0)
    with pytest.raises(ValueError, match="must run at T > 0 to spike"), fas.SpikeRecorder(model):
        model(batch["input_ids"])
    model.set_timesteps(2)
    with pytest.raises(ValueError, match="must be called with the same batch"), fas.SpikeRecorder(model):
        model(batch["input_ids"])
        model(batch["input_ids"][:1])
    with pytest.raises(ValueError, match="must hold all trains"), fas.SpikeRecorder(model, most_bytes=100):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match="must run inside the context before there are trains"):
        fas.SpikeRecorder(model).trains  # noqa: B018


def test_energy_of_texts_a_batch_and_a_length_is_that_of_the_report(folders):
    model, tokenizer = load(folders, FASBertModel), AutoTokenizer.from_pretrained(folders["bert"])
    batch = tokenizer(TEXTS[:6], padding=True, return_tensors="pt")
    length = float(batch["attention_mask"].sum() / 6)
    with model.running(3, "stepwise"), fas.SpikeMonitor(model) as monitor, torch.no_grad():
        model(**batch)
    wanted = energy_report(model, length, execution="stepwise", T=3, spike_rates=monitor.spike_rates())
    settings = {"T": 3, "schedule": "stepwise"}
    for given in (TEXTS[:6], batch):
        found = fas.energy(model, given, **settings)
        assert found["energy_pj"] == pytest.approx(wanted["energy_pj"], rel=1e-6)
        assert found["spike_rate"] == pytest.approx(monitor.spike_rate)
    assert (
        fas.energy(model, 12, T=3, spike_rates=0.1)["ratio"]
        == energy_report(model, 12, execution="stepwise", T=3, spike_rates=0.1)["ratio"]
    )
    assert fas.energy(model, 12)["ratio"] == 1 and "the ANN, 12 tokens" in repr(fas.energy(model, 12))
    with pytest.raises(ValueError, match="`spike_rates` must be given for a number of tokens"):
        fas.energy(model, 12, T=3)
    with pytest.raises(ValueError, match=r"`inputs` must be texts, .* Put it in a list"):
        fas.energy(model, "one text")


@pytest.mark.parametrize("measure", [fas.energy, site_scalars])
def test_an_error_leaves_the_model_in_training_mode(measure):
    model = tiny.model("classify", T=2).train()
    with pytest.raises((ValueError, IndexError)):
        measure(model, {"input_ids": torch.full((1, 4), 10**6)})
    assert model.training
