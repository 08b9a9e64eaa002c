"""Messages of routers: what they have booked, for each other, and why they decided as they did, for operators."""

from __future__ import annotations

import msgspec

from dynamo_lite.plane.wire import FrontendId, Incarnation


class Booked(msgspec.Struct, frozen=True, array_like=True):
    """One request that a router has placed. Its prompt is computed by `computes`, its answer by `decode`."""

    key: int  # of the router's, never used again
    decode: Incarnation
    computes: Incarnation
    tokens: int  # to be computed; 0: they are
    blocks: int  # of the decode worker's that it takes


class Bookings(msgspec.Struct, frozen=True):
    """What has changed since the router's last message, or (`whole`) all that is open. `seq` rises by one a message."""

    router: FrontendId
    seq: int
    booked: tuple[Booked, ...] = ()
    computed: tuple[int, ...] = ()  # keys of requests with a first token
    ended: tuple[int, ...] = ()
    whole: bool = False


class RouteCandidate(msgspec.Struct, frozen=True):
    """A decode worker that a request could have gone to."""

    name: str
    cost_ms: float
    parts_ms: dict[str, float]
    way: str  # how the prompt would get there: "here", "pull", or the name of a prefill worker
    held_tokens: int  # of the prompt
    queued_tokens: int  # of others, to be computed before it
    sequences: int  # of others


class RouteDecision(msgspec.Struct, frozen=True):
    """One placement. A request that was placed again, or has several prompts, has several."""

    request_id: str  # the client's
    flight: str  # as the worker knows it
    frontend: str
    age_s: float
    mode: str
    worker: str
    reason: str
    prompt_tokens: int
    predicted_tokens: int  # of the prompt, on that worker
    found_tokens: int | None  # likewise, as it said itself; None: it has said nothing yet
    prefill: tuple[str, ...]
    holder: str
    candidates: tuple[RouteCandidate, ...]


class Explain(msgspec.Struct, frozen=True):
    """Operator → all frontends. Who knows the request answers."""

    request_id: str


class Explained(msgspec.Struct, frozen=True):
    """In the order in which they were made."""

    decisions: tuple[RouteDecision, ...]
