"""Reading a model folder, encoding, chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dynamo_lite.errors import RequestError, StartError
from dynamo_lite.frontend.chat_template import ChatTemplate
from dynamo_lite.frontend.tokens import LONG_TEXT, load_tokens


def with_settings(model_path: Path, folder: Path, **settings: object) -> Path:
    shutil.copytree(model_path, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


async def test_a_chat_is_rendered_by_the_models_template(model_path: Path) -> None:
    tokens = load_tokens(model_path)
    ids = await tokens.encode_chat([{"role": "user", "content": "hello"}])
    text = b"".join(map(tokens.vocabulary.token_bytes, ids)).decode()
    assert text == "<|endoftext|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


async def test_every_place_that_names_an_end_token_counts(model_path: Path) -> None:
    assert load_tokens(model_path).eos_ids == (0, 2)


async def test_the_vocabulary_is_as_large_as_the_models(model_path: Path) -> None:
    assert load_tokens(model_path).size == 512


async def test_long_and_short_texts_encode_alike(model_path: Path) -> None:
    tokens = load_tokens(model_path)
    long = "hello world " * LONG_TEXT
    assert tokens.vocabulary.text(await tokens.encode(long)) == long


async def test_a_template_file_of_the_folder_wins_over_the_settings(model_path: Path, tmp_path: Path) -> None:
    folder = with_settings(model_path, tmp_path)
    (folder / "chat_template.jinja").write_text("FILE {{ messages[0].content }}")
    tokens = load_tokens(folder)
    assert tokens.vocabulary.text(await tokens.encode_chat([{"role": "user", "content": "x"}])) == "FILE x"


async def test_a_configured_template_wins_over_all(model_path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("MINE")
    tokens = load_tokens(model_path, mine)
    assert tokens.vocabulary.text(await tokens.encode_chat([{"role": "user", "content": "x"}])) == "MINE"


async def test_the_default_of_several_templates_is_used(model_path: Path, tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    tokens = load_tokens(with_settings(model_path, tmp_path, chat_template=several))
    assert tokens.vocabulary.text(await tokens.encode_chat([{"role": "user", "content": "x"}])) == "D"


async def test_a_model_without_a_template_refuses_chats(model_path: Path, tmp_path: Path) -> None:
    tokens = load_tokens(with_settings(model_path, tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="no chat template") as caught:
        await tokens.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_tokenizer_file_that_is_no_json_is_named(model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartError, match=r"tokenizer\.json cannot be read"):
        load_tokens(tmp_path)


def render(source: str, *messages: dict[str, str]) -> str:
    return ChatTemplate(source, {"eos_token": "</s>"}).render(messages or ({"role": "user", "content": "hi"},))


def test_templates_have_the_functions_transformers_gives_them() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "hi"}'
    assert render("{{ {'a': '<ü>'} | tojson(indent=1) }}") == '{\n "a": "<ü>"\n}'
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% for m in messages %}{% if true %}{% break %}{% endif %}{% endfor %}x") == "x"
    assert render("{% generation %}{{ eos_token }}{% endgeneration %}") == "</s>"
    assert render("{{ tools is none }}{{ nothing }}") == "True"


def test_a_refusing_template_is_the_clients_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(RequestError, match="unsafe"):
        render("{{ ''.__class__.__mro__ }}")
    with pytest.raises(RequestError):
        render("{{ messages.append(1) }}")


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartError, match="line 1"):
        ChatTemplate("{% if %}", {})
