"""What the machine can do without us: copies of memory, and a plain TCP connection."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import torch

from workers.bench.protocol import Answer, Connect, Copy, Done, Listen, Moment, Port, Stream, Took

TIMEOUT_S = 10.0


class RawSide:
    """Buffers and the connection of one process."""

    def __init__(self) -> None:
        self._buffers: dict[Copy, tuple[torch.Tensor, torch.Tensor]] = {}
        self._listener: socket.socket | None = None
        self._sent: socket.socket | None = None
        self._file = -1
        self._received: socket.socket | None = None
        self._into = bytearray()

    def obey(self, command: Copy | Listen | Connect | Stream) -> Answer:
        match command:
            case Copy():
                return self._copy(command)
            case Listen():
                return self._listen()
            case Connect():
                return self._connect(command)
            case Stream():
                return self._send(command.size) if self._sent is not None else self._receive(command.size)

    def _copy(self, command: Copy) -> Took:
        """On a CPU numpy's copyto, which is the C library's memcpy."""
        found = self._buffers.get(command)
        if found is None:
            source = torch.ones(command.size, dtype=torch.uint8, device=command.device)
            found = self._buffers[command] = (source, torch.zeros_like(source))
        source, copied = found
        if command.device == "cpu":
            here, there = source.numpy(), copied.numpy()
            began = time.monotonic()
            np.copyto(there, here)
            return Took(time.monotonic() - began)
        torch.cuda.synchronize()
        began = time.monotonic()
        copied.copy_(source)
        torch.cuda.synchronize()
        return Took(time.monotonic() - began)

    def _listen(self) -> Port:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT_S)
        return Port(self._listener.getsockname()[1])

    def _connect(self, command: Connect) -> Done:
        self._sent = socket.create_connection(("127.0.0.1", command.port), timeout=TIMEOUT_S)
        self._sent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Done()

    def _send(self, size: int) -> Moment:
        assert self._sent is not None
        if self._file < 0:
            self._file = os.memfd_create("dynamo-lite-bench", os.MFD_CLOEXEC)
            for _ in range(size >> 20):
                os.write(self._file, bytes(2**20))
        began, offset = time.monotonic(), 0
        with open(self._file, "rb", closefd=False) as source:
            while offset < size:
                offset += self._sent.sendfile(source, offset, size - offset)
        return Moment(began)

    def _receive(self, size: int) -> Moment:
        if self._received is None:
            assert self._listener is not None
            self._received, _ = self._listener.accept()
            self._received.settimeout(TIMEOUT_S)
        if len(self._into) != size:
            self._into = bytearray(size)
        view, got = memoryview(self._into), 0
        while got < size:
            count = self._received.recv_into(view[got:])
            if not count:
                raise ConnectionError("the sender's socket was closed")
            got += count
        return Moment(time.monotonic())

    def close(self) -> None:
        for one in (self._listener, self._sent, self._received):
            if one is not None:
                one.close()
        if self._file >= 0:
            os.close(self._file)
