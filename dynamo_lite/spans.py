"""Where recorded spans go. Imported only by a process that records some."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from dynamo_lite.config import TraceExport

EXPORT_EVERY_MS = 500

log = logging.getLogger(__name__)


def provider_of(export: TraceExport, process: str) -> TracerProvider:
    """Records the spans of a process and exports them; to be shut down."""
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(export.sample)),
        resource=Resource.create({"service.name": "dynamo-lite", "service.instance.id": process}),
        shutdown_on_exit=False,
    )
    exporter = FileExporter(export.file, process) if export.file is not None else _otlp(export.otlp or "")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
    return provider


class FileExporter(SpanExporter):
    """One JSON object a line. Several processes may share the file: each batch is one O_APPEND write."""

    def __init__(self, path: Path, process: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._path, self._process = path, process

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        batch = b"".join(_json_line(span, self._process) for span in spans)
        try:
            written = os.write(self._fd, batch)
        except OSError as error:
            log.warning("spans are lost: cannot write %s: %s", self._path, error)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS if written == len(batch) else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True  # nothing is held back


def _json_line(span: ReadableSpan, process: str) -> bytes:
    context = span.get_span_context()
    if context is None:
        raise ValueError(f"span {span.name} has no context")
    fields = {
        "name": span.name,
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
        "parent_id": None if span.parent is None else trace.format_span_id(span.parent.span_id),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
        "events": [{"name": event.name, "attributes": dict(event.attributes or {})} for event in span.events],
        "status": span.status.status_code.name,
        "status_message": span.status.description,
        "process": process,
    }
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


def _otlp(endpoint: str) -> SpanExporter:
    """http://host:4318 speaks OTLP over HTTP, grpc://host:4317 (or grpcs://) over gRPC."""
    # Imported here: these two clients take 0.2 s and 20 MB that most processes can do without.
    if endpoint.startswith("grpc"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as GrpcExporter,
        )

        parts = urlsplit(endpoint)
        return GrpcExporter(endpoint=parts.netloc, insecure=parts.scheme == "grpc", timeout=5)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter as HttpExporter,
    )

    path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
    return HttpExporter(endpoint=endpoint.rstrip("/") + path, timeout=5)
