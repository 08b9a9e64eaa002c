"""The disk tier on volumes that are full, break, lose power, become read-only or vanish.

Real ones, mounted for the test: skipped where that is not permitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm.errors import TierFailed
from tests.tier_folder import RECORDS, Host, found, named, wanted
from tests.volumes import ext4, run, tmpfs


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


async def failure(call: object) -> TierFailed:
    with pytest.raises(TierFailed) as failed:
        await call  # type: ignore[misc]
    return failed.value


async def test_a_tier_larger_than_its_volume_says_by_how_much_and_opens_once_there_is_room_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "mnt", "size=1m"):
        tier = host.tier(tmp_path / "mnt" / "worker", 256)
        failed = await failure(tier.open())
        assert failed.cause == "no_space"
        assert "kv_tiers.disk.size wants 2097152 bytes more of the volume, and 10" in str(failed)
        assert (await failure(tier.probe())).cause == "no_space"
        run("mount", "-o", "remount,size=8m", tmp_path / "mnt")
        await tier.probe()
        assert await tier.write(host.filled([1, 2])) == 2
        assert await found(host, tier, [1, 2]) == [1, 2]
        await tier.close()


async def test_a_tier_grown_beyond_its_volume_has_what_it_had_once_it_is_made_smaller_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "mnt", "size=1m"):
        for places, well in ((8, True), (256, False), (16, True)):
            tier = host.tier(tmp_path / "mnt" / "worker", places)
            if well:
                await tier.open()
                assert await tier.write(host.filled([1, 2])) == 2
                assert tier.used_bytes == 2 * RECORDS.stride
                assert await found(host, tier, [1, 2]) == [1, 2]
            else:
                assert (await failure(tier.open())).cause == "no_space"
            await tier.close()


async def test_a_full_volume_is_noticed_by_a_probe_and_its_end_too_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "mnt", "size=1m"):
        tier = host.tier(tmp_path / "mnt" / "worker", 8)
        await tier.open()
        ballast = tmp_path / "mnt" / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(2**20))
        assert (await failure(tier.probe())).cause == "no_space"
        assert await tier.write(host.filled([1, 2])) == 2  # what it has was set aside
        ballast.unlink()
        await tier.probe()
        assert await found(host, tier, [1, 2]) == [1, 2]
        await tier.close()
        tier.check()


async def test_what_was_synced_survives_a_power_cut_and_what_is_found_is_whole_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with ext4(tmp_path) as volume:
        tier = host.tier(volume.at / "worker", 12)
        await tier.open()
        await tier.write(host.filled([0, 1, 2, 3]))
        await tier.sync()
        await tier.write(host.filled([4, 5, 6, 7]))
        volume.shut_down()
        assert (await failure(tier.write(host.filled([8])))).cause == "error"
        assert (await failure(tier.probe())).cause == "error"
        assert (await failure(tier.sync())).cause == "error"
        assert (await failure(tier.read(wanted([0])))).cause == "error"
        await tier.close()
        volume.unmount()
        volume.mount()

        tier = host.tier(volume.at / "worker", 12)
        await tier.open()
        proven = await found(host, tier, list(range(10)))
        assert proven[:4] == [0, 1, 2, 3]
        await tier.close()


async def test_a_volume_that_becomes_read_only_can_be_read_and_says_why_it_is_not_written_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with ext4(tmp_path) as volume:
        tier = host.tier(volume.at / "worker", 8)
        await tier.open()
        await tier.write(host.filled([1, 2]))
        await tier.sync()
        volume.find_an_error()
        assert "Read-only file system" in str(failed := await failure(tier.probe()))
        assert failed.cause == "denied"
        assert (await failure(tier.write(host.filled([3])))).cause == "denied"
        assert await found(host, tier, [1, 2, 3]) == [1, 2]
        await tier.close()
        assert (await failure(host.tier(volume.at / "worker", 8).open())).cause == "denied"


async def test_a_volume_mounted_read_only_is_opened_by_a_probe_once_it_is_not_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "mnt", "size=1m"):
        run("mount", "-o", "remount,ro", tmp_path / "mnt")
        tier = host.tier(tmp_path / "mnt" / "worker", 4)
        assert (await failure(tier.open())).cause == "denied"
        run("mount", "-o", "remount,rw", tmp_path / "mnt")
        await tier.probe()
        assert await tier.write(host.filled([1])) == 1
        await tier.close()


async def test_a_volume_that_broke_and_was_replaced_is_used_again_where_mounting_is_permitted(
    host: Host, tmp_path: Path
) -> None:
    with ext4(tmp_path) as volume:
        tier = host.tier(volume.at / "worker", 8)
        await tier.open()
        await tier.write(host.filled([1, 2]))
        tier.changes()
        volume.shut_down()
        assert (await failure(tier.probe())).cause == "error"
        with tmpfs(volume.at, "size=1m"):
            await tier.probe()
            assert set(tier.changes().removed) == {named(1), named(2)}
            assert await tier.write(host.filled([3])) == 1
            await tier.sync()
            assert await found(host, tier, [1, 2, 3]) == [3]
            await tier.close()
