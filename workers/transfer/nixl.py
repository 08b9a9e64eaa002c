"""The transfer engine over NIXL's UCX backend: one agent per rank, writes only.

WRITE, never READ: over cuda_ipc a read falls back to TCP emulation (0.5 GB/s against 1,000), and over TCP a put is
2–5 times a get. `UCX_RNDV_THRESH=inf`, set by the supervisor, keeps same-host transfers on zero copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nixl._api import nixl_agent, nixl_agent_config, nixl_xfer_handle

from workers.errors import PeerLost, TransferError
from workers.transfer.engine import Memory, Notification, Progress, Region

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


class NixlWrite:
    """One posted write. NIXL keeps the handle alive until `close`."""

    def __init__(self, agent: nixl_agent, transfer: nixl_xfer_handle) -> None:
        self._agent, self._transfer = agent, transfer
        self._state = "PROC"

    def post(self) -> None:
        self._state = _guarded(self._agent.transfer, self._transfer)

    def poll(self) -> Progress:
        if self._state == "PROC":
            self._state = _guarded(self._agent.check_xfer_state, self._transfer)
        if self._state == "ERR":
            raise TransferError("NIXL reported a failed write")
        return "done" if self._state == "DONE" else "pending"

    def close(self) -> None:
        _guarded(self._transfer.release)


class NixlEngine:
    """See `workers.transfer.engine.TransferEngine`."""

    backend = "nixl/UCX"

    def __init__(self, name: str, threads: int = 1) -> None:
        """`threads`: UCX threads of NIXL's. With 1 there is none: whoever polls makes the progress.

        NIXL's progress thread spins: measured on an idle pair, it takes 0.3–0.6 of a core per agent, and the mover
        polls anyway while transfers are open. More threads pay only with several fast network ports.
        """
        self.name = name
        more = threads > 1
        config = nixl_agent_config(enable_prog_thread=more, num_threads=threads if more else 0, backends=["UCX"])
        self._agent = nixl_agent(name, config)
        if "UCX" not in self._agent.backends:
            raise TransferError("NIXL came up without its UCX backend")
        self._registered: list[object] = []
        self._peers: dict[bytes, str] = {}

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        self._registered.append(self._agent.register_memory([(address, size, device, "")], memory))
        return Region(address, size, device, memory)

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> str:
        peer = self._peers.get(metadata)
        if peer is None:
            found = _guarded(self._agent.add_remote_agent, metadata)
            peer = found.decode() if isinstance(found, bytes) else str(found)
            self._peers[metadata] = peer
        return peer

    def disconnect(self, peer: str) -> None:
        if peer not in self._peers.values():
            return
        self._peers = {key: name for key, name in self._peers.items() if name != peer}
        try:
            self._agent.remove_remote_agent(peer)
        except (*_LOST, *_FAILED):
            return  # already gone: what we wanted

    def write(
        self, peer: str, local: tuple[Region, int, int], remote: tuple[int, int, Memory], notify: bytes
    ) -> NixlWrite:
        region, offset, size = local
        address, device, memory = remote
        mine = self._agent.get_xfer_descs([(region.address + offset, size, region.device)], region.memory)
        theirs = self._agent.get_xfer_descs([(address, size, device)], memory)
        write = NixlWrite(self._agent, _guarded(self._agent.initialize_xfer, "WRITE", mine, theirs, peer, notify))
        write.post()
        return write

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
        for peer in list(self._peers.values()):
            self.disconnect(peer)
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()


def _guarded(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """NIXL's exceptions as ours."""
    try:
        return call(*args, **kwargs)
    except _LOST as error:
        raise PeerLost(str(error)) from error
    except _FAILED as error:
        raise TransferError(f"{type(error).__name__}: {error}") from error
