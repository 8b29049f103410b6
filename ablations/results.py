"""results.jsonl of a matrix: one line per finished run, whatever came of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ablations.matrix import MatrixError, what_of


class Quantizer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a part of the model was stored as (diagnose.formats)."""

    error: float
    bits: float
    weights: int
    zero_frac: float | None = None
    used: float | None = None
    dead: int | None = None


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a run was of, and what came of it. Of keys that are not named here nothing is known, and they stay."""

    id: str
    row: str
    seed: int
    status: Literal["ok", "failed", "diverged", "timeout"]
    settings: dict
    patches: list[str]
    score_patches: list[str]
    parent: str  # id of the run that it starts from, or ""
    matrix: str = ""
    source: str = ""  # identity of code and data
    code: str = ""  # of the programs alone, without patches; older lines do not say
    data: str = ""  # of the data alone
    machine: dict = {}
    threads: int = 0
    finished: str = ""  # time
    seconds: float = 0.0
    message: str = ""  # why there is no result
    exit_status: int | None = None
    steps: int | None = None
    tokens: int | None = None
    train_seconds: float | None = None
    val_bpb: float | None = None  # from the file, chunked
    val_loss: float | None = None
    sliding_bpb: float | None = None
    gap: float | None = None  # bpb from the file less that in memory
    logits_identical: bool | None = None
    bytes_model: int | None = None
    artifact_sha256: str = ""
    active: str = ""  # the proof that the quantizers are
    formats: dict[str, Quantizer] = {}
    curve: list[tuple[int, float, int, float]] = []  # step, seconds, tokens, training loss
    codes_curve: list[tuple[int, float | None, float | None]] = []  # step, zero_frac, churn

    def __post_init__(self):
        """Raises ValueError on a line that says neither what was measured nor why nothing was."""
        if self.status == "ok" and self.val_bpb is None:
            raise ValueError("val_bpb is missing")
        if self.status != "ok" and (self.steps is None or not self.message):
            raise ValueError("steps or message is missing")

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def line_of(values: dict) -> Line:
    """Raises ValueError unless they are those of a line."""
    return msgspec.convert(values, Line)


def encode(line: Line) -> bytes:
    return msgspec.json.encode(line, order="sorted", enc_hook=str)  # torch's version is a str of its own kind


def decode(text: bytes) -> Line:
    """A line of results. Raises msgspec.MsgspecError if it is none."""
    return msgspec.json.decode(text, type=Line)


def read_results(path: Path) -> list[Line]:
    """The lines of a results file, the last of each id; a last line that was cut off is left out."""
    if not path.exists():
        return []
    texts = path.read_bytes().split(b"\n")
    lines = {}
    for i, text in enumerate(texts):
        if not text:
            continue
        try:
            line = decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            if i == len(texts) - 1:
                continue
            raise MatrixError(f"{path}, line {i + 1}: not a line of results ({e}); remove it") from None
        lines[line.id] = line
    return list(lines.values())


def settings_of(line: Line) -> dict:
    """What its run was asked for. Before lines said their code CPU presets left the device open; none ran on a GPU."""
    left_open = not line.code and line.settings.get("device") == "auto"
    return line.settings | ({"device": "cpu"} if left_open else {})


def what_of_lines(lines: Sequence[Line]) -> dict[str, str]:
    """Id of a line -> hash of what its run was of, as Job.what. A line whose parent is not there before it has none:
    what it started from is part of what it is."""
    what: dict[str, str] = {}
    for line in lines:
        if not line.parent or line.parent in what:
            what[line.id] = what_of(settings_of(line), line.patches, line.score_patches, what.get(line.parent, ""))
    return what


class Results:
    """The file, open to be added to. One runner at a time. Raises MatrixError if there is another one."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MatrixError(f"{path}: another runner is at work on this matrix; wait for it or stop it") from None
        self.lines = {line.id: line for line in read_results(path)}
        self.mend_last_line()

    def mend_last_line(self) -> None:
        """Give a last line its end, or, if a kill cut it off, remove it."""
        self.file.seek(0)
        text = self.file.read()
        last = text[text.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            decode(last)
            self.file.write(b"\n")
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.file.truncate(len(text) - len(last))

    def add(self, line: Line) -> None:
        self.file.write(encode(line) + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines[line.id] = line

    def close(self) -> None:
        self.file.close()  # which lets go of the lock
