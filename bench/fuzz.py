"""Coverage-guided fuzzing of the artifact reader: `make fuzz`, or

    pip install atheris==3.0.0
    python bench/fuzz.py -max_total_time=600 [other options of libFuzzer] [corpus folder]

An input is either a whole file, or (first byte odd) the parts of one that get correct sizes and checksums, so that what
lies behind the checksums is reached. Whatever it is, reading must give tensors or an ArtifactError, within 20 seconds
and a memory limit; what can be read must come back from being written again. Anything else stops the fuzzer with the
input in a crash-* or timeout-* file.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pack

LIMITS = ["-timeout=20", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-max_len=8192"]


def assemble(data: bytes) -> bytes:
    """A file whose sizes and checksums are right, from: header length, header JSON, streams of equal length."""
    (size,) = struct.unpack_from("<H", data)
    text, rest = data[2 : 2 + size], data[2 + size :]
    try:
        header = json.loads(text)
        table = header["streams"]
        share, at = len(rest) // max(len(table), 1), 0
        for i, row in enumerate(table):
            length = row[1] if type(row[1]) is int and 0 <= row[1] <= len(rest) - at else share
            row[1:] = [length, zlib.crc32(rest[at : at + length])]
            at += length
            if i == len(table) - 1:
                rest = rest[:at]
        text = pack.canonical_json(header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass  # as it is
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(text) + deflate.flush()
    preamble = pack.PREAMBLE.pack(pack.MAGIC, pack.VERSION, len(packed), len(text))
    return preamble + struct.pack("<I", zlib.crc32(packed, zlib.crc32(preamble))) + packed + rest


def one_input(data: bytes) -> None:
    again = data[:1] >= b"\x80"  # writing tries every codec, which is slow: half of the inputs
    data = assemble(data[1:]) if len(data) > 3 and data[0] & 1 else data[1:]
    try:
        tensors, meta = pack.decode_artifact(data)
    except pack.ArtifactError:
        return
    if again:
        back, meta_back = pack.decode_artifact(pack.encode_artifact(tensors, meta))
        if pack.first_difference(tensors, back) or meta != meta_back:
            raise AssertionError("what was read is not what comes back")
    for name, t in tensors.items():
        try:
            pack.check_values(name, t)
        except pack.ArtifactError:
            pass


def seeds(folder: Path) -> None:
    """Small files of every format, whole and in parts, from which the fuzzer starts."""
    rng = np.random.default_rng(0)

    def tensor(format: dict, shape: tuple[int, ...]) -> pack.StoredTensor:
        arrays = {}
        for role, (kind, role_shape) in pack.layout(format, shape).items():
            low, high = pack.range_of(kind) if kind[0] != "u" or "int" in kind else (0, 2 ** int(kind[1:]) - 1)
            arrays[role] = rng.integers(low, high, role_shape, endpoint=True).astype(pack.SYMBOLS[kind])
        return pack.StoredTensor(shape, format, arrays["codes"], arrays.get("scales"))

    formats = [{"kind": "ternary", "group_size": 4, "scale": "log6"},
               {"kind": "ternary", "group_size": 0, "scale": "bf16"},
               {"kind": "int", "bits": 4, "group_size": 8, "scale": "log8"},
               {"kind": "int", "bits": 8, "group_size": 8, "scale": "fp16"},
               {"kind": "fp8"}, {"kind": "bf16"}, {"kind": "fp32"}]
    for i, format in enumerate(formats):
        for j, shape in enumerate([(3, 7), (9, 33), (5,), (), (2, 0)]):
            whole = {f"layers.{k}.w": tensor(format, shape) for k in range(3)} | {"x": tensor({"kind": "bf16"}, (9,))}
            for name, codec in pack.CODECS.items():  # each codec, where it may be used
                if codec.compressor and 0 in shape:
                    continue
                others = {n: replace(c, kinds=tuple(k for k in c.kinds if k not in codec.kinds))
                          for n, c in pack.CODECS.items() if not c.compressor}
                held, pack.CODECS = pack.CODECS, others | {name: replace(codec, replaced=())}
                try:
                    data = pack.encode_artifact(whole, {"i": i})
                finally:
                    pack.CODECS = held
                (folder / f"{i}{j}{name}").write_bytes(b"\x80" + data)
                header, end = pack.read_header_json(memoryview(data))
                text = pack.canonical_json(header)
                (folder / f"{i}{j}{name}_parts").write_bytes(b"\1" + struct.pack("<H", len(text)) + text + data[end:])


def main() -> int:
    global pack
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        import atheris
    except ModuleNotFoundError:
        print("error: atheris is not installed; run: pip install atheris==3.0.0, or make fuzz", file=sys.stderr)
        return 1
    with atheris.instrument_imports(include=["pack", "tern"]):  # once more, with what counts which lines are reached
        for name in [name for name in sys.modules if name == "pack" or name.split(".")[0] == "tern"]:
            del sys.modules[name]
        pack = importlib.import_module("pack")
    given = [a for a in sys.argv[1:] if not a.startswith("-")]
    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        options = [a for a in sys.argv[1:] if a.startswith("-")]
        atheris.Setup([sys.argv[0], *LIMITS, *options, *given, folder], one_input)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
