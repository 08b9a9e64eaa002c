"""What the host tier saves, and what it costs: a prefix read back beside computing it, new prompts with and without it.

    .venv/bin/python benchmarks/tiers.py [--json FILE] [--prompts N] [--batches N]

It serves configs/tiered.yaml, and the same without `kv_tiers`. First, prompts that together are about twice what the
device holds go round twice: the second time the one deployment has to find each in the host tier (the answer's cached
tokens must say so), and the other computes it, one right after the other. Then both compute batches of new prompts in
turns. The machine is not asked to be idle: what else it did is recorded beside each figure.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, BenchmarkError, Deployment, serve
from benchmarks.report import Bar

PROMPT_TOKENS = 1000
BLOCK = 32  # tokens
VOCABULARY = 49_152  # SmolLM2
SPECIAL = 17  # its first ids are control tokens
AT_ONCE = 4  # prompts of a batch


@dataclass(frozen=True, slots=True)
class Prefix:
    """Seconds to the first token of a prompt that has left the device."""

    onboarded_s: float
    computed_s: float
    copy_s: float  # of the onboarding: checksums and copies
    other_cores: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Seconds for new prompts, several at once."""

    tiered_s: float
    plain_s: float
    other_cores: float


class Tiers:
    """Both deployments under the same prompts."""

    def __init__(self, tiered: Deployment, plain: Deployment) -> None:
        self._tiered, self._plain = tiered, plain
        self._numbers = random.Random(time.time_ns())  # new prompts in every run; nothing may be cached
        self._load = report.OtherLoad()

    def prompt(self) -> list[int]:
        return [self._numbers.randrange(SPECIAL, VOCABULARY) for _ in range(PROMPT_TOKENS)]

    def warm(self, prompt: Sequence[int]) -> None:
        for deployment in (self._tiered, self._plain):
            if deployment.complete(prompt).cached_tokens:
                raise BenchmarkError("a new prompt was in a cache")

    def again(self, prompt: Sequence[int], turn: int) -> Prefix:
        self._load.cores()
        if turn % 2:
            onboarded, computed = self._tiered.complete(prompt), self._plain.complete(prompt)
        else:
            computed, onboarded = self._plain.complete(prompt), self._tiered.complete(prompt)
        whole = (PROMPT_TOKENS - 1) // BLOCK * BLOCK
        if onboarded.cached_tokens != whole or computed.cached_tokens:
            found = f"{onboarded.cached_tokens} and {computed.cached_tokens}"
            raise BenchmarkError(f"cached tokens should be {whole} with tier and 0 without, they are {found}")
        (span,) = self._tiered.spans("kv.onboard", [onboarded.trace_id])
        return Prefix(onboarded.ttft_s, computed.ttft_s, span["attributes"]["seconds"], self._load.cores())

    def batch(self, turn: int) -> Batch:
        prompts = [self.prompt() for _ in range(AT_ONCE)]
        self._load.cores()
        order = (self._tiered, self._plain) if turn % 2 else (self._plain, self._tiered)
        seconds = {id(deployment): _seconds(deployment, prompts) for deployment in order}
        return Batch(seconds[id(self._tiered)], seconds[id(self._plain)], self._load.cores())


def _seconds(deployment: Deployment, prompts: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(deployment.complete, prompts))
    return time.perf_counter() - started


def start(folder: Path, console: Console, stack: ExitStack) -> tuple[Deployment, Deployment]:
    """With the tier, and without."""
    file = ROOT / "configs" / "tiered.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    del content["kv_tiers"]
    plain_file = folder / "plain.yaml"
    plain_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with console.status("starting the deployment with a host tier"):
        tiered = stack.enter_context(serve(file, folder / "tiered"))
    with console.status("starting the deployment without"):
        plain = stack.enter_context(serve(plain_file, folder / "plain"))
    return tiered, plain


def measure(tiers: Tiers, prompts: int, batches: int, console: Console) -> tuple[list[Prefix], list[Batch]]:
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("prompts", total=2 * prompts + batches + 1)
        chosen = [tiers.prompt() for _ in range(prompts)]
        for prompt in chosen:
            tiers.warm(prompt)
            progress.advance(bar)
        prefixes, costs = [], []
        for turn, prompt in enumerate(chosen):
            prefixes.append(tiers.again(prompt, turn))
            progress.advance(bar)
        tiers.batch(0)
        for turn in range(batches):
            costs.append(tiers.batch(turn))
            progress.advance(bar)
    return prefixes, costs


def bars_of(prefixes: Sequence[Prefix], batches: Sequence[Batch]) -> list[Bar]:
    """Ratios are medians of each pair's ratio: what else the machine did hits both sides of it alike."""
    middle = statistics.median
    return [
        Bar.of("TTFT, computed", middle(one.computed_s for one in prefixes) * 1e3, "ms"),
        Bar.of("TTFT, from host", middle(one.onboarded_s for one in prefixes) * 1e3, "ms"),
        Bar.of("checksums and copies of it", middle(one.copy_s for one in prefixes) * 1e3, "ms"),
        Bar.of("from host / computed", middle(one.onboarded_s / one.computed_s for one in prefixes), "×", "<= 0.15"),
        Bar.of(f"{AT_ONCE} new prompts, without tier", middle(one.plain_s for one in batches), "s"),
        Bar.of("with / without tier", middle(one.tiered_s / one.plain_s for one in batches), "×", "<= 1.03"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=12, help="at least 7, or they fit the device")
    parser.add_argument("--batches", type=int, default=12)
    options = parser.parse_args()
    console = Console(stderr=True)
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-") as folder, ExitStack() as stack:
        tiers = Tiers(*start(Path(folder), console, stack))
        prefixes, batches = measure(tiers, options.prompts, options.batches, console)
    bars = bars_of(prefixes, batches)
    busy = report.spread([one.other_cores for one in [*prefixes, *batches]])
    raw = {
        "prompt_tokens": PROMPT_TOKENS,
        "at_once": AT_ONCE,
        "other_cores_busy": busy,
        "prefixes": [asdict(one) for one in prefixes],
        "batches": [asdict(one) for one in batches],
    }
    title = f"{PROMPT_TOKENS:,}-token prefixes and the host tier, other load {busy['median']:.2f} cores"
    report.show(title, bars, Console())
    if options.json:
        report.write(options.json, machine, bars, raw)


if __name__ == "__main__":
    main()
