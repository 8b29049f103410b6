"""pack.py: golden bytes, exact sizes, determinism, atomic writes, budget and the command line."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import pack
from pack import ArtifactError, StoredTensor
from tern import checkpoints, source

fast = pytest.mark.fast
ROOT = Path(pack.__file__).parent
TERNARY = {"kind": "ternary", "group_size": 128, "rule": "absmean", "threshold": 0.5, "scale": "bf16"}
INT6 = {"kind": "int", "bits": 6, "group_size": 64, "scale": "fp16"}
LOG5 = {"kind": "ternary", "group_size": 32, "scale": "log5"}
FP8 = {"kind": "fp8"}
ONE_BF16, ONE_FP16, LARGEST_FP8 = 0x3F80, 0x3C00, 0x7E  # 0x7F would not be a number


def grouped(fmt: dict, shape: tuple[int, ...], seed: int = 0) -> StoredTensor:
    """Random codes over the format's whole range, and scales that are finite and not zero."""
    rng = np.random.default_rng(seed)
    limit = 1 if fmt["kind"] == "ternary" else 2 ** (fmt["bits"] - 1) - 1
    codes = rng.integers(-limit, limit + 1, shape).astype(np.int8)
    at = pack.layout(fmt, shape)["scales"][1]
    if fmt["scale"].startswith("log"):
        scales = rng.integers(1, 2 ** int(fmt["scale"][3:]), at).astype(np.uint8)
    else:
        scales = ({"bf16": ONE_BF16, "fp16": ONE_FP16}[fmt["scale"]] + rng.integers(0, 100, at)).astype(np.uint16)
    return StoredTensor(shape, fmt, codes, scales)


def model() -> dict[str, StoredTensor]:
    """A tensor or two of most formats. Small, for it is packed many times, and every codec tries every stream."""
    fp8 = np.random.default_rng(6).integers(0, LARGEST_FP8, (6, 16), endpoint=True).astype(np.uint8)
    return {
        "emb": grouped(INT6, (12, 96), 1),
        "a.weight": grouped(TERNARY, (16, 200), 2),
        "gain": StoredTensor((16,), {"kind": "bf16"}, np.full(16, ONE_BF16, np.uint16), None),
        "b.weight": grouped(TERNARY, (40, 64), 3),
        "bias": StoredTensor((3,), {"kind": "fp32"}, np.array([0, 0x3F800000, 0x80000000], np.uint32), None),
        "c.weight": grouped(LOG5, (8, 64), 4),
        "table": StoredTensor((6, 16), FP8, fp8, None),
    }


@functools.cache
def packed() -> bytes:
    return pack.encode_artifact(model(), {})


def write(tmp_path: Path, tensors=None) -> Path:
    """A file of model(), or of other tensors."""
    path = tmp_path / "model.bin"
    path.write_bytes(packed() if tensors is None else pack.encode_artifact(tensors, {}))
    return path


def encoded(codec: str, codes, kind: str) -> bytes:
    symbols = np.asarray(codes, pack.SYMBOLS[kind])
    return pack.CODECS[codec].encode(symbols, kind, [symbols.shape])


def decoded(codec: str, data: bytes, count: int, kind: str) -> np.ndarray:
    return pack.CODECS[codec].decode(data, kind, [(count,)])


# Packings -----------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize(("codes", "data"), [
    ([], []),
    ([-1, 0, 1, 1, -1], [75]),  # digits 0 1 2 2 0, least significant first: 0 + 1*3 + 2*9 + 2*27 + 0*81
    ([1] * 5, [242]),
    ([-1] * 5, [0]),
    ([1], [2]),  # padding digits are 0
    ([0, 0, 0, 0, 0, 1, 1], [121, 8]),
])
def test_base3_goldens(codes, data):
    assert encoded("base3", codes, "ternary") == bytes(data)
    assert decoded("base3", bytes(data), len(codes), "ternary").tolist() == codes


@fast
@pytest.mark.parametrize(("kind", "codes", "data"), [
    ("int3", [-3, 0, 3], [0b10011000, 0b1]),  # 3 bits, lowest first: 0, 3, 6 -> 000 | 011 << 3 | 110 << 6
    ("int8", [-127, 0, 127], [0, 127, 254]),
    ("int2", [-1, 0, 1, 0, 1], [0b01100100, 0b10]),
    ("uint4", [0, 5, 15], [0x50, 0x0F]),  # unsigned kinds start at 0
    ("uint5", [31, 1], [0b00111111, 0b0]),
])
def test_bits_goldens(kind, codes, data):
    assert encoded("bits", codes, kind) == bytes(data)
    assert decoded("bits", bytes(data), len(codes), kind).tolist() == codes


@fast
def test_planes_put_high_bytes_first():
    """Seen through zstd, which stores what is too short to compress: a frame and block header of 5 bytes."""
    data = encoded("planes+zstd", [0x1234, 0x5678], "u16")
    assert data.endswith(bytes([0x12, 0x56, 0x34, 0x78]))
    assert decoded("planes+zstd", data, 2, "u16").tolist() == [0x1234, 0x5678]


@fast
@pytest.mark.parametrize(("kind", "symbols", "size"), [("ternary", 5, 1), ("int2", 4, 1), ("int5", 8, 5),
                                                       ("int8", 1, 1)])
def test_packing_across_chunks(kind, symbols, size):
    """More codes than are packed at a time: no code lost, moved or doubled at the seams. So many symbols take `size`
    bytes."""
    n, codec = 2 * pack.CHUNK + 3, "base3" if kind == "ternary" else "bits"
    codes = np.random.default_rng(0).integers(*pack.range_of(kind), n, endpoint=True).astype(np.int8)
    data = encoded(codec, codes, kind)
    assert len(data) == math.ceil(n * size / symbols)
    back = decoded(codec, data, n, kind)
    assert back.dtype == np.int8 and np.array_equal(back, codes)


def test_base3_is_fast_enough_for_a_large_model():
    codes = np.tile(np.array([-1, 0, 1, 1], np.int8), 2_500_000)
    start = time.process_time()
    assert np.array_equal(decoded("base3", encoded("base3", codes, "ternary"), codes.size, "ternary"), codes)
    assert time.process_time() - start < 3  # 10M codes take 0.15 s here


# Layout -------------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize(
    ("fmt", "shape", "scales"),
    [
        (TERNARY, (64, 200), (64, 2)),
        (TERNARY, (64, 128), (64, 1)),
        (TERNARY, (64, 1), (64, 1)),
        (TERNARY, (200,), (1, 2)),
        (TERNARY, (2, 3, 300), (6, 3)),
        (TERNARY | {"group_size": 0}, (64, 200), (1, 1)),
        (INT6, (), (1, 1)),
        (INT6, (5, 0), (5, 0)),
        (LOG5, (64, 200), (64, 7)),
    ],
)
def test_layout_of_groups(fmt, shape, scales):
    codes, dtype = "ternary" if fmt["kind"] == "ternary" else "int6", "uint5" if fmt is LOG5 else "u16"
    assert pack.layout(fmt, shape) == {"codes": (codes, shape), "scales": (dtype, scales)}


@fast
def test_layout_of_floats_has_no_scales():
    assert pack.layout({"kind": "bf16"}, (3, 4)) == {"codes": ("u16", (3, 4))}
    assert pack.layout({"kind": "fp32"}, (3,)) == {"codes": ("u32", (3,))}
    assert pack.layout(FP8, ()) == {"codes": ("u8", ())}


# Container ----------------------------------------------------------------------------------------------------


@fast
def test_tiny_artifact_byte_by_byte():
    t = StoredTensor((5,), TERNARY, np.array([-1, 0, 1, 1, -1], np.int8), np.array([[ONE_BF16]], np.uint16))
    data = pack.encode_artifact({"w": t}, {"a": 1})
    magic, version, size, text_size, crc = struct.unpack_from("<4sBIII", data)
    text = zlib.decompress(data[17 : 17 + size], -15)
    assert (magic, version, text_size) == (b"TRNY", 2, len(text))
    assert crc == zlib.crc32(data[:13] + data[17 : 17 + size])
    assert json.loads(text) == {
        "formats": [TERNARY],
        "meta": {"a": 1},
        "streams": [["base3", 1, zlib.crc32(bytes([75]))], ["raw", 2, zlib.crc32(bytes([0x80, 0x3F]))]],
        "tensors": [["w", [5], 0]],
    }
    assert text.startswith(b'{"formats":[{"group_size":128,"kind":"ternary","rule":"absmean","scale":"bf16",')
    assert data[17 + size :] == bytes([75, 0x80, 0x3F]), "one byte of codes, one little-endian scale, nothing else"


@fast
def test_folded_artifact_byte_by_byte():
    """Two layers of two tensors: one run in the table, one stream for each format and role."""
    log4 = {"kind": "ternary", "group_size": 2, "scale": "log4"}
    tensors = {}
    for i in range(2):
        codes, scales = np.array([[1, -1 + i]], np.int8), np.array([[9 + i]], np.uint8)
        tensors[f"h.{i}.w"] = StoredTensor((1, 2), log4, codes, scales)
        tensors[f"h.{i}.g"] = StoredTensor((), FP8, np.array(0x38, np.uint8), None)
    data = pack.encode_artifact(tensors, {})
    size = struct.unpack_from("<4sBIII", data)[2]
    base3 = bytes([2 + 0 * 3 + 2 * 9 + 1 * 27])  # codes 1 -1 1 0
    log, fp8 = bytes([9 | 10 << 4]), bytes([0x38, 0x38])
    assert zlib.decompress(data[17 : 17 + size], -15) == (
        b'{"formats":[{"group_size":2,"kind":"ternary","scale":"log4"},{"kind":"fp8"}],"meta":{},'
        b'"streams":[["base3",1,%d],["bits",1,%d],["raw",2,%d]],'
        b'"tensors":[["h.",0,2,[[".w",[1,2],0],[".g",[],1]]]]}' % tuple(map(zlib.crc32, (base3, log, fp8)))
    )
    assert data[17 + size :] == base3 + log + fp8
    assert list(pack.decode_artifact(data)[0]) == ["h.0.w", "h.0.g", "h.1.w", "h.1.g"]


E, W = ["", [5], 0], [".w", [5], 0]


def table_of(*rows: tuple[str, tuple[int, ...], dict]) -> list:
    """The tensor table in the header of a file of such tensors, which must come back in order."""
    tensors = {name: grouped(fmt, shape) for name, shape, fmt in rows}
    data = pack.encode_artifact(tensors, {})
    assert list(pack.decode_artifact(data)[0]) == list(tensors)
    return json.loads(zlib.decompress(data[17 : pack.parse_header(data).header_bytes], -15))["tensors"]


@fast
@pytest.mark.parametrize(
    ("names", "table"),
    [
        ([], []),
        (["w"], [["w", [5], 0]]),
        (["w0"], [["w0", [5], 0]]),
        (["w0", "w1"], [["w", 0, 2, [E]]]),
        (["0", "1", "2"], [["", 0, 3, [E]]]),
        (["w8", "w9", "w10", "w11"], [["w", 8, 4, [E]]]),
        (["w1", "w0"], [["w1", [5], 0], ["w0", [5], 0]]),
        (["w0", "w2"], [["w0", [5], 0], ["w2", [5], 0]]),
        (["w0.w", "w1.w", "w"], [["w", 0, 2, [W]], ["w", [5], 0]]),
        (["w0", "w0.w", "w1", "w1.w"], [["w", 0, 2, [E, W]]]),
        (["w0", "w1", "w0.w", "w1.w"], [["w", 0, 2, [E]], ["w", 0, 2, [W]]]),
        (["w0", "w0.w", "w1"], [["w0", [5], 0], ["w0.w", [5], 0], ["w1", [5], 0]]),
        (["a.0.b.0", "a.0.b.1"], [["a.0.b.0", [5], 0], ["a.0.b.1", [5], 0]]),  # one layer 0, of two tensors
        (["a00", "a01"], [["a0", 0, 2, [E]]]),  # no number has leading zeros, so the first 0 is text
        (["a09", "a10"], [["a09", [5], 0], ["a10", [5], 0]]),
        (["w9999998", "w9999999"], [["w9", 999998, 2, [E]]]),  # at most six digits
        (["w\u0661", "w\u0662"], [["w\u0661", [5], 0], ["w\u0662", [5], 0]]),  # Arabic 1, 2 are letters here
    ],
)
def test_fold_goldens(names, table):
    assert table_of(*((name, (5,), TERNARY) for name in names)) == table


@fast
def test_layers_of_different_shapes_or_formats_are_not_one_run():
    assert table_of(("w0", (5,), TERNARY), ("w1", (6,), TERNARY)) == [["w0", [5], 0], ["w1", [6], 0]]
    assert table_of(("w0", (5,), TERNARY), ("w1", (5,), LOG5)) == [["w0", [5], 0], ["w1", [5], 1]]


@fast
def test_tensors_numbered_as_high_as_may_be():
    for numbers in ([pack.MAX_TENSORS - 1], [pack.MAX_TENSORS, pack.MAX_TENSORS + 1], [20240601], [99_998, 99_999],
                    [999_999, 1_000_000]):
        tensors = {f"step{n}": StoredTensor((1,), FP8, np.array([7], np.uint8), None) for n in numbers}
        assert list(pack.decode_artifact(pack.encode_artifact(tensors, {}))[0]) == list(tensors)


@fast
def test_round_trip_keeps_order_formats_and_bits():
    tensors, meta = model(), {"config": {"lr": 0.04, "name": "é", "on": True, "none": None, "list": [1, [2.5]]}}
    back, back_meta = pack.decode_artifact(pack.encode_artifact(tensors, meta))
    assert list(back) == list(tensors) and back_meta == meta
    assert pack.first_difference(back, tensors) is None
    for t in back.values():
        assert t.codes.flags.writeable and t.codes.dtype.isnative


@fast
def test_one_stream_per_format_and_role():
    header = pack.parse_header(packed())
    assert [(s.format, s.role, s.kind, s.count) for s in header.streams] == [
        (0, "codes", "int6", 12 * 96),
        (0, "scales", "u16", 12 * 2),
        (1, "codes", "ternary", 16 * 200 + 40 * 64),
        (1, "scales", "u16", 16 * 2 + 40),
        (2, "codes", "u16", 16),
        (3, "codes", "u32", 3),
        (4, "codes", "ternary", 8 * 64),
        (4, "scales", "uint5", 8 * 2),
        (5, "codes", "u8", 6 * 16),
    ]
    assert [s.shapes for s in header.streams[2:4]] == [[(16, 200), (40, 64)], [(16, 2), (40, 1)]]
    assert header.streams[0].offset == header.header_bytes
    assert all(a.offset + a.bytes == b.offset for a, b in zip(header.streams, header.streams[1:], strict=False))


def test_uniform_ternary_codes_take_at_most_1_6_bits():
    """base3's 1.6 bits are the ceiling; nothing random takes less than log2(3), nor much more under the model."""
    t = grouped(TERNARY | {"group_size": 0}, (250, 400))
    n = t.codes.size
    assert len(pack.CODECS["base3"].encode(t.codes.ravel(), "ternary", [t.shape])) == n // 5
    stream = pack.parse_header(pack.encode_artifact({"w": t}, {})).streams[0]
    assert stream.codec == "model" and 0.999 * math.log2(3) < 8 * stream.bytes / n < 1.003 * math.log2(3) < 1.6


def test_repetitive_streams_are_compressed():
    codes = np.tile(np.array([1, 0, 0, -1, 0, 0, 0], np.int8), 10_000).reshape(70, 1000)
    t = StoredTensor((70, 1000), TERNARY, codes, np.full((70, 8), ONE_BF16, np.uint16))
    header = pack.parse_header(pack.encode_artifact({"w": t}, {}))
    assert all(s.codec not in ("base3", "raw") and s.bytes < 100 for s in header.streams)


def kind_range(kind: str) -> tuple[int, int]:
    dtype = np.dtype(pack.SYMBOLS[kind])
    return (0, 2 ** (8 * dtype.itemsize) - 1) if kind in pack.FLOATS else pack.range_of(kind)


@pytest.mark.parametrize("name", list(pack.CODECS))
def test_every_codec_round_trips_every_kind_it_claims(name):
    """Of several arrays, two of them empty: a codec may or may not care where one ends."""
    codec, rng, shapes = pack.CODECS[name], np.random.default_rng(0), [(19, 17), (0, 3), (1, 3), (), (19, 17)]
    for kind in codec.kinds:
        symbols = rng.integers(*kind_range(kind), pack.count_of(shapes), endpoint=True).astype(pack.SYMBOLS[kind])
        back = codec.decode(codec.encode(symbols, kind, shapes), kind, shapes)
        assert back.dtype == symbols.dtype and np.array_equal(back, symbols)


@fast
def test_every_kind_has_a_codec_and_every_small_stream_its_plain_one():
    for kind in pack.SYMBOLS:
        names = [name for name, codec in pack.CODECS.items() if kind in codec.kinds]
        assert names[0] in ("base3", "bits", "raw") and ("model" in names) == (kind != "u32")
        assert ("widths" in names) == (kind in pack.SIGNED) == (kind in pack.CODECS["model"].replaced)
        one = np.zeros(1, pack.SYMBOLS[kind])
        assert pack.encode_stream(one[:0], kind, [(0,)]) == (names[0], b"")
        assert pack.encode_stream(one, kind, [()])[0] == names[0], "nothing beats a byte or two, and the first wins"


def test_same_input_same_bytes_whatever_the_key_order():
    turned = {
        name: StoredTensor(t.shape, dict(reversed(t.format.items())), t.codes, t.scales) for name, t in model().items()
    }
    first = pack.encode_artifact(model(), {"a": 1, "b": 2})
    assert first == pack.encode_artifact(turned, {"b": 2, "a": 1})
    script = (
        "import sys, hashlib; sys.path[:0] = ['tests', '.']; import pack, test_pack;"
        "print(hashlib.sha256(pack.encode_artifact(test_pack.model(), {'a': 1, 'b': 2})).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(first).hexdigest()


@fast
def test_layout_in_memory_does_not_matter():
    t = grouped(TERNARY, (16, 200))
    turned = StoredTensor(t.shape, t.format, np.asfortranarray(t.codes), t.scales[:, ::-1].copy()[:, ::-1])
    assert pack.encode_artifact({"w": t}, {}) == pack.encode_artifact({"w": turned}, {})


def test_a_small_model_spends_little_on_its_header():
    """Layers are written once: 30 more cost a digit or two."""
    t = grouped(TERNARY | {"group_size": 0}, (2, 128))
    names = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.proj"]

    def header_bytes(layers: int) -> int:
        tensors = {f"blocks.{i}.{n}.weight": t for i in range(layers) for n in names}
        return pack.parse_header(pack.encode_artifact(tensors, {})).header_bytes

    assert header_bytes(36) - 8 <= header_bytes(6) < 280  # 8: longer sizes and other checksums of the streams


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5, 4]}, "tuple"),
        ({"shape": (5, 5)}, "codes must be int8 \\(5, 5\\)"),
        ({"shape": (-5, -4)}, "shape"),
        ({"codes": np.zeros((5, 4), np.int64)}, "codes must be int8"),
        ({"codes": [[0] * 4] * 5}, "not list"),
        ({"codes": np.full((5, 4), 2, np.int8)}, "quantize"),
        ({"scales": None}, "scales must be uint16"),
        ({"scales": np.ones((5, 1), np.float32)}, "scales must be uint16"),
        ({"scales": np.ones((5, 2), np.uint16)}, "scales must be uint16"),
        ({"format": {"kind": "bf16"}}, "codes must be uint16"),
        ({"format": {"kind": "quaternary"}}, "not known"),
        ({"format": TERNARY | {"scale": "log5"}}, "scales must be uint8"),
        ({"format": TERNARY | {"scale": "log5"}, "scales": np.full((5, 1), 32, np.uint8)}, "quantize"),
        ({"format": FP8}, "codes must be uint8"),
        ({"format": FP8, "codes": np.zeros((5, 4), np.uint8)}, "the format fp8 has no scales: pass None"),
        ({"format": TERNARY | {"threshold": float("nan")}}, "finite"),
    ],
)
def test_writer_refuses_bad_tensors(change, message):
    good = {
        "shape": (5, 4),
        "format": TERNARY,
        "codes": np.zeros((5, 4), np.int8),
        "scales": np.ones((5, 1), np.uint16),
    }
    pack.encode_artifact({"w": StoredTensor(**good)}, {})
    with pytest.raises(ArtifactError, match=message):
        pack.encode_artifact({"w": StoredTensor(**(good | change))}, {})


@fast
def test_writer_refuses_meta_that_is_not_json_and_bad_names():
    for meta in ({"a": float("inf")}, {1: 2}, {"a": {1, 2}}, {"a": np.float32(1)}, {"a": 2**70}, [1], None):
        with pytest.raises(ArtifactError, match="meta"):
            pack.encode_artifact({}, meta)
    for name in ("", "a" * 300, "a\nb", "\x1b[2J", "\ud800", 3):
        with pytest.raises(ArtifactError, match="name"):
            pack.encode_artifact({name: grouped(TERNARY, (5, 4))}, {})


@fast
def test_writer_refuses_a_header_that_no_reader_accepts():
    with pytest.raises(ArtifactError, match="header"):
        pack.encode_artifact({}, {"log": "x" * pack.MAX_HEADER})


def test_what_compresses_too_well_is_stored_plainly_and_can_be_read():
    """The writer obeys the reader's limit on expansion."""
    n = 6 << 20
    zeros = StoredTensor((n,), TERNARY | {"group_size": 0}, np.zeros(n, np.int8), np.zeros((1, 1), np.uint16))
    data = pack.encode_artifact({"w": zeros}, {})
    assert pack.parse_header(data).streams[0].codec == "base3"
    assert not pack.decode_artifact(data)[0]["w"].codes.any()


def test_what_the_model_compresses_too_well_goes_to_another_codec(monkeypatch):
    """Its limit is lower than that of the others, for it decodes more slowly."""
    codec, zeros = pack.CODECS["model"], np.zeros(100 * 64, np.int8)
    assert 0 < codec.free("ternary") < pack.FREE_EXPANSION
    codec = dataclasses.replace(codec, free=lambda kind: 1000)
    assert len(codec.encode(zeros, "ternary", [(100, 64)])) < 80
    monkeypatch.setattr(pack, "CODECS", {"base3": pack.CODECS["base3"], "model": codec})
    assert pack.encode_stream(zeros, "ternary", [(100, 64)])[0] == "base3"
    zeros[::2] = 1
    assert pack.encode_stream(zeros, "ternary", [(100, 64)])[0] == "model", "it is worth its bytes"


def test_what_takes_the_model_too_many_steps_goes_to_another_codec(monkeypatch):
    """A step takes about a millisecond however few symbols it codes; small arrays of many shapes have many."""
    shapes = [(rows, 3) for rows in range(1, 30)]
    zeros, codec = np.zeros(pack.count_of(shapes), np.uint16), pack.CODECS["model"]
    monkeypatch.setattr(pack, "CODECS", {"raw": pack.CODECS["raw"], "model": codec})
    assert 500 < codec.steps(shapes, "u16") < pack.FREE_STEPS
    assert pack.encode_stream(zeros, "u16", shapes)[0] == "model"
    monkeypatch.setattr(pack, "FREE_STEPS", 100)
    assert pack.encode_stream(zeros, "u16", shapes)[0] == "raw"


def test_the_model_is_not_tried_on_matrices_of_floats(monkeypatch):
    """It takes seconds and is larger (LOG.md, floats); scales and vectors are another thing."""
    rng, tried, codec = np.random.default_rng(0), [], pack.CODECS["model"]

    def encode(symbols: np.ndarray, kind: str, shapes: pack.Shapes) -> bytes:
        tried.append(shapes)
        return codec.encode(symbols, kind, shapes)

    monkeypatch.setitem(pack.CODECS, "model", dataclasses.replace(codec, encode=encode))
    noise = (rng.standard_normal(4096).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert pack.encode_stream(noise, "u16", [(64, 64)])[0].endswith("+lzma") and tried == []
    for shapes, role in (([(64, 64)], "scales"), ([(4096,)], "codes"), ([(2, 2048)], "codes")):
        pack.encode_stream(noise, "u16", shapes, role)
        assert tried.pop() == shapes


def test_an_array_too_wide_for_the_model_goes_to_another_codec():
    wide = np.random.default_rng(0).choice(np.array([-1, 0, 0, 0, 0, 0, 1], np.int8), 300_000)
    assert pack.encode_stream(wide, "ternary", [(2, 150_000)])[0] == "model"
    assert pack.encode_stream(wide, "ternary", [(1, 300_000)])[0] != "model"


# Files --------------------------------------------------------------------------------------------------------


@fast
def test_write_returns_the_files_size_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "model.bin"
    assert pack.write_artifact(path, model(), {}) == path.stat().st_size
    assert os.listdir(tmp_path) == ["model.bin"]
    assert pack.first_difference(pack.read_artifact(path)[0], model()) is None


@fast
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, step):
    path = write(tmp_path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ArtifactError, match="No space left"):
        pack.write_artifact(path, {}, {})
    assert os.listdir(tmp_path) == ["model.bin"] and path.read_bytes() == before


@fast
def test_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack.write_artifact(tmp_path / "model.bin", model(), {})
    assert os.listdir(tmp_path) == []


@fast
def test_what_cannot_be_written_leaves_no_file_and_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError):
        pack.write_artifact(tmp_path / "model.bin", {"": grouped(TERNARY, (2, 2))}, {})
    with pytest.raises(ArtifactError, match="folder must exist"):
        pack.write_artifact(tmp_path / "no" / "model.bin", model(), {})
    assert os.listdir(tmp_path) == []


# Budget -------------------------------------------------------------------------------------------------------


@fast
def test_budget_arithmetic(tmp_path):
    for name, size in {"model": 1000, "a.py": 30, "b.py": 4}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    code = [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "a.py"]
    b = pack.budget(tmp_path / "model", code, 1034)
    assert (b.bytes_model, b.bytes_code, b.total, b.margin, b.fits) == (1000, 34, 1034, 0, True)
    b = pack.budget(tmp_path / "model", code, 1033)
    assert (b.margin, b.fits) == (-1, False)
    b = pack.budget(tmp_path / "model", code, 1000, count_code=False)
    assert (b.bytes_code, b.total, b.margin, b.fits) == (34, 1000, 0, True)


def test_budget_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        pack.budget(write(tmp_path), [tmp_path / "none.py"], 10**6)


def test_without_code_files_the_budget_counts_the_one_file_that_is_submitted(tmp_path, capsys):
    """Made of all that training, packing and scoring need beside libraries, of which this program is a part."""
    b = pack.budget(write(tmp_path), None, 10**6)
    assert b.bytes_code == len(source.one_file(source.read_sources()))
    assert {"pack.py", "tern/entropy.py"} <= set(source.code_files())
    assert pack.main(["budget", str(write(tmp_path))]) == 0
    assert f"\nbytes_code {b.bytes_code:,}\n" in capsys.readouterr().out


# Command line -------------------------------------------------------------------------------------------------


@fast
def test_inspect_columns_add_up_to_the_file(tmp_path, capsys):
    path = write(tmp_path)
    assert pack.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = path.stat().st_size
    assert sum(r["bytes"] for r in found["tensors"]) + found["header_bytes"] == found["bytes"] == size
    assert sum(s["bytes"] for s in found["streams"]) + found["header_bytes"] == size
    assert found["weights"] == sum(t.codes.size for t in model().values())
    assert found["bits_per_parameter"] == 8 * size / found["weights"]
    rows = {r["tensor"]: r for r in found["tensors"]}
    assert rows["bias"]["zero_frac"] == pytest.approx(2 / 3), "-0.0 is a zero"
    assert rows["a.weight"]["zero_frac"] == float((model()["a.weight"].codes == 0).mean())

    assert pack.main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    # ... weights, bytes, bits/weight, zeros; the header line has bytes alone, the total no zeros
    column = [int(line.split()[-3].replace(",", "")) for line in table[1:-2]] + [
        int(table[-2].split()[-1].replace(",", ""))
    ]
    assert sum(column) == size == int(table[-1].split()[-2].replace(",", ""))


@fast
def test_verify_accepts_a_good_file(tmp_path, capsys):
    assert pack.main(["verify", str(write(tmp_path))]) == 0
    assert re.findall(r"^\w+", capsys.readouterr().out, re.M) == ["sound", "canonical"]


@fast
@pytest.mark.parametrize(
    ("name", "role", "at", "value", "message"),
    [
        ("a.weight", "scales", (3, 1), 0x7F80, r"scale \[3, 1\] is not finite"),
        ("a.weight", "scales", (3, 1), 0x0000, r"group \[3, 1\] has codes but the scale 0"),
        ("a.weight", "scales", (3, 1), 0x8000, r"group \[3, 1\] has codes but the scale 0"),
        ("emb", "scales", (11, 0), 0x7E00, r"scale \[11, 0\] is not finite"),
        ("c.weight", "scales", (2, 1), 0, r"group \[2, 1\] has codes but the scale 0"),
        ("table", "codes", (3, 4), 0x7F, r"value \[3, 4\] is not finite"),
        ("table", "codes", (5, 15), 0xFF, r"value \[5, 15\] is not finite"),
        ("gain", "codes", (7,), 0xFFC0, r"value \[7\] is not finite"),
    ],
)
def test_verify_finds_values_that_no_model_can_have(tmp_path, capsys, name, role, at, value, message):
    tensors = model()
    getattr(tensors[name], role)[at] = value
    assert pack.main(["verify", str(write(tmp_path, tensors))]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_verify_accepts_a_zero_scale_on_a_zero_group(tmp_path):
    tensors = model()
    tensors["a.weight"].codes[3, 128:] = 0
    tensors["a.weight"].scales[3, 1] = 0
    tensors["c.weight"].codes[2, 32:] = 0
    tensors["c.weight"].scales[2, 1] = 0
    assert pack.main(["verify", str(write(tmp_path, tensors))]) == 0


@fast
def test_verify_finds_a_file_that_is_not_canonical(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(pack, "CODECS", {k: pack.CODECS[k] for k in ("base3", "bits", "raw", "raw+zstd")})
        path = write(tmp_path, model())
    assert pack.read_artifact(path)
    assert pack.main(["verify", str(path)]) == 0  # sound, and another compressor's bytes are no fault of the file
    assert "not canonical here" in capsys.readouterr().out


def checkpoint(folder: Path, tensors: dict[str, StoredTensor], **state: object) -> Path:
    """A run's folder whose checkpoint holds these tensors, and beside them what training needs."""
    arrays = {"latent/emb": np.ones((3, 4), np.float32)}
    for name, t in tensors.items():
        arrays |= {f"{role}/{name}": x for role, x in (("codes", t.codes), ("scales", t.scales)) if x is not None}
    formats = {"formats": {name: t.format for name, t in tensors.items()}}
    checkpoints.write_checkpoint(folder / checkpoints.FILE, arrays, {"step": 7} | formats | state)
    return folder


def changed(t: StoredTensor, role: str, at: tuple[int, ...], value: int) -> StoredTensor:
    array = getattr(t, role).copy()
    array[at] = value
    return dataclasses.replace(t, **{role: array})


EMB, B_WEIGHT, GAIN = (model()[name] for name in ("emb", "b.weight", "gain"))


@fast
@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (model(), None),
        (model() | {"b.weight": changed(B_WEIGHT, "codes", (7, 9), -B_WEIGHT.codes[7, 9] or 1)},
         r"'b.weight': codes\[7, 9\] is"),
        (model() | {"emb": changed(EMB, "scales", (0, 1), 1)},
         r"'emb': scales\[0, 1\] is \d+ in the file, 1 in the checkpoint"),
        ({name: t for name, t in model().items() if name != "gain"}, "'gain' is only in the file"),
        (model() | {"more": GAIN}, "'more' is only in the checkpoint"),
        (model() | {"emb": dataclasses.replace(EMB, format=EMB.format | {"group_size": 65})}, "group_size"),
        (model() | {"emb": dataclasses.replace(EMB, codes=EMB.codes[:-1])}, r"'emb' is \(12, 96\) .*\(11, 96\)"),
        (model() | {"emb": dataclasses.replace(EMB, scales=EMB.scales[:-1])}, "'emb': scales .* another shape or type"),
        (model() | {"emb": dataclasses.replace(EMB, scales=None)}, "'emb': scales .* another shape or type"),
        (model() | {"emb": dataclasses.replace(EMB, codes=EMB.codes.astype(np.int16))}, "'emb': codes .* or type"),
    ],
)
def test_verify_against_a_checkpoint(tmp_path, capsys, theirs, message):
    status = pack.main(["verify", str(write(tmp_path)), "--against", str(checkpoint(tmp_path, theirs))])
    streams = capsys.readouterr()
    if message is None:
        assert (status, streams.err) == (0, "") and "same: every code and scale is that of" in streams.out
    else:
        assert status == 1 and streams.err.count("\n") == 1 and "pack that checkpoint again" in streams.err
        assert re.search(message, streams.err)


@fast
@pytest.mark.parametrize(("spoil", "message"), [
    (lambda path: path.unlink(), "no such checkpoint; give a run's folder"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a checkpoint of this trainer"),
    (lambda path: path.write_bytes(b"PK"), "not a checkpoint of this trainer"),
    (lambda path: (path.unlink(), path.mkdir()), "not a checkpoint of this trainer"),
    (lambda path: checkpoint(path.parent, model(), formats=None), "names no storage formats"),
    (lambda path: checkpoint(path.parent, model(), formats={"w": FP8}), "has no codes of 'w'; it is damaged"),
])
def test_verify_against_no_sound_checkpoint(tmp_path, capsys, spoil, message):
    spoil(checkpoint(tmp_path, model()) / checkpoints.FILE)
    assert pack.main(["verify", str(write(tmp_path)), "--against", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}") and error.count("\n") == 1 and message in error


def test_verify_against_a_checkpoint_needs_neither_torch_nor_the_trainer(tmp_path):
    script = ("import sys; sys.modules.update(torch=None, train_gpt=None)\n"  # to import one of these is an error
              "import pack; sys.exit(pack.main(sys.argv[1:]))")
    command = ["verify", str(write(tmp_path)), "--against", str(checkpoint(tmp_path, model()))]
    done = subprocess.run([sys.executable, "-B", "-c", script, *command], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "") and "same: every code and scale" in done.stdout


@fast
def test_budget_command(tmp_path, capsys):
    path = write(tmp_path)
    size = path.stat().st_size
    (tmp_path / "code.py").write_bytes(b"#" * 10)
    command = ["budget", str(path), "--code", str(tmp_path / "code.py"), "--cap"]
    assert pack.main([*command, str(size + 10)]) == 0
    out = capsys.readouterr().out
    assert f"bytes_model {size:,}\nbytes_code 10\nbytes_total {size + 10:,}\n" in out and out.endswith("FITS\n")
    assert pack.main([*command, str(size + 9)]) == 1
    assert capsys.readouterr().out.endswith("margin -1\nOVER\n")
    assert pack.main([*command, str(size), "--model-only"]) == 0
    assert "bytes_code 10 (not counted)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "verify", "budget"])
def test_errors_are_one_line_and_status_1(tmp_path, command):
    done = subprocess.run(
        [sys.executable, "-B", pack.__file__, command, str(tmp_path / "none.bin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1


def test_importing_does_nothing_and_needs_no_torch():
    script = "import sys; import pack; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
