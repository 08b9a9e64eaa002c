"""A prefix that has left the device is read back from the host tier, and gives the very tokens it gave before."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.integration.serving.deployment import Deployment, total, until
from tests.integration.serving.requests import BLOCK, MODEL, client, prompt, tokens
from tests.integration.serving.test_prefix_hits import cached_tokens

pytestmark = pytest.mark.vllm

BYTES, SLOT = 65536, 69632  # of a block of the tiny model, in float32, and of a slot for its record


def counted(deployment: Deployment, name: str, event: str, tier: str = "host") -> float:
    return total(deployment.metrics(name), "kv_tier_blocks_total", f'event="{event}"', f'tier="{tier}"')


def flush(deployment: Deployment, seed: int) -> None:
    """Use the device for other prompts until nothing of the ones before is left on it."""
    for number in range(11):  # a third more than there is room for
        cached_tokens(deployment, prompt(1000, seed * 100 + number))


@pytest.mark.parametrize("length", [BLOCK + 1, 300, 1000, 1024, 2049])
def test_tokens_are_identical_when_the_prefix_comes_from_the_host_tier(
    length: int, tiered: Deployment, together: Deployment
) -> None:
    token_ids = prompt(length, 50)
    expected = tokens(together, token_ids, temperature=0)
    assert tokens(tiered, token_ids, temperature=0) == expected
    flush(tiered, 51 + length)
    before = counted(tiered, "both-0", "onboarded")
    assert tokens(tiered, token_ids, temperature=0) == expected
    blocks = (length - 1) // BLOCK
    until(lambda: counted(tiered, "both-0", "onboarded") == before + blocks, "every whole block came from the tier")


def test_many_prompts_at_once_come_from_the_host_tier_unmixed(tiered: Deployment, together: Deployment) -> None:
    prompts = [prompt(200 + 40 * number, 60) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        expected = list(pool.map(lambda one: tokens(together, one, temperature=0), prompts))
        list(pool.map(lambda one: tokens(tiered, one, temperature=0), prompts))
        flush(tiered, 61)
        before = counted(tiered, "both-0", "onboarded")
        assert list(pool.map(lambda one: tokens(tiered, one, temperature=0), prompts)) == expected
    until(lambda: counted(tiered, "both-0", "onboarded") > before, "some came from the tier")


def test_a_block_that_is_not_what_was_stored_is_dropped_counted_and_computed(
    tiered: Deployment, together: Deployment
) -> None:
    token_ids = prompt(1000, 70)
    expected = tokens(together, token_ids, temperature=0)
    assert tokens(tiered, token_ids, temperature=0) == expected
    flush(tiered, 71)
    before = counted(tiered, "both-0", "corrupt")
    _flip_a_byte_of_every_slot(tiered.pid("both-0"))
    assert tokens(tiered, token_ids, temperature=0) == expected
    until(lambda: counted(tiered, "both-0", "corrupt") > before, "the block was counted")


def test_tenants_share_nothing_in_the_host_tier_and_those_of_one_salt_do(tiered: Deployment) -> None:
    token_ids = prompt(640, 80)
    cached_tokens(tiered, token_ids, cache_salt="one")
    flush(tiered, 81)
    assert cached_tokens(tiered, token_ids, cache_salt="two") == 0
    assert cached_tokens(tiered, token_ids) == 0
    flush(tiered, 82)
    assert cached_tokens(tiered, token_ids, cache_salt="one") == 608


def test_the_trace_tells_the_tier_and_what_was_predicted(tiered: Deployment) -> None:
    token_ids = prompt(1000, 90)
    cached_tokens(tiered, token_ids)
    flush(tiered, 91)
    assert cached_tokens(tiered, token_ids) == 992

    def told() -> bool:
        spans = [span for span in tiered.spans() if span["name"] == "kv.onboard"]
        return any(
            span["attributes"]["tier"] == "host"
            and span["attributes"]["blocks"] == 31
            and span["attributes"].get("predicted_compute_s", 0) > 0
            for span in spans
        )

    until(told, "the onboarding is on the trace")


def test_what_was_generated_is_offloaded_too_for_the_next_turn(tiered: Deployment) -> None:
    before = counted(tiered, "both-0", "offloaded")
    with client(tiered) as api:
        api.completions.create(
            model=MODEL, prompt=prompt(BLOCK, 95), max_tokens=3 * BLOCK, temperature=0, extra_body={"ignore_eos": True}
        )
    # The last token's KV is not computed, so the fourth block is not full.
    until(lambda: counted(tiered, "both-0", "offloaded") == before + 3, "three blocks were offloaded")


def test_what_is_in_the_tier_is_onboarded_and_only_the_rest_prefilled_remotely(
    tiered_apart: Deployment, together: Deployment
) -> None:
    shared, more = prompt(640, 100), prompt(640, 101)
    tokens(tiered_apart, shared, temperature=0)
    flush(tiered_apart, 102)
    before = counted(tiered_apart, "decode-0", "onboarded")
    moved = total(tiered_apart.metrics("decode-0"), "nixl_transfer_bytes_total")
    assert tokens(tiered_apart, shared + more, temperature=0) == tokens(together, shared + more, temperature=0)
    until(lambda: counted(tiered_apart, "decode-0", "onboarded") == before + 640 // BLOCK, "the shared part")
    after = total(tiered_apart.metrics("decode-0"), "nixl_transfer_bytes_total")
    assert after - moved == 640 // BLOCK * BYTES


def test_answers_are_right_after_the_engine_was_killed_while_blocks_came_from_the_tier(
    tiered: Deployment, together: Deployment
) -> None:
    prompts = [prompt(1000, 110 + number) for number in range(4)]
    expected = [tokens(together, one, temperature=0) for one in prompts]
    for one in prompts:
        cached_tokens(tiered, one)
    flush(tiered, 120)
    starts = int(tiered.process_of("both-0")["starts"])
    before = counted(tiered, "both-0", "onboarded")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(tokens, tiered, one, temperature=0) for one in prompts]
        until(lambda: counted(tiered, "both-0", "onboarded") > before, "the first prefix is being read")
        os.kill(tiered.engine_pid("both-0"), signal.SIGKILL)
        ended = [one.exception() for one in asked]
    assert all(error is None or isinstance(error, openai.APIError) for error in ended)
    until(lambda: tiered.restarted("both-0", starts + 1), "the worker was started again", 120)
    assert [tokens(tiered, one, temperature=0) for one in prompts] == expected
    flush(tiered, 130)
    assert [tokens(tiered, one, temperature=0) for one in prompts] == expected


def _flip_a_byte_of_every_slot(pid: int) -> None:
    folder = Path(f"/proc/{pid}/fd")
    memory = next(one for one in folder.iterdir() if "dynamo-lite-host-tier" in os.readlink(one))
    file = os.open(memory, os.O_RDWR)
    try:
        for offset in range(100, os.fstat(file).st_size, SLOT):
            (byte,) = os.pread(file, 1, offset)
            os.pwrite(file, bytes([byte ^ 1]), offset)
    finally:
        os.close(file)
