"""GPU memory shared between two processes, as a peer's staging is."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.connection import Connection

import msgspec
import pytest
import torch

from workers.transfer.cuda_ipc import CudaBytes, open_cuda, share_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZE = 64 * 2**20
WAIT_S = 60.0


def fill(pipe: Connection) -> None:
    """The other process: opens what it is sent, writes to it twice as long as it is told to."""
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    card = pipe.recv()
    while (value := pipe.recv()) is not None:
        window = open_cuda(card, device)
        assert window is not None
        assert int(window.bytes[5]) == value - 1
        window.bytes[: SIZE // 2].fill_(value)
        torch.cuda.synchronize()
        window.close()
        pipe.send((window.address, len(window.bytes)))
    gone = msgspec.structs.replace(card, handle=bytes(64))
    pipe.send(open_cuda(gone, device) is None)


def test_what_a_peer_writes_to_mapped_memory_is_there_and_nothing_else_is_touched() -> None:
    padding = torch.zeros(3 * 2**20, dtype=torch.uint8, device="cuda")  # so that ours is not alone in its allocation
    memory = torch.full((SIZE,), 6, dtype=torch.uint8, device="cuda")
    card = share_cuda(memory)
    assert isinstance(card, CudaBytes)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=fill, args=(theirs,))
    process.start()
    ours.send(card)
    for value in (7, 8):  # opened, closed, and opened again
        ours.send(value)
        assert ours.poll(WAIT_S)
        assert ours.recv() == (memory.data_ptr(), SIZE)
        assert bool((memory[: SIZE // 2] == value).all())
        assert bool((memory[SIZE // 2 :] == 6).all())
    assert not bool(padding.any())
    ours.send(None)
    assert ours.poll(WAIT_S)
    assert ours.recv() is True  # what cannot be opened is simply not shared
    process.join(WAIT_S)
    assert open_cuda(card, torch.device("cuda", 0)) is None  # its own process needs no window
