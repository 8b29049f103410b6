"""Files that lie. Each test is named after its attack; every forged file has correct checksums, so that the rule
itself must refuse it. Whatever the file, reading ends in tensors or in an ArtifactError, quickly and in little memory.
"""

from __future__ import annotations

import functools
import json
import lzma
import os
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard

import pack
from pack import ArtifactError, StoredTensor
from tern import entropy

pytestmark = pytest.mark.fast

TERNARY = {"group_size": 0, "kind": "ternary", "scale": "bf16"}
BF16, FP32, INT3 = {"kind": "bf16"}, {"kind": "fp32"}, {"bits": 3, "group_size": 0, "kind": "int", "scale": "bf16"}
FP8 = {"kind": "fp8"}
SCALE = b"\x80\x3f"


def forge(
    header, streams: bytes = b"", *, magic=b"TRNY", version=2, text_size=None, size=None, crc=None, deflated=None
):
    """A file around any header (a JSON value or the exact text), with a correct checksum unless told otherwise."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    if deflated is None:
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        deflated = compressor.compress(text) + compressor.flush()
    preamble = struct.pack(
        "<4sBII", magic, version, len(deflated) if size is None else size, len(text) if text_size is None else text_size
    )
    crc = zlib.crc32(preamble + deflated) if crc is None else crc
    return preamble + struct.pack("<I", crc) + deflated + streams


def header_of(streams, *, formats=None, tensors=None, meta=None, **more) -> dict:
    """A header of one ternary tensor w [5], or of what is given. streams: [codec, bytes] pairs."""
    table = [[codec, len(data), zlib.crc32(data)] for codec, data in streams]
    tensors = [["w", [5], 0]] if tensors is None else tensors
    return {
        "formats": [TERNARY] if formats is None else formats,
        "meta": meta or {},
        "streams": table,
        "tensors": tensors,
    } | more


def build(streams, **parts) -> bytes:
    """A forged file whose stream table and checksums fit its streams."""
    return forge(header_of(streams, **parts), b"".join(data for _, data in streams))


GOOD = [("base3", bytes([75])), ("raw", SCALE)]


def refused(data: bytes, message: str, seconds: float = 3.0, megabytes: float = 8.0) -> None:
    """The reader refuses data, with this message, in processor time and memory that do not depend on what it declares.
    """
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ArtifactError, match=message) as caught:
            pack.decode_artifact(data)
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20 + 4 * len(data)
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def check_arrays(tensors: dict[str, StoredTensor]) -> None:
    """What a reader accepts is what its format and shape call for, whoever wrote it."""
    for name, t in tensors.items():
        for role, (kind, shape) in pack.layout(t.format, t.shape).items():
            array = getattr(t, role)
            assert array.shape == shape and array.dtype == np.dtype(pack.SYMBOLS[kind]), (name, role)
            if array.itemsize == 1 and array.size and kind not in pack.FLOATS:
                low, high = pack.range_of(kind)
                assert low <= array.min() and array.max() <= high, (name, role)


@functools.cache
def sample() -> bytes:
    rng = np.random.default_rng(0)
    ternary = TERNARY | {"group_size": 16}
    tensors = {
        "a": StoredTensor(
            (3, 33), ternary, rng.integers(-1, 2, (3, 33)).astype(np.int8), np.full((3, 3), 0x3F80, np.uint16)
        ),
        "b": StoredTensor(
            (7, 5), INT3, rng.integers(-3, 4, (7, 5)).astype(np.int8), np.full((1, 1), 0x3F80, np.uint16)
        ),
        "c": StoredTensor((16,), BF16, np.full(16, 0x3F80, np.uint16), None),
        "d": StoredTensor((3,), FP32, rng.integers(0, 2**32, 3).astype(np.uint32), None),
    }
    return pack.encode_artifact(tensors, {"config": {"layers": 2}})


@functools.cache
def codec_of(kind: str) -> str:
    """The codec of the adaptive model that writes a kind. Integers of older files share its code."""
    return "widths" if kind in pack.SIGNED else "model"


def modelled() -> bytes:
    """A file all of whose streams but one are of the model, whatever else would be shorter."""
    rng = np.random.default_rng(1)
    log = {"group_size": 16, "kind": "ternary", "scale": "log5"}
    streams = []
    for kind, shapes in [("ternary", [(4, 20), (2, 20), (4, 20)]), ("uint5", [(4, 2), (2, 2), (4, 2)]),
                         ("int3", [(7, 5)]), ("u16", [(1, 1)]), ("u8", [(3, 5)])]:
        low, high = (0, 255) if kind in pack.FLOATS else pack.range_of(kind)
        symbols = rng.integers(low, high, pack.count_of(shapes), endpoint=True).astype(pack.SYMBOLS[kind])
        streams.append((codec_of(kind), pack.CODECS[codec_of(kind)].encode(symbols, kind, shapes)))
    rows = [["a", [4, 20], 0], ["b", [2, 20], 0], ["c", [4, 20], 0], ["d", [7, 5], 1], ["e", [3, 5], 2]]
    return build(streams, formats=[log, INT3, FP8], tensors=rows)


def test_the_forger_can_make_a_good_file():
    """Otherwise every refusal below could be for another reason."""
    tensors, _ = pack.decode_artifact(build(GOOD))
    assert tensors["w"].codes.tolist() == [-1, 0, 1, 1, -1]
    again = pack.parse_header(sample())
    assert pack.decode_artifact(sample())[0].keys() == {"a", "b", "c", "d"} and len(again.streams) == 6
    again = pack.parse_header(modelled())
    assert len(pack.decode_artifact(modelled())[0]) == 5 and {s.codec for s in again.streams} == {"model", "widths"}


# Damage -------------------------------------------------------------------------------------------------------


def test_truncated_at_every_byte():
    data = sample()
    for end in range(len(data)):
        with pytest.raises(ArtifactError):
            pack.decode_artifact(data[:end])


def test_every_bit_flipped():
    data = sample()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            pack.decode_artifact(bytes(flipped))


def test_every_byte_of_model_streams_changed():
    data = modelled()
    for at in range(pack.parse_header(data).header_bytes, len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x55
        with pytest.raises(ArtifactError, match="checksum"):
            pack.decode_artifact(bytes(changed))


def test_200_random_corruptions():
    data, rng = sample(), random.Random(0)
    truth, meta = pack.decode_artifact(data)
    for _ in range(200):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(bad))
            action = rng.randrange(3)
            if action == 0:
                bad[at] = rng.randrange(256)
            elif action == 1:
                del bad[at : at + rng.randint(1, 9)]
            else:
                bad[at:at] = rng.randbytes(rng.randint(1, 9))
        try:
            tensors, found = pack.decode_artifact(bytes(bad))
        except ArtifactError:
            continue
        assert pack.first_difference(tensors, truth) is None and found == meta


@pytest.mark.parametrize("original", [sample, modelled])
def test_200_corruptions_under_correct_checksums(original):
    """A forger repairs the checksums: any answer but an ArtifactError or tensors of the declared shapes is a bug."""
    data, rng = original(), random.Random(1)
    clean = pack.parse_header(data)
    header = json.loads(zlib.decompress(data[17 : clean.header_bytes], -15))
    accepted = 0
    for _ in range(200):
        body = bytearray(data[clean.header_bytes :])
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        start = 0
        for row in header["streams"]:
            row[2] = zlib.crc32(bytes(body[start : start + row[1]]))
            start += row[1]
        try:
            tensors, _ = pack.decode_artifact(forge(header, bytes(body)))
        except ArtifactError:
            continue
        accepted += 1
        check_arrays(tensors)
    assert accepted < 200, "some changes must be refused"
    assert accepted or original is modelled, "and in plain packings some make another valid model"


def test_200_random_headers_under_correct_checksums():
    """Header text mutated at random."""
    data, rng, accepted = sample(), random.Random(2), 0
    clean = pack.parse_header(data)
    text = zlib.decompress(data[17 : clean.header_bytes], -15)
    tokens = [b"[", b"]", b"{", b"}", b"-1", b"1e999", b"NaN", b"null", b"true", b'""', b"9" * 20, b",", b"0"]
    for _ in range(200):
        at = rng.randrange(len(text))
        bad = text[:at] + rng.choice(tokens) + text[at + rng.randrange(3) :]
        try:
            tensors, _ = pack.decode_artifact(forge(bad, data[clean.header_bytes :]))
        except ArtifactError:
            continue
        accepted += 1
        check_arrays(tensors)
    assert accepted < 20, "a token in a string of meta or of a name makes another header, elsewhere it makes none"


@pytest.mark.parametrize("n", [0, 1, 16, 17, 100])
def test_random_bytes_of_any_length(n):
    refused(random.Random(n).randbytes(n), "not an artifact")
    refused((b"TRNY\x02" + bytes(n))[:n], "not an artifact|header")


# Preamble -----------------------------------------------------------------------------------------------------


def test_wrong_magic():
    refused(forge(header_of(GOOD), bytes([75]) + SCALE, magic=b"PK\x03\x04"), "not an artifact")


def test_wrong_version():
    for version in (0, 1, 255):
        refused(forge(header_of(GOOD), bytes([75]) + SCALE, version=version), f"version {version} .* reads 2")


def test_wrong_header_checksum():
    refused(forge(header_of(GOOD), bytes([75]) + SCALE, crc=0), "header checksum")


def test_header_longer_than_the_file():
    refused(forge(header_of(GOOD), bytes([75]) + SCALE, size=2**32 - 1), "truncated")


def test_declared_header_size_out_of_bounds_or_not_exact():
    text = json.dumps(header_of(GOOD), sort_keys=True, separators=(",", ":")).encode()
    for text_size in (0, pack.MAX_HEADER + 1, 2**32 - 1):
        refused(forge(text, bytes([75]) + SCALE, text_size=text_size), "header of")
    for off in (-1, 1):
        refused(forge(text, bytes([75]) + SCALE, text_size=len(text) + off), "inflate to exactly")


def test_deflate_bomb():
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(b" " * (64 << 20)) + compressor.flush()
    refused(forge(b" " * 64, deflated=bomb), "declared at offset 5")
    refused(forge(b" " * pack.MAX_HEADER, deflated=bomb), "inflate to exactly")


def test_bytes_hidden_after_the_deflate_stream():
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = json.dumps(header_of(GOOD), sort_keys=True, separators=(",", ":")).encode()
    deflated = compressor.compress(text) + compressor.flush() + b"hidden"
    refused(forge(text, bytes([75]) + SCALE, deflated=deflated), "inflate to exactly")


def test_truncated_deflate_stream():
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = json.dumps(header_of(GOOD), sort_keys=True, separators=(",", ":")).encode()
    deflated = compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)  # all the text, but no end marker
    refused(forge(text, bytes([75]) + SCALE, deflated=deflated), "inflate to exactly")


# JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brackets", [b"[", b'{"a":'])
def test_json_bomb_of_nesting(brackets):
    refused(forge(brackets * (pack.MAX_HEADER // len(brackets))), "bad header", megabytes=32)


def test_deep_nesting_that_the_parser_survives():
    deep = 1
    for _ in range(pack.MAX_DEPTH + 1):
        deep = [deep]
    refused(build(GOOD, meta={"a": deep}), "nesting")


def test_what_is_written_is_not_too_deep_for_the_reader():
    def nested(levels: int) -> dict:
        deep: object = 0
        for _ in range(levels):
            deep = [deep]
        return {"a": deep}

    tensors = {"w": StoredTensor((2,), BF16, np.zeros(2, np.uint16), None)}
    meta = nested(pack.MAX_DEPTH - 2)
    assert pack.decode_artifact(pack.encode_artifact(tensors, meta))[1] == meta
    with pytest.raises(ArtifactError, match="nesting"):
        pack.encode_artifact(tensors, nested(pack.MAX_DEPTH - 1))


def test_what_is_written_is_not_too_long_for_the_reader(monkeypatch):
    tensors = {"w": StoredTensor((200,), BF16, np.arange(200, dtype=np.uint16), None)}
    monkeypatch.setattr(pack, "MAX_FILE", len(pack.encode_artifact(tensors, {})) - 1)
    with pytest.raises(ArtifactError, match="make the model smaller"):
        pack.encode_artifact(tensors, {})


def test_many_streams_of_few_bytes_and_many_steps(monkeypatch):
    """Each within what a stream may take; both sides refuse them together."""
    codes = np.random.default_rng(0).choice([-1, 0, 0, 0, 0, 1], (64, 64)).astype(np.int8)
    scales = np.full((1, 1), 0x3F80, np.uint16)
    tensors = {f"w{n}": StoredTensor((64, 64), TERNARY | {"n": n}, codes, scales) for n in range(3)}
    file = pack.encode_artifact(tensors, {})
    streams = pack.parse_header(file).streams
    steps = [pack.CODECS[s.codec].steps(s.shapes, s.kind) for s in streams]
    bound = sum(steps) - sum(s.bytes for s in streams)
    assert max(steps) < sum(steps)
    monkeypatch.setattr(pack, "FREE_STEPS_IN_ALL", bound)
    assert pack.encode_artifact(tensors, {}) == file and pack.parse_header(file)
    monkeypatch.setattr(pack, "FREE_STEPS_IN_ALL", bound - 1)
    with pytest.raises(ArtifactError, match="steps of decoding"):
        pack.parse_header(file)
    with pytest.raises(ArtifactError, match="steps of decoding"):
        pack.encode_artifact(tensors, {})


def test_a_million_faults_are_not_listed():
    """The first is told; a list of them, of eight numbers each, would be of 64 MB."""
    t = StoredTensor((2,) * 7 + (1 << 13,), FP8, np.full((2,) * 7 + (1 << 13,), 0x7F, np.uint8), None)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=r"value \[0, 0, 0, 0, 0, 0, 0, 0\] is not finite"):
        pack.check_values("w", t)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_names_are_the_same_in_every_python():
    assert all(pack.is_printable(name) for name in ("w", "a b", "\u00e4", "\u0661"))
    assert not any(pack.is_printable(name) for name in ("\x1b[2J", "\u202e", "\u00a0", "\ud800", "\U0001fae8"))


@pytest.mark.parametrize(("number", "message"), [
    (b"NaN", "finite"), (b"-Infinity", "finite"), (b"1e999", "finite"), (b"9" * 5000, "bad header"),
    (b"18446744073709551616", "bad header")], ids=["NaN", "-Infinity", "1e999", "5000 digits", "2^64"])
def test_numbers_that_no_header_may_hold(number, message):
    text = json.dumps(header_of(GOOD, meta={"a": 7}), sort_keys=True, separators=(",", ":")).encode()
    refused(forge(text.replace(b'{"a":7}', b'{"a":%s}' % number), bytes([75]) + SCALE), message)


def test_duplicate_json_keys():
    text = json.dumps(header_of(GOOD), sort_keys=True, separators=(",", ":")).encode()
    refused(forge(text.replace(b'"meta":{}', b'"meta":{"a":1,"a":2}'), bytes([75]) + SCALE), "twice")
    refused(forge(text.replace(b'"meta":{}', b'"meta":{},"meta":{}'), bytes([75]) + SCALE), "twice")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"meta"', b' "meta"'),
        (b'"meta"', b'"m\\u0065ta"'),
        (b'"a":7', b'"a":7.50'),
        (b'"a":7', b'"a":-0'),
        (b'"a":7', b'"a":1E2'),
    ],
)
def test_header_with_two_spellings(old, new):
    text = json.dumps(header_of(GOOD, meta={"a": 7}), sort_keys=True, separators=(",", ":")).encode()
    assert old in text
    refused(forge(text.replace(old, new), bytes([75]) + SCALE), "canonical")


def test_header_that_is_no_header():
    for text in (b"", b"7", b"[]", b"null", b"{}", b"{", b"\xff\xfe", b'"\xc3\xa9"', b"{}{}"):
        refused(forge(text), "header")


@pytest.mark.parametrize("field", ["formats", "meta", "streams", "tensors"])
def test_field_missing_extra_or_of_another_type(field):
    header = header_of(GOOD)
    for value in (None, 1, "x", True):
        refused(forge(header | {field: value}, bytes([75]) + SCALE), "fields")
    refused(forge({k: v for k, v in header.items() if k != field}, bytes([75]) + SCALE), "fields")
    refused(forge(header | {field + "s": []}, bytes([75]) + SCALE), "fields")


# Formats and tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt",
    [7, None, {}, [], {"kind": 1}, {"kind": ["ternary"]}, {"kind": "int9"}, {"kind": "ternary"},
     TERNARY | {"group_size": -1}, TERNARY | {"group_size": 1.0}, TERNARY | {"group_size": True},
     TERNARY | {"scale": "fp8"}, TERNARY | {"scale": []}, TERNARY | {"scale": "log3"}, TERNARY | {"scale": "log9"},
     TERNARY | {"scale": "log"}, TERNARY | {"scale": "log05"}, {"kind": "fp4"}, {"kind": "u8"}, {"kind": "uint4"},
     INT3 | {"bits": 1}, INT3 | {"bits": 9}, INT3 | {"bits": "3"}],
)
def test_unknown_format(fmt):
    refused(build(GOOD, formats=[fmt]), "format .* is not known")


def test_duplicate_formats():
    tensors = [["v", [5], 0], ["w", [5], 1]]
    refused(build(GOOD * 2, formats=[TERNARY, TERNARY], tensors=tensors), "format twice")


def test_too_many_formats():
    formats = [TERNARY | {"n": n} for n in range(pack.MAX_FORMATS + 1)]
    refused(
        build(GOOD * len(formats), formats=formats, tensors=[[f"w{n}", [5], n] for n in range(len(formats))]),
        "more than",
    )


def test_unused_format():
    refused(build(GOOD, formats=[TERNARY, BF16]), "not used")


@pytest.mark.parametrize("index", [-1, 1, True, 0.0, "0", None])
def test_format_index_out_of_order_or_range(index):
    refused(build(GOOD, tensors=[["w", [5], index]]), "order of first use")
    refused(folded([["w", 0, 2, [["", [5], index]]]], 2), "order of first use")


def test_formats_in_another_order_than_that_of_their_first_use():
    streams, tensors = [("raw", SCALE), *GOOD], [["w", [5], 1], ["v", [1], 0]]
    assert pack.decode_artifact(build(streams, formats=[BF16, TERNARY], tensors=tensors[::-1]))
    refused(build(streams, formats=[BF16, TERNARY], tensors=tensors), "order of first use")


def test_duplicate_names():
    refused(build(GOOD, tensors=[["w", [2], 0], ["w", [3], 0]]), "'w' occurs twice")


def test_bad_names():
    for name in ("", "x" * 257, "a\x1b[31m", "a\n", "\ud800", 5, None, ["w"]):
        refused(build(GOOD, tensors=[[name, [5], 0]]), "name")


@pytest.mark.parametrize(
    "shape", [[-5], [-1, -5], [True, 5], [5.0], ["5"], [None], [[5]], [1] * 9, [2**41], [2**40, 2], [2**41, 0]]
)
def test_bad_shapes(shape):
    refused(build(GOOD, tensors=[["w", shape, 0]]), "shape")
    refused(folded([["w", 0, 2, [["", shape, 0]]]], 2), "shape")


@pytest.mark.parametrize("row", [[], ["w", [5]], ["w", [5], 0, 0], ["w", 5, 0], "w50", None, {"name": "w"}])
def test_bad_tensor_entries(row):
    refused(build(GOOD, tensors=[row]), "tensor entry")


# Folded tensors -----------------------------------------------------------------------------------------------

E = ["", [5], 0]


def folded(table, tensors: int) -> bytes:
    """A file whose streams fit a table of so many ternary tensors of 5 weights."""
    return build([("base3", bytes([75]) * tensors), ("raw", SCALE * tensors)], tensors=table)


def test_the_forger_can_fold():
    for table, names in [([["w", 0, 3, [E]]], ["w0", "w1", "w2"]), ([["", 9, 2, [E]]], ["9", "10"]),
                         ([["w", 7, 2, [[".b", [5], 0], E]], ["w", [5], 0]], ["w7.b", "w7", "w8.b", "w8", "w"])]:
        assert list(pack.decode_artifact(folded(table, len(names)))[0]) == names


@pytest.mark.parametrize(
    ("table", "tensors"),
    [
        ([["w0", [5], 0], ["w1", [5], 0]], 2),
        ([["w0", [5], 0], ["w1", [5], 0], ["w2", [5], 0]], 3),
        ([["w", 0, 1, [E]]], 1),
        ([["w", 0, 2, [E]], ["w", 2, 2, [E]]], 4),
        ([["w", 0, 2, [E]], ["w2", [5], 0]], 3),
        ([["w0", [5], 0], ["w", 1, 2, [E]]], 3),
        ([["w", 0, 2, [["5", [5], 0]]]], 2),  # w05, w15
        ([["w1", 0, 3, [E]]], 3),  # w10, w11, w12
        ([["w9", 999998, 3, [E]]], 3),  # w9999998, w9999999, w91000000
        ([["w", 999999, 2, [E]]], 2),  # w1000000 is w1 and then 0
        ([["w00", [5], 0], ["w01", [5], 0]], 2),
        ([["h0.", 0, 2, [E]]], 2),  # h0.0, h0.1: the first number names the layer
        ([["w", 0, 2, [["a", [5], 0]]], ["w", 0, 2, [["b", [5], 0]]], ["w", 2, 2, [["b", [5], 0]]]], 6),
        ([["w", 0, 0, [E]], ["w", [5], 0]], 1),
        ([["w", 0, 2, []], ["w", [5], 0]], 1),
    ],
)
def test_folded_table_with_two_spellings(table, tensors):
    refused(folded(table, tensors), "not folded as|is not \\[before")


def test_number_of_layers_or_first_number_out_of_range():
    for count in (0, -1, pack.MAX_TENSORS + 1, 2**31, 2**62, True, 2.0, "2", None, [2]):
        refused(folded([["w", 0, count, [E]]], 2), "is not \\[before")
    for first in (-1, 10**6, 2**31, 2**62, 2**63 - 1, True, 0.0, "0", "00", None, []):
        refused(folded([["w", first, 2, [E]]], 2), "is not \\[before|not folded as")


def test_layers_beyond_any_number():
    refused(build(GOOD, tensors=[["w", 0, 2**64, [E]]]), "64-bit")
    refused(build(GOOD, tensors=[["w", 2**64, 2, [E]]]), "64-bit")
    text = json.dumps(header_of(GOOD, tensors=[["w", 0, 7, [E]]]), sort_keys=True, separators=(",", ":")).encode()
    for number in (b"07", b"7e0", b"+7", b"9" * 5000, b"1e999"):
        refused(forge(text.replace(b',7,', b',%s,' % number), bytes([75]) + SCALE), "bad header")


def test_more_tensors_than_a_file_may_have():
    names = [[str(i), [5], 0] for i in range(3)]
    for table in ([["w", 0, pack.MAX_TENSORS, names]], [["w", 0, pack.MAX_TENSORS, [E]], ["v", 0, 2, [E]]],
                  [["w", 0, 8000, [E]], ["v", 0, 8000, [E]], ["u", 0, 8000, [E]]]):
        refused(folded(table, 5), "at most 16384|is not \\[before")


def test_the_most_tensors_that_a_file_may_have():
    tensors = [["w", 0, pack.MAX_TENSORS, [E]]]
    assert len(pack.parse_header(folded(tensors, pack.MAX_TENSORS)).tensors) == pack.MAX_TENSORS


@pytest.mark.parametrize(
    "entry",
    [["w", 0, 2], ["w", 0, 2, [E], 0], ["w", 0, 2, E], ["w", 0, 2, "E"], ["w", 0, 2, {"": [5]}], ["w", 0, 2, None],
     ["w", 0, 2, [[]]], ["w", 0, 2, [["", [5]]]], ["w", 0, 2, [["", [5], 0, 0]]], ["w", 0, 2, [None]],
     ["w", 0, 2, [["w", 0, 2, [E]]]], ["w", 0, 2, [[E]]], [["w"], 0, 2, [E]], [None, 0, 2, [E]], [5, 0, 2, [E]],
     ["w", 0, 2, [[7, [5], 0]]], ["w", 0, 2, [[None, [5], 0]]], ["w", 0, 2, [["", 5, 0]]], ["w", 0, 2, [["", "5", 0]]]],
)
def test_bad_folded_entries(entry):
    refused(folded([entry], 2), "tensor entry")


@pytest.mark.parametrize(
    "table",
    [
        [["w", 0, 12, [E]], ["w5", [5], 0]],
        [["w11", [5], 0], ["w", 0, 12, [E]]],
        [["w", 0, 2, [E, E]]],
        [["w", 0, 2, [E]], ["w", 0, 2, [E]]],
        [["w", 0, 20, [E]], ["w1", 0, 5, [E]]],
    ],
)
def test_duplicate_names_after_unfolding(table):
    refused(folded(table, 26), "occurs twice")


@pytest.mark.parametrize(
    "table",
    [
        [["x" * 256, 0, 2, [E]]],
        [["x" * 253, 9, 99, [["." * 2, [5], 0]]]],  # too long from 10 on
        [["", 0, 2, [["x" * 256, [5], 0]]]],
        [["\x1b[2J", 0, 2, [E]]],
        [["w", 0, 2, [["\n", [5], 0]]]],
        [["w", 0, 2, [["\ud800", [5], 0]]]],
    ],
)
def test_bad_names_after_unfolding(table):
    refused(folded(table, 2), "name|tensor entry")


def test_names_that_would_fill_the_memory():
    """A header is 200 bytes when it repeats itself, and its names could unfold to 4 GB."""
    long = "x" * 20_000  # 300 MB already
    refused(folded([[long, 0, pack.MAX_TENSORS, [E]]], 5), "name|tensor entry")
    refused(folded([["w", 0, pack.MAX_TENSORS, [[long, [5], 0]]]], 5), "name|tensor entry")


def test_runs_of_layers_that_are_empty():
    """A loop around nothing: 400 bytes that cost minutes, if each of 10,000 such runs is walked through."""
    refused(folded([["w", 0, pack.MAX_TENSORS, []]] * 200 + [["w", [5], 0]], 1), "tensor entry|not folded as")


def test_more_rows_than_a_file_may_have_tensors():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = [a + b + c for a in letters for b in letters for c in letters][: pack.MAX_TENSORS + 1]
    refused(folded([[name, [5], 0] for name in names], len(names)), "at most 16384", seconds=10, megabytes=32)


# Stream table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 4, 6, 10, 1000, 2**20])
def test_count_that_does_not_match_the_shape(count):
    if count == 4:  # one byte as well, but then its last digit is padding
        return refused(build([("base3", bytes([242])), ("raw", SCALE)], tensors=[["w", [4], 0]]), "padding")
    refused(build(GOOD, tensors=[["w", [count], 0]]), "base3 of")


def test_scales_that_do_not_match_the_shape():
    refused(build([GOOD[0], ("raw", SCALE * 2)]), "raw of 1 u16 symbols takes exactly 2 bytes, not 4")


@pytest.mark.parametrize("fmt", [TERNARY, TERNARY | {"group_size": 1}, INT3, BF16, FP32, FP8], ids=str)
def test_oversized_count(fmt):
    """2^24 or 2^40 weights in a hundred bytes: refused at once and without memory, whatever the codec."""
    for count in (2**24, 2**40):
        for codec in pack.CODECS:
            streams = [(codec, b"\0" * 20)] + ([("raw", SCALE)] if "scale" in fmt else [])
            refused(build(streams, formats=[fmt], tensors=[["w", [count], 0]]),
                    "symbols from 20 bytes are more|is not one for")


def test_oversized_sum_of_counts():
    rows = [["x" * i, [2**22], 0] for i in range(1, 250)]
    refused(build(GOOD, tensors=rows), "more than any model needs")
    for count in (2**14, 2**18, 2**40):  # each within what one tensor may be
        refused(build(GOOD, tensors=[["w", 0, 1000, [["", [count], 0]]]]), "more than any model needs")
        refused(build([("model", b""), GOOD[1]], tensors=[["w", 0, 1000, [["", [count], 0]]]]), "more than any|not one")


def test_overlapping_streams():
    """Offsets are derived from sizes, so an overlap can only be declared as sizes beyond the file's end."""
    header = header_of(GOOD)
    header["streams"][0][1] = header["streams"][1][1] = 3
    refused(forge(header, bytes([75]) + SCALE), "ends at offset")


def test_gap_between_streams():
    refused(forge(header_of(GOOD), bytes([75]) + b"gap" + SCALE), "after the last stream")


def test_trailing_bytes():
    refused(build(GOOD) + b"\0", "1 bytes after the last stream")
    refused(sample() + b"more", "4 bytes after the last stream")


def test_bad_stream_sizes():
    for size in (-1, 2**63 - 1, True, 1.0, "1", None):
        header = header_of(GOOD)
        header["streams"][0][1] = size
        refused(forge(header, bytes([75]) + SCALE), "is not \\[codec, bytes, crc32\\]")


@pytest.mark.parametrize("streams", [GOOD[:1], GOOD + GOOD[1:], []])
def test_missing_and_extra_streams(streams):
    refused(build(streams), "streams, but the formats call for 2")


def test_unknown_codec_or_one_of_another_kind():
    for codec in ("", "planes", "raw", "bits", "pickle", "base3+zstd+zstd", "__class__"):
        refused(build([(codec, bytes([75])), GOOD[1]]), "codec")


def test_wrong_stream_checksum():
    for n in (0, 1):
        header = header_of(GOOD)
        header["streams"][n][2] ^= 1
        refused(forge(header, bytes([75]) + SCALE), f"stream {n} .*checksum")


def test_streams_swapped():
    header = header_of([("base3", bytes([75])), ("base3", bytes([76]))], formats=[TERNARY])
    refused(forge(header, bytes([76, 75])), "codec 'base3' is not one for u16")


# Symbols ------------------------------------------------------------------------------------------------------


def one_stream(codec: str, data: bytes, kind: str, count: int) -> bytes:
    """A file of one tensor, whose codes are this stream."""
    if kind == "u16":
        return build([(codec, data)], formats=[BF16], tensors=[["w", [count], 0]])
    fmt = TERNARY if kind == "ternary" else INT3 | {"bits": int(kind[3:])}
    return build([(codec, data), ("raw", SCALE)], formats=[fmt], tensors=[["w", [count], 0]])


def test_code_outside_base3():
    """243 would be a sixth digit; no byte can spell a code of 3."""
    for byte in (243, 255):
        refused(one_stream("base3", bytes([byte]), "ternary", 5), f"base3 byte 0 is {byte}")
        refused(one_stream("base3", bytes([75, byte, 75]), "ternary", 15), "base3 byte 1 is .* above 242")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_base3_padding_that_is_not_zero(n):
    good = pack.decode_artifact(one_stream("base3", bytes([3**n - 1]), "ternary", n))[0]
    assert good["w"].codes.tolist() == [1] * n
    refused(one_stream("base3", bytes([3**n]), "ternary", n), "padding")


def test_plain_streams_of_another_length():
    for data in (b"", bytes(2), bytes(3)):
        refused(one_stream("base3", data, "ternary", 5), "exactly 1 bytes")
    for data in (b"", bytes(1), bytes(3), bytes(4)):
        refused(one_stream("raw", data, "u16", 1), "exactly 2 bytes")
    for n in (0, 1, 7):
        refused(one_stream("bits", bytes(-(-n * 3 // 8) + 1), "int3", n), "exactly")


@pytest.mark.parametrize("bits", range(2, 9))
def test_int_code_outside_its_range(bits):
    """All ones would be limit + 1: two's complement's lonely negative, which a symmetric format does not have."""
    limit = 2 ** (bits - 1) - 1
    refused(one_stream("bits", bytes([255] * bits), f"int{bits}", 8), f"outside -{limit}")  # 8: no padding bits
    for code in (bytes([limit + 1]), struct.pack("b", -limit - 1)):
        refused(one_stream("raw", code, f"int{bits}", 1), f"integers in -{limit}..{limit}")


def test_bits_padding_that_is_not_zero():
    refused(one_stream("bits", bytes([0b01000000]), "int3", 2), "padding")


@pytest.mark.parametrize(("fmt", "code", "message"), [
    ({"kind": "binary", "group_size": 0, "scale": "bf16"}, 0, "binary code is 0"),
    ({"kind": "codebook", "group_size": 0, "entries": 4}, 2, r"outside -2\.\.1"),
    ({"kind": "codebook", "group_size": 0, "entries": 3}, -2, r"outside -1\.\.1"),
])
def test_a_code_that_its_format_does_not_have(fmt, code, message):
    """In the range of its symbols, so that the stream says nothing."""
    codec, kind = ("base3", "ternary") if fmt["kind"] == "binary" else ("bits", "int3")
    codes = np.array([-1, -1, code, -1, -1], np.int8)
    streams = [(codec, pack.CODECS[codec].encode(codes, kind, [(5,)])), ("raw", SCALE * fmt.get("entries", 1))]
    refused(build(streams, formats=[fmt]), message)
    scales = np.full((1, fmt.get("entries", 1)), 0x3F80, np.uint16)
    with pytest.raises(ArtifactError, match=message):
        pack.encode_artifact({"w": StoredTensor((5,), fmt, codes, scales)}, {})


# Model streams ------------------------------------------------------------------------------------------------

# Of each model its smallest and largest kinds; tests/test_entropy.py has those between, which differ in bits alone.
MODEL_KINDS = ("ternary", "five", "int2", "int4", "int8", "uint4", "uint8", "u8", "u16")


def model_file(kind: str, data: bytes, shapes) -> bytes:
    """A file with one model stream, of tensors aaa, baa, ... of these shapes (uint kinds: their scales)."""
    names = ["".join(chr(97 + i // 26**k % 26) for k in range(3)) for i in range(len(shapes))]
    rows = [[name, list(shape), 0] for name, shape in zip(names, shapes, strict=True)]
    if kind.startswith("uint"):
        codes = bytes(-(-pack.count_of(shapes) // 5))
        fmt = {"group_size": 1, "kind": "ternary", "scale": f"log{kind[4:]}"}
        return build([("base3", codes), ("model", data)], formats=[fmt], tensors=rows)
    if kind in ("ternary", "five") or kind.startswith("int"):
        fmt = TERNARY | {"kind": kind} if kind in ("ternary", "five") else INT3 | {"bits": int(kind[3:])}
        return build([(codec_of(kind), data), ("raw", SCALE * len(shapes))], formats=[fmt], tensors=rows)
    return build([("model", data)], formats=[{"u8": FP8, "u16": BF16}[kind]], tensors=rows)


def model_stream(kind: str, shapes, seed: int = 0) -> tuple[bytes, np.ndarray]:
    low, high = (0, 256 ** (int(kind[1:]) // 8) - 1) if kind in pack.FLOATS else pack.range_of(kind)
    rng = np.random.default_rng(seed)
    symbols = rng.integers(low, high, pack.count_of(shapes), endpoint=True).astype(pack.SYMBOLS[kind])
    return pack.CODECS[codec_of(kind)].encode(symbols, kind, shapes), symbols


def accepted(data: bytes, kind: str) -> np.ndarray | None:
    """The symbols of a file of model_file, None if it is refused; any other answer is an error."""
    try:
        tensors, _ = pack.decode_artifact(data)
    except ArtifactError as e:
        assert len(str(e)) < 500 and "\n" not in str(e)
        return None
    check_arrays(tensors)
    return np.concatenate([(t.scales if kind.startswith("uint") else t.codes).reshape(-1) for t in tensors.values()])


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_model_streams_truncated_lengthened_and_random(kind):
    """No checksum tells: the answer is an error, or symbols of the kind and shapes."""
    shapes, rng = [(5, 8), (2, 4)], random.Random(kind)
    data, symbols = model_stream(kind, shapes)
    assert np.array_equal(accepted(model_file(kind, data, shapes), kind), symbols)
    for size in range(1, 4):
        refused(model_file(kind, data[:-size], shapes), "words of 4 bytes", seconds=5)
        refused(model_file(kind, data + bytes(size), shapes), "words of 4 bytes", seconds=5)
    refused(model_file(kind, data + bytes(8), shapes), "goes on after the last symbol", seconds=5)
    refused(model_file(kind, data + data, shapes), "goes on after the last symbol", seconds=5)
    refused(model_file(kind, bytes([255]) * len(data), shapes), "is not valid", seconds=5)
    forgeries = [data[:4], data[:-8], data[:-4], data[4:], data[:8] + data[4:], bytes(len(data)), bytes(4), bytes(8),
                 *(rng.randbytes(4 * rng.randrange(len(data) // 3)) for _ in range(4))]
    for bad in forgeries:
        found = accepted(model_file(kind, bad, shapes), kind)
        assert found is None or found.size == symbols.size


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_model_stream_has_one_encoding_for_each_input(kind):
    """As base3 and bits do: what decodes at all encodes to the very same bytes, so nothing hides in a stream."""
    shapes = [(4, 6)]
    data, _ = model_stream(kind, shapes)
    forgeries = [data + word for word in (bytes(4), b"spam", bytes([255] * 4))]
    forgeries += [data[:-4] + bytes([(data[-4] + i) % 256]) + data[-3:] for i in (1, 128, 255)]
    forgeries += [data[:-4], data[:-4] + bytes(4), data[:-1] + bytes([(data[-1] + 1) % 256]), data]
    forgeries += [b"", bytes(4), bytes(8)]
    forgeries += [random.Random(i).randbytes(4 * i) for i in range(1, 5)]
    for bad in forgeries:
        found = accepted(model_file(kind, bad, shapes), kind)
        assert found is None or pack.CODECS[codec_of(kind)].encode(found, kind, shapes) == bad, (kind, bad.hex())


@pytest.mark.parametrize("kind", ["u8", "u16"])
def test_model_stream_whose_magnitudes_reach_into_the_sign(kind):
    """A magnitude of one more than the largest, with the sign 0, is the same symbol as 0 with the sign 1."""
    coder = entropy.Encoder()
    (magnitude, _, most), (sign, _, _) = entropy.models(coder, kind)
    shape = (1, 6, 1)
    magnitude.walk(np.array([most, most, most, most + 1, most, most]).reshape(shape), shape)
    sign.walk(np.zeros(shape, np.int64), shape)
    data = coder.finish()
    found = accepted(model_file(kind, data, [(6,)]), kind)
    assert found is None or pack.CODECS["model"].encode(found, kind, [(6,)]) == data


@pytest.mark.parametrize("hidden", [b"", b"spam", b"spamspam"])
def test_model_stream_of_no_symbols(hidden):
    """An empty stream is not compressed, and holds nothing."""
    refused(model_file("ternary", hidden, [(0,)]), "empty stream|goes on after")


def test_model_stream_of_a_kind_or_width_that_it_does_not_have():
    refused(build([("model", bytes(4))], formats=[FP32], tensors=[["w", [1], 0]]), "'model' is not one for u32")
    wide = [(1, entropy.MAX_COLUMNS + 1)]
    refused(model_file("ternary", bytes(4096), wide), "'model' is not one for ternary")
    refused(model_file("ternary", bytes(4096), [(3, 5), *wide]), "'model' is not one for ternary")


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_model_stream_that_claims_more_symbols_than_its_bytes_justify(kind):
    """Refused by its header alone, whatever the shapes: tall, wide and many."""
    most, per_word = entropy.free_symbols(kind), 4 * pack.MAX_EXPANSION // np.dtype(pack.SYMBOLS[kind]).itemsize
    for words in (0, 1, 100):
        count = most + words * per_word
        for shapes in ([(count + 1, 1)], [(count // 256 + 1, 256)], [(1, 1)] + [(count // 200 + 1, 2)] * 100):
            data = model_file(kind, bytes(4 * words), shapes)
            refused(data, "symbols from .* bytes are more than any model needs", seconds=2)
        header = pack.parse_header(model_file(kind, bytes(4 * words), [(count, 1)]))
        assert max(s.count for s in header.streams) == count


@pytest.mark.parametrize("kind", ["uint8", "u8", "u16"])
def test_model_stream_whose_shapes_make_it_slow(kind):
    """A step costs about a millisecond however few symbols it codes, and these shapes have steps of three symbols: a
    megabyte could hold a referee for hours."""
    shapes = [(rows, 3) for rows in range(1024, 2048)]  # 1.5 million steps
    data = model_file(kind, bytes(pack.count_of(shapes) * np.dtype(pack.SYMBOLS[kind]).itemsize // 64), shapes)
    with pytest.raises(ArtifactError, match="steps|more than any model needs|is not one for"):
        pack.parse_header(data)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("ternary", [(2**17,)]),
        ("ternary", [(2**14, 1)]),
        ("int8", [(2**16,)]),
        ("int8", [(2**11, 1)]),
        ("uint8", [(2**13,)]),
        ("uint8", [(2**9, 1)]),
        ("u8", [(2**8, 2)]),
        ("u16", [(2**9,)]),
        ("u16", [(i, 3) for i in range(1, 20)]),
    ],
)
def test_model_stream_that_is_four_bytes_long(kind, shapes):
    """What is granted without bytes (here a part of it) takes bounded time and memory, whatever comes out of it."""
    data, count = model_file(kind, b"\x12\x34\x56\x78", shapes), pack.count_of(shapes)
    tracemalloc.start()
    start = time.process_time()
    try:
        accepted(data, kind)
        assert time.process_time() - start < 10  # less than 1 here, most of it spent in tracemalloc
        assert tracemalloc.get_traced_memory()[1] < (4 << 20) + 600 * count
    finally:
        tracemalloc.stop()


# Compressors --------------------------------------------------------------------------------------------------


def raw_lzma(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])


def frame(data: bytes, **settings: object) -> bytes:
    """A zstd frame as the format wants it, but for the settings."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, source_size=len(data), format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        **{"write_content_size": False, "write_dict_id": False} | settings)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


@pytest.mark.parametrize("codec", ["raw+zstd", "raw+lzma"])
def test_decompression_bomb(codec):
    """A stream expands to what the shapes call for, no more and no less, and never beyond the limit on expansion."""
    bomb = {"raw+zstd": frame, "raw+lzma": raw_lzma}[codec](bytes(64 << 20))
    assert len(bomb) < 20_000
    refused(build([(codec, bomb)], formats=[BF16], tensors=[["w", [1000], 0]]), "zstd|lzma")
    refused(build([(codec, bomb)], formats=[BF16], tensors=[["w", [32 << 20], 0]]), "more than any model needs")


@pytest.mark.parametrize("codec", ["raw+zstd", "raw+lzma"])
def test_compressed_stream_one_byte_short_or_long_or_followed_by_more(codec):
    data = pack.CODECS[codec].encode(np.frombuffer(bytes(range(200)), "<u2"), "u16", [(100,)])

    def file(data: bytes, count: int) -> bytes:
        return one_stream(codec, data, "u16", count)

    assert pack.decode_artifact(file(data, 100))
    for bad in (file(data, 99), file(data, 101), file(data + b"\0", 100), file(data + data, 100), file(data[:-1], 100)):
        refused(bad, codec[4:])
    for nothing in (b"", b"\xff" * 20):
        refused(file(nothing, 100), codec[4:])
    refused(file(data, 0), "empty stream is compressed")


def test_zstd_frame_that_declares_a_huge_content():
    assert pack.decode_artifact(one_stream("raw+zstd", frame(bytes(100)), "u16", 50))
    refused(one_stream("raw+zstd", frame(bytes(100), write_content_size=True), "u16", 50), "declares its own size")
    huge = b"\xe0" + struct.pack("<Q", 2**46) + b"\x01\x00\x00"  # single segment, 8-byte content size
    refused(one_stream("raw+zstd", huge, "u16", 50), "zstd")


def test_zstd_frame_that_wants_a_huge_window():
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    refused(one_stream("raw+zstd", compressor.compress(bytes(100)) + compressor.flush(), "u16", 50), "zstd")


# Things that are no files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [pack.read_artifact, pack.read_header, pack.verify])
def test_paths_that_are_no_artifact(tmp_path, command):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in {"none": "cannot read", "": "not a file", "empty": "not an artifact", "link": "cannot read",
                          "a\0b": "cannot read", "x" * 300: "cannot read"}.items():
        with pytest.raises(ArtifactError, match=message):
            command(str(tmp_path / name))


def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a file"):
        pack.read_artifact(tmp_path / "pipe")


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(sample())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pack.Path, "read_bytes", refuse)  # chmod does not stop root
    with pytest.raises(ArtifactError, match="Permission denied; check"):
        pack.read_artifact(path)


def test_sparse_file_of_a_terabyte(tmp_path):
    with open(tmp_path / "sparse", "wb") as f:
        f.truncate(2**40)
    with pytest.raises(ArtifactError, match="at most"):
        pack.read_artifact(tmp_path / "sparse")


def test_error_names_the_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(sample()[:-1])
    with pytest.raises(ArtifactError, match="model.bin: stream 5"):
        pack.read_artifact(tmp_path / "model.bin")
