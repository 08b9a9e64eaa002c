"""The simulated tiers, under real simulated engines on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite import config
from dynamo_lite.errors import StartError
from dynamo_lite.plane.wire import Incarnation, PushTarget, RequestId, Role, Sampling
from dynamo_lite.router.router import Router
from kvbm.events import BlocksRemoved, BlocksStored, KvEvent, KvEventBatch, Tier
from kvbm.hashing import block_hashes, full_block_hashes
from tests.instances import LAYOUT, record, roster
from tests.sim_engines import STRIDE, sim_spec
from workers.engine import Job, Output, PrefillJob, TierLoad, TransferReport
from workers.sim_engine import SimEngine
from workers.sim_storage import Bucket
from workers.simulate.clock import VirtualTimeLoop

PACES = {"prefill_ms_per_token": 10, "host_ms_per_block": 2, "disk_ms_per_block": 5, "object_ms_per_block": 8}
HOST: dict[str, object] = {"host": {"size": 200 * STRIDE}}
LARGE: dict[str, object] = {"size": 400 * STRIDE, "path": "unused"}  # of a disk tier
SMALL_HOST: dict[str, object] = {"host": {"size": 8 * STRIDE}}  # a prompt of 6 blocks, and not two


def prompt(number: int) -> list[int]:
    """6 blocks of 16 tokens, and 4 tokens."""
    return [(number * 37 + i * 7) % 490 for i in range(100)]


@dataclass
class Fleet:
    """Engines, and what they told: their events are consumed from the start."""

    model: Path
    stack: AsyncExitStack
    group: asyncio.TaskGroup
    told: list[KvEvent] = field(default_factory=list)
    following: list[asyncio.Task[None]] = field(default_factory=list)
    bucket: Bucket = field(default_factory=Bucket)
    engines: list[SimEngine] = field(default_factory=list)

    async def engine(self, kv_tiers: Mapping[str, object], role: Role = Role.DECODE, **sim: object) -> SimEngine:
        spec = sim_spec(self.model, "engine", role, {"kv_blocks": 16, **PACES, **sim}, kv_tiers)
        incarnation = Incarnation(f"engine{len(self.engines)}")
        made = SimEngine(spec, role, incarnation, CollectorRegistry(), self.bucket)
        await made.start()
        self.stack.push_async_callback(made.close)
        self.engines.append(made)
        self.following.append(self.group.create_task(self._follow(made)))
        return made

    async def _follow(self, engine: SimEngine) -> None:
        async for events in engine.kv_events():
            self.told.extend(events)


def in_virtual_time(model: Path, body: Callable[[Fleet], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            fleet = Fleet(model, stack, group)
            await body(fleet)
            for task in fleet.following:
                task.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


async def ask(engine: SimEngine, tokens: list[int], max_tokens: int = 1) -> tuple[int, float]:
    """Cached tokens, and milliseconds to the first token."""
    clock = asyncio.get_running_loop().time
    began, first = clock(), None
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
    async with aclosing(engine.generate(Job(RequestId("r"), tokens, sampling))) as outputs:
        async for output in outputs:
            first = first or (output.cached_tokens or 0, round(1e3 * (clock() - began), 6))
    assert first is not None
    return first


async def push_out(engine: SimEngine, numbers: range = range(50, 56)) -> None:
    """Other prompts, so many that nothing of those before is on the device; time enough to write all to the tiers."""
    for number in numbers:
        await ask(engine, prompt(number))
    await asyncio.sleep(5)


def load_of(engine: SimEngine, tier: Tier) -> TierLoad:
    (load,) = (load for load in engine.load().tiers if load.tier is tier)
    return load


def test_a_prefix_that_left_the_device_comes_back_from_the_host_tier_at_its_pace(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(HOST)
        assert await ask(engine, prompt(0)) == (0, 1000)
        await push_out(engine)
        assert await ask(engine, prompt(0)) == (96, 6 * 2 + 4 * 10)
        assert await ask(engine, prompt(0)) == (96, 4 * 10)  # it is on the device again
        host = load_of(engine, Tier.HOST)
        assert (host.offloaded, host.onboarded, host.evicted, host.missed) == (42, 6, 0, 0)
        assert host.used_bytes == 42 * STRIDE

    in_virtual_time(model, body)


def test_a_prefix_that_left_host_memory_comes_back_from_disk_at_its_pace(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(SMALL_HOST | {"disk": LARGE})
        await ask(engine, prompt(0))
        await asyncio.sleep(1)
        await push_out(engine)
        assert await ask(engine, prompt(0)) == (96, 6 * 5 + 6 * 2 + 4 * 10)
        assert load_of(engine, Tier.DISK).onboarded == 6

    in_virtual_time(model, body)


def test_an_engine_reads_what_another_has_put_into_the_object_tier_once_it_has_listed_it(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        tiers = HOST | {"object": {"url": "s3://bucket/prefix", "admission": "always", "refresh_s": 60}}
        one, other = await fleet.engine(tiers), await fleet.engine(tiers)
        await ask(one, prompt(0))
        await asyncio.sleep(30)
        assert (await ask(other, prompt(0)))[0] == 0
        await ask(one, prompt(1))
        await asyncio.sleep(60)
        assert await ask(other, prompt(1)) == (96, 30 + 6 * 8 + 6 * 2 + 4 * 10)

    in_virtual_time(model, body)


def test_what_is_slower_to_read_than_to_compute_is_read_once_and_then_computed(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(HOST, host_ms_per_block=400)
        for number in (0, 1):
            await ask(engine, prompt(number))
        await asyncio.sleep(60)
        await push_out(engine)
        assert await ask(engine, prompt(0)) == (96, 6 * 400 + 4 * 10)  # how its time becomes known
        assert await ask(engine, prompt(1)) == (0, 1000)

    in_virtual_time(model, body)


def test_second_use_keeps_out_what_only_one_request_has(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine({"host": {"size": 200 * STRIDE, "admission": "second_use"}})
        await ask(engine, prompt(0))
        await push_out(engine)
        assert load_of(engine, Tier.HOST).offloaded == 0
        await ask(engine, prompt(0))
        await push_out(engine, range(60, 66))
        assert load_of(engine, Tier.HOST).offloaded == 6
        assert (await ask(engine, prompt(0)))[0] == 96

    in_virtual_time(model, body)


def test_second_use_of_the_disk_tier_is_a_second_request_while_host_memory_has_the_block(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(HOST | {"disk": LARGE | {"admission": "second_use"}})
        for number in (0, 1, 0):
            await ask(engine, prompt(number))
        await asyncio.sleep(1)
        assert load_of(engine, Tier.DISK).offloaded == 6

    in_virtual_time(model, body)


@pytest.mark.parametrize(("eviction", "kept"), [("lru", True), ("fifo", False)])
def test_a_full_disk_tier_evicts_what_its_eviction_says(model: Path, eviction: str, kept: bool) -> None:
    async def body(fleet: Fleet) -> None:
        disk = {"size": 18 * STRIDE, "path": "unused", "eviction": eviction}  # three prompts
        engine = await fleet.engine(SMALL_HOST | {"disk": disk})
        for number in (0, 1, 2, 0, 3):
            await ask(engine, prompt(number))
            await asyncio.sleep(1)
        assert load_of(engine, Tier.DISK).evicted == 6
        assert (block_hashes(prompt(0), 16)[0] in engine.snapshot()[Tier.DISK]) is kept

    in_virtual_time(model, body)


def test_a_router_learns_from_events_what_is_in_which_tier(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        workers = [record("decode-0"), record("decode-1")]
        known = roster(*workers)
        engine = await fleet.engine(HOST)
        await ask(engine, prompt(0))
        await push_out(engine)
        known.take_batch(KvEventBatch(workers[1].incarnation, 1, tuple(fleet.told)))
        placement = Router(known, config.Router()).place(prompt(0))
        assert placement.decode == workers[1]
        assert placement.reason.startswith("prefix 6/7 blocks (6 in host memory) on decode-1")
        snapshot = engine.snapshot()
        assert set(block_hashes(prompt(0), 16)) <= set(snapshot[Tier.HOST]) - set(snapshot[Tier.DEVICE])

    in_virtual_time(model, body)


def test_what_gives_way_in_host_memory_is_told(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(SMALL_HOST)
        for number in (0, 1):
            await ask(engine, prompt(number))
            await asyncio.sleep(1)

        def hashes(kind: type[BlocksStored | BlocksRemoved]) -> list[int]:
            events = [event for event in fleet.told if isinstance(event, kind)]
            return [one for event in events if event.tier is Tier.HOST for one in event.hashes]

        stored, removed = hashes(BlocksStored), hashes(BlocksRemoved)
        assert len(stored) - len(removed) == len(engine.snapshot()[Tier.HOST]) == 8
        assert set(removed) < set(block_hashes(prompt(0), 16))
        assert load_of(engine, Tier.HOST).evicted == 4

    in_virtual_time(model, body)


def test_a_request_that_goes_while_its_prefix_is_read_leaves_nothing_pinned(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(SMALL_HOST | {"disk": LARGE}, disk_ms_per_block=1000)
        await ask(engine, prompt(0))
        await asyncio.sleep(10)
        await push_out(engine)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await ask(engine, prompt(0))
        assert engine.load().kv_used_blocks == 0
        await asyncio.sleep(10)
        assert engine._tiers is not None
        assert engine._tiers.manager.pinned == {}
        engine._tiers.manager.check()
        engine._pool.check()

    in_virtual_time(model, body)


def test_of_a_prefix_that_has_gone_meanwhile_only_what_is_left_is_read(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(SMALL_HOST)
        await ask(engine, prompt(0))
        await asyncio.sleep(1)
        tiers, came = engine._tiers, list[int]()
        assert tiers is not None
        here = full_block_hashes(prompt(0), 16)
        tiers.read(here[:3] + full_block_hashes(prompt(1), 16), came.append)
        tiers.read(full_block_hashes(prompt(1), 16), came.append)
        await asyncio.sleep(1)
        assert came == [3, 0]
        assert tiers.manager.pinned == {}
        tiers.manager.check()

    in_virtual_time(model, body)


def test_two_requests_for_one_prefix_have_it_read_from_disk_once(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(SMALL_HOST | {"disk": LARGE}, max_num_batched_tokens=4096)
        await ask(engine, prompt(0))
        await asyncio.sleep(1)
        await push_out(engine)
        both = await asyncio.gather(ask(engine, prompt(0)), ask(engine, prompt(0)))
        assert [cached for cached, _ in both] == [96, 96]
        assert load_of(engine, Tier.DISK).onboarded == 6

    in_virtual_time(model, body)


def test_a_prefill_worker_reads_its_tiers_too(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(HOST, Role.PREFILL)
        target = PushTarget(1, Incarnation("d"), LAYOUT, 0, 100, ())
        for number in range(6):
            await engine.prefill(PrefillJob(RequestId("p"), prompt(number), target))
        assert (await engine.prefill(PrefillJob(RequestId("p"), prompt(0), target))).cached_tokens == 96

    in_virtual_time(model, body)


@dataclass
class Remote:
    """A prefill worker that answers at once."""

    targets: list[PushTarget] = field(default_factory=list)
    reports: list[TransferReport] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    asked: str = "prefill"
    more: bool = True
    end: int = 0  # of the prompt

    def plan(self, here: int) -> int:
        return self.end

    async def ask(self, target: PushTarget, first_token: Callable[[int], None] | None = None) -> int:
        self.targets.append(target)
        return 0

    def stop(self) -> None:
        raise AssertionError("nobody gives up")

    def failed(self, cause: str) -> None:
        raise AssertionError(cause)

    def skipped(self, reason: str) -> None:
        self.skips.append(reason)

    def transferred(self, report: TransferReport) -> None:
        self.reports.append(report)


def test_what_the_tiers_do_not_hold_of_a_prompt_is_asked_of_a_prefill_worker(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        engine = await fleet.engine(HOST)
        await ask(engine, prompt(0))
        await push_out(engine)
        longer = prompt(0)[:96] + prompt(70)
        remote = Remote(end=len(longer))
        job = Job(RequestId("r"), longer, Sampling(max_tokens=3, temperature=0.0), remote=remote)
        assert await text(engine, job) == await text(await fleet.engine({}), replace(job, remote=None))
        ((target,), (report,)) = remote.targets, remote.reports
        assert (target.first_block, target.num_blocks, report.blocks) == (6, 7, 7)
        assert load_of(engine, Tier.HOST).onboarded == 6
        assert engine.load().kv_used_blocks == 0

    in_virtual_time(model, body)


def test_a_host_tier_too_small_for_two_blocks_is_a_start_error(model: Path) -> None:
    async def body(fleet: Fleet) -> None:
        with pytest.raises(StartError, match="do not hold two blocks"):
            await fleet.engine({"host": {"size": STRIDE}})

    in_virtual_time(model, body)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_requests_gets_the_text_it_gets_without_tiers(model: Path, seed: int) -> None:
    async def body(fleet: Fleet) -> None:
        numbers = random.Random(seed)
        bucket = {"url": "s3://bucket/prefix", "admission": "always"}
        tiers = {"host": {"size": 20 * STRIDE}, "disk": LARGE, "object": bucket}
        plain, tiered = await fleet.engine({}), await fleet.engine(tiers, steps_at_once=8, decode_step_ms=5)
        assert tiered._tiers is not None

        async def one(tokens: list[int]) -> None:
            job = Job(RequestId("r"), tokens, Sampling(max_tokens=20, temperature=0.0))
            assert await text(tiered, job) == await text(plain, job)

        async with asyncio.TaskGroup() as group:
            for _ in range(60):
                group.create_task(one(prompt(numbers.randrange(12))[: numbers.randrange(1, 101)]))
                await asyncio.sleep(numbers.random() / 2)
                tiered._tiers.manager.check()
                tiered._pool.check()
        assert load_of(tiered, Tier.HOST).onboarded > 0
        assert tiered._tiers.manager.pinned == {}
        assert tiered.load().kv_used_blocks == 0

    in_virtual_time(model, body)


async def text(engine: SimEngine, job: Job) -> list[int]:
    async with aclosing(engine.generate(job)) as outputs:
        found: list[Output] = [output async for output in outputs]
    return [token for output in found for token in output.token_ids]
