"""Placing a request: in this process, without I/O, from what the roster knows now."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from dynamo_lite import config
from dynamo_lite.errors import NoInstance
from dynamo_lite.plane.wire import Holder, Incarnation, Role
from dynamo_lite.router import metrics
from dynamo_lite.router.bookings import BookingLedger
from dynamo_lite.router.cost import (
    HERE,
    PULL,
    RELUCTANCE,
    Policy,
    Prefill,
    Prompt,
    Usual,
    Worker,
    cheapest,
    line,
    predict,
    prefill,
    softmax,
    waiting,
)
from dynamo_lite.router.explain import Considered
from dynamo_lite.router.placement import Placement
from dynamo_lite.router.roster import Instance, Roster
from kvbm.events import Tier
from kvbm.hashing import block_hashes
from kvbm.index import TIERS, Depths

_EVERY_ROLE = tuple(Role)


class Overlap(NamedTuple):
    """Leading blocks of a prompt that a worker holds."""

    blocks: int
    beneath: tuple[tuple[Tier, int], ...] = ()  # of these, how many it has to onboard, and from which tier

    @property
    def in_tiers(self) -> int:
        return sum(count for _, count in self.beneath)


_NONE = Overlap(0)


def _overlap(depths: Depths, longest: int) -> Overlap:
    """Of use are `longest` blocks."""
    blocks = min(depths[0], longest)
    beneath = []
    if depths[-1] > blocks:
        for tier, depth in zip(TIERS[1:], depths[1:], strict=True):
            more = min(depth, longest) - blocks
            if more > 0:
                blocks += more
                beneath.append((tier, more))
    return Overlap(blocks, tuple(beneath))


class Router:
    """Chooses workers for requests."""

    def __init__(self, roster: Roster, weights: config.Router, seed: int | None = None) -> None:
        """`seed`: of what `temperature` and the mode `random` leave to chance."""
        self.bookings = BookingLedger(roster)
        self._roster, self._weights = roster, weights
        self._turn = 0
        self._policy = Policy(RELUCTANCE if weights.remote_prefill == "auto" else 0.0, weights.patience_ms)
        self._random = random.Random(seed)  # noqa: S311  # nobody gains by guessing it

    def place(
        self,
        token_ids: Sequence[int],
        *,
        cache_salt: str | None = None,
        exclude: Collection[Incarnation] = (),
    ) -> Placement:
        """The cheapest decode worker and its prefill candidates. NoInstance when none is left."""
        roster = self._roster
        everyone = roster.usable(_EVERY_ROLE)
        able = [each for each in everyone if each.record.incarnation not in exclude] if exclude else everyone
        decoding = [each for each in able if each.record.role is not Role.PREFILL]
        if not decoding:
            raise NoInstance("decode", len(exclude))
        roster.settle_paces()
        overlaps = self._overlaps(everyone, token_ids, cache_salt)
        if any(each.waiting for each in everyone):
            self._guess(everyone, overlaps, token_ids, cache_salt)
        prefills = self._prefills(able, len(token_ids), overlaps)
        considered = self._consider(decoding, able, overlaps, prefills, len(token_ids))
        self._turn += 1
        chosen = decoding[considered.chosen]
        if chosen.waiting:
            chosen.recent.note(block_hashes(token_ids, chosen.block_size, cache_salt), roster.clock())
        return self._placement(chosen, considered, overlaps, able, prefills)

    def _placement(
        self,
        decode: Instance,
        considered: Considered,
        overlaps: dict[str, Overlap],
        able: Sequence[Instance],
        prefills: Sequence[tuple[Instance, Prefill]],
    ) -> Placement:
        prompt, way = considered.prompts[considered.chosen], considered.predictions[considered.chosen].way
        holder = self._holder(decode, overlaps, able)
        candidates = [] if way == HERE else [each for each, _ in self._fitting(decode, prefills)]
        computes, held = decode, prompt.held
        if way == PULL and holder is not None:
            held = holder.tokens
        elif candidates:
            computes = candidates[0]
            held = _tokens_held(computes, overlaps)
        blocks = -(-prompt.tokens // prompt.block_size)
        metrics.placed(decode.record.name).inc()
        metrics.PROMPT_BLOCKS.inc(blocks)
        return Placement(
            decode=decode.record,
            prefill=tuple(each.record for each in candidates[: self._weights.prefill_candidates]),
            overlap_blocks=prompt.held // prompt.block_size,
            prompt_blocks=blocks,
            holder=holder,
            considered=considered,
            computes=computes.record.incarnation,
            missing_tokens=prompt.tokens - held,
            at=self._roster.clock(),
            _ledger=self.bookings,
        )

    # ---- what is known of the prompt ----

    def _overlaps(
        self, instances: Sequence[Instance], token_ids: Sequence[int], cache_salt: str | None
    ) -> dict[str, Overlap]:
        """Leading blocks of the prompt that each worker holds.

        The last token is always computed, so a block that ends the prompt is never of use.
        """
        kinds = {(each.namespace, each.block_size) for each in instances}
        if len(token_ids) < 2:
            return {}
        overlaps: dict[str, Overlap] = {}
        index = self._roster.index
        for namespace, size in kinds:  # nearly always one
            found = index.match(block_hashes(token_ids, size, cache_salt), namespace)
            longest = (len(token_ids) - 1) // size
            for each in instances:
                depths = found.get(each.record.incarnation)
                if depths and each.block_size == size:
                    overlaps[each.record.incarnation] = _overlap(depths, longest)
        return overlaps

    def _guess(
        self,
        instances: Sequence[Instance],
        overlaps: dict[str, Overlap],
        token_ids: Sequence[int],
        cache_salt: str | None,
    ) -> None:
        """Of workers whose blocks are not known at the moment: what was placed there since ought to be there."""
        now = self._roster.clock()
        for each in instances:
            if each.waiting and len(each.recent):
                hashes = block_hashes(token_ids, each.block_size, cache_salt)[: (len(token_ids) - 1) // each.block_size]
                depth, incarnation = each.recent.match(hashes, now), each.record.incarnation
                if depth > overlaps.get(incarnation, _NONE).blocks:
                    overlaps[incarnation] = Overlap(depth)

    # ---- what it costs ----

    def _consider(
        self,
        decoding: Sequence[Instance],
        able: Sequence[Instance],
        overlaps: dict[str, Overlap],
        prefills: Sequence[tuple[Instance, Prefill]],
        tokens: int,
    ) -> Considered:
        blind = self._weights.mode == "least_loaded"
        prompts = [_prompt(each, tokens, overlaps) for each in decoding]
        crowding = self._roster.inflows.crowding([each.inflow for each in decoding])
        workers = list(map(_worker, decoding, crowding))
        usual = Usual(min([waiting(worker, tokens) for worker in workers]), self._roster.token_ms)
        pulls = self._pulls(decoding, able, overlaps)
        predictions = []
        for each, worker, prompt, pulled in zip(decoding, workers, prompts, pulls, strict=True):
            remote = next(iter(self._fitting(each, prefills)), None) if prefills else None
            seen = Prompt(tokens, prompt.block_size) if blind else prompt
            predictions.append(predict(worker, seen, usual, remote and remote[1], pulled, self._policy))
        chosen = self._choose(workers, [one.total for one in predictions])
        return Considered(self._weights.mode, workers, prompts, predictions, chosen)

    def _choose(self, workers: Sequence[Worker], costs: Sequence[float]) -> int:
        match self._weights.mode:
            case "round_robin":
                return self._turn % len(costs)
            case "random":
                return self._random.randrange(len(costs))
            case "least_loaded":
                fewest = min(worker.sequences for worker in workers)
                pairs = zip(workers, costs, strict=True)
                costs = [cost if worker.sequences == fewest else math.inf for worker, cost in pairs]
            case "kv" if self._weights.temperature:
                return softmax(costs, self._weights.temperature, self._random)
        return cheapest(costs, self._turn)

    def _pulls(
        self, decoding: Sequence[Instance], able: Sequence[Instance], overlaps: dict[str, Overlap]
    ) -> Sequence[int]:
        """For each, how many tokens of the prompt some other worker holds."""
        if all(each.pace.pull is None for each in decoding):
            return (0,) * len(decoding)
        longest = sorted(((_tokens_held(each, overlaps), each.number) for each in able), reverse=True)[:2]
        return [next((held for held, number in longest if number != each.number), 0) for each in decoding]

    # ---- whom it involves besides ----

    def _prefills(
        self, able: Sequence[Instance], tokens: int, overlaps: dict[str, Overlap]
    ) -> list[tuple[Instance, Prefill]]:
        """Prefill workers by what each takes for the prompt; equal ones take turns."""
        found = [each for each in able if each.record.role is Role.PREFILL]
        if not found:
            return []
        first = self._turn % len(found)
        found = [*found[first:], *found[:first]]
        workers = list(map(_worker, found))
        shortest = min(line(worker.pace.prefill, worker.queued_tokens) for worker in workers)
        usual = Usual(shortest, self._roster.token_ms)
        costs = [
            (each, prefill(worker, _prompt(each, tokens, overlaps), usual, self._policy))
            for each, worker in zip(found, workers, strict=True)
        ]
        return sorted(costs, key=lambda each: each[1].total)

    def _fitting(
        self, decode: Instance, prefills: Sequence[tuple[Instance, Prefill]]
    ) -> Iterator[tuple[Instance, Prefill]]:
        """Those that can push KV to this decode worker."""
        if decode.record.role is not Role.BOTH:
            yield from (each for each in prefills if self._roster.fits(decode, each[0]))

    def _holder(self, decode: Instance, overlaps: dict[str, Overlap], able: Sequence[Instance]) -> Holder | None:
        """Who, of any role, has the longest prefix, if that is longer than the decode worker's.

        Of several, one that has more of it on its device goes before others, and then one that is less busy.
        """
        mine = _tokens_held(decode, overlaps)
        best: tuple[int, int, float] | None = None
        found: Instance | None = None
        for each in able:
            held = _tokens_held(each, overlaps)
            if held > mine and each is not decode and self._roster.fits(decode, each):
                in_tiers = overlaps[each.record.incarnation].in_tiers * each.block_size
                rank = (held, -in_tiers, -each.load.sequences)
                if best is None or rank > best:
                    best, found = rank, each
        return None if found is None or best is None else Holder(found.record.incarnation, best[0])


def _tokens_held(instance: Instance, overlaps: dict[str, Overlap]) -> int:
    return overlaps.get(instance.record.incarnation, _NONE).blocks * instance.block_size


def _prompt(instance: Instance, tokens: int, overlaps: dict[str, Overlap]) -> Prompt:
    overlap, size = overlaps.get(instance.record.incarnation, _NONE), instance.block_size
    beneath = tuple((tier, count * size) for tier, count in overlap.beneath) if overlap.beneath else ()
    return Prompt(tokens, size, overlap.blocks * size, beneath)


def _worker(instance: Instance, crowded: float = 1.0) -> Worker:
    load, record, size = instance.load, instance.record, instance.block_size
    return Worker(
        record.name,
        instance.pace,
        load.queued_tokens(instance.pace.prefill[1]),
        load.sequences,
        record.max_num_seqs,
        load.used_blocks * size,
        record.kv_blocks * size,
        crowded,
    )
