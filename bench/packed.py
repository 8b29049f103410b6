"""Products with ternary matrices on this CPU: bf16 weights, 4-bit codes (tern/packed.py), 2-bit codes by torch.compile.

    python bench/packed.py [--preset pr367] [--rows 1 64] [--threads 1]

For each shape of a block's matrices: medians of alternating calls, each on the next of enough copies that no weight is
still in a cache, in microseconds and in shares of the dense product's time; bytes of the weights likewise; and the
relative error (Frobenius norm) against float64, which is that of the output's own rounding to bf16.
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

from tern import command, machine
from tern.packed import packed
from train_gpt import PRESETS, Config, Ternary

CACHE, ROUNDS, SMALLEST = 64 << 20, 11, 64  # bytes that a cache may hold; calls; inputs of a group


def pack_two_bits(codes: Tensor) -> Tensor:
    """Codes int8 [rows, inputs] as uint8 [rows, groups, 16]: the i-th of each quarter of a group in byte i."""
    quarters = (codes + 1).to(torch.uint8).view(len(codes), -1, 4, SMALLEST // 4)
    return sum(quarters[:, :, i] << 2 * i for i in range(4))  # type: ignore[return-value]


def two_bit_product(x: Tensor, held: Tensor, scales: Tensor) -> Tensor:
    """x [1 or more, inputs] bf16; a fused sum for one row, and for more an unpacked matrix."""
    quarters = [((held >> 2 * i) & 3).float() - 1 for i in range(4)]
    if len(x) > 1:
        return F.linear(x, (torch.stack(quarters, 2).flatten(2) * scales[..., None]).flatten(1).to(x.dtype))
    inputs = x.view(1, -1, 4, SMALLEST // 4).float()
    total = sum(codes * inputs[:, :, i] for i, codes in enumerate(quarters))
    return (total * scales[..., None]).sum((1, 2))[None].to(x.dtype)


def compare(ways: dict[str, Callable[[int], Tensor]], copies: int) -> dict[str, float]:
    """Median seconds of a call of each way, in turn, each call on another copy."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            for copy in range(copies):
                way(copy)
            times[name].append((time.perf_counter() - began) / copies if round_ else float("nan"))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


@torch.inference_mode()
def measure(rows: int, inputs: int, batch: int) -> None:
    """One shape, on so many rows of x."""
    copies = CACHE // (2 * rows * inputs) + 1
    fmt = Ternary(group_size=SMALLEST, scale="bf16")
    stored = [fmt.quantize(torch.randn(rows, inputs)) for _ in range(copies)]
    dense = [fmt.dequantize(s) for s in stored]
    four = [packed(matrix) for matrix in dense]
    two = [(pack_two_bits(s.codes), s.scales.float()) for s in stored]
    x, product = torch.randn(batch, inputs).bfloat16(), torch.compile(two_bit_product, dynamic=False)
    ways = {"bf16": lambda i: F.linear(x, dense[i]), "4 bits": lambda i: F.linear(x, four[i])}
    if machine.can_compile(torch.device("cpu")):
        ways["2 bits"] = lambda i: product(x, *two[i])
    size = {"bf16": dense[0].nbytes, "4 bits": four[0].nbytes, "2 bits": two[0][0].nbytes + two[0][1].nbytes // 2}
    exact = x.double() @ dense[0].double().mT
    seconds = compare(ways, copies)
    for name, way in ways.items():
        error = float((way(0).double() - exact).norm() / exact.norm())
        print(f"{rows:5} x {inputs:<5} {batch:4} {name:>7} {1e6 * seconds[name]:9.0f} us "
              f"{seconds[name] / seconds['bf16']:6.2f} {size[name] / size['bf16']:6.3f} {error:.1e}", flush=True)


def main(argv: list[str] | None = None) -> int:
    p = command.Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=tuple(PRESETS), default="pr367", help="whose shapes")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="rows of x: tokens at once")
    p.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = p.parse_args(argv)
    machine.keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    c = Config(**PRESETS[args.preset])
    narrow = c.num_kv_heads * (c.model_dim // c.num_heads)
    shapes = {(rows, c.model_dim) for rows in (c.model_dim, narrow, c.hidden_dim)} | {(c.model_dim, c.hidden_dim)}
    print(f"{'matrix':>13} {'rows':>4} {'weights':>7} {'time':>12} {'time':>6} {'bytes':>6} error")
    for rows, inputs in sorted(shapes):
        for batch in args.rows:
            measure(rows, inputs, batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
