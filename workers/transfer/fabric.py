"""The transfer engine between workers: UCX through NIXL, and on one host memory that both sides address.

`kv_transfer.transport` chooses: UCX is told by its environment (`dynamo_lite.transfer_plan`), memory of host and GPU is
shared here unless the transport rules it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import torch

from dynamo_lite.rdma import RdmaPort
from dynamo_lite.transports import Path, Transport, path_between
from workers.errors import Mismatch, PeerLost, StaleIncarnation, TransferError
from workers.transfer.cuda_ipc import CudaBytes, open_cuda, share_cuda
from workers.transfer.engine import Memory, Notification, Region, Spans, Target, Transfer
from workers.transfer.near import NearNotes
from workers.transfer.nixl import NixlAgent
from workers.transfer.shared import Shared, SharedBytes, Window, host_id, open_shared

_NEAR: tuple[Transport, ...] = ("auto", "shm", "cuda_ipc")  # may share memory, and be told things, without NIXL


class Card(msgspec.Struct, frozen=True, array_like=True):
    """What a peer is told of us."""

    name: str
    host: str
    agent: bytes  # NIXL's metadata
    shared: tuple[SharedBytes, ...]
    cuda: tuple[CudaBytes, ...]
    notes: str  # address, see NearNotes


_cards = msgspec.msgpack.Decoder(Card)  # here: threads that look at the class for the first time at once may crash


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected agent, and what of its memory is mapped here."""

    card: Card
    same_host: bool
    near: bool  # told things without NIXL
    windows: tuple[Window, ...]


class _ThenTold(Transfer):
    """A transfer whose end the peer is told of by us, not by NIXL."""

    def __init__(self, transfer: Transfer, deadline: float, tell: Callable[[], None]) -> None:
        super().__init__(deadline)
        self._transfer, self._tell = transfer, tell
        self._told = False

    def _advance(self) -> bool:
        if not self._told and self._transfer.poll() == "done":
            self._tell()
            self._told = True
        return self._told

    def close(self) -> None:
        self._transfer.close()


class Fabric:
    """See `workers.transfer.engine.PeerEngine`."""

    backend = "nixl/UCX"

    def __init__(
        self, name: str, threads: int = 1, transport: Transport = "auto", rdma: RdmaPort | None = None
    ) -> None:
        """`threads`: see NixlAgent. `rdma`: the port UCX was told to use, if any."""
        self.name = name
        self._transport, self._rdma = transport, rdma
        self._agent = NixlAgent(name, threads)
        self._near = NearNotes(name)
        self._shared: list[Shared] = []
        self._cuda: list[CudaBytes] = []
        self._device = torch.device("cpu")
        self._peers: dict[str, Peer] = {}
        self._broken: set[str] = set()  # near peers that cannot be told anything any more
        self._news: set[str] = set()  # of these, the ones that nobody has asked for
        self._cards: dict[bytes, str] = {}

    # ---- own memory ----

    def allocate(self, size: int, device: torch.device) -> tuple[torch.Tensor, Region]:
        self._device = device
        if device.type != "cpu":
            memory = torch.zeros(size, dtype=torch.uint8, device=device)
            if self._transport in ("auto", "cuda_ipc") and (card := share_cuda(memory)) is not None:
                self._cuda.append(card)
        elif self._transport in ("auto", "shm"):
            shared = Shared(size)
            self._shared.append(shared)
            memory = shared.bytes
        else:
            memory = torch.zeros(size, dtype=torch.uint8)
        return memory, self.register(memory.data_ptr(), size, self._memory, device.index or 0)

    @property
    def _memory(self) -> Memory:
        return "DRAM" if self._device.type == "cpu" else "VRAM"

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        return self._agent.register(address, size, memory, device)

    # ---- peers ----

    def metadata(self) -> bytes:
        cards = tuple(shared.card for shared in self._shared)
        agent, near = self._agent.metadata(), self._near.address
        return msgspec.msgpack.encode(Card(self.name, host_id(), agent, cards, tuple(self._cuda), near))

    def connect(self, metadata: bytes) -> str:
        known = self._cards.get(metadata)
        if known is not None:
            if known in self._broken or not self._agent.connected(known):
                self._again(known)
            return known
        try:
            card: Card = _cards.decode(metadata)
        except msgspec.MsgspecError as error:
            raise Mismatch(f"unreadable metadata of a transfer agent: {error}") from error
        same_host = card.host == host_id()
        if self._transport in ("shm", "cuda_ipc") and not same_host:
            raise Mismatch(f"kv_transfer.transport is {self._transport}, but {card.name} is on another host")
        if card.name in self._peers:
            raise StaleIncarnation(f"{card.name} is connected, and this is another agent of that name")
        near = same_host and self._transport in _NEAR and self._near.connect(card.name, card.notes)
        windows = self._open(card) if near else ()
        self._agent.add(card.agent)
        self._peers[card.name] = Peer(card, same_host, near, windows)
        self._cards[metadata] = card.name
        return card.name

    def renew(self, peer: str) -> None:
        """Make another connection to a peer that does not answer, unless a transfer still uses this one."""
        if not self._agent.busy(peer):
            self._again(peer)

    def _again(self, name: str) -> None:
        """Raises TransferError, and may be tried again. Memory that was mapped stays so: it is that same process's."""
        peer = self._peers[name]
        self._agent.remove(name)
        if peer.near and not self._near.connect(name, peer.card.notes):
            self._broken.add(name)
            raise PeerLost(f"{name} listens no more")
        self._broken.discard(name)
        self._agent.add(peer.card.agent)

    def lost(self) -> list[str]:
        found = {*self._agent.broken, *self._news}
        self._agent.broken.clear()
        self._news.clear()
        return [peer for peer in found if peer in self._peers]

    def _open(self, card: Card) -> tuple[Window, ...]:
        """What of a peer's memory can be addressed from here, and may be."""
        found: list[Window | None] = []
        if self._memory == "DRAM" and self._transport in ("auto", "shm"):
            found += [open_shared(one) for one in card.shared]
        if self._memory == "VRAM" and self._transport in ("auto", "cuda_ipc"):
            found += [open_cuda(one, self._device) for one in card.cuda]
        return tuple(window for window in found if window is not None)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            self._near.disconnect(peer)
            self._broken.discard(peer)
            for window in known.windows:
                window.close()
            self._cards = {key: name for key, name in self._cards.items() if name != peer}
            self._agent.remove(peer)

    def path(self, peer: str) -> Path:
        return path_between(self._transport, self._peers[peer].same_host, self._memory, self._rdma)

    def window(self, target: Target, offset: int, size: int) -> torch.Tensor | None:
        peer = self._peers.get(target.where)
        for window in peer.windows if peer is not None else ():
            first = target.address + offset - window.address
            if 0 <= first <= len(window.bytes) - size:
                return window.bytes.narrow(0, first, size)
        return None

    # ---- moving ----

    def write(
        self, region: Region, here: Spans, target: Target, there: Spans, deadline: float, notify: bytes = b""
    ) -> Transfer:
        peer = self._peers.get(target.where)
        if peer is None or not peer.near:
            return self._agent.start("WRITE", region, here, target, there, deadline, notify)
        write = self._agent.start("WRITE", region, here, target, there, deadline, b"")
        return _ThenTold(write, deadline, partial(self._tell_near, target.where, notify)) if notify else write

    def read(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> Transfer:
        """Prefer `write` from the other side: see `workers.transfer.nixl`."""
        return self._agent.start("READ", region, here, target, there, deadline, b"")

    def notify(self, peer: str, payload: bytes) -> None:
        known = self._peers.get(peer)
        if known is not None and known.near:
            self._tell_near(peer, payload)
        else:
            self._agent.notify(peer, payload)

    def _tell_near(self, peer: str, payload: bytes) -> None:
        if peer in self._broken:
            raise PeerLost(f"{peer} listens no more")
        try:
            self._near.send(peer, payload)
        except PeerLost:
            self._broken.add(peer)
            self._news.add(peer)
            raise

    def notifications(self) -> list[Notification]:
        return self._near.receive() + self._agent.notifications()

    def fileno(self) -> int:
        return self._near.fileno()

    @property
    def polled(self) -> bool:
        """A near peer whose memory is not mapped here writes by NIXL, whose connections both sides make by polling."""
        return any(not (peer.near and peer.windows) for peer in self._peers.values())

    def close(self) -> None:
        for peer in list(self._peers):
            with contextlib.suppress(TransferError):
                self.disconnect(peer)
        self._agent.close()
        self._near.close()
        for shared in self._shared:
            shared.close()
        self._shared.clear()
