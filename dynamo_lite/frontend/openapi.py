"""/openapi.json: FastAPI describes the routes it knows; the two raw ASGI endpoints are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from dynamo_lite.frontend.endpoint import Endpoint

_REF = "#/components/schemas/{model}"
_FAILURES = {
    400: "The request is malformed or cannot be carried out; `param` names the field.",
    404: "The model is not served here.",
    413: "The body is too large.",
    500: "The engine failed.",
    503: "No worker can take the request; see Retry-After.",
    504: "The request's deadline passed.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every error, in OpenAI's nested shape."""

    error: ErrorDetail


def describe(app: FastAPI, endpoints: list[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _add(schemas, ErrorReply)
    for endpoint in endpoints:
        _add(schemas, endpoint.request)
        document["paths"][endpoint.path] = {"post": _operation(endpoint)}
    return document


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(model=ErrorReply.__name__)}}}
    request = {"schema": {"$ref": _REF.format(model=endpoint.request.__name__)}}
    return {
        "summary": (endpoint.request.__doc__ or "").partition("\n")[0],
        "operationId": endpoint.path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": request}},
        "responses": {
            "200": {
                "description": "The answer, or a stream of server-sent events ending with `data: [DONE]`.",
                "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
            },
            **{str(status): {"description": text, "content": error} for status, text in _FAILURES.items()},
        },
    }
