"""The disk tier when its file fails, hangs or is slow to open."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.tiers.disk import DiskSettings, DiskTier, SlotFile
from tests.tier_folder import RECORDS, Host, found, named, opened, wanted


class Broken:
    """A SlotFile with faults in front of a real one."""

    def __init__(self, file: SlotFile) -> None:
        self._file = file
        self.cause = ""
        self.entered, self.opened = asyncio.Event(), asyncio.Event()
        self.opened.set()

    async def _pass(self) -> None:
        self.entered.set()
        await self.opened.wait()
        if self.cause:
            raise TierFailed(Tier.DISK, self.cause, "broken")

    async def write(self, slots: Sequence[int], places: Sequence[int]) -> None:
        await self._pass()
        await self._file.write(slots, places)

    async def read(self, slots: Sequence[int], places: Sequence[int]) -> None:
        await self._pass()
        await self._file.read(slots, places)

    async def sync(self) -> None:
        await self._pass()
        await self._file.sync()

    def close(self) -> None:
        self._file.close()


@asynccontextmanager
async def broken(host: Host, folder: Path, places: int = 4) -> AsyncIterator[tuple[DiskTier, list[Broken]]]:
    files: list[Broken] = []

    def open_file(path: Path, size: int) -> Broken:
        files.append(Broken(host.files.open(path, size)))
        return files[-1]

    settings = DiskSettings(folder, places * RECORDS.stride, RECORDS.stride, b"model", timeout_s=5)
    tier = DiskTier(settings, open_file)
    await tier.open()
    try:
        yield tier, files
    finally:
        await tier.close()
        tier.check()


async def test_a_failed_write_leaves_what_was_complete_and_none_of_the_rest(host: Host, tmp_path: Path) -> None:
    async with broken(host, tmp_path) as (tier, (file,)):
        await tier.write(host.filled([1, 2, 3]))
        file.cause = "error"
        with pytest.raises(TierFailed, match="broken"):
            await tier.write(host.filled([4, 5]))
        tier.check()
        file.cause = ""
        assert await found(host, tier, [1, 2, 3, 4, 5]) == [1, 2]  # the third had to make room
        assert await tier.write(host.filled([4, 5])) == 2
        assert len(tier.hashes()) == 4


async def test_what_cannot_be_read_is_not_tried_again_unless_the_volume_was_only_slow(
    host: Host, tmp_path: Path
) -> None:
    async with broken(host, tmp_path) as (tier, (file,)):
        await tier.write(host.filled([1, 2, 3]))
        for cause, left in (("deadline", 3), ("error", 1)):
            file.cause = cause
            with pytest.raises(TierFailed, match="broken"):
                await tier.read(wanted([1, 2]))
            assert len(tier.hashes()) == left
            tier.check()
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == (named(3),)


async def test_a_record_that_is_being_read_is_not_written_over(host: Host, tmp_path: Path) -> None:
    async with broken(host, tmp_path, 2) as (tier, (file,)), asyncio.TaskGroup() as group:
        await tier.write(host.filled([1, 2]))
        file.entered.clear()
        file.opened.clear()
        reading = group.create_task(tier.read(wanted([1])))
        await file.entered.wait()
        await tier.forget(named(1))
        writing = group.create_task(tier.write(host.filled([0, 0, 0, 3, 4])[3:]))
        file.opened.set()
        assert await writing == 1
        assert await reading == [True]
        assert host.holds(0, 1)
        assert await tier.write(host.filled([0, 0, 0, 3, 4])[3:]) == 2


async def test_behind_a_write_that_hangs_others_fail_by_the_deadline(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broken(host, tmp_path) as (tier, (file,)), asyncio.TaskGroup() as group:
        file.opened.clear()
        hanging = group.create_task(tier.write(host.filled([1])))
        await file.entered.wait()
        monkeypatch.setattr(tier, "_patience_s", 0.05)
        for call in (tier.write(wanted([2])), tier.purge()):
            with pytest.raises(TierFailed, match="the write before has not ended") as failed:
                await call
            assert failed.value.cause == "deadline"
        monkeypatch.undo()
        file.opened.set()
        assert await hanging == 1


async def test_a_write_that_ends_on_files_that_were_taken_away_is_not_found_in_the_new_ones(
    host: Host, tmp_path: Path
) -> None:
    folder = tmp_path / "worker"
    async with broken(host, folder) as (tier, files), asyncio.TaskGroup() as group:
        files[0].opened.clear()
        writing = group.create_task(_failing(tier.write(host.filled([1]))))
        await files[0].entered.wait()
        shutil.rmtree(folder)
        await tier.probe()
        files[0].opened.set()
        assert await writing == "not_found"
        assert tier.hashes() == ()
        assert await tier.write(host.filled([2])) == 1
    async with opened(host, folder) as tier:
        assert tier.hashes() == (named(2),)


async def _failing(call: object) -> str:
    assert asyncio.iscoroutine(call)
    with pytest.raises(TierFailed) as failed:
        await call
    return failed.value.cause


async def test_an_opening_that_takes_too_long_is_waited_for_by_the_next_probe(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def open_file(path: Path, size: int) -> SlotFile:
        assert go.wait(20)
        return host.files.open(path, size)

    tier = DiskTier(DiskSettings(tmp_path, 4 * RECORDS.stride, RECORDS.stride, b"model"), open_file)
    monkeypatch.setattr(tier, "_patience_s", 0.05)
    for call in (tier.open(), tier.probe()):
        with pytest.raises(TierFailed, match=r"no answer within 0\.05 s"):
            await call
    monkeypatch.undo()
    go.set()
    await tier.probe()
    assert await tier.write(host.filled([1])) == 1
    await tier.close()


async def test_a_tier_closed_while_it_opens_lets_the_folder_go_once_it_has(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def open_file(path: Path, size: int) -> SlotFile:
        assert go.wait(20)
        return host.files.open(path, size)

    tier = DiskTier(DiskSettings(tmp_path, 4 * RECORDS.stride, RECORDS.stride, b"model"), open_file)
    monkeypatch.setattr(tier, "_patience_s", 0.05)
    with pytest.raises(TierFailed, match="no answer"):
        await tier.open()
    await tier.close()
    go.set()
    tier._thread.shutdown()  # waits
    async with opened(host, tmp_path) as tier:
        assert await tier.write(host.filled([1])) == 1
