"""Incremental text equals the text of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_lite.frontend.detokenise import ByteDetokeniser, Detokeniser, WindowDetokeniser
from dynamo_lite.frontend.tokens import Vocabulary

Build = Callable[[Tokenizer, list[int]], Detokeniser]
TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def stream(detokeniser: Detokeniser, ids: list[int]) -> list[str]:
    return [*(detokeniser.push(token_id) for token_id in ids), detokeniser.finish()]


def by_bytes(tokenizer: Tokenizer, context: list[int]) -> Detokeniser:
    vocabulary = Vocabulary(tokenizer)
    assert isinstance(vocabulary.detokeniser(context), ByteDetokeniser)
    return vocabulary.detokeniser(context)


def by_window(tokenizer: Tokenizer, context: list[int]) -> Detokeniser:
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return WindowDetokeniser(tokenizer.decode, special, context)


@pytest.mark.parametrize("build", [by_bytes, by_window])
def test_byte_level_text_survives_any_unicode(build: Build, bytes_tokenizer: Tokenizer) -> None:
    @given(TEXT)
    def check(text: str) -> None:
        pieces = stream(build(bytes_tokenizer, []), bytes_tokenizer.encode(text).ids)
        assert "".join(pieces) == text

    check()


def test_any_token_ids_decode_as_all_at_once(bytes_tokenizer: Tokenizer) -> None:
    size = bytes_tokenizer.get_vocab_size()

    @given(st.lists(st.integers(0, size + 20), max_size=30))
    def check(ids: list[int]) -> None:
        whole = bytes_tokenizer.decode([i for i in ids if i < size], skip_special_tokens=True)
        assert "".join(stream(by_bytes(bytes_tokenizer, []), ids)) == whole

    check()


def test_no_piece_holds_half_a_character(bytes_tokenizer: Tokenizer) -> None:
    ids = [token for character in "ß好🙂" for token in bytes_tokenizer.encode(character).ids]
    for build in (by_bytes, by_window):
        assert not any("\ufffd" in piece for piece in stream(build(bytes_tokenizer, []), ids))


def test_byte_fallback_tokens_become_characters(fallback_tokenizer: Tokenizer) -> None:
    @given(st.text(alphabet="abcé好🙂ñ !", max_size=30))
    def check(text: str) -> None:
        ids = fallback_tokenizer.encode(text, add_special_tokens=False).ids
        pieces = stream(Vocabulary(fallback_tokenizer).detokeniser([]), ids)
        assert "".join(pieces) == fallback_tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)

    check()


def test_the_first_word_keeps_the_space_between_it_and_the_prompt(fallback_tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(fallback_tokenizer)
    prompt = fallback_tokenizer.encode("hello", add_special_tokens=False).ids
    the = id_of(fallback_tokenizer, "▁the")
    assert vocabulary.detokeniser(prompt).push(the) == " the"


def test_a_character_begun_in_the_prompt_is_completed(bytes_tokenizer: Tokenizer) -> None:
    ids = [id_of(bytes_tokenizer, symbol) for symbol in "ðŁĻĤ"]  # the four bytes of one emoji
    pieces = stream(by_bytes(bytes_tokenizer, ids[:2]), ids[2:])
    assert "".join(pieces) == "🙂"


def test_an_invalid_byte_run_is_not_held_for_ever(fallback_tokenizer: Tokenizer) -> None:
    byte = id_of(fallback_tokenizer, "<0xFF>")
    detokeniser = Vocabulary(fallback_tokenizer).detokeniser([])
    pieces = [detokeniser.push(byte) for _ in range(40)]
    assert sum(map(bool, pieces)) >= 10
    assert len(detokeniser._ids) < 12  # type: ignore[attr-defined]  # the window stays short


def test_special_tokens_have_no_text(bytes_tokenizer: Tokenizer) -> None:
    end = id_of(bytes_tokenizer, "<|im_end|>")
    think = id_of(bytes_tokenizer, "<think>")
    for build in (by_bytes, by_window):
        assert stream(build(bytes_tokenizer, []), [end, think, end]) == ["", "<think>", "", ""]
