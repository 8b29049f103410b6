"""Kernels for a GPU, in Triton: two products of the MLP, each with the elementwise work that follows it.

Imported only where there is a GPU (tern/kernels.py). y = product(norm(relu(x up^T)^2), down^T) takes two passes over
the hidden activations beside its products, and its backward one more. A norm only scales rows, so here the squares go
into the product as they are, the rows of its output are scaled, and both passes are done where a product has its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLS, INNER, WARPS, STAGES = 128, 256, 64, 8, 3  # of a tile, found on an H100 (LOG.md)


@triton.jit
def up_kernel(x, up, squares, sums, rows, cols, inner, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr):
    """squares = relu(x up^T)^2, and for each tile of columns the sums over its rows of squares^2."""
    across = tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, col = tile // across * ROWS, tile % across * COLS
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for k in range(0, inner, INNER):
            acc = tl.dot(x.load([row, k]), tl.trans(up.load([col, k])), acc)
        u = tl.maximum(acc, 0.0)
        a = (u * u).to(squares.dtype)
        squares.store([row, col], a)
        a = a.to(tl.float32)
        index = row + tl.arange(0, ROWS)
        tl.store(sums + tile % across * rows + index, tl.sum(a * a, 1), mask=index < rows)


@triton.jit
def down_backward_kernel(dz, down, squares, pull, du, rows, cols, inner, ROWS: tl.constexpr, COLS: tl.constexpr,
                         INNER: tl.constexpr):
    """du = 2 sqrt(squares) (dz down + pull squares), pull per row."""
    across = tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, col = tile // across * ROWS, tile % across * COLS
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for k in range(0, inner, INNER):
            acc = tl.dot(dz.load([row, k]), down.load([k, col]), acc)
        index = row + tl.arange(0, ROWS)
        factor = tl.load(pull + index, mask=index < rows, other=0.0)
        a = squares.load([row, col]).to(tl.float32)
        du.store([row, col], (2.0 * tl.sqrt(a) * (acc + factor[:, None] * a)).to(du.dtype))


def programs(rows: int, cols: int, device: torch.device) -> tuple[int]:
    """One for each multiprocessor, which takes tile after tile."""
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(cols, COLS)
    if device.type != "cuda":  # Triton's interpreter
        return (min(tiles, 4),)
    return (min(tiles, torch.cuda.get_device_properties(device).multi_processor_count),)


def up_squared(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(a = relu(x up^T)^2, sums of a^2 over its rows in fp32) of x [rows, inner] and up [cols, inner], bf16."""
    (rows, inner), cols = x.shape, up.shape[0]
    a = x.new_empty(rows, cols)
    sums = x.new_empty(triton.cdiv(cols, COLS), rows, dtype=torch.float32)
    up_kernel[programs(rows, cols, x.device)](
        TensorDescriptor.from_tensor(x, [ROWS, INNER]), TensorDescriptor.from_tensor(up, [COLS, INNER]),
        TensorDescriptor.from_tensor(a, [ROWS, COLS]), sums, rows, cols, inner, ROWS, COLS, INNER, num_warps=WARPS,
        num_stages=STAGES)
    return a, sums.sum(0)


def down_backward(dz: Tensor, down: Tensor, a: Tensor, pull: Tensor) -> Tensor:
    """Gradient of x up^T, from dz [rows, inner] that of a down^T, down [inner, cols], a [rows, cols], and pull [rows]
    fp32: what the scale of a row adds to the gradient of a, over a."""
    (rows, inner), cols = dz.shape, down.shape[1]
    du = torch.empty_like(a)
    down_backward_kernel[programs(rows, cols, a.device)](
        TensorDescriptor.from_tensor(dz, [ROWS, INNER]), TensorDescriptor.from_tensor(down, [INNER, COLS]),
        TensorDescriptor.from_tensor(a, [ROWS, COLS]), pull, TensorDescriptor.from_tensor(du, [ROWS, COLS]), rows,
        cols, inner, ROWS, COLS, INNER, num_warps=WARPS, num_stages=STAGES)
    return du
