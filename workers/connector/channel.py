"""The control channel between the connectors (in vLLM's processes) and the worker process: a Unix socket in a 0700
folder, length-prefixed msgpack. It exists before vLLM starts, so a connector can connect while the engine loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from workers.connector.protocol import NOT_TO_RANKS, TO_SCHEDULER, Command, Hello, Report

_LENGTH = struct.Struct("<I")
_CONNECT_TIMEOUT_S = 10.0
_WRITE_TIMEOUT_S = 5.0


class ConnectorEnd:
    """A connector's end. Reports are written by the caller's thread; commands arrive on a reader thread."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_CONNECT_TIMEOUT_S)
        self._socket.connect(path)
        self._socket.settimeout(None)
        # A worker process that stops reading must not stop the engine for ever.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_WRITE_TIMEOUT_S), 0))
        self._encoder = msgspec.msgpack.Encoder()
        self._writing = threading.Lock()
        self._reader: threading.Thread | None = None

    def report(self, message: Report) -> None:
        data = self._encoder.encode(message)
        with self._writing:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def listen(self, handle: Callable[[Command], None], closed: Callable[[], None]) -> None:
        """Call `handle` for every command, on a thread of our own, and `closed` when the worker process is gone."""
        self._reader = threading.Thread(
            target=self._read, args=(handle, closed), name="dynamo-lite-channel", daemon=True
        )
        self._reader.start()

    def _read(self, handle: Callable[[Command], None], closed: Callable[[], None]) -> None:
        decoder = msgspec.msgpack.Decoder(Command)
        stream = self._socket.makefile("rb")
        try:
            while head := stream.read(_LENGTH.size):
                handle(decoder.decode(stream.read(*_LENGTH.unpack(head))))
        except (OSError, struct.error, msgspec.DecodeError):
            return  # the worker process died in the middle of a message
        finally:
            closed()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end may have closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._reader is not None:
            self._reader.join(timeout=_CONNECT_TIMEOUT_S)
        self._socket.close()


class WorkerEnd:
    """The worker process's end: one listening socket, one connection per connector."""

    def __init__(self) -> None:
        # Not in the state folder: a Unix socket's path holds 107 bytes at most.
        self._folder = Path(tempfile.mkdtemp(prefix="dynamo-lite-"))
        self.path = str(self._folder / "control")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.path)
        os.chmod(self.path, 0o600)
        self._socket.listen(64)
        self._server: asyncio.Server | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def endpoint(self, name: str) -> str:
        """A further ZMQ endpoint in the same private folder."""
        return f"ipc://{self._folder / name}"

    async def serve(self, handle: Callable[[Report], None]) -> None:
        """Start reading; `handle` is called on the event loop for every report."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Report)
            with (
                contextlib.suppress(asyncio.IncompleteReadError, ConnectionError),
                contextlib.closing(writer),
            ):
                while True:
                    size = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
                    report = decoder.decode(await reader.readexactly(size))
                    if isinstance(report, Hello):
                        self._writers[report.rank] = writer
                    handle(report)

        self._server = await asyncio.start_unix_server(connected, sock=self._socket)

    def command(self, message: Command) -> None:
        """To every rank's connector, and what the scheduler's is to know to that one, first."""
        data = self._encoder.encode(message)
        for rank, writer in sorted(self._writers.items(), key=lambda item: item[0]):
            meant = not isinstance(message, NOT_TO_RANKS) if rank >= 0 else isinstance(message, TO_SCHEDULER)
            if meant and not writer.is_closing():
                writer.write(_LENGTH.pack(len(data)) + data)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._server is not None:
            self._server.close()
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)
