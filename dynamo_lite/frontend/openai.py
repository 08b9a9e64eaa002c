"""The request bodies of the OpenAI API: what is accepted, and what is known but not supported.

The models both validate and appear in /openapi.json. Values are checked strictly: "5" is not a number. A
field that would change the answer and is not supported here is an error, never silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_STOPS = 4
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_IDS = 128


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def _check_prompt(value: object) -> str | list[str] | list[int] | list[list[int]]:
    """Own checks: a union would report an error for each of a million tokens in each of its branches."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds in ({str}, {int}) or (kinds == {list} and all(set(map(type, part)) == {int} for part in value)):
            return value
    raise _wrong("must be a text, a list of texts, a list of token ids, or a list of lists of token ids; not empty")


def _check_stop(value: object) -> list[str]:
    stops: list[object] = [] if value is None else value if isinstance(value, list) else [value]
    texts = []
    if len(stops) > MAX_STOPS:
        raise _wrong(f"must be at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise _wrong(f"must be a string, or a list of strings, of 1 to {MAX_STOP_LENGTH} characters each")
        texts.append(stop)
    return texts


def _check_content(value: object) -> str:
    """A text, or text parts; parts are joined by a line break."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong("must be a text or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _wrong(f"part {place}: only parts of type 'text' are supported, not {kind!r}")
        text = part.get("text")
        if not isinstance(text, str):
            raise _wrong(f"part {place}: 'text' must be a string")
        texts.append(text)
    return "\n".join(texts)


def _check_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong("must be an object that maps token ids to numbers")
    bias = {}
    for key, number in value.items():
        if not isinstance(key, str) or not key.isdecimal() or not key.isascii():
            raise _wrong(f"has the key {key!r}; keys must be token ids")
        if isinstance(number, bool) or not isinstance(number, int | float) or not -100 <= number <= 100:
            raise _wrong(f"has the value {number!r} for token {key}; values must be numbers from -100 to 100")
        bias[int(key)] = float(number)
    return bias


_TEXT: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}


def _schema(*options: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(options)})


def _array(items: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    _schema(_TEXT, _array(_TEXT), _IDS, _array(_IDS)),
]
Stop = Annotated[
    list[str],
    PlainValidator(_check_stop),
    _schema(_TEXT, _array(_TEXT, maxItems=MAX_STOPS), {"type": "null"}),
]
Content = Annotated[str, PlainValidator(_check_content), _schema(_TEXT, _array(_PART, minItems=1))]
Bias = Annotated[
    dict[int, float],
    PlainValidator(_check_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Body(BaseModel):
    """Base of all request parts."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted, without effect.")


class Common(Body):
    """What both kinds of generation share."""

    model: str
    max_tokens: int | None = Field(None, ge=0, description="Default: what is left of the context.")
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Bias | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_IDS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, max_length=256, description="Requests share cached prefixes per salt.")
    user: str | None = Field(None, description="Accepted, without effect.")


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ChatRequest(Common):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] | None = Field(None, description="Accepted, without effect.")
    safety_identifier: str | None = Field(None, description="Accepted, without effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted, without effect.")


class CompletionRequest(Common):
    """Body of POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None


# Fields of OpenAI's API that are not supported, with the values that ask for nothing and so are accepted.
UNSUPPORTED: dict[type[Common], dict[str, tuple[object, ...]]] = {
    ChatRequest: {
        "audio": (None,),
        "function_call": (None, "none", "auto"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "parallel_tool_calls": (None, True, False),
        "prediction": (None,),
        "prompt_cache_retention": (None,),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "verbosity": (None,),
        "web_search_options": (None,),
    },
    CompletionRequest: {"best_of": (None, 1), "suffix": (None, "")},
}
