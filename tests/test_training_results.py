"""Results files: whole or absent, complete, and the source of every table."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from training import results


@dataclass
class Settings:
    T: int = 4
    name: str = "tiny"


def test_a_results_file_tells_what_how_and_where(tmp_path):
    path = tmp_path / "new" / "results.json"
    results.write_results(
        path, metrics=[{"T": 1, "accuracy": np.float64(0.5), "rates": torch.tensor([0.1])}], configuration=Settings()
    )
    record = results.read_results(path)
    assert {"command", "date", "commit", "versions", "hardware", "configuration", "metrics"} <= record.keys()
    assert record["configuration"] == {"T": 4, "name": "tiny"}
    assert record["metrics"][0]["accuracy"] == 0.5
    assert record["metrics"][0]["rates"] == pytest.approx([0.1])
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["hardware"]["cores"] >= 1


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_json(path, {"kept": 1})
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.write_json(path, {"kept": 2})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_has_one_line_per_row_and_a_dash_for_what_is_missing():
    table = results.markdown_table([{"mode": "QCFS", "accuracy": 0.84567}, {"mode": "SNN", "T": 4, "accuracy": 0.8}])
    assert table.splitlines() == [
        "| mode | accuracy | T |",
        "| --- | ---: | ---: |",
        "| QCFS | 0.8457 | – |",
        "| SNN | 0.8000 | 4 |",
    ]
    by_column = results.markdown_table([{"a": 0.12345, "b": 0.5}], digits={"a": 2})
    assert by_column.splitlines()[-1] == "| 0.12 | 0.5000 |"


def test_broken_results_are_named(tmp_path):
    for content in ("{", "[1]", '{"x":' * 99_999):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results\.json` must"):
            results.read_results(tmp_path / "results.json")


@pytest.mark.parametrize("text", ["a`b", "`", "``a`", "a\nb", "", "| x"])
def test_a_code_span_holds_any_text(text):
    span = results.code(text)
    ticks = len(span) - len(span.lstrip("`"))
    assert span.endswith("`" * ticks) and "\n" not in span
    assert "`" * ticks not in span[ticks:-ticks]


def test_names_are_escaped_and_plain_ones_stay():
    assert results.escaped("matthews_correlation, T = 4 (bert-base)") == "matthews_correlation, T = 4 (bert-base)"
    assert not set("`*[]<>$|") & set(results.escaped("`*[a](b)<i>$x$ | _c_\n# d"))
    table = results.markdown_table([results.escaped_row({"a|b": "c|d\ne"})])
    assert [line.count("|") for line in table.splitlines()] == [2, 2, 2]


def test_a_checksum_is_of_what_was_measured_and_on_what(tmp_path):
    record = results.write_results(
        tmp_path / "r.json", metrics=[{"loss": float("nan"), "T": 1}], configuration={"a": 1}
    )
    read = results.read_results(tmp_path / "r.json")
    assert record["sha256"] == read["sha256"] == results.checksum(read)
    assert results.checksum(read | {"metrics": []}) != read["sha256"] != results.checksum(read | {"configuration": {}})
    assert results.checksum(read | {"date": "tomorrow"}) == read["sha256"]
