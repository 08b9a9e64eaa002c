"""Prefill and decode apart give the very tokens that one worker gives."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.serving.deployment import Deployment, total
from tests.integration.serving.requests import BLOCK, prompt, tokens

pytestmark = pytest.mark.vllm

LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK, 300, 500]
LENGTHS += [1000, 1024, 1025, 1500, 2047, 2048, 2049, 3000, 3900]


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_identical_for_a_prompt_of(length: int, apart: Deployment, together: Deployment) -> None:
    token_ids = prompt(length, 0)
    assert tokens(apart, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)


def test_greedy_tokens_are_identical_for_sixteen_prompts_at_once(apart: Deployment, together: Deployment) -> None:
    prompts = [prompt(length, 1) for length in random.Random(3).sample(range(1, 900), 16)]
    with ThreadPoolExecutor(16) as pool:
        mine = list(pool.map(lambda one: tokens(apart, one, temperature=0), prompts))
        theirs = list(pool.map(lambda one: tokens(together, one, temperature=0), prompts))
    assert mine == theirs
    assert len({tuple(one) for one in mine}) == 16, "the prompts do not all lead to the same text"


@pytest.mark.parametrize("length", [BLOCK, 130, 1000])
def test_seeded_sampling_is_identical(length: int, apart: Deployment, together: Deployment) -> None:
    token_ids = prompt(length, 2)
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    sampled = tokens(apart, token_ids, **sampling)
    assert sampled == tokens(together, token_ids, **sampling)
    assert sampled != tokens(apart, token_ids, temperature=0)


def test_the_decode_worker_did_not_compute_what_was_transferred(apart: Deployment) -> None:
    def by_source(name: str) -> dict[str, float]:
        samples = apart.metrics(name)
        return {
            source: total(samples, "vllm:prompt_tokens_by_source_total", f'source="{source}"')
            for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
        }

    token_ids = prompt(1000, 4)
    before = by_source("decode-0")
    tokens(apart, token_ids, temperature=0)
    after = by_source("decode-0")
    grown = {source: after[source] - before[source] for source in after}
    # vLLM computes the last token of a prompt again, to sample from it.
    assert grown["external_kv_transfer"] in (999, 1000)
    assert grown["local_compute"] <= 1
    assert grown["local_cache_hit"] == 0
