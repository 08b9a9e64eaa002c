"""What the tiers save, and what they cost: prefixes read back beside computing them, new prompts with and without.

    .venv/bin/python benchmarks/tiers.py [--json FILE] [--plot FILE] [--prompts N] [--batches N] [--passes N]

Four deployments of one worker each, alike but for their tiers: none; host; host and disk; host, disk and an S3 server.
They are asked the same prompts, one after the other, in turns. First prompts that have left the device, for the bars;
then working sets of 0.5 to 8 times what the device holds, in random order: time to first token and hit rate of each;
last batches of new prompts, which nobody reuses. The machine is not asked to be idle: what else it did is recorded.
The S3 server comes with what `make test` installs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, BenchmarkError, Deployment, serve
from benchmarks.report import Bar
from benchmarks.tier_plot import Panel
from benchmarks.tier_plot import draw as draw_lines
from tests.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedFs, seaweedfs

PROMPT_TOKENS = 1000
BLOCK = 32  # tokens
WHOLE = (PROMPT_TOKENS - 1) // BLOCK * BLOCK  # tokens that can be read back
VOCABULARY = 49_152  # SmolLM2
SPECIAL = 17  # its first ids are control tokens
AT_ONCE = 4  # prompts of a batch
DEVICE = 5.6  # prompts that the device holds, 128 MiB
HOST, DISK = "256MiB", "512MiB"  # 11 and 23 prompts
SETS = (0.5, 1, 2, 4, 8)  # times the device
LEAST = 12  # requests of each set
NAMES = ("none", "host", "host+disk", "+object")


@dataclass(frozen=True, slots=True)
class Prefix:
    """Seconds to the first token of a prompt that has left the device."""

    tier: str
    onboarded_s: float
    computed_s: float
    copy_s: float  # of the onboarding: reading, checksums and copies
    other_cores: float


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a working set."""

    tiers: str
    times_device: float
    ttft_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Seconds for new prompts, several at once."""

    seconds: Mapping[str, float]
    other_cores: float


class Bench:
    """All deployments under the same prompts."""

    def __init__(self, deployments: Mapping[str, Deployment], progress: Progress, bar: TaskID) -> None:
        self._deployments, self._progress, self._bar = deployments, progress, bar
        self._numbers = random.Random(time.time_ns())  # new prompts in every run; nothing may be cached
        self._load = report.OtherLoad()
        self._turn = 0

    def prompts(self, count: int) -> list[list[int]]:
        return [[self._numbers.randrange(SPECIAL, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(count)]

    def _in_turns(self, names: Sequence[str]) -> list[str]:
        self._turn += 1
        first = self._turn % len(names)
        return [*names[first:], *names[:first]]

    def prefixes(self, tier: str, name: str, count: int, between: int) -> list[Prefix]:
        """`count` prompts from that tier of a deployment, after `between` others, beside computing them."""
        first, *chosen = self.prompts(count + 1)
        for prompt in [first, *chosen, *self.prompts(between)]:
            if self._deployments[name].complete(prompt).cached_tokens:
                raise BenchmarkError("a new prompt was in a cache")
            self._deployments[name].complete(prompt)  # an object store takes what is used twice
            self._progress.advance(self._bar)
        self._deployments[name].complete(first)  # of a tier of which nothing is known only a part is read
        found = []
        for prompt in chosen:
            self._load.cores()
            answers = {one: self._deployments[one].complete(prompt) for one in self._in_turns(("none", name))}
            onboarded, computed = answers[name], answers["none"]
            if onboarded.cached_tokens != WHOLE or computed.cached_tokens:
                told = f"{onboarded.cached_tokens} and {computed.cached_tokens}"
                raise BenchmarkError(f"cached tokens should be {WHOLE} with tiers and 0 without, they are {told}")
            (span,) = self._deployments[name].spans("kv.onboard", [onboarded.trace_id])
            if not span["attributes"].get(f"{tier}_blocks"):
                raise BenchmarkError(f"the prefix did not come from {tier}: {span['attributes']}")
            copy_s, busy = span["attributes"]["seconds"], self._load.cores()
            found.append(Prefix(tier, onboarded.ttft_s, computed.ttft_s, copy_s, busy))
            self._progress.advance(self._bar)
        return found

    def working_set(self, times_device: float, passes: int) -> list[Asked]:
        prompts = self.prompts(max(1, round(times_device * DEVICE)))
        for prompt in prompts:
            for deployment in self._deployments.values():
                deployment.complete(prompt)
                deployment.complete(prompt)  # as above
            self._progress.advance(self._bar)
        order = [*prompts] * max(passes, -(-LEAST // len(prompts)))
        self._numbers.shuffle(order)
        found = []
        for prompt in order:
            for name in self._in_turns(NAMES):
                answer = self._deployments[name].complete(prompt)
                found.append(Asked(name, times_device, answer.ttft_s, answer.cached_tokens))
            self._progress.advance(self._bar)
        return found

    def batch(self) -> Batch:
        prompts = self.prompts(AT_ONCE)
        self._load.cores()
        seconds = {name: _seconds(self._deployments[name], prompts) for name in self._in_turns(NAMES)}
        self._progress.advance(self._bar)
        return Batch(seconds, self._load.cores())


def _seconds(deployment: Deployment, prompts: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(deployment.complete, prompts))
    return time.perf_counter() - started


def start(folder: Path, server: SeaweedFs, console: Console, stack: ExitStack) -> dict[str, Deployment]:
    content = yaml.safe_load((ROOT / "configs" / "tiered.yaml").read_text(encoding="utf-8"))
    store = {"url": "s3://ready/kv", "endpoint": server.endpoint}
    store |= {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
    host = {"size": HOST}
    tiers: dict[str, dict[str, Any]] = {
        "none": {},
        "host": {"host": host},
        "host+disk": {"host": host, "disk": {"path": str(folder / "kv"), "size": DISK}},
        "+object": {"host": host, "disk": {"path": str(folder / "kv-too"), "size": DISK}, "object": store},
    }
    deployments = {}
    for name, chosen in tiers.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content | {"kv_tiers": chosen}), encoding="utf-8")
        with console.status(f"starting the deployment with tiers: {name}"):
            deployments[name] = stack.enter_context(serve(file, folder / name))
    return deployments


def bars_of(prefixes: Sequence[Prefix], batches: Sequence[Batch]) -> list[Bar]:
    """Ratios are medians of each pair's ratio: what else the machine did hits both sides of it alike."""
    middle = statistics.median
    bars = [Bar.of("TTFT, computed", middle(one.computed_s for one in prefixes) * 1e3, "ms")]
    for tier, bar in (("host", "<= 0.15"), ("disk", "<= 0.25"), ("object", None)):
        mine = [one for one in prefixes if one.tier == tier]
        bars += [
            Bar.of(f"TTFT, from {tier}", middle(one.onboarded_s for one in mine) * 1e3, "ms"),
            Bar.of(f"reading, checksums and copies, {tier}", middle(one.copy_s for one in mine) * 1e3, "ms"),
            Bar.of(f"from {tier} / computed", middle(one.onboarded_s / one.computed_s for one in mine), "×", bar),
        ]
    bars.append(Bar.of(f"{AT_ONCE} new prompts, without tiers", middle(one.seconds["none"] for one in batches), "s"))
    for name in NAMES[1:]:
        ratio = middle(one.seconds[name] / one.seconds["none"] for one in batches)
        bars.append(Bar.of(f"new prompts, {name} / without", ratio, "×", "<= 1.03"))
    return bars


@dataclass(frozen=True, slots=True)
class Point:
    """What one deployment did with one working set."""

    tiers: str
    times_device: float
    hit_rate: float
    p50_ms: float
    p99_ms: float


def points_of(asked: Sequence[Asked]) -> list[Point]:
    points = []
    for name in NAMES:
        for size in SETS:
            mine = [one for one in asked if (one.tiers, one.times_device) == (name, size)]
            if not mine:
                continue
            times = sorted(one.ttft_s * 1e3 for one in mine)
            hits = sum(one.cached_tokens for one in mine) / (PROMPT_TOKENS * len(mine))
            p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
            points.append(Point(name, size, hits, statistics.median(times), p99))
    return points


def table_of(points: Sequence[Point]) -> Table:
    table = Table("working set / device", *NAMES, title="hit rate · TTFT p50 / p99 in ms")
    for size in SETS:
        cells = [
            f"{one.hit_rate:.2f} · {one.p50_ms:.0f} / {one.p99_ms:.0f}"
            for name in NAMES
            for one in points
            if (one.tiers, one.times_device) == (name, size)
        ]
        table.add_row(f"{size:g}", *cells)
    return table


def draw(points: Sequence[Point], file: Path) -> None:
    def series(field: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(one.times_device, getattr(one, field)) for one in points if one.tiers == name] for name in NAMES
        }

    panels = [
        Panel("Prompt tokens found, of 1", series("hit_rate")),
        Panel("Time to first token, median, ms", series("p50_ms")),
        Panel("Time to first token, p99, ms", series("p99_ms")),
    ]
    file.write_text(draw_lines(panels, "working set, times what the device holds"), encoding="utf-8")


def measure(
    bench: Bench, prompts: int, batches: int, passes: int, sets: Sequence[float]
) -> tuple[list[Prefix], list[Asked], list[Batch]]:
    costs = [bench.batch() for _ in range(batches + 1)][1:]
    prefixes = bench.prefixes("host", "host", min(prompts, 8), 0 if prompts >= 7 else 7 - prompts)
    prefixes += bench.prefixes("disk", "host+disk", prompts, 12)
    prefixes += bench.prefixes("object", "+object", prompts, 36)
    asked = [one for size in sets for one in bench.working_set(size, passes)]
    return prefixes, asked, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG")
    parser.add_argument("--prompts", type=int, default=8, help="from each tier; at least 7, or they fit the device")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--sets", type=float, nargs="*", default=SETS, choices=SETS, help="times what the device holds")
    parser.add_argument("--passes", type=int, default=1, help="over each working set, at least 12 requests")
    options = parser.parse_args()
    console, machine = Console(stderr=True), report.machine()
    sets = [max(1, round(size * DEVICE)) for size in options.sets]
    steps = 1 + options.batches + 6 * options.prompts + 51
    steps += sum(size + size * max(options.passes, -(-LEAST // size)) for size in sets)
    with tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        (folder / "s3").mkdir()
        deployments = start(folder, stack.enter_context(seaweedfs(folder / "s3")), console, stack)
        progress = stack.enter_context(Progress(console=console, transient=True))
        bench = Bench(deployments, progress, progress.add_task("prompts", total=steps))
        prefixes, asked, batches = measure(bench, options.prompts, options.batches, options.passes, options.sets)
    bars, points = bars_of(prefixes, batches), points_of(asked)
    busy = report.spread([one.other_cores for one in [*prefixes, *batches]])
    report.show(f"{PROMPT_TOKENS:,}-token prefixes and tiers, other load {busy['median']:.2f} cores", bars, Console())
    if points:
        Console().print(table_of(points))
    if options.plot:
        draw(points, options.plot)
    if options.json:
        raw = {
            "prompt_tokens": PROMPT_TOKENS, "at_once": AT_ONCE, "device_prompts": DEVICE, "host": HOST, "disk": DISK,
            "other_cores_busy": busy, "points": [asdict(one) for one in points],
            "prefixes": [asdict(one) for one in prefixes], "batches": [asdict(one) for one in batches],
            "working_sets": [asdict(one) for one in asked],
        }  # fmt: skip
        report.write(options.json, machine, bars, raw)


if __name__ == "__main__":
    main()
