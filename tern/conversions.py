"""The commands that write a model for other programs, or read one of theirs: `pack.py export`, --to and --from.

A submission, whose bytes count, has nothing of it (tern.source.APART): pack.py imports it when it is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tern import checkpoints, safetensors_files
from tern.exports import ExportError, Model, Stored, check_tokenizer_sha256
from tern.files import sha256_file, write_atomic
from tern.shards import find_tokenizer
from tern.tokenizers import open_tokenizer


def free_place(args: argparse.Namespace, suffix: str) -> Path:
    """Where to write what is made of args.file: args.out, or its own name with another suffix.

    Raises ExportError if something is there that must not be overwritten.
    """
    file = Path(args.file)
    if not file.name:
        raise ExportError(f"{args.file!r} names no file; give the one to read")
    out = Path(args.out or file.with_suffix(suffix))
    if os.path.lexists(out):
        own = file.exists() and out.exists() and os.path.samefile(file, out)
        if own or not (args.force and out.is_file()):
            hint = "" if own or args.force else ", or overwrite it with --force"
            raise ExportError(f"{out} exists; choose another name with --out{hint}")
    return out


def make_model(tensors: Mapping[str, Stored], meta: dict, artifact: bytes, tokenizer: str | None) -> Model:
    """What the bytes of an artifact hold, with a tokenizer, a file or a data folder, if it is the model's.

    Raises ExportError and DataError.
    """
    sha256 = hashlib.sha256(artifact).hexdigest()
    if not tokenizer:
        return Model(tensors, meta, sha256)
    file = find_tokenizer(Path(tokenizer)) if os.path.isdir(tokenizer) else Path(tokenizer)
    pieces, config = open_tokenizer(file).vocab_size(), meta.get("config")
    check_tokenizer_sha256(meta, sha256_file(file), file)
    tokens = config.get("vocab_size", pieces) if isinstance(config, dict) else pieces
    if tokens != pieces:
        raise ExportError(f"{file}: has {pieces} pieces, the model {tokens} tokens; give its own tokenizer")
    return Model(tensors, meta, sha256, file)


def export(args: argparse.Namespace, read: Callable[[str], tuple[Mapping[str, Stored], dict, bytes]]) -> list[str]:
    """Write an artifact as args say; lines on what was written. read: path -> (tensors, meta, bytes) of a sound one.

    Raises what read does, ExportError, DataError and WriteError.
    """
    out = free_place(args, f".{args.to}")
    tensors, meta, artifact = read(args.file)
    model = make_model(tensors, meta, artifact, args.tokenizer)
    data, lines = safetensors_files.encode(model) if args.to == "safetensors" else to_gguf(model, args)
    write_atomic(out, data)
    return [f"written     {out}  {len(data):,} bytes",
            f"from        {args.file}  {len(artifact):,} bytes  sha256 {model.sha256[:16]}",
            f"tokenizer   {model.tokenizer or 'not in the file: --tokenizer puts it there'}", *lines]


def to_gguf(model: Model, args: argparse.Namespace) -> tuple[bytes, list[str]]:
    """(The GGUF file, lines on what is in it). Raises ExportError without the gguf package, which only this needs."""
    try:
        from tern import gguf_files
    except ModuleNotFoundError as e:
        raise ExportError(f"{e.name} is not installed: make setup, or pip install -r requirements.txt") from None
    return gguf_files.encode(model, args.blocks or "TQ1_0", args.reblock)


def import_dense(args: argparse.Namespace) -> list[str]:
    """Write the checkpoint that --init-from takes, as args say; lines on it. Raises ExportError and WriteError."""
    out = free_place(args, ".checkpoint.safetensors")
    arrays, state = safetensors_files.start_from(args.file)
    checkpoints.write_checkpoint(out, arrays, state)
    named = state["tokenizer"]
    return [f"written     {out}  {len(arrays)} latents, {sum(x.size for x in arrays.values()):,} weights, all finite",
            "tokenizer   " + (f"sha256 {named[:16]}" if named else "NOT NAMED: the data must be of the model's own"),
            f"train on    train_gpt.py --init-from {out}, with the settings of its model"]
