"""The two endpoints that generate: /v1/chat/completions and /v1/completions, as raw ASGI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from dynamo_lite.errors import DeadlineExceeded, DynamoError, ModelNotFound
from dynamo_lite.frontend import metrics
from dynamo_lite.frontend.answer import Answer, ChatAnswer, CompletionAnswer
from dynamo_lite.frontend.decisions import HEADER as ROUTE
from dynamo_lite.frontend.decisions import header as route_header
from dynamo_lite.frontend.exchange import ClientGone, Exchange, Receive, Scope, Send
from dynamo_lite.frontend.generate import Backend
from dynamo_lite.frontend.openai import ChatRequest, CompletionRequest
from dynamo_lite.frontend.progress import Progress
from dynamo_lite.frontend.tokens import Tokens
from dynamo_lite.frontend.validate import parse_request
from dynamo_lite.frontend.work import Work, prepare
from dynamo_lite.tasks import background
from dynamo_lite.telemetry import spanning, traceparent

CLIENT_CLOSED = 499  # nginx's name for a reply nobody waited for; only in metrics and traces

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints work with."""

    model: str
    tokens: Tokens
    backend: Backend
    series: metrics.ModelMetrics
    max_body: int
    timeout_s: float
    max_model_len: Callable[[], int]  # raises NoInstance


class Endpoint:
    """An ASGI application that answers one path."""

    def __init__(
        self,
        service: Service,
        path: str,
        request: type[ChatRequest] | type[CompletionRequest],
        answer: type[Answer],
    ) -> None:
        self.path, self.request = path, request
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        parent = exchange.header(b"traceparent")
        metrics.IN_FLIGHT.inc()
        with spanning(f"POST {self.path}", parent, SpanKind.SERVER, record_exception=False) as span:
            if own := traceparent(span):
                exchange.extra_headers.append((b"traceparent", own.encode()))
            try:
                await self._serve(exchange, span)
            except ClientGone:
                metrics.cancelled(self.path).inc()
                exchange.status = CLIENT_CLOSED
            finally:
                metrics.IN_FLIGHT.dec()
                metrics.requests(self.path, exchange.status or CLIENT_CLOSED).inc()
                if span.is_recording():
                    span.set_attribute("http.request.method", "POST")
                    span.set_attribute("http.route", self.path)
                    span.set_attribute("http.response.status_code", exchange.status or CLIENT_CLOSED)

    async def _serve(self, exchange: Exchange, span: Span) -> None:
        """Every way a request can end, as OpenAI's clients understand it."""
        timeout_s = self._service.timeout_s
        started = perf_counter()
        error: DynamoError
        try:
            async with asyncio.timeout(timeout_s):
                body = await exchange.body(self._service.max_body)
                request = parse_request(body, self.request)
                if request.model != self._service.model:
                    raise ModelNotFound(request.model, self._service.model)
                async with background(exchange.gone()):
                    await self._generate(exchange, request, span, started)
            return
        except ClientGone:
            raise
        except TimeoutError:
            error = DeadlineExceeded("the request", timeout_s)
        except DynamoError as known:
            error = known
        except Exception:  # a bug; this request ends, the others go on
            log.exception("request %s failed", exchange.request_id)
            error = DynamoError("internal error; the frontend's log says more")
        span.set_status(Status(StatusCode.ERROR, str(error)))
        span.set_attribute("error.type", error.kind)
        await exchange.fail(error)

    async def _generate(
        self, exchange: Exchange, request: ChatRequest | CompletionRequest, span: Span, started: float
    ) -> None:
        service = self._service
        work = await prepare(request, service.tokens, service.max_model_len())
        answer = self._answer(
            exchange.request_id, service.model, service.tokens.vocabulary, include_usage=work.include_usage
        )
        progress = Progress(work, service.tokens.vocabulary, service.series, started)
        try:
            await self._run(exchange, work, answer, progress)
        finally:
            progress.finish()
            if span.is_recording():
                _describe(span, service.model, work, answer.id, progress)

    async def _run(self, exchange: Exchange, work: Work, answer: Answer, progress: Progress) -> None:
        """One write per wake-up: everything that has gathered goes out together."""
        left_s = self._service.timeout_s
        call = self._service.backend.call(work, traceparent(), left_s, exchange.request_id)
        if exchange.header(ROUTE):
            exchange.late_headers = partial(route_header, call.placements)
        opening = list(progress.echo())
        async with aclosing(call.deltas()) as batches:
            async for batch in batches:
                pieces, opening = opening, []
                for prompt, delta in batch:
                    piece, stopped = progress.take(prompt, delta)
                    if piece is not None:
                        pieces.append(piece)
                    if stopped:
                        await call.stop(prompt, delta.index)
                if not work.stream:
                    for piece in pieces:
                        answer.add(piece)
                elif events := b"".join(map(answer.event, pieces)):
                    await exchange.write(events)
        if work.stream:
            await exchange.end(b"".join(map(answer.event, opening)) + answer.last_events(progress.usage))
        else:
            for piece in opening:
                answer.add(piece)
            await exchange.reply(200, answer.body(progress.usage))


def endpoints(service: Service) -> list[Endpoint]:
    return [
        Endpoint(service, "/v1/chat/completions", ChatRequest, ChatAnswer),
        Endpoint(service, "/v1/completions", CompletionRequest, CompletionAnswer),
    ]


def _describe(span: Span, model: str, work: Work, answer_id: str, progress: Progress) -> None:
    """OpenTelemetry's names for generative AI, and beside them the ones vLLM uses."""
    sampling = work.tasks[0].sampling
    span.set_attributes(
        {
            "gen_ai.operation.name": "chat" if work.chat else "text_completion",
            "gen_ai.provider.name": "dynamo_lite",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": work.n,
            "gen_ai.response.id": answer_id,
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": progress.finish_reasons,
            "gen_ai.usage.input_tokens": work.prompt_tokens,
            "gen_ai.usage.output_tokens": progress.generated,
            "gen_ai.usage.cache_read.input_tokens": progress.cached,
            "gen_ai.usage.prompt_tokens": work.prompt_tokens,
            "gen_ai.usage.completion_tokens": progress.generated,
        }
    )
    if progress.first_token_s is not None:
        span.set_attribute("gen_ai.latency.time_to_first_token", progress.first_token_s)
