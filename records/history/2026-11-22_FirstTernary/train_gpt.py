"""Train a ternary GPT under a byte budget, pack it, and have a fresh process score the file.

    python train_gpt.py                                              # preset cpu without a GPU, pr367 with one
    python train_gpt.py --preset cpu_10min_128kb --seed 7            # a scored run of the CPU track
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset golf16mb
    python train_gpt.py --help                                       # every setting, its default and its reason

Settings resolve as defaults < preset < environment (upper-case names) < command line.

The one idea: every parameter has three forms, and only `Latents.refresh` converts between them:

    latent (fp32, the optimizer's) --quantize--> stored (codes + scales, the file's) --dequantize--> param (bf16)

The model trains on params that are already dequantize(quantize(latent)); its forward is a plain dense GPT. The
straight-through estimator (Bengio et al., arXiv 1308.3432) is the optimizer step: the gradient of the param is applied
to the latent and the param is refreshed. The artifact holds the codes and scales of the last refresh, so the model
rebuilt from the file is the model that was trained, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import pack
from eval_bpb import (
    AuditError,
    ByteCounter,
    DataError,
    audit_bytes,
    evaluate,
    folder_identity,
    keep_freed_memory,
    load_artifact,
    open_data,
    read_shard,
    sha256_file,
    shard_tokens,
)

# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what to do."""


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
    threads: int = setting(0, "CPU threads per process; 0: cores / processes", 0)
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
    seq_ramp_start: int = setting(0, "sequence length at the start, doubling to train_seq_len; 0: no ramp", 0)
    seq_ramp_frac: float = setting(0.25, "share of the run over which the sequence length grows", 0, 1)
    batch_ramp_start: int = setting(0, "tokens per step at the start, growing to train_batch_tokens; 0: no ramp", 0)
    batch_ramp_frac: float = setting(0.20, "share of the run over which the batch grows", 0, 1)
    # model
    vocab_size: int = setting(1024, "must be the tokenizer's", 1, 65536)
    num_layers: int = setting(4, "blocks, at least 2; the first half feeds U-Net skips to the second", 2, 1024)
    model_dim: int = setting(128, "width of the residual stream", 1)
    num_heads: int = setting(2, "query heads", 1)
    num_kv_heads: int = setting(1, "key and value heads (GQA)", 1)
    mlp_mult: int = setting(3, "MLP hidden width in units of model_dim, where mlp_hidden is 0", 0)
    mlp_hidden: int = setting(0, "MLP hidden width, any number; 0: mlp_mult * model_dim", 0)
    rope_base: float = setting(10000.0, "RoPE base frequency", 1e-30)
    logit_softcap: float = setting(30.0, "logits are softcap * tanh(logits / softcap)", 1e-30)
    qk_gain_init: float = setting(1.5, "initial gain of normalised queries, learned per head")
    tied_embed_init_std: float = setting(0.005, "initial standard deviation of the tied embedding", 1e-30)
    # storage formats
    matrix_format: str = setting("ternary", "format of block matrices: ternary, int2..int8, bf16, fp16")
    embed_format: str = setting("bf16", "format of the tied embedding, likewise")
    vector_format: str = setting("bf16", "format of gains, scales, mixes and skips: bf16 or fp16")
    group_size: int = setting(128, "weights per scale along the input dimension; 0: one scale per tensor", 0)
    threshold: float = setting(0.5, "a ternary code is zero up to threshold * mean|w| (0.5: BitNet b1.58)", 0)
    scale_dtype: str = setting("bf16", "dtype of scales: bf16 or fp16")
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
                need(math.isfinite(value) and low <= value <= high, f.name, f"must be between {low} and {high}")
        need(self.mlp_hidden > 0 or self.mlp_mult > 0, "mlp_mult", "must be at least 1, or set mlp_hidden")
        need(self.model_dim % self.num_heads == 0, "num_heads", f"must divide model_dim={self.model_dim}")
        need(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        need(self.model_dim // self.num_heads % 2 == 0, "num_heads", "model_dim / num_heads must be even for RoPE")
        need(self.resume in ("auto", "never"), "resume", "must be auto or never")
        need(self.device in ("auto", "cpu", "cuda"), "device", "must be auto, cpu or cuda")
        need(self.train_batch_tokens % self.train_seq_len == 0, "train_batch_tokens",
             f"must be a multiple of train_seq_len={self.train_seq_len}")
        need(self.eval_stride <= self.train_seq_len, "eval_stride", f"must be at most {self.train_seq_len=}")
        need(self.seq_ramp_start <= self.train_seq_len, "seq_ramp_start", f"must be at most {self.train_seq_len=}")
        ramp = self.train_seq_len // max(self.seq_ramp_start, 1)
        need(not self.seq_ramp_start or self.seq_ramp_start * ramp == self.train_seq_len and ramp & (ramp - 1) == 0,
             "seq_ramp_start", f"must be {self.train_seq_len=} over a power of two")
        need(self.iterations > 0 or self.max_wallclock_seconds > 0, "iterations", "must be positive without a cap")
        for name in ("matrix_format", "embed_format", "vector_format"):
            make_format(self, name)

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or self.mlp_mult * self.model_dim


CPU_TRACK = dict(  # an int4 embedding beats a ternary one with a wider MLP at these bytes (LOG.md)
    cap_bytes=128_000, cap_counts_code=False, embed_format="int4", mlp_hidden=152, train_seq_len=256,
    train_batch_tokens=8192, val_batch_size=8192, tied_embed_lr=0.01,
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
        embed_format="ternary", group_size=128, scale_dtype="bf16", warmdown_iters=0, warmdown_frac=0.2,
        scalar_lr=0.02, tied_embed_lr=0.02, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=500, rope_base=10_000.0, val_loss_every=0,
        data_path="data/fineweb_sp8192",
    ),
}

# PR 367's variables for techniques that this trainer does not have: the values under which nothing is lost, and why.
# A value outside them is an error; one inside that asks for something anyway is answered with a printed notice.
FOREIGN_ENV = {
    "XSA_LAST_N": (("0",), "exclusive self-attention is not in this trainer (PR 367 found that it breaks training)"),
    "TIE_EMBEDDINGS": (("1",), "the embedding is always tied to the output head"),
    "CONTROL_TENSOR_NAME_PATTERNS": ((), "storage formats are chosen with matrix_format, embed_format, vector_format"),
    "TTT_ENABLED": (("0", "1"), "no test-time training: the score is of the model as stored (PR 367: no effect)"),
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
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, help="named settings (default: cpu without a GPU, pr367 with one)")
    for f in fields(Config):
        shown = "on" if f.default is True else "off" if f.default is False else f.default
        text = f"{f.metadata['why']} (default: {shown})".replace("%", "%%")
        names = dict.fromkeys(("--" + f.name.replace("_", "-"), "--" + f.name))  # both spellings
        p.add_argument(*names, metavar=kinds[f.name].__name__.upper(), help=text)
    args = vars(p.parse_args(argv))
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
    config = Config(**values)
    return preset, replace(config, run_id=config.run_id or f"{preset}_seed{config.seed}"), origin, notices


# ---------------------------------------------------------------------------------------------------------------
# Storage formats: latent -> stored -> param
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What the file holds of a tensor: codes in its shape, and scales [.., rows, groups] or None."""

    codes: Tensor
    scales: Tensor | None


# dtype, smallest scale of a group that is not zero (bf16: the smallest normal, which no device flushes to zero)
SCALE_DTYPES = {"bf16": (torch.bfloat16, 2.0**-126), "fp16": (torch.float16, 2.0**-24)}


def split_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """View x [.., rows, cols] as groups [.., rows, groups, size], zero-padded, with each group's true size [groups, 1].

    Groups run along the last (input) dimension; the last one is shorter where group_size does not divide it.
    group_size 0: the whole matrix is one group, [.., 1, 1, rows * cols]. A 1-D tensor is one row.
    """
    if group_size == 0:
        x = x.flatten(-2)[..., None, :] if x.ndim > 1 else x
    cols = x.shape[-1]
    size = min(group_size or cols, cols)
    groups = -(-cols // size)
    sizes = torch.full((groups, 1), float(size), device=x.device)
    if groups * size != cols:
        sizes[-1] = cols - (groups - 1) * size
        x = F.pad(x, (0, groups * size - cols))
    return x.unflatten(-1, (groups, size)), sizes


def join_groups(grouped: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of split_groups: drop the padding and restore the tensor's shape."""
    if grouped.shape[-3:-1].numel() == 1 and grouped.numel() == shape.numel():
        return grouped.reshape(shape)
    return grouped.flatten(-2)[..., : shape[-1]].reshape(shape)


def round_scales(scales: Tensor, nonzero: Tensor, dtype: str) -> Tensor:
    """Scales in their stored dtype: zero exactly for zero groups, never rounded to zero or infinity for the others."""
    kind, smallest = SCALE_DTYPES[dtype]
    return torch.where(nonzero, scales.clamp(smallest, torch.finfo(kind).max), 0.0).to(kind)


class GroupFormat:
    """Formats of codes times a scale per group: ternary and symmetric integers."""

    group_size: int

    def dequantize(self, stored: Stored) -> Tensor:
        """Param, bf16, in the codes' shape: codes * scale, computed in fp32 and rounded once."""
        codes, _ = split_groups(stored.codes.float(), self.group_size)
        param = codes * stored.scales.float()[..., None]
        return join_groups(param, stored.codes.shape).bfloat16()


@dataclass(frozen=True)
class Ternary(GroupFormat):
    """Codes in {-1, 0, 1} and one scale per group.

    absmean: scale = mean|w|, code = 0 where |w| <= threshold * mean|w|, else sign(w); with threshold 0.5 this is
    RoundClip(w / mean|w|, -1, 1) of BitNet b1.58 (arXiv 2402.17764, section 2). Codes use the exact mean and only the
    scale is rounded to 16 bits, so codes(c * W) == codes(W) for c > 0. A zero group has zero codes and a zero scale.
    """

    group_size: int = 128
    rule: str = "absmean"
    threshold: float = 0.5
    scale: str = "bf16"

    def __post_init__(self):
        if self.rule != "absmean" or self.scale not in SCALE_DTYPES or self.group_size < 0 or not self.threshold >= 0:
            raise ConfigError(f"{self}: rule absmean, scale bf16 or fp16, group_size and threshold >= 0 are needed")

    def quantize(self, latent: Tensor) -> Stored:
        """latent: fp32 [.., rows, cols] or [cols] -> codes int8 of its shape, scales 16-bit [.., rows, groups]."""
        w, sizes = split_groups(latent.float(), self.group_size)
        magnitude = w.abs()
        mean = magnitude.sum(-1, keepdim=True) / sizes
        codes = w.sign() * (magnitude > self.threshold * mean)
        nonzero = magnitude.amax(-1) > 0
        codes = join_groups(codes.to(torch.int8), latent.shape)
        return Stored(codes, round_scales(mean[..., 0], nonzero, self.scale))

    def spec(self) -> dict:
        return {"kind": "ternary"} | asdict(self)


@dataclass(frozen=True)
class Int(GroupFormat):
    """Symmetric integers of 2 to 8 bits: scale = max|w| / (2^(bits-1) - 1), code = round(w / scale)."""

    bits: int = 8
    group_size: int = 128
    scale: str = "bf16"

    def __post_init__(self):
        if not 2 <= self.bits <= 8 or self.scale not in SCALE_DTYPES or self.group_size < 0:
            raise ConfigError(f"{self}: 2 to 8 bits, scale bf16 or fp16 and group_size >= 0 are needed")

    def quantize(self, latent: Tensor) -> Stored:
        """Shapes as in Ternary. Codes are rounded against the stored scale: the one that they will be multiplied by."""
        w, _ = split_groups(latent.float(), self.group_size)
        limit = 2 ** (self.bits - 1) - 1
        biggest = w.abs().amax(-1)
        scales = round_scales(biggest / limit, biggest > 0, self.scale)
        divisor = torch.where(scales > 0, scales.float(), 1.0)[..., None]
        codes = (w / divisor).round().clamp(-limit, limit).to(torch.int8)
        return Stored(join_groups(codes, latent.shape), scales)

    def spec(self) -> dict:
        return {"kind": "int"} | asdict(self)


@dataclass(frozen=True)
class Float:
    """Sixteen-bit floats; the codes are the values."""

    dtype: str = "bf16"

    def quantize(self, latent: Tensor) -> Stored:
        return Stored(latent.to(SCALE_DTYPES[self.dtype][0]), None)

    def dequantize(self, stored: Stored) -> Tensor:
        return stored.codes.bfloat16()

    def spec(self) -> dict:
        return {"kind": self.dtype}


Format = Ternary | Int | Float


def make_format(config: Config, name: str) -> Format:
    """The format that the setting `name` (matrix_format, embed_format or vector_format) asks for."""
    value = getattr(config, name)
    if value in SCALE_DTYPES:
        return Float(value)
    if config.scale_dtype not in SCALE_DTYPES:
        raise ConfigError(f"scale_dtype={config.scale_dtype!r}: must be bf16 or fp16")
    if name != "vector_format" and value == "ternary":
        return Ternary(config.group_size, "absmean", config.threshold, config.scale_dtype)
    if name != "vector_format" and value.startswith("int") and value[3:] in list("2345678"):
        return Int(int(value[3:]), config.group_size, config.scale_dtype)
    choices = "bf16 or fp16" if name == "vector_format" else "ternary, int2..int8, bf16 or fp16"
    raise ConfigError(f"{name}={value!r}: must be {choices}")


def format_of(config: Config, name: str, ndim: int) -> Format:
    """The one storage format of the parameter called name."""
    if name == "tok_emb.weight":
        return make_format(config, "embed_format")
    return make_format(config, "matrix_format" if name.endswith(".weight") and ndim == 2 else "vector_format")


def to_pack(stored: Stored, fmt: Format) -> pack.StoredTensor:
    """A tensor as pack.py writes it: 16-bit floats become their bit patterns."""
    def bits(x: Tensor) -> np.ndarray:
        x = x.detach().cpu().contiguous()
        return x.numpy() if x.dtype == torch.int8 else x.view(torch.uint16).numpy()

    scales = None if stored.scales is None else bits(stored.scales).reshape(-1, stored.scales.shape[-1])
    return pack.StoredTensor(tuple(stored.codes.shape), fmt.spec(), bits(stored.codes), scales)


def from_pack(tensor: pack.StoredTensor) -> tuple[Stored, Format]:
    """The inverse of to_pack. Raises ConfigError on a format that this trainer does not know."""
    spec = dict(tensor.format)
    kind = spec.pop("kind")
    try:
        fmt = Ternary(**spec) if kind == "ternary" else Int(**spec) if kind == "int" else Float(kind, **spec)
        if isinstance(fmt, Float) and kind not in SCALE_DTYPES:
            raise TypeError(f"unknown kind {kind!r}")
    except TypeError as e:
        raise ConfigError(f"storage format {tensor.format}: {e}") from None

    def values(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array.copy()).view(dtype)

    if isinstance(fmt, Float):
        return Stored(values(tensor.codes, SCALE_DTYPES[kind][0]), None), fmt
    return Stored(torch.from_numpy(tensor.codes.copy()), values(tensor.scales, SCALE_DTYPES[fmt.scale][0])), fmt


# ---------------------------------------------------------------------------------------------------------------
# Model: a plain dense GPT, PR 367's architecture
# ---------------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [batch, heads, time, head_dim], halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        self.c_q = nn.Linear(c.model_dim, c.model_dim, bias=False)
        self.c_k = nn.Linear(c.model_dim, c.num_kv_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(c.model_dim, c.num_kv_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(c.model_dim, c.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        # One product over the three matrices, which stay three for Muon; joining them copies weights, not activations.
        qkv = F.linear(norm(x), torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight)))
        qkv = qkv.view(batch, time, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q = rotate(norm(q), cos, sin) * self.q_gain[:, None, None]
        k = rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.proj(norm(y.transpose(1, 2).reshape(batch, time, -1)))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.fc = nn.Linear(c.model_dim, c.hidden_dim, bias=False)
        self.proj = nn.Linear(c.hidden_dim, c.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(norm(self.fc(norm(x)).relu().square()))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(c.model_dim), torch.zeros(c.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attn(x, cos, sin)
        return x + self.mlp_scale * self.mlp(x)


class GPT(nn.Module):
    """Token ids [batch, time] -> hidden states -> logits. Born with fp32 initial latents; Latents makes it bf16."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(config.num_layers // 2, config.model_dim))
        nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final normalised hidden states [batch, time, model_dim] of token ids [batch, time]."""
        dtype, half = self.tok_emb.weight.dtype, self.config.model_dim // self.config.num_heads // 2
        frequency = self.config.rope_base ** -(torch.arange(half, device=ids.device, dtype=torch.float32) / half)
        angle = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * frequency
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        # The table in fp32: its gradient sums thousands of rows per frequent token, which bf16 would lose.
        x = x0 = norm(F.embedding(ids, self.tok_emb.weight.float())).to(dtype)
        half_way, skips = self.config.num_layers // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half_way and skips:
                x = x + self.skip_weights[i - half_way] * skips.pop()
            x = block(x, x0, cos, sin)
            if i < half_way:
                skips.append(x)
        return norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Softcapped logits, fp32 [.., vocab_size], of hidden states [.., model_dim]."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, self.tok_emb.weight).float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        return F.cross_entropy(self.head(self.hidden(ids)).flatten(0, 1), targets.flatten())


# What a model is rebuilt from, and so what an artifact's configuration holds; the rest of a run is in its log.
MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "mlp_hidden",
                  "rope_base", "logit_softcap", "train_seq_len")


def model_from_stored(tensors: dict[str, pack.StoredTensor], meta: dict) -> GPT:
    """The model of an artifact. Raises ConfigError unless its tensors are exactly those of its configuration."""
    try:
        settings = {name: meta["config"][name] for name in MODEL_SETTINGS}
        config = Config(**settings, train_batch_tokens=settings["train_seq_len"], eval_stride=0)
    except (KeyError, TypeError) as e:
        raise ConfigError(f"the artifact's configuration is not one of this trainer: {e!r}") from None
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


@dataclass
class Bank:
    """Same-shape parameters of one format, stacked so that each optimizer operation is one call for all of them."""

    names: list[str]
    params: list[nn.Parameter]
    format: Format
    optimizer: str  # "muon", "embed" or "scalar"
    latent: Tensor  # fp32 [n, *shape]
    grad: Tensor  # fp32 [n, *shape], a view of Latents.flat_grad
    stored: Stored


class Latents:
    """Owner of every parameter's latent; `refresh` is the only place that writes the model's params."""

    def __init__(self, model: GPT, config: Config):
        members: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
        for name, p in model.named_parameters():
            muon = name.startswith("blocks.") and name.endswith(".weight")
            kind = "muon" if muon else "embed" if name == "tok_emb.weight" else "scalar"
            members.setdefault((kind, tuple(p.shape)), []).append((name, p))
        sizes = [sum(p.numel() for _, p in group) for group in members.values()]
        device = next(model.parameters()).device
        self.flat_grad = torch.zeros(sum(sizes) + 1, device=device)  # all gradients and, last, the loss
        self.banks: list[Bank] = []
        for (kind, shape), group, grad in zip(members, members.values(), self.flat_grad[:-1].split(sizes), strict=True):
            names, params = [n for n, _ in group], [p for _, p in group]
            fmt = format_of(config, names[0], len(shape))
            latent = torch.stack([p.detach() for p in params]).float()
            grad = grad.view(latent.shape)
            self.banks.append(Bank(names, params, fmt, kind, latent, grad, fmt.quantize(latent)))
            for p in params:
                p.data = torch.empty_like(p, dtype=torch.bfloat16)
        self.refresh()
        covered = sorted(n for b in self.banks for n in b.names)
        assert covered == sorted(n for n, _ in model.named_parameters()), "a parameter has no format, or two"

    @torch.no_grad()
    def refresh(self, measure: bool = False) -> tuple[float, float]:
        """params <- dequantize(quantize(latent)), eager: a compiler may drop a rounding (pytorch issue 185337).

        Returns (zero_frac, churn) of the ternary codes, or NaN unless measure. churn: share changed by this refresh.
        """
        zeros = changed = total = 0
        for bank in self.banks:
            stored = bank.format.quantize(bank.latent)
            if measure and isinstance(bank.format, Ternary):
                zeros += int((stored.codes == 0).sum())
                changed += int((stored.codes != bank.stored.codes).sum())
                total += stored.codes.numel()
            bank.stored = stored
            torch._foreach_copy_([p.data for p in bank.params], list(bank.format.dequantize(stored).unbind()))
        return (zeros / total, changed / total) if total else (math.nan, math.nan)

    @torch.no_grad()
    def accumulate(self, loss: Tensor, micro_batches: int) -> None:
        """Add the params' bf16 gradients and the loss, over micro_batches, to the fp32 sums; clear the gradients."""
        for bank in self.banks:
            grads = [p.grad.float() for p in bank.params]
            torch._foreach_add_(list(bank.grad.unbind()), grads, alpha=1 / micro_batches)
            for p in bank.params:
                p.grad = None
        self.flat_grad[-1] += loss.detach() / micro_batches

    def named(self) -> Iterator[tuple[str, Format, Tensor, Stored]]:
        """(name, format, latent, stored) of each parameter."""
        for bank in self.banks:
            scales = bank.stored.scales if bank.stored.scales is not None else [None] * len(bank.names)
            for row in zip(bank.names, bank.latent, bank.stored.codes, scales, strict=True):
                yield row[0], bank.format, row[1], Stored(row[2], row[3])

    def first_non_finite(self, order: list[str]) -> str | None:
        """The first latent, else the first gradient, in the model's order, that is not finite; None if all are."""
        if bool(torch.isfinite(self.flat_grad.sum())) and all(bool(torch.isfinite(b.latent.sum())) for b in self.banks):
            return None
        for what, attribute in (("weights", "latent"), ("gradient", "grad")):
            tensors = {n: x for b in self.banks for n, x in zip(b.names, getattr(b, attribute), strict=True)}
            for name in order:
                if not bool(torch.isfinite(tensors[name]).all()):
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
    """Muon for the block matrices, AdamW for the embedding and the vectors, on fp32 latents and fp32 state."""

    def __init__(self, latents: Latents, config: Config):
        self.config, self.latents = config, latents
        self.muon = [b for b in latents.banks if b.optimizer == "muon"]
        self.momentum = [torch.zeros_like(b.latent) for b in self.muon]
        self.adam_banks = [b for b in latents.banks if b.optimizer != "muon"]
        lrs = {"embed": config.tied_embed_lr, "scalar": config.scalar_lr}
        groups = [{"params": [b.latent], "lr": lrs[b.optimizer], "base_lr": lrs[b.optimizer]} for b in self.adam_banks]
        for b in self.adam_banks:
            b.latent.grad = b.grad
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, weight_decay=0.0, fused=True)
        held = [n for b in (*self.muon, *self.adam_banks) for n in b.names]
        assert len(held) == len(set(held)) == sum(len(b.names) for b in latents.banks), "not one group per parameter"

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> None:
        """One update of the latents from the accumulated gradients, which are cleared; params are not refreshed."""
        flat = self.latents.flat_grad[:-1]
        if self.config.grad_clip_norm > 0:
            flat *= (self.config.grad_clip_norm / (flat.norm() + 1e-6)).clamp(max=1.0)
        lr = self.config.matrix_lr * lr_scale
        for bank, buffer in zip(self.muon, self.momentum, strict=True):
            buffer.mul_(momentum).add_(bank.grad)
            update = newton_schulz(bank.grad.add(buffer, alpha=momentum), self.config.muon_backend_steps)
            rows, cols = update.shape[-2:]
            bank.latent.mul_(1 - lr * self.config.muon_wd)
            bank.latent.add_(update.float(), alpha=-lr * max(1, rows / cols) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        self.latents.flat_grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """By name: latent/*, momentum/*, exp_avg/*, exp_avg_sq/*, adam_step/*; and codes/* and scales/*, carried so
        that what a file must hold is never derived again on another machine."""
        out = {}
        for name, _, latent, stored in self.latents.named():
            out |= {f"latent/{name}": latent, f"codes/{name}": stored.codes}
            out |= {f"scales/{name}": stored.scales} if stored.scales is not None else {}
        for bank, buffer in zip(self.muon, self.momentum, strict=True):
            out |= {f"momentum/{n}": x for n, x in zip(bank.names, buffer, strict=True)}
        for bank in self.adam_banks:
            moments = self.adam.state[bank.latent] or {
                "exp_avg": torch.zeros_like(bank.latent), "exp_avg_sq": torch.zeros_like(bank.latent),
                "step": torch.zeros((), device=bank.latent.device),
            }
            for key in ("exp_avg", "exp_avg_sq"):
                out |= {f"{key}/{n}": x for n, x in zip(bank.names, moments[key], strict=True)}
            out[f"adam_step/{bank.names[0]}"] = moments["step"]
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what state() gave, and refresh the params. Raises KeyError or ValueError on a wrong state."""
        expected = self.state()
        if wrong := sorted(expected.keys() ^ state.keys()):
            raise ValueError(f"tensor {wrong[0]} is missing or not known")
        for name, x in expected.items():
            if x.shape != state[name].shape or x.dtype != state[name].dtype:
                raise ValueError(f"tensor {name} is {state[name].dtype} {tuple(state[name].shape)}, not {x.dtype} "
                                 f"{tuple(x.shape)}")
        for bank in self.latents.banks:
            bank.latent.copy_(torch.stack([state[f"latent/{n}"] for n in bank.names]))
        for bank, buffer in zip(self.muon, self.momentum, strict=True):
            buffer.copy_(torch.stack([state[f"momentum/{n}"] for n in bank.names]))
        for bank in self.adam_banks:
            step = state[f"adam_step/{bank.names[0]}"]
            moments = {k: torch.stack([state[f"{k}/{n}"] for n in bank.names]) for k in ("exp_avg", "exp_avg_sq")}
            device = bank.latent.device
            self.adam.state[bank.latent] = {k: v.to(device).clone() for k, v in (moments | {"step": step}).items()}
        self.latents.refresh()


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


def sequence_lengths(config: Config) -> list[int]:
    """The lengths that a run goes through: doublings from seq_ramp_start to train_seq_len."""
    start = config.seq_ramp_start or config.train_seq_len
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
    batch = int(small + ramp(c.batch_ramp_frac) * (batch - small)) if small else batch
    return StepPlan(min(warmup, warmdown, 1.0), momentum, seq_len, batch)


def micro_batch_tokens(config: Config, world: int) -> int:
    """Tokens per forward and rank. Raises ConfigError where the batch does not divide into such pieces."""
    c, share = config, config.train_batch_tokens // world
    tokens = min(c.micro_batch_tokens, share)
    if tokens % c.train_seq_len or c.train_batch_tokens % (world * tokens):
        raise ConfigError(
            f"train_batch_tokens={c.train_batch_tokens} over {world} process(es) does not divide into micro-batches of "
            f"{tokens} tokens made of whole sequences of {c.train_seq_len}; change micro_batch_tokens or the batch"
        )
    if c.batch_ramp_start % (world * tokens) or c.batch_ramp_start > c.train_batch_tokens:
        raise ConfigError(f"batch_ramp_start={c.batch_ramp_start}: must be a multiple of the {world * tokens} tokens "
                          "of one micro-batch on every process, and at most train_batch_tokens")
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


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """One safetensors file with the JSON state in its metadata, replaced atomically."""
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    pack.write_atomic(path, safetensors.torch.save(tensors, {"state": json.dumps(state, sort_keys=True)}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint file, or of the one in a run's folder. Raises CheckpointError."""
    path = Path(path)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    try:
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
# What one sees
# ---------------------------------------------------------------------------------------------------------------

METRICS_SCHEMA = 1


class Log:
    """Rank 0's output: the terminal, log.txt (the field's grammar) and metrics.jsonl (typed records)."""

    def __init__(self, folder: Path, rank: int, append: bool):
        self.quiet, self.bar_width = rank != 0, 0
        if not self.quiet:
            folder.mkdir(parents=True, exist_ok=True)
            mode = "a" if append else "w"
            self.text, self.metrics = open(folder / "log.txt", mode), open(folder / "metrics.jsonl", mode)

    def line(self, text: str, console: bool = True) -> None:
        if self.quiet:
            return
        if console:
            self.clear_bar()
            print(text, flush=True)
        print(text, file=self.text, flush=True)

    def record(self, kind: str, **values) -> None:
        if not self.quiet:
            print(json.dumps({"type": kind} | values, sort_keys=True), file=self.metrics, flush=True)

    def bar(self, text: str) -> None:
        """A line that the next one overwrites; only on a terminal."""
        if not self.quiet and sys.stdout.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]
            print("\r" + text.ljust(self.bar_width), end="", flush=True)
            self.bar_width = len(text)

    def clear_bar(self) -> None:
        if self.bar_width:
            print("\r" + " " * self.bar_width + "\r", end="")
            self.bar_width = 0

    def close(self) -> None:
        if not self.quiet:
            self.clear_bar()
            self.text.close()
            self.metrics.close()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def source_hashes() -> dict[str, str]:
    """sha256 of each of the program's own files."""
    return {p.name: sha256_file(p) for p in pack.code_files()}


def machine() -> dict:
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}", "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), "gpu": gpu,
    }


def expected_bits(spec: dict) -> float:
    """Bits per code that a trained tensor of this format packs to: measured on CPU-track artifacts (LOG.md).

    Ternary: base 3. Integers: max|w| scales leave the outer codes rare; an int4 embedding packed to 2.8 to 2.9 bits.
    """
    return {"ternary": 8 / 5, "int": max(spec.get("bits", 0) - 1.1, 1.0)}.get(spec["kind"], 16.0)


def predicted_bytes(latents: Latents) -> dict[str, tuple[int, int]]:
    """Storage format -> (parameters, predicted bytes of its codes and scales); the header, under 1 kB, is not in it."""
    sizes: dict[str, tuple[int, int]] = {}
    for bank in latents.banks:
        spec, codes, scales = bank.format.spec(), bank.stored.codes, bank.stored.scales
        name = spec["kind"] + str(spec.get("bits", ""))
        name += f" groups of {spec['group_size']}, {spec['scale']} scales" if scales is not None else ""
        size = math.ceil(codes.numel() * expected_bits(spec) / 8) + (2 * scales.numel() if scales is not None else 0)
        have = sizes.get(name, (0, 0))
        sizes[name] = (have[0] + codes.numel(), have[1] + size)
    return sizes


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says what happened, at which step, and what is left."""


class Interrupted(Exception):
    """SIGINT or SIGTERM: the step was finished and a checkpoint written."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


RUN_STATE = ("step", "elapsed", "step_seconds", "tokens_seen", "finished")  # a Trainer's, kept in its checkpoints


class Trainer:
    """One run on one rank: set up, warm up, train, pack, score."""

    def __init__(self, preset: str, config: Config, rank: int, world: int, local_rank: int):
        self.preset, self.config, self.rank, self.world = preset, config, rank, world
        cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ConfigError("device='cuda': this machine has no CUDA device; use --device cpu")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        self.seconds: dict[str, float] = {}  # phase -> seconds
        self.signal, self.signalled = 0, 0.0  # number of the last signal, and when it came
        self.log: Log | None = None
        self.step, self.elapsed, self.step_seconds, self.tokens_seen, self.finished = 0, 0.0, 0.0, 0, False
        self.folder, self.shown = Path(config.out_dir) / config.run_id, ""
        self.source_changed = False  # since the checkpoint that this run resumes

    # -- set up ---------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Open the data, build model and optimizer, resume if asked to, and print the preflight block."""
        began, c = time.perf_counter(), self.config
        self.micro_tokens = micro_batch_tokens(c, self.world)
        self.checkpoint_path = self.folder / "checkpoint.safetensors"
        loaded = load_checkpoint(self.checkpoint_path) if self.checkpoint_path.exists() else None
        if loaded and c.resume == "never" and not loaded[1].get("finished"):
            raise CheckpointError(
                f"{self.folder} holds an unfinished run (step {loaded[1].get('step')}): continue with --resume auto, "
                "or start anew under another --run-id, or delete the folder"
            )
        loaded = loaded if c.resume == "auto" else None
        self.data = open_data(c.data_path, c.tokenizer_path)
        self.counter = ByteCounter(self.data.tokenizer)
        if self.counter.vocab_size != c.vocab_size:
            raise ConfigError(f"vocab_size={c.vocab_size}: the tokenizer {self.data.tokenizer} has "
                              f"{self.counter.vocab_size}")
        val = {p.name: read_shard(p) for p in self.data.val}
        if self.rank == 0:
            audit_bytes(val, self.counter)  # before anything is scored, and again in the scoring process
        self.val_tokens = np.concatenate(list(val.values()))
        self.loader = TokenLoader(self.data.train, c.vocab_size)
        torch.manual_seed(c.seed)
        self.model = GPT(c).to(self.device)
        self.order = [name for name, _ in self.model.named_parameters()]
        self.latents = Latents(self.model, c)
        self.optimizer = Optimizer(self.latents, c)
        self.compiled: Callable[[Tensor, Tensor], Tensor] = self.model
        self.log = Log(self.folder, self.rank, append=loaded is not None)
        if loaded:
            self.restore(*loaded)
        if self.world > 1:  # every rank has looked for its checkpoint, and all found the same
            steps = torch.tensor([self.step, -self.step], device=self.device)
            dist.all_reduce(steps, op=dist.ReduceOp.MAX)
            if int(steps.sum()):
                raise CheckpointError(f"{self.checkpoint_path}: the ranks do not see the same checkpoint; share the "
                                      "folder between the machines")
        if self.rank == 0 and not loaded:  # what an earlier run left under this name must not look like this one's
            for name in ("checkpoint.safetensors", "model.tern", "score.json"):
                (self.folder / name).unlink(missing_ok=True)
        self.seconds["load"] = time.perf_counter() - began

    def preflight(self, origin: dict[str, str], notices: list[str]) -> None:
        c, log = self.config, self.log
        sizes = predicted_bytes(self.latents)
        parameters, total = (sum(column) for column in zip(*sizes.values(), strict=True))
        code = sum(p.stat().st_size for p in pack.code_files())
        counted = total + (code if c.cap_counts_code else 0)
        why = "asked for" if c.device != "auto" else "no CUDA device found" if self.device.type == "cpu" else "found"
        accum = c.train_batch_tokens // (self.world * self.micro_tokens)
        if not self.step or self.source_changed:  # a log reproduces its run
            for path in pack.code_files():
                log.line(f"{'=' * 40} {path.name}\n{path.read_text()}", console=False)
        log.record("header", schema=METRICS_SCHEMA, preset=self.preset, argv=sys.argv[1:], settings=asdict(c),
                   origin=origin, machine=machine(), world_size=self.world, source_sha256=source_hashes(),
                   source=folder_identity(source_hashes()), data_sha256=self.data.hashes, data=self.data.identity,
                   parameters=parameters, resumed_at=self.step)
        log.line(f"{'=' * 20} {c.run_id} (preset {self.preset}) {'=' * 20}")
        log.line(f"machine     {json.dumps(machine(), sort_keys=True)}", console=False)
        settings = [f"{n}={v}" + (f" ({origin[n]})" if n in origin else "") for n, v in asdict(c).items()]
        log.line(textwrap.fill(", ".join(settings), 118, initial_indent="settings    ", subsequent_indent=" " * 12,
                               break_on_hyphens=False))
        for notice in notices:
            log.line(f"notice      {notice}")
        log.line(f"device      {self.device} ({why}) x {self.world} process(es), {torch.get_num_threads()} thread(s) "
                 "each")
        log.line("dtype       bf16 params and activations (a param is what the file holds); fp32 latents, gradient "
                 "sums, optimizer state and losses (bf16 would lose small updates)")
        log.line(f"data        {c.data_path}: {int(self.loader.ends[-1]):,} training tokens, {self.val_tokens.size:,} "
                 f"validation tokens, identity {self.data.identity[:16]}")
        log.line(f"model       {c.num_layers} layers x {c.model_dim}, {c.num_heads} heads, {c.num_kv_heads} kv, "
                 f"mlp {c.hidden_dim}, vocab {c.vocab_size}: {parameters:,} parameters")
        for name, (count, size) in sizes.items():
            log.line(f"              {name}: {count:,} parameters, {size:,} bytes")
        log.line(f"bytes       {total:,} predicted for the model, {code:,} of code"
                 f"{'' if c.cap_counts_code else ' (not counted)'}; cap {c.cap_bytes:,}: "
                 f"{'fits, margin' if counted <= c.cap_bytes else 'OVER by'} {abs(c.cap_bytes - counted):,}")
        log.line(f"step        {c.train_batch_tokens:,} tokens = {self.world} process(es) x {accum} micro-batch(es) x "
                 f"{self.micro_tokens // c.train_seq_len} sequences of {c.train_seq_len}")
        if self.step:
            log.line(f"resume      at step {self.step}, {self.elapsed:.1f} s of training done"
                     + ("; the program was changed since" if self.source_changed else ""))
        self.phase("load")

    def phase(self, name: str, note: str = "") -> None:
        self.log.line(f"[{name}] {self.seconds[name]:.1f} s{note}")
        self.log.record("phase", name=name, seconds=self.seconds[name])

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint on rank 0; every rank checks first that there is something worth keeping."""
        if bad := self.latents.first_non_finite(self.order):
            raise TrainingError(f"step {self.step}: {bad} is not finite; the last good checkpoint is kept")
        if self.rank == 0:
            rng = {"rng/cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                rng["rng/cuda"] = torch.cuda.get_rng_state(self.device)
            state = {name: getattr(self, name) for name in RUN_STATE} | {
                "schema": METRICS_SCHEMA, "position": self.loader.position, "config": asdict(self.config),
                "data": self.data.identity, "source": folder_identity(source_hashes()),
            }
            save_checkpoint(self.checkpoint_path, self.optimizer.state() | rng, state)

    def restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        mine, theirs = asdict(self.config), state.get("config", {})
        differ = [n for n in mine if n not in FREE_SETTINGS and mine[n] != theirs.get(n)]
        if differ:
            raise CheckpointError(
                f"{self.checkpoint_path}: made with other settings: "
                + ", ".join(f"{n}={theirs.get(n)} (now {mine[n]})" for n in differ)
                + "; resume with the same ones or use another --run-id"
            )
        if state.get("data") != self.data.identity:
            raise CheckpointError(f"{self.checkpoint_path}: made from other data than {self.config.data_path}")
        self.source_changed = state.get("source") != folder_identity(source_hashes())
        rng = {n: tensors.pop(n) for n in list(tensors) if n.startswith("rng/")}
        try:
            self.optimizer.load_state(tensors)
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
        """Accumulate gradients and loss of one step in latents.flat_grad; over ranks, their mean."""
        for micro in range(micro_batches):
            rows = self.micro_tokens // seq_len
            ids, targets = self.loader.batch(rows, seq_len, micro, self.rank, self.world)
            loss = self.compiled(ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
            loss.backward()
            self.latents.accumulate(loss, micro_batches * self.world)
        if self.world > 1:
            dist.all_reduce(self.latents.flat_grad)

    def warm_up(self) -> None:
        """Compile and prime every shape of the run. Nothing is updated, so there is nothing to undo."""
        began, c, last = time.perf_counter(), self.config, 0.0
        if c.compile and self.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            self.log.line("notice      no C++ compiler found, so torch.compile is off; training will be slower")
        elif c.compile:
            torch._dynamo.config.recompile_limit = max(8, len(sequence_lengths(c)) + 1)  # one graph per length
            self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        for seq_len in sequence_lengths(c):
            for _ in range(c.warmup_steps):
                start = time.perf_counter()
                self.forward_backward(seq_len, 1)
                self.latents.flat_grad.zero_()
                self.synchronize()
                last = time.perf_counter() - start
        self.seconds["compile"] = time.perf_counter() - began
        expect = f"{c.iterations:,}"
        if c.max_wallclock_seconds and last:
            full = last * c.train_batch_tokens / (self.world * self.micro_tokens)
            expect = f"about {min(c.max_wallclock_seconds / full, c.iterations or math.inf):,.0f}"
        self.phase("compile", f", {expect} steps expected")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def control(self, progress: float, stop: bool) -> tuple[float, bool, int]:
        """Rank 0's word on progress, stopping and signals, the same on every rank."""
        if self.world == 1:
            return progress, stop, self.signal
        word = torch.tensor([progress, stop, self.signal], dtype=torch.float64, device=self.device)
        dist.broadcast(word, src=0)
        progress, stop, signum = word.tolist()
        return progress, bool(stop), int(signum)

    def train(self) -> None:
        """Train to the wallclock cap or the number of iterations, whichever comes first."""
        c, log, cap = self.config, self.log, self.config.max_wallclock_seconds
        self.synchronize()
        began, first = time.perf_counter() - self.elapsed, self.step
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
                if self.world > 1:
                    dist.barrier()  # a rank that leaves early would have the others killed, rank 0 while it writes
                raise Interrupted(signum, f"stopped by signal {signum} after step {self.step}, checkpoint in "
                                  f"{self.checkpoint_path}: the same command with --resume auto continues")
            plan = schedule(c, self.step, progress)
            micro_batches = self.micro_batches(plan)
            self.forward_backward(plan.seq_len, micro_batches)
            loss = float(self.latents.flat_grad[-1])  # waits for the device, so the clock below is true
            if not math.isfinite(loss) or not bool(torch.isfinite(self.latents.flat_grad.sum())):
                raise self.diverged(loss, plan.seq_len)
            self.optimizer.step(plan.lr_scale, plan.momentum)
            self.step += 1
            logged = c.train_log_every > 0 and (self.step <= 10 or self.step % c.train_log_every == 0)
            zero_frac, churn = self.latents.refresh(measure=logged)
            tokens = micro_batches * self.world * self.micro_tokens
            self.loader.position += tokens
            self.tokens_seen += tokens
            now = time.perf_counter() - began
            self.step_seconds, self.elapsed = now - self.elapsed, now
            self.report_step(plan, loss, tokens, zero_frac, churn, logged, now / max(self.step - first, 1), progress)
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
        self.check_replicas()
        self.save()
        self.phase("train", f", {self.step:,} steps, {self.tokens_seen:,} tokens")

    def report_step(self, plan: StepPlan, loss: float, tokens: int, zero_frac: float, churn: float, logged: bool,
                    average: float, progress: float) -> None:
        """The log line, the record and the bar of the step that just ended."""
        c, now, rate = self.config, self.elapsed, tokens / self.step_seconds
        left = min(c.max_wallclock_seconds - now if c.max_wallclock_seconds else math.inf,
                   (c.iterations - self.step) * average if c.iterations else math.inf)
        if logged:
            self.log.line(
                f"step:{self.step}/{c.iterations} train_loss:{loss:.4f} train_time:{1000 * now:.0f}ms "
                f"step_avg:{1000 * now / self.step:.2f}ms tok/s:{rate:.0f} zero_frac:{zero_frac:.4f} "
                f"churn:{churn:.5f} lr_scale:{plan.lr_scale:.3f} left:{clock(left)}", console=not sys.stdout.isatty())
            self.log.record(
                "train", step=self.step, loss=loss, elapsed=now, step_seconds=self.step_seconds, tokens=tokens,
                tokens_seen=self.tokens_seen, zero_frac=None if math.isnan(zero_frac) else zero_frac,
                churn=None if math.isnan(churn) else churn, lr_scale=plan.lr_scale, momentum=plan.momentum,
                seq_len=plan.seq_len)
            self.shown = f"zero_frac {zero_frac:.3f}  churn {churn:.4f}"
        self.log.bar(f"[{'#' * int(24 * progress):<24}] step {self.step}  loss {loss:.4f}  "
                     f"{1000 * self.step_seconds:.0f} ms/step  {rate:,.0f} tok/s  {self.shown}  {clock(left)} left")

    @torch.no_grad()
    def diverged(self, loss: float, seq_len: int) -> TrainingError:
        """The error of a step whose loss or gradient is not finite: it names the first bad tensor, and what is left."""
        bad: list[str] = []

        def look(name: str) -> Callable:
            return lambda _module, _inputs, output: None if torch.isfinite(output).all() else bad.append(
                f"the output of {name or 'the model'}")

        hooks = [m.register_forward_hook(look(n)) for n, m in self.model.named_modules()]
        weights = self.latents.first_non_finite(self.order) or ""
        if "weights" not in weights:  # gradients are all bad after a bad activation: look for that first, eagerly
            ids, targets = self.loader.batch(1, seq_len, 0, self.rank, self.world)
            self.model(ids.to(self.device), targets.to(self.device))
        for hook in hooks:
            hook.remove()
        first = (bad or [weights or "the sum of the gradients"])[0]
        kept = f"the last good checkpoint is {self.checkpoint_path}" if self.checkpoint_path.exists() else (
            "no checkpoint was written yet")
        return TrainingError(f"step {self.step + 1}: {first} is not finite (loss {loss}); {kept}; lower the learning "
                             "rates or check the data")

    def check_replicas(self) -> None:
        """Every rank must hold the same bits: compare sha256 of latents and codes."""
        digest = hashlib.sha256()
        for _, _, latent, stored in self.latents.named():
            for x in (latent, stored.codes):
                digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.replica_sha256 = digest.hexdigest()
        if self.world == 1:
            return
        mine = torch.tensor(list(digest.digest()), dtype=torch.int64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        differ = [r for r, other in enumerate(every) if not torch.equal(other, every[0])]
        if differ:
            raise TrainingError(f"replicas differ: ranks {differ} do not hold the same bits as rank 0")
        self.log.line(f"replicas    {self.world} ranks hold identical latents and codes ({self.replica_sha256[:16]})")

    def validate(self, batch_seqs: int):
        """Chunked score of the model in memory."""
        c = self.config
        return evaluate(self.model, self.val_tokens, self.counter, c.train_seq_len, c.train_seq_len, batch_seqs)

    # -- pack and score -------------------------------------------------------------------------------------------

    def finish(self) -> bool:
        """Score in memory, pack, score the file in a fresh process, print the final block. True if all holds."""
        c, log, artifact = self.config, self.log, self.folder / "model.tern"
        began = time.perf_counter()
        memory = self.validate(c.eval_batch_seqs)
        if dist.is_initialized():  # the others have nothing left to do; the scoring processes form their own group
            dist.destroy_process_group()
        if self.rank:
            return True
        memory_seconds = time.perf_counter() - began

        began = time.perf_counter()
        meta = {"config": {name: getattr(c, name) for name in MODEL_SETTINGS}}
        pack.write_artifact(artifact, self.latents.pack(self.order), meta)
        self.seconds["pack"] = time.perf_counter() - began
        size = pack.budget(artifact, pack.code_files(), c.cap_bytes, c.cap_counts_code)
        log.line(f"Ternary artifact: {size.bytes_model} bytes = {size.bytes_model / 1e6:.2f}MB")
        log.line(f"Code size: {size.bytes_code} bytes")
        log.line(f"Total submission size: {size.bytes_model + size.bytes_code} bytes")
        self.phase("pack")

        began = time.perf_counter()
        same = self.same_logits(artifact)
        scored = self.score_in_fresh_process(artifact)
        self.seconds["score"] = memory_seconds + time.perf_counter() - began
        self.phase("score")
        chunked, sliding = scored["chunked"], scored["sliding"]
        gap = chunked["val_bpb"] - memory.val_bpb
        for name, s, extra in (("final_ternary_roundtrip", chunked, ""),
                               ("final_sliding_window", sliding, f" stride:{c.eval_stride}")):
            if s:
                log.line(f"{name} val_loss:{s['val_loss']:.4f} val_bpb:{s['val_bpb']:.4f}{extra} "
                         f"eval_time:{1000 * s['seconds']:.0f}ms")
                log.line(f"{name}_exact val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}")
        parts = " + ".join(f"{n} {self.seconds[n]:.1f}" for n in ("load", "compile", "train", "pack", "score"))
        log.line(f"{'=' * 20} result {'=' * 20}")
        log.line(f"val_bpb before packing    {memory.val_bpb:.8f}   (in memory, chunked)")
        log.line(f"val_bpb from the file     {chunked['val_bpb']:.8f}   (fresh process, chunked)")
        verdict = "identical bit for bit" if same else "DIFFER"
        log.line(f"roundtrip gap             {gap + 0.0:.8f}   (logits {verdict})")
        if sliding:
            log.line(f"sliding val_bpb           {sliding['val_bpb']:.8f}   (stride {c.eval_stride}, window "
                     f"{c.train_seq_len}, {sliding['tokens']:,} tokens, {sliding['bytes']:,} bytes)")
        log.line(f"bytes                     model {size.bytes_model:,} + code {size.bytes_code:,}"
                 f"{'' if c.cap_counts_code else ' (not counted)'} -> total {size.total:,} of {c.cap_bytes:,}: "
                 f"{'FITS' if size.fits else 'OVER'}, margin {size.margin:,}")
        log.line(f"seconds                   {parts} = {sum(self.seconds.values()):.1f}")
        log.line(f"artifact                  {artifact}  sha256 {sha256_file(artifact)[:16]}")
        log.record("final", step=self.step, tokens_seen=self.tokens_seen, memory=asdict(memory), score=scored,
                   roundtrip_gap=gap, logits_identical=same, seconds=self.seconds, bytes_model=size.bytes_model,
                   bytes_code=size.bytes_code, bytes_total=size.total, cap=c.cap_bytes, fits=size.fits,
                   artifact_sha256=sha256_file(artifact), replica_sha256=self.replica_sha256)
        return same and gap == 0.0

    @torch.inference_mode()
    def same_logits(self, artifact: Path) -> bool:
        """Whether the model in memory and the one loaded from the file give the same bits on a validation batch."""
        ids = torch.from_numpy(self.val_tokens[: 4 * self.config.train_seq_len].astype(np.int64))
        ids = ids[: len(ids) // 4 * 4].view(4, -1) if len(ids) >= 4 else ids[None]
        loaded = load_artifact(artifact, self.device)
        a, b = (m.head(m.hidden(ids.to(self.device))) for m in (self.model, loaded))
        return torch.equal(a, b)

    def score_in_fresh_process(self, artifact: Path) -> dict:
        """Run eval_bpb.py on the file, on as many processes as trained it here, and return its JSON."""
        c, out = self.config, self.folder / "score.json"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        launch = [sys.executable] if local == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={local}"]
        command = [*launch, str(Path(__file__).resolve().with_name("eval_bpb.py")), str(artifact), "--data",
                   c.data_path, "--stride", str(c.eval_stride), "--batch-seqs", str(c.eval_batch_seqs), "--json",
                   str(out)] + (["--tokenizer-path", c.tokenizer_path] if c.tokenizer_path else [])
        hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
        env = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("TORCHELASTIC_")}
        env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        env |= {} if self.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        out.unlink(missing_ok=True)
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in done.stdout.rstrip().splitlines():
            self.log.line(f"| {line}")
        if done.returncode or not out.exists():
            raise AuditError(f"scoring failed (status {done.returncode}); see above, or run: {' '.join(command)}")
        scored = json.loads(out.read_text())
        shards = {name: sha for name, sha in self.data.hashes.items() if name in scored["data"]["sha256"]}
        if scored["artifact"]["sha256"] != sha256_file(artifact) or scored["data"]["sha256"] != shards:
            raise AuditError(f"{out}: the scored artifact or data are not those of this run; do not change files while "
                             "it scores")
        return scored


def main(argv: list[str] | None = None) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    trainer = None

    def fail(e: Exception, status: int) -> int:
        """One message: rank 0's; another rank's only if it is not the same for all, which the settings are."""
        if trainer is not None and trainer.log is not None:
            trainer.log.clear_bar()
            trainer.log.line(f"error: {e}", console=False)
        if rank == 0 or status != 2:
            print(f"error: {f'rank {rank}: ' if rank else ''}{e}", file=sys.stderr, flush=True)
        return status

    try:
        preset, config, origin, notices = resolve_settings(sys.argv[1:] if argv is None else argv, os.environ)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(config.threads or max(1, cores // local_world))
        trainer = Trainer(preset, config, rank, world, local_rank)
        if trainer.device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(f"nproc_per_node={local_world}: this machine has {torch.cuda.device_count()} GPU(s)")
            torch.cuda.set_device(trainer.device)
        else:
            keep_freed_memory()
            # The same seed must give the same bytes; on a CPU this costs nothing.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if world > 1:
            dist.init_process_group("nccl" if trainer.device.type == "cuda" else "gloo")

        def on_signal(signum: int, _frame) -> None:
            if trainer.signal and time.monotonic() - trainer.signalled > 2:  # launchers repeat a signal within moments
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            trainer.signal, trainer.signalled = signum, time.monotonic()

        previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        trainer.set_up()
        trainer.preflight(origin, notices)
        trainer.warm_up()
        trainer.train()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        return 0 if trainer.finish() else fail(AuditError("the file does not hold the model that was trained"), 1)
    except Interrupted as e:
        trainer.log.line(str(e))
        return 128 + e.signum
    except ConfigError as e:
        return fail(e, 2)
    except (DataError, AuditError, CheckpointError, TrainingError, pack.ArtifactError, OSError) as e:
        return fail(e, 1)
    finally:
        if trainer is not None and trainer.log is not None:
            trainer.log.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
