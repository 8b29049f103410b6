"""Audits of a text's tokens: are its bytes counted right, and are they this tokenizer's at all? No torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tern.shards import AuditError, DataError, DataFolder, read_shard
from tern.tokenizers import ByteCounter, check_provable, check_tokenizer


def document_bounds(tokens: np.ndarray, counter: ByteCounter) -> np.ndarray:
    """Where documents begin, and the end of the stream: int64 [documents + 1]. A stream without BOS is one document."""
    if not tokens.size:
        return np.zeros(1, dtype=np.int64)
    return np.append(np.union1d(np.flatnonzero(tokens == counter.bos_id), [0]), tokens.size)


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
    unknown = int(counter.unknown[tokens].sum())
    if unknown:
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


def check_scorable(tokens: np.ndarray, counter: ByteCounter, where: str | Path) -> None:
    """Raises DataError on validation tokens of which nothing can be scored."""
    if len(tokens) < 2 or not counter.count_stream(tokens)[1:].any():
        raise DataError(f"{where}: nothing to score, the {len(tokens)} validation token(s) stand for no text; prepare "
                        "the data again")


ORIGIN_TOKENS = 200_000  # of each training shard without a manifest, that are asked whose they are


@dataclass(frozen=True)
class Audit:
    """What the validation text proved to be."""

    tokens: np.ndarray  # uint16 [tokens], all shards
    documents: dict[str, dict[str, int]]  # shard -> documents, tokens and bytes (audit_bytes)
    origin: dict[str, dict]  # shard -> whose tokens they are (audit_origin)

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.documents.values())


def audit_validation(data: DataFolder, counter: ByteCounter) -> Audit:
    """Every audit of the validation text. Raises AuditError and DataError."""
    shards = {path.name: read_shard(path) for path in data.val}
    documents = audit_bytes(shards, counter)
    origin = {name: audit_origin(tokens, counter, data.path / name) for name, tokens in shards.items()}
    found = Audit(np.concatenate(list(shards.values())), documents, origin)
    check_scorable(found.tokens, counter, data.path)
    if data.manifest and data.manifest.val_bytes not in (None, found.bytes):
        raise AuditError(f"{data.path / 'manifest.json'}: states {data.manifest.val_bytes:,} bytes of validation text, "
                         f"the decoded text has {found.bytes:,}; prepare the folder again")
    return found


def audit_before_training(data: DataFolder, counter: ByteCounter) -> list[str]:
    """Whether all shards are of this tokenizer, before anything is trained; what a run's log must say of them.

    The process that scores asks again. Raises AuditError and DataError.
    """
    check_provable(data)
    found = audit_validation(data, counter)
    notices = check_tokenizer(counter.tokenizer, data.tokenizer)
    if data.manifest:
        return notices
    notices.append(f"{data.path} has no manifest.json: only their text says that its shards are of this tokenizer")
    known = np.zeros(counter.vocab_size, dtype=bool)
    for path in data.train:
        tokens = read_shard(path, ORIGIN_TOKENS)
        audit_origin(tokens, counter, path)
        known[tokens] = True
    unseen = float(np.mean(~known[found.tokens]))
    if unseen > 0.01:
        notices.append(f"{unseen:.1%} of the validation tokens are pieces that do not occur in the first "
                       f"{ORIGIN_TOKENS:,} tokens of any training shard: is it the same kind of text?")
    return notices
