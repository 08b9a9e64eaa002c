"""The prefix index, the hashes and a placement, on one core.

    .venv/bin/python -m benchmarks.index [--json FILE] [--rounds N] [--rival PYTHON --rival-script radix.py]

The work is that of the comparison with NVIDIA Dynamo's radix tree: 100,000 blocks on 16 workers, sequences of 128
blocks of which 32 are one of 8 shared prefixes, so all 16 workers are in an answer. Then the same with 1,000 workers
and 10 million blocks, built once, with hashes that are equal to the index's but other objects, as hashing a prompt
gives them.

With `--rival`, a Python that has `dynamo.llm`, `--rival-script` is run in every round, on the same core. In its times
is the decoding of JSON events, and in ours is not that of msgpack, which the table has by itself: the frontend decodes
a batch before the index has it. Our answer is a dict of every worker's depths; theirs is an object that makes one when
asked, which its times leave out. All times are elapsed ones. Each figure is the median of the rounds; operations take
turns within a round, so that other load on the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import statistics
import subprocess
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks.report import Bar, OtherLoad, machine, show, write
from dynamo_lite import config
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Fingerprint, Incarnation, InstanceRecord, Role
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from kvbm.events import BlocksRemoved, BlocksStored, KvEventBatch, KvSnapshot, Tier
from kvbm.hashing import block_hashes
from kvbm.index import PrefixIndex

WORKERS, BLOCKS, DEPTH, SHARED, PREFIXES = 16, 100_000, 128, 32, 8
MANY_WORKERS, MANY_BLOCKS = 1000, 10_000_000
BARS: dict[str, tuple[str, str | None]] = {  # name: unit, bar
    "apply, 96-block events": ("blocks/s", ">= 5000000"),
    "apply, 1-block events": ("events/s", ">= 300000"),
    "decode, 96-block events": ("blocks/s", None),
    "decode, 1-block events": ("events/s", None),
    "remove, 96-block events": ("blocks/s", None),
    "apply at the memory limit": ("blocks/s", None),
    "find, 128-block hit": ("/s", ">= 200000"),
    "find, blocks in two tiers": ("/s", None),
    "find, miss": ("/s", ">= 200000"),
    "hash, 2,048 tokens": ("µs", "<= 300"),
    "place, 2,048 tokens": ("µs", "<= 400"),
    "remove a worker of 1,000,000 blocks": ("ms", "<= 10"),
    "first batch after that removal": ("ms", "<= 50"),
    "memory": ("bytes/block", "<= 150"),
    "find, 10 M blocks, 1,000 workers in the answer": ("µs", "<= 20"),
    "find, 10 M blocks, one worker in the answer": ("µs", "<= 20"),
    "memory, 10 M blocks": ("bytes/block", "<= 150"),
    "longest apply while they came": ("ms", None),
}
RIVAL = {  # what its script prints: our name for it, unit
    "apply_blocks_s": ("apply, 96-block events", "blocks/s"),
    "singles_s": ("apply, 1-block events", "events/s"),
    "find_s": ("find, 128-block hit", "/s"),
    "miss_s": ("find, miss", "/s"),
    "bytes_block": ("memory", "bytes/block"),
}


def sequences(rng: random.Random, workers: int, blocks: int) -> Iterator[tuple[int, list[KvEventBatch], list[int]]]:
    """(blocks, batches, sequence), until so many blocks have been stored; the workers take turns."""
    shared = [hashes(rng, SHARED) for _ in range(PREFIXES)]
    seqs = [0] * workers
    seen: set[tuple[int, int]] = set()
    stored = turn = 0
    while stored < blocks:
        worker, prefix = turn % workers, turn // workers % PREFIXES
        tail = hashes(rng, DEPTH - SHARED)
        events = [BlocksStored(tuple(tail), shared[prefix][-1])]
        if (worker, prefix) not in seen:
            seen.add((worker, prefix))
            events.insert(0, BlocksStored(tuple(shared[prefix])))
        batches = []
        for event in events:
            seqs[worker] += 1
            batches.append(KvEventBatch(f"w{worker}", seqs[worker], (event,)))
        count = sum(len(event.hashes) for event in events)
        yield count, batches, shared[prefix] + tail
        stored += count
        turn += 1


def hashes(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


class Work:
    """The events and queries, made once."""

    def __init__(self) -> None:
        self.rng = rng = random.Random(0)
        made = list(sequences(rng, WORKERS, BLOCKS))
        self.blocks = sum(count for count, _, _ in made)
        self.batches = [batch for _, batches, _ in made for batch in batches]
        self.sequences = [sequence for _, _, sequence in made]
        self.encoded = [msgspec.msgpack.encode(batch) for batch in self.batches]
        self.singles = [
            KvEventBatch(f"w{i % WORKERS}", i // WORKERS + 1, (BlocksStored((rng.getrandbits(64),)),))
            for i in range(WORKERS * 1250)
        ]
        self.encoded_singles = [msgspec.msgpack.encode(batch) for batch in self.singles]
        self.queries = [rng.choice(self.sequences) for _ in range(5000)]
        self.misses = [hashes(rng, DEPTH) for _ in range(2000)]
        self.prompts = [[rng.randrange(49_152) for _ in range(2048)] for _ in range(50)]
        self.big = KvEventBatch("big", 1, (BlocksStored(tuple(hashes(rng, 1_000_000))),))


def timed(body: Callable[[], object]) -> float:
    """Seconds."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        body()
        return time.perf_counter() - start
    finally:
        gc.enable()


def filled(batches: list[KvEventBatch], index: PrefixIndex | None = None) -> PrefixIndex:
    index = index or PrefixIndex()
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
        stored = BlocksStored(tuple(block_hashes(prompt, 16)))
        roster.take_batch(KvEventBatch(worker, roster.index.seq(worker) + 1, (stored,)))
    return Router(roster, config.Router())


def one_round(work: Work) -> dict[str, float]:
    index = filled(work.batches)
    assert len(index.match(work.sequences[0])) == WORKERS
    assert not index.match(work.misses[0])
    decoder = msgspec.msgpack.Decoder(KvEventBatch)
    place = router(work).place
    crowded = filled([work.big])
    queries, misses = work.queries, work.misses
    values = {
        "apply, 96-block events": work.blocks / timed(lambda: filled(work.batches)),
        "apply, 1-block events": len(work.singles) / timed(lambda: filled(work.singles)),
        "decode, 96-block events": work.blocks / timed(lambda: [decoder.decode(each) for each in work.encoded]),
        "decode, 1-block events": len(work.singles)
        / timed(lambda: [decoder.decode(each) for each in work.encoded_singles]),
        "find, 128-block hit": len(queries) / timed(lambda: ask(index, queries)),
        "find, miss": len(misses) / timed(lambda: ask(index, misses)),
        "hash, 2,048 tokens": timed(lambda: [block_hashes(each, 16) for each in work.prompts])
        / len(work.prompts)
        * 1e6,
        "place, 2,048 tokens": timed(lambda: [place(each) for each in work.prompts]) / len(work.prompts) * 1e6,
        "remove a worker of 1,000,000 blocks": timed(lambda: crowded.remove_worker("big")) * 1e3,
    }
    # The entries are swept with later batches; the first one has the most to do.
    values["first batch after that removal"] = timed(lambda: crowded.apply(KvEventBatch("other", 1, ()))) * 1e3
    return values | changing(work, index)


def changing(work: Work, index: PrefixIndex) -> dict[str, float]:
    """Blocks that go from one tier to the next, and then altogether, the last of a sequence first."""
    limited = PrefixIndex(limit=index.bytes // 2)
    values = {"apply at the memory limit": work.blocks / timed(lambda: filled(work.batches, limited))}
    assert limited.evicted
    tails = [
        (batch.worker, event.hashes)
        for batch in work.batches
        for event in batch.events
        if isinstance(event, BlocksStored) and event.parent is not None
    ]
    for worker, tail in tails:
        moved = (BlocksStored(tail[48:], tier=Tier.HOST), BlocksRemoved(tail[:47:-1]))
        assert index.apply(KvEventBatch(worker, index.seq(worker) + 1, moved))
    assert index.match(work.sequences[0])["w0"] == (SHARED + 48, DEPTH, DEPTH, DEPTH)
    values["find, blocks in two tiers"] = len(work.queries) / timed(lambda: ask(index, work.queries))
    index = filled(work.batches)
    removals, seqs = [], {worker: index.seq(worker) for worker in index.workers}
    for worker, tail in tails:
        seqs[worker] += 1
        removals.append(KvEventBatch(worker, seqs[worker], (BlocksRemoved(tail[::-1]),)))
    removed = sum(len(tail) for _, tail in tails)
    values["remove, 96-block events"] = removed / timed(lambda: filled(removals, index))
    assert index.blocks == PREFIXES * SHARED
    return values


def memory(work: Work) -> float:
    """Bytes a block, the hashes' own integers included, as if each event had just been decoded."""
    encoded = work.encoded
    gc.collect()
    tracemalloc.start()
    index = PrefixIndex()
    decoder = msgspec.msgpack.Decoder(KvEventBatch)
    for each in encoded:
        assert index.apply(decoder.decode(each))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / index.blocks


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many(rounds: int) -> dict[str, float]:
    """1,000 workers with 10 million blocks."""
    rng = random.Random(2)
    gc.collect()
    before = resident()
    index = PrefixIndex()
    longest = 0.0
    kept: list[array[int]] = []
    for i, (_, batches, sequence) in enumerate(sequences(rng, MANY_WORKERS, MANY_BLOCKS)):
        for batch in batches:
            start = time.perf_counter()
            index.apply(batch)
            longest = max(longest, time.perf_counter() - start)
        if not i % 20:
            kept.append(array("Q", sequence))
    used = resident() - before
    alone = [array("Q", hashes(rng, DEPTH)) for _ in range(1000)]  # prompts that share nothing
    for i, each in enumerate(alone):
        worker = f"w{i % MANY_WORKERS}"
        index.apply(KvEventBatch(worker, index.seq(worker) + 1, (BlocksStored(tuple(each)),)))
    values = {"memory, 10 M blocks": used / index.blocks, "longest apply while they came": longest * 1e3}
    for sampled in (kept, alone):
        rng.shuffle(sampled)
    asked = {  # by what is asked for
        "find, 10 M blocks, 1,000 workers in the answer": [list(each) for each in kept],
        "find, 10 M blocks, one worker in the answer": [list(each) for each in alone],
    }
    assert [len(index.match(queries[0])) for queries in asked.values()] == [MANY_WORKERS, 1]
    times: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, queries in asked.items():
            times[name].append(timed(partial(ask, index, queries)) / len(queries) * 1e6)
    return values | {name: statistics.median(each) for name, each in times.items()}


def ask(index: PrefixIndex, queries: list[list[int]]) -> None:
    for each in queries:
        index.match(each)


def rival_round(python: Path, script: Path) -> dict[str, float]:
    """The medians of what the rival's script prints."""
    done = subprocess.run([python, script], check=True, capture_output=True, text=True, timeout=300)
    runs = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    singles = next(line for line in done.stdout.splitlines() if line.startswith("single-block"))
    values = {key: statistics.median(run[key] for run in runs) for key in ("apply_blocks_s", "find_s", "miss_s")}
    values["singles_s"] = statistics.median(ast.literal_eval(singles[singles.index("[") :]))
    values["bytes_block"] = runs[0]["rss_mb"] * 2**20 / runs[0]["blocks"]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rival", type=Path, help="a Python with dynamo.llm")
    parser.add_argument("--rival-script", type=Path, help="prints the rival's figures")
    options = parser.parse_args()
    if (options.rival is None) != (options.rival_script is None):
        parser.error("--rival and --rival-script go together")
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    load = OtherLoad()
    rounds, rivals, busy = [], [], []
    if options.rival is not None:
        # Before this process grows, of which the system counts the most it ever had as its children's too.
        bytes_block = rival_round(options.rival, options.rival_script)["bytes_block"]
    work = Work()
    for _ in range(options.rounds):
        load.cores()  # forgets what was before, the rival's own among it
        rounds.append(one_round(work))
        busy.append(load.cores())
        if options.rival is not None:
            rivals.append(rival_round(options.rival, options.rival_script))
    values = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    values |= {"memory": memory(work)} | many(options.rounds)
    bars = [Bar.of(name, values[name], unit, bar) for name, (unit, bar) in BARS.items()]
    theirs = {key: statistics.median(each[key] for each in rivals) for key in (rivals[0] if rivals else ())}
    if rivals:
        theirs["bytes_block"] = bytes_block
    bars += [Bar.of(f"NVIDIA Dynamo: {name}", theirs[key], unit) for key, (name, unit) in RIVAL.items() if theirs]
    show("The prefix index, one core", bars, Console(width=120))
    if options.json:
        raw = {"rounds": rounds, "rival": rivals, "other_cores_busy": busy}
        write(options.json, machine(), bars, raw)


if __name__ == "__main__":
    main()
