"""Kernels for a GPU, in Triton, behind the ops of tern/kernels.py, which call them only where there is one.

Two are products of the MLP with the elementwise work that follows them. norm(relu(x up^T)^2) down^T takes one pass over
the hidden activations beside its products, and its backward another. A norm only scales rows, so here the squares go
into the product as they are, the rows of its output are scaled, and both passes are done where a product has its tile.
Two split the joint product of attention into heads, with norm, RoPE and gain, in one pass each way. The others are
backward passes of what joins the branches of a block: one reading of each tensor, for sums over rows and over columns.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch for CPUs has none, and none of the functions below is called there
    triton = SimpleNamespace(jit=lambda kernel: kernel)
AVAILABLE = not isinstance(triton, SimpleNamespace)

# Of a kernel's tiles: rows, columns, depth of a step, warps, stages of the loads' pipeline; whether that runs on from
# tile to tile, and whether a tile is stored as two halves. Found on an H200 (LOG.md, one H200).
UP = (128, 256, 64, 8, 3, True, True)
DOWN = (128, 256, 64, 8, 3, True, True)

# ---------------------------------------------------------------------------------------------------------------
# The MLP
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right columns of a tile."""
    return x.reshape((ROWS, 2, COLS // 2)).permute((0, 2, 1)).split()


@triton.jit
def up_kernel(x, up, squares, sums, rows, cols, inner, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
              FLAT: tl.constexpr, SPLIT: tl.constexpr):
    """squares = relu(x up^T)^2, and for each tile of columns the sums over its rows of squares^2."""
    across = tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=FLAT):
        row, col = tile // across * ROWS, tile % across * COLS
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for k in range(0, inner, INNER):
            acc = tl.dot(x.load([row, k]), tl.trans(up.load([col, k])), acc)
        u = tl.maximum(acc, 0.0)
        u = u * u
        if SPLIT:
            left, right = halves(u, ROWS, COLS)
            left = left.to(squares.dtype)
            squares.store([row, col], left)
            right = right.to(squares.dtype)
            squares.store([row, col + COLS // 2], right)
            left = left.to(tl.float32)
            right = right.to(tl.float32)
            total = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        else:
            a = u.to(squares.dtype)
            squares.store([row, col], a)
            a = a.to(tl.float32)
            total = tl.sum(a * a, 1)
        index = row + tl.arange(0, ROWS)
        tl.store(sums + tile % across * rows + index, total, mask=index < rows)


@triton.jit
def down_backward_kernel(dz, down, squares, pull, du, rows, cols, inner, ROWS: tl.constexpr, COLS: tl.constexpr,
                         INNER: tl.constexpr, FLAT: tl.constexpr, SPLIT: tl.constexpr):
    """du = 2 sqrt(squares) (dz down + pull squares), pull per row."""
    across = tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=FLAT):
        row, col = tile // across * ROWS, tile % across * COLS
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for k in range(0, inner, INNER):
            acc = tl.dot(dz.load([row, k]), down.load([k, col]), acc)
        index = row + tl.arange(0, ROWS)
        factor = tl.load(pull + index, mask=index < rows, other=0.0)[:, None]
        if SPLIT:
            left, right = halves(acc, ROWS, COLS)
            a = squares.load([row, col]).to(tl.float32)
            du.store([row, col], (2.0 * tl.sqrt(a) * (left + factor * a)).to(du.dtype))
            a = squares.load([row, col + COLS // 2]).to(tl.float32)
            du.store([row, col + COLS // 2], (2.0 * tl.sqrt(a) * (right + factor * a)).to(du.dtype))
        else:
            a = squares.load([row, col]).to(tl.float32)
            du.store([row, col], (2.0 * tl.sqrt(a) * (acc + factor * a)).to(du.dtype))


def launch(kernel, tile: tuple, rows: int, cols: int, inner: int, left: Tensor, right: Tensor, transposed: bool, *rest
           ) -> None:
    """One program for each multiprocessor, which takes tile after tile; rest: other tensors, [rows, cols] or of rows.
    """
    size_r, size_c, size_k, warps, stages, flat, split = tile
    tiles = triton.cdiv(rows, size_r) * triton.cdiv(cols, size_c)
    at_once = torch.cuda.get_device_properties(left.device).multi_processor_count if left.is_cuda else 4
    blocks = [TensorDescriptor.from_tensor(left, [size_r, size_k]),
              TensorDescriptor.from_tensor(right, [size_c, size_k] if transposed else [size_k, size_c])]
    for x in rest:
        whole = x.shape == (rows, cols)
        blocks.append(TensorDescriptor.from_tensor(x, [size_r, size_c // 2 if split else size_c]) if whole else x)
    kernel[(min(tiles, at_once),)](*blocks, rows, cols, inner, size_r, size_c, size_k, flat, split, num_warps=warps,
                                   num_stages=stages)


def up_squared(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(a = relu(x up^T)^2, sums of a^2 over its rows in fp32) of x [rows, inner] and up [cols, inner]."""
    (rows, inner), cols = x.shape, up.shape[0]
    a = x.new_empty(rows, cols)
    sums = x.new_empty(triton.cdiv(cols, UP[1]), rows, dtype=torch.float32)
    launch(up_kernel, UP, rows, cols, inner, x, up, True, a, sums)
    return a, sums.sum(0)


def down_backward(dz: Tensor, down: Tensor, a: Tensor, pull: Tensor) -> Tensor:
    """Gradient of x up^T, from dz [rows, inner] that of a down^T, down [inner, cols], a [rows, cols], and pull [rows]
    fp32: what the scale of a row adds to the gradient of a, over a."""
    du = torch.empty_like(a)
    launch(down_backward_kernel, DOWN, *a.shape, dz.shape[1], dz, down, False, a, pull, du)
    return du


# ---------------------------------------------------------------------------------------------------------------
# Heads: norm, RoPE and gain of queries and keys
# ---------------------------------------------------------------------------------------------------------------

# Below, a row is one head of one token, of the joint product's output [batch, time, heads + 2 kv heads, 2 half]: first
# the queries' heads, then the keys', then the values'. HALF is the power of two that half fits in.

HEAD_ROWS = 32  # of a program


@triton.jit
def rows_of(heads, kv_heads, time, count, half, HALF: tl.constexpr, HEAD_ROWS: tl.constexpr):
    """(row, its token, its head, its time, whether it is there; column of a half, whether it is there)."""
    row = tl.program_id(0) * HEAD_ROWS + tl.arange(0, HEAD_ROWS)
    column = tl.arange(0, HALF)
    every = heads + 2 * kv_heads
    return row, row // every, row % every, row // every % time, row < count, column, column < half


@triton.jit
def heads_kernel(qkv, gain, cos, sin, q, k, v, heads, kv_heads, time, count, half, eps, HALF: tl.constexpr,
                 HEAD_ROWS: tl.constexpr):
    row, token, head, t, here, column, inside = rows_of(heads, kv_heads, time, count, half, HALF, HEAD_ROWS)
    mask = here[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * 2 * half + column[None, :]
    a = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + half, mask=mask, other=0.0).to(tl.float32)
    angle = t[:, None] * half + column[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)
    is_q, is_v = head < heads, head >= heads + kv_heads
    scale *= tl.load(gain + head, mask=here & is_q, other=1.0).to(tl.float32)
    first = tl.where(is_v[:, None], a, (a * c + b * s) * scale[:, None])
    second = tl.where(is_v[:, None], b, (b * c - a * s) * scale[:, None])
    token = token.to(tl.int64)
    for kind in tl.static_range(3):
        if kind == 0:
            out, index, mine = q, token * heads + head, is_q
        elif kind == 1:
            out, index, mine = k, token * kv_heads + head - heads, (head >= heads) & (head < heads + kv_heads)
        else:
            out, index, mine = v, token * kv_heads + head - heads - kv_heads, is_v
        to = index[:, None] * 2 * half + column[None, :]
        tl.store(out + to, first.to(out.dtype.element_ty), mask=mask & mine[:, None])
        tl.store(out + to + half, second.to(out.dtype.element_ty), mask=mask & mine[:, None])


@triton.jit
def heads_backward_kernel(qkv, gain, cos, sin, dq, dk, dv, dqkv, dgain, heads, kv_heads, time, count, half, eps,
                          HALF: tl.constexpr, HEAD_ROWS: tl.constexpr):
    row, token, head, t, here, column, inside = rows_of(heads, kv_heads, time, count, half, HALF, HEAD_ROWS)
    mask = here[:, None] & inside[None, :]
    is_q, is_v = head < heads, head >= heads + kv_heads
    token = token.to(tl.int64)
    da = tl.zeros((HEAD_ROWS, HALF), dtype=tl.float32)
    db = tl.zeros((HEAD_ROWS, HALF), dtype=tl.float32)
    for kind in tl.static_range(3):  # the mask is false in all of them but one
        if kind == 0:
            grad, index, mine = dq, token * heads + head, is_q
        elif kind == 1:
            grad, index, mine = dk, token * kv_heads + head - heads, (head >= heads) & (head < heads + kv_heads)
        else:
            grad, index, mine = dv, token * kv_heads + head - heads - kv_heads, is_v
        at = index[:, None] * 2 * half + column[None, :]
        da += tl.load(grad + at, mask=mask & mine[:, None], other=0.0).to(tl.float32)
        db += tl.load(grad + at + half, mask=mask & mine[:, None], other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * 2 * half + column[None, :]
    turned = mask & (head < heads + kv_heads)[:, None]
    a = tl.load(qkv + at, mask=turned, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + half, mask=turned, other=0.0).to(tl.float32)
    angle = t[:, None] * half + column[None, :]
    c = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)
    g = tl.load(gain + head, mask=here & is_q, other=1.0).to(tl.float32)
    a *= scale[:, None]  # normalised
    b *= scale[:, None]
    ta, tb = da * c - db * s, da * s + db * c  # turned back
    along = tl.sum(ta * a, 1) + tl.sum(tb * b, 1)
    tl.store(dgain + token * heads + head, along, mask=here & is_q)
    mean, factor = (along / (2 * half))[:, None], (g * scale)[:, None]
    tl.store(dqkv + at, tl.where(is_v[:, None], da, (ta - a * mean) * factor).to(dqkv.dtype.element_ty), mask=mask)
    tl.store(dqkv + at + half, tl.where(is_v[:, None], db, (tb - b * mean) * factor).to(dqkv.dtype.element_ty),
             mask=mask)


def head_sizes(qkv: Tensor, heads: int, kv_heads: int) -> tuple:
    """(the grid; what both kernels take as sizes) of qkv [batch, time, (heads + 2 kv heads) * head_dim]."""
    batch, time, width = qkv.shape
    half = width // (heads + 2 * kv_heads) // 2
    count = batch * time * (heads + 2 * kv_heads)
    sizes = (heads, kv_heads, time, count, half, torch.finfo(torch.float32).eps, triton.next_power_of_2(half),
             HEAD_ROWS)
    return (triton.cdiv(count, HEAD_ROWS),), sizes


def split_and_rotate(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, time, heads or kv heads, head_dim] of qkv [batch, time, (heads + 2 kv heads) * head_dim]: q and k
    normalised and turned by cos, sin [time, head_dim / 2], q times gain [heads]."""
    grid, sizes = head_sizes(qkv, heads, kv_heads)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], n, 2 * sizes[4]) for n in (heads, kv_heads, kv_heads))
    heads_kernel[grid](qkv, gain, cos, sin, q, k, v, *sizes)
    return q, k, v


def split_and_rotate_backward(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor,
                              dv: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and gain from those of q, k, v, contiguous."""
    grid, sizes = head_sizes(qkv, dq.shape[2], dk.shape[2])
    dqkv, dgain = torch.empty_like(qkv), qkv.new_empty(dq.shape[:3], dtype=torch.float32)
    heads_backward_kernel[grid](qkv, gain, cos, sin, dq, dk, dv, dqkv, dgain, *sizes)
    return dqkv, dgain.sum((0, 1)).to(gain.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Residuals: backward passes over rows of the model's width
# ---------------------------------------------------------------------------------------------------------------

# A program takes every so many rows, one at a time, and keeps its share of the sums over all rows in registers. DIM is
# the power of two that dim fits in.

# Warps of a program, programs of a multiprocessor: found on an H200, where others take up to a quarter longer.
MIX, BRANCH = (2, 6), (4, 5)


@triton.jit
def load_row(x, row, dim, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    return tl.load(x + row * dim + column, mask=column < dim, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, row, value, dim, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    tl.store(x + row * dim + column, value.to(x.dtype.element_ty), mask=column < dim)


@triton.jit
def mix_backward_kernel(dmixed, dnormed, x, x0, mix, dx, dx0, dmix, rows, dim, eps, DIM: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    a, b = load_row(mix, 0, dim, DIM), load_row(mix, 1, dim, DIM)
    da, db = tl.zeros((DIM,), dtype=tl.float32), tl.zeros((DIM,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        u, v = load_row(x, row, dim, DIM), load_row(x0, row, dim, DIM)
        d, dn = load_row(dmixed, row, dim, DIM), load_row(dnormed, row, dim, DIM)
        mixed = (a * u + b * v).to(x.dtype.element_ty).to(tl.float32)
        scale = tl.rsqrt(tl.sum(mixed * mixed, 0) / dim + eps)
        along = tl.sum(dn * mixed, 0) / dim * scale * scale
        d += scale * (dn - along * mixed)
        store_row(dx, row, a * d, dim, DIM)
        store_row(dx0, row, b * d, dim, DIM)
        da += u * d
        db += v * d
    store_row(dmix, program * 2, da, dim, DIM)
    store_row(dmix, program * 2 + 1, db, dim, DIM)


@triton.jit
def scaled_branch_backward_kernel(dy, gain, z, scale, dz, pull, dgain, rows, dim, hidden, DIM: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    g, dg = load_row(gain, 0, dim, DIM), tl.zeros((DIM,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        d, branch, s = load_row(dy, row, dim, DIM), load_row(z, row, dim, DIM), tl.load(scale + row)
        dg += d * branch * s
        d *= g
        # d scale / d a = -scale^3 a / hidden, where scale = rsqrt(mean(a^2) + eps)
        tl.store(pull + row, tl.sum(d * branch, 0) * s * s * s / -hidden)
        store_row(dz, row, d * s, dim, DIM)
    store_row(dgain, program, dg, dim, DIM)


@triton.jit
def branch_backward_kernel(dy, more, gain, branch, dx, dbranch, dgain, rows, dim, DIM: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    g, dg = load_row(gain, 0, dim, DIM), tl.zeros((DIM,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        d = load_row(dy, row, dim, DIM) + load_row(more, row, dim, DIM)
        store_row(dx, row, d, dim, DIM)
        dg += d * load_row(branch, row, dim, DIM)
        store_row(dbranch, row, d * g, dim, DIM)
    store_row(dgain, program, dg, dim, DIM)


def row_programs(x: Tensor, each: int) -> int:
    """Programs for the rows of x, so many on each multiprocessor; 4 in Triton's interpreter, which has none."""
    at_once = each * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return min(x.shape[0], at_once)


def mix_backward(dmixed: Tensor, dnormed: Tensor, x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, x0 [rows, dim] and mix [2, dim], from those of mixed = mix[0] x + mix[1] x0 and norm(mixed)."""
    (rows, dim), programs = x.shape, row_programs(x, MIX[1])
    dx, dx0, dmix = torch.empty_like(x), torch.empty_like(x0), x.new_empty(programs, 2, dim, dtype=torch.float32)
    mix_backward_kernel[(programs,)](dmixed, dnormed, x, x0, mix, dx, dx0, dmix, rows, dim,
                                     torch.finfo(torch.float32).eps, triton.next_power_of_2(dim), num_warps=MIX[0])
    return dx, dx0, dmix.sum(0).to(mix.dtype)


def scaled_branch_backward(dy: Tensor, gain: Tensor, z: Tensor, scale: Tensor, hidden: int
                           ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z [rows, dim] and gain [dim] from that of x + gain (z scale), and the pull [rows] of down_backward:
    scale [rows], fp32, is that of a norm of `hidden` values."""
    (rows, dim), programs = z.shape, row_programs(z, BRANCH[1])
    dz, pull, dgain = torch.empty_like(z), torch.empty_like(scale), z.new_empty(programs, dim, dtype=torch.float32)
    scaled_branch_backward_kernel[(programs,)](dy, gain, z, scale, dz, pull, dgain, rows, dim, hidden,
                                               triton.next_power_of_2(dim), num_warps=BRANCH[0])
    return dz, pull, dgain.sum(0).to(gain.dtype)


def branch_backward(dy: Tensor, more: Tensor, gain: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, branch [rows, dim] and gain [dim], from those of y = x + gain branch: dy and more, to be added.
    """
    (rows, dim), programs = branch.shape, row_programs(branch, BRANCH[1])
    dx, dbranch, dgain = torch.empty_like(dy), torch.empty_like(branch), dy.new_empty(programs, dim,
                                                                                      dtype=torch.float32)
    branch_backward_kernel[(programs,)](dy, more, gain, branch, dx, dbranch, dgain, rows, dim,
                                        triton.next_power_of_2(dim), num_warps=BRANCH[0])
    return dx, dbranch, dgain.sum(0).to(gain.dtype)
