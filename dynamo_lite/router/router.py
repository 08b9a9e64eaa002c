"""Placing a request: in this process, without I/O, from what the roster knows now."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from dynamo_lite import config
from dynamo_lite.errors import NoInstance
from dynamo_lite.plane.wire import Holder, Incarnation, InstanceRecord, Role
from dynamo_lite.router import metrics
from dynamo_lite.router.cost import Candidate, cheapest, reason, score
from dynamo_lite.router.load import Booking
from dynamo_lite.router.roster import Instance, Roster
from kvbm.events import Tier
from kvbm.hashing import block_hashes


@dataclass(slots=True)
class Placement:
    """Where one request goes, and why."""

    decode: InstanceRecord
    prefill: tuple[InstanceRecord, ...]  # candidates, best first; empty: the decode worker computes
    overlap_blocks: int
    prompt_blocks: int
    reason: str
    scores: dict[str, float]  # by worker name, lower is better
    holder: Holder | None  # has more of the prompt than the decode worker
    _decode: Instance
    _prefill: Instance | None
    _computing: list[Booking] = field(default_factory=list)

    @contextmanager
    def booked(self) -> Iterator[None]:
        """Count the request as load of its workers while the body runs."""
        missing = self.prompt_blocks - self.overlap_blocks
        with ExitStack() as bookings:
            # What is missing is work for whoever computes it, until the first token; the context is work for the
            # decode worker at every step.
            computes = self._prefill or self._decode
            missing_there = missing * _block_size(self._decode) / _block_size(computes)
            bookings.enter_context(self._decode.load.booked(self.prompt_blocks))
            self._computing.append(bookings.enter_context(computes.load.booked(missing_there)))
            yield

    def observed(self, cached_tokens: int) -> None:
        """The first token came: the prompt is computed, and this much of it was on the decode worker."""
        for booking in self._computing:
            booking.reduce(booking.blocks)
        actual = cached_tokens // self.decode.fingerprint.block_size
        metrics.PREDICTED_BLOCKS.inc(self.overlap_blocks)
        metrics.ACTUAL_BLOCKS.inc(actual)
        metrics.MISPREDICTED_BLOCKS.set(self.overlap_blocks - actual)


def _block_size(instance: Instance) -> int:
    return instance.record.fingerprint.block_size


class Overlap(NamedTuple):
    """Leading blocks of a prompt that a worker holds."""

    blocks: int
    beneath: tuple[tuple[Tier, int], ...] = ()  # of these, how many it has to onboard, and from which tier

    @property
    def in_tiers(self) -> int:
        return sum(count for _, count in self.beneath)


_NONE = Overlap(0)


def _overlap(depths: Sequence[tuple[Tier, int]], longest: int) -> Overlap:
    """`depths`: how long a prefix lies in tiers down to each, the nearest first. Of use are `longest` blocks."""
    blocks, beneath = 0, []
    for tier, depth in depths:
        more = min(depth, longest) - blocks
        if more > 0:
            blocks += more
            if tier is not Tier.DEVICE:
                beneath.append((tier, more))
    return Overlap(blocks, tuple(beneath))


class Router:
    """Chooses workers for requests."""

    def __init__(self, roster: Roster, weights: config.Router) -> None:
        self._roster, self._weights = roster, weights
        self._turn = 0

    def place(
        self,
        token_ids: Sequence[int],
        *,
        cache_salt: str | None = None,
        exclude: Collection[Incarnation] = (),
    ) -> Placement:
        """The cheapest decode worker and its prefill candidates. NoInstance when none is left."""
        usable = self._roster.usable((Role.DECODE, Role.BOTH))
        instances = [each for each in usable if each.record.incarnation not in exclude]
        if not instances:
            raise NoInstance("decode", len(exclude))
        overlaps = self._overlaps(self._roster.usable(tuple(Role)), token_ids, cache_salt)
        candidates = []
        for each in instances:
            blocks = -(-len(token_ids) // each.record.fingerprint.block_size)
            overlap = overlaps.get(each.record.incarnation, _NONE)
            candidates.append(
                Candidate(each.record.name, blocks, overlap.blocks, each.load.busy_blocks, overlap.beneath)
            )
        scores = [score(candidate, self._weights) for candidate in candidates]
        chosen = cheapest(scores, self._turn)
        self._turn += 1
        prefill = self._prefill_candidates(instances[chosen], exclude)
        holder = self._holder(instances[chosen], overlaps, exclude)
        winner = candidates[chosen]
        metrics.PLACED.labels(winner.name).inc()
        metrics.PROMPT_BLOCKS.inc(winner.prompt_blocks)
        return Placement(
            decode=instances[chosen].record,
            prefill=tuple(each.record for each in prefill),
            overlap_blocks=winner.overlap_blocks,
            prompt_blocks=winner.prompt_blocks,
            reason=reason(candidates, chosen, self._weights),
            scores={candidate.name: value for candidate, value in zip(candidates, scores, strict=True)},
            holder=holder,
            _decode=instances[chosen],
            _prefill=prefill[0] if prefill else None,
        )

    def _overlaps(
        self, instances: Sequence[Instance], token_ids: Sequence[int], cache_salt: str | None
    ) -> dict[str, Overlap]:
        """Leading blocks of the prompt that each worker holds.

        The last token is always computed, so a block that ends the prompt is never of use.
        """
        sizes = {each.record.fingerprint.block_size for each in instances}
        if self._weights.mode != "kv" or len(token_ids) < 2:
            return {}
        overlaps: dict[str, Overlap] = {}
        index = self._roster.index
        for size in sizes:  # nearly always one
            hashes = block_hashes(token_ids, size, cache_salt)
            depths = [(tier, index.match(hashes, tier)) for tier in (Tier.DEVICE, *index.beneath)]
            longest = (len(token_ids) - 1) // size
            for each in instances:
                if each.record.fingerprint.block_size == size:
                    incarnation = each.record.incarnation
                    mine = [(tier, found.get(incarnation, 0)) for tier, found in depths]
                    overlaps[incarnation] = _overlap(mine, longest)
        return overlaps

    def _holder(
        self, decode: Instance, overlaps: dict[str, Overlap], exclude: Collection[Incarnation]
    ) -> Holder | None:
        """Who has the longest prefix, if that is longer than the decode worker's.

        Of several, one that has more of it on its device goes before others, and then one that is less busy.
        """
        mine = overlaps.get(decode.record.incarnation, _NONE).blocks * _block_size(decode)
        found: list[tuple[int, int, Incarnation]] = []
        for each in self._roster.holders(decode) if overlaps else ():
            incarnation, size = each.record.incarnation, _block_size(each)
            overlap = overlaps.get(incarnation, _NONE)
            if overlap.blocks * size > mine and incarnation not in exclude:
                found.append((overlap.blocks * size, -overlap.in_tiers * size, incarnation))
        best = max(found, key=lambda each: each[:2], default=None)  # the first of equal ones
        return None if best is None else Holder(best[2], best[0])

    def _prefill_candidates(self, decode: Instance, exclude: Collection[Incarnation]) -> list[Instance]:
        if decode.record.role is Role.BOTH:
            return []
        fitting = [each for each in self._roster.prefillers(decode) if each.record.incarnation not in exclude]
        if fitting:
            # Of those that are equally idle another one is first each time.
            first = cheapest([each.load.busy_blocks for each in fitting], self._turn)
            fitting.insert(0, fitting.pop(first))
        return fitting[: self._weights.prefill_candidates]
