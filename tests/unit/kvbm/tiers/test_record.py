"""A record proves which block it holds, and that it is whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.hashing import FullHash
from kvbm.tiers.record import TRAILER_BYTES, Records, stride_bytes

HASH, OTHER = FullHash(b"a" * 32), FullHash(b"b" * 32)


@pytest.mark.parametrize(("block", "stride"), [(1, 4096), (4096 - TRAILER_BYTES, 4096), (4096, 8192)])
def test_records_side_by_side_begin_on_pages(block: int, stride: int) -> None:
    assert stride_bytes(block) == Records(block, 0).stride == stride


def sealed(content: bytes, namespace: int = 7) -> tuple[Records, memoryview]:
    records = Records(len(content), namespace)
    record = memoryview(bytearray(content + bytes(TRAILER_BYTES)))
    records.seal(record, HASH)
    return records, record


@given(st.binary(min_size=1, max_size=300))
def test_a_sealed_record_proves_its_block_by_the_checksum_it_was_sealed_with(content: bytes) -> None:
    records, record = sealed(content)
    assert records.proven(record, HASH) == records.checksum(record)
    assert bytes(record[: len(content)]) == content


@given(st.binary(min_size=1, max_size=64), st.data())
def test_one_bit_changed_anywhere_is_found(content: bytes, data: st.DataObject) -> None:
    records, record = sealed(content)
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert records.proven(record, HASH) is None


def test_another_block_another_namespace_or_nothing_at_all_is_not_what_was_asked_for() -> None:
    records, record = sealed(b"content")
    assert records.proven(record, OTHER) is None
    assert Records(7, 8).proven(record, HASH) is None
    assert Records(6, 7).proven(record, HASH) is None
    assert records.proven(record[:-1], HASH) is None
    assert records.proven(memoryview(bytes(len(record))), HASH) is None
