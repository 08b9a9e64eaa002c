"""What the connectors of an engine's ranks say of themselves, as one worker's."""

from __future__ import annotations

from workers.connector.protocol import Holds, Peers


class RankReports:
    """The latest of each rank."""

    def __init__(self) -> None:
        self._holds: dict[int, Holds] = {}
        self._peers: dict[int, dict[str, int]] = {}

    def take(self, report: Holds | Peers) -> None:
        if isinstance(report, Holds):
            self._holds[report.rank] = report
        else:
            self._peers[report.rank] = report.workers

    @property
    def held(self) -> dict[str, int]:
        """Blocks by reason: every rank holds the same."""
        held: dict[str, int] = {}
        for holds in self._holds.values():
            for reason, count in holds.blocks.items():
                held[reason] = max(held.get(reason, 0), count)
        return held

    @property
    def staged(self) -> int:
        """Bytes."""
        return sum(holds.staged for holds in self._holds.values())

    @property
    def peers(self) -> dict[str, int]:
        """Workers by state: one is met once every rank has met it."""
        peers: dict[str, int] = {}
        for workers in self._peers.values():
            for state, count in workers.items():
                peers[state] = (min if state == "met" else max)(peers.get(state, count), count)
        return peers
