"""Train a ternary GPT under a byte budget, pack it, and have a fresh process score the file.

    python train_gpt.py                                              # preset cpu without a GPU, pr367 with one
    python train_gpt.py --preset cpu_10min_128kb --seed 7            # a scored run of the CPU track
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset golf16mb
    python train_gpt.py --help                                       # every setting, its default and its reason

Settings resolve as defaults < preset < environment (upper-case names) < command line.

The one idea: every parameter has three forms, and in training only `Latents.refresh` goes from one to the next:

    latent (fp32, the optimizer's) --quantize--> stored (codes + scales, the file's) --dequantize--> param (bf16)

The model trains on params that are already dequantize(quantize(latent)), unless --quantize-start or --quantize-ramp
puts that off; nothing in its forward knows of quantization. The straight-through estimator (Bengio et al., arXiv
1308.3432) is the optimizer step: the gradient of the param is applied to the latent and the param is refreshed. The
artifact holds the codes and scales of the last refresh, so the model that is rebuilt from the file is, bit for bit, the
one in memory at the end of training.

Read on in this order: settings, storage formats, model, latents and optimizer, checkpoints, the loop, main.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

import pack
from tern import audits, checkpoints, foreign, groups, kernels, machine, metric, processes, runlog, settings, source
from tern.checkpoints import CheckpointError
from tern.command import steady_streams
from tern.copying import Copying
from tern.ending import end_well, report_end
from tern.errors import Foreseen
from tern.files import folder_identity
from tern.finite import first_bad, first_bad_output
from tern.groups import SCALE_DTYPES, VALUE_DTYPES, join_groups, split_groups
from tern.kernels import Linear, attend, fuses, linear, offset_keys, previous, rope_tables, rotate, token_losses
from tern.loader import TokenLoader
from tern.metric import evaluate
from tern.muon import muon_flops, muon_update
from tern.processes import Place, RankLost, Ranks
from tern.rate import RARE_STEP_BITS, RateControl
from tern.runfolder import RunFolder
from tern.schedule import StepPlan, micro_batch_tokens, schedule, sequence_lengths, warmdown_share
from tern.scoring import score_in_fresh_process
from tern.settings import ConfigError, need, setting
from tern.shards import AuditError, DataFolder, open_data, read_shard
from tern.signals import Interrupted, Signals
from tern.tokenizers import ByteCounter
from tern.wire import from_wire, to_wire

# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every setting, by topic. Those that PR 367 has as environment variables have their names, in lower case."""

    # run
    run_id: str = setting("", "name of the run's folder; empty: <preset>_seed<seed>", free=True)
    out_dir: str = setting("runs", "where the run's folder is made", free=True)
    resume: str = setting("never", "auto: continue from the run folder's checkpoint if there is one; never", free=True)
    write_page: bool = setting(True, "report.html at the end: the run as a page (tern/report.py)", free=True)
    seed: int = setting(1337, "initialisation, and the order of the windows", 0, 2**63 - 1)
    device: str = setting("auto", "auto (cuda if there is one), cpu or cuda", free=True)
    threads: int = setting(0, "CPU threads per process; 0: cores / processes", 0, 1024, free=True)
    compile: bool = setting(True, "torch.compile; off saves the compile time of short runs", free=True)
    # data
    data_path: str = setting("data/packages", "folder of *_train_*.bin and *_val_*.bin shards", free=True)
    tokenizer_path: str = setting("", "SentencePiece model; empty: the one in data_path", free=True)
    shuffle: bool = setting(True, "windows of train_seq_len in a random order, each once an epoch; off: as they come")
    # length of training
    iterations: int = setting(20000, "steps at most", 0)
    max_wallclock_seconds: float = setting(600.0, "training seconds at most, without compile warmup; 0: no cap", 0)
    warmup_steps: int = setting(2, "compile priming passes, outside the clock; they change no state", 0, free=True)
    lr_warmup_steps: int = setting(50, "steps of linear learning-rate warmup", 0)
    warmdown_iters: int = setting(0, "steps of linear warmdown to zero, estimated from the clock; 0: warmdown_frac", 0)
    warmdown_frac: float = setting(0.5, "share of the run that warms down, where warmdown_iters is 0", 0, 1)
    train_batch_tokens: int = setting(16384, "tokens per step over all processes", 1)
    micro_batch_tokens: int = setting(65536, "tokens per forward and process at most; more are accumulated in fp32", 1)
    train_seq_len: int = setting(512, "tokens per sequence", 1, 65536, in_file=True)
    seq_ramp_start: int = setting(0, "sequence length at the start, doubling to the full one; 0: no ramp", 0)
    seq_ramp_frac: float = setting(0.25, "share of the run over which the sequence length grows", 0, 1)
    batch_ramp_start: int = setting(0, "tokens per step at the start, growing to the full batch; 0: no ramp", 0)
    batch_ramp_frac: float = setting(0.20, "share of the run over which the batch grows", 0, 1)
    # model
    vocab_size: int = setting(1024, "must be the tokenizer's", 1, 65536, in_file=True)
    num_layers: int = setting(4, "blocks; the first half feeds U-Net skips to the second", 2, 1024, in_file=True)
    model_dim: int = setting(128, "width of the residual stream", 1, 1 << 20, in_file=True)
    num_heads: int = setting(2, "query heads", 1, in_file=True)
    num_kv_heads: int = setting(1, "key and value heads (GQA)", 1, in_file=True)
    mlp_mult: int = setting(3, "MLP hidden width in units of model_dim, where mlp_hidden is 0", 0, in_file="changed")
    mlp_hidden: int = setting(0, "MLP hidden width, any number; 0: mlp_mult * model_dim", 0, in_file=True)
    rope_base: float = setting(10000.0, "RoPE base frequency", 1e-30, in_file="changed")
    logit_softcap: float = setting(30.0, "logits are softcap * tanh(logits / softcap)", 1e-30, in_file="changed")
    key_offset: bool = setting(False, "half of each key's dimensions are of the token before", in_file="changed")
    attn_window: int = setting(0, "positions that attention sees, its own the last; 0: all", 0, in_file="changed")
    smear: bool = setting(False, "SmearGate: embeddings blended with the one before, by gates", in_file="changed")
    copy_dim: int = setting(0, "directions by which to find what to copy; 0: no copying", 0, 1 << 20, in_file="changed")
    qk_gain_init: float = setting(1.5, "initial gain of normalised queries, learned per head", -1e6, 1e6)
    tied_embed_init_std: float = setting(0.005, "initial standard deviation of the tied embedding", 1e-30)
    # storage formats
    matrix_format: str = setting("ternary", "format of block matrices: ternary, int2..int8, fp8, bf16 or fp16")
    embed_format: str = setting("bf16", "format of the tied embedding, likewise")
    vector_format: str = setting("bf16", "format of gains, scales, mixes and skips: fp8, bf16 or fp16")
    group_size: int = setting(128, "weights per scale along the input dimension; 0: one scale per tensor", 0)
    ternary_rule: str = setting("absmean", "how ternary codes and scales are found (RULES)")
    threshold: float = setting(0.5, "a ternary code is zero up to threshold * mean|w| (0.5: BitNet b1.58)", 0)
    scale_dtype: str = setting("log7", "scales: bf16, fp16 or log4..log8 (2^bits steps over 16 octaves)")
    int_step: float = setting(1.0, "step of integers, in units of the finest that holds the largest weight", 1, 127)
    rare_step: float = setting(0.0, "steps of an int embedding go with (occurrences of the token + 1)^-this", 0, 1)
    fit_cap: float = setting(0.0, "share of the cap that an int embedding's step makes the file fill; 0: off", 0, 1)
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
    train_log_every: int = setting(50, "steps between log lines; the first ten are logged as well", 0, free=True)
    val_loss_every: int = setting(0, "steps between validations inside the clock; 0: only at the end", 0, free=True)
    val_batch_size: int = setting(16384, "tokens per validation batch over all processes", 1, free=True)
    checkpoint_every: int = setting(500, "steps between checkpoints; 0: only at the end and on a signal", 0, free=True)
    # score
    eval_stride: int = setting(64, "stride of the sliding-window score; 0: chunked score only", 0, free=True)
    eval_seq_len: int = setting(0, "tokens in a score's window; 0: as trained", 0, 65536, free=True, in_file="changed")
    eval_batch_seqs: int = setting(32, "windows per batch of the scoring process", 1, free=True)
    cap_bytes: int = setting(16_000_000, "byte cap of the track", 1, free=True)
    cap_counts_code: bool = setting(True, "the cap covers the code too (official), or the model alone", free=True)

    def __post_init__(self):
        settings.check_types(self)
        need(self.mlp_hidden > 0 or self.mlp_mult > 0, self, "mlp_mult", "must be at least 1, or set mlp_hidden")
        need(self.model_dim % self.num_heads == 0, self, "num_heads", f"must divide model_dim={self.model_dim}")
        need(self.num_heads % self.num_kv_heads == 0, self, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        need(self.model_dim // self.num_heads % 2 == 0, self, "num_heads", "model_dim / it must be even for RoPE")
        need(not self.run_id or not {"", ".", ".."} & set(self.run_id.split("/")), self, "run_id",
             "must be a name, or names below each other as in a/b; --out-dir says where")
        need(self.resume in ("auto", "never"), self, "resume", "must be auto or never")
        need(self.device in ("auto", "cpu", "cuda"), self, "device", "must be auto, cpu or cuda")
        need(self.train_batch_tokens % self.train_seq_len == 0, self, "train_batch_tokens",
             f"must be a multiple of train_seq_len={self.train_seq_len}")
        need(self.eval_stride <= self.score_len, self, "eval_stride", f"must be at most {self.score_len}, a window")
        need(min(self.attn_window or self.score_len, self.score_len) <= self.train_seq_len, self, "attn_window",
             f"must be from 1 to {self.train_seq_len}, so that it sees no further in scores of {self.score_len} tokens")
        need(sequence_lengths(self)[-1] == self.train_seq_len, self, "seq_ramp_start",
             f"must be train_seq_len={self.train_seq_len} over a power of two")
        need(self.iterations > 0 or self.max_wallclock_seconds > 0, self, "iterations", "must be positive, or a cap")
        for name in ("matrix_format", "embed_format", "vector_format"):
            make_format(self, name)

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or self.mlp_mult * self.model_dim

    @property
    def score_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len


CPU_TRACK = dict(  # an int5 embedding beats a ternary one with a wider MLP at these bytes
    device="cpu", cap_bytes=128_000, cap_counts_code=False, embed_format="int5", int_step=4.9, rare_step=0.35,
    fit_cap=0.993, num_layers=3, mlp_hidden=280, smear=True, key_offset=True, copy_dim=64, train_seq_len=512,
    seq_ramp_start=256, seq_ramp_frac=1.0, train_batch_tokens=8192, val_batch_size=8192, tied_embed_lr=0.01,
    attn_window=512, eval_seq_len=2048, eval_stride=512, eval_batch_seqs=8,
)
PR367 = dict(  # run_8xh100.sh and train_bitnet.py of PR 367
    num_layers=12, model_dim=768, num_heads=12, num_kv_heads=6, mlp_mult=3, mlp_hidden=2496, train_seq_len=2048,
    train_batch_tokens=524_288, val_loss_every=500, val_batch_size=524_288, train_log_every=50, warmup_steps=20,
    warmdown_iters=1200, matrix_lr=0.04, scalar_lr=0.04, tied_embed_lr=0.04, muon_momentum=0.99,
    muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500, rope_base=200_000.0, group_size=64,
    scale_dtype="fp16", checkpoint_every=2000, data_path="data/fineweb_sp1024", shuffle=False,
)
PRESETS: dict[str, dict] = {
    "cpu": CPU_TRACK | dict(max_wallclock_seconds=180.0),
    "tiny": dict(
        iterations=30, max_wallclock_seconds=0.0, compile=False, num_layers=2, model_dim=32, num_heads=2,
        num_kv_heads=1, mlp_hidden=80, train_seq_len=64, train_batch_tokens=1024, lr_warmup_steps=5, train_log_every=5,
        checkpoint_every=10, eval_stride=32, cap_bytes=128_000, cap_counts_code=False, group_size=32, warmup_steps=0,
        write_page=False,
    ),
    "cpu_10min_128kb": CPU_TRACK | dict(max_wallclock_seconds=600.0),
    "pr367": PR367,
    # Our best guess, not measured as a whole: PR 640's shape and schedule with what paid on the CPU track.
    "golf16mb": PR367 | dict(
        vocab_size=8192, num_layers=10, num_heads=8, num_kv_heads=4, mlp_hidden=3200, seq_ramp_start=1024,
        seq_ramp_frac=1.0, embed_format="int5", int_step=4.0, rare_step=0.35, fit_cap=0.995, group_size=128,
        scale_dtype="log7", warmdown_iters=0, warmdown_frac=0.2, scalar_lr=0.02, tied_embed_lr=0.02,
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500, rope_base=10_000.0,
        val_loss_every=0, shuffle=True, smear=True, key_offset=True, data_path="data/fineweb_sp8192",
    ),
}

# ---------------------------------------------------------------------------------------------------------------
# Storage formats: latent -> stored -> param. A weight is rounded to a code, a scale to its dtype, their product to bf16
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What the file holds of a tensor: codes in its shape, and scales [.., rows, groups] or None."""

    codes: Tensor
    scales: Tensor | None


class Format:
    """A way to store a tensor. Stacked tensors [.., rows, cols] are treated as each of them alone.

    A new one is a subclass with an entry in FORMATS, and a row in pack.KINDS.
    """

    kind: str  # of the file (docs/format.md)
    numbered = False  # whether a setting names it with a number, as int4

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        """The format that a setting such as int4 asks for: kind int, number 4. Raises ConfigError."""
        raise NotImplementedError

    def quantize(self, latent: Tensor) -> Stored:
        """latent: fp32 [.., rows, cols] or [cols] -> codes of its shape, scales [.., rows, groups] or None."""
        raise NotImplementedError

    def dequantize(self, stored: Stored) -> Tensor:
        """Param, bf16, in the codes' shape."""
        raise NotImplementedError

    def spec(self) -> dict:
        """The format as a file and pack.py know it."""
        return {"kind": self.kind} | asdict(self)  # type: ignore[call-overload]


class GroupFormat(Format):
    """Codes times a scale per group."""

    group_size: int
    scale: str

    def __post_init__(self):
        if self.scale not in SCALE_DTYPES or self.group_size < 0:
            raise ConfigError(f"{self}: scale one of {', '.join(SCALE_DTYPES)} and group_size >= 0 are needed")

    def dequantize(self, stored: Stored) -> Tensor:
        """codes * scale, computed in fp32 and rounded once."""
        codes, _ = split_groups(stored.codes.float(), self.group_size)
        param = codes * groups.decode_scales(stored.scales, self.scale)[..., None]
        return join_groups(param, stored.codes.shape).bfloat16()

    def store(self, codes: Tensor, scales: Tensor, nonzero: Tensor, shape: torch.Size) -> Stored:
        """codes [.., rows, groups, size] and exact scales [.., rows, groups] as they are stored."""
        return Stored(join_groups(codes.to(torch.int8), shape), groups.encode_scales(scales, nonzero, self.scale))


def absmean(w: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(which weights are not 0, the scale) of grouped weights w [.., groups, size] whose true sizes are sizes
    [groups, 1]: a code is 0 where |w| <= threshold * mean|w|, and the scale is mean|w|.

    With threshold 0.5 this is RoundClip(w / mean|w|, -1, 1) of BitNet b1.58 (arXiv 2402.17764, section 2).
    """
    magnitude = w.abs()
    mean = magnitude.sum(-1, keepdim=True) / sizes
    return magnitude > threshold * mean, mean[..., 0]


RULES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {"absmean": absmean}


@dataclass(frozen=True)
class Ternary(GroupFormat):
    """Codes in {-1, 0, 1}, found by a rule of RULES, and one scale per group, stored as `scale`.

    Codes use exact measures and only the scale is rounded, so codes(c * W) == codes(W) for c > 0. A zero group has zero
    codes and a zero scale.
    """

    group_size: int = 128
    rule: str = "absmean"
    threshold: float = 0.5
    scale: str = "bf16"
    kind = "ternary"

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in RULES or not self.threshold >= 0:
            raise ConfigError(f"{self}: rule one of {', '.join(RULES)} and threshold >= 0 are needed")

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        need(config.ternary_rule in RULES, config, "ternary_rule", f"must be one of {', '.join(RULES)}")
        return cls(config.group_size, config.ternary_rule, config.threshold, config.scale_dtype)

    def quantize(self, latent: Tensor) -> Stored:
        w, sizes = split_groups(latent.float(), self.group_size)
        live, scale = RULES[self.rule](w, sizes, self.threshold)
        return self.store(w.sign() * live, scale, w.abs().amax(-1) > 0, latent.shape)


@dataclass(frozen=True)
class Int(GroupFormat):
    """Symmetric integers of 2 to 8 bits: scale = step * max|w| / (2^(bits-1) - 1), code = round(w / scale)."""

    bits: int = 8
    group_size: int = 128
    scale: str = "bf16"
    step: float = 1.0  # not below 1: a code has room for the largest weight. The file does not tell
    steps: Tensor | None = field(default=None, compare=False)  # fp32 [rows, 1] in its place
    kind = "int"
    numbered = True

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.bits <= 8 or not 1 <= self.step <= 127:
            raise ConfigError(f"{self}: 2 to 8 bits are needed, and a step of 1 to 127")

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        return cls(int(number), config.group_size, config.scale_dtype, config.int_step)

    def spec(self) -> dict:
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size, "scale": self.scale}

    def quantize(self, latent: Tensor) -> Stored:
        """Codes are rounded against the stored scale: the one that they will be multiplied by."""
        w, _ = split_groups(latent.float(), self.group_size)
        limit = 2 ** (self.bits - 1) - 1
        biggest = w.abs().amax(-1)
        step = self.step if self.steps is None else self.steps
        scales = groups.encode_scales(step * biggest / limit, biggest > 0, self.scale)
        values = groups.decode_scales(scales, self.scale)[..., None]
        divisor = torch.where(values > 0, values, 1.0)
        codes = (w / divisor).round().clamp(-limit, limit).to(torch.int8)
        return Stored(join_groups(codes, latent.shape), scales)


@dataclass(frozen=True)
class Dequantizer(GroupFormat):
    """Any codes times a scale per group, as read from a file: how they were found does not matter any more."""

    group_size: int
    scale: str


@dataclass(frozen=True)
class Float(Format):
    """Floats of 16 bits, or of 8 (e4m3, arXiv 2209.05433: 8 steps per octave, up to 448); the codes are the values."""

    dtype: str = "bf16"

    def __post_init__(self):
        if self.dtype not in VALUE_DTYPES:
            raise ConfigError(f"unknown kind {self.dtype!r}: use one of {', '.join(VALUE_DTYPES)}")

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        return cls(kind)

    def quantize(self, latent: Tensor) -> Stored:
        if self.dtype == "fp8":  # the conversion does not saturate
            latent = latent.clamp(-448.0, 448.0)
        return Stored(latent.to(VALUE_DTYPES[self.dtype]), None)

    def dequantize(self, stored: Stored) -> Tensor:
        return stored.codes.bfloat16()

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.dtype

    def spec(self) -> dict:
        return {"kind": self.dtype}


# Name in the settings -> class; ablations/formats.py adds those that lost.
FORMATS: dict[str, type[Format]] = {"ternary": Ternary, "int": Int, "fp8": Float, "bf16": Float, "fp16": Float}


def make_format(config: Config, name: str) -> Format:
    """The format that the setting `name` (matrix_format, embed_format or vector_format) asks for."""
    value = getattr(config, name)
    need(config.scale_dtype in SCALE_DTYPES, config, "scale_dtype", f"must be one of {', '.join(SCALE_DTYPES)}")
    kind, number = value, ""
    if kind not in FORMATS:  # int4: a kind and its number
        kind = value.rstrip("0123456789")
        number = value[len(kind) :]
    known = kind in FORMATS and FORMATS[kind].numbered == (0 < len(number) < 3)
    need(known, config, name, f"must be one of {', '.join(FORMATS)}, an int with its bits as int4")
    need(name != "vector_format" or value in VALUE_DTYPES, config, name, "must be fp8, bf16 or fp16")
    try:
        return FORMATS[kind].from_settings(config, kind, number)
    except ConfigError as e:
        raise ConfigError(f"{name}={value!r}: {e}") from None


def format_of(config: Config, name: str, ndim: int) -> Format:
    """The one storage format of the parameter called name."""
    if name == "tok_emb.weight":
        return make_format(config, "embed_format")
    return make_format(config, "matrix_format" if name.endswith(".weight") and ndim == 2 else "vector_format")


def format_of_file(spec: dict) -> Format:
    """The format that a file names, to dequantize it. Raises ConfigError on one that is not known."""
    kind = spec["kind"]
    if kind in VALUE_DTYPES:
        return Float(kind)
    if pack.KINDS[kind].has_scale:
        return Dequantizer(spec["group_size"], spec["scale"])
    if kind not in FORMATS:
        raise ConfigError(f"storage format {kind!r} is none of this trainer's: ablations/program.py may know it")
    try:
        return FORMATS[kind](**{name: value for name, value in spec.items() if name != "kind"})
    except TypeError as e:
        raise ConfigError(f"storage format {spec}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------
# Model: PR 367's GPT. Nothing in it knows of quantization
# ---------------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class Attention(nn.Module):
    attend = staticmethod(attend)  # the part of it that other kinds of attention replace

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        self.c_q = Linear(c.model_dim, c.model_dim)
        self.c_k = Linear(c.model_dim, c.num_kv_heads * self.head_dim)
        self.c_v = Linear(c.model_dim, c.num_kv_heads * self.head_dim)
        self.proj = Linear(c.model_dim, c.model_dim)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))
        self.offset, self.window = c.key_offset, c.attn_window

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, time, heads * head_dim] -> [batch, heads, time, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        """The output at the last positions of x [batch, time, model_dim]: [batch, last, model_dim]."""
        return self.of_normed(norm(x), cos, sin, last)

    def of_normed(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        """forward of an x whose rows are normalised."""
        time = x.shape[1]
        if last == time:  # one product over matrices that stay apart for Muon; joining them copies weights alone
            qkv = linear(x, torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight)))
            if fuses(qkv):
                rotated = kernels.split_and_rotate(qkv, self.q_gain, cos, sin, self.heads, self.kv_heads)
                return self.mix(*(x.transpose(1, 2) for x in rotated))
            q, k, v = self.split_heads(qkv).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        else:
            q = self.split_heads(self.c_q(x[:, -last:]))
            heads = self.split_heads(linear(x, torch.cat((self.c_k.weight, self.c_v.weight))))
            k, v = heads.split((self.kv_heads, self.kv_heads), dim=1)
        q = rotate(norm(q), cos[-last:], sin[-last:]) * self.q_gain[:, None, None]
        return self.mix(q, rotate(norm(k), cos, sin), v)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output [batch, queries, model_dim] of rotated heads [batch, heads, time, head_dim]."""
        y = self.attend(q, offset_keys(k) if self.offset else k, v, self.window)
        return self.proj(norm(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.fc = Linear(c.model_dim, c.hidden_dim)
        self.proj = Linear(c.hidden_dim, c.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(norm(self.fc(norm(x)).relu().square()))


MATRICES = "blocks.", "copying."  # how the names of matrices begin, which end in .weight
FUSED = Attention, MLP  # the parts of a block that tern/fused.py joins; of other classes each is computed as it says


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.resid_mix = nn.Parameter(torch.ones(2, c.model_dim))
        for weight in (self.resid_mix.data[1], self.attn.proj.weight, self.mlp.proj.weight):
            nn.init.zeros_(weight)  # a block starts as the identity

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        if last == x.shape[1] and (type(self.attn), type(self.mlp)) == FUSED and fuses(x, *self.mlp.fc.weight.shape):
            x, normed = kernels.mix_and_norm(x, x0, self.resid_mix)
            return kernels.add_branches(x, self.attn.of_normed(normed, cos, sin, last), self.attn_scale,
                                        self.mlp.fc.weight, self.mlp.proj.weight, self.mlp_scale)
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x[:, -last:] + self.attn_scale * self.attn(x, cos, sin, last)
        return x + self.mlp_scale * self.mlp(x)


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
        self.copying = Copying(config) if config.copy_dim else None

    def hidden(self, ids: Tensor) -> Tensor:
        """What `head` needs of every position, [batch, time, ..]."""
        return self.hidden_last(ids, ids.shape[1])

    def hidden_last(self, ids: Tensor, last: int) -> Tensor:
        """hidden(ids)[:, -last:]: states, and of a model that copies the mass of each token."""
        states = self.states(ids, ids.shape[1] if self.copying else last)
        return self.copying.with_masses(states, ids, last) if self.copying else states

    def states(self, ids: Tensor, last: int) -> Tensor:
        """Normalised hidden states [batch, last, model_dim] of the last of ids [batch, time]; other positions are only
        keys and values in the last block."""
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
        """Logits of the next token, fp32 [.., vocab_size], by what hidden_last gave."""
        return self.copying.head(hidden, self.logits) if self.copying else self.logits(hidden)

    def logits(self, states: Tensor) -> Tensor:
        """Softcapped logits, fp32 [.., vocab_size], by states [.., model_dim]: without what is copied."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(linear(states, self.tok_emb.weight).float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        states = self.states(ids, ids.shape[1])
        losses = token_losses(self.logits(states), targets, self.config.logit_softcap)
        return (self.copying.losses(losses, states, targets) if self.copying else losses).mean()


# ---------------------------------------------------------------------------------------------------------------
# Latents and optimizer
# ---------------------------------------------------------------------------------------------------------------


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, in the model's order."""
    with machine.no_values():
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def owners(config: Config, world: int) -> dict[str, int]:
    """Parameter name -> the rank that updates it, the work shared out evenly by flops, 100 for each element besides."""
    shapes = param_shapes(config)
    muon = {n: muon_flops(s, config.muon_backend_steps) for n, s in shapes.items() if optimizer_of(n) == "muon"}
    return processes.share_out({n: 100 * math.prod(s) + muon.get(n, 0) for n, s in shapes.items()}, world)


def optimizer_of(name: str) -> str:
    """"muon" for matrices; "embed" or "scalar", AdamW at its own learning rate, for the rest."""
    muon = name.startswith(MATRICES) and name.endswith(".weight")
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
    grad: Tensor  # fp32 [n, *shape], a view of Latents.flat_grad
    like: Stored  # shapes and dtypes of the stored form, on the meta device
    stored: Stored | None  # the owner's only
    wire: Tensor  # uint8, a view of Latents.wire; empty with one process


def quantize(fmt: Format, latent: Tensor) -> Stored:
    """What the file would hold of a latent: fmt.quantize, as a function that can be compiled."""
    return fmt.quantize(latent)


class Latents:
    """Every parameter's latent, on the rank that owns it; `refresh` is the only place that writes the model's params.

    Over several ranks (ZeRO, arXiv 1910.02054, with codes in place of weights) a step is: gradients are summed on their
    owners (reduce), owners update latents, and send what the file would hold of them (refresh).
    """

    def __init__(self, model: GPT, config: Config, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        owner, members = owners(config, self.ranks.world), {}
        for name, p in model.named_parameters():
            members.setdefault((owner[name], optimizer_of(name), tuple(p.shape)), []).append((name, p))
        members = dict(sorted(members.items(), key=lambda item: item[0][0]))  # one segment per owner
        sizes = [sum(p.numel() for _, p in group) for group in members.values()]
        self.flat_grad = torch.zeros(sum(sizes) + 1, device=next(model.parameters()).device)  # and, last, the loss
        grads = self.flat_grad[:-1].split(sizes)
        self.banks = [self.make_bank(config, rank, kind, group, grad)
                      for ((rank, kind, _), group), grad in zip(members.items(), grads, strict=True)]
        self.wire = torch.cat([bank.wire for bank in self.banks])
        for bank, view in zip(self.banks, self.wire.split([len(b.wire) for b in self.banks]), strict=True):
            bank.wire = view
        self.mine = [b for b in self.banks if b.owner == self.ranks.rank]
        self.others = [b for b in self.banks if b.owner != self.ranks.rank]
        spans = [[b for b in self.banks if b.owner == r] for r in range(self.ranks.world)]
        self.grad_segments = self.flat_grad[:-1].split([sum(b.grad.numel() for b in span) for span in spans])
        self.wire_segments = self.wire.split([sum(len(b.wire) for b in span) for span in spans])
        self.quantize = quantize
        self.refresh()
        covered = sorted(n for b in self.banks for n in b.names)
        assert covered == sorted(n for n, _ in model.named_parameters()), "a parameter has no format, or two"

    def make_bank(self, config: Config, rank: int, kind: str, group: list[tuple[str, nn.Parameter]],
                  grad: Tensor) -> Bank:
        """The bank of a group of named parameters that `rank` owns, whose fp32 values become the latents."""
        names, params = [n for n, _ in group], [p for _, p in group]
        fmt, mine = format_of(config, names[0], params[0].ndim), rank == self.ranks.rank
        latent = torch.stack([p.detach() for p in params]).float()
        stored = fmt.quantize(latent)
        like = Stored(stored.codes.to("meta"), None if stored.scales is None else stored.scales.to("meta"))
        wire = self.flat_grad.new_empty(0, dtype=torch.uint8)
        if self.ranks.world > 1:
            wire = to_wire(stored.codes, stored.scales, fmt.kind == "ternary")
            if schedule(config, 0, 0.0).quantized < 1:  # owners send bf16 params at first
                wire = F.pad(wire, (0, max(2 * latent.numel() - len(wire), 0)))
        for p in params:
            p.data = torch.empty_like(p, dtype=torch.bfloat16)
        return Bank(names, params, fmt, kind, rank, latent if mine else None, grad.view(latent.shape), like,
                    stored if mine else None, wire)

    @torch.no_grad()
    def refresh(self, quantized: float = 1.0, measure: bool = False) -> tuple[float, float]:
        """params <- dequantize(quantize(latent)).

        The second half is eager, as where the file is read: a compiler may drop a rounding (pytorch issue 185337).
        quantized < 1: only so far from the latent towards that. What is stored is quantized all the way. Returns
        (zero_frac, churn) of the block matrices' codes, or NaN unless measure.
        """
        before = [bank.stored for bank in self.mine]
        for bank in self.mine:
            bank.stored = self.quantize(bank.format, bank.latent)
        arrivals = self.exchange(quantized)
        for bank in [*self.mine, *self.others]:  # one's own while others arrive
            if bank.stored is None:
                self.ranks.wait(arrivals[bank.owner])
            param = bank.format.dequantize(self.stored(bank)) if quantized == 1 else self.mixed(bank, quantized)
            torch._foreach_copy_([p.data for p in bank.params], list(param.unbind()))
        self.ranks.wait(arrivals[self.ranks.rank])
        return self.zero_frac_and_churn(before) if measure else (math.nan, math.nan)

    def mixed(self, bank: Bank, quantized: float) -> Tensor:
        """The param, bf16, on the way from the latent (0) to the stored value (1); another rank's from the wire."""
        if bank.stored is None:
            return bank.wire[: 2 * bank.grad.numel()].clone().view(torch.bfloat16).view(bank.grad.shape)
        return bank.latent.float().lerp(bank.format.dequantize(bank.stored).float(), quantized).bfloat16()

    def exchange(self, quantized: float) -> list[dist.Work | None]:
        """Begin to send what this rank owns to the others: codes and scales, or params that are not there yet."""
        for bank in self.mine if self.ranks.world > 1 else []:
            if quantized == 1:
                wire = to_wire(bank.stored.codes, bank.stored.scales, bank.format.kind == "ternary")
            else:
                wire = self.mixed(bank, quantized).flatten().view(torch.uint8)
            bank.wire[: len(wire)].copy_(wire)
        return [self.ranks.broadcast(segment, rank) for rank, segment in enumerate(self.wire_segments)]

    def zero_frac_and_churn(self, before: list[Stored]) -> tuple[float, float]:
        """Shares of the block matrices' codes that are zero, and that are not what they were before; NaN without codes.
        Collective."""
        counts = torch.zeros(3, dtype=torch.int64, device=self.flat_grad.device)  # zeros, changed, all
        for bank, old in zip(self.mine, before, strict=True):
            if bank.optimizer == "muon" and not isinstance(bank.format, Float):
                counts[0] += (bank.stored.codes == 0).sum()
                counts[1] += (bank.stored.codes != old.codes).sum()
                counts[2] += old.codes.numel()
        zeros, changed, total = self.ranks.sum(counts).tolist()
        return (zeros / total, changed / total) if total else (math.nan, math.nan)

    @torch.no_grad()
    def load(self, latents: Mapping[str, Tensor], where: str) -> None:
        """Latents <- those of a checkpoint (name -> fp32 tensor); not yet refreshed. where: what names it in an error.

        Raises CheckpointError on a tensor that is missing, of another shape, or of another model.
        """
        ours = {name: x.shape for bank in self.banks for name, x in zip(bank.names, bank.grad, strict=True)}
        wrong = [name for name in sorted(ours.keys() | latents.keys())
                 if name not in ours or name not in latents or latents[name].shape != ours[name]]
        if wrong:
            raise CheckpointError(f"{where}: {wrong[0]} is missing there, or of another shape, or this model has none; "
                                  "use a checkpoint of the same model")
        for bank in self.mine:
            bank.latent.copy_(torch.stack([latents[name] for name in bank.names]))

    def stored(self, bank: Bank) -> Stored:
        """What the file would hold of a bank, whoever owns it; another rank's only after a refresh(1.0)."""
        if bank.stored is not None:
            return bank.stored
        return Stored(*from_wire(bank.wire, bank.like.codes, bank.like.scales, bank.format.kind == "ternary"))

    @torch.no_grad()
    def accumulate(self, loss: Tensor, micro_batches: int, first: bool = False) -> None:
        """Add the params' bf16 gradients and the loss, over micro_batches, to the fp32 sums, or begin these with the
        first; clear the gradients."""
        for bank in self.banks:
            sums, grads = list(bank.grad.unbind()), [p.grad for p in bank.params]
            if first:
                torch._foreach_copy_(sums, grads)
                if micro_batches > 1:
                    torch._foreach_mul_(sums, 1 / micro_batches)
            else:
                torch._foreach_add_(sums, [g.float() for g in grads], alpha=1 / micro_batches)
            for p in bank.params:
                p.grad = None
        loss = loss.detach() / micro_batches
        self.flat_grad[-1] = loss if first else self.flat_grad[-1] + loss

    @torch.no_grad()
    def loss_word(self) -> Tensor:
        """The loss over all ranks, and the sum of all gradients, which is finite only if each of them is."""
        return self.ranks.sum(torch.stack((self.flat_grad[-1], self.flat_grad.sum())))

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

    def first_non_finite(self, order: list[str]) -> tuple[str, str] | None:
        """("weights" or "gradient", name) of the first latent, else the first gradient, in the model's order, that is
        not finite; None if all are."""
        latents = {n: x for b in self.mine for n, x in zip(b.names, b.latent, strict=True)}
        grads = {n: x for b in self.banks for n, x in zip(b.names, b.grad, strict=True)}
        found = ((what, first_bad((n, tensors[n]) for n in order if n in tensors))
                 for what, tensors in (("weights", latents), ("gradient", grads)))
        return next((pair for pair in found if pair[1]), None)

    def wire_bytes_per_ternary_weight(self) -> float:
        """Bytes, scales too, that an owner sends for each; 0 with one process."""
        ternary = [b for b in self.banks if b.format.kind == "ternary"]
        return sum(len(b.wire) for b in ternary) / max(sum(b.grad.numel() for b in ternary), 1)

    def pack(self, order: list[str]) -> dict[str, pack.StoredTensor]:
        """Every parameter as pack.py writes it, in the model's order."""
        packed = {name: to_pack(stored, fmt) for name, fmt, _, stored in self.named()}
        return {name: packed[name] for name in order}


class Optimizer:
    """Muon for the block matrices, AdamW for the embedding and the vectors, on the fp32 latents that this rank owns."""

    def __init__(self, latents: Latents, config: Config):
        self.config, self.latents = config, latents
        self.muon = [b for b in latents.mine if b.optimizer == "muon"]
        self.muon_update = muon_update
        self.momentum = [torch.zeros_like(b.latent) for b in self.muon]
        self.adam = [b for b in latents.mine if b.optimizer != "muon"]
        self.averages = [(torch.zeros_like(b.latent), torch.zeros_like(b.latent)) for b in self.adam]
        self.counts = [b.latent.new_zeros(()) for b in self.adam]  # of steps, as AdamW's first ones need it
        held = [n for b in (*self.muon, *self.adam) for n in b.names]
        assert len(held) == len(set(held)) == sum(len(b.names) for b in latents.mine), "not one group per parameter"

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> None:
        """One update of the latents from the accumulated gradients, which are cleared; params are not refreshed."""
        latents = self.latents
        works = latents.reduce()
        if self.config.grad_clip_norm > 0:
            own = latents.grad_segments[latents.ranks.rank]
            total = latents.ranks.sum(own.square().sum()).sqrt()
            own *= (self.config.grad_clip_norm / (total + 1e-6)).clamp(max=1.0)
        for bank, buffer in zip(self.muon, self.momentum, strict=True):
            self.update_bank(bank.latent, buffer, bank.grad, lr_scale, momentum)
        self.update_others(lr_scale)
        for work in works:
            latents.ranks.wait(work)
        latents.flat_grad.zero_()

    @torch.no_grad()
    def update_others(self, lr_scale: float) -> None:
        """AdamW of what is not Muon's."""
        c = self.config
        lrs = {"embed": c.tied_embed_lr, "scalar": c.scalar_lr}
        for bank, (mean, square), count in zip(self.adam, self.averages, self.counts, strict=True):
            adamw([bank.latent], [bank.grad], [mean], [square], [], [count], fused=True, amsgrad=False, beta1=c.beta1,
                  beta2=c.beta2, lr=lrs[bank.optimizer] * lr_scale, weight_decay=0.0, eps=c.adam_eps, maximize=False)

    def update_bank(self, latent: Tensor, buffer: Tensor, grad: Tensor, lr_scale: float, momentum: float) -> None:
        """Muon of matrices stacked as [n, rows, cols]."""
        c, (rows, cols) = self.config, latent.shape[-2:]
        lr = c.matrix_lr * lr_scale
        rate = lr * max(1, rows / cols) ** 0.5
        beta, rate, decay = (latent.new_full((), x) for x in (momentum, rate, lr * c.muon_wd))
        self.muon_update(latent, buffer, grad, beta, rate, decay, c.muon_backend_steps)

    @torch.no_grad()
    def compile(self) -> None:
        """Have the update of matrices compiled, now: nothing is updated."""
        self.muon_update = torch.compile(muon_update, dynamic=False)
        for bank in self.muon:
            latent, buffer, grad = (torch.zeros_like(bank.latent) for _ in range(3))
            self.update_bank(latent, buffer, grad, 0.0, 0.0)

    def moments(self, bank: Bank) -> dict[str, Tensor]:
        """The optimizer's fp32 state of a bank that this rank owns, in the latent's shape."""
        if bank.optimizer == "muon":
            return {"momentum": self.momentum[next(i for i, b in enumerate(self.muon) if b is bank)]}
        averages = self.averages[next(i for i, b in enumerate(self.adam) if b is bank)]
        return dict(zip(("exp_avg", "exp_avg_sq"), averages, strict=True))

    def saved(self, bank: Bank) -> dict[str, Tensor]:
        """The fp32 tensors of a bank that a checkpoint has, [n, ..]; on the meta device if another rank has them."""
        if bank.latent is not None:
            return {"latent": bank.latent} | self.moments(bank)
        moments = ["momentum"] if bank.optimizer == "muon" else ["exp_avg", "exp_avg_sq"]
        return dict.fromkeys(["latent", *moments], torch.empty(bank.grad.shape, device="meta"))

    def state(self) -> dict[str, Tensor]:
        """By name, on rank 0, of all ranks: latent/*, momentum/*, exp_avg/*, exp_avg_sq/*. Collective."""
        out = {}
        for bank in self.latents.banks:
            for what, x in self.saved(bank).items():
                x = torch.empty(x.shape, device=bank.grad.device) if x.is_meta else x
                x = self.latents.ranks.gather(x, bank.owner)
                out |= {f"{what}/{n}": row for n, row in zip(bank.names, x, strict=True)}
        return out

    def bytes_held(self) -> int:
        """Of what this rank keeps between steps, beside the params."""
        held = [self.latents.flat_grad, self.latents.wire]
        for bank in self.latents.mine:
            scales = [bank.stored.scales] if bank.stored.scales is not None else []
            held += [*self.saved(bank).values(), bank.stored.codes, *scales]
        return sum(x.nbytes for x in held)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], step: int, quantized: float = 1.0) -> None:
        """Restore what state() gave after that many steps, each rank its own, and refresh the params.

        Raises KeyError or ValueError on a wrong state. The state may come from another number of ranks.
        """
        expected = {f"{what}/{n}": x[i] for bank in self.latents.banks for what, x in self.saved(bank).items()
                    for i, n in enumerate(bank.names)}
        checkpoints.check_tensors(state, expected)
        for bank in self.latents.mine:
            for what, x in self.saved(bank).items():
                x.copy_(torch.stack([state[f"{what}/{n}"] for n in bank.names]))
        for count in self.counts:
            count.fill_(step)
        self.latents.refresh(quantized)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints and artifacts
# ---------------------------------------------------------------------------------------------------------------

RUN_STATE = ("step", "elapsed", "step_seconds", "tokens_seen", "finished", "quantized")  # in checkpoints


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint file, or of the one in a run's folder. Raises CheckpointError."""
    arrays, state = checkpoints.read_checkpoint(path)
    return {name: torch.from_numpy(x) for name, x in arrays.items()}, state


def load_latents(path: str, data: DataFolder, config: Config) -> dict[str, Tensor]:
    """Name -> fp32 latent of a checkpoint that training starts from. Raises CheckpointError and ConfigError."""
    tensors, state = load_checkpoint(path)
    settings.check_start(state.get("model"), config, f"init_from={path}")  # of another program (pack.py export)
    if state.get("tokenizer") not in (None, data.tokenizer_sha256):
        raise CheckpointError(f"init_from={path}: was trained with another tokenizer than {data.tokenizer}, so its "
                              "embedding means other text; use data of its own")
    return {name.removeprefix("latent/"): x for name, x in tensors.items() if name.startswith("latent/")}


def to_pack(stored: Stored, fmt: Format) -> pack.StoredTensor:
    """A tensor as pack.py writes it."""
    scales = None if stored.scales is None else groups.bit_patterns(stored.scales).reshape(-1, stored.scales.shape[-1])
    return pack.StoredTensor(tuple(stored.codes.shape), fmt.spec(), groups.bit_patterns(stored.codes), scales)


def param_of_file(tensor: pack.StoredTensor) -> Tensor:
    """The param, bf16, of a tensor in a file. Raises ConfigError on a format that this trainer does not know."""
    spec = tensor.format
    scales = None if tensor.scales is None else groups.from_patterns(tensor.scales, spec.get("scale", "bf16"))
    return format_of_file(spec).dequantize(Stored(groups.from_patterns(tensor.codes, spec["kind"]), scales))


def artifact_meta(config: Config, data: DataFolder | None = None) -> dict:
    """What an artifact says of its model: configuration, sha256 of the tokenizer, identity of the data (16 digits).

    Without data, as where only the size counts, the names are of nothing.
    """
    nothing = hashlib.sha256(b"").hexdigest()
    tokenizer, identity = (data.tokenizer_sha256, data.identity) if data else (nothing, nothing)
    return {"config": settings.for_file(config), "tokenizer": tokenizer, "data": identity[:16]}


def model_from_stored(tensors: dict[str, pack.StoredTensor], meta: dict) -> GPT:
    """The model of an artifact. Raises ConfigError unless its tensors are exactly those of its configuration."""
    held = settings.from_file(Config, meta.get("config"))
    config = Config(**held, eval_stride=0, train_batch_tokens=held["train_seq_len"])
    if config.num_layers > len(tensors):  # do not build what the file cannot hold
        raise ConfigError(f"{config.num_layers} layers cannot be made of {len(tensors)} tensors")
    with machine.no_values():
        model = GPT(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    wrong = sorted(shapes.keys() ^ tensors.keys()) or [n for n in shapes if tensors[n].shape != shapes[n]]
    if wrong:
        raise ConfigError(f"tensor {wrong[0]} is missing, not known, or not of the shape {shapes.get(wrong[0])}")
    params = {name: param_of_file(tensor) for name, tensor in tensors.items()}
    model.load_state_dict(params, strict=True, assign=True)
    return model


def predicted_bytes(config: Config) -> dict[str, tuple[dict, int, float]]:
    """Part of the model's file -> (format, symbols, bytes), with pack.expected_bits for each symbol."""
    rows = [(name, "embedding" if name == "tok_emb.weight" else "matrices" if name.endswith(".weight") else "vectors",
             shape, format_of(config, name, len(shape)).spec()) for name, shape in param_shapes(config).items()]
    parts = pack.predicted_bytes(rows, artifact_meta(config))
    for part, (spec, count, size) in parts.items():
        if part.endswith("codes") and spec["kind"] == "int":  # twice the step, a bit less
            bits = RARE_STEP_BITS * config.rare_step if part == "embedding codes" else 0.0
            parts[part] = spec, count, size + count * (bits - math.log2(config.int_step)) / 8
    return parts


def model_bytes(config: Config) -> int:
    """Of the model's file, as predicted."""
    return round(sum(size for *_, size in predicted_bytes(config).values()))


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------


class TrainingError(Foreseen):
    """Training that cannot go on; the message says what happened, at which step, and what is left."""

    shared = True


SILENCE = timedelta(seconds=45)  # after which a rank that does not answer is lost


def scoring_command() -> list[str]:
    """Script and arguments of the process that scores; experiments put another one in its place."""
    return source.command_of("eval_bpb")


class Trainer:
    """One run on one rank: set up, warm up, train, pack, score."""

    def __init__(self, preset: str, config: Config, place: Place):
        self.preset, self.config, self.place = preset, config, place
        self.rank, self.world = place.rank, place.world
        self.device = machine.pick_device(config.device, place.local_rank)
        self.ranks = Ranks(place.rank, place.world)
        self.folder = RunFolder(Path(config.out_dir) / config.run_id, config.resume == "auto", config)
        self.signals = Signals()
        self.seconds: dict[str, float] = {}  # phase -> seconds
        self.step, self.elapsed, self.tokens_seen, self.finished = 0, 0.0, 0, False
        self.step_seconds = self.step_before = 0.0  # of the last step, and of the one before it
        self.quantized = schedule(config, 0, 0.0).quantized  # how far the params are from the latents
        self.ahead = int(self.device.type == "cuda")  # steps that the host may be ahead, so that a GPU need not wait
        self.asked: list[tuple[int, int, machine.Fetch]] = []  # (step, its sequence length, its loss on the way)
        self.loss = math.nan  # the last that is known
        # The program as it is now: an edit while it runs must not get into the log of what ran.
        self.sources = source.read_sources()
        self.source_sha256 = {name: hashlib.sha256(text).hexdigest() for name, text in self.sources.items()}
        self.source_changed = False  # since the checkpoint that this run resumes
        self.notices: list[str] = []

    # -- set up ---------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Open the data, take the run's folder, build model and optimizer, and resume if asked to."""
        began, c = time.perf_counter(), self.config
        self.micro_tokens = micro_batch_tokens(c, self.world)
        self.data = open_data(c.data_path, c.tokenizer_path)
        self.counter = ByteCounter(self.data.tokenizer)
        if self.counter.vocab_size != c.vocab_size:
            raise ConfigError(f"vocab_size={c.vocab_size}: the tokenizer {self.data.tokenizer} has "
                              f"{self.counter.vocab_size}; give --vocab-size {self.counter.vocab_size}")
        with self.ranks.naming_failures():
            processes.check_agreement({"data": self.data.identity, "program": self.source_sha256,
                                       "settings": settings.formula(c)}, self.device)
        self.val_tokens = np.concatenate([read_shard(path) for path in self.data.val])
        self.folder.take_together(self.ranks, self.device, lambda: self.notices.extend(
            audits.audit_before_training(self.data, self.counter)))
        self.log = self.folder.log
        loaded = load_checkpoint(self.folder.checkpoint) if self.folder.resumes else None
        seen = hashlib.sha256(repr(loaded and loaded[1]).encode()).digest()
        if self.world > 1 and self.ranks.differing(seen, self.device):
            raise CheckpointError(f"{self.folder.checkpoint}: the ranks do not see the same checkpoint; share the "
                                  "folder between the machines")
        self.loader = TokenLoader(self.data.train, c.vocab_size, c.train_seq_len if c.shuffle else 0, c.seed)
        torch.manual_seed(c.seed)
        self.model = GPT(c).to(self.device)
        self.order = [name for name, _ in self.model.named_parameters()]
        self.latents = Latents(self.model, c, self.ranks)
        if c.init_from and not loaded:
            self.latents.load(load_latents(c.init_from, self.data, c), f"init_from={c.init_from}")
        self.embedding = next(bank for bank in self.latents.banks if "tok_emb.weight" in bank.names)
        self.rate = self.control_rate(self.embedding.format) if isinstance(self.embedding.format, Int) else None
        self.latents.refresh(self.quantized)
        self.optimizer = Optimizer(self.latents, c)
        self.compiled: Callable[[Tensor, Tensor], Tensor] = self.model
        if loaded:
            self.restore(*loaded)
        self.seconds["load"] = time.perf_counter() - began

    def preflight(self, origin: dict[str, str], notices: list[str]) -> None:
        """Say what is about to run."""
        c = self.config
        why = "asked for" if c.device != "auto" else "no CUDA device found" if self.device.type == "cpu" else "found"
        self.bytes_code = source.code_bytes(self.sources) if self.rank == 0 else 0
        self.header = runlog.Header(
            runlog.SCHEMA, self.preset, sys.argv[1:], asdict(c), origin, machine.describe(), self.world,
            self.source_sha256, folder_identity(self.source_sha256), self.data.hashes, self.data.identity,
            sum(p.numel() for p in self.model.parameters()), self.step)
        facts = runlog.Preflight(
            str(self.device), why, torch.get_num_threads(), c.hidden_dim, len(self.loader.stream),
            self.val_tokens.size, {part: (pack.format_label(spec) if spec else "", count, size)
                                   for part, (spec, count, size) in predicted_bytes(c).items()},
            self.bytes_code, self.micro_tokens, self.elapsed, self.source_changed, [*notices, *self.notices])
        self.log.preflight(self.header, facts, self.sources)
        self.log.phase("load", self.seconds["load"])
        self.log.strict = False  # from here on training is worth more than its log

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of all ranks on rank 0, after each has seen that its own part is worth keeping."""
        bad = self.latents.first_non_finite(self.order)
        if int(self.ranks.sum(torch.tensor(int(bad is not None), dtype=torch.int64, device=self.device))):
            what = "the {} of {}".format(*bad) if bad else "what another rank owns"
            raise TrainingError(f"step {self.step}: {what} is not finite; {self.folder.what_is_left()}")
        if self.quantized < 1:
            self.latents.refresh()  # for the codes of every rank
        stored = self.latents.pack(self.order)
        if self.quantized < 1:
            self.latents.refresh(self.quantized)
        tensors = self.optimizer.state()
        if self.rank == 0:
            arrays = {n: x.detach().cpu().numpy() for n, x in (tensors | machine.random_state(self.device)).items()}
            # What a file must hold is in the checkpoint: derived again on another machine it could differ.
            arrays |= {f"codes/{name}": t.codes for name, t in stored.items()}
            arrays |= {f"scales/{name}": t.scales for name, t in stored.items() if t.scales is not None}
            self.folder.save(arrays, {name: getattr(self, name) for name in RUN_STATE} | {
                "schema": runlog.SCHEMA, "position": self.loader.position, "config": asdict(self.config),
                "data": self.data.identity, "tokenizer": self.data.tokenizer_sha256,
                "source": folder_identity(self.source_sha256), "formats": {n: t.format for n, t in stored.items()},
                "rate": self.rate and self.rate.state(),
            })
        self.ranks.call(dist.barrier)  # among all, who wait long enough for a slow disk; and nobody leaves before it

    def restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Go on from what save() wrote. Raises CheckpointError if that was another run."""
        path = self.folder.checkpoint
        self.folder.check_settings(path, state.get("config"))
        if state.get("data") != self.data.identity:
            raise CheckpointError(f"{path}: made from other data than {self.config.data_path}")
        self.source_changed = state.get("source") != folder_identity(self.source_sha256)
        moved = {name: x for name, x in tensors.items() if name.partition("/")[0] not in ("rng", "codes", "scales")}
        try:
            if self.rate:
                self.rate.restore(state["rate"])
            self.optimizer.load_state(moved, int(state["step"]), float(state["quantized"]))
            machine.set_random_state(tensors, self.device)
            self.loader.position = int(state["position"])
            for name in RUN_STATE:
                setattr(self, name, type(getattr(self, name))(state[name]))
        except (KeyError, ValueError, RuntimeError, TypeError) as e:
            raise CheckpointError(f"{path}: {e!r}; delete it and train again") from None

    # -- training -------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile and prime every shape of the run. Nothing is updated, so there is nothing to undo."""
        began, c, last = time.perf_counter(), self.config, 0.0
        if c.compile:
            self.compile_model()
        for seq_len in sequence_lengths(c):
            passes = c.warmup_steps if self.compiled is self.model else max(c.warmup_steps, 1)
            for _ in range(passes):
                start = time.perf_counter()
                try:
                    self.forward_backward(seq_len, 1)
                except Exception as e:  # compilers, headers, caches and libraries each fail in their own way
                    if self.compiled is self.model:
                        raise
                    self.go_on_without_compiler(e)
                    self.forward_backward(seq_len, 1)
                self.latents.flat_grad.zero_()
                machine.synchronize(self.device)
                last = time.perf_counter() - start
        if self.world > 1:  # wait for the slowest compiler, then open the connections
            self.ranks.call(dist.barrier)
            self.ranks.be_impatient(SILENCE)
            self.latents.reduce()
            self.latents.refresh(self.quantized)
            self.latents.flat_grad.zero_()
            self.optimizer.state()  # what checkpoints gather
            self.ranks.sent = dict.fromkeys(self.ranks.sent, 0)
        self.seconds["compile"] = time.perf_counter() - began
        expect = f"{c.iterations:,}"
        if c.max_wallclock_seconds and last:
            full = last * c.train_batch_tokens / (self.world * self.micro_tokens)
            expect = f"about {min(c.max_wallclock_seconds / full, c.iterations or math.inf):,.0f}"
        self.log.phase("compile", self.seconds["compile"], f", {expect} steps expected")

    def compile_model(self) -> None:
        """Have forward and backward compiled at their first call, if there is a compiler."""
        if not machine.can_compile(self.device):
            self.log.line("notice      no C++ compiler found, so torch.compile is off; training will be slower")
            return
        try:
            machine.prepare_compiler(max(len(sequence_lengths(self.config)), len(self.latents.banks)))
            self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
            if self.device.type == "cuda":  # a CPU does these as fast without
                self.optimizer.compile()
                self.latents.quantize = torch.compile(quantize, dynamic=False)
                self.latents.refresh(self.quantized)
        except Exception as e:
            self.go_on_without_compiler(e)

    def go_on_without_compiler(self, e: Exception) -> None:
        """Use the eager model where compiling it failed, on a CPU. Raises e if it was not the compiler's."""
        if isinstance(e, RankLost | torch.OutOfMemoryError | MemoryError):
            raise e
        why = (" ".join(str(e).split()) or repr(e))[:200]
        if self.device.type == "cuda":  # ten minutes of a GPU are not worth an uncompiled run
            raise TrainingError(f"torch.compile failed ({why}); mend that, or train uncompiled with --compile 0") from e
        self.log.line(f"notice      torch.compile failed ({why}), so it is off; training will be slower (--compile 0 "
                      "leaves it out)")
        self.compiled = self.model
        self.model.zero_grad(set_to_none=True)
        self.latents.flat_grad.zero_()

    def train(self) -> None:
        """Train to the wallclock cap or the number of iterations, whichever comes first."""
        c = self.config
        machine.synchronize(self.device)
        first_step, self.began = self.step, time.perf_counter() - self.elapsed
        while True:
            progress, self.finished, signum = self.progress_and_signal()
            if self.finished:
                break
            if signum:
                raise self.interrupted(signum)
            plan = schedule(c, self.step, progress)
            micro_batches = max(plan.batch_tokens // (self.world * self.micro_tokens), 1)
            self.forward_backward(plan.seq_len, micro_batches)
            self.step += 1
            logged = c.train_log_every > 0 and (self.step <= 10 or self.step % c.train_log_every == 0)
            loss = self.known_loss(plan.seq_len, 0 if logged else self.ahead)  # waits: the clock below is true
            self.optimizer.step(plan.lr_scale, plan.momentum)
            self.quantized = plan.quantized
            zero_frac, churn = self.latents.refresh(self.quantized, measure=logged)
            self.after_step(plan)
            self.count_step(micro_batches * self.world * self.micro_tokens)
            if self.rate and self.quantized == 1:  # may wait for the packer: not a step's time, by which a run ends
                self.log.lines(self.rate.follow(progress, warmdown_share(c, self.step, progress)))
            self.report_step(plan, progress, loss, zero_frac, churn, logged)
            if c.val_loss_every > 0 and self.step % c.val_loss_every == 0:
                self.validate_in_training()
            if c.checkpoint_every > 0 and self.step % c.checkpoint_every == 0:
                self.elapsed = time.perf_counter() - self.began  # the validation is inside the clock
                self.save()
        if self.ahead:
            self.known_loss(0, 0)
            machine.synchronize(self.device)
            self.elapsed = time.perf_counter() - self.began
        self.seconds["train"] = self.elapsed
        if c.max_wallclock_seconds and self.step < c.iterations:
            self.log.line(f"stopping_early: wallclock_cap train_time:{1000 * self.elapsed:.0f}ms "
                          f"step:{self.step}/{c.iterations}")
        self.settle()
        self.check_replicas()
        self.report_memory(max(self.step - first_step, 1))
        self.save()
        self.check_compiled()  # after saving: what was trained is not lost with the packing
        self.log.phase("train", self.seconds["train"], runlog.trained_note(self.step, self.tokens_seen))

    def progress_and_signal(self) -> tuple[float, bool, int]:
        """(progress in [0, 1], whether training is over, a signal's number or 0): rank 0's word, any rank's signal."""
        c, cap = self.config, self.config.max_wallclock_seconds
        self.elapsed = time.perf_counter() - self.began
        by_count = self.step / c.iterations if c.iterations else 0.0
        by_clock = self.elapsed / cap if cap else 0.0
        # The next step, after those that a GPU has not done yet, would end after the cap; the last may be a launch.
        longest = max(self.step_seconds, self.ahead * self.step_before)
        too_late = cap > 0 and self.elapsed + (1 + self.ahead) * longest > cap
        progress, over = min(max(by_count, by_clock), 1.0), too_late or by_count >= 1
        mine = [progress, float(over), self.signals.last] if self.rank == 0 else [0.0, 0.0, self.signals.last]
        progress, over, signum = self.ranks.largest(mine)
        return progress, bool(over), int(signum)

    def interrupted(self, signum: int) -> Exception:
        """Save; what a signal ends the run with."""
        self.save()
        if self.folder.unsaved:
            return TrainingError(f"stopped by signal {signum} after step {self.step}, and {self.folder.unsaved}")
        return Interrupted(signum, f"stopped by signal {signum} after step {self.step}, checkpoint in "
                           f"{self.folder.checkpoint}: the same command with --resume auto continues")

    def forward_backward(self, seq_len: int, micro_batches: int) -> None:
        """Accumulate this rank's share of a step's gradients and loss, which are means, in latents.flat_grad."""
        for micro in range(micro_batches):
            rows = self.micro_tokens // seq_len
            batch = self.loader.batch(rows, seq_len, micro, self.rank, self.world)
            loss = self.compiled(*(machine.to_device(x, self.device) for x in batch))
            loss.backward()
            self.latents.accumulate(loss, micro_batches * self.world, first=micro == 0)

    def known_loss(self, seq_len: int, ahead: int) -> float:
        """The last loss that is known when the host may be so many steps ahead of the device; asks for this step's, if
        it has a length. Raises TrainingError if one that comes, or its gradient, is not finite."""
        if seq_len:
            self.asked.append((self.step, seq_len, machine.Fetch(self.latents.loss_word())))
        while len(self.asked) > ahead:
            step, seq_len, word = self.asked.pop(0)
            self.loss, gradients = word.numbers()
            if not (math.isfinite(self.loss) and math.isfinite(gradients)):
                raise self.diverged(step, seq_len)
        return self.loss

    def count_step(self, tokens: int) -> None:
        """Take the step's tokens and time into account."""
        self.step_tokens = tokens
        self.loader.position += tokens
        self.tokens_seen += tokens
        now = time.perf_counter() - self.began
        self.step_before, self.step_seconds, self.elapsed = self.step_seconds, now - self.elapsed, now

    def after_step(self, plan: StepPlan) -> None:
        """Nothing: the hook for techniques that act on latents once the params are refreshed (ablations/patches.py)."""

    def report_step(self, plan: StepPlan, progress: float, loss: float, zero_frac: float, churn: float,
                    logged: bool) -> None:
        """The bar, and every now and then the log line and the record of a step."""
        step = runlog.Step(self.step, loss, self.elapsed, self.step_seconds, self.step_tokens, self.tokens_seen,
                           zero_frac, churn, plan.lr_scale, plan.momentum, plan.seq_len)
        if logged:
            self.log.line(runlog.step_line(step, self.header.settings), console=not self.log.on_terminal())
            self.log.record(step)
        self.log.bar(runlog.progress_bar(step, progress, self.header.settings))

    def validate_in_training(self) -> None:
        score = self.validate(max(self.config.val_batch_size // (self.world * self.config.score_len), 1))
        found = runlog.Validation(self.step, self.elapsed, **asdict(score))
        self.log.line(runlog.validation_line(found, self.header.settings))
        self.log.record(found)

    def validate(self, batch_seqs: int) -> metric.Score:
        """Chunked score of the model in memory."""
        seq_len = self.config.score_len
        with self.ranks.naming_failures():
            return evaluate(self.model, self.val_tokens, self.counter, seq_len, seq_len, batch_seqs)

    def settle(self) -> None:
        """After the last step: what is packed is quantized all the way, whatever the schedule was."""
        if self.quantized < 1:
            self.quantized = 1.0
            self.latents.refresh()
        if self.rate:
            scales = groups.decode_scales(self.latents.stored(self.embedding).scales[0], self.config.scale_dtype)
            self.log.lines(self.rate.trim(scales.mean(-1), self.latents.refresh))

    def control_rate(self, fmt: Int) -> RateControl:
        """What sets the steps of the embedding, whose format is fmt, from now on."""
        cap = (c := self.config).cap_bytes - (source.code_bytes(self.sources) if c.cap_counts_code else 0)
        rate = RateControl(c, cap, 2 ** (fmt.bits - 1) - 1, self.loader.stream.counts(), self.embedding.grad.numel(),
                           self.ranks, lambda: self.latents.pack(self.order),
                           lambda model: len(pack.encode_artifact(model, artifact_meta(c, self.data))), self.device)
        self.embedding.format = replace(fmt, steps=rate.steps)
        return rate

    # -- checks of what was trained -------------------------------------------------------------------------------

    def diverged(self, step: int, seq_len: int) -> TrainingError:
        """The error of a step whose loss or gradient is not finite: it names the first bad tensor, and what is left."""
        bad, first = self.latents.first_non_finite(self.order), "the sum of the gradients, or another rank's,"
        if bad is not None:
            first = "the {} of {}".format(*bad)
        if bad is None or bad[0] == "gradient":  # a bad activation makes all gradients bad
            ids, targets = self.loader.batch(1, seq_len, 0, self.rank, self.world)
            module = first_bad_output(self.model, ids.to(self.device), targets.to(self.device))
            if module is not None:
                first = f"the output of {module or 'the model'}"
        return TrainingError(f"step {step}: {first} is not finite (loss {self.loss}); "
                             f"{self.folder.what_is_left()}; lower the learning rates or check the data")

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

    def check_replicas(self) -> None:
        """Every rank must hold the same model: compare sha256 of all params."""
        self.replica_sha256, differ = self.ranks.same_bits(self.model.parameters())
        if differ:
            raise TrainingError(f"step {self.step}: ranks {differ} hold other bits than rank 0; train again, report it")
        if self.world > 1:
            self.log.line(f"replicas    {self.world} ranks hold identical params ({self.replica_sha256[:16]})")

    def report_memory(self, steps: int) -> None:
        """Bytes of state on each rank, and what the optimizer sent in a step. Collective."""
        held = sum(p.nbytes for p in self.model.parameters()) + self.optimizer.bytes_held()
        table = torch.zeros(self.world, 3, dtype=torch.int64, device=self.device)
        table[self.rank] = torch.tensor([held, *(sent // steps for sent in self.ranks.sent.values())])
        state, gradients, codes = self.ranks.sum(table).T.tolist()
        memory = runlog.Memory(state, gradients, codes, self.latents.wire_bytes_per_ternary_weight())
        self.log.lines(runlog.memory_lines(memory))
        self.log.record(memory)

    # -- pack and score -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Score in memory, pack, score the file in a fresh process, print the final block.

        Raises AuditError if the file is not the model, TrainingError if something beside it could not be written.
        """
        c, artifact, said = self.config, self.folder.artifact, self.header.settings
        began = time.perf_counter()
        memory = self.validate(c.eval_batch_seqs)
        if dist.is_initialized():  # the others have nothing left to do; the scoring processes form their own group
            dist.destroy_process_group()
        if self.rank:
            return
        memory_seconds = time.perf_counter() - began

        began = time.perf_counter()
        bytes_model = pack.write_artifact(artifact, self.latents.pack(self.order), artifact_meta(c, self.data))
        self.seconds["pack"] = time.perf_counter() - began
        self.log.lines(runlog.size_lines(bytes_model, self.bytes_code))
        self.log.phase("pack", self.seconds["pack"])

        began = time.perf_counter()
        loaded = model_from_stored(*pack.read_artifact(artifact)).to(self.device).eval()
        same = metric.same_logits(self.model, loaded, self.val_tokens[: 4 * c.score_len])
        scored = self.score_file(artifact)
        self.seconds["score"] = memory_seconds + time.perf_counter() - began
        self.log.phase("score", self.seconds["score"])
        gap = scored["chunked"]["val_bpb"] - memory.val_bpb
        size = pack.Budget(bytes_model, self.bytes_code, c.cap_bytes, c.cap_counts_code)
        final = runlog.Final(self.step, self.tokens_seen, asdict(memory), scored, gap, same, self.seconds, bytes_model,
                             self.bytes_code, size.total, c.cap_bytes, size.fits, scored["artifact"]["sha256"],
                             self.replica_sha256)
        self.log.lines([*runlog.score_lines(final, said), f"{'=' * 20} result {'=' * 20}",
                        *runlog.result_lines(final, said, str(artifact))])
        self.log.record(final)
        if not same or gap != 0.0:
            raise AuditError(f"{artifact} is not the model that was trained: gap {gap:+.8f}, logits "
                             f"{'identical' if same else 'differ'}; copy its folder, report it, and train again")
        if unwritten := self.folder.unsaved or self.log.failed:
            raise TrainingError(f"{unwritten}; {artifact} and its score are there and whole")

    def score_file(self, artifact: Path) -> dict:
        """Run eval_bpb on the file, on as many processes as trained it here, and return its JSON."""
        c = self.config
        options = ["--data", c.data_path, "--stride", str(c.eval_stride), "--batch-seqs", str(c.eval_batch_seqs),
                   "--tokenizer-path", c.tokenizer_path]
        no_gpu = {} if self.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        env = {"OMP_NUM_THREADS": str(torch.get_num_threads())} | no_gpu
        return score_in_fresh_process(scoring_command(), artifact, options, self.place.local_world, env,
                                      self.data.hashes, self.log.line)


# ---------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------


def resolve_settings(argv: list[str], env: Mapping[str, str]) -> tuple[str, Config, dict[str, str], list[str]]:
    """(preset, settings, where each came from, notices). Raises ConfigError; argparse exits on an unknown flag."""
    default = "pr367" if torch.cuda.is_available() else "cpu"
    preset, config, origin = settings.resolve(Config, PRESETS, default, (__doc__ or "").split("\n\n")[0], argv, env)
    config = replace(config, run_id=config.run_id or f"{preset}_seed{config.seed}")
    slides = config.eval_stride < config.score_len  # a stride of 0 is a chunked score that was asked for
    whole = [] if slides else [f"eval_stride={config.eval_stride} is a whole window: no score slides, both are chunked"]
    return preset, config, origin, foreign.check_foreign(env) + whole


def main(argv: list[str] | None = None) -> int:
    steady_streams()
    return processes.end_process(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Train, pack and score as the settings say; the exit status."""
    trainer, place = None, Place()
    try:
        preset, config, origin, notices = resolve_settings(argv, os.environ)
        place = processes.process_place(os.environ)
        notices += machine.writable_compiler_cache()
        torch.set_num_threads(config.threads or max(1, machine.cores() // place.local_world))
        trainer = Trainer(preset, config, place)
        trainer.folder.look()
        machine.prepare_device(trainer.device)
        machine.compute_deterministically(trainer.device)
        if place.world > 1:
            processes.join_group(place, "nccl" if trainer.device.type == "cuda" else "gloo")
        trainer.signals.note()
        trainer.set_up()
        trainer.preflight(origin, notices)
        trainer.warm_up()
        trainer.train()
        trainer.signals.interrupt("after training: the same command with --resume auto packs and scores")
        trainer.finish()
        return end_well(place, trainer.folder)
    except (Exception, KeyboardInterrupt) as e:
        return report_end(e, place, trainer.folder if trainer is not None else None)
    finally:
        if trainer is not None:
            trainer.folder.close()
        processes.leave_group()


if __name__ == "__main__":
    sys.exit(main())
