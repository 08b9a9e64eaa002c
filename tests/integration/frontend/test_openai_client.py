"""OpenAI's own client against a whole deployment, as a black box: answers."""

from __future__ import annotations

import math
import random
import uuid
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer

from tests.integration.frontend.conftest import MODEL

HI: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]
END = {"2": 100}  # makes the end token, <|im_end|>, certain
BLOCK = 16  # tokens


def chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 8}
    answer = client.chat.completions.create(**(defaults | fields))
    assert isinstance(answer, ChatCompletion)
    return answer


def complete(client: openai.OpenAI, prompt: Any = "Once upon", **fields: Any) -> Completion:
    defaults: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 8}
    answer = client.completions.create(**(defaults | fields))
    assert isinstance(answer, Completion)
    return answer


def text(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = chat(client, temperature=0, max_tokens=20)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text(whole)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "length"
    assert not any(reasons[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_usage_is_streamed_only_when_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_n_gives_choices_that_differ_and_a_seed_that_repeats_them(client: openai.OpenAI) -> None:
    answers = [chat(client, n=3, seed=7, temperature=1.5) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]
    assert answers[0].usage is not None
    assert answers[0].usage.completion_tokens == 24


def test_choices_of_a_stream_are_told_apart(client: openai.OpenAI) -> None:
    whole = chat(client, n=3, seed=7)
    texts = ["", "", ""]
    ends: dict[int, str] = {}
    for chunk in client.chat.completions.create(model=MODEL, messages=HI, max_tokens=8, n=3, seed=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == dict.fromkeys(range(3), "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    scored = chat(client, temperature=0, max_tokens=30, logprobs=True).choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    tokens = [entry.token for entry in scored.content]
    stop = tokens[9][-1:] + tokens[10][:1]
    kept, _, _ = "".join(tokens).partition(stop)
    if stream:
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=HI, temperature=0, max_tokens=30, stop=[stop, "\n\n\n"], stream=True
            )
        )
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = chat(client, temperature=0, max_tokens=30, stop=stop)
        shown, reason = text(answer), answer.choices[0].finish_reason
        assert answer.usage is not None
        read = 0
        while len("".join(tokens[:read])) < len(kept) + len(stop):
            read += 1
        assert answer.usage.completion_tokens == read
    assert shown == kept
    assert reason == "stop"


def test_one_choice_may_stop_while_others_go_on(client: openai.OpenAI) -> None:
    free = chat(client, n=3, seed=3, max_tokens=40).choices
    words = [choice.message.content or "" for choice in free]
    stop = words[1][5:11]
    assert stop not in words[0]
    assert stop not in words[2]
    stopped = chat(client, n=3, seed=3, max_tokens=40, stop=stop).choices
    assert [choice.finish_reason for choice in stopped] == ["length", "stop", "length"]
    assert [choice.message.content for choice in stopped] == [words[0], words[1].partition(stop)[0], words[2]]


def test_the_end_token_ends_the_text_without_being_shown(client: openai.OpenAI) -> None:
    answer = chat(client, logit_bias=END)
    assert text(answer) == ""
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_ignore_eos_goes_on_and_min_tokens_defers_it(client: openai.OpenAI) -> None:
    ignored = chat(client, logit_bias=END, extra_body={"ignore_eos": True})
    assert ignored.choices[0].finish_reason == "length"
    deferred = chat(client, logit_bias=END, extra_body={"min_tokens": 5})
    assert deferred.choices[0].finish_reason == "stop"
    assert deferred.usage is not None
    assert deferred.usage.completion_tokens == 6


def test_a_stop_token_of_the_client_ends_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, logit_bias={"300": 100}, extra_body={"stop_token_ids": [300]})
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs_have_openais_shape(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    scored = answer.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert len(scored.content) == 8
    assert "".join(entry.token for entry in scored.content) == text(answer)
    for entry in scored.content:
        assert entry.logprob <= 0
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert math.exp(sum(top.logprob for top in entry.top_logprobs)) <= 1


def test_chat_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    scored = chat(client, logprobs=True).choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert all(entry.top_logprobs == [] for entry in scored.content)
    assert chat(client).choices[0].logprobs is None


def test_completion_logprobs_have_openais_shape(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=2).choices
    scored = choice.logprobs
    assert scored is not None
    assert scored.tokens is not None
    assert scored.text_offset is not None
    assert scored.top_logprobs is not None
    assert scored.token_logprobs is not None
    assert "".join(scored.tokens) == choice.text
    assert [choice.text[a:][:3] for a in scored.text_offset] == [
        (choice.text[len("".join(scored.tokens[:i])) :])[:3] for i in range(8)
    ]
    for token, logprob, top in zip(scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) in (2, 3)


def test_prompts_may_be_texts_or_token_ids_one_or_many(client: openai.OpenAI, model_path: Any) -> None:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    first, second = (tokenizer.encode(text).ids for text in ("Once upon", "a time"))
    one = complete(client, "Once upon", temperature=0)
    assert complete(client, first, temperature=0).choices == one.choices
    many = complete(client, ["Once upon", "a time"], temperature=0)
    assert complete(client, [first, second], temperature=0).choices == many.choices
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    assert many.usage is not None
    assert many.usage.prompt_tokens == len(first) + len(second)


def test_choices_of_many_prompts_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    many = complete(client, ["Once upon", "a time"], n=2, seed=5)
    alone = [complete(client, prompt, n=2, seed=5) for prompt in ("Once upon", "a time")]
    assert [c.text for c in many.choices] == [c.text for answer in alone for c in answer.choices]


def test_echo_puts_the_prompt_before_the_completion(client: openai.OpenAI) -> None:
    plain = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=0, echo=True).choices[0].text == "Once upon" + plain
    stream = client.completions.create(
        model=MODEL, prompt="Once upon", max_tokens=8, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "Once upon" + plain


def test_echo_of_nothing_more_needs_no_worker(client: openai.OpenAI) -> None:
    answer = complete(client, echo=True, max_tokens=0)
    assert answer.choices[0].text == "Once upon"
    assert answer.choices[0].finish_reason == "length"


def test_without_max_tokens_the_context_is_the_limit(client: openai.OpenAI) -> None:
    prompt = [300 + i % 1000 for i in range(4000)]
    answer = complete(client, prompt, max_tokens=openai.omit)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 96
    assert answer.choices[0].finish_reason == "length"


def test_a_repeated_prompt_is_found_in_the_cache_to_the_block(client: openai.OpenAI) -> None:
    numbers = random.Random(uuid.uuid4().int)
    prompt = [numbers.randrange(300, 2000) for _ in range(10 * BLOCK + 3)]
    first, second = complete(client, prompt), complete(client, prompt)
    for answer, cached in ((first, 0), (second, 10 * BLOCK)):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_another_salt_finds_nothing_in_the_cache(client: openai.OpenAI) -> None:
    numbers = random.Random(uuid.uuid4().int)
    prompt = [numbers.randrange(300, 2000) for _ in range(5 * BLOCK)]
    complete(client, prompt, extra_body={"cache_salt": "a"})
    other = complete(client, prompt, extra_body={"cache_salt": "b"})
    assert other.usage is not None
    assert other.usage.prompt_tokens_details is not None
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_every_sampling_field_is_accepted(client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [5]}
    chat(
        client,
        max_tokens=openai.omit,
        max_completion_tokens=4,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=1,
        stop=["zzz"],
        user="u",
        extra_body=extra,
    )


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
