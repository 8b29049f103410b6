"""Train a ternary GPT under a byte budget, pack it, and have a fresh process score the file.

    python train_gpt.py                                              # preset cpu without a GPU, pr367 with one
    python train_gpt.py --preset cpu_10min_128kb --seed 7            # a scored run of the CPU track
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset golf16mb
    python train_gpt.py --help                                       # every setting, its default and its reason

Settings resolve as defaults < preset < environment (upper-case names) < command line.

The one idea: every parameter has three forms, and only `Latents.refresh` converts between them:

    latent (fp32, the optimizer's) --quantize--> stored (codes + scales, the file's) --dequantize--> param (bf16)

The model trains on params that are already dequantize(quantize(latent)), unless --quantize-start or --quantize-ramp
puts that off; its forward is a plain dense GPT. The straight-through estimator (Bengio et al., arXiv 1308.3432) is the
optimizer step: the gradient of the param is applied to the latent and the param is refreshed. The artifact holds the
codes and scales of the last refresh, so the model rebuilt from the file is the model that was trained, bit for bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import eval_bpb
import pack
import runlog
from eval_bpb import (
    AuditError,
    ByteCounter,
    DataError,
    LaunchError,
    Place,
    audit_bytes,
    audit_origin,
    can_compile,
    check_agreement,
    check_provable,
    check_scorable,
    evaluate,
    folder_identity,
    join_group,
    keep_freed_memory,
    leave,
    load_artifact,
    open_data,
    process_place,
    read_shard,
    sha256_file,
    shard_tokens,
    steady_streams,
    tag_compiler_cache,
    unexpected,
    writable_compiler_cache,
)
from formats import (
    SCALE_DTYPES,
    VALUE_DTYPES,
    Binary,
    Codebook,
    ConfigError,
    ElasticTernary,
    Five,
    Float,
    Format,
    Int,
    State,
    Stored,
    Ternary,
    from_pack,
    from_wire,
    to_pack,
    to_wire,
)

# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


def setting(default, why: str, low: float = -math.inf, high: float = math.inf):
    return field(default=default, metadata={"why": why, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting. The names are PR 367's environment variables in lower case, then ours."""

    # run
    run_id: str = setting("", "name of the run's folder; empty: <preset>_seed<seed>")
    out_dir: str = setting("runs", "where the run's folder is made")
    resume: str = setting("never", "auto: continue from the run folder's checkpoint if there is one; never")
    seed: int = setting(1337, "initialisation; the order of the data is fixed", 0, 2**63 - 1)
    device: str = setting("auto", "auto (cuda if there is one), cpu or cuda")
    threads: int = setting(0, "CPU threads per process; 0: cores / processes", 0, 1024)
    compile: bool = setting(True, "torch.compile of forward and backward; off saves the compile time of short runs")
    # data
    data_path: str = setting("data/packages", "folder of *_train_*.bin and *_val_*.bin shards")
    tokenizer_path: str = setting("", "SentencePiece model; empty: the one in data_path")
    # length of training
    iterations: int = setting(20000, "steps at most", 0)
    max_wallclock_seconds: float = setting(600.0, "training seconds at most, without compile warmup; 0: no cap", 0)
    warmup_steps: int = setting(2, "compile priming passes, outside the clock; they change no state", 0)
    lr_warmup_steps: int = setting(50, "steps of linear learning-rate warmup", 0)
    warmdown_iters: int = setting(0, "steps of linear warmdown to zero, estimated from the clock; 0: warmdown_frac", 0)
    warmdown_frac: float = setting(0.5, "share of the run that warms down, where warmdown_iters is 0", 0, 1)
    train_batch_tokens: int = setting(16384, "tokens per step over all processes", 1)
    micro_batch_tokens: int = setting(65536, "tokens per forward and process at most; more are accumulated in fp32", 1)
    train_seq_len: int = setting(512, "tokens per sequence", 1, 65536)
    seq_ramp_start: int = setting(0, "sequence length at the start, doubling to the full one; 0: no ramp", 0)
    seq_ramp_frac: float = setting(0.25, "share of the run over which the sequence length grows", 0, 1)
    batch_ramp_start: int = setting(0, "tokens per step at the start, growing to the full batch; 0: no ramp", 0)
    batch_ramp_frac: float = setting(0.20, "share of the run over which the batch grows", 0, 1)
    # model
    vocab_size: int = setting(1024, "must be the tokenizer's", 1, 65536)
    num_layers: int = setting(4, "blocks, at least 2; the first half feeds U-Net skips to the second", 2, 1024)
    model_dim: int = setting(128, "width of the residual stream", 1, 1 << 20)
    num_heads: int = setting(2, "query heads", 1)
    num_kv_heads: int = setting(1, "key and value heads (GQA)", 1)
    mlp_mult: int = setting(3, "MLP hidden width in units of model_dim, where mlp_hidden is 0", 0)
    mlp_hidden: int = setting(0, "MLP hidden width, any number; 0: mlp_mult * model_dim", 0)
    rope_base: float = setting(10000.0, "RoPE base frequency", 1e-30)
    logit_softcap: float = setting(30.0, "logits are softcap * tanh(logits / softcap)", 1e-30)
    smear: bool = setting(False, "SmearGate: each embedding is blended with the one before, by learned gates")
    qk_gain_init: float = setting(1.5, "initial gain of normalised queries, learned per head", -1e6, 1e6)
    tied_embed_init_std: float = setting(0.005, "initial standard deviation of the tied embedding", 1e-30)
    # storage formats
    matrix_format: str = setting("ternary", "format of block matrices: ternary, binary, five, int2..int8, codebookK, "
                                 "fp8, bf16, fp16 (formats.py)")
    embed_format: str = setting("bf16", "format of the tied embedding, likewise")
    vector_format: str = setting("bf16", "format of gains, scales, mixes and skips: fp8, bf16 or fp16")
    group_size: int = setting(128, "weights per scale along the input dimension; 0: one scale per tensor", 0)
    ternary_rule: str = setting("absmean", "how ternary codes and scales are found: absmean, lsq, rms or elastic")
    threshold: float = setting(0.5, "a ternary code is zero up to threshold * mean|w| (0.5: BitNet b1.58)", 0)
    codebook_decay: float = setting(0.99, "decay of a codebook's averages", 0, 0.999999)
    commitment: float = setting(0.0, "weight of a codebook's commitment loss, sum (w - Q(w))^2", 0)
    activation_bits: int = setting(16, "8: int8 activations and products in the blocks; not measured on a GPU")
    scale_dtype: str = setting("log7", "scales: bf16, fp16 or log4..log8 (2^bits steps over 16 octaves)")
    quantize_start: float = setting(0.0, "progress at which params begin to be quantized; 1: after training", 0, 1)
    quantize_ramp: float = setting(0.0, "share of the run over which they move from latents to stored values", 0, 1)
    init_from: str = setting("", "checkpoint, or run folder, whose latents training starts from; empty: random")
    # optimizer
    matrix_lr: float = setting(0.04, "Muon learning rate of block matrices", 0)
    scalar_lr: float = setting(0.04, "AdamW learning rate of vectors", 0)
    tied_embed_lr: float = setting(0.04, "AdamW learning rate of the embedding", 0)
    muon_momentum: float = setting(0.95, "Muon momentum after its warmup", 0, 1)
    muon_momentum_warmup_start: float = setting(0.85, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = setting(500, "steps of linear momentum warmup", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1)
    muon_wd: float = setting(0.0, "decoupled weight decay of matrix latents, in units of the learning rate", 0)
    beta1: float = setting(0.9, "AdamW", 0, 0.999999)
    beta2: float = setting(0.95, "AdamW", 0, 0.999999)
    adam_eps: float = setting(1e-8, "AdamW", 1e-30)
    grad_clip_norm: float = setting(0.0, "clip the global gradient norm; 0: off", 0)
    # logging, validation, checkpoints
    train_log_every: int = setting(50, "steps between log lines; the first ten are logged as well", 0)
    val_loss_every: int = setting(0, "steps between validations inside the clock; 0: only at the end", 0)
    val_batch_size: int = setting(16384, "tokens per validation batch over all processes", 1)
    checkpoint_every: int = setting(500, "steps between checkpoints; 0: only at the end and on a signal", 0)
    # score
    eval_stride: int = setting(64, "stride of the sliding-window score; 0: chunked score only", 0)
    eval_batch_seqs: int = setting(32, "windows per batch of the scoring process", 1)
    cap_bytes: int = setting(16_000_000, "byte cap of the track", 1)
    cap_counts_code: bool = setting(True, "whether the cap covers code plus model (official) or the model file alone")

    def __post_init__(self):
        def need(ok: bool, name: str, rule: str):
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {rule}")

        for f in fields(self):
            value, kind, low, high = getattr(self, f.name), type(f.default), f.metadata["low"], f.metadata["high"]
            need(type(value) is kind or kind is float and type(value) is int, f.name, f"must be a {kind.__name__}")
            if kind in (int, float):
                high = min(high, 2**63 - 1) if kind is int else high
                need(low <= value <= high and abs(value) < math.inf, f.name, f"must be between {low} and {high}")
        need(self.mlp_hidden > 0 or self.mlp_mult > 0, "mlp_mult", "must be at least 1, or set mlp_hidden")
        need(self.model_dim % self.num_heads == 0, "num_heads", f"must divide model_dim={self.model_dim}")
        need(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        need(self.model_dim // self.num_heads % 2 == 0, "num_heads", "model_dim / num_heads must be even for RoPE")
        need(not {"", ".", ".."} & set(self.run_id.split("/")) or not self.run_id, "run_id",
             "must be a name, or names below each other as in a/b; --out-dir says where")
        need(self.resume in ("auto", "never"), "resume", "must be auto or never")
        need(self.device in ("auto", "cpu", "cuda"), "device", "must be auto, cpu or cuda")
        need(self.train_batch_tokens % self.train_seq_len == 0, "train_batch_tokens",
             f"must be a multiple of train_seq_len={self.train_seq_len}")
        need(self.eval_stride <= self.train_seq_len, "eval_stride", f"must be at most {self.train_seq_len=}")
        need(sequence_lengths(self)[-1] == self.train_seq_len, "seq_ramp_start",
             f"must be train_seq_len={self.train_seq_len} over a power of two")
        need(self.iterations > 0 or self.max_wallclock_seconds > 0, "iterations", "must be positive without a cap")
        for name in ("matrix_format", "embed_format", "vector_format"):
            make_format(self, name)
        need(self.ternary_rule in ("absmean", "lsq", "rms", "elastic"), "ternary_rule",
             "must be absmean, lsq, rms or elastic")
        need(self.ternary_rule != "elastic" or self.threshold == 0.5, "threshold", "the elastic rule has none")
        need(self.activation_bits in (8, 16), "activation_bits", "must be 8 or 16")
        per_row = self.group_size == 0 or self.group_size >= max(self.model_dim, self.hidden_dim)
        always = self.quantize_start == self.quantize_ramp == 0  # its products take params for ternary
        need(self.activation_bits == 16 or self.matrix_format == "ternary" and per_row and always, "activation_bits",
             "8 needs matrix_format ternary from the start and one scale per row: group_size 0, or no less than any "
             "input width")
        widths = (self.model_dim, self.hidden_dim, self.model_dim // self.num_heads * self.num_kv_heads)
        need(self.activation_bits == 16 or not any(n % 8 for n in widths), "activation_bits",
             f"8 needs widths that are multiples of 8, not {widths}")

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or self.mlp_mult * self.model_dim


CPU_TRACK = dict(  # an int4 embedding beats a ternary one with a wider MLP at these bytes
    cap_bytes=128_000, cap_counts_code=False, embed_format="int4", mlp_hidden=192, smear=True,
    train_seq_len=256, train_batch_tokens=8192, val_batch_size=8192, tied_embed_lr=0.01,
)
PR367 = dict(  # run_8xh100.sh and train_bitnet.py of PR 367
    num_layers=12, model_dim=768, num_heads=12, num_kv_heads=6, mlp_mult=3, mlp_hidden=2496, train_seq_len=2048,
    train_batch_tokens=524_288, val_loss_every=500, val_batch_size=524_288, train_log_every=50, warmup_steps=20,
    warmdown_iters=1200, matrix_lr=0.04, scalar_lr=0.04, tied_embed_lr=0.04, muon_momentum=0.99,
    muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500, rope_base=200_000.0, group_size=64,
    scale_dtype="fp16", checkpoint_every=2000, data_path="data/fineweb_sp1024",
)
PRESETS: dict[str, dict] = {
    "cpu": CPU_TRACK | dict(max_wallclock_seconds=180.0),
    "tiny": dict(
        iterations=30, max_wallclock_seconds=0.0, compile=False, num_layers=2, model_dim=32, num_heads=2,
        num_kv_heads=1, mlp_hidden=80, train_seq_len=64, train_batch_tokens=1024, lr_warmup_steps=5, train_log_every=5,
        checkpoint_every=10, eval_stride=32, cap_bytes=128_000, cap_counts_code=False, group_size=32, warmup_steps=0,
    ),
    "cpu_10min_128kb": CPU_TRACK | dict(max_wallclock_seconds=600.0),
    "pr367": PR367,
    # Our best guess, not measured: PR 640's shape and schedule with a ternary embedding in place of a factored one.
    "golf16mb": PR367 | dict(
        vocab_size=8192, num_layers=10, num_heads=8, num_kv_heads=4, mlp_hidden=3072, train_seq_len=1024,
        embed_format="ternary", group_size=128, scale_dtype="log7", warmdown_iters=0, warmdown_frac=0.2,
        scalar_lr=0.02, tied_embed_lr=0.02, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=500, rope_base=10_000.0, val_loss_every=0,
        data_path="data/fineweb_sp8192",
    ),
}

# PR 367's variables for techniques that this trainer does not have: the values under which nothing is lost, and why.
# A value outside them is an error; one inside that asks for something anyway is answered with a printed notice.
FOREIGN_ENV = {
    "XSA_LAST_N": (("0",), "exclusive self-attention is not in this trainer (no gain was seen: LOG.md, negatives)"),
    "TIE_EMBEDDINGS": (("1",), "the embedding is always tied to the output head"),
    "CONTROL_TENSOR_NAME_PATTERNS": ((), "storage formats are chosen with matrix_format, embed_format, vector_format"),
    "TTT_ENABLED": (("0", "1"), "no test-time training: the score is of the model as stored (LOG.md, negatives)"),
    "TTT_LR": (None, "no test-time training"),
    "TTT_EPOCHS": (None, "no test-time training"),
    "TTT_CHUNK_TOKENS": (None, "no test-time training"),
    "EMBED_LR": (None, "used with untied embeddings only"),
    "HEAD_LR": (None, "used with untied embeddings only"),
}


def parse_setting(name: str, text: str, kind: type, where: str):
    try:
        if kind is bool:
            return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{where} {name}={text!r}: a {kind.__name__} is needed") from None


def resolve_settings(argv: list[str], env: Mapping[str, str]) -> tuple[str, Config, dict[str, str], list[str]]:
    """(preset, settings, where each came from, notices). Raises ConfigError; argparse exits on an unknown flag."""
    kinds = {f.name: type(f.default) for f in fields(Config)}
    p = pack.Parser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--plan", action="store_true", help="do not train: predict bytes, what else fits, time on H100s")
    p.add_argument("--preset", choices=PRESETS, help="named settings (default: cpu without a GPU, pr367 with one)")
    for f in fields(Config):
        shown = "on" if f.default is True else "off" if f.default is False else f.default
        text = f"{f.metadata['why']} (default: {shown})".replace("%", "%%")
        names = dict.fromkeys(("--" + f.name.replace("_", "-"), "--" + f.name))  # both spellings
        p.add_argument(*names, metavar=kinds[f.name].__name__.upper(), help=text)
    args = vars(p.parse_args(argv))
    del args["plan"]  # main's
    preset = args.pop("preset") or env.get("PRESET") or ("pr367" if torch.cuda.is_available() else "cpu")
    if preset not in PRESETS:
        raise ConfigError(f"PRESET={preset!r}: choose one of {', '.join(PRESETS)}")
    values, origin = dict(PRESETS[preset]), dict.fromkeys(PRESETS[preset], "preset")
    given = [("environment", {n: env[n.upper()] for n in kinds if env.get(n.upper(), "") != ""})]
    given += [("command line", {n: v for n, v in args.items() if v is not None})]
    for where, texts in given:
        for name, text in texts.items():
            values[name], origin[name] = parse_setting(name, text, kinds[name], where), where
    notices = []
    for name, (allowed, why) in FOREIGN_ENV.items():
        if (value := env.get(name, "")) == "":
            continue
        if allowed is not None and value not in allowed:
            raise ConfigError(f"environment {name}={value!r}: {why}; unset it")
        if allowed is None or (name, value) == ("TTT_ENABLED", "1"):
            notices.append(f"{name}={value} has no effect here: {why}")
    try:
        config = Config(**values)
    except ConfigError as e:
        name = str(e).partition("=")[0]
        raise ConfigError(f"{e} (from the environment, {name.upper()})" if origin.get(name) == "environment" else e
                          ) from None
    return preset, replace(config, run_id=config.run_id or f"{preset}_seed{config.seed}"), origin, notices


# ---------------------------------------------------------------------------------------------------------------
# Storage formats: which tensor has which (formats.py has them)
# ---------------------------------------------------------------------------------------------------------------


def make_format(config: Config, name: str) -> Format:
    """The format that the setting `name` (matrix_format, embed_format or vector_format) asks for."""
    value, group, scale = getattr(config, name), config.group_size, config.scale_dtype
    if value in VALUE_DTYPES:
        return Float(value)
    if scale not in SCALE_DTYPES:
        raise ConfigError(f"scale_dtype={scale!r}: must be one of {', '.join(SCALE_DTYPES)}")
    if name == "vector_format":
        raise ConfigError(f"{name}={value!r}: must be fp8, bf16 or fp16")
    if value == "ternary" and config.ternary_rule != "elastic":
        return Ternary(group, config.ternary_rule, config.threshold, scale)
    if value in (simple := {"ternary": ElasticTernary, "binary": Binary, "five": Five}):
        return simple[value](group, scale)
    if value in [f"int{bits}" for bits in range(2, 9)]:
        return Int(int(value[3:]), group, scale)
    if entries := re.fullmatch(r"codebook([0-9]{1,2})", value):
        return Codebook(int(entries[1]), group, config.codebook_decay, config.commitment)
    raise ConfigError(f"{name}={value!r}: must be ternary, binary, five, int2..int8, codebook2..codebook64, fp8, bf16 "
                      "or fp16")


def format_of(config: Config, name: str, ndim: int) -> Format:
    """The one storage format of the parameter called name."""
    if name == "tok_emb.weight":
        return make_format(config, "embed_format")
    return make_format(config, "matrix_format" if name.endswith(".weight") and ndim == 2 else "vector_format")


# ---------------------------------------------------------------------------------------------------------------
# Model: a plain dense GPT, PR 367's architecture
# ---------------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [batch, heads, time, head_dim], halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


Q_TILE, HEAD_TILE = 128, 16  # queries and kv heads per tile, so that a tile's scores stay near the core (LOG.md)


def attention_tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(kv heads, queries, keys) of each tile of causal attention; q [n, r, queries, dim] are the last of k's times."""
    before = k.shape[1] - q.shape[2]
    for head in range(0, q.shape[0], HEAD_TILE):
        for start in reversed(range(0, q.shape[2], Q_TILE)):  # the first tile of a head sees every key
            end = min(start + Q_TILE, q.shape[2])
            yield slice(head, head + HEAD_TILE), slice(start, end), slice(0, before + end)


@torch.library.custom_op("train_gpt::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T / sqrt(head_dim)) v under a causal mask, on a CPU.

    q: [n, r, queries, head_dim], r query heads for each of the n key and value heads k, v: [n, time, head_dim]; the
    queries are those of the last positions. Returns the output in q's shape and, if keep, the probabilities of each
    tile, which the backward needs. The mathematics is that of F.scaled_dot_product_attention, which takes two to three
    times as long on a CPU (LOG.md). A score is rounded to the dtype of q, as in any attention made of matrix products;
    the softmax is fp32 inside.
    """
    r, dim = q.shape[1], q.shape[3]
    out, probabilities = torch.empty_like(q, memory_format=torch.contiguous_format), []
    above, q = torch.full((Q_TILE, Q_TILE), -math.inf, dtype=q.dtype).triu(1), q * dim**-0.5
    for heads, rows, keys in attention_tiles(q, k):
        n = rows.stop - rows.start
        scores = torch.bmm(q[heads, :, rows].flatten(1, 2), k[heads, keys].mT)
        scores.unflatten(1, (r, n))[..., -n:] += above[:n, :n]
        p = torch.softmax(scores, -1)
        out[heads, :, rows] = torch.bmm(p, v[heads, keys]).unflatten(1, (r, n))
        probabilities += [p] if keep else []
    return out, probabilities


@torch.library.custom_op("train_gpt::causal_attention_backward", mutates_args=())
def causal_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor]
                              ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output: the softmax's backward between four matrix products."""
    r, scale = q.shape[1], q.shape[-1] ** -0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.empty(k.shape), torch.empty(v.shape)  # fp32: a key's gradient is a sum over tiles
    for p, (heads, rows, keys) in zip(probabilities, attention_tiles(q, k), strict=True):
        g, queries = grad[heads, :, rows].flatten(1, 2), q[heads, :, rows].flatten(1, 2)
        ds = torch._softmax_backward_data(torch.bmm(g, v[heads, keys].mT), p, -1, p.dtype)
        dq[heads, :, rows] = torch.bmm(ds, k[heads, keys]).unflatten(1, (r, -1))
        add = Tensor.copy_ if keys.stop == k.shape[1] else Tensor.add_
        add(dv[heads, keys], torch.bmm(p.mT, g))
        add(dk[heads, keys], torch.bmm(ds.mT, queries))
    return dq * scale, (dk * scale).to(k.dtype), dv.to(v.dtype)


@causal_attention.register_fake
def _(q, k, v, keep):
    shapes = [(len(range(q.shape[0])[heads]), q.shape[1] * (rows.stop - rows.start), keys.stop)
              for heads, rows, keys in attention_tiles(q, k) if keep]
    return q.new_empty(q.shape), [q.new_empty(shape) for shape in shapes]


@causal_attention_backward.register_fake
def _(grad, q, k, v, probabilities):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


causal_attention.register_autograd(
    lambda ctx, grad, _: (*causal_attention_backward(grad, *ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output[1]))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [batch, heads, queries, head_dim], the last of the times of k, v [batch, kv_heads, time,
    head_dim]."""
    queries, time, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        q = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1)
        out, _ = causal_attention(q, k.flatten(0, 1), v.flatten(0, 1), torch.is_grad_enabled())
        return out.view(len(k), -1, *out.shape[2:])
    if queries == time:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = torch.ones(queries, time, dtype=torch.bool, device=q.device).tril(time - queries)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa)


@torch.library.custom_op("train_gpt::rope_tables", mutates_args=())
def rope_tables(ids: Tensor, half: int, base: float) -> Tensor:
    """cos and sin of RoPE's angles, fp32 [2, time, half], for ids [.., time]. An op, so that a compiled step computes
    them once: inlined into the kernels that use them, they cost a sine for each element of every q and k."""
    frequency = base ** -(torch.arange(half, device=ids.device, dtype=torch.float32) / half)
    angle = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


@rope_tables.register_fake
def _(ids, half, base):
    return ids.new_empty(2, ids.shape[-1], half, dtype=torch.float32)


class Int8Product(torch.autograd.Function):
    """x w^T with int8 operands and int32 sums, for a ternary w with one scale per row (BitNet b1.58's W1.58A8).

    The codes of w are exact in int8; x [.., inputs] is rounded per token to 127 steps of its largest magnitude
    (arXiv 2402.17764, section 2). The rounding is passed straight through: gradients are those of the 16-bit product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        tokens = x.flatten(0, -2).float()
        rows = len(tokens)
        tokens = F.pad(tokens, (0, 0, 0, max(32 - rows, 0)))  # CUDA's int8 product takes no fewer than 17
        step = tokens.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        sums = torch._int_mm((tokens / step).round().to(torch.int8), w.sign().to(torch.int8).mT)
        return (sums * step * w.abs().amax(-1).float())[:rows].to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).mT @ x.flatten(0, -2)


def product(x: Tensor, w: Tensor, activation_bits: int) -> Tensor:
    """x [.., inputs] w^T [inputs, outputs]."""
    return F.linear(x, w) if activation_bits == 16 else Int8Product.apply(x, w)


class Linear(nn.Linear):
    """A block matrix [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, activation_bits: int):
        super().__init__(inputs, outputs, bias=False)
        self.activation_bits = activation_bits

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.activation_bits)


class Attention(nn.Module):
    attend = staticmethod(attend)  # the part of it that other kinds of attention replace

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        bits = c.activation_bits
        self.c_q = Linear(c.model_dim, c.model_dim, bits)
        self.c_k = Linear(c.model_dim, c.num_kv_heads * self.head_dim, bits)
        self.c_v = Linear(c.model_dim, c.num_kv_heads * self.head_dim, bits)
        self.proj = Linear(c.model_dim, c.model_dim, bits)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        """The output at the last positions of x [batch, time, model_dim]: [batch, last, model_dim]."""
        (batch, time), bits = x.shape[:2], self.c_q.activation_bits
        x, kv = norm(x), (self.c_k.weight, self.c_v.weight)
        # One product over the three matrices, which stay three for Muon; joining them copies weights, not activations.
        parts = [product(x, torch.cat((self.c_q.weight, *kv)), bits)] if last == time else [
            self.c_q(x[:, -last:]), product(x, torch.cat(kv), bits)]
        heads = [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts]
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = heads[0].split(sizes, dim=1) if last == time else (heads[0], *heads[1].split(sizes[1:], dim=1))
        q = rotate(norm(q), cos[-last:], sin[-last:]) * self.q_gain[:, None, None]
        k = rotate(norm(k), cos, sin)
        y = self.attend(q, k, v)
        return self.proj(norm(y.transpose(1, 2).reshape(batch, last, -1)))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.fc = Linear(c.model_dim, c.hidden_dim, c.activation_bits)
        self.proj = Linear(c.hidden_dim, c.model_dim, c.activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(norm(self.fc(norm(x)).relu().square()))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(c.model_dim), torch.zeros(c.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x[:, -last:] + self.attn_scale * self.attn(x, cos, sin, last)
        return x + self.mlp_scale * self.mlp(x)


def cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """F.cross_entropy of logits [.., vocab_size] within +-cap and targets [..], in one pass over the logits."""
    target = torch.where(torch.arange(logits.shape[-1], device=logits.device) == targets[..., None], logits, 0.0)
    # With a cap of 40 no exponential leaves fp32, so that the maximum need not be looked for first.
    shift = torch.full_like(logits[..., :1], cap) if cap <= 40 else logits.detach().amax(-1, keepdim=True)
    return ((logits - shift).exp().sum(-1).log() + shift[..., 0] - target.sum(-1)).mean()


def previous(x: Tensor) -> Tensor:
    """x [batch, time, ..] one position later, zeros first."""
    return F.pad(x, (0,) * (2 * (x.ndim - 2)) + (1, 0))[:, :-1]


class GPT(nn.Module):
    """Token ids [batch, time] -> hidden states -> logits. Born with fp32 initial latents; Latents makes it bf16."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(config.num_layers // 2, config.model_dim))
        if config.smear:
            self.smear = nn.Parameter(torch.zeros(config.model_dim))
        nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final normalised hidden states [batch, time, model_dim] of token ids [batch, time]."""
        return self.hidden_last(ids, ids.shape[1])

    def hidden_last(self, ids: Tensor, last: int) -> Tensor:
        """hidden(ids)[:, -last:], for which the last block computes only keys and values of the other positions."""
        dtype, half = self.tok_emb.weight.dtype, self.config.model_dim // self.config.num_heads // 2
        cos, sin = rope_tables(ids, half, self.config.rope_base).to(dtype)
        x = x0 = self.embed(ids).to(dtype)
        half_way, skips = self.config.num_layers // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half_way and skips:
                x = x + self.skip_weights[i - half_way] * skips.pop()
            x = block(x, x0, cos, sin, last if i == self.config.num_layers - 1 else ids.shape[1])
            if i < half_way:
                skips.append(x)
        return norm(x)

    def lookup(self, ids: Tensor) -> Tensor:
        """Normalised embeddings, fp32 [batch, time, model_dim]."""
        # The table in fp32: its gradient sums thousands of rows per frequent token, which bf16 would lose.
        return norm(F.embedding(ids, self.tok_emb.weight.float()))

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block, fp32 [batch, time, model_dim]."""
        x = self.lookup(ids)
        # SmearGate (parameter-golf PR 162). A token that brings the one before it needs no head to fetch it, so heads
        # that copy what followed an earlier occurrence seem to form sooner (LOG.md, gates).
        return torch.lerp(x, previous(x), torch.sigmoid(self.smear.float())) if self.config.smear else x

    def head(self, hidden: Tensor) -> Tensor:
        """Softcapped logits, fp32 [.., vocab_size], of hidden states [.., model_dim]."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, self.tok_emb.weight).float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        return cross_entropy(self.head(self.hidden(ids)), targets, self.config.logit_softcap)


# What a model is rebuilt from, and so what an artifact's configuration holds; the rest of a run is in its log.
MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden", "train_seq_len")
# Likewise, where they are not these values; older files name the first three in any case.
MODEL_OPTIONS = {"mlp_mult": 3, "rope_base": 10000.0, "logit_softcap": 30.0, "activation_bits": 16, "smear": False}


def artifact_meta(config: Config, data: eval_bpb.DataFolder | None = None) -> dict:
    """What an artifact says of its model: configuration, sha256 of the tokenizer, identity of the data (16 digits).

    Without data, as where only the size counts, the names are of nothing.
    """
    settings = {name: getattr(config, name) for name in MODEL_SETTINGS}
    chosen = {name: getattr(config, name) for name, without in MODEL_OPTIONS.items()
              if getattr(config, name) != without}
    nothing = hashlib.sha256(b"").hexdigest()
    tokenizer, identity = (data.tokenizer_sha256, data.identity) if data else (nothing, nothing)
    return {"config": settings | chosen, "tokenizer": tokenizer, "data": identity[:16]}


def model_from_stored(tensors: dict[str, pack.StoredTensor], meta: dict) -> GPT:
    """The model of an artifact. Raises ConfigError unless its tensors are exactly those of its configuration."""
    try:
        settings = {name: meta["config"][name] for name in MODEL_SETTINGS}
        options = MODEL_OPTIONS | {name: meta["config"][name] for name in MODEL_OPTIONS if name in meta["config"]}
        bits = options["activation_bits"]
        config = Config(**settings, **options, group_size=128 * (bits == 16), eval_stride=0,
                        train_batch_tokens=settings["train_seq_len"])
    except (KeyError, TypeError) as e:
        raise ConfigError(f"the artifact's configuration is not one of this trainer: {e!r}") from None
    if bits == 8 and any(t.format["kind"] != "ternary" or t.scales.shape[-1] != 1 for n, t in tensors.items()
                         if n.startswith("blocks.") and n.endswith(".weight")):
        raise ConfigError("activation_bits 8 needs ternary block matrices with one scale per row")
    if config.num_layers > len(tensors):  # do not build what the file cannot hold
        raise ConfigError(f"{config.num_layers} layers cannot be made of {len(tensors)} tensors")
    with torch.device("meta"):
        model = GPT(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    wrong = sorted(shapes.keys() ^ tensors.keys()) or [n for n in shapes if tensors[n].shape != shapes[n]]
    if wrong:
        raise ConfigError(f"tensor {wrong[0]} is missing, not known, or not of the shape {shapes.get(wrong[0])}")
    params = {n: fmt.dequantize(stored) for n, t in tensors.items() for stored, fmt in [from_pack(t)]}
    model.load_state_dict(params, strict=True, assign=True)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Latents and optimizer
# ---------------------------------------------------------------------------------------------------------------


class RankLost(RuntimeError):
    """Another process of the run does not answer."""


class Ranks:
    """The processes of a run and all that they say to each other. With one process nothing is said."""

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.world, self.group = rank, world, group
        self.sent = {"gradients": 0, "codes": 0}  # bytes that this rank gave away; of a broadcast, once

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Within it a failure of the backend becomes a RankLost."""
        try:
            yield
        except RuntimeError as e:  # gloo's and NCCL's errors have no type of their own
            if self.world == 1 or isinstance(e, torch.OutOfMemoryError | torch.AcceleratorError):
                raise
            raise RankLost(re.sub(r"^\[[^ ]*\] |\. This is .*|\n.*", "", str(e), flags=re.S)) from e

    def call(self, function: Callable, *args, **kwargs):
        """function(*args), or None with one process."""
        if self.world > 1:
            with self.talking():
                return function(*args, **kwargs)

    def sum(self, x: Tensor) -> Tensor:
        """x <- sum over all ranks, on all ranks."""
        self.call(dist.all_reduce, x, group=self.group)
        return x

    def reduce(self, x: Tensor, owner: int) -> dist.Work | None:
        """Begin: x <- sum over all ranks, on the owner only; elsewhere x becomes undefined."""
        self.sent["gradients"] += x.nbytes * (owner != self.rank)
        return self.call(dist.reduce, x, dst=owner, group=self.group, async_op=True) if x.numel() else None

    def broadcast(self, x: Tensor, owner: int) -> dist.Work | None:
        """Begin: x <- the owner's x, on all ranks."""
        self.sent["codes"] += x.nbytes * (owner == self.rank)
        return self.call(dist.broadcast, x, src=owner, group=self.group, async_op=True) if x.numel() else None

    def wait(self, work: dist.Work | None) -> None:
        if work is not None:
            self.call(work.wait)

    def gather(self, x: Tensor, owner: int) -> Tensor:
        """The owner's x, of equal shape on all ranks, on rank 0; collective, as all of these."""
        if owner and self.rank == owner:
            self.call(dist.send, x, dst=0, group=self.group)
        elif owner and self.rank == 0:
            self.call(dist.recv, x, src=owner, group=self.group)
        return x


def owners(config: Config, world: int) -> dict[str, int]:
    """Parameter name -> the rank that updates it: each in turn, the costliest first, to the rank with the least work.

    Cost in flops: the products of Newton-Schulz, and 100 for each element that is read and written.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}

    def cost(name: str) -> int:
        numel, products = math.prod(shapes[name]), 0
        if optimizer_of(name) == "muon":
            small, large = sorted(shapes[name])
            products = config.muon_backend_steps * (4 * small * small * large + 2 * small**3)
        return products + 100 * numel

    load, owner = [0] * world, {}
    for name in sorted(shapes, key=cost, reverse=True):  # a stable sort: the same on every rank
        owner[name] = load.index(min(load))
        load[owner[name]] += cost(name)
    return {name: owner[name] for name in shapes}


def optimizer_of(name: str) -> str:
    """"muon" for the block matrices; "embed" or "scalar", AdamW at its own learning rate, for the rest."""
    muon = name.startswith("blocks.") and name.endswith(".weight")
    return "muon" if muon else "embed" if name == "tok_emb.weight" else "scalar"


@dataclass
class Bank:
    """Same-shape parameters of one format and one owner, stacked: each optimizer operation is one call for all."""

    names: list[str]
    params: list[nn.Parameter]
    format: Format
    optimizer: str  # "muon", "embed" or "scalar"
    owner: int  # rank
    latent: Tensor | None  # fp32 [n, *shape], the owner's only
    state: State  # what the format learns beside the latent, stacked likewise; the owner's only
    grad: Tensor  # fp32 [n, *shape], a view of Latents.flat_grad
    like: Stored  # shapes and dtypes of the stored form, on the meta device
    stored: Stored | None  # the owner's only
    wire: Tensor  # uint8, a view of Latents.wire; empty with one process


class Latents:
    """Every parameter's latent, on the rank that owns it; `refresh` is the only place that writes the model's params.

    Over several ranks (ZeRO, arXiv 1910.02054, with codes in place of weights) a step is: gradients are summed on their
    owners (reduce), owners update latents, and send what the file would hold of them (refresh).
    """

    def __init__(self, model: GPT, config: Config, ranks: Ranks | None = None):
        self.ranks = ranks = ranks or Ranks()
        owner, members = owners(config, ranks.world), {}
        for name, p in model.named_parameters():
            members.setdefault((owner[name], optimizer_of(name), tuple(p.shape)), []).append((name, p))
        members = dict(sorted(members.items(), key=lambda item: item[0][0]))  # one segment per owner
        sizes = [sum(p.numel() for _, p in group) for group in members.values()]
        self.flat_grad = torch.zeros(sum(sizes) + 1, device=next(model.parameters()).device)  # and, last, the loss
        self.banks: list[Bank] = []
        wires, mixes = [], schedule(config, 0, 0.0).quantized < 1  # then owners send bf16 params at first
        for (rank, kind, shape), group, grad in zip(members, members.values(), self.flat_grad[:-1].split(sizes),
                                                    strict=True):
            names, params = [n for n, _ in group], [p for _, p in group]
            fmt = format_of(config, names[0], len(shape))
            latent = torch.stack([p.detach() for p in params]).float()
            stored, mine = fmt.quantize(latent), rank == ranks.rank
            like = Stored(stored.codes.to("meta"), None if stored.scales is None else stored.scales.to("meta"))
            wire = to_wire(stored, fmt) if ranks.world > 1 else self.flat_grad.new_empty(0, dtype=torch.uint8)
            wires.append(F.pad(wire, (0, max(2 * latent.numel() * (mixes and ranks.world > 1) - len(wire), 0))))
            self.banks.append(Bank(names, params, fmt, kind, rank, latent if mine else None,
                                   fmt.start(latent) if mine else {}, grad.view(latent.shape), like,
                                   stored if mine else None, wires[-1]))
            for p in params:
                p.data = torch.empty_like(p, dtype=torch.bfloat16)
        self.wire = torch.cat(wires)
        for bank, view in zip(self.banks, self.wire.split([len(w) for w in wires]), strict=True):
            bank.wire = view
        self.mine = [b for b in self.banks if b.owner == ranks.rank]
        spans = [[b for b in self.banks if b.owner == r] for r in range(ranks.world)]
        self.grad_segments = self.flat_grad[:-1].split([sum(b.grad.numel() for b in span) for span in spans])
        self.wire_segments = self.wire.split([sum(len(b.wire) for b in span) for span in spans])
        self.refresh()
        covered = sorted(n for b in self.banks for n in b.names)
        assert covered == sorted(n for n, _ in model.named_parameters()), "a parameter has no format, or two"

    @torch.no_grad()
    def refresh(self, quantized: float = 1.0, measure: bool = False) -> tuple[float, float]:
        """params <- dequantize(quantize(latent)), eager: a compiler may drop a rounding (pytorch issue 185337).

        quantized < 1: only so far from the latent towards that, rounded to bf16. What is stored is quantized all the
        way. Returns (zero_frac, churn) of the block matrices' codes, or NaN unless measure. churn: share of the codes
        that this refresh changed.
        """
        counts = torch.zeros(3, dtype=torch.int64, device=self.flat_grad.device)  # zeros, changed, all
        mixed: dict[int, Tensor] = {}  # id of a bank -> param
        for bank in self.mine:
            stored = bank.format.quantize(bank.latent, bank.state)
            if measure and bank.optimizer == "muon" and not isinstance(bank.format, Float):
                counts[0] += (stored.codes == 0).sum()
                counts[1] += (stored.codes != bank.stored.codes).sum()
                counts[2] += stored.codes.numel()
            bank.stored = stored
            if quantized < 1:
                mixed[id(bank)] = bank.latent.float().lerp(bank.format.dequantize(stored).float(), quantized).bfloat16()
            if self.ranks.world > 1:
                wire = mixed[id(bank)].flatten().view(torch.uint8) if mixed else to_wire(stored, bank.format)
                bank.wire[: len(wire)].copy_(wire)
        works = [self.ranks.broadcast(segment, r) for r, segment in enumerate(self.wire_segments)]
        for bank in sorted(self.banks, key=lambda b: b.owner != self.ranks.rank):  # one's own while others arrive
            if bank.stored is None:
                self.ranks.wait(works[bank.owner])
            if quantized == 1:
                param = bank.format.dequantize(self.stored(bank))
            elif (param := mixed.get(id(bank))) is None:
                param = bank.wire[: 2 * bank.grad.numel()].clone().view(torch.bfloat16).view(bank.grad.shape)
            torch._foreach_copy_([p.data for p in bank.params], list(param.unbind()))
        self.ranks.wait(works[self.ranks.rank])
        if not measure:
            return math.nan, math.nan
        zeros, changed, total = self.ranks.sum(counts).tolist()
        if not total:
            return math.nan, math.nan
        # An index of zero into a codebook is no weight of zero.
        indices = any(b.format.kind == "codebook" for b in self.banks if b.optimizer == "muon")
        return math.nan if indices else zeros / total, changed / total

    @torch.no_grad()
    def load(self, latents: Mapping[str, Tensor]) -> None:
        """Latents <- those of a checkpoint (name -> fp32 tensor); formats that learn start anew. Not yet refreshed.

        Raises ValueError on a tensor that is missing, of another shape, or of another model.
        """
        if foreign := latents.keys() - {name for bank in self.banks for name in bank.names}:
            raise ValueError(f"this model has no {sorted(foreign)[0]}")
        for bank in self.banks:
            for i, name in enumerate(bank.names):
                if name not in latents or latents[name].shape != bank.grad[i].shape:
                    raise ValueError(f"the latent of {name} is missing or not of the shape {tuple(bank.grad[i].shape)}")
        for bank in self.mine:
            bank.latent.copy_(torch.stack([latents[name] for name in bank.names]))
            bank.state = bank.format.start(bank.latent)

    def stored(self, bank: Bank) -> Stored:
        """What the file would hold of a bank, whoever owns it; another rank's only after a refresh(1.0)."""
        return bank.stored or from_wire(bank.wire, bank.format, bank.like)

    @torch.no_grad()
    def accumulate(self, loss: Tensor, micro_batches: int) -> None:
        """Add the params' bf16 gradients and the loss, over micro_batches, to the fp32 sums; clear the gradients."""
        for bank in self.banks:
            grads = [p.grad.float() for p in bank.params]
            torch._foreach_add_(list(bank.grad.unbind()), grads, alpha=1 / micro_batches)
            for p in bank.params:
                p.grad = None
        self.flat_grad[-1] += loss.detach() / micro_batches

    @torch.no_grad()
    def total_loss(self) -> tuple[float, bool]:
        """(the loss over all ranks, whether every rank's loss and gradients are finite). Waits for the device."""
        word = torch.stack((self.flat_grad[-1], self.flat_grad.sum()))
        loss, total = self.ranks.sum(word).tolist()
        return loss, math.isfinite(loss) and math.isfinite(total)

    def reduce(self) -> list[dist.Work | None]:
        """Begin to sum the gradients on their owners and wait for this rank's own; the rest is to be waited for."""
        works = [self.ranks.reduce(segment, r) for r, segment in enumerate(self.grad_segments)]
        self.ranks.wait(works[self.ranks.rank])
        return works

    def named(self) -> Iterator[tuple[str, Format, Tensor | None, Stored]]:
        """(name, format, latent if this rank owns it, stored) of each parameter."""
        for bank in self.banks:
            stored, n = self.stored(bank), len(bank.names)
            scales = stored.scales if stored.scales is not None else [None] * n
            latent = bank.latent if bank.latent is not None else [None] * n
            for row in zip(bank.names, latent, stored.codes, scales, strict=True):
                yield row[0], bank.format, row[1], Stored(row[2], row[3])

    def first_non_finite(self, order: list[str]) -> str | None:
        """The first latent, else the first gradient, in the model's order, that is not finite; None if all are."""
        latents = {n: x for b in self.mine for n, x in zip(b.names, b.latent, strict=True)}
        grads = {n: x for b in self.banks for n, x in zip(b.names, b.grad, strict=True)}
        if bool(torch.isfinite(self.flat_grad.sum())) and all(bool(torch.isfinite(b.latent.sum())) for b in self.mine):
            return None
        for what, tensors in (("weights", latents), ("gradient", grads)):
            for name in order:
                if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
                    return f"the {what} of {name}"
        return None

    def pack(self, order: list[str]) -> dict[str, pack.StoredTensor]:
        """Every parameter as pack.py writes it, in the model's order."""
        packed = {name: to_pack(stored, fmt) for name, fmt, _, stored in self.named()}
        return {name: packed[name] for name in order}


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Approximately orthogonalise each matrix of g [n, rows, cols] in bf16: U V^T of its SVD, singular values ~1.

    Quintic iteration and coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon for the block matrices, AdamW for the embedding and the vectors, on the fp32 latents that this rank owns."""

    def __init__(self, latents: Latents, config: Config):
        self.config, self.latents = config, latents
        self.muon = [b for b in latents.mine if b.optimizer == "muon"]
        self.momentum = [torch.zeros_like(b.latent) for b in self.muon]
        self.adam_banks = [b for b in latents.mine if b.optimizer != "muon"]
        lrs = {"embed": config.tied_embed_lr, "scalar": config.scalar_lr}
        groups = [{"params": [b.latent], "lr": lrs[b.optimizer], "base_lr": lrs[b.optimizer]} for b in self.adam_banks]
        for b in self.adam_banks:
            b.latent.grad = b.grad
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.AdamW(groups or [torch.zeros(0)], betas=betas, eps=config.adam_eps, weight_decay=0.0,
                                      fused=True)  # a rank may own no vector, which AdamW does not allow
        held = [n for b in (*self.muon, *self.adam_banks) for n in b.names]
        assert len(held) == len(set(held)) == sum(len(b.names) for b in latents.mine), "not one group per parameter"

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float, quantized: float = 1.0) -> None:
        """One update of the latents from the accumulated gradients, which are cleared; params are not refreshed.

        quantized: with which the params that have these gradients were refreshed.
        """
        latents = self.latents
        works = latents.reduce()
        if self.config.grad_clip_norm > 0:
            own = latents.grad_segments[latents.ranks.rank]
            norm = latents.ranks.sum(own.square().sum()).sqrt()
            own *= (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for bank in latents.mine:
            bank.format.learn(bank.latent, bank.grad, bank.state, lr_scale, quantized)
        lr = self.config.matrix_lr * lr_scale
        for bank, buffer in zip(self.muon, self.momentum, strict=True):
            buffer.mul_(momentum).add_(bank.grad)
            update = newton_schulz(bank.grad.add(buffer, alpha=momentum), self.config.muon_backend_steps)
            rows, cols = update.shape[-2:]
            bank.latent.mul_(1 - lr * self.config.muon_wd)
            bank.latent.add_(update.float(), alpha=-lr * max(1, rows / cols) ** 0.5)
        for group in self.adam.param_groups if self.adam_banks else []:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for work in works:
            latents.ranks.wait(work)
        latents.flat_grad.zero_()

    def moments(self, bank: Bank) -> dict[str, Tensor]:
        """The optimizer's fp32 state of a bank that this rank owns, in the latent's shape."""
        if bank.optimizer == "muon":
            return {"momentum": self.momentum[next(i for i, b in enumerate(self.muon) if b is bank)]}
        state = self.adam.state[bank.latent]
        return {k: state.get(k, torch.zeros_like(bank.latent)) for k in ("exp_avg", "exp_avg_sq")}

    def kept(self, bank: Bank) -> dict[str, Tensor]:
        """The fp32 tensors of a bank that a checkpoint keeps, [n, ..]; on the meta device if another rank has them."""
        moments = ["momentum"] if bank.optimizer == "muon" else ["exp_avg", "exp_avg_sq"]
        if bank.latent is not None:
            return {"latent": bank.latent} | self.moments(bank) | bank.state
        like = torch.empty(bank.grad.shape, device="meta")
        return dict.fromkeys(["latent", *moments], like) | bank.format.start(like)

    def state(self) -> dict[str, Tensor]:
        """By name, on rank 0, of all ranks: latent/*, momentum/*, exp_avg/*, exp_avg_sq/*, what formats learn; and
        codes/* and scales/*, carried so that what a file must hold is never derived again on another machine."""
        out = {}
        for bank in self.latents.banks:
            for what, x in self.kept(bank).items():
                x = torch.empty(x.shape, device=bank.grad.device) if x.is_meta else x
                x = self.latents.ranks.gather(x, bank.owner)
                out |= {f"{what}/{n}": row for n, row in zip(bank.names, x, strict=True)}
        for name, _, _, stored in self.latents.named():
            out[f"codes/{name}"] = stored.codes
            out |= {f"scales/{name}": stored.scales} if stored.scales is not None else {}
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int, quantized: float = 1.0) -> None:
        """Restore what state() gave after that many steps, each rank its own, and refresh the params.

        Raises KeyError or ValueError on a wrong state. The state may come from another number of ranks.
        """
        expected = {}
        for bank in self.latents.banks:
            for i, n in enumerate(bank.names):
                expected |= {f"{what}/{n}": x[i] for what, x in self.kept(bank).items()}
                expected |= {f"codes/{n}": bank.like.codes[i]}
                expected |= {f"scales/{n}": bank.like.scales[i]} if bank.like.scales is not None else {}
        if wrong := sorted(expected.keys() ^ state.keys()):
            raise ValueError(f"tensor {wrong[0]} is missing or not known")
        for name, x in expected.items():
            if x.shape != state[name].shape or x.dtype != state[name].dtype:
                raise ValueError(f"tensor {name} is {state[name].dtype} {tuple(state[name].shape)}, not {x.dtype} "
                                 f"{tuple(x.shape)}")
        for bank in self.latents.mine:
            loaded = {what: torch.stack([state[f"{what}/{n}"] for n in bank.names]) for what in self.kept(bank)}
            bank.latent.copy_(loaded.pop("latent"))
            for what, x in bank.state.items():
                x.copy_(loaded.pop(what))
            if bank.optimizer == "muon":
                self.moments(bank)["momentum"].copy_(loaded["momentum"])
            else:
                device = bank.latent.device
                moments = {k: v.to(device) for k, v in loaded.items()}
                self.adam.state[bank.latent] = moments | {"step": torch.tensor(float(step), device=device)}
        self.latents.refresh(quantized)


# ---------------------------------------------------------------------------------------------------------------
# Data loading and schedules
# ---------------------------------------------------------------------------------------------------------------


class TokenLoader:
    """Training tokens in shard order, endlessly; its whole state is `position`, tokens taken since the start.

    A step's sequences are one contiguous span, dealt to (micro-batch, rank) in order: N ranks and one rank with N
    times the micro-batches read the same sequences in the same step.
    """

    def __init__(self, shards: tuple[Path, ...], vocab_size: int):
        self.shards, self.vocab_size, self.position = shards, vocab_size, 0
        self.ends = np.cumsum([shard_tokens(p) for p in shards])
        self.open_shard, self.tokens = -1, np.zeros(0, dtype=np.uint16)
        if self.ends[-1] < 2:
            raise DataError(f"{shards[0].parent}: the training shards hold no text; prepare the folder again")
        self.read(0, 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """count tokens from position start of the endless stream, int64 [count]."""
        out, filled = np.empty(count, dtype=np.int64), 0
        while filled < count:
            at = (start + filled) % int(self.ends[-1])
            shard = int(np.searchsorted(self.ends, at, side="right"))
            if shard != self.open_shard:
                self.open_shard, self.tokens = shard, read_shard(self.shards[shard])
                if self.tokens.size and int(self.tokens.max()) >= self.vocab_size:
                    raise DataError(f"{self.shards[shard]}: token {self.tokens.max()} with vocab_size="
                                    f"{self.vocab_size}; the shard is of another tokenizer")
            offset = at - (int(self.ends[shard - 1]) if shard else 0)
            piece = self.tokens[offset : offset + count - filled]
            out[filled : filled + piece.size] = piece
            filled += piece.size
        return out

    def batch(self, rows: int, seq_len: int, micro: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, seq_len] of this rank's micro-batch, int64; the position does not move."""
        start = self.position + (micro * world + rank) * rows * seq_len
        span = torch.from_numpy(self.read(start, rows * seq_len + 1))
        return span[:-1].view(rows, seq_len), span[1:].view(rows, seq_len)


@dataclass(frozen=True)
class StepPlan:
    lr_scale: float  # of every learning rate, in [0, 1]
    momentum: float  # Muon's
    seq_len: int  # tokens
    batch_tokens: int  # over all ranks, before rounding down to whole micro-batches
    quantized: float  # how far params are from latents (0) to what is stored (1), after the step


def sequence_lengths(config: Config) -> list[int]:
    """The lengths that a run goes through: doublings from seq_ramp_start to train_seq_len."""
    start = min(config.seq_ramp_start or config.train_seq_len, config.train_seq_len)
    return [start << k for k in range((config.train_seq_len // start).bit_length())]


def schedule(config: Config, step: int, progress: float) -> StepPlan:
    """Everything that changes during a run, from the step and the progress in [0, 1] of the clock or the count."""
    c = config
    steps_in_all = step / progress if step and progress else math.inf
    warmup = (step + 1) / c.lr_warmup_steps if c.lr_warmup_steps else 1.0
    down = c.warmdown_iters / steps_in_all if c.warmdown_iters else c.warmdown_frac
    warmdown = max(1 - progress, 0.0) / down if down else 1.0
    warm = min(step / c.muon_momentum_warmup_steps, 1.0) if c.muon_momentum_warmup_steps else 1.0
    momentum = c.muon_momentum_warmup_start + warm * (c.muon_momentum - c.muon_momentum_warmup_start)

    def ramp(share: float) -> float:
        return min(progress / share, 1.0) if share else 1.0

    lengths, batch, small = sequence_lengths(c), c.train_batch_tokens, c.batch_ramp_start
    seq_len = lengths[round((len(lengths) - 1) * ramp(c.seq_ramp_frac))]
    batch = int(small + ramp(c.batch_ramp_frac) * (batch - small)) if 0 < small < batch else batch
    since = progress - c.quantize_start
    quantized = min(max(since / c.quantize_ramp, 0.0), 1.0) if c.quantize_ramp else float(since >= 0)
    return StepPlan(min(warmup, warmdown, 1.0), momentum, seq_len, batch, quantized)


def micro_batch_tokens(config: Config, world: int) -> int:
    """Tokens per forward and rank. Raises ConfigError where the batch does not divide into such pieces."""
    c, share = config, config.train_batch_tokens // world
    tokens = min(c.micro_batch_tokens, share)
    if tokens % c.train_seq_len or c.train_batch_tokens % (world * tokens):
        raise ConfigError(
            f"train_batch_tokens={c.train_batch_tokens} over {world} process(es) does not divide into micro-batches of "
            f"{tokens} tokens made of whole sequences of {c.train_seq_len}; change micro_batch_tokens or the batch"
        )
    if c.batch_ramp_start < c.train_batch_tokens and c.batch_ramp_start % (world * tokens):
        raise ConfigError(f"batch_ramp_start={c.batch_ramp_start}: must be a multiple of the {world * tokens} tokens "
                          "of one micro-batch on every process; lower micro_batch_tokens")
    return tokens


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what, where and what to do."""


# Settings that may differ between a checkpoint and the run that resumes it: they change no formula. Another device,
# thread count or compiler changes last bits; another data_path is fine because the data's identity is compared.
FREE_SETTINGS = {"run_id", "out_dir", "resume", "threads", "device", "compile", "data_path", "tokenizer_path",
                 "warmup_steps", "train_log_every", "val_loss_every", "checkpoint_every", "eval_stride",
                 "eval_batch_seqs", "val_batch_size", "cap_bytes", "cap_counts_code"}


def check_settings(path: Path, theirs, config: Config) -> None:
    """Raises CheckpointError unless a run that path tells of had these settings, but for those that may differ."""
    mine, theirs = asdict(config), theirs if isinstance(theirs, dict) else {}
    theirs = {f.name: f.default for f in fields(Config)} | theirs  # a setting that is new since does nothing there
    differ = [n for n in mine if n not in FREE_SETTINGS and mine[n] != theirs[n]]
    if differ:
        raise CheckpointError(
            f"{path}: made with other settings: "
            + ", ".join(f"{n}={theirs[n]} (now {mine[n]})" for n in differ)
            + "; resume with the same ones or use another --run-id"
        )


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """One safetensors file with the JSON state in its metadata, replaced atomically."""
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    pack.write_atomic(path, safetensors.torch.save(tensors, {"state": json.dumps(state, sort_keys=True)}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint file, or of the one in a run's folder. Raises CheckpointError."""
    path = Path(path)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such checkpoint; give a run's folder or its checkpoint.safetensors")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with safetensors.safe_open(path, framework="pt") as f:
            state = json.loads((f.metadata() or {})["state"])
            if not isinstance(state, dict):
                raise ValueError("its state is not a JSON object")
            return {name: f.get_tensor(name) for name in f.keys()}, state  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer ({e!r}); delete it and train again") from None


def stored_from_checkpoint(path: str | Path) -> dict[str, pack.StoredTensor]:
    """What an artifact of this checkpoint must hold, for pack.py verify --against: the codes and scales it carries."""
    tensors, state = load_checkpoint(path)
    try:
        config = Config(**state["config"])
        with torch.device("meta"):
            formats = {n: format_of(config, n, p.ndim) for n, p in GPT(config).named_parameters()}
        return {n: to_pack(Stored(tensors[f"codes/{n}"], tensors.get(f"scales/{n}")), f) for n, f in formats.items()}
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path}: the checkpoint's settings do not fit its tensors: {e!r}") from None


# ---------------------------------------------------------------------------------------------------------------
# The run's folder: finished work is never overwritten, and nobody else works in it
# ---------------------------------------------------------------------------------------------------------------


class RunExists(ValueError):
    """The run's folder holds a run that must not be touched; the message says what to do instead."""


@dataclass(frozen=True)
class Finished:
    """What a finished run was."""

    settings: dict
    steps: int
    score: dict  # eval_bpb's
    model_sha256: str


def finished_run(folder: Path) -> Finished | None:
    """The finished run whose model the folder holds; None where there is none.

    Its log's last record says so; where a log was damaged, the score of the model and the end of the checkpoint do.
    """
    metrics, model, score = (folder / name for name in ("metrics.jsonl", "model.tern", "score.json"))
    if not model.is_file():  # a link to a device has no end
        return None
    try:
        sha256, final = sha256_file(model), last_record(metrics)
        if final and final["artifact_sha256"] == sha256:
            header = json.loads(metrics.read_bytes().partition(b"\n")[0])
            return Finished(dict(header["settings"]), int(final["step"]), final["score"], sha256)
        scored, (_, state) = json.loads(score.read_bytes()), load_checkpoint(folder)
        if scored["artifact"]["sha256"] == sha256 and state["finished"]:
            return Finished(dict(state["config"]), int(state["step"]), scored, sha256)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return None


def last_record(metrics: Path) -> dict | None:
    """The record that ends a finished run's metrics.jsonl; None where there is none."""
    try:
        lines = metrics.read_bytes().strip().splitlines() if metrics.is_file() else []
        final = json.loads(lines[-1]) if lines else None
        return final if isinstance(final, dict) and final.get("type") == "final" else None
    except (OSError, ValueError, RecursionError):
        return None


def look_at_folder(folder: Path, config: Config) -> str | None:
    """What to say instead of running, where the run is finished and --resume auto asked for it; None: go on.

    Only reads. Raises RunExists if running would overwrite a run, CheckpointError if it is one with other settings.
    """
    mend = f"use another --run-id, or move {folder} away"
    for name in ("checkpoint.safetensors", "model.tern", "score.json"):
        if (folder / name).exists() and not (folder / name).is_file():
            raise RunExists(f"{folder / name} is not a file: {mend}")
    finished = finished_run(folder)
    if finished:
        if config.resume == "never":
            raise RunExists(f"{folder} holds a finished run ({finished.steps} steps): {mend}")
        check_settings(folder, finished.settings, config)
        kind = "sliding" if finished.score["sliding"] else "chunked"
        return (f"{folder} is finished and left as it is: {finished.steps} steps, {kind} val_bpb "
                f"{finished.score[kind]['val_bpb']:.8f}, model {finished.score['artifact']['bytes']:,} bytes, sha256 "
                f"{finished.model_sha256[:16]}; for a new run {mend}")
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        held = [name for name in ("model.tern", "score.json") if os.path.lexists(folder / name)]
        held += ["log"] if last_record(folder / "metrics.jsonl") else []
        if held:
            raise RunExists(f"{folder} holds the {held[0]} of an earlier run: {mend}")
    elif config.resume == "never":
        _, state = load_checkpoint(checkpoint)
        raise RunExists(f"{folder} holds an unfinished run (step {state.get('step')}): continue with --resume auto, or "
                        + mend)
    return None


# What a killed run may leave: halves of files that pack.write_atomic, or the scoring process, was writing.
HALF_WRITTEN = re.compile(r"\.(model\.tern|score\.json|checkpoint\.safetensors|\.score\.json\.[0-9a-f]{8}\.tmp)"
                          r"\.[0-9a-f]{8}\.tmp")


def lock_folder(folder: Path):
    """The open file whose lock keeps other runs out of the folder. Raises RunExists if another process has it.

    The lock goes with the process, however that ends; the file stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as e:
        raise RunExists(f"{folder}: cannot be written ({e.strerror}); choose another --out-dir or --run-id") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunExists(f"{folder}: another run is at work in it ({file.read().strip() or 'unknown'}); wait for it, or "
                        "use another --run-id") from None
    except OSError:  # a file system without locks
        return file
    try:  # for a reader; the lock is what counts
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    except OSError:
        return file
    return file


# ---------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------

def predicted_bytes(config: Config) -> dict[str, tuple[dict, int, float]]:
    """Part of the model's file -> (format, symbols, bytes), with pack.expected_bits for each symbol."""
    parts: dict[str, tuple[dict, int, float]] = {}
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    for name, shape in shapes.items():
        spec = format_of(config, name, len(shape)).spec()
        part = "embedding" if name == "tok_emb.weight" else "matrices" if name.endswith(".weight") else "vectors"
        for role, (_, role_shape) in pack.layout(spec, shape).items():
            _, count, size = parts.get(f"{part} {role}", (spec, 0, 0.0))
            n = math.prod(role_shape)
            bits = pack.expected_bits(spec, part, shape)[role]
            parts[f"{part} {role}"] = spec, count + n, size + n * bits / 8
    formats = [spec for i, (spec, *_) in enumerate(parts.values()) if spec not in [p[0] for p in parts.values()][:i]]
    rows = [(n, shape, formats.index(format_of(config, n, len(shape)).spec())) for n, shape in shapes.items()]
    header = pack.encode_header(formats, artifact_meta(config), [["model", 10**5, 2**31]] * len(parts), rows)
    return parts | {"header": ({}, 0, float(len(header)))}


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says what happened, at which step, and what is left."""


class AlreadyFinished(Exception):
    """Another process has finished this run; the message says so."""


class Elsewhere(Exception):
    """Rank 0 has met an error, and says it."""


class Interrupted(Exception):
    """SIGINT or SIGTERM: the step was finished and a checkpoint written."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


SILENCE = timedelta(seconds=45)  # after which a rank that does not answer is lost

ORIGIN_TOKENS = 200_000  # of each training shard without a manifest, that are asked whose they are

# A Trainer's, kept in its checkpoints.
RUN_STATE = ("step", "elapsed", "step_seconds", "tokens_seen", "finished", "quantized")


class Trainer:
    """One run on one rank: set up, warm up, train, pack, score."""

    def __init__(self, preset: str, config: Config, place: Place):
        self.preset, self.config, self.place = preset, config, place
        self.rank, self.world = place.rank, place.world
        cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ConfigError("device='cuda': this machine has no CUDA device; use --device cpu")
        self.device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
        self.ranks = Ranks(place.rank, place.world)
        self.seconds: dict[str, float] = {}  # phase -> seconds
        self.signal, self.signalled = 0, 0.0  # number of the last signal, and when it came
        self.log: runlog.Log | None = None
        self.step, self.elapsed, self.step_seconds, self.tokens_seen, self.finished = 0, 0.0, 0.0, 0, False
        self.quantized = schedule(config, 0, 0.0).quantized
        self.folder, self.shown = Path(config.out_dir) / config.run_id, ""
        # The program as it is now: an edit while it runs must not get into the log of what ran.
        self.sources = {p.name: p.read_bytes() for p in pack.code_files()}
        self.source_sha256 = {name: hashlib.sha256(code).hexdigest() for name, code in self.sources.items()}
        self.source_changed = False  # since the checkpoint that this run resumes
        self.lock = None
        self.notices: list[str] = []
        self.unsaved = ""  # why the last checkpoint could not be written; empty if it was

    # -- set up ---------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Open the data, build model and optimizer, resume if asked to, and print the preflight block."""
        began, c = time.perf_counter(), self.config
        self.micro_tokens = micro_batch_tokens(c, self.world)
        self.checkpoint_path = self.folder / "checkpoint.safetensors"
        self.data = open_data(c.data_path, c.tokenizer_path)
        self.counter = ByteCounter(self.data.tokenizer)
        if self.counter.vocab_size != c.vocab_size:
            raise ConfigError(f"vocab_size={c.vocab_size}: the tokenizer {self.data.tokenizer} has "
                              f"{self.counter.vocab_size}; give --vocab-size {self.counter.vocab_size}")
        with self.ranks.talking():
            check_agreement({"data": self.data.identity, "program": self.source_sha256, "settings": {
                name: value for name, value in asdict(c).items() if name not in FREE_SETTINGS}}, self.device)
        val = {p.name: read_shard(p) for p in self.data.val}
        self.claim(val)
        loaded = None
        if c.resume == "auto" and self.checkpoint_path.exists():
            loaded = load_checkpoint(self.checkpoint_path)
        self.val_tokens = np.concatenate(list(val.values()))
        self.loader = TokenLoader(self.data.train, c.vocab_size)
        torch.manual_seed(c.seed)
        self.model = GPT(c).to(self.device)
        self.order = [name for name, _ in self.model.named_parameters()]
        if self.world > 1:  # in the loop a rank that is silent for this long is lost; setting up may take longer
            self.ranks.call(dist.barrier)  # rank 0 has audited the validation text meanwhile
            self.ranks.group = self.ranks.call(dist.new_group, timeout=SILENCE)
        self.latents = Latents(self.model, c, self.ranks)
        if c.init_from and not loaded:
            start, state = load_checkpoint(c.init_from)
            if state.get("tokenizer") not in (None, self.data.tokenizer_sha256):
                raise CheckpointError(f"init_from={c.init_from}: was trained with another tokenizer than "
                                      f"{self.data.tokenizer}, so its embedding means other text; use data of its own")
            try:
                self.latents.load({n.removeprefix("latent/"): x for n, x in start.items() if n.startswith("latent/")})
            except ValueError as e:
                raise CheckpointError(f"init_from={c.init_from}: {e}; use a checkpoint of the same model") from None
        if c.init_from or self.quantized < 1:
            self.latents.refresh(self.quantized)
        self.optimizer = Optimizer(self.latents, c)
        self.compiled: Callable[[Tensor, Tensor], Tensor] = self.model
        if loaded:
            self.restore(*loaded)
        if self.world > 1:  # every rank has looked for its checkpoint, and all found the same
            steps = torch.tensor([self.step, -self.step], device=self.device)
            self.ranks.call(dist.all_reduce, steps, op=dist.ReduceOp.MAX)
            if int(steps.sum()):
                raise CheckpointError(f"{self.checkpoint_path}: the ranks do not see the same checkpoint; share the "
                                      "folder between the machines")
        self.seconds["load"] = time.perf_counter() - began

    def close(self) -> None:
        """Let go of the run's folder."""
        for file in (self.log, self.lock):
            if file is not None:
                file.close()

    def claim(self, val: dict[str, np.ndarray]) -> None:
        """Audit the data and take the run's folder, on rank 0; all ranks leave if that cannot be.

        Raises what rank 0 met there, on other ranks Elsewhere; AlreadyFinished if another process has just finished
        this very run.
        """
        problem: Exception | None = None
        if self.rank == 0:
            try:
                self.audit(val)
                self.lock = lock_folder(self.folder)
                if said := look_at_folder(self.folder, self.config):  # again: another run may have come and gone
                    raise AlreadyFinished(said)
                for left in self.folder.iterdir():
                    if HALF_WRITTEN.fullmatch(left.name) and left.is_file():
                        left.unlink()
                resumes = self.config.resume == "auto" and self.checkpoint_path.exists()
                self.log = runlog.Log(self.folder, 0, append=resumes)
            except (ValueError, OSError, AlreadyFinished) as e:
                problem = e
        else:
            self.log = runlog.Log(self.folder, self.rank, append=True)
        word = 0 if problem is None else 1 if isinstance(problem, AlreadyFinished) else 2
        word = int(self.ranks.sum(torch.tensor(word, dtype=torch.int64, device=self.device)))  # rank 0's alone
        if word:
            raise problem or (AlreadyFinished() if word == 1 else Elsewhere())

    def audit(self, val: dict[str, np.ndarray]) -> None:
        """Whether the shards are of this tokenizer, before anything is trained; the scoring process asks again.

        val: name -> tokens. Raises AuditError.
        """
        check_scorable(np.concatenate(list(val.values())), self.counter, self.data.path)
        check_provable(self.data)
        audit_bytes(val, self.counter)
        for name, tokens in val.items():
            audit_origin(tokens, self.counter, self.data.path / name)
        self.notices += eval_bpb.check_tokenizer(self.counter.tokenizer, self.data.tokenizer)
        if self.data.manifest:
            return
        self.notices.append(f"{self.data.path} has no manifest.json: only their text says that its shards are of this "
                            "tokenizer")
        known = np.zeros(self.counter.vocab_size, dtype=bool)
        for path in self.data.train:
            tokens = read_shard(path, ORIGIN_TOKENS)
            audit_origin(tokens, self.counter, path)
            known[tokens] = True
        unseen = float(np.mean(~known[np.concatenate(list(val.values()))]))
        if unseen > 0.01:
            self.notices.append(f"{unseen:.1%} of the validation tokens are pieces that do not occur in the first "
                                f"{ORIGIN_TOKENS:,} tokens of any training shard: is it the same kind of text?")

    def preflight(self, origin: dict[str, str], notices: list[str]) -> None:
        runlog.preflight(self, origin, [*notices, *self.notices], predicted_bytes(self.config))
        self.phase("load")
        self.log.strict = False  # from here on training is worth more than its log

    def phase(self, name: str, note: str = "") -> None:
        self.log.line(f"[{name}] {self.seconds[name]:.1f} s{note}")
        self.log.record("phase", name=name, seconds=self.seconds[name])

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of all ranks on rank 0, after each has seen that its own part is worth keeping."""
        bad = self.latents.first_non_finite(self.order)
        if int(self.ranks.sum(torch.tensor(bad is not None, dtype=torch.int64, device=self.device))):
            raise TrainingError(f"step {self.step}: {bad or 'what another rank owns'} is not finite; the last good "
                                "checkpoint is kept")
        if self.quantized < 1:
            self.latents.refresh()  # for the codes of every rank
        tensors = self.optimizer.state()
        if self.quantized < 1:
            self.latents.refresh(self.quantized)
        if self.rank == 0:
            rng = {"rng/cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                rng["rng/cuda"] = torch.cuda.get_rng_state(self.device)
            state = {name: getattr(self, name) for name in RUN_STATE} | {
                "schema": runlog.METRICS_SCHEMA, "position": self.loader.position, "config": asdict(self.config),
                "data": self.data.identity, "tokenizer": self.data.tokenizer_sha256,
                "source": folder_identity(self.source_sha256),
            }
            try:
                save_checkpoint(self.checkpoint_path, tensors | rng, state)
                self.unsaved = ""
            except pack.ArtifactError as e:  # a full disk, which may have room again by the next one
                self.unsaved = str(e)
                self.log.line(f"notice      step {self.step}: {e}; training goes on, the last good checkpoint is kept")
        self.ranks.call(dist.barrier)  # among all, who wait long enough for a slow disk; and nobody leaves before it

    def restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        check_settings(self.checkpoint_path, state.get("config"), self.config)
        if state.get("data") != self.data.identity:
            raise CheckpointError(f"{self.checkpoint_path}: made from other data than {self.config.data_path}")
        self.source_changed = state.get("source") != folder_identity(self.source_sha256)
        rng = {n: tensors.pop(n) for n in list(tensors) if n.startswith("rng/")}
        try:
            self.optimizer.load_state(tensors, int(state["step"]), float(state["quantized"]))
            torch.set_rng_state(rng["rng/cpu"])
            if self.device.type == "cuda" and "rng/cuda" in rng:
                torch.cuda.set_rng_state(rng["rng/cuda"], self.device)
            self.loader.position = int(state["position"])
            for name in RUN_STATE:
                setattr(self, name, type(getattr(self, name))(state[name]))
        except (KeyError, ValueError, RuntimeError, TypeError) as e:
            raise CheckpointError(f"{self.checkpoint_path}: {e!r}; delete it and train again") from None

    # -- the loop -------------------------------------------------------------------------------------------------

    def micro_batches(self, plan: StepPlan) -> int:
        """Micro-batches per rank in a step."""
        return max(plan.batch_tokens // (self.world * self.micro_tokens), 1)

    def forward_backward(self, seq_len: int, micro_batches: int) -> None:
        """Accumulate this rank's share of a step's gradients and loss, which are means, in latents.flat_grad."""
        for micro in range(micro_batches):
            rows = self.micro_tokens // seq_len
            ids, targets = self.loader.batch(rows, seq_len, micro, self.rank, self.world)
            loss = self.compiled(ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
            loss.backward()
            self.latents.accumulate(loss, micro_batches * self.world)

    def warm_up(self) -> None:
        """Compile and prime every shape of the run. Nothing is updated, so there is nothing to undo."""
        began, c, last = time.perf_counter(), self.config, 0.0
        if c.compile and not can_compile(self.device):
            self.log.line("notice      no C++ compiler found, so torch.compile is off; training will be slower")
        elif c.compile:
            try:
                torch._dynamo.config.recompile_limit = max(8, len(sequence_lengths(c)) + 1)  # one graph per length
                tag_compiler_cache()
                self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
            except Exception as e:
                self.without_compiler(e)
        for seq_len in sequence_lengths(c):
            passes = c.warmup_steps if self.compiled is self.model else max(c.warmup_steps, 1)
            for _ in range(passes):
                start = time.perf_counter()
                try:
                    self.forward_backward(seq_len, 1)
                except Exception as e:  # compilers, headers, caches and libraries each fail in their own way
                    if self.compiled is self.model:
                        raise
                    self.without_compiler(e)
                    self.forward_backward(seq_len, 1)
                self.latents.flat_grad.zero_()
                self.synchronize()
                last = time.perf_counter() - start
        if self.world > 1:  # wait for the slowest compiler, then open the connections
            self.ranks.call(dist.barrier)
            self.latents.reduce()
            self.latents.refresh(self.quantized)
            self.latents.flat_grad.zero_()
            self.ranks.sent = dict.fromkeys(self.ranks.sent, 0)
        self.seconds["compile"] = time.perf_counter() - began
        expect = f"{c.iterations:,}"
        if c.max_wallclock_seconds and last:
            full = last * c.train_batch_tokens / (self.world * self.micro_tokens)
            expect = f"about {min(c.max_wallclock_seconds / full, c.iterations or math.inf):,.0f}"
        self.phase("compile", f", {expect} steps expected")

    def without_compiler(self, e: Exception) -> None:
        """Go on with the eager model where compiling it failed, on a CPU. Raises e if it was not the compiler's."""
        if isinstance(e, RankLost | torch.OutOfMemoryError | MemoryError):
            raise e
        why = (" ".join(str(e).split()) or repr(e))[:200]
        if self.device.type == "cuda":  # ten minutes of a GPU are not worth an uncompiled run
            raise TrainingError(f"torch.compile failed ({why}); mend that, or train uncompiled with --compile 0") from e
        self.log.line(f"notice      torch.compile failed ({why}), so it is off; training will be slower (--compile 0 "
                      "leaves it out)")
        self.compiled = self.model
        for bank in self.latents.banks:
            for p in bank.params:
                p.grad = None
        self.latents.flat_grad.zero_()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def control(self, progress: float, stop: bool) -> tuple[float, bool, int]:
        """Rank 0's word on progress and stopping, and any rank's signal, the same on every rank."""
        if self.world == 1:
            return progress, stop, self.signal
        word = [progress, stop, self.signal] if self.rank == 0 else [0.0, 0.0, self.signal]
        word = torch.tensor(word, dtype=torch.float64, device=self.device)
        self.ranks.call(dist.all_reduce, word, op=dist.ReduceOp.MAX, group=self.ranks.group)
        progress, stop, signum = word.tolist()
        return progress, bool(stop), int(signum)

    def train(self) -> None:
        """Train to the wallclock cap or the number of iterations, whichever comes first."""
        c, log, cap = self.config, self.log, self.config.max_wallclock_seconds
        self.synchronize()
        self.first_step, began = self.step, time.perf_counter() - self.elapsed
        while not self.finished:
            self.elapsed = time.perf_counter() - began
            progress = max(self.step / c.iterations if c.iterations else 0.0, self.elapsed / cap if cap else 0.0)
            over = bool(cap) and self.elapsed + self.step_seconds > cap  # the next step would end after the cap
            stop = over or bool(c.iterations) and self.step >= c.iterations
            progress, self.finished, signum = self.control(min(progress, 1.0), stop)
            if self.finished:
                break
            if signum:
                self.save()
                if self.unsaved:
                    raise TrainingError(f"stopped by signal {signum} after step {self.step}, and {self.unsaved}")
                raise Interrupted(signum, f"stopped by signal {signum} after step {self.step}, checkpoint in "
                                  f"{self.checkpoint_path}: the same command with --resume auto continues")
            plan = schedule(c, self.step, progress)
            micro_batches = self.micro_batches(plan)
            self.forward_backward(plan.seq_len, micro_batches)
            loss, finite = self.latents.total_loss()  # waits for the device, so the clock below is true
            if not finite:
                raise self.diverged(loss, plan.seq_len)
            self.optimizer.step(plan.lr_scale, plan.momentum, self.quantized)
            self.step += 1
            logged = c.train_log_every > 0 and (self.step <= 10 or self.step % c.train_log_every == 0)
            self.quantized = plan.quantized
            zero_frac, churn = self.latents.refresh(self.quantized, measure=logged)
            tokens = micro_batches * self.world * self.micro_tokens
            self.loader.position += tokens
            self.tokens_seen += tokens
            now = time.perf_counter() - began
            self.step_seconds, self.elapsed = now - self.elapsed, now
            runlog.step(self, plan, loss, tokens, zero_frac, churn, logged, progress)
            if c.val_loss_every > 0 and self.step % c.val_loss_every == 0:
                score = self.validate(max(c.val_batch_size // (self.world * c.train_seq_len), 1))
                log.line(f"step:{self.step}/{c.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                         f"train_time:{1000 * now:.0f}ms step_avg:{1000 * now / self.step:.2f}ms")
                log.record("val", step=self.step, elapsed=now, **asdict(score))
            if c.checkpoint_every and self.step % c.checkpoint_every == 0:
                self.elapsed = time.perf_counter() - began  # the validation is inside the clock
                self.save()
        self.seconds["train"] = self.elapsed
        if cap and self.step < c.iterations:
            log.line(f"stopping_early: wallclock_cap train_time:{1000 * self.elapsed:.0f}ms "
                     f"step:{self.step}/{c.iterations}")
        self.settle()
        self.check_replicas()
        steps = max(self.step - self.first_step, 1)
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.state_tensors()}
        table = torch.zeros(self.world, 3, dtype=torch.int64, device=self.device)
        table[self.rank] = torch.tensor([sum(held.values()), *(v // steps for v in self.ranks.sent.values())])
        runlog.memory(self, *self.ranks.sum(table).T.tolist())
        self.save()
        self.check_compiled()  # after saving: what was trained is not lost with the packing
        self.phase("train", f", {self.step:,} steps, {self.tokens_seen:,} tokens")

    def settle(self) -> None:
        """After the last step: what is packed is quantized all the way, whatever the schedule was."""
        if self.quantized < 1:
            self.quantized = 1.0
            self.latents.refresh()

    @torch.no_grad()
    def diverged(self, loss: float, seq_len: int) -> TrainingError:
        """The error of a step whose loss or gradient is not finite: it names the first bad tensor, and what is left."""
        bad: list[str] = []

        def look(name: str) -> Callable:
            return lambda _module, _inputs, output: None if torch.isfinite(output).all() else bad.append(
                f"the output of {name or 'the model'}")

        hooks = [m.register_forward_hook(look(n)) for n, m in self.model.named_modules()]
        weights = self.latents.first_non_finite(self.order) or ""  # of this rank
        if not weights.startswith("the weights"):  # a bad activation makes all gradients bad: look for it, eagerly
            ids, targets = self.loader.batch(1, seq_len, 0, self.rank, self.world)
            self.model(ids.to(self.device), targets.to(self.device))
        for hook in hooks:
            hook.remove()
        first = (bad or [weights or "the sum of the gradients, or another rank's,"])[0]
        kept = f"the last good checkpoint is {self.checkpoint_path}" if self.checkpoint_path.exists() else (
            "no checkpoint was written yet")
        return TrainingError(f"step {self.step + 1}: {first} is not finite (loss {loss}); {kept}; lower the learning "
                             "rates or check the data")

    def check_compiled(self) -> None:
        """What was trained is the compiled model, what is scored the eager one: both must be the same function."""
        if not self.config.compile:  # the same on all ranks, which all take part below
            return
        seq_len = self.config.train_seq_len
        batch = self.loader.batch(self.micro_tokens // seq_len, seq_len, 0, self.rank, self.world)
        compiled, eager = (float(f(*(x.to(self.device) for x in batch)).detach()) for f in (self.compiled, self.model))
        differs = not abs(compiled - eager) <= 0.002 * eager  # fused kernels round bf16 at other places
        if int(self.ranks.sum(torch.tensor(int(differs), device=self.device))):
            raise TrainingError(f"the compiled model's loss on a batch is {compiled:.5f}, the eager one's {eager:.5f}: "
                                "torch.compile changed the model; train with --compile 0 and report it")

    def lost(self, e: RankLost) -> int:
        """Say once, from whichever rank comes first, that a rank was lost; the exit status."""
        kept = f"continue from {self.checkpoint_path} with --resume auto" if self.checkpoint_path.exists() else (
            "no checkpoint was written yet: start again")
        text = f"error: a process of this run was lost at step {self.step + 1}, so all stop ({e}); {kept}"
        if self.log is not None:
            self.log.line(text, console=False)
        store = dist.distributed_c10d._get_default_store()
        try:
            store.set_timeout(timedelta(seconds=5))
            first = store.add("lost", 1) == 1
        except RuntimeError:  # the store went with the lost process
            first = True
        if first:
            print(text, file=sys.stderr, flush=True)
        return 1

    def check_replicas(self) -> None:
        """Every rank must hold the same model: compare sha256 of all params."""
        digest = hashlib.sha256()
        for p in self.model.parameters():
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.replica_sha256 = digest.hexdigest()
        if self.world == 1:
            return
        mine = torch.tensor(list(digest.digest()), dtype=torch.int64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        self.ranks.call(dist.all_gather, every, mine, group=self.ranks.group)
        differ = [r for r, other in enumerate(every) if not torch.equal(other, every[0])]
        if differ:
            raise TrainingError(f"replicas differ: ranks {differ} do not hold the same bits as rank 0")
        self.log.line(f"replicas    {self.world} ranks hold identical params ({self.replica_sha256[:16]})")

    def state_tensors(self) -> Iterator[Tensor]:
        """All that this rank keeps between steps."""
        yield from (p.data for p in self.model.parameters())
        yield from (self.latents.flat_grad, self.latents.wire)
        for bank in self.latents.mine:
            yield from (*self.optimizer.kept(bank).values(), bank.stored.codes)
            yield from [bank.stored.scales] if bank.stored.scales is not None else []

    def validate(self, batch_seqs: int):
        """Chunked score of the model in memory."""
        c = self.config
        with self.ranks.talking():
            return evaluate(self.model, self.val_tokens, self.counter, c.train_seq_len, c.train_seq_len, batch_seqs)

    # -- pack and score -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Score in memory, pack, score the file in a fresh process, print the final block.

        Raises AuditError if the file is not the model, TrainingError if something beside it could not be written.
        """
        c, artifact = self.config, self.folder / "model.tern"
        began = time.perf_counter()
        memory = self.validate(c.eval_batch_seqs)
        if dist.is_initialized():  # the others have nothing left to do; the scoring processes form their own group
            dist.destroy_process_group()
        if self.rank:
            return
        memory_seconds = time.perf_counter() - began

        began = time.perf_counter()
        pack.write_artifact(artifact, self.latents.pack(self.order), artifact_meta(c, self.data))
        self.seconds["pack"] = time.perf_counter() - began
        size = pack.budget(artifact, pack.code_files(), c.cap_bytes, c.cap_counts_code)
        runlog.size(self, size)
        self.phase("pack")

        began = time.perf_counter()
        same = self.same_logits(artifact)
        scored = self.score_in_fresh_process(artifact)
        self.seconds["score"] = memory_seconds + time.perf_counter() - began
        self.phase("score")
        gap = scored["chunked"]["val_bpb"] - memory.val_bpb
        runlog.result(self, memory, scored, gap, same, size, artifact)
        if not same or gap != 0.0:
            raise AuditError("the file does not hold the model that was trained")
        for fault in filter(None, (self.unsaved, self.log.failed)):
            raise TrainingError(f"{fault}; {artifact} and its score are there and whole")

    @torch.inference_mode()
    def same_logits(self, artifact: Path) -> bool:
        """Whether the model in memory and the one loaded from the file give the same bits on a validation batch."""
        ids = torch.from_numpy(self.val_tokens[: 4 * self.config.train_seq_len].astype(np.int64))
        ids = ids[: len(ids) // 4 * 4].view(4, -1) if len(ids) >= 4 else ids[None]
        loaded = load_artifact(artifact, self.device)
        a, b = (m.head(m.hidden(ids.to(self.device))) for m in (self.model, loaded))
        return torch.equal(a, b)

    def score_in_fresh_process(self, artifact: Path) -> dict:
        """Run eval_bpb on the file, on as many processes as trained it here, and return its JSON."""
        c, out = self.config, self.folder / f".score.json.{secrets.token_hex(4)}.tmp"
        local = self.place.local_world
        launch = [sys.executable] if local == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={local}"]
        command = [*launch, *eval_bpb.command(), str(artifact), "--data", c.data_path, "--stride", str(c.eval_stride),
                   "--batch-seqs", str(c.eval_batch_seqs)]
        command += ["--tokenizer-path", c.tokenizer_path] if c.tokenizer_path else []
        hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
        env = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("TORCHELASTIC_")}
        env |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), eval_bpb.FOLLOWED: str(os.getpid())}
        env |= {} if self.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*command, "--json", str(out)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
        for line in done.stdout.rstrip().splitlines():
            self.log.line(f"| {line}")
        if done.returncode or not out.exists():
            raise AuditError(f"scoring failed (status {done.returncode}); see above, or run: {shlex.join(command)}")
        scored = json.loads(out.read_text(encoding="utf-8"))
        shards = {name: sha for name, sha in self.data.hashes.items() if name in scored["data"]["sha256"]}
        if scored["artifact"]["sha256"] != sha256_file(artifact) or scored["data"]["sha256"] != shards:
            raise AuditError(f"{out}: the scored artifact or data are not those of this run; do not change files while "
                             "it scores")
        out.replace(self.folder / "score.json")
        return scored


def main(argv: list[str] | None = None) -> int:
    steady_streams()
    return leave(run(sys.argv[1:] if argv is None else argv))


def tell(text: str) -> None:
    """To the terminal, if there is one."""
    try:
        print(text, flush=True)
    except OSError:
        return


def stop_scoring(signum: int, _frame) -> None:
    """A signal while the file is packed and scored: the scoring process goes too, and resuming does that again."""
    raise Interrupted(signum, f"stopped by signal {signum} after training: the same command with --resume auto packs "
                      "and scores")


def run(argv: list[str]) -> int:
    """Train, pack and score as the settings say; the exit status."""
    trainer, place = None, Place()

    def fail(e: object, status: int) -> int:
        """One message: rank 0's; of another machine's ranks the first one's, if its error is its own."""
        if trainer is not None and trainer.log is not None:
            trainer.log.strict = False
            trainer.log.clear_bar()
            trainer.log.line(f"error: {e}", console=False)
        shared = status == 2 or isinstance(e, TrainingError | RunExists)  # all ranks raise it together
        if place.rank == 0 or not shared and place.local_rank == 0:
            pack.say_error(f"{f'rank {place.rank}: ' if place.rank else ''}{e}")
        else:
            time.sleep(eval_bpb.LET_RANK_0_SPEAK)
        return status

    try:
        preset, config, origin, notices = resolve_settings(argv, os.environ)
        if "--plan" in argv:
            if pack.in_bundle():
                raise ConfigError("--plan: the planner is not in a bundle; use the repository's train_gpt.py")
            import plan  # the planner knows the trainer, not the other way round

            print(plan.report(preset, config))
            return 0
        place = process_place(os.environ)
        notices += filter(None, [writable_compiler_cache()])
        torch.set_num_threads(config.threads or max(1, runlog.cores() // place.local_world))
        trainer = Trainer(preset, config, place)
        if said := look_at_folder(trainer.folder, config):
            if place.rank == 0:
                tell(said)
            return 0
        if trainer.device.type == "cuda":
            if place.local_rank >= torch.cuda.device_count():
                raise ConfigError(f"nproc_per_node={place.local_world}: this machine has {torch.cuda.device_count()} "
                                  "GPU(s)")
            torch.cuda.set_device(trainer.device)
        else:
            keep_freed_memory()
            # The same seed must give the same bytes; on a CPU this costs nothing.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if place.world > 1:
            join_group(place, "nccl" if trainer.device.type == "cuda" else "gloo")

        def on_signal(signum: int, _frame) -> None:
            if trainer.signal and time.monotonic() - trainer.signalled > 2:  # launchers repeat a signal within moments
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            trainer.signal, trainer.signalled = signum, time.monotonic()

        stopping = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it; else a closed terminal ends the run
            stopping.append(signal.SIGHUP)
        previous = {s: signal.signal(s, on_signal) for s in stopping}
        trainer.set_up()
        trainer.preflight(origin, notices)
        trainer.warm_up()
        trainer.train()
        for signum in previous:
            signal.signal(signum, stop_scoring)
        trainer.finish()
        return 0
    except AlreadyFinished as e:
        if place.rank == 0:
            tell(str(e))
        return 0
    except Elsewhere:
        time.sleep(eval_bpb.LET_RANK_0_SPEAK)
        return 1
    except Interrupted as e:
        trainer.log.strict = False
        trainer.log.line(str(e))
        return 128 + e.signum
    except LaunchError as e:
        pack.say_error(e)  # every process that meets one: it may be the only one
        return 2
    except ConfigError as e:
        return fail(e, 2)
    except RankLost as e:
        return trainer.lost(e)
    except (DataError, AuditError, CheckpointError, TrainingError, RunExists, pack.ArtifactError, OSError) as e:
        return fail(e, 1)
    except KeyboardInterrupt:
        kept = trainer is not None and (trainer.folder / "checkpoint.safetensors").exists()
        return fail(f"stopped; {'--resume auto goes on from the checkpoint' if kept else 'nothing was trained'}", 130)
    except Exception as e:
        return fail(unexpected(e), 1)
    finally:
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    # One module under both names: eval_bpb imports train_gpt, and the operators above must not be registered twice.
    sys.modules["train_gpt"] = sys.modules["__main__"]
    sys.exit(main())
