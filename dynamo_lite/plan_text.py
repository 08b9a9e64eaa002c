"""The plan as text, for `dynamo-lite check`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dynamo_lite.config import Config
from dynamo_lite.plan import Plan, PlannedProcess, gib


def describe(plan: Plan) -> str:
    """Processes, addresses, memory and transfer paths, in aligned columns."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    config = plan.config
    yield f"{config.model_name} by {config.engine}, namespace '{config.namespace}'"
    yield ""
    yield "Processes"
    head = ("name", "device", "threads", "weights", "KV", "staging", "host tier", "overhead", "memory")
    yield from _table([head, *map(_row, plan.processes)])
    yield f"  all together, with nats-server, etcd and the supervisor: {gib(plan.memory)} of {gib(plan.machine.memory)}"
    yield ""
    yield "Addresses"
    yield from _table([("frontend", plan.frontend), ("nats", plan.nats), ("etcd", plan.etcd)])
    yield ""
    yield "KV tiers"
    yield from _table([("device", _device_tier(plan)), *_tiers(plan.config)])
    yield ""
    yield "KV moves by"
    paths = [(f"{path.source} → {path.target}", path.via) for path in plan.transfers]
    yield from _table(paths or [("none", "no prefill workers apart from those that decode")])
    yield ""
    yield f"State and logs: {plan.state_dir}"
    yield from (f"Warning: {warning}" for warning in plan.warnings)
    yield from (f"Warning: this host cannot serve it: {problem}" for problem in plan.problems)
    if plan.missing:
        yield f"Warning: this host cannot serve it; it lacks {', '.join(plan.missing)}"


def _row(process: PlannedProcess) -> Sequence[str]:
    memory = process.memory
    device = "cuda " + ",".join(map(str, process.gpus)) if process.gpus else process.device
    kv = gib(memory.kv) if memory.kv else gib(process.kv_cache) if process.kv_cache else "vLLM's choice"
    return (
        process.name,
        device.replace("none", "–"),
        str(process.threads),
        gib(memory.weights) if memory.weights else "–",
        "–" if process.device == "none" else kv,
        gib(memory.staging) if memory.staging else "–",
        gib(memory.tier) if memory.tier else "–",
        gib(memory.overhead),
        gib(memory.total),
    )


def _tiers(config: Config) -> Iterator[tuple[str, str]]:
    tiers = config.kv_tiers
    if config.engine == "sim":
        yield from ((name, "simulated") for name, tier in tiers if tier is not None)
        return
    if tiers.host is not None:
        yield "host", f"{gib(tiers.host.size)} on each worker, admission {tiers.host.admission}"
    if tiers.disk is not None:
        where = f"{gib(tiers.disk.size)} on each worker, under {tiers.disk.path}"
        yield "disk", f"{where}, admission {tiers.disk.admission}"
    if tiers.object is not None:
        at = f" at {tiers.object.endpoint}" if tiers.object.endpoint else ""
        yield "object", f"{tiers.object.url}{at}, admission {tiers.object.admission}"


def _device_tier(plan: Plan) -> str:
    workers = [process for process in plan.processes if process.role != "frontend"]
    if plan.config.engine == "sim":
        return f"{plan.config.sim.kv_blocks} simulated blocks on each of {len(workers)} workers"
    known = sum(process.kv_cache or 0 for process in workers)
    unknown = sum(process.kv_cache is None for process in workers)
    parts = [f"{gib(known)} in all, on {len(workers) - unknown} of {len(workers)} workers"] if known else []
    return ", ".join([*parts, f"vLLM's choice on {unknown} workers"] if unknown else parts)


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
