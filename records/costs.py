"""What a training step costs on H100s, for plan.py: flops, bytes, memory, and a predicted time.

Counted: flops and bytes of device memory (bench/gpu_step.py), state and what is sent. Measured on one H100, with both
presets at 65,536 tokens a step: how much longer than the card's floor for that work a step takes (MEASURED), and how
much of the activations is kept. Estimated: what eight GPUs say to each other, at the speed of their links and under
nothing else; between GPUs nothing was measured. A step of another shape, as of a model so small that launching its
kernels would rule, may be anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

import pack
from bench.gpu_step import Work, flops_per_token, step_work
from tern import base3
from tern.settings import ConfigError
from train_gpt import PRESETS, Config, format_of, micro_batch_tokens, optimizer_of, owners, param_shapes

LINK_BYTES, GPU_MEMORY = 450e9, 80e9  # NVIDIA's H100 data sheet, SXM: NVLink 4, bytes/s each way (900e9 both ways)
TRAIN_SECONDS = 600  # the competition's
# Preset -> (seconds of a step of 65,536 tokens, bytes of memory at its peak) on one H100:
# bench/results/2026-11-26_h100/train_*.json, and what was otherwise in the preset then. The card waited for 17%
# of that time, an H200 later for 6% of 0.0903 s: an upper bound.
MEASURED = {"pr367": (0.11158, 20_481_251_840), "golf16mb": (0.10277, 19_225_527_296)}
MEASURED_TOKENS = 65_536
MEASURED_WITH = {"pr367": {}, "golf16mb": dict(mlp_hidden=3072, train_seq_len=1024, seq_ramp_start=0, fit_cap=0.0,
                                               embed_format="ternary", rare_step=0.0, smear=False, key_offset=False)}
# bf16 elements of a block kept from forward to backward, in units of (dim, hidden): a fit to those peaks, within 4%.
BLOCK_SAVED, LOGITS_SAVED = (12, 1), 4  # and bytes of a logit


# ---------------------------------------------------------------------------------------------------------------
# State and communication of our optimizer: each parameter has one owner
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    muon: bool  # else AdamW
    codes: int  # bytes of the stored codes in memory
    scales: int  # bytes
    payload: int  # bytes sent after an update: codes (ternary ones five to a byte) and scales

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@cache
def parameters(config: Config) -> dict[str, Parameter]:
    """Every parameter by name; not to be changed by the caller."""
    out = {}
    for name, shape in param_shapes(config).items():
        roles = pack.layout(format_of(config, name, len(shape)).spec(), shape)
        size = {role: math.prod(of) * np.dtype(pack.SYMBOLS[symbol]).itemsize for role, (symbol, of) in roles.items()}
        codes, scales = size["codes"], size.get("scales", 0)
        sent = -(-codes // base3.PER_BYTE) if roles["codes"][0] == "ternary" else codes
        out[name] = Parameter(shape, optimizer_of(name) == "muon", codes, scales, sent + scales)
    return out


def refresh_payload(config: Config) -> dict[str, int]:
    """Bytes that the owner of each parameter sends to all others after its update; if it were sent by itself, as
    codes of one owner and shape share their last byte: under one byte per parameter too many."""
    return {name: p.payload for name, p in parameters(config).items()}


def state_bytes(config: Config, world: int, rank: int) -> dict[str, int]:
    """Bytes that a rank holds between steps, by part: exact, but for AdamW's step counts and refresh_payload's excess.
    """
    every, owner = parameters(config), owners(config, world)
    mine = [p for name, p in every.items() if owner[name] == rank]
    n = sum(p.size for p in every.values())
    payload = sum(p.payload for p in every.values()) if world > 1 else 0
    return {
        "params, bf16": 2 * n,
        "gradient sums, fp32": 4 * (n + 1),  # flat, with the loss
        "payload": payload,
        "latents, fp32": sum(4 * p.size for p in mine),
        "momentum, fp32": sum(4 * p.size for p in mine if p.muon),
        "AdamW moments, fp32": sum(8 * p.size for p in mine if not p.muon),
        "codes": sum(p.codes for p in mine),
        "scales": sum(p.scales for p in mine),
    }


def communication(config: Config, world: int) -> dict[str, float]:
    """Bytes that a rank sends per step, mean over the ranks.

    A reduce to, and a broadcast from, one owner is a chain in which world - 1 of the ranks send each byte on once (the
    trainer's own counter, Ranks.sent, charges a broadcast to its owner alone).
    """
    every = parameters(config).values()
    share = (world - 1) / world
    return {"gradients, fp32": share * 4 * sum(p.size for p in every),
            "codes and scales": share * sum(p.payload for p in every)}


def activation_bytes(config: Config, tokens: int) -> float:
    """Bytes held at the start of a backward of that many tokens, on a GPU with the kernels of tern/fused.py."""
    c, (dim, hidden) = config, BLOCK_SAVED
    return tokens * (2.0 * c.num_layers * (dim * c.model_dim + hidden * c.hidden_dim) + LOGITS_SAVED * c.vocab_size)


def peak_bytes(config: Config, gpus: int) -> float:
    """Of the busiest GPU, in a step: state, a model's gradients, activations."""
    state = max(sum(state_bytes(config, gpus, rank).values()) for rank in range(gpus))
    gradients = 2 * sum(p.size for p in parameters(config).values())  # bf16, all there at the end of a backward
    return state + gradients + activation_bytes(config, micro_batch_tokens(config, gpus))


# ---------------------------------------------------------------------------------------------------------------
# The time of a step
# ---------------------------------------------------------------------------------------------------------------


def share_of_busiest(config: Config, gpus: int) -> float:
    """Of the optimizer's work, by weights: what the GPU that owns most of them has."""
    owned = [0] * gpus
    for name, rank in owners(config, gpus).items():
        owned[rank] += parameters(config)[name].size
    return max(owned) / sum(owned)


def work(config: Config, gpus: int) -> list[Work]:
    """Of the busiest GPU, in a step. Raises ConfigError where the batch does not divide over the GPUs."""
    tokens = config.train_batch_tokens // gpus
    share, micro_batches = share_of_busiest(config, gpus), tokens // micro_batch_tokens(config, gpus)
    return [replace(w, flops=w.flops * share, bytes=w.bytes * share) if w.name == "optimizer and refresh" else w
            for w in step_work(config, tokens, micro_batches)]


def floor_seconds(config: Config, gpus: int) -> float:
    """The shortest time that the card's peaks allow for that work; nothing is sent."""
    return sum(w.seconds for w in work(config, gpus))


def measured_config(preset: str) -> Config:
    """The settings that MEASURED's figures of a preset are of."""
    return Config(**PRESETS[preset] | MEASURED_WITH[preset] | dict(train_batch_tokens=MEASURED_TOKENS))


@cache
def times_the_floor() -> dict[str, float]:
    """Preset -> how many times its floor a step took, on one H100."""
    return {preset: seconds / floor_seconds(measured_config(preset), 1) for preset, (seconds, _) in MEASURED.items()}


def predicted_seconds(config: Config, gpus: int) -> float:
    """Of a step: its floor as many times as was measured, in the mean, then what is sent."""
    factor = float(np.mean(list(times_the_floor().values())))
    return factor * floor_seconds(config, gpus) + sum(communication(config, gpus).values()) / LINK_BYTES


# ---------------------------------------------------------------------------------------------------------------
# The plan's section
# ---------------------------------------------------------------------------------------------------------------


ROWS = ("Tflop (of it Newton-Schulz)", "GB of device memory moved", "ms at the card's peaks",
        "MB sent, gradients + codes", "ms to send them, estimated", "GB of state, counted",
        f"GB at peak, of {GPU_MEMORY / 1e9:.0f}", "ms per step, predicted", "million tokens/s",
        f"steps in {TRAIN_SECONDS} s")


def column(config: Config, gpus: int) -> list[str]:
    """The entries of ROWS. Raises ConfigError as work does."""
    parts, sent, seconds = work(config, gpus), communication(config, gpus).values(), predicted_seconds(config, gpus)
    state = max(sum(state_bytes(config, gpus, rank).values()) for rank in range(gpus))
    peak = peak_bytes(config, gpus)
    return [
        f"{sum(w.flops for w in parts) / 1e12:,.2f} ({parts[-1].flops / 1e12:.2f})",
        f"{sum(w.bytes for w in parts) / 1e9:,.2f}",
        f"{1000 * floor_seconds(config, gpus):,.2f}",
        " + ".join(f"{x / 1e6:,.1f}" for x in sent),
        f"{1000 * sum(sent) / LINK_BYTES:,.2f}",
        f"{state / 1e9:,.3f}",
        f"{peak / 1e9:,.1f}" + ("" if peak <= GPU_MEMORY else " OVER"),
        f"{1000 * seconds:,.1f}", f"{config.train_batch_tokens / seconds / 1e6:,.2f}",
        f"{TRAIN_SECONDS / seconds:,.0f}",
    ]


def report(config: Config, gpus: tuple[int, ...] = (1, 8)) -> list[str]:
    """The plan's lines on the cost of a step, one column for each number of GPUs."""
    products, attention = flops_per_token(config)
    lines = [
        "a step on H100 SXM, from what one of them did. Between GPUs nothing was measured.",
        f"  {products + attention:,.0f} flops per token: weights {products:,.0f}, attention {attention:,.0f}; "
        f"{config.train_batch_tokens:,} tokens per step",
    ]
    columns = {}
    for count in gpus:
        try:
            columns[count] = column(config, count)
        except ConfigError:
            lines.append(f"  {count} GPU(s): the batch does not divide into whole sequences per GPU")
    if not columns:
        return lines
    heads = ["1 GPU" if count == 1 else f"{count} GPUs" for count in columns]
    for row, *entries in [("per GPU, the busiest", *heads), *zip(ROWS, *columns.values(), strict=True)]:
        lines.append(f"  {row:<28}" + "".join(f"{entry:>24}" for entry in entries))
    return [*lines, "  ms = those at the peaks times what was measured, "
            + ", ".join(f"{preset} {x:.2f}" for preset, x in times_the_floor().items())
            + f" at {MEASURED_TOKENS:,} tokens per GPU, then what is sent"]
