"""The artifact: a model's stored tensors in as few bytes as we know how, in a file that a stranger can check.

    python pack.py inspect FILE [--json]                      # what each byte is spent on
    python pack.py verify FILE [--against CHECKPOINT]         # is the file sound, canonical, and this checkpoint's?
    python pack.py budget FILE [--code FILE ...] [--cap N] [--model-only]

A file is a fixed preamble, a compressed JSON header and the streams, back to back, nothing else:

    offset  size  field (little-endian)
    0       4     magic "TRNY"
    4       1     version, 1
    5       4     h, bytes of the compressed header
    9       4     bytes of the header's JSON, at most MAX_HEADER
    13      4     CRC32 of bytes 0 to 12 and of the compressed header
    17      h     raw deflate of {"formats": [format], "meta": {...},
                                  "streams": [[codec, bytes, crc32]], "tensors": [[name, shape, format index]]}
    17 + h  ..    the streams

There is one stream per format and role (codes, scales), of all tensors of that format in order: merged streams
compress better and a short table costs fewer header bytes. What follows from formats and shapes (which streams exist,
how many symbols each holds, and with the sizes their offsets) is derived by `layout` and not stored, so that no file
can contradict itself. Streams cannot overlap or leave gaps, and must end at the end of the file.

Reading trusts nothing. Any input gives tensors or an ArtifactError, every byte is under a checksum or an exact rule,
and every size is checked before memory is taken for it. CRC32 finds accidents, not forgers: compare sha256 for that.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import secrets
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zstandard

MAGIC, VERSION = b"TRNY", 1
PREAMBLE = struct.Struct("<4sBII")  # magic, version, compressed header bytes, JSON bytes; a CRC32 follows
HEADER_AT = PREAMBLE.size + 4
DEFAULT_CAP = 16_000_000  # the official track: decimal megabytes, code plus model

# Limits on what a reader accepts. Each is far above an honest model and far below what hurts a machine.
MAX_FILE = 1 << 32
MAX_HEADER = 1 << 20
MAX_NUMEL = 1 << 40  # of one tensor, zero dimensions counted as one: keeps every product of sizes exact and small
MAX_DIMS, MAX_FORMATS, MAX_NAME, MAX_DEPTH = 8, 32, 256, 32
# A stream may decode to 4 MiB plus 256 times its bytes in the file. zstd and lzma can expand 10,000 times, a trained
# model never does: 256 is a ternary weight in 1/32 bit. So a file of n bytes costs a reader at most 256 n plus
# 4 MiB per stream. The writer obeys the same rule: it drops a candidate that compresses further than that.
FREE_EXPANSION, MAX_EXPANSION = 4 << 20, 256


class ArtifactError(ValueError):
    """An artifact that cannot be read or written. The message says what is wrong, where, and what to do."""


def damaged(what: str) -> ArtifactError:
    return ArtifactError(f"{what}; the file is damaged or was not written by pack.py: copy it or write it again")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file holds it.

    format: {"kind": "ternary", "group_size": 128, "scale": "bf16", ...}   codes int8 in {-1, 0, 1}
            {"kind": "int", "bits": 8, "group_size": 128, "scale": ...}    codes int8 in +-(2^(bits-1) - 1)
            {"kind": "bf16" or "fp16"} or {"kind": "fp32"}                 codes uint16 or uint32: the values' bits
            Other keys are carried along and mean nothing here.
    codes:  in the tensor's shape
    scales: uint16 bit patterns of a scale per group, [rows, groups], or None for the float kinds. Groups run along
            the last dimension, the last one may be short, a 1-D tensor is one row; group_size 0 is one group, [1, 1].
    """

    shape: tuple[int, ...]
    format: dict
    codes: np.ndarray
    scales: np.ndarray | None


# ---------------------------------------------------------------------------------------------------------------
# Formats: from a tensor's format and shape to the streams that hold it
# ---------------------------------------------------------------------------------------------------------------

# Symbol kinds: what a stream is made of, and how it lies in memory.
SYMBOLS = {"ternary": "<i1", "u16": "<u2", "u32": "<u4"} | {f"int{bits}": "<i1" for bits in range(2, 9)}
FLOAT_SYMBOLS = {"bf16": "u16", "fp16": "u16", "fp32": "u32"}
EXPONENT = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F800000}  # all ones: infinite or not a number


def limit_of(kind: str) -> int:
    """The largest code of a ternary or int symbol kind; codes are symmetric around zero."""
    return 1 if kind == "ternary" else 2 ** (int(kind[3:]) - 1) - 1


def scale_shape(format: dict, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """[rows, groups] of a tensor's scales; None for a format without scales."""
    if format["kind"] in FLOAT_SYMBOLS:
        return None
    if format["group_size"] == 0:
        return 1, 1
    return math.prod(shape[:-1]), -(-(shape[-1] if shape else 1) // format["group_size"])


def layout(format: dict, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Role -> (symbol kind, count) of what a file stores of a tensor: the one place that knows. Expects valid input."""
    kind, scales = format["kind"], scale_shape(format, shape)
    symbol = FLOAT_SYMBOLS.get(kind) or (f"int{format['bits']}" if kind == "int" else kind)
    roles = {"codes": (symbol, math.prod(shape))}
    return roles if scales is None else roles | {"scales": ("u16", math.prod(scales))}


def is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # `type`, because True is an instance of int


def check_format(format) -> None:
    """Raises ArtifactError unless format is a dict whose keys, as far as pack.py interprets them, are valid."""
    kind = format.get("kind") if isinstance(format, dict) else None
    ok = kind in ("ternary", "int", *FLOAT_SYMBOLS) if isinstance(kind, str) else False
    if ok and kind not in FLOAT_SYMBOLS:
        ok = is_int(format.get("group_size"), 0, MAX_NUMEL) and format.get("scale") in ("bf16", "fp16")
        ok = ok and (kind == "ternary" or is_int(format.get("bits"), 2, 8))
    if not ok:
        raise ArtifactError(
            f"format {str(format)[:200]!a} is not known: use kind ternary or int (with group_size >= 0, scale bf16 or "
            "fp16, and for int bits 2 to 8), or kind bf16, fp16 or fp32"
        )


def check_name_and_shape(name, shape) -> None:
    """Raises ArtifactError unless name and shape (a tuple or list) can stand in a header."""
    # Printable, because names go to terminals: no escape sequences, no half surrogates.
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
        raise ArtifactError(f"tensor name {str(name)[:40]!a} must be 1 to {MAX_NAME} printable characters: rename it")
    ok = len(shape) <= MAX_DIMS and all(is_int(d, 0, MAX_NUMEL) for d in shape)
    if not ok or math.prod(max(d, 1) for d in shape) > MAX_NUMEL:
        raise ArtifactError(
            f"tensor {name!a} has the shape {str(tuple(shape))[:80]}: it must have at most {MAX_DIMS} dimensions, "
            f"whole and not negative, and {MAX_NUMEL} weights"
        )


def check_json(value, where: str, depth: int = 0) -> None:
    """Raises ArtifactError unless value comes back from JSON as it went in (tuples as lists) in every language."""
    ok = depth <= MAX_DEPTH
    if ok and isinstance(value, dict):
        ok = all(isinstance(key, str) for key in value)
        children: Iterable = value.values()
    else:
        children = value if isinstance(value, list | tuple) else ()
        ok = ok and (value is None or isinstance(value, str | bool | list | tuple) or is_int(value, -(2**63), 2**63 - 1)
                     or (isinstance(value, float) and math.isfinite(value)))  # fmt: skip # JSON's 1e999 is infinity
    if not ok:
        raise ArtifactError(
            f"{where} holds {str(value)[:40] if depth <= MAX_DEPTH else 'too deep a nesting'!a}: it must be JSON of "
            f"finite numbers, 64-bit integers, string keys and at most {MAX_DEPTH} levels"
        )
    for child in children:
        check_json(child, where, depth + 1)


# ---------------------------------------------------------------------------------------------------------------
# Plain packings: symbols to bytes, with one encoding for each input and a size known beforehand
# ---------------------------------------------------------------------------------------------------------------

CHUNK = 5 << 18  # symbols at a time, a multiple of 5 and of 8: keeps temporaries small beside the codes
POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
DIGITS = (np.arange(243)[:, None] // POWERS % 3).astype(np.int8) - 1  # [byte, digit] -> code


def flat_codes(codes, limit: int) -> np.ndarray:
    """codes (any shape, integers) as flat int8. Raises ArtifactError if one is outside +-limit."""
    codes = np.asarray(codes).reshape(-1)
    if codes.size == 0:
        return np.zeros(0, np.int8)
    if codes.dtype.kind not in "iu" or codes.min() < -limit or codes.max() > limit:
        raise ArtifactError(f"codes must be integers in -{limit}..{limit}: quantize before packing")
    return codes.astype(np.int8, copy=False)


def as_bytes(data, size: int, what: str) -> np.ndarray:
    """data as uint8 [size]. Raises ArtifactError on another length, before anything else is allocated."""
    if len(data) != size:
        raise damaged(f"{what} takes exactly {size} bytes, not {len(data)}")
    return np.frombuffer(data, np.uint8)


def pack_base3(codes) -> bytes:
    """Codes in {-1, 0, 1} as base-3 numbers: 5 digits (code + 1) per byte, least significant first, padded with 0."""
    codes = flat_codes(codes, 1)
    out = np.empty(-(-codes.size // 5), np.uint8)
    for start in range(0, codes.size, CHUNK):
        digits = (codes[start : start + CHUNK] + 1).view(np.uint8)
        digits = np.pad(digits, (0, -digits.size % 5)).reshape(-1, 5)
        out[start // 5 :][: len(digits)] = digits @ POWERS  # at most 242: no overflow in uint8
    return out.tobytes()


def unpack_base3(data, n: int) -> np.ndarray:
    """The n codes, int8 [n], of pack_base3. Raises ArtifactError unless data is exactly what pack_base3 gives."""
    packed = as_bytes(data, -(-n // 5), f"base3 of {n} codes")
    if n and packed.max() > 242:
        raise damaged(f"base3 byte {packed.argmax()} is {packed.max()}, above 242")
    if n % 5 and packed[-1] >= 3 ** (n % 5):
        raise damaged(f"base3 padding digits in byte {packed.size - 1} are not 0")
    codes = np.empty(n, np.int8)
    for start in range(0, n, CHUNK):
        chunk = DIGITS[packed[start // 5 : (start + CHUNK) // 5]].reshape(-1)
        codes[start : start + CHUNK] = chunk[: n - start]
    return codes


def pack_bits(codes, bits: int) -> bytes:
    """Codes in +-(2^(bits-1) - 1) as unsigned numbers, code + limit, of `bits` bits, lowest bit first, 0-padded."""
    limit = 2 ** (bits - 1) - 1
    codes = flat_codes(codes, limit)
    parts = []
    for start in range(0, codes.size, CHUNK):
        digits = (codes[start : start + CHUNK].astype(np.int16) + limit).astype(np.uint8)
        rows = np.unpackbits(digits[:, None], axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(rows, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data, n: int, bits: int) -> np.ndarray:
    """The n codes, int8 [n], of pack_bits. Raises ArtifactError unless data is exactly what pack_bits gives."""
    limit = 2 ** (bits - 1) - 1
    packed = as_bytes(data, -(-n * bits // 8), f"{n} codes of {bits} bits")
    if n * bits % 8 and packed[-1] >> (n * bits % 8):
        raise damaged(f"padding bits in byte {packed.size - 1} are not 0")
    codes = np.empty(n, np.int8)
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        rows = np.unpackbits(packed[start * bits // 8 :][: CHUNK * bits // 8], count=count * bits, bitorder="little")
        digits = np.packbits(rows.reshape(-1, bits), axis=1, bitorder="little")[:, 0]
        if digits.max() > 2 * limit:
            raise damaged(f"code {start + digits.argmax()} of {n} is outside -{limit}..{limit}")
        codes[start : start + count] = digits.astype(np.int16) - limit
    return codes


def pack_raw(symbols: np.ndarray, kind: str) -> bytes:
    return symbols.astype(SYMBOLS[kind], copy=False).tobytes()


def unpack_raw(data, count: int, kind: str) -> np.ndarray:
    dtype = np.dtype(SYMBOLS[kind])
    symbols = as_bytes(data, count * dtype.itemsize, f"raw of {count} {kind} symbols").view(dtype)
    symbols = symbols.astype(dtype.newbyteorder("="))  # a copy: writable, in this machine's byte order
    return flat_codes(symbols, limit_of(kind)) if dtype.kind == "i" else symbols


def pack_planes(symbols: np.ndarray, kind: str) -> bytes:
    """All highest bytes, then all next lower ones: sign and exponent repeat, low mantissa bits are noise."""
    rows = np.frombuffer(pack_raw(symbols, kind), np.uint8).reshape(-1, symbols.itemsize)
    return rows[:, ::-1].T.tobytes()


def unpack_planes(data, count: int, kind: str) -> np.ndarray:
    size = np.dtype(SYMBOLS[kind]).itemsize
    planes = as_bytes(data, count * size, f"planes of {count} {kind} symbols").reshape(size, -1)
    return unpack_raw(planes.T[:, ::-1].tobytes(), count, kind)


# ---------------------------------------------------------------------------------------------------------------
# Codecs: one table of ways to write a stream; the smallest wins and the file says which it was
# ---------------------------------------------------------------------------------------------------------------

# Above this many bytes lzma is left out and zstd runs at level 3, because encoding must stay under a minute: on int6
# codes the thorough candidates together took 4 s per million. 68M ternary weights are 13.6 MB and get all of them.
THOROUGH_BELOW = 14 << 20


def zstd_encode(data: bytes) -> bytes:
    """A frame without magic number, content size and checksum (the header has them), from one thread."""
    level = 22 if len(data) <= THOROUGH_BELOW else 3
    params = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False, write_checksum=False, write_dict_id=False, threads=0,
    )
    return zstandard.ZstdCompressor(compression_params=params).compress(data)


def zstd_decode(data, size: int) -> bytes:
    magicless = zstandard.FORMAT_ZSTD1_MAGICLESS
    try:
        # A frame that declares its content size makes the library allocate it, whatever max_output_size says.
        if zstandard.get_frame_parameters(data, format=magicless).content_size != zstandard.CONTENTSIZE_UNKNOWN:
            raise damaged("a zstd frame declares its own size")
        window = 1 << min(max(size.bit_length(), 10), 27)
        return zstandard.ZstdDecompressor(format=magicless, max_window_size=window).decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as e:
        raise damaged(f"zstd does not give {size} bytes ({e})") from None


# Literal settings of lzma, which its streams carry, so that only the writer chooses: without context for packed codes
# and byte planes, with byte position and predecessor for 16-bit symbols (6% smaller for raw scales, measured).
LITERALS = ({"lc": 0, "lp": 0, "pb": 0}, {"lc": 3, "lp": 1, "pb": 1})


def lzma_filters(size: int, literals: dict) -> list[dict]:
    # The dictionary follows the size: both sides know it, and small streams need not pay for a large table.
    dictionary = 1 << min(max(size.bit_length(), 12), 24)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary, **literals}]


def lzma_encode(data: bytes) -> bytes:
    # one setting for large streams, which are codes: a second pass would double the time for nothing
    filters = [lzma_filters(len(data), literals) for literals in LITERALS[: 1 if len(data) > 2 << 20 else 2]]
    return min((lzma.compress(data, format=lzma.FORMAT_RAW, filters=f) for f in filters), key=len)


def lzma_decode(data, size: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=lzma_filters(size, LITERALS[0]))
    try:
        out = decoder.decompress(data, max_length=size + 1)  # one more than allowed shows that there is more
    except lzma.LZMAError as e:
        raise damaged(f"lzma does not give {size} bytes ({e})") from None
    if len(out) != size or not decoder.eof or decoder.unused_data:
        raise damaged(f"lzma does not give exactly {size} bytes from {len(data)}")
    return out


@dataclass(frozen=True)
class Codec:
    """A way to write symbols of some kinds. decode(encode(symbols, kind), count, kind) is symbols, bit for bit.

    decode raises ArtifactError unless data is whole and gives exactly count symbols, all in range. It need not bound
    its output: `parse_header` has done so. `size` is the bytes of count symbols before compression.
    """

    kinds: tuple[str, ...]
    encode: Callable[[np.ndarray, str], bytes]
    decode: Callable[[memoryview | bytes, int, str], np.ndarray]
    size: Callable[[int, str], int]
    compressor: str = ""


def with_compressor(plain: Codec, name: str, compress: Callable, decompress: Callable) -> Codec:
    def encode(symbols: np.ndarray, kind: str) -> bytes:
        return compress(plain.encode(symbols, kind))

    def decode(data, count: int, kind: str) -> np.ndarray:
        if count == 0:
            raise damaged("an empty stream is compressed")  # a limit of 0 means "no limit" to the libraries
        return plain.decode(decompress(data, plain.size(count, kind)), count, kind)

    return Codec(plain.kinds, encode, decode, plain.size, name)


def raw_size(count: int, kind: str) -> int:
    """Bytes of count symbols in memory."""
    return count * np.dtype(SYMBOLS[kind]).itemsize


INTS, FLOATS = tuple(kind for kind in SYMBOLS if kind.startswith("int")), ("u16", "u32")
PLAIN = {
    "base3": Codec(("ternary",), lambda s, kind: pack_base3(s), lambda data, n, kind: unpack_base3(data, n),
                   lambda n, kind: -(-n // 5)),
    "bits": Codec(INTS, lambda s, kind: pack_bits(s, int(kind[3:])),
                  lambda data, n, kind: unpack_bits(data, n, int(kind[3:])),
                  lambda n, kind: -(-n * int(kind[3:]) // 8)),
    "raw": Codec((*INTS, *FLOATS), pack_raw, unpack_raw, raw_size),
    "planes": Codec(FLOATS, pack_planes, unpack_planes, raw_size),
}
COMPRESSORS = {"zstd": (zstd_encode, zstd_decode), "lzma": (lzma_encode, lzma_decode)}
# planes alone are as long as raw, so they are no codec
CODECS = {name: codec for name, codec in PLAIN.items() if name != "planes"} | {
    f"{name}+{c}": with_compressor(codec, c, *both) for name, codec in PLAIN.items() for c, both in COMPRESSORS.items()
}


def expands_too_far(count: int, kind: str, stored_bytes: int) -> bool:
    return raw_size(count, kind) > FREE_EXPANSION + MAX_EXPANSION * stored_bytes


def encode_stream(symbols: np.ndarray, kind: str) -> tuple[str, bytes]:
    """(codec name, bytes) of the smallest encoding; of equals the first in CODECS, so that a file is reproducible."""
    best = None
    for name, codec in CODECS.items():
        if kind not in codec.kinds or (codec.compressor and not symbols.size):
            continue
        if codec.compressor == "lzma" and codec.size(symbols.size, kind) > THOROUGH_BELOW:
            continue
        data = codec.encode(symbols, kind)
        if (best is None or len(data) < len(best[1])) and not expands_too_far(symbols.size, kind, len(data)):
            best = name, data
    return best


# ---------------------------------------------------------------------------------------------------------------
# Container
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A row of the stream table, with what layout derives: whose symbols, of which kind, how many, and where."""

    format: int
    role: str
    kind: str
    count: int
    codec: str
    offset: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Header:
    """A checked header. tensors: (name, shape, format index) in file order; header_bytes includes the preamble."""

    meta: dict
    formats: list[dict]
    tensors: list[tuple[str, tuple[int, ...], int]]
    streams: list[Stream]
    header_bytes: int


def canonical_json(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def stream_table(formats: list[dict], tensors: list[tuple[str, tuple, int]]) -> dict[tuple[int, str], tuple[str, int]]:
    """(format index, role) -> (symbol kind, count), in file order."""
    table: dict[tuple[int, str], tuple[str, int]] = {}
    for _, shape, index in sorted(tensors, key=lambda tensor: tensor[2]):
        for role, (kind, count) in layout(formats[index], shape).items():
            table[index, role] = kind, count + table.get((index, role), (kind, 0))[1]
    return table


def check_tensor(name: str, t: StoredTensor) -> None:
    """Raises ArtifactError unless the tensor's arrays are exactly what its format and shape call for."""
    if not isinstance(t.shape, tuple):
        raise ArtifactError(f"tensor {name!a}: shape must be a tuple, not {t.shape!r}")
    check_name_and_shape(name, t.shape)
    check_format(t.format)
    check_json(t.format, f"the format of tensor {name!a}")
    shapes = {"codes": t.shape, "scales": scale_shape(t.format, t.shape)}
    roles = layout(t.format, t.shape)
    for role, array in (("codes", t.codes), ("scales", t.scales)):
        if role not in roles:
            if array is not None:
                raise ArtifactError(f"tensor {name!a}: the format {t.format['kind']} has no {role}: pass None")
            continue
        dtype = np.dtype(SYMBOLS[roles[role][0]]).newbyteorder("=")
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shapes[role]:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ArtifactError(f"tensor {name!a}: {role} must be {dtype} {shapes[role]}, not {got}")
        if dtype.kind == "i":
            try:
                flat_codes(array, limit_of(roles[role][0]))
            except ArtifactError as e:
                raise ArtifactError(f"tensor {name!a}: {e}") from None


def encode_artifact(tensors: dict[str, StoredTensor], meta: dict) -> bytes:
    """The file's bytes, the same for the same input. Raises ArtifactError on input that could not be read back."""
    formats, rows = {}, []  # formats: canonical JSON -> (index, format), in order of first use
    for name, t in tensors.items():
        check_tensor(name, t)
        index, _ = formats.setdefault(canonical_json(t.format), (len(formats), t.format))
        rows.append((name, t.shape, index))
    if not isinstance(meta, dict):
        raise ArtifactError(f"meta must be a dict, not {type(meta).__name__}")
    check_json(meta, "meta")
    format_list = [format for _, format in formats.values()]
    table, streams = [], []
    for (index, role), (kind, _) in stream_table(format_list, rows).items():
        parts = [getattr(tensors[name], role).reshape(-1) for name, _, i in rows if i == index]
        codec, data = encode_stream(np.concatenate(parts), kind)
        table.append([codec, len(data), zlib.crc32(data)])
        streams.append(data)
    text = canonical_json({"formats": format_list, "meta": meta, "streams": table, "tensors": rows})
    if len(text) > MAX_HEADER or len(format_list) > MAX_FORMATS:
        raise ArtifactError(
            f"header of {len(text)} bytes, {len(format_list)} formats: at most {MAX_HEADER}, {MAX_FORMATS}; cut meta"
        )
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    header = deflate.compress(text) + deflate.flush()
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(header), len(text))
    return b"".join([preamble, struct.pack("<I", zlib.crc32(header, zlib.crc32(preamble))), header, *streams])


def read_header_json(data: memoryview) -> tuple[dict, int]:
    """(header as JSON gave it, offset of the first stream). Raises ArtifactError unless it is canonical JSON."""
    if len(data) < HEADER_AT or data[:4] != MAGIC:
        begin = bytes(data[:4])
        raise ArtifactError(f"not an artifact: {len(data)} bytes that begin with {begin!r}; give a file of pack.py")
    _, version, size, text_size = PREAMBLE.unpack_from(data)
    (crc,) = struct.unpack_from("<I", data, PREAMBLE.size)
    if version != VERSION:
        raise ArtifactError(f"version {version} at offset 4: this pack.py reads {VERSION}; use the one that wrote it")
    end = HEADER_AT + size
    if end > len(data):
        raise damaged(f"truncated: the header ends at offset {end}, the file at {len(data)}")
    if zlib.crc32(data[HEADER_AT:end], zlib.crc32(data[: PREAMBLE.size])) != crc:
        raise damaged(f"header checksum at offset {PREAMBLE.size} does not match")
    if not 0 < text_size <= MAX_HEADER:
        raise damaged(f"header of {text_size} bytes declared at offset 9, at most {MAX_HEADER} are allowed")

    def unique(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        inflate = zlib.decompressobj(-15)
        text = inflate.decompress(data[HEADER_AT:end], text_size + 1)
        if len(text) != text_size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"it does not inflate to exactly {text_size} bytes")
        header = json.loads(text.decode("ascii"), object_pairs_hook=unique)
        check_json(header, "it")
        if not isinstance(header, dict) or canonical_json(header) != text:
            raise ValueError("it is not in canonical form (sorted keys, no spaces, one spelling of each number)")
    except (ValueError, zlib.error, RecursionError) as e:
        raise damaged(f"bad header at offset {HEADER_AT}: {e}") from None
    return header, end


def parse_header(data) -> Header:
    """The checked header of a whole file's bytes. Raises ArtifactError; bounds what decoding may allocate."""
    data = memoryview(data)
    header, offset = read_header_json(data)
    header_bytes = offset
    fields = {"formats": list, "meta": dict, "streams": list, "tensors": list}
    if header.keys() != fields.keys() or not all(isinstance(header[key], fields[key]) for key in fields):
        raise damaged(f"header must have exactly the fields {', '.join(fields)}")

    formats = header["formats"]
    for format in formats:
        check_format(format)
    if len(formats) > MAX_FORMATS or len({canonical_json(format) for format in formats}) != len(formats):
        raise damaged(f"header lists a format twice, or more than {MAX_FORMATS}")

    tensors, names, used = [], set(), 0
    for row in header["tensors"]:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[1], list)):
            raise damaged(f"tensor entry {str(row)[:80]!a} is not [name, shape, format index]")
        name, shape, index = row
        check_name_and_shape(name, shape)
        if name in names:
            raise damaged(f"tensor {name!a} occurs twice")
        if not is_int(index, 0, min(used, len(formats) - 1)):
            raise damaged(f"tensor {name!a} has format {index}: formats are numbered in order of first use")
        names.add(name)
        used = max(used, index + 1)
        tensors.append((name, tuple(shape), index))
    if used != len(formats):
        raise damaged(f"format {used} of the header is not used by any tensor")

    expected = stream_table(formats, tensors)
    if len(header["streams"]) != len(expected):
        raise damaged(f"{len(header['streams'])} streams, but the formats call for {len(expected)}")
    streams = []
    for row, ((index, role), (kind, count)) in zip(header["streams"], expected.items(), strict=True):
        where = f"stream {len(streams)} ({role} of format {index})"
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
                and is_int(row[1], 0, MAX_FILE) and is_int(row[2], 0, 2**32 - 1)):
            raise damaged(f"{where}: {str(row)[:80]!a} is not [codec, bytes, crc32]")
        codec, size, crc = row
        if codec not in CODECS or kind not in CODECS[codec].kinds:
            raise ArtifactError(f"{where}: codec {codec[:40]!a} is not one for {kind}; use the pack.py that wrote it")
        if offset + size > len(data):
            raise damaged(f"{where} ends at offset {offset + size}, the file at {len(data)}")
        if expands_too_far(count, kind, size):
            raise damaged(f"{where}: {count} {kind} symbols from {size} bytes are more than any model needs")
        streams.append(Stream(index, role, kind, count, codec, offset, size, crc))
        offset += size
    if offset != len(data):
        raise damaged(f"{len(data) - offset} bytes after the last stream, at offset {offset}")
    return Header(header["meta"], formats, tensors, streams, header_bytes)


def decode_artifact(data) -> tuple[dict[str, StoredTensor], dict]:
    """(tensors in file order, meta) of a file's bytes. Raises ArtifactError on anything that is not sound."""
    header, data = parse_header(data), memoryview(data)
    flat = {}
    for number, s in enumerate(header.streams):
        where = f"stream {number} ({s.role} of format {s.format}, {s.codec}, offset {s.offset})"
        chunk = data[s.offset : s.offset + s.bytes]
        if zlib.crc32(chunk) != s.crc32:
            raise damaged(f"{where}: checksum does not match")
        try:
            flat[s.format, s.role] = CODECS[s.codec].decode(chunk, s.count, s.kind)
        except ArtifactError as e:
            raise ArtifactError(f"{where}: {e}") from None
    tensors, taken = {}, dict.fromkeys(flat, 0)
    for name, shape, index in header.tensors:
        format, arrays = header.formats[index], {"codes": None, "scales": None}
        for role, (_, count) in layout(format, shape).items():
            start = taken[index, role]
            taken[index, role] += count
            arrays[role] = flat[index, role][start : start + count].reshape(
                shape if role == "codes" else scale_shape(format, shape)
            )
        tensors[name] = StoredTensor(shape, dict(format), **arrays)
    return tensors, header.meta


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, data: bytes) -> int:
    """Write data to path, all or nothing: readers see the old file or the new one. Returns bytes written.

    Raises ArtifactError and leaves no temporary file behind if that fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())  # before the rename: a crash must not leave a new name on missing bytes
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise ArtifactError(f"cannot write {path}: {why}; its folder must exist, be writable and have room") from None
    return len(data)


def read_bytes(path: str | Path) -> bytes:
    """A whole regular file. Raises ArtifactError."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # before opening: a pipe would wait for ever
            raise ArtifactError(f"{path}: not a file; give the artifact itself, for example {Path(path) / 'model.bin'}")
        if info.st_size > MAX_FILE:
            raise ArtifactError(f"{path}: {info.st_size} bytes are not an artifact; at most {MAX_FILE} are read")
        return Path(path).read_bytes()
    except ArtifactError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        why = getattr(e, "strerror", None) or e
        raise ArtifactError(f"cannot read {path}: {why}; check the path and its permissions") from None


def with_path(path: str | Path, function: Callable, data: bytes):
    try:
        return function(data)
    except ArtifactError as e:
        raise ArtifactError(f"{path}: {e}") from None


def write_artifact(path: str | Path, tensors: dict[str, StoredTensor], meta: dict) -> int:
    """Encode and write atomically; returns the file's bytes. Raises ArtifactError and leaves what was there before."""
    return write_atomic(path, encode_artifact(tensors, meta))


def read_artifact(path: str | Path) -> tuple[dict[str, StoredTensor], dict]:
    """(tensors in file order, meta). Raises ArtifactError, whatever the file holds."""
    return with_path(path, decode_artifact, read_bytes(path))


def read_header(path: str | Path) -> Header:
    """The checked header alone; the streams' checksums are not tested. Raises ArtifactError."""
    return with_path(path, parse_header, read_bytes(path))


# ---------------------------------------------------------------------------------------------------------------
# Budget, inspect, verify
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Bytes against a cap. count_code=False: the code is reported and not counted (the CPU track)."""

    bytes_model: int
    bytes_code: int
    cap: int
    count_code: bool = True

    @property
    def total(self) -> int:
        return self.bytes_model + (self.bytes_code if self.count_code else 0)

    @property
    def margin(self) -> int:
        return self.cap - self.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0


def code_files() -> list[Path]:
    """The program's own files, all that training, packing and scoring need beside libraries."""
    return [Path(__file__).resolve().with_name(name) for name in ("train_gpt.py", "pack.py", "eval_bpb.py")]


def budget(model_path: str | Path, code_paths: Iterable[str | Path], cap: int, count_code: bool = True) -> Budget:
    """Sizes of the files as they are on disk. A code file named twice counts once. Raises ArtifactError."""
    code = {Path(path).resolve() for path in code_paths}
    return Budget(len(read_bytes(model_path)), sum(len(read_bytes(path)) for path in code), cap, count_code)


def format_label(format: dict) -> str:
    if format["kind"] in FLOAT_SYMBOLS:
        return format["kind"]
    bits = format["bits"] if format["kind"] == "int" else ""
    return f"{format['kind']}{bits} g{format['group_size']} {format['scale']}"


def describe(data: bytes) -> dict:
    """All that `inspect` shows. A merged stream's bytes are shared among its tensors by count: tensor i gets
    floor(B * c_i / n) - floor(B * c_(i-1) / n) of B bytes, with c the running count, so that shares add up to B."""
    header, (tensors, meta) = parse_header(data), decode_artifact(data)
    streams = {(s.format, s.role): s for s in header.streams}
    running, rows = dict.fromkeys(streams, 0), []
    for name, shape, index in header.tensors:
        share, format, t = 0, header.formats[index], tensors[name]
        for role, (_, count) in layout(format, shape).items():
            s, before = streams[index, role], running[index, role]
            running[index, role] = before + count
            share += s.bytes * (before + count) // s.count - s.bytes * before // s.count if s.count else 0
        sign = 1 << (8 * t.codes.itemsize - 1)
        values = t.codes & (sign - 1) if format["kind"] in FLOAT_SYMBOLS else t.codes  # -0.0 is a zero
        n = t.codes.size
        rows.append({"tensor": name, "shape": list(shape), "format": format_label(format), "weights": n, "bytes": share,
                     "bits_per_weight": 8 * share / n if n else 0.0,
                     "zero_frac": float((values == 0).mean()) if n else 0.0})
    weights = sum(row["weights"] for row in rows)
    table = [asdict(s) | {"format": format_label(header.formats[s.format])} for s in header.streams]
    return {"bytes": len(data), "header_bytes": header.header_bytes, "weights": weights,
            "bits_per_parameter": 8 * len(data) / weights if weights else 0.0, "tensors": rows, "streams": table,
            "formats": header.formats, "meta": meta}


def inspect_text(d: dict) -> str:
    """`describe` as two tables whose bytes each add up, with the header, to the file's size."""
    wide = max([len(row["tensor"]) for row in d["tensors"]] + [8])

    def line(name, shape, format, weights, size, bits, zeros) -> str:
        return f"{name:<{wide}}{shape:>16}  {format:<18}{weights:>12}{size:>12}{bits:>13}{zeros:>8}".rstrip()

    lines = [line("tensor", "shape", "format", "weights", "bytes", "bits/weight", "zeros")]
    for r in d["tensors"]:
        lines.append(line(r["tensor"], "x".join(map(str, r["shape"])) or "scalar", r["format"], f"{r['weights']:,}",
                          f"{r['bytes']:,}", f"{r['bits_per_weight']:.4f}", f"{r['zero_frac']:.4f}"))
    lines.append(line("(header)", "", "", "", f"{d['header_bytes']:,}", "", ""))
    lines.append(line("total", "", "", f"{d['weights']:,}", f"{d['bytes']:,}", f"{d['bits_per_parameter']:.4f}", ""))
    lines += ["", f"{'stream':<8}{'format':<18}{'codec':<14}{'symbols':>12}{'bytes':>12}{'bits/symbol':>13}"]
    for s in d["streams"]:
        bits = 8 * s["bytes"] / s["count"] if s["count"] else 0.0
        lines.append(f"{s['role']:<8}{s['format']:<18}{s['codec']:<14}{s['count']:>12,}{s['bytes']:>12,}{bits:>13.4f}")
    return "\n".join(lines)


def check_values(name: str, t: StoredTensor) -> None:
    """Raises ArtifactError if a code is out of range, a value or scale not finite, or a live group's scale zero."""
    check_tensor(name, t)
    floats, dtype = (t.codes, t.format["kind"]) if t.scales is None else (t.scales, t.format["scale"])
    bad = np.argwhere((floats & EXPONENT[dtype]) == EXPONENT[dtype])
    if len(bad):
        what = "value" if t.scales is None else "scale"
        raise ArtifactError(f"tensor {name!a}: {what} {bad[0].tolist()} is not finite: pack a run that did not diverge")
    if t.scales is None or not t.codes.size:
        return
    rows, groups = t.scales.shape
    live = (t.codes != 0).reshape(rows, -1)
    live = np.logical_or.reduceat(live, np.arange(groups) * (t.format["group_size"] or live.shape[1]), axis=1)
    bad = np.argwhere(live & ((t.scales & 0x7FFF) == 0))
    if len(bad):
        raise ArtifactError(f"tensor {name!a}: group {bad[0].tolist()} has codes but the scale 0: quantize it again")


def first_difference(ours: dict[str, StoredTensor], theirs: dict[str, StoredTensor]) -> str | None:
    """The first way in which two sets of tensors differ, ours/theirs, in words; None if they are equal bit for bit."""
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            return f"tensor {name!a} is only in the {'file' if name in ours else 'checkpoint'}"
        a, b = ours[name], theirs[name]
        if tuple(a.shape) != tuple(b.shape) or canonical_json(a.format) != canonical_json(b.format):
            return f"tensor {name!a} is {a.shape} {a.format} in the file, {tuple(b.shape)} {b.format} in the checkpoint"
        for role in ("codes", "scales"):
            x, y = getattr(a, role), getattr(b, role)
            if x is None and y is None:
                continue
            if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
                return f"tensor {name!a}: {role} of the checkpoint have another shape or type"
            if len(bad := np.argwhere(x != y)):
                at = tuple(bad[0])
                return f"tensor {name!a}: {role}{bad[0].tolist()} is {x[at]} in the file, {y[at]} in the checkpoint"
    return None


def verify(path: str | Path, against: str | None = None) -> list[str]:
    """What was proven about the file, a line each. Raises ArtifactError on the first thing that does not hold."""
    data = read_bytes(path)
    tensors, meta = with_path(path, decode_artifact, data)
    for name, t in tensors.items():
        check_values(name, t)
    lines = [f"sound: {len(data):,} bytes, {len(tensors)} tensors, every checksum, code and scale"]
    if encode_artifact(tensors, meta) != data:
        raise ArtifactError(
            f"{path}: packing its tensors again gives other bytes: it was altered, or written with another version of "
            "pack.py, zstandard or liblzma; pack it again with this one"
        )
    lines.append("canonical: packing its tensors again gives the same bytes")
    if against is not None:
        from train_gpt import stored_from_checkpoint  # needs torch, and only the trainer knows its checkpoints

        if difference := first_difference(tensors, stored_from_checkpoint(Path(against))):
            raise ArtifactError(f"{path} is not {against}: {difference}; pack that checkpoint again")
        lines.append(f"same: every code and scale is that of {against}")
    return lines


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pack.py", description="Inspect, verify and weigh model artifacts.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("inspect", help="what each byte of the file is spent on")
    p.add_argument("file")
    p.add_argument("--json", action="store_true", help="as JSON, with the configuration")
    p = commands.add_parser("verify", help="check that the file is sound, canonical and made from a checkpoint")
    p.add_argument("file")
    p.add_argument("--against", metavar="CHECKPOINT", help="a folder that the trainer wrote")
    p = commands.add_parser("budget", help="bytes of model and code against a cap; exit status 1 when over")
    p.add_argument("file")
    p.add_argument("--code", nargs="+", metavar="FILE", help="default: train_gpt.py, pack.py, eval_bpb.py")
    p.add_argument("--cap", type=int, default=DEFAULT_CAP, help="bytes (default %(default)s)")
    p.add_argument("--model-only", action="store_true", help="report the code, count only the model (the CPU track)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.command == "inspect":
            found = with_path(args.file, describe, read_bytes(args.file))
            print(json.dumps(found, indent=1, sort_keys=True) if args.json else inspect_text(found))
        elif args.command == "verify":
            print("\n".join(verify(args.file, args.against)))
        else:
            b = budget(args.file, args.code or code_files(), args.cap, not args.model_only)
            counted = "" if b.count_code else " (not counted)"
            print(f"bytes_model {b.bytes_model:,}\nbytes_code {b.bytes_code:,}{counted}\nbytes_total {b.total:,}")
            print(f"cap {b.cap:,}\nmargin {b.margin:,}\n{'FITS' if b.fits else 'OVER'}")
            return 0 if b.fits else 1
        return 0
    except (ValueError, OSError, ImportError) as e:  # ArtifactError is a ValueError; --against imports torch
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
