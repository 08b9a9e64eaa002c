"""The object tier on a real S3 server: what it holds, who sees it, and what happens when the server fails."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import obstore
import pytest

from dynamo_lite.config import ObjectTier
from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.tiers.host import HostMemory
from kvbm.tiers.object import Blobs
from kvbm.tiers.record import Records
from tests.integration.workers.object_writer import RECORDS as WRITTEN
from tests.object_tier import DESCRIPTION, SLOTS, SMALL, Worker, block_hash, key
from tests.seaweedfs import READER_KEY, READER_SECRET, SeaweedFs, seaweedfs
from workers.tiers.objects import object_blobs
from workers.transfer.stores import open_store

URL = "s3://kvcache/some/folder"
TIMEOUT_S = 2  # where something is to fail
SLACK_S = 3.0  # of a machine that is busy with other tests
LARGE = Records(720 * 1024, 7)
Way = Literal["there", "back"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFs]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        make_bucket(server)
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[SeaweedFs]:
    """A server that a test may kill."""
    with seaweedfs(tmp_path) as server:
        make_bucket(server)
        yield server


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> bytes:
    """Each test's own."""
    return hashlib.sha256(request.node.name.encode()).digest()


def make_bucket(server: SeaweedFs, url: str = URL) -> None:
    obstore.put(open_store(url, server.options), "made", b"")  # this server makes a bucket that is not there


def settings(server: SeaweedFs, **other: object) -> ObjectTier:
    keys = {"access_key_id": server.options.access_key_id, "secret_access_key": server.options.secret_access_key}
    common = {"url": URL, "endpoint": server.endpoint, "timeout_ms": 20_000}
    return ObjectTier.model_validate(common | keys | other)


@asynccontextmanager
async def unopened(
    settings: ObjectTier, namespace: bytes, records: Records = SMALL, refresh_s: float = 60
) -> AsyncIterator[Worker]:
    def blobs(memory: HostMemory, records: Records) -> Blobs:
        return object_blobs(settings, memory, records)

    each = Worker(blobs, namespace, records, refresh_s=refresh_s)
    try:
        yield each
    finally:
        await each.close()


@asynccontextmanager
async def worker(settings: ObjectTier, namespace: bytes, records: Records = SMALL) -> AsyncIterator[Worker]:
    async with unopened(settings, namespace, records) as each:
        await each.tier.open()
        yield each


@asynccontextmanager
async def fails(cause: str) -> AsyncIterator[None]:
    started = time.monotonic()
    with pytest.raises(TierFailed, match=URL) as failed:
        yield
    assert (failed.value.tier, failed.value.cause) == (Tier.OBJECT, cause)
    assert time.monotonic() - started < TIMEOUT_S + SLACK_S


async def test_blocks_are_shared_by_all_who_use_the_namespace(server: SeaweedFs, namespace: bytes) -> None:
    numbers = list(range(SLOTS))
    async with (
        worker(settings(server), namespace, LARGE) as one,
        worker(settings(server), namespace, LARGE) as two,
        worker(settings(server), bytes(32), LARGE) as stranger,
    ):
        assert await one.write(numbers) == SLOTS
        assert await one.read(numbers) == numbers
        assert await two.read(numbers) == numbers
        for tier in (two.tier, stranger.tier):
            await tier.refresh()
        assert set(two.tier.hashes()) == {block_hash(number) for number in numbers}
        assert stranger.tier.hashes() == ()
        await two.tier.forget(block_hash(3))
        assert await one.read([3, 4]) == [None, 4]
        assert await two.tier.purge() == SLOTS - 1
        await one.tier.refresh()
        assert one.tier.hashes() == ()


async def test_a_folder_says_what_it_is_of(server: SeaweedFs, namespace: bytes) -> None:
    async with worker(settings(server), namespace):
        stored = obstore.get(open_store(URL, server.options), f"{namespace.hex()}/namespace.json")
        assert stored.bytes() == DESCRIPTION


async def test_thousands_of_blocks_are_listed_in_pages(server: SeaweedFs, namespace: bytes) -> None:
    numbers, store = range(2300), open_store(URL, server.options)
    turns = asyncio.Semaphore(16)

    async def put(number: int) -> None:
        async with turns:
            await obstore.put_async(store, key(namespace, number), bytes(SMALL.bytes), use_multipart=False)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(put(number))
    async with worker(settings(server), namespace) as one:
        assert len(one.tier.hashes()) == 1000  # opening reads no more than a page
        await one.tier.refresh()
        assert set(one.tier.hashes()) == {block_hash(number) for number in numbers}
        one.tier.changes()
        gone = [0, 1, 999, 1000, 1001, 2299]
        for number in gone:
            await obstore.delete_async(store, key(namespace, number))
        await one.tier.refresh()
        assert set(one.tier.changes().removed) == {block_hash(number) for number in gone}
        assert await one.tier.purge() == len(numbers) - len(gone)
    assert await obstore.list(store, namespace.hex()).collect_async() == []


async def test_an_object_that_is_not_what_was_stored_is_not_proven_and_can_be_forgotten(
    server: SeaweedFs, namespace: bytes
) -> None:
    store = open_store(URL, server.options)
    async with worker(settings(server), namespace, LARGE) as one:
        await one.write([1, 2, 3, 4])
        flipped = bytearray(obstore.get(store, key(namespace, 1)).bytes())
        flipped[LARGE.block_bytes // 2] ^= 1
        obstore.put(store, key(namespace, 1), bytes(flipped))
        obstore.put(store, key(namespace, 2), bytes(flipped)[:-1])
        obstore.put(store, key(namespace, 3), b"")
        assert await one.read([1, 2, 3, 4]) == [-1, -1, -1, 4]
        for number in (1, 2, 3):
            await one.tier.forget(block_hash(number))
        assert await one.read([1, 2, 3, 4]) == [None, None, None, 4]
        assert await one.write([1]) == 1
        assert await one.read([1]) == [1]


async def test_one_who_may_only_read_forgets_for_good_what_it_cannot_delete(
    server: SeaweedFs, namespace: bytes
) -> None:
    reading = settings(server, access_key_id=READER_KEY, secret_access_key=READER_SECRET)
    async with worker(settings(server), namespace) as writer, worker(reading, namespace) as reader:
        await writer.write([1, 2])
        await reader.tier.refresh()
        assert await reader.read([1, 2]) == [1, 2]
        await reader.tier.forget(block_hash(1))
        for _ in range(2):
            await reader.tier.refresh()
            assert reader.tier.hashes() == (block_hash(2),)
        async with fails("denied"):
            await reader.write([3])
        async with fails("denied"):
            await reader.tier.probe()
        assert block_hash(3) not in reader.tier


async def test_wrong_credentials_are_denied_and_not_shown(server: SeaweedFs, namespace: bytes) -> None:
    async with unopened(settings(server, secret_access_key="misspelt"), namespace) as one:
        for work in (one.tier.open, one.tier.probe, one.tier.refresh, lambda: one.write([1]), lambda: one.read([1])):
            with pytest.raises(TierFailed, match="refused our credentials") as failed:
                await work()
            assert failed.value.cause == "denied"
            assert "misspelt" not in str(failed.value)
            assert server.options.access_key_id not in str(failed.value).split()
        await one.tier.forget(block_hash(1))


async def test_a_bucket_that_is_gone_is_a_failure_and_no_missing_block(mortal: SeaweedFs, namespace: bytes) -> None:
    async with worker(settings(mortal), namespace) as one, worker(settings(mortal), namespace) as two:
        await one.write([1])
        mortal.drop("kvcache")
        async with fails("not_found"):
            await one.read([1])
        async with fails("not_found"):
            await one.tier.refresh()
        assert block_hash(1) in one.tier
        async with fails("not_found"):
            await two.tier.open()
        make_bucket(mortal)
        await one.tier.probe()
        assert await one.read([1]) == [None]


async def test_a_server_that_dies_fails_the_tier_and_comes_back_with_its_blocks(
    mortal: SeaweedFs, namespace: bytes
) -> None:
    impatient = settings(mortal, timeout_ms=TIMEOUT_S * 1000)
    async with worker(impatient, namespace) as one, unopened(impatient, namespace) as two:
        await one.write([1, 2])
        await asyncio.to_thread(mortal.kill)
        for work in (lambda: one.write([2, 3]), lambda: one.read([1]), one.tier.probe, one.tier.refresh, two.tier.open):
            async with fails("unreachable"):
                await work()
        assert set(one.tier.hashes()) == {block_hash(1), block_hash(2)}
        mortal.restart()
        await two.tier.probe()
        await two.tier.refresh()
        assert await two.read([1, 2]) == [1, 2]
        assert block_hash(1) in two.tier
        assert await one.write([3]) == 1


class Proxy:
    """Between the tier and the server. Holds everything back unless `flowing`; spoils a byte of the next content."""

    def __init__(self, server: SeaweedFs) -> None:
        self._server = server
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.spoil: Way | None = None

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        host, _, port = self._server.endpoint.removeprefix("http://").partition(":")
        back, forth = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, forth, "there"))
                group.create_task(self._forward(back, writer, "back"))
        except* OSError:  # either side is gone
            pass
        finally:
            writer.close()
            forth.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: Way) -> None:
        while content := await source.read(2**16):
            await self.flowing.wait()
            if self.spoil == way and not content.endswith(b"\r\n\r\n"):
                self.spoil, spoilt = None, bytearray(content)
                spoilt[-1] ^= 1
                content = bytes(spoilt)
            sink.write(content)
            await sink.drain()
        sink.write_eof()


@asynccontextmanager
async def proxied(server: SeaweedFs) -> AsyncIterator[tuple[Proxy, ObjectTier]]:
    proxy, connections = Proxy(server), list[asyncio.Task[None]]()
    async with asyncio.TaskGroup() as group:

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(group.create_task(proxy.carry(reader, writer)))

        async with await asyncio.start_server(accept, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            yield proxy, settings(server, endpoint=f"http://127.0.0.1:{port}", timeout_ms=TIMEOUT_S * 1000)
        for each in connections:
            each.cancel()


async def test_a_server_that_falls_silent_costs_no_more_than_the_deadline_and_leaves_host_memory_alone(
    server: SeaweedFs, namespace: bytes
) -> None:
    async with proxied(server) as (proxy, through), worker(through, namespace, LARGE) as one:
        await one.write([1])
        proxy.flowing.clear()

        async def fail(work: Coroutine[None, None, object]) -> None:
            async with fails("deadline"):
                await work

        async with asyncio.TaskGroup() as group:
            for work in (one.read([1]), one.write([2, 3]), one.tier.refresh(), one.tier.probe()):
                group.create_task(fail(work))
        assert one.tier.hashes() == (block_hash(1),)
        one.record(0)[:] = bytes(LARGE.bytes)
        proxy.flowing.set()
        await one.tier.probe()
        assert one.record(0) == bytes(LARGE.bytes)
        assert await one.read([1]) == [1]


async def test_what_is_spoilt_on_its_way_to_the_store_is_not_stored(server: SeaweedFs, namespace: bytes) -> None:
    async with proxied(server) as (proxy, through), worker(through, namespace, LARGE) as one:
        proxy.spoil = "there"
        with pytest.raises(TierFailed):
            await one.write([1])
        assert proxy.spoil is None
        assert block_hash(1) not in one.tier
        await one.tier.refresh()
        assert one.tier.hashes() == ()


async def test_a_store_that_spoils_what_it_gives_back_does_not_work(server: SeaweedFs, namespace: bytes) -> None:
    async with proxied(server) as (proxy, through), worker(through, namespace, LARGE) as one:
        await one.write([1])
        proxy.spoil = "back"
        assert await one.read([1]) == [-1]
        proxy.spoil = "back"
        with pytest.raises(TierFailed, match="does not give back what was written") as failed:
            await one.tier.probe()
        assert failed.value.cause == "corrupt"
        await one.tier.probe()


async def test_a_listing_that_fails_is_told_of_once_and_made_later(
    server: SeaweedFs, namespace: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    url = "s3://made-later"

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # nothing of a tier can be waited for
                await asyncio.sleep(0.01)

    async with unopened(settings(server, url=url), namespace, refresh_s=0.01) as one, asyncio.TaskGroup() as group:
        running = group.create_task(one.tier.run())
        await until(lambda: "was not listed" in caplog.text)
        make_bucket(server, url)
        async with worker(settings(server, url=url), namespace) as two:
            await two.write([1])
        await until(lambda: block_hash(1) in one.tier)
        running.cancel()
    assert caplog.text.count("was not listed") == 1


async def test_a_read_that_is_cancelled_touches_its_slots_no_more(server: SeaweedFs, namespace: bytes) -> None:
    async with proxied(server) as (proxy, through), worker(through, namespace, LARGE) as one:
        await one.write([1])
        proxy.flowing.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await one.read([1])
        proxy.flowing.set()
        await one.tier.probe()
        assert one.record(0) == bytes(LARGE.bytes)


@pytest.mark.parametrize("batches", [0, 1, 3])
async def test_what_a_process_stored_that_was_killed_reads_back_as_it_should(
    server: SeaweedFs, namespace: bytes, batches: int
) -> None:
    argv = [sys.executable, "-m", "tests.integration.workers.object_writer"]
    argv += [settings(server).model_dump_json(), namespace.hex()]
    store, stored = open_store(URL, server.options), -1
    writing = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=subprocess.PIPE)
    assert writing.stdout is not None
    for _ in range(batches):
        stored = int(await writing.stdout.readline())
    while not await obstore.list(store, f"{namespace.hex()}/00").collect_async():  # it is in the midst of some
        assert writing.returncode is None
    writing.kill()
    await writing.wait()
    async with worker(settings(server), namespace, WRITTEN) as one:
        await one.tier.refresh()
        numbers = sorted(int.from_bytes(each[1:], "big") for each in one.tier.hashes())
        assert set(range(stored + SLOTS if batches else 0)) <= set(numbers)
        for first in range(0, len(numbers), SLOTS):
            some = numbers[first : first + SLOTS]
            assert await one.read(some) == [number % 256 for number in some]
