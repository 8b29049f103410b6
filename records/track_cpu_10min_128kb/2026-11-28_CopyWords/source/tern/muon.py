"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tern.kernels import factors


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Approximately orthogonalise each matrix of g [n, rows, cols] in bf16: U V^T of its SVD, singular values ~1.

    Quintic iteration with the coefficients of the page above. The sums are in fp32, inside of the products; on a CPU
    without products of bf16 all of it is.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    (x,) = factors(g.bfloat16())
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(latent: Tensor, buffer: Tensor, grad: Tensor, momentum: Tensor, rate: Tensor, decay: Tensor,
                steps: int) -> None:
    """Muon with Nesterov momentum of matrices [n, rows, cols], in place. momentum, rate and decay have no dimensions: a
    compiled update would hold numbers to be constants, and be compiled again for others."""
    buffer.mul_(momentum).add_(grad)
    update = newton_schulz(grad + momentum * buffer, steps)
    latent.mul_(1 - decay).sub_(rate * update.float())


def muon_flops(shape: Sequence[int], steps: int) -> int:
    """Of the products of Newton-Schulz for one matrix."""
    small, large = sorted(shape)
    return steps * (4 * small * small * large + 2 * small**3)
