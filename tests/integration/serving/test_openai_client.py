"""OpenAI's own client against a real model, prefill and decode apart: what only a real engine can answer wrongly.

Every endpoint and error class is driven in tests/integration/frontend, at the speed of a simulated engine.
"""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.integration.serving.deployment import Deployment
from tests.integration.serving.requests import MODEL, client

pytestmark = pytest.mark.vllm
HI: list[Any] = [{"role": "user", "content": "Say hi. " * 60}]  # long enough for a remote prefill


def chat(api: openai.OpenAI, **fields: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0}
    answer = api.chat.completions.create(**(defaults | fields))
    assert isinstance(answer, ChatCompletion)
    return answer


def test_a_streamed_chat_says_what_the_whole_answer_says_and_counts_its_tokens(apart: Deployment) -> None:
    with client(apart) as api:
        whole = chat(api)
        chunks = list(
            api.chat.completions.create(
                model=MODEL, messages=HI, max_tokens=12, temperature=0,
                stream=True, stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_are_those_of_the_most_likely_tokens(apart: Deployment) -> None:
    with client(apart) as api:
        answer = chat(api, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs
    assert entries is not None
    assert entries.content
    for entry in entries.content:
        assert entry.logprob <= 0
        assert math.isclose(entry.logprob, max(top.logprob for top in entry.top_logprobs))  # greedy


def test_several_choices_of_a_seeded_request_differ_and_repeat(apart: Deployment) -> None:
    with client(apart) as api:
        first, again = (chat(api, n=3, seed=7, temperature=1.0) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_penalties_and_biases_reach_the_engine(apart: Deployment) -> None:
    with client(apart) as api:
        biased = chat(api, logit_bias={"100": 100}, max_tokens=4)
        penalised = chat(api, logit_bias={"100": 20}, frequency_penalty=2.0, presence_penalty=2.0)
    text = biased.choices[0].message.content or ""
    assert text == text[: len(text) // 4] * 4  # one token, four times
    assert biased.choices[0].message.content != penalised.choices[0].message.content


def test_errors_of_a_real_deployment_have_their_class(apart: Deployment) -> None:
    with client(apart) as api:
        with pytest.raises(openai.NotFoundError):
            chat(api, model="another")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            chat(api, temperature=-1)
        with pytest.raises(openai.BadRequestError, match="context"):
            api.completions.create(model=MODEL, prompt=[5] * 5000)
        assert [model.id for model in api.models.list().data] == [MODEL]
