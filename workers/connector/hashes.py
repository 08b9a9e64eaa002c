"""Block hashes as `kvbm.hashing` computes them, whatever vLLM's version: routers and tiers have to find what it stored.

vLLM 0.26 puts a request's salt into its first block's hash as it is, later versions under a name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.v1.core import kv_cache_utils

if TYPE_CHECKING:
    from vllm.v1.request import Request

_PROBE = SimpleNamespace(mm_features=[], lora_request=None, prompt_embeds=None, cache_salt="salt")


def name_salts() -> None:
    """Have this process's vLLM hash salts under their name, before it has hashed anything."""
    original = kv_cache_utils.generate_block_hash_extra_keys
    if original(_PROBE, 0, 1, 0)[0] != (_PROBE.cache_salt,):
        return

    def named(request: Request, start: int, end: int, multimodal: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, following = original(request, start, end, multimodal)
        if keys and start == 0 and request.cache_salt:
            keys = tuple(("cache_salt", key) if key == request.cache_salt else key for key in keys)
        return keys, following

    kv_cache_utils.generate_block_hash_extra_keys = named
