"""The roster recovers from lost events and lost workers."""

from __future__ import annotations

import logging

import msgspec
import pytest
from prometheus_client import REGISTRY

from dynamo_lite.plane.wire import Rates, Role
from dynamo_lite.router import roster as roster_module
from dynamo_lite.router.roster import PACES_S, Instance, Roster
from kvbm.events import BlocksStored, KvEventBatch, KvSnapshot, Tier
from tests.instances import instance, matched, record, report, roster, store


def batch(worker: str, seq: int, *hashes: int) -> KvEventBatch:
    return KvEventBatch(worker, seq, (BlocksStored(hashes),))


D0, D1 = record("decode-0"), record("decode-1")


class Asked(list[str]):
    """Collects the names of the workers whose snapshot was asked for."""

    def __call__(self, instance: Instance) -> None:
        self.append(instance.record.name)


def test_batches_that_come_before_the_snapshot_are_applied_after_it() -> None:
    asked = Asked()
    workers = Roster(asked)
    workers.join(D0)
    assert asked == ["decode-0"]
    for seq in (4, 5, 6):
        workers.take_batch(batch(D0.incarnation, seq, seq))
    assert matched(workers, [4]) == {}
    assert workers.take_snapshot(KvSnapshot(D0.incarnation, 5, {Tier.DEVICE: (1, 4)}))
    assert matched(workers, [1, 4, 6]) == {D0.incarnation: 3}
    assert matched(workers, [5]) == {}, "batch 5 is older than the snapshot, which lacks its block"
    workers.take_batch(batch(D0.incarnation, 7, 7))
    assert workers.index.seq(D0.incarnation) == 7
    assert asked == ["decode-0"]


def test_a_gap_asks_for_one_snapshot_only() -> None:
    asked = Asked()
    workers = Roster(asked)
    workers.join(D0)
    workers.take_snapshot(KvSnapshot(D0.incarnation, 0, {}))
    for seq in (1, 3, 4):
        workers.take_batch(batch(D0.incarnation, seq, seq))
    assert asked == ["decode-0", "decode-0"]
    assert workers.take_snapshot(KvSnapshot(D0.incarnation, 3, {Tier.DEVICE: (1, 2, 3)}))
    assert matched(workers, [1, 2, 3, 4]) == {D0.incarnation: 4}


def test_a_snapshot_older_than_the_gap_is_not_enough() -> None:
    workers = roster(D0)
    for seq in (1, 5):
        workers.take_batch(batch(D0.incarnation, seq, seq))
    assert not workers.take_snapshot(KvSnapshot(D0.incarnation, 3, {Tier.DEVICE: (1,)}))
    assert workers.take_snapshot(KvSnapshot(D0.incarnation, 4, {Tier.DEVICE: (1, 4)}))
    assert matched(workers, [1, 4, 5]) == {D0.incarnation: 3}


def test_a_report_reveals_that_the_last_batch_was_lost() -> None:
    asked = Asked()
    workers = Roster(asked)
    workers.join(D0)
    workers.take_snapshot(KvSnapshot(D0.incarnation, 3, {}))
    asked.clear()
    workers.take_report(report(D0, 1, kv_seq=4))
    assert asked == [], "the batch may be on its way"
    workers.take_report(report(D0, 2, kv_seq=4))
    assert asked == ["decode-0"]
    workers.take_report(report(D0, 3, kv_seq=4))
    assert asked == ["decode-0"], "one is under way already"


def test_a_worker_that_left_is_forgotten_with_its_blocks_and_bookings() -> None:
    workers = roster(D0, D1)
    store(workers, D0, [1, 2])
    with instance(workers, D0).load.booked(160, 10, 0.1):
        workers.leave(D0.incarnation)
        assert D0.incarnation not in workers
        assert matched(workers, [1]) == {}
        workers.join(D0)
        assert instance(workers, D0).load.used_blocks == 0
    assert instance(workers, D0).load.used_blocks == 0
    workers.leave(D0.incarnation)
    workers.leave(D0.incarnation)
    workers.take_batch(batch(D0.incarnation, 1, 1))
    workers.take_report(report(D0))
    assert workers.take_snapshot(KvSnapshot(D0.incarnation, 1, {Tier.DEVICE: (1,)}))
    assert matched(workers, [1]) == {}, "late messages of a worker that left change nothing"


def test_a_lost_worker_gets_nothing_until_it_reports_again(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = roster(D0, D1)
    workers.lost(D0.incarnation)
    assert [each.record for each in workers.usable([Role.DECODE])] == [D1]
    workers.take_report(report(D0, 1))
    assert len(workers.usable([Role.DECODE])) == 1, "that report was sent before it died"
    monkeypatch.setattr(roster_module, "REVIVE_AFTER_S", 0.0)
    workers.take_report(report(D0, 2))
    assert len(workers.usable([Role.DECODE])) == 2


def test_a_draining_worker_gets_nothing() -> None:
    workers = roster(D0, D1)
    workers.take_report(report(D0, 1, draining=True))
    assert [each.record for each in workers.usable([Role.DECODE])] == [D1]


def test_who_can_take_kv_from_whom_is_settled_once(caplog: pytest.LogCaptureFixture) -> None:
    p0, other = record("prefill-0", Role.PREFILL), record("prefill-2", Role.PREFILL, dtype="fp8_e4m3")
    workers = roster(D0, D1, p0, other)
    with caplog.at_level(logging.WARNING):
        for decode in (D0, D1, D0):
            assert workers.fits(instance(workers, decode), instance(workers, p0))
            assert not workers.fits(instance(workers, decode), instance(workers, other))
    said = [line.getMessage() for line in caplog.records]
    assert said == [
        "decode-0 cannot take KV from prefill-2: the prefill worker stores KV as fp8_e4m3, the decode worker as float32"
    ], "workers of one kind are not asked one by one"


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel": 2}, {"block_size": 64}, {"dtype": "bfloat16"}, {"keys": "HND", "values": "HND"}]
)
def test_kv_that_is_converted_on_its_way_can_be_taken_like_any_other(layout: dict[str, object]) -> None:
    sender = record("prefill-0", Role.PREFILL, **layout)
    workers = roster(D0, sender)
    assert workers.fits(instance(workers, D0), instance(workers, sender))


def test_paces_follow_reports_and_not_more_often_than_once_a_second() -> None:
    now = 100.0
    workers = Roster(lambda _: None, lambda: now)
    workers.join(D0)
    workers.settle_paces()
    guessed = instance(workers, D0).pace
    for seq, prefill in enumerate([(1.0, 0.5), (1.0, 0.7), (1.0, 0.9)]):
        workers.take_report(report(D0, seq + 1, rates=Rates(prefill=prefill)))
        workers.settle_paces()
    assert guessed.prefill != (1.0, 0.5)
    assert instance(workers, D0).pace.prefill == (1.0, 0.5), "the first is of use at once"
    now += PACES_S
    workers.settle_paces()
    assert instance(workers, D0).pace.prefill == (1.0, 0.9)


def test_workers_of_another_model_or_revision_do_not_answer_for_this_one() -> None:
    other = msgspec.structs.replace(D1, fingerprint=msgspec.structs.replace(D1.fingerprint, revision="r2"))
    workers = roster(D0, other)
    store(workers, D0, [1, 2])
    store(workers, other, [1, 2, 3])
    for each, depth in ((D0, 2), (other, 3)):
        found = workers.index.match([1, 2, 3], instance(workers, each).namespace)
        assert found == {each.incarnation: (depth,) * 4}


def test_the_size_of_the_index_and_what_it_forgot_are_told_with_each_report() -> None:
    def told(name: str) -> float:
        return REGISTRY.get_sample_value(f"dynamo_lite_router_index_{name}") or 0.0

    workers = Roster(lambda instance: None, index_memory=2**20)
    workers.join(D0)
    workers.take_snapshot(KvSnapshot(D0.incarnation, 0, {}))
    before = told("evicted_blocks_total")
    store(workers, D0, list(range(5000)))
    store(workers, D0, list(range(5000, 8000)))
    workers.take_report(report(D0))
    assert 0 < told("blocks") == workers.index.blocks < 8000
    assert 0 < told("bytes") == workers.index.bytes <= 2**20
    assert told("evicted_blocks_total") - before == 8000 - workers.index.blocks
    workers.take_report(report(D0, 2))
    assert told("evicted_blocks_total") - before == 8000 - workers.index.blocks
