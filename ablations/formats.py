"""Storage formats: latent -> stored -> param. The only code that quantizes or dequantizes.

    latent (fp32, the optimizer's) --quantize--> stored (codes + scales, the file's) --dequantize--> param (bf16)

A format is a small frozen class with `quantize`, `dequantize` and `spec`, what a file says of it. Every format treats
stacked tensors [.., rows, cols] as it treats each of them alone. Two formats learn something beside the latent (an
elastic scale, a codebook): `start` makes that state and `learn` moves it, in closed form, once per step.

Formats, by the names of the settings matrix_format and embed_format:

    ternary      codes in {-1, 0, 1} times a scale per group; the setting ternary_rule says how they are found
    binary       codes in {-1, 1}, scale mean|w| (XNOR-Net, arXiv 1603.05279)
    five         codes in {-2 .. 2}
    int2..int8   symmetric integers, scale max|w| / largest code
    codebookK    K learned values per group
    fp8, bf16, fp16
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import pack


@dataclass(frozen=True)
class Stored:
    """What the file holds of a tensor: codes in its shape, and scales [.., rows, groups] or None."""

    codes: Tensor
    scales: Tensor | None


State = dict[str, Tensor]  # what a format learns beside a latent, fp32; most have nothing


# ---------------------------------------------------------------------------------------------------------------
# Scales and groups
# ---------------------------------------------------------------------------------------------------------------

# dtype, and smallest scale of a group that is not zero (bf16: the smallest normal, which no device flushes to zero)
FLOAT_DTYPES = {"bf16": (torch.bfloat16, 2.0**-126), "fp16": (torch.float16, 2.0**-24)}
VALUE_DTYPES = {n: dtype for n, (dtype, _) in FLOAT_DTYPES.items()} | {"fp8": torch.float8_e4m3fn}


def log_table(bits: int) -> Tensor:
    """The scales that the codes of log<bits> stand for, fp32 [2^bits]: 16 octaves of 2^(bits - 4) steps from 2^-12.

    Code 0 is a zero group. Code c is 2^(c / 2^(bits-4) - 12) with its mantissa rounded to bf16's 7 bits, so that the
    table is exact in bf16 and the same on every machine.
    """
    steps = 2 ** (bits - 4)
    values = [2.0 ** (c // steps - 12) * (1 + round(128 * (2 ** (c % steps / steps) - 1)) / 128)
              for c in range(2**bits)]
    return torch.tensor([0.0] + values[1:])


LOG_TABLES = {f"log{bits}": log_table(bits) for bits in range(4, 9)}
SCALE_DTYPES = (*FLOAT_DTYPES, *LOG_TABLES)


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


def encode_scales(scales: Tensor, nonzero: Tensor, dtype: str) -> Tensor:
    """Scales as they are stored: zero exactly for zero groups, never rounded to zero or infinity for the others.

    bf16 and fp16 are the values; log4 to log8 are uint8 codes, the nearest by ratio.
    """
    if dtype in LOG_TABLES:
        steps = len(LOG_TABLES[dtype]) // 16
        codes = ((scales.clamp(min=2.0**-126).log2() + 12) * steps).round().clamp(1, 16 * steps - 1)
        return torch.where(nonzero, codes, 0.0).to(torch.uint8)
    kind, smallest = FLOAT_DTYPES[dtype]
    return torch.where(nonzero, scales.clamp(smallest, torch.finfo(kind).max), 0.0).to(kind)


def decode_scales(stored: Tensor, dtype: str) -> Tensor:
    """The fp32 values of stored scales."""
    return LOG_TABLES[dtype].to(stored.device)[stored.long()] if dtype in LOG_TABLES else stored.float()


# ---------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------


class Format:
    """What every format has."""

    kind: str  # of the file (docs/format.md)

    def start(self, latent: Tensor) -> State:
        """The state of a new latent [n, .., cols]; every tensor of it is stacked like the latent."""
        return {}

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        """latent: fp32 [.., rows, cols] or [cols] -> codes of its shape, scales [.., rows, groups] or None."""
        raise NotImplementedError

    def dequantize(self, stored: Stored) -> Tensor:
        """Param, bf16, in the codes' shape."""
        raise NotImplementedError

    def learn(self, latent: Tensor, grad: Tensor, state: State, lr_scale: float, quantized: float = 1.0) -> None:
        """Before each update of the latent: move the state, and turn the gradient of the param, in place, into that of
        the latent. The straight-through estimator (arXiv 1308.3432) leaves it as it is. quantized: how far the param
        is on the way from the latent to the stored value; at 0 it is the latent, and so is its gradient."""

    def spec(self) -> dict:
        """The format as a file and pack.py know it."""
        return {"kind": self.kind} | asdict(self)


class GroupFormat(Format):
    """Formats of codes times a scale per group."""

    group_size: int
    scale: str

    def __post_init__(self):
        if self.scale not in SCALE_DTYPES or self.group_size < 0:
            raise ConfigError(f"{self}: scale one of {', '.join(SCALE_DTYPES)} and group_size >= 0 are needed")

    def dequantize(self, stored: Stored) -> Tensor:
        """codes * scale, computed in fp32 and rounded once."""
        codes, _ = split_groups(stored.codes.float(), self.group_size)
        param = codes * decode_scales(stored.scales, self.scale)[..., None]
        return join_groups(param, stored.codes.shape).bfloat16()

    def store(self, codes: Tensor, scales: Tensor, nonzero: Tensor, shape: torch.Size) -> Stored:
        """codes [.., rows, groups, size] and exact scales [.., rows, groups] as they are stored."""
        return Stored(join_groups(codes.to(torch.int8), shape), encode_scales(scales, nonzero, self.scale))


@dataclass(frozen=True)
class Ternary(GroupFormat):
    """Codes in {-1, 0, 1} and one scale per group, stored as `scale`: bf16, fp16 or log4 to log8.

    A code is 0 where |w| <= threshold * measure, else sign(w). Rules, with the measure and the scale of each:
    absmean: mean|w| both. With threshold 0.5 this is RoundClip(w / mean|w|, -1, 1) of BitNet b1.58 (arXiv 2402.17764,
        section 2).
    lsq: mean|w|; the scale is the mean of |w| over the codes that are not 0, which makes the squared error of these
        codes least (TWN, arXiv 1605.04711, equations 4 and 6, with threshold 0.7).
    rms: sqrt(mean w^2) both (PR 920).
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
        if self.rule not in ("absmean", "lsq", "rms") or not self.threshold >= 0:
            raise ConfigError(f"{self}: rule absmean, lsq or rms and threshold >= 0 are needed")

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        w, sizes = split_groups(latent.float(), self.group_size)
        magnitude = w.abs()
        mean = magnitude.sum(-1, keepdim=True) / sizes
        if self.rule == "rms":
            biggest = magnitude.amax(-1, keepdim=True).clamp(min=2.0**-126)  # so that no square is lost
            mean = ((w / biggest).square().sum(-1, keepdim=True) / sizes).sqrt() * biggest
        kept = magnitude > self.threshold * mean
        scale, nonzero = mean[..., 0], magnitude.amax(-1) > 0
        if self.rule == "lsq":
            scale, nonzero = (magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1), kept.any(-1)
        return self.store(w.sign() * kept, scale, nonzero, latent.shape)


@dataclass(frozen=True)
class ElasticTernary(GroupFormat):
    """ParetoQ's stretched elastic ternary (arXiv 2502.02631, equations 3 to 5; StretchedElasticQuant of its code).

    code = round(1.5 clip(w / alpha, -0.99, 0.99)), value = 2/3 alpha code, so a code is 0 up to alpha / 3. alpha is
    learned for each group: here as 1.5 mean|w| 2^theta, which at theta = 0 is the absmean rule and follows the norm of
    the latents, that Muon lets grow; theta moves by Adam (arXiv 1412.6980) at LR. Weights beyond alpha get no gradient.
    """

    group_size: int = 128
    scale: str = "bf16"
    rule: str = "elastic"
    kind = "ternary"
    CLIP, LR, BETA1, BETA2 = 0.99, 0.01, 0.9, 0.95

    def start(self, latent: Tensor) -> State:
        w, _ = split_groups(latent, self.group_size)
        state = {name: latent.new_zeros(w.shape[:-1]) for name in ("theta", "theta_mean", "theta_square")}
        return state | {"theta_steps": latent.new_zeros(len(latent))}

    def ratio(self, latent: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """(w / alpha [.., rows, groups, size], alpha [.., rows, groups, 1]), 0 where a group is zero."""
        w, sizes = split_groups(latent.float(), self.group_size)
        alpha = 1.5 * w.abs().sum(-1, keepdim=True) / sizes * state["theta"][..., None].exp2()
        return w / torch.where(alpha > 0, alpha, 1.0), alpha

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        """state None: theta = 0."""
        ratio, alpha = self.ratio(latent, state or {"theta": torch.zeros(())})
        codes = (1.5 * ratio.clamp(-self.CLIP, self.CLIP)).round()
        return self.store(codes, alpha[..., 0] * (2 / 3), alpha[..., 0] > 0, latent.shape)

    def learn(self, latent: Tensor, grad: Tensor, state: State, lr_scale: float, quantized: float = 1.0) -> None:
        if not quantized:
            return
        ratio, alpha = self.ratio(latent, state)
        inside = ratio.abs() <= self.CLIP
        level = (1.5 * ratio.clamp(-self.CLIP, self.CLIP)).round() / 1.5
        slope = torch.where(inside, level - ratio, level)  # of the value, by alpha
        g = (split_groups(grad, self.group_size)[0] * slope).sum(-1) * alpha[..., 0] * (math.log(2) * quantized)
        grad.mul_(join_groups(torch.where(inside, 1.0, 1.0 - quantized), latent.shape))
        state["theta_steps"] += 1
        steps = state["theta_steps"].view(-1, *[1] * (g.ndim - 1))
        mean = state["theta_mean"].lerp_(g, 1 - self.BETA1) / (1 - self.BETA1**steps)
        square = state["theta_square"].lerp_(g.square(), 1 - self.BETA2) / (1 - self.BETA2**steps)
        state["theta"] -= lr_scale * self.LR * mean / (square.sqrt() + 1e-20)


@dataclass(frozen=True)
class Binary(GroupFormat):
    """Codes in {-1, 1}, the sign (of 0: 1), and scale mean|w|, the least-squares one (XNOR-Net, arXiv 1603.05279)."""

    group_size: int = 128
    scale: str = "bf16"
    kind = "binary"

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        w, sizes = split_groups(latent.float(), self.group_size)
        mean = w.abs().sum(-1) / sizes[:, 0]
        return self.store(torch.where(w < 0, -1, 1), mean, mean > 0, latent.shape)


@dataclass(frozen=True)
class Five(GroupFormat):
    """Codes in {-2 .. 2}: round(w / scale), clipped, with scale = 1.057 mean|w|.

    That is the step of least squared error for five uniform levels and Gaussian weights: 0.843 standard deviations (Max
    1960, "Quantizing for minimum distortion", table II), of which mean|w| is 0.798.
    """

    group_size: int = 128
    scale: str = "bf16"
    kind = "five"
    STEP = 1.057

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        w, sizes = split_groups(latent.float(), self.group_size)
        step = self.STEP * w.abs().sum(-1, keepdim=True) / sizes
        codes = (w / torch.where(step > 0, step, 1.0)).round().clamp(-2, 2)
        return self.store(codes, step[..., 0], step[..., 0] > 0, latent.shape)


@dataclass(frozen=True)
class Int(GroupFormat):
    """Symmetric integers of 2 to 8 bits: scale = max|w| / (2^(bits-1) - 1), code = round(w / scale)."""

    bits: int = 8
    group_size: int = 128
    scale: str = "bf16"
    kind = "int"

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"{self}: 2 to 8 bits are needed")

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        """Codes are rounded against the stored scale: the one that they will be multiplied by."""
        w, _ = split_groups(latent.float(), self.group_size)
        limit = 2 ** (self.bits - 1) - 1
        biggest = w.abs().amax(-1)
        scales = encode_scales(biggest / limit, biggest > 0, self.scale)
        values = decode_scales(scales, self.scale)[..., None]
        divisor = torch.where(values > 0, values, 1.0)
        codes = (w / divisor).round().clamp(-limit, limit).to(torch.int8)
        return Stored(join_groups(codes, latent.shape), scales)


@dataclass(frozen=True)
class Codebook(Format):
    """`entries` learned values per group, each weight the nearest of them (NativeBit, as the field notes give it).

    The codebook follows the weights by exponential averages, the canonical ones of VQ-VAE (arXiv 1711.00937, appendix
    A.1): N <- d N + (1 - d) n, s <- d s + (1 - d) sum w, e = s / N, where an entry without weights stays as it is; and
    the weights follow the codebook by the gradient of commitment * sum (w - Q(w))^2.

    code = index of the entry - entries // 2, int8. Stored.scales are the entries, bf16 [.., rows, groups * entries].
    """

    entries: int = 4
    group_size: int = 128
    decay: float = 0.99
    commitment: float = 0.0
    kind = "codebook"

    def __post_init__(self):
        if not 2 <= self.entries <= 64 or self.group_size < 0 or not 0 <= self.decay < 1 or not self.commitment >= 0:
            raise ConfigError(f"{self}: 2 to 64 entries, group_size >= 0, decay in [0, 1), commitment >= 0 are needed")

    def start(self, latent: Tensor) -> State:
        """Entries at the quantiles of each group, each counting for one weight."""
        w, sizes = split_groups(latent, self.group_size)
        at = (torch.arange(self.entries, device=latent.device) + 0.5) / self.entries
        values = w.masked_fill(~self.present(w, sizes), math.inf).sort(-1).values  # the padding comes last
        index = (at * sizes).long().expand(*w.shape[:-1], -1)
        entries = values.gather(-1, index)
        return {"count": torch.ones_like(entries), "sum": entries.clone(), "codebook": entries}

    @staticmethod
    def present(w: Tensor, sizes: Tensor) -> Tensor:
        """Which of grouped weights [.., groups, size] are no padding."""
        return (torch.arange(w.shape[-1], device=w.device) < sizes).expand(w.shape)

    def nearest(self, w: Tensor, codebook: Tensor) -> Tensor:
        """Index of the entry [.., groups, entries] that is nearest to each of grouped weights; of equals the first."""
        best, index = (w - codebook[..., :1]).abs(), torch.zeros_like(w, dtype=torch.int64)
        for k in range(1, self.entries):  # one entry at a time: all at once would be `entries` times the memory
            distance = (w - codebook[..., k : k + 1]).abs()
            index, best = torch.where(distance < best, k, index), torch.minimum(distance, best)
        return index

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        """state None: as at the start. Entries are rounded first: a weight gets the nearest of those in the file."""
        w, _ = split_groups(latent.float(), self.group_size)
        stored = (state or self.start(latent))["codebook"].bfloat16()
        index = self.nearest(w, stored.float())
        return Stored(join_groups((index - self.entries // 2).to(torch.int8), latent.shape), stored.flatten(-2))

    def dequantize(self, stored: Stored) -> Tensor:
        index, _ = split_groups(stored.codes.long() + self.entries // 2, self.group_size)
        entries = stored.scales.reshape(*index.shape[:-1], self.entries)
        return join_groups(entries.gather(-1, index), stored.codes.shape).bfloat16()

    def learn(self, latent: Tensor, grad: Tensor, state: State, lr_scale: float, quantized: float = 1.0) -> None:
        w, sizes = split_groups(latent, self.group_size)
        flat = state["codebook"].amax(-1) == state["codebook"].amin(-1)
        if bool(flat.any()):  # a latent that began as zeros: start when it has become something
            for name, fresh in self.start(latent).items():
                state[name][flat] = fresh[flat]
        stored = self.quantize(latent, state)
        index, present = self.nearest(w, state["codebook"].bfloat16().float()), self.present(w, sizes)
        for k in range(self.entries):
            mine = (index == k) & present
            n, total = mine.sum(-1), (w * mine).sum(-1)
            for name, new in (("count", n), ("sum", total)):
                old = state[name][..., k]
                state[name][..., k] = torch.where(n > 0, self.decay * old + (1 - self.decay) * new, old)
        state["codebook"].copy_(state["sum"] / state["count"])
        if self.commitment:
            grad.add_(latent - self.dequantize(stored).float(), alpha=2 * self.commitment * quantized)

    def commitment_loss(self, latent: Tensor, state: State) -> float:
        """commitment * sum (w - Q(w))^2, whose gradient learn adds."""
        param = self.dequantize(self.quantize(latent, state)).float()
        return self.commitment * float((latent - param).square().sum())


@dataclass(frozen=True)
class Float(Format):
    """Floats of 16 bits, or of 8 (e4m3, arXiv 2209.05433: 8 steps per octave, up to 448); the codes are the values."""

    dtype: str = "bf16"

    def __post_init__(self):
        if self.dtype not in VALUE_DTYPES:
            raise ConfigError(f"unknown kind {self.dtype!r}: use one of {', '.join(VALUE_DTYPES)}")

    def quantize(self, latent: Tensor, state: State | None = None) -> Stored:
        if self.dtype == "fp8":  # the conversion does not saturate
            latent = latent.clamp(-448.0, 448.0)
        return Stored(latent.to(VALUE_DTYPES[self.dtype]), None)

    def dequantize(self, stored: Stored) -> Tensor:
        return stored.codes.bfloat16()

    @property
    def kind(self) -> str:
        return self.dtype

    def spec(self) -> dict:
        return {"kind": self.dtype}


def from_spec(spec: dict) -> Format:
    """The format that a file names. Raises ConfigError on one that is not known."""
    settings = dict(spec)
    kind = settings.pop("kind")
    known: dict[str, Callable[..., Format]] = {
        "ternary": ElasticTernary if settings.get("rule") == "elastic" else Ternary,
        "binary": Binary, "five": Five, "int": Int, "codebook": Codebook}
    try:
        return known.get(kind, functools.partial(Float, kind))(**settings)
    except TypeError as e:
        raise ConfigError(f"storage format {spec}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------
# Stored tensors in a file, and on the wire between processes
# ---------------------------------------------------------------------------------------------------------------


def to_pack(stored: Stored, fmt: Format) -> pack.StoredTensor:
    """A tensor as pack.py writes it: 16-bit floats become their bit patterns."""
    def bits(x: Tensor) -> np.ndarray:
        x = x.detach().cpu().contiguous()
        return x.numpy() if not x.is_floating_point() else x.view(getattr(torch, f"uint{8 * x.itemsize}")).numpy()

    scales = None if stored.scales is None else bits(stored.scales).reshape(-1, stored.scales.shape[-1])
    return pack.StoredTensor(tuple(stored.codes.shape), fmt.spec(), bits(stored.codes), scales)


def from_pack(tensor: pack.StoredTensor) -> tuple[Stored, Format]:
    """The inverse of to_pack. Raises ConfigError on a format that this trainer does not know."""
    fmt = from_spec(tensor.format)

    def values(array: np.ndarray, dtype: str) -> Tensor:
        x = torch.from_numpy(array.copy())
        return x.view(VALUE_DTYPES[dtype]) if dtype in VALUE_DTYPES else x

    codes = values(tensor.codes, tensor.format["kind"])
    scales = None if tensor.scales is None else values(tensor.scales, tensor.format.get("scale", "bf16"))
    return Stored(codes, scales), fmt


def to_wire(stored: Stored, fmt: Format) -> Tensor:
    """uint8 [bytes] that an owner sends: ternary codes five to a byte (as pack.pack_base3), others and scales as is."""
    codes = stored.codes.flatten()
    if fmt.kind == "ternary":
        digits = F.pad((codes + 1).to(torch.uint8), (0, -len(codes) % 5)).view(-1, 5)
        codes = sum(3**i * digits[:, i] for i in range(5))
    parts = [codes] if stored.scales is None else [codes, stored.scales.flatten()]
    return torch.cat([x.view(torch.uint8) for x in parts])


@functools.cache
def trits(device: torch.device) -> Tensor:
    """Byte -> its five codes, int8 [243, 5]."""
    rows = [[byte // 3**i % 3 - 1 for i in range(5)] for byte in range(3**5)]
    return torch.tensor(rows, dtype=torch.int8, device=device)


def from_wire(data: Tensor, fmt: Format, like: Stored) -> Stored:
    """The inverse of to_wire; like has the shapes and dtypes. data may be longer."""
    count, ternary = like.codes.numel(), fmt.kind == "ternary"
    size = -(-count // 5) if ternary else like.codes.nbytes
    end = size + (0 if like.scales is None else like.scales.nbytes)
    codes, scales = data[:size].clone(), data[size:end].clone()  # clones: a 16-bit view needs an even address
    codes = trits(data.device)[codes.int()].flatten()[:count] if ternary else codes.view(like.codes.dtype)
    scales = None if like.scales is None else scales.view(like.scales.dtype).view(like.scales.shape)
    return Stored(codes.view(like.codes.shape), scales)
