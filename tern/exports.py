"""An artifact's values as other programs read them, and what all exports share. numpy, no torch.

No part of a submission (tern/conversions.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tern.errors import Foreseen
from tern.logscale import log_values


class ExportError(Foreseen):
    """A model that cannot be exported or imported; the message says what is wrong, where, and what to do."""


class Stored(Protocol):
    """A tensor as an artifact holds it (pack.StoredTensor)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> dict: ...
    @property
    def codes(self) -> np.ndarray: ...
    @property
    def scales(self) -> np.ndarray | None: ...


# Values -------------------------------------------------------------------------------------------------------


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of the bf16 that are nearest to fp32 numbers, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def fp8_table() -> np.ndarray:
    """The fp32 values of the 256 patterns of e4m3 (arXiv 2209.05433): bias 7, no infinity, two that are not numbers."""
    exponent, mantissa = np.arange(16)[:, None], np.arange(8)
    positive = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9).astype(np.float32)
    positive[15, 7] = np.nan
    return np.concatenate((positive.ravel(), -positive.ravel()))


def float_values(kind: str, patterns: np.ndarray) -> np.ndarray:
    """The fp32 values of floats' bit patterns, or of codes of a log scale; kind as in docs/format.md."""
    if kind == "bf16":
        return bf16_values(patterns)
    if kind in ("fp16", "fp32"):
        return patterns.view(f"f{patterns.itemsize}").astype(np.float32)
    table = fp8_table() if kind == "fp8" else np.array(log_values(int(kind.removeprefix("log"))), np.float32)
    return table[patterns]


def bf16_bits(t: Stored) -> np.ndarray:
    """The model's param of a stored tensor: bf16 bit patterns, uint16 in its shape.

    The same bits as the trainer's `dequantize` gives: codes times scales in fp32, rounded once. Raises ExportError
    where finite ones give a value that is none.
    """
    bits = rounded_param(t)
    if (bits & 0x7F80 == 0x7F80).any():
        raise ExportError("a value is beyond the range of bf16, in which models compute: nothing is exported")
    return bits


def rounded_param(t: Stored) -> np.ndarray:
    if t.scales is None:
        return t.codes if t.format["kind"] == "bf16" else round_to_bf16(float_values(t.format["kind"], t.codes))
    if not t.codes.size:
        return np.zeros(t.shape, np.uint16)
    rows = t.codes.reshape(len(t.scales), -1)
    group = np.arange(rows.shape[1]) // (t.format["group_size"] or rows.shape[1])  # of each column
    if t.format["kind"] == "codebook":
        entries = t.format["entries"]
        index = group * entries + rows.astype(np.int64) + entries // 2
        return np.take_along_axis(t.scales, index, axis=1).reshape(t.shape)
    scales = float_values(t.format["scale"], t.scales)[:, group]
    return round_to_bf16(rows.astype(np.float32) * scales).reshape(t.shape)


# What is exported, and where to -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """An artifact that is to be exported."""

    tensors: Mapping[str, Stored]
    meta: dict
    sha256: str  # of the artifact
    tokenizer: Path | None = None


# Settings that a file says only where they differ from these, the trainer's defaults.
UNSAID = {"rope_base": 10000.0, "logit_softcap": 30.0, "mlp_mult": 3}


def mlp_hidden(config: Mapping) -> object:
    """Hidden width of the MLPs by a file's configuration, where that has sound numbers; else what it says, or None."""
    mult, dim = config.get("mlp_mult", UNSAID["mlp_mult"]), config.get("model_dim")
    return config.get("mlp_hidden") or (mult * dim if type(mult) is type(dim) is int else None)


def check_tokenizer_sha256(meta: Mapping, sha256: str, where: str | Path) -> None:
    """Raises ExportError if a model names its tokenizer, and it is another one; older files name none."""
    if meta.get("tokenizer") not in (None, sha256):
        raise ExportError(f"{where}: the tokenizer's sha256 is {sha256[:16]}, and the model was trained with "
                          f"{str(meta['tokenizer'])[:16]!a}: give that one")


EXACT = "exact       every value, bit for bit what the artifact's model computes with"


def type_table(sizes: Mapping[str, tuple[str, int, int]]) -> list[str]:
    """Lines that say what the bytes are spent on; sizes: tensor -> (type, weights, bytes)."""
    lines = [f"{'type':<12}{'tensors':>9}{'weights':>14}{'bytes':>14}{'bits/weight':>13}"]
    for kind in sorted({kind for kind, *_ in sizes.values()}):
        rows = [row for row in sizes.values() if row[0] == kind]
        weights, size = sum(n for _, n, _ in rows), sum(b for *_, b in rows)
        lines.append(f"{kind:<12}{len(rows):>9,}{weights:>14,}{size:>14,}{8 * size / max(weights, 1):>13.4f}")
    return lines
