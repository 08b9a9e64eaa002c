"""Reading, writing and hashing traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_lite.errors import TraceError
from kvbm.hashing import block_hashes, low64
from workers.simulate.trace import Hashes, Request, attainable, read_trace, write_trace

LINE = {"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [0, 7]}


def written(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_lines_become_requests_in_the_order_of_their_times(tmp_path: Path) -> None:
    file = written(tmp_path / "trace.jsonl", LINE, "", {**LINE, "timestamp": 20.5, "output_length": 0, "more": 1})
    assert read_trace(file) == [Request(0.0205, 700, 1, (0, 7)), Request(1.5, 700, 9, (0, 7))]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    requests = [Request(0.0, 5, 1, (1, 2)), Request(1.25, 8, 3, (1, 3))]
    write_trace(tmp_path / "trace.jsonl", requests)
    assert read_trace(tmp_path / "trace.jsonl", 4) == requests


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a line of a trace in Mooncake's format"),
        ("timestamp,input_length", "not a line of a trace in Mooncake's format"),
        ({"timestamp": 1}, "object missing required field `input_length`"),
        ({**LINE, "input_length": "long"}, r"expected `int`, got `str` - at `\$.input_length`"),
        ({**LINE, "timestamp": -1}, r"expected `float` >= 0.0 - at `\$.timestamp`"),
        ({**LINE, "input_length": 0}, "expected `int` >= 1"),
        (
            {**LINE, "hash_ids": [0]},
            "1 hash_ids do not fit input_length 700: blocks of 512 tokens would be 2; --trace",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: object, problem: str) -> None:
    file = written(tmp_path / "trace.jsonl", LINE, line)
    with pytest.raises(TraceError, match=f":2: {problem}") as caught:
        read_trace(file)
    assert caught.value.line == 2


def test_no_file_and_an_empty_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "absent.jsonl")
    with pytest.raises(TraceError, match="no requests"):
        read_trace(written(tmp_path / "empty.jsonl", ""))
    with pytest.raises(TraceError, match="No such file"):
        write_trace(tmp_path / "no folder" / "trace.jsonl", [])


def test_blocks_are_alike_where_their_ids_and_all_before_them_are() -> None:
    hashes = Hashes(4)
    one, longer, other = (hashes.prompt(Request(0, 4 * len(ids), 1, ids)) for ids in ((1, 2), (1, 2, 3), (5, 2)))
    assert longer.full[:2] == one.full
    assert not set(other.full) & set(one.full)
    assert one.low == [low64(full) for full in one.full]
    assert hashes.answer() != hashes.answer()


def test_a_block_that_is_cut_off_has_no_hash_and_routers_take_the_others_as_they_are() -> None:
    prompt = Hashes(4).prompt(Request(0, 7, 1, (1, 2)))
    assert (len(prompt), len(prompt.full)) == (7, 1)
    assert block_hashes(prompt, 4) == prompt.low
    with pytest.raises(TypeError, match="not known"):
        prompt[0]


def test_what_a_worker_that_forgets_nothing_finds_leaves_out_what_it_has_to_compute() -> None:
    requests = [Request(0, 8, 1, ids) for ids in ((1, 2), (3, 4), (1, 2), (3, 4))]
    assert attainable(requests, 4) == 0.25  # the last block ends the prompt, so it is computed
