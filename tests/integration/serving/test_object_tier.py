"""A prefix that is in an object store alone serves other deployments too, and the store's failures cost no request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from tests.integration.serving.conftest import GROUP
from tests.integration.serving.deployment import Deployment, serve, total, until
from tests.integration.serving.requests import BLOCK, prompt, tokens
from tests.integration.serving.test_prefix_hits import cached_tokens
from tests.integration.serving.test_tiers import BYTES, counted, flush
from tests.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedFs, seaweedfs

pytestmark = pytest.mark.vllm
W = "both-0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFs]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


def on_objects(store: SeaweedFs) -> dict[str, Any]:
    """One worker with little room on its device and in host memory, and an object tier that is written to at once."""
    return {
        "workers": {"both": GROUP | {"kv_cache": "18MiB"}},
        "kv_tiers": {
            "host": {"size": "16MiB"},
            "object": {
                "url": "s3://ready/kv",
                "endpoint": store.endpoint,
                "access_key_id": ACCESS_KEY,
                "secret_access_key": SECRET_KEY,
                "admission": "always",
                "flush_interval_ms": 0,
                "timeout_ms": 5000,
                "refresh_s": 1,
            },
        },
    }


@pytest.fixture(scope="module")
def stored(base: dict[str, Any], store: SeaweedFs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with serve(tmp_path_factory.mktemp("stored"), base | on_objects(store)) as deployment:
        yield deployment


def put_into_store(deployment: Deployment, token_ids: list[int], seed: int, **more: Any) -> None:
    """Its whole blocks, and leave them nowhere else."""
    before = counted(deployment, W, "offloaded", "object")
    cached_tokens(deployment, token_ids, **more)
    blocks = (len(token_ids) - 1) // BLOCK
    until(lambda: counted(deployment, W, "offloaded", "object") >= before + blocks, "the prompt is in the store")
    flush(deployment, seed)


@pytest.mark.parametrize("length", [300, 1000, 1024])
def test_tokens_are_identical_when_the_prefix_comes_from_the_store(
    length: int, stored: Deployment, together: Deployment
) -> None:
    token_ids = prompt(length, 300)
    expected = tokens(together, token_ids, temperature=0)
    put_into_store(stored, token_ids, 301 + length)
    before = counted(stored, W, "onboarded", "object")
    assert tokens(stored, token_ids, temperature=0) == expected
    blocks = (length - 1) // BLOCK
    until(lambda: counted(stored, W, "onboarded", "object") == before + blocks, "every whole block came from there")


def test_what_one_deployment_has_stored_serves_another_and_tenants_stay_apart(
    base: dict[str, Any], store: SeaweedFs, stored: Deployment, together: Deployment, tmp_path: Path
) -> None:
    token_ids = prompt(1000, 310)
    expected = tokens(together, token_ids, temperature=0)
    put_into_store(stored, token_ids, 311)
    put_into_store(stored, prompt(640, 312), 313, cache_salt="one")
    with serve(tmp_path, base | on_objects(store)) as other:
        assert tokens(other, token_ids, temperature=0) == expected
        until(lambda: counted(other, W, "onboarded", "object") == 31, "every whole block came from the store")
        assert cached_tokens(other, prompt(640, 312), cache_salt="two") == 0
        assert cached_tokens(other, prompt(640, 312)) == 0
        assert cached_tokens(other, prompt(640, 312), cache_salt="one") == 608


def test_a_byte_that_changed_in_the_store_is_found_counted_and_the_object_deleted(
    stored: Deployment, store: SeaweedFs, together: Deployment
) -> None:
    token_ids = prompt(1000, 330)
    expected = tokens(together, token_ids, temperature=0)
    put_into_store(stored, token_ids, 331)
    bucket = S3Store(
        "ready", endpoint=store.endpoint, region="us-east-1", access_key_id=ACCESS_KEY, secret_access_key=SECRET_KEY,
        virtual_hosted_style_request=False, client_options={"allow_http": True},
    )  # fmt: skip
    keys = [one["path"] for page in obstore.list(bucket, prefix="kv/") for one in page if one["size"] > BYTES]
    for key in keys:
        content = bytearray(obstore.get(bucket, key).bytes())
        content[100] ^= 1
        obstore.put(bucket, key, bytes(content))
    before = counted(stored, W, "corrupt", "object")
    assert tokens(stored, token_ids, temperature=0) == expected
    until(lambda: counted(stored, W, "corrupt", "object") > before, "the block was counted")


def test_a_store_that_falls_silent_costs_no_request(stored: Deployment, store: SeaweedFs, together: Deployment) -> None:
    token_ids = prompt(1000, 340)
    expected = tokens(together, token_ids, temperature=0)
    put_into_store(stored, token_ids, 341)
    with stored.frozen(store.child.pid):
        assert tokens(stored, token_ids, temperature=0) == expected
        until(lambda: not is_on(stored), "the tier is off")
    until(lambda: is_on(stored), "the tier is on again", 60)


def is_on(deployment: Deployment) -> bool:
    return total(deployment.metrics(W), "kv_tier_on", 'tier="object"') == 1


def test_a_store_that_dies_costs_no_request_and_is_used_again_once_it_lives(
    stored: Deployment, store: SeaweedFs, together: Deployment
) -> None:
    token_ids = prompt(1000, 320)
    expected = tokens(together, token_ids, temperature=0)
    put_into_store(stored, token_ids, 321)
    store.kill()
    assert tokens(stored, token_ids, temperature=0) == expected
    until(lambda: not is_on(stored), "the tier is off")
    flush(stored, 322)
    assert tokens(stored, token_ids, temperature=0) == expected
    store.restart()
    until(lambda: is_on(stored), "the tier is on again", 60)
    flush(stored, 323)
    before = counted(stored, W, "onboarded", "object")
    assert tokens(stored, token_ids, temperature=0) == expected
    until(lambda: counted(stored, W, "onboarded", "object") > before, "blocks come from the store again")
    warnings = [line for line in stored.log(W).splitlines() if "object tier" in line]
    assert any("is off until it works again" in line for line in warnings)
    assert any("works again" in line for line in warnings)
