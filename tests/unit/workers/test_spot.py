from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from workers.spot import DEADLINE_S, noticed, seconds_left


@pytest.mark.parametrize(("text", "seconds"), [("", DEADLINE_S), ("30", 30.0), (" 45.5\n", 45.5), ("soon", DEADLINE_S),
                                               ("{}", DEADLINE_S), ('{"time": 5}', DEADLINE_S)])  # fmt: skip
def test_a_notice_says_how_long_is_left(text: str, seconds: float, tmp_path: Path) -> None:
    file = tmp_path / "notice"
    file.write_text(text)
    assert seconds_left(file) == pytest.approx(seconds, abs=1.0)


def test_a_notice_may_name_the_time_as_the_clouds_do(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    at = datetime.now(UTC) + timedelta(seconds=90)
    file.write_text(f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}')
    assert seconds_left(file) == pytest.approx(90, abs=2.0)


def test_no_notice_and_one_of_the_past_are_none(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    assert seconds_left(file) is None
    file.write_text("30")
    os.utime(file, (time.time() - 60, time.time() - 60))
    assert seconds_left(file) is None
    assert seconds_left(tmp_path) is None


async def test_a_notice_is_heard_of_when_it_comes(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(noticed(file))
        await asyncio.sleep(0)
        assert not waiting.done()
        file.write_text("12")
    assert waiting.result() == pytest.approx(12, abs=2.0)
