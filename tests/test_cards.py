"""The model card: every number in it comes from a file of the checkpoint, and the client takes its metadata."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from checkpoints import MODELS, tiny_checkpoint, tiny_results
from training import untrained
from training.evaluate import command as evaluate
from training.publish import cards
from training.publish.card import (
    TEMPLATE,
    CardOptions,
    build_card,
    inherited_options,
)
from training.publish.cards import main, rewrite_card
from training.publish.files import VerificationError
from training.publish.records import Record, lineage, read_records, read_sources
from training.results import fingerprint, flat, write_json, write_results
from training_helpers import save_gpt2, write_corpus


COMMITTED = sorted(path for path in TEMPLATE.parent.glob("*.md") if path != TEMPLATE)
NUMBER = re.compile(r"(?<![\w.])\d[\d.,e+-]*\d|\d")


def make_card(folder: Path, repo_id: str, options: CardOptions, **more) -> ModelCard:
    return build_card(read_sources(folder), repo_id, options, **more)


def report(folder: Path, weights: str | None = None, data: dict | None = None, **row) -> None:
    """A report as `training.evaluate` writes it."""
    rows = [{"mode": "stock", "schedule": None, "T": 0, "quality": {"accuracy": 0.8571, "examples": 872}}]
    rows += [
        {"mode": mode, "schedule": schedule, "T": T, "quality": {"accuracy": accuracy, "examples": 872}}
        | {"agreement": 0.9137 + T / 1000, "logit_error": 0.0731, "spike_rate": 0.0271 if T else None}
        | {"energy": {"ratio": 1.0 + T * 0.733, "mac_pj": 4.6, "ac_pj": 0.9}, "seconds": 3.25}
        for mode, schedule, T, accuracy in [
            ("qcfs", None, 0, 0.8463),
            ("spiking", "stepwise", 4, 0.8377),
            ("spiking", "layerwise", 4, 0.8449),
        ]
    ]
    rows = [each | {"split": "validation", **row} for each in rows]
    configuration = {"checkpoint": str(folder), "data": data or {"task_name": "sst2"}}
    configuration["weights_sha256"] = weights
    write_results(folder / "report" / "results.json", metrics={"rows": rows}, configuration=configuration)


def calibration_record(folder: Path) -> None:
    """A record as calibration writes it."""
    sites = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)] + ["bert.pooler.activation"]
    stages = {
        stage: {
            site: {"scale": 0.9311 + i / 100, "initial_potential": 0.4823 - i / 100, "error": error * (i + 1)}
            for i, site in enumerate(sites)
        }
        for stage, error in [("uncalibrated", 0.03117), ("coarse", 0.01973), ("fine", 0.01171)]
    }
    write_json(folder / "calibration.json", {"T": 4, "L": 8, "granularity": "neuron", "stages": stages})


@pytest.fixture(autouse=True)
def loaded_here(monkeypatch):
    """The process that loads the weights is left out: tests of publishing start it."""

    def weights(folder):
        return fingerprint(MODELS["classifier"].from_pretrained(folder))

    monkeypatch.setattr(cards, "weights_sha256", weights)


@pytest.fixture(params=["evaluation", "report"])
def folder(request, tmp_path):
    tiny_checkpoint(tmp_path / "checkpoint", "classifier")
    calibration_record(tmp_path / "checkpoint")
    if request.param == "report":
        report(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def leaves(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *leaves(item))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def forms(value) -> set[str]:
    """How a value of a file may stand in a card."""
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int | float):
        return {str(value), f"{value:g}", *(f"{value:.{digits}f}" for digits in (2, 4, 5))}
    return set(NUMBER.findall(str(value)))


def unexplained(card: ModelCard, *sources: Path) -> list[str]:
    """Numbers of a card that are in no results file or configuration, nor in the template."""
    documents = [json.loads(path.read_text()) for path in sources]
    known = {form for document in documents for leaf in leaves(document) for form in forms(leaf)}
    known |= set(NUMBER.findall(TEMPLATE.read_text()))
    configs = [document.get("sources", {}).get("config", document) for document in documents]
    # Sites: one for each layer, and the pooler.
    known |= {str(config["num_hidden_layers"] + 1) for config in configs if "num_hidden_layers" in config}
    return [
        number for number in NUMBER.findall(card.content) if number not in known and number.rstrip(".") not in known
    ]


def test_every_number_comes_from_a_file(folder):
    card = make_card(folder, "tester/tiny", CardOptions(license="mit", language=["en"]))
    assert unexplained(card, *folder.rglob("*.json")) == []
    assert len(NUMBER.findall(card.content)) > 100


def test_a_typed_number_would_be_found(folder):
    card = make_card(folder, "tester/tiny", CardOptions())
    card.content += "\nIt reaches 91.3 % at T = 4.\n"
    assert unexplained(card, *folder.rglob("*.json")) == ["91.3"]


def test_metadata_survives_the_validation_of_the_client(folder):
    """What the client itself checks: it parses, and its model index turns into the same evaluation results."""
    options = CardOptions(license="apache-2.0", language=["en"], base_model="someone/base")
    card = make_card(folder, "tester/tiny", options)
    card.save(folder / "README.md")
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
    assert data.to_dict() == card.data.to_dict()
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert (data.pipeline_tag, data.base_model) == ("text-classification", "someone/base")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.datasets == ["nyu-mll/glue"] and {"spiking-neural-network", "custom_code"} <= set(data.tags)
    name, results = model_index_to_eval_results(eval_results_to_model_index("tiny", data.eval_results))
    assert name == "tiny" and results == data.eval_results
    for result in results:
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
            "nyu-mll/glue",
            "sst2",
            "validation",
        )


def test_one_result_for_each_metric_T_and_schedule(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    found = make_card(tmp_path, "tester/tiny", CardOptions()).data.eval_results
    told = [(r.metric_type, r.metric_args["T"], r.metric_args.get("schedule"), r.metric_value) for r in found]
    rows = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]["rows"]
    assert told == [("accuracy", row["T"], row["schedule"], row["quality"]["accuracy"]) for row in rows]


def test_the_report_comes_first_and_brings_energy(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    assert "energy ratio" not in make_card(tmp_path, "tester/tiny", CardOptions()).content
    report(tmp_path)
    content = make_card(tmp_path, "tester/tiny", CardOptions()).content
    assert "| spiking | 4 | stepwise | 0.8377 | 0.9177 | GLUE sst2 | validation | 872 examples |" in content
    assert "| spiking | 4 | stepwise | 0.0271 | 3.9320 |" in content
    assert "| stock model | 0 | – | 0.8571 | – | GLUE sst2 |" in content
    assert "4.6 pJ" in content and "`report/results.json`" in content


def test_rows_of_an_earlier_version_are_refused(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    content = json.loads((tmp_path / "evaluation.json").read_text())
    write_json(tmp_path / "evaluation.json", content | {"metrics": [{"mode": "qcfs", "T": 0, "accuracy": 0.8}]})
    with pytest.raises(VerificationError, match=r"`evaluation.json` must hold rows .*Evaluate the checkpoint again"):
        make_card(tmp_path, "tester/tiny", CardOptions())


def test_calibration_is_told_site_by_site(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    calibration_record(tmp_path)
    content = make_card(tmp_path, "tester/tiny", CardOptions()).content
    assert "| `bert.pooler.activation` | 0.09351 | 0.05919 | 0.03513 | 0.95110 | 0.46230 |" in content


@pytest.mark.parametrize("base", [None, 3, {"a": 1}, ["x"], "../x"])
def test_a_base_model_of_any_type_is_no_fault(base, tmp_path):
    tiny_checkpoint(tmp_path, "classifier", results=False)
    tiny_results(tmp_path, "classifier", base=base)
    assert make_card(tmp_path, "tester/tiny", inherited_options(tmp_path, CardOptions())).data.base_model is None


def test_a_calibration_of_other_settings_is_refused(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    calibration_record(tmp_path)
    content = json.loads((tmp_path / "calibration.json").read_text())
    write_json(tmp_path / "calibration.json", content | {"T": 8})
    with pytest.raises(
        VerificationError, match=r"`calibration.json` must be of the calibration .*'T': 4.*got .*'T': 8"
    ):
        make_card(tmp_path, "tester/tiny", CardOptions())


HOSTILE = "x|y`z` <img src=x> [a](javascript:b) $\\foo$\n# head"


def test_names_out_of_checkpoints_and_data_are_no_markup_in_a_card(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    calibration_record(tmp_path)
    path = tmp_path / "evaluation.json"
    content = json.loads(path.read_text())
    for row in content["metrics"]["rows"]:
        row["quality"][HOSTILE] = 0.5
        row["split"] = HOSTILE if row["T"] else "validation"
    content["hardware"], content["versions"] = {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}
    content |= {"commit": HOSTILE, "date": HOSTILE, "command": f"run {HOSTILE}"}
    content["configuration"]["model"]["stage"] = HOSTILE
    content["configuration"]["data"] = {"dataset_name": HOSTILE}
    write_json(path, content)
    calibration = json.loads((tmp_path / "calibration.json").read_text())
    calibration["stages"] = {HOSTILE: {HOSTILE: next(iter(calibration["stages"]["fine"].values()))}}
    write_json(tmp_path / "calibration.json", calibration)
    edited = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", edited | {"fas_version": HOSTILE, "transformers_version": HOSTILE})
    card = make_card(tmp_path, "tester/tiny", CardOptions())
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text)  # without code spans
    for markup in ("<img", "[a](", "\n# head", "$"):
        assert markup not in text, markup
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    lines = [line.replace("\\|", "").count("|") for line in card.text.splitlines() if line.startswith("|")]
    assert min(lines) > 2 and len(lines) > 10


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sources": {}, "repo_id": "a/b", "options": {}}'])
def test_a_file_that_is_beside_no_card_is_a_message(content, tmp_path, capsys):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "card.json")])
    said = capsys.readouterr().err
    assert "must" in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        main([str(tmp_path / "card.json"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_edited_results_beside_a_card_are_refused(folder, tmp_path, capsys):
    report(folder, fingerprint(MODELS["classifier"].from_pretrained(folder)))
    assert main([str(folder), "tester/tiny", str(tmp_path / "tiny.md")]) == 0
    content = json.loads((tmp_path / "tiny.json").read_text())
    measured_by(content).content["metrics"]["rows"][0]["quality"]["accuracy"] = 0.99
    write_json(tmp_path / "tiny.json", content)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "tiny.json")])
    assert "must stand as it was written" in capsys.readouterr().err


def test_the_stages_are_followed_to_the_base_model(tmp_path):
    base, first, second = tmp_path / "base", tmp_path / "run" / "qcfs", tmp_path / "run" / "calibrated"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: bsd-3-clause\nlanguage: de\nbase_model: theirs/of-theirs\n---\n")
    tiny_checkpoint(first, "classifier", results=False)
    tiny_results(first, "classifier", base=str(base))
    tiny_checkpoint(second, "classifier", results=False)
    tiny_results(second, "classifier", base="elsewhere/run/qcfs")  # moved together since
    assert [path for path, _ in lineage(second)] == [second, first]
    options = inherited_options(second, CardOptions())
    assert options == CardOptions(license="bsd-3-clause", language=["de"], base_model=None)
    card = make_card(second, "tester/tiny", options)
    assert card.data.base_model is None and str(tmp_path) not in card.content
    assert "made from `base` (a local folder)" in card.content
    assert card.content.count("\n| calibrate | GLUE sst2 |") == 2
    own = CardOptions(license="mit", base_model="someone/base")
    assert inherited_options(second, own) == CardOptions(license="mit", language=["de"], base_model="someone/base")


def test_a_folder_without_results_says_so(tmp_path):
    tiny_checkpoint(tmp_path, "gpt2", results=False, calibrated=False)
    card = make_card(tmp_path, "tester/tiny", CardOptions())
    for text in ("No results file", "Not measured", "Not calibrated", "No training record"):
        assert text in card.content
    assert card.data.eval_results is None


def test_the_snippet_is_python_and_names_the_commit(tmp_path):
    tiny_checkpoint(tmp_path, "gpt2")
    content = make_card(tmp_path, "tester/tiny", CardOptions(), pinned="a" * 40).content
    snippet = re.search(r"```python\n(.*?)```", content, re.DOTALL)[1]
    compile(snippet, "snippet", "exec")
    assert len(snippet.strip().splitlines()) == 3 and snippet.count(f'revision="{"a" * 40}"') == 2
    assert "AutoModelForCausalLM" in snippet


# Cards on files: beside each stands what it was made from


def test_the_command_writes_what_the_card_can_be_made_from_again(folder, tmp_path):
    report(folder, fingerprint(MODELS["classifier"].from_pretrained(folder)))
    flags = ["--license", "mit", "--language", "en", "de", "--base-model", "someone/base"]
    assert main([str(folder), "tester/tiny", str(tmp_path / "tiny.md"), *flags]) == 0
    shutil.rmtree(folder)
    moved = shutil.copy(tmp_path / "tiny.json", tmp_path / "moved.json")
    assert main([str(moved)]) == 0
    assert (tmp_path / "moved.md").read_bytes() == (tmp_path / "tiny.md").read_bytes()
    assert "site" in (tmp_path / "tiny.md").read_text() and "4.6 pJ" in (tmp_path / "tiny.md").read_text()


def test_a_card_of_a_report_of_other_weights_is_refused(tmp_path, capsys):
    report(tmp_path / "made", fingerprint(tiny_checkpoint(tmp_path / "made", "classifier")))
    arguments = [str(tmp_path / "made"), "tester/tiny", str(tmp_path / "tiny.md")]
    assert main(arguments) == 0
    (tmp_path / "tiny.md").unlink(), (tmp_path / "tiny.json").unlink()
    for change in ("other weights", "no fingerprint"):
        if change == "other weights":
            tiny_checkpoint(tmp_path / "made", "classifier", seed=1)
        else:
            report(tmp_path / "made")
        with pytest.raises(SystemExit):
            main(arguments)
        said = capsys.readouterr().err
        assert "`report/results.json` must be measured on the weights in" in said and "training.evaluate" in said
        assert ("weights it does not name" in said) == (change == "no fingerprint")
        assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("arguments", [["x"], ["x", "a/b"], ["x", "a/b", "card.json"]])
def test_a_card_needs_a_name_of_its_own(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "`card` must be a file NAME.md to write" in capsys.readouterr().err


@pytest.fixture(params=COMMITTED, ids=lambda path: path.stem)
def committed(request, tmp_path, monkeypatch):
    """A committed card, and a copy of the file beside it in a folder where nothing else is."""
    monkeypatch.chdir(tmp_path)
    return request.param, Path(shutil.copy(request.param.with_suffix(".json"), tmp_path))


def test_a_committed_card_is_what_the_file_beside_it_makes(committed):
    card, source = committed
    rewrite_card(source)
    assert source.with_suffix(".md").read_bytes() == card.read_bytes()


def test_every_number_of_a_committed_card_stands_in_the_file_beside_it(committed):
    path, source = committed
    card = ModelCard.load(path)
    assert unexplained(card, source) == []
    rows = measured_by(json.loads(source.read_text())).rows
    measured = {(row["T"], row["schedule"], row["split"]): flat(row) for row in rows if row["mode"] != "stock"}
    named = set()
    for each in card.data.eval_results:
        key = each.metric_args["T"], each.metric_args.get("schedule"), each.dataset_split
        assert each.metric_value == measured[key][each.metric_type]
        named.add(key)
    assert named == measured.keys()


def test_a_committed_card_shows_every_figure_of_quality_and_cost(committed):
    """Another figure in the file makes another card: none of those that are shown stands there for nothing."""
    card, source = committed
    original = source.read_text()
    changed = 0
    for index, row in enumerate(map(flat, measured_by(json.loads(original)).rows)):
        for name in ("accuracy", "perplexity", "spike_rate", "energy_ratio"):
            if row.get(name) is None:
                continue
            content = json.loads(original)
            change = measured_by(content).content["metrics"]["rows"][index]
            if name == "energy_ratio":
                change["energy"]["ratio"] += 0.011
            elif name in change:
                change[name] += 0.011
            else:
                change["quality"][name] += 0.011
            measured_by(content).content.pop("sha256", None)  # what was edited is refused by it
            source.write_text(json.dumps(content))
            rewrite_card(source)
            assert source.with_suffix(".md").read_bytes() != card.read_bytes(), (row, name)
            changed += 1
    assert changed >= 2 * (index + 1)


def measured_by(content) -> Record:
    """The record of a file beside a card that its tables come from."""
    return next(record for each in content["sources"]["records"] if (record := Record(**each)).rows)


def test_a_list_beside_the_base_model_is_no_results_file(tmp_path):
    """all-MiniLM-L6-v2 has such a data_config.json."""
    (tmp_path / "data_config.json").write_text("[1]")
    (tmp_path / "evaluation.json").write_text('{"metrics": {}, "configuration": {}}')
    assert [record.file for record in read_records(tmp_path)] == ["evaluation.json"]


# What was measured is told as what was measured


def test_results_are_of_the_data_they_were_measured_on_not_of_those_trained_on(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")  # trained on GLUE sst2
    data = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2", "limit": 8}
    report(tmp_path, data=data, split="test", quality={"perplexity": 31.25, "loss": 3.44, "tokens": 4096})
    card = make_card(tmp_path, "tester/tiny", CardOptions())
    for result in card.data.eval_results:
        named = (result.dataset_type, result.dataset_config, result.dataset_split, result.dataset_args)
        assert named == ("Salesforce/wikitext", "wikitext-2", "test", {"rows": "4096 tokens"})
        assert result.metric_type in ("perplexity", "agreement")  # the number of tokens is none
    assert (
        "| spiking | 4 | stepwise | 31.25 | 0.9177 | Salesforce/wikitext wikitext-2 | test | 4096 tokens |"
        in card.content
    )
    assert card.data.datasets == ["nyu-mll/glue"] and "| calibrate | GLUE sst2 |" in card.content


def test_epochs_are_those_that_were_trained(tmp_path):
    tiny_checkpoint(tmp_path, "classifier")
    path = tmp_path / "evaluation.json"
    content = json.loads(path.read_text())
    content["configuration"]["training"]["num_train_epochs"] = 1.0
    write_json(path, content | {"training": {"epoch": 0.2598, "train_loss": 0.5}})
    assert "| 0.26 |" in make_card(tmp_path, "tester/tiny", CardOptions()).content


@pytest.mark.parametrize(
    ("base", "told"),
    [("bases/mini", "`mini`"), ("gt_minilm/model", "`gt_minilm/model`"), ("a/checkpoint", "`a/checkpoint`")],
)
def test_a_base_model_that_is_a_folder_is_named_in_words_alone(base, told, tmp_path):
    (tmp_path / base).mkdir(parents=True)
    folder = tmp_path / "run"
    tiny_checkpoint(folder, "classifier", results=False)
    tiny_results(folder, "classifier", base=str(tmp_path / base))
    sources = read_sources(folder)
    for _ in range(2):
        card = build_card(sources, "tester/tiny", CardOptions())
        assert f"made from {told} (a local folder)" in card.content and card.data.base_model is None
        sources.forget_paths()


def test_paths_of_this_machine_stay_here(folder, tmp_path):
    report(
        folder,
        fingerprint(MODELS["classifier"].from_pretrained(folder)),
        {"validation_file": f"{folder}/secret/rows.csv"},
    )
    card = tmp_path / "out" / "tiny.md"
    card.parent.mkdir()
    assert main([str(folder), "tester/tiny", str(card)]) == 0
    for path in (card, card.with_suffix(".json")):
        text = path.read_text()
        assert "rows.csv" in text and str(tmp_path) not in text and "/home/someone" not in text, path


# Conversion without training


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """What `training.convert MODEL --sites all` wrote: a causal model, its tokenizer and conversion.json."""
    folder = tmp_path_factory.mktemp("converted")
    source, corpus = save_gpt2(folder / "mini" / "model"), write_corpus(folder / "corpus.jsonl")
    line = f"{source} --sites all --code phase --T 3 --calibration_file {corpus} --tokens 150 --limit 4"
    untrained.main([*line.split(), "--output_dir", str(folder / "spiking")])
    return folder / "spiking"


def test_a_converted_checkpoint_has_a_card_with_its_table(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "weights_sha256", lambda folder: fingerprint(MODELS["gpt2"].from_pretrained(folder)))
    assert main([str(converted), "tester/spiking", str(tmp_path / "spiking.md"), "--license", "mit"]) == 0
    text = (tmp_path / "spiking.md").read_text()
    rows = json.loads((converted / "conversion.json").read_text())["metrics"]["rows"]
    for row, name in zip(rows, ("stock model | 0 | –", "spiking | 3 | layerwise"), strict=True):
        told = f"| {name} | {row['quality']['perplexity']:.2f} |"
        assert (
            told in text and f"| corpus.jsonl (local files) | validation | {row['quality']['tokens']} tokens |" in text
        )
    assert f"{rows[1]['energy']['ratio']:.4f}" in text and "4.6 pJ" in text
    for said in (
        "made from `mini/model` (a local folder)",
        "at the queries and the values of every attention and at the input of the head",
        "spikes of both signs, in the code `phase`",
        "With `T` = 0 it runs as the stock model,",
        "Converted without training: thresholds of least squared error on 150 tokens of corpus.jsonl",
    ):
        assert said in text, said
    assert "QCFS" not in text and str(converted.parent) not in text
    assert unexplained(ModelCard.load(tmp_path / "spiking.md"), tmp_path / "spiking.json") == []
    again = shutil.copy(tmp_path / "spiking.json", tmp_path / "again.json")
    assert main([str(again)]) == 0 and (tmp_path / "again.md").read_text() == text


def test_a_network_without_levels_that_was_trained_is_neither_quantised_nor_the_stock_model(
    converted, tmp_path, monkeypatch
):
    monkeypatch.setattr(cards, "weights_sha256", lambda folder: fingerprint(MODELS["gpt2"].from_pretrained(folder)))
    folder = shutil.copytree(converted, tmp_path / "trained")
    (folder / "conversion.json").unlink()
    corpus = converted.parent / "corpus.jsonl"
    evaluate.main(
        f"{folder} --T 3 --validation_file {corpus} --limit 4 --window 16 --output_dir {folder / 'report'}".split()
    )
    assert main([str(folder), "tester/spiking", str(tmp_path / "card.md"), "--license", "mit"]) == 0
    text = (tmp_path / "card.md").read_text()
    assert "With `T` = 0 it runs as the ANN with the same weights," in text
    assert "| ANN | 0 |" in text and "The ANN is this network at T = 0, without spikes and not quantised." in text
    assert "QCFS" not in text and "stock model |" not in text
