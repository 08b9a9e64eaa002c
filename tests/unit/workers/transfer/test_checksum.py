from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.checksum import checksum

CPU = torch.device("cpu")


@given(st.binary(min_size=8, max_size=400).map(lambda data: data[: len(data) // 4 * 4]), st.data())
def test_a_changed_byte_always_shows(data: bytes, draw: st.DataObject) -> None:
    piece = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    before = checksum(piece)
    at = draw.draw(st.integers(0, len(data) - 1))
    piece[at] ^= draw.draw(st.integers(1, 255))
    assert checksum(piece) != before


def test_two_blocks_that_changed_places_show() -> None:
    piece = torch.arange(64, dtype=torch.uint8)
    swapped = torch.cat([piece[32:], piece[:32]])
    assert checksum(piece) != checksum(swapped)


def test_the_same_flip_in_two_places_does_not_cancel_out() -> None:
    piece = torch.zeros(64, dtype=torch.uint8)
    before = checksum(piece)
    piece[3] ^= 0x80
    piece[11] ^= 0x80
    assert checksum(piece) != before
