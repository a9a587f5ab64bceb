"""The report says what the results say, and is one file."""

import json
import re

import pytest
from matplotlib.image import imread

import tiny
from training.evaluate import plots
from training.evaluate.evaluation import Evaluation, headline, summary
from training.evaluate.measurement import evaluate
from training.evaluate.report import NOT_COUNTED, main, tables, write_report
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


@pytest.fixture(scope="module")
def made(metrics, tmp_path_factory):
    """The folder of a report, not to be changed."""
    return write_report(write(tmp_path_factory.mktemp("report"), metrics)).parent


def test_everything_is_in_one_file(metrics, made):
    html = (made / "report.html").read_text()
    assert html.count('src="data:image/png;base64,') == html.count('srcset="data:image/png;base64,') == 5
    # Nothing else is loaded from anywhere.
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script|<link', html)
    assert "a<b>bert" not in html
    assert "a&lt;b&gt;bert" in html
    for row in metrics["rows"]:
        assert f"{row['quality']['accuracy']:.3f}" in html
    assert "None" not in html
    for text in ("run it", "Partial", *NOT_COUNTED[:1]):
        assert (text in html) == (text != "Partial")


def test_plots_are_images(made):
    for name in ("quality", "spike_rate", "spike_rate_histogram", "raster", "energy"):
        pixels = imread(made / f"{name}.png")
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.05


def test_numbers_of_the_tables(metrics, made):
    results = json.loads((made / "results.json").read_text())
    found = tables(results)
    assert [row["run"] for row in found["Quality"]] == [
        *("stock model", "QCFS ANN", "stepwise T = 1", "stepwise T = 2", "layerwise T = 1", "layerwise T = 2")
    ]
    energy = {row["run"]: row for row in found["Energy per token"]}
    stepwise = next(row["energy"] for row in metrics["rows"] if (row["schedule"], row["T"]) == ("stepwise", 2))
    assert energy["stepwise T = 2"]["ratio to ANN"] == stepwise["ratio"] > 1
    assert energy["stepwise T = 2"]["ratio as published"] == stepwise["ratio_replicated"]
    assert energy["QCFS ANN"]["ratio to ANN"] == 1
    text = (made / "report.md").read_text()
    assert f"{stepwise['ratio']:.3f}" in text
    assert "| stock model |" in text


def test_an_interrupted_run(metrics, tmp_path, undrawn):
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
    assert headline([{"quality": quality}]) == name


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"metrics": []}', '{"metrics": {"rows": []}}'])
def test_no_results(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="`path` must"):
        write_report(path)
    assert {each.name for each in tmp_path.iterdir()} <= {"results.json"}


HOSTILE = "x|y`z` <img src=x onerror=alert(1)> [a](javascript:b) $\\foo$\n# head"


def test_names_out_of_checkpoints_and_data_are_no_markup(metrics, tmp_path):
    hostile = json.loads(json.dumps(metrics))
    for row in hostile["rows"]:
        row["quality"][HOSTILE] = 0.5
        for site in row.get("sites", ()):
            site["site"] = HOSTILE
    configuration = {"checkpoint": f"models/{HOSTILE.replace('/', '')}", "data": {"dataset": HOSTILE}}
    path = tmp_path / "results.json"
    write_results(path, metrics=hostile, configuration=configuration, command=f"run {HOSTILE}", status="complete")
    html = write_report(path).read_text()
    text = (tmp_path / "report.md").read_text()
    assert "<img src=x" not in html and "onerror" in html
    span = f"``run {HOSTILE}``".replace("\n", " ")
    assert span in text
    for markup in ("<img", "[a](", "\n# head", "`z`", "$"):
        assert markup not in text.replace(span, ""), markup
    found = [line.count("|") for line in text.splitlines() if line.startswith("| QCFS ANN")]
    assert found == [line.count("|") for line in text.splitlines() if line.startswith("| stepwise T = 1")]


FIELDS = ["command", "date", "commit", "versions", "hardware", "configuration"]
ROW_FIELDS = ["mode", "T", "schedule", "quality", "agreement", "logit_error", "sites"]


@pytest.mark.parametrize("field", [*FIELDS, *(f"metrics.rows.-1.{name}" for name in ROW_FIELDS)])
def test_a_report_with_a_missing_field_says_which(field, metrics, tmp_path, capsys):
    path = write(tmp_path, metrics)
    content = json.loads(path.read_text())
    *owners, last = field.split(".")
    owner = content
    for each in owners:
        owner = owner[int(each) if each.lstrip("-").isdigit() else each]
    del owner[last]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        main([str(path)])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in said
    assert f"results.json' with no '{last}'" in said or f"with one without {last}" in said
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


SPOILED_ROWS = {
    "no-quality-known": (lambda row: row.update(quality={"x": 1.0}), "a quality of none of perplexity"),
    "text-for-a-number": (lambda row: row["quality"].update(accuracy="good"), "`accuracy` 'good', no finite number"),
    "no-number": (lambda row: row["quality"].update(loss=float("nan")), "`loss` nan, no finite number"),
    "unknown-schedule": (lambda row: row.update(schedule="magic", T=3, sites=[]), "with no 'magic'"),
    "empty": (lambda row: row.clear(), "with one without mode"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED_ROWS.values(), ids=SPOILED_ROWS)
def test_a_spoiled_row_is_a_message_and_writes_nothing(spoil, message, metrics, tmp_path):
    path = write(tmp_path, metrics)
    content = json.loads(path.read_text())
    spoil(content["metrics"]["rows"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        write_report(path)
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_debug_shows_the_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.json"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_report_of_the_accumulated_schedule_is_drawn(metrics, tmp_path):
    rows = [row | {"schedule": "accumulated"} if row["schedule"] == "stepwise" else row for row in metrics["rows"]]
    write_report(write(tmp_path, {"rows": rows}))


def test_the_headline_comes_first_and_provenance_last(metrics, made):
    html, text = ((made / f"report.{kind}").read_text() for kind in ("html", "md"))
    for page in (html, text):
        places = [page.index(each) for each in ("of the ANN", "How to read it", "Where it comes from", "Machine: ")]
        assert places == sorted(places)
    best = max((row for row in metrics["rows"] if row["T"]), key=lambda row: row["quality"]["accuracy"])
    assert f"accuracy {best['quality']['accuracy']:.3f} (stock model" in html[: html.index("<table")]
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_a_report_of_what_evaluate_returned(metrics, tmp_path):
    begun = Evaluation({"rows": metrics["rows"][:1]}, metrics.configuration, "fas.evaluate(model, data)")
    assert write_report(begun, tmp_path / "made").read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match="`folder` must be given for what `evaluate` returned"):
        write_report(metrics)
    table = summary(metrics)
    assert repr(metrics) == table and "| QCFS ANN |" in table and "loss" not in table


def axes_of(draw, metrics):
    return draw({"metrics": metrics}).axes[0]


def test_timesteps_are_whole_and_legends_stand_outside(metrics):
    axes = axes_of(plots.quality_plot, metrics)
    assert [each.get_text() for each in axes.get_xticklabels()] == ["1", "2"]
    for name, (draw, _) in plots.figures({"metrics": metrics}).items():
        figure = draw({"metrics": metrics})
        assert figure.axes[0].get_legend() is None and len(figure.legends) == (name != "raster"), name
        figure.canvas.draw()
        assert any(each.get_text() for each in figure.axes[0].get_yticklabels()), name


def spoiled(metrics, **site):
    rows = json.loads(json.dumps(metrics["rows"]))
    for row in rows:
        if row["T"]:
            row["sites"][1] |= site
    return {"rows": rows}


def test_sites_are_categories_and_dead_ones_are_marked(metrics):
    neurons = metrics["rows"][2]["sites"][1]["neurons"]
    dead = spoiled(metrics, dead=neurons, spike_rate=0.0)
    axes = axes_of(plots.spike_rate_plot, dead)
    names = [each.get_text() for each in axes.get_xticklabels()]
    assert names[0] == "0 intermediate_act_fn" and names[-1] == "pooler.activation"
    (marked,) = (line for line in axes.lines if "dead" in str(line.get_label()))
    assert {*marked.get_xdata()} == {1} and all(line.get_linestyle() == "None" for line in axes.lines)
    assert "1 intermediate_act_fn (dead)" in [
        row["site"] for row in tables({"metrics": dead})["Sites, stepwise T = 1"]
    ]


def test_many_sites_are_drawn_by_block(metrics):
    rows = json.loads(json.dumps(metrics["rows"]))
    for row in rows:
        if row["T"]:
            row["sites"] = [
                {**row["sites"][0], "site": f"model.layers.{block}.mlp.{name}.site"}
                for block in range(10)
                for name in ("up_proj", "down_proj")
            ]
    axes = axes_of(plots.spike_rate_plot, {"rows": rows})
    assert [each.get_text() for each in axes.get_xticklabels()] == [str(block) for block in range(10)]
    assert [line.get_label() for line in axes.lines] == ["mlp.up_proj", "mlp.down_proj"]
    assert axes.get_title() == "spike rate by block, stepwise T = 2"


def test_the_histogram_is_of_all_neurons(metrics):
    axes = axes_of(plots.histogram_plot, metrics)
    row = next(row for row in metrics["rows"] if row["T"] == 2 and row["schedule"] == "stepwise")
    counts = [sum(site["histogram"][j] for site in row["sites"]) for j in range(11)]
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert heights == pytest.approx([count / sum(counts) for count in counts])
