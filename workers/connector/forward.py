"""What a forward pass has computed so far of the prompts that are pushed: after each group of layers that fills a piece
the mover is told, so that the piece leaves while the next layers are computed.

Where vLLM does not say that a layer is done, as in a CUDA graph of the whole pass, all go at the end of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_lite.plane.layout import KvLayout
from workers.connector.cut import PieceSize, piece_size
from workers.connector.mover import Mover
from workers.connector.protocol import PushStep
from workers.transfer.ready import StepReady


class Forward:
    """Used by the thread that computes. Little is done there for a layer, and nothing ever waits for the GPU."""

    def __init__(self, mover: Mover, layout: KvLayout, rank: int, names: Sequence[str]) -> None:
        """`names` of the model's layers, in the order of their KV; none where one call a step does not compute each."""
        self._mover, self._layout, self._rank = mover, layout, rank
        self._index = {name: index for index, name in enumerate(names)}
        self._sizes: dict[tuple[KvLayout, tuple[int, ...]], PieceSize | None] = {}  # by the receiver's layout and slots
        self._ready: StepReady | None = None  # of what is told of layer by layer in the present step
        self._computed: list[bool] = []  # by layer
        self._done = 0  # leading layers, all of which are computed
        self._told = 0  # of these
        self._group = 0  # layers that are told of at once

    def begin(self, pushes: Sequence[PushStep]) -> list[PushStep]:
        """Before a step: hand over what takes several pieces. Returns the rest, which goes at its end."""
        layers, late, early, groups = self._layout.layers, list[PushStep](), list[PushStep](), list[int]()
        for push in pushes:
            group = self._layers_at_once(push)
            if group < layers:
                early.append(push)
                groups.append(group)
            else:
                late.append(push)
        if early:
            self._ready = self._mover.push(early)
            self._computed, self._done, self._told, self._group = [False] * layers, 0, 0, min(groups)
        return late

    def computed(self, name: str) -> None:
        """Within a step: the KV of all its tokens is in that layer, as of now on the current CUDA stream."""
        if self._ready is None or name not in self._index:
            return
        self._computed[self._index[name]] = True
        while self._done < len(self._computed) and self._computed[self._done]:
            self._done += 1
        if self._done - self._told >= self._group or self._done == len(self._computed):
            self._tell(self._ready, self._done)

    def end(self) -> None:
        """The whole step is computed."""
        if self._ready is not None:
            self._tell(self._ready, self._layout.layers)
            self._ready = None

    def _tell(self, ready: StepReady, layers: int) -> None:
        if layers > self._told:
            self._told = layers
            self._mover.reached(ready, layers)

    def _layers_at_once(self, push: PushStep) -> int:
        """How many layers of these tokens a piece takes; all where they are not to be told of one by one."""
        if not self._index:
            return self._layout.layers
        target = push.target
        key = target.layout, tuple(rank.slot_bytes for rank in target.ranks)
        if key not in self._sizes:
            self._sizes[key] = piece_size(self._layout, self._rank, self._mover.slot_bytes, target)
        size = self._sizes[key]
        return size.layers_at_once(push.span.tokens) if size is not None else self._layout.layers
