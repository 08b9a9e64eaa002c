"""Models that come without a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from dynamo_lite.frontend.tokens import load_tokens


async def test_transformers_makes_the_tokenizer_of_an_older_model(model_path: Path, tmp_path: Path) -> None:
    content = json.loads((model_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 2048}))
    made, given = load_tokens(tmp_path), load_tokens(model_path)
    for text in ("def f(x): return x", "Grüße 🙂"):
        ids = await made.encode(text)
        assert ids == await given.encode(text)
        assert made.vocabulary.text(ids) == text
    assert made.eos_ids == (2,)
