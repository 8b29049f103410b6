"""What a card can do, kernel by kernel: matrix products in several precisions, attention, copies, launches.

Used by gpu.py: its stage machine measures how fast these are, its stage correct whether they are right.
"""

from __future__ import annotations

import fcntl
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def alone(lock: str, shared: bool = False) -> Iterator[None]:
    """Hold the file `lock`, alone or with others that share it; without a name nothing is held.

    Of several programs on one card, which may compile side by side, one at a time measures, and nothing compiles then,
    since it might keep the host from the card. One that shares goes before one that waits to be alone.
    """
    if not lock:
        yield
        return
    with open(lock, "ab") as f:
        fcntl.flock(f, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


class Clock:
    """Marks in the device's own time: CUDA events, or the host's clock for a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        """Between two marks. Waits for the device."""
        if self.device.type == "cpu":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def median(self, function: Callable[[], object], repeats: int) -> float:
        """Seconds of a call, warm."""
        for _ in range(min(repeats, 3)):
            function()
        marks = []
        for _ in range(repeats):
            start = self.mark()
            function()
            marks.append((start, self.mark()))
        return statistics.median(self.seconds(*pair) for pair in marks)


def copy_rate(clock: Clock, size: int, repeats: int) -> float:
    """Bytes read and written per second when `size` bytes are copied."""
    source, target = (torch.ones(size // 4, device=clock.device) for _ in range(2))
    return 2 * size / clock.median(lambda: target.copy_(source), repeats)


def launch_seconds(clock: Clock, count: int = 1000) -> dict[str, float]:
    """Seconds from one kernel that has nothing to do to the next: asked for one by one, and in a CUDA graph."""
    x = torch.zeros(1, device=clock.device)

    def launch() -> None:
        for _ in range(count):
            x.add_(1)

    found = {"one by one": clock.median(launch, 3) / count}
    if clock.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        found["in a CUDA graph"] = clock.median(graph.replay, 3) / count
    return found


# ---------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """a b^T of a [m, k] and b [n, k] as some precision rounds them."""

    run: Callable[[], Tensor]  # [m, n]
    operands: Callable[[], tuple[Tensor, Tensor]]  # what is multiplied, rounded, in float64


def rounded(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes of x [m, k] in 8 bits, fp32 scales [m, groups]): each `group` of a row has a scale that its largest fits.
    """
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    grouped = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scales = grouped.abs().amax(-1).clamp(min=1e-12) / limit
    codes = grouped / scales[..., None]
    if dtype == torch.int8:
        codes = codes.round()
    return codes.flatten(1)[:, : x.shape[1]].contiguous().to(dtype), scales


def values(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return codes.double() * scales.double().repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def bf16(a: Tensor, b: Tensor) -> Product:
    a, b = a.bfloat16(), b.bfloat16()
    return Product(lambda: a @ b.mT, lambda: (a.double(), b.double()))


def fp8_rows(a: Tensor, b: Tensor, fast: bool = True) -> Product:
    """A scale for each row of a and of b. fast: sums in fewer bits than fp32, as Hopper adds them."""
    group, e4m3 = a.shape[1], torch.float8_e4m3fn
    (qa, sa), (qb, sb) = rounded(a, group, e4m3), rounded(b, group, e4m3)
    scale_b = sb.mT.contiguous()
    return Product(lambda: torch._scaled_mm(qa, qb.mT, sa, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast),
                   lambda: (values(qa, sa, group), values(qb, sb, group)))


def fp8_rows_exact_sums(a: Tensor, b: Tensor) -> Product:
    return fp8_rows(a, b, fast=False)


def fp8_blocks(a: Tensor, b: Tensor) -> Product:
    """A scale for each 128 inputs of a row of a and of b; the scales of all rows lie beside each other in memory."""
    (qa, sa), (qb, sb) = (rounded(x, 128, torch.float8_e4m3fn) for x in (a, b))
    scale_a, scale_b = sa.mT.contiguous().mT, sb.mT.contiguous()
    return Product(lambda: torch._scaled_mm(qa, qb.mT, scale_a, scale_b, out_dtype=torch.bfloat16),
                   lambda: (values(qa, sa, 128), values(qb, sb, 128)))


def int8(a: Tensor, b: Tensor) -> Product:
    """Of the codes alone: exact, int32."""
    (qa, _), (qb, _) = (rounded(x, x.shape[1], torch.int8) for x in (a, b))
    return Product(lambda: torch._int_mm(qa, qb.mT), lambda: (qa.double(), qb.double()))


EIGHT_BITS: dict[str, Callable[[Tensor, Tensor], Product]] = {
    "fp8 rows": fp8_rows, "fp8 rows, fp32 sums": fp8_rows_exact_sums, "fp8 1x128": fp8_blocks, "int8": int8,
}
PRECISIONS = {"bf16": bf16} | EIGHT_BITS
NOT_THERE = (RuntimeError, ValueError, NotImplementedError, AttributeError)  # what torch raises for want of a kernel
# What a product y = x w^T of x [rows, inputs] needs in all: each as (m, k, n) of rows, inputs and outputs.
DIRECTIONS: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "forward": lambda rows, inputs, outputs: (rows, inputs, outputs),
    "input gradient": lambda rows, inputs, outputs: (rows, outputs, inputs),
    "weight gradient": lambda rows, inputs, outputs: (outputs, rows, inputs),
}


def product_rate(clock: Clock, precision: str, shape: tuple[int, int, int], repeats: int) -> float:
    """Operations per second of [m, k] x [k, n], shape (m, k, n), on random data. Raises what torch raises where it has
    no such product."""
    m, k, n = shape
    a, b = (torch.randn(rows, k, device=clock.device) for rows in (m, n))
    product = PRECISIONS[precision](a, b)
    del a, b
    return 2.0 * m * k * n / clock.median(product.run, repeats)


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}


def attention_inputs(shape: tuple[int, int, int, int, int], device: torch.device) -> tuple[Tensor, ...]:
    """Random bf16 q, k, v and gradient of the output; shape: batch, heads, kv heads, time, head dim."""
    batch, heads, kv_heads, time_, dim = shape
    return tuple(torch.randn(batch, n, time_, dim, device=device).bfloat16()
                 for n in (heads, kv_heads, kv_heads, heads))


def attention_rates(clock: Clock, attend: Callable[[Tensor, Tensor, Tensor], Tensor],
                    shape: tuple[int, int, int, int, int], repeats: int) -> tuple[float, float]:
    """Seconds of (attend forward, forward and backward)."""
    *inputs, gradient = attention_inputs(shape, clock.device)
    q, k, v = (x.requires_grad_() for x in inputs)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

    with torch.no_grad():
        forward = clock.median(lambda: attend(q, k, v), repeats)
    return forward, clock.median(both, repeats)


def attend_by(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention by one of torch's back ends, or by none other."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def attention_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its definition, of q, the last of k's times."""
    queries, time_, repeat = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeat, 1), v.double().repeat_interleave(repeat, 1)
    seen = torch.ones(queries, time_, dtype=torch.bool, device=q.device).tril(time_ - queries)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v
