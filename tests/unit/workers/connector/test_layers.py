"""Pieces that leave while the step they belong to is still computed, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import PushTarget
from tests.unit.workers.connector.layouts import BLOCKS as MANY
from tests.unit.workers.connector.layouts import Case, compare
from tests.unit.workers.connector.pair import LAYERS, LAYOUT, Side, pair, plan_receive, push, step_of, tell
from tests.unit.workers.connector.pair import target_of as target_in
from tests.unit.workers.connector.reports import WAIT_S
from workers.connector.forward import Forward
from workers.connector.protocol import Piece, PushEnded, ReceiveEnded, ReceiveOpened, StepPlan, StopPush

TAKEN, PLACED = [1, 2, 3, 4, 5, 6], [20, 11, 32, 43, 54, 5]  # a piece takes two blocks in three layers, or six in one


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """(sender, receiver)"""
    with pair() as made:
        yield made


def opened(receiver: Side, ids: list[int] = PLACED) -> PushTarget:
    plan_receive(receiver, ids)
    return target_in(receiver.reports.take(ReceiveOpened))


def there(sender: Side, receiver: Side, layers: range, taken: list[int] = TAKEN, placed: list[int] = PLACED) -> bool:
    """Whether these layers, and no others, are in place."""
    pairs = zip(sender.blocks(taken), receiver.blocks(placed), strict=True)
    return [layer for layer, (mine, theirs) in enumerate(pairs) if torch.equal(mine, theirs)] == list(layers)


def arrive(sender: Side, receiver: Side, layers: range) -> None:
    """Wait until they are there, and until the sender knows that its write has ended."""
    deadline = time.monotonic() + WAIT_S
    left = -(-(LAYERS - len(layers)) * len(TAKEN) // LAYERS)  # blocks of which a layer is missing at least
    while not (there(sender, receiver, layers) and sender.reports.holding("push") == left):
        assert time.monotonic() < deadline, f"layers {layers} have not come"


def ended(sender: Side, receiver: Side) -> PushEnded:
    """Both sides, well."""
    received, pushed = receiver.reports.take(ReceiveEnded), sender.reports.take(PushEnded)
    assert (received.cause, pushed.cause) == ("", "")
    assert (received.bytes, received.pieces) == (pushed.bytes, pushed.pieces)
    assert pushed.bytes == received.blocks * LAYOUT.block_bytes
    return pushed


def test_layers_leave_while_later_ones_are_computed_and_one_piece_is_left_at_the_end(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.begin(step_of(opened(receiver), TAKEN))
    for layer in range(LAYERS - 1):
        sender.forward.computed(f"layer{layer}")
        arrive(sender, receiver, range(layer + 1))
    assert receiver.mover.ended(set()).received == set()
    assert receiver.reports.latest(ReceiveEnded) is None, "a layer is missing"
    sender.forward.computed(f"layer{LAYERS - 1}")
    sender.end()
    pushed = ended(sender, receiver)
    assert (pushed.pieces, pushed.late_pieces) == (3, 1)
    assert there(sender, receiver, range(LAYERS))


def test_a_step_that_fits_one_piece_leaves_as_one_at_its_end(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.begin(step_of(opened(receiver, PLACED[:2]), TAKEN[:2]))
    for layer in range(LAYERS):
        sender.forward.computed(f"layer{layer}")
        assert sender.reports.holding("push") == 0, "the mover does not even know of it"
    sender.end()
    pushed = ended(sender, receiver)
    assert (pushed.pieces, pushed.late_pieces) == (1, 1)
    assert there(sender, receiver, range(LAYERS), TAKEN[:2], PLACED[:2])


def test_a_step_whose_layers_nobody_tells_of_goes_at_its_end(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.begin(step_of(opened(receiver), TAKEN))
    while sender.reports.holding("push") != len(TAKEN):
        sender.look()
    assert there(sender, receiver, range(0))
    sender.end()
    pushed = ended(sender, receiver)
    assert (pushed.pieces, pushed.late_pieces) == (3, 3)
    assert there(sender, receiver, range(LAYERS))


def test_layers_that_come_out_of_order_wait_for_those_before_them(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.begin(step_of(opened(receiver), TAKEN))
    for layer in (2, 1):
        sender.forward.computed(f"layer{layer}")
        sender.look()
    assert there(sender, receiver, range(0))
    sender.forward.computed("layer0")
    assert ended(sender, receiver).pieces == 3, "nothing is left for the end"
    sender.end()
    assert there(sender, receiver, range(LAYERS))


def test_a_model_whose_layers_cannot_be_told_apart_sends_whole_steps(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    forward, step = Forward(sender.mover, LAYOUT, 0, ()), step_of(opened(receiver), TAKEN)
    assert forward.begin([step]) == [step]
    forward.computed("layer0")
    forward.end()
    sender.mover.plan(StepPlan(pushes=[step]))
    assert ended(sender, receiver).late_pieces == 3


def test_what_is_not_a_layer_with_kv_is_nothing_to_be_told_of(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.forward.computed("layer0")  # of a step that pushes nothing
    sender.begin(step_of(opened(receiver), TAKEN))
    sender.forward.computed("vision.layer0")
    sender.end()
    assert ended(sender, receiver).late_pieces == 3


def test_a_layer_that_does_not_fit_a_piece_is_cut_by_blocks() -> None:
    taken, placed = list(range(16)), list(range(30, 46))
    with pair() as (sender, receiver):
        sender.begin(step_of(opened(receiver, placed), taken))
        sender.forward.computed("layer0")
        sender.forward.computed("layer1")
        deadline = time.monotonic() + WAIT_S
        while not (there(sender, receiver, range(2), taken, placed) and sender.reports.holding("push") == 6):
            assert time.monotonic() < deadline
        sender.end()
        pushed = ended(sender, receiver)
        assert (pushed.pieces, pushed.late_pieces) == (9, 3), "the last layer of sixteen blocks, six of them in a piece"
        assert there(sender, receiver, range(LAYERS), taken, placed)


def test_a_prompt_of_several_steps_is_left_with_one_piece_of_the_last(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    taken, placed = [*range(12)], [*range(30, 42)]
    target = opened(receiver, placed)
    for first in (0, 6):
        sender.begin(step_of(target, taken[first : first + 6], first))
        for layer in range(LAYERS):
            sender.forward.computed(f"layer{layer}")
            left = len(taken) * LAYERS - first * LAYERS - (layer + 1) * 6
            while sender.reports.holding("push") != -(-left // LAYERS):
                sender.look()
        sender.end()
    pushed = ended(sender, receiver)
    assert (pushed.pieces, pushed.late_pieces) == (6, 1)
    assert there(sender, receiver, range(LAYERS), taken, placed)


@pytest.mark.parametrize("how", ["stopped", "cancelled", "preempted"])
def test_a_push_that_ends_between_two_layers_reads_nothing_more(how: str, sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    sender.begin(step_of(opened(receiver), TAKEN))
    sender.forward.computed("layer0")
    arrive(sender, receiver, range(1))
    if how == "stopped":
        sender.mover.command(StopPush("r"))
    elif how == "cancelled":
        sender.mover.plan(StepPlan(cancelled_pushes=["r-engine"]))
    else:
        sender.mover.cancel_pushes(["r-engine"])
    assert sender.reports.take(PushEnded).cause == ("preempted" if how == "preempted" else "cancelled")
    assert sender.held("push") == 0
    for layer in range(1, LAYERS):
        sender.forward.computed(f"layer{layer}")
    sender.end()
    sender.look()
    assert there(sender, receiver, range(1))
    sender.mover.wait(5)
    assert sender.mover.ended({"r-engine"}).sent == (set() if how == "preempted" else {"r-engine"})
    plan_receive(receiver, [7], "next", 512)
    push(sender, target_in(receiver.reports.take(ReceiveOpened)), [9], request_id="next")
    assert sender.reports.take(PushEnded).cause == ""


def test_a_push_preempted_before_the_mover_knew_of_its_step_is_never_begun(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    target = opened(receiver)
    sender.mover.cancel_pushes(["r-engine"])
    sender.begin(step_of(target, TAKEN))
    assert sender.reports.take(PushEnded).cause == "preempted"
    for layer in range(LAYERS):
        sender.forward.computed(f"layer{layer}")
    sender.end()
    sender.look()
    assert there(sender, receiver, range(0))


def test_every_layer_is_proven_by_its_own_checksum() -> None:
    with pair(verify=True) as (sender, receiver):
        target = opened(receiver)
        sender.begin(step_of(target, TAKEN))
        sender.forward.computed("layer0")
        arrive(sender, receiver, range(1))
        tell(target, Piece(target.transfer_id, target.ranks[0].slots[-1], 0, 6, 0, 1, 1, 1, checksum=1))
        assert receiver.reports.take(ReceiveEnded).cause == "corrupt"
        assert sender.reports.take(PushEnded).cause == "corrupt"
        sender.end()


def test_layers_of_every_layout_are_read_after_they_were_computed() -> None:
    prefill = KvLayout(6, 4, 4, 2, 8, 8, "float32", "NHKD", "NHKD")
    decode = KvLayout(6, 8, 4, 4, 8, 8, "bfloat16", "HND", "HND")
    case = Case(150, 1, list(range(MANY)), list(range(18))[::-1], [60, 150])
    compare(prefill, decode, case, torch.device("cpu"), by_layer=True)
    one_step = Case(150, 0, list(range(MANY)), list(range(38)), [150])
    compare(prefill, prefill, one_step, torch.device("cpu"), by_layer=True)
