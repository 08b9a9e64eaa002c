"""A client that goes away, at every stage: its request is cancelled within 100 ms, and its blocks are freed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.wire import Cancel, GenerateRequest, Incarnation, LoadReport, Subjects, decode
from tests.integration.frontend.conftest import MODEL
from tests.integration.serving.deployment import Deployment, scrape, total

DEADLINE_S = 20.0
PROMPT_NUMBERS = iter(range(300, 2000))


@dataclass
class Wiretap:
    """What frontends and workers say to each other."""

    requests: list[GenerateRequest] = field(default_factory=list)
    cancels: dict[str, float] = field(default_factory=dict)  # when, by request id
    loads: dict[Incarnation, LoadReport] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def generate(self, message: Message) -> None:
        self.requests.append(decode(message.data, GenerateRequest))
        self.news.set()

    def cancel(self, message: Message) -> None:
        self.cancels[decode(message.data, Cancel).request_id] = time.monotonic()
        self.news.set()

    def load(self, message: Message) -> None:
        report = decode(message.data, LoadReport)
        self.loads[report.worker] = report
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def idle(self) -> None:
        """Until every worker has reported, from now on, that nothing runs and no block is in use."""
        self.loads.clear()

        def idle() -> bool:
            reports = self.loads.values()
            busy = sum(r.running + r.waiting + r.kv_used_blocks + r.held_blocks for r in reports)
            return len(reports) == 3 and busy == 0

        await self.until(idle)


@pytest.fixture
async def wiretap(deployment: Deployment) -> AsyncIterator[Wiretap]:
    subjects, tap = Subjects(deployment.namespace), Wiretap()
    every = Incarnation("*")
    async with Bus.connect(NatsAddress.model_validate(deployment.run["nats"]), "wiretap") as bus:
        await bus.subscribe(subjects.generate(every), tap.generate)
        await bus.subscribe(subjects.cancel(every), tap.cancel)
        await bus.subscribe(subjects.load(), tap.load)
        await tap.idle()
        yield tap


def body(**fields: Any) -> dict[str, Any]:
    start = next(PROMPT_NUMBERS)  # never a prompt that is in a cache
    return {"model": MODEL, "prompt": [start] * 2000, "max_tokens": 2000} | fields


async def cancelled_in_time(tap: Wiretap, left_at: float) -> None:
    (request,) = tap.requests
    await tap.until(lambda: request.request_id in tap.cancels)
    assert tap.cancels[request.request_id] - left_at < 0.1
    await tap.idle()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_token_frees_everything(
    deployment: Deployment, wiretap: Wiretap, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        asked = asyncio.ensure_future(http.post("/v1/completions", json=body(stream=stream)))
        await wiretap.until(lambda: bool(wiretap.requests))
        asked.cancel()
        await asyncio.wait((asked,))
    await cancelled_in_time(wiretap, time.monotonic())


async def test_a_client_that_leaves_a_stream_frees_everything(deployment: Deployment, wiretap: Wiretap) -> None:
    before = scrape(f"{deployment.url}/metrics")
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        async with http.stream("POST", "/v1/completions", json=body(prompt="hi", stream=True)) as answer:
            async for _ in answer.aiter_lines():
                break
        left_at = time.monotonic()
    await cancelled_in_time(wiretap, left_at)
    after = scrape(f"{deployment.url}/metrics")
    name = "dynamo_lite_cancelled_requests_total"
    assert total(after, name) - total(before, name) == 1


async def test_a_client_that_leaves_a_whole_answer_frees_everything(deployment: Deployment, wiretap: Wiretap) -> None:
    generated = "vllm:generation_tokens_total"
    before = total(scrape(f"{deployment.url}/metrics"), generated)
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        asked = asyncio.ensure_future(http.post("/v1/completions", json=body(prompt="hi")))
        await wiretap.until(lambda: any(report.running for report in wiretap.loads.values()))
        asked.cancel()
        await asyncio.wait((asked,))
    await cancelled_in_time(wiretap, time.monotonic())
    assert total(scrape(f"{deployment.url}/metrics"), generated) - before < 2000


async def test_every_prompt_of_a_request_is_cancelled(deployment: Deployment, wiretap: Wiretap) -> None:
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        asked = asyncio.ensure_future(http.post("/v1/completions", json=body(prompt=["a", "b", "c"], n=2)))
        await wiretap.until(lambda: len(wiretap.requests) == 3)
        asked.cancel()
        await asyncio.wait((asked,))
    await wiretap.until(lambda: {request.request_id for request in wiretap.requests} <= set(wiretap.cancels))
    await wiretap.idle()


async def test_a_client_that_leaves_before_its_body_is_complete_disturbs_nobody(deployment: Deployment) -> None:
    host, _, port = deployment.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        answer = await http.post("/v1/completions", json=body(prompt="hi", max_tokens=1))
    assert answer.status_code == 200


async def test_a_finished_request_is_not_cancelled(deployment: Deployment, wiretap: Wiretap) -> None:
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as http:
        await http.post("/v1/completions", json=body(prompt="hi", max_tokens=3))
        async with http.stream("POST", "/v1/completions", json=body(prompt="hi", max_tokens=3, stream=True)) as answer:
            await answer.aread()
    await wiretap.idle()
    assert len(wiretap.requests) == 2
    assert not wiretap.cancels
