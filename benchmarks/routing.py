"""What placing by predicted cost gains over other policies: a trace, simulated at several speeds.

    .venv/bin/python benchmarks/routing.py --trace FILE [--json FILE] [--speeds 1 4 8]

FILE is in Mooncake's format, e.g. its conversation trace. Each run replays it, on a virtual clock, on 8 aggregated
workers of 3,000 blocks of 512 tokens; the paces are those of `tier_trace.py`. Nothing but the mode `random` is random,
and that has a seed: two runs give the same figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.report import Bar
from benchmarks.sim_fleet import read_trace, trace_model
from benchmarks.tier_trace import PACES, WORKERS, Run, attainable, pooled, replay
from dynamo_lite.config import RouterMode

BLOCKS = 3000  # of each worker's device
MODES: tuple[RouterMode, ...] = get_args(RouterMode)
HOST = "host 6,000"


@dataclass(frozen=True, slots=True)
class Replay:
    """One run, and what it was of."""

    mode: str
    speed: float
    run: Run


def bars(replays: Sequence[Replay]) -> Iterator[Bar]:
    """Against the issue's: what one pooled cache of all devices' size finds, at an even load; and times."""
    first = next(one.run for one in replays if one.mode == "kv" and one.run.tiers == "none")
    tiered = next(one.run for one in replays if one.run.tiers == HOST)
    yield Bar.of("hit rate", 100 * first.hit_rate, "%", ">= 30.6")
    yield Bar.of("the busiest worker over the mean", first.placed_spread, "×", "<= 1.25")
    yield Bar.of(f"hit rate, {HOST}", 100 * tiered.hit_rate, "%", ">= 35.5")
    for speed in dict.fromkeys(one.speed for one in replays):
        p99 = {one.mode: one.run.ttft_p99_s for one in replays if one.speed == speed and one.run.tiers == "none"}
        others = min(seconds for mode, seconds in p99.items() if mode != "kv")
        yield Bar.of(f"TTFT p99 of random, speed {speed:g}", p99["random"] / p99["kv"], "×", ">= 2")
        yield Bar.of(f"TTFT p99 of the best other policy, speed {speed:g}", others / p99["kv"], "×", ">= 1")


def table(replays: Sequence[Replay]) -> Table:
    shown = Table(title="TTFT in ms; the busiest worker over the mean", title_justify="left", show_edge=False)
    for name in ("mode", "tiers", "speed", "hits", "p50", "p99", "mean", "sent", "computed"):
        shown.add_column(name, justify="left" if name in ("mode", "tiers") else "right", no_wrap=True)
    for one in replays:
        run = one.run
        shown.add_row(
            one.mode, run.tiers, f"{one.speed:g}", f"{run.hit_rate:.2%}", f"{run.ttft_p50_s * 1e3:,.0f}",
            f"{run.ttft_p99_s * 1e3:,.0f}", f"{run.ttft_mean_s * 1e3:,.0f}", f"{run.placed_spread:.2f}",
            f"{run.computed_spread:.2f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="FILE", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 4.0, 8.0], help="times the trace's own")
    options = parser.parse_args()
    console, machine = Console(stderr=True), report.machine()
    requests = read_trace(options.trace)
    wanted = [("kv", HOST, 1.0), *((mode, "none", speed) for speed in options.speeds for mode in MODES)]
    replays: list[Replay] = []
    load = report.OtherLoad()
    with trace_model(requests) as model, Progress(console=console, transient=True) as progress:
        for mode, tiers, speed in progress.track(wanted, description="runs"):
            replays.append(Replay(mode, speed, replay(requests, model, tiers, BLOCKS, speed, mode)))
            progress.console.print(f"{mode} × {speed:g}, {replays[-1].run.line}")
    Console(width=110).print(table(replays))
    found = list(bars(replays))
    for bar in found:
        print(f"{bar.name:55} {bar.value:8.2f} {bar.unit} {bar.bar or ''}")
    if options.json:
        raw = {
            "workers": WORKERS, "blocks": BLOCKS, "paces": PACES, "requests": len(requests),
            "other_cores_busy": load.cores(), "pooled": pooled(requests, WORKERS * BLOCKS),
            "attainable": attainable(requests), "replays": [asdict(one) for one in replays],
        }  # fmt: skip
        report.write(options.json, machine, found, raw)


if __name__ == "__main__":
    main()
