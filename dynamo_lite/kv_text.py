"""What the `kv` commands print: tables for people, JSON for programs, and how far a long one has come."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TextIO

import msgspec
from rich.console import Console
from rich.table import Table

from dynamo_lite.kv_client import Failure, Worker
from dynamo_lite.plane.kv_wire import KvTier, KvTiers

_QUIET_S = 2.0  # what takes no longer says nothing of how far it is
_LINE_S, _REDRAW_S = 10.0, 0.25  # between lines where nobody watches a terminal; between changes of the line on one
_WIDE = 200  # columns, where no terminal has a width


@dataclass(slots=True)
class Verdict:
    """What verifying one tier has shown."""

    worker: str
    tier: str
    right: int = 0
    corrupt: int = 0
    gone: int = 0  # evicted, deleted or replaced meanwhile
    whole: bool = False  # all of it was gone through


@dataclass(frozen=True, slots=True)
class Purged:
    """What was dropped of one tier."""

    worker: str
    tier: str
    blocks: int


class Meter:
    """How far a command has come, on stderr: one line that changes, or one line every 10 s."""

    def __init__(self, out: TextIO) -> None:
        self.text = ""
        self._out, self._live = out, out.isatty()
        self._drawn = False

    async def draw(self) -> NoReturn:
        await asyncio.sleep(_QUIET_S)
        began = time.monotonic() - _QUIET_S
        while True:
            line = f"{time.monotonic() - began:5.0f} s  {self.text}"
            print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=self._out, flush=True)
            self._drawn = True
            await asyncio.sleep(_REDRAW_S if self._live else _LINE_S)

    def close(self) -> None:
        """The line makes room for the result."""
        if self._live and self._drawn:
            print("\r\x1b[K", end="", file=self._out, flush=True)


def size(count: float) -> str:
    """Bytes, in three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def number(count: int) -> str:
    return f"{count:,}"


# ---- tables ----

_COUNTS = ("hits", "misses", "offloaded", "onboarded", "evicted", "missed", "corrupt", "waiting")


def print_stats(stats: Mapping[Worker, KvTiers]) -> None:
    table = _table("worker", "tier", "", numbers=("used", "size", "blocks", *_COUNTS))
    for worker, told in stats.items():
        each = worker.block_bytes
        used, total = size(told.device_used * each), size(told.device_total * each)
        none = [""] * len(_COUNTS)
        table.add_row(worker.label, "device", "", used, total, number(told.device_cached), *none)
        for tier in told.tiers:
            table.add_row("", tier.tier.value, "" if tier.on else "off", *_numbers(tier))
    _print(table)


def _numbers(tier: KvTier) -> list[str]:
    limit = size(tier.size_bytes) if tier.size_bytes else "–"
    return [size(tier.used_bytes), limit, *(number(getattr(tier, name)) for name in ("blocks", *_COUNTS))]


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    table = _table("worker", "tier", "", numbers=("right", "corrupt", "gone"))
    for one in verdicts:
        state = "" if one.whole else "not all"
        table.add_row(one.worker, one.tier, state, number(one.right), number(one.corrupt), number(one.gone))
    _print(table)


def print_purged(purged: Sequence[Purged]) -> None:
    table = _table("worker", "tier", numbers=("dropped",))
    for one in purged:
        table.add_row(one.worker, one.tier, number(one.blocks))
    _print(table)


def _table(*texts: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


# ---- JSON ----


def stats_json(stats: Mapping[Worker, KvTiers], failures: Sequence[Failure]) -> str:
    workers = [
        {
            "name": worker.record.name,
            "host": worker.record.host,
            "role": worker.record.role.value,
            "device": {
                "used_blocks": told.device_used,
                "cached_blocks": told.device_cached,
                "total_blocks": told.device_total,
                "block_bytes": worker.block_bytes,
            },
            "tiers": msgspec.to_builtins(told.tiers),
        }
        for worker, told in stats.items()
    ]
    return as_json({"workers": workers}, failures)


def as_json(what: Mapping[str, Any], failures: Sequence[Failure]) -> str:
    return json.dumps({**what, "failed": [asdict(failure) for failure in failures]}, indent=1)
