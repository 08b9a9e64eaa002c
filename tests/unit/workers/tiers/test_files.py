"""Records between host memory and a file: errors as the tiers know them, and no slot let go while it is touched."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.errors import TierFailed
from tests.tier_folder import RECORDS, Host
from workers.transfer import files


class Gate:
    """A system call that starts, and ends when it is let."""

    def __init__(self, call: Callable[..., int]) -> None:
        self._call = call
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args: int) -> int:
        self.entered.set()
        assert self.opened.wait(20)
        return self._call(*args)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


async def test_records_go_to_their_places_and_come_back_into_other_slots(host: Host, tmp_path: Path) -> None:
    host.filled([1, 2, 3])
    file = host.files.open(tmp_path / "blocks", 8 * RECORDS.stride)
    await file.write([0, 1, 2], [7, 2, 3])
    await file.sync()
    host.wipe()
    await file.read([5, 0], [7, 3])
    assert host.holds(5, 1)
    assert host.holds(0, 3)
    file.close()
    with pytest.raises(TierFailed, match="is not open") as failed:
        await file.sync()
    assert failed.value.cause == "not_found"


async def test_a_volume_that_does_not_answer_fails_by_the_deadline_but_keeps_the_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(timeout_s=0.2)
    gate = Gate(files._preadv)
    monkeypatch.setattr(files, "_preadv", gate)
    host.filled([1])
    file = host.files.open(tmp_path / "blocks", RECORDS.stride)
    await file.write([0], [0])
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(_cause(file.read([1], [0])))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        done, _ = await asyncio.wait([reading], timeout=0.4)
        assert not done
        gate.opened.set()
        assert await reading == "deadline"
    host.close()


async def test_a_cancelled_read_ends_only_once_its_slots_are_not_touched_any_more(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(files._preadv)
    monkeypatch.setattr(files, "_preadv", gate)
    host.filled([1])
    file = host.files.open(tmp_path / "blocks", RECORDS.stride)
    await file.write([0], [0])
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(file.read([1], [0]))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        for _ in range(3):
            reading.cancel()
            done, _ = await asyncio.wait([reading], timeout=0.1)
            assert not done
        gate.opened.set()
        await asyncio.wait([reading])
        assert reading.cancelled()
    assert host.holds(1, 1)


async def _cause(call: object) -> str:
    assert asyncio.iscoroutine(call)
    with pytest.raises(TierFailed) as failed:
        await call
    return failed.value.cause


async def test_no_room_is_told_as_such(host: Host, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RECORDS.stride, before[1]))
    try:
        with pytest.raises(TierFailed, match="File too large") as failed:
            host.files.open(tmp_path / "blocks", 2 * RECORDS.stride)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.cause == "no_space"
    assert not (tmp_path / "blocks").exists()
