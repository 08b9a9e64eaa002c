"""One transfer between two mover processes, up to any point of it."""

from __future__ import annotations

from typing import Literal

import pytest

from dynamo_lite.plane.wire import PushTarget
from tests.integration.workers.mover_process import MoverProcess, know, until
from workers.connector.protocol import GiveUp, PushEnded, ReceiveEnded, Settle

SENT, PLACED = list(range(80)), list(range(10, 90))
FIRST = 256  # a transfer id
Way = Literal["shm", "tcp"]
WAYS = pytest.mark.parametrize("way", ["shm", "tcp"])
LOST = ("peer_lost", "receiver_silent", "deadline", "in_flight")


def acquainted(*processes: MoverProcess) -> tuple[MoverProcess, ...]:
    """The same, once all of them have met all others."""
    for one in processes:
        for other in processes:
            if one is not other:
                one.meet(other)
    know(*processes, met=len(processes) - 1)
    return processes


def begin(sender: MoverProcess, receiver: MoverProcess) -> PushTarget:
    """Returns in the middle: some blocks have arrived, many are on their way, and the last is still to be computed."""
    target = receiver.receive(PLACED, "r", FIRST)
    sender.push(target, SENT[:40], "r")
    until(lambda: receiver.values(PLACED[:1]) == sender.expected(SENT[:1]), "the first block arrives")
    sender.push(target, SENT[40:-1], "r", first=40)
    return target


def pause(sender: MoverProcess, receiver: MoverProcess) -> PushTarget:
    """Returns between two pieces: all blocks but the last have arrived, and nothing is on its way."""
    target = begin(sender, receiver)
    until(lambda: receiver.values(PLACED[78:79]) == sender.expected(SENT[78:79]), "the last but one arrives")
    until(sender.stages_nothing, "its write ends")
    return target


def give_up(
    receiver: MoverProcess, sender: MoverProcess, request_id: str = "r", transfer_id: int = FIRST, *,
    closed: bool = False,
) -> None:  # fmt: skip
    """As the worker process does when it hears nothing of the sender any more, or that it has ended (`closed`)."""
    receiver.command(Settle(transfer_id, sender.incarnation, closed=closed))
    receiver.command(GiveUp(request_id, transfer_id))
    assert receiver.reports.take(ReceiveEnded).cause == "given up"
    receiver.tells_vllm(received={f"{request_id}-engine"}, invalid=set(PLACED))
    receiver.releases("receive")


def completes(sender: MoverProcess, receiver: MoverProcess, transfer_id: int = 512) -> None:
    """A whole transfer to the same blocks."""
    sent = sender.values(SENT)
    sender.push(receiver.receive(PLACED, f"{transfer_id}", transfer_id), SENT, f"{transfer_id}")
    pushed = sender.reports.take(PushEnded, f"{transfer_id}")
    assert pushed.cause == "", pushed
    received = receiver.reports.take(ReceiveEnded, f"{transfer_id}")
    assert received.cause == "", received
    found = receiver.values(PLACED)
    assert found == sent, [
        (index, *pair) for index, pair in enumerate(zip(found, sent, strict=True)) if pair[0] != pair[1]
    ]
    receiver.tells_vllm(received={f"{transfer_id}-engine"})


def completes_again(sender: MoverProcess, receiver: MoverProcess, transfer_id: int = 512) -> None:
    """After a break. A connection that broke while it was idle is found by whoever uses it first: that one may fail."""
    sender.push(receiver.receive(PLACED, "again", transfer_id), SENT, "again")
    if (cause := sender.reports.take(PushEnded, "again").cause) == "":
        assert receiver.reports.take(ReceiveEnded, "again").cause == ""
        receiver.tells_vllm(received={"again-engine"})
    else:
        assert cause in LOST
        give_up(receiver, sender, "again", transfer_id)
    know(sender, receiver, met=1)
    completes(sender, receiver, transfer_id + 256)


def complete_or_given_up(receiver: MoverProcess, sender: MoverProcess) -> None:
    """Give up what may have arrived in the meantime: then its blocks are right, otherwise vLLM computes them."""
    receiver.command(Settle(FIRST, sender.incarnation, closed=False))
    receiver.command(GiveUp("r", FIRST))
    cause = receiver.reports.take(ReceiveEnded).cause
    assert cause in ("", "given up")
    if cause:
        receiver.tells_vllm(received={"r-engine"}, invalid=set(PLACED))
    else:
        assert receiver.values(PLACED) == sender.expected(SENT)
        receiver.tells_vllm(received={"r-engine"})
