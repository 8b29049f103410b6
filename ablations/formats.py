"""Storage formats and ternary rules that lost (LOG.md), kept so that their runs can be made again.

    --ternary-rule lsq | rms
    --matrix-format, --embed-format  binary | five | elastic | codebookK      (K values per group, 2 to 64)

`register` adds them to the trainer's tables. Two of them learn something beside the latent, an elastic scale or a
codebook, which moves in closed form once per step; they work in one process only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import train_gpt
from ablations import hooks
from tern import checkpoints
from tern.groups import join_groups, split_groups
from tern.settings import ConfigError, need
from train_gpt import Config, Format, GroupFormat, Latents, Optimizer, Stored

State = dict[str, Tensor]  # what a format learns, fp32

# ---------------------------------------------------------------------------------------------------------------
# Rules of ternary: which weights are not 0, and the scale, as train_gpt.absmean
# ---------------------------------------------------------------------------------------------------------------


def lsq(w: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Codes as those of absmean; the scale is the mean of |w| over the codes that are not 0, which makes the squared
    error of these codes least (TWN, arXiv 1605.04711, equations 4 and 6, with threshold 0.7)."""
    live, _ = train_gpt.absmean(w, sizes, threshold)
    return live, (w.abs() * live).sum(-1) / live.sum(-1).clamp(min=1)


def rms(w: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """sqrt(mean w^2) in place of mean|w|, for the threshold and the scale (PR 920)."""
    magnitude = w.abs()
    biggest = magnitude.amax(-1, keepdim=True).clamp(min=2.0**-126)  # so that no square is lost
    measure = ((w / biggest).square().sum(-1, keepdim=True) / sizes).sqrt() * biggest
    return magnitude > threshold * measure, measure[..., 0]


# ---------------------------------------------------------------------------------------------------------------
# Formats that are functions of the latent
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binary(GroupFormat):
    """Codes in {-1, 1}, the sign (of 0: 1), and scale mean|w|, the least-squares one (XNOR-Net, arXiv 1603.05279)."""

    group_size: int = 128
    scale: str = "bf16"
    kind = "binary"

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        return cls(config.group_size, config.scale_dtype)

    def quantize(self, latent: Tensor) -> Stored:
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

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        return cls(config.group_size, config.scale_dtype)

    def quantize(self, latent: Tensor) -> Stored:
        w, sizes = split_groups(latent.float(), self.group_size)
        step = self.STEP * w.abs().sum(-1, keepdim=True) / sizes
        codes = (w / torch.where(step > 0, step, 1.0)).round().clamp(-2, 2)
        return self.store(codes, step[..., 0], step[..., 0] > 0, latent.shape)


# ---------------------------------------------------------------------------------------------------------------
# Formats that learn
# ---------------------------------------------------------------------------------------------------------------


class Learner(Format):
    """A format that learns `state` beside the latents [n, .., cols] of the one bank that it belongs to."""

    state: State | None = None  # None: as at the start

    def start(self, latent: Tensor) -> State:
        """The state of a new latent; every tensor of it is stacked like the latent, [n, ..]."""
        raise NotImplementedError

    def learn(self, latent: Tensor, grad: Tensor, lr_scale: float, quantized: float = 1.0) -> None:
        """Before each update of the latent: move the state, and turn the gradient of the param, in place, into that of
        the latent. quantized: how far the param is on the way from the latent to the stored value; at 0 it is the
        latent, and so is its gradient."""
        raise NotImplementedError


@dataclass
class Elastic(Learner, GroupFormat):
    """ParetoQ's stretched elastic ternary (arXiv 2502.02631, equations 3 to 5; StretchedElasticQuant of its code).

    code = round(1.5 clip(w / alpha, -0.99, 0.99)), value = 2/3 alpha code, so a code is 0 up to alpha / 3. alpha is
    learned for each group: here as 1.5 mean|w| 2^theta, which at theta = 0 is the absmean rule and follows the norm of
    the latents, that Muon lets grow; theta moves by Adam (arXiv 1412.6980) at LR. Weights beyond alpha get no gradient.
    """

    group_size: int = 128
    scale: str = "bf16"
    rule: str = "elastic"  # of the kind ternary, in the file
    kind = "ternary"
    CLIP, LR, BETA1, BETA2 = 0.99, 0.01, 0.9, 0.95

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        need(config.threshold == 0.5, config, "threshold", "elastic has none: its thresholds follow its scales")
        return cls(config.group_size, config.scale_dtype)

    def start(self, latent: Tensor) -> State:
        w, _ = split_groups(latent, self.group_size)
        state = {name: latent.new_zeros(w.shape[:-1]) for name in ("theta", "theta_mean", "theta_square")}
        return state | {"theta_steps": latent.new_zeros(len(latent))}

    def ratio(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(w / alpha [.., rows, groups, size], alpha [.., rows, groups, 1]), 0 where a group is zero."""
        w, sizes = split_groups(latent.float(), self.group_size)
        alpha = 1.5 * w.abs().sum(-1, keepdim=True) / sizes
        if self.state is not None:
            alpha = alpha * self.state["theta"][..., None].exp2()
        return w / torch.where(alpha > 0, alpha, 1.0), alpha

    def quantize(self, latent: Tensor) -> Stored:
        ratio, alpha = self.ratio(latent)
        codes = (1.5 * ratio.clamp(-self.CLIP, self.CLIP)).round()
        return self.store(codes, alpha[..., 0] * (2 / 3), alpha[..., 0] > 0, latent.shape)

    def learn(self, latent: Tensor, grad: Tensor, lr_scale: float, quantized: float = 1.0) -> None:
        if not quantized:
            return
        ratio, alpha = self.ratio(latent)
        inside = ratio.abs() <= self.CLIP
        level = (1.5 * ratio.clamp(-self.CLIP, self.CLIP)).round() / 1.5
        slope = torch.where(inside, level - ratio, level)  # of the value, by alpha
        g = (split_groups(grad, self.group_size)[0] * slope).sum(-1) * alpha[..., 0] * (math.log(2) * quantized)
        grad.mul_(join_groups(torch.where(inside, 1.0, 1.0 - quantized), latent.shape))
        state = self.state
        state["theta_steps"] += 1
        steps = state["theta_steps"].view(-1, *[1] * (g.ndim - 1))
        mean = state["theta_mean"].lerp_(g, 1 - self.BETA1) / (1 - self.BETA1**steps)
        square = state["theta_square"].lerp_(g.square(), 1 - self.BETA2) / (1 - self.BETA2**steps)
        state["theta"] -= lr_scale * self.LR * mean / (square.sqrt() + 1e-20)


@dataclass
class Codebook(Learner):
    """`entries` learned values per group, each weight the nearest of them (NativeBit, as the field notes give it).

    The codebook follows the weights by exponential averages, the canonical ones of VQ-VAE (arXiv 1711.00937, appendix
    A.1): N <- d N + (1 - d) n, s <- d s + (1 - d) sum w, e = s / N, where an entry without weights stays as it is; and
    the weights follow the codebook by the gradient of commitment * sum (w - Q(w))^2.

    code = index of the entry - entries // 2, int8. Stored.scales are the entries, bf16 [.., rows, groups * entries].
    The patch "codebook=DECAY,COMMITMENT" (patches.py) sets the two.
    """

    entries: int = 4
    group_size: int = 128
    decay: float = 0.99
    commitment: float = 0.0
    kind = "codebook"
    numbered = True  # codebook4
    DECAY, COMMITMENT = 0.99, 0.0  # of those that settings ask for

    def __post_init__(self):
        if not 2 <= self.entries <= 64 or self.group_size < 0 or not 0 <= self.decay < 1 or not self.commitment >= 0:
            raise ConfigError(f"{self}: 2 to 64 entries, group_size >= 0, decay in [0, 1), commitment >= 0 are needed")

    @classmethod
    def from_settings(cls, config: Config, kind: str, number: str) -> Format:
        return cls(int(number), config.group_size, cls.DECAY, cls.COMMITMENT)

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

    def quantize(self, latent: Tensor) -> Stored:
        """Entries are rounded first: a weight gets the nearest of those in the file."""
        w, _ = split_groups(latent.float(), self.group_size)
        state = self.start(latent) if self.state is None else self.state
        stored = state["codebook"].bfloat16()
        index = self.nearest(w, stored.float())
        return Stored(join_groups((index - self.entries // 2).to(torch.int8), latent.shape), stored.flatten(-2))

    def dequantize(self, stored: Stored) -> Tensor:
        index, _ = split_groups(stored.codes.long() + self.entries // 2, self.group_size)
        entries = stored.scales.reshape(*index.shape[:-1], self.entries)
        return join_groups(entries.gather(-1, index), stored.codes.shape).bfloat16()

    def learn(self, latent: Tensor, grad: Tensor, lr_scale: float, quantized: float = 1.0) -> None:
        w, sizes = split_groups(latent, self.group_size)
        state = self.state
        flat = state["codebook"].amax(-1) == state["codebook"].amin(-1)
        if bool(flat.any()):  # a latent that began as zeros: start when it has become something
            for name, fresh in self.start(latent).items():
                state[name][flat] = fresh[flat]
        stored = self.quantize(latent)
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


# ---------------------------------------------------------------------------------------------------------------
# Into the trainer
# ---------------------------------------------------------------------------------------------------------------

RULES = {"lsq": lsq, "rms": rms}
FORMATS: dict[str, type[Format]] = {"binary": Binary, "five": Five, "elastic": Elastic, "codebook": Codebook}


def register() -> None:
    """Add all of the above to the trainer's tables, and let the formats that learn do so in its loop.

    Once per process; a second call changes nothing.
    """
    if "elastic" in train_gpt.FORMATS:
        return
    train_gpt.RULES.update(RULES)
    train_gpt.FORMATS.update(FORMATS)
    hooks.after(Latents, "__init__", begin)
    hooks.after(Latents, "load", begin)
    hooks.before(Optimizer, "step", learn)
    note_refreshes()
    keep_in_checkpoints()
    count_as_memory()


def learning(latents: Latents) -> list:
    """The banks whose formats learn."""
    return [bank for bank in latents.banks if isinstance(bank.format, Learner)]


def begin(latents: Latents, *_, **__) -> None:
    """The latents are new: so is what is learned beside them. Raises ConfigError over several processes."""
    for bank in learning(latents):
        if latents.ranks.world > 1:
            raise ConfigError(f"{bank.names[0]}: {type(bank.format).__name__.lower()} learns beside the latents, which "
                              f"works in one process, not in {latents.ranks.world}: start one, or use another format")
        bank.format.state = bank.format.start(bank.latent)


@torch.no_grad()
def learn(optimizer: Optimizer, lr_scale: float, momentum: float) -> None:
    """One step of what the formats learn, from gradients that are not clipped yet."""
    for bank in learning(optimizer.latents):
        bank.format.learn(bank.latent, bank.grad, lr_scale, optimizer.latents.quantized)


def note_refreshes() -> None:
    """Have Latents know how far its params are from the latents; and an index of zero into a codebook is no zero."""
    original = Latents.refresh

    def refresh(self: Latents, quantized: float = 1.0, measure: bool = False) -> tuple[float, float]:
        self.quantized = quantized
        zero_frac, churn = original(self, quantized, measure)
        if any(isinstance(bank.format, Codebook) for bank in self.banks if bank.optimizer == "muon"):
            zero_frac = math.nan
        return zero_frac, churn

    Latents.refresh = refresh


def learned(latents: Latents) -> State:
    """By "what/name of the parameter": views of all that was learned."""
    return {f"{what}/{name}": rows[i] for bank in learning(latents) for what, rows in bank.format.state.items()
            for i, name in enumerate(bank.names)}


def keep_in_checkpoints() -> None:
    original_state, original_load = Optimizer.state, Optimizer.load_state

    def state(self: Optimizer) -> State:
        return original_state(self) | learned(self.latents)

    @torch.no_grad()
    def load_state(self: Optimizer, state: State, step: int, quantized: float = 1.0) -> None:
        own = learned(self.latents)
        checkpoints.check_tensors({name: state[name] for name in own if name in state}, own)
        for name, x in own.items():
            x.copy_(state[name])
        others = {name: x for name, x in state.items() if name not in own}
        original_load(self, others, step, quantized)

    Optimizer.state, Optimizer.load_state = state, load_state


def count_as_memory() -> None:
    original = Optimizer.bytes_held

    def bytes_held(self: Optimizer) -> int:
        return original(self) + sum(x.nbytes for x in learned(self.latents).values())

    Optimizer.bytes_held = bytes_held
