"""The prefix index, the hashes and a placement, on one core.

    .venv/bin/python benchmarks/index.py [--json FILE] [--rounds N]

The work is that of the comparison with NVIDIA Dynamo's radix tree: 100,000 blocks on 16 workers, sequences of 128
blocks of which 32 are one of 8 shared prefixes. Each figure is the median of the rounds; operations take turns
within a round, so that other load on the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from dynamo_lite import config
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Fingerprint, Incarnation, InstanceRecord, Role
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from kvbm.events import BlocksRemoved, BlocksStored, KvEventBatch, KvSnapshot
from kvbm.hashing import block_hashes
from kvbm.index import PrefixIndex

WORKERS, BLOCKS, DEPTH, SHARED, PREFIXES = 16, 100_000, 128, 32, 8
BARS: dict[str, tuple[str, str, float]] = {  # name: unit, better, bar
    "apply, 96-block events": ("blocks/s", ">=", 5e6),
    "apply, 1-block events": ("events/s", ">=", 300e3),
    "find, 128-block hit": ("/s", ">=", 200e3),
    "find, miss": ("/s", ">=", 200e3),
    "hash, 2,048 tokens": ("µs", "<=", 300),
    "place, 2,048 tokens": ("µs", "<=", 400),
    "remove a worker of 1,000,000 blocks": ("ms", "<=", 10),
    "first batch after that removal": ("ms", "<=", 50),
    "memory": ("bytes/block", "<=", 150),
}


class Work:
    """The events and queries, made once."""

    def __init__(self) -> None:
        rng = random.Random(0)
        self.rng = rng
        shared = [self._hashes(SHARED) for _ in range(PREFIXES)]
        self.sequences: list[list[int]] = []
        self.batches: list[KvEventBatch] = []
        seqs = [0] * WORKERS
        seen: set[tuple[int, int]] = set()
        blocks = turn = 0
        while blocks < BLOCKS:
            worker, prefix = turn % WORKERS, turn // WORKERS % PREFIXES
            tail = self._hashes(DEPTH - SHARED)
            events = [BlocksStored(tuple(tail), shared[prefix][-1])]
            if (worker, prefix) not in seen:
                seen.add((worker, prefix))
                events.insert(0, BlocksStored(tuple(shared[prefix])))
            for event in events:
                seqs[worker] += 1
                self.batches.append(KvEventBatch(f"w{worker}", seqs[worker], (event,)))
                blocks += len(event.hashes)
            self.sequences.append(shared[prefix] + tail)
            turn += 1
        self.blocks = blocks
        self.singles = [
            KvEventBatch(f"w{i % WORKERS}", i // WORKERS + 1, (BlocksStored((rng.getrandbits(64),)),))
            for i in range(WORKERS * 1250)
        ]
        self.queries = [rng.choice(self.sequences) for _ in range(5000)]
        self.misses = [self._hashes(DEPTH) for _ in range(2000)]
        self.prompts = [[rng.randrange(49_152) for _ in range(2048)] for _ in range(50)]

    def _hashes(self, count: int) -> list[int]:
        return [self.rng.getrandbits(64) for _ in range(count)]


def timed(body: Callable[[], object]) -> float:
    """Seconds of CPU, so that waiting for the core does not count."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        body()
        return time.process_time() - start
    finally:
        gc.enable()


def filled(batches: list[KvEventBatch]) -> PrefixIndex:
    index = PrefixIndex()
    for batch in batches:
        assert index.apply(batch)
    return index


def router(work: Work) -> Router:
    """A router that knows 16 workers and the blocks of all prompts."""
    roster = Roster(lambda instance: None)
    fingerprint = Fingerprint("m", "r", "sim", "sim", KvLayout(1, 16, 1, 1, 1, 0, "float16", "NHD", "NHD"))
    for i in range(WORKERS):
        incarnation = Incarnation(f"w{i}")
        roster.join(InstanceRecord(f"decode-{i}", incarnation, Role.DECODE, "h", 1, "m", fingerprint, 10_000, 8192, 64))
        roster.take_snapshot(KvSnapshot(incarnation, 0, {}))
    for i, prompt in enumerate(work.prompts):
        worker = f"w{i % WORKERS}"
        hashes = tuple(block_hashes(prompt, 16))
        roster.take_batch(KvEventBatch(worker, roster.index.seq(worker) + 1, (BlocksStored(hashes),)))
    return Router(roster, config.Router())


def one_round(work: Work, big: KvEventBatch) -> dict[str, float]:
    index = filled(work.batches)
    assert index.match(work.sequences[0])
    assert not index.match(work.misses[0])
    place = router(work).place
    crowded = filled([big])
    values = {
        "apply, 96-block events": work.blocks / timed(lambda: filled(work.batches)),
        "apply, 1-block events": len(work.singles) / timed(lambda: filled(work.singles)),
        "find, 128-block hit": len(work.queries) / timed(lambda: [index.match(each) for each in work.queries]),
        "find, miss": len(work.misses) / timed(lambda: [index.match(each) for each in work.misses]),
        "hash, 2,048 tokens": timed(lambda: [block_hashes(each, 16) for each in work.prompts])
        / len(work.prompts)
        * 1e6,
        "place, 2,048 tokens": timed(lambda: [place(each) for each in work.prompts]) / len(work.prompts) * 1e6,
        "remove a worker of 1,000,000 blocks": timed(lambda: crowded.remove_worker("big")) * 1e3,
    }
    # The entries are swept with later batches; the first one has the most to do.
    values["first batch after that removal"] = timed(lambda: crowded.apply(KvEventBatch("other", 1, ()))) * 1e3
    removals = [BlocksRemoved((block,)) for block in work.sequences[0][::-1]]
    index.apply(KvEventBatch("w0", index.seq("w0") + 1, tuple(removals)))
    assert "w0" not in index.match(work.sequences[0])
    return values


def memory(work: Work) -> float:
    """Bytes a block, the hashes' own integers included, as if each event had just been decoded."""
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    index = PrefixIndex()
    for i, batch in enumerate(work.batches):
        event = batch.events[0]
        assert isinstance(event, BlocksStored)
        # Shared prefixes keep their hashes; all others are new objects, owned by the index alone.
        hashes = event.hashes if len(event.hashes) == SHARED else tuple(rng.getrandbits(64) for _ in event.hashes)
        assert index.apply(KvEventBatch(batch.worker, batch.seq, (BlocksStored(hashes),))), i
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / index.blocks


def machine() -> dict[str, object]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = Work()
    big = KvEventBatch("big", 1, (BlocksStored(tuple(work.rng.getrandbits(64) for _ in range(1_000_000))),))
    rounds = [one_round(work, big) for _ in range(options.rounds)]
    values = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    values["memory"] = memory(work)
    bars = []
    for name, (unit, better, bar) in BARS.items():
        value = values[name]
        holds = value >= bar if better == ">=" else value <= bar
        bars.append({"name": name, "value": value, "unit": unit, "bar": f"{better} {bar:g}", "holds": holds})
        print(f"{name:38} {value:14,.1f} {unit:12} {better} {bar:<12,.0f} {'holds' if holds else 'MISSED'}")
    if options.json:
        result = {"machine": machine(), "bars": bars, "raw": {"rounds": rounds}}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
