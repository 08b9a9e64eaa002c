"""The application: the generating endpoints as raw ASGI; and with FastAPI the small ones, errors and /openapi.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Literal

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route

from dynamo_lite.errors import ModelNotFound, NoInstance, RequestError
from dynamo_lite.frontend.answer import error_body
from dynamo_lite.frontend.endpoint import Endpoint, Service, endpoints
from dynamo_lite.frontend.exchange import Receive, Scope, Send
from dynamo_lite.frontend.openapi import ErrorReply, describe


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dynamo-lite"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["live", "ready", "waiting"]
    reason: str = ""


class Application:
    """The generating endpoints directly; all else by FastAPI, whose layers would cost every event of a stream."""

    def __init__(self, generating: Sequence[Endpoint], others: FastAPI) -> None:
        self._generating: dict[tuple[object, ...], Endpoint] = {
            ("http", "POST", endpoint.path): endpoint for endpoint in generating
        }
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._generating.get((scope["type"], scope.get("method"), scope.get("path")))
        await (self._others if endpoint is None else endpoint)(scope, receive, send)


def build_app(service: Service, *, with_metrics: bool, connected: Callable[[], bool]) -> Application:
    """`connected`: whether the control plane can be reached at this moment."""
    app = FastAPI(title="dynamo-lite", version=version("dynamo-lite"), docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    generating = endpoints(service)
    for endpoint in generating:
        app.router.routes.append(Route(endpoint.path, endpoint, methods=["POST"]))  # so that a GET is not allowed
    app.add_exception_handler(HTTPException, _http_error)
    _add_models(app, service.model)
    _add_health(app, service, connected)
    if with_metrics:

        @app.get("/metrics")
        def metrics() -> Response:  # not async: a scrape takes tens of ms, and a thread keeps tokens flowing
            return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    described = cache(lambda: describe(app, generating))
    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way
    return Application(generating, app)


def _add_models(app: FastAPI, model: str) -> None:
    card = ModelCard(id=model, created=int(time.time()))

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses={404: {"model": ErrorReply}})
    async def one_model(name: str) -> ModelCard | Response:
        if name != model:
            return _error(ModelNotFound(name, model))
        return card


def _add_health(app: FastAPI, service: Service, connected: Callable[[], bool]) -> None:
    @app.get("/health/live")
    async def live() -> Health:
        return Health(status="live")

    @app.get("/health/ready", responses={503: {"model": Health}})
    async def ready(response: Response) -> Health:
        """Whether a request would be served now."""
        try:
            service.max_model_len()
        except NoInstance as error:
            response.status_code = 503
            return Health(status="waiting", reason=str(error))
        if not connected():
            response.status_code = 503
            return Health(status="waiting", reason="NATS cannot be reached")
        return Health(status="ready")


def _error(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(error), error.status, headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses, in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    place = f"{request.method} {request.url.path}"
    known = {404: ("not_found", f"There is no {place}."), 405: ("method_not_allowed", f"{place} is not allowed.")}
    code, message = known.get(status, ("http_error", str(error)))
    body = error_body(RequestError(message, None, code))
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return Response(body, status, headers, "application/json")
