"""A prefix that is on disk alone gives the tokens it gave before, after a restart too, whatever happens on the disk."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.serving.conftest import behind_host
from tests.integration.serving.deployment import Deployment, serve, until
from tests.integration.serving.requests import BLOCK, prompt, tokens
from tests.integration.serving.test_prefix_hits import cached_tokens
from tests.integration.serving.test_tiers import BYTES, counted, flush

pytestmark = pytest.mark.vllm
W = "both-0"


def put_on_disk(deployment: Deployment, token_ids: list[int], seed: int) -> None:
    """Its whole blocks, and leave them nowhere else."""
    before = counted(deployment, W, "offloaded", "disk")
    cached_tokens(deployment, token_ids)
    blocks = (len(token_ids) - 1) // BLOCK
    until(lambda: counted(deployment, W, "offloaded", "disk") >= before + blocks, "the prompt is on disk")
    flush(deployment, seed)


def blocks_file(deployment: Deployment) -> Path:
    (found,) = (deployment.folder / "kv").rglob("blocks")
    return found


@pytest.mark.parametrize("length", [BLOCK + 1, 300, 1000, 1024, 2049])
def test_tokens_are_identical_when_the_prefix_comes_from_disk(
    length: int, on_disk: Deployment, together: Deployment
) -> None:
    token_ids = prompt(length, 200)
    expected = tokens(together, token_ids, temperature=0)
    put_on_disk(on_disk, token_ids, 201 + length)
    before = counted(on_disk, W, "onboarded", "disk")
    assert tokens(on_disk, token_ids, temperature=0) == expected
    blocks = (length - 1) // BLOCK
    until(lambda: counted(on_disk, W, "onboarded", "disk") == before + blocks, "every whole block came from disk")


def test_many_prompts_at_once_come_from_disk_unmixed(on_disk: Deployment, together: Deployment) -> None:
    prompts = [prompt(200 + 40 * number, 210) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda one: tokens(together, one, temperature=0), prompts))
        list(pool.map(lambda one: tokens(on_disk, one, temperature=0), prompts))
        flush(on_disk, 211)
        before = counted(on_disk, W, "onboarded", "disk")
        assert list(pool.map(lambda one: tokens(on_disk, one, temperature=0), prompts)) == expected
    until(lambda: counted(on_disk, W, "onboarded", "disk") > before, "some came from disk")


def test_a_byte_that_changed_on_disk_is_found_counted_and_the_block_computed(
    on_disk: Deployment, together: Deployment
) -> None:
    token_ids = prompt(1000, 220)
    expected = tokens(together, token_ids, temperature=0)
    put_on_disk(on_disk, token_ids, 221)
    before = counted(on_disk, W, "corrupt", "disk")
    with blocks_file(on_disk).open("r+b") as file:
        for offset in range(100, os.fstat(file.fileno()).st_size, BYTES + 4096):
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    assert tokens(on_disk, token_ids, temperature=0) == expected
    until(lambda: counted(on_disk, W, "corrupt", "disk") > before, "the block was counted")


def test_the_disk_survives_the_worker_being_killed(on_disk: Deployment, together: Deployment) -> None:
    token_ids = prompt(1000, 230)
    expected = tokens(together, token_ids, temperature=0)
    put_on_disk(on_disk, token_ids, 231)
    restart(on_disk)
    assert tokens(on_disk, token_ids, temperature=0) == expected
    until(lambda: counted(on_disk, W, "onboarded", "disk") == 31, "every whole block came from disk")


def restart(deployment: Deployment) -> None:
    starts = int(deployment.process_of(W)["starts"])
    deployment.kill(W, signal.SIGKILL)
    until(lambda: deployment.restarted(W, starts + 1), "the worker was started again", 120)


def test_answers_are_right_after_the_worker_was_killed_while_it_wrote_and_while_it_read(
    on_disk: Deployment, together: Deployment
) -> None:
    prompts = [prompt(1000, 240 + number) for number in range(4)]
    expected = [tokens(together, one, temperature=0) for one in prompts]
    for event in ("offloaded", "onboarded"):
        before = counted(on_disk, W, event, "disk")
        starts = int(on_disk.process_of(W)["starts"])
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(tokens, on_disk, one, temperature=0) for one in prompts]
            until(lambda event=event, before=before: counted(on_disk, W, event, "disk") > before, f"some are {event}")  # type: ignore[misc]
            on_disk.kill(W, signal.SIGKILL)
            ended = [one.exception() for one in asked]
        assert all(error is None or isinstance(error, openai.APIError) for error in ended)
        until(lambda starts=starts: on_disk.restarted(W, starts + 1), "the worker was started again", 120)  # type: ignore[misc]
        assert [tokens(on_disk, one, temperature=0) for one in prompts] == expected
        flush(on_disk, 250)


def test_a_folder_that_is_taken_away_costs_no_request(
    base: dict[str, Any], together: Deployment, tmp_path: Path
) -> None:
    token_ids = prompt(1000, 260)
    expected = tokens(together, token_ids, temperature=0)
    kv = tmp_path / "kv"
    with serve(tmp_path, base | behind_host(kv)) as deployment:
        put_on_disk(deployment, token_ids, 261)
        kv.rename(tmp_path / "away")
        kv.touch()  # not a folder
        assert tokens(deployment, token_ids, temperature=0) == expected
        flush(deployment, 262)
        assert tokens(deployment, token_ids, temperature=0) == expected
        kv.unlink()
        (tmp_path / "away").rename(kv)
        flush(deployment, 263)
        assert tokens(deployment, token_ids, temperature=0) == expected
