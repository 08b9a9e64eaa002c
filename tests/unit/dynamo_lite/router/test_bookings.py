"""Routers count each other's requests, and nothing is counted for ever."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_lite.plane.route_wire import Bookings
from dynamo_lite.plane.wire import Role
from dynamo_lite.router.bookings import SILENCE_S, BookingLedger
from dynamo_lite.router.roster import Roster
from kvbm.events import KvSnapshot
from tests.instances import instance, record

D, P = record("decode-0"), record("prefill-0", Role.PREFILL)


class Side:
    """One router's bookings, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.roster = Roster(lambda _: None, lambda: self.now)
        for each in (D, P):
            self.roster.join(each)
            self.roster.take_snapshot(KvSnapshot(each.incarnation, 0, {}))
        self.ledger = BookingLedger(self.roster)

    @property
    def sequences(self) -> tuple[float, float]:
        return instance(self.roster, D).load.sequences, instance(self.roster, P).load.sequences

    @property
    def queued(self) -> tuple[float, float]:
        return tuple(instance(self.roster, each).load.queued_tokens(0.1) for each in (D, P))  # type: ignore[return-value]


@pytest.fixture
def sides() -> tuple[Side, Side]:
    """They know of each other."""
    here, there = Side(), Side()
    here.ledger.take(there.ledger.statement())
    there.ledger.take(here.ledger.statement())
    return here, there


def test_what_one_router_books_computes_and_ends_the_other_counts(sides: tuple[Side, Side]) -> None:
    here, there = sides
    with here.ledger.booked(D.incarnation, P.incarnation, 320, 20) as computed:
        there.ledger.take(here.ledger.changes())
        assert there.sequences == here.sequences == (1, 1)
        assert there.queued == here.queued == (0, 320)
        assert there.ledger.others == 1
        computed()
        there.ledger.take(here.ledger.changes())
        assert there.sequences == here.sequences == (1, 0)
        computed()
        assert not here.ledger.changes().computed, "it was told"
    there.ledger.take(here.ledger.changes())
    assert there.sequences == here.sequences == (0, 0)
    assert there.ledger.others == 0


def test_lost_messages_are_made_up_for_by_the_next_statement(sides: tuple[Side, Side]) -> None:
    here, there = sides
    with here.ledger.booked(D.incarnation, D.incarnation, 320, 20):
        here.ledger.changes()
        there.ledger.take(here.ledger.statement())
        assert there.sequences == (1, 0)
        there.ledger.take(here.ledger.statement())
        assert there.sequences == (1, 0), "the same one counts once"
    here.ledger.changes()
    there.ledger.take(here.ledger.statement())
    assert there.sequences == (0, 0)


def test_a_message_that_is_overtaken_changes_nothing(sides: tuple[Side, Side]) -> None:
    here, there = sides
    with here.ledger.booked(D.incarnation, D.incarnation, 320, 20):
        early = here.ledger.changes()
    there.ledger.take(here.ledger.statement())
    there.ledger.take(early)
    assert there.sequences == (0, 0)


def test_a_router_that_falls_silent_has_nothing_open(sides: tuple[Side, Side]) -> None:
    here, there = sides
    with here.ledger.booked(D.incarnation, P.incarnation, 320, 20):
        there.ledger.take(here.ledger.changes())
        there.now += SILENCE_S
        there.ledger.expire()
        assert there.sequences == (1, 1)
        there.now += 0.1
        there.ledger.expire()
        assert (there.sequences, there.ledger.routers) == ((0, 0), 0)
        there.ledger.take(here.ledger.statement())
        assert there.ledger.others == 1, "it is back"


def test_what_is_told_of_a_router_that_is_not_known_waits_for_its_statement() -> None:
    here, there = Side(), Side()
    here.ledger.take(there.ledger.statement())
    with here.ledger.booked(D.incarnation, D.incarnation, 320, 20):
        there.ledger.take(here.ledger.changes())
        assert there.ledger.routers == 0
        there.ledger.take(here.ledger.statement())
        assert there.sequences == (1, 0)


def test_a_router_alone_keeps_no_journal() -> None:
    here = Side()
    with here.ledger.booked(D.incarnation, D.incarnation, 320, 20):
        pass
    told = here.ledger.changes()
    assert (told.booked, told.computed, told.ended) == ((), (), ())


def test_its_own_words_and_requests_at_unknown_workers_count_for_nothing(sides: tuple[Side, Side]) -> None:
    here, there = sides
    there.roster.leave(D.incarnation)
    with here.ledger.booked(D.incarnation, D.incarnation, 320, 20):
        told = here.ledger.changes()
        here.ledger.take(told)
        assert here.sequences == (1, 0)
        there.ledger.take(told)
        assert there.ledger.others == 1


class SharingMachine(RuleBasedStateMachine):
    """Whatever is lost, or comes late, after a statement both count the same."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = Side(), Side()
        self.here.ledger.take(self.there.ledger.statement())
        self.open: list[ExitStack] = []
        self.held_back: list[Bookings] = []

    @rule(remote=st.booleans(), tokens=st.integers(0, 500))
    def book(self, remote: bool, tokens: int) -> None:
        stack = ExitStack()
        computes = P.incarnation if remote else D.incarnation
        computed = stack.enter_context(self.here.ledger.booked(D.incarnation, computes, tokens, 20))
        self.open.append(stack)
        if tokens % 2:
            computed()

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.open:
            self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).close()

    @rule(fate=st.sampled_from(["comes", "is lost", "is late"]))
    def tell(self, fate: str) -> None:
        told = self.here.ledger.changes()
        if fate == "comes":
            self.there.ledger.take(told)
        elif fate == "is late":
            self.held_back.append(told)

    @rule()
    def arrive_late(self) -> None:
        while self.held_back:
            self.there.ledger.take(self.held_back.pop())

    @rule()
    def state(self) -> None:
        self.there.ledger.take(self.here.ledger.statement())
        assert self.there.ledger.others == len(self.open)
        assert self.there.sequences == self.here.sequences

    @invariant()
    def nothing_is_negative(self) -> None:
        assert min(*self.there.sequences, *self.there.queued) >= 0

    def teardown(self) -> None:
        for stack in self.open:
            stack.close()
        self.there.ledger.take(self.here.ledger.statement())
        assert self.there.ledger.others == 0
        assert self.there.sequences == self.here.sequences == (0, 0)


TestSharingMachine = SharingMachine.TestCase
