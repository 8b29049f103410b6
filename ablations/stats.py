"""Statistics of a matrix: each row against the base, seed by seed. Lower is better, differences are row - base.

The seeds of a row and of the base are paired: same data in the same order, same initial latents where the shapes agree.
Training is chaotic, so pairing removes less noise than one would think; the standard deviation of the differences says
how much was left.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, ALPHA, POWER = 0.95, 0.05, 0.80
MAX_EXACT = 16  # pairs up to which all sign flips are tried
SAMPLED = 100_000  # of them beyond that


@dataclass(frozen=True)
class Comparison:
    """A row against the base over n paired seeds. With n < 2 all but n and mean are NaN."""

    n: int
    mean: float  # of the differences
    sd: float  # of the differences, n - 1 in the denominator
    low: float  # CONFIDENCE interval of the mean, by Student's t
    high: float
    p_t: float  # two-sided paired t-test
    p_flip: float  # two-sided sign-flip permutation test of the mean; at least 2 / 2^n
    detectable: float  # the smallest true difference that n seeds would have shown with POWER at ALPHA
    p_holm: float = math.nan  # p_t after Holm's correction over the matrix
    equivalent: float = math.nan  # the bound within which the 90% interval lies: half its width plus |mean|


def sign_flip(differences: np.ndarray) -> float:
    """Share of the 2^n ways to flip signs whose |mean| is no less (Fisher 1935): of all of them up to MAX_EXACT pairs,
    beyond that of the one observed and SAMPLED drawn from a fixed seed (Phipson and Smyth 2010)."""
    n = len(differences)
    if n <= MAX_EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1, -1), (SAMPLED + 1, n))
        signs[0] = 1
    means = np.abs(signs @ differences)
    return float((means >= means[0] * (1 - 1e-12)).mean())


def detectable_difference(sd: float, n: int) -> float:
    """The true mean difference that a two-sided t-test at ALPHA finds with probability POWER, given the sd and n."""
    if n < 2 or not sd > 0:
        return math.nan
    # The power is the mean over the standard error's own distribution, here at its quantiles: scipy's noncentral t is
    # NaN in places, for one where n is 2.
    df, quantiles = n - 1, (np.arange(20_000) + 0.5) / 20_000
    critical = stats.t.ppf(1 - ALPHA / 2, df) * np.sqrt(stats.chi2.ppf(quantiles, df) / df)

    def power(effect: float) -> float:
        shift = effect * math.sqrt(n)
        return float((stats.norm.sf(critical - shift) + stats.norm.sf(critical + shift)).mean())

    low, high = 0.0, 1.0  # in standard deviations
    while power(high) < POWER:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high * sd


def compare(row: dict[int, float], base: dict[int, float]) -> Comparison:
    """Compare values by seed; seeds that only one has, or with a value that is not finite, are left out."""
    seeds = sorted(s for s in row.keys() & base.keys() if math.isfinite(row[s]) and math.isfinite(base[s]))
    d = np.array([row[s] - base[s] for s in seeds], dtype=np.float64)
    n = len(d)
    mean = float(d.mean()) if n else math.nan
    if n < 2:
        return Comparison(n, mean, *[math.nan] * 6)
    sd = float(d.std(ddof=1))
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    # Equal differences leave no doubt of their sign, and none of their being zero.
    p_t = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    equivalent = abs(mean) + float(stats.t.ppf(1 - ALPHA, n - 1)) * error
    return Comparison(n, mean, sd, mean - half, mean + half, p_t, sign_flip(d), detectable_difference(sd, n),
                      equivalent=equivalent)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979) of p-values; NaN stay NaN and do not count."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, running = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * value))
        adjusted[i] = running
    return adjusted


def verdict(c: Comparison, bound: float) -> str:
    """What a comparison allows one to say. bound: the difference below which one does not care, in the same unit."""
    if c.n < 2:
        return "not tested"
    if c.p_holm < ALPHA:
        word = "better" if c.mean < 0 else "worse"
        return f"{word}, by less than {bound:g}" if c.equivalent <= bound else word
    if c.equivalent <= bound:  # two one-sided tests (Schuirmann 1987)
        return f"no effect beyond {bound:g}"
    return "undecided"
