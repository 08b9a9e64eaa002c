"""When a push has ended: by the word of every rank, also where it is ended early."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_lite.errors import PrefillFailed
from workers.connector.protocol import IN_FLIGHT, Command, PushEnded, StopPush
from workers.pulse import Pulse
from workers.pushes import Push, Pushes

RANKS = 2


class Bench:
    """Pushes, with the commands they gave."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        pulse = Pulse(range(RANKS), lambda: None, 1.0)
        self.pushes = Pushes(RANKS, self.commands.append, pulse, 0.1)

    def end(self, rank: int, cause: str = "", pieces: int = 2) -> None:
        ended = PushEnded("r", 7, rank, cause, 100 * pieces, pieces, "shm", 10 + rank, 20 + rank, pieces // 2)
        self.pushes.handle(ended)


async def test_a_push_is_reported_once_every_rank_has_ended_and_of_those_that_sent_something() -> None:
    bench = Bench()
    with bench.pushes.expected("r") as push:
        bench.end(0)
        ending = asyncio.ensure_future(bench.pushes.ended(push))
        await asyncio.sleep(0)
        assert not ending.done()
        bench.end(1, pieces=0)
        await ending
        await bench.pushes.stop(push)
    assert bench.commands == [], "there was nothing to stop"
    report = push.report(9)
    assert (report.bytes, report.blocks, report.pieces, report.late_pieces, report.path) == (200, 9, 2, 1, "shm")
    assert (report.started_ns, report.ended_ns) == (10, 20)


async def test_a_failure_on_one_rank_is_that_of_the_push() -> None:
    bench = Bench()
    with bench.pushes.expected("r") as push:
        bench.end(0)
        bench.end(1, "peer_lost")
    with pytest.raises(PrefillFailed) as caught:
        push.report(9)
    assert caught.value.cause == "peer_lost"


async def test_a_push_is_stopped_when_no_rank_writes_any_more() -> None:
    bench = Bench()
    with bench.pushes.expected("r") as push:
        stopping = asyncio.ensure_future(bench.pushes.stop(push))
        await asyncio.sleep(0)
        assert bench.commands == [StopPush("r")]
        bench.end(0, "cancelled")
        bench.end(1, "cancelled")
        await stopping


@pytest.mark.parametrize(("ends", "cause"), [((), "silent"), (("cancelled",), "silent"), (("", IN_FLIGHT), IN_FLIGHT)])
async def test_that_a_push_cannot_be_stopped_is_said(ends: tuple[str, ...], cause: str) -> None:
    bench = Bench()
    with bench.pushes.expected("r") as push:
        stopping = asyncio.ensure_future(bench.pushes.stop(push))
        await asyncio.sleep(0)
        for rank, end in enumerate(ends):
            bench.end(rank, end)
        with pytest.raises(PrefillFailed) as caught:
            await stopping
    assert caught.value.cause == cause


async def test_a_report_of_a_push_that_is_over_is_ignored() -> None:
    bench = Bench()
    with bench.pushes.expected("r") as push:
        pass
    bench.end(0)
    assert push == Push("r", changed=push.changed)
