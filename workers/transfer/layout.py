"""How a model's KV tensors lie in memory, seen as planes: rows of bytes, one row per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from workers.errors import Mismatch


@dataclass(frozen=True, slots=True)
class Planes:
    """Every KV tensor of a model as uint8 tensors `[num_blocks, row_bytes]` over the engine's own memory.

    A layer gives one plane where a block's keys and values lie together (vLLM's CPU and FlashInfer layouts,
    `[blocks, …]`), two where they lie apart (`[2, blocks, …]`).
    """

    planes: tuple[torch.Tensor, ...]
    num_blocks: int
    layout: str  # for the fingerprint: the shape of each plane's row, stride order included

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.shape[1] for plane in self.planes)

    @property
    def device(self) -> torch.device:
        return self.planes[0].device


def planes_of(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> Planes:
    """View vLLM's `kv_caches` (layer name → tensor, in the order of the layers) as planes.

    Raises Mismatch for a tensor in which a block is not one dense run of bytes.
    """
    planes: list[torch.Tensor] = []
    shapes: list[str] = []
    for name, cache in kv_caches.items():
        if cache.shape[0] == num_blocks:
            parts = [cache]
        elif cache.dim() > 1 and cache.shape[0] == 2 and cache.shape[1] == num_blocks:
            parts = [cache[0], cache[1]]
        else:
            raise Mismatch(f"{name}: no dimension of {tuple(cache.shape)} counts the {num_blocks} blocks")
        planes += [_rows(name, part) for part in parts]
        row = parts[0]
        order = sorted(range(1, row.dim()), key=lambda d, row=row: -row.stride(d))  # type: ignore[misc]
        shapes.append(f"{len(parts)}x{[row.shape[d] for d in order]}{str(row.dtype).removeprefix('torch.')}")
    return Planes(tuple(planes), num_blocks, ",".join(dict.fromkeys(shapes)))


def _rows(name: str, part: torch.Tensor) -> torch.Tensor:
    item = part.element_size()
    row_bytes = part[0].numel() * item
    if part.stride(0) * item < row_bytes or _span(part[0]) * item != row_bytes:
        raise Mismatch(f"{name}: a block is not one run of bytes (shape {tuple(part.shape)}, strides {part.stride()})")
    return torch.empty(0, dtype=torch.uint8, device=part.device).set_(
        part.untyped_storage(),
        part.storage_offset() * item,
        (part.shape[0], row_bytes),
        (part.stride(0) * item, 1),
    )


def _span(row: torch.Tensor) -> int:
    """Elements from the first to one past the last that `row` touches."""
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(row.shape, row.stride(), strict=True))
