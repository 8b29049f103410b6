"""Checkpoints: one safetensors file with a JSON state in its metadata. No torch is needed to read one, and no pickle.

The trainer says what is in it. What an artifact of it must hold, pack.py compares: `codes/NAME` and `scales/NAME` are
the packer's arrays, and the state's "formats" their formats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from tern.errors import Foreseen
from tern.files import write_atomic

FILE = "checkpoint.safetensors"  # in a run's folder


class CheckpointError(Foreseen):
    """A checkpoint that cannot be used; the message says what, where and what to do."""


def write_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], state: dict) -> None:
    """Replace the file, all or nothing. Raises WriteError."""
    contiguous = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    write_atomic(path, safetensors.numpy.save(contiguous, {"state": json.dumps(state, sort_keys=True)}))


def check_tensors(found: Mapping, expected: Mapping) -> None:
    """Raises ValueError unless both have the same names, shapes and dtypes."""
    wrong = sorted(expected.keys() ^ found.keys())
    if wrong:
        raise ValueError(f"tensor {wrong[0]} is missing or not known")
    for name, x in expected.items():
        theirs = found[name]
        if x.shape != theirs.shape or x.dtype != theirs.dtype:
            raise ValueError(f"tensor {name} is {theirs.dtype} {tuple(theirs.shape)}, not {x.dtype} {tuple(x.shape)}")


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or that in a run's folder. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such checkpoint; give a run's folder or its {FILE}")
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, state) of a checkpoint file, or of the one in a run's folder. Raises CheckpointError."""
    return _read(find(path), with_arrays=True)


def read_state(path: str | Path) -> dict:
    """The state alone, without reading the arrays. Raises CheckpointError."""
    return _read(find(path), with_arrays=False)[1]


def _read(path: Path, with_arrays: bool) -> tuple[dict[str, np.ndarray], dict]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with safetensors.safe_open(path, framework="np") as f:
            state = json.loads((f.metadata() or {})["state"])
            if not isinstance(state, dict):
                raise ValueError("its state is not a JSON object")
            names = list(f.keys()) if with_arrays else []
            return {name: f.get_tensor(name) for name in names}, state
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer ({e!r}); delete it and train again") from None
