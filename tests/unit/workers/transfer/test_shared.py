from __future__ import annotations

import os

import msgspec
import pytest
import torch

from workers.errors import StaleIncarnation
from workers.transfer.shared import Shared, open_shared


def test_what_one_side_writes_the_other_reads() -> None:
    mine = Shared(4096)
    theirs = open_shared(mine.card)
    assert theirs is not None
    mine.bytes[7] = 3
    theirs.bytes[4095] = 9
    assert int(theirs.bytes[7]) == 3
    assert int(mine.bytes[4095]) == 9
    mine.close()


def test_memory_of_another_host_is_not_shared() -> None:
    mine = Shared(64)
    assert open_shared(msgspec.structs.replace(mine.card, host="another boot")) is None
    mine.close()


def test_memory_of_a_process_that_ended_is_not_shared() -> None:
    mine = Shared(64)
    mine.close()
    assert open_shared(mine.card) is None


def test_another_file_under_the_same_descriptor_is_told_apart() -> None:
    mine = Shared(64)
    other = os.memfd_create("other")
    os.ftruncate(other, os.fstat(mine.card.fd).st_size)
    card = msgspec.structs.replace(mine.card, fd=other)
    with pytest.raises(StaleIncarnation):
        open_shared(card)
    os.close(other)
    mine.close()


def test_shared_memory_outlives_its_name() -> None:
    mine = Shared(64)
    theirs = open_shared(mine.card)
    mine.close()
    assert theirs is not None
    theirs.bytes.fill_(5)
    assert torch.equal(mine.bytes, torch.full((64,), 5, dtype=torch.uint8))
