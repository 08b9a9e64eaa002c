"""Spans sent to an OTLP collector, over HTTP and over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from dynamo_lite.config import TraceExport
from dynamo_lite.telemetry import parent_context, traceparent, tracer, tracing

Received = list[tuple[str, str, int]]  # process, span name, trace id


@contextmanager
def http_collector(received: Received) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                raise AssertionError("not expected to be compressed")
            note(received, ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def grpc_collector(received: Received) -> Iterator[str]:
    class Service(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:  # noqa: N802
            note(received, request)
            return ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"grpc://127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.mark.parametrize("collector", [http_collector, grpc_collector])
def test_every_span_reaches_the_collector_before_the_process_ends(collector: Any) -> None:
    received: Received = []
    with collector(received) as endpoint, tracing(TraceExport(otlp=endpoint), "decode-0"):
        with tracer().start_as_current_span("POST") as post:
            parent = traceparent()
        for number in range(20):
            with tracer().start_as_current_span(f"decode {number}", parent_context(parent)):
                pass
    trace_id = post.get_span_context().trace_id
    expected = {("decode-0", name, trace_id) for name in ("POST", *(f"decode {number}" for number in range(20)))}
    assert set(received) == expected


def test_a_collector_that_is_down_costs_spans_not_the_process(caplog: pytest.LogCaptureFixture) -> None:
    with http_collector([]) as endpoint:
        pass
    with tracing(TraceExport(otlp=endpoint), "p"), tracer().start_as_current_span("lost"):
        pass
    assert "export" in caplog.text.lower()


def note(received: Received, request: ExportTraceServiceRequest) -> None:
    for resource in request.resource_spans:
        names = {each.key: each.value.string_value for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                received.append((names["service.instance.id"], span.name, int.from_bytes(span.trace_id)))
