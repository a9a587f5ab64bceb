"""Conversion without training: in Python, on the command line, and what a user sees when it cannot be done."""

import json
import logging
import subprocess

import pytest
import torch

import backbones
from checkpoints import tiny_tokenizer
from configuration_fas import BACKBONES, FASConfig
from fas import convert_to_spiking
from modeling_fas import FASGPT2LMHeadModel, FASLlamaForCausalLM
from training import convert, demo_llm
from training.calibrate.conversion import (
    GAINS,
    POWERS,
    _config_of,
    _fit,
    _in_place,
    convert_and_report,
    fit_thresholds,
    summary,
)
from training.layout import sites
from training.publish.upload import publish
from training.results import fingerprint, read_results
from training_helpers import save_bert, save_gpt2, sentences, write_corpus, write_lines, write_reviews


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(2, 10)[None]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    print(json.dumps([model.config.T, found[0].tolist()]))
"""


# Every kind of block, of norms, of positions and of MLPs.
FEW_BACKBONES = ("gpt2", "roberta", "distilbert", "qwen3")


def head(backbone):
    return "AutoModelForCausalLM" if BACKBONES[backbone].causal else "AutoModelForSequenceClassification"


def stock(backbone, auto_class=None, seed=0):
    """A tiny random stock model."""
    auto_class = auto_class or head(backbone)
    own = backbones.config(backbone, auto_class)
    names = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "num_labels")
    settings = {name: getattr(own, name) for name in names} | backbones.SIZES[backbone]
    if "init_std" not in settings:
        settings["initializer_range"] = 0.2
    torch.manual_seed(seed)
    return backbones.stock_class(backbone, auto_class)(type(own)._stock_class(**settings)).eval()


def calibration(rows=8, length=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, backbones.VOCABULARY, (rows, length), generator=generator)


def logits(model, ids=None):
    with torch.no_grad():
        return model(calibration(2, 12, seed=4) if ids is None else ids).logits


def converted(model, **settings):
    return convert_to_spiking(model, calibration(), progress=False, **settings)


@pytest.mark.parametrize("backbone", backbones.some(lambda backbone: backbone in FEW_BACKBONES, BACKBONES))
def test_from_a_folder_and_in_place_give_one_model_that_is_stock_at_no_timesteps(backbone, tmp_path):
    model = stock(backbone)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    spiking = converted(model)
    assert spiking is model
    kept = dict(spiking.named_parameters())
    assert {name: kept[name].data_ptr() for name in addresses} == addresses
    loaded = converted(tmp_path)
    assert fingerprint(loaded) == fingerprint(spiking)
    assert torch.equal(logits(loaded), logits(spiking))
    for each in (spiking, loaded):
        assert each.config.T == 5 and not each.training
        assert not torch.equal(logits(each), expected)
        assert torch.equal(logits(each.set_timesteps(0)), expected)


def test_neurons_stand_on_the_device_of_their_layer():
    model = stock("llama")
    model.model.layers[1].to("meta")
    spiking = _in_place(model, _config_of(model), FASLlamaForCausalLM)
    devices = {name: neuron.threshold.device.type for name, neuron in spiking.neurons()}
    assert devices == {name: "meta" if ".1." in name else "cpu" for name in devices} and len(devices) > 1


@pytest.mark.parametrize("backbone", backbones.some(lambda backbone: backbone in FEW_BACKBONES, BACKBONES))
def test_thresholds_are_positive_and_by_neuron_and_more_timesteps_are_nearer_to_stock(backbone):
    vocabulary = "AutoModelForCausalLM" if BACKBONES[backbone].causal else "AutoModelForMaskedLM"  # many outputs
    expected = logits(stock(backbone, vocabulary))
    errors = []
    for T in (3, 5, 8):
        spiking = converted(stock(backbone, vocabulary), T=T)
        for name, neuron in spiking.neurons():
            assert neuron.fine_threshold.shape == (neuron.width,) and (neuron.fine_threshold > 0).all(), name
        errors.append((logits(spiking) - expected).norm().item())
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_other_heads(auto_class):
    model = stock("bert", auto_class)
    before = model(calibration(2, 12))[0]
    spiking = converted(model)
    assert torch.equal(spiking.set_timesteps(0)(calibration(2, 12))[0], before)


def test_a_head_over_a_vocabulary_gets_one_row(monkeypatch):
    seen = []
    model = stock("llama")
    model.lm_head.register_forward_hook(lambda layer, args, output: seen.append(output.shape))
    converted(model)
    assert seen == [(8, 1, backbones.VOCABULARY)]
    assert logits(model).shape == (2, 12, backbones.VOCABULARY)


@pytest.mark.parametrize(
    "settings", [{"T": 33}, {"T": 0}, {"schedule": "stepwise"}, {"code_base": 1}, {"code_base": 0}]
)
def test_what_is_refused_leaves_the_model_as_it_was(settings):
    model = stock("gpt2")
    kind, config = type(model), model.config
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must"):
        converted(model, **settings)
    with pytest.raises(ValueError, match="at least one token"):
        convert_to_spiking(model, torch.zeros(0, 4).long())
    assert type(model) is kind and model.config is config and not hasattr(model.transformer.h[0].attn, "query_site")


def test_a_model_that_spikes_already_is_refused_with_the_way_out(tmp_path):
    spiking = converted(stock("gpt2"))
    spiking.save_pretrained(tmp_path)
    for source in (spiking, tmp_path):
        with pytest.raises(
            ValueError, match=r"must be a stock model.*which spikes already.*`set_timesteps` changes T"
        ):
            converted(source)


def test_every_code_is_reloaded_by_a_new_process_with_equal_tokens(tmp_path, run_outside):
    settings = {
        "phase": ("llama", {"code": "phase"}),
        "first_spike": ("gpt2", {"code": "first_spike"}),
        "rate": ("qwen3", {"code": "rate", "T": 6}),
        "accumulated": ("gpt2", {"code": "rate", "sites": "linear", "schedule": "accumulated", "T": 6}),
    }
    expected = []
    ids = torch.arange(2, 10)[None]
    for name, (backbone, chosen) in settings.items():
        spiking = converted(stock(backbone), **chosen)
        spiking.save_pretrained(tmp_path / name)
        found = spiking.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected.append([spiking.config.T, found[0].tolist()])
    printed = run_outside(["-c", RELOAD, *(str(tmp_path / name) for name in settings)])
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("[")] == expected


def test_one_short_line_warns(tmp_path, caplog):
    tokenizer = tiny_tokenizer("gpt2", tmp_path)
    model = stock("gpt2")
    model.resize_token_embeddings(64, mean_resizing=False)
    with caplog.at_level(logging.WARNING):
        convert_to_spiking(model, ["the cat"], tokenizer=tokenizer, progress=False)
    assert "`calibration` holds 3 tokens: thresholds fitted to so few may not suit other texts" in caplog.text
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
def test_neurons_that_no_text_reaches_are_counted_and_can_fire(backbone, caplog):
    model = stock(backbone)
    norm = model.transformer.h[1].ln_1 if backbone == "gpt2" else model.model.layers[1].input_layernorm
    for parameter in norm.parameters():
        parameter.data[:3] = 0
    spiking, found = convert_and_report(model, calibration(), sites="linear", code="phase", progress=False)
    name = next(each.name for each in sites(spiking) if each.layer == 1)
    assert found[name]["dead"] == 3
    assert sum(row["dead"] for row in summary(spiking, found)) >= 3
    assert (spiking.get_submodule(name).fine_threshold > 0).all()
    assert not caplog.text
    for parameter in norm.parameters():
        parameter.data.zero_()
    found = fit_thresholds(spiking, {"input_ids": calibration()}, 5, progress=False)
    assert found[name]["dead"] == spiking.get_submodule(name).width
    assert f"No calibration text makes these sites fire: {name}" in caplog.text
    assert (spiking.get_submodule(name).fine_threshold > 0).all() and logits(spiking).isfinite().all()


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "opt"])
def test_padding_takes_no_part(backbone):
    batch = backbones.batch(backbone, head(backbone))
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7))
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    found = [convert_to_spiking(stock(backbone), each, progress=False) for each in (batch, other)]
    for (name, left), (_, right) in zip(*(each.neurons() for each in found), strict=True):
        assert torch.equal(left.fine_threshold, right.fine_threshold), name


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("stock") / "gpt2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus.jsonl")


def arguments(model, corpus, out, *more):
    given = ["--sites", "all", "--code", "phase", "--calibration_file", corpus, "--output_dir", str(out)]
    return [model, *given, "--tokens", "256", "--limit", "4", *more]


def test_the_command_converts_compares_and_what_it_saves_can_be_published(
    gpt2, corpus, outside, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    rows = convert.main(arguments(gpt2, corpus, out))
    record = read_results(out / "conversion.json")
    assert record["metrics"]["rows"] == json.loads(json.dumps(rows))
    assert [row["mode"] for row in rows] == ["stock", "spiking"]
    assert all(row["quality"]["tokens"] == 4 * 31 for row in rows)
    assert rows[1]["quality"]["perplexity"] == pytest.approx(rows[0]["quality"]["perplexity"], rel=0.05)
    assert 0 < rows[1]["spikes_an_input"] < 5 and rows[1]["energy"]["reads_ratio"] > rows[1]["energy"]["ratio"] > 0
    assert record["configuration"]["judged_on"].startswith("what calibration left of")
    model = FASGPT2LMHeadModel.from_pretrained(out)
    assert record["configuration"]["weights_sha256"] == fingerprint(model)
    assert model.config.T == 5 and record["metrics"]["sites"].keys() == {name for name, _ in model.neurons()}
    monkeypatch.setattr(subprocess, "run", outside.run)
    assert publish(out, "tester/tiny", dry_run=tmp_path / "published") == str(tmp_path / "published")
    assert (tmp_path / "published" / "sites_fas.py").is_file()


def test_what_is_judged_was_not_calibrated_on(gpt2, corpus, tmp_path):
    from transformers import AutoTokenizer

    from training.untrained import split_texts

    texts = sentences(40)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    seen, left = split_texts(texts, tokenizer, True, 64, 32, 100)
    whole = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert seen.shape == (2, 32)
    assert seen.flatten().tolist() + [token for row in left for token in row["input_ids"]] == whole
    seen, left = split_texts(texts, tokenizer, False, 64, 32, 100)
    assert [tokenizer(text)["input_ids"] for text in texts[len(seen) :]] == [row["input_ids"] for row in left]


def test_a_validation_file_or_else_the_calibration_itself(gpt2, tmp_path, caplog):
    short = write_lines(tmp_path / "short.jsonl", [{"body": text} for text in sentences(8)])
    more = write_corpus(tmp_path / "other.jsonl", seed=1)
    convert.main(arguments(gpt2, short, tmp_path / "out", "--calibration_column", "body"))
    assert "`--calibration_file` leaves no text to judge the models on" in caplog.text
    assert "the calibration itself" in read_results(tmp_path / "out" / "conversion.json")["configuration"]["judged_on"]
    convert.main(arguments(gpt2, short, tmp_path / "out", "--validation_file", more))
    assert read_results(tmp_path / "out" / "conversion.json")["configuration"]["judged_on"].startswith(more)


def test_classifiers_with_labels_and_without(tmp_path):
    model, reviews = save_bert(tmp_path / "bert"), write_reviews(tmp_path / "reviews.jsonl")
    rows = convert.main(arguments(model, reviews, tmp_path / "out", "--validation_file", reviews))
    assert {"accuracy", "loss", "examples"} == rows[1]["quality"].keys()
    rows = convert.main([*arguments(model, reviews, tmp_path / "out"), "--tokens", "64"])
    assert 0 < rows[1]["quality"]["output_error"] < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--T", "33"], "`T` must be at most 16 with code 'phase', got 33"),
        (["--T", "33", "--code", "rate"], "`T` must be at most 32"),
        (["--T", "0"], "`T` must be at least 1"),
        (["--schedule", "stepwise"], "`schedule` must be 'layerwise' with code 'phase'"),
        (["--code_base", "1"], "`code_base` must be a finite number above 1"),
        (["--calibration_file", "empty.txt"], "`--calibration_file` must hold text, got the empty file"),
        (["--calibration_file", "blank.txt"], "`--calibration_file` must hold text, got none"),
        (["--calibration_file", "nowhere.txt"], "`--calibration_file` must be a file that exists, got 'nowhere.txt'"),
        (["--calibration_file", "a.png"], "`--calibration_file` must be one of .txt, .csv"),
        (["--calibration_column", "body"], "`--calibration_column` must name columns of the data, got ['body']"),
        (["--validation_file", "nowhere.txt"], "`--validation_file` must be a file that exists"),
        (["--tokens", "0"], "`--tokens` must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_messages(changes, message, gpt2, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", ""), ("blank.txt", "\n\n"), ("a.png", "x")):
        (tmp_path / name).write_text(text)
    assert convert.command(arguments(gpt2, corpus, tmp_path / "out", *changes)) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("Not converted: ") and message in printed


def test_models_that_cannot_be_converted_and_memory_that_runs_out(gpt2, corpus, tmp_path, monkeypatch, capsys):
    converted(stock("gpt2")).save_pretrained(tmp_path / "spiking")
    tiny_tokenizer("gpt2", tmp_path).save_pretrained(tmp_path / "spiking")
    for model, message in (
        (str(tmp_path / "spiking"), "which spikes already. Start from the checkpoint it was made from"),
        (str(tmp_path / "nowhere"), "`MODEL` must be a checkpoint that can spike"),
    ):
        assert convert.command(arguments(model, corpus, tmp_path / "out")) == 1
        assert message in capsys.readouterr().err
    assert convert.command(arguments(gpt2, corpus, gpt2)) == 1
    assert "must not be the folder of the stock model" in capsys.readouterr().err

    def fail(*args, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("training.untrained.convert_and_report", fail)
    assert convert.command(arguments(gpt2, corpus, tmp_path / "out")) == 1
    assert "memory ran out. Fewer --tokens" in capsys.readouterr().err


def test_help_is_one_page_on_both_ways_and_recipes_say_what_they_miss(capsys):
    with pytest.raises(SystemExit) as end:
        convert.command(["--help"])
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert "without training:" in page and "with training, the published method:" in page and "gpt2_downstream" in page
    assert max(map(len, page.splitlines())) <= 120
    assert convert.command([]) == 2
    assert "`MODEL` or `--model_name_or_path` is required" in capsys.readouterr().err


def test_a_gain_by_token_takes_the_power_and_end_of_least_error_in_what_follows():
    spiking = {"sites": "all", "activation": "stock", "L": None, "code": "phase", "T": 3, "schedule": "layerwise"}
    model = backbones.model("llama", "AutoModelForCausalLM", gain="token", **spiking).begin_calibration(3)
    placed = next(each for each in sites(model) if each.site.group == "mlp in")
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(32, generator=generator).mul(1.5).exp()
    values = torch.randn(200, 32, generator=generator) * scale
    values[::25, 0] *= 40  # massive activations
    with torch.no_grad():
        for layer in placed.targets:
            layer.weight.mul_(torch.randn(32, generator=generator).mul(1.5).exp())
    assert [layer.weight.shape for layer in placed.targets] == [(48, 32)] * 2  # gate and up
    weight = sum((layer.weight**2).sum(0) for layer in placed.targets).detach()

    def error(power, gain, weight):
        rms = (values**2).mean(0).sqrt().clamp(min=0.05 * (values**2).mean().sqrt())
        theta = rms**power * gain * (values / rms**power).abs().amax(-1, keepdim=True)
        emitted = (values / theta * 7 + 0.5).floor().clamp(-7, 7) / 7 * theta
        return ((emitted - values) ** 2 * weight).mean().item()

    def best(weight):
        return min((error(power, gain, weight), power, gain) for power in POWERS for gain in GAINS)[1:]

    power, gain = best(weight)
    assert power < 1 and best(torch.ones(32)) != (power, gain)
    with torch.no_grad():
        _fit(placed, values)
    rms = (values**2).mean(0).sqrt().clamp(min=0.05 * (values**2).mean().sqrt())
    torch.testing.assert_close(placed.neuron.fine_threshold.data, rms**power)
    assert placed.neuron.gain.item() == pytest.approx(gain)
    assert min(POWERS) < 0.8 and max(POWERS) == 1  # SmolLM2 takes 0.6 to 0.8


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_the_demo_with_a_tiny_llama(tmp_path, capsys, outside, monkeypatch):
    torch.manual_seed(0)
    model = stock("llama")
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer("gpt2", tmp_path).save_pretrained(tmp_path / "llama")
    flags = ["--model", str(tmp_path / "llama"), "--prompt", "the cat", "--max_new_tokens", "4"]
    monkeypatch.setattr(demo_llm.subprocess, "run", outside.run)
    record = demo_llm.main([*flags, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert record["metrics"]["equal_after_reload"] and "equal tokens" in printed and "DIFFERENT" not in printed
    assert [row["model"] for row in record["metrics"]["rows"]] == ["stock", "spiking, T = 7"]
    assert FASConfig.from_pretrained(tmp_path / "out" / "spiking").code == "phase"


@pytest.mark.slow
def test_the_demo_with_smollm2(tmp_path, capsys):
    pytest.importorskip("gguf")
    try:
        demo_llm.smollm2(tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    whole = (tmp_path / "stock" / "model.safetensors").stat().st_mtime_ns
    record = demo_llm.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "stock" / "model.safetensors").stat().st_mtime_ns == whole
    assert record["metrics"]["equal_after_reload"]
    assert record["metrics"]["rows"][1]["energy"] < 0.6
