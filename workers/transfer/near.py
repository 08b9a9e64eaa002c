"""Notifications between agents of one host, over Unix sockets: the receiver sleeps until one comes.

UCX's own have to be polled for, which costs the thread that runs the model its interpreter. Each agent listens on a
random address in the abstract namespace, which ends with its process; only processes of the same user are let in.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct

from workers.errors import PeerLost, TransferError
from workers.transfer.engine import Notification

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BACKLOG = 64
_LARGEST = 2**17  # bytes of a notification; the first of a transfer carries an agent's metadata, some KiB


class NearNotes:
    """One agent's end. A connection carries one direction, from who made it; its first message is that agent's name."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self.address = f"dynamo-lite-{secrets.token_hex(16)}"
        self._listener = _socket()
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(_BACKLOG)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._incoming: dict[int, tuple[socket.socket, str]] = {}  # by descriptor; with the peer's name, once known
        self._outgoing: dict[str, socket.socket] = {}

    def fileno(self) -> int:
        """Readable when `receive` has something to do."""
        return self._epoll.fileno()

    def connect(self, peer: str, address: str) -> bool:
        """Whether that agent can be told things this way from now on."""
        self.disconnect(peer)
        sock = _socket()
        try:
            sock.connect(f"\0{address}")
            sock.send(self._name, socket.MSG_NOSIGNAL)
        except OSError:  # it has ended, or is in another network namespace
            sock.close()
            return False
        self._outgoing[peer] = sock
        return True

    def disconnect(self, peer: str) -> None:
        sock = self._outgoing.pop(peer, None)
        if sock is not None:
            sock.close()

    def send(self, peer: str, payload: bytes) -> None:
        """To a connected agent. Never waits: raises PeerLost when it has ended, TransferError when it does not read."""
        sock = self._outgoing.get(peer)
        if sock is None:
            raise PeerLost(f"{peer} is not connected")
        try:
            sock.send(payload, socket.MSG_NOSIGNAL)
        except BlockingIOError as error:
            raise TransferError(f"{peer} reads no notifications") from error
        except OSError as error:
            raise PeerLost(f"{peer}: {error}") from error

    def receive(self) -> list[Notification]:
        """All that has come, of each agent in its order."""
        found: list[Notification] = []
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                for sock in self._accept():
                    self._read(sock, found)
            else:
                self._read(descriptor, found)
        return found

    def _accept(self) -> list[int]:
        accepted = []
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
                    sock.close()
                    continue
                self._incoming[sock.fileno()] = (sock, "")
                self._epoll.register(sock, select.EPOLLIN)
                accepted.append(sock.fileno())
        return accepted

    def _read(self, descriptor: int, found: list[Notification]) -> None:
        sock, peer = self._incoming[descriptor]
        with contextlib.suppress(BlockingIOError):
            while payload := self._message(sock):
                if peer:
                    found.append(Notification(peer, payload))
                else:
                    peer = payload.decode(errors="replace")
                    self._incoming[descriptor] = (sock, peer)
            self._epoll.unregister(sock)  # it has ended
            del self._incoming[descriptor]
            sock.close()

    @staticmethod
    def _message(sock: socket.socket) -> bytes:
        try:
            return sock.recv(_LARGEST)
        except ConnectionError:
            return b""

    def close(self) -> None:
        for sock in (self._listener, *self._outgoing.values(), *(sock for sock, _ in self._incoming.values())):
            sock.close()
        self._epoll.close()


def _socket() -> socket.socket:
    """Whole messages in order, bounded by the buffer; and the other end's death is noticed."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    return sock
