"""What the router knows of the workers: who is there, what they hold, how busy they are. No I/O here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from statistics import median

from dynamo_lite.plane.wire import Fingerprint, Incarnation, InstanceRecord, LoadReport, Rates, Role
from dynamo_lite.router import metrics
from dynamo_lite.router.cost import Pace
from dynamo_lite.router.inflow import Inflow, Inflows
from dynamo_lite.router.load import WorkerLoad
from dynamo_lite.router.paces import pace
from dynamo_lite.router.recent import Recent
from kvbm.events import BlocksStored, KvEventBatch, KvSnapshot, Tier
from kvbm.index import LIMIT, PrefixIndex

REVIVE_AFTER_S = 0.5  # a report this long after a worker was called lost was not under way at that time
PACES_S = 1.0  # how often what is believed of the workers' speeds follows what they report
BUFFERED_BATCHES = 4096  # kept while waiting for a snapshot; with more, another snapshot is asked for

NOTHING = Rates()

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Instance:
    """One live worker."""

    record: InstanceRecord
    load: WorkerLoad
    inflow: Inflow
    number: int  # of its own
    kind: int  # equal for workers of one fingerprint
    block_size: int  # tokens
    namespace: str  # of the index: workers whose block hashes name the same KV
    pace: Pace
    recent: Recent = field(default_factory=Recent)  # placed there while it is `waiting`
    lost_at: float | None = None  # by the roster's clock
    waiting: bool = True  # for a snapshot; batches are buffered meanwhile
    buffer: deque[KvEventBatch] = field(default_factory=lambda: deque(maxlen=BUFFERED_BATCHES))

    @property
    def usable(self) -> bool:
        return self.lost_at is None and not self.load.draining


def namespace(fingerprint: Fingerprint) -> str:
    """A block hash names tokens, and so, in one of these, their KV."""
    return f"{fingerprint.engine}:{fingerprint.model}@{fingerprint.revision}"


class Roster:
    """The workers. `ask_snapshot` is called when one of them must tell all of its blocks."""

    def __init__(
        self,
        ask_snapshot: Callable[[Instance], None],
        clock: Callable[[], float] = time.monotonic,
        index_memory: int = LIMIT,
    ) -> None:
        """`clock`: seconds, from whenever on. `index_memory`: what the index may take, in bytes."""
        self.index = PrefixIndex(index_memory)
        self._evicted = 0  # blocks of the index that the counter has
        self.clock = clock
        self._instances: dict[Incarnation, Instance] = {}
        self._ask_snapshot = ask_snapshot
        self._kinds: dict[Fingerprint, int] = {}
        self._problems: dict[tuple[int, int], str | None] = {}
        self.token_ms = 0.0  # of computing a prompt, on a worker as most are
        self.inflows = Inflows()
        self._joined = 0  # workers, so far
        self._paces_at: float | None = None  # when they were worked out; None: they have to be now
        self._rates_changed = False
        self._watching: set[asyncio.Event] = set()

    def __contains__(self, incarnation: Incarnation) -> bool:
        return incarnation in self._instances

    def instance(self, incarnation: Incarnation) -> Instance | None:
        return self._instances.get(incarnation)

    def refreshing(self, incarnation: Incarnation) -> bool:
        """Whether the worker's blocks are unknown, or some of them: its snapshot is awaited."""
        instance = self._instances.get(incarnation)
        return instance is not None and instance.waiting

    def usable(self, roles: Collection[Role]) -> list[Instance]:
        """Workers of these roles that may be given work, in the order they came."""
        return [each for each in self._instances.values() if each.usable and each.record.role in roles]

    def fits(self, decode: Instance, sender: Instance) -> bool:
        """Whether one can push KV to the other."""
        pair = (decode.kind, sender.kind)
        if pair not in self._problems:
            to, of = decode.record, sender.record
            self._problems[pair] = problem = to.fingerprint.problem_with(of.fingerprint)
            if problem:
                log.warning("%s cannot take KV from %s: %s", to.name, of.name, problem)
        return self._problems[pair] is None

    def settle_paces(self) -> None:
        """Work out anew how fast the workers are, if they have reported anything of it since, and not too often."""
        now = self.clock()
        if self._paces_at is not None and (not self._rates_changed or now - self._paces_at < PACES_S):
            return
        self._paces_at, self._rates_changed = now, False
        kin: dict[int, list[Rates]] = {}
        reports = [(each, each.load.report) for each in self._instances.values()]
        for each, report in reports:
            kin.setdefault(each.kind, []).append(report.rates if report is not None else NOTHING)
        for each, report in reports:
            each.pace = pace(report.rates if report is not None else NOTHING, kin[each.kind])
        self.token_ms = median(each.pace.prefill[1] for each in self._instances.values())

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a change after which `holds`, for readiness. The deadline is the caller's."""
        change = asyncio.Event()
        self._watching.add(change)
        try:
            while not holds():
                change.clear()
                await change.wait()
        finally:
            self._watching.discard(change)

    def join(self, record: InstanceRecord) -> None:
        """A worker registered. Its blocks are unknown until its snapshot comes."""
        if record.incarnation in self._instances:
            self._instances[record.incarnation].record = record
            return
        kind = self._kinds.setdefault(record.fingerprint, len(self._kinds))
        self._joined += 1
        instance = self._instances[record.incarnation] = Instance(
            record,
            WorkerLoad(self.clock),
            Inflow(record.kv_blocks),
            self._joined,
            kind,
            record.fingerprint.block_size,
            namespace(record.fingerprint),
            pace(NOTHING, ()),
        )
        self._paces_at = None
        log.info("%s joined (%s)", record.name, record.incarnation)
        self.index.join(record.incarnation, instance.namespace)
        self._count_workers()
        self._ask_snapshot(instance)
        self.tell()

    def leave(self, incarnation: Incarnation) -> None:
        """A worker's registration ended."""
        instance = self._instances.pop(incarnation, None)
        if instance is not None:
            log.info("%s left (%s)", instance.record.name, incarnation)
            self.index.remove_worker(incarnation)
            self._count_workers()
            self.tell()

    def lost(self, incarnation: Incarnation) -> None:
        """The request path found the worker gone: place nothing there, unless it reports again."""
        instance = self._instances.get(incarnation)
        if instance is not None and instance.lost_at is None:
            log.warning("%s is lost (%s)", instance.record.name, incarnation)
            instance.lost_at = self.clock()
            self.tell()

    def take_report(self, report: LoadReport) -> None:
        """A worker's load; its `kv_seq` shows when its last KV event batches were lost."""
        instance = self._instances.get(report.worker)
        if instance is None:
            return
        if instance.lost_at is not None and self.clock() - instance.lost_at > REVIVE_AFTER_S:
            log.warning("%s is back (%s)", instance.record.name, report.worker)
            instance.lost_at = None
        before = instance.load.report
        instance.load.take(report)
        if before is None:
            self._paces_at = None
        elif before.rates != report.rates:
            self._rates_changed = True
        # Batches may be on their way still, but not those that the report before this one spoke of.
        if before is not None and before.kv_seq > self.index.seq(report.worker) and not instance.waiting:
            self._gap(instance)
        self._show_index()
        self.tell()

    def take_batch(self, batch: KvEventBatch) -> None:
        """KV events of one engine step."""
        instance = self._instances.get(Incarnation(batch.worker))
        if instance is None:
            return
        if instance.waiting:
            instance.buffer.append(batch)
        elif not self.index.apply(batch):
            instance.buffer.append(batch)
            self._gap(instance)
        self._note_stored(instance, batch)
        self.tell()

    def _note_stored(self, instance: Instance, batch: KvEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlocksStored) and event.tier is Tier.DEVICE:
                everyone = [each.inflow for each in self._instances.values()]
                self.inflows.store(instance.inflow, len(event.hashes), everyone)

    def take_snapshot(self, snapshot: KvSnapshot) -> bool:
        """All blocks of a worker. False when batches after it are missing, and another one is needed."""
        instance = self._instances.get(Incarnation(snapshot.worker))
        if instance is None:
            return True
        metrics.SNAPSHOTS.inc()
        self.index.load(snapshot)
        while instance.buffer:
            if not self.index.apply(instance.buffer[0]):
                metrics.GAPS.inc()
                return False
            instance.buffer.popleft()
        instance.waiting = False
        instance.recent.clear()
        self.tell()
        return True

    def tell(self) -> None:
        """Something has changed that somebody may wait for in `until`."""
        for change in self._watching:
            change.set()

    def _gap(self, instance: Instance) -> None:
        log.warning("KV events of %s were lost; asking for a snapshot", instance.record.name)
        metrics.GAPS.inc()
        instance.waiting = True
        self._ask_snapshot(instance)

    def _show_index(self) -> None:
        metrics.INDEX_BLOCKS.set(self.index.blocks)
        metrics.INDEX_BYTES.set(self.index.bytes)
        metrics.INDEX_EVICTED.inc(self.index.evicted - self._evicted)
        self._evicted = self.index.evicted

    def _count_workers(self) -> None:
        roles: Iterable[Role] = [each.record.role for each in self._instances.values()]
        for role in Role:
            metrics.WORKERS.labels(role.value).set(sum(each is role for each in roles))
