"""The few numbers of a model that decide how much memory serving it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Of one model; `weights` counts bytes as stored, in `dtype`."""

    weights: int
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    max_length: int  # tokens

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights once loaded as `dtype`."""
        loaded = self._dtype(dtype)
        return self.weights * VALUE_BYTES[loaded] // VALUE_BYTES.get(self.dtype, VALUE_BYTES[loaded])

    def kv_bytes(self, dtype: str, kv_dtype: str) -> int:
        """Bytes of keys and values of one token, all layers."""
        value = VALUE_BYTES.get(self._dtype(dtype) if kv_dtype == "auto" else kv_dtype, 2)
        return 2 * self.layers * self.kv_heads * self.head_dim * value

    def _dtype(self, dtype: str) -> str:
        """vLLM's `auto` is the model's own type, but 16 bits for float32 models."""
        if dtype != "auto":
            return dtype
        return self.dtype if self.dtype in ("float16", "bfloat16") else "bfloat16"

    @classmethod
    def read(cls, folder: Path) -> ModelShape | None:
        """From a Hugging Face folder; None for a model whose config.json does not say these things."""
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            return None
        config = config.get("text_config", config)
        heads = config.get("num_attention_heads")
        hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
        if not (heads and hidden and layers):
            return None
        return cls(
            weights=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            layers=layers,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_length=config.get("max_position_embeddings") or 0,
        )
