"""Scales on a grid of octaves: the values that the codes of log4 to log8 stand for."""

from __future__ import annotations


def log_values(bits: int) -> list[float]:
    """The scales that the codes of log<bits> stand for, [2^bits]: 16 octaves of 2^(bits - 4) steps from 2^-12."""
    steps = 2 ** (bits - 4)
    values = [2.0 ** (c // steps - 12) * (1 + round(128 * (2 ** (c % steps / steps) - 1)) / 128)
              for c in range(2**bits)]
    return [0.0, *values[1:]]
