"""pack.py: what holds for every input. Sizes stay around the edges: multiples of 5, of 8 and of the group."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
from pack import StoredTensor

EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)
EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 17, 24, 25, 63, 64, 65, 127, 128, 129, 130]
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from(EDGES)),
    st.tuples(st.sampled_from([0, 1, 2, 5, 16]), st.sampled_from(EDGES)),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(EDGES)),
).filter(lambda shape: math.prod(shape) <= 700)  # a float has some twenty decisions: seconds, from here on


@st.composite
def formats(draw) -> dict:
    """Any format that the packer has a row for, with the keys that the row asks for and some that mean nothing."""
    name = draw(st.sampled_from(list(pack.KINDS)))
    kind = pack.KINDS[name]
    format = {"kind": name} | {key: draw(st.integers(low, high)) for key, (low, high) in kind.numbers.items()}
    if kind.has_scale or kind.has_entries:
        format["group_size"] = draw(st.sampled_from([0, 1, 5, 64, 128, 1000]))
    if kind.has_scale:
        format["scale"] = draw(st.sampled_from(sorted(pack.SCALES)))
    return format | draw(st.fixed_dictionaries({}, optional={"rule": st.just("absmean"), "threshold": st.floats(0, 2)}))


def kind_range(kind: str) -> tuple[int, int]:
    """The smallest and largest symbol of any kind."""
    dtype = np.dtype(pack.SYMBOLS[kind])
    return (0, 2 ** (8 * dtype.itemsize) - 1) if kind in pack.FLOATS else pack.range_of(kind)


def symbols(kind: str, shape: tuple[int, ...], fill: str, seed: int) -> np.ndarray:
    """An array of a symbol kind: random over its whole range, or one value everywhere."""
    dtype, (low, high) = np.dtype(pack.SYMBOLS[kind]).newbyteorder("="), kind_range(kind)
    if fill == "random":
        return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype)
    return np.full(shape, {"low": low, "high": high, "zero": 0}[fill], dtype)


FILLS = st.sampled_from(["random", "random", "low", "high", "zero"])


@st.composite
def stored_tensors(draw) -> StoredTensor:
    fmt, shape, seed = draw(formats()), draw(SHAPES), draw(st.integers(0, 2**32))
    arrays = {role: symbols(kind, of_role, draw(FILLS), seed + len(role))
              for role, (kind, of_role) in pack.layout(fmt, shape).items()}
    kind, codes = pack.KINDS[fmt["kind"]], arrays["codes"]
    if kind.codes is not None:  # of the symbols, those that the format has
        codes = np.asarray(codes.clip(*kind.codes(fmt)))
    if not kind.has_zero:
        codes = np.where(codes == 0, np.int8(1), codes)
    return StoredTensor(shape, fmt, codes, arrays.get("scales"))


NUMBERED = st.builds("{}{}{}".format, st.sampled_from(["", "w", "h.", "h.0", "x1."]), st.integers(0, 12),
                     st.sampled_from(["", ".w", ".b", "0", ".1"]))
NAMES = st.text(min_size=1, max_size=20).filter(pack.is_printable) | NUMBERED
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def encoded(codec: str, codes: np.ndarray, kind: str) -> bytes:
    return pack.CODECS[codec].encode(codes, kind, [codes.shape])


def decoded(codec: str, data: bytes, count: int, kind: str) -> np.ndarray | None:
    """The symbols, None where the data are refused."""
    try:
        return pack.CODECS[codec].decode(data, kind, [(count,)])
    except pack.ArtifactError:
        return None


@pytest.mark.fast
@EXAMPLES
@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=40))
def test_base3_is_the_number_it_claims_to_be(codes):
    """Against arithmetic by hand: sum of (code + 1) * 3^position, five positions to a byte."""
    data = encoded("base3", np.array(codes, np.int8), "ternary")
    assert list(data) == [sum((c + 1) * 3**i for i, c in enumerate(codes[k : k + 5])) for k in range(0, len(codes), 5)]
    assert decoded("base3", data, len(codes), "ternary").tolist() == codes


@pytest.mark.fast
@EXAMPLES
@given(st.sampled_from(pack.INTS), st.sampled_from(EDGES), FILLS, st.integers(0, 2**32))
def test_bits_are_the_number_they_claim_to_be(kind, n, fill, seed):
    """The whole stream is one little-endian number: sum of (code - smallest) * 2^(bits * position)."""
    codes, bits, low = symbols(kind, (n,), fill, seed), pack.bits_of(kind), kind_range(kind)[0]
    data = encoded("bits", codes, kind)
    assert len(data) == math.ceil(n * bits / 8)
    assert int.from_bytes(data, "little") == sum((int(c) - low) << (bits * i) for i, c in enumerate(codes))
    assert np.array_equal(decoded("bits", data, n, kind), codes)


@pytest.mark.fast
@EXAMPLES
@given(st.integers(1, 20), st.data())
def test_base3_has_one_encoding_for_each_input(n, more):
    """Bytes of the right number are refused for a sixth digit or a padding that is not 0, or pack to the very same."""
    data = more.draw(st.binary(min_size=-(-n // 5), max_size=-(-n // 5)))
    codes = decoded("base3", data, n, "ternary")
    assert (codes is None) == (max(data) > 242 or data[-1] >= 3 ** (n % 5 or 5))
    assert codes is None or encoded("base3", codes, "ternary") == data


@pytest.mark.fast
@EXAMPLES
@given(st.integers(1, 16), st.sampled_from(pack.INTS), st.data())
def test_bits_have_one_encoding_for_each_input(n, kind, more):
    bits, (low, high) = pack.bits_of(kind), kind_range(kind)
    size = -(-n * bits // 8)
    data = more.draw(st.binary(min_size=size, max_size=size))
    number = int.from_bytes(data, "little")
    digits = [number >> bits * i & 2**bits - 1 for i in range(n)]
    codes = decoded("bits", data, n, kind)
    assert (codes is None) == (max(digits) > high - low or number >> bits * n != 0)
    assert codes is None or encoded("bits", codes, kind) == data


ROWS = st.lists(st.tuples(NUMBERED, st.sampled_from([(), (5,), (2, 3)]), st.integers(0, 1)), max_size=12)
LAYERS = st.builds(
    lambda before, first, layers, parts: [
        (f"{before}{i}{after}", shape, 0) for i in range(first, first + layers) for after, shape in parts],
    st.sampled_from(["", "h.", "x1."]), st.integers(0, 11), st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["", ".w", ".b"]), st.sampled_from([(5,), (2, 3)])), min_size=1, max_size=3))


@pytest.mark.fast
@settings(EXAMPLES, max_examples=400)
@given(ROWS | st.lists(LAYERS, max_size=4).map(lambda parts: sum(parts, [])))
def test_folding_loses_nothing_and_has_one_form(rows):
    """What folds unfolds to the same rows, which fold alike; no two layers in a row could have been one run."""
    table = pack.fold(rows)
    back = [(name, tuple(shape), index) for name, shape, index in pack.unfold(table)]
    assert back == rows and pack.fold(back) == table
    for a, b in zip(table, table[1:], strict=False):
        assert not (len(a) == len(b) == 4 and [a[0], a[1] + a[2], a[3]] == [b[0], b[1], b[3]])
    assert all(len(entry) == 3 or entry[2] > 1 for entry in table)


@EXAMPLES
@given(st.dictionaries(NAMES, stored_tensors(), max_size=5), st.dictionaries(st.text(), JSON, max_size=3))
def test_artifact_round_trip(tensors, meta):
    """Bit for bit, in order, canonical, in the shapes that layout says, with shares that add up."""
    data = pack.encode_artifact(tensors, meta)
    back, back_meta = pack.decode_artifact(data)
    assert list(back) == list(tensors) and back_meta == meta
    assert pack.first_difference(back, tensors) is None
    assert pack.encode_artifact(back, back_meta) == data
    found = pack.describe(data)
    assert sum(row["bytes"] for row in found["tensors"]) + found["header_bytes"] == len(data)


@EXAMPLES
@given(stored_tensors())
def test_stream_is_never_longer_than_the_plain_packing(t):
    plain = {"ternary": lambda n: -(-n // 5), "five": lambda n: n, "u8": lambda n: n, "u16": lambda n: 2 * n,
             "u32": lambda n: 4 * n}
    for s in pack.parse_header(pack.encode_artifact({"w": t}, {})).streams:
        size = plain[s.kind](s.count) if s.kind in plain else -(-s.count * pack.bits_of(s.kind) // 8)
        assert s.bytes <= size


@pytest.mark.fast
@EXAMPLES
@given(stored_tensors().filter(lambda t: t.codes.size), st.data())
def test_first_difference_finds_any_changed_symbol(t, data):
    role = data.draw(st.sampled_from([r for r in ("codes", "scales") if getattr(t, r) is not None]))
    array = getattr(t, role)
    other = array.copy()
    at = data.draw(st.integers(0, array.size - 1))
    other.flat[at] ^= 1
    arrays = {"codes": t.codes, "scales": t.scales} | {role: other}
    found = pack.first_difference({"w": t}, {"w": StoredTensor(t.shape, t.format, **arrays)})
    assert found and f"{role}{list(map(int, np.unravel_index(at, array.shape)))}" in found


def floats(kind: str, patterns: np.ndarray) -> np.ndarray:
    """Bit patterns as floats; of a log scale its codes, of which 0 is the scale 0 and all others are positive."""
    if kind == "fp8":
        return np.where(patterns & 0x7F == 0x7F, np.nan, 1.0)
    if kind == "bf16":
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.view({"fp16": np.float16, "fp32": np.float32}[kind]) if kind in ("fp16", "fp32") else patterns


def is_sound(t: StoredTensor) -> bool:
    """Whether a model can have these values: finite, and with a scale wherever a code is not zero."""
    kind = pack.KINDS[t.format["kind"]]
    if t.scales is None:
        return bool(np.isfinite(floats(t.format["kind"], t.codes)).all())
    scales = floats(t.format.get("scale", "bf16"), t.scales)
    if not np.isfinite(scales).all():
        return False
    if not (kind.has_scale and kind.has_zero) or not t.codes.size:
        return True
    codes = t.codes.reshape(len(scales), -1)
    groups = np.arange(codes.shape[1]) // (t.format["group_size"] or codes.shape[1])
    return bool((scales[:, groups][codes != 0] != 0).all())


@pytest.mark.fast
@pytest.mark.filterwarnings("error")
@settings(EXAMPLES, max_examples=300)
@given(stored_tensors())
def test_values_are_checked_by_their_meaning(t):
    try:
        pack.check_values("w", t)
        accepted = True
    except pack.ArtifactError:
        accepted = False
    assert accepted == is_sound(t)
