"""Statistics of a matrix: each row against the base, seed by seed. Lower is better, differences are row - base.

The seeds of a row and of the base are paired: same data in the same order, same initial latents where the shapes agree.
Training is chaotic, so pairing removes less noise than one would think; the standard deviation of the differences says
how much was left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE, ALPHA, POWER = 0.95, 0.05, 0.80
FLIPS = 99_999  # of signs: all of them where these are more, up to 16 pairs; else so many drawn from a fixed seed


@dataclass(frozen=True)
class Comparison:
    """A row against the base over n paired seeds. With n < 2 all but n and mean are NaN."""

    n: int
    mean: float = math.nan  # of the differences
    sd: float = math.nan  # of the differences, n - 1 in the denominator
    low: float = math.nan  # CONFIDENCE interval of the mean, by Student's t
    high: float = math.nan
    p_t: float = math.nan  # two-sided paired t-test
    p_flip: float = math.nan  # two-sided sign-flip permutation test of the mean (Fisher 1935); at least 2 / 2^n
    detectable: float = math.nan  # the smallest true difference that n seeds would have shown with POWER at ALPHA
    p_holm: float = math.nan  # p_t after Holm's correction over the matrix
    equivalent: float = math.nan  # the least bound that two one-sided tests at ALPHA would find the difference within


def compare(row: dict[int, float], base: dict[int, float]) -> Comparison:
    """Compare values by seed; seeds that only one has, or with a value that is not finite, are left out."""
    seeds = sorted(s for s in row.keys() & base.keys() if math.isfinite(row[s]) and math.isfinite(base[s]))
    d = np.array([row[s] - base[s] for s in seeds], dtype=np.float64)
    n = len(d)
    if n == 0:
        return Comparison(0)
    mean = float(d.mean())
    if n == 1:
        return Comparison(1, mean)
    sd = float(d.std(ddof=1))
    if sd <= 1e-12 * abs(mean):  # equal differences leave no doubt of their sign, and none of their being zero
        return Comparison(n, mean, sd, mean, mean, float(mean == 0), sign_flip(d), equivalent=abs(mean))
    test = stats.ttest_1samp(d, 0.0)
    inner, outer = test.confidence_interval(1 - 2 * ALPHA), test.confidence_interval(CONFIDENCE)
    return Comparison(n, mean, sd, float(outer.low), float(outer.high), float(test.pvalue), sign_flip(d),
                      detectable_difference(sd, n), equivalent=float(max(-inner.low, inner.high)))


def sign_flip(differences: np.ndarray) -> float:
    """p of the mean among those of the same differences with all their signs flipped in every way."""
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", vectorized=True,
                                  n_resamples=FLIPS, rng=0)
    return float(test.pvalue)


def detectable_difference(sd: float, n: int) -> float:
    """The true mean difference that a two-sided t-test at ALPHA finds with probability POWER, given the sd and n."""
    # The power is the mean over the standard error's own distribution, here at its quantiles: scipy's noncentral t is
    # NaN in places, for one where n is 2.
    df, quantiles = n - 1, (np.arange(20_000) + 0.5) / 20_000
    critical = stats.t.ppf(1 - ALPHA / 2, df) * np.sqrt(stats.chi2.ppf(quantiles, df) / df)

    def missing_power(effect: float) -> float:
        shift = effect * math.sqrt(n)
        return POWER - float((stats.norm.sf(critical - shift) + stats.norm.sf(critical + shift)).mean())

    return sd * optimize.brentq(missing_power, 0.0, 100.0)  # in standard deviations: with n = 2 it is 11.5


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
