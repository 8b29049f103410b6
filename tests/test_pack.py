"""pack.py: golden bytes, exact sizes, determinism, atomic writes, budget and the command line."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

import pack
from pack import ArtifactError, StoredTensor

TERNARY = {"kind": "ternary", "group_size": 128, "rule": "absmean", "threshold": 0.5, "scale": "bf16"}
INT6 = {"kind": "int", "bits": 6, "group_size": 64, "scale": "fp16"}
ONE_BF16, ONE_FP16 = 0x3F80, 0x3C00


def grouped(fmt: dict, shape: tuple[int, ...], seed: int = 0) -> StoredTensor:
    """Random codes over the format's whole range, and scales near 1."""
    rng = np.random.default_rng(seed)
    limit = 1 if fmt["kind"] == "ternary" else 2 ** (fmt["bits"] - 1) - 1
    codes = rng.integers(-limit, limit + 1, shape).astype(np.int8)
    one = ONE_BF16 if fmt["scale"] == "bf16" else ONE_FP16
    scales = (one + rng.integers(0, 100, pack.scale_shape(fmt, shape))).astype(np.uint16)
    return StoredTensor(shape, fmt, codes, scales)


def model() -> dict[str, StoredTensor]:
    return {
        "emb": grouped(INT6, (40, 96), 1),
        "a.weight": grouped(TERNARY, (64, 200), 2),
        "gain": StoredTensor((64,), {"kind": "bf16"}, np.full(64, ONE_BF16, np.uint16), None),
        "b.weight": grouped(TERNARY, (200, 64), 3),
        "bias": StoredTensor((3,), {"kind": "fp32"}, np.array([0, 0x3F800000, 0x80000000], np.uint32), None),
    }


def write(tmp_path: Path, tensors=None, meta=None) -> Path:
    path = tmp_path / "model.bin"
    pack.write_artifact(path, model() if tensors is None else tensors, {} if meta is None else meta)
    return path


# Packings -----------------------------------------------------------------------------------------------------


def test_base3_golden_is_75():
    # digits 0 1 2 2 0, least significant first: 0 + 1*3 + 2*9 + 2*27 + 0*81 = 75
    assert pack.pack_base3(np.array([-1, 0, 1, 1, -1], np.int8)) == bytes([75])
    assert pack.unpack_base3(bytes([75]), 5).tolist() == [-1, 0, 1, 1, -1]


def test_base3_goldens_of_extremes_and_padding():
    assert pack.pack_base3([]) == b""
    assert pack.pack_base3([1] * 5) == bytes([242])
    assert pack.pack_base3([-1] * 5) == bytes([0])
    assert pack.pack_base3([1]) == bytes([2]), "padding digits are 0"
    assert pack.pack_base3([0, 0, 0, 0, 0, 1, 1]) == bytes([121, 8])


def test_bits_goldens():
    # 3 bits, limit 3, lowest first: 0, 3, 6 -> 000 | 011 << 3 | 110 << 6 = 0b1_1001_1000
    assert pack.pack_bits([-3, 0, 3], "int3") == bytes([0b10011000, 0b1])
    assert pack.unpack_bits(bytes([0b10011000, 0b1]), 3, "int3").tolist() == [-3, 0, 3]
    assert pack.pack_bits([-127, 0, 127], "int8") == bytes([0, 127, 254])
    assert pack.pack_bits([-1, 0, 1, 0, 1], "int2") == bytes([0b01100100, 0b10])


def test_planes_put_high_bytes_first():
    symbols = np.array([0x1234, 0x5678], np.uint16)
    assert pack.pack_planes(symbols, "u16") == bytes([0x12, 0x56, 0x34, 0x78])
    assert pack.unpack_planes(bytes([0x12, 0x56, 0x34, 0x78]), 2, "u16").tolist() == symbols.tolist()


@pytest.mark.parametrize("bits", [None, 2, 5, 8])
def test_packing_across_chunks(bits):
    """More codes than are packed at a time: no code lost, moved or doubled at the seams."""
    limit = 1 if bits is None else 2 ** (bits - 1) - 1
    n = 2 * pack.CHUNK + 3
    codes = np.random.default_rng(0).integers(-limit, limit + 1, n).astype(np.int8)
    data = pack.pack_base3(codes) if bits is None else pack.pack_bits(codes, f"int{bits}")
    assert len(data) == (-(-n // 5) if bits is None else -(-n * bits // 8))
    back = pack.unpack_base3(data, n) if bits is None else pack.unpack_bits(data, n, f"int{bits}")
    assert back.dtype == np.int8 and np.array_equal(back, codes)


@pytest.mark.parametrize("codes", [[2], [-2], [0.5], [0, 1, 127]])
def test_base3_refuses_what_is_not_ternary(codes):
    with pytest.raises(ArtifactError, match="quantize"):
        pack.pack_base3(codes)


def test_base3_is_fast_enough_for_a_large_model():
    codes = np.tile(np.array([-1, 0, 1, 1], np.int8), 2_500_000)
    start = time.perf_counter()
    assert np.array_equal(pack.unpack_base3(pack.pack_base3(codes), codes.size), codes)
    assert time.perf_counter() - start < 3  # 10M codes take 0.15 s here


# Layout -------------------------------------------------------------------------------------------------------


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
    ],
)
def test_layout_of_groups(fmt, shape, scales):
    kind = "ternary" if fmt["kind"] == "ternary" else "int6"
    assert pack.scale_shape(fmt, shape) == scales
    assert pack.layout(fmt, shape) == {"codes": (kind, shape), "scales": ("u16", scales)}


def test_layout_of_floats_has_no_scales():
    assert pack.layout({"kind": "bf16"}, (3, 4)) == {"codes": ("u16", 12)}
    assert pack.layout({"kind": "fp32"}, (3,)) == {"codes": ("u32", 3)}


# Container ----------------------------------------------------------------------------------------------------


def test_tiny_artifact_byte_by_byte():
    t = StoredTensor((5,), TERNARY, np.array([-1, 0, 1, 1, -1], np.int8), np.array([[ONE_BF16]], np.uint16))
    data = pack.encode_artifact({"w": t}, {"a": 1})
    magic, version, size, text_size, crc = struct.unpack_from("<4sBIII", data)
    text = zlib.decompress(data[17 : 17 + size], -15)
    assert (magic, version, text_size) == (b"TRNY", 1, len(text))
    assert crc == zlib.crc32(data[:13] + data[17 : 17 + size])
    assert json.loads(text) == {
        "formats": [TERNARY],
        "meta": {"a": 1},
        "streams": [["base3", 1, zlib.crc32(bytes([75]))], ["raw", 2, zlib.crc32(bytes([0x80, 0x3F]))]],
        "tensors": [["w", [5], 0]],
    }
    assert data[17 + size :] == bytes([75, 0x80, 0x3F]), "one byte of codes, one little-endian scale, nothing else"


def test_round_trip_keeps_order_formats_and_bits():
    tensors, meta = model(), {"config": {"lr": 0.04, "name": "é", "on": True, "none": None, "list": [1, [2.5]]}}
    back, back_meta = pack.decode_artifact(pack.encode_artifact(tensors, meta))
    assert list(back) == list(tensors) and back_meta == meta
    assert pack.first_difference(back, tensors) is None
    for t in back.values():
        assert t.codes.flags.writeable and t.codes.dtype.isnative


def test_one_stream_per_format_and_role():
    header = pack.parse_header(pack.encode_artifact(model(), {}))
    assert [(s.format, s.role, s.kind, s.count) for s in header.streams] == [
        (0, "codes", "int6", 40 * 96),
        (0, "scales", "u16", 40 * 2),
        (1, "codes", "ternary", 2 * 64 * 200),
        (1, "scales", "u16", 64 * 2 + 200),
        (2, "codes", "u16", 64),
        (3, "codes", "u32", 3),
    ]
    assert header.streams[0].offset == header.header_bytes
    assert all(a.offset + a.bytes == b.offset for a, b in zip(header.streams, header.streams[1:], strict=False))


def test_uniform_ternary_codes_take_1_6_bits():
    header = pack.parse_header(pack.encode_artifact({"w": grouped(TERNARY, (500, 1000))}, {}))
    assert header.streams[0].codec == "base3" and header.streams[0].bytes == 100_000


def test_repetitive_streams_are_compressed():
    codes = np.tile(np.array([1, 0, 0, -1, 0, 0, 0], np.int8), 10_000).reshape(70, 1000)
    t = StoredTensor((70, 1000), TERNARY, codes, np.full((70, 8), ONE_BF16, np.uint16))
    header = pack.parse_header(pack.encode_artifact({"w": t}, {}))
    assert all("+" in s.codec and s.bytes < 100 for s in header.streams)


@pytest.mark.parametrize("name", list(pack.CODECS))
def test_every_codec_round_trips_every_kind_it_claims(name):
    codec = pack.CODECS[name]
    rng = np.random.default_rng(0)
    for kind in codec.kinds:
        dtype = np.dtype(pack.SYMBOLS[kind])
        high = pack.range_of(kind)[1] if dtype.itemsize == 1 else 2 ** (8 * dtype.itemsize) - 1
        low = -high if dtype.kind == "i" else 0
        symbols = rng.integers(low, high, 1003, endpoint=True).astype(dtype)
        back = codec.decode(codec.encode(symbols, kind, [symbols.shape]), kind, [symbols.shape])
        assert back.dtype == dtype and np.array_equal(back, symbols)


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
    root = Path(pack.__file__).parent
    out = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == __import__("hashlib").sha256(first).hexdigest()


def test_layout_in_memory_does_not_matter():
    t = grouped(TERNARY, (64, 200))
    turned = StoredTensor(t.shape, t.format, np.asfortranarray(t.codes), t.scales[:, ::-1].copy()[:, ::-1])
    assert pack.encode_artifact({"w": t}, {}) == pack.encode_artifact({"w": turned}, {})


def test_a_small_model_spends_little_on_its_header():
    names = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.proj"]
    tensors = {f"blocks.{i}.{n}.weight": grouped(TERNARY, (8, 128)) for i in range(6) for n in names}
    assert pack.parse_header(pack.encode_artifact(tensors, {})).header_bytes < 420


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5, 4]}, "tuple"),
        ({"shape": (5, 5)}, "codes must be int8 \\(5, 5\\)"),
        ({"shape": (True, 20)}, "shape"),
        ({"shape": (-5, -4)}, "shape"),
        ({"codes": np.zeros((5, 4), np.int64)}, "codes must be int8"),
        ({"codes": [[0] * 4] * 5}, "not list"),
        ({"codes": np.full((5, 4), 2, np.int8)}, "quantize"),
        ({"scales": None}, "scales must be uint16"),
        ({"scales": np.ones((5, 1), np.float32)}, "scales must be uint16"),
        ({"scales": np.ones((5, 2), np.uint16)}, "scales must be uint16"),
        ({"format": {"kind": "bf16"}}, "codes must be uint16"),
        ({"format": {"kind": "quaternary"}}, "not known"),
        ({"format": TERNARY | {"group_size": -1}}, "not known"),
        ({"format": TERNARY | {"scale": "fp32"}}, "not known"),
        ({"format": TERNARY | {"threshold": float("nan")}}, "finite"),
        ({"format": INT6 | {"bits": 9}}, "not known"),
        ({"format": INT6 | {"bits": True}}, "not known"),
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


@pytest.mark.parametrize(
    "meta", [{"a": float("inf")}, {1: 2}, {"a": {1, 2}}, {"a": np.float32(1)}, {"a": 2**70}, [1], None]
)
def test_writer_refuses_meta_that_is_not_json(meta):
    with pytest.raises(ArtifactError, match="meta"):
        pack.encode_artifact({}, meta)


@pytest.mark.parametrize("name", ["", "a" * 300, "a\nb", "\x1b[2J", "\ud800", 3])
def test_writer_refuses_bad_names(name):
    with pytest.raises(ArtifactError, match="name"):
        pack.encode_artifact({name: grouped(TERNARY, (5, 4))}, {})


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


# Files --------------------------------------------------------------------------------------------------------


def test_write_returns_the_files_size_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "model.bin"
    assert pack.write_artifact(path, model(), {}) == path.stat().st_size
    assert os.listdir(tmp_path) == ["model.bin"]
    assert pack.first_difference(pack.read_artifact(path)[0], model()) is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, step):
    path = write(tmp_path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.os, step, fail)
    with pytest.raises(ArtifactError, match="No space left"):
        pack.write_artifact(path, {}, {})
    assert os.listdir(tmp_path) == ["model.bin"] and path.read_bytes() == before


def test_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack.write_artifact(tmp_path / "model.bin", model(), {})
    assert os.listdir(tmp_path) == []


def test_invalid_tensors_leave_no_file(tmp_path):
    with pytest.raises(ArtifactError):
        pack.write_artifact(tmp_path / "model.bin", {"": grouped(TERNARY, (2, 2))}, {})
    assert os.listdir(tmp_path) == []


def test_write_into_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="folder must exist"):
        pack.write_artifact(tmp_path / "no" / "model.bin", model(), {})


# Budget -------------------------------------------------------------------------------------------------------


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


def test_code_files_are_those_beside_pack():
    assert [p.name for p in pack.code_files()] == ["train_gpt.py", "pack.py", "eval_bpb.py"]
    assert {p.parent for p in pack.code_files()} == {Path(pack.__file__).resolve().parent}


# Command line -------------------------------------------------------------------------------------------------


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


def test_verify_accepts_a_good_file(tmp_path, capsys):
    assert pack.main(["verify", str(write(tmp_path))]) == 0
    assert re.findall(r"^\w+", capsys.readouterr().out, re.M) == ["sound", "canonical"]


@pytest.mark.parametrize(
    ("name", "role", "at", "value", "message"),
    [
        ("a.weight", "scales", (3, 1), 0x7F80, r"scale \[3, 1\] is not finite"),
        ("a.weight", "scales", (3, 1), 0x0000, r"group \[3, 1\] has codes but the scale 0"),
        ("a.weight", "scales", (3, 1), 0x8000, r"group \[3, 1\] has codes but the scale 0"),
        ("emb", "scales", (39, 0), 0x7E00, r"scale \[39, 0\] is not finite"),
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
    assert pack.main(["verify", str(write(tmp_path, tensors))]) == 0


def test_verify_finds_a_file_that_is_not_canonical(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(pack, "CODECS", {k: pack.CODECS[k] for k in ("base3", "raw+zstd")})
        path = write(tmp_path)
    assert pack.read_artifact(path)
    assert pack.main(["verify", str(path)]) == 0  # sound, and another compressor's bytes are no fault of the file
    assert "not canonical here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, None),
        (
            lambda t: t["b.weight"].codes.__setitem__((7, 9), -t["b.weight"].codes[7, 9] or 1),
            r"'b.weight': codes\[7, 9\] is",
        ),
        (
            lambda t: t["emb"].scales.__setitem__((0, 1), 1),
            r"'emb': scales\[0, 1\] is \d+ in the file, 1 in the checkpoint",
        ),
        (lambda t: t.pop("gain"), "'gain' is only in the file"),
        (lambda t: t.update(more=t["gain"]), "'more' is only in the checkpoint"),
        (lambda t: t["emb"].format.update(group_size=65), "group_size"),
    ],
)
def test_verify_against_a_checkpoint(tmp_path, capsys, monkeypatch, change, message):
    tensors = {n: StoredTensor(t.shape, dict(t.format), t.codes, t.scales) for n, t in model().items()}
    if change:
        change(tensors)
    trainer = types.SimpleNamespace(stored_from_checkpoint=lambda folder: tensors)
    monkeypatch.setitem(sys.modules, "train_gpt", trainer)
    status = pack.main(["verify", str(write(tmp_path)), "--against", str(tmp_path)])
    streams = capsys.readouterr()
    assert (status, bool(streams.err)) == ((1, True) if message else (0, False))
    assert re.search(message or "same: every code", streams.err + streams.out)


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
    root = Path(pack.__file__).parent
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
