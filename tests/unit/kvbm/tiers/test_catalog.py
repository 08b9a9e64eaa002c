from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm.hashing import FullHash
from kvbm.tiers.base import Changes
from kvbm.tiers.catalog import Catalog, Listing


def block_hash(number: int) -> FullHash:
    """Three blocks a part of the catalog, parts with none between them."""
    return FullHash(bytes([number // 3 * 80 % 256]) + number.to_bytes(31, "big"))


NUMBERS = st.integers(0, 11)


def catalog_of(*numbers: int, limit: int = 100) -> Catalog:
    catalog = Catalog(limit)
    for number in numbers:
        catalog.wrote(block_hash(number))
    catalog.changes()
    return catalog


def listed(catalog: Catalog, *pages: tuple[int, ...]) -> Listing:
    """A listing to its end."""
    listing = Listing(catalog)
    for page in (*pages, ()):
        listing.ask()
        for number in page:
            listing.found(block_hash(number))
    listing.end()
    return listing


def test_a_listing_tells_what_others_stored_and_deleted() -> None:
    catalog = catalog_of(0, 1, 5, 11)
    assert listed(catalog, (1, 2), (3, 11)).complete
    assert catalog.changes() == Changes((block_hash(2), block_hash(3)), (block_hash(0), block_hash(5)))
    assert catalog.changes() == Changes()
    assert set(catalog.hashes()) == {block_hash(number) for number in (1, 2, 3, 11)}


def test_a_listing_that_is_given_up_leaves_what_it_did_not_come_to() -> None:
    catalog = catalog_of(0, 1, 4, 8)
    listing = Listing(catalog)
    listing.ask()
    listing.found(block_hash(1))
    listing.found(block_hash(3))
    assert set(catalog.hashes()) == {block_hash(number) for number in (1, 3, 4, 8)}


def test_what_was_written_after_a_page_was_asked_for_is_not_gone_because_the_page_lacks_it() -> None:
    catalog = catalog_of()
    listing = Listing(catalog)
    listing.ask()
    catalog.wrote(block_hash(0))
    listing.end()
    assert block_hash(0) in catalog


def test_what_came_and_went_while_a_listing_was_elsewhere_is_noticed_by_it() -> None:
    catalog = catalog_of()
    listing = Listing(catalog)
    listing.ask()
    listing.found(block_hash(0))
    catalog.wrote(block_hash(11))
    listing.ask()  # by now others have deleted it
    listing.end()
    assert set(catalog.hashes()) == {block_hash(0)}


def test_listings_at_the_same_time_do_not_undo_what_was_written_meanwhile() -> None:
    catalog = catalog_of()
    one, two = Listing(catalog), Listing(catalog)
    one.ask()
    two.ask()
    catalog.wrote(block_hash(0))
    one.found(block_hash(0))
    two.end()
    assert block_hash(0) in catalog


def test_what_was_deleted_after_a_page_was_asked_for_is_not_back_because_the_page_has_it() -> None:
    catalog = catalog_of(0)
    listing = Listing(catalog)
    listing.ask()
    catalog.doom(block_hash(0))
    catalog.deleted(block_hash(0))
    listing.found(block_hash(0))
    assert block_hash(0) not in catalog
    listing.ask()
    listing.found(block_hash(0))  # somebody stored it anew
    assert block_hash(0) in catalog


def test_what_could_not_be_deleted_cannot_be_found_until_it_is_written_anew() -> None:
    catalog = catalog_of(0)
    catalog.doom(block_hash(0))
    listed(catalog, (0,))
    listed(catalog, (0,))
    assert block_hash(0) not in catalog
    catalog.wrote(block_hash(0))
    catalog.deleted(block_hash(0))  # the deletion ends late, and may or may not have come before
    listed(catalog, (0,))
    assert block_hash(0) in catalog


def test_a_full_catalog_takes_what_this_worker_wrote_and_nothing_listed() -> None:
    catalog = catalog_of(0, 1, limit=2)
    assert not listed(catalog, (0, 1, 2)).complete
    assert block_hash(2) not in catalog
    catalog.wrote(block_hash(11))
    assert block_hash(11) in catalog
    assert len(catalog) == 2
    catalog.check()


@given(st.lists(st.tuples(st.booleans(), NUMBERS)))
def test_changes_are_none_where_something_came_and_went_or_went_and_came(steps: list[tuple[bool, int]]) -> None:
    catalog, before = catalog_of(0, 1, 2, 3), {block_hash(number) for number in range(4)}
    for comes, number in steps:
        if comes:
            catalog.wrote(block_hash(number))
        else:
            catalog.missed(block_hash(number))
    changes, after = catalog.changes(), set(catalog.hashes())
    assert (set(changes.stored), set(changes.removed)) == (after - before, before - after)


class Store(RuleBasedStateMachine):
    """A store that this worker and others use, while pages of a listing are on their way."""

    pages = Bundle("pages")

    @initialize()
    def start(self) -> None:
        self.catalog = Catalog(100)
        self.there: set[int] = set()
        self.certain: set[int] = set()  # written by this worker, and by nobody deleted since
        self.doomed: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self.listing, self.after = Listing(self.catalog), -1
        self.page: list[int] | None = None

    @precondition(lambda self: self.page is None)
    @rule(size=st.integers(1, 4))
    def a_page_is_asked_for_and_made(self, size: int) -> None:
        self.listing.ask()
        in_order = sorted(self.there, key=block_hash)
        place = block_hash(self.after) if self.after >= 0 else b""
        self.page = [number for number in in_order if block_hash(number) > place][:size]

    @precondition(lambda self: self.page is not None)
    @rule()
    def the_page_arrives(self) -> None:
        page, self.page = self.page, None
        for number in page or ():
            self.listing.found(block_hash(number))
            self.after = number
        if not page:
            self.listing.end()
            self._begin()

    @rule()
    def the_listing_is_given_up(self) -> None:
        self._begin()

    @rule(number=NUMBERS)
    def this_worker_writes(self, number: int) -> None:
        self.there.add(number)
        self.catalog.wrote(block_hash(number))
        self.certain.add(number)
        self.doomed.discard(number)

    @rule(number=NUMBERS, works=st.booleans())
    def this_worker_deletes(self, number: int, works: bool) -> None:
        self.catalog.doom(block_hash(number))
        self.certain.discard(number)
        self.doomed.add(number)
        if works:
            self.there.discard(number)
            self.catalog.deleted(block_hash(number))
            self.doomed.discard(number)

    @rule(number=NUMBERS)
    def others_write(self, number: int) -> None:
        self.there.add(number)

    @rule(number=NUMBERS)
    def others_delete(self, number: int) -> None:
        self.there.discard(number)
        self.certain.discard(number)

    @rule(number=NUMBERS)
    def a_read_finds_out(self, number: int) -> None:
        if number not in self.there:
            self.catalog.missed(block_hash(number))

    @invariant()
    def nothing_is_lost_or_found_by_mistake(self) -> None:
        self.catalog.check()
        found = set(self.catalog.hashes())
        assert {block_hash(number) for number in self.certain} <= found
        assert not {block_hash(number) for number in self.doomed} & found

    def teardown(self) -> None:
        """A listing that nobody disturbs brings the catalog up to date."""
        if hasattr(self, "catalog"):
            listed(self.catalog, tuple(sorted(self.there, key=block_hash)))
            expected = {block_hash(number) for number in self.there - self.doomed}
            assert set(self.catalog.hashes()) == expected


TestAStoreThatOthersUse = Store.TestCase
