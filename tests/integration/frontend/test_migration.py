"""A worker with streams is killed, frozen or drained: what clients get is what they would have got."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.frontend.conftest import MODEL, settings
from tests.integration.serving.deployment import Deployment, scrape, serve, total, until

STREAMS = 12
TOKENS = 150
# Slow enough that every stream is hit in the middle.
PACE = {"decode_step_ms": 15.0, "prefill_ms_per_token": 0.1}


@pytest.fixture(scope="module")
def mortals(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two decode workers, that the supervisor brings back."""
    config = settings(model_path, workers={"decode": {"count": 2}}, sim=PACE)
    with serve(tmp_path_factory.mktemp("mortals"), config) as running:
        yield running


@pytest.fixture
def pair(mortals: Deployment) -> Deployment:
    """Both of them alive, idle, and known to the frontend."""

    def known() -> bool:
        pids = {mortals.pid(f"decode-{number}") for number in range(2)}
        if not all(Path(f"/proc/{pid}").exists() for pid in pids):
            return False
        workers = scrape(f"{mortals.url}/metrics").get('dynamo_lite_router_workers{role="decode"}')
        return workers == 2 and {record.pid for record in mortals.instances().values()} == pids

    until(known, "two workers")
    return mortals


@dataclass
class Told:
    """One stream as its client got it."""

    events: list[dict[str, Any]] = field(default_factory=list)
    longest_gap_s: float = 0.0
    done: bool = False

    @property
    def what(self) -> Any:
        """All but how it was cut into events."""
        choices: dict[int, dict[str, Any]] = {}
        for event in self.events:
            for choice in event["choices"]:
                known = choices.setdefault(choice["index"], {"text": "", "finish": None, "tokens": [], "scores": []})
                known["text"] += choice["text"]
                known["finish"] = choice["finish_reason"] or known["finish"]
                if choice["logprobs"]:
                    known["tokens"] += choice["logprobs"]["tokens"]
                    known["scores"] += choice["logprobs"]["token_logprobs"]
                    known.setdefault("offsets", []).extend(choice["logprobs"]["text_offset"])
        usage = {**self.events[-1]["usage"], "prompt_tokens_details": None}  # what was cached differs
        return sorted(choices.items()), usage, self.done


def stream(deployment: Deployment, begun: Callable[[], None] = lambda: None, **body: Any) -> Told:
    body = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True, **body}
    body["stream_options"] = {"include_usage": True}
    told = Told()
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as answer:
        last = time.monotonic()
        for line in answer.iter_lines():
            if not line:
                continue
            told.longest_gap_s, last = max(told.longest_gap_s, time.monotonic() - last), time.monotonic()
            if line == "data: [DONE]":
                told.done = True
            else:
                told.events.append(json.loads(line.removeprefix("data: ")))
                assert "error" not in told.events[-1], told.events[-1]
            if len(told.events) == 5:
                begun()
    return told


def running(deployment: Deployment, name: str) -> float:
    samples = scrape(deployment.instances()[name].metrics_url)
    return total(samples, "vllm:num_requests_running")


def migrations(deployment: Deployment, cause: str) -> float:
    return total(scrape(f"{deployment.url}/metrics"), "dynamo_lite_migrations_total", f'cause="{cause}"')


def together(deployment: Deployment, bodies: list[dict[str, Any]], fault: Callable[[], None]) -> list[Told]:
    """All of them at once; the fault comes when each has some tokens."""
    begun: list[None] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        streams = [pool.submit(stream, deployment, lambda: begun.append(None), **body) for body in bodies]
        until(lambda: len(begun) == len(bodies), "every stream has begun")
        fault()
        return [one.result() for one in streams]


@pytest.mark.parametrize(("number", "cause", "gap_s"), [(signal.SIGKILL, "died", 1.0), (signal.SIGSTOP, "silent", 2.0)])
def test_every_stream_is_complete_and_the_same_when_a_worker_is_hit(
    number: signal.Signals, cause: str, gap_s: float, pair: Deployment
) -> None:
    # Prompts of its own for each fault, or all would go where the last ones went.
    bodies: list[dict[str, Any]] = [{"prompt": [int(number) * STREAMS + one] * 64} for one in range(STREAMS)]
    expected = [stream(pair, **body).what for body in bodies[:2]]
    before, starts = migrations(pair, cause), int(pair.process_of("decode-0")["starts"])
    with ExitStack() as stack:

        def fault() -> None:
            assert running(pair, "decode-0")
            if number is signal.SIGSTOP:
                stack.enter_context(pair.frozen(pair.pid("decode-0")))
            else:
                pair.kill("decode-0", number)

        told = together(pair, bodies, fault)
        assert [one.what for one in told[:2]] == expected
        assert all(one.done for one in told)
        assert {one.what[1]["completion_tokens"] for one in told} == {TOKENS}
        assert max(one.longest_gap_s for one in told) < gap_s
    assert migrations(pair, cause) > before
    if number is signal.SIGSTOP:
        until(lambda: running(pair, "decode-0") == 0, "what a thawed worker still had is cancelled")
    else:
        until(lambda: pair.restarted("decode-0", starts + 1), "the supervisor starts it again")


CASES: dict[str, dict[str, Any]] = {
    "several sequences with a seed": {"n": 3, "temperature": 1.0, "seed": 7},
    "log-probabilities": {"logprobs": 2},
    "a sampled sequence with log-probabilities": {"logprobs": 1, "temperature": 0.8, "seed": 3, "top_p": 0.9},
    "several prompts": {"prompt": [[31] * 40, [32] * 50, [33] * 60]},
    "at least so many tokens": {"min_tokens": 100, "ignore_eos": False},
}


def test_whatever_a_request_asks_for_its_stream_is_the_same_when_it_goes_on_elsewhere(pair: Deployment) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": [21 + number] * 64} | more for number, more in enumerate(CASES.values())]
    # Where a stop string begins before the cut, or after: each stream is cut somewhere else.
    for number in range(6):
        prompt = [40 + number] * 32
        text = stream(pair, prompt=prompt).what[0][0][1]["text"]
        bodies.append({"prompt": prompt, "stop": [text[120 + 8 * number : 132 + 8 * number]]})
    bodies *= 2  # one of each pair is at the worker that dies, or nearly
    expected = [stream(pair, **body).what for body in bodies[: len(bodies) // 2]]
    assert {choices[0][1]["finish"] for choices, _, _ in expected} == {"stop", "length"}
    before = migrations(pair, "died")
    told = together(pair, bodies, lambda: pair.kill("decode-0"))
    assert [one.what for one in told] == expected * 2
    assert migrations(pair, "died") - before >= len(CASES)


def test_a_stream_whose_only_workers_die_waits_for_one_that_comes_back(pair: Deployment) -> None:
    expected = stream(pair, prompt=[50] * 64).what

    def fault() -> None:
        for name in ("decode-0", "decode-1"):
            pair.kill(name)

    (told,) = together(pair, [{"prompt": [50] * 64}], fault)
    assert told.what == expected


def test_sigterm_moves_what_a_worker_generates_with_its_kv(pair: Deployment) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": [60 + one] * 256} for one in range(6)]
    expected = [stream(pair, **body).what for body in bodies]
    before, starts = migrations(pair, "moved"), int(pair.process_of("decode-0")["starts"])
    pulled = total(pair.metrics("decode-1"), "dynamo_lite_worker_pulls_total", 'direction="in"', 'outcome="ok"')
    told = together(pair, bodies, lambda: pair.kill("decode-0", signal.SIGTERM))
    assert [one.what for one in told] == expected
    moved = migrations(pair, "moved") - before
    assert moved
    samples = pair.metrics("decode-1")
    assert total(samples, "dynamo_lite_worker_pulls_total", 'direction="in"', 'outcome="ok"') - pulled == moved
    until(lambda: pair.restarted("decode-0", starts + 1), "the supervisor starts it again")
