"""Weights in groups, and the scale of each group as it is stored."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tern.logscale import log_values

# dtype, and smallest scale of a group that is not zero (bf16: the smallest normal, which no device flushes to zero)
FLOAT_DTYPES = {"bf16": (torch.bfloat16, 2.0**-126), "fp16": (torch.float16, 2.0**-24)}
VALUE_DTYPES = {n: dtype for n, (dtype, _) in FLOAT_DTYPES.items()} | {"fp8": torch.float8_e4m3fn}


def log_table(bits: int) -> Tensor:
    """The scales that the codes of log<bits> stand for, fp32 [2^bits]: 16 octaves of 2^(bits - 4) steps from 2^-12.

    Code 0 is a zero group. Code c is 2^(c / 2^(bits-4) - 12) with its mantissa rounded to bf16's 7 bits, so that the
    table is exact in bf16 and the same on every machine; also without torch, where a file is read for another program
    (tern/logscale.py has the formula).
    """
    return torch.tensor(log_values(bits))


LOG_TABLES = {f"log{bits}": log_table(bits) for bits in range(4, 9)}
SCALE_DTYPES = (*FLOAT_DTYPES, *LOG_TABLES)


def split_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """View x [.., rows, cols] as groups [.., rows, groups, size], zero-padded, with each group's true size [groups, 1].

    Groups run along the last (input) dimension; the last one is shorter where group_size does not divide it.
    group_size 0: the whole matrix is one group, [.., 1, 1, rows * cols]. A 1-D tensor is one row.
    """
    if group_size == 0:
        x = x.flatten(-2)[..., None, :] if x.ndim > 1 else x
    cols = x.shape[-1]
    size = min(group_size or cols, cols)
    groups = -(-cols // size)
    sizes = torch.full((groups, 1), float(size), device=x.device)
    if groups * size != cols:
        sizes[-1] = cols - (groups - 1) * size
        x = F.pad(x, (0, groups * size - cols))
    return x.unflatten(-1, (groups, size)), sizes


def join_groups(grouped: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of split_groups: drop the padding and restore the tensor's shape."""
    if grouped.shape[-3:-1].numel() == 1 and grouped.numel() == shape.numel():
        return grouped.reshape(shape)
    return grouped.flatten(-2)[..., : shape[-1]].reshape(shape)


def encode_scales(scales: Tensor, nonzero: Tensor, dtype: str) -> Tensor:
    """Scales as they are stored: zero exactly for zero groups, never rounded to zero or infinity for the others.

    bf16 and fp16 are the values; log4 to log8 are uint8 codes, the nearest by ratio.
    """
    if dtype in LOG_TABLES:
        steps = len(LOG_TABLES[dtype]) // 16
        codes = ((scales.clamp(min=2.0**-126).log2() + 12) * steps).round().clamp(1, 16 * steps - 1)
        return torch.where(nonzero, codes, 0.0).to(torch.uint8)
    kind, smallest = FLOAT_DTYPES[dtype]
    return torch.where(nonzero, scales.clamp(smallest, torch.finfo(kind).max), 0.0).to(kind)


def decode_scales(stored: Tensor, dtype: str) -> Tensor:
    """The fp32 values of stored scales."""
    return LOG_TABLES[dtype].to(stored.device)[stored.long()] if dtype in LOG_TABLES else stored.float()


def bit_patterns(x: Tensor) -> np.ndarray:
    """A tensor as pack.py has it: floats of 16 bits or less become their bit patterns."""
    x = x.detach().cpu().contiguous()
    return x.view(getattr(torch, f"uint{8 * x.itemsize}")).numpy() if x.is_floating_point() else x.numpy()


def from_patterns(array: np.ndarray, dtype: str) -> Tensor:
    """The inverse of bit_patterns; dtype: a float's name, or anything else for integers."""
    x = torch.from_numpy(array.copy())
    return x.view(VALUE_DTYPES[dtype]) if dtype in VALUE_DTYPES else x
