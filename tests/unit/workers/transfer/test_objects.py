from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from obstore.exceptions import GenericError, PermissionDeniedError

from workers.errors import Corrupt, Denied, Mismatch, NoBucket, NotFound, TransferError, TransferTimeout, Unreachable
from workers.transfer.engine import Region, Spans, Target
from workers.transfer.objects import Listed, ObjectEngine, parts_of
from workers.transfer.stores import StoreOptions, failure, open_store

SIZE = 2**12
PART = 64


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def spans(offsets: list[int], size: int) -> Spans:
    return Spans(np.array(offsets, dtype=np.int64), size)


def random_bytes(size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)


def region_of(engine: ObjectEngine, memory: NDArray[np.uint8]) -> Region:
    return engine.register(memory.ctypes.data, memory.size, "DRAM", 0)


@pytest.fixture
def engine() -> Iterator[ObjectEngine]:
    with closing(ObjectEngine(open_store("memory:///"), requests=3, part_bytes=PART)) as engine:
        yield engine


def stored(engine: ObjectEngine, key: str, content: bytes) -> Target:
    """An object of this content."""
    memory = np.frombuffer(content, dtype=np.uint8)
    target, whole = engine.object(key, len(content)), Spans.one(0, len(content))
    engine.write(region_of(engine, memory), whole, target, whole, soon()).wait()
    return target


@given(st.data(), st.sampled_from([1, 16, PART, 3 * PART + 7]), st.integers(1, 12))
def test_spans_written_as_an_object_are_read_back_wherever_they_are_wanted(
    data: st.DataObject, size: int, count: int
) -> None:
    slots = st.lists(st.integers(0, SIZE // size - 1), min_size=count, max_size=count, unique=True)
    places = st.permutations(range(count))
    source, back = random_bytes(), np.zeros(SIZE, dtype=np.uint8)
    taken, order = data.draw(slots), data.draw(places)
    wanted = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    placed = data.draw(slots)[: len(wanted)]
    content, expected = np.zeros(count * size, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    for slot, place in zip(taken, order, strict=True):
        content[place * size : (place + 1) * size] = source[slot * size : (slot + 1) * size]
    for slot, place in zip(placed, wanted, strict=True):
        expected[slot * size : (slot + 1) * size] = content[place * size : (place + 1) * size]

    with closing(ObjectEngine(store := open_store("memory:///"), requests=2, part_bytes=PART)) as engine:
        target = engine.object("kv/1", count * size)
        here, there = spans([slot * size for slot in taken], size), spans([place * size for place in order], size)
        engine.write(region_of(engine, source), here, target, there, soon()).wait()
        assert obstore.get(store, "kv/1").bytes() == content.tobytes()
        here, there = spans([slot * size for slot in placed], size), spans([place * size for place in wanted], size)
        engine.read(region_of(engine, back), here, target, there, soon()).wait()
    assert np.array_equal(back, expected)


def test_contiguous_spans_are_one_request_up_to_a_part() -> None:
    there = spans([0, 16, 32, 48, 64, 200], 16)
    parts = parts_of(spans([500, 400, 300, 200, 100, 0], 16), there, PART)
    assert [(part.start, part.offsets.tolist()) for part in parts] == [
        (0, [500, 400, 300, 200]),
        (64, [100]),
        (200, [0]),
    ]


def test_an_object_is_written_whole(engine: ObjectEngine) -> None:
    region, target = region_of(engine, random_bytes()), engine.object("key", 32)
    for there in (spans([0], 16), spans([0, 0], 16), spans([0, 15], 16)):
        here = spans([0] * len(there.offsets), 16)
        with pytest.raises(Mismatch, match="do not cover the 32 bytes of key"):
            engine.write(region, here, target, there, soon())
    with pytest.raises(Mismatch, match="are not all in key"):
        engine.write(region, spans([0, 0], 16), target, spans([0, 32], 16), soon())
    with pytest.raises(Mismatch, match="objects are written from host memory"):
        engine.register(0, SIZE, "VRAM", 0)


def test_an_object_may_be_empty(engine: ObjectEngine) -> None:
    memory = random_bytes()
    nothing = spans([], 1)
    engine.write(region_of(engine, memory), nothing, engine.object("empty", 0), nothing, soon()).wait()
    found = engine.head("empty", soon())
    found.wait()
    assert found.size == 0


def test_head_and_delete_know_whether_an_object_is_there(engine: ObjectEngine) -> None:
    stored(engine, "kv/1", b"content")
    sizes = []
    for _ in range(2):
        (found := engine.head("kv/1", soon())).wait()
        sizes.append(found.size)
        engine.delete("kv/1", soon()).wait()
        engine.delete("kv/1", soon()).wait()
    assert sizes == [7, None]


def keys(engine: ObjectEngine, prefix: str, count: int) -> list[list[str]]:
    """Page after page, the last of which is empty."""
    pages: list[list[str]] = []
    while not pages or pages[-1]:
        (page := engine.page(prefix, pages[-1][-1] if pages else "", count, soon())).wait()
        pages.append([each.key for each in page.objects])
    return pages


def test_a_folder_is_listed_page_after_page_in_order(engine: ObjectEngine) -> None:
    for key in ("kv/b/2", "kv/a/1", "kv/b/1", "kv/c", "kv/a/3", "kvx/1", "other"):
        stored(engine, key, b"content")
    assert keys(engine, "kv", 2) == [["kv/a/1", "kv/a/3"], ["kv/b/1", "kv/b/2"], ["kv/c"], []]
    assert keys(engine, "kv/b", 5) == [["kv/b/1", "kv/b/2"], []]
    assert keys(engine, "nothing", 5) == [[]]
    (page := engine.page("kv", "kv/b/2", 5, soon())).wait()
    assert page.objects == [Listed("kv/c", 7)]


async def test_a_transfer_that_is_stopped_is_over_at_once(engine: ObjectEngine) -> None:
    memory, back, whole = random_bytes(), np.zeros(SIZE, dtype=np.uint8), Spans.one(0, SIZE)
    target = engine.object("key", SIZE)
    await (written := engine.write(region_of(engine, memory), whole, target, whole, soon()))
    await written.stopped()
    read = engine.read(region_of(engine, back), whole, target, whole, soon())
    await read.stopped()
    had = back.copy()
    await engine.head("key", soon())  # a late part would have come by now
    assert np.array_equal(back, had)


def test_an_object_that_is_gone_or_shorter_than_said_fails_the_read(engine: ObjectEngine) -> None:
    memory = np.zeros(SIZE, dtype=np.uint8)
    region, whole = region_of(engine, memory), Spans.one(0, SIZE)
    with pytest.raises(NotFound, match="kv/none: no such object or bucket"):
        engine.read(region, whole, engine.object("kv/none", SIZE), whole, soon()).wait()
    stored(engine, "kv/short", bytes(10))
    first = Spans.one(0, 11)
    with pytest.raises(TransferError, match="kv/short ends at byte 10"):
        engine.read(region, first, engine.object("kv/short", 11), first, soon()).wait()


def test_nothing_is_written_after_the_deadline(engine: ObjectEngine) -> None:
    memory, whole = random_bytes(), Spans.one(0, SIZE)
    late = engine.write(region_of(engine, memory), whole, engine.object("late", SIZE), whole, soon(-1))
    with pytest.raises(TransferTimeout):
        late.wait()
    late.close()
    (found := engine.head("late", soon())).wait()
    assert found.size is None


async def test_transfers_can_be_awaited(engine: ObjectEngine) -> None:
    memory, back, whole = random_bytes(), np.zeros(SIZE, dtype=np.uint8), Spans.one(0, SIZE)
    target = engine.object("key", SIZE)
    await engine.write(region_of(engine, memory), whole, target, whole, soon())
    await engine.read(region_of(engine, back), whole, target, whole, soon())
    assert np.array_equal(back, memory)


def test_after_close_nothing_can_be_started_and_the_thread_has_ended() -> None:
    engine = ObjectEngine(open_store("memory:///"))
    engine.close()
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "objects"]
    with pytest.raises(TransferError, match="closed"):
        engine.delete("key", soon())


def test_a_folder_can_stand_in_for_a_store(tmp_path: Path) -> None:
    with closing(ObjectEngine(open_store(f"file://{tmp_path}"))) as engine:
        stored(engine, "kv/1", b"content")
        engine.delete("kv/2", soon()).wait()
    assert (tmp_path / "kv" / "1").read_bytes() == b"content"


@pytest.mark.parametrize("url", ["ftp://host/folder", "s3://"])
def test_an_address_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(Mismatch):
        open_store(url)


def test_credentials_are_not_shown() -> None:
    options = StoreOptions(access_key_id="AKIA", secret_access_key="hidden", session_token="token")
    store = open_store("s3://bucket/prefix", options)
    assert not [secret for secret in ("AKIA", "hidden", "token") if secret in f"{options!r} {store!r}"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError("… <Code>NoSuchBucket</Code>"), NoBucket, "k: no such bucket (NoSuchBucket)"),
        (FileNotFoundError("…"), NotFound, "k: no such object or bucket"),
        (
            PermissionDeniedError("… 403 Forbidden: <?xml…<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIA"),
            Denied,
            "k: the store refused our credentials (InvalidAccessKeyId)",
        ),
        (
            GenericError("GET: status code: 403 Forbidden: <?xml…<Code>SignatureDoesNotMatch</Code>"),
            Denied,
            "k: the store refused our credentials (SignatureDoesNotMatch)",
        ),
        (
            GenericError("Generic S3 error: HTTP error: error sending request\n\nDebug source:\n HttpError {…"),
            Unreachable,
            "k: Generic S3 error: HTTP error: error sending request",
        ),
        (
            GenericError("PUT: Server returned error response, status code: 503 Slow: <?xml…<Code>SlowDown</Code>"),
            Unreachable,
            "k: PUT: Server returned error response, status code: 503 Slow (SlowDown)",
        ),
        (
            GenericError("GET: status code: 416 Range: <?xml…<Code>InvalidRange</Code>"),
            Corrupt,
            "k ends before the bytes that are wanted (InvalidRange)",
        ),
        (GenericError("GET: status code: 416 Range: <?xml…"), TransferError, "k: GET: status code: 416 Range"),
    ],
)
def test_a_stores_error_says_what_is_wrong_in_a_line(error: Exception, kind: type[TransferError], text: str) -> None:
    found = failure(error, "k")
    assert (type(found), str(found)) == (kind, text)
