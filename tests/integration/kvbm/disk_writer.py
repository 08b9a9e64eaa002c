"""A process that writes to a disk tier until it is killed: by its parent, or by itself at a point it was told.

python disk_writer.py FOLDER SEED [POINT]
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kvbm.tiers.disk import DiskSettings, DiskTier, SlotFile
from tests.tier_folder import RECORDS, Host

PLACES = 8
NEVER = "never"
POINTS = ("before", "half", "inside", "after")


class Fatal:
    """A SlotFile under whose third write the process dies."""

    def __init__(self, file: SlotFile, path: Path, host: Host, point: str) -> None:
        self._file, self._path, self._host, self._point = file, path, host, point
        self._writes = 0

    async def write(self, slots: Sequence[int], places: Sequence[int]) -> None:
        self._writes += 1
        if self._writes < 3 or self._point == NEVER:
            await self._file.write(slots, places)
            return
        if self._point == "half":
            await self._file.write(slots[: len(slots) // 2], places[: len(places) // 2])
        elif self._point == "inside":
            for slot, place in zip(slots, places, strict=True):
                with self._path.open("r+b") as file:
                    file.seek(place * RECORDS.stride)
                    file.write(self._host.record(slot)[: RECORDS.block_bytes // 2])
        elif self._point == "after":
            await self._file.write(slots, places)
        os.kill(os.getpid(), signal.SIGKILL)

    async def read(self, slots: Sequence[int], places: Sequence[int]) -> None:
        await self._file.read(slots, places)

    async def sync(self) -> None:
        await self._file.sync()

    def close(self) -> None:
        self._file.close()


async def write_for_ever(folder: Path, seed: int, point: str) -> NoReturn:
    host, numbers = Host(), random.Random(seed)
    settings = DiskSettings(folder, PLACES * RECORDS.stride, RECORDS.stride, b"model")
    tier = DiskTier(settings, lambda path, size: Fatal(host.files.open(path, size), path, host, point))
    await tier.open()
    print(f"pid {os.getpid()}", flush=True)
    while True:
        await tier.write(host.filled(numbers.sample(range(40), numbers.randint(2, 6))))
        print("wrote", flush=True)
        if numbers.random() < 0.2:
            await tier.forget(numbers.choice(tier.hashes()))
        if numbers.random() < 0.2:
            await tier.sync()


def main() -> None:
    for line in sys.stdin:
        folder, seed, point = line.split()
        child = os.fork()
        if not child:
            asyncio.run(write_for_ever(Path(folder), int(seed), point))
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
