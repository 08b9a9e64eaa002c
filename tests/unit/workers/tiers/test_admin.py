"""What operators see of a worker's blocks, and what becomes of those they verify and drop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_lite.errors import RequestError, WorkerError
from dynamo_lite.plane.kv_wire import (
    KvBlock,
    KvCursor,
    KvList,
    KvListed,
    KvPurge,
    KvPurged,
    KvStats,
    KvTiers,
    KvVerified,
    KvVerify,
)
from kvbm.events import BlocksRemoved, Tier
from kvbm.hashing import FullHash, low64
from tests.unit.workers.tiers.test_tiers import (
    BYTES,
    HASHES,
    PROMPT,
    SLOT,
    _change_a_byte,
    disk,
    load_of,
    on_disk,
    taken,
    tiers_of,
    until,
)
from workers.connector.protocol import Offloaded, OnboardChecked, TierChanged
from workers.engine import EngineLoad
from workers.tiers import admin as module
from workers.tiers import walks
from workers.tiers.admin import KvAdmin
from workers.tiers.tiers import Tiers

BENEATH = (Tier.HOST, Tier.DISK)


def admin_of(tiers: Tiers | None, device: Sequence[int] = ()) -> KvAdmin:
    """`device`: low 64 bits of the hashes that are there."""

    def load() -> EngineLoad:
        return EngineLoad(0, 0, 1, 100, tiers=tiers.load() if tiers is not None else ())

    return KvAdmin(load, lambda: {Tier.DEVICE: tuple(device)}, tiers)


async def fill(tiers: Tiers, *numbers: int) -> None:
    """As if the engine had offloaded these blocks of the prompt."""
    slots = tiers.manager.grant(len(numbers))
    for slot, number in zip(slots, numbers, strict=True):
        tiers.memory.view(slot * SLOT, BYTES)[:] = bytes([number + 1]) * BYTES
    tiers.handle(Offloaded(0, tuple((slot, HASHES[number], True) for slot, number in zip(slots, numbers, strict=True))))
    await until(tiers, lambda: all(tiers.manager.match([HASHES[number]]) for number in numbers))


async def told_gone(tiers: Tiers, hashes: Sequence[FullHash]) -> None:
    """Until routers know that these, and no others, are not on disk any more."""
    gone: set[int] = set()
    while gone < set(map(low64, hashes)):
        for event in await taken(tiers):
            if isinstance(event, BlocksRemoved) and event.tier is Tier.DISK:
                gone.update(event.hashes)
    assert gone == set(map(low64, hashes))


async def listed(admin: KvAdmin, tiers: tuple[Tier, ...], limit: int = 1000) -> list[KvBlock]:
    blocks: list[KvBlock] = []
    cursor: KvCursor | None = None
    while True:
        told = await admin.answer(KvList(tiers, cursor, limit))
        assert isinstance(told, KvListed)
        assert len(told.blocks) <= limit
        blocks += told.blocks
        cursor = told.cursor
        if cursor is None:
            return blocks


async def verified(admin: KvAdmin, tier: Tier) -> tuple[int, int, int]:
    """Right, corrupt, gone."""
    right = corrupt = gone = 0
    cursor: KvCursor | None = None
    while True:
        told = await admin.answer(KvVerify(tier, cursor))
        assert isinstance(told, KvVerified)
        right, corrupt, gone = right + told.right, corrupt + told.corrupt, gone + told.gone
        cursor = told.cursor
        if cursor is None:
            return right, corrupt, gone


async def test_stats_tell_of_every_tier(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await engine.offload(range(6))
        await until(tiers, lambda: load_of(tiers, Tier.DISK).offloaded == 6)
        told = await admin_of(tiers, [1, 2, 3]).answer(KvStats())
        assert isinstance(told, KvTiers)
        assert (told.device_used, told.device_cached, told.device_total) == (1, 3, 100)
        assert [(one.tier, one.on, one.blocks, one.used_bytes) for one in told.tiers] == [
            (Tier.HOST, True, 6, 6 * SLOT),
            (Tier.DISK, True, 6, 6 * SLOT),
        ]


@pytest.mark.parametrize("limit", [1, 2, 1000])
async def test_every_block_is_listed_once_with_all_its_tiers(limit: int, tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine, 4)
        await fill(tiers, 3, 4, 5)
        await until(tiers, lambda: load_of(tiers, Tier.DISK).offloaded == 6)
        admin = admin_of(tiers, [low64(HASHES[0]), low64(HASHES[5]), 7])
        found = await listed(admin, (*BENEATH, Tier.DEVICE), limit)
        assert {block.hash: block.tiers for block in found} == {
            HASHES[0]: (Tier.DEVICE, Tier.DISK),
            HASHES[1]: (Tier.DISK,),
            HASHES[2]: (Tier.DISK,),
            HASHES[3]: BENEATH,
            HASHES[4]: BENEATH,
            HASHES[5]: (Tier.DEVICE, *BENEATH),
            (7).to_bytes(8, "big"): (Tier.DEVICE,),
        }
        assert len(found) == 7
        assert {block.hash for block in await listed(admin, (Tier.HOST,), limit)} == set(HASHES[3:])
        assert [block.hash[-8:] for block in await listed(admin, (Tier.DEVICE,), limit)] == [
            HASHES[0][-8:],
            HASHES[5][-8:],
            (7).to_bytes(8, "big"),
        ]


async def test_a_worker_without_tiers_lists_its_device_and_refuses_the_rest() -> None:
    admin = admin_of(None, [5])
    assert await listed(admin, (*BENEATH, Tier.DEVICE)) == [KvBlock((5).to_bytes(8, "big"), (Tier.DEVICE,))]
    for ask in (KvVerify(Tier.HOST), KvPurge(Tier.DISK)):
        with pytest.raises(RequestError, match=f"no {ask.tier} tier"):
            await admin.answer(ask)


async def test_what_leaves_while_it_is_listed_is_not_told(tmp_path: Path) -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        admin = admin_of(tiers)
        first = await admin.answer(KvList((Tier.HOST,), None, 2))
        assert isinstance(first, KvListed)
        tiers.manager.purge()
        rest = await admin.answer(KvList((Tier.HOST,), first.cursor, 1000))
        assert rest == KvListed((), None)


async def test_a_listing_that_was_left_is_forgotten_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    admin = admin_of(None, [1, 2, 3])
    ask = KvList((Tier.DEVICE,), None, 1)
    told = [await admin.answer(ask) for _ in range(5)]
    first, last = told[0], told[-1]
    assert isinstance(first, KvListed)
    assert isinstance(last, KvListed)
    with pytest.raises(RequestError, match="begin anew"):
        await admin.answer(KvList((Tier.DEVICE,), first.cursor, 1))
    monkeypatch.setattr(walks, "_KEPT_S", -1.0)
    with pytest.raises(RequestError, match="begin anew"):
        await admin.answer(KvList((Tier.DEVICE,), last.cursor, 1))


async def test_a_byte_that_changed_in_host_memory_is_found_told_and_its_block_dropped() -> None:
    async with tiers_of(64) as (tiers, engine):
        slots = await engine.offload(range(6))
        await taken(tiers)
        tiers.memory.view(slots[2] * SLOT + 9, 1)[0] ^= 1
        before = tiers.manager.hashes()
        assert await verified(admin_of(tiers), Tier.HOST) == (5, 1, 0)
        assert load_of(tiers, Tier.HOST).corrupt == 1
        assert (await engine.take(TierChanged)).removed == (HASHES[2],)
        assert await taken(tiers) == (BlocksRemoved((low64(HASHES[2]),), Tier.HOST),)
        assert tiers.manager.hashes() == tuple(one for one in before if one != HASHES[2])


async def test_verifying_does_not_make_a_block_seem_to_be_of_use() -> None:
    async with tiers_of(16) as (tiers, engine):
        await fill(tiers, 0, 1)
        await fill(tiers, 2, 3)
        assert tiers.onboard("r", PROMPT[: 2 * 16 + 1], None, 0) is not None  # the first two are of use now
        await engine.take(OnboardChecked, lambda one: not one.more)
        tiers.manager.unpin("r")
        assert await verified(admin_of(tiers), Tier.HOST) == (4, 0, 0)
        while tiers.manager.stored > 2:
            tiers.manager.grant(1)
        assert set(tiers.manager.hashes()) == set(HASHES[:2])


async def test_a_byte_that_changed_on_disk_is_found_told_and_its_block_dropped_for_good(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        _change_a_byte(tmp_path, bytes([3]) * BYTES)
        free = tiers.manager.granted
        admin = admin_of(tiers)
        assert await verified(admin, Tier.DISK) == (5, 1, 0)
        assert load_of(tiers, Tier.DISK).corrupt == 1
        assert load_of(tiers, Tier.DISK).onboarded == 0
        assert tiers.manager.granted == free, "what was lent was given back"
        assert tiers.manager.stored == 0, "what was read cannot be found in host memory"
        assert await verified(admin, Tier.DISK) == (5, 0, 0)
        await told_gone(tiers, [HASHES[2]])
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, _):
        assert low64(HASHES[2]) not in tiers.snapshot()[Tier.DISK]


async def test_verifying_a_disk_evicts_at_most_the_few_blocks_whose_slots_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_SLOTS", 1)
    async with tiers_of(8, disk=disk(tmp_path)) as (tiers, _):
        await fill(tiers, *range(6))
        await until(tiers, lambda: load_of(tiers, Tier.DISK).offloaded == 6)
        engine_slots = tiers.manager.grant(8 - tiers.manager.stored - tiers.manager.granted)
        assert tiers.manager.stored == 6
        assert await verified(admin_of(tiers), Tier.DISK) == (6, 0, 0)
        assert tiers.manager.stored == 5
        for slot in engine_slots:
            tiers.manager.abandon(slot)


async def test_a_host_memory_that_is_all_in_use_is_not_taken_from_requests(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        slots = tiers.manager.grant(tiers.manager.slots)
        with pytest.raises(WorkerError, match="no room to read blocks into"):
            await admin_of(tiers).answer(KvVerify(Tier.DISK))
        for slot in slots:
            tiers.manager.abandon(slot)


async def test_a_request_has_its_blocks_while_the_disk_is_verified(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        async with asyncio.TaskGroup() as group:
            verifying = group.create_task(verified(admin_of(tiers), Tier.DISK))
            assert tiers.onboard("r", PROMPT, None, 0) is not None
            assert (await engine.take(OnboardChecked, lambda one: not one.more)).blocks == 6
        right, corrupt, _ = verifying.result()
        assert (right, corrupt) == (6, 0)


async def test_a_purge_of_host_memory_drops_all_and_tells_engine_and_routers() -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        await taken(tiers)
        assert await admin_of(tiers).answer(KvPurge(Tier.HOST)) == KvPurged(6)
        assert set((await engine.take(TierChanged)).removed) == set(HASHES)
        assert {one for event in await taken(tiers) for one in getattr(event, "hashes", ())} == set(map(low64, HASHES))
        assert tiers.onboard("r", PROMPT, None, 0) is None


async def test_a_purge_of_host_memory_leaves_requests_what_they_read() -> None:
    async with tiers_of(64) as (tiers, engine):
        await engine.offload(range(6))
        onboarding = tiers.onboard("r", PROMPT, None, 0)
        assert onboarding is not None
        assert await admin_of(tiers).answer(KvPurge(Tier.HOST)) == KvPurged(6)
        assert bytes(tiers.memory.view(onboarding.slots[5] * SLOT, BYTES)) == bytes([6]) * BYTES
        assert tiers.manager.pinned == {"r": 6}


async def test_what_was_purged_from_disk_is_not_found_after_a_restart(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        while not tiers.snapshot()[Tier.DISK]:
            await taken(tiers)
        assert await admin_of(tiers).answer(KvPurge(Tier.DISK)) == KvPurged(6)
        await told_gone(tiers, HASHES)
        assert tiers.onboard("r", PROMPT, None, 0) is None
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, _):
        assert tiers.snapshot()[Tier.DISK] == ()


async def test_what_waits_to_be_written_is_purged_with_the_disk(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path, flush_interval_ms=3_600_000)) as (tiers, engine):
        await engine.offload(range(3))
        assert load_of(tiers, Tier.DISK).waiting == 3
        assert await admin_of(tiers).answer(KvPurge(Tier.DISK)) == KvPurged(0)
        assert load_of(tiers, Tier.DISK).waiting == 0
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, _):
        assert tiers.snapshot()[Tier.DISK] == ()


async def test_a_disk_that_fails_is_named_turned_off_and_not_verified(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        _cut(tmp_path)
        admin = admin_of(tiers)
        with pytest.raises(WorkerError, match="disk tier"):
            await admin.answer(KvPurge(Tier.DISK))
        assert not load_of(tiers, Tier.DISK).on
        assert await verified(admin, Tier.DISK) == (0, 0, 0)
        assert tiers.storages[0].hashes() == ()


def _cut(folder: Path) -> None:
    """The file of blocks, as somebody might."""
    (blocks,) = folder.rglob("blocks")
    with blocks.open("r+b") as file:
        file.truncate(0)


def test_hashes_and_numbers_of_a_walk_come_in_order_across_its_tiers() -> None:
    first, second = FullHash(bytes(32)), FullHash(bytes([1]) * 32)
    walk = walks.Walk([(Tier.HOST, [first]), (Tier.DISK, [second])], frozenset({7}), [7])
    assert len(walk) == 3
    assert walk.items(0, 10) == [(Tier.HOST, first), (Tier.DISK, second), (Tier.DEVICE, 7)]
    assert walk.items(1, 2) == [(Tier.DISK, second)]
    assert walk.items(2, 3) == [(Tier.DEVICE, 7)]
