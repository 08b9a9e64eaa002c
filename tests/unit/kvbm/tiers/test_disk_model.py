"""The disk tier, driven at random in a real folder, against a list in the order of eviction."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvbm.tiers.slots import Eviction
from tests.tier_folder import Host, named, wanted

PLACES = 6
NUMBERS = st.lists(st.integers(0, 9), max_size=8)


class DiskTiers(RuleBasedStateMachine):
    """`model` holds the version of each block that can be found, the next to be evicted first."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.host, self.host_places, self.homes = Host(), PLACES, 0
        self.model: dict[int, int] = {}
        self.version = 0
        self.known: set[bytes] = set()  # by `changes` alone

    @initialize(eviction=st.sampled_from(["lru", "fifo"]))
    def begin(self, eviction: Eviction) -> None:
        self.eviction = eviction
        self._open()

    def _open(self) -> None:
        self.tier = self.host.tier(self.folder / str(self.homes), self.host_places, self.eviction)
        self.runner.run(self.tier.open())
        self.known = set()

    def _use(self, numbers: list[int]) -> None:
        for number in reversed(numbers):
            if self.eviction == "lru" and number in self.model:
                self.model[number] = self.model.pop(number)

    @rule(numbers=NUMBERS)
    def write(self, numbers: list[int]) -> None:
        self.version += 1
        here = [number for number in numbers if number in self.model]
        new = list(dict.fromkeys(number for number in numbers if number not in self.model))
        idle = [number for number in self.model if number not in here]
        free = self.host_places - len(self.model)
        new = new[: free + len(idle)]
        gone = idle[: max(0, len(new) - free)]
        for number in gone:
            del self.model[number]
        self._use(here)
        self.model |= dict.fromkeys(reversed(new), self.version)

        evicted = self.tier.evicted
        assert self.runner.run(self.tier.write(self.host.filled(numbers, self.version))) == len(
            [number for number in numbers if number in self.model]
        )
        assert self.tier.evicted == evicted + len(gone)

    @rule(numbers=NUMBERS, use=st.booleans())
    def read(self, numbers: list[int], use: bool) -> None:
        self.host.wipe()
        there = self.runner.run(self.tier.read(wanted(numbers), use=use))
        assert there == [number in self.model for number in numbers]
        for slot, number in enumerate(numbers):
            assert number not in self.model or self.host.holds(slot, number, self.model[number])
        if use:
            self._use(numbers)

    @rule(numbers=st.lists(st.integers(0, 9), unique=True))
    def used(self, numbers: list[int]) -> None:
        self.tier.used([named(number) for number in numbers])
        self._use(numbers)

    @rule(number=st.integers(0, 9))
    def forget(self, number: int) -> None:
        self.runner.run(self.tier.forget(named(number)))
        self.model.pop(number, None)

    @rule()
    def purge(self) -> None:
        assert self.runner.run(self.tier.purge()) == len(self.model)
        self.model = {}

    @rule()
    def sync(self) -> None:
        self.runner.run(self.tier.sync())

    @rule()
    def probe(self) -> None:
        self.runner.run(self.tier.probe())

    @rule(places=st.integers(3, 8))
    def restart(self, places: int) -> None:
        """A smaller one loses what lies beyond; which that is, is the tier's business."""
        self.runner.run(self.tier.close())
        shrunk, self.host_places = places < self.host_places, places
        self._open()
        kept = [block_hash[0] for block_hash in self.tier.hashes()]
        assert kept == [number for number in self.model if number in kept]
        assert shrunk or len(kept) == len(self.model)
        self.model = {number: self.model[number] for number in kept}

    @rule()
    def crash(self) -> None:
        """What the folder holds at this moment is all there is. Only how recently blocks were used may be lost."""
        shutil.copytree(self.folder / str(self.homes), self.folder / str(self.homes + 1))
        self.runner.run(self.tier.close())
        self.homes += 1
        self._open()
        kept = [block_hash[0] for block_hash in self.tier.hashes()]
        assert set(kept) == set(self.model)
        self.model = {number: self.model[number] for number in kept}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.tier.check()
        assert {block_hash[0] for block_hash in self.tier.hashes()} == set(self.model)
        assert all((named(number) in self.tier) == (number in self.model) for number in range(10))
        changes = self.tier.changes()
        self.known = (self.known - set(changes.removed)) | set(changes.stored)
        assert self.known == set(self.tier.hashes())
        assert self.tier.used_bytes <= self.tier.size_bytes

    def teardown(self) -> None:
        self.runner.run(self.tier.close())
        self.host.close()
        self.runner.close()
        shutil.rmtree(self.folder)


TestDiskTiers = DiskTiers.TestCase
TestDiskTiers.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
