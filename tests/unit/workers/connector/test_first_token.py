from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from tests.unit.workers.connector.pair import pair, plan_receive, push, target_of
from tests.unit.workers.connector.reports import WAIT_S
from workers.connector.first_token import FirstTokens, go_on_with
from workers.connector.mover import Ended
from workers.connector.protocol import FirstToken, GiveUp, ReceiveOpened, Settle


def test_a_token_told_in_time_is_taken_once() -> None:
    tokens = FirstTokens()
    tokens.expect("r")
    tokens.told(FirstToken("r", 7))
    assert tokens.take("r") == 7
    assert tokens.take("r") is None


def test_taking_waits_for_a_word_that_is_on_its_way() -> None:
    tokens = FirstTokens()
    tokens.expect("r")
    threading.Timer(0.05, tokens.told, (FirstToken("r", 7),)).start()
    assert tokens.take("r") == 7


def test_tokens_of_requests_that_are_not_expected_are_not_kept() -> None:
    tokens = FirstTokens()
    tokens.told(FirstToken("r", 7))
    assert tokens.take("r") is None
    tokens.expect("r")
    tokens.forget("r")
    tokens.told(FirstToken("r", 7))
    assert tokens.take("r") is None


@dataclass
class FakeRequest:
    """As much of vLLM's request as is changed."""

    prompt_token_ids: list[int]
    max_tokens: int
    min_tokens: int
    hashed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._all_token_ids = self.prompt_token_ids.copy()
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.sampling_params = SimpleNamespace(min_tokens=self.min_tokens)

    def update_block_hashes(self) -> None:
        self.hashed.append(len(self._all_token_ids))


def test_the_token_becomes_the_prompts_last_and_counts_among_those_generated() -> None:
    request = FakeRequest([1, 2, 3], max_tokens=8, min_tokens=2)
    go_on_with(cast("object", request), 9)
    assert request.prompt_token_ids == request._all_token_ids == [1, 2, 3, 9]
    assert (request.num_prompt_tokens, request.max_tokens, request.sampling_params.min_tokens) == (4, 7, 1)
    assert request.hashed == [4]


def test_a_receive_does_not_end_for_vllm_before_it_is_known_whether_there_is_a_first_token() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [5], first_token=True)
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), [9])
        with receiver.reports.changed:
            receiver.reports.changed.wait_for(lambda: receiver.reports.holding("first_token"), WAIT_S)
        assert receiver.mover.ended(set()).received == set()
        receiver.mover.command(FirstToken("r", 7))
        receiver.mover.wait(WAIT_S)
        ended = receiver.mover.ended(set())
        assert (ended.received, ended.invalid_blocks) == ({"r-engine"}, set())
        assert receiver.held("first_token") == 0


def test_blocks_that_did_not_arrive_are_handed_back_together_with_the_word_on_the_first_token() -> None:
    with pair() as (_, receiver):
        plan_receive(receiver, [5], first_token=True)
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(Settle(opened.transfer_id, "p", closed=True))
        receiver.mover.command(GiveUp("r", opened.transfer_id))
        with receiver.reports.changed:
            receiver.reports.changed.wait_for(lambda: receiver.reports.holding("first_token"), WAIT_S)
        assert receiver.mover.ended(set()) == Ended(set(), set(), set())
        receiver.mover.command(FirstToken("r", None))
        receiver.mover.wait(WAIT_S)
        ended = receiver.mover.ended(set())
        assert (ended.received, ended.invalid_blocks) == ({"r-engine"}, {5})
