from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import msgspec
import pytest

from dynamo_lite.status import STATUS_FD, Status, StatusLine, parse_line


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            assert fd == reading  # the test closed it


def lines(reading: int) -> list[StatusLine]:
    return [parse_line(line) for line in os.read(reading, 65536).splitlines()]


def test_phases_arrive_as_lines(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATUS_FD, str(pipe[1]))
    status = Status()
    status.phase("loading", "weights 3/8")
    status.phase("ready")
    assert lines(pipe[0]) == [StatusLine("loading", "weights 3/8"), StatusLine("ready")]


async def test_the_heartbeat_is_a_line_without_a_phase(pipe: tuple[int, int]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await Status(pipe[1]).beat()
    assert lines(pipe[0]) == [StatusLine()]


def test_without_a_supervisor_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATUS_FD, raising=False)
    Status().phase("ready")


def test_a_supervisor_that_is_gone_does_not_disturb(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    status = Status(pipe[1])
    status.phase("loading")
    status.phase("ready")


def test_a_supervisor_that_does_not_read_never_blocks_the_child(pipe: tuple[int, int]) -> None:
    status = Status(pipe[1])
    for _ in range(10_000):  # far more than a pipe holds
        status.phase("draining", "x" * 100)
    assert lines(pipe[0])[0] == StatusLine("draining", "x" * 100)


def test_a_line_that_is_none_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        parse_line(b'{"phase": "daydreaming"}')
