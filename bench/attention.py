"""Causal attention on this CPU: torch's SDPA against tern/kernels.py, in time and in exactness.

    python bench/attention.py                       # 8,192 tokens at several lengths and head counts
    python bench/attention.py --tiles 64x8 128x8 128x16 256x8

Medians of alternating calls, and relative errors (Frobenius norms) of the output and of the gradients of q, k and v in
bf16 against float64, on queries and keys normalised as the model normalises them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tern import kernels, machine
from train_gpt import norm

SHAPES = ((32, 2, 256), (16, 2, 512), (16, 3, 512), (8, 3, 1024), (8, 5, 1024))  # sequences, query heads, length
HEAD_DIM, ROUNDS, GAIN = 64, 9, 1.5


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the dtype of its inputs."""
    scores = q @ k.mT * HEAD_DIM**-0.5 + torch.full((q.shape[2],) * 2, -torch.inf, dtype=q.dtype).triu(1)
    return scores.softmax(-1) @ v


def run(attention: Callable, inputs: list[Tensor], grad: Tensor) -> tuple[list[float], list[Tensor]]:
    """Seconds of forward and backward; output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    marks = [time.perf_counter()]
    out = attention(*leaves)
    marks.append(time.perf_counter())
    out.backward(grad)
    marks.append(time.perf_counter())
    return [b - a for a, b in zip(marks, marks[1:], strict=False)], [out.detach(), *(x.grad for x in leaves)]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--tiles", nargs="+", default=[f"{kernels.Q_TILE}x{kernels.HEAD_TILE}"],
                   help="queries x kv heads of a tile, such as 128x16; several are compared")
    args = p.parse_args()
    machine.keep_freed_memory()
    torch.set_num_threads(machine.cores())
    print("ms forward + backward, and relative errors of out, dq, dk, dv; one kv head")
    for sequences, heads, length in SHAPES:
        torch.manual_seed(0)
        shape = (sequences, heads, length, HEAD_DIM)
        q = GAIN * norm(torch.randn(shape))
        k = norm(torch.randn(sequences, 1, length, HEAD_DIM) + 0.7 * torch.randn(HEAD_DIM))
        inputs = [x.bfloat16() for x in (q, k, torch.randn(sequences, 1, length, HEAD_DIM))]
        grad = torch.randn(shape).bfloat16()
        _, exact = run(reference, [x.double() for x in inputs], grad.double())
        sides = {"sdpa": (sdpa, None)} | {tile: (kernels.attend, tile) for tile in args.tiles}
        times: dict[str, list[list[float]]] = {name: [] for name in sides}
        errors: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, (attention, tile) in sides.items():
                if tile:
                    kernels.Q_TILE, kernels.HEAD_TILE = map(int, tile.split("x"))
                seconds, results = run(attention, inputs, grad)
                times[name].append(seconds)
                errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
        print(f"{sequences} x {heads} heads, length {length}")
        for name, rows in times.items():
            forward, backward = (1000 * statistics.median(x) for x in zip(*rows[1:], strict=True))
            ratio = statistics.median(sum(a) / sum(b) for a, b in zip(times["sdpa"][1:], rows[1:], strict=True))
            print(f"  {name:<8}{forward:>7.1f} +{backward:>6.1f}   {ratio:>5.2f} times as fast   errors "
                  + " ".join(f"{e:.1e}" for e in errors[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
