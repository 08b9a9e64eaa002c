"""Workers of other tensor-parallel and block sizes give each other KV, and the very tokens that one worker gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.serving.conftest import GROUP
from tests.integration.serving.deployment import Deployment, serve, total
from tests.integration.serving.requests import prompt, tokens

pytestmark = pytest.mark.vllm

LENGTHS = [1, 31, 32, 33, 63, 64, 65, 127, 500, 1025, 2100]
# tensor_parallel and block_size of the prefill and the decode worker
PAIRS = {"two ranks to one": ((2, 64), (1, 32)), "one rank to two": ((1, 32), (2, 64))}


def group(tensor_parallel: int, block_size: int) -> dict[str, Any]:
    return GROUP | {"tensor_parallel": tensor_parallel, "args": {"block_size": block_size}}


@pytest.fixture(scope="module", params=list(PAIRS.values()), ids=list(PAIRS))
def uneven(
    request: pytest.FixtureRequest, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    prefill, decode = request.param
    uneven = {
        "workers": {"prefill": group(*prefill), "decode": group(*decode)},
        "kv_transfer": {"verify": True, "min_remote_tokens": 1},
    }
    with serve(tmp_path_factory.mktemp("uneven"), base | uneven) as deployment:
        yield deployment


def test_the_workers_differ_in_what_the_test_is_about(uneven: Deployment) -> None:
    layouts = {name: record.fingerprint.layout for name, record in uneven.instances().items()}
    prefill, decode = layouts["prefill-0"], layouts["decode-0"]
    assert prefill.tensor_parallel != decode.tensor_parallel
    assert prefill.block_size != decode.block_size
    assert {prefill.rank_heads, decode.rank_heads} == {1, 2}


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_identical_for_a_prompt_of(length: int, uneven: Deployment, together: Deployment) -> None:
    token_ids = prompt(length, 5)
    assert tokens(uneven, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)


def test_greedy_tokens_are_identical_for_eight_prompts_at_once(uneven: Deployment, together: Deployment) -> None:
    prompts = [prompt(length, 6) for length in (40, 95, 96, 130, 257, 400, 640, 801)]
    with ThreadPoolExecutor(8) as pool:
        mine = list(pool.map(lambda one: tokens(uneven, one, temperature=0), prompts))
        theirs = list(pool.map(lambda one: tokens(together, one, temperature=0), prompts))
    assert mine == theirs


def test_a_prefix_of_whole_blocks_is_not_sent_again(uneven: Deployment, together: Deployment) -> None:
    token_ids = prompt(900, 7)
    tokens(uneven, token_ids[:450], temperature=0)
    before = sources(uneven)
    assert tokens(uneven, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)
    grown = {source: count - before[source] for source, count in sources(uneven).items()}
    assert grown["local_cache_hit"] == 448, "both 32 and 64 go into it"
    assert grown["external_kv_transfer"] in (451, 452)


def test_the_decode_worker_did_not_compute_what_was_transferred(uneven: Deployment) -> None:
    before, failures = sources(uneven), failed(uneven)
    tokens(uneven, prompt(1000, 8), temperature=0)
    grown = {source: count - before[source] for source, count in sources(uneven).items()}
    assert grown["external_kv_transfer"] in (999, 1000)
    assert grown["local_compute"] <= 1
    assert grown["local_cache_hit"] == 0
    assert failed(uneven) == failures


def test_kv_that_cannot_be_converted_is_refused_in_a_sentence_and_never_asked_for(
    base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    workers = {"prefill": GROUP | {"args": {"kv_cache_dtype": "fp8_e4m3"}}, "decode": GROUP}
    with serve(tmp_path_factory.mktemp("refused"), base | {"workers": workers}) as apart:
        for seed in range(3):
            tokens(apart, prompt(500, seed), temperature=0)
        assert sources(apart)["external_kv_transfer"] == 0
        assert sources(apart)["local_compute"] >= 1500
        assert failed(apart) == 0
        sentence = "from prefill-0: the prefill worker stores KV as fp8_e4m3, the decode worker as float32"
        assert apart.log("frontend-0").count(f"decode-0 cannot take KV {sentence}") == 1


def sources(deployment: Deployment) -> dict[str, float]:
    """Prompt tokens of the decode worker, by where they came from."""
    samples = deployment.metrics("decode-0")
    return {
        source: total(samples, "vllm:prompt_tokens_by_source_total", f'source="{source}"')
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    }


def failed(deployment: Deployment) -> float:
    return total(deployment.metrics("decode-0"), "nixl_transfer_failures_total")
