"""`dynamo-lite kv` against real engines: what is in the tiers, what is wrong there, and away with it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynamo_lite.cli import app
from kvbm.hashing import full_block_hashes
from tests.integration.serving.deployment import Deployment, until
from tests.integration.serving.requests import BLOCK, prompt, tokens
from tests.integration.serving.test_disk_tier import W, blocks_file, put_on_disk, restart
from tests.integration.serving.test_prefix_hits import cached_tokens
from tests.integration.serving.test_tiers import SLOT, _flip_a_byte_of_every_slot, counted, flush

pytestmark = pytest.mark.vllm


def kv(deployment: Deployment, command: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["kv", command, str(deployment.folder / "test.yaml"), *options])


def told(deployment: Deployment, command: str, *options: str) -> dict[str, Any]:
    shown = kv(deployment, command, "--json", *options)
    content = json.loads(shown.stdout)
    assert isinstance(content, dict)
    return content


def blocks_of(deployment: Deployment, tier: str) -> int:
    (worker,) = told(deployment, "stats")["workers"]
    return int(next(one["blocks"] for one in worker["tiers"] if one["tier"] == tier))


def test_what_is_on_disk_is_shown_and_listed(on_disk: Deployment) -> None:
    token_ids = prompt(1000, 400)
    put_on_disk(on_disk, token_ids, 401)
    shown = kv(on_disk, "stats")
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [line[:2] for line in lines[1:2]] == [[W, "device"]]
    assert [line[0] for line in lines[2:]] == ["host", "disk"]
    listed = {one["hash"]: one["tiers"] for one in told(on_disk, "ls", "--limit", "0")["blocks"]}
    hashes = [one.hex() for one in full_block_hashes(token_ids, BLOCK)]
    assert all("disk" in listed[one] for one in hashes)
    assert not any("device" in listed[one] for one in hashes), "others took their places there"
    found = [one["hash"] for one in told(on_disk, "ls", "--limit", "0", "--tier", "disk")["blocks"]]
    assert set(hashes) <= set(found)
    assert len(found) == len(set(found)) == blocks_of(on_disk, "disk")


def test_a_byte_that_changed_on_disk_is_found_dropped_and_counted(on_disk: Deployment) -> None:
    token_ids = prompt(1000, 410)
    put_on_disk(on_disk, token_ids, 411)
    expected = tokens(on_disk, token_ids, temperature=0)
    flush(on_disk, 412)
    kv(on_disk, "verify", "--tier", "disk")  # what other tests have spoilt there is gone from here on
    counted_before, there = counted(on_disk, W, "corrupt", "disk"), blocks_of(on_disk, "disk")
    bad = full_block_hashes(token_ids, BLOCK)[5]
    _flip_a_byte_of(on_disk, bad)
    shown = kv(on_disk, "verify", "--tier", "disk")
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[1].split() == [W, "disk", f"{there - 1:,}", "1", "0"]
    assert "1 block was not what was stored: dropped" in shown.stderr
    until(lambda: counted(on_disk, W, "corrupt", "disk") == counted_before + 1, "it is counted")
    assert kv(on_disk, "verify", "--tier", "disk").exit_code == 0
    assert bad.hex() not in [one["hash"] for one in told(on_disk, "ls", "--limit", "0", "--tier", "disk")["blocks"]]
    assert tokens(on_disk, token_ids, temperature=0) == expected


def test_bytes_that_changed_in_host_memory_are_found(on_disk: Deployment) -> None:
    cached_tokens(on_disk, prompt(1000, 420))
    there = blocks_of(on_disk, "host")
    assert there > 0
    _flip_a_byte_of_every_slot(on_disk.pid(W))
    (verified,) = told(on_disk, "verify", "--tier", "host")["verified"]
    assert verified["right"] + verified["gone"] == 0
    assert verified["corrupt"] >= there
    assert verified["whole"]
    assert kv(on_disk, "verify", "--tier", "host").exit_code == 0


def test_requests_are_answered_while_everything_is_verified(on_disk: Deployment) -> None:
    prompts = [prompt(300 + 100 * number, 430) for number in range(6)]
    expected = [tokens(on_disk, one, temperature=0) for one in prompts]
    flush(on_disk, 431)
    with ThreadPoolExecutor(7) as pool:
        verifying = pool.submit(told, on_disk, "verify")
        assert list(pool.map(lambda one: tokens(on_disk, one, temperature=0), prompts)) == expected
        verified = verifying.result()
    assert verified["failed"] == []
    assert sum(one["corrupt"] for one in verified["verified"]) == 0
    assert {one["tier"] for one in verified["verified"] if one["whole"]} == {"host", "disk"}


def test_what_was_purged_is_gone_for_good(on_disk: Deployment) -> None:
    token_ids = prompt(1000, 440)
    put_on_disk(on_disk, token_ids, 441)
    expected = tokens(on_disk, token_ids, temperature=0)
    flush(on_disk, 442)
    there = blocks_of(on_disk, "disk")
    refused = kv(on_disk, "purge", "--all")
    assert refused.exit_code == 2
    assert blocks_of(on_disk, "disk") == there
    shown = kv(on_disk, "purge", "--all", "--yes")
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[2] == [W, "disk", f"{there:,}"]
    assert blocks_of(on_disk, "disk") == blocks_of(on_disk, "host") == 0
    restart(on_disk)
    assert blocks_of(on_disk, "disk") == 0
    assert cached_tokens(on_disk, token_ids) == 0
    assert tokens(on_disk, token_ids, temperature=0) == expected


def _flip_a_byte_of(deployment: Deployment, block_hash: bytes) -> None:
    """Of that block, where its record is on disk."""
    with blocks_file(deployment).open("r+b") as file:
        start = file.read().index(block_hash) // SLOT * SLOT
        file.seek(start + 100)
        (byte,) = file.read(1)
        file.seek(start + 100)
        file.write(bytes([byte ^ 1]))
