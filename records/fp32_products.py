"""For programs of before 0.2.0 on a CPU without products of bf16: the same factors, multiplied in fp32.

Where torch has no kernel for such products it takes some twenty times as long for them (LOG.md, laptops). This
trainer computes them in fp32 there (tern.kernels.linear), records of before do not, and a pair of both would compare
nothing but that. make_record.py --against starts such a record's program, and what that starts, with `environment`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def in_fp32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product of bf16 tensors, from their fp32 values and rounded once; anything else as before."""
    @functools.wraps(product)  # Inductor finds torch's functions by their names
    def wrapped(*factors, **more):
        if torch.overrides.has_torch_function(factors):
            return torch.overrides.handle_torch_function(wrapped, factors, *factors, **more)
        if not all(isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in factors):
            return product(*factors, **more)
        out = more.pop("out", None)
        exact = product(*(x.float() for x in factors), **more)
        return exact.to(torch.bfloat16) if out is None else out.copy_(exact)

    return wrapped


def install() -> None:
    """Replace, in this process, the functions by which those programs multiply on a CPU."""
    F.linear, torch.bmm, torch.baddbmm = in_fp32(F.linear), in_fp32(torch.bmm), in_fp32(torch.baddbmm)
    Tensor.__matmul__ = in_fp32(Tensor.__matmul__)


def environment(folder: Path) -> dict[str, str]:
    """os.environ for a program: it and what it starts find in folder, written here, what Python runs first."""
    text = Path(__file__).read_text(encoding="utf-8")
    (folder / "sitecustomize.py").write_text(f"{text}\n\ninstall()\n", encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}
