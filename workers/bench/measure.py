"""What is measured between a pair of processes: samples by name, in interleaved rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workers.bench.pair import BenchError, Pair
from workers.bench.protocol import KvShape, OpenMover

WARM_UP = 2  # rounds: the first push connects, and pages are touched
TINY, TINIES = 4096, 500
SINGLES = 20  # transfers of one block, in each round
IN_FLIGHT = 4
SCATTERED_BLOCKS = 2048


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is moved, in bytes, and through which staging."""

    total: int
    piece: int
    staging: int
    window: int  # pieces in flight

    @property
    def whole(self) -> KvShape:
        """Llama-3.1-8B's: 32 layers, a block of 16 tokens is 2 MiB."""
        kv = KvShape(layers=32, blocks=1, tokens=16, heads=8, values=128)
        return KvShape(kv.layers, max(2, self.total // kv.block_bytes), kv.tokens, kv.heads, kv.values)

    @property
    def scattered(self) -> KvShape:
        """Blocks of 32 KiB; half of them are moved."""
        kv = KvShape(layers=1, blocks=1, tokens=16, heads=4, values=128)
        moved = max(2, min(SCATTERED_BLOCKS, self.total // kv.block_bytes))
        return KvShape(kv.layers, 2 * moved, kv.tokens, kv.heads, kv.values)


@dataclass(slots=True)
class Samples:
    """One figure's, a value per round."""

    name: str
    bytes: int  # that each moved; 0 where that is not the point
    run: Callable[[], float]  # seconds
    seconds: list[float] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Bytes a second."""
        return [self.bytes / one for one in self.seconds]


class Movers:
    """KV through the movers of a pair; where it lies is shuffled on both sides."""

    def __init__(self, pair: Pair, case: str, kv: KvShape, moved: int, sizes: Sizes) -> None:
        self._pair, self._case, self._kv = pair, case, kv
        self.path, self.bytes = "", moved * kv.block_bytes
        pair.open_mover(OpenMover(case, pair.wires, kv, sizes.staging, sizes.piece, sizes.window))
        numbers = random.Random(case)  # the same in every run  # noqa: S311
        self._sent, self._received = (numbers.sample(range(kv.blocks), moved) for _ in range(2))

    def all(self) -> float:
        moved = self._pair.move(self._case, self._sent, self._received)
        self.path = moved.path
        return moved.seconds

    def one(self) -> float:
        return statistics.median(
            self._pair.move(self._case, self._sent[:1], self._received[:1]).seconds for _ in range(SINGLES)
        )

    def compare(self) -> None:
        """Raises BenchError unless everything arrived where it should."""
        self._pair.compare(self._case, self._sent, self._received)


def raw(pair: Pair, sizes: Sizes, with_socket: bool) -> dict[str, Samples]:
    """The limits, in the same processes."""
    found = {"memcpy": Samples("memcpy", sizes.total, lambda: pair.copy(sizes.total))}
    if with_socket:
        pair.connect()
        found["socket"] = Samples("socket", sizes.total, lambda: pair.stream(sizes.total))
    return found


@dataclass(slots=True)
class PathSamples:
    """All that is measured of one path."""

    pair: Pair
    movers: dict[str, Movers]
    samples: dict[str, Samples]
    idle: float = 0.0  # share of one core

    @property
    def path(self) -> str:
        return next(iter(self.movers.values())).path


def of_path(pair: Pair, sizes: Sizes) -> PathSamples:
    kv, small = sizes.whole, sizes.scattered
    movers = {
        "pieces": Movers(pair, "pieces", kv, kv.blocks, sizes),
        "scattered": Movers(pair, "scattered", small, small.blocks // 2, sizes),
    }
    samples = {name: Samples(name, mover.bytes, mover.all) for name, mover in movers.items()}
    samples["one block"] = Samples("one block", 0, movers["scattered"].one)
    pair.open_engine(sizes.total)
    piece = min(sizes.piece, sizes.total)
    count = sizes.total // piece
    samples["writes"] = Samples("writes", count * piece, lambda: pair.write(count, piece, IN_FLIGHT)[0])
    samples["one write"] = Samples("one write", sizes.total, lambda: pair.write(1, sizes.total, 1)[0])
    samples["tiny"] = Samples("tiny", 0, lambda: statistics.median(pair.write(TINIES, TINY, 1)[1]))
    return PathSamples(pair, movers, samples)


def measure(limits: Sequence[Samples], paths: Sequence[PathSamples], rounds: int, advance: Callable[[], None]) -> None:
    """Interleaved: what else the machine does meets all alike."""
    everything = [*limits, *(one for path in paths for one in path.samples.values())]
    for turn in range(WARM_UP + rounds):
        for samples in everything:
            seconds = samples.run()
            if turn >= WARM_UP:
                samples.seconds.append(seconds)
            advance()
    for path in paths:
        for mover in path.movers.values():
            mover.compare()


__all__ = ["BenchError", "PathSamples", "Samples", "Sizes", "measure", "of_path", "raw"]
