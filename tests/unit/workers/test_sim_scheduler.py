from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.wire import RequestId, Sampling
from kvbm.events import BlocksRemoved, BlocksStored
from kvbm.hashing import block_hashes
from kvbm.pool import BlockPool
from workers.engine import Output
from workers.sim_scheduler import Scheduler
from workers.sim_sequence import Sequence, TokenSequence
from workers.sim_tokens import Sampler, SimModel

MODEL = SimModel(tuple(range(10, 110)), 200, 4096, 64)
BLOCK = 4


def name_of(sequence: Sequence) -> str:
    assert isinstance(sequence, TokenSequence)
    return sequence.request_id


@dataclass
class Batch:
    """A scheduler and what came out of it."""

    blocks: int = 32
    max_num_seqs: int = 8
    budget: int = 64
    outputs: dict[str, list[Output]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks)
        self.scheduler = Scheduler(self.pool, BLOCK, self.max_num_seqs, self.budget)

    def add(self, name: str, tokens: list[int], max_tokens: int = 4, **sampling: object) -> TokenSequence:
        wanted = Sampling(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
        sequence = TokenSequence(RequestId(name), list(tokens), wanted, Sampler(MODEL, wanted, 0))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> int:
        """Tokens computed."""
        step = self.scheduler.plan()
        for sequence, output in self.scheduler.finish(step):
            self.outputs.setdefault(name_of(sequence), []).append(output)
        self.pool.check()
        return sum(step.tokens.values())

    def run(self, most: int = 1000) -> None:
        for _ in range(most):
            step = self.scheduler.plan()
            for sequence, output in self.scheduler.finish(step):
                self.outputs.setdefault(name_of(sequence), []).append(output)
            self.pool.check()
            if not step.tokens and not step.preempted:
                return
        raise AssertionError("does not come to rest")

    def text(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + i * 7) % 190 for i in range(length)]


def test_a_sequence_ends_at_max_tokens_and_frees_its_blocks() -> None:
    batch = Batch()
    batch.add("a", prompt(9), max_tokens=5)
    batch.run()
    assert len(batch.text("a")) == 5
    assert [output.finish for output in batch.outputs["a"]] == [None] * 4 + ["length"]
    assert batch.pool.pinned == 0


def test_a_sequence_ends_with_a_stop_token_as_its_last() -> None:
    batch = Batch()
    batch.add("free", prompt(9), max_tokens=6)
    batch.run()
    stop = batch.text("free")[3]
    batch.add("stopped", prompt(9), max_tokens=6, stop_token_ids=(stop,))
    batch.run()
    end = batch.text("free").index(stop) + 1
    assert batch.text("stopped") == batch.text("free")[:end]
    assert (batch.outputs["stopped"][-1].finish, batch.outputs["stopped"][-1].stop_token) == ("stop", stop)


def test_a_sequence_ends_at_the_context_length() -> None:
    batch = Batch()
    batch.scheduler.max_model_len = 12
    batch.add("a", prompt(9), max_tokens=50)
    batch.run()
    assert len(batch.text("a")) == 3
    assert batch.outputs["a"][-1].finish == "length"


def test_prompts_share_the_token_budget_of_a_step() -> None:
    batch = Batch(budget=10)
    batch.add("a", prompt(16), max_tokens=3)
    batch.add("b", prompt(8, 50), max_tokens=3)
    assert batch.step() == 10
    assert batch.step() == 6 + 4  # the rest of a, the first half of b
    assert list(batch.outputs) == ["a"]
    assert batch.step() == 1 + 4
    assert len(batch.outputs["a"]) == 2
    assert len(batch.outputs["b"]) == 1


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12), (17, 16)])
def test_a_repeated_prompt_hits_all_but_the_last_token_in_whole_blocks(length: int, cached: int) -> None:
    batch = Batch()
    batch.add("first", prompt(length), max_tokens=1)
    batch.run()
    batch.add("again", prompt(length), max_tokens=1)
    assert batch.step() == length - cached
    assert batch.outputs["again"][0].cached_tokens == cached
    assert batch.text("again") == batch.text("first")


def test_only_the_first_output_says_what_was_cached() -> None:
    batch = Batch()
    batch.add("a", prompt(9))
    batch.run()
    assert [output.cached_tokens for output in batch.outputs["a"]] == [0, None, None, None]


def test_a_salt_keeps_prompts_apart() -> None:
    batch = Batch()
    batch.add("a", prompt(9), max_tokens=1)
    batch.run()
    salted = batch.add("b", prompt(9), max_tokens=1)
    salted.cache_salt = "tenant"
    batch.run()
    assert batch.outputs["b"][0].cached_tokens == 0


def test_events_carry_the_hashes_of_prompt_and_generated_tokens() -> None:
    batch = Batch()
    sequence = batch.add("a", prompt(6), max_tokens=4)
    batch.run()
    hashes = block_hashes(sequence.tokens, BLOCK)
    # The last token's KV is never computed, so 9 of 10 tokens fill two blocks.
    assert batch.pool.events() == (BlocksStored((hashes[0],)), BlocksStored((hashes[1],), hashes[0]))


def test_eviction_is_announced() -> None:
    batch = Batch(blocks=4)
    batch.add("a", prompt(13), max_tokens=1)
    batch.run()
    batch.pool.events()
    batch.add("b", prompt(13, 90), max_tokens=1)
    batch.run()
    removed = [event for event in batch.pool.events() if isinstance(event, BlocksRemoved)]
    assert {block_hash for event in removed for block_hash in event.hashes} == set(block_hashes(prompt(13), BLOCK))


def test_the_youngest_sequence_is_preempted_and_its_output_is_the_same_in_the_end() -> None:
    alone: dict[str, list[int]] = {}
    for name, start in (("a", 0), ("b", 60)):
        roomy = Batch()
        roomy.add(name, prompt(8, start), max_tokens=8)
        roomy.run()
        alone[name] = roomy.text(name)
    batch = Batch(blocks=6)
    batch.add("a", prompt(8), max_tokens=8)
    batch.add("b", prompt(8, 60), max_tokens=8)
    preempted = 0
    for _ in range(100):
        step = batch.scheduler.plan()
        preempted += step.preempted
        for sequence, output in batch.scheduler.finish(step):
            batch.outputs.setdefault(name_of(sequence), []).append(output)
        batch.pool.check()
    assert preempted > 0
    assert {name: batch.text(name) for name in alone} == alone
    assert [output.finish for output in batch.outputs["a"]].index("length") == 7
    assert batch.pool.pinned == 0


def test_a_prompt_waits_until_blocks_are_free() -> None:
    batch = Batch(blocks=4)
    batch.add("a", prompt(12), max_tokens=2)
    batch.add("b", prompt(12, 70), max_tokens=2)
    batch.step()
    assert (batch.scheduler.running, batch.scheduler.waiting) == (1, 1)
    batch.run()
    assert len(batch.text("b")) == 2


def test_no_more_sequences_run_than_allowed() -> None:
    batch = Batch(max_num_seqs=2)
    for name in "abc":
        batch.add(name, prompt(5, ord(name)))
    batch.step()
    assert (batch.scheduler.running, batch.scheduler.waiting) == (2, 1)


def test_a_removed_sequence_frees_its_blocks_in_the_middle_of_a_step() -> None:
    batch = Batch()
    sequence = batch.add("a", prompt(9))
    step = batch.scheduler.plan()
    batch.scheduler.remove(sequence)
    assert batch.pool.pinned == 0
    assert batch.scheduler.finish(step) == []
    batch.scheduler.remove(sequence)  # harmless
    batch.pool.check()


def test_a_prompt_alone_keeps_its_blocks_until_removed() -> None:
    batch = Batch()
    sequence = TokenSequence(RequestId("p"), prompt(9), Sampling(max_tokens=1))
    batch.scheduler.add(sequence)
    batch.run()
    assert [output.token_ids for output in batch.outputs["p"]] == [[]]
    assert (batch.pool.pinned, batch.scheduler.running) == (3, 0)
    batch.scheduler.remove(sequence)
    assert batch.pool.pinned == 0


def test_a_fetched_prompt_has_all_its_blocks_first_and_computes_its_last_token() -> None:
    batch = Batch()
    sequence = batch.add("a", prompt(12), max_tokens=2)
    sequence.fetch = lambda cached: True
    step = batch.scheduler.plan()
    assert step.fetches == [sequence]
    assert not step.tokens
    assert (len(sequence.blocks), batch.scheduler.waiting) == (4, 1)  # the last for a token that may come with it
    batch.scheduler.fetched(sequence, 11)
    assert batch.step() == 1
    batch.run()
    plain = Batch()
    plain.add("a", prompt(12), max_tokens=2)
    plain.run()
    assert batch.text("a") == plain.text("a")


def test_a_failed_fetch_computes_what_was_not_cached() -> None:
    batch = Batch()
    batch.add("warm", prompt(8), max_tokens=1)
    batch.run()
    sequence = batch.add("a", prompt(20), max_tokens=1)
    seen: list[int] = []
    sequence.fetch = lambda cached: not seen.append(cached)  # type: ignore[func-returns-value]
    batch.scheduler.plan()
    assert seen == [8]
    batch.scheduler.fetched(sequence, 8)
    assert batch.step() == 12
    assert batch.outputs["a"][0].cached_tokens == 8


def test_removal_while_fetching_frees_the_blocks() -> None:
    batch = Batch()
    sequence = batch.add("a", prompt(20))
    sequence.fetch = lambda cached: True
    batch.scheduler.plan()
    batch.scheduler.remove(sequence)
    batch.scheduler.fetched(sequence, 19)  # comes too late and changes nothing
    assert (batch.pool.pinned, batch.scheduler.waiting) == (0, 0)


def test_a_fetched_sequence_is_not_held_up_by_a_queue_that_finds_no_blocks() -> None:
    batch = Batch(blocks=6)
    fetching = batch.add("fetching", prompt(16), max_tokens=2)
    fetching.fetch = lambda cached: True
    batch.scheduler.plan()
    batch.add("large", prompt(20, 80), max_tokens=2)
    batch.step()
    batch.scheduler.fetched(fetching, 15)
    batch.run()
    assert len(batch.text("fetching")) == len(batch.text("large")) == 2


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(1, 9), st.booleans()), min_size=1, max_size=8
    ),
    st.integers(8, 24),
    st.integers(1, 30),
)
def test_any_mix_ends_with_the_same_output_as_alone(
    wanted: list[tuple[int, int, int, bool]], blocks: int, budget: int
) -> None:
    batch = Batch(blocks=blocks, max_num_seqs=3, budget=budget)
    for number, (length, start, max_tokens, fetch) in enumerate(wanted):
        sequence = batch.add(str(number), prompt(length, start * 50), max_tokens)
        sequence.fetch = (lambda cached: True) if fetch else None
    fetching: list[Sequence] = []
    for _ in range(2000):
        step = batch.scheduler.plan()
        fetching += step.fetches
        for one, output in batch.scheduler.finish(step):
            batch.outputs.setdefault(name_of(one), []).append(output)
        batch.pool.check()
        if step.tokens:
            continue
        if fetching:  # a sequence that preempts itself again and again waits for their blocks
            done = fetching.pop()
            batch.scheduler.fetched(done, done.prompt_len - 1)
        elif not step.preempted:
            break
    assert batch.pool.pinned == 0
    for number, (length, start, max_tokens, _) in enumerate(wanted):
        alone = Batch(blocks=64)
        alone.add("x", prompt(length, start * 50), max_tokens)
        alone.run()
        assert batch.text(str(number)) == alone.text("x")


def test_steps_alike_are_computed_at_once_until_a_sequence_ends() -> None:
    batch = Batch()
    batch.scheduler.steps_at_once = 100
    batch.add("short", prompt(9), max_tokens=3)
    batch.add("long", prompt(9, 50), max_tokens=9)
    repeats = []
    while (step := batch.scheduler.plan()).tokens:
        repeats.append(step.repeats)
        for sequence, output in batch.scheduler.finish(step, step.repeats):
            batch.outputs.setdefault(name_of(sequence), []).append(output)
        batch.pool.check()
    # The prompts with their first tokens; the two other tokens of "short"; what is left of "long", in several blocks.
    assert repeats == [1, 2, 6]
    for name, start, count in (("short", 0, 3), ("long", 50, 9)):
        alone = Batch()
        alone.add(name, prompt(9, start), max_tokens=count)
        alone.run()
        assert batch.text(name) == alone.text(name)
        assert batch.outputs[name][-1].finish == "length"


def test_without_blocks_for_all_steps_only_those_are_computed_at_once_that_need_none() -> None:
    batch = Batch(blocks=4)
    batch.scheduler.steps_at_once = 100
    batch.add("long", prompt(9), max_tokens=9)
    batch.step()
    batch.pool.allocate(1)  # somebody else's: there is none for a fifth block
    assert batch.scheduler.plan().repeats == 3  # its third block has the prompt's last token, and room for three


def test_fewer_steps_than_may_be_computed_at_once_can_be_told_of() -> None:
    batch = Batch(blocks=64)
    batch.scheduler.steps_at_once = 100
    batch.add("a", prompt(8), max_tokens=20)
    batch.step()
    batch.step()
    step = batch.scheduler.plan()
    assert step.repeats == 18
    ((_, output),) = batch.scheduler.finish(step, 2)
    assert len(output.token_ids) == 2


def test_a_stop_token_ends_a_sequence_in_the_middle_of_steps_at_once() -> None:
    batch = Batch()
    batch.add("free", prompt(8), max_tokens=6)
    batch.run()
    stop = batch.text("free")[2]
    batch.scheduler.steps_at_once = 100
    batch.add("stopped", prompt(8), max_tokens=6, stop_token_ids=(stop,))
    while (step := batch.scheduler.plan()).tokens:
        for sequence, output in batch.scheduler.finish(step, step.repeats):
            batch.outputs.setdefault(name_of(sequence), []).append(output)
    assert batch.text("stopped") == batch.text("free")[: batch.text("free").index(stop) + 1]
    assert batch.outputs["stopped"][-1].stop_token == stop
    assert batch.pool.pinned == 0


def test_sequences_computed_elsewhere_have_room_for_the_token_that_comes_with_them() -> None:
    batch = Batch(blocks=6)
    waiting = [batch.add(str(number), prompt(8, 20 * number), max_tokens=4) for number in range(3)]
    for sequence in waiting:
        sequence.fetch = lambda cached: True
    step = batch.scheduler.plan()
    assert step.fetches == waiting[:2]  # of two blocks each, and a third: together all there are
    for sequence in waiting[:2]:
        sequence.tokens.append(7)
        sequence.length += 1
        batch.scheduler.fetched(sequence, 8)
    waiting[2].fetch = None
    batch.run()
    assert all(len(batch.text(str(number))) == (3, 3, 4)[number] for number in range(3))


def test_queued_tokens_are_those_of_prompts_that_are_neither_cached_nor_computed() -> None:
    batch = Batch(budget=16)
    batch.add("first", list(range(10, 42)))
    assert batch.scheduler.queued_tokens == 32
    batch.step()
    assert batch.scheduler.queued_tokens == 16
    batch.add("second", list(range(10, 26)) + list(range(60, 72)))
    assert batch.scheduler.queued_tokens == 16 + 12, "of the second, 16 are cached by now"
    batch.run()
    assert batch.scheduler.queued_tokens == 0
