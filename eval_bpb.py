"""Score an artifact in bits per byte, from the file on disk, and audit every byte of the score.

    python eval_bpb.py ARTIFACT --data DIR [--stride S] [--json OUT]
    python eval_bpb.py ARTIFACT --data DIR --sample "Once upon"               # see what it says
    torchrun --standalone --nproc_per_node=N eval_bpb.py ARTIFACT --data DIR     # windows shared by N processes

bpb = (sum of the scored tokens' negative log-likelihoods in nats / ln 2) / (UTF-8 bytes of the same tokens).

Three things can make such a number wrong: bytes, windows and the model. Each has its own section here, and each
is checked on every run: the byte counter against the decoded text of every validation document, the windows by
counting that each token is scored once, the model by tests for look-ahead, for normalisation and for ternary codes.
If a check of the score fails, no score is printed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import getpass
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import pack

# ---------------------------------------------------------------------------------------------------------------
# Data on disk: shards, and the folder that knows its own identity
# ---------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256  # the official format: int32 header, uint16 tokens


class DataError(ValueError):
    """A shard, tokenizer or data folder that cannot be used; the message says what, where and what to do."""


class AuditError(ValueError):
    """A score that must not be printed: its bytes, windows or model failed a check."""


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shard_tokens(path: str | Path) -> int:
    """Number of tokens in a shard. Raises DataError unless header and file size agree exactly."""
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as e:
        raise DataError(f"{path}: cannot read the shard ({e.strerror}); run: python data/prepare.py") from None
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(
            f"{path}: not a token shard (a header of {SHARD_HEADER_INTS} int32 that starts with {SHARD_MAGIC}, "
            f"{SHARD_VERSION} is expected); make shards with: python data/prepare.py"
        )
    tokens, expected = int(header[2]), 4 * SHARD_HEADER_INTS + 2 * int(header[2])
    if tokens < 0 or size != expected:
        raise DataError(
            f"{path}: the header says {tokens} tokens, so {expected} bytes, but the file has {size}; "
            "it is truncated or damaged: delete it and prepare the data again"
        )
    return tokens


def read_shard(path: str | Path, most: int | None = None) -> np.ndarray:
    """The first `most` (None: all) tokens of one shard, uint16 [tokens]. Raises DataError as shard_tokens does."""
    count = shard_tokens(path)
    return np.fromfile(path, dtype="<u2", count=count if most is None else min(count, most),
                       offset=4 * SHARD_HEADER_INTS)


def folder_identity(hashes: dict[str, str]) -> str:
    """One hash for a set of files: sha256 over the sorted lines "<sha256>  <file name>"."""
    lines = "\n".join(f"{sha}  {name}" for name, sha in sorted(hashes.items()))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True)
class DataFolder:
    """A folder of shards and its tokenizer, with the sha256 of every file."""

    path: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    tokenizer: Path
    hashes: dict[str, str]  # file name -> sha256, of the files that were opened
    tokenizer_sha256: str
    manifest: Manifest | None  # what vouches that the shards are of this tokenizer; None: nothing does

    @property
    def identity(self) -> str:
        return folder_identity(self.hashes)


@dataclass(frozen=True)
class Manifest:
    """What a folder's manifest.json says of its files."""

    hashes: dict[str, str]  # file name -> sha256, of the shards and the tokenizer
    tokenizer: str  # its file name
    val_bytes: int | None  # of the validation text; None where it does not say
    changed_documents: int  # documents whose text the tokenizer changed (a foreign one, that is not lossless)


def open_data(path: str | Path, tokenizer_path: str | Path = "", need_train: bool = True) -> DataFolder:
    """Find and verify shards and tokenizer.

    Files are `*_train_*.bin`, `*_val_*.bin` and `tokenizer.model` (or the one `*.model`, or tokenizer_path). Where a
    manifest.json says what a file's hash is, it must be that; so with a manifest the tokenizer, wherever it lies, is
    the one that made the shards. Raises DataError, also when a training shard has the content of a validation shard:
    training on it would make every score worthless.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such data folder; prepare the default one with: python data/prepare.py")
    train = tuple(sorted(path.glob("*_train_*.bin"))) if need_train else ()
    val = tuple(sorted(path.glob("*_val_*.bin")))
    for split, shards in (("train", train), ("val", val)):
        if not shards and (need_train or split == "val"):
            raise DataError(f"{path}: no *_{split}_*.bin shard; prepare the folder with: python data/prepare.py")
    if odd := [p for p in (*train, *val) if not p.is_file()]:
        raise DataError(f"{odd[0]}: not a file; remove it, or put the shard itself there")
    tokenizer = Path(tokenizer_path) if tokenizer_path else path / "tokenizer.model"
    models = sorted(path.glob("*.model"))
    if not tokenizer_path and not tokenizer.is_file() and len(models) == 1:
        tokenizer = models[0]
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no tokenizer; give one with --tokenizer-path, or run: python data/prepare.py")

    hashes = {p.name: sha256_file(p) for p in (*train, *val)}
    tokenizer_sha256, name = sha256_file(tokenizer), tokenizer.name
    manifest = read_manifest(path, tokenizer_elsewhere=bool(tokenizer_path))
    if manifest:
        name = manifest.tokenizer  # so that a copy under another name gives the same identity
        if stray := [p for p in (*train, *val) if p.name not in manifest.hashes]:
            raise DataError(f"{stray[0]}: not in the folder's manifest.json, so nobody knows what it holds; remove it")
        if tokenizer_sha256 != manifest.hashes[name]:
            raise DataError(
                f"{tokenizer}: sha256 {tokenizer_sha256[:16]} is not the tokenizer that made the shards of {path} "
                f"({manifest.hashes[name][:16]} by its manifest.json), so their bytes cannot be counted with it; "
                + ("leave --tokenizer-path out" if tokenizer_path else "it was changed or damaged: prepare the folder "
                   "again")
            )
        for shard, sha in hashes.items():
            if manifest.hashes[shard] != sha:
                raise DataError(
                    f"{path / shard}: sha256 {sha} is not the manifest's {manifest.hashes[shard]}; the file was "
                    "changed or damaged: delete the folder and prepare it again"
                )
    val_hashes: dict[str, Path] = {}
    for shard in val:
        if other := val_hashes.get(hashes[shard.name]):
            raise DataError(f"{shard}: the same as {other.name}; its text would be scored twice: remove one of them")
        val_hashes[hashes[shard.name]] = shard
    for shard in train:
        if hashes[shard.name] in val_hashes:
            raise DataError(
                f"{shard}: this training shard is the validation shard {val_hashes[hashes[shard.name]].name}; "
                "a model trained on it cannot be scored: remove it"
            )
    return DataFolder(path, train, val, tokenizer, hashes | {name: tokenizer_sha256}, tokenizer_sha256, manifest)


def read_manifest(path: Path, tokenizer_elsewhere: bool = False) -> Manifest | None:
    """What the folder's manifest.json states; None without one (official shards). Raises DataError.

    tokenizer_elsewhere: the tokenizer need not lie in the folder.
    """
    file = path / "manifest.json"
    if not os.path.lexists(file):
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        shards = [s for split in manifest["splits"].values() for s in split["shards"]]
        tokenizer = manifest["tokenizer"]
        hashes = {s["file"]: s["sha256"] for s in (*shards, tokenizer)}
        if not all(isinstance(text, str) for pair in hashes.items() for text in pair):
            raise ValueError("a file's name or sha256 is not a string")
        val_bytes, changed = manifest["splits"].get("val", {}).get("bytes"), tokenizer.get("changed_documents", 0)
        found = Manifest(hashes, tokenizer["file"], int(val_bytes) if val_bytes is not None else None, int(changed))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise DataError(f"{file}: not a manifest of data/prepare.py ({e!r}); prepare the folder again") from None
    needed = hashes.keys() - ({found.tokenizer} if tokenizer_elsewhere else set())
    missing = sorted(name for name in needed if not (path / name).is_file())
    if missing:
        raise DataError(f"{path / missing[0]}: named in manifest.json but missing; prepare the folder again")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------


# What must come back from a tokenizer letter by letter: no Unicode normalization in use changes it.
EXACT_PROBES = (
    "The quick brown fox jumps over the lazy dog, and THE END is near.",
    "".join(map(chr, range(0x21, 0x7F))),
    "a b c 1 2 3 ? !",
    "café naïve Über ñ česky Жук αβγ אב مر 漢字 かな 한구",
    "🤖 😀 — “quoted” € √",
)
# What normalization may change: white space and control characters, and letters to those that NFKC makes of them.
LOOSE_PROBES = (
    "a  b   c", " lead", "trail ", "a\tb", "a\nb\n\nc", "a\r\nb", "\u00a0x\u2003y", "x\u200by\ufeffz", "a\u2028b\x85c",
    "\x00a\x07", "e\u0301 n\u0303", "\u2460 \ufb01 \uff21 \u3371 \u00bd \u017f", "<s></s><unk><0x41>",
    "def f(x):\n    return  x\n", "\u1e9b\u0323", "\U0001d518\U0001d52b\U0001d526",
)


def letters(text: str) -> str:
    """Text after NFKC without white space, control, format and unassigned characters: what no tokenizer may change."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "ZC")


def protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of the fields of a protocol buffer message: integers, and the bytes of strings and messages.

    protobuf.dev/programming-guides/encoding; a .model file is a ModelProto of sentencepiece_model.proto.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, data[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


# Field numbers of sentencepiece_model.proto: of a ModelProto, of its normalizers, of its TrainerSpec, of a piece.
PIECES, TRAINER, NORMALIZER, DENORMALIZER, CHARSMAP, MODEL_TYPE, TEXT, KIND = 1, 2, 3, 5, 2, 3, 1, 3
BPE, NORMAL, USER_DEFINED = 2, 1, 4
# sha256, first 16 digits, of the rules that are sentencepiece's own: nmt_nfkc (that of the official tokenizers, and of
# sentencepiece 0.2.3) and nfkc. Rules that fold case change letters, so they are none of these.
KNOWN_RULES = {"79372c41389c2b9b": "nmt_nfkc", "1e2c7b43d3ee9755": "nmt_nfkc", "7e46d9e08af4b6a3": "nfkc"}


@dataclass(frozen=True)
class TokenizerFile:
    """What a .model file says that sentencepiece does not tell."""

    is_bpe: bool
    pieces: dict[str, int]  # text -> kind
    normalizer: bytes  # precompiled rules; empty where text is left as it is
    denormalizer: bytes

    def from_nowhere(self) -> list[str]:
        """The pieces of a BPE model that no two of its pieces make. Training gives none such, an edited file may."""
        known = {text for text, kind in self.pieces.items() if kind in (NORMAL, USER_DEFINED)}
        return [text for text in known if self.is_bpe and len(text) > 1 and self.pieces[text] == NORMAL
                and not any(text[:i] in known and text[i:] in known for i in range(1, len(text)))]

    def why_unproven(self) -> str:
        """Why the file does not show that its pieces are those of training; empty for a plain BPE model."""
        if not self.is_bpe:
            return "is no BPE model"
        return "has user-defined pieces" if USER_DEFINED in self.pieces.values() else ""


def read_tokenizer_file(model: bytes, where: str | Path) -> TokenizerFile:
    """The bytes of a .model file, which sentencepiece has opened. Raises DataError where they hold something odd."""
    try:
        fields = [(number, dict(protobuf_fields(message))) for number, message in protobuf_fields(model)
                  if number in (PIECES, TRAINER, NORMALIZER, DENORMALIZER)]
        return TokenizerFile(
            any(number == TRAINER and part.get(MODEL_TYPE) == BPE for number, part in fields),
            {part[TEXT].decode(): part.get(KIND, NORMAL) for number, part in fields if number == PIECES},
            *(b"".join(part.get(CHARSMAP, b"") for number, part in fields if number == spec)
              for spec in (NORMALIZER, DENORMALIZER)))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{where}: not a file that sentencepiece wrote ({e!r}); use another tokenizer") from None


def check_provable(data: DataFolder) -> None:
    """Raises AuditError where neither a manifest nor the tokenizer itself vouches for what its pieces stand for."""
    if data.manifest is not None:
        return
    if why := read_tokenizer_file(data.tokenizer.read_bytes(), data.tokenizer).why_unproven():
        raise AuditError(f"{data.tokenizer}: {why}, and no manifest.json says that it made the shards, so nobody knows "
                         "what text its pieces stand for; prepare the text with data/prepare.py --tokenizer")


def check_tokenizer(sp: spm.SentencePieceProcessor, where: str | Path) -> list[str]:
    """What a score must say of this tokenizer; empty for one that gives every text back unchanged.

    The byte audit compares the counter with what the tokenizer decodes, so it proves nothing if decoding itself is not
    the text. Here hard texts must come back. Raises DataError, naming where, on a tokenizer whose pieces do not stand
    for the bytes of the text.
    """
    def refuse(what: str) -> DataError:
        return DataError(f"{where}: {what}, so bytes would be counted wrongly; use another tokenizer")

    size, bos, space = sp.vocab_size(), sp.bos_id(), sp.piece_to_id("▁")
    if not 0 <= bos < size or not sp.is_control(bos):
        raise refuse("no BOS token, which every document begins with")
    if sp.is_unknown(space) or sp.is_control(space) or sp.is_unused(space) or sp.id_to_piece(space) != "▁":
        raise refuse('no standalone "▁" piece (a lone space)')
    pieces = {sp.id_to_piece(i) for i in range(size) if sp.is_byte(i)}
    if pieces not in (set(), {f"<0x{byte:02X}>" for byte in range(256)}):
        raise refuse(f"{len(pieces)} of the 256 byte pieces")
    file = read_tokenizer_file(sp.serialized_model_proto(), where)
    if file.denormalizer:
        raise refuse("it changes text when it decodes (a denormalizer)")
    if odd := file.from_nowhere():
        raise refuse(f"its piece {min(odd)!a} is not made of other pieces of it, as in a file that was edited")

    counter, notes = ByteCounter(sp), []
    if not pieces:
        notes.append("no byte pieces: text with characters outside its vocabulary cannot be scored")
    for text in EXACT_PROBES + LOOSE_PROBES:
        ids = sp.encode(text)
        if any(sp.is_unknown(i) for i in ids):
            if pieces:
                raise refuse(f"{text!a} becomes <unk> in spite of byte pieces")
            continue
        back = sp.decode(ids)
        counted = int(counter.count([bos, *ids[:-1]], ids).sum()) if ids else 0
        if counted != len(back.encode()):
            raise refuse(f"the pieces of {text!a} count {counted} bytes, their text {back!a} has {len(back.encode())}")
        if back == text:
            continue
        if text in EXACT_PROBES or letters(back) != letters(text) or "▁" in back:
            raise refuse(f"{text!a} comes back as {back!a}")
        if not any(note.startswith("normalizes") for note in notes):
            notes.append("normalizes: bytes are those of its decoded text, as the competition counts them "
                         f"({text!a} is {back!a})")
    if file.normalizer and hashlib.sha256(file.normalizer).hexdigest()[:16] not in KNOWN_RULES:
        notes.append("WARNING: normalizes by rules that are none of sentencepiece's nmt_nfkc and nfkc, so nobody knows "
                     "what else it changes")
    return notes


def open_tokenizer(path: str | Path) -> spm.SentencePieceProcessor:
    """A sound tokenizer. Raises DataError on anything else."""
    try:
        open(path, "rb").close()
    except OSError as e:
        raise DataError(f"{path}: the tokenizer cannot be read ({e.strerror}); check name and permissions") from None
    try:
        sp = spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        why = " ".join(str(e).split())
        raise DataError(f"{path}: not a SentencePiece model ({why}); give one, or make one with data/prepare.py"
                        ) from None
    check_tokenizer(sp, path)
    return sp


class ByteCounter:
    """UTF-8 bytes that each token stands for, by the competition's rule.

    A token's bytes are those of its piece without the leading "▁", plus one for that space unless the previous token
    is a control, unknown or unused token (BOS); a byte-fallback token counts 1; control, unknown and unused count 0.
    (openai/parameter-golf train_gpt.py, build_sentencepiece_luts.) A "▁" inside a piece is a space too: one byte.
    """

    def __init__(self, tokenizer: str | Path | spm.SentencePieceProcessor):
        sp = tokenizer if isinstance(tokenizer, spm.SentencePieceProcessor) else open_tokenizer(tokenizer)
        self.tokenizer, self.vocab_size, self.bos_id = sp, sp.vocab_size(), sp.bos_id()
        self.base_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        self.leading_space = np.zeros(self.vocab_size, dtype=bool)
        self.boundary = np.zeros(self.vocab_size, dtype=bool)
        self.unknown = np.zeros(self.vocab_size, dtype=bool)
        for i in range(self.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.boundary[i] = True
                self.unknown[i] = sp.is_unknown(i)
            elif sp.is_byte(i):
                self.base_bytes[i] = 1
            else:
                piece = sp.id_to_piece(i)
                self.leading_space[i] = piece.startswith("▁")
                self.base_bytes[i] = len(piece.removeprefix("▁").replace("▁", " ").encode())

    def count(self, prev_ids, ids) -> np.ndarray:
        """Bytes of each token of ids [n] that follows prev_ids [n], int64 [n]. Raises DataError on an id too large."""
        prev_ids, ids = np.asarray(prev_ids, dtype=np.int64), np.asarray(ids, dtype=np.int64)
        for array in (prev_ids, ids):
            if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
                raise DataError(f"token ids up to {array.max()} with a tokenizer of {self.vocab_size}: not its shards")
        return self.base_bytes[ids] + (self.leading_space[ids] & ~self.boundary[prev_ids])

    def count_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream [n], int64 [n]; the first token stands as if after a boundary."""
        tokens = np.asarray(tokens)
        if not tokens.size:
            return np.zeros(0, dtype=np.int64)
        first = int(np.argmax(self.boundary))
        return self.count(np.concatenate(([first], tokens[:-1])), tokens)


def audit_bytes(shards: dict[str, np.ndarray], counter: ByteCounter) -> dict[str, dict[str, int]]:
    """Compare the counter with the decoded text: every document of every shard, and so every shard's total.

    shards: name -> uint16 [tokens], in stream order; a document starts at BOS and may run on into the next shard.
    Returns name -> {documents, tokens, bytes}. Raises AuditError at the first document whose count differs, and at an
    unknown token, which stands for text that nobody knows.
    """
    names = list(shards)
    tokens = np.concatenate([shards[n] for n in names])
    ends = np.cumsum([shards[n].size for n in names])
    counted = np.concatenate(([0], np.cumsum(counter.count_stream(tokens))))
    if unknown := int(counter.unknown[tokens].sum()):
        at = int(np.argmax(counter.unknown[tokens]))
        raise AuditError(
            f"byte audit failed: {unknown} unknown tokens (the first is token {at}): nobody knows the text behind "
            "them, so its bytes cannot be counted; make the shards with a tokenizer that has byte fallback"
        )
    bounds = document_bounds(tokens, counter)
    report = {n: {"documents": 0, "tokens": int(shards[n].size), "bytes": 0} for n in names}
    batch = 256  # documents decoded per call, so that the text of a large split is never in memory at once
    for lo in range(0, len(bounds) - 1, batch):
        hi = min(lo + batch, len(bounds) - 1)
        texts = counter.tokenizer.decode([tokens[bounds[i] : bounds[i + 1]].tolist() for i in range(lo, hi)])
        for i, text in zip(range(lo, hi), texts, strict=True):
            have, want = int(counted[bounds[i + 1]] - counted[bounds[i]]), len(text.encode())
            name = names[int(np.searchsorted(ends, bounds[i], side="right"))]
            if have != want:
                raise AuditError(
                    f"byte audit failed: document {i} (token {bounds[i]}, shard {name}) counts {have} bytes but its "
                    f"decoded text has {want}; the tokenizer is not the one of these shards, or its decoding is not "
                    f"what the counting rule assumes. Text begins {text[:60]!r}"
                )
            report[name]["documents"] += 1
            report[name]["bytes"] += want
    return report


def document_bounds(tokens: np.ndarray, counter: ByteCounter) -> np.ndarray:
    """Where documents begin, and the end of the stream: int64 [documents + 1]. A stream without BOS is one document."""
    if not tokens.size:
        return np.zeros(1, dtype=np.int64)
    return np.append(np.union1d(np.flatnonzero(tokens == counter.bos_id), [0]), tokens.size)


SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 512, 20_000  # documents that are encoded again, and tokens of each, at most
REPRODUCED = 0.9  # a tokenizer gives all of its own tokens again, another one less than 1% (LOG.md, identity)


def audit_origin(tokens: np.ndarray, counter: ByteCounter, where: str | Path) -> dict:
    """Is this the tokenizer that made the tokens? Nothing in a shard says so, but its text, encoded again, does.

    tokens: uint16 [n], a stream or the beginning of one. Returns {"reproduced": share of a sample's tokens that their
    decoded text gives again when it is encoded, "bytes_per_token", "pieces_used": pieces that occur, "pieces": all,
    "controls": tokens that stand for no bytes, beside BOS and EOS}. Raises AuditError where too few come again, and
    DataError on an id that the tokenizer does not have.
    """
    size = int(counter.count_stream(tokens).sum())
    share, text = reproduced(tokens, counter)
    if share < REPRODUCED:
        raise AuditError(
            f"{where}: these shards are not of this tokenizer: encoding their text again gives {share:.1%} of their "
            f"tokens (its own shards give all of them). Text begins {text[:60]!a}; give the tokenizer that made them "
            "with --tokenizer-path, or prepare the data again"
        )
    ordinary = counter.boundary.copy()
    ordinary[[i for i in (counter.bos_id, counter.tokenizer.eos_id()) if i >= 0]] = False
    counts = np.bincount(tokens, minlength=counter.vocab_size) if tokens.size else np.zeros(counter.vocab_size, int)
    return {"reproduced": share, "pieces_used": int((counts > 0).sum()), "pieces": counter.vocab_size,
            "bytes_per_token": size / max(tokens.size, 1), "controls": int(counts[ordinary].sum())}


def reproduced(tokens: np.ndarray, counter: ByteCounter) -> tuple[float, str]:
    """(share of a sample's tokens that come again when their text is encoded, text of the worst document)."""
    sp, bounds = counter.tokenizer, document_bounds(tokens, counter)
    chosen = np.unique(np.linspace(0, len(bounds) - 2, SAMPLE_DOCUMENTS).astype(np.int64)) if tokens.size else []
    same = seen = 0
    worst, text_of_worst = 1.0, ""
    for i in chosen:
        ids = tokens[bounds[i] : min(bounds[i + 1], bounds[i] + SAMPLE_TOKENS)].astype(np.int64)
        ids = ids[~counter.boundary[ids]]  # BOS and the like are not made from text
        if not ids.size:
            continue
        text = sp.decode(ids.tolist())
        again = np.array(sp.encode(text), dtype=np.int64)
        # A document may be cut off at its begin or end, where a few tokens differ: what agrees from either side.
        n = min(ids.size, again.size)
        from_begin = agreeing(ids[:n] == again[:n])
        from_end = agreeing((ids[ids.size - n :] == again[again.size - n :])[::-1])
        agree = min(from_begin + from_end, n)
        same, seen = same + agree, seen + ids.size
        if agree / ids.size < worst:
            worst, text_of_worst = agree / ids.size, text
    return same / seen if seen else 1.0, text_of_worst


def agreeing(equal: np.ndarray) -> int:
    """How many leading entries are true."""
    return int(equal.size if equal.all() else np.argmin(equal))


# ---------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------


def sliding_windows(num_tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, end, score_from) over the num_tokens predicted positions of a stream of num_tokens + 1 tokens.

    A window reads tokens[start:end] and predicts tokens[start + 1 : end + 1]; its positions score_from..end-1 are
    scored, so the scored ranges [score_from, end) tile [0, num_tokens) exactly. Every window but the first of a short
    stream is seq_len long and scores at most stride positions, so each scored token (after the first window) sees at
    least seq_len - stride tokens of context, at the tail too. stride == seq_len gives the plain chunked score.
    """
    if seq_len < 1 or not 1 <= stride <= seq_len:
        raise ValueError(f"windows need 1 <= stride <= seq_len, not stride {stride} and seq_len {seq_len}")
    done = 0
    while done < num_tokens:
        end = min(done + (stride if done else seq_len), num_tokens)
        yield max(0, end - seq_len), end, done
        done = end


@dataclass(frozen=True)
class Score:
    """val_loss: nats per token; val_bpb: bits per byte; tokens and bytes that were scored; seconds it took."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float


HEAD_ROWS = 8192  # positions per pass through the output head: bounds the fp32 logits (8,192 x vocab x 4 bytes)


# From so many positions on, the forward is compiled: that takes 10 to 20 s and saves a quarter of the time (LOG.md).
COMPILE_FROM = 4_000_000


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds a compiler: of C++ for a CPU, of C for a GPU."""
    return any(map(shutil.which, ("g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")))


OWN_CACHES: list[str] = []  # made by this process, which removes them


def remove_caches() -> None:
    while OWN_CACHES:
        shutil.rmtree(OWN_CACHES.pop(), ignore_errors=True)


def writable_compiler_cache() -> str:
    """Give torch's compiler a cache folder that it can write, in the environment; a notice if not the usual one.

    torch makes the folder when parts of it are imported, compiled or not. Raises OSError where nothing can be written.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id that the machine has no name for
        user = ""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not folder and user:
        folder = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        own = tempfile.mkdtemp(prefix="torchinductor_")
        OWN_CACHES.append(own)
        atexit.register(remove_caches)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = own
        return (f"the compiler's cache {folder or 'of a user without a name'} cannot be written ({e.strerror}): another"
                " one is used and thrown away; TORCHINDUCTOR_CACHE_DIR names a folder to keep")


def tag_compiler_cache() -> None:
    """Make the compiler's cache ask for this very program: it does not look into operators such as train_gpt's."""
    torch.compiler.config.cache_key_tag = folder_identity({p.name: sha256_file(p) for p in pack.code_files()})


def hidden_last(model, ids: Tensor, last: int) -> Tensor:
    """Hidden states [batch, last, model_dim] of the last positions of ids; all are computed where a model must."""
    return model.hidden_last(ids, last) if hasattr(model, "hidden_last") else model.hidden(ids)[:, -last:]


def compiled_hidden_last():
    """hidden_last, compiled at its first call; as it is where that fails: headers or a cache may be missing."""
    chosen = None

    def call(model, ids: Tensor, last: int) -> Tensor:
        nonlocal chosen
        if chosen is not None:
            return chosen(model, ids, last)
        try:
            tag_compiler_cache()
            chosen = torch.compile(hidden_last, dynamic=False, fullgraph=True)
            return chosen(model, ids, last)
        except Exception as e:
            why = (" ".join(str(e).split()) or repr(e))[:200]
            print(f"notice      torch.compile failed ({why}), so scoring takes longer", file=sys.stderr, flush=True)
            chosen = hidden_last
            return chosen(model, ids, last)

    return call


def position_losses(model, ids: Tensor, targets: Tensor, scored: Tensor, forward=hidden_last) -> Tensor:
    """Losses in nats, fp32 [number of True in scored]. ids: [batch, time]; targets, scored: [batch, last], of the last
    positions of ids."""
    hidden = forward(model, ids, scored.shape[1])[scored]
    rows = zip(hidden.split(HEAD_ROWS), targets[scored].split(HEAD_ROWS), strict=True)
    return torch.cat([F.cross_entropy(model.head(h), t, reduction="none") for h, t in rows])


@torch.inference_mode()
def evaluate(model, tokens, counter: ByteCounter, seq_len: int, stride: int, batch_seqs: int = 32,
             compiled: bool = False) -> Score:
    """Score a token stream [n + 1] with windows of seq_len tokens, batch_seqs windows at a time.

    compiled: compile the forward of full batches, which is worth its while on long streams (COMPILE_FROM).

    In a process group the windows are shared by the ranks and every rank returns the same Score. The sum over windows
    is exact (math.fsum), so it does not depend on how they were shared. Raises AuditError if a loss is not finite.
    """
    began = time.perf_counter()
    tokens = np.asarray(tokens).astype(np.int64)
    device = next(model.parameters()).device
    per_token = counter.count(tokens[:-1], tokens[1:])  # before the model sees them: ids beyond its table are caught
    windows = np.array(list(sliding_windows(len(tokens) - 1, seq_len, stride)), dtype=np.int64).reshape(-1, 3)
    if not len(windows):
        raise DataError(f"nothing to score: the validation stream has {len(tokens)} token(s)")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # The first window is scored whole, all others at their end only: apart, they need little of the last block.
    starts = [0, *range(1, len(windows), batch_seqs)] if stride < seq_len else range(0, len(windows), batch_seqs)
    batches = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(windows)], strict=True)]
    sums = torch.zeros(len(windows), dtype=torch.float64, device=device)
    stream = torch.from_numpy(tokens)
    fast = compiled_hidden_last() if compiled else hidden_last
    for batch in batches[rank::world]:
        start, end, score_from = (torch.from_numpy(column) for column in windows[batch].T)
        position = start[:, None] + torch.arange(int((end - start).max()))  # windows of one batch are equally long
        at_end = position[:, -int((end - score_from).max()) :]
        scored = (at_end >= score_from[:, None]).to(device)
        full = scored.shape == (batch_seqs, stride)  # the first window and the last batch are not worth a compilation
        losses = position_losses(model, stream[position].to(device), stream[at_end + 1].to(device), scored,
                                 fast if full else hidden_last)
        padded = torch.zeros(scored.shape, dtype=torch.float64, device=device)
        padded[scored] = losses.double()
        sums[batch] = padded.sum(1)
    if world > 1:
        dist.all_reduce(sums)  # each window has one non-zero term, so this is exact
    total = math.fsum(sums.tolist())
    before = np.concatenate(([0], np.cumsum(per_token)))
    scored_tokens = int((windows[:, 1] - windows[:, 2]).sum())
    scored_bytes = int((before[windows[:, 1]] - before[windows[:, 2]]).sum())
    if scored_tokens != len(tokens) - 1 or scored_bytes != int(per_token.sum()):
        raise AuditError(f"windows scored {scored_tokens} tokens, {scored_bytes} bytes of {len(tokens) - 1} tokens")
    if not math.isfinite(total):
        raise AuditError("the validation loss is not finite; the model is broken")
    bpb = total / math.log(2) / scored_bytes if scored_bytes else math.inf
    return Score(total / scored_tokens, bpb, scored_tokens, scored_bytes, time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------
# The model, and whether it is what it claims
# ---------------------------------------------------------------------------------------------------------------


def load_artifact(path: str | Path, device: str | torch.device = "cpu"):
    """The model rebuilt from an artifact file, on device, in eval mode. Raises pack.ArtifactError."""
    return load_tensors(*pack.read_artifact(path), path, device)


def load_tensors(tensors: dict[str, pack.StoredTensor], meta: dict, path, device):
    from train_gpt import model_from_stored  # the one backward import: only the trainer's file knows the model

    try:
        return model_from_stored(tensors, meta).to(device).eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as e:  # RuntimeError: shapes that overflow
        raise pack.ArtifactError(
            f"{path}: the tensors do not make the model that its configuration describes: {e}; "
            "score it with the train_gpt.py that wrote it"
        ) from None


def audit_ternary(tensors: dict[str, pack.StoredTensor]) -> dict:
    """What the file itself proves about its matrices: which are ternary, and that their codes are {-1, 0, 1}."""
    ternary = {n: t for n, t in tensors.items() if t.format["kind"] == "ternary"}
    for name, t in ternary.items():
        if not np.isin(t.codes, (-1, 0, 1)).all():
            raise AuditError(f"{name}: declared ternary but holds codes outside {{-1, 0, 1}}")
    matrices = [n for n, t in tensors.items() if len(t.shape) == 2 and n.startswith("blocks.") and min(t.shape) > 2]
    weights = sum(t.codes.size for t in ternary.values())
    zeros = sum(int((t.codes == 0).sum()) for t in ternary.values())
    return {
        "ternary_tensors": len(ternary),
        "ternary_weights": weights,
        "zero_frac": zeros / weights if weights else 0.0,
        "parameters": sum(t.codes.size for t in tensors.values()),
        "unquantized_matrices": [n for n in matrices if tensors[n].format["kind"] in ("bf16", "fp16", "fp32")],
        "not_ternary_matrices": [n for n in matrices if n not in ternary],
    }


@torch.inference_mode()
def audit_model(model, tokens: np.ndarray, seq_len: int) -> dict:
    """Three properties that a scorer relies on, tested on the first window of the stream.

    Look-ahead: no change to tokens from position t on may change a loss before t. Normalisation: the probabilities at
    a position sum to one. Both raise AuditError. Context: does shuffling it change the next prediction? (reported)
    """
    device = next(model.parameters()).device
    window = torch.from_numpy(np.asarray(tokens[: seq_len + 1]).astype(np.int64)).to(device)
    ids, targets = window[None, :-1], window[None, 1:]
    length = ids.shape[1]
    generator = torch.Generator().manual_seed(0)

    def losses(ids: Tensor) -> Tensor:
        return position_losses(model, ids, targets, torch.ones_like(ids, dtype=torch.bool))

    base, vocab = losses(ids), model.head(model.hidden(ids)[0, :1]).shape[-1]
    for t in sorted({length // 4, length // 2, length - 1} - {0}):
        changed = ids.clone()
        changed[0, t:] = torch.randint(vocab, (length - t,), generator=generator).to(device)
        drift = (losses(changed)[:t] - base[:t]).abs().max().item()
        if not drift <= 1e-6:
            raise AuditError(
                f"look-ahead: changing tokens from position {t} on changes earlier losses by up to {drift:.3g}; "
                "the model sees the future, so its score means nothing"
            )
    logits = model.head(model.hidden(ids)[0, -64:])
    off = (logits.log_softmax(-1).double().exp().sum(-1) - 1).abs().max().item()
    if not off <= 1e-4:
        raise AuditError(f"probabilities sum to one only within {off:.3g}; logits are not finite or not logits")
    shuffled = ids.clone()
    shuffled[0, :-1] = ids[0, :-1][torch.randperm(length - 1, generator=generator).to(device)]
    uses_context = not torch.equal(model.head(model.hidden(shuffled)[0, -1:]), model.head(model.hidden(ids)[0, -1:]))
    return {"softmax_error": off, "uses_context": uses_context}


@torch.inference_mode()
def sample(model, tokenizer: spm.SentencePieceProcessor, prompt: str, count: int, seed: int = 0) -> str:
    """The prompt, continued by count tokens drawn at temperature 1; the same seed gives the same text."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    ids = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
    for _ in range(count):
        window = torch.tensor([ids[-model.config.train_seq_len :]], device=device)
        probabilities = model.head(model.hidden(window)[0, -1]).softmax(-1)
        ids.append(int(torch.multinomial(probabilities.cpu(), 1, generator=generator)))
    return tokenizer.decode(ids)


# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------


class LaunchError(ValueError):
    """Processes that are not the group that the environment says; the message says how to start them."""


@dataclass(frozen=True)
class Place:
    """A process among those of a run; the defaults are those of a process alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine
    local_world: int = 1


def process_place(env: Mapping[str, str]) -> Place:
    """This process's place, from the variables that torchrun sets. Raises LaunchError.

    Clusters and notebooks set some of them too. WORLD_SIZE alone decides: empty or 1 is a process alone, whatever the
    others say; more needs all that a group needs.
    """
    def number(name: str, default: int, low: int, high: int) -> int:
        text = env.get(name, "").strip()
        if not text:
            return default
        if len(text) > 9 or not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
            raise LaunchError(f"environment {name}={text[:40]!r}: must be a whole number from {low} to {high}; start "
                              "with torchrun, which sets it, or unset WORLD_SIZE for a process alone")
        return int(text)

    world = number("WORLD_SIZE", 1, 1, 1 << 20)
    if world == 1:
        return Place()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name, "").strip()]:
        raise LaunchError(
            f"WORLD_SIZE={world} is set in the environment, but not {', '.join(missing)}: start all processes with "
            f"torchrun --standalone --nproc_per_node={world}, or unset WORLD_SIZE for a process alone"
        )
    number("MASTER_PORT", 0, 1, 65535)
    local_world = number("LOCAL_WORLD_SIZE", 1, 1, world)
    return Place(number("RANK", 0, 0, world - 1), world, number("LOCAL_RANK", 0, 0, world - 1), local_world)


# How long processes look for each other. torchrun starts all of them, which on a busy file system takes its time; a
# person who started one of two should not have to wait.
FIND_EACH_OTHER, WITH_TORCHRUN = timedelta(seconds=40), timedelta(minutes=10)
TORCHRUN = {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK"}  # it sets all of them
SETTING_UP = timedelta(minutes=30)  # compiling and reading data may keep a process from answering for this long


def join_group(place: Place, backend: str) -> None:
    """Make the process group of all processes of this run. Raises LaunchError within a minute if they are not there."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    patience = WITH_TORCHRUN if os.environ.keys() >= TORCHRUN else FIND_EACH_OTHER
    if place.rank:
        patience /= 2  # a rank that does not find rank 0 tries twice
    try:
        with quiet_stderr():  # torch warns of every attempt to connect
            store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=patience))
            if store.add(f"here/{place.rank}", 1) > 1:
                raise ValueError(f"RANK={place.rank} was started twice")
            store.wait([f"here/{rank}" for rank in range(place.world)], patience)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=SETTING_UP)
    except (RuntimeError, ValueError, OSError) as e:  # torch's errors of connection are RuntimeErrors
        if "EADDRINUSE" in str(e):
            raise LaunchError(f"MASTER_PORT={port}: another program uses this port; choose another one for all "
                              "processes") from None
        why = " ".join(str(e).splitlines()[0].split())[:200] if str(e) else repr(e)
        raise LaunchError(
            f"rank {place.rank} did not find the other processes of WORLD_SIZE={place.world} at MASTER_ADDR={address} "
            f"MASTER_PORT={port} ({why}); start all of them, each with its RANK, or use torchrun; unset WORLD_SIZE for "
            "a process alone"
        ) from None


LET_RANK_0_SPEAK = 2.0  # seconds: torchrun stops all processes, rank 0 too, when the first one ends with an error


def check_agreement(said: Mapping[str, object], device: torch.device) -> None:
    """Raises LaunchError unless all processes of the group say the same under each name: machines may hold older copies
    of data or program. A process alone agrees with itself."""
    if not dist.is_initialized():
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in said.values()]
    mine = torch.tensor([list(digest) for digest in digests], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for i, name in enumerate(said):
        if differ := [rank for rank, theirs in enumerate(every) if not torch.equal(theirs[i], every[0][i])]:
            raise LaunchError(f"rank(s) {', '.join(map(str, differ))} do not have the {name} of rank 0; give all "
                              "processes the same, on every machine")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what libraries write to the standard error file, past Python."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed: then there is nothing to hear
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# ---------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the kernel, which then zeroes every page again.

    PyTorch's CPU allocator is malloc; the activations of a step are megabytes each. LOG.md has the measured effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (malloc.h)
        mallopt(name, value)


def command() -> list[str]:
    """Script and arguments that run this program in a fresh process; a submission's one file needs its name as well."""
    return [str(Path(__file__).resolve()), *(["eval_bpb"] if pack.in_bundle() else [])]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = pack.Parser(description="Score an artifact in bits per byte.", allow_abbrev=False)
    p.add_argument("artifact", help="file written by train_gpt.py")
    p.add_argument("--data", required=True, help="folder with *_val_*.bin shards and their tokenizer")
    p.add_argument("--tokenizer-path", default="", help="tokenizer, if it is not in the data folder")
    p.add_argument("--stride", type=int, default=64, help="sliding-window stride in tokens; 0: chunked score only")
    p.add_argument("--seq-len", type=int, default=0, help="window length in tokens; 0: the model's training length")
    p.add_argument("--batch-seqs", type=int, default=32, help="windows per batch")
    p.add_argument("--json", default="", help="write the result to this file as well")
    p.add_argument("--sample", metavar="PROMPT", help="do not score: continue this text by 200 tokens")
    return p.parse_args(argv)


def artifact_tokenizer(meta: dict) -> str | None:
    """sha256 of the tokenizer that an artifact was trained with; None in files that do not name it (older ones).

    Raises pack.ArtifactError on a name that is none.
    """
    if "tokenizer" not in meta:
        return None
    found = meta["tokenizer"]
    if not (isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)):
        raise pack.ArtifactError(f"the artifact's meta.tokenizer is {str(found)[:70]!a}, not a sha256; pack the "
                                 "checkpoint again")
    return found


def check_identity(meta: dict, data: DataFolder, artifact: str | Path) -> None:
    """Raises DataError if the artifact was trained with another tokenizer than the data's."""
    trained_with = artifact_tokenizer(meta)
    if trained_with not in (None, data.tokenizer_sha256):
        raise DataError(
            f"{artifact}: was trained with the tokenizer of sha256 {trained_with[:16]}, {data.tokenizer} is "
            f"{data.tokenizer_sha256[:16]}: its tokens mean other text to this model; score it on data made with its "
            "own tokenizer"
        )


def check_json_target(path: str) -> None:
    """Raises ValueError where --json would overwrite anything but an older score."""
    if not os.path.isfile(path):
        return  # new, a device, or an error of writing that names it
    try:
        with open(path, encoding="utf-8") as f:
            older = json.loads(f.read(1 << 24))
        if {"artifact", "chunked"} <= older.keys():
            return
    except (ValueError, AttributeError, RecursionError):
        pass  # the same answer
    raise ValueError(f"--json {path}: the file is not a score of this program, so it is not overwritten; choose "
                     "another name")


def write_json(path: str, result: dict) -> None:
    """To a file, all or nothing, or to a device such as /dev/stdout."""
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
    else:
        pack.write_atomic(path, text.encode())


def check_scorable(tokens: np.ndarray, counter: ByteCounter, where: str | Path) -> None:
    """Raises DataError on validation tokens of which nothing can be scored."""
    if len(tokens) < 2 or not counter.count_stream(tokens)[1:].any():
        raise DataError(f"{where}: nothing to score, the {len(tokens)} validation token(s) stand for no text; prepare "
                        "the data again")


def score_file(args: argparse.Namespace, device: torch.device) -> dict:
    """All checks and scores of one artifact, as the JSON that --json writes."""
    data = open_data(args.data, args.tokenizer_path, need_train=False)
    file = pack.read_bytes(args.artifact)
    artifact_sha256 = hashlib.sha256(file).hexdigest()
    tensors, meta = pack.with_path(args.artifact, pack.decode_artifact, file)
    check_identity(meta, data, args.artifact)
    check_agreement({"artifact": artifact_sha256, "data": data.identity,
                     "settings": [args.stride, args.seq_len, args.batch_seqs]}, device)
    counter = ByteCounter(data.tokenizer)
    shards = {p.name: read_shard(p) for p in data.val}
    documents = audit_bytes(shards, counter)
    origin = {name: audit_origin(tokens, counter, data.path / name) for name, tokens in shards.items()}
    tokens = np.concatenate(list(shards.values()))
    check_scorable(tokens, counter, data.path)
    if artifact_tokenizer(meta) is None:
        check_provable(data)
    audited = sum(d["bytes"] for d in documents.values())
    if data.manifest and data.manifest.val_bytes not in (None, audited):
        raise AuditError(f"{data.path / 'manifest.json'}: states {data.manifest.val_bytes:,} bytes of validation text, "
                         f"the decoded text has {audited:,}; prepare the folder again")
    proof = audit_ternary(tensors)
    model = load_tensors(tensors, meta, args.artifact, device)
    seq_len = args.seq_len or model.config.train_seq_len
    if not 0 <= args.stride <= seq_len or seq_len < 1 or args.batch_seqs < 1:
        raise ValueError(f"--stride {args.stride}, --seq-len {seq_len}, --batch-seqs {args.batch_seqs}: the stride "
                         "must be between 0 and the window length, the others positive")
    if model.config.vocab_size != counter.vocab_size:
        raise DataError(
            f"{args.artifact}: the model has {model.config.vocab_size} tokens, {data.tokenizer} {counter.vocab_size}; "
            "score it on the data it was trained for"
        )
    checks = audit_model(model, tokens, seq_len)
    chunked = evaluate(model, tokens, counter, seq_len, seq_len, args.batch_seqs)
    positions = len(tokens) // max(args.stride, 1) * seq_len
    sliding = evaluate(model, tokens, counter, seq_len, args.stride, args.batch_seqs,
                       args.stride < seq_len and positions >= COMPILE_FROM and can_compile(device),
                       ) if args.stride else None
    scored = audited - int(counter.count_stream(tokens[:1])[0])
    if chunked.bytes != scored:
        raise AuditError(f"{chunked.bytes} bytes were scored but the decoded text has {scored}")
    frequencies = np.bincount(tokens) / tokens.size
    unigram = float(-(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum())
    return {
        "artifact": {"file": Path(args.artifact).name, "bytes": len(file), "sha256": artifact_sha256},
        "data": {"sha256": data.hashes, "shards": documents, "origin": origin,
                 "manifest": data.manifest is not None, "tokenizer_sha256": data.tokenizer_sha256,
                 "tokenizer_notes": check_tokenizer(counter.tokenizer, data.tokenizer),
                 "changed_documents": data.manifest.changed_documents if data.manifest else None},
        "trained": {"tokenizer_sha256": artifact_tokenizer(meta), "data": meta.get("data")},
        "model": proof,
        "checks": checks | {"unigram_loss": unigram},
        "seq_len": seq_len,
        "stride": args.stride,
        "chunked": asdict(chunked),
        "sliding": asdict(sliding) if sliding else None,
    }


def report(result: dict) -> str:
    """A score as lines for a reader: what was checked, and what could not be."""
    m, c, d = result["model"], result["checks"], result["data"]
    lines = [
        f"artifact    {result['artifact']['file']}  {result['artifact']['bytes']:,} bytes  "
        f"sha256 {result['artifact']['sha256'][:16]}",
        f"model       {m['parameters']:,} parameters, {m['ternary_weights']:,} ternary in {m['ternary_tensors']} "
        f"tensors, zero_frac {m['zero_frac']:.4f}, all codes in {{-1, 0, 1}}",
    ]
    if m["not_ternary_matrices"]:
        names = ", ".join(m["not_ternary_matrices"][:4])
        lines.append(f"WARNING     {len(m['not_ternary_matrices'])} matrices are not ternary "
                     f"({len(m['unquantized_matrices'])} of them unquantized): {names}")
    named = result["trained"]["tokenizer_sha256"] is not None
    lines.append(f"tokenizer   sha256 {d['tokenizer_sha256'][:16]}, "
                 + ("the one that the artifact names" if named else
                    "NOT CHECKED: the artifact is older than the naming of tokenizers in it"))
    lines += [f"tokenizer   {note}" for note in d["tokenizer_notes"]]
    if not d["manifest"]:
        lines.append("NOTE        the folder has no manifest.json, so only the text itself says that its shards are of "
                     "this tokenizer (next lines)")
    if d["changed_documents"]:
        lines.append(f"NOTE        the tokenizer changed the text of {d['changed_documents']:,} documents; bytes are "
                     "those of the decoded text")
    for name, shard in d["shards"].items():
        origin = d["origin"][name]
        lines.append(f"byte audit  {name}: {shard['documents']:,} documents, {shard['tokens']:,} tokens, "
                     f"{shard['bytes']:,} bytes = UTF-8 length of the decoded text")
        lines.append(f"origin      {name}: {origin['reproduced']:.2%} of its tokens come again when their text is "
                     f"encoded, {origin['pieces_used']:,} of {origin['pieces']:,} pieces occur, "
                     f"{origin['bytes_per_token']:.3f} bytes per token")
        if origin["reproduced"] < 0.99:
            lines.append(f"WARNING     {name}: some of it was not made by this tokenizer as it encodes today")
        if origin["controls"]:
            lines.append(f"WARNING     {name}: {origin['controls']:,} control tokens stand for no bytes")
    lines.append(f"checks      no look-ahead; softmax sums to one within {c['softmax_error']:.1e}; "
                 + ("context is used" if c["uses_context"] else "WARNING: THE MODEL IGNORES ITS CONTEXT"))
    if result["chunked"]["val_loss"] > c["unigram_loss"]:
        lines.append(f"WARNING     the model is worse than the frequencies of the tokens ({c['unigram_loss']:.4f} "
                     "nats): barely trained, or trained on other tokens")
    for name in ("chunked", "sliding"):
        if s := result[name]:
            at = f"stride {result['stride'] if name == 'sliding' else result['seq_len']}"
            lines.append(f"{name:<11} val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}  {at}, "
                         f"window {result['seq_len']}, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
                         f"{s['seconds']:.1f} s")
    return "\n".join(lines)


FOLLOWED = "SCORING_FOR"  # of the environment: the process id of the run whose file is scored


def follow(process: int) -> None:
    """End when the run that asked for this score is gone, however it went: nobody waits for the result, and a new run
    may be at work in its folder."""
    child = os.getppid() == process

    def watch() -> None:
        while os.getppid() == process if child else Path(f"/proc/{process}").exists():
            time.sleep(0.3)
        os._exit(1)

    if child or Path("/proc/self").exists():
        threading.Thread(target=watch, daemon=True).start()


def leave(status: int) -> int:
    """The status of a command that is over; one of several processes ends here and now with it.

    A process group that the compiler has seen outlives its destruction: its threads run on while the interpreter is
    taken down, and one that still lets go of a tensor then aborts the process ("terminate called without an active
    exception"), after the work is done.
    """
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody listens any more
                stream.flush()
        remove_caches()
        os._exit(status)
    return status


def steady_streams() -> None:
    """Let text out whatever the locale is: a character that it does not have is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def unexpected(e: BaseException) -> str:
    """One line of an error that nobody foresaw, with where it came from; TRACEBACK=1 shows all of it instead."""
    if os.environ.get("TRACEBACK"):
        raise e
    if isinstance(e, MemoryError) or "can't allocate memory" in str(e) or "out of memory" in str(e):
        return ("out of memory: use a smaller batch (--micro-batch-tokens, --val-batch-size, --eval-batch-seqs; "
                "--batch-seqs of eval_bpb.py), a smaller model or a larger machine")
    at = traceback.extract_tb(e.__traceback__)[-1:]
    place = f" at {Path(at[0].filename).name}:{at[0].lineno}" if at else ""
    return (f"{type(e).__name__}{place}: {' '.join(str(e).split())[:300]}; nobody expected this: set TRACEBACK=1 "
            "to see where it happened, and report it")


def main(argv: list[str] | None = None) -> int:
    steady_streams()
    return leave(run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Score, or sample, as the arguments say; the exit status."""
    place = Place()
    try:
        if os.environ.get(FOLLOWED, "").isdecimal():
            follow(int(os.environ[FOLLOWED]))
        place = process_place(os.environ)
        if (said := writable_compiler_cache()) and place.rank == 0:
            print(f"notice      {said}", file=sys.stderr)
        if args.json:
            check_json_target(args.json)
        device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        if place.world > 1:
            join_group(place, "nccl" if device.type == "cuda" else "gloo")
        if args.sample is not None:
            data = open_data(args.data, args.tokenizer_path, need_train=False)
            tensors, meta = pack.read_artifact(args.artifact)
            check_identity(meta, data, args.artifact)
            model = load_tensors(tensors, meta, args.artifact, device)
            if place.rank == 0:
                print(sample(model, open_tokenizer(data.tokenizer), args.sample, 200))
            return 0
        result = score_file(args, device)
        if place.rank == 0:
            if args.json:  # first: a terminal may be gone
                write_json(args.json, result)
            try:
                print(report(result), flush=True)
            except OSError as e:
                raise OSError(f"cannot write to the standard output: {e.strerror}") from None
        return 0
    except LaunchError as e:  # every process that meets one says so: it may be the only one
        pack.say_error(e)
        return 2
    except (ValueError, OSError) as e:  # ArtifactError, DataError and AuditError are ValueErrors
        if place.rank == 0 or place.world > 1 and isinstance(e, OSError):  # what rank 0 may not have met itself
            pack.say_error(e)
        else:
            time.sleep(LET_RANK_0_SPEAK)
        return 1
    except KeyboardInterrupt:
        pack.say_error("stopped; nothing was written")
        return 130
    except Exception as e:
        pack.say_error(unexpected(e))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
