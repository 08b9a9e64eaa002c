"""From deltas to text, stop strings and finish reasons."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_lite.errors import WorkerError
from dynamo_lite.frontend.choices import Choice
from dynamo_lite.frontend.tokens import Vocabulary
from dynamo_lite.frontend.work import Task, Work
from dynamo_lite.plane.wire import Delta, RequestId, Sampling, TokenLogprob

R = RequestId("r")
END = 2


def choice(tokenizer: Tokenizer, *, stops: Sequence[str] = (), logprobs: int | None = None, minimum: int = 0) -> Choice:
    task = Task([], Sampling(max_tokens=1000))
    work = Work(False, (task,), 1, tuple(stops), logprobs, True, False, False, None)
    return Choice(0, Vocabulary(tokenizer), [], work, minimum)


def feed(one: Choice, ids: list[int], sizes: Sequence[int] = (1,), finish: str = "length") -> str:
    """`ids` in deltas of these sizes, again and again; the text, up to the end."""
    text, at, turn = "", 0, 0
    while at < len(ids) and one.finish is None:
        part = ids[at : at + sizes[turn % len(sizes)]]
        at, turn = at + len(part), turn + 1
        text += one.push(Delta(R, token_ids=part, finish=finish if at >= len(ids) else None)).text
    return text


def test_text_and_count_do_not_depend_on_how_tokens_are_grouped(bytes_tokenizer: Tokenizer) -> None:
    @given(
        st.text(alphabet="abc \n🙂", min_size=1, max_size=30),
        st.lists(st.text(alphabet="abc \n🙂", min_size=1, max_size=3), max_size=3),
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
    )
    def check(text: str, stops: list[str], sizes: list[int]) -> None:
        ids = bytes_tokenizer.encode(text).ids
        single, grouped = choice(bytes_tokenizer, stops=stops), choice(bytes_tokenizer, stops=stops)
        assert feed(grouped, ids, sizes) == feed(single, ids)
        assert (grouped.tokens, grouped.finish, grouped.stopped) == (single.tokens, single.finish, single.stopped)
        assert single.finish == ("stop" if single.stopped else "length")

    check()


def test_tokens_after_the_stop_string_do_not_count(bytes_tokenizer: Tokenizer) -> None:
    ids = [token for character in "abcdef" for token in bytes_tokenizer.encode(character).ids]
    one = choice(bytes_tokenizer, stops=["cd"])
    assert feed(one, ids, [6]) == "ab"
    assert one.tokens == 4
    assert one.finish == "stop"


def test_the_token_that_ends_a_text_counts_but_is_not_shown(bytes_tokenizer: Tokenizer) -> None:
    one = choice(bytes_tokenizer, logprobs=0)
    token = bytes_tokenizer.encode("a").ids[0]
    scored = [TokenLogprob(token, -1.0), TokenLogprob(END, -2.0)]
    piece = one.push(Delta(R, token_ids=[token, END], logprobs=scored, finish="stop", stop_token=END))
    assert piece.text == "a"
    assert piece.logprobs == scored[:1]
    assert piece.finish == "stop"
    assert one.tokens == 2


def test_what_a_stop_string_might_have_become_is_shown_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("ab").ids
    assert feed(choice(bytes_tokenizer, stops=["bc"]), ids) == "ab"


def test_half_a_character_at_the_end_is_shown_as_a_replacement(bytes_tokenizer: Tokenizer) -> None:
    half = bytes_tokenizer.token_to_id("ð")
    assert half is not None
    assert feed(choice(bytes_tokenizer), [half]) == "\ufffd"


def test_a_stop_string_within_min_tokens_does_not_count(bytes_tokenizer: Tokenizer) -> None:
    ids = [token for character in "abab" for token in bytes_tokenizer.encode(character).ids]
    one = choice(bytes_tokenizer, stops=["b"], minimum=3)
    assert feed(one, ids) == "aba"
    assert one.tokens == 4


def test_an_aborted_sequence_is_an_error_not_an_end(bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(WorkerError, match="abort"):
        choice(bytes_tokenizer).push(Delta(R, finish="abort"))
