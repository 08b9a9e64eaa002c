"""Traces in Mooncake's format: one JSON object a line, with `timestamp` (ms), `input_length` and `output_length`
(tokens) and `hash_ids`, which name the blocks of the prompt, the last of which may be cut off.

Equal ids are equal blocks, as long as all before them are equal too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from dynamo_lite.errors import TraceError
from kvbm.hashing import ROOT, FullHash, HashedPrompt

BLOCK = 512  # tokens of a block in Mooncake's own traces
FORMAT = '{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one for each block]}'


@dataclass(frozen=True, slots=True)
class Request:
    """One line."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    hash_ids: tuple[int, ...]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: tuple[int, ...]


def read_trace(file: Path, block: int = BLOCK) -> list[Request]:
    """In the order of their times. `block`: tokens that an id stands for. Raises TraceError with the line."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(str(file), 0, error.strerror or str(error)) from error
    decode = msgspec.json.Decoder(_Line).decode
    requests = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.ValidationError as error:
            raise TraceError(str(file), number, f"{str(error)[:1].lower()}{str(error)[1:]}") from error
        except msgspec.DecodeError as error:
            hint = f"not a line of a trace in Mooncake's format, {FORMAT}"
            raise TraceError(str(file), number, hint) from error
        if problem := _problem(line, block):
            raise TraceError(str(file), number, problem)
        requests.append(Request(line.timestamp / 1000, line.input_length, max(1, line.output_length), line.hash_ids))
    if not requests:
        raise TraceError(str(file), 0, "it has no requests")
    return sorted(requests, key=lambda request: request.at_s)


def _problem(line: _Line, block: int) -> str | None:
    ids, length = len(line.hash_ids), line.input_length
    if ids == -(-length // block):
        return None
    return (
        f"{ids} hash_ids do not fit input_length {length}: blocks of {block} tokens would be {-(-length // block)}; "
        "--trace-block says how many tokens an id stands for"
    )


def write_trace(file: Path, requests: Iterable[Request]) -> None:
    """Raises TraceError."""
    encode = msgspec.json.encode
    try:
        with file.open("wb") as out:
            for request in requests:
                line = _Line(
                    round(request.at_s * 1000, 3), request.prompt_tokens, request.answer_tokens, request.hash_ids
                )
                out.write(encode(line) + b"\n")
    except OSError as error:
        raise TraceError(str(file), 0, error.strerror or str(error)) from error


class Hashes:
    """Block hashes for the ids of a trace, and for blocks of answers, which nobody asks for again."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._known: dict[tuple[FullHash, int], FullHash] = {}
        self._answers = 0

    def prompt(self, request: Request) -> HashedPrompt:
        """Chained: the hash of a block stands for all before it as well."""
        known, after, full = self._known, ROOT, list[FullHash]()
        for number in request.hash_ids[: request.prompt_tokens // self.block]:
            key = after, number
            found = known.get(key)
            if found is None:
                found = known[key] = FullHash(hashlib.sha256(b"%b %d" % key).digest())
            full.append(found)
            after = found
        return HashedPrompt(request.prompt_tokens, self.block, full)

    def answer(self) -> FullHash:
        """Of a block like no other."""
        self._answers += 1
        return FullHash(hashlib.sha256(b"answer %d" % self._answers).digest())


def attainable(requests: Sequence[Request], block: int) -> float:
    """The hit rate of one worker that forgets nothing: it finds whole blocks only, and computes the last token.

    Of all blocks, those that are cut off included.
    """
    hashes, seen = Hashes(block), set[FullHash]()
    hits = total = 0
    for request in requests:
        full = hashes.prompt(request).full
        most = full[: (request.prompt_tokens - 1) // block]
        hits += next((n for n, one in enumerate(most) if one not in seen), len(most))
        total += -(-request.prompt_tokens // block)
        seen.update(full)
    return hits / total
