"""Traffic that is made up."""

from __future__ import annotations

import statistics

import pytest

from dynamo_lite.errors import ConfigError
from workers.simulate.synthetic import Synthetic, generate
from workers.simulate.trace import Hashes, attainable

SPEC = Synthetic(rate=20, seconds=300, turns=3, pause=10, prompt=400, answer=80, system=1000, systems=4)
BLOCK = 64


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    assert generate(SPEC, BLOCK, 1) == generate(SPEC, BLOCK, 1) != generate(SPEC, BLOCK, 2)


def test_requests_come_in_order_at_the_rate_and_for_as_long_as_asked_for() -> None:
    requests = generate(SPEC, BLOCK, 1)
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 300
    assert len(requests) / 300 == pytest.approx(20, rel=0.1)
    halves = [sum(at < 150 for at in times), sum(at >= 150 for at in times)]
    assert halves[0] == pytest.approx(halves[1], rel=0.15)  # it neither begins nor ends gently
    assert statistics.mean(request.answer_tokens for request in requests) == pytest.approx(80, rel=0.1)


def test_every_prompt_has_an_id_for_each_block_and_a_later_turn_begins_with_the_one_before() -> None:
    requests = generate(SPEC, BLOCK, 1)
    seen: dict[int, tuple[int, ...]] = {}  # by the first block of its own: the full blocks of a conversation
    later = 0
    for request in requests:
        assert len(request.hash_ids) == -(-request.prompt_tokens // BLOCK)
        full = request.hash_ids[: request.prompt_tokens // BLOCK]
        own = full[SPEC.system // BLOCK :]
        if own:
            before = seen.get(own[0], ())
            assert full[: len(before)] == before
            later += bool(before)
            seen[own[0]] = full
    assert later > len(requests) / 3


def test_conversations_share_system_prompts_the_first_more_often_than_the_others() -> None:
    first = [Hashes(BLOCK).prompt(request).low[0] for request in generate(SPEC, BLOCK, 1)]
    counts = sorted((first.count(one) for one in set(first)), reverse=True)
    assert len(counts) == 4
    assert counts[0] > 1.5 * counts[-1]
    alike = SPEC.model_copy(update={"systems": 1})
    assert attainable(generate(alike, BLOCK, 1), BLOCK) > attainable(generate(SPEC, BLOCK, 1), BLOCK) > 0.5


def test_no_prompt_is_longer_than_asked_for() -> None:
    spec = SPEC.model_copy(update={"longest": 2000, "turns": 20})
    assert max(request.prompt_tokens for request in generate(spec, BLOCK, 1)) <= 2000


def test_a_text_gives_some_keys_and_leaves_the_others() -> None:
    assert Synthetic.parse("rate=20, seconds=300") == Synthetic(rate=20, seconds=300)
    assert Synthetic.parse("") == Synthetic()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rat=1", "no key 'rat'; keys are rate, seconds"),
        ("rate", "'rate' is not KEY=VALUE"),
        ("rate=fast", "rate: input should be a valid number"),
        ("rate=0", "rate: input should be greater than 0"),
        ("turns=0.5", "turns: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_key_or_value_is_said(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--synthetic: {problem}"):
        Synthetic.parse(text)


def test_a_load_without_requests_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no request comes"):
        generate(Synthetic(rate=1e-6, seconds=1, pause=1), BLOCK, 0)
