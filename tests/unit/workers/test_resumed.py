"""A sequence that is cut at any token and goes on at another engine is the one that was not cut."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from dynamo_lite.plane.wire import FrontendId as Frontend
from dynamo_lite.plane.wire import GenerateRequest, Incarnation, RequestId, Resumed, Role, Sampling, TokenLogprob
from tests.sim_engines import VOCAB, sim_spec, write_model
from workers.engine import Job, Output
from workers.resumed import carried
from workers.sim_engine import SimEngine

SAMPLING = st.builds(
    Sampling,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**31),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.lists(st.integers(4, VOCAB - 1), max_size=60).map(tuple),
    logprobs=st.sampled_from([None, 0, 2]),
)
Said = tuple[list[int], list[TokenLogprob], str | None, int | None]


def said(outputs: list[Output]) -> Said:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    return tokens, logprobs, outputs[-1].finish, outputs[-1].stop_token


async def generate(folder: Path, token_ids: list[int], sampling: Sampling, resumed: int = 0) -> Said:
    spec = sim_spec(folder, "decode-0", Role.DECODE, {})
    engine = SimEngine(spec, Role.DECODE, Incarnation("engine"), CollectorRegistry())
    engine.prepare()
    await engine.start()
    try:
        async with aclosing(engine.generate(Job(RequestId("r"), token_ids, sampling, resumed=resumed))) as outputs:
            return said([output async for output in outputs])
    finally:
        await engine.close()


@settings(max_examples=80, deadline=None)
@given(sampling=SAMPLING, prompt=st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=40), data=st.data())
def test_whatever_the_sampling_and_wherever_the_cut(sampling: Sampling, prompt: list[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        tokens, logprobs, finish, stop = asyncio.run(generate(folder, prompt, sampling))
        cut = data.draw(st.integers(0, len(tokens) - 1))
        rest = asyncio.run(generate(folder, prompt + tokens[:cut], sampling.after(cut), cut))
    assert rest == (tokens[cut:], logprobs[cut:] if logprobs else [], finish, stop)


def test_what_is_left_is_counted_from_the_cut() -> None:
    whole = Sampling(max_tokens=10, min_tokens=4, seed=3)
    assert whole.after(0) is whole
    assert whole.after(3) == Sampling(max_tokens=7, min_tokens=1, seed=3)
    assert whole.after(9) == Sampling(max_tokens=1, min_tokens=0, seed=3)


def test_a_request_says_what_the_client_has_of_each_sequence() -> None:
    new = GenerateRequest(RequestId("r"), Frontend("f"), [1], Sampling(4), n=2)
    assert new.histories == {0: [], 1: []}
    resumed = (Resumed(1, [5, 6]),)
    assert GenerateRequest(RequestId("r"), Frontend("f"), [1], Sampling(4), n=2, resumed=resumed).histories == {
        1: [5, 6]
    }


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_seed_goes_on_as_another_one_that_depends_on_nothing_but_the_cut(seed: int) -> None:
    sampling = Sampling(9, seed=seed)
    seeds = [carried(sampling, [5] * count).seed for count in range(50)]
    assert seeds[0] == seed
    assert seeds == [carried(sampling, [6] * count).seed for count in range(50)]
    assert len(set(seeds)) == 50
    assert all(one is not None and 0 <= one < 2**63 for one in seeds)
    assert carried(Sampling(9), [5]).seed is None


def test_penalties_of_what_was_said_before_the_cut_go_on_as_a_bias() -> None:
    sampling = Sampling(9, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={7: 1.0, 8: 2.0})
    assert carried(sampling, [7, 9, 7]).logit_bias == {7: 1.0 - 1.25, 8: 2.0, 9: -0.75}
    assert carried(sampling, []) is sampling
    assert carried(Sampling(9, repetition_penalty=1.2), [7, 9, 7]) == Sampling(9, repetition_penalty=1.2)
