"""From the bytes of a body to a request, or to an error that names the field."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from dynamo_lite.errors import RequestError
from dynamo_lite.frontend.openai import UNSUPPORTED, ChatRequest, Common, CompletionRequest

R = TypeVar("R", bound=Common)


def parse_request(body: bytes | bytearray, kind: type[R]) -> R:
    """Raises RequestError."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
            None,
            "invalid_json",
        ) from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.", None, "invalid_json")
    _refuse_other_fields(fields, kind)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _named(error) from None
    _check_together(request)
    return request


def _refuse_other_fields(fields: dict[str, Any], kind: type[Common]) -> None:
    unsupported = UNSUPPORTED[kind]
    for name in fields.keys() - kind.model_fields.keys():
        neutral = unsupported.get(name)
        if neutral is None:
            near = difflib.get_close_matches(name, [*kind.model_fields, *unsupported], 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise RequestError(f"Unknown field '{name}'.{hint}", name, "unknown_parameter")
        value = fields.pop(name)
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise RequestError(
                f"'{name}' is not supported by this server" + ("." if value is True else " with this value."),
                name,
                "unsupported_parameter",
            )


def _named(error: ValidationError) -> RequestError:
    """The first error, with its place as `messages[0].content`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return RequestError(f"The field '{param}' is missing.", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return RequestError(f"Unknown field '{param}'.", param, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removesuffix(".")
    verb = "" if first["type"] == "value" else "should be " if first["msg"].startswith("Input should be ") else ""
    return RequestError(f"'{param}' {verb}{message}.", param, "invalid_value")


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _check_together(request: Common) -> None:
    """Fields that contradict each other."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("'stream_options' needs 'stream': true.", "stream_options", "invalid_value")
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true.", "top_logprobs", "invalid_value")
        both = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                "'max_tokens' and 'max_completion_tokens' differ; give one.", "max_tokens", "invalid_value"
            )
        if request.max_tokens == 0:
            raise RequestError("'max_tokens' should be at least 1.", "max_tokens", "invalid_value")
    if isinstance(request, CompletionRequest):
        if request.echo and request.logprobs is not None:
            raise RequestError(
                "'logprobs' together with 'echo' is not supported: prompt tokens are not scored.",
                "logprobs",
                "unsupported_parameter",
            )
        if request.max_tokens == 0 and not request.echo:
            raise RequestError("'max_tokens' should be at least 1 without 'echo'.", "max_tokens", "invalid_value")
