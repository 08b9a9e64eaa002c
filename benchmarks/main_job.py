"""Time to the first token of a long prompt: aggregated, disaggregated, and a prefix hit; and the KV transfer's speed.

    .venv/bin/python benchmarks/main_job.py [--json FILE] [--rounds N]

It starts configs/aggregated.yaml and configs/quickstart.yaml as they are, and loads one at a time. A round sends one
new random prompt to both, the same again to the disaggregated one, whose decode worker now holds its prefix, and
copies as many bytes as were transferred from one warm buffer to another. vLLM's counters of the decode worker have
to show that the prompt's KV was transferred, or found, and not computed. The machine is not asked to be idle: what
else it did is recorded beside each round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, Answered, BenchmarkError, Deployment, grown, prompt_sources, serve
from benchmarks.report import Bar

PROMPT_TOKENS = 1000
VOCABULARY = 49_152  # SmolLM2
SPECIAL = 17  # its first ids are control tokens
WARM_UP = 2
COPIES = 5  # in each round
DECODE_WORKER = "decode-0"


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds, each for a prompt of `PROMPT_TOKENS`."""

    aggregated_s: float
    cold_s: float
    hit_s: float
    hit_tokens: int
    transferred_tokens: int
    other_cores: float
    trace_id: str  # of the cold request


@dataclass(frozen=True, slots=True)
class Transfer:
    """The KV transfer of one round, and a copy of the same bytes."""

    bytes: int
    pieces: int
    seconds: float  # from the first piece's arrival until the last piece is in the decode worker's blocks
    prefill_s: float  # the prefill worker's whole part: compute and push
    memcpy_s: float


class MainJob:
    """Both deployments under the same prompts."""

    def __init__(self, aggregated: Deployment, apart: Deployment) -> None:
        self._aggregated, self._apart = aggregated, apart
        self._decode_metrics = apart.metrics_urls()[DECODE_WORKER]
        self._numbers = random.Random(time.time_ns())  # new prompts in every run; nothing may be cached
        self._load = report.OtherLoad()

    def round(self, turn: int) -> Round:
        prompt = [self._numbers.randrange(SPECIAL, VOCABULARY) for _ in range(PROMPT_TOKENS)]
        self._load.cores()
        if turn % 2:
            aggregated, (cold, moved) = self._aggregated.complete(prompt), self._sourced(prompt)
        else:
            (cold, moved), aggregated = self._sourced(prompt), self._aggregated.complete(prompt)
        hit, found = self._sourced(prompt)
        if aggregated.cached_tokens or moved["local_cache_hit"]:
            raise BenchmarkError("a new prompt was in a cache")
        transferred = int(moved["external_kv_transfer"])
        if transferred < PROMPT_TOKENS - 1:
            raise BenchmarkError(f"the prompt was not transferred: {moved}")
        if found["external_kv_transfer"] or found["local_cache_hit"] != hit.cached_tokens or not hit.cached_tokens:
            raise BenchmarkError(f"the repeated prompt was no prefix hit of {hit.cached_tokens} tokens: {found}")
        return Round(
            aggregated.ttft_s, cold.ttft_s, hit.ttft_s, hit.cached_tokens, transferred,
            self._load.cores(), cold.trace_id,
        )  # fmt: skip

    def _sourced(self, prompt: Sequence[int]) -> tuple[Answered, dict[str, float]]:
        """The disaggregated deployment's answer, and where its decode worker had the prompt's KV from."""
        before = prompt_sources(self._decode_metrics)
        answered = self._apart.complete(prompt)
        return answered, grown(self._decode_metrics, before, PROMPT_TOKENS)

    def transfers(self, rounds: Sequence[Round], memcpy_s: Sequence[float]) -> list[Transfer]:
        trace_ids = [one.trace_id for one in rounds]
        moves, prefills = self._apart.spans("kv.transfer", trace_ids), self._apart.spans("prefill", trace_ids)
        return [
            Transfer(
                move["attributes"]["bytes"], move["attributes"]["pieces"], move["attributes"]["seconds"],
                (prefill["end_ns"] - prefill["start_ns"]) / 1e9, copied,
            )
            for move, prefill, copied in zip(moves, prefills, memcpy_s, strict=True)
        ]  # fmt: skip

    def transfer_bytes(self, first: Round) -> int:
        (span,) = self._apart.spans("kv.transfer", [first.trace_id])
        return int(span["attributes"]["bytes"])


class Memcpy:
    """Copies between two buffers whose pages are there and whose first copies are over."""

    def __init__(self, size: int) -> None:
        self._source, self._target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        self.seconds()

    def seconds(self) -> float:
        """Median of a few copies."""
        times = []
        for _ in range(COPIES):
            started = time.perf_counter()
            np.copyto(self._target, self._source)
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def start(folder: Path, console: Console, stack: ExitStack) -> tuple[Deployment, Deployment, list[float]]:
    """Both deployments, one after the other; and what each start of the disaggregated one took.

    The first start may have to convert the model; the second finds everything done and is the one that has a bar.
    """
    quickstart = ROOT / "configs" / "quickstart.yaml"
    with console.status("starting the disaggregated deployment"), serve(quickstart, folder / "first") as first:
        ready_s = [first.ready_s]
    with console.status("starting the disaggregated deployment a second time"):
        apart = stack.enter_context(serve(quickstart, folder / "apart"))
    ready_s.append(apart.ready_s)
    with console.status("starting the aggregated deployment"):
        aggregated = stack.enter_context(serve(ROOT / "configs" / "aggregated.yaml", folder / "aggregated"))
    return aggregated, apart, ready_s


def measure(job: MainJob, count: int, console: Console) -> tuple[list[Round], list[Transfer]]:
    rounds, memcpy_s = [], []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rounds", total=WARM_UP + count)
        for turn in range(WARM_UP):
            warm = job.round(turn)
            progress.advance(bar)
        memcpy = Memcpy(job.transfer_bytes(warm))
        for turn in range(count):
            rounds.append(job.round(turn))
            memcpy_s.append(memcpy.seconds())
            progress.advance(bar)
    return rounds, job.transfers(rounds, memcpy_s)


def bars_of(rounds: Sequence[Round], transfers: Sequence[Transfer], second_start_s: float) -> list[Bar]:
    """Ratios are medians of the rounds' ratios: what else the machine did hits both sides of each alike."""
    middle = statistics.median
    return [
        Bar.of("TTFT, aggregated", middle(one.aggregated_s for one in rounds) * 1e3, "ms"),
        Bar.of("TTFT, disaggregated", middle(one.cold_s for one in rounds) * 1e3, "ms"),
        Bar.of("TTFT, prefix hit", middle(one.hit_s for one in rounds) * 1e3, "ms"),
        Bar.of("disaggregated / aggregated", middle(one.cold_s / one.aggregated_s for one in rounds), "×"),
        Bar.of("prefix hit / aggregated", middle(one.hit_s / one.aggregated_s for one in rounds), "×"),
        Bar.of("KV transfer", middle(one.bytes / one.seconds for one in transfers) / 1e9, "GB/s"),
        Bar.of("memcpy of the same bytes", middle(one.bytes / one.memcpy_s for one in transfers) / 1e9, "GB/s"),
        Bar.of("KV transfer / memcpy", middle(one.memcpy_s / one.seconds for one in transfers), "×"),
        Bar.of("KV transfer, from first piece to last", middle(one.seconds for one in transfers) * 1e3, "ms"),
        Bar.of("second start until ready", second_start_s, "s", "<= 40"),
    ]


def raw_of(rounds: Sequence[Round], transfers: Sequence[Transfer], ready_s: Sequence[float]) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "ready_s": {"disaggregated": list(ready_s)},
        "other_cores_busy": report.spread([one.other_cores for one in rounds]),
        "rounds": [
            {key: value for key, value in asdict(one).items() if key != "trace_id"} | {"transfer": asdict(transfer)}
            for one, transfer in zip(rounds, transfers, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    console = Console(stderr=True)
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-") as folder, ExitStack() as stack:
        aggregated, apart, ready_s = start(Path(folder), console, stack)
        rounds, transfers = measure(MainJob(aggregated, apart), options.rounds, console)
    bars = bars_of(rounds, transfers, ready_s[-1])
    raw = raw_of(rounds, transfers, ready_s)
    busy = raw["other_cores_busy"]["median"]
    report.show(f"{PROMPT_TOKENS:,}-token prompt, {len(rounds)} rounds, other load {busy:.2f} cores", bars, Console())
    if options.json:
        report.write(options.json, machine, bars, raw)


if __name__ == "__main__":
    main()
