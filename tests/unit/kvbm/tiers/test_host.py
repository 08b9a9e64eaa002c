"""The host tier's memory is shared with processes of the same user, by name, and cut on pages."""

from __future__ import annotations

import mmap
import os

import pytest

from kvbm.tiers.host import HostMemory, slot_bytes


@pytest.mark.parametrize(("block", "ranks", "slot"), [(4096, 1, 4096), (4097, 1, 8192), (1000, 4, 4096), (1, 1, 4096)])
def test_a_slot_holds_every_rank_and_begins_on_a_page(block: int, ranks: int, slot: int) -> None:
    assert slot_bytes(block, ranks) == slot


def test_what_another_process_writes_by_the_path_is_seen() -> None:
    memory = HostMemory(8192)
    file = os.open(memory.path, os.O_RDWR)
    with mmap.mmap(file, 8192) as other:
        other[5000] = 7
        assert memory.view(5000, 2).tolist() == [7, 0]
    os.close(file)
    memory.close()
    assert not os.path.exists(memory.path)
