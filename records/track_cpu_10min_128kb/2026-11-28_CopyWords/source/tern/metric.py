"""The score: every byte of it audited, every token scored once, in windows that tile the stream.

bpb = (sum of the scored tokens' negative log-likelihoods in nats / ln 2) / (UTF-8 bytes of the same tokens).

Nothing here is for tuning.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tern.machine import tag_compiler_cache
from tern.shards import AuditError, DataError
from tern.tokenizers import ByteCounter


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
    """What the model's head takes, [batch, last, ..], of the last positions of ids; all are computed where it must."""
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
def same_logits(a, b, tokens: np.ndarray) -> bool:
    """Whether two models on one device give the same bits on these tokens, four sequences of them if there are four."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(next(a.parameters()).device)
    ids = ids[: len(ids) // 4 * 4].view(4, -1) if len(ids) >= 4 else ids[None]
    return torch.equal(*(model.head(model.hidden(ids)) for model in (a, b)))


@torch.inference_mode()
def evaluate(model, tokens, counter: ByteCounter, seq_len: int, stride: int, batch_seqs: int = 32,
             compiled: bool = False, kept: Tensor | None = None,
             learn: Callable[[int], None] | None = None) -> Score:
    """Score a token stream [n + 1] with windows of seq_len tokens, batch_seqs windows at a time.

    compiled: compile the forward of full batches, which is worth its while on long streams (COMPILE_FROM).
    kept: zeros, fp32 [n] on the model's device, that take the loss of every token, in nats, for those who ask where the
    bits went (tern/spread.py); the score does not look at it.
    learn: called with the number of positions that have their scores, after each batch: the model may learn from those
    (tern/adapt.py), and no score of before changes. In one process only.

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
    if learn is not None and world > 1:
        raise ValueError("a model that learns from what it scores is scored in order, by one process")
    # The first window is scored whole, all others at their end only: apart, they need little of the last block (a model
    # that copies needs all of it).
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
        if kept is not None:
            kept[at_end.to(device)[scored]] = losses
        padded = torch.zeros(scored.shape, dtype=torch.float64, device=device)
        padded[scored] = losses.double()
        sums[batch] = padded.sum(1)
        if learn is not None:
            learn(int(end[-1]))
    if world > 1:
        dist.all_reduce(sums)  # each window has one non-zero term, so this is exact
        if kept is not None:
            dist.all_reduce(kept)
    total = math.fsum(sums.tolist())
    before = np.concatenate(([0], np.cumsum(per_token)))
    scored_tokens = int((windows[:, 1] - windows[:, 2]).sum())
    scored_bytes = int((before[windows[:, 1]] - before[windows[:, 2]]).sum())
    if scored_tokens != len(tokens) - 1 or scored_bytes != int(per_token.sum()):
        raise AuditError(f"windows scored {scored_tokens} tokens, {scored_bytes} bytes of {len(tokens) - 1} tokens")
    if not math.isfinite(total):
        raise AuditError("the validation loss is not finite; "
                         + ("what learns does so at too high a rate" if learn else "the model is broken"))
    bpb = total / math.log(2) / scored_bytes if scored_bytes else math.inf
    return Score(total / scored_tokens, bpb, scored_tokens, scored_bytes, time.perf_counter() - began)
