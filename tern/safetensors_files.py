"""Models as safetensors files: an artifact's as dense bf16, and a dense float model as what training starts from.

One file holds all: the tensors under the trainer's names, and in its metadata, under "ternary-golf", JSON of

    version        1
    meta           what an artifact says of its model: config, and the sha256 of the tokenizer
    artifact       sha256 of the artifact that it was made from
    tokenizer      the tokenizer's file in base 64, if it was given

to import a model, config in meta is enough. docs/export.md has examples.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from tern.exports import (
    EXACT,
    ExportError,
    Model,
    bf16_bits,
    bf16_values,
    check_tokenizer_sha256,
    mlp_hidden,
    type_table,
)

KEY, VERSION = "ternary-golf", 1
PAGE = "docs/export.md shows what it must hold"
FLOATS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # what can be imported without loss -> how it lies in memory


def encode(model: Model) -> tuple[bytes, list[str]]:
    """(The file, lines on what is in it.) The same bytes for the same model."""
    if "__metadata__" in model.tensors:
        raise ExportError("a tensor is called __metadata__, which is safetensors' own name: rename it")
    dense = {name: np.asarray(bf16_bits(t), order="C") for name, t in model.tensors.items()}  # held: specs point at it
    about = {"version": VERSION, "meta": model.meta, "artifact": model.sha256}
    if model.tokenizer:
        about["tokenizer"] = base64.b64encode(model.tokenizer.read_bytes()).decode()
    specs = {name: safetensors.TensorSpec(dtype="bfloat16", shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
             for name, x in dense.items()}
    # One key, as the library writes several in any order.
    data = bytes(safetensors.serialize(specs, {KEY: json.dumps(about, sort_keys=True)}))
    return data, [*type_table({name: ("BF16", x.size, x.nbytes) for name, x in dense.items()}), EXACT]


def read_file(path: str | Path) -> tuple[dict[str, tuple[str, np.ndarray]], dict]:
    """(Tensor -> (dtype, values; bf16 as bit patterns), what the metadata says.) Raises ExportError.

    Arrays are of tensors in sorted order, as the library gives them in any.
    """
    try:
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file; give a .safetensors file")
        with safetensors.safe_open(path, framework="np") as f:
            text = (f.metadata() or {}).get(KEY)
        tensors = sorted(safetensors.deserialize(Path(path).read_bytes()), key=lambda item: item[0])
    except (OSError, safetensors.SafetensorError) as e:
        raise ExportError(f"{path}: not a safetensors file that can be read ({e}); write it again") from None
    try:
        about = json.loads(text) if text is not None else {}
        if about.get("version") != VERSION or not isinstance(about["meta"]["config"], dict):
            raise ValueError(f"version {about.get('version')!a} or no object meta.config")
        named = about["meta"].get("tokenizer")
        if named is not None and not (isinstance(named, str) and re.fullmatch("[0-9a-f]{64}", named)):
            raise ValueError("meta.tokenizer is no sha256")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ExportError(f"{path}: its metadata {KEY!a} does not describe a model ({e!r}); {PAGE}") from None
    values = {}
    for name, t in tensors:
        if t["dtype"] not in FLOATS:
            raise ExportError(f"{path}: tensor {name[:80]!a} is {t['dtype']}; save it as {', '.join(FLOATS)}")
        values[name] = t["dtype"], np.frombuffer(t["data"], FLOATS[t["dtype"]]).reshape(t["shape"])
    return values, about


def held_tokenizer(about: Mapping, path: str | Path) -> bytes | None:
    """The tokenizer's file that a model's file holds; None if it has none. Raises ExportError if it is another's."""
    if about.get("tokenizer") is None:
        return None
    try:
        data = base64.b64decode(about["tokenizer"], validate=True)
    except (binascii.Error, ValueError, TypeError) as e:
        raise ExportError(f"{path}: its tokenizer is not base 64 ({e}); {PAGE}") from None
    check_tokenizer_sha256(about["meta"], hashlib.sha256(data).hexdigest(), path)
    return data


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict, bytes | None]:
    """(Tensor -> bf16 bit patterns, meta, the tokenizer's file if it is there) of an exported model.

    Raises ExportError.
    """
    values, about = read_file(path)
    for name, (dtype, _) in values.items():
        if dtype != "BF16":
            raise ExportError(f"{path}: tensor {name[:80]!a} is {dtype}, and models compute with bf16: pack.py export "
                              "--from safetensors makes of it what training starts from")
    return {name: x for name, (_, x) in values.items()}, about["meta"], held_tokenizer(about, path)


# Import -------------------------------------------------------------------------------------------------------


def expected_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of the trainer's GPT, without torch; a test holds them to the model's.

    Raises ValueError on widths that make no model.
    """
    names = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads")
    found = [config.get(name) for name in names]
    hidden, copies = mlp_hidden(config), config.get("copy_dim") or 1
    for name, value in (*zip(names, found, strict=True), ("mlp_hidden", hidden), ("copy_dim", copies)):
        if type(value) is not int or not 1 <= value < 1 << 24:
            raise ValueError(f"{name} is {str(value)[:40]!a}")
    vocab, layers, dim, heads, kv_heads = found
    if dim % heads or heads % kv_heads or layers > 1024:
        raise ValueError(f"{dim=}, {heads=}, {kv_heads=}, {layers=}")
    kv = kv_heads * (dim // heads)
    block = {"attn.c_q.weight": (dim, dim), "attn.c_k.weight": (kv, dim), "attn.c_v.weight": (kv, dim),
             "attn.proj.weight": (dim, dim), "attn.q_gain": (heads,), "mlp.fc.weight": (hidden, dim),
             "mlp.proj.weight": (dim, hidden), "attn_scale": (dim,), "mlp_scale": (dim,), "resid_mix": (2, dim)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    shapes |= {"tok_emb.weight": (vocab, dim), "skip_weights": (layers // 2, dim)}
    if config.get("smear"):
        shapes["smear"] = (dim,)
    if config.get("copy_dim"):
        shapes |= {"copying.c_q.weight": (copies, dim), "copying.c_k.weight": (copies, dim),
                   "copying.scale_and_bias": (2,)}
    return shapes


def start_from(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, state) of the checkpoint that training with --init-from starts from: a dense model's fp32 latents.

    Raises ExportError unless the file holds just the tensors that its configuration makes, in floats that are finite.
    """
    values, about = read_file(path)
    config, tokenizer = about["meta"]["config"], held_tokenizer(about, path)
    try:
        shapes = expected_shapes(config)
    except (ValueError, TypeError) as e:
        raise ExportError(f"{path}: meta.config makes no model of this trainer ({e}); {PAGE}") from None
    for name in sorted(shapes.keys() | values.keys()):
        if name not in values or name not in shapes:
            wrong = "is missing" if name in shapes else "is not one"
            raise ExportError(f"{path}: tensor {name[:80]!a} {wrong} of the model that meta.config describes; mend "
                              "one of them")
        dtype, x = values[name]
        if x.shape != shapes[name]:
            raise ExportError(f"{path}: tensor {name!a} is {x.shape}, by meta.config {shapes[name]}; mend one of them")
        latent = bf16_values(x) if dtype == "BF16" else x.astype(np.float32)
        bad = np.argwhere(~np.isfinite(latent))
        if len(bad):
            raise ExportError(f"{path}: tensor {name!a}{bad[0].tolist()} is not finite; import a run that did not "
                              "diverge")
        values[name] = dtype, latent
    named = about["meta"].get("tokenizer") or (tokenizer and hashlib.sha256(tokenizer).hexdigest())
    return ({f"latent/{name}": x for name, (_, x) in values.items()},
            {"tokenizer": named, "model": config, "formats": {}})
