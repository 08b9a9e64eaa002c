"""The notice that the machine is about to be taken away: a file that the cloud's agent writes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

DEADLINE_S = 120.0  # where the notice does not say: what spot machines are given
LOOK_S = 0.5
MOST_BYTES = 4096

log = logging.getLogger(__name__)


async def noticed(file: Path) -> float:
    """Returns once there is a notice that still counts, with the seconds left."""
    while True:
        left_s = await asyncio.to_thread(seconds_left, file)
        if left_s is not None:
            return left_s
        await asyncio.sleep(LOOK_S)


def seconds_left(file: Path) -> float | None:
    """Until the machine goes; None: there is no notice, or it is one of the past."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES).decode(errors="replace").strip()
            written = file.stat().st_mtime
    except OSError:
        return None
    now = time.time()
    left_s = _until(text, written, now)
    return left_s if left_s > 0 else None


def _until(text: str, written: float, now: float) -> float:
    """`text`: nothing; seconds from when it was `written`; or JSON with a "time", as of AWS's instance-action."""
    if not text:
        return written + DEADLINE_S - now
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            at = datetime.fromisoformat(str(content["time"]))
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
        return written + float(content) - now
    except (ValueError, TypeError, KeyError):
        log.warning("the spot notice says neither seconds nor a time: %s s are assumed", DEADLINE_S)
        return written + DEADLINE_S - now
