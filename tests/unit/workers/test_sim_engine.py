from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite.errors import PrefillFailed, RequestError, StartError, WorkerError
from dynamo_lite.plane.wire import Incarnation, PushTarget, RequestId, Role, Sampling
from kvbm.events import Tier
from kvbm.hashing import block_hashes
from tests.instances import LAYOUT
from tests.sim_engines import sim_spec
from workers.engine import Job, Output, PrefillJob, TransferReport
from workers.sim_engine import SimEngine
from workers.simulate.clock import VirtualTimeLoop

MakeEngine = Callable[..., Awaitable[SimEngine]]
PROMPT = [10 + i % 400 for i in range(130)]  # 8 blocks and 2 tokens
TARGET = PushTarget(1, Incarnation("d"), LAYOUT, 0, 130, ())


def greedy(max_tokens: int = 4) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0)


@dataclass
class Peers:
    """A remote prefill whose candidates are engines of this process; one that is an error fails with it."""

    candidates: list[SimEngine | PrefillFailed]
    token_ids: list[int]
    targets: list[PushTarget] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    reports: list[TransferReport] = field(default_factory=list)
    end: int | None = None  # of what is pulled; None: the prompt's
    asked: str = ""
    asking: asyncio.Event = field(default_factory=asyncio.Event)

    def plan(self, here: int) -> int:
        return self.end or len(self.token_ids)

    @property
    def more(self) -> bool:
        return bool(self.candidates)

    async def ask(self, target: PushTarget, first_token: Callable[[int], None] | None = None) -> int:
        self.targets.append(target)
        self.asking.set()
        candidate = self.candidates.pop(0)
        if isinstance(candidate, PrefillFailed):
            raise candidate
        end = len(self.token_ids) if self.end is None else self.end + 1
        job = PrefillJob(RequestId("remote"), self.token_ids[:end], target, only_held=self.end is not None)
        return (await candidate.prefill(job)).cached_tokens

    def stop(self) -> None:
        self.candidates.clear()

    def failed(self, cause: str) -> None:
        raise AssertionError(cause)

    def skipped(self, reason: str) -> None:
        self.skips.append(reason)

    def transferred(self, report: TransferReport) -> None:
        self.reports.append(report)


async def generate(
    engine: SimEngine, tokens: list[int], sampling: Sampling | None = None, remote: Peers | None = None
) -> list[Output]:
    job = Job(RequestId("r"), tokens, sampling or greedy(), remote=remote)
    async with aclosing(engine.generate(job)) as outputs:
        return [output async for output in outputs]


def text(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def begun(engine: SimEngine, job: Job) -> asyncio.Task[None]:
    """A request in flight that has its first token, or asks for its prompt."""
    first = job.remote.asking if isinstance(job.remote, Peers) else asyncio.Event()

    async def consume() -> None:
        async with aclosing(engine.generate(job)) as outputs:
            async for _ in outputs:
                first.set()

    task = asyncio.get_running_loop().create_task(consume())
    await first.wait()
    return task


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def assert_free(*engines: SimEngine) -> None:
    for engine in engines:
        load = engine.load()
        assert (load.kv_used_blocks, load.running, load.waiting, sum(load.held_blocks.values())) == (0, 0, 0, 0)


async def test_output_is_identical_computed_cached_and_fetched(engine: MakeEngine) -> None:
    alone, decode, prefill = await engine(), await engine(), await engine(Role.PREFILL)
    expected = text(await generate(alone, PROMPT))
    assert len(expected) == 4
    assert text(await generate(alone, PROMPT)) == expected
    remote = Peers([prefill], PROMPT)
    outputs = await generate(decode, PROMPT, remote=remote)
    assert text(outputs) == expected
    assert outputs[0].cached_tokens == 0
    assert (remote.targets[0].first_block, remote.targets[0].num_blocks) == (0, 9)
    assert [report.blocks for report in remote.reports] == [9]
    assert_free(alone, decode, prefill)


async def test_seeded_sampling_is_identical_computed_and_fetched(engine: MakeEngine) -> None:
    alone, decode, prefill = await engine(), await engine(), await engine(Role.PREFILL)
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=11)
    expected = text(await generate(alone, PROMPT, sampling))
    assert text(await generate(decode, PROMPT, sampling, Peers([prefill], PROMPT))) == expected


async def test_generation_continues_where_it_was_cut_off(engine: MakeEngine) -> None:
    one, other = await engine(), await engine()
    for sampling in (greedy(10), Sampling(max_tokens=10, temperature=1.0, seed=3)):
        whole = text(await generate(one, PROMPT, sampling))
        assert text(await generate(other, PROMPT + whole[:6], sampling))[:4] == whole[6:]


async def test_unseeded_sampling_differs_between_requests(engine: MakeEngine) -> None:
    one = await engine()
    sampling = Sampling(max_tokens=20, temperature=1.0)
    assert text(await generate(one, PROMPT, sampling)) != text(await generate(one, PROMPT, sampling))


async def test_fetched_blocks_can_be_matched_by_the_next_prompt(engine: MakeEngine) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL)
    await generate(decode, PROMPT, remote=Peers([prefill], PROMPT))
    remote = Peers([prefill], PROMPT)
    outputs = await generate(decode, PROMPT, remote=remote)
    assert outputs[0].cached_tokens == 128
    assert remote.skips == ["prefix hit"]
    assert remote.targets == []


async def test_a_partial_hit_fetches_only_what_is_missing(engine: MakeEngine) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL)
    await generate(decode, PROMPT[:40])
    remote = Peers([prefill], PROMPT)
    outputs = await generate(decode, PROMPT, remote=remote)
    assert (remote.targets[0].first_block, remote.targets[0].num_blocks) == (2, 7)
    assert outputs[0].cached_tokens == 32


@pytest.mark.parametrize(("length", "asks"), [(63, 0), (64, 1)])
async def test_short_prompts_are_computed_here(engine: MakeEngine, length: int, asks: int) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL)
    remote = Peers([prefill], PROMPT[:length])
    await generate(decode, PROMPT[:length], remote=remote)
    assert len(remote.targets) == asks
    assert remote.skips == ([] if asks else ["short"])


async def test_a_failed_prefill_is_tried_at_the_next_candidate_under_a_new_transfer_id(engine: MakeEngine) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL)
    remote = Peers([PrefillFailed("gone"), prefill], PROMPT)
    outputs = await generate(decode, PROMPT, remote=remote)
    assert len({target.transfer_id for target in remote.targets}) == 2
    assert len(remote.reports) == 1
    assert len(text(outputs)) == 4


async def test_a_prompt_is_computed_here_when_every_candidate_fails(engine: MakeEngine) -> None:
    alone, decode = await engine(), await engine()
    remote = Peers([PrefillFailed("gone"), PrefillFailed("silent")], PROMPT)
    assert text(await generate(decode, PROMPT, remote=remote)) == text(await generate(alone, PROMPT))
    assert remote.reports == []
    assert_free(decode)


async def test_cancelling_a_running_sequence_frees_its_blocks(engine: MakeEngine) -> None:
    one = await engine(decode_step_ms=1)
    task = await begun(one, Job(RequestId("r"), PROMPT, greedy(300)))
    assert one.load().kv_used_blocks >= 9
    await stopped(task)
    assert_free(one)


async def test_cancelling_during_a_fetch_frees_both_sides(engine: MakeEngine) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL, prefill_ms_per_token=50)
    task = await begun(decode, Job(RequestId("r"), PROMPT, greedy(), remote=Peers([prefill], PROMPT)))
    assert decode.load().held_blocks == {"receive": 9}
    await stopped(task)
    assert_free(decode, prefill)


async def test_blocks_being_pushed_are_held_with_their_reason(engine: MakeEngine) -> None:
    prefill = await engine(Role.PREFILL, transfer_ms_per_block=10_000)
    task = asyncio.get_running_loop().create_task(prefill.prefill(PrefillJob(RequestId("p"), PROMPT, TARGET)))
    await anext(prefill.kv_events())  # its blocks are computed
    assert prefill.load().held_blocks == {"push": 9}
    assert prefill.load().kv_used_blocks == 9
    task.cancel()
    await asyncio.wait((task,))
    assert_free(prefill)


async def test_a_push_has_a_deadline(engine: MakeEngine) -> None:
    prefill = await engine(Role.PREFILL, transfer_ms_per_block=10_000)
    with pytest.raises(PrefillFailed) as failure:
        await prefill.prefill(PrefillJob(RequestId("p"), PROMPT, TARGET, timeout_s=0.05))
    assert failure.value.cause == "deadline"
    assert_free(prefill)


async def test_a_target_beyond_the_prompt_is_refused(engine: MakeEngine) -> None:
    prefill = await engine(Role.PREFILL)
    target = PushTarget(1, Incarnation("d"), LAYOUT, 0, 131, ())
    with pytest.raises(PrefillFailed) as failure:
        await prefill.prefill(PrefillJob(RequestId("p"), PROMPT, target))
    assert failure.value.cause == "mismatch"


async def test_a_prefill_says_what_it_had_cached(engine: MakeEngine) -> None:
    prefill = await engine(Role.PREFILL)
    assert (await prefill.prefill(PrefillJob(RequestId("p"), PROMPT, TARGET))).cached_tokens == 0
    assert (await prefill.prefill(PrefillJob(RequestId("p"), PROMPT, TARGET))).cached_tokens == 128


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "empty"),
        ([10] * 512, "512 tokens; at most 511"),
        ([500], "from 0 to 499"),
        ([-1], "from 0 to 499"),
        ([2**64], "from 0 to 499"),
    ],
)
async def test_impossible_prompts_are_request_errors(engine: MakeEngine, tokens: list[int], words: str) -> None:
    one = await engine()
    with pytest.raises(RequestError, match=words):
        await generate(one, tokens)
    assert_free(one)


async def test_the_longest_prompt_yields_one_token(engine: MakeEngine) -> None:
    assert len(text(await generate(await engine(), [10] * 511, greedy(50)))) == 1


async def test_death_ends_everything_in_flight_and_all_that_follows(engine: MakeEngine) -> None:
    one = await engine(decode_step_ms=1)
    task = await begun(one, Job(RequestId("r"), PROMPT, greedy(300)))
    one.fail("out of luck")
    with pytest.raises(WorkerError, match="out of luck"):
        await task
    assert await one.failed() == "out of luck"
    with pytest.raises(WorkerError, match="out of luck"):
        await generate(one, PROMPT)
    with pytest.raises(PrefillFailed):
        await one.prefill(PrefillJob(RequestId("p"), PROMPT, TARGET))


async def test_a_snapshot_holds_what_the_consumed_events_said(engine: MakeEngine) -> None:
    one = await engine()
    async with aclosing(one.kv_events()) as events:
        await generate(one, PROMPT, greedy(1))
        assert one.snapshot() == {}
        await anext(events)
        assert set(one.snapshot()[Tier.DEVICE]) == set(block_hashes(PROMPT, 16))


async def test_blocks_evicted_by_later_prompts_leave_the_snapshot(engine: MakeEngine) -> None:
    one = await engine(kv_blocks=16)
    async with aclosing(one.kv_events()) as events:
        for start in range(6):
            await generate(one, [start * 60 + i for i in range(100)], greedy(1))
            await anext(events)
            assert len(one.snapshot()[Tier.DEVICE]) <= 16
        assert set(block_hashes([300 + i for i in range(100)], 16)) <= set(one.snapshot()[Tier.DEVICE])
        assert block_hashes(list(range(100)), 16)[5] not in one.snapshot()[Tier.DEVICE]


async def test_a_context_that_does_not_fit_the_blocks_is_a_start_error(engine: MakeEngine) -> None:
    one = await engine(kv_blocks=8)
    config = one._spec.config.model_copy(update={"max_model_len": 129})
    spec = one._spec.model_copy(update={"config": config})
    again = SimEngine(spec, Role.DECODE, one._incarnation, CollectorRegistry())
    with pytest.raises(StartError, match="129 is over the 128 tokens"):
        await again.start()


async def test_prompt_tokens_are_counted_by_source(engine: MakeEngine) -> None:
    decode, prefill = await engine(), await engine(Role.PREFILL)
    await generate(decode, PROMPT[:40], greedy(1))
    await generate(decode, PROMPT, greedy(1), Peers([prefill], PROMPT))

    def counted(source: str) -> float | None:
        return decode._registry.get_sample_value("vllm:prompt_tokens_by_source_total", {"source": source})

    assert (counted("local_compute"), counted("local_cache_hit"), counted("external_kv_transfer")) == (41, 32, 97)


async def test_pace_follows_the_configuration(engine: MakeEngine) -> None:
    one = await engine(decode_step_ms=10, prefill_ms_per_token=1)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await generate(one, PROMPT[:100], greedy(11))
    assert loop.time() - started >= 0.19  # 100 ms of prompt and 10 steps, less one timer's rounding


async def test_output_is_identical_when_a_prefix_is_pulled_and_only_that_is_moved(engine: MakeEngine) -> None:
    alone, here, holder = await engine(), await engine(), await engine()
    await generate(holder, PROMPT[:100])
    remote = Peers([holder], PROMPT, end=96)
    outputs = await generate(here, PROMPT, remote=remote)
    assert text(outputs) == text(await generate(alone, PROMPT))
    assert outputs[0].cached_tokens == 0
    assert [(target.first_token, target.tokens) for target in remote.targets] == [(0, 96)]
    assert [report.blocks for report in remote.reports] == [6]
    again = await generate(here, PROMPT)
    assert again[0].cached_tokens == 128, "pulled blocks can be matched as those that were computed"
    assert_free(alone, here, holder)


async def test_a_holder_that_has_lost_the_prefix_declines_and_it_is_computed_here(engine: MakeEngine) -> None:
    alone, here, holder = await engine(), await engine(), await engine()
    await generate(holder, PROMPT[:60])
    target = PushTarget(1, Incarnation("d"), LAYOUT, 0, 96, ())
    with pytest.raises(PrefillFailed, match="3 of 6 blocks") as caught:
        await holder.prefill(PrefillJob(RequestId("pull"), PROMPT[:97], target, only_held=True))
    assert caught.value.cause == "not held"
    remote = Peers([holder], PROMPT, end=96)
    assert text(await generate(here, PROMPT, remote=remote)) == text(await generate(alone, PROMPT))
    assert remote.reports == []
    assert_free(here, holder)


async def test_computing_is_measured(engine: MakeEngine) -> None:
    one = await engine(prefill_ms_per_token=0.1)
    await generate(one, PROMPT)
    forecast = one.cost.forecast(1, 100, 0, remote=False)
    assert forecast.compute_s is not None
    assert forecast.compute_s >= 0.01


def test_a_request_that_comes_ends_a_burst_of_steps_at_the_end_of_one(model: Path) -> None:
    async def main() -> tuple[list[tuple[float, int]], float]:
        spec = sim_spec(model, "one", Role.DECODE, {"decode_step_ms": 10, "steps_at_once": 100, "block_size": 256})
        one = SimEngine(spec, Role.DECODE, Incarnation("one"), CollectorRegistry())
        await one.start()
        clock, arrivals = asyncio.get_running_loop().time, list[tuple[float, int]]()

        async def consume() -> None:
            async with aclosing(one.generate(Job(RequestId("r"), PROMPT[:10], greedy(60)))) as outputs:
                async for output in outputs:
                    arrivals.append((round(clock(), 6), len(output.token_ids)))

        async with asyncio.TaskGroup() as group:
            group.create_task(consume())
            await asyncio.sleep(0.103)
            began = clock()
            await generate(one, PROMPT[:5], greedy(1))
            waited = clock() - began
        await one.close()
        return arrivals, waited

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        arrivals, waited = runner.run(main())
    # One token with the prompt; eleven steps until the end of the one in which the other request came; the step that
    # computes its prompt; and all the others, but for one that its end cuts off.
    assert arrivals == [(0.0, 1), (0.11, 11), (0.12, 1), (0.13, 1), (0.59, 46)]
    assert waited == pytest.approx(0.017)


async def test_what_is_measured_and_queued_is_part_of_the_load(engine: MakeEngine) -> None:
    one = await engine(prefill_ms_per_token=0.1, decode_step_ms=2)
    assert one.load().rates.prefill is None
    await generate(one, PROMPT, greedy(6))
    rates = one.load().rates
    assert rates.prefill == pytest.approx((0.0, 0.1), abs=1e-9)
    assert rates.step == pytest.approx((2.0, 0.0), abs=1e-9)
    assert rates.answer_tokens == 6
    tasks = [asyncio.create_task(generate(one, [20 + number, *PROMPT])) for number in range(3)]
    await asyncio.sleep(0)
    assert one.load().queued_tokens == 3 * (len(PROMPT) + 1)
    await asyncio.gather(*tasks)
    assert one.load().queued_tokens == 0
