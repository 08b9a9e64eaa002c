from __future__ import annotations

from dynamo_lite.keeper import Backoff


def test_delays_double_up_to_half_a_minute() -> None:
    backoff = Backoff()
    assert [backoff.next(healthy_s=1.0) for _ in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_healthy_minute_starts_over() -> None:
    backoff = Backoff()
    for _ in range(4):
        backoff.next(healthy_s=0.0)
    assert [backoff.next(healthy_s=60.0), backoff.next(healthy_s=0.0)] == [0.5, 1.0]
