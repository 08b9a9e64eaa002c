"""How fast KV moves between two processes of this host, beside what the machine could do in the same minute.

Two processes, with the workers' own movers and transfer engine, move KV from one's memory to the other's, gather and
scatter included; the same two processes copy memory and stream through a plain TCP socket. Rounds are interleaved,
figures are medians, and ratios are medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress

from dynamo_lite.config import Config, parse_bytes
from dynamo_lite.rdma import rdma_ports
from dynamo_lite.transfer_plan import Device, TransferPlan
from dynamo_lite.transports import Transport, usable_ports
from workers.bench import report
from workers.bench.measure import TINIES, PathSamples, Samples, Sizes, measure, of_path, raw
from workers.bench.pair import BenchError, started
from workers.bench.protocol import Wires
from workers.bench.report import Bar

_EPILOG = """examples:
  dynamo-lite bench transfer                         shared memory and TCP, 256 MiB, on the CPU
  dynamo-lite bench transfer --path tcp --size 64MiB --json tcp.json
  dynamo-lite bench transfer --device cuda           512 MiB from GPU memory to GPU memory, two processes on one GPU
  dynamo-lite bench transfer --device cuda --gpus 0,1    the same from one GPU to another

UCX_* variables of your environment win over the settings of a path.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    paths: tuple[Transport, ...]
    device: Device
    gpus: tuple[str, str] | None  # of sender and receiver; None: what both see first
    sizes: Sizes
    rounds: int
    idle_s: float
    timeout_s: float
    json: Path | None


def options_of(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        "dynamo-lite bench transfer", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--path", action="append", choices=get_args(Transport), help="repeat for several; default: auto and tcp")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the KV lies (default: cpu)")
    add("--gpus", type=_gpus, metavar="SENDER,RECEIVER", help="the GPU of each, as CUDA_VISIBLE_DEVICES calls it")
    add("--size", type=_size, help="bytes of KV (default: 256MiB, on CUDA 512MiB)")
    add("--piece", type=_size, help="bytes of a piece (default: 2MiB, on CUDA 64MiB)")
    add("--window", type=int, default=4, help="pieces in flight (default: 4)")
    add("--rounds", type=int, default=9, help="how often everything is measured (default: 9)")
    add("--idle", type=float, default=5.0, metavar="SECONDS", help="how long the idle pair is watched (default: 5)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="longest wait for one step (default: 60)")
    add("--json", type=Path, metavar="FILE", help="write machine, figures and every sample there")
    given = parser.parse_args(arguments)
    cuda = given.device == "cuda"
    size = given.size or (512 if cuda else 256) * 2**20
    piece = given.piece or (64 if cuda else 2) * 2**20  # on CUDA what workers use
    sizes = Sizes(size, piece, max(64 * 2**20, 2 * given.window * piece), given.window)
    paths = tuple(dict.fromkeys(given.path or (("auto",) if cuda else ("auto", "tcp"))))
    if given.gpus and not cuda:
        parser.error("--gpus needs --device cuda")
    return Options(paths, given.device, given.gpus, sizes, given.rounds, given.idle, given.timeout, given.json)


def _gpus(text: str) -> tuple[str, str]:
    match text.split(","):
        case [str(sender), str(receiver)] if sender and receiver:
            return sender, receiver
    raise argparse.ArgumentTypeError(f"'{text}' does not name two GPUs")


def _size(text: str) -> int:
    size = parse_bytes(text)
    if not isinstance(size, int) or size < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size")
    return size


def wires_of(path: Transport, device: Device) -> tuple[Wires, Mapping[str, str]]:
    """And the UCX settings that `serve` would give to workers with this transport. Raises BenchError."""
    ports = rdma_ports()
    plan = TransferPlan(Config.model_validate({"kv_transfer": {"transport": path}}), ports)
    for problem in plan.problems({"prefill": device, "decode": device}):
        raise BenchError(f"--path {path}: {problem}")
    return Wires(path, device, next(iter(usable_ports(path, ports, None)), None)), plan.environment(device)


def run(options: Options, console: Console) -> tuple[list[Bar], dict[str, Any]]:
    load = report.OtherLoad()
    with ExitStack() as stack:
        paths: dict[Transport, PathSamples] = {}
        with console.status("starting the processes"):
            for path in options.paths:
                pair = stack.enter_context(started(*wires_of(path, options.device), options.timeout_s, options.gpus))
                paths[path] = of_path(pair, options.sizes)
            limits = raw(next(iter(paths.values())).pair, options.sizes, "tcp" in paths)
        progress = stack.enter_context(Progress(console=console, transient=True))
        steps = len(limits) + sum(len(path.samples) for path in paths.values())
        task = progress.add_task("measuring", total=(options.rounds + 2) * steps + len(paths))
        measure(list(limits.values()), list(paths.values()), options.rounds, lambda: progress.advance(task))
        for one in paths.values():
            one.idle = one.pair.idle(options.idle_s)
            progress.advance(task)
        other = load.cores()  # while the processes still run, or their time would count as that of others
    return bars_of(limits, paths, options.device), raw_of(limits, paths, options, other)


def _median(samples: Samples, scale: float) -> float:
    return statistics.median(samples.seconds) * scale


def _ratio(samples: Samples, limit: Samples) -> float:
    """Of the rates, round by round."""
    return statistics.median(mine / theirs for mine, theirs in zip(samples.rates(), limit.rates(), strict=True))


def bars_of(limits: Mapping[str, Samples], paths: Mapping[Transport, PathSamples], device: Device) -> list[Bar]:
    memcpy, socket = limits["memcpy"], limits.get("socket")
    copied = "device copy" if device == "cuda" else "memcpy"
    bars = [Bar.of(f"{copied}, one process", statistics.median(memcpy.rates()) / 1e9, "GB/s")]
    if socket is not None:
        bars.append(Bar.of("plain TCP socket", statistics.median(socket.rates()) / 1e9, "GB/s"))
    for asked, path in paths.items():
        name = asked if asked == path.path else f"{asked} ({path.path})"
        pieces, scattered = path.samples["pieces"], path.samples["scattered"]
        bar = ">= 0.6" if path.path == "shm" else None
        bars.append(Bar.of(f"{name}: KV in pieces", statistics.median(pieces.rates()) / 1e9, "GB/s"))
        bars.append(Bar.of(f"{name}: KV in pieces / {copied}", _ratio(pieces, memcpy), "×", bar))
        bars.append(Bar.of(f"{name}: scattered blocks", statistics.median(scattered.rates()) / 1e9, "GB/s"))
        bars.append(Bar.of(f"{name}: scattered blocks / {copied}", _ratio(scattered, memcpy), "×", bar))
        if device == "cuda":
            bars.append(Bar.of(f"{name}: {pieces.bytes >> 20} MiB of KV", _median(pieces, 1e3), "ms", "<= 5"))
        bars += _of_engine(name, path, socket)
    return bars


def _of_engine(name: str, path: PathSamples, socket: Samples | None) -> list[Bar]:
    found = []
    for key in ("writes", "one write"):
        samples = path.samples[key]
        found.append(Bar.of(f"{name}: engine, {key}", statistics.median(samples.rates()) / 1e9, "GB/s"))
        if socket is not None and path.path == "tcp":
            found.append(Bar.of(f"{name}: engine, {key} / socket", _ratio(samples, socket), "×", ">= 0.9"))
    found.append(Bar.of(f"{name}: engine, a write of 4 KiB", _median(path.samples["tiny"], 1e6), "µs", "<= 100"))
    found.append(Bar.of(f"{name}: movers, one block", _median(path.samples["one block"], 1e6), "µs"))
    found.append(Bar.of(f"{name}: idle pair", path.idle * 100, "% of a core", "<= 1"))
    return found


def raw_of(
    limits: Mapping[str, Samples], paths: Mapping[Transport, PathSamples], options: Options, other: float
) -> dict[str, Any]:
    def told(samples: Mapping[str, Samples]) -> dict[str, object]:
        return {name: {"bytes": one.bytes, "seconds": one.seconds} for name, one in samples.items()}

    return {
        "device": options.device,
        "gpus": options.gpus,
        "sizes": asdict(options.sizes),
        "rounds": options.rounds,
        "tiny_writes": TINIES,
        "other_cores_busy": other,
        "limits": told(limits),
        "paths": {
            asked: {"path": path.path, "idle_share": path.idle, "samples": told(path.samples)}
            for asked, path in paths.items()
        },
    }


def main() -> None:
    options, console = options_of(sys.argv[1:]), Console(stderr=True)
    machine = report.machine()
    try:
        bars, samples = run(options, console)
    except BenchError as error:
        sys.exit(f"Error: {error}")
    size = options.sizes.total >> 20
    title = f"{size} MiB, {options.rounds} rounds, other load {samples['other_cores_busy']:.2f} cores"
    report.show(title, bars, Console())
    if options.json:
        report.write(options.json, machine, bars, samples)


if __name__ == "__main__":
    main()
