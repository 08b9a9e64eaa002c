from __future__ import annotations

import json
import logging
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Status, StatusCode
from prometheus_client import Histogram

from dynamo_lite.config import TraceExport
from dynamo_lite.spans import FileExporter
from dynamo_lite.telemetry import (
    Latencies,
    metrics_server,
    parent_context,
    record_span,
    setup_logging,
    traceparent,
    tracer,
    tracing,
)

INCOMING = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans(file: Path) -> dict[str, dict[str, Any]]:
    return {span["name"]: span for span in map(json.loads, file.read_text().splitlines())}


def test_spans_of_one_request_form_one_tree_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "traces.jsonl"
    with tracing(TraceExport(file=file), "decode-0"):
        with tracer().start_as_current_span("POST", parent_context(INCOMING), attributes={"n": 1, "ids": [1, 2]}):
            across = traceparent()
            with tracer().start_as_current_span("decode") as decode:
                decode.set_status(Status(StatusCode.ERROR, "lost"))
        with tracer().start_as_current_span("route", parent_context(across)) as route:
            assert traceparent(route) == traceparent()
    found = spans(file)
    post, decode_line, route_line = found["POST"], found["decode"], found["route"]
    assert {span["trace_id"] for span in found.values()} == {INCOMING.split("-")[1]}
    assert post["parent_id"] == INCOMING.split("-")[2]
    assert decode_line["parent_id"] == route_line["parent_id"] == post["span_id"]
    assert post["attributes"] == {"n": 1, "ids": [1, 2]}
    assert post["start_ns"] <= decode_line["start_ns"] <= decode_line["end_ns"] <= post["end_ns"]
    assert (post["status"], decode_line["status"], decode_line["status_message"]) == ("UNSET", "ERROR", "lost")
    assert {span["process"] for span in found.values()} == {"decode-0"}


def test_an_error_that_leaves_a_span_is_on_it(tmp_path: Path) -> None:
    with (
        tracing(TraceExport(file=tmp_path / "traces"), "p"),
        pytest.raises(ValueError, match="bad"),
        tracer().start_as_current_span("fails"),
    ):
        raise ValueError("bad")
    span = spans(tmp_path / "traces")["fails"]
    assert span["status"] == "ERROR"
    assert span["events"][0]["attributes"]["exception.message"] == "bad"


def test_a_span_measured_elsewhere_keeps_its_times(tmp_path: Path) -> None:
    with tracing(TraceExport(file=tmp_path / "traces"), "p"):
        record_span("kv.transfer", INCOMING, 1_000, 5_000, {"bytes": 4096, "backend": "nixl"})
    span = spans(tmp_path / "traces")["kv.transfer"]
    assert (span["start_ns"], span["end_ns"]) == (1_000, 5_000)
    assert span["parent_id"] == INCOMING.split("-")[2]
    assert span["attributes"] == {"bytes": 4096, "backend": "nixl"}


def test_without_an_export_nothing_is_recorded_but_the_trace_is_handed_on() -> None:
    with tracing(TraceExport(), "p"):
        with tracer().start_as_current_span("POST", parent_context(INCOMING)) as span:
            assert not span.is_recording()
            assert traceparent() == INCOMING
        with tracer().start_as_current_span("POST", parent_context("")):
            assert traceparent() == ""
        record_span("kv.transfer", "", 1, 2, {})


def test_a_sample_of_zero_still_follows_a_caller_who_samples(tmp_path: Path) -> None:
    with tracing(TraceExport(file=tmp_path / "traces", sample=0.0), "p"):
        for name, parent in (("own", ""), ("theirs", INCOMING), ("unsampled", INCOMING[:-1] + "0")):
            with tracer().start_as_current_span(name, parent_context(parent)):
                pass
    assert set(spans(tmp_path / "traces")) == {"theirs"}


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", "ff-" + INCOMING[3:]])
def test_a_bad_parent_starts_a_new_trace(tmp_path: Path, parent: str) -> None:
    with (
        tracing(TraceExport(file=tmp_path / "traces"), "p"),
        tracer().start_as_current_span("root", parent_context(parent)),
    ):
        pass
    assert spans(tmp_path / "traces")["root"]["parent_id"] is None


def test_processes_that_share_the_file_never_mix_their_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dynamo_lite.config import TraceExport;"
        "from dynamo_lite.telemetry import record_span, tracing\n"
        "with tracing(TraceExport(file=Path(sys.argv[1])), sys.argv[2]):\n"
        "    for n in range(500): record_span(f'{sys.argv[2]}-{n}', '', 1, 2, {'filler': 'x' * 200})\n"
    )
    file = tmp_path / "traces"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), name]) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(spans(file)) == 1000


def test_a_full_disk_costs_spans_not_requests(caplog: pytest.LogCaptureFixture) -> None:
    exporter = FileExporter(Path("/dev/full"), "p")
    recorded: list[ReadableSpan] = []
    with tracing(TraceExport(file=Path("/dev/null")), "p"), tracer().start_as_current_span("x") as span:
        assert isinstance(span, ReadableSpan)
        recorded.append(span)
    assert exporter.export(recorded) is SpanExportResult.FAILURE
    exporter.shutdown()
    assert "spans are lost" in caplog.text


def test_latencies_are_exposed_as_prometheus_own_histogram() -> None:
    def exposed(histogram: Callable[[prometheus_client.CollectorRegistry], Latencies | Histogram]) -> list[str]:
        registry = prometheus_client.CollectorRegistry()
        observed = histogram(registry)
        for seconds in (0.001, 0.01, 0.0101, 0.5, 7.0):
            observed.observe(seconds)
        lines = prometheus_client.generate_latest(registry).decode().splitlines()
        return [line for line in lines if "_created" not in line]

    bounds = (0.01, 0.5, 1.0)
    assert exposed(lambda registry: Latencies("x:seconds", "Text", bounds, {"model": "m"}, registry)) == exposed(
        lambda registry: Histogram("x:seconds", "Text", ("model",), buckets=bounds, registry=registry).labels("m")
    )


async def test_metrics_are_served_on_a_kernel_chosen_port() -> None:
    counter = prometheus_client.Counter("dynamo_lite_test_requests", "Requests of this test.")
    try:
        counter.inc(3)
        async with metrics_server() as url:
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: ASYNC210  # the server has its own thread
                assert "dynamo_lite_test_requests_total 3.0" in answer.read().decode()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(url, timeout=10)  # noqa: ASYNC210
    finally:
        prometheus_client.REGISTRY.unregister(counter)


def test_log_lines_name_their_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    setup_logging("info", "decode-0")
    logging.getLogger("part").info("hello")
    logging.getLogger("part").debug("too fine")
    assert "INFO decode-0 part: hello\n" in capsys.readouterr().err
