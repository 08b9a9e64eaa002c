"""What the tests of this folder ask a deployment."""

from __future__ import annotations

import random
from typing import Any

import openai

from tests.integration.serving.deployment import Deployment
from tests.models import VOCAB

MODEL = "tiny"
BLOCK = 32  # tokens
NEW_TOKENS = 24


def client(deployment: Deployment) -> openai.OpenAI:
    """To be used in a `with` block."""
    return openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=120)


def prompt(length: int, seed: int) -> list[int]:
    numbers = random.Random(f"{length} {seed}")
    return [numbers.randrange(3, VOCAB) for _ in range(length)]


def tokens(deployment: Deployment, token_ids: list[int], **sampling: Any) -> list[str]:
    """The generated tokens themselves: text alone could hide a difference."""
    with client(deployment) as api:
        answer = api.completions.create(
            model=MODEL,
            prompt=token_ids,
            max_tokens=NEW_TOKENS,
            logprobs=0,
            extra_body={"ignore_eos": True},
            **sampling,
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == NEW_TOKENS
    return list(logprobs.tokens)
