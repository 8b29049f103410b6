"""Storage formats: goldens by hand, a few-line reference, and the properties that the format promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
from train_gpt import (
    LOG_TABLES,
    Config,
    ConfigError,
    Float,
    Int,
    Ternary,
    decode_scales,
    encode_scales,
    from_pack,
    to_pack,
)

W = torch.tensor([[0.8, -0.5, 1.2], [-1.5, 0.4, -0.9], [1.3, -0.7, 0.2]])
CODES = [[1, -1, 1], [-1, 0, -1], [1, -1, 0]]
ALL_FORMATS = [Ternary(), Ternary(4, scale="fp16"), Ternary(0), Ternary(8, scale="log6"), Int(8), Int(4, 5), Int(2, 0),
               Int(4, 16, "log8"), Int(5, 3, "log4"), Float("bf16"), Float("fp16"), Float("fp8")]


def test_hand_golden_as_one_group():
    stored = Ternary(group_size=0).quantize(W)
    assert stored.codes.tolist() == CODES and stored.codes.dtype == torch.int8
    assert stored.scales.tolist() == [[pytest.approx(7.5 / 9, rel=2**-8)]]
    assert Ternary(group_size=9).quantize(W.reshape(1, 9)).codes.tolist() == [sum(CODES, [])]


def test_hand_golden_dequantize():
    param = Ternary(group_size=0).dequantize(Ternary(group_size=0).quantize(W))
    assert param.dtype == torch.bfloat16
    assert param.float().tolist() == [[c * 0.83203125 for c in row] for row in CODES]  # 0.8333 rounded to bf16


def test_a_weight_at_the_threshold_is_zero():
    """round(0.5) is 0 in BitNet's RoundClip: the threshold belongs to zero."""
    assert Ternary(4).quantize(torch.tensor([[0.5, -0.5, 1.5, -1.5]])).codes.tolist() == [[0, 0, 1, -1]]


def reference_ternary(w: np.ndarray, group: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = np.zeros(w.shape, dtype=np.int8), []
    for r in range(w.shape[0]):
        row = []
        for start in range(0, w.shape[1], group):
            g = w[r, start : start + group].astype(np.float64)
            mean = np.abs(g).mean()
            codes[r, start : start + group] = [0 if abs(x) <= threshold * mean else (1 if x > 0 else -1) for x in g]
            row.append(mean)
        scales.append(row)
    return codes, np.array(scales)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 17), st.floats(0, 2), st.integers(0, 2**31))
def test_ternary_is_the_reference_for_any_shape(rows, cols, group, threshold, seed):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    stored = Ternary(group, threshold=threshold).quantize(w)
    codes, scales = reference_ternary(w.numpy(), group, threshold)
    assert (stored.codes.numpy() == codes).all()
    assert stored.scales.shape == scales.shape == (rows, math.ceil(cols / group))
    np.testing.assert_allclose(stored.scales.float().numpy(), scales, rtol=2**-8)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-12, 1e12), st.integers(0, 2**31), st.sampled_from([1, 8, 128, 0]),
       st.sampled_from(["bf16", "fp16"]))
def test_codes_ignore_scale_and_follow_sign(c, seed, group, scale):
    w = torch.randn(7, 50, generator=torch.Generator().manual_seed(seed))
    fmt = Ternary(group, scale=scale)
    assert torch.equal(fmt.quantize(w * c).codes, fmt.quantize(w).codes)
    assert torch.equal(fmt.quantize(-w).codes, -fmt.quantize(w).codes)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_zero_groups_are_zero_and_not_nan(fmt):
    w = torch.randn(3, 20)
    w[1] = 0
    stored = fmt.quantize(w)
    assert (stored.codes[1].float() == 0).all()
    assert (fmt.dequantize(stored)[1] == 0).all()
    zero = fmt.quantize(torch.zeros(3, 20))
    assert torch.isfinite(fmt.dequantize(zero)).all()
    if zero.scales is not None:
        assert (zero.scales == 0).all()


@pytest.mark.parametrize("scale", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-9, 1e9, 3e37])
@pytest.mark.parametrize("kind", [Ternary, Int])
def test_no_scale_underflows_or_overflows(kind, size, scale):
    stored = kind(group_size=4, scale=scale).quantize(torch.full((1, 8), size))
    assert (stored.scales > 0).all() and torch.isfinite(stored.scales).all()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_a_stack_is_quantized_as_its_members(fmt):
    stack = torch.randn(3, 6, 20)
    together = fmt.quantize(stack)
    for i in range(3):
        alone = fmt.quantize(stack[i])
        assert torch.equal(alone.codes, together.codes[i])
        assert alone.scales is None or torch.equal(alone.scales, together.scales[i])
        assert torch.equal(fmt.dequantize(alone), fmt.dequantize(together)[i])


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_formats_survive_the_file(fmt, tmp_path):
    stored = fmt.quantize(torch.randn(6, 20))
    pack.write_artifact(tmp_path / "a", {"w": to_pack(stored, fmt)}, {})
    back, back_fmt = from_pack(pack.read_artifact(tmp_path / "a")[0]["w"])
    assert back_fmt == fmt
    assert torch.equal(fmt.dequantize(stored), back_fmt.dequantize(back))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_int_error_is_at_most_half_a_step(bits, seed):
    w = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    stored = Int(bits, 30).quantize(w)
    limit = 2 ** (bits - 1) - 1
    assert stored.codes.abs().max() <= limit
    exact = stored.codes.double() * stored.scales.double()
    # half a step, and what clipping at the limit loses because the scale was rounded to bf16
    slack = limit * stored.scales.double() * 2**-8
    assert ((w.double() - exact).abs() <= stored.scales.double() / 2 + slack).all()


@pytest.mark.parametrize("bad", [{"matrix_format": "quaternary"}, {"embed_format": "int9"}, {"scale_dtype": "fp8"},
                                 {"vector_format": "ternary"}, {"matrix_format": "int1"}])
def test_an_unknown_format_is_one_clear_error(bad):
    with pytest.raises(ConfigError, match="must be"):
        Config(**bad)


def test_an_unknown_format_in_a_file_is_an_error():
    tensor = to_pack(Ternary().quantize(torch.randn(2, 8)), Ternary())
    with pytest.raises(ConfigError, match="surprise"):
        from_pack(pack.StoredTensor(tensor.shape, tensor.format | {"surprise": 1}, tensor.codes, tensor.scales))


@pytest.mark.parametrize("bits", range(4, 9))
def test_log_scales_are_exact_in_bf16_and_nearest_by_ratio(bits):
    table = LOG_TABLES[f"log{bits}"]
    steps = 2 ** (bits - 4)
    assert table[0] == 0 and len(table) == 2**bits and (table.diff() > 0).all()
    assert torch.equal(table.bfloat16().float(), table)
    exact = 2.0 ** (torch.arange(1, 2**bits).double() / steps - 12)
    assert ((table[1:].double() / exact).log2().abs() < 2**-8 * 1.45).all()  # half a unit of a 7-bit mantissa
    x = torch.logspace(-4, 1.5, 500)
    code = encode_scales(x, x > 0, f"log{bits}")
    assert code.dtype == torch.uint8 and (code > 0).all()
    inside = (x > table[1]) & (x < table[-1])
    away = (x.double().log2() + 12) * steps - code
    assert inside.any() and (away[inside].abs() <= 0.5 + 1e-5).all()
    assert torch.equal(decode_scales(code, f"log{bits}"), table[code.long()])


def test_log_scales_saturate_and_keep_zero():
    x = torch.tensor([0.0, 1e-30, 1e-5, 2.0**-12, 1.0, 1e4])
    code = encode_scales(x, x > 0, "log6")
    assert code.tolist() == [0, 1, 1, 1, 48, 63]
