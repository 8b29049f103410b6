"""An artifact as a GGUF file, by the gguf package: ternary matrices in blocks of 256, all else in bf16.

TQ1_0 (1.6875 bits a weight) and TQ2_0 (2.0625) hold 256 codes of a row and one fp16 scale d (ggml/src/ggml-common.h of
llama.cpp). A matrix whose groups give every such block one scale goes into them unchanged. Where a block meets several
scales, d can be the least-squares one: sum(w * code) / (number of codes that are not 0) over the block.

llama.cpp has no program for this architecture, "ternary-golf": the file is for its tools and other readers of GGUF.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import Keys

from tern.exports import EXACT, UNSAID, ExportError, Model, Stored, bf16_bits, bf16_values, mlp_hidden, type_table
from tern.tokenizers import open_tokenizer, read_tokenizer_file

ARCHITECTURE = "ternary-golf"
BLOCK = gguf.QK_K  # 256
BLOCKED = {"TQ1_0": (Type.TQ1_0, gguf.LlamaFileType.MOSTLY_TQ1_0),
           "TQ2_0": (Type.TQ2_0, gguf.LlamaFileType.MOSTLY_TQ2_0)}
# Settings of the model that GGUF has names for; the others are in ternary-golf.meta.
INTEGERS = {"train_seq_len": Keys.LLM.CONTEXT_LENGTH, "vocab_size": Keys.LLM.VOCAB_SIZE,
            "num_layers": Keys.LLM.BLOCK_COUNT, "model_dim": Keys.LLM.EMBEDDING_LENGTH,
            "mlp_hidden": Keys.LLM.FEED_FORWARD_LENGTH, "num_heads": Keys.Attention.HEAD_COUNT,
            "num_kv_heads": Keys.Attention.HEAD_COUNT_KV, "attn_window": Keys.Attention.SLIDING_WINDOW}
FLOATS = {"rope_base": Keys.Rope.FREQ_BASE, "logit_softcap": Keys.LLM.FINAL_LOGIT_SOFTCAPPING}


@dataclass(frozen=True)
class Blocks:
    """A ternary matrix in blocks, and what that changes."""

    data: np.ndarray  # uint8 [rows, bytes]
    same_bits: bool  # what is read from them is the param, bit for bit
    squares: float  # sum of the squared errors
    largest: float  # error


def reblock(codes: np.ndarray, param: np.ndarray, kind: Type) -> Blocks | None:
    """A matrix's codes int8 [rows, cols] in blocks with the least-squares scales of param, fp32 of that shape.

    None where such a scale is beyond fp16.
    """
    blocks, w = (x.reshape(-1, BLOCK) for x in (codes, param))
    live = np.count_nonzero(blocks, axis=1)
    with np.errstate(over="ignore"):  # looked for in the next line
        d = (np.einsum("ij,ij->i", w, blocks, dtype=np.float64) / np.maximum(live, 1)).astype(np.float16)
    if not np.isfinite(d).all():
        return None
    data = gguf.quants.quantize((blocks * d[:, None].astype(np.float32)).reshape(codes.shape), kind)
    back = gguf.quants.dequantize(data, kind).reshape(codes.shape)
    errors = np.abs(back.astype(np.float64) - param)
    return Blocks(data, bool((back.view(np.uint32) == param.view(np.uint32)).all()), float((errors**2).sum()),
                  float(errors.max()))


def fits_blocks(t: Stored) -> bool:
    """Whether a tensor is a ternary matrix whose rows are whole blocks."""
    return (t.format["kind"] in ("ternary", "binary") and len(t.shape) == 2 and t.codes.size > 0
            and t.shape[1] % BLOCK == 0)


def encode(model: Model, blocked: str, inexact: bool) -> tuple[bytes, list[str]]:
    """(The file, lines on what is in it and what it changed.)

    blocked: TQ1_0 or TQ2_0. inexact: also for matrices that these would change. Raises ExportError.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return write(Path(folder) / "model.gguf", model, blocked, inexact)
    except OSError as e:
        raise ExportError(f"cannot write the draft of a GGUF file in {tempfile.gettempdir()}: {e.strerror or e}; make "
                          "room there, or let TMPDIR name another folder") from None


def write(path: Path, model: Model, blocked: str, inexact: bool) -> tuple[bytes, list[str]]:
    """encode by a file at path, which the gguf package needs."""
    kind, file_type = BLOCKED[blocked]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    sizes: dict[str, tuple[str, int, int]] = {}
    changed: dict[str, tuple[Blocks, float]] = {}  # with the sum of the squared weights
    for name, t in model.tensors.items():
        bits = bf16_bits(t)
        param = bf16_values(bits)
        blocks = reblock(t.codes, param, kind) if fits_blocks(t) else None
        if blocks and not blocks.same_bits:
            changed[name] = blocks, float((param.astype(np.float64) ** 2).sum())
        if blocks and (blocks.same_bits or inexact):
            writer.add_tensor(name, blocks.data, raw_dtype=kind)
            sizes[name] = blocked, t.codes.size, blocks.data.nbytes
        else:
            writer.add_tensor(name, np.atleast_1d(bits).view(np.uint8), raw_dtype=Type.BF16)
            sizes[name] = "BF16", t.codes.size, bits.nbytes
    used = any(type_name == blocked for type_name, *_ in sizes.values())
    writer.add_file_type(file_type if used else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, model)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    data = path.read_bytes()
    narrow = sum(t.format["kind"] in ("ternary", "binary") and not fits_blocks(t) for t in model.tensors.values())
    return data, [*type_table(sizes), *notes(changed, narrow, blocked, inexact)]


def notes(changed: Mapping[str, tuple[Blocks, float]], narrow: int, blocked: str, inexact: bool) -> list[str]:
    """Lines on what is not in blocks, and on the error of what is; narrow: tensors whose rows are no whole blocks."""
    lines = []
    if narrow:
        lines.append(f"bf16        {narrow} ternary tensors whose rows are no multiple of {BLOCK}")
    if not changed:
        return [*lines, EXACT]
    weights = sum(squares for _, squares in changed.values()) or 1
    total = math.sqrt(sum(b.squares for b, _ in changed.values()) / weights)
    if not inexact:
        return [*lines, f"bf16        {len(changed)} ternary tensors whose blocks of {BLOCK} have no one fp16 scale",
                f"            --reblock stores them as {blocked}, with errors of {total:.4f} of their rms", EXACT]
    wide = max(map(len, [*changed, "all of these"]))
    lines.append(f"{'re-blocked':<{wide}}{'rms error/rms':>15}{'largest error':>15}")
    for name, (blocks, squares) in changed.items():
        lines.append(f"{name:<{wide}}{math.sqrt(blocks.squares / (squares or 1)):>15.6f}{blocks.largest:>15.6f}")
    lines.append(f"{'all of these':<{wide}}{total:>15.6f}{max(b.largest for b, _ in changed.values()):>15.6f}")
    return [*lines, "exact       every value of the other tensors"]


def describe(writer: gguf.GGUFWriter, model: Model) -> None:
    """Metadata: what the model is, and its tokenizer."""
    said = model.meta.get("config")
    config: dict[str, Any] = {**UNSAID, **(said if isinstance(said, dict) else {})}
    config |= {"train_seq_len": config.get("eval_seq_len") or config.get("train_seq_len"),  # what it may read
               "mlp_hidden": mlp_hidden(config)}
    for names, add, types in ((INTEGERS, writer.add_uint32, (int,)), (FLOATS, writer.add_float32, (int, float))):
        for name, key in names.items():
            if type(config.get(name)) in types and 0 < config[name] < 2**32:
                add(key.format(arch=ARCHITECTURE), config[name])
    writer.add_string(f"{ARCHITECTURE}.meta", json.dumps(model.meta, sort_keys=True))
    writer.add_string(f"{ARCHITECTURE}.artifact", model.sha256)
    if model.tokenizer:
        add_tokenizer(writer, model.tokenizer)


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    """A SentencePiece model, as llama.cpp's converter writes one. Its kinds of pieces have the same numbers there."""
    sp = open_tokenizer(path)
    file = read_tokenizer_file(sp.serialized_model_proto(), path)
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_scores([sp.get_score(i) for i in range(len(pieces))])
    writer.add_token_types([file.pieces[piece] for piece in pieces])
    for add, token in ((writer.add_bos_token_id, sp.bos_id()), (writer.add_eos_token_id, sp.eos_id()),
                       (writer.add_unk_token_id, sp.unk_id()), (writer.add_pad_token_id, sp.pad_id())):
        if token >= 0:
            add(token)
    writer.add_add_bos_token(True)  # which every document begins with
    if file.normalizer:
        writer.add_precompiled_charsmap(file.normalizer)
