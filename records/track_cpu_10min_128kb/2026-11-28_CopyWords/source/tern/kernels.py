"""Kernels: products of bf16 on any CPU, causal attention there as tiles of them, RoPE, and the loss in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tern import fused, machine

FP32_PRODUCTS = not machine.bf16_products()  # of bf16 factors, on a CPU
Q_TILE, HEAD_TILE = 128, 16  # queries and kv heads per tile, so that a tile's scores stay near the core (LOG.md)


def factors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the machine's products take them: bf16 in fp32, which holds the same values, on a CPU that has no
    products of bf16. A compiled model keeps what is between two such products in fp32 too, where eager rounds it."""
    wide = FP32_PRODUCTS and all(x.device.type == "cpu" for x in tensors)
    return tuple(x.float() if wide and x.dtype == torch.bfloat16 else x for x in tensors)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """F.linear(x, w) of x [.., inputs] and w [outputs, inputs], a tensor or packed.Packed: sums in fp32, rounded to x's
    dtype."""
    if not isinstance(w, Tensor):
        return F.linear(x, w)
    return F.linear(*factors(x, w)).to(x.dtype)


class Linear(nn.Linear):
    """A block matrix [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def attention_tiles(q: Tensor, k: Tensor, window: int) -> Iterator[tuple[slice, slice, slice]]:
    """(kv heads, queries, keys) of each tile of causal attention; q [n, r, queries, dim] are the last of k's times, and
    see `window` of them, or all where it is 0."""
    before = k.shape[1] - q.shape[2]
    for head in range(0, q.shape[0], HEAD_TILE):
        for start in reversed(range(0, q.shape[2], Q_TILE)):  # the first tile sees every key, without a window
            end = min(start + Q_TILE, q.shape[2])
            first = max(before + start - window + 1, 0) if window else 0
            yield slice(head, head + HEAD_TILE), slice(start, end), slice(first, before + end)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, keep: bool, window: int) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T / sqrt(head_dim)) v under a causal mask, on a CPU.

    q: [n, r, queries, head_dim], r query heads for each of the n key and value heads k, v: [n, time, head_dim]; the
    queries are those of the last positions. A query sees its own position and window - 1 before it; 0: all before it
    (sliding-window attention: Longformer, arXiv 2004.05150, section 3.1). Returns the output in q's shape and, if keep,
    the probabilities of each tile, which the backward needs. The mathematics is that of F.scaled_dot_product_attention,
    which takes two to three times as long on a CPU (LOG.md). A score is rounded to the dtype of the products, as in any
    attention made of them; the softmax is fp32 inside.
    """
    dtype, (q, k, v) = q.dtype, factors(q, k, v)
    r, dim = q.shape[1], q.shape[3]
    out, probabilities = torch.empty_like(q, memory_format=torch.contiguous_format), []
    unseen, q = torch.full((Q_TILE, Q_TILE), -math.inf, dtype=q.dtype), q * dim**-0.5
    above, before = unseen.triu(1), k.shape[1] - q.shape[2]
    for heads, rows, keys in attention_tiles(q, k, window):
        n = rows.stop - rows.start
        scores = torch.bmm(q[heads, :, rows].flatten(1, 2), k[heads, keys].mT)
        of_rows = scores.unflatten(1, (r, n))
        of_rows[..., -n:] += above[:n, :n]
        if window and before + rows.stop > window:  # the last rows do not see the first keys
            missing = keys.start - (before + rows.start - window + 1)  # keys that the tile's first row could see too
            of_rows[..., :n] += unseen.tril(-1 - missing)[:n, :n]
        p = torch.softmax(scores, -1)
        out[heads, :, rows] = torch.bmm(p, v[heads, keys]).unflatten(1, (r, n))
        probabilities += [p] if keep else []
    return out.to(dtype), probabilities


def causal_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor],
                              window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output: the softmax's backward between four matrix products."""
    dtype, (grad, q, k, v) = q.dtype, factors(grad, q, k, v)
    r, scale = q.shape[1], q.shape[-1] ** -0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    new = torch.zeros if window else torch.empty  # without a window a head's first tile writes all of it
    dk, dv = new(k.shape), new(v.shape)  # fp32: a key's gradient is a sum over tiles
    for p, (heads, rows, keys) in zip(probabilities, attention_tiles(q, k, window), strict=True):
        g, queries = grad[heads, :, rows].flatten(1, 2), q[heads, :, rows].flatten(1, 2)
        ds = torch._softmax_backward_data(torch.bmm(g, v[heads, keys].mT), p, -1, p.dtype)
        dq[heads, :, rows] = torch.bmm(ds, k[heads, keys]).unflatten(1, (r, -1))
        add = Tensor.copy_ if not window and keys.stop == k.shape[1] else Tensor.add_
        add(dv[heads, keys], torch.bmm(p.mT, g))
        add(dk[heads, keys], torch.bmm(ds.mT, queries))
    return (dq * scale).to(dtype), (dk * scale).to(dtype), dv.to(dtype)


# What is compiled takes these as they are. The first call of an op imports torch's compiler, which takes 2 s, so
# that other programs call the functions.
attention_op = torch.library.custom_op("tern::causal_attention", causal_attention, mutates_args=())
attention_backward_op = torch.library.custom_op("tern::causal_attention_backward", causal_attention_backward,
                                                mutates_args=())


@attention_op.register_fake
def _(q, k, v, keep, window):
    shapes = [(len(range(q.shape[0])[heads]), q.shape[1] * (rows.stop - rows.start), keys.stop - keys.start)
              for heads, rows, keys in attention_tiles(q, k, window) if keep]
    return q.new_empty(q.shape), [factors(q)[0].new_empty(shape) for shape in shapes]


@attention_backward_op.register_fake
def _(grad, q, k, v, probabilities, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    ctx.window = inputs[4]
    ctx.save_for_backward(*inputs[:3], *output[1])


def attention_gradients(ctx, grad: Tensor, _) -> tuple:
    q, k, v, *probabilities = ctx.saved_tensors
    return *attention_backward_op(grad, q, k, v, probabilities, ctx.window), None, None


attention_op.register_autograd(attention_gradients, setup_context=keep_for_backward)


class CausalAttention(torch.autograd.Function):
    """The same of what is not compiled."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        output = causal_attention(*inputs)
        keep_for_backward(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable  # the probabilities are constants to a second derivative
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, *probabilities = ctx.saved_tensors
        return *causal_attention_backward(grad, q, k, v, probabilities, ctx.window), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal attention of q [batch, heads, queries, head_dim], the last of the times of k, v [batch, kv_heads, time,
    head_dim], to the last `window` positions, its own among them; 0: to all."""
    queries, time, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    window = window if window < time else 0
    if q.device.type == "cpu":
        q = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1)
        inputs = q, k.flatten(0, 1), v.flatten(0, 1), torch.is_grad_enabled(), window
        out = attention_op(*inputs)[0] if torch.compiler.is_compiling() else CausalAttention.apply(*inputs)
        return out.view(len(k), -1, *out.shape[2:])
    if queries == time and not window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = torch.ones(queries, time, dtype=torch.bool, device=q.device).tril(time - queries)
    mask = mask.triu(time - queries - window + 1) if window else mask
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa)


def rope_tables(ids: Tensor, half: int, base: float) -> Tensor:
    """cos and sin of RoPE's angles, fp32 [2, time, half], for ids [.., time]. An op, so that a compiled step computes
    them once: inlined into the kernels that use them, they cost a sine for each element of every q and k."""
    return (rope_op if torch.compiler.is_compiling() else rope_of)(ids, half, base)


def rope_of(ids: Tensor, half: int, base: float) -> Tensor:
    frequency = base ** -(torch.arange(half, device=ids.device, dtype=torch.float32) / half)
    angle = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


rope_op = torch.library.custom_op("tern::rope_tables", rope_of, mutates_args=())


@rope_op.register_fake
def _(ids, half, base):
    return ids.new_empty(2, ids.shape[-1], half, dtype=torch.float32)


def previous(x: Tensor) -> Tensor:
    """x [batch, time, ..] one position later, zeros first."""
    return F.pad(x, (0,) * (2 * (x.ndim - 2)) + (1, 0))[:, :-1]


def offset_keys(k: Tensor) -> Tensor:
    """Rotated keys [batch, heads, time, head_dim], of which half the dimensions, those that RoPE turns slowest, are
    those of the token before; zeros first.

    A head whose queries look for the token before finds what followed it, without another head that moves it there
    (modded-nanogpt, "key offset"; KV shifting attention, arXiv 2411.19574).
    """
    half = k.shape[-1] // 2
    slow = torch.arange(2 * half, device=k.device) % half >= half // 2
    return torch.where(slow, F.pad(k, (0, 0, 1, 0))[:, :, :-1], k)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [batch, heads, time, head_dim], halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def token_losses(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """F.cross_entropy without reduction, fp32 [..], of logits [.., vocab_size] within +-cap and targets [..], in one
    pass over the logits."""
    target = torch.where(torch.arange(logits.shape[-1], device=logits.device) == targets[..., None], logits, 0.0)
    # With a cap of 40 no exponential leaves fp32, so that the maximum need not be looked for first.
    shift = torch.full_like(logits[..., :1], cap) if cap <= 40 else logits.detach().amax(-1, keepdim=True)
    return (logits - shift).exp().sum(-1).log() + shift[..., 0] - target.sum(-1)


# ---------------------------------------------------------------------------------------------------------------
# For a GPU: ops around the kernels of tern/fused.py
# ---------------------------------------------------------------------------------------------------------------


def fuses(x: Tensor, *widths: int) -> bool:
    """Whether the fused kernels serve x and matrices of these widths: bf16 on a GPU that has tensor maps (Hopper)."""
    return (fused.AVAILABLE and x.device.type == "cuda" and x.dtype == torch.bfloat16
            and all(w % 8 == 0 for w in widths)
            and torch.cuda.get_device_properties(x.device).major >= 9)


@torch.library.custom_op("tern::mix_and_norm_backward", mutates_args=())
def mix_and_norm_backward(dmixed: Tensor, dnormed: Tensor, x: Tensor, x0: Tensor, mix: Tensor
                          ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, x0 and mix."""
    dmixed, dnormed, rows, rows0 = (t.contiguous().flatten(0, -2) for t in (dmixed, dnormed, x, x0))
    dx, dx0, dmix = fused.mix_backward(dmixed, dnormed, rows, rows0, mix)
    return dx.view(x.shape), dx0.view(x.shape), dmix


@mix_and_norm_backward.register_fake
def _(dmixed, dnormed, x, x0, mix):
    return x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(mix)


class MixAndNorm(torch.autograd.Function):
    """mix_and_norm; a compiler sees into the forward."""

    @staticmethod
    def forward(ctx, x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, x0, mix)
        mixed = mix[0] * x + mix[1] * x0
        return mixed, F.rms_norm(mixed, (mixed.shape[-1],))

    @staticmethod
    def backward(ctx, dmixed: Tensor, dnormed: Tensor):
        return mix_and_norm_backward(dmixed, dnormed, *ctx.saved_tensors)


def mix_and_norm(x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """(mixed = mix[0] x + mix[1] x0, norm(mixed)) of x, x0 [batch, time, dim] and mix [2, dim]."""
    return MixAndNorm.apply(x, x0.view_as(x0), mix)  # compiled, it takes no tensor twice, and at first x is x0


@torch.library.custom_op("tern::relu_squared_products", mutates_args=())
def relu_squared_products(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z = a down^T, scale, a = relu(x up^T)^2) of x [rows, dim]; scale [rows], fp32, makes scale * a norm(a)."""
    a, sums = fused.up_squared(x.contiguous(), up)
    return a @ down.mT, torch.rsqrt(sums / a.shape[1] + torch.finfo(torch.float32).eps), a  # the eps of F.rms_norm


@torch.library.custom_op("tern::branches_backward", mutates_args=())
def branches_backward(dy: Tensor, branch: Tensor, gain: Tensor, middle: Tensor, up: Tensor, down: Tensor,
                      mlp_gain: Tensor, z: Tensor, scale: Tensor, a: Tensor
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gain, up, down and mlp_gain."""
    dy, middle = dy.contiguous().flatten(0, -2), middle.flatten(0, -2)
    dz, pull, dmlp_gain = fused.scaled_branch_backward(dy, mlp_gain, z, scale, a.shape[1])
    du = fused.down_backward(dz, down, a, pull)
    dx, dbranch, dgain = fused.branch_backward(dy, du @ up, gain, branch.contiguous().flatten(0, -2))
    return dx.view(branch.shape), dbranch.view(branch.shape), dgain, du.mT @ middle, dz.mT @ a, dmlp_gain


@relu_squared_products.register_fake
def _(x, up, down):
    rows = x.shape[0]
    return x.new_empty(rows, down.shape[0]), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, up.shape[0])


@branches_backward.register_fake
def _(dy, branch, gain, middle, up, down, mlp_gain, z, scale, a):
    return (branch.new_empty(branch.shape), branch.new_empty(branch.shape),
            *(torch.empty_like(w) for w in (gain, up, down, mlp_gain)))


class AddBranches(torch.autograd.Function):
    """add_branches; a compiler sees into the forward, but for the products."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, gain: Tensor, up: Tensor, down: Tensor, mlp_gain: Tensor) -> Tensor:
        middle = x + gain * branch
        z, scale, a = relu_squared_products(middle.flatten(0, -2), up, down)
        ctx.save_for_backward(branch, gain, middle, up, down, mlp_gain, z, scale, a)
        return middle + mlp_gain * (z * scale[:, None]).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return branches_backward(dy, *ctx.saved_tensors)


def add_branches(x: Tensor, branch: Tensor, gain: Tensor, up: Tensor, down: Tensor, mlp_gain: Tensor) -> Tensor:
    """The end of a block: middle + mlp_gain * mlp(middle) of middle = x + gain * branch, for x and branch [batch, time,
    dim], both gains [dim].

    mlp(x) is norm(relu(norm(x) up^T)^2) down^T; the first norm is left out, as a row's scale has no effect (the eps of
    the second aside).
    """
    return AddBranches.apply(x, branch, gain, up, down, mlp_gain)


@torch.library.custom_op("tern::split_and_rotate", mutates_args=())
def split_and_rotate(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, time, heads or kv heads, head_dim] of qkv [batch, time, (heads + 2 kv heads) * head_dim]: q and k
    normalised and rotated by cos, sin [time, head_dim / 2], q times gain [heads]."""
    return fused.split_and_rotate(qkv.contiguous(), gain, cos.contiguous(), sin.contiguous(), heads, kv_heads)


@torch.library.custom_op("tern::split_and_rotate_backward", mutates_args=())
def split_and_rotate_backward(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
                              ) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and gain."""
    return fused.split_and_rotate_backward(qkv, gain, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous())


@split_and_rotate.register_fake
def _(qkv, gain, cos, sin, heads, kv_heads):
    dim = qkv.shape[2] // (heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], n, dim) for n in (heads, kv_heads, kv_heads))
    return q, k, v


@split_and_rotate_backward.register_fake
def _(qkv, gain, cos, sin, dq, dk, dv):
    return torch.empty_like(qkv), torch.empty_like(gain)


split_and_rotate.register_autograd(
    lambda ctx, *grads: (*split_and_rotate_backward(*ctx.saved_tensors, *grads), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4]))
