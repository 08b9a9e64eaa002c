"""A prompt computed in one step leaves the prefill worker layer by layer, while that step goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.serving.deployment import Deployment, until
from tests.integration.serving.requests import BLOCK, MODEL, client, prompt, tokens
from tests.models import LAYERS

pytestmark = pytest.mark.vllm

PIECE_BLOCKS = 64  # of one layer


def pushed(apart: Deployment, together: Deployment, length: int) -> tuple[int, int]:
    """Pieces of a prompt of that length, and how many of these were left after its last step. Tokens are compared.

    First with the prefill worker's own first token, so that nobody is done before that worker has answered; and, of
    another prompt, token by token.
    """
    first, second = prompt(length, 30), prompt(length, 31)
    texts = []
    for deployment in (apart, together):
        with client(deployment) as api:
            more = {"ignore_eos": True}
            answer = api.completions.create(model=MODEL, prompt=first, max_tokens=64, temperature=0, extra_body=more)
            texts.append(answer.choices[0].text)
    assert texts[0] == texts[1]

    def spans() -> list[dict[str, Any]]:
        found = [span["attributes"] for span in apart.spans() if span["name"] == "prefill"]
        return [span for span in found if span["prompt_tokens"] == length]

    until(lambda: bool(spans()), f"the span of a prompt of {length} tokens")
    (span,) = spans()
    assert tokens(apart, second, temperature=0) == tokens(together, second, temperature=0)
    return span["pieces"], span["late_pieces"]


def test_pieces_leave_before_the_only_step_ends_and_tokens_are_identical(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    found = [pushed(apart_by_layer, together, length) for length in (1800, 1900, 2000, PIECE_BLOCKS * BLOCK)]
    assert {pieces for pieces, _ in found} == {LAYERS}
    left = [late for _, late in found]
    assert max(left) < LAYERS, "some have left before the end of the step"
    assert min(left) == 1, "where nothing else uses the processor the last layer alone is left"


def test_layers_larger_than_a_piece_are_cut_and_tokens_are_identical(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    pieces, late = pushed(apart_by_layer, together, 3900)
    assert pieces == 2 * LAYERS
    assert 2 <= late < pieces


def test_a_prompt_that_fits_a_piece_leaves_at_the_end_of_its_step(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    assert pushed(apart_by_layer, together, 500) == (1, 1)
