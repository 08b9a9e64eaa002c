"""Everything the frontend knows of the model: its tokenizer, chat template, and tokens that end a text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dynamo_lite.errors import RequestError, StartError
from dynamo_lite.frontend.chat_template import ChatTemplate, Message
from dynamo_lite.frontend.detokenise import ByteDetokeniser, Detokeniser, WindowDetokeniser
from dynamo_lite.frontend.encode import BYTE_SYMBOLS, Encoder

# Characters; encoding them takes about 2 ms, and longer texts leave the event loop.
LONG_TEXT = 8192
LONG_KNOWN_TEXT = 4 * LONG_TEXT  # where words are looked up
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Token ids and their text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
        kinds = {part.get("type") for part in state.get("decoders", [state])}
        self._byte_level = kinds <= {"ByteLevel", "Fuse"} and "ByteLevel" in kinds
        self._bytes: dict[int, bytes] = {}
        self._shown: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    def detokeniser(self, prompt: Sequence[int]) -> Detokeniser:
        """For text that follows `prompt`."""
        if self._byte_level:
            return ByteDetokeniser(self._shown_bytes, self._whole_text, prompt)
        return WindowDetokeniser(self._tokenizer.decode, self.special, prompt)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of whole sequences, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for on its own; special tokens stand for their name."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _shown_bytes(self, token_id: int) -> bytes:
        known = self._shown.get(token_id)
        if known is None:
            known = self._shown[token_id] = b"" if token_id in self.special else self.token_bytes(token_id)
        return known

    def _whole_text(self, token_id: int) -> str | None:
        """None where the token is, or ends in, a part of a character."""
        if token_id not in self._texts:
            try:
                self._texts[token_id] = self._shown_bytes(token_id).decode()
            except UnicodeDecodeError:
                self._texts[token_id] = None
        return self._texts[token_id]

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # models round their vocabulary up; such ids have no text
            return b""
        if token_id in self.special:
            return token.encode()
        if self._byte_level:
            values = [BYTE_SYMBOLS.get(symbol) for symbol in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if found := BYTE_TOKEN.fullmatch(token):
            return bytes([int(found[1], 16)])
        return token.replace("▁", " ").encode()


class Tokens:
    """The model's tokenizer as requests need it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
    ) -> None:
        tokenizer.no_truncation()  # some tokenizer files cut silently
        tokenizer.no_padding()
        self._encoder = Encoder(tokenizer)
        self._template = template
        self.eos_ids = tuple(eos_ids)
        self.vocabulary = Vocabulary(tokenizer)
        self.size = max(vocab_size or 0, self.vocabulary.size)  # ids below it may be sent to the model

    async def encode(self, text: str) -> list[int]:
        """A completion prompt, with the tokens the model wants at its start."""
        if len(text) < self._long(text):
            return self._encoder.encode(text, True)
        return await asyncio.to_thread(self._encoder.encode, text, True)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Raises RequestError when the model has no template or the template refuses the messages."""
        contents = "".join([message["content"] for message in messages])
        if len(contents) < self._long(contents):
            return self._encode_chat(messages)
        return await asyncio.to_thread(self._encode_chat, messages)

    def _long(self, text: str) -> int:
        return LONG_KNOWN_TEXT if self._encoder.looks_up and text.isascii() else LONG_TEXT

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if self._template is None:
            raise RequestError(
                "This model has no chat template; use /v1/completions, or set frontend.chat_template.",
                "messages",
            )
        return self._encoder.encode(self._template.render(messages), False)


def load_tokens(model: Path, chat_template: Path | None = None) -> Tokens:
    """Read a model folder. Raises StartError naming the file that is missing or wrong."""
    settings = _read_json(model / "tokenizer_config.json")
    config = _read_json(model / "config.json")
    config = {**config.get("text_config", {}), **config}  # multimodal models nest the language model's
    tokenizer = _read_tokenizer(model)
    special = _special_tokens(settings)
    source = _template_source(model, settings, chat_template)
    template = ChatTemplate(source, special) if source is not None else None
    eos = {tokenizer.token_to_id(special["eos_token"])} if "eos_token" in special else set()
    for value in (
        _read_json(model / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
    ):
        eos.update(value if isinstance(value, list) else [value])
    eos_ids = sorted(token_id for token_id in eos if isinstance(token_id, int))
    return Tokens(tokenizer, template, eos_ids, config.get("vocab_size"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StartError("tokenizer", f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StartError("tokenizer", f"{path} is not a JSON object")
    return value


def _read_tokenizer(model: Path) -> Tokenizer:
    path = model / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise StartError("tokenizer", f"{path} cannot be read: {error}") from error
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415  # slow to import, needed by few models
    except ImportError as error:
        raise StartError(
            "tokenizer",
            f"{model} has no tokenizer.json, and transformers, which could make one, is not installed",
        ) from error
    try:
        made = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, ImportError) as error:
        raise StartError("tokenizer", f"transformers cannot read the tokenizer in {model}: {error}") from error
    backend = getattr(made, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise StartError("tokenizer", f"the tokenizer in {model} has no fast form")
    return backend


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; a value is a string or an object with `content`."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text:
            found[key] = text
    return found


def _template_source(model: Path, settings: dict[str, Any], override: Path | None) -> str | None:
    path = override or model / "chat_template.jinja"
    if override is not None or path.exists():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise StartError("chat template", f"{path} cannot be read: {error}") from error
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    return source if isinstance(source, str) else None
