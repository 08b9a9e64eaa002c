"""Which tiers of which workers are gone through, and how numbers are shown."""

from __future__ import annotations

import io

import pytest

from dynamo_lite.kv_client import Worker, _labelled, targets
from dynamo_lite.kv_text import Meter, size
from dynamo_lite.plane.kv_wire import KvTier, KvTiers
from kvbm.events import Tier
from tests.instances import record


def tier_of(tier: Tier, *, on: bool = True) -> KvTier:
    return KvTier(tier, on, *(0 for _ in range(11)))


def told(*tiers: KvTier) -> KvTiers:
    return KvTiers(0, 0, 100, tiers)


def worker(name: str, **layout: object) -> Worker:
    return Worker(name, record(name, **layout))  # type: ignore[arg-type]


def test_an_object_tier_is_gone_through_once_for_all_who_share_it_by_one_whose_works() -> None:
    host, broken = tier_of(Tier.HOST), tier_of(Tier.OBJECT, on=False)
    fine = tier_of(Tier.OBJECT)
    a, b, c, other = worker("a"), worker("b"), worker("c"), worker("d", tensor_parallel=2)
    stats = {a: told(host, broken), b: told(host, fine), c: told(host, fine), other: told(host, fine)}
    assert targets(stats) == [(a, host), (b, host), (c, host), (other, host), (b, fine), (other, fine)]
    assert targets(stats, Tier.OBJECT) == [(b, fine), (other, fine)]
    assert targets(stats, Tier.DISK) == []


def test_workers_of_one_name_on_several_hosts_are_told_apart() -> None:
    assert [one.label for one in _labelled([record("a"), record("b"), record("a")])] == [
        "a@localhost",
        "b",
        "a@localhost",
    ]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (18 * 2**20, "18.0 MiB")],
)
def test_sizes_are_short(count: int, shown: str) -> None:
    assert size(count) == shown


def test_a_meter_that_was_never_drawn_leaves_no_trace() -> None:
    out = io.StringIO()
    Meter(out).close()
    assert not out.getvalue()
