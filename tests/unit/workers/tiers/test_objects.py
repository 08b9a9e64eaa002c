"""The object tier on a store in this process's memory, through the real adapter and engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lite import config
from dynamo_lite.tasks import background
from kvbm.errors import TierRefused
from kvbm.events import BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, low64
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost
from kvbm.storage import Storage, StoragePolicy
from kvbm.tiers.base import Changes, HostRecord, StorageTier
from kvbm.tiers.host import HostMemory, HostRecords
from kvbm.tiers.record import Records
from tests.object_tier import DESCRIPTION, SLOTS, SMALL, Worker, block_hash, key
from workers.tiers.objects import StoreBlobs, object_blobs
from workers.transfer.objects import ObjectEngine
from workers.transfer.stores import open_store

if TYPE_CHECKING:
    from obstore.store import ObjectStore

NAMESPACE = bytes(range(32))
BLOCK = SMALL.block_bytes


@asynccontextmanager
async def worker(store: ObjectStore, namespace: bytes = NAMESPACE, entries: int = 1000) -> AsyncIterator[Worker]:
    def blobs(memory: HostMemory, records: Records) -> StoreBlobs:
        return StoreBlobs(ObjectEngine(store), "memory", memory, records, 10)

    each = Worker(blobs, namespace, entries=entries)
    try:
        await each.tier.open()
        yield each
    finally:
        await each.close()


@pytest.fixture
def store() -> ObjectStore:
    return open_store("memory:///")


async def test_a_block_is_read_back_as_it_was_written_by_all_who_share_its_namespace(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as two, worker(store, bytes(32)) as stranger:
        storage: StorageTier = one.tier
        assert (storage.tier, storage.size_bytes, storage.evicted) == (Tier.OBJECT, 0, 0)
        assert await one.write([1, 2, 3]) == 3
        for tier in (two.tier, stranger.tier):
            await tier.refresh()
        assert await one.read([3, 1]) == [3, 1]
        assert await two.read([1, 2, 3]) == [1, 2, 3]
        assert set(two.tier.hashes()) == {block_hash(number) for number in (1, 2, 3)}
        assert two.tier.used_bytes == 3 * SMALL.bytes
        assert stranger.tier.hashes() == ()
        assert await stranger.read([1]) == [None]
    async with worker(store) as later:
        assert block_hash(1) in later.tier


async def test_a_folder_says_what_it_is_of(store: ObjectStore) -> None:
    name = f"{NAMESPACE.hex()}/namespace.json"
    async with worker(store) as one:
        assert obstore.get(store, name).bytes() == DESCRIPTION
        await one.tier.purge()
        await one.write([1])
        assert obstore.get(store, name).bytes() == DESCRIPTION


async def test_a_block_that_others_deleted_is_missed_and_forgotten(store: ObjectStore) -> None:
    async with worker(store) as one:
        await one.write([1, 2])
        assert set(one.tier.changes().stored) == {block_hash(1), block_hash(2)}
        obstore.delete(store, key(NAMESPACE, 1))
        assert await one.read([1, 2]) == [None, 2]
        assert block_hash(1) not in one.tier
        assert one.tier.changes() == Changes(removed=(block_hash(1),))
        obstore.delete(store, key(NAMESPACE, 2))
        await one.tier.refresh()
        assert one.tier.changes() == Changes(removed=(block_hash(2),))
        assert await one.write([1]) == 1


async def test_a_forgotten_block_is_deleted_for_all(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as two:
        await one.write([1])
        await two.tier.refresh()
        await one.tier.forget(block_hash(1))
        assert block_hash(1) not in one.tier
        assert await two.read([1]) == [None]
        await one.tier.refresh()
        assert one.tier.hashes() == ()


async def test_an_object_that_is_not_what_was_stored_is_not_proven(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as two:
        await one.write([1, 2])
        flipped = bytearray(obstore.get(store, key(NAMESPACE, 1)).bytes())
        flipped[BLOCK // 2] ^= 1
        obstore.put(store, key(NAMESPACE, 1), bytes(flipped))
        obstore.put(store, key(NAMESPACE, 2), bytes(obstore.get(store, key(NAMESPACE, 2)).bytes())[:-1])
        assert await one.read([1, 2]) == [-1, -1]
        await two.tier.refresh()
        assert two.tier.hashes() == (block_hash(1),)  # a listing shows that the other is too short
        assert await two.write([2]) == 1
        assert await one.read([2]) == [2]


async def test_what_is_no_block_is_not_taken_for_one(store: ObjectStore) -> None:
    name = block_hash(1).hex()
    for stray in (f"00/{name}", f"{name[:2]}/{name[:-1]}", f"{name[:2]}/{name[:-1]}x", name, f"{name[:2]}/x/{name}"):
        obstore.put(store, f"{NAMESPACE.hex()}/{stray}", bytes(SMALL.bytes))
    obstore.put(store, f"{NAMESPACE.hex()}{name[:2]}/{name}", bytes(SMALL.bytes))
    async with worker(store) as one:
        await one.tier.refresh()
        expected = [block_hash(1)] if block_hash(1)[0] == 0 else []
        assert list(one.tier.hashes()) == expected


async def test_a_purge_leaves_nothing_of_the_namespace_and_all_of_others(store: ObjectStore) -> None:
    gone: list[int] = []
    async with worker(store) as one, worker(store, bytes(32)) as stranger:
        await one.write(range(SLOTS))
        await stranger.write([1])
        assert await one.tier.purge(gone.append) == SLOTS
        assert gone[-1] == SLOTS
        assert one.tier.hashes() == ()
        assert await stranger.read([1]) == [1]
    assert [each for page in obstore.list(store, NAMESPACE.hex()) for each in page] == []


async def test_no_more_blocks_are_known_of_than_there_is_room_for(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(store) as one, worker(store, entries=4) as small:
        await one.write(range(10))
        await small.tier.refresh()
        await small.tier.refresh()
        assert len(small.tier.hashes()) == 4
        assert await small.write([12]) == 1
        assert block_hash(12) in small.tier
        assert len(small.tier.hashes()) == 4
    assert caplog.text.count("more than the 4 blocks") == 1


async def test_running_lists_again_after_a_while_and_after_a_probe(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as two, asyncio.TaskGroup() as group:
        running = group.create_task(two.tier.run())
        await one.write([1])
        await two.tier.probe()
        async with asyncio.timeout(20):
            while block_hash(1) not in two.tier:  # noqa: ASYNC110  # nothing of a tier can be waited for
                await asyncio.sleep(0.01)
        running.cancel()
    assert not [each for page in obstore.list(store) for each in page if "probe" in each["path"]]


async def test_what_others_stored_is_told_when_it_is_listed_though_this_worker_does_nothing(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as two:
        with ThreadPoolExecutor(1) as threads:
            told: asyncio.Queue[tuple[KvEvent, ...]] = asyncio.Queue()
            records, manager = HostRecords(two.memory, SMALL, threads), BlockManager(SLOTS, ranks=1)
            policy = StoragePolicy(0.0, 1, False, timeout_s=5.0)
            storage = Storage(
                two.tier, policy, manager, records, OnboardCost(), lambda: told.put_nowait(storage.events())
            )
            await storage.open(5.0)
            await one.write([1])
            async with asyncio.timeout(20), background(*storage.loops()):
                while BlocksStored((low64(block_hash(1)),), tier=Tier.OBJECT) not in await told.get():
                    pass


def test_a_url_that_names_no_bucket_is_refused() -> None:
    memory = HostMemory(SMALL.stride)
    with pytest.raises(TierRefused, match=r"kv_tiers\.object"):
        object_blobs(config.ObjectTier(url="s3://buck et"), memory, SMALL)
    memory.close()


NUMBER = st.integers(0, 11)
NUMBERS = st.lists(NUMBER, max_size=6, unique=True)
Step = tuple[str, int, list[int]]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.sampled_from(["write", "read"]), st.integers(0, 1), NUMBERS),
    st.tuples(st.sampled_from(["forget", "spoil", "delete"]), st.integers(0, 1), NUMBERS),
    st.tuples(st.sampled_from(["refresh", "purge", "changes"]), st.integers(0, 1), st.just([])),
)


class Model:
    """What the store has, and what each of two workers may know of it."""

    def __init__(self) -> None:
        self.store: dict[int, int] = {}  # what each block consists of; -1: spoilt
        self.known: list[set[int]] = [set(), set()]
        self.told: list[set[FullHash]] = [set(), set()]

    async def step(self, store: ObjectStore, workers: list[Worker], step: Step) -> None:
        name, who, numbers = step
        each, known = workers[who], self.known[who]
        if name == "write":
            assert await each.write(numbers) == len(numbers)
            self.store |= {number: number for number in numbers if number not in known}
            known |= set(numbers)
        elif name == "read":
            assert await each.read(numbers) == [self.store.get(number) for number in numbers]
            known -= set(numbers) - self.store.keys()
        elif name == "refresh":
            await each.tier.refresh()
            known.clear()
            known.update(self.store)
        elif name == "purge":
            assert await each.tier.purge() == len(self.store)
            known.difference_update(self.store)
            self.store.clear()
        elif name == "changes":
            self.tell(who, each)
        else:
            for number in numbers:
                await self._meddle(store, name, each, number)
            known -= set(numbers) if name == "forget" else set()

    async def _meddle(self, store: ObjectStore, name: str, each: Worker, number: int) -> None:
        if name == "forget":
            await each.tier.forget(block_hash(number))
        elif number in self.store and name == "spoil":
            obstore.put(store, key(NAMESPACE, number), bytes(SMALL.bytes))
            self.store[number] = -1
            return
        elif number in self.store:
            obstore.delete(store, key(NAMESPACE, number))
        self.store.pop(number, None)

    def tell(self, who: int, each: Worker) -> None:
        changes, told = each.tier.changes(), self.told[who]
        assert told >= set(changes.removed)
        told -= set(changes.removed)
        assert not told & set(changes.stored)
        told |= set(changes.stored)
        assert told == set(each.tier.hashes())


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_to_the_store_a_tier_knows_what_its_last_listing_and_its_own_work_say(
    steps: list[Step],
) -> None:
    async def run() -> None:
        store, model = open_store("memory:///"), Model()
        async with AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(worker(store)) for _ in range(2)]
            for step in steps:
                await model.step(store, workers, step)
                for each, known in zip(workers, model.known, strict=True):
                    assert set(each.tier.hashes()) == {block_hash(number) for number in known}
            for who, each in enumerate(workers):
                model.tell(who, each)

    asyncio.run(run())


async def test_an_operator_has_what_is_wrong_and_then_everything_deleted_from_the_store(store: ObjectStore) -> None:
    async with worker(store) as one, worker(store) as other:
        await one.write([1, 2, 3])
        await obstore.put_async(store, key(NAMESPACE, 2), bytes(SMALL.bytes))
        with ThreadPoolExecutor(1) as threads:
            records, manager = HostRecords(other.memory, SMALL, threads), BlockManager(SLOTS, ranks=1)
            policy = StoragePolicy(0.0, 1, False, timeout_s=5.0)
            storage = Storage(other.tier, policy, manager, records, OnboardCost(), lambda: None)
            await storage.open(5.0)
            wanted = [HostRecord(block_hash(number), slot) for slot, number in enumerate((1, 2, 3, 4))]
            assert await storage.verify(wanted) == [True, False, True, None]
            assert storage.counts.corrupt == 1
            with pytest.raises(FileNotFoundError):
                await obstore.get_async(store, key(NAMESPACE, 2))
            assert await storage.purge() == 2
        assert [each for page in obstore.list(store) for each in page] == []
        assert other.tier.hashes() == ()
