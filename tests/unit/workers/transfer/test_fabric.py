"""Two agents of real NIXL in one process, on host memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

os.environ.setdefault("UCX_RNDV_THRESH", "inf")  # as the supervisor sets it, before UCX starts
from dynamo_lite.transports import Path, Transport
from workers.errors import Mismatch, PeerLost, StaleIncarnation, TransferError, TransferTimeout
from workers.transfer.engine import Region, Spans, Target, Transfer
from workers.transfer.fabric import Card, Fabric

CPU = torch.device("cpu")
SIZE = 4096


@dataclass
class Side:
    fabric: Fabric
    memory: torch.Tensor
    region: Region

    @classmethod
    def make(cls, name: str, transport: Transport) -> Side:
        fabric = Fabric(name, transport=transport)
        memory, region = fabric.allocate(SIZE, CPU)
        return cls(fabric, memory, region)

    def target(self) -> Target:
        return Target(self.fabric.name, SIZE, self.region.address)


@pytest.fixture(params=["auto", "tcp"])
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Side]]:
    one, two = Side.make("one", request.param), Side.make("two", request.param)
    one.fabric.connect(two.fabric.metadata())
    yield one, two
    one.fabric.close()
    two.fabric.close()


def soon() -> float:
    return time.monotonic() + 10


def finish(transfer: Transfer, other: Side) -> None:
    """In one thread the other side has to be polled too, for UCX to make progress."""
    while transfer.poll() == "pending":
        other.fabric.notifications()
    transfer.close()


def test_spans_are_written_to_their_places_and_the_peer_is_notified(sides: tuple[Side, Side]) -> None:
    one, two = sides
    one.memory.copy_(torch.arange(SIZE, dtype=torch.int64).to(torch.uint8))
    here, there = np.array([0, 300, 800]), np.array([2000, 16, 1000])
    transfer = one.fabric.write(
        one.region, Spans(here, 100), two.target(), Spans(there, 100), soon(), notify=b"look"
    )  # fmt: skip
    finish(transfer, two)
    for source, destination in zip(here, there, strict=True):
        assert torch.equal(two.memory[destination : destination + 100], one.memory[source : source + 100])
    assert int(two.memory.count_nonzero()) <= 300


def test_a_read_brings_the_peers_bytes(sides: tuple[Side, Side]) -> None:
    one, two = sides
    two.memory.fill_(7)
    finish(one.fabric.read(one.region, Spans.one(8, 16), two.target(), Spans.one(100, 16), soon()), two)
    assert one.memory[8:24].tolist() == [7] * 16
    assert int(one.memory.count_nonzero()) == 16


def test_what_lies_outside_of_either_memory_is_refused_before_anything_moves(sides: tuple[Side, Side]) -> None:
    one, two = sides
    for here, there in [(SIZE - 8, 0), (0, SIZE - 8), (-1, 0)]:
        with pytest.raises(Mismatch):
            one.fabric.write(one.region, Spans.one(here, 16), two.target(), Spans.one(there, 16), soon())
    with pytest.raises(Mismatch):
        one.fabric.write(one.region, Spans(np.array([0, 16]), 16), two.target(), Spans.one(0, 16), soon())


class Endless(Transfer):
    def _advance(self) -> bool:
        return False

    def close(self) -> None:
        return


async def test_a_deadline_ends_every_way_of_waiting_with_a_typed_error() -> None:
    with pytest.raises(TransferTimeout):
        Endless(time.monotonic() + 0.01).wait()
    with pytest.raises(TransferTimeout):
        await Endless(time.monotonic() + 0.01)
    assert Endless(soon()).poll() == "pending"


def test_a_peer_that_was_never_met_is_lost(sides: tuple[Side, Side]) -> None:
    one, _ = sides
    with pytest.raises((PeerLost, TransferError)):
        one.fabric.write(one.region, Spans.one(0, 8), Target("nobody", SIZE, 4096), Spans.one(0, 8), soon())


async def test_a_transfer_can_be_awaited(sides: tuple[Side, Side]) -> None:
    one, two = sides
    one.memory.fill_(5)
    finish(one.fabric.write(one.region, Spans.one(0, 8), two.target(), Spans.one(0, 8), soon()), two)  # wires up
    await one.fabric.write(one.region, Spans.one(0, 64), two.target(), Spans.one(0, 64), soon())
    assert two.memory[:64].tolist() == [5] * 64


def test_a_peers_memory_is_addressable_on_the_same_host_unless_the_transport_rules_it_out(
    sides: tuple[Side, Side],
) -> None:
    one, two = sides
    window = one.fabric.window(two.target(), 16, 32)
    path = one.fabric.path("two")
    assert path in get_args(Path)
    if path == "tcp":
        assert window is None
    else:
        assert window is not None
        window.fill_(3)
        assert two.memory[16:48].tolist() == [3] * 32
        assert int(two.memory.count_nonzero()) == 32
        assert one.fabric.window(two.target(), SIZE - 8, 16) is None


def test_a_worker_on_another_host_cannot_be_reached_by_shared_memory() -> None:
    one, two = Side.make("one", "shm"), Side.make("two", "shm")
    card = msgspec.msgpack.decode(two.fabric.metadata(), type=Card)
    elsewhere = msgspec.msgpack.encode(msgspec.structs.replace(card, host="another"))
    with pytest.raises(Mismatch, match="another host"):
        one.fabric.connect(elsewhere)
    one.fabric.close()
    two.fabric.close()


def test_another_agent_of_a_connected_ones_name_is_refused_until_that_one_is_gone(sides: tuple[Side, Side]) -> None:
    one, _ = sides
    impostor = Side.make("two", "tcp")
    with pytest.raises(StaleIncarnation, match="another agent of that name"):
        one.fabric.connect(impostor.fabric.metadata())
    one.fabric.disconnect("two")
    assert one.fabric.connect(impostor.fabric.metadata()) == "two"
    impostor.fabric.close()
