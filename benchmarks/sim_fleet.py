"""Simulated workers and a router in one process, on whatever clock the event loop has, under a trace's requests.

The engines, their pools and tiers, the index and the router are those of a deployment. What is left out is what carries
their messages: KV events and load reports go to the router by a call.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from prometheus_client import CollectorRegistry

from dynamo_lite.config import Config, EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.plane.wire import Incarnation, InstanceRecord, LoadReport, RequestId, Role, Sampling
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from kvbm.events import KvEventBatch, KvSnapshot
from kvbm.hashing import FullHash, full_block_hashes, low64
from workers.engine import EngineInfo, Job
from workers.reports import INTERVAL_S
from workers.sim_engine import SimEngine
from workers.sim_storage import Bucket

BLOCK = 512  # tokens of a trace's block
FIRST = 256  # token ids below are for answers, those above for the blocks of prompts


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace in Mooncake's format."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    hash_ids: tuple[int, ...]  # of the blocks of BLOCK tokens, the last of which may be cut off

    def token_ids(self) -> list[int]:
        """Equal hash ids become equal blocks."""
        tokens: list[int] = []
        for number in self.hash_ids:
            tokens += [FIRST + number] * BLOCK
        return tokens[: self.prompt_tokens]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    worker: int
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float


def read_trace(file: Path) -> list[Request]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    return [
        Request(line["timestamp"] / 1000, line["input_length"], max(1, line["output_length"]), tuple(line["hash_ids"]))
        for line in lines
    ]


def write_model(folder: Path, requests: Sequence[Request]) -> None:
    """What the simulation reads of Llama-3.1-8B, with as many token ids as the trace has blocks."""
    vocabulary = FIRST + 1 + max(max(request.hash_ids) for request in requests)
    config = {
        "vocab_size": vocabulary, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "head_dim": 128, "max_position_embeddings": 131_072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = {"".join(chr(97 + digit) for digit in divmod(number, 16)): number for number in range(FIRST)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}), encoding="utf-8")


class Worker:
    """An engine and what its worker process tells of it."""

    def __init__(self, engine: SimEngine, record: InstanceRecord, roster: Roster) -> None:
        self.engine, self.record, self._roster = engine, record, roster
        self._kv_seq = self._load_seq = 0

    async def tell_events(self) -> NoReturn:
        async for events in self.engine.kv_events():
            self._kv_seq += 1
            self._roster.take_batch(KvEventBatch(self.record.incarnation, self._kv_seq, events))
        raise AssertionError("an engine's KV events never end")

    def report(self) -> None:
        load = self.engine.load()
        self._load_seq += 1
        self._roster.take_report(
            LoadReport(
                self.record.incarnation, self._load_seq, load.running, load.waiting, load.kv_used_blocks,
                load.kv_total_blocks, sum(load.held_blocks.values()), self._kv_seq,
                queued_tokens=load.queued_tokens, rates=load.rates,
            )
        )  # fmt: skip


class SimFleet:
    """Aggregated workers behind one router."""

    def __init__(self, workers: Sequence[Worker], roster: Roster, config: Config) -> None:
        self.workers, self._router = workers, Router(roster, config.router, seed=0)
        self._number = {worker.record.incarnation: number for number, worker in enumerate(workers)}

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config, model: Path) -> AsyncIterator[SimFleet]:
        """`config.workers.both` says how many; `model`: what `write_model` wrote."""
        assert config.workers.both is not None, "the workers are aggregated ones"
        roster, bucket = Roster(lambda _: None, asyncio.get_running_loop().time), Bucket()
        async with AsyncExitStack() as stack:
            workers = []
            for number in range(config.workers.both.count):
                engine = SimEngine(
                    _spec(config, number, model), Role.BOTH, Incarnation(f"worker{number}"), CollectorRegistry(), bucket
                )
                stack.push_async_callback(engine.close)
                record = _record(number, await engine.start())
                roster.join(record)
                roster.take_snapshot(KvSnapshot(record.incarnation, 0, {}))
                workers.append(Worker(engine, record, roster))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            fleet = cls(workers, roster, config)
            loops = [group.create_task(each.tell_events()) for each in workers]
            loops.append(group.create_task(fleet._report()))
            yield fleet
            for loop in loops:
                loop.cancel()

    async def _report(self) -> NoReturn:
        while True:
            for worker in self.workers:
                worker.report()
            await asyncio.sleep(INTERVAL_S)

    async def replay(self, requests: Iterable[Request], speed: float) -> list[Answer]:
        """The requests at their times, these divided by `speed`. In the order in which they ended."""
        loop, answers = asyncio.get_running_loop(), list[Answer]()
        begin = loop.time()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                await asyncio.sleep(max(0.0, begin + request.at_s / speed - loop.time()))
                group.create_task(self._serve(RequestId(f"r{number}"), request, answers))
        return answers

    async def _serve(self, request_id: RequestId, request: Request, answers: list[Answer]) -> None:
        loop, token_ids = asyncio.get_running_loop(), request.token_ids()
        arrived = loop.time()
        placement = self._router.place(token_ids)
        number = self._number[placement.decode.incarnation]
        job = Job(request_id, token_ids, Sampling(max_tokens=request.answer_tokens, temperature=0.0))
        with placement.booked():
            async with aclosing(self.workers[number].engine.generate(job)) as outputs:
                async for output in outputs:
                    if output.cached_tokens is not None:
                        placement.observed(output.cached_tokens)
                        ttft_s = loop.time() - arrived
                        answers.append(Answer(number, request.prompt_tokens, output.cached_tokens, ttft_s))


def _spec(config: Config, number: int, model: Path) -> ProcessSpec:
    return ProcessSpec(
        config=config,
        role="both",
        name=f"both-{number}",
        model_path=model,
        nats=NatsAddress(url="nats://unused:1"),
        etcd=EtcdAddress(endpoints=("http://unused:1",)),
        state_dir=model,
    )


def _record(number: int, info: EngineInfo) -> InstanceRecord:
    return InstanceRecord(
        name=f"both-{number}",
        incarnation=Incarnation(f"worker{number}"),
        role=Role.BOTH,
        host="simulated",
        pid=number,
        served_model="simulated",
        fingerprint=info.fingerprint,
        kv_blocks=info.kv_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
    )


class TraceHashes:
    """`kvbm.hashing` that hashes each block of a trace once, as hashing again would be most of the work.

    A block that begins and ends with the same token of a prompt is that token throughout.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[FullHash | None, int], FullHash] = {}

    def full(
        self, token_ids: Sequence[int], block_size: int, cache_salt: str | None = None, *, after: FullHash | None = None
    ) -> list[FullHash]:
        assert cache_salt is None, "a trace has no tenants"
        hashes: list[FullHash] = []
        for end in range(block_size, len(token_ids) + 1, block_size):
            first, last = token_ids[end - block_size], token_ids[end - 1]
            found = self._known.get((after, first)) if first == last >= FIRST else None
            if found is None:
                (found,) = full_block_hashes(token_ids[end - block_size : end], block_size, after=after)
                if first == last >= FIRST:
                    self._known[after, first] = found
            hashes.append(found)
            after = found
        return hashes

    def low(self, token_ids: Sequence[int], block_size: int, cache_salt: str | None = None) -> list[int]:
        return [low64(block_hash) for block_hash in self.full(token_ids, block_size, cache_salt)]


@contextmanager
def trace_model(requests: Sequence[Request]) -> Iterator[Path]:
    """The folder of a model for this trace; hashing its blocks is remembered while the body runs."""
    hashes = TraceHashes()
    with (
        tempfile.TemporaryDirectory(prefix="dynamo-lite-trace-") as folder,
        patch("dynamo_lite.router.router.block_hashes", hashes.low),
        patch("workers.sim_scheduler.full_block_hashes", hashes.full),
    ):
        write_model(Path(folder), requests)
        yield Path(folder)
