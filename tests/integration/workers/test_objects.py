"""The object engine against a real S3 server: what it holds, and what happens when it fails."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.seaweedfs import SeaweedFs, seaweedfs
from workers.errors import Denied, NotFound, TransferError, TransferTimeout, Unreachable
from workers.transfer.engine import Region, Spans, Target, Transfer
from workers.transfer.objects import Listed, ObjectEngine
from workers.transfer.stores import StoreOptions, open_store

MIB = 2**20
PART = 5 * MIB
SIZE = 32 * MIB
WHOLE = Spans.one(0, SIZE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFs]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[SeaweedFs]:
    """A server that a test may kill."""
    with seaweedfs(tmp_path) as server:
        yield server


@pytest.fixture
def engine(server: SeaweedFs) -> Iterator[ObjectEngine]:
    with engine_of(server.options) as engine:
        yield engine


@contextmanager
def engine_of(options: StoreOptions, url: str = "s3://kvcache/tests", requests: int = 4) -> Iterator[ObjectEngine]:
    with closing(ObjectEngine(open_store(url, options), requests, PART)) as engine:
        yield engine


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def random_bytes() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)


def region_of(engine: ObjectEngine, memory: NDArray[np.uint8]) -> Region:
    return engine.register(memory.ctypes.data, memory.size, "DRAM", 0)


def stored(engine: ObjectEngine, key: str, memory: NDArray[np.uint8]) -> Target:
    target = engine.object(key, SIZE)
    engine.write(region_of(engine, memory), WHOLE, target, WHOLE, soon()).wait()
    return target


def size_of(engine: ObjectEngine, key: str) -> int | None:
    (found := engine.head(key, soon())).wait()
    return found.size


def test_an_object_of_many_parts_holds_scattered_spans_in_order(engine: ObjectEngine) -> None:
    source, back, span = random_bytes(), np.zeros(SIZE, dtype=np.uint8), 32768
    in_order = np.arange(SIZE // span, dtype=np.int64) * span
    here = Spans(np.random.default_rng(2).permutation(in_order), span)
    target = engine.object("scattered", SIZE)
    engine.write(region_of(engine, source), here, target, Spans(in_order, span), soon()).wait()
    assert size_of(engine, "scattered") == SIZE
    engine.read(region_of(engine, back), here, target, Spans(in_order, span), soon()).wait()
    assert np.array_equal(back, source)


async def test_many_objects_at_once_keep_their_contents(engine: ObjectEngine) -> None:
    source, back = random_bytes(), np.zeros(SIZE, dtype=np.uint8)
    written, read = region_of(engine, source), region_of(engine, back)
    targets = [engine.object(f"many/{number}", MIB) for number in range(SIZE // MIB)]
    places = [Spans.one(number * MIB, MIB) for number in range(SIZE // MIB)]
    one = Spans.one(0, MIB)
    for transfers in (
        [engine.write(written, place, target, one, soon()) for place, target in zip(places, targets, strict=True)],
        [engine.read(read, place, target, one, soon()) for place, target in zip(places, targets, strict=True)],
    ):
        for transfer in transfers:
            await transfer
    assert np.array_equal(back, source)


def test_a_deleted_object_is_not_found(engine: ObjectEngine) -> None:
    memory = random_bytes()
    target = stored(engine, "short-lived", memory)
    engine.delete("short-lived", soon()).wait()
    engine.delete("short-lived", soon()).wait()
    assert size_of(engine, "short-lived") is None
    with pytest.raises(NotFound, match="short-lived: no such object or bucket"):
        engine.read(region_of(engine, memory), WHOLE, target, WHOLE, soon()).wait()


def test_a_folder_is_listed_page_after_page_in_order(engine: ObjectEngine) -> None:
    content = np.ones(7, dtype=np.uint8)
    whole, keys = Spans.one(0, 7), [f"listed/{number % 5:02x}/{number:03}" for number in range(40)]
    for key in [*keys, "listed/last", "listed-too"]:
        engine.write(region_of(engine, content), whole, engine.object(key, 7), whole, soon()).wait()
    pages: list[Sequence[Listed]] = []
    while not pages or pages[-1]:
        (page := engine.page("listed", pages[-1][-1].key if pages else "", 9, soon())).wait()
        pages.append(page.objects)
    assert [len(page) for page in pages] == [9, 9, 9, 9, 5, 0]
    assert [each for page in pages for each in page] == [Listed(key, 7) for key in [*sorted(keys), "listed/last"]]


async def test_a_transfer_that_is_stopped_is_waited_for_by_a_task_that_is_cancelled_too() -> None:
    memory = random_bytes()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = StoreOptions(f"http://127.0.0.1:{silent.getsockname()[1]}", access_key_id="a", secret_access_key="b")
        with engine_of(options) as engine:
            transfer = engine.write(region_of(engine, memory), WHOLE, engine.object("key", SIZE), WHOLE, soon())
            async with asyncio.TaskGroup() as group:
                stopping = group.create_task(transfer.stopped())
                group.create_task(transfer.stopped())
                await asyncio.sleep(0)
                stopping.cancel()
            transfer.close()
            with pytest.raises(TransferError, match="cancelled"):
                await transfer


def test_a_bucket_that_is_gone_is_not_found(server: SeaweedFs) -> None:
    memory = random_bytes()
    with engine_of(server.options, "s3://nobody-made-this") as engine, pytest.raises(NotFound, match="NoSuchBucket"):
        engine.read(region_of(engine, memory), WHOLE, engine.object("key", SIZE), WHOLE, soon()).wait()


def test_wrong_credentials_are_denied_and_not_shown(server: SeaweedFs) -> None:
    memory = random_bytes()
    with engine_of(replace(server.options, secret_access_key="misspelt")) as engine:
        with pytest.raises(Denied, match="SignatureDoesNotMatch") as denied:
            stored(engine, "key", memory)
        assert denied.value.__cause__ is None
        with pytest.raises(Denied):
            size_of(engine, "key")
    assert "misspelt" not in str(denied.value)


def test_a_cancelled_upload_leaves_no_object_and_its_memory_alone(engine: ObjectEngine) -> None:
    memory = random_bytes()
    transfer = engine.write(region_of(engine, memory), WHOLE, engine.object("cancelled", SIZE), WHOLE, soon())
    transfer.close()
    memory[:] = 0
    with pytest.raises(TransferError, match="cancelled"):
        transfer.wait()
    assert size_of(engine, "cancelled") is None


def wait_for_a_part(transfer: Transfer, memory: NDArray[np.uint8]) -> None:
    """Until some of it, and not all, has arrived."""
    while not memory[::PART].any():
        assert transfer.poll() == "pending"


def test_a_cancelled_read_touches_its_memory_no_more(engine: ObjectEngine) -> None:
    target, memory = stored(engine, "read", random_bytes()), np.zeros(SIZE, dtype=np.uint8)
    transfer = engine.read(region_of(engine, memory), WHOLE, target, WHOLE, soon())
    wait_for_a_part(transfer, memory)
    transfer.close()
    memory[:] = 0
    assert size_of(engine, "read") == SIZE  # another round trip, after which a late part would have come
    assert not memory.any()


def test_a_server_killed_mid_read_is_unreachable_and_the_object_comes_back_with_it(mortal: SeaweedFs) -> None:
    source, memory = random_bytes(), np.zeros(SIZE, dtype=np.uint8)
    with engine_of(mortal.options, requests=1) as engine:
        target, region = stored(engine, "kept", source), region_of(engine, memory)
        transfer = engine.read(region, WHOLE, target, WHOLE, soon())
        wait_for_a_part(transfer, memory)
        mortal.kill()
        with pytest.raises(Unreachable, match="kept"):
            transfer.wait()
        transfer.close()
        mortal.restart()
        engine.read(region, WHOLE, target, WHOLE, soon()).wait()
    assert np.array_equal(memory, source)


def test_a_frozen_server_costs_no_more_than_the_deadline_and_one_that_then_dies_is_unreachable(
    mortal: SeaweedFs,
) -> None:
    source = random_bytes()
    with engine_of(mortal.options) as engine:
        region, target = region_of(engine, source), engine.object("frozen", SIZE)
        mortal.child.signal(signal.SIGSTOP)
        started = time.monotonic()
        late = engine.write(region, WHOLE, target, WHOLE, soon(0.5))
        with pytest.raises(TransferTimeout):
            late.wait()
        late.close()
        assert time.monotonic() - started < 5
        transfer = engine.write(region, WHOLE, target, WHOLE, soon())
        mortal.kill()
        with pytest.raises(Unreachable):
            transfer.wait()
        mortal.restart()
        assert size_of(engine, "frozen") is None
        stored(engine, "frozen", source)
        assert size_of(engine, "frozen") == SIZE


def test_an_address_where_nobody_listens_is_unreachable_long_before_the_deadline() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        options = StoreOptions(f"http://127.0.0.1:{bound.getsockname()[1]}", access_key_id="a", secret_access_key="b")
        with engine_of(options) as engine, pytest.raises(Unreachable, match="HTTP error"):
            size_of(engine, "key")


def test_a_server_that_never_answers_costs_no_more_than_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = StoreOptions(f"http://127.0.0.1:{silent.getsockname()[1]}", access_key_id="a", secret_access_key="b")
        with engine_of(options) as engine:
            for found in (engine.head("key", soon(0.3)), engine.page("folder", "", 10, soon(0.3))):
                with pytest.raises(TransferTimeout):
                    found.wait()


def test_requests_have_a_deadline_of_their_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = StoreOptions(
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            access_key_id="a",
            secret_access_key="b",
            request_timeout_s=0.2,
            retries=1,
        )
        with engine_of(options) as engine, pytest.raises(Unreachable):
            size_of(engine, "key")


def test_closing_the_engine_ends_what_is_under_way() -> None:
    memory = random_bytes()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = StoreOptions(f"http://127.0.0.1:{silent.getsockname()[1]}", access_key_id="a", secret_access_key="b")
        engine = ObjectEngine(open_store("s3://kvcache", options))
        transfer = engine.write(region_of(engine, memory), WHOLE, engine.object("key", SIZE), WHOLE, soon())
        engine.close()
        with pytest.raises(TransferError, match="cancelled"):
            transfer.wait()
        transfer.close()
