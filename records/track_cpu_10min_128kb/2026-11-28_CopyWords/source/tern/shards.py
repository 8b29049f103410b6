"""Data on disk: token shards, and the folder that knows its own identity."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tern.errors import Foreseen
from tern.files import folder_identity, sha256_file

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256  # the official format: int32 header, uint16 tokens


class DataError(Foreseen):
    """A shard, tokenizer or data folder that cannot be used; the message says what, where and what to do."""


class AuditError(Foreseen):
    """A score that must not be printed: its bytes, windows or model failed a check."""


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


class TokenStream:
    """The tokens of shards, one after the other and then again from the first, endlessly; mapped into memory."""

    def __init__(self, shards: tuple[Path, ...], vocab_size: int):
        self.shards, self.vocab_size = shards, vocab_size
        self.ends = np.cumsum([shard_tokens(p) for p in shards])
        self.mapped: dict[int, np.ndarray] = {}
        if self.ends[-1] < 2:
            raise DataError(f"{shards[0].parent}: the training shards hold no text; prepare the folder again")
        first = int(np.flatnonzero(self.ends)[0])  # a whole one: of another tokenizer it would show before training
        self.check(first, self.tokens(first))

    def __len__(self) -> int:
        """Tokens of all shards, once."""
        return int(self.ends[-1])

    def tokens(self, shard: int) -> np.ndarray:
        """uint16 [tokens] of a shard."""
        if shard not in self.mapped:
            self.mapped[shard] = np.memmap(self.shards[shard], dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)
        return self.mapped[shard]

    def counts(self) -> np.ndarray:
        """How often each token occurs in the first shard that has any, int64 [vocab_size]."""
        return np.bincount(self.tokens(int(np.flatnonzero(self.ends)[0])), minlength=self.vocab_size)

    def check(self, shard: int, tokens: np.ndarray) -> None:
        """Raises DataError on a token of another tokenizer."""
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(f"{self.shards[shard]}: token {tokens.max()} with vocab_size={self.vocab_size}; the shard "
                            "is of another tokenizer")

    def read(self, start: int, count: int) -> np.ndarray:
        """count tokens from position start, int64 [count]. Raises DataError on a token of another tokenizer."""
        out, filled = np.empty(count, dtype=np.int64), 0
        while filled < count:
            at = (start + filled) % len(self)
            shard = int(np.searchsorted(self.ends, at, side="right"))
            offset = at - (int(self.ends[shard - 1]) if shard else 0)
            piece = self.tokens(shard)[offset : offset + count - filled]
            self.check(shard, piece)
            out[filled : filled + piece.size] = piece
            filled += piece.size
        return out


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
    odd = [p for p in (*train, *val) if not p.is_file()]
    if odd:
        raise DataError(f"{odd[0]}: not a file; remove it, or put the shard itself there")
    tokenizer = Path(tokenizer_path) if tokenizer_path else find_tokenizer(path)
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no tokenizer; give one with --tokenizer-path, or run: python data/prepare.py")

    hashes = {p.name: sha256_file(p) for p in (*train, *val)}
    tokenizer_sha256, name = sha256_file(tokenizer), tokenizer.name
    manifest = read_manifest(path, tokenizer_elsewhere=bool(tokenizer_path))
    if manifest:
        name = manifest.tokenizer  # so that a copy under another name gives the same identity
        stray = [p for p in (*train, *val) if p.name not in manifest.hashes]
        if stray:
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
        other = val_hashes.get(hashes[shard.name])
        if other:
            raise DataError(f"{shard}: the same as {other.name}; its text would be scored twice: remove one of them")
        val_hashes[hashes[shard.name]] = shard
    for shard in train:
        if hashes[shard.name] in val_hashes:
            raise DataError(
                f"{shard}: this training shard is the validation shard {val_hashes[hashes[shard.name]].name}; "
                "a model trained on it cannot be scored: remove it"
            )
    return DataFolder(path, train, val, tokenizer, hashes | {name: tokenizer_sha256}, tokenizer_sha256, manifest)


def find_tokenizer(folder: Path) -> Path:
    """tokenizer.model of a data folder, or the one *.model that it has; there may be none."""
    named, models = folder / "tokenizer.model", sorted(folder.glob("*.model"))
    return models[0] if len(models) == 1 and not named.is_file() else named


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
