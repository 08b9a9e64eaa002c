"""Our hashes against vLLM's own function."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvbm.hashing import ROOT, SEED, block_hashes, full_block_hashes


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
