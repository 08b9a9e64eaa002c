"""How a model's KV tensors lie in memory, seen as planes: rows of bytes, one row per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dynamo_lite.plane.layout import FLOATS, ITEM_BYTES, KvLayout
from workers.errors import Mismatch


@dataclass(frozen=True, slots=True)
class Planes:
    """Every KV tensor of a rank as uint8 tensors `[num_blocks, row_bytes]` over the engine's own memory.

    A layer gives one plane where a block's keys and values lie together, else two, keys first.
    """

    planes: tuple[torch.Tensor, ...]
    num_blocks: int
    layout: KvLayout

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.shape[1] for plane in self.planes)

    @property
    def device(self) -> torch.device:
        return self.planes[0].device


@dataclass(frozen=True, slots=True)
class ModelKv:
    """What a rank's tensors do not tell of the model's KV. The defaults are those of a model on one rank."""

    kv_heads: int = 0  # over all ranks; 0: as many as the tensors have
    tensor_parallel: int = 1
    key_size: int = 0  # 0: half of a head's values
    dtype: str = ""  # of what is stored, where tensors only show bytes ("fp8_e4m3")
    orders: tuple[str, str] | None = None  # of keys and values, where the attention has its own inside a row
    packed: str = ""  # see KvLayout


def planes_of(kv_caches: Mapping[str, torch.Tensor], num_blocks: int, model: ModelKv | None = None) -> Planes:
    """View vLLM's `kv_caches` (layer name → tensor, in the order of the layers) as planes.

    vLLM's logical shapes are `[blocks, heads, tokens, keys|values]`, `[2, blocks, tokens, heads, values]`,
    `[blocks, 2, tokens, heads, values]` and `[blocks, tokens, values]` (MLA); strides tell the order in memory.
    Raises Mismatch for any other, for layers that differ, and for blocks that are not one dense run of bytes.
    """
    planes: list[torch.Tensor] = []
    layouts: set[KvLayout] = set()
    for name, cache in kv_caches.items():
        dims, apart = _dims(name, cache, num_blocks)
        rows = [cache[0], cache[1]] if apart else [cache]
        planes += [_rows(name, row) for row in rows]
        layouts.add(_layout(rows[0], dims, len(kv_caches), apart, model or ModelKv()))
    if len(layouts) != 1:
        raise Mismatch(f"layers of one shape are needed, these have {len(layouts)}")
    return Planes(tuple(planes), num_blocks, layouts.pop())


def _dims(name: str, cache: torch.Tensor, num_blocks: int) -> tuple[str, bool]:
    """What a block's dimensions are, one letter each (C: keys|values), and whether keys and values lie apart."""
    match tuple(cache.shape):
        case (blocks, _, _, _) if blocks == num_blocks:
            return "HNC", False
        case (blocks, 2, _, _, _) if blocks == num_blocks:
            return "KNHD", False
        case (2, blocks, _, _, _) if blocks == num_blocks:
            return "NHD", True
        case (blocks, _, _) if blocks == num_blocks:
            return "ND", False
    raise Mismatch(f"{name}: {tuple(cache.shape)} is no known shape of {num_blocks} blocks")


def _layout(rows: torch.Tensor, dims: str, layers: int, apart: bool, model: ModelKv) -> KvLayout:
    """`rows` is the first plane of a layer as a tensor `[blocks, *dims]`."""
    sizes = dict(zip(dims, rows.shape[1:], strict=True))
    strides = dict(zip(dims, rows.stride()[1:], strict=True))
    order = "".join(sorted(dims, key=lambda dim: (-strides[dim], sizes[dim] == 1)))
    dtype = model.dtype or str(rows.dtype).removeprefix("torch.")
    packed = model.packed or ("" if dtype in ITEM_BYTES else dtype)
    if "H" not in sizes:
        sizes["H"], order = 1, "H" + order
    if "C" not in sizes:
        key, value = sizes["D"], sizes["D"] if apart or "K" in sizes else 0
    elif packed and sizes["C"] != 2 * (model.key_size or sizes["C"] // 2):
        key, value, order = sizes["C"], 0, order.replace("C", "D")  # scales beside the values, for example
    else:
        key = model.key_size or sizes["C"] // 2
        value, order = sizes["C"] - key, order.replace("C", "KD")
    layout = KvLayout(
        layers=layers,
        block_size=sizes["N"],
        kv_heads=model.kv_heads if "H" in dims and model.kv_heads else sizes["H"],
        tensor_parallel=model.tensor_parallel,
        key_size=key,
        value_size=value,
        dtype=dtype,
        keys=model.orders[0] if model.orders else order,
        values=model.orders[1] if model.orders else order,
        packed=packed,
    )
    if layout.rank_heads != sizes["H"]:
        raise Mismatch(f"{sizes['H']} KV heads on a rank, where {layout.rank_heads} were expected")
    return layout


def storage_dtype(layout: KvLayout) -> torch.dtype:
    """As what its values are copied: floats as themselves, anything else as bytes."""
    found: torch.dtype = getattr(torch, layout.dtype) if layout.dtype in FLOATS else torch.uint8
    return found


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
