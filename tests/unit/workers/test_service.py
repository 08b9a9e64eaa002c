from __future__ import annotations

import pytest

from dynamo_lite.plane.wire import Role
from tests.instances import record
from workers.service import exchanges_kv


@pytest.mark.parametrize(
    ("one", "other", "may"),
    [
        (Role.PREFILL, Role.DECODE, True),
        (Role.DECODE, Role.PREFILL, True),
        (Role.PREFILL, Role.PREFILL, False),
        (Role.DECODE, Role.DECODE, False),
        (Role.BOTH, Role.BOTH, False),
        (Role.PREFILL, Role.BOTH, False),
    ],
)
def test_without_pulls_only_prefill_and_decode_workers_meet(one: Role, other: Role, may: bool) -> None:
    assert exchanges_kv(record("one", one), record("other", other), pulls=False) is may


@pytest.mark.parametrize("one", list(Role))
@pytest.mark.parametrize("other", list(Role))
def test_a_worker_that_decodes_meets_all_that_may_hold_a_prefix_for_it(one: Role, other: Role) -> None:
    assert exchanges_kv(record("one", one), record("other", other)) is (one.decodes or other.decodes)


def test_workers_whose_kv_can_be_converted_meet_and_others_do_not() -> None:
    prefill = record("one", Role.PREFILL)
    assert not exchanges_kv(record("one"), record("other", dtype="fp8_e4m3"))
    assert exchanges_kv(prefill, record("other", Role.DECODE, dtype="float16", block_size=64, tensor_parallel=2))
    assert not exchanges_kv(prefill, record("other", Role.DECODE, dtype="fp8_e4m3"))


@pytest.mark.parametrize("role", list(Role))
def test_no_worker_meets_itself(role: Role) -> None:
    assert not exchanges_kv(record("one", role), record("one", role))
