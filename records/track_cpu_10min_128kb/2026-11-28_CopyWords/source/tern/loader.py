"""Batches of training tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tern.shards import TokenStream


class TokenLoader:
    """Training tokens, endlessly; the whole state is `position`, tokens taken since the start.

    By windows of so many tokens, each once an epoch, in an order that seed and epoch decide; without a window in the
    order of the shards. A step's rows are dealt to (micro-batch, rank) in order: N ranks and one rank with N times the
    micro-batches read the same rows in the same step. A row is a window, or a part of one.
    """

    def __init__(self, shards: tuple[Path, ...], vocab_size: int, window: int = 0, seed: int = 0):
        self.stream, self.position, self.seed = TokenStream(shards, vocab_size), 0, seed
        self.window = window or len(self.stream)
        self.windows = max((len(self.stream) - 1) // window, 1) if window else 1  # and what is left, less than one
        self.orders: dict[int, np.ndarray] = {}  # epoch -> order of its windows

    def place(self, position: int) -> int:
        """Where in the stream the row begins that a position is the begin of."""
        index, offset = divmod(position, self.window)
        epoch, index = divmod(index, self.windows)
        if epoch not in self.orders:
            # Numpy promises that this old generator will always give the same.
            shuffled = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch]).permutation(self.windows)
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1} | {epoch: shuffled}
        return int(self.orders[epoch][index]) * self.window + offset

    def batch(self, rows: int, seq_len: int, micro: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, seq_len] of this rank's micro-batch, int64; the position does not move."""
        first = self.position + (micro * world + rank) * rows * seq_len
        spans = np.stack([self.stream.read(self.place(first + i * seq_len), seq_len + 1) for i in range(rows)])
        return torch.from_numpy(spans[:, :-1].copy()), torch.from_numpy(spans[:, 1:].copy())
