"""A manifest claims what was written to it, and nothing else, however it was torn."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.hashing import FullHash
from kvbm.tiers.manifest import ENTRY_BYTES, Entry, Header, Manifest, read

HEADER = Header(b"model", 8192, 4)


def entry(place: int, number: int, name: int | None = None) -> Entry:
    return Entry(place, FullHash(bytes([place if name is None else name]) * 32), number)


def fresh(folder: Path, *entries: Entry) -> Path:
    Manifest.replace(folder / "manifest", HEADER, entries).close()
    return folder / "manifest"


def test_what_was_set_is_read_in_the_order_of_use_and_what_was_cleared_is_not(tmp_path: Path) -> None:
    path = fresh(tmp_path, entry(0, 1), entry(2, 9))
    assert path.stat().st_size == HEADER.size
    manifest = Manifest(path)
    manifest.set([entry(1, 5), entry(3, 2)])
    manifest.clear([0])
    manifest.sync()
    assert read(path, HEADER) == (4, [entry(3, 2), entry(1, 5), entry(2, 9)])
    manifest.wipe(4)
    assert read(path, HEADER) == (4, [])
    manifest.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        manifest.set([entry(1, 5)])


def test_of_two_places_with_one_block_the_later_counts(tmp_path: Path) -> None:
    assert read(fresh(tmp_path, entry(0, 7, name=1), entry(2, 5, name=1)), HEADER) == (4, [entry(0, 7, name=1)])


@pytest.mark.parametrize("other", [Header(b"another", 8192, 4), Header(b"model", 4096, 4)])
def test_of_another_model_or_layout_nothing_is_read(tmp_path: Path, other: Header) -> None:
    assert read(fresh(tmp_path, entry(0, 1)), other) is None


def test_the_number_of_places_it_was_written_under_is_told(tmp_path: Path) -> None:
    assert read(fresh(tmp_path, entry(3, 1)), Header(b"model", 8192, 2)) == (4, [entry(3, 1)])


def test_cut_off_at_any_byte_it_has_the_entries_that_are_whole(tmp_path: Path) -> None:
    entries = [entry(place, place + 1) for place in range(4)]
    path = fresh(tmp_path, *entries)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = read(path, HEADER)
        assert found == ((4, entries[: length // ENTRY_BYTES - 1]) if length >= ENTRY_BYTES else None)


def test_torn_at_any_byte_an_entry_is_the_old_one_the_new_one_or_none(tmp_path: Path) -> None:
    """The first bytes of a write are there, or all but the first."""
    for old, new in ((b"", entry(1, 2).pack()), (entry(1, 1, name=9).pack(), bytes(ENTRY_BYTES))):
        path = fresh(tmp_path, entry(0, 1))
        whole = path.read_bytes()
        before = old or bytes(ENTRY_BYTES)
        for cut in range(ENTRY_BYTES + 1):
            for torn in (new[:cut] + before[cut:], before[:cut] + new[cut:]):
                path.write_bytes(whole[: 2 * ENTRY_BYTES] + torn + whole[3 * ENTRY_BYTES :])
                found = read(path, HEADER)
                assert found in (
                    (4, [entry(0, 1)]),
                    (4, [entry(0, 1), entry(1, 2)]),
                    (4, [entry(0, 1), entry(1, 1, 9)]),
                )
                assert len(found[1]) == 1 or torn in (before, new)


@given(raw=st.binary(max_size=3 * ENTRY_BYTES))
def test_garbage_is_no_entry_and_a_garbage_header_no_manifest(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "manifest"
    path.write_bytes(HEADER.pack() + raw)
    assert read(path, HEADER) == (4, [])
    path.write_bytes(raw)
    assert read(path, HEADER) is None


def test_an_entry_that_stands_at_another_place_is_none(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    path.write_bytes(HEADER.pack() + entry(1, 1).pack())
    assert read(path, HEADER) == (4, [])
