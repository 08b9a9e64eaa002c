"""The worker process's side of the tiers, with the engine's processes played by the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from dynamo_lite.config import DiskTier, HostTier, KvTiers
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.tasks import background, scope
from kvbm.errors import TierRefused
from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import full_block_hashes, low64
from tests.instances import FINGERPRINT
from workers.connector.protocol import (
    Command,
    GrantSlots,
    Offloaded,
    OnboardChecked,
    Onboarded,
    OnboardOver,
    SlotsWanted,
    TierChanged,
)
from workers.engine import TierLoad
from workers.tiers import tiers as module
from workers.tiers.place import Place
from workers.tiers.tiers import Tiers
from workers.transfer import files

BLOCK, BYTES, SLOT = 16, 1024, 4096  # tokens; bytes of a block, and of the slot for its record
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
            self.tiers.memory.view(slot * SLOT, BYTES)[:] = bytes([number + 1]) * BYTES
        blocks = tuple((slot, HASHES[number], True) for number, slot in zip(numbers, slots, strict=True))
        for rank in range(ranks):
            self.tiers.handle(Offloaded(rank, blocks))
        await self.take(GrantSlots)  # follows once they are stored
        return slots


PLACE = Place("default", "both-0", b"n" * 32, b"{}")


@asynccontextmanager
async def tiers_of(slots: int, ranks: int = 1, **beneath: DiskTier) -> AsyncIterator[tuple[Tiers, Engine]]:
    tiers = Tiers(KvTiers(host=HostTier(size=slots * SLOT), **beneath))
    engine = Engine(tiers)
    layout = KvLayout(1, BLOCK, 2, ranks, 4, 4, "float32", "NHKD", "NHKD")
    try:
        async with scope() as group:
            await tiers.start(msgspec.structs.replace(FINGERPRINT, layout=layout), PLACE, engine, group)
            async with background(*tiers.loops()):
                yield tiers, engine
                await tiers.flush()
            tiers.manager.check()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await tiers.close()


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


async def test_what_comes_into_slots_that_were_let_go_is_not_taken_for_a_damaged_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with tiers_of(64) as (tiers, engine):
        slots = await engine.offload(range(4))
        opened = threading.Event()
        threads = [tiers._threads.submit(opened.wait, 20) for _ in range(tiers._readers)]
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        tiers.handle(Onboarded("r", 0, "cancelled"))
        await emptied(tiers, engine)
        for slot in slots:
            tiers.memory.view(slot * SLOT, BYTES)[:] = b"x" * BYTES
        opened.set()
        for thread in threads:
            await asyncio.wrap_future(thread)
        await asyncio.gather(*(task for task in asyncio.all_tasks() if "_check" in repr(task.get_coro())))
        assert "not what was stored" not in caplog.text
        assert not [one for one in engine.commands if isinstance(one, OnboardChecked)]


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


async def test_a_prompt_gets_the_slots_it_asks_for_up_to_half_of_all() -> None:
    async with tiers_of(64) as (tiers, engine):
        assert len((await engine.take(GrantSlots)).slots) == 8
        tiers.handle(SlotsWanted(10))
        assert len((await engine.take(GrantSlots)).slots) == 10
        tiers.handle(SlotsWanted(1000))
        assert len((await engine.take(GrantSlots)).slots) == 14
        tiers.handle(SlotsWanted(1))
        assert tiers.manager.granted == 32


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
    with pytest.raises(ValueError, match=r"kv_tiers\.host\.size"):
        async with tiers_of(1):
            pass


# ---- with a disk beneath ----


def disk(folder: Path, slots: int = 64, **more: object) -> DiskTier:
    return DiskTier.model_validate({"path": folder, "size": slots * SLOT, "flush_interval_ms": 0, **more})


def load_of(tiers: Tiers, tier: Tier) -> TierLoad:
    return next(load for load in tiers.load() if load.tier is tier)


async def until(tiers: Tiers, holds: Callable[[], bool]) -> list[KvEvent]:
    """Take events until it does; returns them."""
    found: list[KvEvent] = []
    async with asyncio.timeout(10):
        while not holds():
            found += await taken(tiers)
    return found


async def emptied(tiers: Tiers, engine: Engine) -> None:
    """Nothing is left in host memory."""
    for slot in tiers.manager.grant(tiers.manager.slots):
        tiers.manager.abandon(slot)
    assert tiers.manager.stored == 0
    tiers.tell()


async def on_disk(tiers: Tiers, engine: Engine, blocks: int = 6) -> None:
    await engine.offload(range(blocks))
    await until(tiers, lambda: load_of(tiers, Tier.DISK).offloaded == blocks)
    await emptied(tiers, engine)


async def test_blocks_come_back_from_disk_through_host_memory(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        onboarding = tiers.onboard("r", PROMPT, None, 0)
        assert onboarding is not None
        assert onboarding.tiers == {Tier.DISK: 6}
        checked = await engine.take(OnboardChecked, lambda one: not one.more)
        assert checked.blocks == 6
        for number, slot in enumerate(onboarding.slots):
            assert bytes(tiers.memory.view(slot * SLOT, BYTES)) == bytes([number + 1]) * BYTES
        gained = await engine.take(TierChanged, lambda one: bool(one.stored))
        assert set(gained.stored) <= set(HASHES)
        tiers.handle(Onboarded("r", 0, "", 6, 6 * BYTES, 1_000_000, 2_000_000))
        assert tiers.manager.pinned == {}
        assert load_of(tiers, Tier.DISK).onboarded == 6
        assert load_of(tiers, Tier.DISK).hits == 6
        told = {tier: set(hashes) for tier, hashes in tiers.snapshot().items()}
        assert told == {tier: set(map(low64, HASHES)) for tier in (Tier.HOST, Tier.DISK)}


async def test_routers_hear_of_both_tiers(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await engine.offload(range(2))
        events = await until(tiers, lambda: load_of(tiers, Tier.DISK).offloaded == 2)
        events += await taken(tiers) if not any(event.tier is Tier.DISK for event in events) else ()  # type: ignore[union-attr]
        told = {(event.tier, one) for event in events if isinstance(event, BlocksStored) for one in event.hashes}
        assert told == {(tier, low64(HASHES[number])) for tier in (Tier.HOST, Tier.DISK) for number in (0, 1)}


async def test_a_prefix_may_lie_in_host_memory_and_on_disk(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine, 6)
        first = tiers.onboard("first", PROMPT[: 2 * BLOCK + 1], None, 0)
        assert first is not None
        await engine.take(OnboardChecked, lambda one: not one.more)
        onboarding = tiers.onboard("r", PROMPT, None, 0)
        assert onboarding is not None
        assert onboarding.tiers == {Tier.HOST: 2, Tier.DISK: 4}
        assert (await engine.take(OnboardChecked, lambda one: not one.more)).blocks == 6


async def test_two_requests_at_once_wait_for_one_copy_of_a_block(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        one, two = tiers.onboard("one", PROMPT, None, 0), tiers.onboard("two", PROMPT, None, 0)
        assert one is not None
        assert two is not None
        assert one.slots == two.slots
        for name in ("one", "two"):
            last = await engine.take(OnboardChecked, lambda told, name=name: told.request_id == name and not told.more)  # type: ignore[misc]
            assert last.blocks == 6
        assert load_of(tiers, Tier.DISK).onboarded == 6


async def test_as_many_blocks_come_as_host_memory_has_room_for(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await engine.offload(range(6))
    async with tiers_of(4, disk=disk(tmp_path)) as (tiers, engine):
        assert tiers.manager.granted == 1
        onboarding = tiers.onboard("r", PROMPT, None, 0)
        assert onboarding is not None
        assert len(onboarding.blocks) == 3
        assert (await engine.take(OnboardChecked, lambda one: not one.more)).blocks == 3
        assert tiers.onboard("s", PROMPT[:BLOCK] + [7] * BLOCK + [1], None, 0) is not None, (
            "what is there can be shared"
        )


async def test_a_byte_that_changed_on_disk_is_found_and_the_rest_of_the_prefix_computed(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        _change_a_byte(tmp_path, bytes([3]) * BYTES)
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        assert (await engine.take(OnboardChecked, lambda one: not one.more)).blocks == 2
        assert load_of(tiers, Tier.DISK).corrupt == 1
        assert low64(HASHES[2]) not in tiers.snapshot()[Tier.DISK]


async def test_what_is_on_disk_is_there_after_a_restart(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await engine.offload(range(6))
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        assert tiers.snapshot()[Tier.DISK]
        assert {one for event in await taken(tiers) for one in getattr(event, "hashes", ())} == set(map(low64, HASHES))
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        assert (await engine.take(OnboardChecked, lambda one: not one.more)).blocks == 6


async def test_two_workers_of_one_name_cannot_share_a_folder(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)):
        with pytest.raises(TierRefused, match=str(tmp_path)):
            async with tiers_of(64, disk=disk(tmp_path)):
                pass


async def test_a_prefix_that_was_pinned_for_a_request_that_left_is_let_go(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        assert tiers.onboard("r", PROMPT, None, 0) is not None
        tiers.release("r")
        await engine.take(OnboardOver)
        tiers.handle(Onboarded("r", 0, "cancelled"))
        await until(tiers, lambda: load_of(tiers, Tier.DISK).onboarded == 6)
        assert tiers.manager.pinned == {}
        assert not [one for one in engine.commands if isinstance(one, OnboardChecked)], "nobody asks any more"


async def test_a_disk_that_takes_longer_than_computing_is_not_read(tmp_path: Path) -> None:
    async with tiers_of(64, disk=disk(tmp_path)) as (tiers, engine):
        await on_disk(tiers, engine)
        tiers.cost.onboarded(6 * BYTES, 0.001)
        tiers.cost.read(Tier.DISK, 6 * BYTES, 10.0)
        tiers.cost.computed(1000, 0.1)
        assert tiers.onboard("r", PROMPT, None, 0) is None
        assert tiers.manager.pinned == {}


async def test_requests_do_not_wait_for_blocks_that_a_dead_volume_does_not_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiers_of(64, disk=disk(tmp_path, timeout_ms=10)) as (tiers, engine):
        await on_disk(tiers, engine)
        opened, read = threading.Event(), files._preadv
        monkeypatch.setattr(files, "_preadv", lambda *args: opened.wait(20) and read(*args))
        assert tiers.onboard("first", PROMPT, None, 0) is not None
        assert (await engine.take(OnboardChecked)).blocks == 0
        await until(tiers, lambda: not load_of(tiers, Tier.DISK).on)
        assert tiers.onboard("second", PROMPT, None, 0) is None
        opened.set()


def _change_a_byte(folder: Path, content: bytes) -> None:
    """Of where that is on disk."""
    (data,) = folder.rglob("blocks")
    place = data.read_bytes().index(content)
    with data.open("r+b") as file:
        file.seek(place + 5)
        file.write(b"x")
