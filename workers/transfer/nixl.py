"""NIXL's UCX backend: one agent, writes and reads between registered memories.

WRITE rather than READ: over cuda_ipc a read falls back to TCP emulation (0.5 GB/s against 1,000), and over TCP a put is
2–5 times a get. `UCX_RNDV_THRESH=inf`, set by the supervisor, keeps same-host transfers on zero copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


class NixlTransfer(Transfer):
    """One posted write or read. NIXL keeps the handle alive until `close`."""

    def __init__(self, agent: nixl_agent, transfer: nixl_xfer_handle, deadline: float) -> None:
        super().__init__(deadline)
        self._agent, self._transfer = agent, transfer
        self._state = _guarded(agent.transfer, transfer)

    def _advance(self) -> bool:
        if self._state == "PROC":
            self._state = _guarded(self._agent.check_xfer_state, self._transfer)
        if self._state == "ERR":
            raise TransferError("NIXL reported a failed transfer")
        return bool(self._state == "DONE")

    def close(self) -> None:
        _guarded(self._transfer.release)


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

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        self._registered.append(_guarded(self._agent.register_memory, [(address, size, device, "")], memory))
        return Region(address, size, device, memory)

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def add(self, metadata: bytes) -> str:
        found = _guarded(self._agent.add_remote_agent, metadata)
        return found.decode() if isinstance(found, bytes) else str(found)

    def remove(self, peer: str) -> None:
        try:
            self._agent.remove_remote_agent(peer)
        except (*_LOST, *_FAILED):
            return  # already gone: what we wanted

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
        handle = _guarded(self._agent.initialize_xfer, operation, mine, theirs, target.where, notify)
        return NixlTransfer(self._agent, handle, deadline)

    def notify(self, peer: str, payload: bytes) -> None:
        _guarded(self._agent.send_notif, peer, payload)

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
