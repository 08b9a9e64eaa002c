"""What it saves to take a prefix from another worker that holds it, beside computing it.

    .venv/bin/python benchmarks/pull.py [--json FILE] [--prompts N]

It serves configs/aggregated.yaml with two workers, and requests that go to the idle one whatever the other one holds.
A new prompt goes to one of the two, which computes it; once the router knows, the same prompt goes to the other, which
has to pull it (its trace must say so). The machine is not asked to be idle: what else it did is recorded.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, SPANS_S, BenchmarkError, Deployment, serve
from benchmarks.report import Bar

PROMPT_TOKENS = 1000
BLOCK = 32  # tokens
VOCABULARY = 49_152  # SmolLM2
SPECIAL = 17  # its first ids are control tokens
INDEX = "dynamo_lite_router_index_blocks "
ATTEMPTS = 4  # at having the other worker of two equally idle ones


@dataclass(frozen=True, slots=True)
class Prefix:
    """Seconds to the first token of one prompt, and what was predicted where there was something to go by."""

    computed_s: float
    pulled_s: float
    transfer_s: float  # of the pull, from its first piece to its last
    bytes: int
    predicted_pull_s: float | None
    predicted_compute_s: float | None
    other_cores: float


class Pulls:
    """Two workers under the same prompts."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._numbers = random.Random(time.time_ns())  # new prompts in every run; nothing may be cached
        self._load = report.OtherLoad()

    def prefix(self) -> Prefix:
        """Raises BenchmarkError when the second worker does not pull."""
        for _ in range(ATTEMPTS):
            prompt = [self._numbers.randrange(SPECIAL, VOCABULARY) for _ in range(PROMPT_TOKENS)]
            before = self._indexed()
            self._load.cores()
            computed = self._deployment.complete(prompt)
            self._until_indexed(before + PROMPT_TOKENS // BLOCK)
            pulled = self._deployment.complete(prompt)
            self._deployment.complete(prompt[:1])  # workers take turns: next time each has the other part
            if pulled.cached_tokens:
                continue  # it went to the same worker
            decode, transfer = self._span("decode", pulled.trace_id), self._span("kv.transfer", pulled.trace_id)
            if decode["reason"] != "pulled":
                raise BenchmarkError(f"the prompt was to be pulled; its trace says {decode['reason']!r}")
            return Prefix(
                computed.ttft_s, pulled.ttft_s, transfer["seconds"], transfer["bytes"],
                decode.get("predicted_pull_s"), decode.get("predicted_compute_s"), self._load.cores(),
            )  # fmt: skip
        raise BenchmarkError("both requests always went to the same worker")

    def _span(self, name: str, trace_id: str) -> dict[str, Any]:
        (span,) = self._deployment.spans(name, [trace_id])
        attributes: dict[str, Any] = span["attributes"]
        return attributes

    def _indexed(self) -> float:
        with urllib.request.urlopen(f"{self._deployment.run['frontend']}/metrics", timeout=10) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return next(float(line.removeprefix(INDEX)) for line in lines if line.startswith(INDEX))

    def _until_indexed(self, blocks: float) -> None:
        deadline = time.monotonic() + SPANS_S
        while self._indexed() < blocks:
            if time.monotonic() > deadline:
                raise BenchmarkError("the router was not told of the prompt's blocks")
            time.sleep(0.05)


def configuration(folder: Path) -> Path:
    content = yaml.safe_load((ROOT / "configs" / "aggregated.yaml").read_text(encoding="utf-8"))
    content["workers"]["both"]["count"] = 2
    content["router"] = {"mode": "round_robin"}
    file = folder / "pair.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def bars_of(prefixes: Sequence[Prefix]) -> list[Bar]:
    """Ratios are medians of each pair's ratio: what else the machine did hits both sides of it alike."""
    middle = statistics.median
    predicted = [one for one in prefixes if one.predicted_pull_s is not None]
    return [
        Bar.of("TTFT, computed", middle(one.computed_s for one in prefixes) * 1e3, "ms"),
        Bar.of("TTFT, pulled", middle(one.pulled_s for one in prefixes) * 1e3, "ms"),
        Bar.of("from its first piece to its last", middle(one.transfer_s for one in prefixes) * 1e3, "ms"),
        Bar.of("pulled / computed", middle(one.pulled_s / one.computed_s for one in prefixes), "×", "<= 1"),
        Bar.of("pulled / predicted", middle(one.pulled_s / (one.predicted_pull_s or 1.0) for one in predicted), "×"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=12, help="at least 3")
    options = parser.parse_args()
    console = Console(stderr=True)
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-") as folder:
        file = configuration(Path(folder))
        with console.status("starting two workers"):
            served = serve(file, Path(folder) / "pair")
        with served as deployment:
            pulls = Pulls(deployment)
            pulls.prefix()  # each way has been gone once
            numbers = track(range(options.prompts), "prompts", console=console, transient=True)
            prefixes = [pulls.prefix() for _ in numbers]
    bars = bars_of(prefixes)
    busy = report.spread([one.other_cores for one in prefixes])
    raw = {
        "prompt_tokens": PROMPT_TOKENS,
        "other_cores_busy": busy,
        "prefixes": [asdict(one) for one in prefixes],
    }
    report.show(
        f"{PROMPT_TOKENS:,}-token prefixes of another worker, other load {busy['median']:.2f} cores", bars, Console()
    )
    if options.json:
        report.write(options.json, machine, bars, raw)


if __name__ == "__main__":
    main()
