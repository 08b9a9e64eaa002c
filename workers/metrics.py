"""A worker's Prometheus metrics; under vLLM's own names where those exist and vLLM itself does not export them."""

from __future__ import annotations

from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from dynamo_lite.plane.wire import Role
from dynamo_lite.telemetry import Latencies
from kvbm.events import Tier
from workers.engine import EngineLoad, TierLoad, TransferReport

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Twice as long at each step: quantiles are then right to a factor of 1.4 from 0.1 ms to 3 s.
_TRANSFER_SECONDS = tuple(0.0001 * 2**step for step in range(16))
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TIER_EVENTS = ("hits", "misses", "offloaded", "onboarded", "evicted", "missed", "corrupt")  # fields of TierLoad


class WorkerMetrics:
    """What every worker counts, whatever its engine."""

    def __init__(self, role: Role, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dynamo_lite_worker_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dynamo_lite_worker_{name}", text, labels, registry=registry)

        self._role = role
        self._ended: dict[str, Counter] = {}
        self._requests = counter("requests", "Requests ended, by role and outcome", "role", "outcome")
        self.remote_prefills = counter("remote_prefills", "Remote prefill attempts, by outcome", "outcome")
        self.pulls = counter("pulls", "Prefixes asked of other workers (in), and by them (out)", "direction", "outcome")
        self.prompts = counter("prompts", "Prompts, by how they were computed", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.hit_blocks = counter("hit_blocks", "Prompt blocks found in this worker's own KV")
        self._transfer_bytes = Counter(
            "nixl_transfer_bytes", "KV bytes moved, by direction (in, out) and path",
            ["direction", "path"], registry=registry,
        )  # fmt: skip
        self._transfer_seconds = Histogram(
            "nixl_transfer_seconds", "From a transfer's first piece to its last, by direction and path",
            ["direction", "path"], buckets=_TRANSFER_SECONDS, registry=registry,
        )  # fmt: skip
        self.transfer_failures = Counter(
            "nixl_transfer_failures", "Transfers that failed, by direction and cause",
            ["direction", "cause"], registry=registry,
        )  # fmt: skip
        self._held_bytes = Gauge("nixl_held_bytes", "Bytes of the held blocks", registry=registry)
        self._staged_bytes = Gauge("nixl_staged_bytes", "Staging in use by pieces and grants", registry=registry)
        self.failures = counter("failures", "Failed requests and prefills, by cause", "cause")
        self.delta_batches = counter("delta_batches", "Messages of token deltas sent to frontends")
        self.running = gauge("running", "Sequences in the engine's batch")
        self.waiting = gauge("waiting", "Sequences queued in the engine")
        self.kv_used = gauge("kv_used_blocks", "Device KV blocks in use by sequences or holds")
        self.held_blocks = gauge("held_blocks", "Blocks held for a peer, by reason", "reason")
        self.peers = gauge("peers", "Workers that KV may be exchanged with, by state of the contact", "state")
        self._hold_reasons: set[str] = set()
        self._tier_bytes = Gauge("kv_tier_used_bytes", "Bytes of the stored blocks", ["tier"], registry=registry)
        self._tier_size = Gauge("kv_tier_size_bytes", "Size of the tier", ["tier"], registry=registry)
        self._tier_on = Gauge("kv_tier_on", "1 while the tier works, 0 while it is off", ["tier"], registry=registry)
        self._tier_waiting = Gauge("kv_tier_waiting_blocks", "To be written there", ["tier"], registry=registry)
        self._tier_blocks = Counter(
            "kv_tier_blocks", "Blocks, by what became of them: " + ", ".join(_TIER_EVENTS),
            ["tier", "event"], registry=registry,
        )  # fmt: skip
        self._tier_loads: dict[Tier, TierLoad] = {}

    def ended(self, outcome: str) -> None:
        found = self._ended.get(outcome)
        if found is None:  # looking a child up costs more than counting
            found = self._ended[outcome] = self._requests.labels(self._role.value, outcome)
        found.inc()

    def transferred(self, direction: Literal["in", "out"], report: TransferReport) -> None:
        self._transfer_bytes.labels(direction, report.path).inc(report.bytes)
        self._transfer_seconds.labels(direction, report.path).observe((report.ended_ns - report.started_ns) / 1e9)

    def loaded(self, load: EngineLoad) -> None:
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.kv_used.set(load.kv_used_blocks)
        self._held_bytes.set(load.held_bytes)
        self._staged_bytes.set(load.staged_bytes)
        self._hold_reasons.update(load.held_blocks)
        for reason in self._hold_reasons:
            self.held_blocks.labels(reason).set(load.held_blocks.get(reason, 0))
        for state, count in load.peers.items():
            self.peers.labels(state).set(count)
        for tier in load.tiers:
            self._tier_loaded(tier)

    def _tier_loaded(self, load: TierLoad) -> None:
        self._tier_bytes.labels(load.tier).set(load.used_bytes)
        self._tier_size.labels(load.tier).set(load.size_bytes)
        before = self._tier_loads.get(load.tier)
        self._tier_on.labels(load.tier).set(load.on)
        self._tier_waiting.labels(load.tier).set(load.waiting)
        for event in _TIER_EVENTS:
            grown = getattr(load, event) - (getattr(before, event) if before is not None else 0)
            self._tier_blocks.labels(load.tier, event).inc(grown)
        self._tier_loads[load.tier] = load


class SimMetrics:
    """What vLLM exports itself, under vLLM's names, for the simulated engine."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.kv_usage = Gauge("vllm:kv_cache_usage_perc", "KV-cache usage; 1 means 100 percent", registry=registry)
        self.running = Gauge("vllm:num_requests_running", "Requests in the batch", registry=registry)
        self.waiting = Gauge("vllm:num_requests_waiting", "Requests waiting", registry=registry)
        self.preemptions = Counter("vllm:num_preemptions", "Preemptions", registry=registry)
        by_source = Counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from", ["source"], registry=registry
        )
        sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
        self.prompt_source = {source: by_source.labels(source) for source in sources}
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "Time to first token", buckets=_SECONDS, registry=registry
        )
        self.inter_token_latency = Latencies(
            "vllm:inter_token_latency_seconds", "Time between tokens", _TOKEN_SECONDS, registry=registry
        )
