"""What changes during a run: learning rate, momentum, lengths, batch, quantization. A function of step and progress;
and how a batch is divided.

config is the trainer's Config, for which this is nothing but arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tern.settings import ConfigError


@dataclass(frozen=True)
class StepPlan:
    lr_scale: float  # of every learning rate, in [0, 1]
    momentum: float  # Muon's
    seq_len: int  # tokens
    batch_tokens: int  # over all ranks, before rounding down to whole micro-batches
    quantized: float  # how far params are from latents (0) to what is stored (1), after the step


def sequence_lengths(config: Any) -> list[int]:
    """The lengths that a run goes through: doublings from seq_ramp_start to train_seq_len."""
    start = min(config.seq_ramp_start or config.train_seq_len, config.train_seq_len)
    return [start << k for k in range((config.train_seq_len // start).bit_length())]


def warmdown_share(config: Any, step: int, progress: float) -> float:
    """Of the run, that warms down; where that is a number of steps, by the steps so far."""
    c = config
    return c.warmdown_iters * progress / step if c.warmdown_iters and step and progress else (
        0.0 if c.warmdown_iters else c.warmdown_frac)


def schedule(config: Any, step: int, progress: float) -> StepPlan:
    """Everything that changes during a run, from the step and the progress in [0, 1] of the clock or the count."""
    c = config
    warmup = (step + 1) / c.lr_warmup_steps if c.lr_warmup_steps else 1.0
    down = warmdown_share(c, step, progress)
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


def micro_batch_tokens(config: Any, world: int) -> int:
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
