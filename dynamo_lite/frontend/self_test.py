"""Proves, once at the start, that prefix routing works: a short prompt twice, of which the second has to be a hit.

A router that sees no KV events works, and is silently no better than chance; this is what tells.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import aclosing
from dataclasses import dataclass

from dynamo_lite.errors import DynamoError
from dynamo_lite.frontend.generate import Backend
from dynamo_lite.frontend.work import Task, Work
from dynamo_lite.plane.wire import Incarnation, Role, Sampling
from dynamo_lite.router import metrics
from dynamo_lite.router.placement import Placement
from dynamo_lite.router.roster import Roster
from kvbm.hashing import block_hashes

WORKERS_S = 600.0  # for a worker to be there
REQUEST_S = 30.0
EVENTS_S = 5.0  # for the events of the first request's blocks
BLOCKS = 2
DECODES = (Role.DECODE, Role.BOTH)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended."""

    result: str  # "hit", "no events", "no hit" or "failed"
    sentence: str


async def self_test(backend: Backend) -> str:
    """Runs beside serving, for a bounded time; returns the outcome for people, in a few words. Raises nothing."""
    try:
        async with asyncio.timeout(WORKERS_S):
            await backend.roster.until(lambda: any(not each.waiting for each in backend.roster.usable(DECODES)))
        outcome = await _twice(backend, backend.roster)
    except TimeoutError:
        outcome = Outcome("failed", "no answer in time")
    except DynamoError as error:
        outcome = Outcome("failed", str(error))
    except Exception as error:  # a bug: serving goes on
        log.exception("the prefix self-test failed")
        outcome = Outcome("failed", repr(error))
    metrics.SELF_TEST.labels(outcome.result).set(1)
    sentence = f"prefix self-test: {outcome.sentence}"
    log.log(logging.INFO if outcome.result == "hit" else logging.WARNING, "%s", sentence)
    return sentence


async def _twice(backend: Backend, roster: Roster) -> Outcome:
    """Salted, so that it meets nobody else's blocks, and nobody meets its."""
    worker = next(each for each in roster.usable(DECODES) if not each.waiting)
    me, size, salt = worker.record.incarnation, worker.block_size, f"self-test-{uuid.uuid4().hex}"
    token_ids = [1] * (BLOCKS * size + 1)
    if len(token_ids) >= worker.record.max_model_len:
        return Outcome("failed", f"{BLOCKS} blocks are more than this model takes")
    others = {each.record.incarnation for each in roster.usable(tuple(Role)) if each.record.role.decodes} - {me}
    await _ask(backend, token_ids, salt, others)
    hashes = block_hashes(token_ids, size, salt)

    def known() -> bool:
        depths = roster.index.match(hashes, worker.namespace).get(me)
        return depths is not None and depths[-1] == BLOCKS

    try:
        async with asyncio.timeout(EVENTS_S):
            await roster.until(known)
    except TimeoutError:
        return Outcome("no events", f"{worker.record.name} told of no blocks; prefixes are not seen")
    second = await _ask(backend, token_ids, salt, others)
    found = (second.found_tokens or 0) // size
    name = second.decode.name
    if not found:
        return Outcome("no hit", f"{name} did not find the {second.overlap_blocks} blocks predicted")
    return Outcome("hit", f"{second.overlap_blocks} blocks predicted on {name}, {found} found")


async def _ask(backend: Backend, token_ids: list[int], salt: str, avoid: set[Incarnation]) -> Placement:
    """One token; returns where it went."""
    task = Task(token_ids, Sampling(max_tokens=1, temperature=0.0))
    work = Work(
        chat=False, tasks=(task,), n=1, stops=(), logprobs=None, stream=False, include_usage=False, echo=False,
        cache_salt=salt,
    )  # fmt: skip
    call = backend.call(work, "", REQUEST_S, avoid=avoid)
    async with asyncio.timeout(REQUEST_S), aclosing(call.deltas()) as batches:
        async for _ in batches:
            pass
    return call.placements[-1]
