"""What a finished run's files say of its quantizers: which are active, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import pack
import train_gpt
from tern.groups import split_groups
from tern.shards import AuditError

PARTS = ("matrices", "embedding")
Tensors = Mapping[str, pack.StoredTensor]  # of a file, by name


def part_of(name: str) -> str:
    """The part of the model that a parameter is of; "" for vectors and what patches add."""
    if name == "tok_emb.weight":
        return "embedding"
    return "matrices" if name.startswith(train_gpt.MATRICES) and name.endswith(".weight") else ""


def quantized(spec: dict) -> bool:
    return pack.is_grouped(spec)


def prove_active(tensors: Tensors, config: train_gpt.Config, names: Iterable[str] | None = None,
                 settings_of: Callable[[str], train_gpt.Config] | None = None) -> str:
    """One line on the formats of the matrices (all but the embedding), after a check that the file holds nothing else.

    names: of all parameters of the model; without them, those of the settings' model, which patches may have changed.
    settings_of: the settings that a matrix of this name is stored by, where a patch stores some by others.
    Raises AuditError unless the settings quantize, the file has every matrix, each has the format of the settings, and
    its codes are in that format's alphabet and not all equal.
    """
    wanted = train_gpt.make_format(config, "matrix_format").spec()
    if not quantized(wanted):
        raise AuditError(f"the settings store matrices as {wanted['kind']}: nothing is quantized")
    if names is None:
        names = train_gpt.param_shapes(config)
    names = {n for n in (*names, *tensors) if n.endswith(".weight") and n != "tok_emb.weight"}
    missing = sorted(names - tensors.keys())
    if len(missing) == len(names):
        raise AuditError("the file holds no matrices: nothing is quantized")
    if missing:
        raise AuditError(f"{missing[0]} is not in the file")
    matrices: dict[str, list[int]] = {}
    for name in sorted(names):
        if settings_of is not None:
            wanted = train_gpt.make_format(settings_of(name), "matrix_format").spec()
        check_codes(name, tensors[name], wanted)
        matrices.setdefault(pack.format_label(wanted), []).append(tensors[name].codes.size)
    return "; ".join(f"{label}: {len(sizes)} matrices, {sum(sizes):,} weights" for label, sizes in matrices.items())


def prove_embedding(tensors: Tensors, config: train_gpt.Config) -> str:
    """The same of the embedding alone. Raises AuditError."""
    wanted = train_gpt.make_format(config, "embed_format").spec()
    if not quantized(wanted):
        raise AuditError(f"the settings store the embedding as {wanted['kind']}: it is not quantized")
    tensor = tensors.get("tok_emb.weight")
    if tensor is None:
        raise AuditError("tok_emb.weight is not in the file")
    check_codes("tok_emb.weight", tensor, wanted)
    return f"{pack.format_label(wanted)}: embedding, {tensor.codes.size:,} weights"


def check_codes(name: str, tensor: pack.StoredTensor, wanted: dict) -> None:
    """Raises AuditError unless a tensor has this format and, if quantized, codes of its alphabet, not all equal."""
    if tensor.format != wanted:
        raise AuditError(f"{name} is stored as {pack.format_label(tensor.format)}, not as {pack.format_label(wanted)}")
    if not quantized(wanted):
        return
    codes, alphabet = set(codes_of(tensor).unique().tolist()), levels(wanted)
    if not codes <= alphabet:
        raise AuditError(f"{name}: code {min(codes - alphabet)} is not one of {wanted['kind']}")
    if len(codes) < 2:
        raise AuditError(f"{name}: all its codes are {codes}: it holds nothing")


def codes_of(tensor: pack.StoredTensor) -> Tensor:
    """int32, in the tensor's shape."""
    return torch.from_numpy(tensor.codes.astype("i4"))


def levels(spec: dict) -> set[int]:
    """The codes that a quantized format may use."""
    kind = pack.KINDS[spec["kind"]]
    low, high = kind.codes(spec) if kind.codes else pack.range_of(kind.symbol(spec))
    found = set(range(low, high + 1))
    return found if kind.has_zero else found - {0}


def formats(folder: Path, tensors: Tensors) -> dict[str, dict]:
    """Part of the model -> diagnostics of a run's quantizer, from its checkpoint and its file, which holds these
    tensors.

    error: rms(latent - param) / rms(latent). zero_frac, used: shares of zero codes and of the alphabet's codes in use
    (of a codebook: of all entries of all groups; its codes have no zero); dead: entries without a weight. bits: true
    bits per weight, codes and scales together, of a file of these tensors alone, as parts of one format share the
    streams of the run's file.
    """
    state, _ = train_gpt.load_checkpoint(folder)
    found = {}
    for part in PARTS:
        names = [name for name in tensors if part_of(name) == part]
        latents = {name: state[f"latent/{name}"].double() for name in names}
        found[part] = diagnostics({name: tensors[name] for name in names}, latents)
    return found


def diagnostics(tensors: Tensors, latents: Mapping[str, Tensor]) -> dict:
    """Of tensors, by name, of one format each, and their latents (float64)."""
    error = norm = zeros = weights = used = possible = 0
    for name, tensor in tensors.items():
        spec, latent = tensor.format, latents[name]
        error += float((train_gpt.param_of_file(tensor).double() - latent).square().sum())
        norm += float(latent.square().sum())
        weights += latent.numel()
        if not quantized(spec):
            continue
        zeros += math.nan if spec["kind"] == "codebook" else float((codes_of(tensor) == 0).sum())
        groups, sizes = split_groups(codes_of(tensor), spec["group_size"])
        present = torch.arange(groups.shape[-1]) < sizes  # the last group may be short
        for code in sorted(levels(spec)):
            used += int(((groups == code) & present).any(-1).sum())
        possible += len(levels(spec)) * groups.shape[:-1].numel()
    alone = pack.parse_header(pack.encode_artifact(dict(tensors), {}))
    size = sum(stream.bytes for stream in alone.streams)
    found = {"error": math.sqrt(error / norm) if norm else 0.0, "bits": 8 * size / weights, "weights": weights}
    if possible:
        found |= {"zero_frac": None if math.isnan(zeros) else zeros / weights, "used": used / possible,
                  "dead": possible - used}
    return found
