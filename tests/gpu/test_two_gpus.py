"""KV from one GPU to another of the same host: each process sees only its own, as workers do."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.connection import Connection

import pytest
import torch
from rich.console import Console

from dynamo_lite.plane.layout import KvLayout
from tests.unit.workers.connector.layouts import Case, compare
from tests.unit.workers.transfer.kv import ORDERS
from workers.bench.transfer import options_of, run
from workers.transfer.cuda_ipc import CudaBytes, open_cuda, share_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
SIZE = 64 * 2**20
WAIT_S = 60.0


def fill_from_the_other_gpu(card: CudaBytes, pipe: Connection) -> None:
    """Another process, which sees the second GPU only: writes what it has there to the first one's memory."""
    device = torch.device("cuda", 0)
    mine = torch.arange(SIZE // 8, dtype=torch.int64, device=device)
    window = open_cuda(card, device)
    if window is not None:
        window.bytes.copy_(mine.view(torch.uint8))
        torch.cuda.synchronize()
        window.close()
    pipe.send(window is not None)


def test_memory_of_a_gpu_that_a_process_does_not_see_is_mapped_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(SIZE, dtype=torch.uint8, device="cuda:0")
    card = share_cuda(memory)
    assert card is not None
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=fill_from_the_other_gpu, args=(card, theirs))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of no effect here, where CUDA has been used
    process.start()
    assert ours.poll(WAIT_S)
    assert ours.recv() is True
    process.join(WAIT_S)
    assert torch.equal(memory.view(torch.int64), torch.arange(SIZE // 8, device="cuda:0"))


def test_kv_goes_from_one_gpu_to_the_other_by_cuda_ipc_and_every_block_is_right() -> None:
    options = options_of(
        ["--device", "cuda", "--gpus", "0,1", "--size", "128MiB", "--piece", "16MiB", "--rounds", "2", "--idle", "0.1"]
    )  # fmt: skip
    _, raw = run(options, Console(quiet=True))  # raises unless both ends agree on the content
    assert raw["paths"]["auto"]["path"] == "cuda_ipc"


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [(2, 1), (1, 2), (4, 2)],
)
def test_unequal_workers_exchange_kv_over_two_gpus(prefill: int, decode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Agents of one process that connect at once may crash in UCX's cuda_ipc; a worker's process has one.
    monkeypatch.setenv("UCX_TLS", "^cuda_ipc")
    sender, receiver = (KvLayout(2, 16, 4, ranks, 64, 64, "bfloat16", *ORDERS["nhd"]) for ranks in (prefill, decode))
    case = Case(250, 1, list(range(16))[::-1], list(range(3, 18)), [70, 200, 250])
    compare(sender, receiver, case, torch.device("cuda", 0), torch.device("cuda", 1))
