"""Stop strings across any cutting of the text."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.frontend.stops import StopMatcher

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            return "".join(shown), matcher.matched, shown
    shown.append(matcher.finish())
    return "".join(shown), None, shown


def reference(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(STOPS, LETTERS, st.lists(st.integers(0, 30), max_size=6))
def test_the_first_complete_stop_string_ends_the_text_however_it_is_cut(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    shown, matched, _ = run(stops, pieces)
    assert (shown, matched) == reference(stops, text)


@given(STOPS, LETTERS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for position, character in enumerate(text, 1):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : position]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_before_the_stop_string_is_kept_and_the_rest_dropped() -> None:
    shown, matched, pieces = run(["\n\nUser:"], ["Hello", " there\n", "\nUs", "er: hi"])
    assert shown == "Hello there"
    assert matched == "\n\nUser:"
    assert pieces[1] == " there"


def test_a_held_beginning_is_shown_when_the_text_ends() -> None:
    assert run(["END"], ["the EN"])[0] == "the EN"
