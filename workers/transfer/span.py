"""A run of a prompt's tokens, and the sender's blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """`tokens` tokens that begin `skipped` tokens into the first of the blocks; the last block may go on after them."""

    block_ids: BlockIds | torch.Tensor  # a tensor (int64) once it is where the blocks are
    block_size: int  # tokens
    skipped: int
    tokens: int

    def head(self, tokens: int) -> Span:
        """The first `tokens` of them, or all there are."""
        tokens = min(tokens, self.tokens)
        blocks = -(-(self.skipped + tokens) // self.block_size)
        return Span(self.block_ids[:blocks], self.block_size, self.skipped, tokens)

    def rest(self, tokens: int) -> Span:
        """What `head(tokens)` leaves."""
        start = self.skipped + min(tokens, self.tokens)
        block, skipped = divmod(start, self.block_size)
        return Span(self.block_ids[block:], self.block_size, skipped, max(0, self.tokens - tokens))
