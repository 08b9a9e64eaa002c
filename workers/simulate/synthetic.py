"""Traffic that was never recorded: conversations of several turns, some of which share their system prompt.

Conversations begin at random (a Poisson process). Each has one of several system prompts, popular ones more often
than others, and some turns, each after a while. A turn's prompt is all that came before it, answers included, and what
the user adds. The same seed gives the same requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Annotated

from pydantic import Field, ValidationError

from dynamo_lite.config import Model
from dynamo_lite.errors import ConfigError
from workers.simulate.trace import Request

_SPREAD = 0.8  # sigma of the lognormal lengths: the longest hundredth is some five times the mean
_BEFORE = 5  # times a conversation's mean length: what began before that has ended

Tokens = Annotated[int, Field(ge=1)]


class Synthetic(Model):
    """What is generated."""

    rate: Annotated[float, Field(gt=0)] = 4.0  # requests a second
    seconds: Annotated[float, Field(gt=0)] = 600.0  # for so long
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
        """`rate=40,seconds=300`, everything else as by default. Raises ConfigError."""
        values = dict[str, str]()
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if not equals:
                raise _wrong(f"'{part}' is not KEY=VALUE; keys are {', '.join(cls.model_fields)}")
            values[key.strip()] = value.strip()
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise _wrong(f"no key '{key}'; keys are {', '.join(cls.model_fields)}") from error
            raise _wrong(f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _wrong(problem: str) -> ConfigError:
    return ConfigError(problem, file="--synthetic")


def generate(spec: Synthetic, block: int, seed: int) -> list[Request]:
    """In the order of their times, from 0 s on. Conversations that had begun before are in the midst of it.

    `block`: tokens of a hash id. Raises ConfigError when nothing comes.
    """
    chance, ids = random.Random(seed), count()  # noqa: S311 – traffic, not secrets
    systems = [[next(ids) for _ in range(spec.system // block)] for _ in range(spec.systems)]
    weights = [(rank + 1) ** -spec.skew for rank in range(spec.systems)]
    requests: list[Request] = []
    at = -_BEFORE * spec.turns * spec.pause
    while (at := at + chance.expovariate(spec.rate / spec.turns)) < spec.seconds:
        (shared,) = chance.choices(systems, weights)
        requests += [one for one in _turns(spec, block, at, shared, chance, ids) if 0 <= one.at_s < spec.seconds]
    if not requests:
        raise _wrong(f"no request comes within {spec.seconds:g} s at a rate of {spec.rate:g}")
    return sorted(requests, key=lambda request: request.at_s)


def _turns(
    spec: Synthetic, block: int, at: float, shared: Sequence[int], chance: random.Random, ids: Iterator[int]
) -> Iterator[Request]:
    """One conversation. Blocks that are full stay the same from turn to turn."""
    blocks, before = list(shared), spec.system  # tokens that the next prompt begins with
    while True:
        prompt = before + _length(spec.prompt, chance)
        if prompt > spec.longest:
            return
        answer = _length(spec.answer, chance)
        blocks += [next(ids) for _ in range(prompt // block - len(blocks))]
        cut = [next(ids)] if prompt % block else []
        yield Request(at, prompt, answer, (*blocks, *cut))
        before = prompt + answer
        if chance.random() < 1 / spec.turns:
            return
        at += chance.expovariate(1 / spec.pause)


def _length(mean: int, chance: random.Random) -> int:
    return max(1, round(mean * math.exp(chance.gauss(-_SPREAD * _SPREAD / 2, _SPREAD))))
