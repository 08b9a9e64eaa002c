"""kill −9 of a process that writes to its disk tier: what is found afterwards is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm.errors import TierRefused
from kvbm.tiers.disk import DiskTier
from tests.integration.kvbm import disk_writer
from tests.integration.kvbm.disk_writer import NEVER, PLACES, POINTS
from tests.tier_folder import Host, wanted

ROOT = Path(__file__).parents[3]


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


class Writers:
    """See `disk_writer`: one at a time."""

    def __init__(self) -> None:
        environment = {"PYTHONPATH": str(ROOT)}
        self._parent = subprocess.Popen(
            [sys.executable, disk_writer.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    def start(self, folder: Path, seed: int, point: str = NEVER) -> int:
        """Returns its process id once it has the folder."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{folder} {seed} {point}\n")
        self._parent.stdin.flush()
        return int(self._line().removeprefix("pid "))

    def wrote(self, times: int) -> None:
        for _ in range(times):
            assert self._line() == "wrote"

    def dead(self) -> None:
        while self._line() != "dead":
            pass

    def _line(self) -> str:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, "the writers' parent is gone"
        return line.strip()

    def close(self) -> None:
        self._parent.kill()
        self._parent.communicate(timeout=20)


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


async def whole(host: Host, tier: DiskTier) -> int:
    """How many blocks are found; each must be there, proven and byte for byte."""
    numbers = [block_hash[0] for block_hash in tier.hashes()]
    host.wipe()
    assert all(await tier.read(wanted(numbers)))
    assert [number for slot, number in enumerate(numbers) if not host.holds(slot, number)] == []
    tier.check()
    return len(numbers)


async def test_killed_at_any_moment_it_leaves_only_whole_blocks(host: Host, tmp_path: Path, writers: Writers) -> None:
    for seed in range(20):
        child = writers.start(tmp_path, seed)
        writers.wrote(3 * seed + 1)
        os.kill(child, signal.SIGKILL)
        writers.dead()
        tier = host.tier(tmp_path, PLACES)
        await tier.open()
        assert await whole(host, tier) > 0
        await tier.close()


@pytest.mark.parametrize("point", POINTS)
async def test_killed_within_a_write_it_leaves_the_blocks_that_did_not_have_to_make_room(
    host: Host, tmp_path: Path, writers: Writers, point: str
) -> None:
    writers.start(tmp_path, 1, point)
    writers.dead()
    tier = host.tier(tmp_path, PLACES)
    await tier.open()
    assert PLACES - 6 <= await whole(host, tier) < PLACES
    await tier.close()


async def test_a_folder_that_another_process_uses_is_refused_and_free_once_that_is_killed(
    host: Host, tmp_path: Path, writers: Writers
) -> None:
    child = writers.start(tmp_path, 1)
    tier = host.tier(tmp_path, PLACES)
    with pytest.raises(TierRefused, match=rf"in use by process {child}: two workers cannot share a folder"):
        await tier.open()
    os.kill(child, signal.SIGKILL)
    writers.dead()
    await tier.open()
    await tier.close()
