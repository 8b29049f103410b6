"""data/prepare.py: text as it exists, whatever its line ends, compression, encoding, script, size or repetition."""

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import messages, prepare, textfiles
from tern.shards import DataError, read_shard

fast = pytest.mark.fast


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(count))


def run(tmp_path: Path, name: str, data: bytes | str, *options: object) -> dict:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    assert prepare.main(["--source", "text", "--input", str(path), "--out", str(tmp_path / "out"),
                         *map(str, options or ("--vocab-size", 300))]) == 0
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def fails(tmp_path: Path, capsys, name: str, data: bytes | str, *options: object) -> str:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    assert prepare.main(["--source", "text", "--input", str(path), "--out", str(tmp_path / "out"),
                         *map(str, options or ("--vocab-size", 300))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return error


def read_back(out: Path, split: str) -> list[str]:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokens = np.concatenate([read_shard(path) for path in sorted(out.glob(f"*_{split}_*.bin"))]).astype(int)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def molecule(rng: random.Random) -> str:
    groups = ["C", "C", "CC", "O", "N", "c1ccccc1", "C(=O)", "C(C)", "C(=O)O", "N(C)C", "S(=O)(=O)", "F", "Cl",
              "[C@@H]", "C1CCNCC1", "c1ccncc1", "C#N", "Br", "/C=C/"]
    return "".join(rng.choices(groups, k=rng.randint(4, 14)))


# ---------------------------------------------------------------- compression

JSONL = "".join(json.dumps({"text": words(random.Random(i), 40)}) + "\n" for i in range(60)).encode()


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A53, len(data)) + data


def long_window(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACKED = {
    "plain": ("a.jsonl", lambda data: data),
    "upper case": ("A.JSONL", lambda data: data),
    "zstd": ("a.jsonl.zst", zst),
    "zstd, window of 2 GiB": ("a.jsonl.zst", long_window),
    "zstd, many frames": ("a.jsonl.zst", lambda d: b"".join(zst(d[i:i + 700]) for i in range(0, len(d), 700))),
    "zstd, skippable": ("a.jsonl.zst", lambda d: skippable(b"hello") + zst(d[:999]) + skippable(b"") + zst(d[999:])),
    "zstd, empty frame": ("a.jsonl.zst", lambda d: zst(b"") + zst(d) + zst(b"")),
    "gzip": ("A.Jsonl.GZ", gzip.compress),
    "gzip, two members and zeros": ("a.jsonl.gz", lambda d: gzip.compress(d[:99]) + gzip.compress(d[99:]) + bytes(600)),
    "bzip2": ("a.jsonl.bz2", bz2.compress),
    "bzip2, two streams": ("a.jsonl.bz2", lambda data: bz2.compress(data[:99]) + bz2.compress(data[99:])),
    "xz": ("a.jsonl.xz", lzma.compress),
    "xz, the older format": ("a.jsonl.xz", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    "hidden": (".jsonl", lambda data: data),
    "hidden and packed": (".jsonl.gz", gzip.compress),
    "xz, two streams and padding": ("a.jsonl.xz", lambda d: lzma.compress(d[:99]) + bytes(4) + lzma.compress(d[99:])),
}


@fast
@pytest.mark.parametrize("kind", PACKED)
def test_compressed_files_hold_what_was_packed(tmp_path, kind):
    name, pack = PACKED[kind]
    (tmp_path / name).write_bytes(pack(JSONL))
    assert list(textfiles.text_documents([tmp_path / name])) == [
        json.loads(line)["text"] for line in JSONL.splitlines()]


@fast
def test_a_zstd_frame_that_needs_a_dictionary_says_so(tmp_path, capsys):
    dictionary = zstandard.train_dictionary(2_000, [JSONL[i:i + 300] for i in range(0, len(JSONL), 300)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(JSONL)
    error = fails(tmp_path, capsys, "a.jsonl.zst", packed)
    assert f"needs the zstd dictionary with id {dictionary.dict_id()}" in error
    assert "zstd -d -D" in error


@fast
def test_a_zstd_window_that_nobody_can_hold_says_how_large_it_is(tmp_path, capsys):
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (32 - 10) << 3) + b"\x01\x00\x00"
    error = fails(tmp_path, capsys, "a.jsonl.zst", frame)
    assert "4,096 MiB" in error
    assert "2,048 MiB" in error


@fast
def test_memory_that_is_denied_says_how_much(tmp_path):
    packed = long_window(JSONL)
    message = textfiles.unpack_fault(Path("a.zst"), packed[:18], MemoryError())
    assert "needs 2,048 MiB of memory" in message


@fast
@pytest.mark.parametrize("suffix", ["zst", "gz", "bz2", "xz"])
def test_damaged_compressed_files_are_one_error(tmp_path, capsys, suffix):
    pack = {"zst": zst, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix]
    whole = pack(JSONL)
    middle = len(whole) // 2
    for data in (whole[:-3], whole + pack(JSONL)[:7], whole + b"not zero", b"",
                 whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1:]):
        error = fails(tmp_path, capsys, f"a.jsonl.{suffix}", data)
        assert "fetch the file again" in error and f"a.jsonl.{suffix}: " in error
    for size in (1, 10, 3_000, len(JSONL)):
        error = fails(tmp_path, capsys, f"a.jsonl.{suffix}", JSONL[:size])
        assert "fetch the file again" in error
        assert f"or leave .{suffix} out of its name if it is plain text" in error


def test_a_bomb_is_read_in_bounded_pieces(tmp_path):
    """100 MB of one letter in 10 kB: the blocks stay small."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(compressor.compress(b"a" * 1_000_000) for _ in range(100)) + compressor.flush()
    (tmp_path / "a.txt.gz").write_bytes(packed)
    (tmp_path / "a.txt.zst").write_bytes(zst(b"a" * 100_000_000))
    for name in ("a.txt.gz", "a.txt.zst"):
        sizes = [len(block) for block in textfiles.byte_blocks(tmp_path / name)]
        assert sum(sizes) == 100_000_000
        assert max(sizes) < 40_000_000


# ---------------------------------------------------------------- lines


@fast
def test_json_lines_with_any_line_end(tmp_path):
    lines = JSONL.splitlines()
    blank = b"\n\n \t\r\n\n"
    for data in (JSONL, b"\r".join([*lines, b""]), b"\r\n".join(lines), b"\n".join(lines),
                 b"\n".join([lines[0], b"\r".join(lines[1:20]), *lines[20:]]),
                 blank + blank.join(lines) + blank, b"\xef\xbb\xbf" + JSONL):
        (tmp_path / "a.jsonl").write_bytes(data)
        assert list(textfiles.text_documents([tmp_path / "a.jsonl"])) == [json.loads(line)["text"] for line in lines]


@fast
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_marks_between_files_and_fields_that_nobody_uses(tmp_path, end):
    mark, lines = codecs.BOM_UTF8, JSONL.splitlines()[:4]
    (tmp_path / "a.jsonl").write_bytes(mark + lines[0] + end + mark + lines[1] + end + mark + end  # an empty file
                                       + mark + mark + lines[2] + end + lines[3])
    assert list(textfiles.text_documents([tmp_path / "a.jsonl"])) == [json.loads(line)["text"] for line in lines]
    numbers = b"[" + b"1" * 5_000 + b", -" + b"9" * 5_000 + b", 1e999, 0." + b"3" * 5_000 + b"]"
    record = b'{"text": "one",%s "n": %s}' % (b"\r" if end == b"\n" else b"", numbers)
    (tmp_path / "a.jsonl").write_bytes((record + end) * 3)
    assert list(textfiles.text_documents([tmp_path / "a.jsonl"])) == ["one"] * 3


LONG_RECORDS = {
    "number": ('{"text": ' + "1" * 5_000 + "}", 'its "text" is of the type int'),
    "lone number": ("1" * 5_000, "it is of the type int"),
    "surrogate": ('{"text": "' + "x" * 100_000 + '\\ud800"}', "half a surrogate pair at character 100000"),
    "key": ('{"' + "k" * 300_000 + '": "a"}', "its keys are 'kkk"),
    "keys": (json.dumps({f"{n:040}": 1 for n in range(900)}), "its keys are '000"),
    "depth": ('{"n": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "open string": ('{"text": "' + "x" * 300_000, "Unterminated string"),
}


@fast
@pytest.mark.parametrize("kind", LONG_RECORDS)
def test_an_error_does_not_carry_the_document(tmp_path, capsys, kind):
    record, reason = LONG_RECORDS[kind]
    error = fails(tmp_path, capsys, "a.jsonl", record)
    assert reason in error
    assert "mend that line or leave it out" in error
    assert len(error.replace(str(tmp_path), "")) < 400


@fast
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_errors_name_the_line_at_any_place_of_a_block(tmp_path, monkeypatch, name):
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 7)
    line = b'{"text": "abc"}'
    for end in (b"\n", b"\r", b"\r\n"):
        for before in (0, 1, 2, 20):
            (tmp_path / name).write_bytes((line + end) * before + b'{"text": "\xff"}' + end + line)
            with pytest.raises(DataError, match=rf"{name}:{before + 1}: not UTF-8"):
                list(textfiles.text_documents([tmp_path / name]))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("a b\né🤖\r\u0301\u2028"), max_size=60), block=st.integers(1, 9))
def test_blocks_change_no_text(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "BLOCK_BYTES", block)
        patch.setattr(textfiles, "LINE_BYTES", 16)
        small = list(textfiles.text_lines(textfiles.decoded_blocks(path)))
        patch.setattr(textfiles, "BLOCK_BYTES", 1 << 20)
        large = list(textfiles.text_lines(textfiles.decoded_blocks(path)))
    assert small == large, "lines depend on the text alone"
    assert "".join(large) == text
    assert not any(first.endswith("\r") and second.startswith("\n")
                   for first, second in zip(large, large[1:], strict=False) if len(first) < 16)


def test_ordinary_text_is_cut_as_before():
    """The rule of the first version, for lines that are not too long."""
    rng = random.Random(4)
    lines = [rng.choice([words(rng, rng.randint(1, 400)), "", " ", "x" * rng.randint(1, 100_000)]) + end
             for end in rng.choices(["\n", "\r\n"], k=300)]
    expected, held, size = [], [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= 131_072 or (size >= 65_536 and not line.strip()):
            expected.append("".join(held))
            held, size = [], 0
    expected += ["".join(held)] if held else []
    text = "".join(lines)
    blocks = [text[i:i + 1_000] for i in range(0, len(text), 1_000)]
    assert list(textfiles.split_document(textfiles.text_lines(["".join(blocks)]))) == expected
    assert len(expected) > 10


@pytest.mark.parametrize(("kind", "name"), [("spaces", "a.txt"), ("none", "a.txt"), ("wide", "a.txt"),
                                            ("marks", "a.txt"), ("CR", "a.txt"), ("wide", "a.jsonl")])
def test_a_line_of_megabytes_is_cut_where_it_hurts_least(tmp_path, kind, name):
    rng = random.Random(2)
    text = {"spaces": words(rng, 200_000), "none": "".join(rng.choices("abcdef", k=1_000_000)),
            "wide": "".join(rng.choices("日本語テキスト", k=400_000)), "CR": words(rng, 200_000).replace(" ", "\r"),
            "marks": "".join(rng.choices(["e\u0301\u0323", "👩\u200d🔬", "o\u0308"], k=100_000))}[kind]
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text, newline="")
    parts = list(textfiles.text_documents([tmp_path / name]))
    assert "".join(parts) == text
    assert all(60_000 < len(part.encode()) < 131_072 + 100 for part in parts[:-1])
    assert len(parts) > 4
    for part, following in zip(parts, parts[1:], strict=False):
        if kind == "spaces":
            assert part.endswith(" ")
        if kind == "marks":
            assert following[0] in "e👩o"


def test_cutting_a_long_line_takes_linear_time(tmp_path):
    """A second of processor time for 100 MB; work on the whole rest for every piece takes ten."""
    line, began = "abcdefghij" * 10_000_000, time.process_time()
    assert sum(map(len, textfiles.short_lines(line))) == len(line)
    assert time.process_time() - began < 5
    began = time.process_time()
    assert sum(map(len, textfiles.text_lines(line[i:i + 250_000] for i in range(0, len(line), 250_000)))) == len(line)
    assert sum(map(len, prepare.cut_finer([line[:20_000_000]], 1_024))) == 20_000_000
    assert time.process_time() - began < 5


@fast
def test_a_windows_line_end_is_never_cut_in_two():
    text = "ab\r\n" * 9
    for limit in range(2, 30):
        assert text[textfiles.cut_place(text, limit, limit // 2)] != "\n"
        parts = list(prepare.cut_finer([text], limit))
        assert "".join(parts) == text
        assert not any(part.startswith("\n") for part in parts)


# ---------------------------------------------------------------- encodings


@fast
@pytest.mark.parametrize(("encoding", "name", "text"), [
    ("utf-16", "UTF-16", "plain words"), ("utf-16-le", "UTF-16LE", "plain words"),
    ("utf-16-be", "UTF-16BE", "plain words"), ("utf-32", "UTF-32", "plain words"),
    ("utf-32-le", "UTF-32LE", "plain words"), ("latin-1", "ISO-8859-1", "naïve café crème"),
    ("cp1252", "WINDOWS-1252", "it’s “quoted” text"), ("gb18030", "GB18030", "中文编码测试文本" * 9),
    ("shift_jis", "SHIFT_JIS", "日本語のテスト" * 9), ("cp1251", "WINDOWS-1251", "русский текст " * 9)])
def test_other_encodings_are_named_with_the_command_that_converts_them(tmp_path, capsys, encoding, name, text):
    for suffix in (".txt", ".jsonl", ".txt.gz"):
        data = json.dumps({"text": text}, ensure_ascii=False) if suffix == ".jsonl" else text + "\n" + text
        data = data.encode(encoding)
        error = fails(tmp_path, capsys, "a b" + suffix, gzip.compress(data) if suffix.endswith("gz") else data)
        assert name in error
        assert f"a b{suffix}:1: not UTF-8" in error
        assert "iconv -f " in error
        assert f"'{tmp_path}/a b{suffix}'" in error
        assert ("gzip -dc '" in error) == suffix.endswith("gz")


@fast
def test_damaged_and_cut_utf8_are_told_from_other_encodings(tmp_path, capsys):
    assert "damaged bytes" in fails(tmp_path, capsys, "a.txt", "é ü\n".encode() * 9 + b"\xff\n")
    assert "cut short" in fails(tmp_path, capsys, "a.txt", "plain and é".encode()[:-1])


# ---------------------------------------------------------------- sizes and repetition


@pytest.mark.parametrize("size", [3_000, 50_000, 400_000])
def test_one_small_file_gives_training_and_validation(tmp_path, capsys, size):
    text = "\n".join(words(random.Random(i), 12) for i in range(size // 70))[:size]
    manifest = run(tmp_path, "a.txt", text)
    notes = manifest["notes"]["pieces"]
    assert "too few documents" in capsys.readouterr().out
    assert notes["bytes"] == max(1_024, int(len(text) * 0.025 / 4))
    parts = read_back(tmp_path / "out", "val") + read_back(tmp_path / "out", "train")
    assert sum(map(len, parts)) == len(text)
    assert sorted("".join(parts)) == sorted(text)
    assert notes["pieces"] == len(parts)
    assert all(part.endswith("\n") for part in parts if part != text[-len(part):])
    assert 0 < manifest["splits"]["val"]["bytes"] < max(2_000, 0.2 * size)


def test_a_forced_split_is_the_smallest_digest(tmp_path):
    texts = [words(random.Random(i), 60) for i in range(3)]
    manifest = run(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts),
                   "--vocab-size", 280, "--val-fraction", 1e-9)
    assert manifest["notes"] == {"forced_validation_documents": 1}
    assert read_back(tmp_path / "out", "val") == [min(texts, key=lambda text: hashlib.sha256(
        text.encode()).digest())]


def test_all_validation_leaves_one_for_training(tmp_path):
    texts = [words(random.Random(i), 60) for i in range(4)]
    manifest = run(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts),
                   "--vocab-size", 270, "--val-fraction", 0.999999)
    assert manifest["splits"]["train"]["documents"] == 1
    assert manifest["splits"]["val"]["documents"] == 3


@fast
@pytest.mark.parametrize(("data", "message"), [
    ("hi", "documents: 1, of 2 bytes"),
    ("a line\n" * 9, "documents: 1, of 63 bytes"),
    ("", "holds no text"), (" \n\t\n", "holds no text"),
])
def test_too_little_text_is_said_in_numbers(tmp_path, capsys, data, message):
    assert message in fails(tmp_path, capsys, "a.txt", data)


def test_wholly_repeated_text_is_said_in_numbers(tmp_path, capsys):
    error = fails(tmp_path, capsys, "a.jsonl", '{"text": "the same line"}\n' * 500)
    assert "exact duplicates left out: 499" in error
    error = fails(tmp_path, capsys, "a.txt", "the same line again\n" * 5_000)
    assert "no training text is left" in error
    assert "more were exact duplicates" in error


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, capsys, monkeypatch):
    real = textfiles.decoded_blocks

    def grown(path):
        yield from real(path)
        with path.open("a") as file:
            file.write("more")

    monkeypatch.setattr(textfiles, "decoded_blocks", grown)
    assert "was changed while it was read" in fails(tmp_path, capsys, "a.txt", words(random.Random(0), 900))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_an_input_that_is_no_file_is_refused(tmp_path, capsys, kind):
    path = tmp_path / "a.txt"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert prepare.main(["--source", "text", "--input", str(path), "--out", str(tmp_path / "out")]) == 1
    assert ("a folder" if kind == "folder" else "not a regular file") in capsys.readouterr().err


# ---------------------------------------------------------------- the tokenizer's trainer


def pieces(model: bytes) -> list[str]:
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]


@pytest.mark.parametrize("kind", ["smiles", "protein", "base64", "one line", "emoji"])
def test_text_without_spaces_gets_the_lone_space_piece(tmp_path, kind):
    rng = random.Random(3)
    text = {"smiles": "\n".join(molecule(rng) for _ in range(6_000)),
            "protein": "".join(f">P{i}|HUMAN\n" + "\n".join("".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=60))
                                                          for _ in range(6)) + "\n" for i in range(300)),
            "base64": codecs.encode(rng.randbytes(100_000), "base64").decode(),
            "one line": "".join(rng.choices("ACGT", k=300_000)),
            "emoji": "".join(chr(0x1F300 + rng.randint(0, 30)) * rng.randint(1, 3) for _ in range(20_000))}[kind]
    run(tmp_path, "a.txt", text, "--vocab-size", 320)
    tokenizer = prepare.load_tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.decode(tokenizer.encode("C C\tx  y\n")) == "C C\tx  y\n"
    assert sorted("".join(read_back(tmp_path / "out", "val") + read_back(tmp_path / "out", "train"))) == sorted(text)


def test_text_with_spaces_is_trained_once(monkeypatch):
    calls, real = [], prepare.train_pieces
    monkeypatch.setattr(prepare, "train_pieces", lambda *a: calls.append(a[2]) or real(*a))
    prepare.train_tokenizer([words(random.Random(0), 500)], 300)
    assert calls == ["\n"]
    prepare.train_tokenizer(["".join(random.Random(0).choices("abc", k=9_000))], 300)
    assert calls == ["\n", "\n", "\n▁"]


@pytest.mark.parametrize("mark", ["\t", "\u2585", "\0"])
def test_the_trainer_sees_what_stands_beside_a_character_it_cannot_take(mark):
    documents = [f"{mark}zebra quagga zebra quagga {mark} zebra{mark}quagga" for _ in range(50)]
    found = pieces(prepare.train_tokenizer(documents, 280)[0])
    assert "▁zebra" in found
    assert mark not in "".join(found)


def test_long_runs_without_spaces_are_cut_for_the_trainer():
    run_of = prepare.TRAINER_RUN
    short = "x" * run_of + " " + "y" * run_of
    assert list(prepare.trainer_parts(short)) == [short]
    long = "ab " + "x" * 60_000 + "\n" + "y" * 200_000 + " end"
    parts = list(prepare.trainer_parts(long))
    assert "".join(parts) == long
    assert parts[0].endswith("x\n"), "at a line end"
    assert all(len(word) <= run_of for part in parts for word in part.split(" "))
    assert len(parts) == 5


@pytest.mark.parametrize("vocab_size", [300, 700, 1_024])
def test_an_alphabet_larger_than_the_vocabulary(tmp_path, capsys, vocab_size):
    rng = random.Random(1)
    letters = [chr(0x4E00 + i) for i in range(3_000)]
    text = "".join(rng.choices(letters, [1 / (i + 3) for i in range(3_000)], k=60_000))
    documents = [text[i:i + 500] for i in range(0, len(text), 500)]
    manifest = run(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents),
                   "--vocab-size", vocab_size)
    share = manifest["notes"]["alphabet_share"]
    assert {300: share < 0.5, 700: 0.5 < share < 0.9, 1_024: 0.6 < share < 0.95}[vocab_size]
    assert f"{share:.1%} of the text" in capsys.readouterr().out
    assert manifest["tokenizer"]["vocab_size"] == vocab_size
    assert sorted(read_back(tmp_path / "out", "val") + read_back(tmp_path / "out", "train")) == sorted(documents)


def test_a_vocabulary_that_cannot_be_filled_is_told_the_largest(tmp_path, capsys):
    data = "".join(json.dumps({"text": f"abc {i}"}) + "\n" for i in range(400))
    error = fails(tmp_path, capsys, "a.jsonl", data, "--vocab-size", 1_024)
    assert "--vocab-size 1024 is more pieces" in error
    largest = error.split("give --vocab-size ")[1].split()[0]
    assert "smaller" not in error
    run(tmp_path, "a.jsonl", data, "--vocab-size", largest)


def test_a_vocabulary_too_small_is_told_the_smallest(tmp_path, capsys):
    rng = random.Random(0)
    text = "".join(chr(0x4E00 + rng.randint(0, 9_000)) for _ in range(20_000))
    error = fails(tmp_path, capsys, "a.txt", text, "--vocab-size", 300)
    smallest = error.split("give --vocab-size ")[1].split()[0]
    run(tmp_path, "a.txt", text, "--vocab-size", smallest)
    for senseless in (0, -5, 261, 65_537):
        assert "give one from 262 to 65536" in fails(tmp_path / "..", capsys, "a.txt", text, "--vocab-size", senseless)


# ---------------------------------------------------------------- near duplicates


@fast
@settings(max_examples=100, deadline=None)
@given(codes=st.lists(st.integers(0, 2**64 - 1), max_size=70), length=st.integers(1, 60))
def test_run_hashes_are_the_polynomial(codes, length):
    length_used = max(1, min(length, len(codes)))
    expected = set()
    for start in range(max(0, len(codes) - length_used + 1) if codes else 0):
        value = 0
        for code in codes[start:start + length_used]:
            value = (value * 0x9E3779B97F4A7C15 + code) % 2**64
        expected.add(value)
    assert prepare.run_hashes(np.array(codes, dtype=np.uint64), length).tolist() == sorted(expected)


@fast
@given(values=st.lists(st.integers(0, 40)), table=st.sets(st.integers(0, 40)))
def test_members_is_isin(values, table):
    values, table = np.array(values, dtype=np.uint64), np.array(sorted(table), dtype=np.uint64)
    assert prepare.members(values, table).tolist() == np.isin(values, table).tolist()


def test_formulas_are_compared_by_characters(tmp_path, capsys):
    rng = random.Random(8)
    texts = ["".join(rng.choices(["C(", "C)", "C=", "O-", "N#"], k=600)) for _ in range(400)]
    held_out = [text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 6]
    assert held_out
    copies = [f"{molecule(rng)}\n{held_out[0]}\n{molecule(rng)}" for _ in range(20)]
    copies = [text for text in copies if hashlib.sha256(text.encode()).digest()[0] > 6]
    assert copies
    manifest = run(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts + copies))
    note = manifest["notes"]["near_duplicates_by"]
    assert note["units"] == "characters"
    assert note["removed_by_words"] > 200
    assert "runs of characters decide" in capsys.readouterr().out
    train = read_back(tmp_path / "out", "train")
    assert not set(copies) & set(train), "real duplicates are still found"
    assert len(train) > 350


@pytest.mark.parametrize("units", [prepare.BY_WORDS, prepare.BY_CHARACTERS])
def test_any_run_of_a_brief_document_counts(units):
    rng = random.Random(6)
    brief, long = words(rng, 12), words(rng, 100)
    overlap = prepare.Overlap([brief, long], units)
    around = words(rng, 900)
    assert overlap.near(f"{around} {brief} {around}"), "too short for a long run or for a tenth"
    assert not overlap.near(f"{around} {' '.join(long.split()[:12])} {around}"), "a short quotation of a long one"
    assert overlap.near(f"{around} {' '.join(long.split()[:60])} {around}")


def test_ordinary_text_is_compared_by_words(tmp_path):
    texts = [words(random.Random(i), 60) for i in range(300)]
    manifest = run(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert "notes" not in manifest


# ---------------------------------------------------------------- many documents


@fast
def test_the_spool_sorts_and_drops_duplicates(tmp_path):
    rng = random.Random(0)
    documents = [rng.choice("abc") * rng.randint(1, 40) for _ in range(500)] + [" \n"]
    spool = prepare.Spool(tmp_path / "spool", documents, messages.Progress())
    expected = sorted(set(documents) - {" \n"}, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert list(spool.read(range(len(spool)))) == expected
    assert spool.duplicates == 500 - len(expected)
    assert spool.bytes == sum(map(len, expected))
    below = [text for text in expected if int(hashlib.sha256(text.encode()).hexdigest(), 16) < 0.3 * 2**256]
    assert spool.below(0.3) == len(below)


@fast
def test_a_batch_of_long_documents_is_bounded():
    documents = ["x" * 1_000_000] * 11 + ["y"] * 1_200
    batches = list(prepare.batches(documents))
    assert [text for batch in batches for text in batch] == documents
    assert [len(batch) for batch in batches[:2]] == [4, 4]
    assert max(map(len, batches)) <= prepare.BATCH_DOCUMENTS


@fast
def test_time_is_linear(monkeypatch):
    """What a training document costs does not grow with validation: no sort of the whole table for each."""
    sizes, real = [], np.unique
    overlap = prepare.Overlap([words(random.Random(i), 300) for i in range(50)])
    monkeypatch.setattr(prepare.np, "unique", lambda values: sizes.append(len(values)) or real(values))
    monkeypatch.setattr(prepare.np, "isin", lambda *_, **__: pytest.fail("sorts the table"))
    text = words(random.Random(99), 300)
    calls, codes = [], prepare.word_codes
    overlap.units = overlap.units._replace(codes=lambda text: calls.append(text) or codes(text))
    assert not overlap.near(text)
    assert max(sizes, default=0) <= 300
    assert len(calls) == 1, "the words of a document are found once"


@fast
def test_progress_is_silent_in_a_short_run_and_rare_in_a_long_one(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    progress = messages.Progress()
    for second in range(30):
        now[0] = float(second)
        progress.show("reading", 1_000 * second, 50_000, 2_000_000 * second)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 8,000 of 50,000 documents, 16 MB", "reading: 16,000 of 50,000 documents, 32 MB",
                     "reading: 24,000 of 50,000 documents, 48 MB"]
