"""Texts to token ids, a word at a time: one that has come before is only looked up.

A byte-level tokenizer (GPT-2, Llama 3, Qwen, SmolLM) cuts a text into words with regular expressions and encodes each
on its own, so a word has the same ids wherever it stands. Those of ASCII words are kept here, and a text of known words
costs a fifth of what encoding it does. The expressions are the tokenizer's own, written for ASCII as `re` takes it;
any other text, and a tokenizer that is put together in another way, is encoded by the library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import orjson
from tokenizers import Tokenizer

_MOST_WORDS = 100_000  # about 20 MB
_LONGEST_WORD = 48  # characters; longer ones hardly come again
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Classes of characters by Unicode category, as far as they are ASCII.
_ASCII = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9", "Nd": "0-9"}
_SYNTAX = re.compile(r"\\[pP]\{(\w+)\}|\\.|\[\^?|\]|[^\\\[\]]+", re.S)
_SAMPLES = (
    "Hello world, it's what we'VE 'said' -- isn't it?\n\n  Two spaces,\ttabs \r\n and an end ",
    "def f(x: int) -> str:\n    return x[0] + {'a': 1.5e-3}['a']  # 1234567 0xFF\n\n\n\nclass A_b2: ...",
    '<a href="b">&amp;</a> {"k": [1, 22, 333, 4444]}\\n $100% ~/x_y.z CamelCaseWord UPPER lower1upper2',
    "".join(map(chr, range(128))) + "".join(map(chr, range(127, -1, -1))),
)


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [value for value in range(256) if value not in printable]
    symbols = {chr(value): value for value in printable}
    symbols.update({chr(256 + place): value for place, value in enumerate(hidden)})
    return symbols


BYTE_SYMBOLS = _byte_symbols()
_ASCII_SYMBOLS = {value: symbol for symbol, value in BYTE_SYMBOLS.items() if value < 128}


class Encoder:
    """The tokenizer, without truncation and padding, and the words it has met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        plain, framed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), 0)
        self._before, self._after = framed[:start], framed[start + len(plain) :]
        self._words = _Words.of(tokenizer)
        if any(self.encode(text, False) != tokenizer.encode(text, add_special_tokens=False).ids for text in _SAMPLES):
            self._words = None

    @property
    def looks_up(self) -> bool:
        """Whether ASCII words are looked up."""
        return self._words is not None

    @property
    def kept(self) -> int:
        """Words whose ids are kept."""
        return len(self._words or ())

    def encode(self, text: str, special: bool) -> list[int]:
        """`special`: with the tokens that the model wants at a text's start and end."""
        ids = self._words.ids(text) if self._words is not None and text.isascii() else None
        if ids is None:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        return [*self._before, *ids, *self._after] if special else ids


class _Words(dict[str, tuple[int, ...]]):
    """Token ids of words, and of those added tokens that are cut out of a text first."""

    def __init__(self, tokenizer: Tokenizer, stages: Sequence[re.Pattern[str]]) -> None:
        super().__init__()
        self._model, self._stages = tokenizer.model, stages
        self._added: dict[str, int] = {}
        others = []
        for token_id, added in tokenizer.get_added_tokens_decoder().items():
            # Takes spaces with it, or depends on what is beside it or on what has become of the text before.
            if added.normalized or added.lstrip or added.rstrip or added.single_word:
                others.append(added.content)
            else:
                self._added[added.content] = token_id
        self._cut, self._not_here = _any_of([*self._added]), _any_of(others)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Words | None:
        """None where the words of a text cannot be told without the library."""
        if tokenizer.pre_tokenizer is None or _state(tokenizer.normalizer).get("type") not in (None, "NFC"):
            return None
        if getattr(tokenizer.model, "dropout", None):
            return None  # a word is encoded differently each time
        stages = _stages(_state(tokenizer.pre_tokenizer))
        return None if stages is None else cls(tokenizer, stages)

    def ids(self, text: str) -> list[int] | None:
        """Of an ASCII text; None where the library has to encode it."""
        if self._not_here.search(text):
            return None
        if not self._cut.search(text):
            return self._plain(text)
        ids: list[int] = []
        for part in self._cut.split(text):
            token_id = self._added.get(part)
            more = self._plain(part) if token_id is None else [token_id]
            if more is None:
                return None
            ids += more
        return ids

    def _plain(self, text: str) -> list[int] | None:
        words = [text]
        for stage in self._stages:
            words = stage.findall(words[0]) if len(words) == 1 else [*chain.from_iterable(map(stage.findall, words))]
        if sum(map(len, words)) != len(text):
            return None  # the expression left something out
        return [*chain.from_iterable(map(self.__getitem__, words))]

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple([token.id for token in self._model.tokenize(word.translate(_ASCII_SYMBOLS))])
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Finds the longest of those that begin at the first place where any does; splitting by it keeps what is found."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if texts else r"(?!)")


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else orjson.loads(part.__getstate__())


def _stages(state: dict[str, Any]) -> list[re.Pattern[str]] | None:
    """The expressions that cut an ASCII text one after another; the last part has to be the byte-level one."""
    parts = state.get("pretokenizers", [state])
    expressions = [_expression(part) for part in parts]
    if not parts or parts[-1].get("type") != "ByteLevel" or None in expressions:
        return None
    try:
        stages = [re.compile(one, re.ASCII) for one in expressions if one]
    except re.error:
        return None
    return stages if not any(stage.groups for stage in stages) else None


def _expression(part: dict[str, Any]) -> str | None:
    """Of one part of a pre-tokenizer; empty where it cuts nothing, None where it is not known."""
    match part:
        case {"type": "Digits", "individual_digits": individual}:
            return r"[0-9]|[^0-9]+" if individual else r"[0-9]+|[^0-9]+"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": cuts}:
            return _in_ascii(_GPT2) if cuts else ""
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return _in_ascii(expression)
    return None


def _in_ascii(expression: str) -> str | None:
    """A regular expression with Unicode categories, as `re` takes it for ASCII texts; None where that is not simple."""
    written, inside = [], False
    for found in _SYNTAX.finditer(expression):
        part, category = found[0], found[1]
        if category:
            characters = _ASCII.get(category)
            if characters is None or part[1] == "P" or not (inside or characters):
                return None
            part = characters if inside else f"[{characters}]"
        elif part.startswith("[") == inside and part[0] in "[]":
            return None  # a class within a class
        elif part[0] in "[]":
            inside = not inside
        written.append(part)
    return "".join(written)
