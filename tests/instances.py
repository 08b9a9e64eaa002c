"""Instance records and rosters for tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Fingerprint, Incarnation, InstanceRecord, LoadReport, Role
from dynamo_lite.router.roster import Instance, Roster, namespace
from kvbm.events import BlocksStored, KvEventBatch, KvSnapshot, Tier

LAYOUT = KvLayout(2, 16, 2, 1, 4, 4, "float32", "NHKD", "NHKD")
FINGERPRINT = Fingerprint("tiny", "r1", "sim", "sim", LAYOUT)


def record(name: str, role: Role = Role.DECODE, **layout: object) -> InstanceRecord:
    return InstanceRecord(
        name=name,
        incarnation=Incarnation(f"{name}-incarnation"),
        role=role,
        host="localhost",
        pid=1,
        served_model="tiny",
        fingerprint=msgspec.structs.replace(FINGERPRINT, layout=msgspec.structs.replace(LAYOUT, **layout)),
        kv_blocks=1000,
        max_model_len=4096,
        max_num_seqs=64,
    )


def roster(*records: InstanceRecord, clock: Callable[[], float] = time.monotonic) -> Roster:
    """A roster whose workers answered with an empty snapshot each."""
    workers = Roster(lambda instance: None, clock)
    for each in records:
        workers.join(each)
        workers.take_snapshot(KvSnapshot(each.incarnation, 0, {}))
    return workers


def store(workers: Roster, worker: InstanceRecord, hashes: list[int], tier: Tier = Tier.DEVICE) -> None:
    seq = workers.index.seq(worker.incarnation) + 1
    workers.take_batch(KvEventBatch(worker.incarnation, seq, (BlocksStored(tuple(hashes), tier=tier),)))


def matched(workers: Roster, hashes: list[int]) -> dict[str, int]:
    """Leading blocks, in whatever tier, by worker of the model that `record` is of."""
    return {worker: depths[-1] for worker, depths in workers.index.match(hashes, namespace(FINGERPRINT)).items()}


def report(worker: InstanceRecord, seq: int = 1, *, used: int = 0, running: int = 0, **more: object) -> LoadReport:
    return LoadReport(worker.incarnation, seq, running, more.pop("waiting", 0), used, 1000, **more)  # type: ignore[arg-type]


def instance(workers: Roster, worker: InstanceRecord) -> Instance:
    found = workers.instance(worker.incarnation)
    assert found is not None
    return found
