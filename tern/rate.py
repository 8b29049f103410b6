"""Rate control: a step for integers with which a file takes the bytes that it may."""

from __future__ import annotations

from collections.abc import Callable

MOST_TRIES = 8


def fit(size_of: Callable[[float], int], step: float, most: float, weights: int, low: int, aim: int, cap: int
        ) -> list[tuple[float, int]]:
    """The steps that were tried, each with its size; the last is in [low, cap], near the aim, if one was found. Else it
    is the one of the largest file under the cap, or, where no step up to `most` gives one, `most`.

    size_of: bytes of the file for a step; its last call is for the step that stays. weights: how many integers have the
    step; twice the step takes a bit from each (Gish and Pierce, 1968: so the entropy falls at high rates). Where scales
    are rounded the size is not smooth: then by halving between a step that is too fine and one that is too coarse.
    """
    tried = [(step, size_of(step))]
    while not low <= tried[-1][1] <= cap and len(tried) < MOST_TRIES:
        step, size = tried[-1]
        wanted = step * 2 ** (8 * (size - aim) / weights)
        finest = max((step for step, size in tried if size > cap), default=1.0)
        coarsest = min((step for step, size in tried if size < low), default=most)
        if not finest < wanted < coarsest:
            edge = most if size > cap else 1.0
            untried = edge in (finest, coarsest) and all(step != edge for step, _ in tried)
            wanted = edge if untried else (finest * coarsest) ** 0.5
        if coarsest / finest < 1.001:
            break
        tried.append((wanted, size_of(wanted)))
    under = [(size, step) for step, size in tried if size <= cap]
    best = max(under)[1] if under else most
    if tried[-1][0] != best:
        tried.append((best, size_of(best)))
    return tried
