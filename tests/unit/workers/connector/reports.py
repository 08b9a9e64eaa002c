"""What movers told the tests that are their worker process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TypeVar

from workers.connector.protocol import Holds, Report

WAIT_S = 10.0
R = TypeVar("R", bound=Report)


@dataclass
class Reports:
    """Those of one mover."""

    seen: list[Report] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, report: Report) -> None:
        with self.changed:
            self.seen.append(report)
            self.changed.notify_all()

    def take(self, kind: type[R], request_id: str = "") -> R:
        """The oldest report of that kind, and about that request, that was not taken yet; waits for it."""

        def found() -> R | None:
            reports = (report for report in self.seen if isinstance(report, kind))
            return next((one for one in reports if request_id in ("", getattr(one, "request_id", ""))), None)

        with self.changed:
            assert self.changed.wait_for(found, WAIT_S), f"no {kind.__name__} came; seen: {self.seen}"
            report = found()
            assert report is not None
            self.seen.remove(report)
            return report

    def latest(self, kind: type[R]) -> R | None:
        with self.changed:
            return next((report for report in reversed(self.seen) if isinstance(report, kind)), None)

    def holding(self, *reasons: str) -> int:
        """What it last said to hold for one of these reasons, or for any."""
        latest = self.latest(Holds)
        return sum(latest.blocks.get(reason, 0) for reason in reasons or latest.blocks) if latest is not None else 0

    def staged(self) -> int:
        """Bytes of staging that it last said to use."""
        latest = self.latest(Holds)
        return latest.staged if latest is not None else 0
