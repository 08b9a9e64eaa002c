"""`dynamo-lite simulate`: from its options to what it prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError, TraceError
from workers.simulate import plot, text
from workers.simulate.figures import Slo
from workers.simulate.fleet import Load
from workers.simulate.runs import Run, runs, variants
from workers.simulate.settings import POLICIES, Split
from workers.simulate.synthetic import Synthetic, generate
from workers.simulate.trace import BLOCK, Request, attainable, read_trace, write_trace


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. Of `trace` and `synthetic` one is given."""

    trace: Path | None
    synthetic: str | None
    block: int = BLOCK  # tokens that a hash id stands for
    policies: tuple[str, ...] = ()  # none: the configuration's
    compare: bool = False  # all there are
    splits: tuple[str, ...] = ()  # none: the configuration's
    speed: float = 1.0
    seed: int = 0
    ttft_ms: float = 2000.0
    itl_ms: float = 50.0
    json: Path | None = None
    plot: Path | None = None
    write_trace: Path | None = None


def run(config: Config, kv_bytes: int | None, options: Options, out: Console, progress_on: Console) -> None:
    """`kv_bytes`: of a token, where known. Raises ConfigError, TraceError."""
    policies, splits = chosen_policies(config, options), chosen_splits(config, options)
    if kv_bytes is None and config.kv_tiers.host is not None:
        raise ConfigError(
            "sim.kv_bytes_per_token is not set, and the model is not here to ask how much the tiers hold",
            key="sim.kv_bytes_per_token",
        )
    requests = _requests(options)
    slo = Slo(options.ttft_ms / 1e3, options.itl_ms / 1e3)
    load = Load(requests, options.block, slo, options.speed, options.seed)
    done: list[Run] = []
    every = variants(policies, splits)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_on, transient=True) as progress:
        task = progress.add_task("simulating", total=len(every) * len(requests))
        for one in runs(config, kv_bytes or 1, load, every, lambda count: progress.update(task, completed=count)):
            done.append(one)
            progress.console.print(f"{one.name}: {one.figures.duration_s:,.0f} s simulated in {one.cpu_s:.1f} s")
    out.print(text.table(done))
    most = attainable(requests, options.block)
    for note in text.notes(done, slo, most):
        out.print(note)
    _write(options, done, load, most)


def _requests(options: Options) -> Sequence[Request]:
    if options.trace is not None:
        return read_trace(options.trace, options.block)
    requests = generate(Synthetic.parse(options.synthetic or ""), options.block, options.seed)
    if options.write_trace is not None:
        write_trace(options.write_trace, requests)
    return requests


def chosen_policies(config: Config, options: Options) -> list[str]:
    """Raises ConfigError."""
    if options.compare:
        return list(POLICIES)
    for name in options.policies:
        if name not in POLICIES:
            raise ConfigError(f"there are {', '.join(POLICIES)}", file=f"--policy {name}")
    return list(options.policies) or [config.router.mode]


def chosen_splits(config: Config, options: Options) -> list[Split]:
    """Raises ConfigError."""
    return [Split.parse(text) for text in options.splits] or [Split.of(config.workers)]


def _write(options: Options, done: Sequence[Run], load: Load, most: float) -> None:
    content = {
        "load": {
            "trace": options.trace and options.trace.name, "synthetic": options.synthetic, "block": load.block,
            "requests": len(load.requests), "speed": load.speed, "seed": load.seed,
            "attainable_hit_rate": most,
        },
        "slo": asdict(load.slo),
        "runs": [one.data() for one in done],
    }  # fmt: skip
    try:
        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
        if options.plot is not None:
            options.plot.write_text(plot.draw(done), encoding="utf-8")
    except OSError as error:
        raise TraceError(str(error.filename), 0, error.strerror or str(error)) from error
