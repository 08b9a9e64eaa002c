"""NIXL's UCX backend: one agent, writes and reads between registered memories.

WRITE rather than READ: over cuda_ipc a read falls back to TCP emulation (0.5 GB/s against 1,000), and over TCP a put is
2–5 times a get. `UCX_RNDV_THRESH=inf`, set by the supervisor, keeps same-host transfers on zero copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config, nixl_xfer_handle
from numpy.typing import NDArray

from workers.errors import Mismatch, PeerLost, TransferError
from workers.transfer.engine import Memory, Notification, Region, Spans, Target, Transfer

# `nixl` picks nixl_cu12 or nixl_cu13 at import; the exceptions live in the one it picked.
_errors = importlib.import_module(nixl_agent.__module__.rpartition(".")[0] + "._bindings")
_LOST = (_errors.nixlRemoteDisconnectError, _errors.nixlNotFoundError)
_FAILED = (
    _errors.nixlBackendError,
    _errors.nixlCancelledError,
    _errors.nixlInvalidParamError,
    _errors.nixlMismatchError,
    _errors.nixlNotAllowedError,
    _errors.nixlNotSupportedError,
    _errors.nixlUnknownError,
)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Connection:
    """To one peer, until it breaks: UCX ends every transfer of it then, and would fail every later one."""

    peer: str
    broken: list[str]  # of the agent: peers whose connections have broken
    lost: bool = False
    transfers: int = 0  # that are not closed

    def lose(self) -> None:
        if not self.lost:
            self.lost = True
            self.broken.append(self.peer)


class NixlTransfer(Transfer):
    """One posted write or read. NIXL keeps the handle alive until `close`."""

    def __init__(self, agent: nixl_agent, transfer: nixl_xfer_handle, deadline: float, connection: Connection) -> None:
        super().__init__(deadline)
        self._agent, self._transfer, self._connection = agent, transfer, connection
        try:
            self._state = _guarded(agent.transfer, transfer)
        except TransferError as error:
            connection.lose()
            raise PeerLost(str(error)) from error
        connection.transfers += 1

    def _advance(self) -> bool:
        """NIXL fails a transfer with its connection only, whatever it calls the error."""
        try:
            if self._state == "PROC":
                self._state = _guarded(self._agent.check_xfer_state, self._transfer)
        except TransferError as error:
            self._state = "ERR"
            self._connection.lose()
            raise PeerLost(str(error)) from error
        if self._state == "ERR":
            self._connection.lose()
            raise PeerLost(f"the connection to {self._connection.peer} broke")
        return bool(self._state == "DONE")

    def close(self) -> None:
        _guarded(self._transfer.release)
        self._connection.transfers -= 1


class NixlAgent:
    """One agent and what it has registered."""

    def __init__(self, name: str, threads: int = 1) -> None:
        """`threads`: UCX threads of NIXL's. With 1 there is none: whoever polls makes the progress.

        NIXL's progress thread spins: measured on an idle pair, it takes 0.3–0.6 of a core per agent, and the mover
        polls anyway while transfers are open. More threads pay only with several fast network ports.
        """
        more = threads > 1
        config = nixl_agent_config(enable_prog_thread=more, num_threads=threads if more else 0, backends=["UCX"])
        try:
            self._agent = _guarded(nixl_agent, name, config)
        except TransferError as error:
            message = "UCX has none of the transports or devices that it was told to use (see what it printed above)"
            raise TransferError(f"{message}: {error}") from error
        self._registered: list[object] = []
        self._connections: dict[str, Connection] = {}
        self.broken: list[str] = []  # peers whose connection was found to be broken, for the owner to take

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        self._registered.append(_guarded(self._agent.register_memory, [(address, size, device, "")], memory))
        return Region(address, size, device, memory)

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def add(self, metadata: bytes) -> str:
        """Raises PeerLost when no connection can be made, TransferError when the metadata cannot be understood.

        UCX keeps a file descriptor for good each time that it finds no route: callers must not try again and again.
        """
        try:
            found = self._agent.add_remote_agent(metadata)
        except _errors.nixlBackendError as error:
            raise PeerLost(f"no connection can be made: {error}") from error
        except (*_LOST, *_FAILED) as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error
        peer = found.decode() if isinstance(found, bytes) else str(found)
        self._connections[peer] = Connection(peer, self.broken)
        return peer

    def remove(self, peer: str) -> None:
        """Its transfers end, with PeerLost."""
        connection = self._connections.pop(peer, None)
        if connection is not None:
            connection.lost = True  # which is no news
        try:
            self._agent.remove_remote_agent(peer)
        except (*_LOST, *_FAILED):
            return  # already gone: what we wanted

    def connected(self, peer: str) -> bool:
        """As far as is known: a connection that nobody uses may be broken."""
        connection = self._connections.get(peer)
        return connection is not None and not connection.lost

    def busy(self, peer: str) -> bool:
        """Whether a transfer to it is not closed."""
        connection = self._connections.get(peer)
        return connection is not None and connection.transfers > 0

    def _connection(self, peer: str) -> Connection:
        connection = self._connections.get(peer)
        if connection is None or connection.lost:
            raise PeerLost(f"there is no connection to {peer}")
        return connection

    def start(
        self, operation: Literal["WRITE", "READ"], region: Region, here: Spans, target: Target, there: Spans,
        deadline: float, notify: bytes,
    ) -> NixlTransfer:  # fmt: skip
        """Post a transfer of `here` to `there`, or back. Raises Mismatch, PeerLost, TransferError."""
        if len(here.offsets) != len(there.offsets) or here.size != there.size:
            raise Mismatch(f"{len(here.offsets)} spans of {here.size} bytes here, {len(there.offsets)} there")
        here.check(region.size, "the region")
        there.check(target.size, f"{target.where}'s memory")
        mine = self._agent.get_xfer_descs(_described(region.address, here, region.device), region.memory)
        theirs = self._agent.get_xfer_descs(_described(target.address, there, target.device), target.memory)
        connection = self._connection(target.where)
        handle = _guarded(self._agent.initialize_xfer, operation, mine, theirs, target.where, notify)
        return NixlTransfer(self._agent, handle, deadline, connection)

    def notify(self, peer: str, payload: bytes) -> None:
        """Raises PeerLost. What a connection that breaks later has not delivered is gone without a word."""
        connection = self._connection(peer)
        try:
            _guarded(self._agent.send_notif, peer, payload)
        except TransferError as error:
            connection.lose()
            raise PeerLost(str(error)) from error

    def notifications(self) -> list[Notification]:
        fresh = _guarded(self._agent.get_new_notifs)
        return [
            Notification(peer.decode() if isinstance(peer, bytes) else peer, payload)
            for peer, payloads in fresh.items()
            for payload in payloads
        ]

    def close(self) -> None:
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()


def _described(address: int, spans: Spans, device: int) -> NDArray[np.uint64]:
    """NIXL's descriptors, `[spans, 3]`: address, bytes, device."""
    table = np.empty((len(spans.offsets), 3), dtype=np.uint64)
    table[:, 0] = spans.offsets.astype(np.uint64) + np.uint64(address)
    table[:, 1] = spans.size
    table[:, 2] = device
    return table


def _guarded(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """NIXL's exceptions as ours."""
    try:
        return call(*args, **kwargs)
    except _LOST as error:
        raise PeerLost(str(error)) from error
    except _FAILED as error:
        raise TransferError(f"{type(error).__name__}: {error}") from error
