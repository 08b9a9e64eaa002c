"""The `kv` commands: what they ask of which worker, and what they print. Each returns its exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import typer

from dynamo_lite.errors import DynamoError, NotThere
from dynamo_lite.kv_client import KvClient, Worker, connect, targets
from dynamo_lite.kv_text import (
    Meter,
    Purged,
    Verdict,
    as_json,
    number,
    print_purged,
    print_stats,
    print_verdicts,
    size,
    stats_json,
)
from dynamo_lite.plane.kv_wire import (
    KvBlock,
    KvCursor,
    KvList,
    KvListed,
    KvPurge,
    KvPurged,
    KvStats,
    KvTier,
    KvTiers,
    KvVerified,
    KvVerify,
)
from dynamo_lite.state import Run
from dynamo_lite.tasks import background
from kvbm.events import Tier

_AT_A_TIME = 1000  # blocks of an answer
_LOOK_S = 0.5  # how often a worker that drops blocks is asked how many are left
Job = tuple[Worker, KvTier]


async def stats(run: Run, only: str | None, as_program: bool) -> int:
    async with _opened(run, only) as (client, _):
        found = await client.stats()
    if as_program:
        typer.echo(stats_json(found, client.failures))
    else:
        print_stats(found)
    return _told(client)


# ---- ls ----


async def list_blocks(run: Run, tier: Tier | None, only: str | None, limit: int, as_program: bool) -> int:
    """`limit`: 0: all."""
    listed: list[tuple[Worker, KvBlock]] = []
    more, count = False, 0
    async with _opened(run, only) as (client, meter):
        found = await client.stats()
        sharing = {worker.label for worker, one in targets(found, tier) if one.tier is Tier.OBJECT}
        for worker, told in found.items():
            walked = _walked(told, tier, worker.label in sharing)
            async for block in _blocks(client, worker, walked):
                if count == limit > 0:
                    more = True
                    break
                count += 1
                meter.text = f"{number(count)} blocks"
                if as_program:
                    listed.append((worker, block))
                else:
                    meter.close()
                    typer.echo(_line(worker, block))
    if as_program:
        blocks = [
            {"worker": worker.label, "hash": block.hash.hex(), "tiers": [one.value for one in block.tiers]}
            for worker, block in listed
        ]
        typer.echo(as_json({"blocks": blocks, "more": more}, client.failures))
    elif more:
        typer.echo(f"there are more than {number(limit)}: --limit 0 lists all", err=True)
    elif not count:
        typer.echo("no blocks", err=True)
    return _told(client)


def _walked(told: KvTiers, tier: Tier | None, shared: bool) -> tuple[Tier, ...]:
    """Which tiers of a worker are gone through; the object tier by one of those that share it."""
    there = [one.tier for one in told.tiers if one.tier is not Tier.OBJECT or shared]
    return tuple(one for one in (*there, Tier.DEVICE) if tier in (None, one))


async def _blocks(client: KvClient, worker: Worker, walked: tuple[Tier, ...]) -> AsyncIterator[KvBlock]:
    cursor: KvCursor | None = None
    while walked:
        told = await client.ask(worker, KvList(walked, cursor, _AT_A_TIME), KvListed)
        if told is None:
            return
        for block in told.blocks:
            yield block
        cursor = told.cursor
        if cursor is None:
            return


def _line(worker: Worker, block: KvBlock) -> str:
    return f"{worker.label}  {block.hash.hex():>64}  {' '.join(tier.value for tier in block.tiers)}"


# ---- verify ----


async def verify(run: Run, tier: Tier | None, only: str | None, as_program: bool) -> int:
    async with _opened(run, only) as (client, meter):
        jobs = await _jobs(client, tier)
        total = sum(one.blocks for _, one in jobs if one.on)
        verdicts = {job: Verdict(job[0].label, job[1].tier.value) for job in jobs}

        def show() -> None:
            done = sum(one.right + one.corrupt + one.gone for one in verdicts.values())
            corrupt = sum(one.corrupt for one in verdicts.values())
            meter.text = f"{number(done)} of {number(total)} blocks verified, {number(corrupt)} corrupt"

        show()
        async with asyncio.TaskGroup() as group:
            for worker in {worker for worker, _ in jobs}:
                mine = [(one, verdicts[worker, one]) for other, one in jobs if other is worker]
                group.create_task(_verify_worker(client, worker, mine, show))
    results = list(verdicts.values())
    if as_program:
        fields = ("worker", "tier", "right", "corrupt", "gone", "whole")
        told = [{name: getattr(one, name) for name in fields} for one in results]
        typer.echo(as_json({"verified": told}, client.failures))
    else:
        print_verdicts(results)
    corrupt = sum(one.corrupt for one in results)
    if corrupt and not as_program:
        text = "1 block was" if corrupt == 1 else f"{number(corrupt)} blocks were"
        typer.echo(f"{text} not what was stored: dropped, to be computed again", err=True)
    return _told(client) or (1 if corrupt else 0)


async def _verify_worker(
    client: KvClient, worker: Worker, jobs: Sequence[tuple[KvTier, Verdict]], show: Callable[[], None]
) -> None:
    for tier, verdict in jobs:
        if not tier.on:
            client.fail(worker.label, f"its {tier.tier} tier is off: nothing there was verified")
            continue
        cursor: KvCursor | None = None
        while not verdict.whole:
            told = await client.ask(worker, KvVerify(tier.tier, cursor), KvVerified)
            if told is None:
                break
            verdict.right += told.right
            verdict.corrupt += told.corrupt
            verdict.gone += told.gone
            cursor, verdict.whole = told.cursor, told.cursor is None
            show()


# ---- purge ----


async def purge_question(run: Run, tier: Tier | None, only: str | None) -> str:
    """What is to be asked before anything is dropped. `tier`: None: all."""
    async with _opened(run, only) as (client, _):
        jobs = await _jobs(client, tier)
    blocks, used = sum(one.blocks for _, one in jobs), sum(one.used_bytes for _, one in jobs)
    where = ", ".join(f"{worker.label}'s {one.tier}" for worker, one in jobs)
    shared = any(one.tier is Tier.OBJECT for _, one in jobs)
    others = " The object tier is emptied for all who share it." if shared else ""
    return f"Drop {number(blocks)} blocks ({size(used)}) of {where}?{others}"


async def purge(run: Run, tier: Tier | None, only: str | None) -> int:
    purged: list[Purged] = []
    async with _opened(run, only) as (client, meter):
        for worker, one in await _jobs(client, tier):
            meter.text = f"{worker.label} drops its {one.tier} tier's blocks"
            async with background(_watch(client, worker, one.tier, meter)):
                told = await client.ask(worker, KvPurge(one.tier), KvPurged)
            if told is not None:
                purged.append(Purged(worker.label, one.tier.value, told.blocks))
    print_purged(purged)
    return _told(client)


async def _watch(client: KvClient, worker: Worker, tier: Tier, meter: Meter) -> NoReturn:
    """Tell how many blocks are left. Where that cannot be asked it is no failure: the purge has its own deadline."""
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            told = await client.request(worker, KvStats(), KvTiers)
        except DynamoError:
            continue
        left = next((one.blocks for one in told.tiers if one.tier is tier), 0)
        meter.text = f"{worker.label} drops its {tier} tier's blocks: {number(left)} are left"


# ---- all of them ----


@asynccontextmanager
async def _opened(run: Run, only: str | None) -> AsyncIterator[tuple[KvClient, Meter]]:
    meter = Meter(sys.stderr)
    meter.text = "looking for the workers"
    try:
        async with background(meter.draw()), connect(run, only) as client:
            meter.text = f"{len(client.workers)} workers are asked"
            yield client, meter
    finally:
        meter.close()


async def _jobs(client: KvClient, tier: Tier | None) -> list[Job]:
    """Raises NotThere where every worker answers and none has such a tier."""
    jobs = targets(await client.stats(), tier)
    if not jobs and not client.failures:
        what = "tiers beneath the device" if tier is None else f"a tier '{tier}'"
        raise NotThere(f"no worker has {what}: the file's `kv_tiers` says which there are")
    return jobs


def _told(client: KvClient) -> int:
    """The exit code, after everything that went wrong was named."""
    for failure in client.failures:
        typer.echo(f"Error: {failure.worker}: {failure.reason}", err=True)
    return 1 if client.failures else 0
