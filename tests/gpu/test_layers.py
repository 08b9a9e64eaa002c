"""Pieces that leave while a GPU computes later layers of the same step: real movers, events and kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynamo_lite.plane.layout import KvLayout
from tests.unit.workers.connector.layouts import BLOCKS, steps_of
from tests.unit.workers.connector.pair import Side, Worker, worker
from tests.unit.workers.connector.prompt import Engine
from tests.unit.workers.transfer.kv import ORDERS
from workers.connector.protocol import PushEnded, PushStep, ReceiveEnded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
LAYOUT = KvLayout(8, 16, 4, 1, 64, 64, "bfloat16", *ORDERS["nhd"])
TAKEN, PLACED = list(range(16)), list(range(20, 36))  # a piece takes two blocks in eight layers, or sixteen in one
TOKENS = len(TAKEN) * LAYOUT.block_size
LAYER_CYCLES = 100_000_000  # some 50 ms
NEW = 110  # content of the first layer; before, all values are less


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, Worker]]:
    """(prefill, decode), which have exchanged something before: kernels are compiled, connections are made."""
    # Agents of one process that connect at once may crash in UCX's cuda_ipc; a worker's process has one.
    monkeypatch.setenv("UCX_TLS", "^cuda_ipc")
    with (
        worker(LAYOUT, BLOCKS, 1, slots=16, device=DEVICE) as prefill,
        worker(LAYOUT, BLOCKS, 50, slots=16, device=DEVICE) as decode,
    ):
        prefill.compute([step(decode, 256)], lambda _: None)
        ended(prefill, decode)
        (side,) = prefill.sides
        side.mover.wait(5)
        assert side.mover.ended({"e"}).sent == {"e"}
        yield prefill, decode


def step(decode: Worker, transfer_id: int) -> PushStep:
    target = decode.open(PLACED, 0, TOKENS, transfer_id)
    (one,) = steps_of(Engine(LAYOUT.block_size, TOKENS, target, TAKEN), [TOKENS])
    return one


def ended(prefill: Worker, decode: Worker) -> PushEnded:
    assert decode.sides[0].reports.take(ReceiveEnded).cause == ""
    pushed = prefill.sides[0].reports.take(PushEnded)
    assert pushed.cause == ""
    return pushed


def launch(side: Side, prefill: Worker, *, told: bool) -> None:
    """Launch a forward pass, each layer of which takes a while and then has content of its own."""
    for layer, cache in enumerate(prefill.ranks[0].caches):
        torch.cuda._sleep(LAYER_CYCLES)
        cache.fill_(NEW + layer)
        if told:
            side.forward.computed(f"layer{layer}")


@pytest.mark.parametrize("told", [True, False], ids=["layer by layer", "in one CUDA graph"])
def test_one_piece_is_left_of_a_step_that_the_gpu_has_told_of(told: bool, workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    (side,) = prefill.sides
    side.begin(step(decode, 512))
    launch(side, prefill, told=told)
    side.end()
    assert not torch.cuda.current_stream().query(), "launching has waited for the GPU"
    pushed = ended(prefill, decode)
    assert (pushed.pieces, pushed.late_pieces) == (8, 1 if told else 8)
    for layer, cache in enumerate(decode.ranks[0].caches):
        assert bool((cache[PLACED] == NEW + layer).all()), f"layer {layer} was read before it was computed"


def test_a_preemption_does_not_wait_for_what_the_gpu_still_computes(workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    (side,) = prefill.sides
    side.begin(step(decode, 512))
    launch(side, prefill, told=True)
    side.mover.cancel_pushes(["e"])
    assert not torch.cuda.current_stream().query(), "it has waited for layers that are not read"
    assert side.reports.take(PushEnded).cause in ("preempted", "in_flight")
    side.end()
    torch.cuda.synchronize()
    side.look()
    assert not bool((decode.ranks[0].caches[-1][PLACED] >= NEW).any()), "it was pushed all the same"
