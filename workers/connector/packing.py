"""What vLLM's CPU attention makes of a block's inside: a plain order, or something packed for the instruction set."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from workers.transfer.layout import ModelKv

_PLAIN = ("HKDN", "HKND")  # each head's keys transposed, then its values


def packing(cache: torch.Tensor, kv_cache_dtype: str, model: ModelKv) -> ModelKv:
    """`model` with the orders or the packing of `cache`, a layer's `[blocks, heads, tokens, keys|values]`.

    They are found out, not assumed: the attention itself writes a scratch block of known keys and values.
    """
    _, _, tokens, both = cache.shape
    isa = _get_attn_isa(cache.dtype, tokens, both // 2, kv_cache_dtype)
    packed = replace(model, packed=f"for {isa} on {torch.backends.cpu.get_cpu_capability()}")
    if not cache.dtype.is_floating_point or cache.element_size() < 2:
        return packed  # fp8: known keys do not come out as they went in
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(tokens, 1, both // 2, generator=generator).to(cache.dtype) for _ in range(2))
    block = torch.zeros(1, 1, 2 * tokens, both // 2, dtype=cache.dtype)
    keys, values = block.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, keys, values, torch.arange(tokens), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    plain = torch.equal(keys.flatten(), key.squeeze(1).T.flatten()) and torch.equal(values.flatten(), value.flatten())
    return replace(model, orders=_PLAIN) if plain else packed
