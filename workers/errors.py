"""Errors of the transfer engine.

TransferError
├── PeerLost          the peer's process or link is gone
├── TransferTimeout   our deadline passed
├── ReceiverSilent    nobody empties the staging slots we were granted
├── Frozen            this process stood still for too long
├── StaleIncarnation  the address is another process's by now
├── Corrupt           the bytes that arrived are not those that were sent
├── NoSpace           the volume has no room for it
├── Denied            the volume or the store does not let us
├── NotFound          no such file, object or bucket
│   └── NoBucket      the store says that it is the bucket
├── Unreachable       the store does not answer
└── Mismatch          the two sides cannot exchange KV
"""

from __future__ import annotations


class TransferError(Exception):
    """A transfer failed; `cause` is a short word for metrics."""

    cause = "error"


class PeerLost(TransferError):
    """The peer's process or link is gone."""

    cause = "peer_lost"


class TransferTimeout(TransferError):
    """Our deadline passed while the peer was silent."""

    cause = "deadline"


class ReceiverSilent(TransferError):
    """The receiver has not emptied a granted slot for as long as a peer is waited for."""

    cause = "receiver_silent"


class Frozen(TransferError):
    """This process stood still for longer than a peer waits; what it was allowed to write to may be in other use."""

    cause = "frozen"


class Mismatch(TransferError):
    """The two sides cannot exchange KV; says which property differs."""

    cause = "mismatch"


class StaleIncarnation(TransferError):
    """What is at that address is not the process that was meant: it was restarted, or is another's."""

    cause = "stale"


class Corrupt(TransferError):
    """A piece's bytes are not those that were sent."""

    cause = "corrupt"


class NoSpace(TransferError):
    """The volume has no room for it, or the file would be larger than it may be."""

    cause = "no_space"


class Denied(TransferError):
    """The volume or the store does not let us: permissions, read-only, credentials."""

    cause = "denied"


class NotFound(TransferError):
    """There is no such file, object or bucket."""

    cause = "not_found"


class NoBucket(NotFound):
    """There is no such bucket."""


class Unreachable(TransferError):
    """The store does not answer."""

    cause = "unreachable"
