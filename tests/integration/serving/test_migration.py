"""A real engine goes on with what another one has begun: the very tokens, computed again or with the KV taken along."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.integration.serving.conftest import GROUP
from tests.integration.serving.deployment import Deployment, scrape, serve, total, until
from tests.integration.serving.requests import BLOCK, MODEL, prompt
from tests.integration.serving.test_faults import RESTART_S, at_rest, running

pytestmark = pytest.mark.vllm

WORKERS = ("both-0", "both-1")
NEW = 600  # tokens: some seconds


@pytest.fixture(scope="module")
def movable(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two workers that do both; they are killed, frozen and drained."""
    with serve(tmp_path_factory.mktemp("movable"), base | {"workers": {"both": GROUP | {"count": 2}}}) as deployment:
        yield deployment


@pytest.fixture
def both(movable: Deployment) -> Deployment:
    def known() -> bool:
        there = {record.pid for record in movable.instances().values()}
        workers = scrape(f"{movable.url}/metrics").get('dynamo_lite_router_workers{role="both"}')
        return workers == 2 and there == {movable.pid(name) for name in WORKERS}

    until(known, "two workers", RESTART_S)
    for name in WORKERS:
        until(lambda name=name: at_rest(movable, name), f"{name} is idle")  # type: ignore[misc]
    return movable


@dataclass
class Told:
    """The sequences of one streamed completion."""

    tokens: dict[int, list[str]] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    longest_gap_s: float = 0.0

    def add(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            if choice["logprobs"]:
                self.tokens.setdefault(index, []).extend(choice["logprobs"]["tokens"])
                self.scores.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                self.finish[index] = choice["finish_reason"]
        self.usage = event.get("usage") or self.usage


def stream(deployment: Deployment, begun: Callable[[], None] = lambda: None, **body: Any) -> Told:
    body = {
        "model": MODEL,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
        **body,
    }
    body["stream_options"] = {"include_usage": True}
    told, count = Told(), 0
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=RESTART_S) as answer:
        last = time.monotonic()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            told.longest_gap_s, last = max(told.longest_gap_s, time.monotonic() - last), time.monotonic()
            told.add(json.loads(line.removeprefix("data: ")))
            count += 1
            if count == 60:
                begun()
    return told


def hit(deployment: Deployment, bodies: list[dict[str, Any]], fault: Callable[[str], None]) -> list[Told]:
    """Streams, and what `fault` does to the worker that has most of them."""
    begun: list[None] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        streams = [pool.submit(stream, deployment, lambda: begun.append(None), **body) for body in bodies]
        until(lambda: len(begun) == len(bodies), "every stream has begun")
        fault(max(WORKERS, key=lambda name: running(deployment, name)))
        return [one.result() for one in streams]


def migrations(deployment: Deployment, cause: str) -> float:
    return total(scrape(f"{deployment.url}/metrics"), "dynamo_lite_migrations_total", f'cause="{cause}"')


def test_tokens_are_identical_after_a_worker_is_killed(both: Deployment) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": prompt(100 + number, 700)} for number in range(3)]
    bodies.append({"prompt": prompt(150, 701), "n": 2, "frequency_penalty": 0.4})
    expected = [stream(both, **body) for body in bodies]
    before = migrations(both, "died")
    told = hit(both, bodies, both.kill)
    assert migrations(both, "died") > before
    for mine, theirs in zip(told, expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.finish == theirs.finish == dict.fromkeys(mine.tokens, "length")
        assert mine.usage["completion_tokens"] == theirs.usage["completion_tokens"] == NEW * len(mine.tokens)
        for index, scores in mine.scores.items():
            assert scores == pytest.approx(theirs.scores[index], abs=1e-4)


def test_an_engine_that_alone_is_frozen_is_noticed_like_a_frozen_worker(both: Deployment) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": prompt(100, 710 + number)} for number in range(2)]
    expected = [stream(both, **body).tokens for body in bodies]
    with ExitStack() as stack:
        told = hit(both, bodies, lambda name: stack.enter_context(both.frozen(both.engine_pid(name))))
    assert [one.tokens for one in told] == expected
    assert max(one.longest_gap_s for one in told) < 4.0  # 2 s on a machine with nothing else to do
    for name in WORKERS:
        until(lambda name=name: at_rest(both, name), "what it had is dropped when it thaws")  # type: ignore[misc]


def test_what_a_drained_worker_has_goes_on_with_its_kv_and_not_computed_again(both: Deployment) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": prompt(1000, 720 + number)} for number in range(4)]
    expected = [stream(both, **body).tokens for body in bodies]
    names: list[str] = []

    def drain(name: str) -> None:
        names.extend(other for other in WORKERS if other != name)
        pulls.append(pulled(both, names[0]))
        both.kill(name, signal.SIGTERM)

    pulls: list[tuple[float, float]] = []
    before = migrations(both, "moved")
    told = hit(both, bodies, drain)
    assert [one.tokens for one in told] == expected
    moved = migrations(both, "moved") - before
    assert moved >= 1
    times, blocks = (now - then for now, then in zip(pulled(both, names[0]), pulls[0], strict=True))
    assert times == moved
    assert blocks >= moved * (1000 // BLOCK)
    assert max(one.longest_gap_s for one in told) < 2.0  # 0.3 s on a machine with nothing else to do


def pulled(deployment: Deployment, name: str) -> tuple[float, float]:
    """How often, and blocks."""
    samples = deployment.metrics(name)
    times = total(samples, "dynamo_lite_worker_pulls_total", 'direction="in"', 'outcome="ok"')
    size = total(samples, "nixl_transfer_bytes_total", 'direction="in"')
    return times, size / deployment.instances()[name].fingerprint.block_bytes
