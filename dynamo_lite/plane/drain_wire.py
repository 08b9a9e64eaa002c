"""What an operator asks of a worker that is to leave: `dynamo-lite drain`. See `wire`."""

from __future__ import annotations

import msgspec


class Drain(msgspec.Struct, frozen=True):
    """Operator → worker: finish, accept nothing, end. → Draining. Asked again, the earlier deadline counts."""

    deadline_s: float | None  # what is not done then is begun again elsewhere; None: only tell how things are
    restart: bool = False  # the supervisor is to start it again
    cause: str = "drain"  # "drain" | "spot"


class Draining(msgspec.Struct, frozen=True):
    """How far it is."""

    draining: bool
    running: int = 0  # requests, of prefills too
    moved: int = 0  # requests that went on elsewhere
    waiting: int = 0  # of these, whose KV has not been fetched yet
    left_s: float = 0.0  # until the deadline
