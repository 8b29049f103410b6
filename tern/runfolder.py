"""A run's folder: finished work is never overwritten, and nobody else works in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tern import checkpoints
from tern.errors import Foreseen
from tern.files import WriteError, sha256_file
from tern.processes import Elsewhere, Ranks
from tern.runlog import Log
from tern.settings import differences


class RunExists(Foreseen):
    """The run's folder holds a run that must not be touched; the message says what to do instead."""

    shared = True


class AlreadyFinished(Exception):
    """The run is finished, and left as it is; the message says what it is."""


@dataclass(frozen=True)
class Finished:
    """What a finished run was."""

    settings: dict
    steps: int
    score: dict  # eval_bpb's
    model_sha256: str


def finished_run(folder: Path) -> Finished | None:
    """The finished run whose model the folder holds; None where there is none.

    Its log's last record says so; where a log was damaged, the score of the model and the end of the checkpoint do.
    A file that was found not to be the model that was trained ends no run.
    """
    metrics, model, score = (folder / name for name in ("metrics.jsonl", "model.tern", "score.json"))
    if not model.is_file():  # a link to a device has no end
        return None
    try:
        sha256, final = sha256_file(model), last_record(metrics)
        if final and final["artifact_sha256"] == sha256:
            if final["roundtrip_gap"] != 0 or not final["logits_identical"]:
                return None
            header = json.loads(metrics.read_bytes().partition(b"\n")[0])
            return Finished(dict(header["settings"]), int(final["step"]), final["score"], sha256)
        scored, state = json.loads(score.read_bytes()), checkpoints.read_state(folder)
        if scored["artifact"]["sha256"] == sha256 and state["finished"]:
            return Finished(dict(state["config"]), int(state["step"]), scored, sha256)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return None


def last_record(metrics: Path) -> dict | None:
    """The record that ends a finished run's metrics.jsonl; None where there is none."""
    try:
        lines = metrics.read_bytes().strip().splitlines() if metrics.is_file() else []
        final = json.loads(lines[-1]) if lines else None
        return final if isinstance(final, dict) and final.get("type") == "final" else None
    except (OSError, ValueError, RecursionError):
        return None


def look_at_folder(folder: Path, resume: bool, check_settings: Callable[[Path, dict], None]) -> str | None:
    """What to say instead of running, where the run is finished and may be resumed; None: go on.

    check_settings: raises where a run of that folder, with those settings, is another run than this one. Only reads.
    Raises RunExists if running would overwrite a run.
    """
    mend = f"use another --run-id, or move {folder} away"
    for name in (checkpoints.FILE, "model.tern", "score.json"):
        if (folder / name).exists() and not (folder / name).is_file():
            raise RunExists(f"{folder / name} is not a file: {mend}")
    finished = finished_run(folder)
    if finished:
        if not resume:
            raise RunExists(f"{folder} holds a finished run ({finished.steps} steps): {mend}")
        check_settings(folder, finished.settings)
        kind = "sliding" if finished.score["sliding"] else "chunked"
        return (f"{folder} is finished and left as it is: {finished.steps} steps, {kind} val_bpb "
                f"{finished.score[kind]['val_bpb']:.8f}, model {finished.score['artifact']['bytes']:,} bytes, sha256 "
                f"{finished.model_sha256[:16]}; for a new run {mend}")
    checkpoint = folder / checkpoints.FILE
    if not checkpoint.exists():
        held = [name for name in ("model.tern", "score.json") if os.path.lexists(folder / name)]
        held += ["log"] if last_record(folder / "metrics.jsonl") else []
        if held:
            raise RunExists(f"{folder} holds the {held[0]} of an earlier run: {mend}")
    elif not resume:
        state = checkpoints.read_state(checkpoint)
        raise RunExists(f"{folder} holds an unfinished run (step {state.get('step')}): continue with --resume auto, or "
                        + mend)
    return None


# What a killed run may leave: halves of files that files.write_atomic, or the scoring process, was writing.
HALF_WRITTEN = re.compile(r"\.(model\.tern|checkpoint\.safetensors|report\.html|(score|details)\.json|"
                          r"\.(score|details)\.json\.[0-9a-f]{8}\.tmp)\.[0-9a-f]{8}\.tmp")


def lock_folder(folder: Path):
    """The open file whose lock keeps other runs out of the folder. Raises RunExists if another process has it.

    The lock goes with the process, however that ends; the file stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as e:
        raise RunExists(f"{folder}: cannot be written ({e.strerror}); choose another --out-dir or --run-id") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunExists(f"{folder}: another run is at work in it ({file.read().strip() or 'unknown'}); wait for it, or "
                        "use another --run-id") from None
    except OSError:  # a file system without locks
        return file
    try:  # for a reader; the lock is what counts
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    except OSError:
        return file
    return file


def remove_half_written(folder: Path) -> None:
    """Remove what a killed run left. Only for the process that holds the folder's lock."""
    for left in folder.iterdir():
        if HALF_WRITTEN.fullmatch(left.name) and left.is_file():
            left.unlink()


class RunFolder:
    """A run's folder as the run has it: what lies there, the lock on it, its log.

    resume: whether a run in it may be continued. config: this run's settings.
    """

    def __init__(self, path: Path, resume: bool, config):
        self.path, self.resume, self.config = path, resume, config
        self.checkpoint, self.artifact = path / checkpoints.FILE, path / "model.tern"
        self.log: Log | None = None
        self.lock = None
        self.unsaved = ""  # why the last checkpoint could not be written; empty if it was

    @property
    def resumes(self) -> bool:
        """Whether there is something to continue from."""
        return self.resume and self.checkpoint.exists()

    def check_settings(self, where: Path, theirs: object) -> None:
        """Raises CheckpointError unless a run that `where` tells of had these settings, but for those that are free."""
        differ = differences(theirs, self.config)
        if differ:
            raise checkpoints.CheckpointError(f"{where}: made with other settings: {', '.join(differ)}; resume with "
                                              "the same ones or use another --run-id")

    def look(self) -> None:
        """Raises AlreadyFinished if nothing is left to do, RunExists if running would overwrite a run."""
        said = look_at_folder(self.path, self.resume, self.check_settings)
        if said:
            raise AlreadyFinished(said)

    def take_together(self, ranks: Ranks, device: torch.device, audit: Callable[[], None]) -> None:
        """On rank 0 audit and take the folder; all ranks leave if that cannot be. Collective.

        Raises what rank 0 met there, on other ranks Elsewhere; AlreadyFinished if another process has just finished
        this very run.
        """
        problem: Exception | None = None
        if ranks.rank == 0:
            try:
                audit()
                self.take()
            except (ValueError, OSError, AlreadyFinished) as e:
                problem = e
        else:
            self.log = Log(self.path, ranks.rank, append=True)
        word = {type(None): 0, AlreadyFinished: 1}.get(type(problem), 2)
        word = int(ranks.sum(torch.tensor(word, dtype=torch.int64, device=device)))  # rank 0's alone
        if problem is not None:
            raise problem
        if word:
            raise AlreadyFinished() if word == 1 else Elsewhere()

    def take(self) -> None:
        """Lock the folder, clear away what a killed run left, and open the log. Raises as look does."""
        self.lock = lock_folder(self.path)
        self.look()  # again: another run may have come and gone
        remove_half_written(self.path)
        self.log = Log(self.path, 0, append=self.resumes)

    def save(self, arrays: Mapping[str, np.ndarray], state: dict) -> None:
        """Write the checkpoint. A disk that is full is noted, not raised: it may have room again by the next one."""
        try:
            checkpoints.write_checkpoint(self.checkpoint, arrays, state)
            self.unsaved = ""
        except WriteError as e:
            self.unsaved = str(e)
            goes_on = "" if state.get("finished") else "training goes on; "
            self.log.line(f"notice      step {state['step']}: {e}; {goes_on}{self.what_is_left()}")

    def what_is_left(self) -> str:
        """For a run that cannot go on."""
        if self.checkpoint.exists():
            return f"the last good checkpoint is {self.checkpoint}: --resume auto continues from it"
        return "no checkpoint was written yet"

    def close(self) -> None:
        for file in (self.log, self.lock):
            if file is not None:
                file.close()
