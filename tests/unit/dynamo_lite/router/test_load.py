"""Bookings count at once and never leak; reports correct them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_lite.plane.wire import Incarnation, LoadReport
from dynamo_lite.router.load import Booking, WorkerLoad


def report(seq: int, used: int, running: int = 1, waiting: int = 0) -> LoadReport:
    return LoadReport(Incarnation("w"), seq, running, waiting, used, 1000)


def test_a_booking_counts_at_once_and_ends_with_its_body_even_on_an_error() -> None:
    load = WorkerLoad()

    def fail() -> None:
        with load.booked(20):
            assert load.busy_blocks == 20
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (load.busy_blocks, load.bookings) == (0, 0)


def test_work_that_is_done_early_is_not_subtracted_twice() -> None:
    load = WorkerLoad()
    with load.booked(10), load.booked(8) as booking:
        booking.reduce(5)
        booking.reduce(100)
        assert load.busy_blocks == 10
    assert load.busy_blocks == 0


def test_others_requests_count_through_the_report_and_own_ones_on_top_until_the_next() -> None:
    load = WorkerLoad()
    load.take(report(1, used=50))
    with load.booked(20):
        assert load.busy_blocks == 70
        load.take(report(2, used=70))
        assert load.busy_blocks == 70
    assert load.busy_blocks == 50
    load.take(report(3, used=0, running=0))
    assert load.busy_blocks == 0


def test_a_report_that_does_not_know_of_a_request_yet_does_not_hide_it() -> None:
    load = WorkerLoad()
    with load.booked(20):
        load.take(report(1, used=0, running=0))
        assert load.busy_blocks == 20


def test_waiting_requests_count_like_those_that_run() -> None:
    load = WorkerLoad()
    load.take(report(1, used=40, running=4, waiting=3))
    assert load.busy_blocks == 70


def test_a_report_that_arrives_late_is_ignored() -> None:
    load = WorkerLoad()
    load.take(report(5, used=10))
    load.take(report(4, used=99))
    assert load.busy_blocks == 10


class LoadMachine(RuleBasedStateMachine):
    """Requests and reports in any order: the load is never negative and ends at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.load = WorkerLoad()
        self.seq = 0
        self.open: list[tuple[contextlib.ExitStack, Booking]] = []

    @rule(blocks=st.integers(0, 100))
    def book(self, blocks: int) -> None:
        stack = contextlib.ExitStack()
        self.open.append((stack, stack.enter_context(self.load.booked(blocks))))

    @rule(data=st.data(), blocks=st.integers(0, 100))
    def progress(self, data: st.DataObject, blocks: int) -> None:
        if self.open:
            self.open[data.draw(st.integers(0, len(self.open) - 1))][1].reduce(blocks)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.open:
            self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))[0].close()

    @rule(used=st.integers(0, 1000), running=st.integers(0, 9), waiting=st.integers(0, 9))
    def report(self, used: int, running: int, waiting: int) -> None:
        self.seq += 1
        self.load.take(report(self.seq, used, running, waiting))

    @invariant()
    def own_bookings_are_a_lower_bound(self) -> None:
        assert self.load.busy_blocks >= self.load.booked_blocks >= 0
        assert self.load.bookings == len(self.open)
        assert self.load.booked_blocks == sum(booking.blocks for _, booking in self.open)

    def teardown(self) -> None:
        for stack, _ in self.open:
            stack.close()
        self.load.take(report(self.seq + 1, 0, 0))
        assert self.load.busy_blocks == 0


TestLoadMachine = LoadMachine.TestCase
