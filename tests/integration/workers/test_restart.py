"""A decode worker that is killed and started again under an address that a sender knows the old one by."""

from __future__ import annotations

import msgspec

from dynamo_lite.plane.wire import PushTarget
from tests.integration.workers.cable import DEVICE, NEEDS_NAMESPACES, cable
from tests.integration.workers.exchange import FIRST, LOST, PLACED, SENT, acquainted, completes
from tests.integration.workers.mover_process import MoverProcess, know, movers, rest
from workers.connector.protocol import PeerGone, PushEnded, ReceiveEnded
from workers.transfer.fabric import Card


@NEEDS_NAMESPACES
def test_what_is_meant_for_a_killed_worker_never_reaches_its_successor_at_the_same_address_in_network_namespaces() -> (
    None
):
    with cable() as joined, movers("tcp") as start:
        sender = start(1000, within=joined.ends[0], UCX_NET_DEVICES=DEVICE)
        there = {"UCX_NET_DEVICES": DEVICE, "UCX_TCP_PORT_RANGE": "20830-20830"}
        old = start(2000, within=joined.ends[1], **there)
        acquainted(sender, old)
        completes(sender, old)
        stale = old.receive(PLACED, "r", FIRST)
        old.kill()
        joined.replace_second_end()
        new = start(3000, within=joined.ends[1], **there)
        fresh = new.receive(PLACED, "r", FIRST)  # even the transfer's id is the same
        for request in ("r1", "r2"):  # the first finds the connection broken, the second makes another
            sender.push(stale, SENT, request)
            sender.push_ends_with(*LOST)
        new.look()
        assert new.values(PLACED) == new.expected(PLACED)
        assert new.reports.latest(ReceiveEnded) is None
        sender.meet(new)
        new.meet(sender)
        know(sender, met=1, silent=1)
        sender.push(fresh, SENT, "r")
        assert sender.reports.take(PushEnded).cause == "", "the same transfer id, and another worker"
        assert new.reports.take(ReceiveEnded).cause == ""
        assert new.values(PLACED) == sender.expected(SENT)
        sender.command(PeerGone(old.incarnation))
        know(sender, met=1)
        rest(sender)
        rest(new)


def test_shared_memory_of_a_process_that_has_the_old_ones_pid_is_not_written_to() -> None:
    with movers("shm") as start:
        sender, receiver, other = start(1000), start(2000), start(3000)
        target = receiver.receive(PLACED, "r", FIRST)
        sender.push(offering(target, other), SENT, "r")
        sender.push_ends_with("stale")
        assert other.values(PLACED) == other.expected(PLACED)
        assert receiver.values(PLACED) == receiver.expected(PLACED)
        rest(sender)
        completes(sender, other)


def offering(target: PushTarget, other: MoverProcess) -> PushTarget:
    """The target, with the memory of another process under its descriptors, as if that had been given its pid."""
    (rank,) = target.ranks
    card = msgspec.msgpack.decode(rank.agent, type=Card)
    theirs = msgspec.msgpack.decode(other.agent, type=Card)
    shared = tuple(
        msgspec.structs.replace(mine, pid=one.pid, fd=one.fd)
        for mine, one in zip(card.shared, theirs.shared, strict=True)
    )
    agent = msgspec.msgpack.encode(msgspec.structs.replace(card, shared=shared))
    return msgspec.structs.replace(target, ranks=(msgspec.structs.replace(rank, agent=agent),))
