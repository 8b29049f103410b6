"""The artifact: a model's stored tensors in as few bytes as we know how, in a file that a stranger can check.

    python pack.py inspect FILE [--json]                      # what each byte is spent on
    python pack.py verify FILE [--against CHECKPOINT]         # is the file sound, canonical, and this checkpoint's?
    python pack.py budget FILE [--code FILE ...] [--cap N] [--model-only]
    python pack.py export FILE --to safetensors | gguf        # for other programs; --from: the way back

A file is a fixed preamble, a compressed JSON header and the streams, back to back, nothing else:

    offset  size  field (little-endian)
    0       4     magic "TRNY"
    4       1     version, 2
    5       4     h, bytes of the compressed header
    9       4     bytes of the header's JSON, at most MAX_HEADER
    13      4     CRC32 of bytes 0 to 12 and of the compressed header
    17      h     raw deflate of {"formats": [format], "meta": {...},
                                  "streams": [[codec, bytes, crc32]], "tensors": [[name, shape, format index]]}
    17 + h  ..    the streams

docs/format.md is the whole format. There is one stream per format and role (codes, scales), of all tensors
of that format in order: merged streams compress better and a short table costs fewer header bytes. What follows from
formats and shapes (which streams exist, how many symbols each holds, and with the sizes their offsets) is derived by
`layout` and not stored, so that no file can contradict itself; the names of repeated layers are derived from the
first's (`fold`). Streams cannot overlap or leave gaps, and must end at the end of the file.

Reading trusts nothing. Any input gives tensors or an ArtifactError, every byte is under a checksum or an exact rule,
and every size is checked before memory is taken for it. CRC32 finds accidents, not forgers: compare sha256 for that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np
import zstandard

from tern import base3, checkpoints, entropy, source
from tern.command import Parser, say_error
from tern.errors import Foreseen
from tern.files import WriteError, write_atomic

MAGIC, VERSION = b"TRNY", 2
PREAMBLE = struct.Struct("<4sBII")  # magic, version, compressed header bytes, JSON bytes; a CRC32 follows
HEADER_AT = PREAMBLE.size + 4
DEFAULT_CAP = 16_000_000  # the official track: decimal megabytes, code plus model

# Limits on what a reader accepts. Each is far above an honest model and far below what hurts a machine.
MAX_FILE = 1 << 28  # 16 times the official cap
MAX_HEADER = 1 << 18  # thousands of tensors
MAX_NUMEL = 1 << 40  # of one tensor, zero dimensions counted as one: keeps every product of sizes exact and small
MAX_DIMS, MAX_FORMATS, MAX_NAME, MAX_DEPTH, MAX_TENSORS = 8, 32, 256, 32, 1 << 14
# A stream may decode to 4 MiB plus 64 times its bytes in the file. zstd and lzma can expand 10,000 times, a trained
# model never does: 64 is a ternary weight in 1/8 bit. So a file of n bytes decodes to at most 64 n plus 4 MiB per
# stream. The writer obeys the same rule: it drops a candidate that compresses further than that.
FREE_EXPANSION, MAX_EXPANSION = 4 << 20, 64
FREE_STEPS = 4096  # and take so many steps of the adaptive model, of about a millisecond, plus one per byte


class ArtifactError(Foreseen):
    """An artifact that cannot be read or written. The message says what is wrong, where, and what to do."""


def damaged(what: str) -> ArtifactError:
    return ArtifactError(f"{what}; the file is damaged or was not written by pack.py: copy it or write it again")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file holds it.

    format: {"kind": "ternary", "group_size": 128, "scale": "bf16", ...}   codes int8 in {-1, 0, 1}
            {"kind": "binary" or "five", "group_size": .., "scale": ..}    codes int8 in {-1, 1} or {-2 .. 2}
            {"kind": "int", "bits": 8, "group_size": 128, "scale": ...}    codes int8 in +-(2^(bits-1) - 1)
            {"kind": "codebook", "entries": k, "group_size": ..}           codes int8 in -(k // 2) .. (k - 1) // 2
            {"kind": "fp8", "bf16", "fp16" or "fp32"}    codes uint8, uint16, uint16 or uint32: the values' bits
            Other keys are carried along and mean nothing here.
    codes:  in the tensor's shape
    scales: a scale per group, [rows, groups]: uint16 bit patterns of bf16 or fp16, or uint8 codes of log4 to log8
            (0 is the scale 0, docs/format.md has the others); None for the float kinds. A codebook's are its values,
            [rows, groups * entries], bf16 bit patterns. Groups run along
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
SYMBOLS = {"ternary": "<i1", "five": "<i1", "u8": "<u1", "u16": "<u2", "u32": "<u4"}
SYMBOLS |= {f"int{bits}": "<i1" for bits in range(2, 9)} | {f"uint{bits}": "<u1" for bits in range(4, 9)}
SCALES = {"bf16": "u16", "fp16": "u16"} | {f"log{bits}": f"uint{bits}" for bits in range(4, 9)}  # -> symbols

# Bits of a trained model's symbols (LOG.md, "bits of trained models", "equal_bytes"): what `expected_bits` assumes.
BITS: dict[str, float] = {
    "ternary": 1.577, "binary": 1.0, "five": 2.18, "codebook entry": 7.2,
    "embedding int2": 0.7, "embedding int3": 1.8, "embedding int4": 2.80, "embedding int5": 3.76,
    "embedding int6": 4.66, "embedding int7": 5.7, "embedding int8": 6.8,
    "fp8": 5.4, "bf16": 10.9, "fp16": 13.9, "fp32": 32.0,  # of either sign
    "vectors fp8": 4.7, "vectors bf16": 8.6, "vectors fp16": 11.6,  # near one, like gains
    "scale log4": 0.2, "scale log5": 1.1, "scale log6": 1.95, "scale log7": 2.9, "scale log8": 3.8,
    "scale bf16": 6.8, "scale fp16": 9.1,
}


@dataclass(frozen=True)
class Kind:
    """What the packer has to know of a kind of storage format: its row in KINDS, with its expected bits in BITS.

    Nothing else here changes for a new kind whose codes are symbols that there are (SYMBOLS).
    """

    symbol: Callable[[dict], str]  # format -> symbol kind of its codes
    expected: Callable[[dict, str, tuple[int, ...]], float]  # format, part of the model, shape -> bits of a code
    has_scale: bool = False  # codes times a scale per group: the format has the keys group_size and scale
    has_entries: bool = False  # codes are indices into the group's values: the keys group_size and entries
    numbers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # further keys of the format, and their ranges
    codes: Callable[[dict], tuple[int, int]] | None = None  # the codes in use, where that is less than the symbols
    has_zero: bool = True  # whether 0 is a code
    exponent: int = 0  # of floats: these bits all ones are an infinity or not a number


def float_kind(name: str, symbol: str, exponent: int) -> Kind:
    return Kind(lambda f: symbol, lambda f, part, shape: BITS.get(f"{part} {name}", BITS[name]), exponent=exponent)


KINDS = {
    "ternary": Kind(lambda f: "ternary", lambda f, part, shape: BITS["ternary"] * threshold_entropy(f) /
                    threshold_entropy({}), has_scale=True),
    # Ternary symbols without zeros, which costs the adaptive model 0.0005 bits each.
    "binary": Kind(lambda f: "ternary", lambda f, part, shape: BITS["binary"], has_scale=True, has_zero=False),
    "five": Kind(lambda f: "five", lambda f, part, shape: BITS["five"], has_scale=True),
    "int": Kind(lambda f: f"int{f['bits']}", lambda f, part, shape: BITS.get(f"{part} int{f['bits']}") or
                absmax_entropy(f, shape), has_scale=True, numbers={"bits": (2, 8)}),
    # Indices around zero are integers of one bit more than they need.
    "codebook": Kind(lambda f: f"int{(f['entries'] - 1).bit_length() + 1}", lambda f, part, shape:
                     math.log2(f["entries"]), has_entries=True, numbers={"entries": (2, 64)},
                     codes=lambda f: (-(f["entries"] // 2), (f["entries"] - 1) // 2)),
    "fp8": float_kind("fp8", "u8", 0x7F),  # e4m3 (arXiv 2209.05433)
    "bf16": float_kind("bf16", "u16", 0x7F80),
    "fp16": float_kind("fp16", "u16", 0x7C00),
    "fp32": float_kind("fp32", "u32", 0x7F800000),
}
SCALE_EXPONENT = {name: KINDS[name].exponent for name in ("bf16", "fp16")}  # every log scale is finite


def bits_of(symbol: str) -> int:
    """Bits of an int or uint symbol kind."""
    return int(symbol.removeprefix("u").removeprefix("int"))


def range_of(symbol: str) -> tuple[int, int]:
    """The smallest and largest symbol of a kind of one byte; codes are symmetric around zero."""
    levels = {"ternary": 1, "five": 2}
    if symbol in levels:
        return -levels[symbol], levels[symbol]
    if symbol.startswith("int"):
        high = 2 ** (bits_of(symbol) - 1) - 1
        return -high, high
    return 0, 2 ** bits_of(symbol) - 1


def is_grouped(format: dict) -> bool:
    """Whether the format has something for each group of weights, beside their codes."""
    return KINDS[format["kind"]].has_scale or KINDS[format["kind"]].has_entries


def scale_shape(format: dict, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """[rows, groups] of a tensor's scales (of a codebook: groups * entries); None for a format without scales."""
    if not is_grouped(format):
        return None
    each = format["entries"] if KINDS[format["kind"]].has_entries else 1
    if format["group_size"] == 0:
        return 1, each
    return math.prod(shape[:-1]), -(-(shape[-1] if shape else 1) // format["group_size"]) * each


def layout(format: dict, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Role -> (symbol kind, shape) of what a file stores of a tensor: the one place that knows. Expects valid input."""
    roles, scales = {"codes": (KINDS[format["kind"]].symbol(format), shape)}, scale_shape(format, shape)
    if scales is not None:
        roles["scales"] = SCALES[scale_dtype(format)], scales
    return roles


def scale_dtype(format: dict) -> str:
    """Of the scales, or of a codebook's values."""
    return format["scale"] if KINDS[format["kind"]].has_scale else "bf16"


def is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # `type`, because True is an instance of int


def check_format(format) -> None:
    """Raises ArtifactError unless format is a dict whose keys, as far as pack.py interprets them, are valid."""
    name = format.get("kind") if isinstance(format, dict) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    ok = kind is not None
    if ok and is_grouped(format):
        ok = is_int(format.get("group_size"), 0, MAX_NUMEL)
    if ok and kind.has_scale:
        ok = format.get("scale") in tuple(SCALES)
    if ok:
        ok = all(is_int(format.get(key), low, high) for key, (low, high) in kind.numbers.items())
    if not ok:
        raise ArtifactError(
            f"format {str(format)[:200]!a} is not known: use kind ternary, binary, five or int (with group_size >= 0, "
            "scale bf16, fp16 or log4 to log8, and for int bits 2 to 8), codebook (group_size, entries 2 to 64), or "
            "kind fp8, bf16, fp16 or fp32"
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
                     or (isinstance(value, float) and math.isfinite(value)))  # JSON's 1e999 is infinity
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


def flat_codes(codes, kind: str) -> np.ndarray:
    """codes (any shape, integers) flat, in the kind's type. Raises ArtifactError if one is outside the kind's range."""
    codes, (low, high) = np.asarray(codes).reshape(-1), range_of(kind)
    if codes.size == 0:
        return np.zeros(0, SYMBOLS[kind])
    if codes.dtype.kind not in "iu" or codes.min() < low or codes.max() > high:
        raise ArtifactError(f"codes must be integers in {low}..{high}: quantize before packing")
    return codes.astype(SYMBOLS[kind], copy=False)


def as_bytes(data, size: int, what: str) -> np.ndarray:
    """data as uint8 [size]. Raises ArtifactError on another length, before anything else is allocated."""
    if len(data) != size:
        raise damaged(f"{what} takes exactly {size} bytes, not {len(data)}")
    return np.frombuffer(data, np.uint8)


def pack_base3(codes) -> bytes:
    """Codes in {-1, 0, 1} as base-3 numbers: 5 digits (code + 1) per byte, least significant first, padded with 0."""
    codes = flat_codes(codes, "ternary")
    out = np.empty(-(-codes.size // 5), np.uint8)
    for start in range(0, codes.size, CHUNK):
        digits = (codes[start : start + CHUNK] + 1).view(np.uint8)
        digits = np.pad(digits, (0, -digits.size % 5)).reshape(-1, 5)
        out[start // 5 :][: len(digits)] = base3.join_digits(digits)
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
        chunk = base3.CODES[packed[start // 5 : (start + CHUNK) // 5]].reshape(-1)
        codes[start : start + CHUNK] = chunk[: n - start]
    return codes


def pack_bits(codes, kind: str) -> bytes:
    """int or uint codes as unsigned numbers, code - smallest, of the kind's bits, lowest bit first, 0-padded."""
    bits, (low, _) = bits_of(kind), range_of(kind)
    codes = flat_codes(codes, kind)
    parts = []
    for start in range(0, codes.size, CHUNK):
        digits = (codes[start : start + CHUNK].astype(np.int16) - low).astype(np.uint8)
        rows = np.unpackbits(digits[:, None], axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(rows, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data, n: int, kind: str) -> np.ndarray:
    """The n codes of pack_bits. Raises ArtifactError unless data is exactly what pack_bits gives."""
    bits, (low, high) = bits_of(kind), range_of(kind)
    packed = as_bytes(data, -(-n * bits // 8), f"{n} codes of {bits} bits")
    if n * bits % 8 and packed[-1] >> (n * bits % 8):
        raise damaged(f"padding bits in byte {packed.size - 1} are not 0")
    codes = np.empty(n, SYMBOLS[kind])
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        rows = np.unpackbits(packed[start * bits // 8 :][: CHUNK * bits // 8], count=count * bits, bitorder="little")
        digits = np.packbits(rows.reshape(-1, bits), axis=1, bitorder="little")[:, 0]
        if digits.max() > high - low:
            raise damaged(f"code {start + digits.argmax()} of {n} is outside {low}..{high}")
        codes[start : start + count] = digits.astype(np.int16) + low
    return codes


def pack_raw(symbols: np.ndarray, kind: str) -> bytes:
    return symbols.astype(SYMBOLS[kind], copy=False).tobytes()


def unpack_raw(data, count: int, kind: str) -> np.ndarray:
    dtype = np.dtype(SYMBOLS[kind])
    symbols = as_bytes(data, count * dtype.itemsize, f"raw of {count} {kind} symbols").view(dtype)
    symbols = symbols.astype(dtype.newbyteorder("="))  # a copy: writable, in this machine's byte order
    return flat_codes(symbols, kind) if dtype.itemsize == 1 else symbols


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

# Above this many bytes lzma is left out and zstd runs at level 3, because encoding must stay under a minute, and on
# long streams of trained codes the adaptive model has won every time (LOG.md).
THOROUGH_BELOW = 1 << 20


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


Shapes = list[tuple[int, ...]]


def count_of(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class Codec:
    """A way to write the symbols of arrays, one after the other (flat), of some kinds and of the given shapes.
    decode(encode(symbols, kind, shapes), kind, shapes) is symbols, bit for bit.

    decode raises ArtifactError unless data is whole and gives exactly so many symbols, all in range. It need not bound
    its output: `parse_header` has done so. `size` is the bytes of count symbols before compression; `free` the symbols
    that a stream may hold however short it is (0: FREE_EXPANSION rules), `steps` its milliseconds of decoding.
    `replaced`: kinds that are read, and that another codec writes.
    """

    kinds: tuple[str, ...]
    encode: Callable[[np.ndarray, str, Shapes], bytes]
    decode: Callable[[memoryview | bytes, str, Shapes], np.ndarray]
    size: Callable[[int, str], int]
    compressor: str = ""
    suits: Callable[[Shapes, str], bool] = lambda shapes, kind: True
    free: Callable[[str], int] = lambda kind: 0
    steps: Callable[[Shapes, str], int] = lambda shapes, kind: 0
    replaced: tuple[str, ...] = ()


def with_compressor(plain: Codec, name: str, compress: Callable, decompress: Callable) -> Codec:
    def encode(symbols: np.ndarray, kind: str, shapes: Shapes) -> bytes:
        return compress(plain.encode(symbols, kind, shapes))

    def decode(data, kind: str, shapes: Shapes) -> np.ndarray:
        count = count_of(shapes)
        if count == 0:
            raise damaged("an empty stream is compressed")  # a limit of 0 means "no limit" to the libraries
        return plain.decode(decompress(data, plain.size(count, kind)), kind, shapes)

    return Codec(plain.kinds, encode, decode, plain.size, name)


def raw_size(count: int, kind: str) -> int:
    """Bytes of count symbols in memory."""
    return count * np.dtype(SYMBOLS[kind]).itemsize


def of_flat(kinds: tuple[str, ...], encode: Callable, decode: Callable, size: Callable) -> Codec:
    """A codec to which shapes mean nothing: encode(symbols, kind), decode(data, count, kind)."""
    return Codec(kinds, lambda symbols, kind, shapes: encode(symbols, kind),
                 lambda data, kind, shapes: decode(data, count_of(shapes), kind), size)


def of_model(kinds: tuple[str, ...], widths: bool, replaced: tuple[str, ...] = ()) -> Codec:
    """The adaptive model (tern/entropy.py) of integers whose rows have widths, or of before."""
    def encode(symbols: np.ndarray, kind: str, shapes: Shapes) -> bytes:
        parts = np.split(symbols, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
        return entropy.encode([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)], kind, widths)

    def decode(data, kind: str, shapes: Shapes) -> np.ndarray:
        if count_of(shapes) == 0:
            raise damaged("an empty stream is compressed")
        try:
            symbols = np.concatenate([x.reshape(-1) for x in entropy.decode(data, shapes, kind, widths)])
            return flat_codes(symbols, kind).astype(SYMBOLS[kind], copy=False)
        except entropy.DecodeError as e:
            raise damaged(str(e)) from None

    return Codec(kinds, encode, decode, raw_size, "model", entropy.suits, entropy.free_symbols, entropy.steps, replaced)


INTS, FLOATS = tuple(kind for kind in SYMBOLS if "int" in kind), ("u8", "u16", "u32")
SIGNED = ("five", *(kind for kind in INTS if kind.startswith("int")))
PLAIN = {
    "base3": of_flat(("ternary",), lambda s, kind: pack_base3(s), lambda data, n, kind: unpack_base3(data, n),
                     lambda n, kind: -(-n // 5)),
    "bits": of_flat(INTS, pack_bits, unpack_bits, lambda n, kind: -(-n * bits_of(kind) // 8)),
    "raw": of_flat(("five", *INTS, *FLOATS), pack_raw, unpack_raw, raw_size),
    "planes": of_flat(FLOATS[1:], pack_planes, unpack_planes, raw_size),
}
COMPRESSORS = {"zstd": (zstd_encode, zstd_decode), "lzma": (lzma_encode, lzma_decode)}
# planes alone are as long as raw, so they are no codec
CODECS = {name: codec for name, codec in PLAIN.items() if name != "planes"} | {
    f"{name}+{c}": with_compressor(codec, c, *both) for name, codec in PLAIN.items() for c, both in COMPRESSORS.items()
} | {"model": of_model(("ternary", "five", *INTS, "u8", "u16"), False, SIGNED), "widths": of_model(SIGNED, True)}


def expands_too_far(codec: Codec, shapes: Shapes, kind: str, stored_bytes: int) -> bool:
    """Whether decoding would take more memory or time than so many bytes of an honest model justify."""
    free = codec.free(kind) * raw_size(1, kind) or FREE_EXPANSION
    return (raw_size(count_of(shapes), kind) > free + MAX_EXPANSION * stored_bytes
            or codec.steps(shapes, kind) > FREE_STEPS + stored_bytes)


def are_weights(kind: str, role: str, shapes: Shapes) -> bool:
    """Whether a stream is mostly matrices of 16-bit floats. Their low bits are noise, and lzma takes 3% to 9% less for
    them than the model, which needs seconds (LOG.md, floats)."""
    matrices = [shape for shape in shapes if len(shape) > 1 and min(shape) >= 16]
    return kind == "u16" and role == "codes" and 2 * count_of(matrices) > count_of(shapes)


def encode_stream(symbols: np.ndarray, kind: str, shapes: Shapes, role: str = "codes") -> tuple[str, bytes]:
    """(codec name, bytes) of the smallest encoding that is tried; of equals the first in CODECS, so that a file is
    reproducible."""
    best = None
    for name, codec in CODECS.items():
        if kind not in codec.kinds or (codec.compressor and not symbols.size) or not codec.suits(shapes, kind):
            continue
        if kind in codec.replaced:
            continue
        if codec.compressor == "lzma" and codec.size(symbols.size, kind) > THOROUGH_BELOW:
            continue
        if name == "model" and best and best[0].endswith("lzma") and are_weights(kind, role, shapes):
            continue
        data = codec.encode(symbols, kind, shapes)
        better = best is None or len(data) < len(best[1])
        if better and not expands_too_far(codec, shapes, kind, len(data)):
            best = name, data
    return best


# ---------------------------------------------------------------------------------------------------------------
# Container
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A row of the stream table, with what layout derives: whose symbols, of which kind and shapes, and where."""

    format: int
    role: str
    kind: str
    shapes: Shapes
    codec: str
    offset: int
    bytes: int
    crc32: int

    @property
    def count(self) -> int:
        return count_of(self.shapes)


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


Row = tuple[str, tuple[int, ...], int]  # of the tensor table: name, shape, format index


def stream_table(formats: list[dict], tensors: list[Row]) -> dict[tuple[int, str], tuple[str, Shapes]]:
    """(format index, role) -> (symbol kind, shapes), in file order."""
    table: dict[tuple[int, str], tuple[str, Shapes]] = {}
    for _, shape, index in sorted(tensors, key=lambda tensor: tensor[2]):
        for role, (kind, shape_of_role) in layout(formats[index], shape).items():
            table.setdefault((index, role), (kind, []))[1].append(shape_of_role)
    return table


NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,5})(?![0-9])(.*)", re.ASCII)


def fold(rows: list[Row]) -> list[list]:
    """The tensor table as a header has it: layers that differ in their number alone are written once.

    A row is [name, shape, format index]; a run of layers [before, first number, layers, [[after, shape, format index],
    ...]], whose names are before + number + after.
    """
    layers: list[list] = []  # [before, number, count, [[after, shape, format index], ...]], or a row
    for name, shape, index in rows:
        match = NUMBERED.fullmatch(name)
        if not match:
            layers.append([name, list(shape), index])
            continue
        before, number, entry = match[1], int(match[2]), [match[3], list(shape), index]
        if layers and len(layers[-1]) == 4 and layers[-1][:2] == [before, number]:
            layers[-1][3].append(entry)
        else:
            layers.append([before, number, 1, [entry]])
    runs: list[list] = []
    for layer in layers:
        if len(layer) == 4 and runs and len(runs[-1]) == 4:
            before, first, count, entries = runs[-1]
            if [before, first + count, entries] == [layer[0], layer[1], layer[3]]:
                runs[-1][2] += 1
                continue
        runs.append(layer)
    return [row for run in runs for row in ([run] if len(run) == 3 or run[2] > 1 else unfold([run]))]


def unfold(table: list) -> list:
    """The rows of a tensor table, as they are (not checked, but at most MAX_TENSORS). Raises ArtifactError."""
    rows: list = []
    for entry in table:
        if isinstance(entry, list) and len(entry) == 4:
            before, first, count, entries = entry
            ok = isinstance(before, str) and is_int(first, 0, 999_999) and is_int(count, 1, MAX_TENSORS)
            ok = ok and isinstance(entries, list) and len(entries) > 0 and count * len(entries) <= MAX_TENSORS
            ok = ok and all(isinstance(e, list) and len(e) == 3 and isinstance(e[0], str)
                            and len(before) + len(e[0]) < MAX_NAME for e in entries)  # before any is made
            if not ok:
                raise damaged(f"tensor entry {str(entry)[:80]!a} is not [before, first, layers, [[after, shape, "
                              f"format index], ...]], at most {MAX_TENSORS} tensors with names of at most {MAX_NAME}")
            rows += [[f"{before}{i}{after}", shape, index]
                     for i in range(first, first + count) for after, shape, index in entries]
        else:
            rows.append(entry)
        if len(rows) > MAX_TENSORS:
            raise damaged(f"the tensor table has more than the at most {MAX_TENSORS} tensors")
    return rows


def check_tensor(name: str, t: StoredTensor) -> None:
    """Raises ArtifactError unless the tensor's arrays are exactly what its format and shape call for."""
    if not isinstance(t.shape, tuple):
        raise ArtifactError(f"tensor {name!a}: shape must be a tuple, not {t.shape!r}")
    check_name_and_shape(name, t.shape)
    check_format(t.format)
    check_json(t.format, f"the format of tensor {name!a}")
    roles = layout(t.format, t.shape)
    for role, array in (("codes", t.codes), ("scales", t.scales)):
        if role not in roles:
            if array is not None:
                raise ArtifactError(f"tensor {name!a}: the format {t.format['kind']} has no {role}: pass None")
            continue
        dtype, shape = np.dtype(SYMBOLS[roles[role][0]]).newbyteorder("="), roles[role][1]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ArtifactError(f"tensor {name!a}: {role} must be {dtype} {shape}, not {got}")
        if dtype.itemsize == 1:
            try:
                flat_codes(array, roles[role][0])
            except ArtifactError as e:
                raise ArtifactError(f"tensor {name!a}: {e}") from None
    check_codes(name, t)


def check_codes(name: str, t: StoredTensor) -> None:
    """Raises ArtifactError if codes in the range of their symbols are none of the format's."""
    kind = KINDS[t.format["kind"]]
    if not kind.has_zero and not t.codes.all():
        raise damaged(f"tensor {name!a}: a {t.format['kind']} code is 0")
    if kind.codes is not None and t.codes.size:
        low, high = kind.codes(t.format)
        if t.codes.min() < low or t.codes.max() > high:
            raise damaged(f"tensor {name!a}: a code is outside {low}..{high}, those of a {t.format['kind']} here")


NORMAL = NormalDist()

def entropy_of(shares: Iterable[float]) -> float:
    """Bits per symbol of independent symbols that occur in these shares."""
    return sum(-p * math.log2(p) for p in shares if p > 0)


def threshold_entropy(format: dict) -> float:
    """Bits per ternary code of normal weights, by the format's rule and threshold; without these, absmean and 0.5."""
    unit = 1.0 if format.get("rule") == "rms" else math.sqrt(2 / math.pi)  # of the threshold, in standard deviations
    zeros = 2 * NORMAL.cdf(format.get("threshold", 0.5) * unit) - 1
    return entropy_of((zeros, (1 - zeros) / 2, (1 - zeros) / 2))


def absmax_entropy(format: dict, shape: tuple[int, ...]) -> float:
    """Bits per int code of normal weights divided by the largest magnitude of their group: by that one's median."""
    limit, size = 2 ** (format["bits"] - 1) - 1, format["group_size"]
    group = min(size, shape[-1]) if size else math.prod(shape)
    step = NORMAL.inv_cdf((1 + 0.5 ** (1 / group)) / 2) / limit
    below = [0.0, *(NORMAL.cdf((code + 0.5) * step) for code in range(-limit, limit)), 1.0]
    return entropy_of(after - before for before, after in itertools.pairwise(below))


def expected_bits(format: dict, part: str = "matrices", shape: tuple[int, ...] = (128,)) -> dict[str, float]:
    """Role -> bits that one of its symbols is expected to take in the file of a trained model.

    part: matrices (of blocks; ints are those of normal weights), embedding (whose rare tokens stay near their small
    start, and whose codes take less for it), or vectors. shape: of the tensor; ints depend on how many share a scale.
    """
    kind = KINDS[format["kind"]]
    bits = {"codes": kind.expected(format, part, shape)}
    if is_grouped(format):
        bits["scales"] = BITS[f"scale {format['scale']}"] if kind.has_scale else BITS["codebook entry"]
    return bits


def predicted_bytes(rows: Iterable[tuple[str, str, tuple[int, ...], dict]], meta: dict
                    ) -> dict[str, tuple[dict, int, float]]:
    """Part of a model's file -> (format, symbols, bytes), with expected_bits for each symbol.

    rows: of each tensor its name, part ("matrices", "embedding" or "vectors"), shape and format.
    """
    parts: dict[str, tuple[dict, int, float]] = {}
    table, formats = [], []
    for name, part, shape, format in rows:
        for role, (_, role_shape) in layout(format, shape).items():
            _, count, size = parts.get(f"{part} {role}", (format, 0, 0.0))
            n, bits = math.prod(role_shape), expected_bits(format, part, shape)[role]
            parts[f"{part} {role}"] = format, count + n, size + n * bits / 8
        if format not in formats:
            formats.append(format)
        table.append((name, shape, formats.index(format)))
    header = encode_header(formats, meta, [["model", 10**5, 2**31]] * len(parts), table)
    return parts | {"header": ({}, 0, float(len(header)))}


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
    for (index, role), (kind, shapes) in stream_table(format_list, rows).items():
        parts = [getattr(tensors[name], role).reshape(-1) for name, _, i in rows if i == index]
        codec, data = encode_stream(np.concatenate(parts), kind, shapes, role)
        table.append([codec, len(data), zlib.crc32(data)])
        streams.append(data)
    return b"".join([encode_header(format_list, meta, table, rows), *streams])


def encode_header(formats: list[dict], meta: dict, table: list, rows: list[Row]) -> bytes:
    """The file up to the first stream. Raises ArtifactError if it would be too large."""
    text = canonical_json({"formats": formats, "meta": meta, "streams": table, "tensors": fold(rows)})
    if len(text) > MAX_HEADER or len(formats) > MAX_FORMATS or len(rows) > MAX_TENSORS:
        raise ArtifactError(
            f"header of {len(text)} bytes, {len(formats)} formats, {len(rows)} tensors: at most {MAX_HEADER}, "
            f"{MAX_FORMATS}, {MAX_TENSORS}; cut meta"
        )
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    header = deflate.compress(text) + deflate.flush()
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(header), len(text))
    return b"".join([preamble, struct.pack("<I", zlib.crc32(header, zlib.crc32(preamble))), header])


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
    if not 0 < text_size <= MAX_HEADER or size > text_size + 1024:  # before any work on it; deflate never adds more
        raise damaged(f"header of {text_size} bytes in {size} declared at offset 5, at most {MAX_HEADER} are allowed")
    if zlib.crc32(data[HEADER_AT:end], zlib.crc32(data[: PREAMBLE.size])) != crc:
        raise damaged(f"header checksum at offset {PREAMBLE.size} does not match")

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
    for row in unfold(header["tensors"]):
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
    if fold(tensors) != header["tensors"]:
        raise damaged("the tensor table is not folded as pack.py folds it")
    if used != len(formats):
        raise damaged(f"format {used} of the header is not used by any tensor")

    expected = stream_table(formats, tensors)
    if len(header["streams"]) != len(expected):
        raise damaged(f"{len(header['streams'])} streams, but the formats call for {len(expected)}")
    streams = []
    for row, ((index, role), (kind, shapes)) in zip(header["streams"], expected.items(), strict=True):
        where = f"stream {len(streams)} ({role} of format {index})"
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
                and is_int(row[1], 0, MAX_FILE) and is_int(row[2], 0, 2**32 - 1)):
            raise damaged(f"{where}: {str(row)[:80]!a} is not [codec, bytes, crc32]")
        codec, size, crc = row
        if codec not in CODECS or kind not in CODECS[codec].kinds or not CODECS[codec].suits(shapes, kind):
            raise ArtifactError(f"{where}: codec {codec[:40]!a} is not one for {kind}; use the pack.py that wrote it")
        if offset + size > len(data):
            raise damaged(f"{where} ends at offset {offset + size}, the file at {len(data)}")
        if expands_too_far(CODECS[codec], shapes, kind, size):
            raise damaged(f"{where}: {count_of(shapes)} {kind} symbols from {size} bytes are more than any model needs")
        streams.append(Stream(index, role, kind, shapes, codec, offset, size, crc))
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
            flat[s.format, s.role] = CODECS[s.codec].decode(chunk, s.kind, s.shapes)
        except ArtifactError as e:
            raise ArtifactError(f"{where}: {e}") from None
    tensors, taken = {}, dict.fromkeys(flat, 0)
    for name, shape, index in header.tensors:
        format = header.formats[index]
        arrays: dict[str, np.ndarray | None] = {"codes": None, "scales": None}
        for role, (_, shape_of_role) in layout(format, shape).items():
            start, count = taken[index, role], math.prod(shape_of_role)
            taken[index, role] += count
            arrays[role] = flat[index, role][start : start + count].reshape(shape_of_role)
        tensors[name] = StoredTensor(shape, dict(format), **arrays)
        check_codes(name, tensors[name])
    return tensors, header.meta


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """A whole regular file. Raises ArtifactError."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # before opening: a pipe would wait for ever
            raise ArtifactError(f"{path}: not a file; give the artifact itself, as {Path(path) / 'model.tern'}")
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
    except MemoryError:
        raise ArtifactError(f"{path}: needs more memory than there is; use a larger machine") from None


def write_artifact(path: str | Path, tensors: dict[str, StoredTensor], meta: dict) -> int:
    """Encode and write atomically; returns the file's bytes. Raises ArtifactError and leaves what was there before."""
    data = encode_artifact(tensors, meta)
    try:
        return write_atomic(path, data)
    except WriteError as e:
        raise ArtifactError(str(e)) from None


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


def budget(model_path: str | Path, code_paths: Iterable[str | Path] | None, cap: int, count_code: bool = True
           ) -> Budget:
    """Sizes of the files as they are on disk. A code file named twice counts once. Raises ArtifactError.

    code_paths None: the code is this program's, as a referee weighs it (source.code_bytes).
    """
    if code_paths is None:
        code = source.code_bytes()
    else:
        code = sum(len(read_bytes(path)) for path in {Path(path).resolve() for path in code_paths})
    return Budget(len(read_bytes(model_path)), code, cap, count_code)


def format_label(format: dict) -> str:
    """A format for people: int4 g128 log7."""
    if not is_grouped(format):
        return format["kind"]
    number = "".join(str(format[key]) for key in KINDS[format["kind"]].numbers)
    return f"{format['kind']}{number} g{format['group_size']} {scale_dtype(format)}"


def tensor_bytes(header: Header) -> dict[str, int]:
    """Bytes of each tensor in the file, by name. A merged stream's bytes are shared among its tensors by count: tensor
    i gets floor(B * c_i / n) - floor(B * c_(i-1) / n) of B bytes, with c the running count, so that shares add up."""
    streams = {(s.format, s.role): s for s in header.streams}
    running, shares = dict.fromkeys(streams, 0), {}
    for name, shape, index in header.tensors:
        shares[name] = 0
        for role, (_, shape_of_role) in layout(header.formats[index], shape).items():
            s, before, count = streams[index, role], running[index, role], math.prod(shape_of_role)
            running[index, role] = before + count
            shares[name] += s.bytes * (before + count) // s.count - s.bytes * before // s.count if s.count else 0
    return shares


def describe(data: bytes, tensors: dict[str, StoredTensor] | None = None) -> dict:
    """All that `inspect` shows. tensors: those of the file, where it was decoded already."""
    header = parse_header(data)
    tensors = tensors or decode_artifact(data)[0]
    shares, rows = tensor_bytes(header), []
    for name, shape, index in header.tensors:
        share, format, t = shares[name], header.formats[index], tensors[name]
        values = t.codes
        if KINDS[format["kind"]].exponent:  # a float: -0.0 is a zero
            values = t.codes & ((1 << (8 * t.codes.itemsize - 1)) - 1)
        n = t.codes.size
        rows.append({"tensor": name, "shape": list(shape), "format": format_label(format), "weights": n, "bytes": share,
                     "bits_per_weight": 8 * share / n if n else 0.0,
                     "zero_frac": float((values == 0).mean()) if n else 0.0})
    weights = sum(tensors[name].codes.size for name, *_ in header.tensors)
    table = [{"role": s.role, "format": format_label(header.formats[s.format]), "kind": s.kind, "codec": s.codec,
              "count": s.count, "offset": s.offset, "bytes": s.bytes, "crc32": s.crc32} for s in header.streams]
    return {"bytes": len(data), "header_bytes": header.header_bytes, "weights": weights,
            "bits_per_parameter": 8 * len(data) / weights if weights else 0.0, "tensors": rows, "streams": table,
            "formats": header.formats, "meta": header.meta}


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
    lines += ["", "A stream that tensors share is split among them by their number of weights."]
    return "\n".join(lines)


def check_values(name: str, t: StoredTensor) -> None:
    """Raises ArtifactError if a code is out of range, a value or scale not finite, or a live group's scale zero."""
    check_tensor(name, t)
    kind = KINDS[t.format["kind"]]
    floats, mask, what = t.codes, kind.exponent, "value"
    if t.scales is not None:
        floats, mask, what = t.scales, SCALE_EXPONENT.get(scale_dtype(t.format), 0), "scale"
    if mask:
        bad = np.argwhere((floats & mask) == mask)
        if len(bad):
            raise ArtifactError(f"tensor {name!a}: {what} {bad[0].tolist()} is not finite: pack a run that did not "
                                "diverge")
    if not (kind.has_scale and kind.has_zero and t.codes.size):
        return
    rows, groups = t.scales.shape
    live = (t.codes != 0).reshape(rows, -1)
    live = np.logical_or.reduceat(live, np.arange(groups) * (t.format["group_size"] or live.shape[1]), axis=1)
    bad = np.argwhere(live & ((t.scales & (0x7FFF if mask else 0xFF)) == 0))
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
            bad = np.argwhere(x != y)
            if len(bad):
                at = tuple(bad[0])
                return f"tensor {name!a}: {role}{bad[0].tolist()} is {x[at]} in the file, {y[at]} in the checkpoint"
    return None


def stored_in_checkpoint(path: str | Path) -> dict[str, StoredTensor]:
    """What an artifact of this checkpoint must hold. Raises CheckpointError and ArtifactError."""
    arrays, state = checkpoints.read_checkpoint(path)
    formats = state.get("formats")
    if not isinstance(formats, dict):
        raise checkpoints.CheckpointError(f"{path}: names no storage formats; it is older than 0.1.0: use the pack.py "
                                          "of its time, or train again")
    tensors = {}
    for name, format in formats.items():
        codes, scales = arrays.get(f"codes/{name}"), arrays.get(f"scales/{name}")
        if codes is None:
            raise checkpoints.CheckpointError(f"{path}: has no codes of {name[:80]!a}; it is damaged: train again")
        tensors[name] = StoredTensor(tuple(codes.shape), format, codes, scales)
    return tensors


def verify(path: str | Path, against: str | None = None) -> list[str]:
    """What was proven about the file, a line each. Raises ArtifactError on the first thing that does not hold."""
    tensors, meta, data = read_sound(path)
    lines = [f"sound: {len(data):,} bytes, {len(tensors)} tensors, every checksum, code and scale"]
    same = encode_artifact(tensors, meta) == data
    lines.append("canonical: packing its tensors again gives the same bytes" if same else
                 "not canonical here: packing its tensors again gives other bytes (another packer, zlib, liblzma or "
                 "zstandard)")
    if against is not None:
        difference = first_difference(tensors, stored_in_checkpoint(against))
        if difference:
            raise ArtifactError(f"{path} is not {against}: {difference}; pack that checkpoint again")
        lines.append(f"same: every code and scale is that of {against}")
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Other programs' formats
# ---------------------------------------------------------------------------------------------------------------


def find_conversions():
    """tern.conversions, of which no submission has a byte (tern.source.APART). Raises ArtifactError in one."""
    try:
        from tern import conversions
    except ImportError as e:
        raise ArtifactError(f"{e}: a submission's one file has it not; use pack.py of its source") from e
    return conversions


def read_sound(path: str | Path) -> tuple[dict[str, StoredTensor], dict, bytes]:
    """(tensors, meta, the file's bytes) of an artifact whose every value is finite. Raises ArtifactError."""
    data = read_bytes(path)
    tensors, meta = with_path(path, decode_artifact, data)
    for name, t in tensors.items():
        check_values(name, t)
    return tensors, meta, data


def read_exported(path: str | Path) -> tuple[dict[str, StoredTensor], dict]:
    """(tensors, meta) of a model that was exported to safetensors, all in bf16. Raises ArtifactError."""
    try:
        values, meta, _ = find_conversions().safetensors_files.read(path)
    except Foreseen as e:
        raise ArtifactError(str(e)) from None
    return {name: StoredTensor(x.shape, {"kind": "bf16"}, x, None) for name, x in values.items()}, meta


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="pack.py", description="Inspect, verify, weigh and export model artifacts.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("inspect", help="what each byte of the file is spent on")
    p.add_argument("file")
    p.add_argument("--json", action="store_true", help="as JSON, with the configuration")
    p = commands.add_parser("verify", help="check that the file is sound, canonical and made from a checkpoint")
    p.add_argument("file")
    p.add_argument("--against", metavar="CHECKPOINT", help="a folder that the trainer wrote")
    p = commands.add_parser("budget", help="bytes of model and code against a cap; exit status 1 when over")
    p.add_argument("file")
    p.add_argument("--code", nargs="+", metavar="FILE", help="default: the one file that this program is submitted as")
    p.add_argument("--cap", type=int, default=DEFAULT_CAP, help="bytes (default %(default)s)")
    p.add_argument("--model-only", action="store_true", help="report the code, count only the model (the CPU track)")
    p = commands.add_parser("export", help="write the model in another program's format, or read it from one")
    p.add_argument("file", help="an artifact; with --from a safetensors file as docs/export.md describes it")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=("safetensors", "gguf"), help="dense bf16, or GGUF's tensor types; exact values")
    way.add_argument("--from", dest="source", choices=("safetensors",),
                     help="make a dense float model what training starts from (--init-from)")
    p.add_argument("--blocks", choices=("TQ1_0", "TQ2_0"), help="GGUF's type of ternary matrices: TQ1_0, the smaller "
                   "(default), or TQ2_0, made for speed")
    p.add_argument("--reblock", action="store_true", help="GGUF: also matrices with several scales in a block of 256, "
                   "which changes them by an error that is printed; without it they stay exact, in bf16")
    p.add_argument("--tokenizer", metavar="PATH", help="with --to, to put in: a .model file, or the folder of the data")
    p.add_argument("-o", "--out", metavar="OUT", help="file to write (default: FILE, its suffix the format's, or "
                   ".checkpoint.safetensors)")
    p.add_argument("--force", action="store_true", help="overwrite it")
    args = parser.parse_args(argv)
    if args.command == "export" and args.to != "gguf" and (args.reblock or args.blocks):
        parser.error("--blocks and --reblock are for --to gguf")
    if args.command == "export" and args.source and args.tokenizer:
        parser.error("--tokenizer is for --to: a model that is read has its own")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.command == "inspect":
            found = with_path(args.file, describe, read_bytes(args.file))
            print(json.dumps(found, indent=1, sort_keys=True) if args.json else inspect_text(found))
        elif args.command == "verify":
            print("\n".join(verify(args.file, args.against)))
        elif args.command == "export":
            conversions = find_conversions()
            lines = conversions.import_dense(args) if args.source else conversions.export(args, read_sound)
            print("\n".join(lines))
        else:
            b = budget(args.file, args.code, args.cap, not args.model_only)
            counted = "" if b.count_code else " (not counted)"
            print(f"bytes_model {b.bytes_model:,}\nbytes_code {b.bytes_code:,}{counted}\nbytes_total {b.total:,}")
            print(f"cap {b.cap:,}\nmargin {b.margin:,}\n{'FITS' if b.fits else 'OVER'}")
            return 0 if b.fits else 1
        return 0
    except (ValueError, OSError) as e:  # ArtifactError and CheckpointError are ValueErrors
        say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
