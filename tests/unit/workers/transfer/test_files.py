from __future__ import annotations

import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.errors import Denied, Mismatch, NoSpace, NotFound, TransferError, TransferTimeout
from workers.transfer import background, files
from workers.transfer.batches import IOV_MAX, Batch, pieces_of
from workers.transfer.engine import Region, Spans, Target
from workers.transfer.files import ALIGNMENT, FileEngine

SIZE = 2**18
BATCH = 8192


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def spans(offsets: list[int], size: int) -> Spans:
    return Spans(np.array(offsets, dtype=np.int64), size)


def page_aligned(size: int = SIZE) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def random_bytes(size: int = SIZE) -> NDArray[np.uint8]:
    memory = page_aligned(size)
    memory[:] = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    return memory


def region_of(engine: FileEngine, memory: NDArray[np.uint8]) -> Region:
    return engine.register(memory.ctypes.data, memory.size, "DRAM", 0)


@pytest.fixture
def engine() -> Iterator[FileEngine]:
    with closing(FileEngine(threads=3, batch_bytes=BATCH)) as engine:
        yield engine


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk looks like, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Gate:
    """A system call that starts, and ends when it is let."""

    def __init__(self, call: Callable[..., int]) -> None:
        self._call = call
        self.entered, self.opened, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, *args: int) -> int:
        self.calls += 1
        self.entered.set()
        assert self.opened.wait(20)
        return self._call(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Where every write of a file waits."""
    gate = Gate(files._pwritev)
    monkeypatch.setattr(files, "_pwritev", gate)
    monkeypatch.setattr(background, "CLOSE_S", 0.05)
    yield gate
    gate.opened.set()


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Spans, Spans]:
    """As many spans on both sides, none overlapping another."""
    size = draw(st.sampled_from([1, 7, 512, ALIGNMENT, 3 * ALIGNMENT]))
    count = draw(st.integers(0, min(20, SIZE // size // 2)))
    slots = st.lists(st.integers(0, min(40, SIZE // size - 1) - 1), min_size=count, max_size=count, unique=True)

    def side() -> Spans:
        shift = draw(st.sampled_from([0, 0, 1, 512]))
        chosen = draw(st.one_of(slots, slots.map(sorted), st.just(list(range(count)))))
        return spans([slot * size + min(shift, SIZE % size) for slot in chosen], size)

    return side(), side()


@given(patterns(), st.booleans())
def test_what_was_written_is_what_is_read_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory, pattern: tuple[Spans, Spans], direct: bool
) -> None:
    here, there = pattern
    source, back = random_bytes(), page_aligned()
    expected, read = np.zeros(SIZE, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    for mine, theirs in zip(here.offsets, there.offsets, strict=True):
        expected[theirs : theirs + here.size] = source[mine : mine + here.size]
        read[mine : mine + here.size] = source[mine : mine + here.size]
    path = tmp_path_factory.mktemp("files") / "file"
    with closing(FileEngine(threads=2, batch_bytes=BATCH, direct=direct)) as engine:
        target = engine.open(path, SIZE)
        engine.write(region_of(engine, source), here, target, there, soon()).wait()
        assert path.read_bytes() == expected.tobytes()
        engine.read(region_of(engine, back), here, target, there, soon()).wait()
    assert np.array_equal(back, read)


@given(st.lists(st.integers(2, 50), min_size=1, max_size=10), st.data())
def test_the_rest_of_a_partial_call_is_what_was_not_moved(sizes: list[int], data: st.DataObject) -> None:
    iovecs = np.array([[1000 * number, size] for number, size in enumerate(sizes)], dtype=np.uint64)
    moved = data.draw(st.integers(1, sum(sizes) - 1))

    def addresses(batch: Batch) -> list[int]:
        return [address + byte for address, size in batch.iovecs.tolist() for byte in range(size)]

    whole = Batch(iovecs, 7, sum(sizes))
    assert addresses(whole.after(moved)) == addresses(whole)[moved:]
    assert (whole.after(moved).offset, whole.after(moved).size) == (7 + moved, sum(sizes) - moved)


def test_spans_contiguous_on_both_sides_become_one_piece() -> None:
    offsets = spans([512 * number for number in range(16)], 512)
    [batch] = pieces_of(4096, offsets, offsets, BATCH).batches(BATCH)
    assert batch.iovecs.tolist() == [[4096, BATCH]]


def test_scattered_memory_goes_to_one_place_of_the_file_in_one_call() -> None:
    count = 3 * IOV_MAX
    here, there = spans([2 * number for number in range(count)][::-1], 1), spans(list(range(count)), 1)
    batches = pieces_of(0, here, there, 2**20).batches(2**20)
    assert [(len(batch.iovecs), batch.offset) for batch in batches] == [(IOV_MAX, n * IOV_MAX) for n in range(3)]


def test_a_long_span_is_cut_into_batches() -> None:
    batches = pieces_of(0, Spans.one(5, 10 * BATCH + 1), Spans.one(9, 10 * BATCH + 1), BATCH).batches(BATCH)
    assert [int(batch.iovecs[:, 1].sum()) for batch in batches] == [BATCH] * 10 + [1]


@pytest.mark.parametrize("shift", [0, 512])
def test_a_transfer_that_is_not_aligned_goes_through_the_page_cache(
    engine: FileEngine, tmp_path: Path, shift: int
) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    moved = Spans.one(shift, SIZE - ALIGNMENT)
    engine.write(region_of(engine, source), moved, target, moved, soon()).wait()
    content = np.fromfile(target.where, dtype=np.uint8)
    assert np.array_equal(content[shift : shift + moved.size], source[shift : shift + moved.size])


def test_without_direct_io_the_backend_says_buffered(tmp_path: Path) -> None:
    with closing(FileEngine(threads=1, direct=False)) as engine:
        assert engine.backend(engine.open(tmp_path / "file", SIZE)) == "files/buffered"


def test_the_space_of_a_new_file_is_reserved_and_a_longer_one_keeps_its_size(
    engine: FileEngine, tmp_path: Path
) -> None:
    assert engine.open(tmp_path / "new", SIZE) == Target(str(tmp_path / "new"), SIZE)
    assert (tmp_path / "new").stat().st_blocks * 512 >= SIZE
    (tmp_path / "longer").write_bytes(bytes(2 * SIZE))
    engine.open(tmp_path / "longer", SIZE)
    assert (tmp_path / "longer").stat().st_size == 2 * SIZE


def test_a_volume_without_room_is_said_at_open_and_nothing_is_left(engine: FileEngine, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"content")
    with largest_file(SIZE // 2):
        for name in ("old", "new"):
            with pytest.raises(NoSpace, match=rf"{tmp_path / name}: .* \(EFBIG\)"):
                engine.open(tmp_path / name, SIZE)
    assert (tmp_path / "old").read_bytes() == b"content"
    assert not (tmp_path / "new").exists()


def test_running_out_of_room_ends_the_write_after_what_fitted(engine: FileEngine, tmp_path: Path) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    os.truncate(target.where, 0)
    half = BATCH // 2  # one batch is cut by the limit: its first half is written, and the rest then fails
    with largest_file(half):
        transfer = engine.write(region_of(engine, source), Spans.one(0, BATCH), target, Spans.one(0, BATCH), soon())
        with pytest.raises(NoSpace, match="EFBIG"):
            transfer.wait()
        transfer.close()
    assert Path(target.where).read_bytes() == source[:half].tobytes()


def test_a_file_shorter_than_it_was_fails_the_read(engine: FileEngine, tmp_path: Path) -> None:
    memory, target = page_aligned(), engine.open(tmp_path / "file", SIZE)
    os.truncate(target.where, 1000)
    transfer = engine.read(region_of(engine, memory), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
    with pytest.raises(TransferError, match="ends at byte"):
        transfer.wait()
    transfer.close()


def test_a_folder_that_does_not_exist_or_takes_no_files_is_said_with_its_path(
    engine: FileEngine, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=f"{tmp_path}/none/file: No such file or directory"):
        engine.open(tmp_path / "none" / "file", 1)
    with pytest.raises(Denied, match="/sys/file"):
        engine.open("/sys/file", 1)
    with pytest.raises(TransferError, match="EISDIR"):
        engine.open(tmp_path, 1)


def test_what_cannot_be_moved_is_refused_with_a_sentence(engine: FileEngine, tmp_path: Path) -> None:
    region, target = region_of(engine, page_aligned()), engine.open(tmp_path / "file", SIZE)
    one, two = spans([0], 8), spans([0, 8], 8)
    with pytest.raises(Mismatch, match="stage VRAM"):
        engine.register(0, SIZE, "VRAM", 0)
    with pytest.raises(Mismatch, match="1 spans of 8 bytes here, 2 of 8 there"):
        engine.write(region, one, target, two, soon())
    with pytest.raises(Mismatch, match="are not all in"):
        engine.read(region, one, target, Spans.one(SIZE - 4, 8), soon())
    with pytest.raises(Mismatch, match="spans of 0 bytes"):
        engine.read(region, spans([0], 0), target, spans([0], 0), soon())
    with pytest.raises(Mismatch, match="open already"):
        engine.open(target.where, SIZE)
    with pytest.raises(Mismatch, match="multiple of 4096"):
        FileEngine(batch_bytes=1000)


def test_a_forgotten_file_stays_open_until_its_transfer_ended(engine: FileEngine, tmp_path: Path, gate: Gate) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    transfer = engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
    assert gate.entered.wait(20)
    engine.forget(target)
    with pytest.raises(NotFound, match="is not open"):
        engine.sync(target, soon())
    other = engine.open(tmp_path / "other", SIZE)  # would get the descriptor of a file closed too early
    gate.opened.set()
    transfer.wait()
    assert Path(target.where).read_bytes() == source.tobytes()
    assert not any(Path(other.where).read_bytes())


def test_a_cancelled_write_posts_nothing_more_and_says_while_its_memory_is_in_use(
    engine: FileEngine, tmp_path: Path, gate: Gate
) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    transfer = engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
    assert gate.entered.wait(20)
    with pytest.raises(TransferError, match="could not be stopped"):
        transfer.close()
    gate.opened.set()
    transfer.close()
    with pytest.raises(TransferError, match="cancelled"):
        transfer.poll()
    written = Path(target.where).read_bytes()
    assert len(written.rstrip(b"\0")) <= 3 * BATCH  # a batch for each of the three threads
    source[:] = 0
    engine.sync(target, soon()).wait()
    assert Path(target.where).read_bytes() == written


def test_nothing_is_posted_after_the_deadline(engine: FileEngine, tmp_path: Path) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    late = engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon(-1))
    with pytest.raises(TransferTimeout):
        late.wait()
    late.close()
    assert not any(Path(target.where).read_bytes())


async def test_the_deadline_ends_every_way_of_waiting(engine: FileEngine, tmp_path: Path, gate: Gate) -> None:
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    transfer = engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon(0.1))
    with pytest.raises(TransferTimeout):
        await transfer
    with pytest.raises(TransferTimeout):
        transfer.wait()
    with pytest.raises(TransferTimeout):
        transfer.poll()
    gate.opened.set()
    transfer.close()


async def test_transfers_can_be_awaited_and_synced(engine: FileEngine, tmp_path: Path) -> None:
    source, back = random_bytes(), page_aligned()
    target, whole = engine.open(tmp_path / "file", SIZE), Spans.one(0, SIZE)
    await engine.write(region_of(engine, source), whole, target, whole, soon())
    await engine.sync(target, soon())
    await engine.read(region_of(engine, back), whole, target, whole, soon())
    assert np.array_equal(back, source)


def test_a_large_transfer_does_not_hold_up_a_small_one(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes_before_the_read = []

    def preadv(*args: int) -> int:
        writes_before_the_read.append(gate.calls)
        return read(*args)

    read = files._preadv
    monkeypatch.setattr(files, "_preadv", preadv)
    with closing(FileEngine(threads=1, batch_bytes=ALIGNMENT)) as engine:
        memory = random_bytes()
        region, target = region_of(engine, memory), engine.open(tmp_path / "file", SIZE)
        large = engine.write(region, Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
        assert gate.entered.wait(20)
        small = engine.read(region, Spans.one(0, 1), target, Spans.one(0, 1), soon())
        gate.opened.set()
        small.wait()
        large.wait()
    assert writes_before_the_read == [1]


def test_closing_cancels_ends_the_threads_and_closes_the_files(tmp_path: Path, gate: Gate) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    engine = FileEngine(threads=2, batch_bytes=BATCH)
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    transfer = engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
    assert gate.entered.wait(20)
    gate.opened.set()
    engine.close()
    with pytest.raises(TransferError, match="cancelled"):
        transfer.wait()
    with pytest.raises(NotFound):
        engine.backend(target)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("files-")]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_closing_says_which_threads_are_stuck(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CLOSE_S", 0.05)
    engine = FileEngine(threads=1)
    source, target = random_bytes(), engine.open(tmp_path / "file", SIZE)
    engine.write(region_of(engine, source), Spans.one(0, SIZE), target, Spans.one(0, SIZE), soon())
    assert gate.entered.wait(20)
    with pytest.raises(TransferError, match="files-0 still in a system call"):
        engine.close()
    gate.opened.set()
    engine.close()
