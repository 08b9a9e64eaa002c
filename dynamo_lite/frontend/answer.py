"""The bodies of OpenAI's answers, whole and as server-sent events.

A streamed token costs one join of prepared bytes: all of an event but the text is rendered once per answer.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from dynamo_lite.errors import DynamoError
from dynamo_lite.frontend.choices import Piece
from dynamo_lite.frontend.tokens import Vocabulary
from dynamo_lite.plane.wire import TokenLogprob

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no infinity


def error_body(error: DynamoError) -> bytes:
    """OpenAI's nested shape."""
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    fields = {"message": str(error), "type": error.kind, "param": param, "code": code or error.kind}
    return orjson.dumps({"error": fields})


def error_event(error: DynamoError) -> bytes:
    """Ends a stream that failed, in place of `DONE`."""
    return b"data: " + error_body(error) + b"\n\n"


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Answer(ABC):
    """One answer. Use either `event` for each piece and `last_events`, or `add` for each piece and `body`."""

    id_prefix: ClassVar[str]
    whole: ClassVar[str]  # the `object` of a whole answer
    part: ClassVar[str]  # and of an event

    def __init__(self, request_id: str, model: str, vocabulary: Vocabulary, *, include_usage: bool = False) -> None:
        self.id = self.id_prefix + request_id
        self._vocabulary = vocabulary
        self._include_usage = include_usage
        self._head = {"id": self.id, "object": self.part, "created": int(time.time()), "model": model}
        self._begin = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._pieces: dict[int, list[Piece]] = {}

    def event(self, piece: Piece) -> bytes:
        """Empty when the piece shows nothing yet."""
        if not piece.text and piece.logprobs is None and piece.finish is None:
            return b""
        logprobs, finish = b"null", b"null"
        if piece.logprobs is not None:
            logprobs = orjson.dumps(self._scores(piece.index, piece.logprobs))
        if piece.finish is not None:
            finish = b'"%b"' % piece.finish.encode()
        index = b"%d," % piece.index
        fields = b',"logprobs":%b,"finish_reason":%b' % (logprobs, finish)
        return b"".join((self._opening(piece.index), self._begin, index, self._text(piece.text), fields, self._end))

    def last_events(self, counts: dict[str, Any]) -> bytes:
        if not self._include_usage:
            return DONE
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": counts}) + b"\n\n" + DONE

    def add(self, piece: Piece) -> None:
        self._pieces.setdefault(piece.index, []).append(piece)

    def body(self, counts: dict[str, Any]) -> bytes:
        choices = []
        for index, pieces in sorted(self._pieces.items()):
            scored = [one for piece in pieces for one in piece.logprobs or ()]
            has_scores = any(piece.logprobs is not None for piece in pieces)
            choices.append(
                {
                    "index": index,
                    **self._whole_text("".join(piece.text for piece in pieces)),
                    "logprobs": self._scores(index, scored) if has_scores else None,
                    "finish_reason": pieces[-1].finish,
                }
            )
        return orjson.dumps({**self._head, "object": self.whole, "choices": choices, "usage": counts})

    def _opening(self, index: int) -> bytes:
        """An event before the first one of a choice."""
        return b""

    @abstractmethod
    def _text(self, text: str) -> bytes: ...

    @abstractmethod
    def _whole_text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _scores(self, index: int, scored: Sequence[TokenLogprob]) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    id_prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, vocabulary: Vocabulary, *, include_usage: bool = False) -> None:
        super().__init__(request_id, model, vocabulary, include_usage=include_usage)
        self._opened: set[int] = set()

    def _opening(self, index: int) -> bytes:
        if index in self._opened:
            return b""
        self._opened.add(index)
        role = b'%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' % index
        return self._begin + role + self._end

    def _text(self, text: str) -> bytes:
        return b'"delta":{"content":%b}' % orjson.dumps(text) if text else b'"delta":{}'

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _scores(self, index: int, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for one in scored:
            top = [self._score(token_id, logprob) for token_id, logprob in one.top]
            content.append({**self._score(one.token_id, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _score(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._vocabulary.token_bytes(token_id)
        logprob = max(logprob, LEAST_LOGPROB)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    id_prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, request_id: str, model: str, vocabulary: Vocabulary, *, include_usage: bool = False) -> None:
        super().__init__(request_id, model, vocabulary, include_usage=include_usage)
        self._offsets: dict[int, int] = {}  # by choice: characters of text so far

    def _text(self, text: str) -> bytes:
        return b'"text":' + orjson.dumps(text)

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _scores(self, index: int, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        tokens, offsets, likeliest = [], [], []
        for one in scored:
            token = self._name(one.token_id)
            tokens.append(token)
            offsets.append(offset)
            # Counting the bytes that begin a character makes the parts of a split one add up to one.
            offset += sum(byte & 0xC0 != 0x80 for byte in self._vocabulary.token_bytes(one.token_id))
            top = {self._name(token_id): max(logprob, LEAST_LOGPROB) for token_id, logprob in one.top}
            likeliest.append({token: max(one.logprob, LEAST_LOGPROB)} | top)
        self._offsets[index] = offset
        chosen = [max(one.logprob, LEAST_LOGPROB) for one in scored]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": likeliest, "text_offset": offsets}

    def _name(self, token_id: int) -> str:
        """The token's text; as OpenAI does, bytes that are no text on their own are spelt out."""
        data = self._vocabulary.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
