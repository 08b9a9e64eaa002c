from __future__ import annotations

import pytest

from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.wire import Delta, DeltaBatch, Incarnation, RequestId, TokenLogprob, WireError, decode
from workers.deltas import PAYLOAD_LIMIT, batches

WORKER = Incarnation("w")


def delta(name: str, tokens: int, alternatives: int = 0) -> Delta:
    top = tuple((i, -float(i)) for i in range(alternatives))
    probs = [TokenLogprob(i, -0.5, top) for i in range(tokens)] if alternatives else None
    return Delta(RequestId(name), 0, list(range(tokens)), probs)


def test_what_fits_is_one_message() -> None:
    (data,) = batches(WORKER, 7, [delta("a", 1), delta("b", 2)])
    batch = decode(data, DeltaBatch)
    assert (batch.worker, batch.seq, [each.request_id for each in batch.deltas]) == (WORKER, 7, ["a", "b"])


def test_more_than_the_limit_becomes_consecutive_messages_in_order() -> None:
    deltas = [delta(str(number), 2000, 5) for number in range(30)]
    messages = list(batches(WORKER, 3, deltas))
    assert len(messages) > 1
    assert all(len(data) <= PAYLOAD_LIMIT for data in messages)
    found = [decode(data, DeltaBatch) for data in messages]
    assert [batch.seq for batch in found] == list(range(3, 3 + len(found)))
    assert [each for batch in found for each in batch.deltas] == deltas


def test_one_delta_over_the_limit_is_cut_between_tokens() -> None:
    whole = delta("a", 6000, 20)
    last = Delta(whole.request_id, 0, whole.token_ids, whole.logprobs, "stop", 5999, 16, WireError("k", 500, "m"))
    parts = [each for data in batches(WORKER, 1, [last]) for each in decode(data, DeltaBatch).deltas]
    assert len(parts) > 1
    assert [token for part in parts for token in part.token_ids] == last.token_ids
    assert [probs for part in parts for probs in part.logprobs or []] == last.logprobs
    assert [part.cached_tokens for part in parts] == [16] + [None] * (len(parts) - 1)
    assert [part.finish for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (parts[-1].stop_token, parts[-1].error) == (5999, last.error)
    assert all(part.error is None for part in parts[:-1])


def test_one_token_over_the_limit_is_an_error() -> None:
    with pytest.raises(PlaneError, match="one token"):
        list(batches(WORKER, 1, [delta("a", 1, 200_000)]))
