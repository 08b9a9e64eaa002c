"""Token ids to text, a few tokens at a time, never splitting a character.

Two ways, both giving exactly what decoding all tokens at once gives. Where the tokenizer is byte-level
(GPT-2, Llama 3, Qwen, SmolLM) every token is a byte string, so an incremental UTF-8 decoder does it in
constant time. Any other decoder (SentencePiece with byte fallback, WordPiece) may change a token's text by
its neighbours, so a short window is decoded again and the known part cut off.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding an incomplete character yields
LONGEST_CHARACTER = 4  # bytes, and so tokens, of one UTF-8 character
_UTF8 = codecs.getincrementaldecoder("utf-8")
CONTEXT = 6  # prompt tokens that shape the first generated token's text (a leading space, a split character)


class Detokeniser(Protocol):
    """The text of one sequence as it grows."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back: a character that never became complete."""
        ...


class ByteDetokeniser:
    """For tokenizers whose tokens are byte strings.

    `token_text` gives the text of a token of whole characters, None for any other.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        token_text: Callable[[int], str | None],
        context: Sequence[int],
    ) -> None:
        self._token_bytes, self._token_text = token_bytes, token_text
        self._decoder = _UTF8("replace")
        self._within = False  # a character has begun
        last = token_bytes(context[-1]) if context else b""
        if not last or last[-1] >= 0x80:  # a prompt may end inside a character
            for token_id in context[-CONTEXT:]:
                self._decode(token_bytes(token_id))

    def push(self, token_id: int) -> str:
        if not self._within:
            text = self._token_text(token_id)
            if text is not None:
                return text
        return self._decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)

    def _decode(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        self._within = bool(self._decoder.getstate()[0])
        return text


class WindowDetokeniser:
    """For any tokenizer: decodes a window of recent tokens and keeps what is new.

    The text of the window's first `read` tokens has been given out. A text that ends in the
    replacement character may become another one with the next token, so it waits, but not for longer than a
    character can be.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: Container[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._special = special
        self._ids = [token_id for token_id in context[-CONTEXT:] if token_id not in special]
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        if token_id in self._special:  # has no text, and a run of them must not make the window long
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < LONGEST_CHARACTER:
            return ""
        return self._take(text)

    def finish(self) -> str:
        if self._read == len(self._ids):
            return ""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        known = self._decode(self._ids[: self._read])
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(known) :]
