"""The disk tier: what it finds after a restart, what it refuses, and what it does when its folder is not as it was."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvbm.errors import TierFailed, TierRefused
from kvbm.tiers import disk
from kvbm.tiers.base import Changes, HostRecord
from kvbm.tiers.disk import DiskSettings, DiskTier
from tests.tier_folder import RECORDS, Host, found, named, opened, wanted

# ---- write, read, restart ----


async def test_what_was_written_is_read_back_byte_for_byte_also_after_a_restart(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path / "kv" / "worker") as tier:
        assert await tier.write(host.filled([1, 2, 3])) == 3
        assert tier.changes() == Changes(stored=(named(3), named(2), named(1)))
        assert await found(host, tier, [3, 9, 1]) == [3, 1]
        assert (tier.used_bytes, tier.size_bytes) == (3 * RECORDS.stride, 4 * RECORDS.stride)
    assert tier.hashes() == ()
    async with opened(host, tmp_path / "kv" / "worker") as tier:
        assert set(tier.changes().stored) == {named(1), named(2), named(3)}
        assert await found(host, tier, [1, 2, 3]) == [1, 2, 3]


async def test_the_first_records_are_stored_when_there_is_no_room_for_all(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([8, 9]))
        assert await tier.write(host.filled([9, 1, 2, 3, 4, 5, 9])) == 5
        assert await found(host, tier, range(10)) == [1, 2, 3, 9]
        assert tier.evicted == 1
        changes = tier.changes()
        assert changes.removed == (named(8),)
        assert named(8) not in changes.stored


async def test_what_was_used_is_kept_longest_also_after_a_restart(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2, 3, 4]))  # one prefix: its tail goes first
        tier.used([named(4)])
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([5, 6]))
        assert await found(host, tier, range(10)) == [1, 4, 5, 6]


async def test_first_in_first_out_does_not_care_for_use(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path, eviction="fifo") as tier:
        for number in (1, 2, 3, 4):
            await tier.write(host.filled([number]))
        tier.used([named(1)])
        await found(host, tier, [2])
    async with opened(host, tmp_path, eviction="fifo") as tier:
        await tier.write(host.filled([5, 6]))
        assert await found(host, tier, range(10)) == [3, 4, 5, 6]


async def test_many_parts_are_one_write_and_one_read(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_PART_BYTES", 2 * RECORDS.stride)
    async with opened(host, tmp_path, 7) as tier:
        assert await tier.write(host.filled(range(9))) == 7
        assert await found(host, tier, range(9)) == [0, 1, 2, 3, 4, 5, 6]


async def test_writes_at_the_same_time_store_each_block_once(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path, 8) as tier:
        records = host.filled([1, 2, 3, 4])
        assert await asyncio.gather(*(tier.write(part) for part in (records[:3], records[1:], records))) == [3, 3, 4]
        assert tier.used_bytes == 4 * RECORDS.stride


async def test_whatever_is_written_and_forgotten_meanwhile_what_is_read_is_what_was_asked_for(tmp_path: Path) -> None:
    host, numbers = Host(slots=24), random.Random(1)
    reads, writing = 0, True

    async def read(first: int) -> None:
        nonlocal reads
        while writing:
            await asyncio.sleep(0)  # a read of nothing does not wait
            asked = [HostRecord(named(numbers.randrange(12)), first + place) for place in range(4)]
            for record, there in zip(asked, await tier.read(asked), strict=True):
                assert not there or host.holds(record.slot, record.hash[0])
                reads += there

    async with opened(host, tmp_path, 6) as tier:
        async with asyncio.TaskGroup() as group:
            for first in (8, 12, 16, 20):
                group.create_task(read(first))
            for _ in range(60):
                await tier.write(host.filled([numbers.randrange(12) for _ in range(4)]))
                await tier.forget(named(numbers.randrange(12)))
            writing = False
        assert reads
    host.close()


# ---- what is not what it was ----


async def test_one_byte_flipped_is_not_proven_and_what_is_forgotten_stays_so(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2]))
    with (tmp_path / "blocks").open("r+b") as file:
        for place in range(2):  # a different byte of each
            file.seek(place * RECORDS.stride + 1000 + place)
            flipped = bytes([file.read(1)[0] ^ 1])
            file.seek(-1, os.SEEK_CUR)
            file.write(flipped)
    async with opened(host, tmp_path) as tier:
        assert await tier.read(wanted([1, 2])) == [True, True]
        assert [RECORDS.proven(host.record(slot), named(slot + 1)) for slot in (0, 1)] == [None, None]
        await tier.forget(named(1))
        assert named(1) not in tier
        assert tier.changes().removed == (named(1),)
        await tier.forget(named(1))
        tier.check()
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == (named(2),)


async def test_a_purged_tier_is_empty_also_after_a_restart(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2]))
        assert await tier.purge() == 2
        assert (tier.hashes(), tier.changes()) == ((), Changes(removed=(named(2), named(1))))
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == ()


async def test_blocks_of_another_model_are_not_found_and_one_line_says_so(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2]))
    async with opened(host, tmp_path, namespace=b"another", places=2) as tier:
        assert tier.hashes() == ()
        assert (tmp_path / "blocks").stat().st_size == 2 * RECORDS.stride
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == ()


@pytest.mark.parametrize("name", ["blocks", "manifest"])
async def test_without_one_of_its_files_it_is_empty_and_of_use(host: Host, tmp_path: Path, name: str) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2]))
    (tmp_path / name).unlink()
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == ()
        await tier.write(host.filled([3]))
        assert await found(host, tier, [1, 2, 3]) == [3]


async def test_a_file_of_blocks_that_was_cut_is_not_trusted(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2]))
    os.truncate(tmp_path / "blocks", 4 * RECORDS.stride - 1)
    async with opened(host, tmp_path) as tier:
        assert tier.hashes() == ()


async def test_a_manifest_that_was_cut_keeps_what_is_left_and_grows_whole_again(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1, 2, 3]))
    before = (tmp_path / "manifest").stat().st_size
    os.truncate(tmp_path / "manifest", 150)
    async with opened(host, tmp_path) as tier:
        assert len(await found(host, tier, [1, 2, 3])) == 1
        assert (tmp_path / "manifest").stat().st_size == before


# ---- what it refuses ----


async def test_a_folder_has_one_worker_and_the_other_is_told_whose_it_is(host: Host, tmp_path: Path) -> None:
    async with opened(host, tmp_path) as tier:
        await tier.write(host.filled([1]))
        second = host.tier(tmp_path, 4)
        with pytest.raises(
            TierRefused, match=rf"{tmp_path} is in use by process {os.getpid()}: .*kv_tiers\.disk\.path"
        ):
            await second.open()
        await second.close()
        assert await found(host, tier, [1]) == [1]


async def test_a_folder_that_is_a_file_and_a_size_below_one_block_are_refused(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "worker"):
        with pytest.raises(TierRefused, match="is not a folder"):
            await host.tier(folder, 4).open()
    settings = DiskSettings(tmp_path, RECORDS.stride - 1, RECORDS.stride, b"model")
    with pytest.raises(TierRefused, match=r"kv_tiers\.disk\.size: 8191 bytes"):
        await DiskTier(settings, host.files.open).open()


async def test_a_tier_that_is_not_open_has_nothing_and_fails(host: Host, tmp_path: Path) -> None:
    tier = host.tier(tmp_path, 4)
    assert (named(1) in tier, tier.hashes(), tier.used_bytes) == (False, (), 0)
    for call in (tier.write(host.filled([1])), tier.read(wanted([1])), tier.purge(), tier.sync()):
        with pytest.raises(TierFailed, match="is not open"):
            await call
    await tier.forget(named(1))
    await tier.close()
    await tier.close()


# ---- what is taken away while it runs ----


@asynccontextmanager
async def another(folder: Path) -> AsyncIterator[None]:
    """A worker of its own."""
    host = Host()
    async with opened(host, folder):
        yield
    host.close()


@pytest.mark.parametrize("gone", ["", "lock", "blocks", "manifest"])
async def test_a_probe_makes_anew_what_somebody_deleted(host: Host, tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "worker"
    async with opened(host, folder) as tier:
        await tier.write(host.filled([1, 2]))
        await tier.sync()
        tier.changes()
        if gone:
            (folder / gone).unlink()
        else:
            shutil.rmtree(folder)
        with pytest.raises(TierFailed, match="took files of it away"):
            await tier.sync()
        await tier.probe()
        assert set(tier.changes().removed) == {named(1), named(2)}
        await tier.write(host.filled([3]))
        await tier.sync()
        assert 3 in await found(host, tier, [1, 2, 3])
        assert sorted(path.name for path in folder.iterdir()) == ["blocks", "lock", "manifest"]


async def test_a_folder_that_another_took_meanwhile_is_left_to_it(host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "worker"
    async with opened(host, folder) as tier:
        shutil.rmtree(folder)
        async with another(folder):
            with pytest.raises(TierFailed, match="is in use by") as failed:
                await tier.probe()
            assert failed.value.cause == "refused"
        await tier.probe()
        assert await tier.write(host.filled([1])) == 1
