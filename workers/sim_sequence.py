"""What a simulated engine's scheduler works on: prompts, and what is generated from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_lite.plane.wire import RequestId, Sampling, TokenLogprob
from kvbm.hashing import FullHash, full_block_hashes
from workers.engine import Output
from workers.sim_tokens import Sampler, fold


@dataclass(slots=True, eq=False)
class Sequence(ABC):
    """Its lengths and its blocks; what its tokens are is up to those who inherit."""

    prompt_len: int = field(init=False, default=0)
    length: int = field(init=False, default=0)  # tokens, the generated ones included
    longest: int = field(init=False, default=0)  # tokens: then it has generated all that was asked for
    generates: bool = field(init=False, default=True)  # False: its prompt is computed, and that is all
    fetch: Callable[[int], bool] | None = field(init=False, default=None)
    """Given the cached tokens: shall another worker compute the rest?"""
    fetch_end: int = field(init=False, default=0)  # up to which token it does; 0: not decided
    computed: int = field(init=False, default=0)  # tokens whose KV is in `blocks`
    cached: int | None = field(init=False, default=None)  # prompt tokens found in the pool when first admitted
    reported: bool = field(init=False, default=False)  # whether an output has said so
    blocks: list[int] = field(init=False, default_factory=list)
    committed: int = field(init=False, default=0)  # leading blocks that can be matched

    @property
    def generated(self) -> int:
        return self.length - self.prompt_len

    @abstractmethod
    def hashes(self, block_size: int) -> list[FullHash]:
        """Of all full blocks, whether their KV is computed or not."""

    @abstractmethod
    def sample(self, times: int, limit: int) -> Output:
        """Up to `times` tokens, at most up to a length of `limit`; the first that ends it is the last."""


@dataclass(slots=True, eq=False)
class TokenSequence(Sequence):
    """With tokens. `sampler` is None for a prompt that is only computed."""

    request_id: RequestId
    tokens: list[int]
    sampling: Sampling
    sampler: Sampler | None = None
    cache_salt: str | None = None
    state: int = 0
    _hashes: list[FullHash] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_len = self.length = len(self.tokens)
        self.longest = self.prompt_len + self.sampling.max_tokens
        self.generates = self.sampler is not None
        self.state = fold(0, self.tokens)

    def hashes(self, block_size: int) -> list[FullHash]:
        known = len(self._hashes)
        if len(self.tokens) // block_size > known:
            rest = self.tokens[known * block_size :]
            after = self._hashes[-1] if known else None
            salt = None if known else self.cache_salt
            self._hashes += full_block_hashes(rest, block_size, salt, after=after)
        return self._hashes

    def sample(self, times: int, limit: int) -> Output:
        assert self.sampler is not None, "nothing follows a prompt that is only computed"
        sampler, sampling, tokens, state = self.sampler, self.sampling, self.tokens, self.state
        first, logprobs = len(tokens), list[TokenLogprob]()
        stopped = full = False
        longest = min(self.longest, limit)
        if times > 1 and sampler.plain:
            more, state = sampler.many(state, min(times, longest - first))
            tokens += more
            full = len(tokens) >= longest
        while not (stopped or full) and len(tokens) - first < times:
            token, logprob = sampler.next(state, len(tokens), len(tokens) - self.prompt_len)
            tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
            state = fold(state, [token])
            stopped = token in sampling.stop_token_ids and len(tokens) - self.prompt_len >= sampling.min_tokens
            full = len(tokens) >= longest
        self.state, self.length = state, len(tokens)
        cached = None if self.reported else self.cached
        self.reported = True
        return Output(
            tokens[first:],
            logprobs or None,
            "stop" if stopped else "length" if full else None,
            tokens[-1] if stopped else None,
            cached,
        )
