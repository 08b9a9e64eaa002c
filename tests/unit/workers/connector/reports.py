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

    def take(self, kind: type[R]) -> R:
        """The oldest report of that kind that was not taken yet; waits for it."""

        def there() -> bool:
            return any(isinstance(report, kind) for report in self.seen)

        with self.changed:
            assert self.changed.wait_for(there, WAIT_S), f"no {kind.__name__} came; seen: {self.seen}"
            report = next(report for report in self.seen if isinstance(report, kind))
            self.seen.remove(report)
            return report

    def latest(self, kind: type[R]) -> R | None:
        with self.changed:
            return next((report for report in reversed(self.seen) if isinstance(report, kind)), None)

    def holding(self, reason: str) -> int:
        """What it last said to hold for that reason."""
        latest = self.latest(Holds)
        return latest.blocks.get(reason, 0) if latest is not None else 0
