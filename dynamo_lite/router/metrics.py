"""What the router counts."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge

INDEX_BLOCKS = Gauge("dynamo_lite_router_index_blocks", "Entries in this router's prefix index")
INDEX_BYTES = Gauge("dynamo_lite_router_index_bytes", "Memory of this router's prefix index, estimated from above")
INDEX_EVICTED = Counter(
    "dynamo_lite_router_index_evicted_blocks_total", "Blocks forgotten as the index was at router.index_memory"
)
WORKERS = Gauge("dynamo_lite_router_workers", "Live workers known to this router", ["role"])
GAPS = Counter("dynamo_lite_router_kv_event_gaps_total", "Gaps seen in workers' KV events")
SNAPSHOTS = Counter("dynamo_lite_router_snapshots_total", "Snapshots of workers' blocks loaded")
SNAPSHOT_FAILURES = Counter("dynamo_lite_router_snapshot_failures_total", "Snapshot requests that failed")
_PLACED = Counter("dynamo_lite_router_placements_total", "Requests placed", ["worker"])
PROMPT_BLOCKS = Counter("dynamo_lite_router_prompt_blocks_total", "Blocks of the prompts placed")
PREDICTED_BLOCKS = Counter("dynamo_lite_router_predicted_hit_blocks_total", "Blocks expected on the chosen worker")
ACTUAL_BLOCKS = Counter("dynamo_lite_router_actual_hit_blocks_total", "Blocks the chosen worker really had")
MISPREDICTED_BLOCKS = Gauge(
    "dynamo_lite_router_predicted_minus_actual_hit_blocks", "Of the last placement whose worker answered"
)
BOOKINGS = Gauge("dynamo_lite_router_bookings", "Requests under way, by whose router placed them", ["whose"])
ROUTERS = Gauge("dynamo_lite_router_peers", "Other routers that are heard of")
SELF_TEST = Gauge("dynamo_lite_router_self_test", "1 for how the prefix self-test at the start ended", ["result"])


@cache
def placed(worker: str) -> Counter:
    return _PLACED.labels(worker)
