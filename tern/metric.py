"""The score: every byte of it audited, every token scored once, in windows that tile the stream.

bpb = (sum of the scored tokens' negative log-likelihoods in nats / ln 2) / (UTF-8 bytes of the same tokens).

Nothing here is for tuning.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tern.machine import tag_compiler_cache
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


def check_scorable(tokens: np.ndarray, counter: ByteCounter, where: str | Path) -> None:
    """Raises DataError on validation tokens of which nothing can be scored."""
    if len(tokens) < 2 or not counter.count_stream(tokens)[1:].any():
        raise DataError(f"{where}: nothing to score, the {len(tokens)} validation token(s) stand for no text; prepare "
                        "the data again")


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
