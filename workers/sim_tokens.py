"""The simulated engine's "model": the next token is a pure function of all tokens before it.

Whatever way a prompt's KV came to be (computed, found, pushed by a peer, computed again after a preemption), the
output is the same, which is what tests of everything around the engine need.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from dynamo_lite.errors import StartError
from dynamo_lite.plane.wire import Sampling, TokenLogprob

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_CANDIDATES = 20  # as many as OpenAI's top_logprobs can ask for
_WORD = re.compile(r"[Ġ▁]?[A-Za-z]+")
_MANY = 64  # tokens from which on numpy is faster
_FEWEST_WORDS = 64  # below this a vocabulary is not of words, and any ordinary id will do


def mix(value: int) -> int:
    """splitmix64's finaliser: every input bit changes about half of the output bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def fold(state: int, token_ids: list[int]) -> int:
    """The state after `token_ids` (each below 2⁶³); folding a list in parts gives the same as folding it whole."""
    if len(token_ids) >= _MANY:
        return _fold_many(state, token_ids)
    for token in token_ids:
        state = (state * _ODD + token + 1) & _MASK
    return state


def _fold_many(state: int, token_ids: list[int]) -> int:
    """`fold` as one polynomial, whose terms are summed modulo 2⁶⁴."""
    count = len(token_ids)
    powers = _powers(1 << count.bit_length())
    ids = np.frombuffer(array("q", token_ids), dtype=np.int64).astype(np.uint64) + np.uint64(1)
    return (state * int(powers[count]) + int(np.dot(ids, powers[count - 1 :: -1]))) & _MASK


@cache
def _powers(count: int) -> npt.NDArray[np.uint64]:
    """Of `_ODD`, from the 0th on."""
    factors = np.full(count, _ODD, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def _fraction(bits: int) -> float:
    return bits / 2.0**64


@dataclass(frozen=True, slots=True)
class SimModel:
    """What the simulation takes from a model folder; no weights are read."""

    words: tuple[int, ...]  # ids it may emit: printable, none of them special
    vocab_size: int
    max_model_len: int  # tokens
    kv_values: int  # numbers of KV per token over all layers

    @classmethod
    def read(cls, folder: Path) -> SimModel:
        """Raises StartError when there is no usable config.json."""
        try:
            config = json.loads((folder / "config.json").read_bytes())
            vocab_size = int(config["vocab_size"])
            heads = int(config.get("num_attention_heads", 1))
            head_dim = int(config.get("head_dim") or int(config.get("hidden_size", 64)) // heads)
            kv_heads = int(config.get("num_key_value_heads", heads))
            layers = int(config.get("num_hidden_layers", 1))
            longest = int(config.get("max_position_embeddings", 2048))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartError(
                "sim engine", f"{folder / 'config.json'} is not a model configuration: {error!r}"
            ) from error
        words = _printable(folder / "tokenizer.json", vocab_size) or _ordinary(config, vocab_size)
        return cls(words, vocab_size, longest, 2 * layers * kv_heads * head_dim)


class _Token(msgspec.Struct):
    id: int


class _TokenizerModel(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerFile(msgspec.Struct):
    """Of several megabytes only these are read."""

    model: _TokenizerModel
    added_tokens: list[_Token] = []


def _printable(tokenizer: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids of whole words in a Hugging Face tokenizer; none when there is no such file or it has too few."""
    if not tokenizer.exists():
        return ()
    try:
        content = msgspec.json.decode(tokenizer.read_bytes(), type=_TokenizerFile)
    except msgspec.MsgspecError:
        return ()  # the frontend, which needs it, says what is wrong
    vocab = content.model.vocab
    special = {token.id for token in content.added_tokens}
    entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    words = sorted(i for text, i in entries if i not in special and i < vocab_size and _WORD.fullmatch(text))
    return tuple(words) if len(words) >= _FEWEST_WORDS else ()


def _ordinary(config: dict[str, object], vocab_size: int) -> tuple[int, ...]:
    """Every id that config.json does not give a meaning of its own."""
    special: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    ids = tuple(i for i in range(vocab_size) if i not in special)
    if not ids:
        raise StartError("sim engine", f"a vocabulary of {vocab_size} leaves no ordinary token")
    return ids


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, shape: SimModel, sampling: Sampling, seed: int) -> None:
        self._words = shape.words
        self._sampling = sampling
        self._seed = mix(seed * _ODD & _MASK)
        self._stops = frozenset(sampling.stop_token_ids)
        usual = sampling.logprobs is None and not sampling.logit_bias
        self._greedy = usual and sampling.temperature == 0
        # Then every token is drawn with the same chances by rank.
        self._chances = _usual_chances(_shape(sampling), min(_CANDIDATES, len(shape.words))) if usual else ()

    @property
    def plain(self) -> bool:
        """Whether nothing but the state decides on a token."""
        return self._greedy and not self._stops

    def many(self, state: int, count: int) -> tuple[list[int], int]:
        """The next tokens after `state`, and the state after them. For a `plain` sampler, and much faster."""
        words, tokens = self._words, list[int]()
        for _ in range(count):
            token = words[mix(state) % len(words)]
            tokens.append(token)
            state = (state * _ODD + token + 1) & _MASK
        return tokens, state

    def next(self, state: int, position: int, generated: int) -> tuple[int, TokenLogprob | None]:
        """The token after `state` at `position`, and its logprobs when asked for."""
        banned = self._stops if generated < self._sampling.min_tokens else frozenset()
        key, words = mix(state), self._words
        if self._greedy:
            token = words[key % len(words)]
            if token not in banned:
                return token, None
        bits = mix(key ^ self._seed ^ mix(position))
        if self._chances and not banned:
            return words[(key + _rank(self._chances, bits)) % len(words)], None
        logits = self._logits(key, banned)
        chosen = list(logits)[_rank(_chances(logits.values(), _shape(self._sampling)), bits)]
        return chosen, self._logprob(chosen, logits)

    def _logits(self, key: int, banned: frozenset[int]) -> dict[int, float]:
        """Candidates, likeliest first."""
        count = min(_CANDIDATES + len(banned), len(self._words))
        logits = {self._words[(key + rank) % len(self._words)]: _logit(rank) for rank in range(count)}
        for token, bias in (self._sampling.logit_bias or {}).items():
            logits[token] = logits.get(token, -20.0) + bias
        allowed = {token: logit for token, logit in logits.items() if token not in banned}
        return dict(sorted((allowed or logits).items(), key=lambda item: -item[1]))

    def _logprob(self, chosen: int, logits: dict[int, float]) -> TokenLogprob | None:
        if self._sampling.logprobs is None:
            return None
        best = max(logits.values())
        log_sum = best + math.log(sum(math.exp(logit - best) for logit in logits.values()))
        top = tuple((token, logit - log_sum) for token, logit in logits.items())
        return TokenLogprob(chosen, logits[chosen] - log_sum, top[: self._sampling.logprobs])


def _logit(rank: int) -> float:
    return -0.7 * rank


_Shape = tuple[float, int, float, float]  # temperature, top-k, top-p, min-p


def _shape(sampling: Sampling) -> _Shape:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


@lru_cache(256)
def _usual_chances(shape: _Shape, count: int) -> list[float]:
    return _chances(map(_logit, range(count)), shape)


def _chances(logits: Iterable[float], shape: _Shape) -> list[float]:
    """Running sums of the weights of candidates, likeliest first: temperature, top-k, top-p and min-p, in vLLM's order
    of meaning. Penalties are not simulated.
    """
    temperature, top_k, top_p, min_p = shape
    values = list(logits)
    if temperature == 0:
        return [1.0]
    weights = [math.exp((logit - values[0]) / temperature) for logit in values]
    sums = list(accumulate([weight for weight in weights if weight >= min_p][: top_k or None]))  # the best weighs 1
    return sums[: bisect_left(sums, top_p * sums[-1]) + 1]


def _rank(chances: list[float], bits: int) -> int:
    return min(bisect_right(chances, _fraction(bits) * chances[-1]), len(chances) - 1)
