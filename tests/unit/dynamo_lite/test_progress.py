from __future__ import annotations

import io
import re

from dynamo_lite.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_phase_is_a_line() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.expect("decode-0")
        progress.phase("decode-0", "loading", "weights [bold]")
        progress.phase("decode-0", "ready")
        progress.note("all well")
    lines = [re.sub(r"\d+\.\d s", "T", line).strip() for line in out.getvalue().splitlines()]
    assert lines == ["T  decode-0: loading: weights [bold]", "T  decode-0: ready (T)", "T  all well"]


def test_on_a_terminal_the_list_shows_every_part_and_later_events_are_lines() -> None:
    out = Terminal()
    with Progress(out) as progress:
        progress.expect("nats-server", "decode-0")
        progress.phase("nats-server", "ready")
        progress.phase("decode-0", "loading")
        progress.close()
        progress.phase("decode-0", "failed", "killed by SIGKILL")
    text = out.getvalue()
    assert "✓" in text
    assert "loading" in text
    assert "decode-0: failed: killed by SIGKILL" in text


def test_the_time_of_a_part_stops_when_it_is_ready_and_starts_anew_with_it() -> None:
    progress = Progress(io.StringIO())
    progress.phase("decode-0", "starting")
    progress.phase("decode-0", "ready")
    took = progress.parts["decode-0"].took
    assert took is not None
    assert progress.parts["decode-0"].seconds == took
    progress.phase("decode-0", "starting")
    assert progress.parts["decode-0"].took is None


def test_a_part_that_names_its_own_start_does_not_start_its_time_anew() -> None:
    progress = Progress(io.StringIO())
    progress.expect("frontend-0")
    assert progress.parts["frontend-0"].since is None
    progress.phase("frontend-0", "starting")
    began = progress.parts["frontend-0"].since
    progress.phase("frontend-0", "starting")
    assert progress.parts["frontend-0"].since == began
