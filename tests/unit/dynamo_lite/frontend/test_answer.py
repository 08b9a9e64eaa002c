"""The bytes clients read."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from dynamo_lite.errors import ModelNotFound, WorkerLost
from dynamo_lite.frontend.answer import Answer, ChatAnswer, CompletionAnswer, error_body, error_event, usage
from dynamo_lite.frontend.choices import Piece
from dynamo_lite.frontend.tokens import Vocabulary
from dynamo_lite.plane.wire import TokenLogprob

COUNTS = usage(3, 2, 1)


def events(data: bytes) -> list[dict[str, Any]]:
    parts = data.decode().split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def answer(kind: type[Answer], tokenizer: Tokenizer, *, include_usage: bool = False) -> Answer:
    return kind("r", "m", Vocabulary(tokenizer), include_usage=include_usage)


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(bytes_tokenizer: Tokenizer) -> None:
    chat = answer(ChatAnswer, bytes_tokenizer)
    pieces = [Piece(0, 'a"\n🙂'), Piece(0, ""), Piece(0, "b"), Piece(0, "", finish="stop")]
    chunks = events(b"".join(map(chat.event, pieces)))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": 'a"\n🙂'},
        {"content": "b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-r"}
    assert "usage" not in chunks[0]
    assert chat.last_events(COUNTS) == b"data: [DONE]\n\n"


def test_every_choice_has_its_own_beginning(bytes_tokenizer: Tokenizer) -> None:
    chat = answer(ChatAnswer, bytes_tokenizer)
    chunks = events(chat.event(Piece(1, "x")) + chat.event(Piece(0, "y")) + chat.event(Piece(1, "z")))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [1, 1, 0, 0, 1]


def test_usage_comes_last_and_is_null_before(bytes_tokenizer: Tokenizer) -> None:
    text = answer(CompletionAnswer, bytes_tokenizer, include_usage=True)
    (chunk,) = events(text.event(Piece(0, "x")))
    assert chunk["usage"] is None
    last, done = text.last_events(COUNTS).split(b"\n\n")[:2]
    assert json.loads(last.removeprefix(b"data: "))["usage"] == COUNTS
    assert json.loads(last.removeprefix(b"data: "))["choices"] == []
    assert done == b"data: [DONE]"


def test_a_whole_answer_joins_the_pieces(bytes_tokenizer: Tokenizer) -> None:
    chat = answer(ChatAnswer, bytes_tokenizer)
    for piece in (Piece(1, "x"), Piece(0, "a"), Piece(0, "b", finish="stop"), Piece(1, "", finish="length")):
        chat.add(piece)
    body = json.loads(chat.body(COUNTS))
    assert body["object"] == "chat.completion"
    assert body["usage"] == COUNTS
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab", "x"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][0]["logprobs"] is None


def test_infinity_becomes_a_number(bytes_tokenizer: Tokenizer) -> None:
    chat = answer(ChatAnswer, bytes_tokenizer)
    scored = [TokenLogprob(5, float("-inf"), ((5, float("-inf")),))]
    (_, chunk) = events(chat.event(Piece(0, "x", scored)))
    (entry,) = chunk["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999.0
    assert entry["top_logprobs"][0]["logprob"] == -9999.0


def test_parts_of_a_character_are_spelt_as_bytes(bytes_tokenizer: Tokenizer) -> None:
    half, rest = bytes_tokenizer.token_to_id("Ã"), bytes_tokenizer.token_to_id("¼")  # the two bytes of ü
    assert half is not None
    assert rest is not None
    scored = [TokenLogprob(half, -1.0), TokenLogprob(rest, -1.0), TokenLogprob(half, -1.0)]
    text = answer(CompletionAnswer, bytes_tokenizer)
    (first,) = events(text.event(Piece(0, "", scored[:1])))
    (second,) = events(text.event(Piece(0, "ü", scored[1:])))
    assert first["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xc3"]
    assert second["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xbc", "bytes:\\xc3"]
    assert second["choices"][0]["logprobs"]["text_offset"] == [1, 1]


def test_errors_have_openais_nested_shape() -> None:
    body = json.loads(error_body(ModelNotFound("x", "y")))
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == "model"
    assert body["error"]["code"] == "model_not_found"
    (event,) = events(error_event(WorkerLost("decode-0", "it died")))
    assert event["error"]["code"] == "worker_lost"
    assert event["error"]["param"] is None
