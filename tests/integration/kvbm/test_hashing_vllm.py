"""Our hashes against vLLM's own function."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvbm.hashing import ROOT, block_hashes, full_block_hashes
from kvbm.seed import SEED


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::Warning")  # importing vLLM and torch warns
@pytest.mark.parametrize("salt", [None, "tenant-7"])
@pytest.mark.parametrize("lora", [None, ("adapter", "/adapters/one")])
def test_hashes_equal_what_vllm_puts_into_its_kv_events(
    monkeypatch: pytest.MonkeyPatch, salt: str | None, lora: tuple[str, str] | None
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", SEED)  # as the supervisor does
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(sha256_cbor)
    ids = random.Random(1).choices(range(200_000), k=530)
    # The attributes of vLLM's Request that its hasher reads.
    request = SimpleNamespace(
        num_tokens=len(ids),
        all_token_ids=ids,
        block_hashes=[],
        mm_features=[],
        prompt_embeds=None,
        cache_salt=salt,
        lora_request=lora and SimpleNamespace(lora_name=lora[0], lora_path=lora[1]),
    )
    theirs = kv_cache_utils.get_request_block_hasher(16, sha256_cbor)(request)
    assert kv_cache_utils.NONE_HASH == ROOT
    assert full_block_hashes(ids, 16, salt, lora) == theirs
    assert block_hashes(ids, 16, salt, lora) == [kv_cache_utils.maybe_convert_block_hash(full) for full in theirs]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::Warning")  # importing vLLM and torch warns
@pytest.mark.parametrize("salt", [None, "tenant-7"])
def test_a_vllm_that_does_not_name_salts_is_made_to_hash_them_as_we_do(
    monkeypatch: pytest.MonkeyPatch, salt: str | None
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", SEED)
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils

    from workers.connector.hashes import name_salts

    def as_in_0_26(request: SimpleNamespace, start: int, end: int, multimodal: int) -> tuple[tuple[str] | None, int]:
        return ((request.cache_salt,) if start == 0 and request.cache_salt else None), multimodal

    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", as_in_0_26)
    name_salts()
    name_salts()  # of both connectors of an engine in one process
    kv_cache_utils.init_none_hash(sha256_cbor)
    ids = list(range(100))
    request = SimpleNamespace(
        num_tokens=len(ids), all_token_ids=ids, block_hashes=[], mm_features=[], prompt_embeds=None,
        cache_salt=salt, lora_request=None,
    )  # fmt: skip
    theirs = kv_cache_utils.get_request_block_hasher(16, sha256_cbor)(request)
    assert full_block_hashes(ids, 16, salt) == theirs


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::Warning")  # importing vLLM and torch warns
def test_a_vllm_that_names_salts_is_left_as_it_is() -> None:
    from vllm.v1.core import kv_cache_utils

    from workers.connector.hashes import name_salts

    before = kv_cache_utils.generate_block_hash_extra_keys
    name_salts()
    assert kv_cache_utils.generate_block_hash_extra_keys is before
