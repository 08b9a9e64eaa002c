"""Processes killed under load: what a client sees, and that nothing stays held. Each test starts and wrecks its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.serving.conftest import GROUP
from tests.integration.serving.deployment import Deployment, serve, total, until
from tests.integration.serving.requests import MODEL, NEW_TOKENS, prompt, tokens

pytestmark = pytest.mark.vllm

RESTART_S = 120.0
FROZEN_S = 14.0  # longer would end a frozen process: the supervisor after 15 s, the worker its engine after 20 s


@pytest.fixture(scope="module")
def fragile(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Not shared with other modules: its processes are killed."""
    workers = {"prefill": GROUP, "decode": GROUP}
    with serve(tmp_path_factory.mktemp("fragile"), base | {"workers": workers}) as deployment:
        yield deployment


def held(deployment: Deployment, name: str) -> float:
    return total(deployment.metrics(name), "dynamo_lite_worker_held_blocks")


def running(deployment: Deployment, name: str) -> float:
    return total(deployment.metrics(name), "vllm:num_requests_running")


def at_rest(deployment: Deployment, name: str) -> bool:
    samples = deployment.metrics(name)
    busy = total(samples, "vllm:num_requests_running") + total(samples, "vllm:num_requests_waiting")
    return not busy and not total(samples, "dynamo_lite_worker_held_blocks")


def test_a_client_that_leaves_frees_what_its_request_held_on_both_workers(fragile: Deployment) -> None:
    body = {"model": MODEL, "prompt": prompt(3000, 30), "max_tokens": 1000, "stream": True}
    body |= {"ignore_eos": True}
    with httpx.stream("POST", f"{fragile.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        until(lambda: running(fragile, "decode-0") == 1, "the sequence runs")
    until(lambda: at_rest(fragile, "decode-0"), "the decode worker freed it", 10)
    until(lambda: at_rest(fragile, "prefill-0"), "the prefill worker freed it", 10)


def test_a_client_that_leaves_during_the_prefill_frees_it_too(fragile: Deployment) -> None:
    bodies = [{"model": MODEL, "prompt": prompt(3900, 40 + number), "max_tokens": 4} for number in range(8)]
    with httpx.Client(timeout=60) as api, ThreadPoolExecutor(8) as pool:

        def post(body: dict[str, Any]) -> str:
            try:
                return str(api.post(f"{fragile.url}/v1/completions", json=body, timeout=0.5).status_code)
            except httpx.ReadTimeout:
                return "left"

        assert "left" in set(pool.map(post, bodies)), "eight long prompts take longer than half a second"
    until(lambda: at_rest(fragile, "decode-0"), "the decode worker freed them", 20)
    until(lambda: at_rest(fragile, "prefill-0"), "the prefill worker freed them", 20)


@pytest.mark.parametrize(("whole", "cause"), [(False, "engine_silent"), (True, "silent")])
def test_a_prefill_worker_that_is_frozen_costs_no_request_and_serves_again_when_it_thaws(
    whole: bool, cause: str, fragile: Deployment, together: Deployment
) -> None:
    def outcomes(outcome: str) -> float:
        samples = fragile.metrics("decode-0")
        return total(samples, "dynamo_lite_worker_remote_prefills_total", f'outcome="{outcome}"')

    starts, failed = fragile.process_of("prefill-0")["starts"], outcomes(cause)
    core = fragile.engine_pid("prefill-0")
    prompts = [prompt(3500, 80 + 8 * whole + number) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(tokens, fragile, one, temperature=0) for one in prompts]
        until(lambda: running(fragile, "prefill-0") > 0, "prefills run")
        with fragile.frozen(core, *([fragile.pid("prefill-0")] if whole else [])):
            got = [answer.result(FROZEN_S) for answer in answers]
    assert outcomes(cause) > failed, "the freeze hit prefills under way"
    assert got == [tokens(together, one, temperature=0) for one in prompts]
    until(lambda: at_rest(fragile, "decode-0"), "nothing stays held")
    until(lambda: at_rest(fragile, "prefill-0"), "nothing stays held on the other side")
    done = outcomes("ok")
    tokens(fragile, prompt(3500, 79 - whole), temperature=0)
    until(lambda: outcomes("ok") == done + 1, "its reply, which may come after the tokens, says that it served")
    assert fragile.process_of("prefill-0")["starts"] == starts


def test_killing_the_prefill_worker_during_prefills_costs_no_request(fragile: Deployment, together: Deployment) -> None:
    prompts = [prompt(3500, 50 + number) for number in range(6)]
    starts = fragile.process_of("prefill-0")["starts"]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(tokens, fragile, one, temperature=0) for one in prompts]
        until(lambda: running(fragile, "prefill-0") > 0, "prefills run")
        fragile.kill("prefill-0")
        got = [answer.result() for answer in answers]
    failed = total(fragile.metrics("decode-0"), "dynamo_lite_worker_remote_prefills_total", 'outcome="gone"')
    assert failed > 0, "the kill hit prefills under way"
    assert got == [tokens(together, one, temperature=0) for one in prompts]
    until(lambda: at_rest(fragile, "decode-0"), "nothing stays held")
    until(lambda: fragile.restarted("prefill-0", starts + 1), "the prefill worker is back", RESTART_S)


def test_streams_of_a_frozen_engine_go_on_when_it_thaws_where_there_is_no_other(fragile: Deployment) -> None:
    starts = fragile.process_of("decode-0")["starts"]
    body = {"model": MODEL, "prompt": prompt(500, 90), "max_tokens": 600, "stream": True, "ignore_eos": True}
    body |= {"temperature": 0}
    expected = text_of(fragile, body)
    with httpx.stream("POST", f"{fragile.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        events = [next(lines)]
        with fragile.frozen(fragile.engine_pid("decode-0")):
            refused = {"prompt": prompt(500, 92), "max_tokens": 2, "stream": False}
            again = httpx.post(f"{fragile.url}/v1/completions", json=body | refused, timeout=FROZEN_S)
        events += [line for line in lines if line]
    assert again.status_code == 503
    assert "retry-after" in again.headers
    assert text(events) == expected
    until(lambda: httpx.get(f"{fragile.url}/health/ready").status_code == 200, "the frontend finds it again")
    assert len(tokens(fragile, prompt(500, 91), temperature=0)) == NEW_TOKENS
    until(lambda: at_rest(fragile, "decode-0"), "nothing stays held")
    until(lambda: at_rest(fragile, "prefill-0"), "nothing stays held on the other side")
    assert fragile.process_of("decode-0")["starts"] == starts


def test_streams_of_a_killed_decode_worker_go_on_when_it_is_back_where_there_is_no_other(fragile: Deployment) -> None:
    starts = fragile.process_of("decode-0")["starts"]
    body = {"model": MODEL, "prompt": prompt(500, 70), "max_tokens": 600, "stream": True, "ignore_eos": True}
    body |= {"temperature": 0}
    expected = text_of(fragile, body)
    with httpx.stream("POST", f"{fragile.url}/v1/completions", json=body, timeout=RESTART_S) as answer:
        lines = answer.iter_lines()
        events = [next(lines)]
        fragile.kill("decode-0")
        until(lambda: refused(fragile), "new requests are refused meanwhile")
        events += [line for line in lines if line]
    assert text(events) == expected
    assert fragile.restarted("decode-0", starts + 1)
    until(lambda: at_rest(fragile, "prefill-0"), "nothing stays held for the dead worker")
    until(lambda: at_rest(fragile, "decode-0"), "nothing stays held")


def refused(deployment: Deployment) -> bool:
    body = {"model": MODEL, "prompt": prompt(100, 71), "max_tokens": 2}
    answer = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=60)
    return answer.status_code == 503 and "retry-after" in answer.headers


def text_of(deployment: Deployment, body: dict[str, Any]) -> str:
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as answer:
        return text([line for line in answer.iter_lines() if line])


def text(events: list[str]) -> str:
    assert events[-1] == "data: [DONE]"
    told = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    return "".join(event["choices"][0]["text"] for event in told)
