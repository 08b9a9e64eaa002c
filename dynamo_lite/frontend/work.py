"""A validated request in the terms of the engine: token ids, sampling, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from dynamo_lite.errors import RequestError
from dynamo_lite.frontend.openai import MAX_PROMPTS, ChatRequest, CompletionRequest
from dynamo_lite.frontend.tokens import Tokens
from dynamo_lite.plane.wire import Sampling

MAX_SEQUENCES = 1024  # of one request


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt, to be continued `n` times."""

    token_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Work:
    """Everything one HTTP request asks for. Choice `i` of prompt `p` has the index `p * n + i`."""

    chat: bool
    tasks: tuple[Task, ...]
    n: int
    stops: tuple[str, ...]
    logprobs: int | None  # alternatives to show; None: no log-probabilities at all
    stream: bool
    include_usage: bool
    echo: bool
    cache_salt: str | None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(task.token_ids) for task in self.tasks)


async def prepare(request: ChatRequest | CompletionRequest, tokens: Tokens, max_model_len: int) -> Work:
    """Raises RequestError when the request cannot be carried out by this model."""
    prompts = await _prompts(request, tokens)
    n = request.n or 1
    if n * len(prompts) > MAX_SEQUENCES:
        raise RequestError(
            f"'n' times the number of prompts is {n * len(prompts)}; the most is {MAX_SEQUENCES}.", "n", "invalid_value"
        )
    _check_ids(request, prompts, tokens.size)
    source = "messages" if isinstance(request, ChatRequest) else "prompt"
    return Work(
        chat=isinstance(request, ChatRequest),
        tasks=tuple(
            Task(prompt, _sampling(request, tokens, _room(request, len(prompt), max_model_len, source)))
            for prompt in prompts
        ),
        n=n,
        stops=tuple(request.stop),
        logprobs=_logprobs(request),
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
        cache_salt=request.cache_salt or None,
    )


async def _prompts(request: ChatRequest | CompletionRequest, tokens: Tokens) -> list[list[int]]:
    if isinstance(request, ChatRequest):
        # "developer" is OpenAI's newer name of "system"; chat templates know only the older.
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            | ({"name": message.name} if message.name else {})
            for message in request.messages
        ]
        return [await tokens.encode_chat(messages)]
    given = request.prompt
    single = isinstance(given, str) or isinstance(given[0], int)  # the type of the first is the type of all
    parts = cast("list[str | list[int]]", [given] if single else given)
    if len(parts) > MAX_PROMPTS:
        raise RequestError(f"'prompt' holds {len(parts)} prompts; the most is {MAX_PROMPTS}.", "prompt")
    prompts = [await tokens.encode(part) if isinstance(part, str) else part for part in parts]
    if not all(prompts):
        raise RequestError("'prompt' is empty: this model needs at least one token to start from.", "prompt")
    return prompts


def _check_ids(request: ChatRequest | CompletionRequest, prompts: list[list[int]], size: int) -> None:
    """Ids outside the vocabulary would read outside the model's tables."""
    given = {
        "stop_token_ids": request.stop_token_ids or [],
        "logit_bias": list(request.logit_bias or ()),
        "prompt": []
        if isinstance(request, ChatRequest)
        else [bound for ids in prompts for bound in (min(ids), max(ids))],
    }
    for param, ids in given.items():
        for token_id in ids:
            if not 0 <= token_id < size:
                raise RequestError(
                    f"'{param}' has the token id {token_id}; this model's are 0 to {size - 1}.",
                    param,
                    "invalid_value",
                )


def _room(request: ChatRequest | CompletionRequest, prompt: int, limit: int, source: str) -> int:
    """The tokens to generate at most."""
    wanted, param = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        wanted, param = request.max_completion_tokens, "max_completion_tokens"
    left = limit - prompt
    if left < (1 if wanted is None else wanted):
        asked = f"the prompt has {prompt} tokens" + (f" and '{param}' asks for {wanted} more" if wanted else "")
        raise RequestError(
            f"This model's context length is {limit} tokens, but {asked}.",
            source if left < 1 or wanted is None else param,
            "context_length_exceeded",
        )
    room = left if wanted is None else wanted
    if (request.min_tokens or 0) > room:
        raise RequestError(
            f"'min_tokens' is {request.min_tokens}, above the {room} tokens that can be generated.",
            "min_tokens",
            "invalid_value",
        )
    return room


def _sampling(request: ChatRequest | CompletionRequest, tokens: Tokens, max_tokens: int) -> Sampling:
    ends = dict.fromkeys(request.stop_token_ids or ())
    if not request.ignore_eos:
        ends.update(dict.fromkeys(tokens.eos_ids))

    def or_default(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    return Sampling(
        max_tokens=max_tokens,
        temperature=or_default(request.temperature, 1.0),
        top_p=or_default(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=or_default(request.min_p, 0.0),
        seed=request.seed,
        presence_penalty=or_default(request.presence_penalty, 0.0),
        frequency_penalty=or_default(request.frequency_penalty, 0.0),
        repetition_penalty=or_default(request.repetition_penalty, 1.0),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(ends),
        logprobs=_logprobs(request),
        logit_bias=request.logit_bias,
    )


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs
