"""`dynamo-lite drain`: has one worker of a running deployment leave, and tells how far it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import typer

from dynamo_lite.errors import DeadlineExceeded, DynamoError, LastWorker, NoResponders, NotThere
from dynamo_lite.kv_client import Worker, live_workers
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.drain_wire import Drain, Draining
from dynamo_lite.plane.wire import Subjects, decode, encode
from dynamo_lite.state import Run

ANSWER_S = 5.0
LOOK_S = 0.2
AFTERWARDS_S = 60.0  # beyond the deadline, until its process is gone
BACK_S = 600.0


async def drain(run: Run, name: str, ask: Drain, *, force: bool) -> int:
    """Returns the exit code once it has left, or is back. Raises NotThere, LastWorker, PlaneError."""
    async with Bus.connect(run.nats, "dynamo-lite drain") as bus:
        asking = _Asking(bus, Subjects(run.namespace))
        workers = await live_workers(run)
        worker = _named(workers, name)
        if not force and worker.record.role.decodes and not await asking.others(workers, worker):
            raise LastWorker(worker.label)
        began = time.monotonic()
        if not await asking.left(worker, ask):
            typer.echo(f"Error: {worker.label} is still there; its log may say why", err=True)
            return 1
        typer.echo(f"{worker.label} has left after {time.monotonic() - began:.1f} s")
    if not ask.restart:
        return 0
    if not await _back(run, worker):
        typer.echo(f"Error: {worker.label} is not back after {BACK_S:.0f} s; its log may say why", err=True)
        return 1
    typer.echo(f"{worker.label} is back after {time.monotonic() - began:.1f} s")
    return 0


def _named(workers: Sequence[Worker], name: str) -> Worker:
    found = [one for one in workers if name in (one.label, one.record.incarnation)]
    if not found:
        there = ", ".join(one.label for one in workers) or "none"
        raise NotThere(f"no worker is called {name}; there are: {there}")
    return found[0]


class _Asking:
    """Questions to workers."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus, self._subjects = bus, subjects

    async def others(self, workers: Sequence[Worker], leaving: Worker) -> bool:
        """Whether another worker generates, and is to stay."""
        for other in workers:
            if other is leaving or not other.record.role.decodes:
                continue
            try:
                if not (await self._ask(other, Drain(None))).draining:
                    return True
            except DynamoError:
                continue  # it is no help
        return False

    async def left(self, worker: Worker, ask: Drain) -> bool:
        """Whether it has, in time."""
        assert ask.deadline_s is not None, "it is asked to leave"
        said, until = "", time.monotonic() + ask.deadline_s + AFTERWARDS_S
        told = await self._ask(worker, ask)
        while time.monotonic() < until:
            if (line := _line(worker, told)) != said:
                typer.echo(line, err=True)
                said = line
            await asyncio.sleep(LOOK_S)
            try:
                told = await self._ask(worker, Drain(None))
            except NoResponders:
                return True
            except DeadlineExceeded:
                continue  # its last moments may be long
        return False

    async def _ask(self, worker: Worker, ask: Drain) -> Draining:
        subject = self._subjects.drain(worker.record.incarnation)
        return decode(await self._bus.request(subject, encode(ask), ANSWER_S), Draining)


def _line(worker: Worker, told: Draining) -> str:
    fetched = f", {told.waiting} of them with KV to be fetched" if told.waiting else ""
    return f"{worker.label}: {told.running} requests run here, {told.moved} have gone on elsewhere{fetched}"


async def _back(run: Run, worker: Worker) -> bool:
    """Whether it was started again in time."""
    until = time.monotonic() + BACK_S
    while time.monotonic() < until:
        for one in await live_workers(run):
            there = (one.record.name, one.record.host) == (worker.record.name, worker.record.host)
            if there and one.record.incarnation != worker.record.incarnation:
                return True
        await asyncio.sleep(LOOK_S)
    return False
