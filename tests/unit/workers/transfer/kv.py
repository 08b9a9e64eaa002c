"""KV caches in every order that vLLM has, written and read in the slow and obvious way."""

from __future__ import annotations

import torch

from dynamo_lite.plane.layout import KvLayout
from workers.transfer.layout import ModelKv, Planes, planes_of

ORDERS = {  # name: orders of keys and values
    "nhd": ("NHKD", "NHKD"),  # vLLM's CUDA backends from 0.26 on
    "hnd": ("HNKD", "HNKD"),
    "cpu": ("HKDN", "HKND"),
    "apart": ("NHD", "NHD"),  # [2, blocks, tokens, heads, values]
    "apart hnd": ("HND", "HND"),
    "pairs": ("KNHD", "KNHD"),  # [blocks, 2, tokens, heads, values]
    "pairs hnd": ("KHND", "KHND"),
}


def cache(layout: KvLayout, blocks: int) -> torch.Tensor:
    """One layer's KV of one rank, in vLLM's logical shape over memory in the layout's order."""
    heads, tokens, size = layout.rank_heads, layout.block_size, layout.key_size
    dtype = getattr(torch, layout.dtype, torch.uint8)
    match layout.keys:
        case "NHKD":
            return torch.zeros(blocks, tokens, heads, 2 * size, dtype=dtype).permute(0, 2, 1, 3)
        case "HNKD" | "HKDN":
            return torch.zeros(blocks, heads, tokens, 2 * size, dtype=dtype)
        case "NHD":
            return torch.zeros(2, blocks, tokens, heads, size, dtype=dtype)
        case "HND":
            return torch.zeros(2, blocks, heads, tokens, size, dtype=dtype).permute(0, 1, 3, 2, 4)
        case "KNHD":
            return torch.zeros(blocks, 2, tokens, heads, size, dtype=dtype)
        case "KHND":
            return torch.zeros(blocks, 2, heads, tokens, size, dtype=dtype).permute(0, 1, 3, 2, 4)
    raise AssertionError(layout.keys)


def keys_and_values(layout: KvLayout, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a `cache` as `[blocks, tokens, heads, values]`."""
    size = layout.key_size
    match layout.keys:
        case "NHKD" | "HNKD":
            logical = tensor.permute(0, 2, 1, 3)
            return logical[..., :size], logical[..., size:]
        case "HKDN":
            blocks, heads, tokens, _ = tensor.shape
            pair = tensor.view(blocks, heads, 2, tokens * size)
            keys = pair[:, :, 0].view(blocks, heads, size, tokens).permute(0, 3, 1, 2)
            return keys, pair[:, :, 1].view(blocks, heads, tokens, size).permute(0, 2, 1, 3)
        case "NHD" | "HND":
            return tensor[0], tensor[1]
    return tensor[:, 0], tensor[:, 1]


class Rank:
    """One rank's caches."""

    def __init__(self, layout: KvLayout, rank: int, blocks: int, seed: int = 0) -> None:
        self.layout, self.heads = layout, layout.heads(rank)
        self.caches = [cache(layout, blocks) for _ in range(layout.layers)]
        generator = torch.Generator().manual_seed(seed)
        for each in self.caches:
            each.copy_(torch.randint(1, 100, each.shape, generator=generator, device="cpu"))
        model = ModelKv(
            kv_heads=layout.kv_heads,
            tensor_parallel=layout.tensor_parallel,
            dtype=layout.dtype,
            orders=(layout.keys, layout.values) if layout.keys == "HKDN" else None,
            packed=layout.packed,
        )
        self.planes: Planes = planes_of({f"layer{i}": each for i, each in enumerate(self.caches)}, blocks, model)

    def logical(self) -> torch.Tensor:
        """A copy of everything: `[layers, 2, blocks, tokens, heads, values]`."""
        return torch.stack([torch.stack(keys_and_values(self.layout, each)) for each in self.caches]).clone()

    def write(self, table: list[int], prompt: torch.Tensor, layers: range | None = None) -> None:
        """A prompt's KV, `[layers, 2, tokens, heads of the model, values]`, token by token into these blocks."""
        for layer in range(self.layout.layers) if layers is None else layers:
            tensor = self.caches[layer]
            for kind, view in enumerate(keys_and_values(self.layout, tensor)):
                for token in range(prompt.shape[2]):
                    block, place = divmod(token, self.layout.block_size)
                    view[table[block], place] = prompt[layer, kind, token, self.heads.start : self.heads.stop]
