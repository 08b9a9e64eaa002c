"""What the benchmarks share: see `workers.bench.report`."""

from workers.bench.report import Bar, OtherLoad, machine, show, spread, write

__all__ = ["Bar", "OtherLoad", "machine", "show", "spread", "write"]
