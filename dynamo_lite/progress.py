"""The live list of parts while a deployment starts; plain lines where nobody watches a terminal."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NoReturn, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynamo_lite.status import Phase

REFRESH_S = 0.2
MARKS = {"ready": ("✓", "green"), "failed": ("✗", "red"), "draining": ("↓", "yellow")}
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


@dataclass(slots=True)
class Part:
    """How far one part has come."""

    phase: Phase = "starting"
    detail: str = ""
    since: float | None = None  # None until it is started
    took: float | None = None  # seconds to ready or to failure

    @property
    def seconds(self) -> float:
        if self.took is not None:
            return self.took
        return time.monotonic() - self.since if self.since is not None else 0.0


class Progress:
    """Where the parts of the deployment stand, shown on `out`. Draws from the event loop, without a thread."""

    def __init__(self, out: TextIO) -> None:
        self.parts: dict[str, Part] = {}
        self._console = Console(file=out, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._table)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The list stays as it is; from here on what happens is told in lines."""
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None

    async def draw(self) -> NoReturn:
        """Keeps the seconds running."""
        while True:
            self._refresh()
            await asyncio.sleep(REFRESH_S)

    def expect(self, *names: str) -> None:
        """Show parts that start later."""
        for name in names:
            self.parts.setdefault(name, Part())
        self._refresh()

    def phase(self, name: str, phase: Phase, detail: str = "") -> None:
        """A part has come to `phase`."""
        part = self.parts.get(name)
        if part is None or part.since is None or (phase == "starting" and part.took is not None):
            part = self.parts[name] = Part(since=time.monotonic())
        if phase in ("ready", "failed") and part.took is None:
            part.took = part.seconds
        part.phase, part.detail = phase, detail
        if self._live is None:
            self._print(f"{name}: {phase}" + (f" ({part.seconds:.1f} s)" if phase == "ready" else ""), detail)
        self._refresh()

    def note(self, sentence: str) -> None:
        """Something worth telling that is no part's phase."""
        self._print(sentence, "")

    def _print(self, text: str, detail: str) -> None:
        stamp = f"{self.seconds:7.1f} s  "
        self._console.print(Text(stamp + text + (f": {detail}" if detail else "")))

    def _refresh(self) -> None:
        if self._live is not None and self._live.is_started:
            self._live.refresh()

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        frame = FRAMES[int(time.monotonic() / REFRESH_S) % len(FRAMES)]
        for name, part in self.parts.items():
            mark, colour = MARKS.get(part.phase, (frame, "cyan"))
            if part.since is None:
                table.add_row(" ", name, Text("waiting", "dim"))
            else:
                detail = Text(part.detail, "dim", no_wrap=True, overflow="ellipsis")
                table.add_row(Text(mark, colour), name, part.phase, f"{part.seconds:.1f} s", detail)
        return table
