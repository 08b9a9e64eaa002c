"""Prefill requests of decode workers, pulls among them: compute what is not here, push, reply."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

import msgspec
from opentelemetry.trace import Span

from dynamo_lite.errors import DynamoError, PlaneError, PrefillFailed
from dynamo_lite.plane.wire import Cancel, FirstToken, PrefillReply, PrefillRequest, WireError, decode, encode
from dynamo_lite.telemetry import AttributeValue, spanning, traceparent
from workers.engine import PrefillJob
from workers.pulls import REFUSALS
from workers.serving import InFlight, Serving

log = logging.getLogger(__name__)

_PUBLISH_S = 1.0


class Prefills:
    """Everything this worker computes for others.

    A reply means that nothing more is written to the target, so a cancelled request is answered too, after the
    engine has let go of it.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._in_flight = InFlight(serving.changed)
        self._answers: set[asyncio.Task[Any]] = set()  # they end once the reply has been published
        self.served = 0

    def __len__(self) -> int:
        return len(self._answers)

    async def answer(self, data: bytes) -> bytes:
        """Handler of the prefill subject; each call has a task of its own."""
        answering = asyncio.current_task()
        assert answering is not None, "runs as a task"
        self._answers.add(answering)
        answering.add_done_callback(self._answers.discard)
        request = decode(data, PrefillRequest)
        if self._serving.early_cancels.take(request.request_id):
            return encode(PrefillReply(error=WireError.of(PrefillFailed("cancelled", "before it came"))))
        if request.request_id in self._in_flight:
            raise PrefillFailed("duplicate", f"{request.request_id} is in flight already")
        started = time.monotonic()
        reply: asyncio.Future[PrefillReply] = asyncio.get_running_loop().create_future()
        task = self._serving.group.create_task(self._compute(request, reply))
        self._in_flight.start(request.request_id, task)
        await asyncio.wait((task,))
        self.served += 1
        if not reply.done():
            self._ended(request, "cancelled")
            return encode(PrefillReply(error=WireError.of(PrefillFailed("cancelled"))))
        found = reply.result()
        self._ended(request, "ok" if found.error is None else "error")
        return encode(msgspec.structs.replace(found, seconds=time.monotonic() - started))

    def _ended(self, request: PrefillRequest, outcome: str) -> None:
        if request.only_held:
            self._serving.metrics.pulls.labels("out", outcome).inc()
        else:
            self._serving.metrics.ended(outcome)

    def cancel(self, cancel: Cancel) -> bool:
        """False when no such request is here."""
        return self._in_flight.cancel(cancel.request_id)

    def cancel_all(self) -> None:
        self._in_flight.cancel_all()

    async def idle(self) -> None:
        """Returns once every reply is out."""
        while self._answers:
            await asyncio.wait(self._answers)

    async def _compute(self, request: PrefillRequest, reply: asyncio.Future[PrefillReply]) -> None:
        attributes: dict[str, AttributeValue] = {
            "request.id": request.request_id,
            "worker": self._serving.name,
            "prompt_tokens": len(request.token_ids),
            "first_block": request.target.first_block,
            "blocks": request.target.num_blocks,
            "pull": request.only_held,
        }
        with spanning("prefill", request.traceparent, attributes=attributes) as span:
            reply.set_result(await self._push(request, span))

    async def _push(self, request: PrefillRequest, span: Span) -> PrefillReply:
        job = PrefillJob(
            request.request_id,
            request.token_ids,
            request.target,
            request.cache_salt,
            request.timeout_ms / 1000,
            request.sampling,
            partial(self._first_token, request) if request.sampling is not None else None,
            request.only_held,
            request.leaving,
        )
        metrics = self._serving.metrics
        try:
            done = await self._serving.engine.prefill(job)
        except DynamoError as error:
            cause = error.cause if isinstance(error, PrefillFailed) else error.kind
            if cause in REFUSALS:
                log.info("%s: %s", request.request_id, error)
            else:
                log.warning("%s: %s", request.request_id, error)
                metrics.failures.labels(cause).inc()
                metrics.transfer_failures.labels("out", cause).inc()
            span.set_attribute("outcome", cause)
            return PrefillReply(error=WireError.of(error), traceparent=traceparent(span))
        metrics.transferred("out", done.transfer)
        if not request.only_held:
            metrics.prompt_tokens.inc(len(request.token_ids))
            metrics.hit_blocks.inc(done.cached_tokens // self._serving.block_size)
        span.set_attribute("outcome", "ok")
        span.set_attribute("cached_tokens", done.cached_tokens)
        span.set_attribute("pieces", done.transfer.pieces)
        span.set_attribute("late_pieces", done.transfer.late_pieces)
        return PrefillReply(done.cached_tokens, traceparent=traceparent(span), first_token=done.first_token)

    def _first_token(self, request: PrefillRequest, token_id: int) -> None:
        self._serving.group.create_task(self._publish(request, FirstToken(request.request_id, token_id)))

    async def _publish(self, request: PrefillRequest, told: FirstToken) -> None:
        try:
            async with asyncio.timeout(_PUBLISH_S):
                await self._serving.bus.publish(self._serving.subjects.first_token(request.target.decode), encode(told))
        except (PlaneError, TimeoutError) as error:
            log.info("%s: its first token comes with the reply: %s", request.request_id, error)
