"""What a child tells the supervisor while it starts and runs: JSON lines on an inherited pipe."""

from __future__ import annotations

import asyncio
import os
from typing import Literal, NoReturn, get_args

import msgspec

STATUS_FD = "DYNAMO_LITE_STATUS_FD"  # the supervisor sets it to the number of the pipe's writing end
BEAT_INTERVAL_S = 1.0

Phase = Literal["starting", "downloading", "converting", "loading", "ready", "failed", "draining", "drained"]
PHASES: tuple[str, ...] = get_args(Phase)


class StatusLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line; a bare heartbeat has no phase."""

    phase: Phase | None = None
    detail: str = ""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(StatusLine)


def parse_line(line: bytes) -> StatusLine:
    """The supervisor's side. Raises msgspec.MsgspecError on a line that is none."""
    return _decoder.decode(line)


class Status:
    """The child's side. Does nothing when no supervisor listens."""

    def __init__(self, fd: int | None = None) -> None:
        """`fd`: the pipe's writing end; by default the one the supervisor announced in the environment."""
        announced = os.environ.get(STATUS_FD)
        self._fd = int(announced) if fd is None and announced else fd
        if self._fd is not None:
            os.set_blocking(self._fd, False)
            os.set_inheritable(self._fd, False)

    def phase(self, name: Phase, detail: str = "") -> None:
        """Tell the phase; `detail` is one short line for people."""
        self._write(StatusLine(name, detail))

    async def beat(self) -> NoReturn:
        """A heartbeat a second: the event loop runs."""
        while True:
            self._write(StatusLine())
            await asyncio.sleep(BEAT_INTERVAL_S)

    def _write(self, line: StatusLine) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, _encoder.encode(line) + b"\n")
        except BlockingIOError:
            pass  # the supervisor is a thousand lines behind; serving goes first
        except BrokenPipeError:
            self._fd = None  # the supervisor is gone, and the kernel is about to end us too
