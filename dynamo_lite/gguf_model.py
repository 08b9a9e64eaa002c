"""Converts a Llama model in GGUF into a Hugging Face folder: `python -m dynamo_lite.gguf_model SOURCE FOLDER`.

Done with gguf and numpy alone: seconds where loading it through torch and transformers takes half a minute. Runs
as a process of its own, so that it can be ended at any time and its memory is given back.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TYPES = (3, 4)  # control and user-defined tokens, in GGUF's numbering
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The vocabulary; a token's place is its id."""

    texts: list[str]
    special: list[str]
    bos: int
    eos: int
    unknown: int
    padding: int
    chat_template: str


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer and bfloat16 weights into `folder`, which exists."""
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    tokens = _tokens(fields)
    ends = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.padding}
    _write(folder / "config.json", _config(fields, tokens, tied) | ends)
    _write(folder / "generation_config.json", ends)
    _write(folder / "tokenizer_config.json", _tokenizer_config(fields, tokens))
    _tokenizer(fields, tokens).save(str(folder / "tokenizer.json"))
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = dict(_weight(tensor, heads, kv_heads) for tensor in reader.tensors)
    specs = {name: _spec(bits) for name, bits in weights.items()}
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})


def _tokens(fields: dict[str, Any]) -> Tokens:
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return Tokens(
        texts=texts,
        special=[text for text, kind in zip(texts, types, strict=True) if kind in SPECIAL_TYPES],
        bos=fields["tokenizer.ggml.bos_token_id"],
        eos=fields["tokenizer.ggml.eos_token_id"],
        unknown=fields["tokenizer.ggml.unknown_token_id"],
        padding=fields["tokenizer.ggml.padding_token_id"],
        chat_template=fields["tokenizer.chat_template"],
    )


def _config(fields: dict[str, Any], tokens: Tokens, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tokens.texts),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # Stored in 32 bits: 1e-5 reads back as 9.99999974e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }


def _tokenizer(fields: dict[str, Any], tokens: Tokens) -> Tokenizer:
    """Byte-level BPE; the pre-tokenizer called `smollm` takes every digit for itself.

    (transformers 5.19 overlooks that when it reads GGUF, and so splits spaces before digits unlike the real one.)
    """
    if (found := fields["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"pre-tokenizer '{found}' is not known here, only 'smollm'")
    merges: list[tuple[str, str]] = []
    for merge in fields["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {text: index for index, text in enumerate(tokens.texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens.special])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens.texts[tokens.bos],
        "eos_token": tokens.texts[tokens.eos],
        "pad_token": tokens.texts[tokens.padding],
        "unk_token": tokens.texts[tokens.unknown],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": tokens.chat_template,
    }


def _weight(tensor: ReaderTensor, heads: int, kv_heads: int) -> tuple[str, np.ndarray]:
    """Its name in Hugging Face's Llama, and its bfloat16 bits."""
    name = OUTER_NAMES.get(tensor.name)
    weight = dequantize(tensor.data, tensor.tensor_type)
    if name is None:
        _, layer, part, kind = tensor.name.split(".")
        name = f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
        if part in ("attn_q", "attn_k"):
            weight = _rotary_halves(weight, heads if part == "attn_q" else kv_heads)
    return name, _bfloat16(weight)


def _spec(bits: np.ndarray) -> TensorSpec:
    return TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves that rotary embedding pairs; Hugging Face keeps them one after the other."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _bfloat16(weight: np.ndarray) -> np.ndarray:
    """The upper halves of the float32 bits, rounded to the nearest even."""
    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    source, folder = map(Path, arguments)
    convert(source, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
