"""What a finished run's files say of its quantizers: which are active, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

import formats as storage
import pack
import train_gpt
from eval_bpb import AuditError


def prove_active(tensors: dict[str, pack.StoredTensor], config: train_gpt.Config,
                 names: Iterable[str] | None = None) -> str:
    """One line on the format of the matrices (all but the embedding), after a check that the file holds nothing else.

    names: of all parameters of the model; without them, those of the settings' model, which patches may have changed.
    Raises AuditError unless the settings quantize, the file has every matrix, each has the format of the settings, and
    its codes are in that format's alphabet and not all equal.
    """
    wanted = train_gpt.make_format(config, "matrix_format").spec()
    if wanted["kind"] in pack.FLOAT_SYMBOLS:
        raise AuditError(f"the settings store matrices as {wanted['kind']}: nothing is quantized")
    if names is None:
        with torch.device("meta"):
            names = [name for name, _ in train_gpt.GPT(config).named_parameters()]
    names = {n for n in (*names, *tensors) if n.endswith(".weight") and n != "tok_emb.weight"}
    if not names & tensors.keys():
        raise AuditError("the file holds no matrices: nothing is quantized")
    if missing := names - tensors.keys():
        raise AuditError(f"{sorted(missing)[0]} is not in the file")
    matrices = {n: t for n, t in tensors.items() if n in names}
    for name, t in matrices.items():
        check_codes(name, t, wanted)
    weights = sum(t.codes.size for t in matrices.values())
    return f"{pack.format_label(wanted)}: {len(matrices)} matrices, {weights:,} weights"


def prove_embedding(tensors: dict[str, pack.StoredTensor], config: train_gpt.Config) -> str:
    """The same of the embedding alone. Raises AuditError."""
    wanted = train_gpt.make_format(config, "embed_format").spec()
    if wanted["kind"] in pack.FLOAT_SYMBOLS:
        raise AuditError(f"the settings store the embedding as {wanted['kind']}: it is not quantized")
    if (t := tensors.get("tok_emb.weight")) is None:
        raise AuditError("tok_emb.weight is not in the file")
    check_codes("tok_emb.weight", t, wanted)
    return f"{pack.format_label(wanted)}: embedding, {t.codes.size:,} weights"


def check_codes(name: str, t: pack.StoredTensor, wanted: dict) -> None:
    """Raises AuditError unless a tensor has this quantized format, and codes of its alphabet that are not all equal."""
    if t.format != wanted:
        raise AuditError(f"{name} is stored as {pack.format_label(t.format)}, not as {pack.format_label(wanted)}")
    codes, alphabet = set(map(int, torch.unique(torch.from_numpy(t.codes.astype("i4"))))), levels(wanted)
    if not codes <= alphabet:
        raise AuditError(f"{name}: code {min(codes - alphabet)} is not one of {wanted['kind']}")
    if len(codes) < 2:
        raise AuditError(f"{name}: all its codes are {codes}: it holds nothing")


def levels(spec: dict) -> set[int] | None:
    """The codes that a format may use; None for floats."""
    kind = spec["kind"]
    if kind == "binary":
        return {-1, 1}
    if kind in pack.FLOAT_SYMBOLS:
        return None
    if kind == "codebook":
        return set(range(-(spec["entries"] // 2), spec["entries"] - spec["entries"] // 2))
    low, high = pack.range_of(pack.code_symbol(spec))
    return set(range(low, high + 1))


def formats(folder: Path, tensors: dict[str, pack.StoredTensor]) -> dict[str, dict]:
    """Part ("matrices", "embedding") -> diagnostics of a run's quantizer, from its checkpoint and its file, which holds
    these tensors.

    error: rms(latent - param) / rms(latent). zero_frac, used: shares of zero codes and of the alphabet's codes in use
    (of a codebook: of all entries of all groups); dead: entries without a weight. bits: true bits per weight, codes and
    scales together, of a file of these tensors alone, as parts of one format share the streams of the run's file.
    """
    state, _ = train_gpt.load_checkpoint(folder)
    out = {}
    for part, names in (("matrices", [n for n in tensors if n.startswith("blocks.") and n.endswith(".weight")]),
                        ("embedding", ["tok_emb.weight"])):
        error = norm = zeros = used = possible = weights = 0.0
        for name in names:
            stored, fmt = storage.from_pack(tensors[name])
            latent = state[f"latent/{name}"].double()
            error += float((fmt.dequantize(stored).double() - latent).square().sum())
            norm += float(latent.square().sum())
            weights += latent.numel()
            if isinstance(fmt, storage.Float):
                continue
            zeros += float((stored.codes == 0).sum()) if fmt.kind != "codebook" else math.nan
            groups, sizes = storage.split_groups(stored.codes.int(), fmt.group_size)
            for code in sorted(levels(fmt.spec())):
                present = torch.arange(groups.shape[-1]) < sizes
                used += float(((groups == code) & present).any(-1).sum())
            possible += len(levels(fmt.spec())) * groups.shape[:-1].numel()
        alone = pack.parse_header(pack.encode_artifact({name: tensors[name] for name in names}, {}))
        size = sum(stream.bytes for stream in alone.streams)
        out[part] = {"error": math.sqrt(error / norm) if norm else 0.0, "bits": 8 * size / weights,
                     "weights": int(weights)} | ({"zero_frac": None if math.isnan(zeros) else zeros / weights,
                                                  "used": used / possible, "dead": int(possible - used)}
                                                 if possible else {})
    return out
