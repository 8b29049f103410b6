"""Base 3: five ternary codes to a byte, as digits code + 1, the least significant first."""

from __future__ import annotations

import numpy as np

PER_BYTE = 5  # 3^5 = 243 of 256 values: 1.6 bits a code, log2(3) = 1.585 being the least for equally likely ones
CODES = (np.arange(3**PER_BYTE)[:, None] // 3 ** np.arange(PER_BYTE) % 3).astype(np.int8) - 1  # [byte, digit] -> code


def join_digits(digits):
    """Digits 0, 1, 2, uint8 [n, 5], to bytes, uint8 [n]; of numpy or torch, whatever they are."""
    return sum(digits[:, i] * 3**i for i in range(PER_BYTE))  # at most 242: no overflow in uint8
