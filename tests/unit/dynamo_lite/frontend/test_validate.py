"""Bodies become requests, or errors that name the field."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.errors import RequestError
from dynamo_lite.frontend.openai import ChatRequest, Common, CompletionRequest
from dynamo_lite.frontend.validate import parse_request

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return parse_request(orjson.dumps({"model": "m", "messages": MESSAGES, **fields}), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(orjson.dumps({"model": "m", "prompt": "hi", **fields}), CompletionRequest)


def refused(fields: dict[str, Any], kind: type[Common] = ChatRequest) -> RequestError:
    base = {"messages": MESSAGES} if kind is ChatRequest else {"prompt": "hi"}
    with pytest.raises(RequestError) as caught:
        parse_request(orjson.dumps({"model": "m", **base, **fields}), kind)
    assert caught.value.param is not None
    assert caught.value.param in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 7}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*MESSAGES, {"role": "robot", "content": ""}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_completions_refuse_by_name_too(fields: dict[str, Any], param: str) -> None:
    assert refused(fields, CompletionRequest).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"audio": {}},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "low"},
        {"store": True},
    ],
)
def test_what_openai_has_and_we_do_not_is_refused_not_ignored(fields: dict[str, Any]) -> None:
    assert refused(fields).code == "unsupported_parameter"


@pytest.mark.parametrize(
    "fields",
    [{"tools": []}, {"tools": None}, {"response_format": {"type": "text"}}, {"store": False}, {"user": "u"}],
)
def test_unsupported_fields_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


def test_an_unknown_field_is_refused_with_the_nearest_known_one() -> None:
    error = refused({"temprature": 1})
    assert error.param == "temprature"
    assert "'temperature'" in str(error)
    assert error.code == "unknown_parameter"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'"x"', b'{"a": NaN}', b"\xff", b'{"a": "\\ud800"}'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, ChatRequest)
    assert caught.value.code in ("invalid_json",)


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 2], [[1], [2, 3]]])
def test_prompts_are_texts_or_token_ids(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == prompt


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


def test_null_means_default() -> None:
    names = set(Common.model_fields) - {"model"}
    request = chat(**dict.fromkeys(names))
    assert request.stop == []
    assert request.n is None


@given(
    st.dictionaries(
        st.sampled_from(sorted({*ChatRequest.model_fields, "tools", "nonsense"})),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_json_is_a_request_or_a_request_error(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    with contextlib.suppress(RequestError):  # any other exception would be a bug
        parse_request(body, ChatRequest)
