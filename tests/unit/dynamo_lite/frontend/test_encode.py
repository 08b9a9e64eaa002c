"""Looking words up gives what the tokenizer gives."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from dynamo_lite.frontend import encode
from dynamo_lite.frontend.encode import Encoder
from tests.unit.dynamo_lite.frontend.conftest import byte_level

REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + REST
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
GPT4O = "|".join((*CASED, REST))
SYMBOLS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PARTS = [
    "the",
    " capital",
    "Paris",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "1",
    "42",
    ".",
    "...",
    "/x",
    "A",
    "\x1c",
]
PARTS += ["<|im_start|>", "<|im_end|>", "<|im_", "<think>", "_", "\\", "\x00", "\x0b", "-- ", "UP", "é", "好"]


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), SYMBOLS])


def tokenizer_of(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


KNOWN = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "SmolLM": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "whole numbers": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]),
    "Llama 3": split(LLAMA3),
    "GPT-4o": split(GPT4O),
}


def assert_alike(tokenizer: Tokenizer, encoder: Encoder) -> None:
    numbers = random.Random(0)
    for _ in range(300):
        text = "".join(numbers.choices(PARTS, k=numbers.randrange(12)))
        for special in (False, True):
            assert encoder.encode(text, special) == tokenizer.encode(text, add_special_tokens=special).ids, text


@pytest.mark.parametrize("pre_tokenizer", KNOWN.values(), ids=KNOWN.keys())
def test_words_looked_up_are_those_of_the_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer) -> None:
    tokenizer = tokenizer_of(pre_tokenizer)
    encoder = Encoder(tokenizer)
    assert encoder.looks_up
    assert_alike(tokenizer, encoder)


def test_tokens_that_the_model_wants_around_a_text_are_there() -> None:
    tokenizer = byte_level()
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", None, special)
    encoder = Encoder(tokenizer)
    assert encoder.looks_up
    assert encoder.encode("the capital", True)[0] == 1
    assert_alike(tokenizer, encoder)


def test_added_tokens_that_take_spaces_with_them_are_left_to_the_tokenizer() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("Paris", lstrip=True, rstrip=True)])
    encoder = Encoder(tokenizer)
    assert encoder.looks_up
    assert_alike(tokenizer, encoder)


UNKNOWN = {
    "a leading space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no part at all": pre_tokenizers.Sequence([]),
    "no byte-level part": pre_tokenizers.Whitespace(),
    "a category that is not known": split(r"\p{Sc}+|\s+|\S+"),
    "an expression that re does not have": split(r"\p{L}&&[a-z]|[a-z&&[^b]]+|.|\n"),
    "what is merged": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "merged_with_next"), SYMBOLS]),
}


@pytest.mark.parametrize("pre_tokenizer", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_tokenizer_of_another_kind_encodes_itself(pre_tokenizer: pre_tokenizers.PreTokenizer) -> None:
    tokenizer = tokenizer_of(pre_tokenizer)
    encoder = Encoder(tokenizer)
    assert not encoder.looks_up
    assert_alike(tokenizer, encoder)


def test_a_normalizer_that_changes_ascii_is_left_to_the_tokenizer() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    assert not Encoder(tokenizer).looks_up
    tokenizer.normalizer = normalizers.NFC()
    encoder = Encoder(tokenizer)
    assert encoder.looks_up
    assert_alike(tokenizer, encoder)


def test_what_the_expressions_leave_out_is_left_to_the_tokenizer() -> None:
    numbers = pre_tokenizers.Split(Regex(r"\p{N}+"), "isolated")
    tokenizer = tokenizer_of(pre_tokenizers.Sequence([numbers, pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    assert_alike(tokenizer, Encoder(tokenizer))


def test_the_words_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_MOST_WORDS", 5)
    tokenizer = byte_level()
    encoder = Encoder(tokenizer)
    assert_alike(tokenizer, encoder)
    assert encoder.kept <= 5
