"""Files: what they hold, and how they are written, all or nothing."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from tern.errors import Foreseen


class WriteError(Foreseen):
    """A file that could not be written; the message says which, why and what to do. What was there before still is."""


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_identity(hashes: Mapping[str, str]) -> str:
    """One hash for a set of files: sha256 over the sorted lines "<sha256>  <file name>"."""
    lines = "\n".join(f"{sha}  {name}" for name, sha in sorted(hashes.items()))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def write_atomic(path: str | Path, data: bytes) -> int:
    """Write data to path, all or nothing: readers see the old file or the new one. Returns bytes written.

    Raises WriteError and leaves no temporary file behind if that fails.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    try:
        if os.path.lexists(path) and not path.is_file():
            raise ValueError("something that is not a file is in its place")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())  # before the rename: a crash must not leave a new name on missing bytes
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise WriteError(f"cannot write {path}: {why}; its folder must exist, be writable and have room") from None
    return len(data)
