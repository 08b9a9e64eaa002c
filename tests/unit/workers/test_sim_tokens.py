from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from dynamo_lite.errors import StartError
from dynamo_lite.plane.wire import Sampling
from workers.sim_tokens import Sampler, SimModel, fold

PLAIN = SimModel(tuple(range(10, 110)), 200, 512, 64)


def draw(sampling: Sampling, seed: int = 0, count: int = 200) -> list[int]:
    sampler = Sampler(PLAIN, sampling, seed)
    return [sampler.next(state, 7, 0)[0] for state in range(count)]


def test_folding_a_prompt_in_parts_gives_the_state_of_the_whole() -> None:
    tokens = [5, 0, 9, 9, 1]
    assert fold(fold(0, tokens[:2]), tokens[2:]) == fold(0, tokens)


def test_the_order_of_tokens_matters() -> None:
    assert fold(0, [1, 2]) != fold(0, [2, 1])


def test_greedy_tokens_are_the_same_with_and_without_logprobs() -> None:
    greedy = draw(Sampling(max_tokens=1, temperature=0.0))
    assert greedy == draw(Sampling(max_tokens=1, temperature=0.0, logprobs=3), seed=9)
    assert len(set(greedy)) > 50


@pytest.mark.parametrize("narrow", [{}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.3}, {"temperature": 0.2}])
def test_sampled_tokens_are_the_same_with_and_without_logprobs(narrow: dict[str, float]) -> None:
    sampled = draw(Sampling(max_tokens=1, **narrow), seed=9)  # type: ignore[arg-type]
    assert sampled == draw(Sampling(max_tokens=1, logprobs=3, **narrow), seed=9)  # type: ignore[arg-type]


def test_a_seed_decides_sampled_tokens() -> None:
    sampling = Sampling(max_tokens=1, temperature=1.0)
    assert draw(sampling, seed=1) == draw(sampling, seed=1)
    assert draw(sampling, seed=1) != draw(sampling, seed=2)


def test_low_temperature_follows_greedy_more_often_than_high() -> None:
    greedy = draw(Sampling(max_tokens=1, temperature=0.0))

    def agreement(temperature: float) -> int:
        drawn = draw(Sampling(max_tokens=1, temperature=temperature), seed=3)
        return sum(a == b for a, b in zip(greedy, drawn, strict=True))

    assert agreement(0.1) > agreement(1.0) > agreement(10.0)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_narrowing_to_one_candidate_is_greedy(narrow: dict[str, float]) -> None:
    sampling = Sampling(max_tokens=1, temperature=1.0, **narrow)  # type: ignore[arg-type]
    assert draw(sampling, seed=4) == draw(Sampling(max_tokens=1, temperature=0.0))


def test_logprobs_are_sorted_sum_to_at_most_one_and_hold_the_chosen_token() -> None:
    sampler = Sampler(PLAIN, Sampling(max_tokens=1, temperature=1.0, logprobs=20), 5)
    for state in range(50):
        token, logprob = sampler.next(state, 3, 0)
        assert logprob is not None
        values = [value for _, value in logprob.top]
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) == pytest.approx(1.0)
        assert len({other for other, _ in logprob.top}) == 20
        assert (token, logprob.logprob) in logprob.top


def test_logprobs_of_zero_alternatives_still_name_the_token() -> None:
    token, logprob = Sampler(PLAIN, Sampling(max_tokens=1, temperature=0.0, logprobs=0), 5).next(1, 1, 0)
    assert logprob is not None
    assert logprob.token_id == token
    assert logprob.top == ()


def test_a_strong_bias_forces_and_forbids_tokens() -> None:
    forced = draw(Sampling(max_tokens=1, temperature=0.0, logit_bias={77: 100.0}))
    assert Counter(forced) == {77: 200}
    greedy = draw(Sampling(max_tokens=1, temperature=0.0))
    banned = draw(Sampling(max_tokens=1, temperature=0.0, logit_bias={greedy[0]: -100.0}))
    assert greedy[0] not in banned


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    greedy = draw(Sampling(max_tokens=9, temperature=0.0))
    sampler = Sampler(PLAIN, Sampling(max_tokens=9, temperature=0.0, min_tokens=4, stop_token_ids=(greedy[0],)), 0)
    assert sampler.next(0, 7, 3)[0] != greedy[0]
    assert sampler.next(0, 7, 4)[0] == greedy[0]


def test_special_ids_are_never_words(tmp_path: Path) -> None:
    config = {"vocab_size": 9, "eos_token_id": [2, 3], "pad_token_id": 0, "num_hidden_layers": 2, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = SimModel.read(tmp_path)
    assert model.words == (1, 4, 5, 6, 7, 8)
    assert model.kv_values == 2 * 2 * 8


def test_words_of_a_tokenizer_are_preferred(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    vocab = {"Ġword" + "abcdefghij"[i // 10] + "abcdefghij"[i % 10]: i for i in range(100)} | {"\x80": 100, "Ġ7": 101}
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"id": 5}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert SimModel.read(tmp_path).words == tuple(i for i in range(100) if i != 5)


def test_a_folder_without_a_configuration_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"config\.json is not a model configuration"):
        SimModel.read(tmp_path)


def test_a_vocabulary_of_special_tokens_is_a_start_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1, "eos_token_id": 0}))
    with pytest.raises(StartError, match="no ordinary token"):
        SimModel.read(tmp_path)


@pytest.mark.parametrize("count", [63, 64, 65, 1000])
def test_folding_many_tokens_at_once_gives_the_state_of_folding_them_one_by_one(count: int) -> None:
    tokens = [(i * 7919) % 200_000 for i in range(count)]
    state = 5
    for token in tokens:
        state = fold(state, [token])
    assert fold(5, tokens) == state


def test_many_tokens_at_once_are_those_that_follow_one_by_one() -> None:
    sampler = Sampler(PLAIN, Sampling(max_tokens=50, temperature=0.0), 0)
    state, expected = 9, []
    for position in range(50):
        token, _ = sampler.next(state, position, position)
        expected.append(token)
        state = fold(state, [token])
    assert sampler.many(9, 50) == (expected, state)
    assert sampler.plain


@pytest.mark.parametrize("more", [{"temperature": 1.0}, {"logprobs": 1}, {"stop_token_ids": (5,)}])
def test_a_sampler_that_needs_more_than_the_state_is_not_plain(more: dict[str, object]) -> None:
    sampling = Sampling(**{"max_tokens": 5, "temperature": 0.0} | more)  # type: ignore[arg-type]
    assert not Sampler(PLAIN, sampling, 0).plain
