"""Traffic that was never recorded: conversations of several turns, some of which share their system prompt.

Conversations begin at random (a Poisson process). Each has one of several system prompts, popular ones more often
than others, and some turns, each after a while. A turn's prompt is all that came before it, answers included, and what
the user adds. The same seed gives the same requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated

from pydantic import Field, ValidationError

from dynamo_lite.config import Model
from dynamo_lite.errors import TraceError
from workers.simulate.trace import Request

_SPREAD = 0.8  # sigma of the lognormal lengths: the longest hundredth is some five times the mean

Tokens = Annotated[int, Field(ge=1)]


class Synthetic(Model):
    """What is generated."""

    rate: Annotated[float, Field(gt=0)] = 4.0  # requests a second
    seconds: Annotated[float, Field(gt=0)] = 600.0  # in which conversations begin
    turns: Annotated[float, Field(ge=1)] = 3.0  # of a conversation, on average
    pause: Annotated[float, Field(gt=0)] = 60.0  # seconds from one turn to the next, on average
    prompt: Tokens = 3000  # tokens that a turn adds, on average
    answer: Tokens = 300  # on average
    systems: Annotated[int, Field(ge=1)] = 8  # different system prompts
    system: Annotated[int, Field(ge=0)] = 2000  # tokens of each
    skew: Annotated[float, Field(ge=0)] = (
        1.0  # of their popularity: the n-th is used n^-skew times as often as the first
    )
    longest: Tokens = 120_000  # tokens of a prompt; a conversation ends before it

    @classmethod
    def parse(cls, text: str) -> Synthetic:
        """`rate=40,seconds=300`, everything else as by default. Raises TraceError."""
        values = dict[str, str]()
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if not equals:
                raise TraceError("--synthetic", 0, f"'{part}' is not KEY=VALUE; keys are {', '.join(cls.model_fields)}")
            values[key.strip()] = value.strip()
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise TraceError("--synthetic", 0, f"no key '{key}'; keys are {', '.join(cls.model_fields)}") from error
            raise TraceError("--synthetic", 0, f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


@dataclass(slots=True)
class _Conversation:
    """How far it has come."""

    tokens: int  # of the next prompt, without what its user adds
    blocks: list[int] = field(default_factory=list)  # ids of its full blocks


def generate(spec: Synthetic, block: int, seed: int) -> list[Request]:
    """In the order of their times."""
    chance, ids = random.Random(seed), count()  # noqa: S311 – traffic, not secrets
    systems = [[next(ids) for _ in range(spec.system // block)] for _ in range(spec.systems)]
    weights = [(rank + 1) ** -spec.skew for rank in range(spec.systems)]
    requests: list[Request] = []
    at = 0.0
    while (at := at + chance.expovariate(spec.rate / spec.turns)) < spec.seconds:
        (shared,) = chance.choices(systems, weights)
        talk = _Conversation(spec.system, list(shared))
        requests += _turns(spec, block, at, talk, chance, ids)
    if not requests:
        raise TraceError("--synthetic", 0, f"no request comes within {spec.seconds:g} s at a rate of {spec.rate:g}")
    return sorted(requests, key=lambda request: request.at_s)


def _turns(  # noqa: PLR0913 – one walk through a conversation
    spec: Synthetic, block: int, at: float, talk: _Conversation, chance: random.Random, ids: Iterator[int]
) -> Iterator[Request]:
    while True:
        prompt = talk.tokens + _length(spec.prompt, chance)
        if prompt > spec.longest:
            return
        answer = _length(spec.answer, chance)
        talk.blocks += [next(ids) for _ in range(prompt // block - len(talk.blocks))]
        cut = [next(ids)] if prompt % block else []
        yield Request(at, prompt, answer, (*talk.blocks, *cut))
        talk.tokens = prompt + answer
        if chance.random() < 1 / spec.turns:
            return
        at += chance.expovariate(1 / spec.pause)


def _length(mean: int, chance: random.Random) -> int:
    return max(1, round(mean * math.exp(chance.gauss(-_SPREAD * _SPREAD / 2, _SPREAD))))
