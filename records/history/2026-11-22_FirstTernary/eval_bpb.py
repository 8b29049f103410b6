"""Score an artifact in bits per byte, from the file on disk, and audit every byte of the score.

    python eval_bpb.py ARTIFACT --data DIR [--stride S] [--json OUT]
    torchrun --standalone --nproc_per_node=N eval_bpb.py ARTIFACT --data DIR     # windows shared by N processes

bpb = (sum of the scored tokens' negative log-likelihoods in nats / ln 2) / (UTF-8 bytes of the same tokens).

Three things can make such a number wrong: bytes, windows and the model. Each has its own section here, and each
is checked on every run: the byte counter against the decoded text of every validation document, the windows by
counting that each token is scored once, the model by tests for look-ahead, for normalisation and for ternary codes.
If a check of the score fails, no score is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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


def read_shard(path: str | Path) -> np.ndarray:
    """Tokens of one shard, uint16 [tokens]. Raises DataError as shard_tokens does."""
    return np.fromfile(path, dtype="<u2", count=shard_tokens(path), offset=4 * SHARD_HEADER_INTS)


def folder_identity(hashes: dict[str, str]) -> str:
    """One hash for a set of files: sha256 over the sorted lines "<sha256>  <file name>"."""
    lines = "\n".join(f"{sha}  {name}" for name, sha in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class DataFolder:
    """A folder of shards and its tokenizer, with the sha256 of every file."""

    path: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    tokenizer: Path
    hashes: dict[str, str]  # file name -> sha256, of the files that were opened

    @property
    def identity(self) -> str:
        return folder_identity(self.hashes)


def open_data(path: str | Path, tokenizer_path: str | Path = "", need_train: bool = True) -> DataFolder:
    """Find and verify shards and tokenizer.

    Files are `*_train_*.bin`, `*_val_*.bin` and `tokenizer.model` (or the one `*.model`, or tokenizer_path). Where a
    manifest.json says what a file's hash is, it must be that. Raises DataError, also when a training shard has the
    content of a validation shard: training on it would make every score worthless.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such data folder; prepare the default one with: python data/prepare.py")
    train = tuple(sorted(path.glob("*_train_*.bin"))) if need_train else ()
    val = tuple(sorted(path.glob("*_val_*.bin")))
    for split, shards in (("train", train), ("val", val)):
        if not shards and (need_train or split == "val"):
            raise DataError(f"{path}: no *_{split}_*.bin shard; prepare the folder with: python data/prepare.py")
    tokenizer = Path(tokenizer_path) if tokenizer_path else path / "tokenizer.model"
    models = sorted(path.glob("*.model"))
    if not tokenizer_path and not tokenizer.is_file() and len(models) == 1:
        tokenizer = models[0]
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no tokenizer; give one with --tokenizer-path, or run: python data/prepare.py")

    hashes = {p.name: sha256_file(p) for p in (*train, *val, tokenizer)}
    for name, sha in read_manifest(path).items():
        if name in hashes and hashes[name] != sha:
            raise DataError(
                f"{path / name}: sha256 {hashes[name]} is not the manifest's {sha}; the file was changed or damaged: "
                "delete the folder and prepare it again"
            )
    val_hashes = {hashes[p.name]: p for p in val}
    for shard in train:
        if hashes[shard.name] in val_hashes:
            raise DataError(
                f"{shard}: this training shard is the validation shard {val_hashes[hashes[shard.name]].name}; "
                "a model trained on it cannot be scored: remove it"
            )
    return DataFolder(path, train, val, tokenizer, hashes)


def read_manifest(path: Path) -> dict[str, str]:
    """File name -> sha256 as the folder's manifest.json states them; empty without a manifest (official shards)."""
    file = path / "manifest.json"
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text())
        shards = [s for split in manifest["splits"].values() for s in split["shards"]]
        hashes = {s["file"]: s["sha256"] for s in (*shards, manifest["tokenizer"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{file}: not a manifest of data/prepare.py ({e!r}); prepare the folder again") from None
    missing = [name for name in hashes if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path / missing[0]}: named in manifest.json but missing; prepare the folder again")
    return hashes


# ---------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------


def open_tokenizer(path: str | Path) -> spm.SentencePieceProcessor:
    try:
        return spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        raise DataError(f"{path}: not a SentencePiece model ({e}); run: python data/prepare.py") from None


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
        for i in range(self.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.boundary[i] = True
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
    Returns name -> {documents, tokens, bytes}. Raises AuditError at the first document whose count differs.
    """
    names = list(shards)
    tokens = np.concatenate([shards[n] for n in names])
    ends = np.cumsum([shards[n].size for n in names])
    counted = np.concatenate(([0], np.cumsum(counter.count_stream(tokens))))
    starts = np.union1d(np.flatnonzero(tokens == counter.bos_id), [0]) if tokens.size else np.zeros(0, dtype=np.int64)
    bounds = np.append(starts, tokens.size)
    report = {n: {"documents": 0, "tokens": int(shards[n].size), "bytes": 0} for n in names}
    batch = 256  # documents decoded per call, so that the text of a large split is never in memory at once
    for lo in range(0, len(starts), batch):
        hi = min(lo + batch, len(starts))
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


def position_losses(model, ids: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Losses in nats, fp32 [number of True in scored]. ids, targets, scored: [batch, time]."""
    hidden = model.hidden(ids)[scored]
    rows = zip(hidden.split(HEAD_ROWS), targets[scored].split(HEAD_ROWS), strict=True)
    return torch.cat([F.cross_entropy(model.head(h), t, reduction="none") for h, t in rows])


@torch.inference_mode()
def evaluate(model, tokens, counter: ByteCounter, seq_len: int, stride: int, batch_seqs: int = 32) -> Score:
    """Score a token stream [n + 1] with windows of seq_len tokens, batch_seqs windows at a time.

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
    batches = [slice(i, i + batch_seqs) for i in range(0, len(windows), batch_seqs)]
    sums = torch.zeros(len(windows), dtype=torch.float64, device=device)
    stream = torch.from_numpy(tokens)
    for batch in batches[rank::world]:
        start, end, score_from = (torch.from_numpy(column) for column in windows[batch].T)
        position = start[:, None] + torch.arange(int((end - start).max()))  # windows of one batch are equally long
        scored = (position >= score_from[:, None]).to(device)
        losses = position_losses(model, stream[position].to(device), stream[position + 1].to(device), scored)
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Score an artifact in bits per byte.", allow_abbrev=False)
    p.add_argument("artifact", help="file written by train_gpt.py")
    p.add_argument("--data", required=True, help="folder with *_val_*.bin shards and their tokenizer")
    p.add_argument("--tokenizer-path", default="", help="tokenizer, if it is not in the data folder")
    p.add_argument("--stride", type=int, default=64, help="sliding-window stride in tokens; 0: chunked score only")
    p.add_argument("--seq-len", type=int, default=0, help="window length in tokens; 0: the model's training length")
    p.add_argument("--batch-seqs", type=int, default=32, help="windows per batch")
    p.add_argument("--json", default="", help="write the result to this file as well")
    return p.parse_args(argv)


def score_file(args: argparse.Namespace, device: torch.device) -> dict:
    """All checks and scores of one artifact, as the JSON that --json writes."""
    data = open_data(args.data, args.tokenizer_path, need_train=False)
    counter = ByteCounter(data.tokenizer)
    shards = {p.name: read_shard(p) for p in data.val}
    documents = audit_bytes(shards, counter)
    tokens = np.concatenate(list(shards.values()))
    tensors, meta = pack.read_artifact(args.artifact)
    proof = audit_ternary(tensors)
    model = load_tensors(tensors, meta, args.artifact, device)
    seq_len = args.seq_len or model.config.train_seq_len
    if not 0 <= args.stride <= seq_len or seq_len < 1 or args.batch_seqs < 1:
        raise ValueError(f"--stride {args.stride}, --seq-len {seq_len}, --batch-seqs {args.batch_seqs}: the stride "
                         "must be between 0 and the window length, the others positive")
    if len(tokens) < 2:
        raise DataError(f"{data.path}: nothing to score, the validation shards hold {len(tokens)} token(s)")
    if model.config.vocab_size != counter.vocab_size:
        raise DataError(
            f"{args.artifact}: the model has {model.config.vocab_size} tokens, {data.tokenizer} {counter.vocab_size}; "
            "score it on the data it was trained for"
        )
    checks = audit_model(model, tokens, seq_len)
    chunked = evaluate(model, tokens, counter, seq_len, seq_len, args.batch_seqs)
    sliding = evaluate(model, tokens, counter, seq_len, args.stride, args.batch_seqs) if args.stride else None
    audited = sum(d["bytes"] for d in documents.values()) - int(counter.count_stream(tokens[:1])[0])
    if chunked.bytes != audited:
        raise AuditError(f"{chunked.bytes} bytes were scored but the decoded text has {audited}")
    return {
        "artifact": {"file": Path(args.artifact).name, "bytes": Path(args.artifact).stat().st_size,
                     "sha256": sha256_file(args.artifact)},
        "data": {"sha256": data.hashes, "shards": documents},
        "model": proof,
        "checks": checks,
        "seq_len": seq_len,
        "stride": args.stride,
        "chunked": asdict(chunked),
        "sliding": asdict(sliding) if sliding else None,
    }


def report(result: dict) -> str:
    m, c = result["model"], result["checks"]
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
    for name, d in result["data"]["shards"].items():
        lines.append(f"byte audit  {name}: {d['documents']:,} documents, {d['tokens']:,} tokens, {d['bytes']:,} bytes "
                     "= UTF-8 length of the decoded text")
    lines.append(f"checks      no look-ahead; softmax sums to one within {c['softmax_error']:.1e}; "
                 + ("context is used" if c["uses_context"] else "WARNING: THE MODEL IGNORES ITS CONTEXT"))
    for name in ("chunked", "sliding"):
        if s := result[name]:
            at = f"stride {result['stride'] if name == 'sliding' else result['seq_len']}"
            lines.append(f"{name:<11} val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}  {at}, "
                         f"window {result['seq_len']}, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
                         f"{s['seconds']:.1f} s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    try:
        result = score_file(args, device)
        if rank == 0:
            print(report(result), flush=True)
            if args.json:
                pack.write_atomic(args.json, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
        return 0
    except (ValueError, OSError) as e:  # ArtifactError, DataError and AuditError are ValueErrors
        if rank == 0 or world > 1 and isinstance(e, OSError):  # what rank 0 may not have met itself
            print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
