"""Workers that die, freeze or are not there; and the end of the frontend itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.frontend.conftest import MODEL, settings
from tests.integration.serving.deployment import Deployment, scrape, serve, until

BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 1000, "stream": True}


@pytest.fixture(scope="module")
def mortals(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two decode workers that tests may kill; the supervisor brings them back."""
    with serve(tmp_path_factory.mktemp("mortals"), settings(model_path, workers={"decode": {"count": 2}})) as running:
        yield running


@pytest.fixture(scope="module")
def solo(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One worker, and little patience."""
    alone = settings(model_path, workers={"both": {"count": 1}}, frontend={"request_timeout_s": 2.0})
    with serve(tmp_path_factory.mktemp("solo"), alone) as running:
        yield running


@pytest.fixture
def pair(mortals: Deployment) -> Deployment:
    """Both of them alive, and known to the frontend."""

    def known() -> bool:
        pids = {mortals.pid("decode-0"), mortals.pid("decode-1")}
        if not all(Path(f"/proc/{pid}").exists() for pid in pids):
            return False
        workers = scrape(f"{mortals.url}/metrics")['dynamo_lite_router_workers{role="decode"}']
        return workers == 2 and {record.pid for record in mortals.instances().values()} == pids

    until(known, "two workers")
    return mortals


@pytest.fixture
def http(pair: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair.url, timeout=60) as connected:
        yield connected


@contextmanager
def frozen(pair: Deployment, name: str) -> Iterator[None]:
    pid = pair.pid(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_request_to_a_frozen_worker_is_answered_by_another(pair: Deployment, http: httpx.Client) -> None:
    whole = BODY | {"max_tokens": 4, "stream": False}
    with frozen(pair, "decode-0"):
        for _ in range(3):  # whichever they are placed on
            started = time.monotonic()
            assert http.post("/v1/completions", json=whole).status_code == 200
            assert time.monotonic() - started < 5


def test_a_request_that_takes_too_long_ends(solo: Deployment) -> None:
    with httpx.Client(base_url=solo.url, timeout=60) as http:
        whole = http.post("/v1/completions", json=BODY | {"max_tokens": 4000, "stream": False})
        assert whole.status_code == 504
        assert whole.json()["error"]["type"] == "timeout"
        with http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 4000}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert '"timeout"' in events[-1]


def test_a_stream_survives_sigterm_and_the_frontend_comes_back(solo: Deployment) -> None:
    with httpx.stream("POST", f"{solo.url}/v1/completions", json=BODY | {"max_tokens": 300}) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(solo.pid("frontend-0"), signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    until(lambda: solo.restarted("frontend-0", 2), "the frontend's restart")


def test_without_workers_a_request_is_told_to_come_back(solo: Deployment) -> None:
    with httpx.Client(base_url=solo.url, timeout=60) as http:
        solo.kill("both-0")
        answer = http.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "service_unavailable"
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        until(lambda: http.get("/health/ready").status_code == 200, "readiness again")


def test_many_streams_at_once_are_all_complete(deployment: Deployment) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60)
        stream = client.completions.create(
            model=MODEL, prompt=f"number {number % 8}", max_tokens=50, temperature=0, stream=True
        )
        texts[number] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 32
    for number, text in texts.items():
        assert text
        assert text == texts[number % 8]
