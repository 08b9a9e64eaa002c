"""The worker process's side of the tiers, with the engine's processes played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from dynamo_lite.config import HostTier
from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import full_block_hashes, low64
from workers import tiers as module
from workers.connector.protocol import (
    Command,
    GrantSlots,
    Offloaded,
    OnboardChecked,
    Onboarded,
    OnboardOver,
    TierChanged,
)
from workers.tiers import Tiers

BLOCK, SLOT = 16, 4096  # tokens; bytes
PROMPT = list(range(100))  # six whole blocks
HASHES = full_block_hashes(PROMPT, BLOCK)
C = TypeVar("C", bound=Command)


class Engine:
    """What the tiers command, and the slots they have granted."""

    def __init__(self, tiers: Tiers) -> None:
        self.tiers = tiers
        self.commands: list[Command] = []
        self.changed = asyncio.Event()

    def __call__(self, command: Command) -> None:
        self.commands.append(command)
        self.changed.set()

    async def take(self, kind: type[C], fits: Callable[[C], bool] = lambda _: True) -> C:
        async with asyncio.timeout(5):
            while True:
                for command in self.commands:
                    if isinstance(command, kind) and fits(command):
                        self.commands.remove(command)
                        return command
                self.changed.clear()
                await self.changed.wait()

    async def offload(self, numbers: range, ranks: int = 1) -> list[int]:
        """Fill granted slots with these blocks of the prompt; returns the slots."""
        (grant,) = [one for one in self.commands if isinstance(one, GrantSlots)]
        slots = list(grant.slots[: len(numbers)])
        self.commands.remove(grant)
        for number, slot in zip(numbers, slots, strict=True):
            self.tiers.memory.view(slot * SLOT, SLOT)[:] = bytes([number + 1]) * SLOT
        blocks = tuple((slot, HASHES[number], True) for number, slot in zip(numbers, slots, strict=True))
        for rank in range(ranks):
            self.tiers.handle(Offloaded(rank, blocks))
        await self.take(GrantSlots)  # follows once they are stored
        return slots


@asynccontextmanager
async def tiers_of(slots: int, ranks: int = 1) -> AsyncIterator[tuple[Tiers, Engine]]:
    tiers = Tiers(HostTier(size=slots * SLOT))
    engine = Engine(tiers)
    async with asyncio.TaskGroup() as group:
        tiers.start(SLOT // ranks, ranks, BLOCK, engine, group)
        yield tiers, engine
    tiers.close()


async def taken(tiers: Tiers) -> tuple[KvEvent, ...]:
    async with asyncio.timeout(5):
        return await anext(tiers.events())


async def test_a_block_can_be_found_once_every_rank_has_filled_its_share() -> None:
    async with tiers_of(64, ranks=2) as (tiers, engine):
        slots = await engine.offload(range(2), ranks=2)
        assert await taken(tiers) == tuple(BlocksStored((low64(HASHES[number]),), tier=Tier.HOST) for number in (0, 1))
        onboarding = tiers.onboard("r", PROMPT, None, 0)
        assert onboarding is not None
        assert (onboarding.first, onboarding.slots) == (0, slots)
        assert (await engine.take(OnboardChecked)).blocks == 2
        assert tiers.onboard("s", PROMPT, "another tenant", 0) is None


@pytest.mark.parametrize(("local", "found"), [(0, 6), (2, 4), (6, 0)])
async def test_only_what_the_device_lacks_is_onboarded(local: int, found: int) -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        onboarding = tiers.onboard("r", PROMPT, None, local)
        assert (len(onboarding.blocks) if onboarding else 0) == found


async def test_the_engine_is_left_a_token_to_compute() -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        onboarding = tiers.onboard("r", PROMPT[: 2 * BLOCK], None, 0)
        assert onboarding is not None
        assert len(onboarding.blocks) == 1


async def test_a_changed_byte_is_found_and_its_block_forgotten_by_all() -> None:
    async with tiers_of(64) as (tiers, engine):
        slots = await engine.offload(range(4))
        await taken(tiers)
        tiers.memory.view(slots[2] * SLOT + 77, 1)[0] ^= 1
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        assert (await engine.take(OnboardChecked)).blocks == 2
        assert (await engine.take(TierChanged)).removed == (HASHES[2],)
        assert await taken(tiers) == (BlocksRemoved((low64(HASHES[2]),), Tier.HOST),)
        assert tiers.load()[0].corrupt == 1


async def test_the_engine_is_told_of_blocks_that_are_right_before_all_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CHECKED", 2 * SLOT)
    async with tiers_of(64) as (tiers, engine):
        slots = await engine.offload(range(6))
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        told = [await engine.take(OnboardChecked) for _ in range(3)]
        assert [(one.blocks, one.more) for one in told] == [(2, True), (4, True), (6, False)]
        tiers.memory.view(slots[2] * SLOT, 1)[0] ^= 1
        assert tiers.onboard("s", PROMPT, None, 0) is not None
        told = [await engine.take(OnboardChecked) for _ in range(2)]
        assert [(one.blocks, one.more) for one in told] == [(2, True), (2, False)]


async def test_slots_are_pinned_until_every_rank_has_let_go() -> None:
    async with tiers_of(64, ranks=2) as (tiers, engine):
        await engine.offload(range(3), ranks=2)
        assert tiers.onboard("r", PROMPT, None, 0, "00-" + "1" * 32 + "-" + "2" * 16 + "-01") is not None
        tiers.handle(Onboarded("r", 0, "", 3, 3 * SLOT // 2, 1_000_000, 2_000_000))
        assert tiers.manager.pinned == {"r": 3}
        tiers.release("r")
        tiers.release("r")
        assert isinstance(await engine.take(OnboardOver), OnboardOver)
        assert not [one for one in engine.commands if isinstance(one, OnboardOver)], "they are asked once"
        tiers.handle(Onboarded("r", 0, "cancelled"))
        tiers.handle(Onboarded("r", 1, "", 3, 3 * SLOT // 2, 1_000_000, 3_000_000))
        assert tiers.manager.pinned == {}
        assert tiers.load()[0].onboarded == 3, "the first word of a rank counts"
        tiers.release("r")
        assert not [one for one in engine.commands if isinstance(one, OnboardOver)]


async def test_a_prefix_that_is_faster_to_compute_is_not_read() -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        tiers.cost.onboarded(SLOT, 10.0)
        tiers.cost.computed(1000, 0.1)
        assert tiers.onboard("r", PROMPT, None, 0) is None
        assert tiers.manager.pinned == {}


async def test_slots_that_were_not_filled_are_granted_again() -> None:
    async with tiers_of(16) as (tiers, engine):
        (slot, *_) = (await engine.take(GrantSlots)).slots
        tiers.handle(Offloaded(0, ((slot, HASHES[0], False),)))
        assert (await engine.take(TierChanged)).removed == (HASHES[0],)
        assert slot in (await engine.take(GrantSlots)).slots
        tiers.handle(Offloaded(-1, missed=3))
        assert tiers.load()[0].missed == 4


async def test_the_device_being_cleared_leaves_the_tier_known() -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(1))
        await taken(tiers)

        async def device() -> AsyncIterator[tuple[KvEvent, ...]]:
            yield (BlocksCleared(),)
            await asyncio.Event().wait()

        forwarding = asyncio.create_task(tiers.forward(device()))
        assert await taken(tiers) == (BlocksCleared(), BlocksStored((low64(HASHES[0]),), tier=Tier.HOST))
        forwarding.cancel()


async def test_a_tier_that_holds_no_two_blocks_is_refused_with_its_key() -> None:
    tiers = Tiers(HostTier(size=SLOT))
    async with asyncio.TaskGroup() as group:
        with pytest.raises(ValueError, match=r"kv_tiers\.host\.size"):
            tiers.start(SLOT, 1, BLOCK, lambda _: None, group)
    tiers.close()
