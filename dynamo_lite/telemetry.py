"""Traces (OpenTelemetry), metrics (Prometheus) and logging of one process.

A span costs about 30 µs, so there is one per request and stage, never one per token. Without an export spans
are not recorded, but an incoming trace context is still handed on.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from itertools import accumulate
from threading import Thread
from wsgiref.simple_server import WSGIServer

import prometheus_client
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dynamo_lite.config import TraceExport

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

log = logging.getLogger(__name__)
_propagator = TraceContextTextMapPropagator()
_not_recording = NoOpTracer()
_no_span = nullcontext(trace.INVALID_SPAN)
_tracer: Tracer = _not_recording


@contextmanager
def tracing(export: TraceExport, process: str) -> Iterator[None]:
    """Record and export the spans of this process while the body runs; flushes at its end."""
    global _tracer  # noqa: PLW0603  # one per process, like logging
    if export.file is None and export.otlp is None:
        yield
        return
    from dynamo_lite.spans import provider_of  # noqa: PLC0415  # the SDK is 0.1 s of a start that does not need it

    provider = provider_of(export, process)
    _tracer = provider.get_tracer("dynamo-lite")
    try:
        yield
    finally:
        _tracer = _not_recording
        provider.shutdown()


def tracer() -> Tracer:
    """The tracer of this process; without an export its spans are free and record nothing."""
    return _tracer


def spanning(
    name: str,
    parent: str | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    record_exception: bool = True,
) -> AbstractContextManager[Span]:
    """The current span while the body runs: a child of the current one, or of the `traceparent` given as `parent`.

    Where nothing is recorded and nobody has sent a trace context there is nothing to be current, and it costs nothing.
    """
    if _tracer is _not_recording and not parent:
        return _no_span
    context = None if parent is None else parent_context(parent)
    return _tracer.start_as_current_span(name, context, kind, attributes, record_exception=record_exception)


def traceparent(span: Span | None = None) -> str:
    """W3C `traceparent` of `span`, or of the current span; empty when there is no trace."""
    found = trace.get_current_span() if span is None else span
    if found is trace.INVALID_SPAN:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(found))
    return carrier.get("traceparent", "")


def parent_context(parent: str) -> Context:
    """The context for `start_span(context=...)` of a child of `parent`; a new trace when that is empty or bad."""
    return _propagator.extract({"traceparent": parent}, Context()) if parent else Context()


def record_span(
    name: str, parent: str, started_ns: int, ended_ns: int, attributes: Mapping[str, AttributeValue]
) -> None:
    """A span that was measured elsewhere, with its times (ns since the epoch)."""
    span = _tracer.start_span(name, parent_context(parent), attributes=attributes, start_time=started_ns)
    span.end(ended_ns)


class Latencies(Collector):
    """A histogram of seconds for what happens at every token: a fifth of the cost of prometheus_client's.

    Only one thread observes; a scrape in another one may see the last value in part.
    """

    def __init__(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        labels: Mapping[str, str] | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name, self._text, self._labels = name, text, dict(labels or {})
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._sum += seconds
        self._counts[bisect_left(self._bounds, seconds)] += 1

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        uppers = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(uppers, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


@asynccontextmanager
async def metrics_server(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve this process's metrics; yields their URL. In a thread: a scrape may take 35 ms, tokens do not wait."""
    server, thread = prometheus_client.start_http_server(port, host)
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        await asyncio.to_thread(_stop_server, server, thread)


def _stop_server(server: WSGIServer, thread: Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()


def setup_logging(level: str, process: str) -> None:
    """Log to stderr, which the supervisor directs to the process's log file."""
    form = f"%(asctime)s.%(msecs)03d %(levelname)s {process} %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%Y-%m-%dT%H:%M:%S", force=True)
