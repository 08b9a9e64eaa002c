"""What the benchmarks share: figures against bars, for people as a table and for programs as one JSON file.

It needs neither psutil nor torch, so that it also runs where only the transfer engine does.

The file holds `{"machine": {...}, "bars": [{"name", "value", "unit", "bar", "holds"}], "raw": ...}`. A figure
without a bar is reported all the same, with `bar` and `holds` null.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

_TICKS_S = os.sysconf("SC_CLK_TCK")
_COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure, and what it has to be."""

    name: str
    value: float
    unit: str
    bar: str | None = None  # "<= 40"
    holds: bool | None = None

    @classmethod
    def of(cls, name: str, value: float, unit: str, bar: str | None = None) -> Self:
        """`bar` is "<= LIMIT", ">= LIMIT", or None for a figure that is only reported."""
        if bar is None:
            return cls(name, value, unit)
        sign, _, limit = bar.partition(" ")
        return cls(name, value, unit, bar, bool(_COMPARE[sign](value, float(limit))))


def spread(values: Sequence[float]) -> dict[str, float]:
    """What is told of a figure that was measured several times."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def machine() -> dict[str, object]:
    """Neither names nor paths of the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


class OtherLoad:
    """How many cores were busy with what is not this benchmark: all of the machine but this process and its children.

    Processes that end within a measurement are missed, so it is told too much then, never too little.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """Since the last call, on average."""
        before, self._start = self._start, self._now()
        elapsed, busy, own = (now - then for now, then in zip(self._start, before, strict=True))
        return max(0.0, busy - own) / elapsed * (os.cpu_count() or 1) if elapsed > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all cores together, of these busy, of these ours."""
        first = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
        user, nice, system, idle, iowait, irq, softirq, steal = (int(ticks) for ticks in first.split()[1:9])
        busy = user + nice + system + irq + softirq + steal
        return (busy + idle + iowait) / _TICKS_S, busy / _TICKS_S, _own_ticks() / _TICKS_S


def _own_ticks() -> int:
    """Processor time of this process and of everything it has started, directly or not, that still runs."""
    children: dict[int, list[int]] = {}
    spent: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(file.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        spent[pid] = int(fields[11]) + int(fields[12])
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        total += spent.get(pid, 0)
        todo += children.get(pid, [])
    return total


def show(title: str, bars: Sequence[Bar], console: Console) -> None:
    """The table for people."""
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("bar")
    table.add_column("")
    for bar in bars:
        verdict = "" if bar.holds is None else "[green]holds[/]" if bar.holds else "[red]MISSED[/]"
        table.add_row(bar.name, f"{bar.value:,.{_digits(bar.value)}f}", bar.unit, bar.bar or "", verdict)
    console.print(table)


def write(file: Path, machine: dict[str, object], bars: Sequence[Bar], raw: Any) -> None:
    """The file for programs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "bars": [asdict(bar) for bar in bars], "raw": raw}
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _digits(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3
