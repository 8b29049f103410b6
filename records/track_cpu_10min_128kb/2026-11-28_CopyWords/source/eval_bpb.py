"""Score an artifact in bits per byte, from the file on disk, and audit every byte of the score.

    python eval_bpb.py ARTIFACT --data DIR [--stride S] [--json OUT] [--adapt RATE]
    python eval_bpb.py sample ARTIFACT --tokenizer MODEL --prompt "Once upon"    # see what it says; --help: more
    torchrun --standalone --nproc_per_node=N eval_bpb.py ARTIFACT --data DIR     # windows shared by N processes

bpb = (sum of the scored tokens' negative log-likelihoods in nats / ln 2) / (UTF-8 bytes of the same tokens).

Three things can make such a number wrong: bytes, windows and the model. Each is checked on every run: the byte counter
against the decoded text of every validation document (tern/audits.py), the windows by counting that each token is
scored once (tern/metric.py), the model by tests for look-ahead, for normalisation and for ternary codes (below). If a
check of the score fails, no score is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import pack
import train_gpt
from tern import audits, command, machine, metric, processes, spread
from tern.adapt import Adapter
from tern.copying import Copying
from tern.files import sha256_file, write_atomic
from tern.metric import Score, evaluate, position_losses, sliding_windows
from tern.packed import pack_matrices
from tern.processes import LaunchError, Place
from tern.sampling import Context, TextStream, continue_tokens
from tern.shards import AuditError, DataError, open_data, read_shard
from tern.tokenizers import ByteCounter, check_provable, check_tokenizer

# The metric lies in tern/, where no program changes it; these names of it belong to scoring, so they are here too.
__all__ = ["AuditError", "ByteCounter", "DataError", "Score", "evaluate", "load_artifact", "open_data", "read_shard",
           "sliding_windows"]

# ---------------------------------------------------------------------------------------------------------------
# The model, and whether it is what it claims
# ---------------------------------------------------------------------------------------------------------------


def load_artifact(path: str | Path, device: str | torch.device = "cpu") -> train_gpt.GPT:
    """The model rebuilt from an artifact, or its export to safetensors, on device, in eval mode.

    Raises pack.ArtifactError.
    """
    read = pack.read_exported if Path(path).suffix == ".safetensors" else pack.read_artifact
    return load_tensors(*read(path), path, device)


def load_tensors(tensors: dict[str, pack.StoredTensor], meta: dict, path: str | Path,
                 device: str | torch.device) -> train_gpt.GPT:
    try:
        return train_gpt.model_from_stored(tensors, meta).to(device).eval()
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
    matrices = [n for n, t in tensors.items()
                if len(t.shape) == 2 and n.startswith(train_gpt.MATRICES) and min(t.shape) > 2]
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
    if not base.isfinite().all():
        raise AuditError("the losses of the first window are not finite; the model is broken")
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
# The model one token at a time
# ---------------------------------------------------------------------------------------------------------------


class KeepingAttention(train_gpt.Attention):
    """Attention over new positions, which see those before by the keys and values that were kept of them."""

    def make_room(self, positions: int) -> None:
        """For keys and values of so many positions, of which none is known."""
        self.known = 0
        self.kept = self.q_gain.new_empty(2, 1, self.kv_heads, positions, self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        """x, and the queries, are of new positions; cos, sin and last are those of all."""
        new = x.shape[1]
        return super().forward(x, cos[-new:], sin[-new:], min(last, new))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, self.known = self.known, self.known + k.shape[2]
        for kept, new in zip(self.kept, (k, v), strict=True):
            kept[:, :, start : self.known] = new
        return super().mix(q, *self.kept[:, :, :, : self.known])


class KeepingCopying(Copying):
    """Copying to new positions, from those before by the keys that were kept of them."""

    def make_room(self, positions: int) -> None:
        self.known = 0
        self.kept = self.scale_and_bias.new_empty(1, positions, self.c_k.out_features)

    def keys(self, states: Tensor) -> Tensor:
        start, self.known = self.known, self.known + states.shape[1]
        self.kept[:, start : self.known] = super().keys(states)
        return self.kept[:, : self.known]


class Cached(train_gpt.GPT):
    """The same function as a model, whose params it shares, for one sequence [1, time] of at most `room` tokens.

    It keeps keys and values, and computes only what follows the longest beginning that a sequence has in common with
    the one before it. So a token more takes one position's work, and no order of calls gives another result.
    """

    def __init__(self, model: train_gpt.GPT, room: int):
        with machine.no_values():
            super().__init__(model.config)
        self.load_state_dict(model.state_dict(), assign=True)
        for module in self.modules():
            for plain, keeping in ((train_gpt.Attention, KeepingAttention), (Copying, KeepingCopying)):
                if isinstance(module, plain):
                    module.__class__ = keeping
        self.keeping = [m for m in self.modules() if isinstance(m, KeepingAttention | KeepingCopying)]
        for module in self.keeping:
            module.make_room(room)
        self.ids, self.known = self.tok_emb.weight.new_empty(1, 0, dtype=torch.int64), 0
        self.eval()

    def hidden_last(self, ids: Tensor, last: int) -> Tensor:
        both = min(ids.shape[1] - last, self.ids.shape[1])
        same = ids[0, :both] == self.ids[0, :both]
        self.known = int(same.cumprod(0).sum())
        self.ids = ids[:, : self.known]  # until the others are there
        for module in self.keeping:
            module.known = self.known
        hidden = super().hidden_last(ids, last)
        self.ids = ids
        return hidden

    def embed(self, ids: Tensor) -> Tensor:
        """Of the positions that are not known; an embedding knows of the token before, and of no other."""
        start = max(self.known - 1, 0)
        return super().embed(ids[:, start:])[:, self.known - start :]


def for_sampling(model: train_gpt.GPT, window: int) -> train_gpt.GPT:
    """The model, made faster at one token after the other; ablations/program.py knows where it must stay as it is."""
    cached = Cached(model, window)
    pack_matrices(cached)
    return cached


# ---------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Of either command; `work` is the function that does it."""
    return parse_sample_args(argv[1:]) if argv[:1] == ["sample"] else parse_score_args(argv)


def parse_score_args(argv: list[str]) -> argparse.Namespace:
    p = command.Parser(description="Score an artifact in bits per byte.", allow_abbrev=False,
                       epilog="eval_bpb.py sample --help: let it continue a text.")
    p.add_argument("artifact", help="file written by train_gpt.py")
    p.add_argument("--data", required=True, help="folder with *_val_*.bin shards and their tokenizer")
    p.add_argument("--tokenizer-path", default="", help="tokenizer, if it is not in the data folder")
    p.add_argument("--stride", type=int, help="sliding-window stride in tokens; 0: chunked score only; left out: 64, "
                   "or a quarter of the window where attention sees no more than that")
    p.add_argument("--seq-len", type=int, default=0, help="window length in tokens; 0: the one that the model's "
                   "settings have for scores")
    p.add_argument("--batch-seqs", type=int, help="windows per batch; left out: 32, or 8 where attention sees no "
                   "more than a quarter of the window")
    p.add_argument("--adapt", type=float, default=0.0, metavar="RATE", help="score once more by a model that learns "
                   "from each batch after its score (test-time training), at this rate in units of each parameter's "
                   "size; 0.001 is a good one")
    p.add_argument("--json", default="", help="write the result to this file as well")
    p.add_argument("--details", default="", help="write what is behind the score to this file: bytes of each tensor, "
                   "where the bits go (tern/report.py shows it)")
    p.set_defaults(work=score)
    return p.parse_args(argv)


def parse_sample_args(argv: list[str]) -> argparse.Namespace:
    p = command.Parser(prog="eval_bpb.py sample", allow_abbrev=False, description="Continue a text, as an artifact's "
                       "model does: the text and what follows go to the standard output, all else to the error file.")
    p.add_argument("artifact", help="file written by train_gpt.py")
    p.add_argument("--tokenizer", required=True, metavar="MODEL", help="the model's own: tokenizer.model of its data")
    p.add_argument("--prompt", help="the text; left out: what comes from the standard input, if that is no terminal, "
                   "without the newline at its end")
    p.add_argument("--tokens", type=int, default=200, help="how many more; controls (BOS, padding) and unknown never "
                   "come")
    p.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0: always the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that have this share "
                   "together, and no others")
    p.add_argument("--seed", type=int, default=0, help="another one, another text")
    p.add_argument("--seq-len", type=int, default=0, help="tokens that the model sees at most; over that, it goes on "
                   "from the newest half of them; 0: as many as in windows of scores")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    p.add_argument("--threads", type=int, default=1, help="of the CPU; 0: as many as cores. More than one wait for "
                   "each other hundreds of times a token, which on a busy machine takes longer than the work")
    p.set_defaults(work=sample)
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


def check_identity(meta: dict, tokenizer: Path, sha256: str, artifact: str | Path) -> None:
    """Raises DataError if the artifact was trained with another tokenizer than this one, whose sha256 is given."""
    trained_with = artifact_tokenizer(meta)
    if trained_with not in (None, sha256):
        raise DataError(
            f"{artifact}: was trained with the tokenizer of sha256 {trained_with[:16]}, {tokenizer} is {sha256[:16]}: "
            "its tokens mean other text to this model; use its own tokenizer, and data made with that"
        )


def check_vocabulary(model: train_gpt.GPT, counter: ByteCounter, tokenizer: Path, artifact: str | Path) -> None:
    """Raises DataError unless model and tokenizer have equally many tokens."""
    if model.config.vocab_size != counter.vocab_size:
        raise DataError(
            f"{artifact}: the model has {model.config.vocab_size} tokens, {tokenizer} {counter.vocab_size}; use the "
            "tokenizer and the data that it was trained with"
        )


def check_json_target(option: str, path: str, keys: set[str]) -> None:
    """Raises ValueError where an option would overwrite anything but an older JSON of this program, with such keys."""
    if not os.path.isfile(path):
        return  # new, a device, or an error of writing that names it
    try:
        with open(path, encoding="utf-8") as f:
            older = json.loads(f.read(1 << 24))
        if keys <= older.keys():
            return
    except (ValueError, AttributeError, RecursionError):
        pass  # the same answer
    raise ValueError(f"{option} {path}: the file is not one that this program wrote there, so it is not overwritten; "
                     "choose another name")


def write_json(path: str, result: dict) -> None:
    """To a file, all or nothing, or to a device such as /dev/stdout."""
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
    else:
        write_atomic(path, text.encode())


def score_file(args: argparse.Namespace, device: torch.device) -> tuple[dict, Callable[[], dict]]:
    """All checks and scores of one artifact, as the JSON that --json writes, and what makes that of --details."""
    data = open_data(args.data, args.tokenizer_path, need_train=False)
    file = pack.read_bytes(args.artifact)
    artifact_sha256 = hashlib.sha256(file).hexdigest()
    tensors, meta = pack.with_path(args.artifact, pack.decode_artifact, file)
    check_identity(meta, data.tokenizer, data.tokenizer_sha256, args.artifact)
    processes.check_agreement({"artifact": artifact_sha256, "data": data.identity,
                               "settings": [args.stride, args.seq_len, args.batch_seqs]}, device)
    counter = ByteCounter(data.tokenizer)
    if artifact_tokenizer(meta) is None:
        check_provable(data)
    text = audits.audit_validation(data, counter)
    tokens = text.tokens
    proof = audit_ternary(tensors)
    model = load_tensors(tensors, meta, args.artifact, device)
    seq_len = args.seq_len or model.config.score_len
    # Where attention sees little of a window, it sees as much at all positions but the first, whatever the stride.
    short = 0 < model.config.attn_window <= seq_len // 4
    args.stride = (seq_len // 4 if short else 64) if args.stride is None else args.stride
    args.batch_seqs = (8 if short else 32) if args.batch_seqs is None else args.batch_seqs
    if not 0 <= args.stride <= seq_len or seq_len < 1 or args.batch_seqs < 1:
        raise ValueError(f"--stride {args.stride}, --seq-len {seq_len}, --batch-seqs {args.batch_seqs}: the stride "
                         "must be between 0 and the window length, the others positive")
    if not 0 <= args.adapt < math.inf or args.adapt and not args.stride:
        raise ValueError(f"--adapt {args.adapt}, --stride {args.stride}: a rate is not negative, and what "
                         "learns is scored by sliding windows, so give a stride")
    check_vocabulary(model, counter, data.tokenizer, args.artifact)
    checks = audit_model(model, tokens, seq_len)
    kept = [torch.zeros(len(tokens) - 1, device=device) if args.details else None for _ in range(2)]
    chunked = evaluate(model, tokens, counter, seq_len, seq_len, args.batch_seqs, kept=kept[0])
    positions = len(tokens) // max(args.stride, 1) * seq_len
    compiles = args.stride < seq_len and positions >= metric.COMPILE_FROM and machine.can_compile(device)
    sliding = None
    if args.stride:
        sliding = evaluate(model, tokens, counter, seq_len, args.stride, args.batch_seqs, compiles, kept=kept[1])
    adapted = None
    if args.adapt:  # last: the model is another one afterwards
        learn = Adapter(model, tokens, seq_len, args.adapt)
        adapted = evaluate(model, tokens, counter, seq_len, args.stride, args.batch_seqs, compiles, learn=learn)
    scored = text.bytes - int(counter.count_stream(tokens[:1])[0])
    if chunked.bytes != scored:
        raise AuditError(f"{chunked.bytes} bytes were scored but the decoded text has {scored}")
    frequencies = np.bincount(tokens) / tokens.size
    unigram = float(-(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum())
    result = {
        "artifact": {"file": Path(args.artifact).name, "bytes": len(file), "sha256": artifact_sha256},
        "data": {"sha256": data.hashes, "shards": text.documents, "origin": text.origin,
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
    if adapted:
        result["adapted"] = asdict(adapted) | {"rate": args.adapt, "batch_seqs": args.batch_seqs, "steps": learn.steps}
    return result, lambda: details_of(file, tensors, result, tokens, counter, kept)


def details_of(file: bytes, tensors: dict[str, pack.StoredTensor], result: dict, tokens: np.ndarray,
               counter: ByteCounter, kept: list[Tensor]) -> dict:
    """What is behind a score, as the JSON that --details writes: pack.py's inspection, a ternary matrix as a picture,
    and the bits by document and position. kept: every token's loss in chunks, and in sliding windows.

    Raises AuditError where the losses are not those of the score; those of a technique that scores in its own way, and
    keeps none, are left out.
    """
    losses: dict[str, np.ndarray] = {}
    where = None
    for name, found in zip(("chunked", "sliding"), kept, strict=True):
        if result[name] and bool(found.any()):
            losses[name] = found.double().cpu().numpy()
            total = result[name]["val_loss"] * result[name]["tokens"]
            if not abs(losses[name].sum() - total) <= 1e-6 * total:
                raise AuditError(f"the {name} losses of all tokens add up to {losses[name].sum():.6f} nats, the score "
                                 f"says {total:.6f}")
    if losses:
        seq_len = result["seq_len"]
        chunks = sliding_windows(len(tokens) - 1, seq_len, seq_len)
        where = asdict(spread.spread(tokens, counter, losses, seq_len, chunks))
    picture = spread.picture({name: t.codes for name, t in tensors.items() if t.format["kind"] == "ternary"
                              and len(t.shape) == 2})
    return {"artifact": result["artifact"], "data": result["data"]["sha256"],
            "inspection": pack.describe(file, tensors), "picture": asdict(picture) if picture else None,
            "entropies": {name: spread.entropy(t.codes) for name, t in tensors.items()},
            "spread": where}


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
        s = result[name]
        if s:
            at = f"stride {result['stride'] if name == 'sliding' else result['seq_len']}"
            lines.append(f"{name:<11} val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}  {at}, "
                         f"window {result['seq_len']}, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
                         f"{s['seconds']:.1f} s")
    if s := result.get("adapted"):
        lines.append(f"adapted     val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}  "
                     f"{s['val_bpb'] - result['sliding']['val_bpb']:+.4f} by learning from what was scored, "
                     f"{s['steps']:,} steps at rate {s['rate']:g}, {s['seconds']:.1f} s; the file's own score is the "
                     "one above")
    return "\n".join(lines)


def score(args: argparse.Namespace, place: Place) -> None:
    """The first command: score, and report."""
    for option, path, keys in (("--json", args.json, {"artifact", "chunked"}),
                               ("--details", args.details, {"artifact", "inspection"})):
        if path:
            check_json_target(option, path, keys)
    if args.adapt and place.world > 1:
        raise LaunchError("--adapt: takes one process, which scores in order; start it without torchrun, and unset "
                          "WORLD_SIZE")
    device = machine.pick_device("auto", place.local_rank)
    machine.prepare_device(device)
    if place.world > 1:
        processes.join_group(place, "nccl" if device.type == "cuda" else "gloo")
    result, details = score_file(args, device)
    if place.rank == 0:
        if args.json:  # first: a terminal may be gone
            write_json(args.json, result)
        command.write_out(report(result) + "\n")
        if args.details:
            try:
                write_json(args.details, details())
            except (AuditError, MemoryError) as e:  # the score holds without them
                print(f"notice      {args.details} was not written: {e or 'no memory'}", file=sys.stderr)


def prompt_text(given: str | None) -> str:
    """What --prompt gives, else the standard input, else nothing. Raises ValueError on what is no text."""
    try:
        if given is not None:
            return os.fsencode(given).decode()
        if sys.stdin is None or sys.stdin.isatty():
            return ""
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as e:
        where = "the standard input" if given is None else "--prompt"
        raise ValueError(f"{where}: not UTF-8 text (byte {e.start}: {e.object[e.start]:#x}); convert it") from None


def sample(args: argparse.Namespace, place: Place) -> None:
    """The second command: a text, and how the model continues it, as it comes."""
    if place.world > 1:
        raise LaunchError("sample: takes one process; start it without torchrun, and unset WORLD_SIZE")
    if not (args.tokens > 0 and 0 <= args.temperature < math.inf and 0 < args.top_p <= 1 and args.seq_len >= 0
            and 0 <= args.seed < 2**63 and 0 <= args.threads <= 1024):
        raise ValueError(f"--tokens {args.tokens}, --temperature {args.temperature}, --top-p {args.top_p}, --seq-len "
                         f"{args.seq_len}, --seed {args.seed}, --threads {args.threads}: none may be negative, tokens "
                         "and top-p are above 0, top-p is at most 1, threads are at most 1024")
    prompt, tokenizer = prompt_text(args.prompt), Path(args.tokenizer)
    device = machine.pick_device(args.device, place.local_rank)
    machine.prepare_device(device)
    torch.set_num_threads(args.threads or machine.cores())
    began = time.perf_counter()
    counter = ByteCounter(tokenizer)
    ids = [counter.bos_id, *counter.tokenizer.encode(prompt)]
    if counter.unknown[ids].any():
        raise DataError(f"{tokenizer}: has no pieces for all of the prompt's characters; leave the rare ones out")
    tensors, meta = pack.read_artifact(args.artifact)
    check_identity(meta, tokenizer, sha256_file(tokenizer), args.artifact)
    if artifact_tokenizer(meta) is None:
        print(f"warning     {args.artifact} is older than the naming of tokenizers in files: whether {tokenizer} is "
              "its own was not checked", file=sys.stderr)
    model = load_tensors(tensors, meta, args.artifact, device)
    check_vocabulary(model, counter, tokenizer, args.artifact)
    window = args.seq_len or model.config.score_len
    parameters = sum(p.numel() for p in model.parameters())
    model = for_sampling(model, min(window, len(ids) + args.tokens))
    del tensors  # the model has all that is needed, in fewer bytes
    context = Context(model, window)
    print(f"loaded      {args.artifact}: {parameters:,} parameters, window {window}, on {device.type}, in "
          f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    began = time.perf_counter()
    context.add(ids)
    tokens = continue_tokens(context, torch.from_numpy(counter.boundary), args.tokens, args.temperature, args.top_p,
                             args.seed)
    try:
        write_text(itertools.chain(ids, tokens), TextStream(counter))
    except BrokenPipeError:  # `| head` has read enough
        return
    seconds = time.perf_counter() - began
    print(f"sampled     {args.tokens:,} tokens after {len(ids):,} in {seconds:.2f} s, {args.tokens / seconds:.1f} "
          "tokens/s", file=sys.stderr, flush=True)


def write_text(tokens: Iterable[int], text: TextStream) -> None:
    """To the standard output, each token's as soon as it is there, and a newline. Raises OSError."""
    try:
        for token in tokens:
            command.write_out(text.add(token))
    finally:  # when it is stopped, too
        command.write_out(text.end() + "\n")


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    return processes.end_process(run(parse_args(sys.argv[1:] if argv is None else argv)))


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    place = Place()
    try:
        if os.environ.get(command.FOLLOWED, "").isdecimal():
            command.follow(int(os.environ[command.FOLLOWED]))
        place = processes.process_place(os.environ)
        for notice in machine.writable_compiler_cache() if place.rank == 0 else []:
            print(f"notice      {notice}", file=sys.stderr)
        args.work(args, place)
        return 0
    except LaunchError as e:  # every process that meets one says so: it may be the only one
        command.say_error(e)
        return 2
    except (ValueError, OSError) as e:  # ArtifactError, DataError and AuditError are ValueErrors
        if place.rank == 0 or place.world > 1 and isinstance(e, OSError):  # what rank 0 may not have met itself
            command.say_error(e)
        else:
            time.sleep(processes.LET_RANK_0_SPEAK)
        return 1
    except KeyboardInterrupt:
        command.say_error("stopped; no file was written")
        return 130
    except Exception as e:
        command.say_error(command.describe_unexpected(e))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
