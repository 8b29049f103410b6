"""Rate control: a step for integers with which a file takes the bytes that it may."""

from __future__ import annotations

from collections.abc import Callable


def fit(size_of: Callable[[float], int], step: float, most: float, weights: int, low: int, aim: int, cap: int
        ) -> list[tuple[float, int]]:
    """The steps that were tried, each with its size; the last is near the aim, in [low, cap] where there is such a
    step; else it is the finest one, 1, if that is still too small, or the coarsest, `most`, if that is still too large.

    size_of: bytes of the file for a step; its last call is for the step that stays. weights: how many integers have the
    step; twice the step takes a bit from each (Gish and Pierce, 1968: so the entropy falls at high rates).
    """
    tried = [(step, size_of(step))]
    while not low <= tried[-1][1] <= cap and len(tried) < 7:
        step, size = tried[-1]
        wanted = min(max(step * 2 ** (8 * (size - aim) / weights), 1.0), most)
        if wanted == step:
            break
        tried.append((wanted, size_of(wanted)))
    while tried[-1][1] > cap and tried[-1][0] < most:  # the law does not hold here: then by small steps
        wanted = min(1.05 * tried[-1][0], most)
        tried.append((wanted, size_of(wanted)))
    return tried
