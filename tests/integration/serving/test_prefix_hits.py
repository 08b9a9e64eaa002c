"""A prompt whose beginning is cached goes to the decode worker that has it, and no prefill worker hears of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.serving.deployment import Deployment, total, until
from tests.integration.serving.requests import BLOCK, MODEL, client, prompt

pytestmark = pytest.mark.vllm


def cached_tokens(deployment: Deployment, token_ids: list[int], **more: Any) -> int:
    with client(deployment) as api:
        answer = api.completions.create(model=MODEL, prompt=token_ids, max_tokens=4, temperature=0, extra_body=more)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def prefills(deployment: Deployment) -> float:
    return total(deployment.metrics("prefill-0"), "dynamo_lite_worker_requests_total", 'role="prefill"')


@pytest.mark.parametrize("length", [1000, 1024, 1025])
def test_a_repeated_prompt_skips_the_prefill_worker_and_counts_its_cached_blocks(
    length: int, apart: Deployment
) -> None:
    token_ids = prompt(length, 10)
    before = prefills(apart)
    assert cached_tokens(apart, token_ids) == 0
    until(lambda: prefills(apart) == before + 1, "the first request was prefilled remotely")
    longer = token_ids + prompt(20, 11)
    assert cached_tokens(apart, longer) == length // BLOCK * BLOCK
    # The last token is always computed, so of a prompt that fills its last block that block does not count.
    assert cached_tokens(apart, token_ids) == (length - 1) // BLOCK * BLOCK
    assert prefills(apart) == before + 1


def test_only_the_missing_blocks_of_a_partly_cached_prompt_are_transferred(apart: Deployment) -> None:
    shared = prompt(640, 12)
    assert cached_tokens(apart, shared) == 0
    before = total(apart.metrics("decode-0"), "nixl_transfer_bytes_total")
    block_bytes = apart.instances()["decode-0"].fingerprint.block_bytes
    assert cached_tokens(apart, shared + prompt(320, 13)) == 640
    after = total(apart.metrics("decode-0"), "nixl_transfer_bytes_total")
    assert after - before == 320 // BLOCK * block_bytes


def test_prompts_of_different_tenants_share_nothing_and_those_of_one_do(apart: Deployment) -> None:
    token_ids = prompt(300, 14)
    assert cached_tokens(apart, token_ids, cache_salt="one") == 0
    assert cached_tokens(apart, token_ids, cache_salt="two") == 0
    assert cached_tokens(apart, token_ids) == 0
    assert cached_tokens(apart, token_ids, cache_salt="one") == 288


def test_the_frontend_says_why_it_chose_the_worker(apart: Deployment) -> None:
    token_ids = prompt(200, 15)
    cached_tokens(apart, token_ids)
    cached_tokens(apart, token_ids)

    def reasons() -> list[str]:
        return [span["attributes"]["dynamo.route.reason"] for span in apart.spans() if span["name"] == "route"]

    until(lambda: any(reason.startswith("prefix 6/7 blocks on decode-0") for reason in reasons()), "the reason")
