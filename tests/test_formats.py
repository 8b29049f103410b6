"""Storage formats: goldens by hand, a few-line reference, and the properties that the format promises.

Those of train_gpt.py, and those of ablations/formats.py, in the trainer's tables as its `register` adds them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
import train_gpt
from ablations import formats
from ablations.formats import Binary, Codebook, Elastic, Five
from tern.groups import LOG_TABLES, decode_scales, encode_scales
from tern.settings import ConfigError
from train_gpt import Config, Float, Int, Ternary, make_format, param_of_file, to_pack

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module", autouse=True)
def losing_formats():
    with pytest.MonkeyPatch.context() as patch:
        for table, more in ((train_gpt.RULES, formats.RULES), (train_gpt.FORMATS, formats.FORMATS)):
            for name, entry in more.items():
                patch.setitem(table, name, entry)
        yield


W = torch.tensor([[0.8, -0.5, 1.2], [-1.5, 0.4, -0.9], [1.3, -0.7, 0.2]])
CODES = [[1, -1, 1], [-1, 0, -1], [1, -1, 0]]
EVERY = {  # each class, with groups that divide 20 columns, that do not, and one group in all; each kind of scale
    "ternary": lambda: Ternary(),
    "ternary, one group": lambda: Ternary(0, scale="fp16"),
    "ternary, short groups": lambda: Ternary(8, scale="log6"),
    "ternary lsq": lambda: Ternary(8, "lsq", 0.7),
    "ternary rms": lambda: Ternary(0, "rms", scale="log8"),
    "int8": lambda: Int(8),
    "int4": lambda: Int(4, 5, "log4"),
    "int2": lambda: Int(2, 0),
    "bf16": lambda: Float("bf16"),
    "fp16": lambda: Float("fp16"),
    "fp8": lambda: Float("fp8"),
    "elastic": lambda: Elastic(8),
    "binary": lambda: Binary(8),
    "five": lambda: Five(0, "fp16"),
    "codebook, one group": lambda: Codebook(3, 0),
    "codebook, two groups": lambda: Codebook(4, 10),
}


@pytest.fixture(params=EVERY)
def fmt(request) -> train_gpt.Format:
    return EVERY[request.param]()


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


def test_zero_groups_are_zero_and_not_nan(fmt):
    w = torch.randn(3, 20)
    w[1] = 0
    stored = fmt.quantize(w)
    if fmt.kind not in ("binary", "codebook"):  # which may have no code for 0
        assert (stored.codes[1].float() == 0).all()
    if fmt.kind not in ("binary", "codebook") or fmt.group_size:  # a group of its own
        assert (fmt.dequantize(stored)[1] == 0).all()
    zero = fmt.quantize(torch.zeros(3, 20))
    assert torch.isfinite(fmt.dequantize(zero)).all()
    if zero.scales is not None:
        assert (zero.scales == 0).all()


@pytest.mark.parametrize("kind", [Ternary, Elastic, Binary, Five, Int])
def test_no_scale_underflows_or_overflows(kind):
    for scale in ("bf16", "fp16"):
        for size in (1e-45, 1e-30, 1e-9, 1e9, 3e37):
            stored = kind(group_size=4, scale=scale).quantize(torch.full((1, 8), size))
            assert (stored.scales > 0).all() and torch.isfinite(stored.scales).all(), (scale, size)


def test_a_stack_is_quantized_as_its_members(fmt):
    stack = torch.randn(3, 6, 20)
    together = fmt.quantize(stack)
    for i in range(3):
        alone = fmt.quantize(stack[i])
        assert torch.equal(alone.codes, together.codes[i])
        assert alone.scales is None or torch.equal(alone.scales, together.scales[i])
        assert torch.equal(fmt.dequantize(alone), fmt.dequantize(together)[i])


def test_what_a_format_stores_is_sound_and_survives_the_file(fmt, tmp_path):
    w = torch.randn(6, 20)
    w[2] = 0
    stored, path = fmt.quantize(w), tmp_path / "model.tern"
    pack.write_artifact(path, {"w": to_pack(stored, fmt)}, {})
    assert pack.verify(path)[0].startswith("sound")
    back = pack.read_artifact(path)[0]["w"]
    assert back.format == fmt.spec()
    assert torch.equal(param_of_file(back), fmt.dequantize(stored))


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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 17), st.floats(0, 2), st.integers(0, 2**31))
def test_rules_of_ternary_are_their_definitions(rows, cols, group, threshold, seed):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    lsq, rms = (Ternary(group, rule, threshold).quantize(w) for rule in ("lsq", "rms"))
    for r in range(rows):
        for at, start in enumerate(range(0, cols, group)):
            g = w[r, start : start + group].double().numpy()
            codes, scale = lsq.codes[r, start : start + group].double().numpy(), float(lsq.scales[r, at])
            assert (codes == np.sign(g) * (np.abs(g) > threshold * np.abs(g).mean())).all()
            best = codes @ g / max(codes @ codes, 1)  # of all scales the one with the least squared error
            assert scale == pytest.approx(best, rel=2**-8)
            root = np.sqrt((g**2).mean())
            assert float(rms.scales[r, at]) == pytest.approx(root, rel=2**-8)
            codes = rms.codes[r, start : start + group].double().numpy()
            near = np.abs(np.abs(g) - threshold * root) < 1e-6 * root
            assert ((codes == np.sign(g) * (np.abs(g) > threshold * root)) | near).all()


def test_binary_is_the_sign_and_its_scale_the_best():
    stored = Binary(3).quantize(torch.tensor([[0.5, -1.0, 0.0, -2.0]]))
    assert stored.codes.tolist() == [[1, -1, 1, -1]] and stored.scales.tolist() == [[0.5, 2.0]]


def test_five_levels_are_rounded_and_clipped():
    w = torch.tensor([[0.0, 0.4, -0.6, 1.4, -1.6, 2.0]])  # mean|w| = 1
    stored = Five(0, "fp16").quantize(w)
    assert stored.codes.tolist() == [[round(x / 1.057) for x in w[0].tolist()]]
    assert Five().quantize(torch.tensor([[0.0] * 9 + [1.0]])).codes.tolist() == [[0] * 9 + [2]]


def test_five_has_the_least_error_of_its_kind():
    w = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    error = [float((fmt.dequantize(fmt.quantize(w)).float() - w).square().mean()) for fmt in (
        Five(0), type("Narrow", (Five,), {"STEP": 1.0})(0), type("Wide", (Five,), {"STEP": 1.12})(0))]
    assert error[0] == min(error)


def elastic_by_autograd(w: torch.Tensor, alpha: torch.Tensor, grad: torch.Tensor):
    """Gradients of w and alpha by LSQ's rule: round is passed straight through, and clip is not."""
    w, alpha = w.double().requires_grad_(), alpha.double().requires_grad_()
    x = 1.5 * (w / alpha).clamp(-0.99, 0.99)
    value = alpha * (x + (x.round() - x).detach()) / 1.5
    value.backward(grad.double())
    return value, w.grad, alpha.grad


def test_elastic_learns_by_its_definition():
    g = torch.Generator().manual_seed(0)
    w, grad = torch.randn(2, 3, 16, generator=g), torch.randn(2, 3, 16, generator=g)
    fmt = Elastic(16)
    state = fmt.state = fmt.start(w)
    state["theta"] += torch.randn(2, 3, 1, generator=g) / 4
    alpha = 1.5 * w.abs().mean(-1, keepdim=True) * state["theta"].exp2()
    value, dw, dalpha = elastic_by_autograd(w, alpha, grad)
    stored = fmt.quantize(w)
    assert torch.allclose(fmt.dequantize(stored).double(), value.detach(), rtol=2**-7)
    before, mine = state["theta"].clone(), grad.clone()
    fmt.learn(w, mine, 1.0)
    assert torch.equal(mine, grad * (dw != 0)), "a weight beyond alpha gets no gradient, others the param's"
    theta_grad = state["theta_mean"] / (1 - fmt.BETA1)
    assert torch.allclose(theta_grad.double(), dalpha * alpha.double() * math.log(2), rtol=1e-5)
    assert torch.allclose(state["theta"], before - fmt.LR * theta_grad.sign(), atol=1e-6), "Adam's first step"


def test_elastic_starts_as_absmean():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    a, b = Elastic(16).quantize(w), Ternary(16).quantize(w)
    assert torch.equal(a.codes, b.codes)
    assert torch.allclose(a.scales.float(), b.scales.float(), rtol=2**-7)


def nativebit(weights: list[float], codebook: list[float], **settings) -> tuple[Codebook, torch.Tensor]:
    """A codebook of one group as it is before its first step, and its latent."""
    fmt, entries = Codebook(len(codebook), 0, **settings), torch.tensor(codebook).view(1, 1, 1, -1)
    fmt.state = {"count": torch.ones_like(entries), "sum": entries.clone(), "codebook": entries.clone()}
    return fmt, torch.tensor(weights).view(1, 1, -1)


def test_codebook_reference_averages():
    fmt, w = nativebit([0.1] * 100 + [0.9], [0.0, 1.0], decay=0.9)
    fmt.learn(w, torch.zeros_like(w), 1.0)
    assert fmt.state["codebook"].flatten().tolist() == pytest.approx([1 / 10.9, 0.99])
    assert fmt.state["count"].flatten().tolist() == pytest.approx([10.9, 1.0])


def test_codebook_reference_commitment():
    """The gradient of (0.3 - 0)^2 + (0.7 - 1)^2."""
    fmt, w = nativebit([0.3, 0.7], [0.0, 1.0], commitment=1.0)
    grad = torch.zeros_like(w)
    fmt.learn(w, grad, 1.0)
    assert grad.flatten().tolist() == pytest.approx([0.6, -0.6])


def test_dead_entries_stay():
    fmt, w = nativebit([0.1, 0.2, 0.9], [0.0, 1.0, 50.0], decay=0.5)
    for _ in range(5):
        fmt.learn(w, torch.zeros_like(w), 1.0)
    assert [fmt.state[name].flatten()[2].item() for name in ("codebook", "sum", "count")] == [50.0, 50.0, 1.0]
    assert fmt.state["codebook"].flatten()[:2].tolist() != [0.0, 1.0]


def test_a_codebook_of_zeros_starts_when_there_is_something():
    fmt = Codebook(4, 8)
    fmt.state = fmt.start(torch.zeros(1, 2, 16))
    w = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))
    fmt.learn(w, torch.zeros_like(w), 1.0)
    assert all(len(set(fmt.quantize(w).codes[0, r, s].tolist())) == 4 for r in (0, 1)
               for s in (slice(0, 8), slice(8, 16)))


def test_codebook_codes_are_the_nearest_entries_in_the_file():
    g = torch.Generator().manual_seed(0)
    w, fmt = torch.randn(3, 21, generator=g), Codebook(5, 8)
    stored = fmt.quantize(w)
    entries = stored.scales.float().unflatten(-1, (-1, 5))
    for r in range(3):
        for c in range(21):
            table = entries[r, c // 8]
            assert float(fmt.dequantize(stored)[r, c]) == float(table[(table - w[r, c]).abs().argmin()])


def test_settings_name_formats():
    for name, fmt in (("ternary", Ternary(128, scale="log7")), ("binary", Binary(128, "log7")),
                      ("five", Five(128, "log7")), ("elastic", Elastic(128, "log7")), ("int6", Int(6, 128, "log7")),
                      ("codebook16", Codebook(16, 128)), ("fp8", Float("fp8"))):
        assert make_format(Config(matrix_format=name), "matrix_format") == fmt
    assert make_format(Config(ternary_rule="lsq"), "matrix_format") == Ternary(128, "lsq", scale="log7")


@pytest.mark.parametrize(("bad", "message"), [
    ({"matrix_format": "codebook1"}, "2 to 64 entries"), ({"matrix_format": "codebook65"}, "2 to 64 entries"),
    ({"embed_format": "codebook"}, "must be"), ({"ternary_rule": "median"}, "one of absmean"),
    ({"matrix_format": "quaternary"}, "must be"), ({"embed_format": "int9"}, "2 to 8 bits"),
    ({"matrix_format": "int1"}, "2 to 8 bits"), ({"scale_dtype": "fp8"}, "must be"),
    ({"vector_format": "ternary"}, "must be fp8, bf16 or fp16")])
def test_an_unknown_format_is_one_clear_error(bad, message):
    with pytest.raises(ConfigError, match=message):
        Config(**bad)


def test_what_the_trainer_knows_of_formats_in_a_file(monkeypatch):
    """Codes times scales are dequantized however they were found; a kind with other values needs its class."""
    stored = to_pack(Binary(8).quantize(torch.randn(2, 8)), Binary(8))
    codebook = to_pack(Codebook(4, 8).quantize(torch.randn(2, 8)), Codebook(4, 8))
    for name in formats.FORMATS:
        monkeypatch.delitem(train_gpt.FORMATS, name)
    more = pack.StoredTensor(stored.shape, stored.format | {"surprise": 1}, stored.codes, stored.scales)
    assert torch.equal(param_of_file(more), param_of_file(stored))
    with pytest.raises(ConfigError, match="'codebook' is none of this trainer's: ablations/program.py may know it"):
        param_of_file(codebook)


@pytest.mark.parametrize("bits", [4, 6, 8])
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
