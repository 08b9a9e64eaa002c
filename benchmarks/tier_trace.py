"""How much less device memory gives the same hit rate and time to first token with tiers: a trace, simulated.

    .venv/bin/python benchmarks/tier_trace.py --trace FILE [--json FILE] [--plot FILE.svg] [--speed X]

FILE is in Mooncake's format, e.g. its conversation trace. Each run replays all of it, on a virtual clock, on 8
aggregated workers behind the router, with one size of device memory and one choice of tiers. The paces are those of
Llama-3.1-8B in bf16 on an H100; a block of 512 tokens has 64 MiB. Nothing is random: two runs give the same figures.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.report import Bar
from benchmarks.sim_fleet import BLOCK, Answer, Request, SimFleet, read_trace, trace_model
from benchmarks.tier_plot import Panel, draw
from benchmarks.virtual_time import VirtualTimeLoop
from dynamo_lite.config import Config
from kvbm.tiers.record import stride_bytes
from workers.engine import EngineLoad

WORKERS = 8
BLOCK_BYTES = 64 * 2**20  # 512 tokens, 32 layers, keys and values of 8 heads of 128, 2 bytes each
DEVICE = (300, 500, 1000, 1500, 2000, 3000, 6000)  # blocks a worker; the longest prompt and its answer take 251
FEWER = (300, 500, 1000, 3000)  # with tiers little depends on it
TIERS: dict[str, dict[str, int]] = {  # blocks a worker
    "none": {},
    "host 1,500": {"host": 1500},
    "host 6,000": {"host": 6000},
    "+ disk": {"host": 6000, "disk": 24_000},
    "+ disk + object": {"host": 6000, "disk": 24_000, "object": 1},
}
SWEEP = [(tiers, blocks) for tiers in TIERS for blocks in (FEWER if TIERS[tiers] else DEVICE)]
PACES = {
    "prefill_ms_per_token": 0.025,  # measured: 512, 2,048 and 4,096 tokens in 16, 53 and 102 ms
    "decode_step_ms": 6.6,  # measured: 153 tokens/s alone, 4,318 with 32
    "host_ms_per_block": 2.7,  # 25 GB/s
    "disk_ms_per_block": 11.2,  # 6 GB/s
    "object_ms_per_block": 67.0,  # 1 GB/s
    "object_latency_ms": 30.0,
    "max_num_batched_tokens": 8192,
    "steps_at_once": 4096,
}
SAME = 1.01  # times as long is still the same TTFT


@dataclass(frozen=True, slots=True)
class Run:
    """One replay."""

    tiers: str
    device_blocks: int  # a worker
    hit_rate: float  # blocks not computed, of all, those cut off included
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    placed_spread: float  # prompt tokens sent to the busiest worker, over the mean
    computed_spread: float  # likewise, of those that it computed
    workers: list[dict[str, object]]
    cpu_s: float  # what simulating it took

    @property
    def line(self) -> str:
        return f"{self.tiers}, {self.device_blocks:,} blocks: {self.hit_rate:.1%}, simulated in {self.cpu_s:.0f} s"


def config_of(tiers: str, device_blocks: int, mode: str = "kv") -> Config:
    stride = stride_bytes(BLOCK_BYTES)
    blocks = TIERS[tiers]
    kv_tiers: dict[str, object] = {}
    if "host" in blocks:
        kv_tiers["host"] = {"size": blocks["host"] * stride}
    if "disk" in blocks:
        kv_tiers["disk"] = {"size": blocks["disk"] * stride, "path": "simulated"}
    if "object" in blocks:
        kv_tiers["object"] = {"url": "s3://simulated"}
    return Config.model_validate(
        {
            "engine": "sim",
            "model": "llama-3.1-8b",
            "max_model_len": min(131_072, device_blocks * BLOCK),
            "workers": {"both": {"count": WORKERS, "max_num_seqs": 256}},
            "kv_tiers": kv_tiers,
            "router": {"mode": mode},
            "sim": PACES | {"block_size": BLOCK, "kv_blocks": device_blocks},
        }
    )


def replay(
    requests: Sequence[Request], model: Path, tiers: str, device_blocks: int, speed: float, mode: str = "kv"
) -> Run:
    """One run, in virtual time. `mode`: the router's."""

    async def main() -> tuple[list[Answer], list[EngineLoad]]:
        async with SimFleet.open(config_of(tiers, device_blocks, mode), model) as fleet:
            answers = await fleet.replay(requests, speed)
            return answers, [worker.engine.load() for worker in fleet.workers]

    begun = time.process_time()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        answers, loads = runner.run(main())
    if len(answers) != len(requests):
        raise RuntimeError(f"{len(requests)} requests, {len(answers)} answers")
    return summary(tiers, device_blocks, answers, loads, time.process_time() - begun)


def summary(
    tiers: str, device_blocks: int, answers: Sequence[Answer], loads: Sequence[EngineLoad], cpu_s: float
) -> Run:
    ttft = statistics.quantiles((one.ttft_s for one in answers), n=100, method="inclusive")
    workers: list[dict[str, object]] = []
    for number, load in enumerate(loads):
        mine = [one for one in answers if one.worker == number]
        placed, cached = sum(one.prompt_tokens for one in mine), sum(one.cached_tokens for one in mine)
        tier_loads = {tier.tier.value: {k: v for k, v in asdict(tier).items() if k != "tier"} for tier in load.tiers}
        workers.append(
            {"requests": len(mine), "placed_tokens": placed, "computed_tokens": placed - cached, "tiers": tier_loads}
        )
    blocks = sum(-(-one.prompt_tokens // BLOCK) for one in answers)
    return Run(
        tiers,
        device_blocks,
        sum(one.cached_tokens for one in answers) / BLOCK / blocks,
        ttft[49],
        ttft[98],
        statistics.mean(one.ttft_s for one in answers),
        _spread([worker["placed_tokens"] for worker in workers]),
        _spread([worker["computed_tokens"] for worker in workers]),
        workers,
        cpu_s,
    )


def _spread(values: Sequence[object]) -> float:
    numbers = [float(str(value)) for value in values]
    return max(numbers) / statistics.mean(numbers)


def pooled(requests: Sequence[Request], blocks: int | None) -> float:
    """The hit rate of one cache of that many blocks for everybody, least recently used first out; None: without limit.

    Every id counts, also that of a block that is cut off, which no engine can find again.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for request in requests:
        found = next((n for n, one in enumerate(request.hash_ids) if one not in cache), len(request.hash_ids))
        hits, total = hits + found, total + len(request.hash_ids)
        for one in reversed(request.hash_ids):
            cache[one] = None
            cache.move_to_end(one)
        while blocks is not None and len(cache) > blocks:
            cache.popitem(last=False)
    return hits / total


def attainable(requests: Sequence[Request]) -> float:
    """The hit rate of an engine that forgets nothing: it finds whole blocks only, and computes the last token."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        most = request.hash_ids[: (request.prompt_tokens - 1) // BLOCK]
        hits += next((n for n, one in enumerate(most) if one not in seen), len(most))
        total += len(request.hash_ids)
        seen.update(request.hash_ids[: request.prompt_tokens // BLOCK])
    return hits / total


# ---- what the runs say ----


@dataclass(frozen=True, slots=True)
class Saved:
    """As good as without tiers, with less."""

    tiers: str
    without_blocks: int
    with_blocks: float | None  # None: no size that was tried is as good, up to that without
    at_least: bool  # the smallest size that was tried is enough

    @property
    def percent(self) -> float:
        return 0.0 if self.with_blocks is None else 100 * (1 - self.with_blocks / self.without_blocks)


def saved(runs: Sequence[Run], tiers: str, plain: Run) -> Saved:
    """The least device memory that is as good as `plain`; between sizes that were tried all goes in straight lines."""
    curve = sorted((run for run in runs if run.tiers == tiers), key=lambda run: run.device_blocks)
    if _as_good(curve[0], curve[0], 0, plain):
        return Saved(tiers, plain.device_blocks, curve[0].device_blocks, at_least=True)
    for lower, upper in pairwise(curve):
        for step in range(1, 101):
            blocks = lower.device_blocks + (upper.device_blocks - lower.device_blocks) * step / 100
            if blocks <= plain.device_blocks and _as_good(lower, upper, step / 100, plain):
                return Saved(tiers, plain.device_blocks, blocks, at_least=False)
    return Saved(tiers, plain.device_blocks, None, at_least=False)


def _as_good(lower: Run, upper: Run, part: float, plain: Run) -> bool:
    def at(name: str) -> float:
        first: float = getattr(lower, name)
        last: float = getattr(upper, name)
        return first + (last - first) * part

    times = ("ttft_p50_s", "ttft_p99_s", "ttft_mean_s")
    return at("hit_rate") >= plain.hit_rate and all(at(name) <= SAME * getattr(plain, name) for name in times)


def savings(runs: Sequence[Run]) -> list[Saved]:
    plain = [run for run in runs if run.tiers == "none"]
    return [saved(runs, tiers, run) for tiers in TIERS if tiers != "none" for run in plain]


def tables(runs: Sequence[Run], found: Sequence[Saved], requests: Sequence[Request]) -> Iterator[Table]:
    table = Table(
        title="Runs: TTFT in ms, the busiest worker over the mean by tokens sent and computed",
        title_justify="left",
        show_edge=False,
    )
    for name in ("tiers", "device", "hits", "p50", "p99", "mean", "sent", "computed"):
        table.add_column(name, justify="left" if name == "tiers" else "right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.tiers, f"{run.device_blocks:,}", f"{run.hit_rate:.1%}", f"{run.ttft_p50_s * 1e3:,.0f}",
            f"{run.ttft_p99_s * 1e3:,.0f}", f"{run.ttft_mean_s * 1e3:,.0f}",
            f"{run.placed_spread:.2f}", f"{run.computed_spread:.2f}",
        )  # fmt: skip
    yield table
    table = Table(title="Blocks of a device that is as good", title_justify="left", show_edge=False)
    for name in ("without tiers", *[tiers for tiers in TIERS if tiers != "none"]):
        table.add_column(name, justify="right")
    for run in (run for run in runs if run.tiers == "none"):
        mine = [one for one in found if one.without_blocks == run.device_blocks]
        table.add_row(f"{run.device_blocks:,}", *map(_saved_text, mine))
    yield table
    table = Table(title="One cache for all, for comparison", title_justify="left", show_edge=False)
    table.add_column("blocks")
    table.add_column("hit rate", justify="right")
    for blocks in DEVICE:
        table.add_row(f"{WORKERS} × {blocks:,}", f"{pooled(requests, WORKERS * blocks):.1%}")
    table.add_row("without limit", f"{pooled(requests, None):.1%}")
    table.add_row("without limit, whole blocks only", f"{attainable(requests):.1%}")
    yield table


def _saved_text(one: Saved) -> str:
    if one.with_blocks is None:
        return "–"
    return f"{'≤ ' if one.at_least else ''}{one.with_blocks:,.0f} (−{one.percent:.0f} %)"


def panels(runs: Sequence[Run]) -> list[Panel]:
    def lines(name: str, factor: float) -> dict[str, list[tuple[float, float]]]:
        return {
            tiers: [(run.device_blocks, factor * getattr(run, name)) for run in runs if run.tiers == tiers]
            for tiers in TIERS
        }

    return [
        Panel("hit rate, %", lines("hit_rate", 100)),
        Panel("TTFT p50, ms", lines("ttft_p50_s", 1e3)),
        Panel("TTFT p99, ms", lines("ttft_p99_s", 1e3)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="FILE", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--speed", type=float, default=1.0, help="requests come so many times as fast as in the trace")
    options = parser.parse_args()
    console, machine = Console(stderr=True), report.machine()
    requests = read_trace(options.trace)
    runs: list[Run] = []
    load = report.OtherLoad()
    with trace_model(requests) as model, Progress(console=console, transient=True) as progress:
        for tiers, device_blocks in progress.track(SWEEP, description="runs"):
            runs.append(replay(requests, model, tiers, device_blocks, options.speed))
            progress.console.print(runs[-1].line)
    found = savings(runs)
    for table in tables(runs, found, requests):
        Console().print(table)
    bars = [Bar.of(f"less than {one.without_blocks:,} blocks, {one.tiers}", one.percent, "%") for one in found]
    raw = {
        "workers": WORKERS, "speed": options.speed, "requests": len(requests), "block_bytes": BLOCK_BYTES,
        "paces": PACES, "tiers": TIERS, "other_cores_busy": load.cores(),
        "pooled": {blocks: pooled(requests, WORKERS * blocks) for blocks in DEVICE},
        "unlimited": pooled(requests, None), "attainable": attainable(requests),
        "savings": [asdict(one) for one in found], "runs": [asdict(run) for run in runs],
    }  # fmt: skip
    if options.json:
        report.write(options.json, machine, bars, raw)
    if options.plot:
        options.plot.write_text(draw(panels(runs), "device KV, blocks of 64 MiB a worker"), encoding="utf-8")


if __name__ == "__main__":
    main()
