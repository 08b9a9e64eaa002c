"""`dynamo-lite drain` against a deployment that runs, with the simulated engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from dynamo_lite.cli import app
from tests.integration.frontend.conftest import settings
from tests.integration.frontend.test_migration import PACE, TOKENS, migrations, stream, together
from tests.integration.serving.deployment import Deployment, serve, until
from tests.models import make_tiny_model


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A prefill and two decode workers."""
    folder = tmp_path_factory.mktemp("three")
    model = make_tiny_model(folder / "tiny")
    workers = {"prefill": {"count": 1}, "decode": {"count": 2, "spot_notice_file": str(folder / "notice")}}
    with serve(folder, settings(model, workers=workers, sim=PACE)) as deployment:
        yield deployment


def drain(deployment: Deployment, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["drain", *arguments, str(deployment.folder / "test.yaml")])


def test_a_worker_that_is_not_there_is_told_with_those_that_are(three: Deployment) -> None:
    result = drain(three, "decode-7")
    assert result.exit_code == 1
    assert "Error: no worker is called decode-7; there are: decode-0, decode-1, prefill-0" in result.output


def test_a_worker_is_restarted_under_load_and_its_streams_notice_nothing(three: Deployment) -> None:
    prompts: list[dict[str, Any]] = [{"prompt": [70 + number] * 128} for number in range(4)]
    expected = [stream(three, **body).what for body in prompts]
    starts, moved = int(three.process_of("decode-0")["starts"]), migrations(three, "moved")
    results: list[Result] = []
    told = together(three, prompts, lambda: results.append(drain(three, "decode-0", "--restart")))
    (result,) = results
    assert result.exit_code == 0, result.output
    assert "decode-0 has left after" in result.output
    assert "decode-0 is back after" in result.output
    assert [one.what for one in told] == expected
    assert migrations(three, "moved") > moved
    assert three.restarted("decode-0", starts + 1)


def test_a_drained_worker_stays_away_and_the_last_one_does_not_leave_unless_forced(three: Deployment) -> None:
    assert drain(three, "prefill-0").exit_code == 0
    result = drain(three, "decode-1", "--deadline", "5")
    assert result.exit_code == 0, result.output
    until(lambda: three.process_of("decode-1")["pid"] is None, "it is gone")
    assert not three.process_of("decode-1")["ready"]
    refused = drain(three, "decode-0")
    assert refused.exit_code == 1
    assert "decode-0 is the last worker that generates" in refused.output
    assert stream(three, prompt=[5] * 20).what[1]["completion_tokens"] == TOKENS
    assert set(three.instances()) == {"decode-0"}


def test_the_last_worker_drains_on_a_spot_notice_and_finishes_what_it_has(three: Deployment) -> None:
    (told,) = together(three, [{"prompt": [80] * 40}], lambda: notice(three.folder))
    assert told.what[1]["completion_tokens"] == TOKENS
    until(lambda: three.process_of("decode-0")["pid"] is None, "it has left")
    assert httpx.post(f"{three.url}/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 503


def notice(folder: Path) -> None:
    (folder / "notice").write_text("60")


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["drain", "--help"])
    assert result.exit_code == 0
    assert "--deadline" in result.output
    both = CliRunner().invoke(app, ["drain", "decode-0", "--spot", "--restart"])
    assert both.exit_code == 2
