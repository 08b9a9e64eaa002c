from __future__ import annotations

import asyncio

from dynamo_lite.plane.wire import Cancel, RequestId
from workers.serving import EarlyCancels, InFlight

A, B = RequestId("a"), RequestId("b")


async def test_an_early_cancel_is_taken_once() -> None:
    cancels = EarlyCancels()
    cancels.add(Cancel(A))
    assert cancels.take(A) == {None}
    assert cancels.take(A) == set()


async def test_early_cancels_of_single_sequences_add_up() -> None:
    cancels = EarlyCancels()
    cancels.add(Cancel(A, 0))
    cancels.add(Cancel(B))
    cancels.add(Cancel(A, 2))
    assert cancels.take(A) == {0, 2}


async def test_early_cancels_are_bounded_and_the_oldest_go_first() -> None:
    cancels = EarlyCancels()
    for number in range(5000):
        cancels.add(Cancel(RequestId(str(number))))
    assert cancels.take(RequestId("0")) == set()
    assert cancels.take(RequestId("4999")) == {None}


async def test_in_flight_tells_only_of_the_first_and_the_last() -> None:
    changes: list[int] = []
    flight = InFlight(lambda: changes.append(len(flight)))
    hold = asyncio.Event()

    async def work() -> None:
        await hold.wait()

    async with asyncio.TaskGroup() as group:
        for request_id in (A, B):
            flight.start(request_id, group.create_task(work()))
        assert A in flight
        assert changes == [1]
        hold.set()
        await flight.idle()
    assert changes == [1, 0]


async def test_in_flight_cancels_by_id() -> None:
    flight = InFlight(lambda: None)
    assert not flight.cancel(A)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(asyncio.Event().wait())
        second = group.create_task(asyncio.Event().wait())
        flight.start(A, first)  # type: ignore[arg-type]
        flight.start(B, second)  # type: ignore[arg-type]
        assert flight.cancel(A)
        await asyncio.wait((first,))
        assert not second.done()
        flight.cancel_all()
        await flight.idle()
    assert second.cancelled()
