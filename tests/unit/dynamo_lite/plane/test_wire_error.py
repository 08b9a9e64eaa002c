from __future__ import annotations

import pytest

from dynamo_lite.errors import (
    ConfigError,
    DeadlineExceeded,
    DynamoError,
    ModelNotFound,
    NoInstance,
    NoResponders,
    PrefillFailed,
    ProtocolMismatch,
    RequestError,
    StartError,
    WorkerLost,
)
from dynamo_lite.plane.wire import WireError, decode, encode


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("bad", file="a.yaml", line=3, column=1, hint="did you mean b"),
        StartError("etcd", "exited with 1", "/log"),
        RequestError("too hot", "temperature"),
        ModelNotFound("a", "b"),
        NoInstance("decode", 2),
        NoResponders("dl.ns.w.1.ping"),
        DeadlineExceeded("ping", 0.5),
        ProtocolMismatch("protocol 2"),
        WorkerLost("decode-0", "SIGKILL"),
        PrefillFailed("deadline", "64 blocks"),
    ],
)
def test_an_error_arrives_as_what_it_was(error: DynamoError) -> None:
    arrived = decode(encode(WireError.of(error)), WireError).exception()
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert (arrived.status, arrived.kind) == (error.status, error.kind)
    plain = {name: value for name, value in vars(error).items() if isinstance(value, str | int | float | None)}
    assert {name: getattr(arrived, name) for name in plain} == plain


def test_a_bug_arrives_as_an_internal_error_that_names_it() -> None:
    wire = WireError.of(ZeroDivisionError("division by zero"))
    assert (wire.kind, wire.status) == ("internal_error", 500)
    assert str(wire.exception()) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", ["FromTheFuture", "annotations", "Sequence", "__doc__", ""])
def test_a_class_unknown_here_arrives_as_a_plain_error(name: str) -> None:
    arrived = WireError("new_kind", 418, "a teapot", name).exception()
    assert type(arrived) is DynamoError
    assert str(arrived) == "a teapot"
