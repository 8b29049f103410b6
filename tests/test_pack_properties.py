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
GROUP_FORMATS = st.fixed_dictionaries(
    {"group_size": st.sampled_from([0, 1, 5, 64, 128, 1000]), "scale": st.sampled_from(["bf16", "fp16"])},
    optional={"rule": st.just("absmean"), "threshold": st.floats(0, 2)},
)
FORMATS = st.one_of(
    GROUP_FORMATS.map(lambda f: f | {"kind": "ternary"}),
    st.builds(lambda f, bits: f | {"kind": "int", "bits": bits}, GROUP_FORMATS, st.integers(2, 8)),
    st.sampled_from([{"kind": "bf16"}, {"kind": "fp16"}, {"kind": "fp32"}]),
)
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from(EDGES)),
    st.tuples(st.sampled_from([0, 1, 2, 5, 16]), st.sampled_from(EDGES)),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(EDGES)),
)


def symbols(kind: str, shape: tuple[int, ...], fill: str, seed: int) -> np.ndarray:
    """An array of a symbol kind: random over its whole range, or one value everywhere."""
    dtype = np.dtype(pack.SYMBOLS[kind]).newbyteorder("=")
    high = pack.range_of(kind)[1] if dtype.itemsize == 1 else 2 ** (8 * dtype.itemsize) - 1
    low = -high if dtype.kind == "i" else 0
    if fill == "random":
        return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype)
    return np.full(shape, {"low": low, "high": high, "zero": 0}[fill], dtype)


FILLS = st.sampled_from(["random", "random", "low", "high", "zero"])


@st.composite
def stored_tensors(draw) -> StoredTensor:
    fmt, shape, fill, seed = draw(FORMATS), draw(SHAPES), draw(FILLS), draw(st.integers(0, 2**32))
    codes = symbols(pack.layout(fmt, shape)["codes"][0], shape, fill, seed)
    scales = pack.scale_shape(fmt, shape)
    return StoredTensor(shape, fmt, codes, None if scales is None else symbols("u16", scales, draw(FILLS), seed + 1))


NAMES = st.text(min_size=1, max_size=20).filter(str.isprintable)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@EXAMPLES
@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=40))
def test_base3_is_the_number_it_claims_to_be(codes):
    """Against arithmetic by hand: sum of (code + 1) * 3^position, five positions to a byte."""
    data = pack.pack_base3(np.array(codes, np.int8))
    assert list(data) == [sum((c + 1) * 3**i for i, c in enumerate(codes[k : k + 5])) for k in range(0, len(codes), 5)]
    assert pack.unpack_base3(data, len(codes)).tolist() == codes


@EXAMPLES
@given(st.integers(2, 8), st.sampled_from(EDGES), FILLS, st.integers(0, 2**32))
def test_bits_are_the_number_they_claim_to_be(bits, n, fill, seed):
    """The whole stream is one little-endian number: sum of (code + limit) * 2^(bits * position)."""
    codes, limit = symbols(f"int{bits}", (n,), fill, seed), 2 ** (bits - 1) - 1
    data = pack.pack_bits(codes, f"int{bits}")
    assert len(data) == math.ceil(n * bits / 8)
    assert int.from_bytes(data, "little") == sum((int(c) + limit) << (bits * i) for i, c in enumerate(codes))
    assert np.array_equal(pack.unpack_bits(data, n, f"int{bits}"), codes)


@EXAMPLES
@given(st.binary(max_size=4), st.integers(0, 20))
def test_base3_has_one_encoding_for_each_input(data, n):
    """What unpacks at all packs to the very same bytes."""
    try:
        codes = pack.unpack_base3(data, n)
    except pack.ArtifactError:
        return
    assert pack.pack_base3(codes) == data


@EXAMPLES
@given(st.binary(max_size=4), st.integers(0, 16), st.integers(2, 8))
def test_bits_have_one_encoding_for_each_input(data, n, bits):
    try:
        codes = pack.unpack_bits(data, n, f"int{bits}")
    except pack.ArtifactError:
        return
    assert pack.pack_bits(codes, f"int{bits}") == data


@EXAMPLES
@given(st.sampled_from(sorted(pack.CODECS)), st.data())
def test_codec_round_trip(name, data):
    codec = pack.CODECS[name]
    kind = data.draw(st.sampled_from(codec.kinds))
    n = data.draw(st.sampled_from(EDGES[1:] if codec.compressor else EDGES))
    x = symbols(kind, (n,), data.draw(FILLS), data.draw(st.integers(0, 2**32)))
    back = codec.decode(codec.encode(x, kind), n, kind)
    assert back.dtype == x.dtype and np.array_equal(back, x)


@EXAMPLES
@given(st.dictionaries(NAMES, stored_tensors(), max_size=5), st.dictionaries(st.text(), JSON, max_size=3))
def test_artifact_round_trip(tensors, meta):
    """Bit for bit, in order, canonical, with shapes that agree with layout and shares that add up."""
    data = pack.encode_artifact(tensors, meta)
    back, back_meta = pack.decode_artifact(data)
    assert list(back) == list(tensors) and back_meta == meta
    assert pack.first_difference(back, tensors) is None
    assert pack.encode_artifact(back, back_meta) == data
    for name, t in back.items():
        pack.check_tensor(name, t)
    found = pack.describe(data)
    assert sum(row["bytes"] for row in found["tensors"]) + found["header_bytes"] == len(data)


@EXAMPLES
@given(stored_tensors())
def test_stream_is_never_longer_than_the_plain_packing(t):
    plain = {"ternary": lambda n: -(-n // 5), "u16": lambda n: 2 * n, "u32": lambda n: 4 * n}
    for s in pack.parse_header(pack.encode_artifact({"w": t}, {})).streams:
        size = plain[s.kind](s.count) if s.kind in plain else -(-s.count * int(s.kind[3:]) // 8)
        assert s.bytes <= size


@EXAMPLES
@given(stored_tensors(), st.data())
def test_first_difference_finds_any_changed_symbol(t, data):
    role = data.draw(st.sampled_from([r for r in ("codes", "scales") if getattr(t, r) is not None]))
    array = getattr(t, role)
    if not array.size:
        return
    other = array.copy()
    at = data.draw(st.integers(0, array.size - 1))
    other.flat[at] ^= 1
    arrays = {"codes": t.codes, "scales": t.scales} | {role: other}
    found = pack.first_difference({"w": t}, {"w": StoredTensor(t.shape, t.format, **arrays)})
    assert found and f"{role}{list(map(int, np.unravel_index(at, array.shape)))}" in found


@pytest.mark.filterwarnings("error")
@EXAMPLES
@given(stored_tensors())
def test_check_values_raises_only_artifact_errors(t):
    try:
        pack.check_values("w", t)
    except pack.ArtifactError:
        return
    if t.scales is not None and t.codes.size:  # what passed has a live, finite scale wherever a code is not zero
        scale = (
            t.scales.view(np.float16)
            if t.format["scale"] == "fp16"
            else (t.scales.astype(np.uint32) << 16).view(np.float32)
        )
        codes = t.codes.reshape(t.scales.shape[0], -1)
        groups = np.arange(codes.shape[1]) // (t.format["group_size"] or codes.shape[1])
        assert np.isfinite(scale).all() and (scale[:, groups][codes != 0] != 0).all()
