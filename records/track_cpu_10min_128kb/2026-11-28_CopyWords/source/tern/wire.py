"""Codes and scales as bytes between processes: ternary codes five to a byte, others and scales as they are."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tern import base3


def to_wire(codes: Tensor, scales: Tensor | None, ternary: bool) -> Tensor:
    """uint8 [bytes] of codes and scales of any shape; ternary: the codes are in {-1, 0, 1}."""
    codes = codes.flatten()
    if ternary:
        digits = F.pad((codes + 1).to(torch.uint8), (0, -len(codes) % base3.PER_BYTE)).view(-1, base3.PER_BYTE)
        codes = base3.join_digits(digits)
    parts = [codes] if scales is None else [codes, scales.flatten()]
    return torch.cat([x.view(torch.uint8) for x in parts])


@functools.cache
def codes_of_bytes(device: torch.device) -> Tensor:
    """Byte -> its five codes, int8 [243, 5]."""
    return torch.from_numpy(base3.CODES).to(device)


def from_wire(data: Tensor, codes: Tensor, scales: Tensor | None, ternary: bool) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) of what to_wire gave; the arguments have their shapes and dtypes. data may be longer."""
    count = codes.numel()
    size = -(-count // base3.PER_BYTE) if ternary else codes.nbytes
    end = size if scales is None else size + scales.nbytes
    sent, sent_scales = data[:size].clone(), data[size:end].clone()  # clones: a 16-bit view needs an even address
    sent = codes_of_bytes(data.device)[sent.int()].flatten()[:count] if ternary else sent.view(codes.dtype)
    if scales is not None:
        scales = sent_scales.view(scales.dtype).view(scales.shape)
    return sent.view(codes.shape), scales
