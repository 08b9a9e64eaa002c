"""One request, one trace, over all processes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.serving.deployment import Deployment, until
from tests.integration.serving.requests import MODEL, prompt

pytestmark = pytest.mark.vllm

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_remotely_prefilled_request_is_one_trace_under_the_caller_s_span(apart: Deployment) -> None:
    body = {"model": MODEL, "prompt": prompt(900, 20), "max_tokens": 4, "temperature": 0}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = httpx.post(f"{apart.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["traceparent"].split("-")[1] == TRACE

    def spans() -> dict[str, dict[str, Any]]:
        return {span["name"]: span for span in apart.spans() if span["trace_id"] == TRACE}

    names = {"POST /v1/completions", "route", "decode", "prefill", "kv.transfer"}
    until(lambda: spans().keys() == names, f"the spans {names}")
    post, route, decode, prefill, transfer = (
        spans()[name] for name in ("POST /v1/completions", "route", "decode", "prefill", "kv.transfer")
    )
    assert post["parent_id"] == PARENT
    assert route["parent_id"] == decode["parent_id"] == post["span_id"]
    assert prefill["parent_id"] == decode["span_id"]
    assert transfer["parent_id"] == prefill["span_id"]
    processes = [span["process"] for span in (post, route, decode, prefill, transfer)]
    assert processes == ["frontend-0", "frontend-0", "decode-0", "prefill-0", "decode-0"]
    blocks = -(-900 // 32)
    fingerprint = apart.instances()["decode-0"].fingerprint
    assert transfer["attributes"]["blocks"] == blocks
    assert transfer["attributes"]["bytes"] == blocks * fingerprint.block_bytes
    assert transfer["attributes"]["backend"] == "nixl/UCX"
    assert 0 < transfer["attributes"]["seconds"] < 60
    assert decode["attributes"]["reason"] == "remote"
    assert post["attributes"]["gen_ai.usage.input_tokens"] == 900


def test_every_process_exports_its_metrics_under_vllm_s_names(apart: Deployment) -> None:
    decode = apart.metrics("decode-0")
    names = {name.partition("{")[0] for name in decode}
    assert {"vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_count"} <= names
    assert {"nixl_transfer_bytes_total", "dynamo_lite_worker_held_blocks"} <= names
    frontend = httpx.get(f"{apart.url}/metrics").text
    for name in ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "dynamo_lite_http_requests"):
        assert name in frontend
