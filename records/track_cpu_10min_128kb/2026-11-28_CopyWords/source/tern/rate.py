"""Rate control: a file that takes the bytes that it may, by the steps of its embedding's integers.

A file is entropy-coded, so its size is known only when it is packed, and what a coarser grid costs depends on when it
comes. All values rounded anew after training cost 0.04 bits per byte, however little coarser the grid is (LOG.md, files
that fit): training has chosen the roundings that it left. So the steps move while there is training to come, by what
packing finds at three moments of the warmdown; and if the last file is over its cap all the same, only rows of rare
tokens are rounded anew, those that matter least first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tern.processes import Ranks

MOMENTS = (0.0, 0.5, 0.8)  # of the warmdown: the model is packed as it is then
GRACE = 0.02  # of the run: so much later the steps follow from it; until then it is packed beside training
OVER, UNDER = 1.002, (0.996, 0.996, 0.985)  # shares of the aim between which they stay: late changes cost more
DOUBLINGS = 4  # of a row's step at most, after training
RARE_STEP_BITS = 3.2  # by which a weight is larger for each unit of rare_step; measured at 0.35 (LOG.md, widths)
NEAR = 0.997  # share of the cap at which the search for the rows to round anew ends


def rarity(counts: np.ndarray, power: float) -> np.ndarray:
    """Factors [rows], of geometric mean 1, for the steps of tokens that occur so often: (counts + 1)^-power.

    What an error in a row costs goes with its token's occurrences and the square of the step, and twice the step saves
    a bit for each weight whatever the row: by that, steps should go with counts^-1/2 (Cover and Thomas, Elements of
    Information Theory, section 10.3.3). Training answers to errors, more so where it sees them often: less is best.
    """
    factors = (counts + 1.0) ** -power
    return factors / np.exp(np.log(factors).mean())


class RateControl:
    """The steps of a run's int embedding, `steps`, fp32 [rows, 1], in units of the finest; changed in place.

    config: fit_cap is the share of the cap to fill (0: nothing is changed), int_step the step to begin with, rare_step
    rarity's power. limit: the largest step. model: what would be stored now; size: bytes of the file of that, on rank
    0. Every rank has one, and calls the same methods in the same order.
    """

    def __init__(self, config: Any, cap: int, limit: int, counts: np.ndarray, weights: int, ranks: Ranks,
                 model: Callable[[], dict], size: Callable[[dict], int], device: torch.device):
        self.share, self.cap, self.limit, self.weights = config.fit_cap, cap, float(limit), weights
        self.ranks, self.model, self.size = ranks, model, size
        self.counts = torch.from_numpy(counts.astype(np.float64)).to(device)
        self.factors = torch.from_numpy(rarity(counts, config.rare_step)).float()[:, None].to(device)
        self.steps = torch.empty_like(self.factors)
        self.set_step(config.int_step)
        self.done, self.waiting = 0, False  # moments, and whether the last one's size has not been used yet
        self.found = 0  # that size, on rank 0, once it is known
        self.packing: Future[int] | None = None  # the same, on its way
        self.packer: ThreadPoolExecutor | None = None

    def set_step(self, step: float, doubled: Tensor | None = None) -> None:
        """step times each row's factor, doubled so many times (int [rows]); codes are those of the next refresh."""
        self.step = step
        steps = (step * self.factors).clamp(1.0, self.limit)
        self.steps.copy_(steps if doubled is None else steps * 2.0 ** doubled[:, None])

    # -- in training ----------------------------------------------------------------------------------------------

    def follow(self, progress: float, warmdown: float) -> list[str]:
        """After a step: do what is due, and say what came of it. warmdown: its share of the run."""
        moments = [1 - (warmdown or 0.5) * (1 - share) for share in MOMENTS] if self.share else []
        if self.waiting:
            if progress >= moments[self.done - 1] + GRACE:
                return [self.adjust()]
        elif self.done < len(moments) and progress >= moments[self.done]:
            self.done, self.waiting = self.done + 1, True
            if not self.ranks.rank:
                self.packer = self.packer or ThreadPoolExecutor(1)
                # The wire's buffers are written again in the next step.
                now = {name: replace(t, codes=t.codes.copy(), scales=None if t.scales is None else t.scales.copy())
                       for name, t in self.model().items()}
                self.packing = self.packer.submit(self.size, now)
        return []

    def measured(self) -> int:
        """The size that is waited for, on rank 0."""
        if self.packing is not None:
            self.found, self.packing = self.packing.result(), None
        return self.found

    def adjust(self) -> str:
        """Take the step that brings a file of the size that was found to the aim.

        Twice the step takes a bit from each code (Gish and Pierce, 1968: so the entropy falls at high rates).
        """
        size, aim, before, self.waiting = self.agree(self.measured()), self.share * self.cap, self.step, False
        if not UNDER[self.done - 1] * aim <= size <= OVER * aim:
            self.set_step(min(max(before * 2 ** (8 * (size - aim) / self.weights), 1.0), self.limit))
        return (f"size        {size:,} bytes of {self.cap:,} at moment {self.done} of {len(MOMENTS)} (margin "
                f"{self.cap - size:,}); step of the embedding {before:.3f} -> {self.step:.3f}")

    def agree(self, size: int) -> int:
        """Rank 0's number, on all ranks."""
        return int(self.ranks.sum(torch.tensor(0 if self.ranks.rank else size, device=self.steps.device)))

    def state(self) -> dict:
        """What a checkpoint has of it; of rank 0."""
        return {"step": self.step, "done": self.done, "waiting": self.waiting, "found": self.measured()}

    def restore(self, state: Mapping) -> None:
        """Raises KeyError, TypeError or ValueError on what state() did not give."""
        self.done, self.waiting, self.found = int(state["done"]), bool(state["waiting"]), int(state["found"])
        if not 0 <= self.done <= len(MOMENTS) or not 1 <= float(state["step"]) <= self.limit:
            raise ValueError(f"{state} is no state of the rate control")
        self.set_step(float(state["step"]))

    # -- after training -------------------------------------------------------------------------------------------

    def trim(self, scales: Tensor, refresh: Callable[[], object]) -> list[str]:
        """Where the file is over its cap, double the steps of rows of rare tokens until it is not, and say so; if
        nothing helps, of all. scales [rows]: what a code of 1 is worth. refresh: codes <- steps."""
        if not self.share:
            return []

        def size_with(rows: Tensor) -> int:
            self.set_step(self.step, torch.bincount(rows, minlength=len(self.steps)))
            refresh()
            return self.agree(0 if self.ranks.rank else self.size(self.model()))

        order = self.ladder(scales)
        first = size = size_with(order[:0])
        if first <= self.cap:
            return []
        low, high, best = 0, len(order) + 1, 0  # doublings: too few, and enough or more than there are; those tried
        n = int(16 * (first - self.cap) * len(self.steps) / self.weights)  # at half a bit for each weight
        while high - low > 1 and not NEAR * self.cap <= size <= self.cap:
            n = min(max(n, low + 1), high - 1)
            size = size_with(order[:n])
            low, high = (n, high) if size > self.cap else (low, n)
            best, n = n, (low + high) // 2
        if best != min(high, len(order)):
            best = min(high, len(order))
            size = size_with(order[:best])
        return [f"size        {first:,} bytes are {first - self.cap:,} over the {self.cap:,} that there are: rows of "
                f"{len(order[:best].unique()):,} rare tokens of {len(self.steps):,} rounded more coarsely, {size:,}"]

    def ladder(self, scales: Tensor) -> Tensor:
        """Rows, the one to double first first, each as often as it may be: by how much the squared error grows, times
        how often the token occurs."""
        doublings = torch.arange(DOUBLINGS, device=scales.device)
        costs = ((self.counts + 0.1) * scales.double().square())[:, None] * 4.0**doublings
        allowed = self.steps * 2.0 ** (doublings + 1) <= self.limit
        order = torch.where(allowed, costs, torch.inf).flatten().argsort(stable=True)
        return order[: int(allowed.sum())] // DOUBLINGS
