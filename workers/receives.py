"""The worker process's side of receives: ties what the connectors report to the remote prefill that fills them.

One `Receive` per request that may be prefilled remotely; its driver asks candidate after candidate, and outlives the
request when that is aborted, until it is certain what the candidate will still write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dynamo_lite.errors import PrefillFailed
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Incarnation, PushTarget, RankTarget
from workers.connector.protocol import (
    IN_FLIGHT,
    NO_STAGING,
    Command,
    FirstToken,
    GiveUp,
    Prepare,
    ReceiveEnded,
    ReceiveOpened,
    ReceivePlanned,
    Reopen,
    Settle,
    Skipped,
)
from workers.engine import RemotePrefill, TransferReport
from workers.errors import Corrupt
from workers.pulse import ENGINE_SILENT

# Failures after which a candidate may still be writing: it has not said otherwise, and one that NATS cannot reach
# is not therefore dead.
_STAGING_PATIENCE = 20  # times the transfer's timeout: the connectors hand back what waits half as long
_LOST = "lost"  # pieces that were sent and did not arrive
_UNCERTAIN = ("silent", "gone", "protocol", "engine_died", ENGINE_SILENT, IN_FLIGHT)


@dataclass(slots=True)
class Receive:
    """One request's way to its KV."""

    request_id: str
    remote: RemotePrefill
    opened: dict[int, ReceiveOpened] = field(default_factory=dict)  # by rank, of the current attempt
    arrived: dict[int, ReceiveEnded] = field(default_factory=dict)  # by rank, of the current attempt
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unwanted: bool = False
    driven: bool = False
    over: bool = False  # no candidate is asked any more: the driver has ended, or it waited too long for staging
    prepared: Prepare | None = None  # staging was asked for before vLLM has planned the receive
    planned: set[int] = field(default_factory=set)  # ranks that know vLLM's plan
    skipped: str = ""  # why vLLM has planned none after all
    corrupt: bool = False  # a piece of the current attempt was not what was sent
    local_blocks: int | None = None  # found on the device by the scheduler; None until a remote prefill was chosen
    first_token: asyncio.Future[int] | None = None  # chosen by a prefill worker; None: not wanted
    chosen: int | None = None  # the token it will be
    told: bool = False  # the connectors know of it, or that there is none


class Receives:
    """All receives of one engine. Runs on the event loop; drivers are tasks of `group`."""

    def __init__(
        self, incarnation: Incarnation, layout: KvLayout, command: Callable[[Command], None], timeout_s: float,
        group: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        """`layout` of this worker: prefill workers bring KV into it."""
        self._incarnation, self._layout, self._ranks, self._command = (
            incarnation, layout, layout.tensor_parallel, command,
        )  # fmt: skip
        self._timeout_s, self._group = timeout_s, group
        self._receives: dict[str, Receive] = {}

    def expect(
        self, request_id: str, remote: RemotePrefill, *, first_token: bool = False, prepare: Prepare | None = None
    ) -> Receive:
        """A request that may be prefilled remotely is about to be given to the engine.

        `first_token`: the engine is to go on from the one that the prefill worker chooses. `prepare`: ask before the
        engine has planned it.
        """
        receive = self._receives[request_id] = Receive(request_id, remote, prepared=prepare)
        if prepare is not None:
            self._command(prepare)
        if first_token:
            receive.first_token = asyncio.get_running_loop().create_future()
        return receive

    def release(self, request_id: str) -> None:
        """The request has ended, finished or aborted."""
        receive = self._receives.get(request_id)
        if receive is None:
            return
        if not receive.unwanted:
            self._withdraw(receive)
        if receive.over or not receive.driven:
            del self._receives[request_id]

    def _withdraw(self, receive: Receive) -> None:
        """Nobody wants what a prefill worker computes for it."""
        receive.unwanted = True
        if receive.prepared is not None and self._unplanned(receive):
            self._command(GiveUp(receive.request_id, receive.prepared.transfer_id))
        if receive.driven and not receive.over:
            receive.remote.stop()
            receive.changed.set()

    def _unplanned(self, receive: Receive) -> bool:
        """Staging was asked for, and not every rank knows where the blocks go from there."""
        return receive.prepared is not None and len(receive.planned) < self._ranks

    @property
    def unplanned(self) -> int:
        """How many requests are about to be planned."""
        return sum(self._unplanned(one) and not one.unwanted for one in self._receives.values())

    def handle(self, report: Skipped | ReceivePlanned | ReceiveOpened | ReceiveEnded) -> None:
        """A connector's report. Those of a request that is forgotten are of no use to anybody."""
        receive = self._receives.get(report.request_id)
        match report:
            case Skipped():
                if receive is not None:
                    receive.remote.skipped(report.reason)
                    if receive.prepared is not None:
                        receive.skipped, receive.local_blocks = report.reason, None
                        self._withdraw(receive)
            case ReceivePlanned():
                if receive is not None:
                    receive.planned.add(report.rank)
                    self._tell(receive)
            case ReceiveOpened():
                self._opened(receive, report)
            case ReceiveEnded() if report.cause == NO_STAGING:
                if receive is not None:
                    receive.remote.skipped(NO_STAGING)
                    receive.over = True
                    self._tell(receive)
                    receive.changed.set()
            case ReceiveEnded():
                self._ended(receive, report)

    @staticmethod
    def _ended(receive: Receive | None, report: ReceiveEnded) -> None:
        if receive is None or report.rank not in receive.opened:
            return
        if not report.cause:
            receive.arrived[report.rank] = report
        elif report.cause == Corrupt.cause and report.transfer_id == receive.opened[report.rank].transfer_id:
            receive.corrupt = True
        receive.changed.set()

    def _opened(self, receive: Receive | None, report: ReceiveOpened) -> None:
        if receive is None or receive.over:  # granted too late: nobody was asked, so nobody will write
            self._command(Settle(report.transfer_id, "", closed=True))
            return
        receive.opened[report.rank] = report
        if not receive.skipped:
            receive.local_blocks = report.first_block
        receive.changed.set()
        if not receive.driven:
            receive.driven = True
            self._group.create_task(self._drive(receive), name=f"receive {receive.request_id}")

    async def _drive(self, receive: Receive) -> None:
        try:
            while not await self._attempt(receive):
                pass
        finally:
            receive.over = True
            self._tell(receive)
            if receive.skipped:
                receive.remote.skipped(receive.skipped)
            known = receive.unwanted or not self._unplanned(receive)
            if known and self._receives.get(receive.request_id) is receive:
                del self._receives[receive.request_id]

    def _first_token(self, receive: Receive, token_id: int) -> None:
        """The first that comes counts, whatever becomes of that attempt."""
        if receive.chosen is None:
            receive.chosen = token_id
            self._tell(receive)

    def _tell(self, receive: Receive) -> None:
        """The connectors, and through `first_token` the client, of the first token, or that there will be none.

        Not before the engine has planned the receive: until then it may still compute the prompt, and choose, itself.
        """
        if receive.first_token is None or receive.told or self._unplanned(receive):
            return
        if receive.chosen is not None and not receive.unwanted:
            receive.told = True
            self._command(FirstToken(receive.request_id, receive.chosen))
            receive.first_token.set_result(receive.chosen)
        elif receive.over:
            receive.told = True
            self._command(FirstToken(receive.request_id, None))

    async def _attempt(self, receive: Receive) -> bool:
        """Ask one candidate; True when the request needs no other."""
        granted = await self._granted(receive)
        if not receive.opened:
            return True  # aborted, or handed back, while it waited for staging
        transfer_id = next(iter(receive.opened.values())).transfer_id
        if not granted:
            self._command(Settle(transfer_id, "", closed=True))
            if not receive.unwanted:
                self._command(GiveUp(receive.request_id, transfer_id))
            return True
        try:
            heard = None if receive.first_token is None else partial(self._first_token, receive)
            await receive.remote.ask(self._target(receive, transfer_id), heard)
        except PrefillFailed as failure:
            if len(receive.arrived) < self._ranks:
                return self._failed(receive, transfer_id, closed=failure.cause not in _UNCERTAIN)
            # Only its reply was lost: every block is here.
        # Every piece has been written; what is left is to scatter the last ones.
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(receive.arrived) < self._ranks and not (receive.unwanted or receive.corrupt):
                    await self._change(receive)
        except TimeoutError:
            receive.remote.failed(_LOST)
            return self._failed(receive, transfer_id, closed=True)
        if receive.corrupt:
            receive.remote.failed(Corrupt.cause)
            return self._failed(receive, transfer_id, closed=True)
        if len(receive.arrived) == self._ranks:
            receive.remote.transferred(_summary(list(receive.arrived.values())))
        else:
            self._command(Settle(transfer_id, receive.remote.asked, closed=True))
        return True

    async def _granted(self, receive: Receive) -> bool:
        """Whether every rank got staging for the attempt. Ranks may disagree: then none of them is to wait on."""
        try:
            async with asyncio.timeout(self._timeout_s * _STAGING_PATIENCE):
                while len(receive.opened) < self._ranks and not receive.unwanted and not receive.over:
                    await self._change(receive)
        except TimeoutError:
            receive.remote.skipped(NO_STAGING)
            return False
        return len(receive.opened) == self._ranks and not receive.unwanted

    def _failed(self, receive: Receive, transfer_id: int, *, closed: bool) -> bool:
        self._command(Settle(transfer_id, receive.remote.asked, closed))
        if receive.unwanted:
            return True
        partly = bool(receive.arrived)  # a rank that has all of its blocks will not open again
        receive.opened.clear()
        receive.arrived.clear()
        receive.corrupt = False
        if receive.remote.more and not partly:
            self._command(Reopen(receive.request_id, transfer_id))
            return False
        self._command(GiveUp(receive.request_id, transfer_id))
        return True

    def _target(self, receive: Receive, transfer_id: int) -> PushTarget:
        opened = [receive.opened[rank] for rank in sorted(receive.opened)]
        ranks: tuple[RankTarget, ...] = tuple(one.target for one in opened)
        first_token = opened[0].first_block * self._layout.block_size
        return PushTarget(transfer_id, self._incarnation, self._layout, first_token, opened[0].tokens, ranks)

    @staticmethod
    async def _change(receive: Receive) -> None:
        await receive.changed.wait()
        receive.changed.clear()


def _summary(ends: Sequence[ReceiveEnded]) -> TransferReport:
    return TransferReport(
        bytes=sum(end.bytes for end in ends),
        blocks=ends[0].blocks,
        pieces=sum(end.pieces for end in ends),
        path=ends[0].path,
        started_ns=min(end.started_ns for end in ends),
        ended_ns=max(end.ended_ns for end in ends),
    )
