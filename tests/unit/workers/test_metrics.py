from __future__ import annotations

from prometheus_client import CollectorRegistry

from dynamo_lite.plane.wire import Role
from workers.engine import EngineLoad, TransferReport
from workers.metrics import WorkerMetrics


def test_a_hold_reason_that_is_gone_reads_zero() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(Role.DECODE, registry)
    metrics.loaded(EngineLoad(1, 2, 3, 10, {"receive": 5}))
    metrics.loaded(EngineLoad(0, 0, 0, 10, {}))
    assert registry.get_sample_value("dynamo_lite_worker_held_blocks", {"reason": "receive"}) == 0
    assert registry.get_sample_value("dynamo_lite_worker_running") == 0


def test_workers_met_are_counted_by_state() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(Role.DECODE, registry).loaded(EngineLoad(0, 0, 0, 10, peers={"met": 2, "silent": 1}))
    assert registry.get_sample_value("dynamo_lite_worker_peers", {"state": "met"}) == 2
    assert registry.get_sample_value("dynamo_lite_worker_peers", {"state": "silent"}) == 1


def test_transfers_add_up_bytes_and_seconds() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(Role.DECODE, registry)
    for _ in range(2):
        metrics.transferred("in", TransferReport(1000, 2, 1, "sim", 0, 500_000_000))
    assert registry.get_sample_value("nixl_transfer_bytes_total", {"direction": "in", "path": "sim"}) == 2000
    assert registry.get_sample_value("nixl_transfer_seconds_sum", {"direction": "in", "path": "sim"}) == 1.0


def test_requests_are_counted_by_role_and_outcome() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(Role.PREFILL, registry).ended("ok")
    labels = {"role": "prefill", "outcome": "ok"}
    assert registry.get_sample_value("dynamo_lite_worker_requests_total", labels) == 1
