"""Generate requests of frontends: one task each, one more per sequence; deltas go out as the engine yields."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from opentelemetry.trace import Span

from dynamo_lite.errors import DeadlineExceeded, DynamoError, ProtocolMismatch, RequestError
from dynamo_lite.plane.bus import Message
from dynamo_lite.plane.wire import Cancel, Delta, FirstToken, FrontendId, GenerateRequest, RequestId, WireError, decode
from dynamo_lite.telemetry import AttributeValue, spanning, traceparent
from workers.deltas import DeltaSender
from workers.engine import Job, Output, RemotePrefill
from workers.left import Left
from workers.pulls import Pulls
from workers.remote import NO_CANDIDATES, CandidatePrefill, PrefillPlane, Prompt
from workers.serving import InFlight, Serving

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Request:
    """One request while it is here."""

    wire: GenerateRequest
    deadline: float  # on the event loop's clock
    histories: dict[int, list[int]]  # of the sequences to generate: tokens that another worker has generated
    open: set[int]  # sequences whose last delta has not been sent
    cancelled: set[int | None]  # sequences cancelled one by one
    traceparent: str = ""
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    first_token: asyncio.Event = field(default_factory=asyncio.Event)  # of the first sequence, or its end
    error: DynamoError | None = None  # what ended it; None: its client cancelled
    reason: str = NO_CANDIDATES  # how the first sequence's prompt was computed
    predicted: dict[str, AttributeValue] = field(default_factory=dict)  # of the first, where pulling was considered
    chosen_by: str = "decode"  # who chose the first sequence's first token: a "prefill" or this worker
    cached_tokens: int = 0  # of the first sequence
    generated: int = 0
    outcome: str = "ok"

    @property
    def first(self) -> int:
        """The sequence that computes the prompt for all: 0, unless that is over already."""
        return min(self.histories)


class Requests:
    """Everything this worker generates."""

    def __init__(self, serving: Serving, deltas: DeltaSender, pulls: Pulls) -> None:
        self._serving, self._deltas = serving, deltas
        self._plane = PrefillPlane(
            serving.bus, serving.subjects, serving.metrics, serving.group, pulls.silence_s, pulls
        )
        self._requests: dict[RequestId, _Request] = {}
        self.left = Left(serving.group)
        self.in_flight = InFlight(serving.changed)

    def receive(self, message: Message) -> None:
        """Handler of the generate subject."""
        try:
            request = decode(message.data, GenerateRequest)
        except ProtocolMismatch as error:
            self._refuse_unread(message.reply, error)
            return
        try:
            self._check(request)
        except RequestError as error:
            self._refuse(request.frontend, request.request_id, error)
            return
        early = self._serving.early_cancels.take(request.request_id)
        if None in early:
            log.debug("%s was cancelled before it came", request.request_id)
            self._serving.metrics.ended("cancelled")
            return
        deadline = asyncio.get_running_loop().time() + request.timeout_ms / 1000
        histories = request.histories
        state = _Request(request, deadline, histories, set(histories), early)
        self._requests[request.request_id] = state
        self.in_flight.start(request.request_id, self._serving.group.create_task(self._serve(state)))

    def first_token(self, message: Message) -> None:
        """Handler of the first tokens that prefill workers choose. One that nobody waits for came too late."""
        try:
            told = decode(message.data, FirstToken)
        except ProtocolMismatch as error:
            log.warning("dropped a first token: %s", error)  # it comes with the reply again
            return
        waiting = self._plane.first_tokens.get(told.request_id)
        if waiting is not None:
            waiting(told.token_id)

    def cancel(self, cancel: Cancel) -> bool:
        """False when no such request is here."""
        if self.left.fetched(cancel.request_id):
            return True
        state = self._requests.get(cancel.request_id)
        if state is None:
            return False
        if cancel.index is None or state.histories.keys() == {cancel.index}:
            if cancel.moved:
                state.outcome = "moved"
                self.left.behind(cancel.request_id)
            self.in_flight.cancel(cancel.request_id)
            return True
        state.cancelled.add(cancel.index)
        if task := state.tasks.get(cancel.index):
            task.cancel()
        return True

    def bounced(self, message: Message) -> None:
        """Handler of the bounced subject: a frontend that is gone has no use for its requests."""
        if not message.no_responders or self._serving.bus.settling:
            return
        frontend = message.subject.rpartition(".")[2]
        lost = [state.wire.request_id for state in self._requests.values() if state.wire.frontend == frontend]
        if lost:
            log.warning("frontend %s is gone; its %d requests end", frontend, len(lost))
        for request_id in lost:
            self.in_flight.cancel(request_id)

    def abort(self, error: DynamoError) -> None:
        """End everything in flight with `error`."""
        for state in self._requests.values():
            state.error = error
        self.in_flight.cancel_all()

    def _check(self, request: GenerateRequest) -> None:
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id} is in flight already")
        if request.n < 1:
            raise RequestError("n must be at least 1", "n")
        if request.sampling.max_tokens < 1:
            raise RequestError("max_tokens must be at least 1", "max_tokens")
        histories = request.histories
        if not all(0 <= index < request.n for index in histories) or len(histories) < len(request.resumed):
            raise RequestError(f"sequences to go on with must be different ones of the {request.n}")
        if any(len(tokens) >= request.sampling.max_tokens for tokens in histories.values()):
            raise RequestError("a sequence to go on with has all of its tokens")

    def _refuse_unread(self, reply: str, error: ProtocolMismatch) -> None:
        """A request that cannot be read still names its frontend and id, in the subject it was to be bounced to."""
        sender = self._serving.subjects.parse_undelivered(reply)
        if sender is None:
            log.error("dropped a generate request: %s", error)
            self._serving.metrics.failures.labels(error.kind).inc()
        else:
            self._refuse(*sender, error)

    def _refuse(self, frontend: FrontendId, request_id: RequestId, error: DynamoError) -> None:
        log.warning("refused %s: %s", request_id, error)
        self._serving.metrics.failures.labels(error.kind).inc()
        self._serving.metrics.ended("error")
        self._deltas.send(frontend, Delta(request_id, error=WireError.of(error)))

    # -- one request

    async def _serve(self, state: _Request) -> None:
        request = state.wire
        attributes: dict[str, AttributeValue] = {
            "request.id": request.request_id,
            "worker": self._serving.name,
            "prompt_tokens": len(request.token_ids),
            "n": request.n,
            "resumed_tokens": sum(map(len, state.histories.values())),
            "route.reason": request.route_reason,
        }
        try:
            with spanning("decode", request.traceparent, attributes=attributes) as span:
                state.traceparent = traceparent(span)
                try:
                    await self._bounded(state)
                finally:
                    self._end(state, span)
        finally:
            del self._requests[request.request_id]

    async def _bounded(self, state: _Request) -> None:
        try:
            async with asyncio.timeout_at(state.deadline):
                if len(state.histories) == 1:
                    (only,) = state.histories
                    await self._sequence(state, only)
                else:
                    async with asyncio.TaskGroup() as sequences:
                        for index in sorted(state.histories):
                            state.tasks[index] = sequences.create_task(self._sequence(state, index))
        except TimeoutError:
            state.outcome = "timeout"
            state.error = DeadlineExceeded(f"request {state.wire.request_id}", state.wire.timeout_ms / 1000)
        except asyncio.CancelledError:
            if state.outcome != "moved":
                state.outcome = "cancelled" if state.error is None else "error"
            raise
        except Exception as bug:
            first = bug.exceptions[0] if isinstance(bug, ExceptionGroup) else bug
            state.outcome, state.error = "error", DynamoError(f"internal error: {first!r}")
            raise

    def _end(self, state: _Request, span: Span) -> None:
        """Last deltas, and the request's marks in trace and metrics."""
        metrics = self._serving.metrics
        for index in sorted(state.open):
            self._close(state, index, state.error)
        if state.outcome in ("timeout", "error"):
            metrics.failures.labels("unknown" if state.error is None else state.error.kind).inc()
        metrics.ended(state.outcome)
        metrics.prompt_tokens.inc(len(state.wire.token_ids))
        metrics.generated_tokens.inc(state.generated)
        if not span.is_recording():
            return
        span.set_attribute("reason", state.reason)
        span.set_attributes(state.predicted)
        span.set_attribute("first_token", state.chosen_by)
        span.set_attribute("cached_tokens", state.cached_tokens)
        span.set_attribute("generated_tokens", state.generated)
        span.set_attribute("outcome", state.outcome)

    def _close(self, state: _Request, index: int, error: DynamoError | None) -> None:
        """The last delta of a sequence that the engine did not finish."""
        state.open.discard(index)
        finish, wire = ("abort", None) if error is None else (None, WireError.of(error))
        self._deltas.send(state.wire.frontend, Delta(state.wire.request_id, index, finish=finish, error=wire))

    # -- one sequence

    async def _sequence(self, state: _Request, index: int) -> None:
        try:
            if index != state.first:
                await state.first_token.wait()  # from then on the prompt is in the cache for all
            if index != state.first and state.error is not None:
                raise state.error
            if index not in state.cancelled:
                await self._run(state, index)
        except DynamoError as error:
            log.warning("%s, sequence %d: %s", state.wire.request_id, index, error)
            state.outcome = "error"
            state.error = state.error or error
            self._close(state, index, error)
        finally:
            if index in state.cancelled and index in state.open:
                self._close(state, index, None)
            if index == state.first:
                state.first_token.set()

    async def _run(self, state: _Request, index: int) -> None:
        job = self._job(state, index)
        remote = job.remote
        try:
            async with aclosing(self._serving.engine.generate(job)) as outputs:
                async for output in outputs:
                    if isinstance(remote, CandidatePrefill):
                        remote.answered()
                    self._pass_on(state, index, output)
        finally:
            reason = remote.reason if isinstance(remote, CandidatePrefill) else NO_CANDIDATES
            self._serving.metrics.prompts.labels(reason).inc()
            if index == state.first:
                state.reason = reason
                state.predicted = _predicted(remote)
                state.chosen_by = "prefill" if isinstance(remote, CandidatePrefill) and remote.chose else "decode"

    def _job(self, state: _Request, index: int) -> Job:
        request, history = state.wire, state.histories[index]
        sampling = request.sampling.after(len(history))
        if index and sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
        job_id = request.request_id if request.n == 1 else RequestId(f"{request.request_id}-{index}")
        token_ids = request.token_ids + history if history else request.token_ids
        remote = None
        if request.prefill or request.holder is not None:
            prompt = Prompt(job_id, token_ids, request.cache_salt, state.traceparent, state.deadline, sampling)
            remote = CandidatePrefill(self._plane, prompt, request.prefill, request.holder)
        trace = {"traceparent": state.traceparent} if state.traceparent else {}
        alone = len(state.histories) == 1
        return Job(
            job_id, token_ids, sampling, request.cache_salt, remote, trace, request.held_tokens, alone, len(history)
        )  # fmt: skip

    def _pass_on(self, state: _Request, index: int, output: Output) -> None:
        cached = output.cached_tokens
        if cached is not None:
            self._serving.metrics.hit_blocks.inc(cached // self._serving.block_size)
            if index == state.first:
                state.cached_tokens = cached
        state.generated += len(output.token_ids)
        if output.finish is not None:
            state.open.discard(index)
        delta = Delta(
            state.wire.request_id,
            index,
            output.token_ids,
            output.logprobs,
            output.finish,
            output.stop_token,
            cached if index == state.first else None,
        )
        self._deltas.send(state.wire.frontend, delta)
        if index == state.first:
            state.first_token.set()


def _predicted(remote: RemotePrefill | None) -> dict[str, AttributeValue]:
    """Seconds until the first token, by each way there was a prediction for."""
    forecast = remote.forecast if isinstance(remote, CandidatePrefill) else None
    if forecast is None:
        return {}
    ways = {"pull": forecast.pull_s, "compute": forecast.compute_s, "remote": forecast.remote_s}
    return {f"predicted_{way}_s": seconds for way, seconds in ways.items() if seconds is not None}
