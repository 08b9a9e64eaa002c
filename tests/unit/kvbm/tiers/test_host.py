"""The host tier's memory is shared with processes of the same user, by name."""

from __future__ import annotations

import mmap
import os

from kvbm.tiers.host import HostMemory


def test_what_another_process_writes_by_the_path_is_seen() -> None:
    memory = HostMemory(8192)
    file = os.open(memory.path, os.O_RDWR)
    with mmap.mmap(file, 8192) as other:
        other[5000] = 7
        assert memory.view(5000, 2).tolist() == [7, 0]
    os.close(file)
    memory.close()
    assert not os.path.exists(memory.path)
