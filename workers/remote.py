"""A decode worker's remote prefills and pulls: candidates asked one after the other over NATS."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dynamo_lite.errors import DynamoError, NoResponders, PlaneError, PrefillFailed, ProtocolMismatch
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import (
    Cancel,
    Holder,
    Incarnation,
    PrefillReply,
    PrefillRequest,
    PushTarget,
    RequestId,
    Sampling,
    Subjects,
    decode,
    encode,
)
from dynamo_lite.telemetry import AttributeValue, record_span
from kvbm.policy import PullForecast
from workers.engine import BACKEND, TransferReport
from workers.metrics import WorkerMetrics
from workers.pulls import REFUSALS, Pull, Pulls

log = logging.getLogger(__name__)

_CANCEL_DEADLINE_S = 1.0

# How a prompt came to be computed: the `reason` of the decode span and of the `prompts` metric.
REMOTE = "remote"
NO_CANDIDATES = "no candidates"
PREFILL_FAILED = "prefill failed"
PULLED = "pulled"
PULL_FAILED = "pull failed"
FASTER_HERE = "faster here"  # than pulling it


@dataclass(frozen=True, slots=True)
class PrefillPlane:
    """What every remote prefill of this worker uses."""

    bus: Bus
    subjects: Subjects
    metrics: WorkerMetrics
    group: asyncio.TaskGroup
    silence_s: float  # longest silence of a prefill worker
    pulls: Pulls
    first_tokens: dict[RequestId, Callable[[int], None]] = field(default_factory=dict)  # who waits for one


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence's prompt, as the prefill workers are asked for it."""

    request_id: RequestId
    token_ids: list[int]
    cache_salt: str | None
    traceparent: str  # of the decode span
    deadline: float  # on the event loop's clock
    sampling: Sampling


class CandidatePrefill:
    """`RemotePrefill` of one sequence: each `ask` takes the next candidate, best first.

    A candidate's reply is also its word that it writes nothing more, so a stopped or overdue attempt waits for that
    reply, as long as the candidate shows life. Only then has a failure another cause than "silent".
    """

    def __init__(
        self, plane: PrefillPlane, prompt: Prompt, candidates: Sequence[Incarnation], holder: Holder | None = None
    ) -> None:
        """`holder` becomes the first candidate if `plan` decides so."""
        self._plane, self._prompt = plane, prompt
        self._left = deque(candidates)
        self._holder = holder
        self._pull: Pull | None = None  # decided upon
        self._end = len(prompt.token_ids)  # of what is asked for
        self._began = 0.0  # when it was asked for; monotonic seconds
        self._first_s: float | None = None  # how long the sequence's first token took from then on
        self._report: TransferReport | None = None  # of what has come
        self._tokens = 0  # asked for
        self._asked: Incarnation | None = None
        self._asking = False
        self._span = prompt.traceparent  # parent of the transfer's span: the prefill span once it is known
        self.reason = NO_CANDIDATES
        self.chose = False  # a candidate, the first token
        self.forecast: PullForecast | None = None  # where pulling was considered

    def plan(self, here: int) -> int:
        if self._holder is None:
            return self._end
        holder = self._holder
        pull = self._plane.pulls.weigh(holder.tokens, self._end, here, remote=self.more, leaving=holder.leaving)
        if pull is None:
            return self._end
        self.forecast = pull.forecast
        if pull.chosen:
            self._pull, self._end = pull, pull.tokens
            others = [candidate for candidate in self._left if candidate != holder.incarnation]
            self._left = deque([holder.incarnation, *others])
        elif not self.more:
            self.reason = FASTER_HERE
        return self._end

    @property
    def _pulling(self) -> bool:
        """Whether it is the holder that was asked last."""
        return self._pull is not None and self._holder is not None and self._asked == self._holder.incarnation

    @property
    def more(self) -> bool:
        return bool(self._left)

    @property
    def asked(self) -> str:
        return self._asked or ""

    async def ask(self, target: PushTarget, first_token: Callable[[int], None] | None = None) -> int:
        worker = self._asked = self._left.popleft()
        self._began, self._tokens = time.monotonic(), target.tokens
        # Unless it fails: the KV may be here, and a short sequence over, before the reply is.
        self.reason = PULLED if self._pulling else REMOTE
        outcome, self._asking = "cancelled", True
        if first_token is not None:
            first_token = partial(self._heard, first_token)
            self._plane.first_tokens[self._prompt.request_id] = first_token
        try:
            reply = await self._call(worker, target, first_token is not None)
            outcome = "ok"
        except PrefillFailed as error:
            outcome = error.cause
            self.reason = PULL_FAILED if self._pulling else PREFILL_FAILED
            level = logging.INFO if outcome in REFUSALS else logging.WARNING
            log.log(level, "%s: prefill worker %s: %s", self._prompt.request_id, worker, error)
            raise
        finally:
            self._asking = False
            self._plane.first_tokens.pop(self._prompt.request_id, None)
            self._count(outcome)
            if outcome in ("silent", "cancelled"):
                await self._cancel(worker)  # one that is only frozen drops the request when it wakes up
        if first_token is not None and reply.first_token is not None:
            first_token(reply.first_token)
        self._span = reply.traceparent or self._span
        return reply.cached_tokens

    def _count(self, outcome: str) -> None:
        """How one candidate's attempt went."""
        metrics = self._plane.metrics
        if self._pulling:
            metrics.pulls.labels("in", outcome).inc()
            if outcome in ("deadline", "silent"):
                self._plane.pulls.cost.pull_failed(time.monotonic() - self._began)
        else:
            metrics.remote_prefills.labels(outcome).inc()
        if outcome not in ("ok", "cancelled", *REFUSALS):
            metrics.transfer_failures.labels("in", outcome).inc()

    def _heard(self, first_token: Callable[[int], None], token_id: int) -> None:
        self.chose = True
        first_token(token_id)

    def stop(self) -> None:
        self._left.clear()
        if self._asking and self._asked is not None:
            self._plane.group.create_task(self._cancel(self._asked))

    def skipped(self, reason: str) -> None:
        self.reason = reason

    def failed(self, cause: str) -> None:
        self.reason = PULL_FAILED if self._pulling else PREFILL_FAILED
        self._plane.metrics.transfer_failures.labels("in", cause).inc()

    def transferred(self, report: TransferReport) -> None:
        self.reason = PULLED if self._pulling else REMOTE  # though the reply may have been lost
        self._plane.metrics.transferred("in", report)
        self._report = report
        self._measure()
        attributes: dict[str, AttributeValue] = {
            "bytes": report.bytes,
            "blocks": report.blocks,
            "pieces": report.pieces,
            "backend": "sim" if report.path == "sim" else BACKEND,
            "path": report.path,
            "seconds": (report.ended_ns - report.started_ns) / 1e9,
        }
        record_span("kv.transfer", self._span, report.started_ns, report.ended_ns, attributes)

    def answered(self) -> None:
        """The sequence has its first token, whoever chose it."""
        if self._first_s is None:
            self._first_s = time.monotonic() - self._began
            self._measure()

    def _measure(self) -> None:
        """For later decisions: what this way has taken. The token may come before the reply that ends the transfer."""
        report, cost = self._report, self._plane.pulls.cost
        if report is None or self._first_s is None:
            return
        if self._pulling:
            rest, moving_s = len(self._prompt.token_ids) - self._end, (report.ended_ns - report.started_ns) / 1e9
            cost.pulled(report.bytes, rest, self._first_s, moving_s)
        else:
            cost.prefilled(self._tokens, self._first_s)

    async def _call(self, worker: Incarnation, target: PushTarget, wants_token: bool) -> PrefillReply:
        """The reply of one candidate; every failure is a PrefillFailed."""
        plane = self._plane
        left_s = self._prompt.deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise PrefillFailed("deadline", "the request's time is up")
        if self._pulling and self._pull is not None and self._pull.patience_s is not None:
            left_s = min(left_s, self._pull.patience_s)
        try:
            data = await plane.bus.call(
                plane.subjects.prefill(worker),
                encode(self._request(target, left_s, wants_token)),
                timeout_s=left_s + plane.silence_s,  # it keeps the deadline itself, and says so
                probe=plane.subjects.ping(worker),
                silence_s=plane.silence_s,
            )
            reply = decode(data, PrefillReply)
            if reply.error is not None:
                raise reply.error.exception()
        except NoResponders as error:
            raise PrefillFailed("gone", str(error)) from error
        except ProtocolMismatch as error:
            raise PrefillFailed("protocol", str(error)) from error
        except PlaneError as error:  # no answer: it may still be writing
            raise PrefillFailed("silent", str(error)) from error
        except PrefillFailed:
            raise
        except DynamoError as error:
            raise PrefillFailed(error.kind, str(error)) from error
        return reply

    def _request(self, target: PushTarget, left_s: float, wants_token: bool) -> PrefillRequest:
        prompt = self._prompt
        return PrefillRequest(
            prompt.request_id,
            prompt.token_ids[: self._end + 1],
            target,
            prompt.cache_salt,
            max(1, int(left_s * 1000)),
            prompt.traceparent,
            prompt.sampling if wants_token else None,
            only_held=self._pulling,
            leaving=self._pulling and self._holder is not None and self._holder.leaving,
        )

    async def _cancel(self, worker: Incarnation) -> None:
        try:
            async with asyncio.timeout(_CANCEL_DEADLINE_S):
                subject = self._plane.subjects.cancel(worker)
                await self._plane.bus.publish(subject, encode(Cancel(self._prompt.request_id)))
        except (PlaneError, TimeoutError) as error:
            log.warning("%s: cannot cancel the prefill at %s: %s", self._prompt.request_id, worker, error)
