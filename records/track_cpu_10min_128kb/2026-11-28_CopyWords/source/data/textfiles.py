"""Reading text files for data/prepare.py: compression, encodings, lines, and the cutting of long documents."""

import bz2
import codecs
import contextlib
import io
import itertools
import json
import lzma
import re
import shlex
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tern.shards import DataError

SPLIT_BYTES = 65_536  # text: cut longer documents at a blank line past this size
LINE_BYTES = 2 * SPLIT_BYTES  # text: cut longer lines
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines
TEXT_RULES = 2  # counts the changes of how text files become documents, so that folders of an older rule are rebuilt
BLOCK_BYTES = 1 << 18
UNPACK = {".zst": "zstd -dc", ".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}
MAGIC = {".gz": (b"\x1f\x8b",), ".bz2": (b"BZh",), ".zst": (b"\x28\xb5\x2f\xfd",),
         ".xz": (b"\xfd7zXZ\x00", b"\x5d\0\0")}  # how each begins; the second of .xz is what older programs wrote
WINDOW_LIMIT = 1 << 31  # bytes; the largest window that zstd can be told to accept (--long=31)


def text_kind(path: Path) -> str:
    """.txt or .jsonl, whatever the case of the name and the compression. Raises DataError for another file."""
    inner = path.with_suffix("") if path.suffix.lower() in UNPACK else path
    kind = inner.suffix.lower() or inner.name.lower()  # a hidden file may be all suffix
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{path}: not a .txt or .jsonl file (either also as {', '.join(UNPACK)}); rename or convert it")
    return kind


def unpacker(path: Path) -> Callable:
    """A function that makes a decoder for one frame, member or stream of a compressed file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    if suffix == ".bz2":
        return bz2.BZ2Decompressor
    if suffix == ".xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO)  # also what older programs wrote
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT).decompressobj


def zstd_window(start: bytes) -> int:
    """Bytes of the window that the header of a zstd frame asks for (RFC 8878, 3.1.1.1.2); 0 if it asks for none."""
    if len(start) < 6 or start[4] & 0x20:
        return 0
    base = 1 << (10 + (start[5] >> 3))
    return base + base // 8 * (start[5] & 7)


def unpack_fault(path: Path, start: bytes, error: Exception) -> str:
    """Why a compressed file cannot be read, from the first bytes of the frame and what its decoder says."""
    reason = str(error) or type(error).__name__
    if path.suffix.lower() == ".zst":
        import zstandard

        window = zstd_window(start)
        if window > WINDOW_LIMIT:
            return (f"{path}: needs a zstd window of {window >> 20:,} MiB, more than the {WINDOW_LIMIT >> 20:,} MiB "
                    "that can be read; pack it again with zstd --long=31 or less")
        if "memory" in reason or isinstance(error, MemoryError):
            return (f"{path}: needs {window >> 20:,} MiB of memory for its zstd window, more than this machine gives; "
                    "pack it again with a smaller window, or use a larger machine")
        with contextlib.suppress(zstandard.ZstdError):
            if number := zstandard.get_frame_parameters(start).dict_id:
                return (f"{path}: needs the zstd dictionary with id {number}; unpack it first: "
                        f"zstd -d -D DICTIONARY {shlex.quote(str(path))}")
    if isinstance(error, MemoryError):
        return f"{path}: unpacking needs more memory than this machine gives; use a larger one"
    kind = path.suffix.lower()[1:].replace("zst", "zstd")
    if not start.startswith(MAGIC[path.suffix.lower()]):
        return f"{path}: damaged {kind} data, or none at all ({reason[:200]}); {perhaps_plain(path)}"
    return f"{path}: damaged {kind} data ({reason[:200]}); fetch the file again"


def perhaps_plain(path: Path) -> str:
    """What to do about a packed file that does not begin as one."""
    return f"fetch the file again, or leave {path.suffix} out of its name if it is plain text"


def unpacked(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """The bytes in a compressed file. Raises DataError where it is damaged or ends too early."""
    errors = (ValueError, OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError)
    if path.suffix.lower() == ".zst":
        import zstandard

        errors += (zstandard.ZstdError,)
    make, decoder, start = unpacker(path), None, b""
    padded = path.suffix.lower() in (".gz", ".xz")  # zeros may follow a member: tapes, xz padding
    while chunk := file.read(512):  # small, because a few bytes can stand for a hundred thousand times as many
        while chunk:
            if decoder is None:
                if padded and start and not (chunk := chunk.lstrip(b"\0")):
                    break
                decoder, start = make(), b""
            start += chunk[: 18 - len(start)]  # the longest header of a zstd frame
            try:
                text = decoder.decompress(chunk)
            except errors as error:
                raise DataError(unpack_fault(path, start, error)) from None
            if text:
                yield text
            chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None or not start:
        kind = path.suffix.lower()[1:].replace("zst", "zstd")
        mend = "fetch the file again"
        if start and not start.startswith(MAGIC[path.suffix.lower()]):  # too short for its decoder to know
            mend = perhaps_plain(path)
        raise DataError(f"{path}: the {kind} data ends before its last frame does; {mend}")


def byte_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a plain or compressed file in blocks of about BLOCK_BYTES."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() not in UNPACK:
                while block := file.read(BLOCK_BYTES):
                    yield block
                return
            held, size = [], 0
            for part in unpacked(path, file):
                held.append(part)
                size += len(part)
                if size >= BLOCK_BYTES:
                    yield b"".join(held)
                    held, size = [], 0
            yield b"".join(held)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its disk") from None


def wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 by its mark or by where its zeros stand; empty for other text."""
    for mark, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                       (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if head.startswith(mark):
            return name
    quarter = len(head) // 4
    if not quarter:
        return ""
    zeros = [head[place : 4 * quarter : 4].count(0) / quarter for place in range(4)]
    for name, full in (("UTF-32LE", (2, 3)), ("UTF-32BE", (0, 1)), ("UTF-16LE", (1, 3)), ("UTF-16BE", (0, 2))):
        other = {"UTF-32LE": (0,), "UTF-32BE": (3,), "UTF-16LE": (0, 2), "UTF-16BE": (1, 3)}[name]
        if all(zeros[place] > 0.4 for place in full) and all(zeros[place] < 0.1 for place in other):
            return name
    return ""


def encoding_fault(path: Path, line: int, encoding: str, data: bytes = b"", error: UnicodeDecodeError | None = None
                   ) -> DataError:
    """The error for text that is not UTF-8: what it probably is, and the command that converts it.

    data holds the bytes around error.start; encoding is known for UTF-16 and UTF-32 and else found from them.
    """
    kind, quoted = text_kind(path), shlex.quote(str(path))
    reason = f"byte {error.start}: {error.reason}" if error else "by its first bytes"
    flags, near = f"-f {encoding}", data[error.start : error.start + 4_096] if error else b""
    high = sum(byte >= 0x80 for byte in near) / max(1, len(near))
    guess = encoding
    if not encoding:
        before = data[max(0, error.start - 65_536) : error.start]
        if error.reason == "unexpected end of data" and error.end == len(data):
            guess, flags = "UTF-8 that ends inside a character, so perhaps cut short", "-c -f UTF-8"
        elif any(byte >= 0x80 for byte in before):
            guess, flags = "UTF-8 with damaged bytes, which this leaves out", "-c -f UTF-8"
        elif high > 0.3 and len(near) >= 32:
            guess, flags = "GB18030, SHIFT_JIS, EUC-KR, WINDOWS-1251 or the like", "-f NAME"
        else:
            guess = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in near) else "ISO-8859-1 (Latin-1)"
            flags = f"-f {guess.split()[0]}"
    command = f"iconv {flags} -t UTF-8 {quoted}"
    if path.suffix.lower() in UNPACK:
        command = f"{UNPACK[path.suffix.lower()]} {quoted} | iconv {flags} -t UTF-8"
    return DataError(f"{path}:{line}: not UTF-8 ({reason}), probably {guess}; convert it: {command} > utf8{kind}")


def utf8_blocks(path: Path) -> Iterator[bytes]:
    """Blocks of a file that is not in UTF-16 or UTF-32, without the mark that may stand before UTF-8."""
    first = True
    for block in byte_blocks(path):
        if first and block:
            first = False
            if encoding := wide_encoding(block[:4_096]):
                raise encoding_fault(path, 1, encoding)
            block = block.removeprefix(codecs.BOM_UTF8)
        yield block


def line_ends(data: bytes) -> int:
    """How many line ends: \\n, \\r\\n and a lone \\r."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def decoded_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks. Raises DataError that names the line where it is not UTF-8."""
    held, line = b"", 1
    for block in itertools.chain(utf8_blocks(path), [None]):
        data = held + (block or b"")
        # A character or a \r\n may be cut by the end of the block; what is cut waits for the next one.
        ends = len(data) - 1 if block is not None and data.endswith(b"\r") else len(data)
        try:
            text, used = codecs.utf_8_decode(data[:ends], "strict", block is None)
        except UnicodeDecodeError as error:
            number = line + line_ends(data[: error.start])
            raise encoding_fault(path, number, "", data, error) from None
        line, held = line + line_ends(data[:used]), data[used:]
        yield text


LINE_END = re.compile(r"\r\n|\n|\r(?!\Z)")  # a \r at the end of a block may be half of a \r\n


def joined(text: str, place: int) -> bool:
    """Whether the character at place belongs to the one before it: a combining mark, a joiner and what it joins."""
    return unicodedata.category(text[place]).startswith("M") or "\u200d" in text[place - 1 : place + 1]


def cut_place(text: str, limit: int, back: int) -> int:
    """Where to cut so that at most `limit` bytes stand before: in the last `back` characters after a line end, else
    after white space, else between two characters."""
    place = len(text[:limit].encode("utf-8")[:limit].decode("utf-8", "ignore"))
    if place == len(text):
        return place
    if text[place - 1 : place + 1] == "\r\n" and place > 1:
        place -= 1
    start = max(0, place - back)
    end = max(text.rfind("\n", start, place), text.rfind("\r", start, place))
    if end >= 0:
        return end + 1
    for index in range(place - 1, start, -1):
        if text[index].isspace():
            return index + 1
    for index in range(place, max(1, place - 32), -1):
        if not joined(text, index):
            return index
    return place


def short_lines(line: str) -> Iterator[str]:
    """The line, in pieces of at most LINE_BYTES."""
    start = 0
    while 4 * (len(line) - start) > LINE_BYTES:  # a character has at most four bytes
        window = line[start : start + LINE_BYTES + 64]
        if len(window.encode("utf-8")) <= LINE_BYTES:
            break
        place = cut_place(window, LINE_BYTES, 8_192)
        yield window[:place]
        start += place
    yield line[start:]


def text_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends (\\n, \\r\\n or a lone \\r) of a text that comes in blocks; long ones in pieces."""
    held = ""
    for block in blocks:
        held += block
        start = 0
        for match in LINE_END.finditer(held):
            yield from short_lines(held[start : match.end()])
            start = match.end()
        held = held[start:]
        # A line whose end is still to come is cut where it would be cut as a whole.
        while len(held) > LINE_BYTES + 64:
            place = cut_place(held, LINE_BYTES, 8_192)
            yield held[:place]
            held = held[place:]
    if held:
        yield from short_lines(held)


def split_document(lines: Iterable[str]) -> Iterator[str]:
    """Cut at the first blank line after SPLIT_BYTES, at any line after twice that, and where a long line was cut."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line.encode("utf-8"))
        if size >= 2 * SPLIT_BYTES or (size >= SPLIT_BYTES and (not line.strip() or line[-1] not in LINE_ENDS)):
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file. They end with \\n, or with \\r too where the first line does and is JSON by itself."""
    pattern, held, number, carried = None, [], 0, b""
    for part in itertools.chain(utf8_blocks(path), [None]):
        block, carried = carried + (part or b""), b""
        if block.endswith(b"\r") and part is not None:  # perhaps half of a \r\n
            block, carried = block[:-1], b"\r"
        if pattern is None and (first := re.search(rb"\r\n|\n|\r", block)):
            line = b"".join([*held, block[: first.start()]])
            pattern = rb"\r\n|\n|\r" if first[0] == b"\r" and (not line.strip() or is_json(line)) else rb"\n"
        *lines, rest = re.split(pattern, block) if pattern else [block]
        for line in lines:
            number += 1
            yield number, b"".join([*held, line])
            held = []
        held.append(rest)
    if held := b"".join(held):
        yield number + 1, held


# Python refuses integers of thousands of digits. The fields that may hold them are not used: any number will do.
RECORDS = json.JSONDecoder(parse_int=len)
MARKS = re.compile(b"(?:%s)+" % codecs.BOM_UTF8)


def unmarked(line: bytes) -> bytes:
    """The line without the marks before it: files that were put together keep theirs."""
    marks = MARKS.match(line)
    return line[marks.end() :] if marks else line


def is_json(line: bytes) -> bool:
    try:
        RECORDS.decode(unmarked(line).decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return False
    return True


def record_text(line: bytes, path: Path, number: int) -> str:
    """The "text" of one JSON line. Raises DataError that names file and line."""
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_fault(path, number, "", line, error) from None
    try:
        record = RECORDS.decode(content)
        text = record["text"]
        text.encode("utf-8")  # JSON can spell half a surrogate pair, UTF-8 cannot
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, UnicodeEncodeError):
            reason = f"half a surrogate pair at character {error.start}"
        elif isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, KeyError):
            reason = f"its keys are {', '.join(repr(key[:30]) for key in list(record)[:8])}"
        elif isinstance(error, AttributeError):
            reason = f'its "text" is of the type {type(text).__name__}'
        elif isinstance(error, TypeError):
            reason = f"it is of the type {type(record).__name__}"
            reason += "; write its items with: jq -c '.[]'" if isinstance(record, list) else ""
        raise DataError(f'{path}:{number}: not a JSON object with a "text" string ({reason[:200]}); mend that line or '
                        "leave it out") from None
    return text


def text_documents(paths: list[Path]) -> Iterator[str]:
    """One document per .txt file or per .jsonl line, either of them also compressed; long ones in pieces."""
    for path in paths:
        if text_kind(path) == ".txt":
            yield from split_document(text_lines(decoded_blocks(path)))
            continue
        for number, line in json_lines(path):
            records = [line]
            if b"\r" in line.strip() and not is_json(line):
                records = line.split(b"\r")  # a file whose lines end in more than one way
            for record in filter(bytes.strip, map(unmarked, records)):
                text = record_text(record, path, number)
                if 4 * len(text) < SPLIT_BYTES:  # in bytes too, so it is not cut
                    yield text
                    continue
                lines = text.splitlines(keepends=True)
                yield from split_document(piece for line in lines for piece in short_lines(line))
