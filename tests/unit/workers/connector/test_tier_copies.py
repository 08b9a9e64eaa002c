"""The mover between a worker's KV and the host tier's memory: what is copied, what is told, and what is given up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvbm.tiers.host import HostMemory
from kvbm.tiers.record import stride_bytes
from tests.unit.workers.connector.pair import LAYOUT, Side, side
from workers.connector.protocol import (
    GiveUp,
    Offloaded,
    OffloadStep,
    OnboardChecked,
    Onboarded,
    OnboardOver,
    OnboardPlan,
    ReceiveEnded,
    ReceivePlan,
    StepPlan,
)

BLOCK_BYTES = LAYOUT.block_bytes
HASHES = [bytes([number]) * 32 for number in range(8)]


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    made = HostMemory(16 * stride_bytes(BLOCK_BYTES))
    yield made
    made.close()


@pytest.fixture
def worker(memory: HostMemory) -> Iterator[Side]:
    made = side(1, arena=memory.path)
    yield made
    made.mover.close()


def offload(worker: Side, ids: list[int], slots: list[int], engine_id: str = "e") -> None:
    worker.mover.plan(StepPlan(offloads=[OffloadStep(engine_id, ids, HASHES[: len(ids)], slots)]))


def onboard(worker: Side, ids: list[int], slots: list[int], skipped: int = 0) -> None:
    worker.mover.plan(StepPlan(onboards=[OnboardPlan("e", "r", skipped, ids, slots)]))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_blocks_come_back_from_the_tier_as_they_went_there(worker: Side) -> None:
    before = worker.blocks([3, 9, 5])
    offload(worker, [3, 9, 5], [2, 0, 15])
    told = worker.reports.take(Offloaded)
    assert told.blocks == ((2, HASHES[0], True), (0, HASHES[1], True), (15, HASHES[2], True))
    onboard(worker, [20, 21, 22], [2, 0, 15])
    worker.mover.command(OnboardChecked("r", 3))
    ended = worker.reports.take(Onboarded)
    assert (ended.cause, ended.blocks, ended.bytes) == ("", 3, 3 * BLOCK_BYTES)
    assert same(worker.blocks([20, 21, 22]), before)
    worker.look()
    assert worker.mover.ended(set()).received == {"e"}


def test_a_finished_request_is_told_as_sent_only_once_its_blocks_are_copied(worker: Side) -> None:
    offload(worker, [1, 2], [0, 1])
    worker.reports.take(Offloaded)
    worker.mover.wait(5)
    assert worker.mover.ended(set()).sent == set(), "vLLM has not finished it"
    offload(worker, [3], [2])
    worker.reports.take(Offloaded)
    worker.mover.wait(5)
    assert worker.mover.ended({"e"}).sent == {"e"}
    assert worker.mover.ended({"e"}).sent == set(), "it is told once"


def test_only_blocks_that_were_found_right_are_copied_and_the_rest_is_invalid(worker: Side) -> None:
    offload(worker, [1, 2, 3], [0, 1, 2])
    worker.reports.take(Offloaded)
    untouched = worker.blocks([21, 22])
    onboard(worker, [20, 21, 22], [0, 1, 2])
    worker.mover.command(OnboardChecked("r", 1))
    ended = worker.reports.take(Onboarded)
    assert (ended.cause, ended.blocks) == ("corrupt", 1)
    worker.look()
    assert worker.mover.ended(set()).invalid_blocks == {21, 22}
    assert same(worker.blocks([20]), worker.blocks([1]))
    assert same(worker.blocks([21, 22]), untouched)


def test_the_word_of_what_is_right_may_come_before_the_plan_and_counts_what_the_device_had(worker: Side) -> None:
    offload(worker, [1, 2, 3], [0, 1, 2])
    worker.reports.take(Offloaded)
    worker.mover.command(OnboardChecked("r", 3))
    onboard(worker, [20, 21], [1, 2], skipped=1)
    assert worker.reports.take(Onboarded).blocks == 2
    assert same(worker.blocks([20, 21]), worker.blocks([2, 3]))


def test_blocks_are_copied_while_later_ones_are_still_being_checked(worker: Side) -> None:
    offload(worker, [1, 2, 3], [0, 1, 2])
    worker.reports.take(Offloaded)
    onboard(worker, [20, 21, 22], [0, 1, 2])
    worker.mover.command(OnboardChecked("r", 2, more=True))
    worker.look()
    worker.look()
    assert same(worker.blocks([20, 21]), worker.blocks([1, 2]))
    assert worker.reports.latest(Onboarded) is None
    worker.mover.command(OnboardChecked("r", 3))
    assert worker.reports.take(Onboarded).blocks == 3
    assert same(worker.blocks([22]), worker.blocks([3]))


def test_nothing_counts_as_read_when_the_word_of_the_last_blocks_does_not_come(memory: HostMemory) -> None:
    worker = side(1, timeout_s=0.02, arena=memory.path)
    onboard(worker, [20, 21], [0, 1])
    worker.mover.command(OnboardChecked("r", 1, more=True))
    assert worker.reports.take(Onboarded).cause == "silent"
    worker.look()
    assert worker.mover.ended(set()).invalid_blocks == {20, 21}
    worker.mover.close()


@pytest.mark.parametrize("planned", [True, False])
def test_what_nobody_wants_any_more_is_not_read_whenever_its_plan_comes(worker: Side, planned: bool) -> None:
    untouched = worker.blocks([20])
    if planned:
        onboard(worker, [20], [0])
    worker.mover.command(OnboardOver("r"))
    assert worker.reports.take(Onboarded).cause == "cancelled"
    if not planned:
        onboard(worker, [20], [0])
        assert worker.reports.take(Onboarded).cause == "cancelled"
    worker.mover.command(OnboardChecked("r", 1))
    worker.look()
    assert worker.mover.ended(set()).invalid_blocks == {20}
    assert same(worker.blocks([20]), untouched)


def test_a_request_that_is_aborted_gets_its_blocks_back_at_once(worker: Side) -> None:
    onboard(worker, [20, 21], [0, 1])
    worker.mover.plan(StepPlan(cancelled_receives=["e"]))
    assert worker.reports.take(Onboarded).cause == "cancelled"
    worker.mover.wait(5)
    assert worker.mover.ended(set()).received == {"e"}


def test_blocks_that_nobody_checks_are_handed_back_by_the_deadline(memory: HostMemory) -> None:
    worker = side(1, timeout_s=0.02, arena=memory.path)
    onboard(worker, [20], [0])
    assert worker.reports.take(Onboarded).cause == "silent"
    worker.look()
    assert worker.mover.ended(set()).invalid_blocks == {20}
    worker.mover.close()


def test_steps_of_a_preempted_request_are_given_up_also_those_that_come_later(worker: Side) -> None:
    with worker.mover._lock:  # the mover stands still: no step is taken before the preemption
        offload(worker, [1], [0])
        offload(worker, [2], [1])
        worker.mover._offloader.preempt("e", 2)  # type: ignore[union-attr]  # as `cancel_offloads`, whose lock we hold
    assert [worker.reports.take(Offloaded).blocks[0][2] for _ in range(2)] == [False, False]
    offload(worker, [3], [2])
    assert worker.reports.take(Offloaded).blocks == ((2, HASHES[0], True),), "it goes on after it was resumed"
    worker.mover.cancel_offloads(["e"])
    worker.mover.wait(5)
    assert worker.mover.ended({"e"}).sent == {"e"}


def test_a_request_that_waits_for_both_the_tier_and_a_prefill_worker_goes_on_when_both_are_there(worker: Side) -> None:
    receive = ReceivePlan("e", "r", [22, 23], 2, 2 * LAYOUT.block_size, 256)
    worker.mover.plan(StepPlan(onboards=[OnboardPlan("e", "r", 0, [20, 21], [0, 1])], receives=[receive]))
    worker.mover.command(OnboardChecked("r", 2))
    worker.reports.take(Onboarded)
    worker.look()
    assert worker.mover.ended(set()).received == set(), "the receive is still to come"
    worker.mover.command(GiveUp("r", 256))
    worker.reports.take(ReceiveEnded)
    worker.mover.wait(5)
    ended = worker.mover.ended(set())
    assert (ended.received, ended.invalid_blocks) == ({"e"}, {22, 23})


def test_what_the_worker_process_still_says_of_a_request_that_was_aborted_is_not_kept(worker: Side) -> None:
    onboard(worker, [20], [0])
    worker.mover.plan(StepPlan(cancelled_receives=["e"]))
    assert worker.reports.take(Onboarded).cause == "cancelled"
    worker.mover.command(OnboardChecked("r", 1))
    worker.look()
    onboarder = worker.mover._onboarder
    assert onboarder is not None
    assert onboarder._checked == {}
