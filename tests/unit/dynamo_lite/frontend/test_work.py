"""Requests in the terms of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_lite.errors import RequestError
from dynamo_lite.frontend.openai import ChatRequest, CompletionRequest
from dynamo_lite.frontend.tokens import Tokens, load_tokens
from dynamo_lite.frontend.work import Work, prepare

LIMIT = 100


@pytest.fixture
def tokens(model_path: Path) -> Tokens:
    return load_tokens(model_path)


async def completion(tokens: Tokens, **fields: Any) -> Work:
    return await prepare(CompletionRequest.model_validate({"model": "m", "prompt": [5, 6]} | fields), tokens, LIMIT)


async def chat(tokens: Tokens, **fields: Any) -> Work:
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return await prepare(ChatRequest.model_validate(base | fields), tokens, LIMIT)


async def test_what_is_left_of_the_context_is_the_default_length(tokens: Tokens) -> None:
    work = await completion(tokens, prompt=[[5], [5, 6, 7]])
    assert [task.sampling.max_tokens for task in work.tasks] == [99, 97]


async def test_prompt_and_answer_may_fill_the_context_exactly(tokens: Tokens) -> None:
    work = await completion(tokens, prompt=[5] * 60, max_tokens=40)
    assert work.tasks[0].sampling.max_tokens == 40


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt": [5] * 100}, "prompt"), ({"prompt": [5] * 61, "max_tokens": 40}, "max_tokens")]
)
async def test_more_than_the_context_is_refused(tokens: Tokens, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="context length is 100") as caught:
        await completion(tokens, **fields)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == param


async def test_the_newer_name_of_max_tokens_is_named_in_its_error(tokens: Tokens) -> None:
    with pytest.raises(RequestError) as caught:
        await chat(tokens, max_completion_tokens=100)
    assert caught.value.param == "max_completion_tokens"


async def test_end_tokens_join_the_clients_unless_ignored(tokens: Tokens) -> None:
    assert (await completion(tokens)).tasks[0].sampling.stop_token_ids == tokens.eos_ids
    both = await completion(tokens, stop_token_ids=[9, 2])
    assert both.tasks[0].sampling.stop_token_ids == (9, 2, 0)
    ignoring = await completion(tokens, stop_token_ids=[9], ignore_eos=True)
    assert ignoring.tasks[0].sampling.stop_token_ids == (9,)


async def test_defaults_ask_for_plain_sampling(tokens: Tokens) -> None:
    sampling = (await chat(tokens)).tasks[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.logprobs, sampling.seed) == (1.0, None, None)


async def test_zero_is_not_taken_for_absent(tokens: Tokens) -> None:
    sampling = (await completion(tokens, temperature=0, seed=0, logprobs=0)).tasks[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0.0, 0, 0)


async def test_top_k_minus_one_means_all(tokens: Tokens) -> None:
    assert (await completion(tokens, top_k=-1)).tasks[0].sampling.top_k == 0


async def test_a_developer_is_a_system_to_the_template(tokens: Tokens) -> None:
    texts = []
    for role in ("developer", "system"):
        work = await chat(tokens, messages=[{"role": role, "content": "x"}, {"role": "user", "content": "y"}])
        texts.append(work.tasks[0].token_ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [[5], [-1]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"min_tokens": 99}, "min_tokens"),
        ({"prompt": ["x"] * 9, "n": 128}, "n"),
        ({"prompt": ["x"] * 257}, "prompt"),
    ],
)
async def test_the_impossible_is_refused_by_name(tokens: Tokens, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await completion(tokens, **fields)
    assert caught.value.param == param
