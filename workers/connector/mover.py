"""The mover: one thread per rank that owns the transfer engine, the staging and both halves of every transfer.

vLLM's own thread only leaves plans here and collects what ended, so a transfer never delays an engine step. Nothing
else calls NIXL. The thread sleeps until something happens, and polls only while bytes move, or for what comes by UCX.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec

from dynamo_lite.plane.layout import slot_bytes
from dynamo_lite.processes import wake_precisely
from workers.connector.arena import Arena
from workers.connector.contacts import Contacts
from workers.connector.offload import Offloader
from workers.connector.onboard import Onboarder
from workers.connector.protocol import (
    Alive,
    Closed,
    Command,
    Credit,
    FirstToken,
    GiveUp,
    Greeting,
    Holds,
    Meet,
    Note,
    OnboardChecked,
    OnboardOver,
    PeerGone,
    Piece,
    Prepare,
    Probe,
    PushStep,
    Refused,
    Reopen,
    Report,
    Settle,
    StepPlan,
    StopPush,
)
from workers.connector.push import Sender
from workers.connector.receive import Receiver
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.connector.wake import Wake
from workers.errors import TransferError
from workers.transfer.engine import Notification, PeerEngine
from workers.transfer.layout import Planes
from workers.transfer.pack import Copier, Copy
from workers.transfer.ready import Ready, ReadyWatch, StepReady

_log = logging.getLogger(__name__)
_POLL_MOVING_S = 0.00002
_POLL_WAITING_S = 0.001
_POLL_DEADLINES_S = 0.05  # nothing has to be polled for: whatever happens wakes us
_MOVING_S = 0.002  # after the last piece, credit or write: more are likely to come
_LINGER_S = 0.1  # after the last transfer: a notification may still wait in UCX for somebody to poll
_HOLDS_S = 0.02  # between two reports of what is held, which every piece changes
_JOIN_TIMEOUT_S = 5.0
_SWITCH_S = 0.0002  # the thread that runs the model would otherwise keep the interpreter for up to 5 ms at a time


@dataclass(frozen=True, slots=True)
class Ended:
    """What vLLM is told at the end of a step."""

    sent: set[str]
    received: set[str]
    invalid_blocks: set[int]


class Mover:
    """Thread-safe: `plan`, `cancel_pushes`, `command`, `ended`, `wait`, `close`."""

    def __init__(
        self,
        engine: PeerEngine,
        planes: Planes,
        settings: MoverSettings,
        report: Callable[[Report], None],
        on_bug: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """`report` and `on_bug` are called on the mover's thread; the latter when it ends by an error of ours."""
        self.slot_bytes = size = slot_bytes(planes.layout, settings.piece)
        self._copier = copier = Copier(planes, settings.rank)
        copier.warm()  # before vLLM captures its CUDA graphs, which nobody may disturb
        self._engine, self._report, self._settings, self._on_bug = engine, report, settings, on_bug
        self._device, self._layers = planes.device, planes.layout.layers
        outgoing = Staging(engine, settings.staging, size, planes.device)
        incoming = Staging(engine, settings.staging, size, planes.device)
        self._stagings = (outgoing, incoming)
        self._contacts = Contacts(engine, settings.rank, settings.timeout_s, report)
        self._wake = Wake(engine)
        cuda = planes.device.type == "cuda"
        self._ready_watch = ReadyWatch(self._wake.ring) if cuda else None
        self._copy_watch = ReadyWatch(self._wake.ring) if cuda else None  # they end long before the step they belong to
        self._sender = Sender(engine, self._contacts, outgoing, copier, settings, report, self._watch_copy)
        self._receiver = Receiver(engine, self._contacts, incoming, copier, settings, report)
        self._arena: Arena | None = None
        self._offloader: Offloader | None = None
        self._onboarder: Onboarder | None = None
        if settings.arena:
            own = Copier(planes, settings.rank)  # its copies are long, and pushes must not wait behind them
            own.warm()
            self._arena = Arena(settings.arena, settings.rank, settings.ranks, own, planes.device, self._wake.ring)
            self._offloader = Offloader(self._arena, settings.rank, report)
            self._onboarder = Onboarder(self._arena, settings.rank, settings.timeout_s, report)
        self.agent = engine.metadata()  # for other workers; here, before the thread owns the engine
        self._notes = msgspec.msgpack.Decoder(Note)
        self._todo: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # held while blocks are read or written: `cancel_pushes` waits for it
        self._ended_lock = threading.Lock()
        self._pushing: set[str] = set()  # engine ids with a push that vLLM has not been told the end of
        self._finished: set[str] = set()  # of these, the ones that vLLM has finished
        self._sent: set[str] = set()
        self._unreported: set[str] = set()  # preempted: vLLM is not told of their end
        self._offloading: dict[str, int] = {}  # engine ids with blocks handed over: steps still to be copied
        self._parts: dict[str, int] = {}  # engine ids: how many of onboarding and receive are still to come
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._stopped = False
        self._changed = threading.Event()
        self._held = Holds(settings.rank, {})
        self._told = -_HOLDS_S  # when it was
        self._told_late = False  # it may have changed since
        self._moved = 0.0  # when anything last did
        self._thread = threading.Thread(target=self._live, name="dynamo-lite-mover", daemon=True)
        self._thread.start()

    # ---- from vLLM's thread ----

    def plan(self, step: StepPlan) -> None:
        """Take over what this step asks; its blocks are computed as of now on the current CUDA stream."""
        outgoing, incoming = step.pushes or step.offloads, step.receives or step.onboards
        if outgoing or incoming or step.cancelled_receives or step.cancelled_pushes:
            with self._ended_lock:
                self._pushing |= {push.engine_id for push in step.pushes}
                for offload in step.offloads:
                    self._offloading[offload.engine_id] = self._offloading.get(offload.engine_id, 0) + 1
            ready = Ready(self._device)
            self._do(lambda: self._take(step, ready))
            if outgoing and self._ready_watch is not None:
                self._ready_watch.watch(ready)

    def push(self, steps: list[PushStep]) -> StepReady:
        """Take over tokens that are about to be computed: layers of them may leave as soon as they are `reached`."""
        with self._ended_lock:
            self._pushing |= {step.engine_id for step in steps}
        ready = StepReady(self._layers)
        self._do(lambda: self._push(steps, ready))
        return ready

    def reached(self, ready: StepReady, layers: int) -> None:
        """So many layers of that step are computed as of now on the current CUDA stream."""
        point = Ready(self._device)
        ready.reach(layers, point)
        if self._ready_watch is not None:
            self._ready_watch.watch(point)
        else:
            self._wake.ring()

    def cancel_pushes(self, engine_ids: list[str]) -> None:
        """Return once no block of these prompts is read any more: vLLM is about to hand them out."""
        with self._ended_lock:
            self._pushing -= set(engine_ids)  # vLLM has freed their blocks itself
            self._unreported |= set(engine_ids)
        with self._lock:
            for engine_id in engine_ids:
                self._sender.preempt(engine_id)

    def cancel_offloads(self, engine_ids: list[str]) -> None:
        """Return once no block of these requests is read any more for a tier: vLLM is about to hand them out."""
        with self._lock, self._ended_lock:
            if self._offloader is not None:
                for engine_id in engine_ids:
                    self._offloader.preempt(engine_id, self._offloading.get(engine_id, 0))
        self._wake.ring()

    def ended(self, finished: set[str]) -> Ended:
        """What has ended since the last call. What is sent is only reported once vLLM has `finished` its request."""
        with self._ended_lock:
            self._finished |= finished & (self._pushing | self._offloading.keys())
            pushed = self._sent | (self._offloading.keys() - self._pushing)
            sent = {one for one in pushed & self._finished if not self._offloading.get(one)}
            self._sent -= sent
            self._finished -= sent
            self._pushing -= sent
            for engine_id in sent:
                self._offloading.pop(engine_id, None)
            over = finished & self._unreported
            self._sent -= over
            self._unreported -= over
            received, self._received = self._received, set()
            invalid, self._invalid = self._invalid, set()
            self._changed.clear()
        if sent or over:
            self._do(lambda: self._sender.forget(sent | over))
        return Ended(sent, received, invalid)

    def wait(self, seconds: float) -> None:
        """Sleep until something ended: an engine with nothing to compute would otherwise spin."""
        self._changed.wait(seconds)

    # ---- from the channel's thread ----

    def command(self, command: Command) -> None:
        self._do(lambda: self._obey(command))

    def close(self) -> None:
        self._stopped = True
        self._wake.ring()
        self._thread.join(timeout=_JOIN_TIMEOUT_S)

    # ---- the thread ----

    def _watch_copy(self, copy: Copy) -> None:
        """Be woken once it is done. Without CUDA it is."""
        if self._copy_watch is not None:
            self._copy_watch.watch(copy)

    def _do(self, action: Callable[[], None]) -> None:
        self._todo.append(action)
        self._wake.ring()

    def _live(self) -> None:
        try:
            wake_precisely()
            sys.setswitchinterval(_SWITCH_S)
            self._copier.live()
            self._run()
        except BaseException as error:
            self._on_bug(error)
            raise

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            if not self._todo:
                self._wake.wait(self._pause())
            if self._stopped:
                break
            now = time.monotonic()
            with self._lock:
                if now - last > self._settings.timeout_s and self._sender.active:
                    # This process was frozen: receivers have given up on these pushes, and must not be written to.
                    self._sender.fail_all("frozen")
                self._sender.fence(now + self._settings.timeout_s)
                for _ in range(len(self._todo)):  # not those that come meanwhile: what peers say must be read, too
                    self._todo.popleft()()
                self._poll()
            last = now
            self._tell_holds(now, late=now - self._told < _HOLDS_S)
        self._sender.fail_all("shutdown")
        self._engine.close()
        if self._arena is not None:
            self._arena.close()

    def _pause(self) -> float | None:
        quiet_s = time.monotonic() - self._moved
        polled = self._engine.polled
        if self._tiers_moving and self._device.type != "cuda":
            return _POLL_MOVING_S
        active = self._sender.active or self._receiver.active or self._contacts.active or self._tiers_active
        if active or (polled and quiet_s < _LINGER_S):
            if polled:
                return _POLL_MOVING_S if quiet_s < _MOVING_S else _POLL_WAITING_S
            copying = self._device.type == "cuda" and (self._sender.moving or self._receiver.moving)
            return _POLL_MOVING_S if copying else _POLL_DEADLINES_S
        return _HOLDS_S if self._told_late else self._contacts.idle_s

    def _poll(self) -> None:
        for note in self._notifications():
            self._note(note.peer, note.payload)
            self._moved = time.monotonic()
        moved = [self._sender.progress(), self._receiver.progress(), self._sender.moving, self._receiver.moving]
        if any(moved) or (self._move_tiers() and self._device.type != "cuda"):
            self._moved = time.monotonic()
        self._receiver.expire()
        self._contacts.progress()
        for peer in self._engine.lost():
            self._sender.lost(peer)
            self._contacts.lost(peer)
        if self._sender.fresh or self._receiver.received:
            with self._ended_lock:
                self._sent.update(self._sender.fresh)
                self._arrived(self._receiver.received, self._receiver.invalid_blocks)
            self._sender.fresh.clear()
            self._receiver.received.clear()
            self._receiver.invalid_blocks.clear()
            self._changed.set()

    def _move_tiers(self) -> bool:
        """Copy blocks to and from the host tier; True when anything moved, or could."""
        if self._onboarder is None or self._offloader is None:
            return False
        moved = [self._onboarder.progress(), self._offloader.progress(), self._onboarder.moving, self._offloader.moving]
        if self._onboarder.received or self._offloader.fresh:
            with self._ended_lock:
                for engine_id in self._offloader.fresh:
                    self._offloading[engine_id] -= 1
                self._arrived(self._onboarder.received, self._onboarder.invalid_blocks)
            self._offloader.fresh.clear()
            self._onboarder.received.clear()
            self._onboarder.invalid_blocks.clear()
            self._changed.set()
        return any(moved)

    @property
    def _tiers_moving(self) -> bool:
        """Blocks can be copied now: but for CUDA, where each copy's end wakes us, nothing will."""
        return (self._onboarder is not None and self._onboarder.moving) or (
            self._offloader is not None and self._offloader.moving
        )

    @property
    def _tiers_active(self) -> bool:
        return (self._onboarder is not None and self._onboarder.active) or (
            self._offloader is not None and self._offloader.active
        )

    def _arrived(self, engine_ids: Iterable[str], invalid_blocks: set[int]) -> None:
        """One part of what these requests wait for: vLLM is told of the last."""
        for engine_id in engine_ids:
            left = self._parts.pop(engine_id, 1) - 1
            if left:
                self._parts[engine_id] = left
            else:
                self._received.add(engine_id)
        self._invalid |= invalid_blocks

    def _notifications(self) -> list[Notification]:
        try:
            return self._engine.notifications()
        except TransferError as error:  # of one peer's connection; its pushes fail by themselves
            _log.warning("reading notifications failed: %s", error)
            return []

    def _note(self, peer: str, payload: bytes) -> None:
        try:
            note: Note = self._notes.decode(payload)
        except msgspec.MsgspecError:
            return  # not of this protocol: a peer of another version, refused by fingerprint before it gets here
        match note:
            case Piece():
                self._receiver.piece(peer, note)
            case Credit():
                self._sender.credit(peer, note.transfer_id, note.slot)
            case Refused():
                self._sender.refused(peer, note.transfer_id, note.cause)
            case Closed():
                self._receiver.closed(peer, note)
            case Greeting():
                self._contacts.greeting(peer, note)

    def _take(self, step: StepPlan, ready: Ready) -> None:
        for engine_id in step.cancelled_receives:
            self._receiver.cancel(engine_id)
            if self._onboarder is not None:
                self._onboarder.cancel(engine_id)
        both = {plan.engine_id for plan in step.receives} & {plan.engine_id for plan in step.onboards}
        self._parts.update(dict.fromkeys(both, 2))
        if self._onboarder is not None and self._offloader is not None:
            for onboard in step.onboards:
                self._onboarder.plan(replace(onboard, ready=ready))
            for offload in step.offloads:
                self._offloader.step(offload, ready)
        for engine_id in step.cancelled_pushes:
            self._sender.cancel(engine_id, "cancelled")
        for receive in step.receives:
            self._receiver.plan(receive, ready)
        self._push(step.pushes, StepReady.whole(self._layers, ready))

    def _push(self, steps: list[PushStep], ready: StepReady) -> None:
        for step in steps:
            self._sender.step(step, ready)

    def _obey(self, command: Command) -> None:
        match command:
            case Prepare():
                self._receiver.prepare(command)
            case Reopen():
                self._receiver.reopen(command.request_id, command.transfer_id)
            case GiveUp():
                self._receiver.give_up(command.request_id, command.transfer_id)
            case FirstToken():
                self._receiver.first_token(command.request_id)
            case Settle():
                self._receiver.settle(command.transfer_id, command.peer, command.closed)
            case PeerGone():
                self._receiver.quarantine.peer_gone(command.incarnation)
                self._sender.gone(command.incarnation)
                self._contacts.forget(command.incarnation)
            case Meet():
                self._receiver.quarantine.peer_back(command.incarnation)
                self._contacts.meet(command.incarnation, command.agents)
            case StopPush():
                self._sender.stop(command.request_id)
            case OnboardChecked() if self._onboarder is not None:
                self._onboarder.checked(command)
            case OnboardOver() if self._onboarder is not None:
                self._onboarder.over(command.request_id)
            case Probe():
                self._tell_holds(time.monotonic(), late=False)
                self._report(Alive(self._settings.rank))

    def _tier_holds(self) -> dict[str, int]:
        if self._onboarder is None or self._offloader is None:
            return {}
        return {"onboard": self._onboarder.blocks, "offload": self._offloader.blocks}

    def _tell_holds(self, now: float, *, late: bool) -> None:
        """If they have changed. `late`: not yet, but before long."""
        self._told_late = late
        if late:
            return
        staged = sum(staging.used for staging in self._stagings)
        holds = Holds(self._settings.rank, self._sender.holds() | self._receiver.holds() | self._tier_holds(), staged)
        if holds != self._held:
            self._held, self._told = holds, now
            self._report(holds)
