"""The disk tier beside fio: records written and read at the same size, about as many in flight, in the same folder.

    .venv/bin/python benchmarks/disk_tier.py [--json FILE] [--folder FOLDER] [--rounds N]

It needs fio (`apt-get install fio`). Both have a file of equal length whose every byte has been written before. In each
round the tier reads a random half of its records, all at once, forgets them and writes them anew; fio reads and writes
as many at random, with O_DIRECT as the tier, by threads and by libaio: the faster of the two counts. They take turns at
being first. The machine is not asked to be idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.report import Bar
from kvbm.hashing import FullHash
from kvbm.tiers.base import HostRecord
from kvbm.tiers.disk import DiskSettings, DiskTier
from kvbm.tiers.host import HostMemory
from kvbm.tiers.record import Records
from workers.tier_files import TierFiles

BLOCKS = {"SmolLM2": 737_280, "2 MiB": 2 * 2**20}  # bytes of a block: 32 tokens of SmolLM2 in bfloat16, and a large one
FILE_BYTES = 2**30
IN_FLIGHT = 8  # fio's records
ENGINES = {  # of fio; the faster counts
    "psync": ["--ioengine=psync", "--thread", f"--numjobs={IN_FLIGHT}", "--group_reporting"],
    "libaio": ["--ioengine=libaio", f"--iodepth={IN_FLIGHT}"],
}


@dataclass(frozen=True, slots=True)
class Round:
    """Bytes a second."""

    tier_read: float
    tier_write: float
    fio_read: float
    fio_write: float
    other_cores: float  # while the tier was measured


class Side:
    """A disk tier full of records, and the host memory they came from."""

    def __init__(self, folder: Path, block_bytes: int) -> None:
        self.records = Records(block_bytes, 1)
        self.count = FILE_BYTES // self.records.stride
        self._memory = HostMemory(self.count * self.records.stride)
        self._files = TierFiles(self._memory, self.records.stride, 60)
        settings = DiskSettings(folder, self.count * self.records.stride, self.records.stride, b"benchmark")
        self._tier = DiskTier(settings, self._files.open)
        self._all = [HostRecord(FullHash(slot.to_bytes(32, "big")), slot) for slot in range(self.count)]

    def _record(self, slot: int) -> memoryview:
        return self._memory.view(slot * self.records.stride, self.records.bytes)

    async def fill(self) -> None:
        """Random bytes, sealed, written once."""
        content = np.random.default_rng(1).bytes(self._memory.size)
        self._memory.view(0, self._memory.size)[:] = content
        for record in self._all:
            self.records.seal(self._record(record.slot), record.hash)
        await self._tier.open()
        assert await self._tier.write(self._all) == self.count

    async def half(self, numbers: random.Random) -> tuple[float, float]:
        """Bytes a second of reading and of writing a random half."""
        half = numbers.sample(self._all, self.count // 2)
        size = len(half) * self.records.stride
        read_s = await _seconds(self._tier.read(half))
        assert all(self.records.proven(self._record(one.slot), one.hash) is not None for one in half)
        for one in half:
            await self._tier.forget(one.hash)
        write_s = await _seconds(self._tier.write(half))
        assert all(one.hash in self._tier for one in half)
        return size / read_s, size / write_s

    async def close(self) -> None:
        await self._tier.close()
        self._files.close()
        self._memory.close()


async def _seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def fio(folder: Path, kind: str, stride: int, count: int) -> float:
    """Bytes a second of random reads or writes over half of a file that is made where it is missing."""
    return max(_fio(folder, kind, stride, count, engine) for engine in ENGINES)


def _fio(folder: Path, kind: str, stride: int, count: int, engine: str) -> float:
    share = count // 2 // (IN_FLIGHT if engine == "psync" else 1)  # each thread's
    command = [
        "fio", "--name=records", f"--filename={folder / 'fio'}", f"--size={count * stride}", f"--bs={stride}",
        f"--io_size={share * stride}", f"--rw=rand{kind}", "--direct=1", "--overwrite=1", "--fallocate=posix",
        "--output-format=json", *ENGINES[engine],
    ]  # fmt: skip
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(result["jobs"][0][kind]["bw_bytes"])


async def measure(folder: Path, block_bytes: int, rounds: int, progress: Progress) -> tuple[Records, list[Round]]:
    bar = progress.add_task(f"{block_bytes:,}-byte blocks", total=rounds + 1)
    side = Side(folder / "tier", block_bytes)
    stride, count = side.records.stride, side.count
    await side.fill()
    fio(folder, "write", stride, count)
    load, numbers, found = report.OtherLoad(), random.Random(1), []

    async def tier() -> tuple[float, float, float]:
        load.cores()
        return *await side.half(numbers), load.cores()

    def beside() -> tuple[float, float]:
        return fio(folder, "read", stride, count), fio(folder, "write", stride, count)

    for turn in range(rounds + 1):  # the first is not counted
        if turn % 2:
            ours, theirs = await tier(), beside()
        else:
            theirs = beside()
            ours = await tier()
        found.append(Round(ours[0], ours[1], *theirs, ours[2]))
        progress.advance(bar)
    await side.close()
    (folder / "fio").unlink()
    return side.records, found[1:]


def bars_of(name: str, rounds: list[Round]) -> list[Bar]:
    """Ratios are medians of each round's ratio: what else the machine did hits both sides of it alike."""
    middle = statistics.median
    mib = 2**20
    return [
        Bar.of(f"{name}: tier reads", middle(one.tier_read for one in rounds) / mib, "MiB/s"),
        Bar.of(f"{name}: fio reads", middle(one.fio_read for one in rounds) / mib, "MiB/s"),
        Bar.of(f"{name}: reads, tier / fio", middle(one.tier_read / one.fio_read for one in rounds), "×", ">= 0.8"),
        Bar.of(f"{name}: tier writes", middle(one.tier_write for one in rounds) / mib, "MiB/s"),
        Bar.of(f"{name}: fio writes", middle(one.fio_write for one in rounds) / mib, "MiB/s"),
        Bar.of(f"{name}: writes, tier / fio", middle(one.tier_write / one.fio_write for one in rounds), "×", ">= 0.8"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="on the volume to measure; default: the temporary folder's")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    machine, bars, raw = report.machine(), [], {}
    busy: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-", dir=options.folder) as folder,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        for name, block_bytes in BLOCKS.items():
            records, rounds = asyncio.run(measure(Path(folder), block_bytes, options.rounds, progress))
            bars += bars_of(name, rounds)
            busy += [one.other_cores for one in rounds]
            raw[name] = {"record_bytes": records.stride, "rounds": [asdict(one) for one in rounds]}
            (Path(folder) / "tier" / "blocks").unlink()
            (Path(folder) / "tier" / "manifest").unlink()
    spread = report.spread(busy)
    report.show(f"disk tier beside fio, other load {spread['median']:.2f} cores", bars, Console())
    if options.json:
        settings = {"file_bytes": FILE_BYTES, "fio_in_flight": IN_FLIGHT, "other_cores_busy": spread}
        report.write(options.json, machine, bars, settings | raw)


if __name__ == "__main__":
    main()
