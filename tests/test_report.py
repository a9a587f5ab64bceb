"""The report says what the results say, and is one file."""

import json
import re

import pytest
from matplotlib.image import imread

import tiny
from training.evaluate.measurement import evaluate
from training.evaluate.report import NOT_COUNTED, headline, main, tables, write_report
from training.results import write_results


@pytest.fixture(scope="module")
def metrics():
    examples = [{"input_ids": list(range(1, 4 + i)), "labels": i % 3} for i in range(6)]
    model = tiny.model("classify")
    return evaluate(model, examples, metric="mnli", timesteps=[1, 2], stock=tiny.model("classify"), progress=False)


def write(folder, metrics, status="complete"):
    configuration = {"checkpoint": "models/a<b>bert", "data": {"task_name": "mnli", "limit": None}}
    write_results(
        folder / "results.json", metrics=metrics, configuration=configuration, status=status, command="run it"
    )
    return folder / "results.json"


def test_everything_is_in_one_file(metrics, tmp_path):
    html = write_report(write(tmp_path, metrics)).read_text()
    assert html.count('src="data:image/png;base64,') == 3
    # Nothing else is loaded from anywhere.
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script|<link', html)
    assert "a<b>bert" not in html
    assert "a&lt;b&gt;bert" in html
    for row in metrics["rows"]:
        assert f"{row['quality']['accuracy']:.4f}" in html
    assert "None" not in html
    for text in ("run it", "Partial", *NOT_COUNTED[:1]):
        assert (text in html) == (text != "Partial")


def test_plots_are_images(metrics, tmp_path):
    write_report(write(tmp_path, metrics))
    for name in ("quality", "spike_rate", "energy"):
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.05


def test_numbers_of_the_tables(metrics, tmp_path):
    results = json.loads(write(tmp_path, metrics).read_text())
    found = tables(results)
    assert [row["run"] for row in found["Quality"]] == [
        *("stock model", "QCFS ANN", "stepwise T = 1", "stepwise T = 2", "layerwise T = 1", "layerwise T = 2")
    ]
    energy = {row["run"]: row for row in found["Energy per token"]}
    stepwise = next(row["energy"] for row in metrics["rows"] if (row["schedule"], row["T"]) == ("stepwise", 2))
    assert energy["stepwise T = 2"]["ratio to ANN"] == stepwise["ratio"] > 1
    assert energy["stepwise T = 2"]["ratio as published"] == stepwise["ratio_replicated"]
    assert energy["QCFS ANN"]["ratio to ANN"] == 1
    text = write_report(tmp_path / "results.json").with_name("report.md").read_text()
    assert f"{stepwise['ratio']:.4f}" in text
    assert "| stock model |" in text


def test_an_interrupted_run(metrics, tmp_path):
    begun = {"rows": metrics["rows"][:2]}
    html = main([str(write(tmp_path, begun, "partial"))])
    assert "Partial: the run was interrupted" in html.read_text()


def test_only_the_stock_model_is_finished(metrics, tmp_path):
    write_report(write(tmp_path, {"rows": metrics["rows"][:1]}, "partial"))


@pytest.mark.parametrize(
    "quality, name",
    [
        ({"perplexity": 9.0, "loss": 2.2, "tokens": 5}, "perplexity"),
        ({"accuracy": 0.5, "f1": 0.4, "examples": 5}, "f1"),
        ({"pearson": 0.5, "spearmanr": 0.4, "examples": 5}, "spearmanr"),
    ],
)
def test_the_quality_to_plot(quality, name):
    assert headline({"metrics": {"rows": [{"quality": quality}]}}) == name


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"metrics": []}', '{"metrics": {"rows": []}}'])
def test_no_results(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="`path` must"):
        write_report(path)
    assert {each.name for each in tmp_path.iterdir()} <= {"results.json"}
