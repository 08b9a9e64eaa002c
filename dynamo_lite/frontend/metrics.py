"""Prometheus metrics of a frontend; vLLM's own names where it has them.

Label sets are small and their children cached here: looking one up costs more than counting.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from dynamo_lite.telemetry import Latencies

_MODEL = ("model_name",)
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_GAP = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)

_REQUESTS = Counter("dynamo_lite_http_requests", "HTTP requests by endpoint and status", ("endpoint", "status"))
_CANCELLED = Counter("dynamo_lite_cancelled_requests", "Requests whose client went away before the end", ("endpoint",))
_ROUTED = Counter("dynamo_lite_routing_decisions", "Placements by the kind of reason", ("reason",))
_REROUTED = Counter("dynamo_lite_rerouted_requests", "Placements repeated after a failure", ("cause",))
_MIGRATIONS = Counter("dynamo_lite_migrations", "Prompts with tokens that went on at another worker", ("cause",))
_GAPS = Histogram("dynamo_lite_migration_gap_seconds", "Without a token, of such a prompt", ("cause",), buckets=_GAP)
IN_FLIGHT = Gauge("dynamo_lite_http_requests_in_flight", "HTTP requests being answered")
CACHED_TOKENS = Counter("dynamo_lite_cached_prompt_tokens", "Prompt tokens the decode worker had KV of")

_TTFT = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _MODEL, buckets=_FAST)
_WHOLE = Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _MODEL, buckets=_SLOW)
_PROMPT = Counter("vllm:prompt_tokens", "Prompt tokens", _MODEL)
_GENERATION = Counter("vllm:generation_tokens", "Generated tokens", _MODEL)


class ModelMetrics:
    """The series of one served model."""

    def __init__(self, model: str) -> None:
        self.first_token = _TTFT.labels(model)
        self.inter_token = Latencies(
            "vllm:inter_token_latency_seconds", "Between tokens of one choice", _FAST, {"model_name": model}
        )
        self.whole = _WHOLE.labels(model)
        self.prompt_tokens = _PROMPT.labels(model)
        self.generation_tokens = _GENERATION.labels(model)


@cache
def requests(endpoint: str, status: int) -> Counter:
    return _REQUESTS.labels(endpoint, str(status))


@cache
def cancelled(endpoint: str) -> Counter:
    return _CANCELLED.labels(endpoint)


@cache
def routed(reason: str) -> Counter:
    return _ROUTED.labels(reason)


@cache
def rerouted(cause: str) -> Counter:
    return _REROUTED.labels(cause)


@cache
def migrations(cause: str) -> Counter:
    return _MIGRATIONS.labels(cause)


@cache
def migration_gap(cause: str) -> Histogram:
    return _GAPS.labels(cause)
