"""Errors and everything around the answers, at the level of HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.integration.frontend.conftest import MODEL
from tests.integration.serving.deployment import Deployment, scrape, total, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def post(http: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    return http.post(path, json={"model": MODEL, "prompt": "x", "max_tokens": 2} | fields)


def test_errors_reach_openais_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="x")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"


def test_a_prompt_over_the_context_length_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[300] * 4096)
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as sum_of_both:
        client.completions.create(model=MODEL, prompt=[300] * 4000, max_tokens=97)
    assert sum_of_both.value.code == "context_length_exceeded"
    assert sum_of_both.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as messages:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}])
    assert messages.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [2048]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"stop_token_ids": [5000]}, "stop_token_ids"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": ["x"] * 100, "n": 100}, "n"),
        ({"tools": []}, "tools"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert error_of(post(http, **fields), 400)["param"] == param


def test_a_body_that_is_no_json_is_refused(http: httpx.Client) -> None:
    assert error_of(http.post(CHAT, content=b"{nonsense"), 400)["code"] == "invalid_json"


def test_a_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    assert error_of(post(http, prompt="x" * 300_000), 413)["code"] == "body_too_large"
    assert post(http).status_code == 200  # on the same connection


def test_a_chunked_body_is_refused_as_soon_as_it_is_over_the_limit(deployment: Deployment) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536

    host, port = deployment.url.removeprefix("http://").split(":")
    from http.client import HTTPConnection

    connection = HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("POST", CHAT)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _, part in zip(range(5), endless(), strict=False):  # the body never ends
        connection.send(b"%x\r\n%b\r\n" % (len(part), part))
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_wrong_paths_and_methods_are_refused_in_json(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    refused = http.get(CHAT)
    assert error_of(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "POST"
    error_of(http.post("/v1/models"), 405)


def test_the_request_id_is_echoed_or_made(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    given = http.post(COMPLETIONS, json=body, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", post(http).headers["x-request-id"])
    assert "x-request-id" in post(http, temperature=9).headers
    unsafe = http.post(COMPLETIONS, json=body, headers={"x-request-id": "a b"})
    assert unsafe.headers["x-request-id"] != "a b"


def test_a_trace_goes_on_through_frontend_and_workers(http: httpx.Client, deployment: Deployment) -> None:
    prompt = [300 + i for i in range(200)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 3}
    answer = http.post(COMPLETIONS, json=body, headers={"traceparent": PARENT})
    _, trace_id, parent_id, _ = PARENT.split("-")
    assert answer.headers["traceparent"].split("-")[1] == trace_id

    def spans() -> dict[str, dict[str, Any]]:
        return {span["name"]: span for span in deployment.spans() if span["trace_id"] == trace_id}

    until(lambda: {"POST /v1/completions", "route", "decode", "prefill"} <= set(spans()), "spans")
    found = spans()
    root, route, decode = (found[name] for name in ("POST /v1/completions", "route", "decode"))
    assert root["parent_id"] == parent_id
    assert answer.headers["traceparent"].split("-")[2] == root["span_id"]
    assert route["parent_id"] == decode["parent_id"] == root["span_id"]
    assert route["attributes"]["dynamo.route.worker"].startswith("decode-")
    assert route["attributes"]["dynamo.route.reason"]
    attributes = root["attributes"]
    assert attributes["gen_ai.usage.input_tokens"] == 200
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.request.model"] == MODEL
    assert attributes["http.response.status_code"] == 200


def test_a_refused_request_marks_its_span(http: httpx.Client, deployment: Deployment) -> None:
    answer = post(http, temperature=9)
    trace_id = answer.headers["traceparent"].split("-")[1]
    until(lambda: any(span["trace_id"] == trace_id for span in deployment.spans()), "the span")
    (span,) = (span for span in deployment.spans() if span["trace_id"] == trace_id)
    assert span["status"] == "ERROR"
    assert span["attributes"]["http.response.status_code"] == 400


def test_requests_are_counted_and_timed(http: httpx.Client, deployment: Deployment) -> None:
    before = scrape(f"{deployment.url}/metrics")
    post(http, max_tokens=5)
    post(http, temperature=9)
    after = scrape(f"{deployment.url}/metrics")

    def gained(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert gained("dynamo_lite_http_requests_total", COMPLETIONS, '"200"') == 1
    assert gained("dynamo_lite_http_requests_total", COMPLETIONS, '"400"') == 1
    assert gained("vllm:time_to_first_token_seconds_count", MODEL) == 1
    assert gained("vllm:inter_token_latency_seconds_count", MODEL) >= 1
    assert gained("vllm:e2e_request_latency_seconds_count", MODEL) == 1
    assert gained("vllm:prompt_tokens_total", MODEL) == 1
    assert gained("vllm:generation_tokens_total", MODEL) == 5
    assert gained("dynamo_lite_routing_decisions_total") == 1
    assert total(after, "dynamo_lite_http_requests_in_flight") == 0


def test_health_says_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").status_code == 200
    ready = http.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"


def test_the_openapi_document_describes_the_bodies(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, name in ((CHAT, "ChatRequest"), (COMPLETIONS, "CompletionRequest")):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"] == f"#/components/schemas/{name}"
        assert {"200", "400", "404", "413", "503"} <= set(operation["responses"])
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "stop", "logit_bias", "stream_options"} <= set(fields)
    assert {"/v1/models", "/health/ready", "/metrics"} <= set(document["paths"])
    references = re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])


def test_streams_have_the_headers_of_event_streams(http: httpx.Client) -> None:
    with http.stream(
        "POST", COMPLETIONS, json={"model": MODEL, "prompt": "x", "max_tokens": 2, "stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
