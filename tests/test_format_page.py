"""docs/format.md is enough: a decoder written from that page alone reads what the packer writes, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib

import independent_decoder as page
import numpy as np
import pytest
import torch

import pack
import train_gpt
from ablations.formats import Codebook

fast = pytest.mark.fast
SCALES = ["bf16", "fp16", "log4", "log5", "log6", "log7", "log8"]
FLOATS = [{"kind": kind} for kind in ("fp8", "bf16", "fp16", "fp32")]


def ternary(group_size=16, scale="log5"):
    return {"kind": "ternary", "group_size": group_size, "scale": scale}


def integer(bits, group_size=16, scale="log5"):
    return {"kind": "int", "bits": bits, "group_size": group_size, "scale": scale}


FEW = [{"kind": "binary", "group_size": 16, "scale": "log5"}, {"kind": "five", "group_size": 7, "scale": "bf16"}]
CODEBOOKS = [{"kind": "codebook", "entries": k, "group_size": g} for k, g in ((2, 7), (3, 0), (16, 16), (64, 5))]


def patterns(kind, x):
    """float32 values as the bit patterns of a float format (of bf16: cut)."""
    x = np.asarray(x, np.float32)
    if kind == "fp8":
        return torch.tensor(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if kind == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16).view(np.uint16) if kind == "fp16" else x.view(np.uint32)


def random_scales(rng, fmt, rows, last):
    shape = tuple(page.scales_shape(fmt, (rows, last)))
    walk = np.cumsum(rng.normal(0, 0.3, shape), 0) + rng.normal(0, 1.5, shape)
    walk += 30 * (rng.random(shape) < 0.02)  # some far from the others
    if fmt.get("scale", "bf16").startswith("log"):
        top = 2 ** int(fmt["scale"][3:]) - 1
        return np.clip(np.round(top / 2 + walk), 0, top).astype(np.uint8)
    return patterns(fmt.get("scale", "bf16"), np.exp(walk / 5 - 3))


def random_tensor(rng, fmt, *shape):
    """Columns differ in their share of zeros and depend on others; some rows of an int table nearly repeat a row."""
    if "group_size" not in fmt:
        x = np.asarray(rng.normal(rng.random(), 0.05, shape))
        return pack.StoredTensor(shape, fmt, np.asarray(patterns(fmt["kind"], x)), None)
    rows, cols = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    if fmt["kind"] in ("binary", "codebook"):
        k = fmt.get("entries", 2)
        x = rng.integers(0, k, (rows, cols)) - k // 2 if fmt["kind"] == "codebook" else 1 - 2 * rng.integers(
            0, 2, (rows, cols))
        return pack.StoredTensor(shape, fmt, x.astype(np.int8).reshape(shape), random_scales(rng, fmt, rows, cols))
    m = 2 if fmt["kind"] == "five" else 2 ** (fmt.get("bits", 2) - 1) - 1
    x = rng.normal(0, 1, (rows, cols))
    x += 0.7 * x @ (rng.normal(0, 1, (cols, cols)) * (rng.random((cols, cols)) < 3 / max(cols, 1)))
    x = np.clip(np.round(x * rng.uniform(0.1, 1, cols) * m * 0.6), -m, m).astype(np.int8)
    if fmt["kind"] == "int":
        for row in np.flatnonzero(rng.random(rows) < 0.4):
            if row:
                near = x[max(row - 1 - rng.integers(1500), 0)]
                x[row] = np.clip(near + (rng.random(cols) < 0.05) * rng.integers(-1, 2, cols), -m, m)
    return pack.StoredTensor(shape, fmt, x.reshape(shape), random_scales(rng, fmt, rows, cols))


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


def roundtrip(tensors, meta=None):
    """Pack, check what the independent decoder makes of it, and return the file's header."""
    data = pack.encode_artifact(tensors, meta or {})
    found, found_meta = page.decode(data)
    assert found_meta == (meta or {}) and list(found) == list(tensors)
    for name, tensor in tensors.items():
        fmt, shape, codes, scales = found[name]
        assert fmt == tensor.format and shape == tuple(tensor.shape)
        assert same(codes, tensor.codes), name
        assert (scales is None) == (tensor.scales is None) and (scales is None or same(scales, tensor.scales)), name
    return json.loads(zlib.decompress(data[17 : 17 + int.from_bytes(data[5:9], "little")], wbits=-15))


CODECS = pack.CODECS  # of which a test may leave some out


def only(monkeypatch, codec):
    """Let the packer use no other codec for the kinds of symbols that this one can hold."""
    kinds, plain = CODECS[codec].kinds, ("base3", "bits", "raw")
    rest = {name: tuple(k for k in CODECS[name].kinds if k not in kinds) for name in plain if name != codec}
    codecs = {name: dataclasses.replace(CODECS[name], kinds=left) for name, left in rest.items()}
    monkeypatch.setattr(pack, "CODECS", {**codecs, codec: dataclasses.replace(CODECS[codec], replaced=())})


def codecs_of(header):
    return [codec for codec, _, _ in header["streams"]]


def model_roundtrip(monkeypatch, *tensors):
    """By the model, and integers by that of files from before too."""
    kinds = {page.code_kind(t.format) for t in tensors}
    for codec in ["model", *(["widths"] if kinds & set(pack.SIGNED) else [])]:
        only(monkeypatch, codec)
        found = set(codecs_of(roundtrip({f"t.{i}": t for i, t in enumerate(tensors)})))
        assert codec in found and found <= {codec, "raw", "bits", "base3"}


def assert_values(tensor):
    want = train_gpt.param_of_file(tensor)
    assert want.dtype == torch.bfloat16
    want, found = want.float().numpy(), page.values(tensor.format, tensor.codes, tensor.scales)
    assert found.dtype == np.float32 and found.shape == want.shape
    assert ((found.view(np.uint32) == want.view(np.uint32)) | (np.isnan(found) & np.isnan(want))).all()


def test_a_model_of_several_layers():
    rng, matrix, norm, width = np.random.default_rng(0), ternary(32, "log6"), {"kind": "bf16"}, 32
    tensors = {"wte.weight": random_tensor(rng, integer(4, 64, "log7"), 1500, width)}
    for i in range(8, 12):  # the numbers get longer on the way
        for name, rows, cols in [("attn.c_q", 1, 1), ("attn.c_k", 0.5, 1), ("attn.proj", 1, 1), ("mlp.fc", 4, 1),
                                 ("mlp.proj", 1, 4)]:
            shape = int(rows * width), cols * width
            tensors[f"blocks.{i}.{name}.weight"] = random_tensor(rng, matrix, *shape)
        tensors[f"blocks.{i}.norm.weight"] = random_tensor(rng, norm, width)
        tensors[f"blocks.{i}.gate"] = random_tensor(rng, {"kind": "fp8"}, 3, width)
        tensors[f"blocks.{i}.lambda"] = random_tensor(rng, {"kind": "fp32"})
    tensors["norm.weight"] = random_tensor(rng, norm, width)
    header = roundtrip(tensors, {"config": {"layers": 4, "name": 'ä "漢"', "lr": 0.1, "more": [None, True, -(2**60)]}})
    assert [len(row) for row in header["tensors"]] == [3, 4, 3] and "model" in codecs_of(header)
    for tensor in tensors.values():
        if tensor.format["kind"] != "fp32":  # the trainer has none
            assert_values(tensor)


@fast
def test_names():
    one = pack.StoredTensor((1,), {"kind": "fp8"}, np.ones(1, np.uint8), None)
    names = "0 1 a07 a08 a9 a09 a10 a b1.2 b1.3 b2.2 b2.3 b3.2 ä1\" ä2\" 1234567 1234568 1000000 ١ ٢ x.y x.z c1 c3"
    names += " a17000 a17001 a99999 a999998 a999999 a1000000"
    roundtrip(dict.fromkeys(names.split(), one))
    roundtrip({})


@pytest.mark.parametrize("codec", list(CODECS))
def test_each_codec(monkeypatch, codec):
    rng, kinds = np.random.default_rng(1), pack.CODECS[codec].kinds
    formats = [ternary(), *(integer(b, 7, s) for b, s in zip(range(2, 9), SCALES, strict=True)), *FEW,
               *CODEBOOKS, *FLOATS]
    tensors = {f"{i}.{j}": random_tensor(rng, fmt, *shape) for i, fmt in enumerate(formats)
               for j, shape in enumerate([(31, 23), (23, 31), (7,), (), (0, 4)])}
    only(monkeypatch, codec)
    streams = [page.code_kind(f) for f in formats]
    assert codecs_of(roundtrip(tensors)).count(codec) >= sum(kind in kinds for kind in streams) > 0


@pytest.mark.parametrize("fmt", [ternary(0, "log4"), ternary(5, "fp16"), integer(2, 64, "bf16"), integer(3, 1, "log8"),
                                 integer(5, 0), integer(8, 7, "log6"), *FLOATS[:3]], ids=str)
def test_odd_shapes_in_one_stream(monkeypatch, fmt):
    """Each stream holds its stacks in the order of the shapes' first occurrence, and all state crosses them."""
    rng = np.random.default_rng(2)
    shapes = [(), (1,), (7,), (7, 1), (1, 7), (20, 20), (3, 4, 33), (0,), (4, 0), (0, 5), (9, 60), (60, 9), (2, 5, 7)]
    model_roundtrip(monkeypatch, *(random_tensor(rng, fmt, *shape) for _ in range(2) for shape in shapes))


STACKS = [(9, 1, 2), (40, 31, 1), (7, 32, 2), (8, 32, 2), (90, 47, 3), (300, 48, 1), (63, 256, 1), (64, 256, 1),
          (70, 257, 1), (33, 300, 2), (3, 700, 1)]


@pytest.mark.parametrize("rows, cols, layers", STACKS)
def test_ternary_stacks(monkeypatch, rows, cols, layers):
    rng = np.random.default_rng([rows, cols])
    model_roundtrip(monkeypatch, *(random_tensor(rng, ternary(), rows, cols) for _ in range(layers)))


def test_ternary_with_equal_and_opposite_columns(monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.choice([-1, 0, 1], (300, 4)).repeat(16, 1) * rng.choice([-1, 1], 64) * (rng.random((300, 64)) > 0.02)
    model_roundtrip(monkeypatch, pack.StoredTensor(x.shape, ternary(0), x.astype(np.int8), np.ones((1, 1), np.uint8)))


def test_ternary_rows_that_turn_around(monkeypatch):
    """A row is full where it was empty just before: the row's weight falls to its lower end."""
    rng = np.random.default_rng(3)
    full = rng.integers(0, 2, (300, 4, 1, 1)) ^ np.array([0, 1])[:, None]
    x = np.broadcast_to(full, (300, 4, 2, 16)).reshape(300, 128).astype(np.int8)
    model_roundtrip(monkeypatch, pack.StoredTensor(x.shape, ternary(0), x, np.ones((1, 1), np.uint8)))


@pytest.mark.parametrize("fmt", [integer(2, 0), integer(5, 0), *(pytest.param(fmt, marks=pytest.mark.rehearsal)
                                 for fmt in (integer(4, 0), integer(8, 0, "log8")))], ids=str)
def test_int_tables(monkeypatch, fmt):
    """More rows than a reference reaches back, one and several segments, several layers."""
    rng = np.random.default_rng(4)
    model_roundtrip(monkeypatch, random_tensor(rng, fmt, 2200, 12), random_tensor(rng, fmt, 300, 40),
                    random_tensor(rng, fmt, 60, 50), random_tensor(rng, fmt, 60, 50))


@pytest.mark.parametrize("fmt", [*(integer(2, 9, scale) for scale in SCALES), *FLOATS[:3]], ids=str)
def test_symbols_about_a_mean(monkeypatch, fmt):
    rng, shapes = np.random.default_rng(5), [(150, 9), (150, 9), (700,), (5, 30), (40, 7)]
    model_roundtrip(monkeypatch, *(random_tensor(rng, fmt, *shape) for shape in shapes))


def test_extreme_symbols(monkeypatch):
    """All patterns, in and out of order; rows that jump between the ends; constants."""
    rng, tensors = np.random.default_rng(6), []
    for kind, top in [("fp8", 2**8), ("bf16", 2**16), ("fp16", 2**16)]:
        dtype = page.CODE_TYPES[kind]
        for x in (rng.permutation(top)[:300], np.arange(0, top, top // 128), np.arange(99) % 2 * (top - 1),
                  np.full(40, top - 1)):
            tensors.append(pack.StoredTensor((len(x),), {"kind": kind}, x.astype(dtype), None))
    for bits in range(2, 9):
        m = 2 ** (bits - 1) - 1
        x = np.concatenate([np.full(40, m), np.full(40, -m), rng.integers(-m, m + 1, 80)]).reshape(20, 8)
        scales = rng.choice([0, 15, 240, 255], (20, 1)).astype(np.uint8)
        tensors.append(pack.StoredTensor((20, 8), integer(bits, 8, "log8"), x.astype(np.int8), scales))
    model_roundtrip(monkeypatch, *tensors)


def test_nearly_certain_bits(monkeypatch):
    """The low bits of codes, and of excesses of equal size, that are always the same: their p reaches its ends."""
    rng, tensors = np.random.default_rng(10), []
    x = rng.choice(np.int8([-15, -13, 9, 15]), (150, 60))  # + 15: 0, 2, 24, 30
    tensors.append(pack.StoredTensor(x.shape, integer(5, 0), x, np.ones((1, 1), np.uint8)))
    for cols in range(3000, 3005):  # stacks of one row: the mean of one is the guess for all of the next
        scales = rng.permutation(np.uint8([80, 120] * (cols // 2) + [100] * (cols % 2)))[None]
        tensors.append(pack.StoredTensor((cols,), ternary(1, "log8"), np.ones(cols, np.int8), scales))
    x = rng.choice(np.int8([-14, -13]), (150, 60))  # + 15: 1, 2
    tensors.append(pack.StoredTensor(x.shape, integer(5, 1), x, np.ones(x.shape, np.uint8)))
    model_roundtrip(monkeypatch, *tensors)


@pytest.mark.rehearsal
def test_long_arrays(monkeypatch):
    """Steps of more rows than the lanes ask for, stacks cut at 2^18 columns."""
    rng = np.random.default_rng(7)

    def sparse(fmt, *shape):
        codes = (rng.random(shape) < 0.01).astype(np.int8)
        return pack.StoredTensor(shape, fmt, codes, np.full((1, 1), 9, np.uint8))

    fmt = ternary(0)
    model_roundtrip(monkeypatch, sparse(fmt, 2**17 + 1), sparse(fmt, 50, 3), sparse(fmt, 2**17 + 1))
    model_roundtrip(monkeypatch, sparse(fmt, 8800, 33))
    model_roundtrip(monkeypatch, sparse(integer(2, 0), 8200, 33), random_tensor(rng, integer(2, 1, "log4"), 2100, 3))


@fast
@pytest.mark.parametrize("fmt", [ternary(16), ternary(0), integer(3, 7), integer(8, 64)], ids=str)
def test_values(fmt):
    rng, m = np.random.default_rng(8), 2 ** (fmt.get("bits", 2) - 1) - 1
    for scale in SCALES:
        for shape in [(40, 90), (90,), (1,)]:
            codes = rng.integers(-m, m + 1, shape).astype(np.int8)
            rows = math.prod(shape[:-1])
            groups = (rows, -(-shape[-1] // fmt["group_size"])) if fmt["group_size"] else (1, 1)
            if scale.startswith("log"):
                scales = rng.integers(0, 2 ** int(scale[3:]), groups).astype(np.uint8)
            else:
                scales = rng.integers(0, 2**16, groups).astype(np.uint16)
                scales[~np.isfinite(page.floats(scale, scales))] = 1
            with np.errstate(over="ignore"):
                assert_values(pack.StoredTensor(shape, {**fmt, "scale": scale}, codes, scales))


@fast
def test_values_of_few_levels(monkeypatch):
    """Of codebooks the trainer has none, but the ablations do."""
    monkeypatch.setitem(train_gpt.FORMATS, "codebook", Codebook)
    rng = np.random.default_rng(8)
    for fmt in [*FEW, *CODEBOOKS]:
        for shape in [(40, 90), (90,), (1,)]:
            assert_values(random_tensor(rng, fmt, *shape))


@fast
def test_values_of_floats():
    for kind, count in [("fp8", 2**8), ("bf16", 2**16), ("fp16", 2**16)]:
        codes = np.arange(count).astype(page.CODE_TYPES[kind])
        assert_values(pack.StoredTensor((count,), {"kind": kind}, codes, None))
    x = np.random.default_rng(9).integers(0, 2**32, 100_000, dtype=np.uint32)
    want, found = torch.tensor(x.view(np.float32)).bfloat16().float().numpy(), page.values({"kind": "fp32"}, x, None)
    assert ((found.view(np.uint32) == want.view(np.uint32)) | (np.isnan(found) & np.isnan(want))).all()


@fast
def test_values_of_all_log_scales():
    for scale in SCALES[2:]:
        count = 2 ** int(scale[3:])
        scales, codes = np.arange(count, dtype=np.uint8)[:, None], np.tile(np.int8([-1, 0, 1]), (count, 1))
        assert_values(pack.StoredTensor((count, 3), ternary(3, scale), codes, scales))
