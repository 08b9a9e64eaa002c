"""Which workers show signs of life, and how long one may be silent before its streams go on elsewhere.

A worker that is given up although it lives costs a prompt computed twice. That must not feed on itself: where more than
half of the workers are quiet, this host or the network is to blame rather than they, and they are given more time; so
is one that was given up lately and was there after all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dynamo_lite.errors import DynamoError, NoResponders, PlaneError, ProtocolMismatch, WorkerLost
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.wire import Incarnation, InstanceRecord, Pong, Role, Subjects, decode
from dynamo_lite.router.roster import Roster

PING_S = 0.1
SILENCE_S = 0.8  # a worker of which nothing is heard for so long is frozen or cut off
HEAD_START_S = 0.4  # of a silence that began before anything was asked of the worker
LONG_SILENCE_S = 3.0  # the same, where that is less likely
QUIET_S = 0.6  # without one of its reports, which are four a second
NATS_AWAY_S = 30.0  # without NATS nobody else could go on with a stream either
REMEMBERED_S = 60.0  # how long an alarm makes the next one of that worker less likely
DECODES = (Role.DECODE, Role.BOTH)


class _Silent(DynamoError):
    """Ends a watch; says why."""


class Liveness:
    """Of the workers of one frontend. Open it with `open`."""

    def __init__(self, bus: Bus, subjects: Subjects, roster: Roster) -> None:
        self._bus, self._subjects, self._roster = bus, subjects, roster
        self._clock = asyncio.get_running_loop().time
        self._heard: dict[Incarnation, float] = {}  # its process and its engine
        self._reported: dict[Incarnation, float] = {}  # its process
        self._watched: set[Incarnation] = set()
        self._alarms: dict[Incarnation, list[float]] = {}  # when it was given up as silent

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, subjects: Subjects, roster: Roster) -> AsyncIterator[Liveness]:
        liveness = cls(bus, subjects, roster)
        reports = await bus.subscribe(subjects.load(), liveness._report)
        try:
            yield liveness
        finally:
            await reports.close()

    def heard(self, worker: Incarnation, ago_s: float = 0.0) -> None:
        """A sign of life of its engine's, so many seconds old."""
        at = self._clock() - ago_s
        if at > self._heard.get(worker, float("-inf")):
            self._heard[worker] = at

    def keep_house(self) -> None:
        """Forget those that are not there any more."""
        for known in (self._heard, self._reported, self._alarms):
            for worker in [one for one in known if one not in self._roster and one not in self._watched]:
                del known[worker]

    async def lost(self, worker: InstanceRecord) -> WorkerLost:
        """Returns once the worker is dead or has been silent for too long, and says which."""
        me, away = worker.incarnation, self._clock()
        # One that has been silent for long needs less to be found frozen, but is asked first.
        self._heard[me] = max(self._last(me, away), away - HEAD_START_S)
        self._watched.add(me)

        def pong(data: bytes) -> None:
            try:
                self.heard(me, decode(data, Pong).engine_silent_s)
            except ProtocolMismatch:
                self.heard(me)  # the request itself will fail for this, with a better message

        def check(late_s: float) -> None:
            nonlocal away
            now = self._clock()
            if self._bus.settling:
                if now - away > NATS_AWAY_S:
                    raise _Silent(f"NATS is away for {NATS_AWAY_S:.3g} s")
                self._heard[me] = now
                return
            away = now
            self._heard[me] += late_s
            silent_s = now - self._heard[me]
            if silent_s > self._patience_s(me, now):
                self._alarms.setdefault(me, []).append(now)
                raise _Silent(f"nothing was heard of it for {silent_s:.1f} s")

        probe = self._subjects.ping(me)
        try:
            await self._bus.watch_alive(probe, pong=pong, check=check, interval_s=PING_S)
        except NoResponders:
            return WorkerLost(worker.name, "its process is gone", "died")
        except (_Silent, PlaneError) as error:
            return WorkerLost(worker.name, str(error), "silent")
        finally:
            self._watched.discard(me)

    def _report(self, message: Message) -> None:
        """Of its load. That its engine runs too, only pongs tell in time."""
        self._reported[Incarnation(message.subject.rpartition(".")[2])] = self._clock()

    def _patience_s(self, worker: Incarnation, now: float) -> float:
        """How long it may be silent."""
        alarms = [at for at in self._alarms.get(worker, ()) if now - at < REMEMBERED_S]
        if self._many_quiet(worker, now):
            return LONG_SILENCE_S
        return min(SILENCE_S * (1 << len(alarms)), LONG_SILENCE_S)

    def _many_quiet(self, worker: Incarnation, now: float) -> bool:
        """Whether, with this one, it is more than half of those that generate; those just given up are among them."""
        there = {each.record.incarnation for each in self._roster.usable(DECODES)} | {worker}
        given_up = {one for one, alarms in self._alarms.items() if now - alarms[-1] < LONG_SILENCE_S}
        quiet = {one for one in there if now - self._last(one, now) > QUIET_S} | {worker}
        return 2 * len(quiet | given_up) > len(there | given_up)

    def _last(self, worker: Incarnation, now: float) -> float:
        """When there was a sign of it; one of which there never was any has just come."""
        return max(self._heard.get(worker, 0.0), self._reported.get(worker, 0.0)) or now
