"""Why a request went where it went: in its reply, from the command line, and whether prefixes are seen at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from typer.testing import CliRunner, Result

from dynamo_lite.cli import app
from tests.integration.serving.deployment import Deployment, scrape, serve, until

from .conftest import MODEL, settings

COMPLETIONS = "/v1/completions"
ROUTE = "x-dynamo-lite-route"


def explain(deployment: Deployment, request_id: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["explain", request_id, str(deployment.folder / "test.yaml"), *options])


def ask(http: httpx.Client, prompt: list[int], **headers: str) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
    answer = http.post(COMPLETIONS, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_reply_says_why_it_came_from_there_if_the_request_asks(http: httpx.Client) -> None:
    prompt = [700 + i for i in range(100)]
    assert ROUTE not in ask(http, prompt).headers
    told = json.loads(ask(http, prompt, **{ROUTE: "explain"}).headers[ROUTE])
    assert told["worker"] in told["reason"]
    assert set(told["cost_ms"]) == {"decode-0", "decode-1"}
    assert told["prefill"] == ["prefill-0"]
    assert min(told["cost_ms"].values()) == told["cost_ms"][told["worker"]]


def test_a_streamed_reply_has_it_too_and_several_prompts_have_several(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": [[1, 2, 3], [4, 5, 6]], "max_tokens": 2, "stream": True}
    with http.stream("POST", COMPLETIONS, json=body, headers={ROUTE: "1"}) as answer:
        told = json.loads(answer.headers[ROUTE])
        answer.read()
    assert len(told) == 2


def test_the_command_line_explains_a_request_by_the_id_of_its_reply(http: httpx.Client, deployment: Deployment) -> None:
    prompt = [800 + i for i in range(100)]
    ask(http, prompt)
    until(lambda: "prefix" in ask(http, prompt, **{ROUTE: "1"}).headers[ROUTE][:60], "the prefix is known")
    answer = ask(http, prompt)
    shown = explain(deployment, answer.headers["x-request-id"])
    assert shown.exit_code == 0, shown.output
    assert "kv: prefix 6/7 blocks on decode-" in shown.stdout
    assert "100 tokens; 96 expected there, 96 found" in shown.stdout
    assert "prefill-0" in shown.stdout
    for column in ("queue", "prefill", "transfer", "onboard", "decode", "work", "late", "way", "held"):
        assert column in shown.stdout
    (told,) = json.loads(explain(deployment, answer.json()["id"], "--json").stdout)
    assert told["request_id"] == answer.headers["x-request-id"]
    assert told["candidates"][0]["name"] == told["worker"]


def test_a_request_that_no_frontend_remembers_is_an_error_that_says_so(deployment: Deployment) -> None:
    shown = explain(deployment, "no-such-request")
    assert shown.exit_code == 1
    assert "no frontend knows of the request 'no-such-request'" in shown.output


def test_the_start_proves_that_prefixes_are_seen(model_path: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = settings(model_path, router={"self_test": True})
    with serve(tmp_path, config) as deployment:
        name = "dynamo_lite_router_self_test"
        url = f"{deployment.url}/metrics"
        until(lambda: any(each.startswith(name) for each in scrape(url)), "the self-test's end")
        assert scrape(url)[f'{name}{{result="hit"}}'] == 1
        until(lambda: "2 blocks predicted on decode-" in deployment.log("frontend-0"), "the log")
        assert "2 found" in deployment.log("frontend-0")
