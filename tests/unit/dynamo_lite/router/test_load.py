"""Bookings count at once and never leak; reports correct them; a queue shrinks as it is computed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_lite.plane.wire import Incarnation, LoadReport
from dynamo_lite.router.load import UNSEEN_S, Booking, WorkerLoad

MS = 0.1  # a token


class Clock:
    """Stands still but for `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(seq: int, *, queued: int = 0, used: int = 0, running: int = 0, waiting: int = 0) -> LoadReport:
    return LoadReport(Incarnation("w"), seq, running, waiting, used, 1000, queued_tokens=queued)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> WorkerLoad:
    return WorkerLoad(clock)


def state(load: WorkerLoad) -> tuple[float, float, float]:
    return load.queued_tokens(MS), load.sequences, load.used_blocks


def test_a_booking_counts_at_once_and_ends_with_its_body_even_on_an_error(load: WorkerLoad) -> None:
    def fail() -> None:
        with load.booked(320, 20, MS):
            assert state(load) == (320, 1, 20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (*state(load), load.bookings) == (0, 0, 0, 0)


def test_a_queue_is_worked_off_at_the_workers_pace(load: WorkerLoad, clock: Clock) -> None:
    with load.booked(1000, 20, MS):
        clock.now += 0.06
        assert load.queued_tokens(MS) == pytest.approx(400)
        with load.booked(1000, 20, MS):
            assert load.queued_tokens(MS) == pytest.approx(1400)
            clock.now += 10
            assert state(load) == (0, 2, 40)


def test_what_ends_before_it_is_computed_leaves_the_queue_and_what_is_computed_is_not_subtracted_twice(
    load: WorkerLoad, clock: Clock
) -> None:
    with load.booked(1000, 20, MS) as first:
        with load.booked(500, 20, MS):
            pass
        assert load.queued_tokens(MS) == 1000
        with load.booked(500, 20, MS):
            clock.now += 0.1
            assert load.queued_tokens(MS) == pytest.approx(500)
            first.computed()
            assert load.queued_tokens(MS) == pytest.approx(500)
        assert load.queued_tokens(MS) == 0


def test_a_first_token_shows_that_a_worker_is_faster_than_was_thought(load: WorkerLoad) -> None:
    with load.booked(1000, 20, MS) as first, load.booked(300, 20, MS):
        first.computed()
        assert load.queued_tokens(MS) == 300


def test_others_requests_count_through_the_report_and_own_ones_on_top_until_the_next(
    load: WorkerLoad, clock: Clock
) -> None:
    load.take(report(1, queued=500, used=50, running=3))
    with load.booked(100, 20, MS):
        assert state(load) == (600, 4, 70)
        clock.now += 1
        load.take(report(2, queued=50, used=70, running=4))
        assert state(load) == (50, 4, 70)
    load.take(report(3))
    assert state(load) == (0, 0, 0)


def test_a_report_that_does_not_know_of_a_request_yet_does_not_hide_it(load: WorkerLoad, clock: Clock) -> None:
    with load.booked(320, 20, MS):
        load.take(report(1))
        assert state(load) == (320, 1, 20)
        clock.now += 2 * UNSEEN_S
        load.take(report(2))
        assert state(load) == (0, 1, 20), "by now it would"


def test_a_report_that_arrives_late_is_ignored(load: WorkerLoad) -> None:
    load.take(report(5, queued=10))
    load.take(report(4, queued=99))
    assert load.queued_tokens(MS) == 10


def test_bookings_of_a_worker_that_never_reports_are_not_remembered_for_ever(load: WorkerLoad, clock: Clock) -> None:
    for _ in range(1000):
        with load.booked(1, 1, MS):
            clock.now += UNSEEN_S / 10
    assert len(load._recent) < 20


class LoadMachine(RuleBasedStateMachine):
    """Requests, reports and time in any order: the load is never negative and ends at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.load = WorkerLoad(self.clock)
        self.seq = 0
        self.open: list[tuple[contextlib.ExitStack, Booking]] = []

    @rule(tokens=st.integers(0, 1000), blocks=st.integers(0, 100))
    def book(self, tokens: int, blocks: int) -> None:
        stack = contextlib.ExitStack()
        self.open.append((stack, stack.enter_context(self.load.booked(tokens, blocks, MS))))

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        if self.open:
            self.open[data.draw(st.integers(0, len(self.open) - 1))][1].computed()

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.open:
            stack, booking = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            stack.close()
            booking.end()

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(queued=st.integers(0, 1000), used=st.integers(0, 1000), running=st.integers(0, 9))
    def report(self, queued: int, used: int, running: int) -> None:
        self.seq += 1
        self.load.take(report(self.seq, queued=queued, used=used, running=running))

    @invariant()
    def own_bookings_are_a_lower_bound(self) -> None:
        queued, sequences, blocks = state(self.load)
        assert queued >= 0
        assert sequences >= self.load.bookings == len(self.open)
        assert blocks >= sum(booking.blocks for _, booking in self.open)

    def teardown(self) -> None:
        for stack, _ in self.open:
            stack.close()
        self.load.take(report(self.seq + 1))
        assert state(self.load) == (0, 0, 0)


TestLoadMachine = LoadMachine.TestCase
