"""The frontends' shared port: one reserved socket in the supervisor, one listening socket for every process start.

All are bound with SO_REUSEPORT, so the kernel spreads connections over the frontends that listen, and a frontend
that died takes no more of them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from dynamo_lite.errors import StartError


class Port:
    """A port that stays ours while the context lasts, also between two frontends' lives."""

    def __init__(self, family: socket.AddressFamily, host: str, number: int) -> None:
        self.host, self.number = host, number
        self._family = family

    @classmethod
    @contextmanager
    def reserve(cls, host: str, number: int) -> Iterator[Port]:
        """`number` 0 lets the kernel choose. Raises StartError when the port or the address cannot be had."""
        try:
            family, *_ = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        except socket.gaierror as error:
            raise StartError("frontend", f"'{host}' is no address of this machine: {error.strerror}") from error
        # SO_REUSEPORT would let us slip in beside another program of the same user: look first, without it.
        for shared in (False, True):
            reserved = socket.socket(family, socket.SOCK_STREAM)
            try:
                _bind(reserved, host, number, shared)
            except OSError as error:
                reserved.close()
                raise StartError("frontend", _reason(error, host, number)) from error
            if not shared:
                number = reserved.getsockname()[1]
                reserved.close()
        with reserved:
            yield cls(family, host, number)

    @property
    def url(self) -> str:
        """What to type on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104  # only compared
        return f"http://[{host}]:{self.number}" if ":" in host else f"http://{host}:{self.number}"

    def socket(self) -> socket.socket:
        """A bound socket for one frontend, which calls `listen` once it can serve."""
        bound = socket.socket(self._family, socket.SOCK_STREAM)
        _bind(bound, self.host, self.number, shared=True)
        return bound


def _bind(target: socket.socket, host: str, number: int, shared: bool) -> None:
    target.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or the port of a server just ended is refused
    if shared:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    target.bind((host, number))


def _reason(error: OSError, host: str, number: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {number} is taken by another program; stop that one, or set another with --set frontend.port=…"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"'{host}' is no address of this machine"
    if error.errno == errno.EACCES:
        return f"port {number} is for administrators only; set one above 1023 with --set frontend.port=…"
    return f"cannot listen on {host}:{number}: {error.strerror}"
