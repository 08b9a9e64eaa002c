"""Block hashes equal vLLM's definition, written with cbor2."""

from __future__ import annotations

import hashlib
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvbm.hashing import ROOT, block_hashes, full_block_hashes, low64
from kvbm.seed import SEED

token_ids = st.lists(
    st.one_of(st.integers(0, 300), st.integers(65_000, 66_000), st.integers(0, 2**32 - 1)), max_size=200
)


def sha256_cbor(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def defined_hashes(ids: list[int], size: int, salt: str | None, lora: tuple[str, str] | None) -> list[bytes]:
    """vLLM's definition, block by block."""
    parent, hashes = sha256_cbor(SEED), []
    for start in range(0, len(ids) - size + 1, size):
        keys: list[Any] = [("lora", *lora)] if lora else []
        keys += [("cache_salt", salt)] if salt and start == 0 else []
        parent = sha256_cbor((parent, tuple(ids[start : start + size]), tuple(keys) or None))
        hashes.append(parent)
    return hashes


@given(
    token_ids,
    st.sampled_from([1, 4, 16, 23, 24, 32, 128]),
    st.one_of(st.none(), st.text(max_size=40)),
    st.one_of(st.none(), st.tuples(st.text(max_size=9), st.text(max_size=30))),
)
@example([0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1], 4, None, None)
@example(list(range(300)), 300, "tenant", ("adapter", "/models/a"))
def test_hashes_equal_the_definition_written_with_cbor2(
    ids: list[int], size: int, salt: str | None, lora: tuple[str, str] | None
) -> None:
    expected = defined_hashes(ids, size, salt, lora)
    assert full_block_hashes(ids, size, salt, lora) == expected
    assert block_hashes(ids, size, salt, lora) == [int.from_bytes(full, "big") & (2**64 - 1) for full in expected]


def test_an_array_over_65535_tokens_has_a_four_byte_length() -> None:
    ids = [7] * 70_000
    assert full_block_hashes(ids, 70_000) == defined_hashes(ids, 70_000, None, None)


@given(token_ids, st.integers(0, 200))
def test_a_chain_continued_after_a_block_equals_the_chain_hashed_at_once(ids: list[int], cut: int) -> None:
    whole = full_block_hashes(ids, 4, "salt")
    done = whole[: cut // 4]
    rest = full_block_hashes(ids[len(done) * 4 :], 4, "salt", after=done[-1] if done else None)
    assert done + rest == whole


def test_a_salt_separates_tenants_and_an_empty_one_is_none() -> None:
    ids = list(range(64))
    assert not set(block_hashes(ids, 16, "a")) & set(block_hashes(ids, 16, "b"))
    assert block_hashes(ids, 16, "") == block_hashes(ids, 16)


def test_a_partial_block_has_no_hash() -> None:
    assert block_hashes([1] * 15, 16) == []
    assert len(block_hashes([1] * 47, 16)) == 2


def test_the_low_half_is_the_last_eight_bytes() -> None:
    assert low64(ROOT) == int.from_bytes(ROOT, "big") & (2**64 - 1)


def test_a_negative_token_id_is_refused() -> None:
    with pytest.raises(OverflowError):
        block_hashes([-1] * 16, 16)
