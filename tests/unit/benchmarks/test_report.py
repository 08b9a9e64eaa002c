"""The form in which benchmarks tell their figures."""

from __future__ import annotations

import json
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.report import Bar


@pytest.mark.parametrize(
    ("value", "bar", "holds"),
    [
        (40.0, "<= 40", True),
        (40.1, "<= 40", False),
        (0.6, ">= 0.6", True),
        (0.5, ">= 0.6", False),
        (3, ">= 5e6", False),
    ],
)
def test_a_bar_holds_up_to_its_limit(value: float, bar: str, holds: bool) -> None:
    assert Bar.of("x", value, "s", bar).holds is holds


def test_a_figure_without_a_bar_is_reported_without_a_verdict() -> None:
    assert Bar.of("x", 1.0, "s") == Bar("x", 1.0, "s", None, None)


def test_a_bar_in_no_known_form_is_an_error() -> None:
    with pytest.raises(KeyError):
        Bar.of("x", 1.0, "s", "< 2")


def test_the_file_holds_machine_bars_and_raw(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    report.write(file, {"cores": 2}, [Bar.of("start", 20.5, "s", "<= 40"), Bar.of("x", 1.0, "ms")], {"rounds": [1, 2]})
    assert json.loads(file.read_text()) == {
        "machine": {"cores": 2},
        "bars": [
            {"name": "start", "value": 20.5, "unit": "s", "bar": "<= 40", "holds": True},
            {"name": "x", "value": 1.0, "unit": "ms", "bar": None, "holds": None},
        ],
        "raw": {"rounds": [1, 2]},
    }


def test_the_machine_is_told_without_its_name() -> None:
    machine = report.machine()
    assert set(machine) == {"cpu", "cores", "memory_gib", "kernel", "python", "load"}
    json.dumps(machine)


def test_the_spread_of_an_even_count_has_the_middle_as_its_median() -> None:
    assert report.spread([4.0, 1.0, 2.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "count": 4}


def test_the_table_says_what_was_missed() -> None:
    text = StringIO()
    bars = [Bar.of("one", 1234.5, "µs", "<= 10"), Bar.of("two", 0.25, "s", "<= 10"), Bar.of("three", 2.0, "s")]
    report.show("Figures", bars, Console(file=text, width=100))
    rows = {line.split()[0]: line for line in text.getvalue().splitlines() if line.strip()}
    assert "1,234" in rows["one"]
    assert "MISSED" in rows["one"]
    assert "holds" in rows["two"]
    assert not {"holds", "MISSED"} & set(rows["three"].split())


def test_work_of_this_process_is_not_other_load() -> None:
    load = report.OtherLoad()
    began, spent = time.process_time(), 0.0
    started = time.perf_counter()
    while spent < 0.3:
        spent = time.process_time() - began
    elapsed = time.perf_counter() - started
    cores = report.machine()["cores"]
    assert isinstance(cores, int)
    # What is left over of all cores, and a little for the kernel's clock, which ticks every 10 ms.
    assert 0 <= load.cores() <= cores - spent / elapsed + 0.2
