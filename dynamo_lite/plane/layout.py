"""How a worker's KV lies in memory, what two workers can exchange, and which heads go from which rank to which.

Pure: no torch, no I/O. What differs is converted where it is gathered; `exchange_problem` says what cannot be.

An *order* names the dimensions of a row (one block of one layer), outermost first: N tokens, H heads, D the values of
one head, and K the pair of keys and values where they lie in one row. vLLM's CUDA backends have "NHKD" or "HNKD" for
both; its CPU attention has "HKDN" for keys, that is each head's keys transposed, and "HKND" for values. Orders without
K mean that keys and values lie apart, in a plane each.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
ALIGNMENT = 64  # bytes: where a share of a staging slot begins
FLOATS = ("float32", "float16", "bfloat16")  # converted into one another; the others are only copied


class KvLayout(msgspec.Struct, frozen=True):
    """One worker's KV: the same on each of its tensor-parallel ranks, but for which heads are there."""

    layers: int
    block_size: int  # tokens
    kv_heads: int  # of the model, over all ranks
    tensor_parallel: int
    key_size: int  # values of one head's key
    value_size: int  # 0 where keys are all there is (MLA)
    dtype: str  # of the stored values, e.g. "bfloat16", "fp8_e4m3"
    keys: str  # their order
    values: str
    packed: str = ""  # what packs a row's inside in a way of its own, e.g. "amx"; then orders only say where heads lie

    def __post_init__(self) -> None:
        outside = self.keys.partition("H")[0]
        if outside != self.values.partition("H")[0] or ("K" in outside and self.key_size != self.value_size):
            raise ValueError(f"orders {self.keys} and {self.values} have no row in which heads can be found")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES.get(self.dtype, 1)

    @property
    def together(self) -> bool:
        """Whether a block's keys and values of one layer lie in one row."""
        return "K" in self.keys

    @property
    def rank_heads(self) -> int:
        """Heads on each rank; with fewer heads than ranks each one is on several."""
        return max(1, self.kv_heads // self.tensor_parallel)

    @property
    def plane_sizes(self) -> tuple[int, ...]:
        """Per plane of a layer, the values it holds of each head and token."""
        if self.together or not self.value_size:
            return (self.key_size + self.value_size,)
        return (self.key_size, self.value_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, per rank."""
        return self.part_bytes(self.rank_heads)

    def part_bytes(self, heads: int, layers: int | None = None) -> int:
        """Bytes of one block, of that many heads, in that many layers (None: in all of them)."""
        layers = self.layers if layers is None else layers
        return layers * self.block_size * heads * (self.key_size + self.value_size) * self.item_bytes

    def heads(self, rank: int) -> range:
        """The model's heads that lie on this rank."""
        first = rank * self.kv_heads // self.tensor_parallel
        return range(first, first + self.rank_heads)


@dataclass(frozen=True, slots=True)
class Runs:
    """Where some heads lie in each row of a plane, in bytes: `count` runs of `size`, `pitch` apart, from `start` on."""

    start: int
    size: int
    pitch: int
    count: int

    @property
    def total(self) -> int:
        return self.count * self.size


def runs(layout: KvLayout, rank: int, heads: range) -> tuple[Runs, ...]:
    """`heads` (of the model, all of them on this rank) in the rows of each plane of a layer."""
    skipped = heads.start - layout.heads(rank).start
    found = []
    for order, size in zip((layout.keys, layout.values), layout.plane_sizes, strict=False):
        outer, inner = order.split("H")
        head = layout.item_bytes * size * (layout.block_size if "N" in inner else 1)
        count = layout.block_size if "N" in outer else 1
        if "K" in outer:
            head, count = head // 2, count * 2  # keys and values are of one size there
        if len(heads) == layout.rank_heads:
            found.append(Runs(0, head * len(heads) * count, head * len(heads) * count, 1))
        else:
            found.append(Runs(skipped * head, len(heads) * head, layout.rank_heads * head, count))
    return tuple(found)


def parts(prefill: KvLayout, prefill_rank: int, decode: KvLayout, decode_rank: int) -> range | None:
    """The heads that one prefill rank sends to one decode rank, or None.

    Of a head that lies on several prefill ranks each decode rank gets one copy, and these ranks share the work.
    """
    mine, theirs = prefill.heads(prefill_rank), decode.heads(decode_rank)
    copies = max(1, prefill.tensor_parallel // prefill.kv_heads)
    if prefill_rank % copies != decode_rank % copies:
        return None
    shared = range(max(mine.start, theirs.start), min(mine.stop, theirs.stop))
    return shared or None


def slot_bytes(layout: KvLayout, piece: int) -> int:
    """Size of a staging slot: one block at least, or as many as fit into `piece` bytes, in whatever shares."""
    size = max(piece // layout.block_bytes, 1) * layout.block_bytes
    if layout.rank_heads > 1 and layout.part_bytes(1) % ALIGNMENT:
        size += layout.rank_heads * ALIGNMENT  # what the shares lose by their alignment
    return -(-size // ALIGNMENT) * ALIGNMENT


def share(layout: KvLayout, rank: int, heads: range, slot_bytes: int) -> range:
    """The bytes, in each staging slot of a decode rank, that belong to whoever sends `heads` of the model to it.

    `parts` of one rank are disjoint, and so are their shares: several prefill ranks fill a slot side by side, each with
    flow control of its own, and nobody has to tell them which part of it is theirs.
    """
    first = heads.start - layout.heads(rank).start
    start, stop = (slot_bytes * count // layout.rank_heads // ALIGNMENT for count in (first, first + len(heads)))
    return range(start * ALIGNMENT, stop * ALIGNMENT)


def exchange_problem(prefill: KvLayout, decode: KvLayout) -> str | None:
    """A sentence, naming both sides, on why KV of one cannot be used by the other; None when it can."""
    for field, what in (
        ("layers", "layers"), ("kv_heads", "KV heads"), ("key_size", "values a key"), ("value_size", "values a value"),
    ):  # fmt: skip
        mine, theirs = getattr(prefill, field), getattr(decode, field)
        if mine != theirs:
            return f"the prefill worker's model has {mine} {what}, the decode worker's {theirs}"
    if prefill.dtype != decode.dtype and not (prefill.dtype in FLOATS and decode.dtype in FLOATS):
        return f"the prefill worker stores KV as {prefill.dtype}, the decode worker as {decode.dtype}"
    if prefill.packed or decode.packed:
        return _packed_problem(prefill, decode)
    return None


def _packed_problem(prefill: KvLayout, decode: KvLayout) -> str | None:
    """What is packed can only be copied as it is, head by head at best."""
    if prefill.packed != decode.packed:
        return f"{_packing(prefill)} at the prefill worker, {_packing(decode)} at the decode worker"
    for field in ("block_size", "dtype", "keys", "values"):
        mine, theirs = getattr(prefill, field), getattr(decode, field)
        if mine != theirs:
            return (
                f"KV is packed ({prefill.packed}), which only fits an equal {field}: "
                f"{mine} at the prefill worker, {theirs} at the decode worker"
            )
    if prefill.rank_heads != decode.rank_heads and not prefill.keys.startswith("H"):
        return (
            f"KV is packed ({prefill.packed}), which cannot be cut into heads: "
            f"{prefill.rank_heads} a rank at the prefill worker, {decode.rank_heads} at the decode worker"
        )
    return None


def _packing(layout: KvLayout) -> str:
    return f"KV is packed ({layout.packed})" if layout.packed else "KV is not packed"
