"""A prompt computed in one step leaves the prefill worker layer by layer, while that step goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.serving.deployment import Deployment, until
from tests.integration.serving.requests import BLOCK, prompt, tokens
from tests.models import LAYERS

pytestmark = pytest.mark.vllm

PIECE_BLOCKS = 64  # of one layer


def prefill_of(deployment: Deployment, length: int) -> dict[str, Any]:
    """The attributes of the span of a prompt of that length."""

    def found() -> list[dict[str, Any]]:
        spans = [span["attributes"] for span in deployment.spans() if span["name"] == "prefill"]
        return [span for span in spans if span["prompt_tokens"] == length]

    until(lambda: bool(found()), f"the span of a prompt of {length} tokens")
    return found()[-1]


def test_pieces_leave_before_the_only_step_ends_and_tokens_are_identical(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    late = []
    for length in (1800, 1900, 2000, PIECE_BLOCKS * BLOCK):
        token_ids = prompt(length, 30)
        assert tokens(apart_by_layer, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)
        span = prefill_of(apart_by_layer, length)
        assert span["pieces"] == LAYERS
        assert span["late_pieces"] < LAYERS, "none has left before the end of the step"
        late.append(span["late_pieces"])
    assert min(late) == 1, "where nothing else uses the processor the last layer alone is left"


def test_layers_larger_than_a_piece_are_cut_and_tokens_are_identical(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    token_ids = prompt(3900, 31)
    assert tokens(apart_by_layer, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)
    span = prefill_of(apart_by_layer, 3900)
    assert span["pieces"] == 2 * LAYERS
    assert span["late_pieces"] < 2 * LAYERS


def test_a_prompt_that_fits_a_piece_leaves_at_the_end_of_its_step(
    apart_by_layer: Deployment, together: Deployment
) -> None:
    token_ids = prompt(500, 32)
    assert tokens(apart_by_layer, token_ids, temperature=0) == tokens(together, token_ids, temperature=0)
    span = prefill_of(apart_by_layer, 500)
    assert (span["pieces"], span["late_pieces"]) == (1, 1)
