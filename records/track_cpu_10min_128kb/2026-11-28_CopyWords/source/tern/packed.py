"""Ternary matrices as 4-bit codes and scales on a CPU, and products that read these in place of bf16 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, ROWS, ZERO = (128, 64, 32), 16, 8  # inputs of a group, rows' divisor and code of 0 that torch's kernel takes


@dataclass(frozen=True)
class Packed:
    """In place of a matrix [rows, inputs], in F.linear and torch.cat along the rows, and nowhere else.

    parts: matrices one below the other, each as what torch's _weight_int4pack_mm_for_cpu takes: codes, inputs of a
    group, and scales with zero points, bf16 [groups, rows, 2].
    """

    shape: tuple[int, int]
    parts: tuple[tuple[Tensor, int, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(codes.nbytes + scales.nbytes for codes, _, scales in self.parts)

    def product(self, x: Tensor) -> Tensor:
        """x [.., inputs] times the transposed matrix: [.., rows]; sums in fp32, as F.linear in bf16."""
        flat = x.reshape(-1, x.shape[-1])
        parts = [torch.ops.aten._weight_int4pack_mm_for_cpu(flat, *part) for part in self.parts]
        return torch.cat(parts, -1).view(*x.shape[:-1], -1)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch asks this where one of its functions is given something that is no tensor."""
        if function is F.linear and isinstance(args[1], cls):
            return args[1].product(args[0])
        if function is torch.cat and len(args) == 1 and not kwargs and all(isinstance(m, cls) for m in args[0]):
            rows = sum(matrix.shape[0] for matrix in args[0])
            return cls((rows, args[0][0].shape[1]), tuple(part for matrix in args[0] for part in matrix.parts))
        return NotImplemented


def packed(matrix: Tensor) -> Packed | None:
    """A bf16 matrix [rows, inputs] on a CPU whose groups of inputs have weights -s, 0 and s alone; None for others.

    The very same weights: what is lost where a code is multiplied with its scale is lost in bf16 already.
    """
    rows, inputs = matrix.shape
    if matrix.dtype != torch.bfloat16 or matrix.device.type != "cpu" or rows % ROWS:
        return None
    for size in GROUPS:
        if inputs % size:
            continue
        groups = matrix.unflatten(1, (-1, size))
        codes, scales = groups.sign(), groups.abs().amax(-1)
        if torch.equal(codes * scales[..., None], groups):
            held = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes.flatten(1) + ZERO).int(), 1)
            scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
            return Packed((rows, inputs), ((held, size, scales_and_zeros),))
    return None


@torch.no_grad()
def pack_matrices(model: nn.Module) -> None:
    """Put a Packed into each linear layer of a model whose matrix is one; the others stay as they are.

    Layers below one module may be joined into one product, as queries, keys and values are, so all of those with as
    many inputs become one, or none.
    """
    for parent in model.modules():
        linear: dict[int, list[nn.Linear]] = {}
        for layer in parent.children():
            if isinstance(layer, nn.Linear) and layer.bias is None:
                linear.setdefault(layer.in_features, []).append(layer)
        for layers in linear.values():
            weights = [packed(layer.weight) for layer in layers]
            if all(weight is not None for weight in weights):
                for layer, weight in zip(layers, weights, strict=True):
                    del layer.weight  # a parameter would have to be a tensor
                    layer.weight = weight  # type: ignore[assignment]
