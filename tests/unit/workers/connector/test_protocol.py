from __future__ import annotations

from workers.connector.protocol import IN_FLIGHT, PushEnded, failure


def ends(*causes: str) -> list[PushEnded]:
    return [PushEnded("r", 1, rank, cause) for rank, cause in enumerate(causes)]


def test_a_push_fails_with_the_cause_of_the_rank_that_failed() -> None:
    assert failure(ends("", "peer_lost", "cancelled")) == "peer_lost"
    assert failure(ends("", "")) == ""


def test_a_rank_that_still_writes_is_never_hidden_by_why_another_failed() -> None:
    assert failure(ends("corrupt", IN_FLIGHT)) == IN_FLIGHT
