"""A prompt's KV from all ranks of one worker to all ranks of another, and every byte of it compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_lite.plane.layout import KvLayout
from tests.unit.workers.connector.pair import worker
from tests.unit.workers.connector.prompt import Engine
from workers.connector.protocol import PushEnded, PushStep, ReceiveEnded

BLOCKS = 40  # of each worker


@dataclass(frozen=True)
class Case:
    """`tokens` of a prompt, of which the receiver has the first `first` blocks already."""

    tokens: int
    first: int
    taken: list[int]  # the sender's blocks
    placed: list[int]  # the receiver's, from its `first` block on
    cuts: list[int]  # steps of the prefill end after so many tokens


def steps_of(engine: Engine, cuts: list[int]) -> list[PushStep]:
    """The prompt computed in steps that end after so many tokens."""
    engine.side.arrived(engine.request)
    return [step for cut in cuts for step in engine.step(cut - engine.computed)]


def expected(prompt: torch.Tensor, tokens: int, first: int, prefill: KvLayout, decode: KvLayout) -> torch.Tensor:
    """What the filled blocks hold, of all heads: `[layers, 2, blocks, tokens, heads, values]`.

    What follows the prompt in its last block is what the sender had there, or zero where it had to convert.
    """
    size = decode.block_size
    blocks = -(-tokens // size)
    alike = (prefill.block_size, prefill.dtype, prefill.keys) == (size, decode.dtype, decode.keys)
    padded = torch.zeros(*prompt.shape[:2], blocks * size, *prompt.shape[3:])
    padded[:, :, :tokens] = prompt[:, :, :tokens]
    if alike:
        padded[:, :, tokens:] = prompt[:, :, tokens : blocks * size]
    return padded.unflatten(2, (blocks, size))[:, :, first:]


def compare(
    prefill: KvLayout, decode: KvLayout, case: Case, device: torch.device, other: torch.device | None = None,
    *, by_layer: bool = False,
) -> None:  # fmt: skip
    """Asserts that the blocks placed are the prompt's, in the receiver's form, and that no other block has changed.

    The receiver is on the `other` device, if there is one. `by_layer`: the first step computes one layer after the
    other, and the sender's movers are told of each.
    """
    generator = torch.Generator().manual_seed(case.tokens)
    shape = (prefill.layers, 2, len(case.taken) * prefill.block_size, prefill.kv_heads, prefill.key_size)
    prompt = torch.randint(0, 200, shape, generator=generator).float()
    with (
        worker(prefill, BLOCKS, 1, slots=16, device=device) as senders,
        worker(decode, BLOCKS, 50, device=other or device) as receivers,
    ):
        layers = range(0 if by_layer else prefill.layers)
        for rank in senders.ranks:
            rank.write(case.taken, prompt, layers)
        before = [rank.logical() for rank in receivers.ranks]
        target = receivers.open(case.placed, case.first, case.tokens - case.first * decode.block_size)
        steps = steps_of(Engine(prefill.block_size, case.tokens, target, case.taken), case.cuts)

        def layer(number: int) -> None:
            for rank in senders.ranks:
                rank.write(case.taken, prompt, range(number, number + 1))

        if by_layer:
            senders.compute(steps, layer)
        else:
            senders.push(steps)

        sent = 0
        for side in senders.sides:
            pushed = side.reports.take(PushEnded)
            assert pushed.cause == ""
            sent += pushed.bytes
            assert side.reports.latest(PushEnded) is None, "one report a rank"
        for side in receivers.sides:
            ended = side.reports.take(ReceiveEnded)
            assert (ended.cause, ended.blocks) == ("", len(case.placed))
            assert ended.bytes == len(case.placed) * decode.block_bytes
            sent -= ended.bytes
        assert sent == 0
        whole = expected(prompt, case.tokens, case.first, prefill, decode)
        for rank, old in zip(receivers.ranks, before, strict=True):
            now = rank.logical()
            mine = whole[..., rank.heads.start : rank.heads.stop, :]
            assert torch.equal(now[:, :, case.placed].float().cpu(), mine)
            untouched = [block for block in range(BLOCKS) if block not in case.placed]
            assert torch.equal(now[:, :, untouched], old[:, :, untouched])
