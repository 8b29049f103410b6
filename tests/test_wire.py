"""tern/wire.py: what ranks send each other is the codes and scales of the file, to the bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import pack
from tern.wire import from_wire, to_wire
from train_gpt import Float, Int, Ternary

pytestmark = pytest.mark.fast
FORMATS = [Ternary(0), Ternary(3, scale="fp16"), Ternary(128, scale="log7"), Int(2, 4, "log4"), Int(8, 4),
           Float("fp8"), Float("bf16"), Float("fp16")]
SHAPES = [(1, 1), (6,), (3, 7), (2, 5, 5), (4, 3, 11), (3, 16, 32)]  # parameters are sent in stacks


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: "-".join(map(str, fmt.spec().values())))
def test_the_wire_carries_every_bit(fmt):
    """At any address, as segments start where the one before ends; and for any bits of a float, also of NaN."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        stored = fmt.quantize(torch.randn(shape, generator=generator))
        codes, scales = stored.codes, stored.scales
        ternary = fmt.kind == "ternary"
        if codes.is_floating_point():
            random = torch.randint(256, (codes.nbytes,), generator=generator, dtype=torch.uint8)
            codes = random.view(codes.dtype).view(shape)
        wire = to_wire(codes, scales, ternary)
        size = -(-codes.numel() // 5) if ternary else codes.nbytes
        assert wire.dtype == torch.uint8 and len(wire) == size + (0 if scales is None else scales.nbytes)
        if ternary:
            assert wire[:size].numpy().tobytes() == pack.pack_base3(codes.numpy())
        like = codes.to("meta"), None if scales is None else scales.to("meta")
        for offset in range(4):
            buffer = torch.full((len(wire) + 8,), 255, dtype=torch.uint8)
            view = buffer[offset : offset + len(wire)]
            view.copy_(wire)
            got = from_wire(view, *like, ternary)
            buffer.fill_(0)  # the next step's codes arrive there while these may be in use
            assert (got[1] is None) == (scales is None)
            for x, want in zip(got, (codes, scales), strict=True):
                if want is not None:
                    assert x.dtype == want.dtype and x.shape == want.shape
                    assert torch.equal(bits(x), bits(want)), (shape, offset)


def test_every_ternary_byte():
    """The first code is the least digit: all 243 quintuples in order are the bytes 0 to 242."""
    codes = torch.tensor([five[::-1] for five in product((-1, 0, 1), repeat=5)], dtype=torch.int8)
    wire = to_wire(codes, None, True)
    assert wire.tolist() == list(range(243)) == list(pack.pack_base3(codes.numpy()))
    assert torch.equal(from_wire(wire, codes, None, True)[0], codes)
