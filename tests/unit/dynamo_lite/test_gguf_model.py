from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors import deserialize
from tokenizers import Tokenizer, pre_tokenizers

from dynamo_lite.gguf_model import convert

HIDDEN, HEADS, KV_HEADS, FFN = 32, 4, 2, 64
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "he", "ll", "hell", "11", "Ġh"]
MERGES = ["h e", "l l", "he ll", "1 1", "Ġ h"]
WEIGHTS = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN),
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
}


def random_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}


def write_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    weights = random_weights()
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    weights = write_gguf(tmp_path / "model.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder)
    return folder, weights


def test_the_configuration_says_what_the_gguf_says(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (32, 4, 2)
    assert (config["head_dim"], config["rms_norm_eps"], config["rope_theta"]) == (8, 1e-5, 100000.0)
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokenizer_config = json.loads((converted[0] / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == "{{ messages }}"
    assert (tokenizer_config["bos_token"], tokenizer_config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_the_tokenizer_merges_letters_but_never_digits(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    assert tokenizer.encode("hello  11 hé").tokens == ["hell", "o", "Ġ", "Ġ", "1", "1", "Ġh", "Ã", "©"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(tokenizer.encode("hello  11 hé").ids) == "hello  11 hé"


def test_weights_are_bfloat16_under_their_hugging_face_names(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, source = converted
    stored = dict(deserialize((folder / "model.safetensors").read_bytes()))  # type: ignore[no-untyped-call]
    assert len(stored) == len(WEIGHTS)
    assert {tensor["dtype"] for tensor in stored.values()} == {"BF16"}

    def loaded(name: str) -> np.ndarray:
        bits = np.frombuffer(stored[name]["data"], dtype=np.uint16).astype(np.uint32) << 16
        values: np.ndarray = bits.view(np.float32).reshape(stored[name]["shape"])
        return values

    down = loaded("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_allclose(down, source["blk.0.ffn_down.weight"], rtol=2**-8)
    # Of each head GGUF interleaves the rows i and i + 4; Hugging Face keeps the halves whole.
    queries, interleaved = loaded("model.layers.0.self_attn.q_proj.weight"), source["blk.0.attn_q.weight"]
    np.testing.assert_allclose(queries[0:4], interleaved[0:8:2], rtol=2**-8)
    np.testing.assert_allclose(queries[4:8], interleaved[1:8:2], rtol=2**-8)


def test_an_unknown_pre_tokenizer_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", pre="qwen2")
    with pytest.raises(ValueError, match="'qwen2' is not known"):
        convert(tmp_path / "model.gguf", tmp_path)
