"""One run of a matrix, as processes of this machine: started, watched, measured. Its line of results is all it leaves,
beside its files in runs/ID."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pack
import train_gpt
from ablations import diagnose, patches, program
from ablations.matrix import ROOT, Job, Matrix, code_identity
from ablations.results import Line, line_of
from tern import machine, processes
from tern.foreign import FOREIGN_ENV
from tern.groups import VALUE_DTYPES

PROGRAM = Path(program.__file__)
# Of this user on this machine, whatever matrix or checkout.
TIMED = Path(tempfile.gettempdir()) / f"ablations_timed_{os.getuid()}.lock"
LONGEST = 1e9  # seconds: more than that cannot be waited for


# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------


def run_environment() -> dict[str, str]:
    """The environment without what could change a setting."""
    names = {f.name.upper() for f in fields(train_gpt.Config)} | set(FOREIGN_ENV) | {"PRESET"}
    return {name: value for name, value in processes.environment_alone(os.environ).items() if name not in names}


def never() -> bool:
    return False


@contextlib.contextmanager
def machine_to_itself(timed: bool, stopped: Callable[[], bool] = never) -> Iterator[None]:
    """Timed runs alone, others together: also among several runners on one machine. Raises InterruptedError."""
    with open(TIMED, "a") as lock:
        while True:
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if timed else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stopped():
                    raise InterruptedError from None
                time.sleep(0.2)
        yield


class Children:
    """The processes in flight, so that all can be stopped."""

    def __init__(self):
        self.lock = threading.RLock()  # a second signal may come in stop()
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def call(self, command: list[str], output: Path, cores: list[int], threads: int, timeout: float) -> int:
        """Exit status of a command, its output in a file; -1: too long. Raises InterruptedError once stopped."""
        def child() -> None:
            if cores:
                os.sched_setaffinity(0, cores)

        env = run_environment() | {"OMP_NUM_THREADS": str(threads), program.PARENT: str(os.getpid())}
        with open(output, "ab") as out:
            with self.lock:
                if self.stopped:
                    raise InterruptedError
                process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                                           preexec_fn=child, start_new_session=True)
                self.running.add(process)
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                kill_group(process)
                return -1
            finally:
                with self.lock:
                    self.running.discard(process)
                if self.stopped:
                    raise InterruptedError

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------


def execute(job: Job, matrix: Matrix, runs: Path, cores: list[int], children: Children) -> Line:
    """Run a job in runs/ID and return its line of results. Raises InterruptedError if the runner was stopped."""
    folder, began = runs / job.id, time.time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = matrix.threads or len(cores) or machine.cores()
    timeout = matrix.timeout
    if matrix.timed:
        timeout += 3 * matrix.budget[1]
    output = folder / "output.txt"
    with machine_to_itself(matrix.timed, lambda: children.stopped):
        status = children.call(command_of(job, runs, threads), output, cores, threads, min(timeout, LONGEST))
    described = describe(job, matrix) | {"threads": threads, "seconds": time.time() - began}
    try:
        measured = score_results(folder) if job.row.score_of else train_results(folder / "run", job)
        return line_of(described | measured | {"status": "ok"})
    except (OSError, KeyError, ValueError) as e:
        return line_of(described | failure(status, output, folder / "run", e))


def command_of(job: Job, runs: Path, threads: int) -> list[str]:
    """What trains a job's model, or scores its parent's, in runs/ID."""
    c, folder = job.config, runs / job.id
    command = [sys.executable, str(PROGRAM)]
    if not job.row.score_of:
        settings = replace(c, out_dir=str(folder), run_id="run", threads=threads, write_page=False)
        if job.row.init_from:
            settings = replace(settings, init_from=str(runs / job.parent.id / "run"))
        return [*command, *patch_flags(job.row.patches), "train", *flags(settings)]
    command += [*patch_flags(job.row.score_patches), *patch_flags(job.parent.row.patches), "eval_bpb"]
    command += [str(runs / job.takes), "--data", c.data_path, "--stride", str(c.eval_stride)]
    command += ["--batch-seqs", str(c.eval_batch_seqs), "--json", str(folder / "score.json")]
    if c.tokenizer_path:
        command += ["--tokenizer-path", c.tokenizer_path]
    return command


def flags(config: train_gpt.Config) -> list[str]:
    """Every setting as a flag, so that a run does not depend on presets."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items()]


def patch_flags(names: tuple[str, ...]) -> list[str]:
    return [word for name in names for word in ("--patch", name)]


# ---------------------------------------------------------------------------------------------------------------
# Its line of results
# ---------------------------------------------------------------------------------------------------------------


def describe(job: Job, matrix: Matrix) -> dict:
    """What a line says of its run, whatever came of it."""
    return {
        "id": job.id, "matrix": matrix.name, "row": job.row.name, "seed": job.seed, "settings": job.settings,
        "patches": list(job.row.patches), "score_patches": list(job.row.score_patches),
        "parent": job.parent.id if job.parent else "", "source": job.source, "code": code_identity(), "data": job.data,
        "machine": machine.describe(), "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def broken(job: Job, matrix: Matrix, why: object) -> Line:
    """The line of a run that never was one."""
    said = why if isinstance(why, str) else repr(why)
    return line_of(describe(job, matrix) | {"status": "failed", "message": said[:500], "steps": 0})


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_results(folder: Path, job: Job) -> dict:
    """What a finished run measured. Raises KeyError or ValueError if it did not finish, or not as it was told."""
    records = read_metrics(folder)
    if not records or records[-1]["type"] != "final":
        raise ValueError("the run has no final record")
    final = records[-1]
    opens_a_gap = any(patches.name_of(patch) in patches.OPEN_A_GAP for patch in job.row.patches)
    if not opens_a_gap and (final["roundtrip_gap"] or not final["logits_identical"]):
        raise ValueError(f"the file is not the model that was trained: gap {final['roundtrip_gap']:.8f} bpb")
    steps = [record for record in records if record["type"] == "train"]
    tensors, _ = pack.read_artifact(folder / "model.tern")
    return scores(final["score"]) | {
        "gap": final["roundtrip_gap"], "logits_identical": final["logits_identical"], "steps": final["step"],
        "tokens": final["tokens_seen"], "train_seconds": final["seconds"]["train"],
        "curve": [[r["step"], round(r["elapsed"], 3), r["tokens_seen"], r["loss"]] for r in steps],
        "codes_curve": [[r["step"], r["zero_frac"], r["churn"]] for r in steps if r["churn"] is not None],
        "active": active(folder, tensors, job.config, job.row.patches),
        "formats": diagnose.formats(folder, tensors),
    }


def score_results(folder: Path) -> dict:
    """What a score measured."""
    return scores(json.loads((folder / "score.json").read_text()))


def scores(scored: dict) -> dict:
    """Of the JSON of eval_bpb.py."""
    chunked, sliding, artifact = scored["chunked"], scored["sliding"], scored["artifact"]
    return {"val_bpb": chunked["val_bpb"], "val_loss": chunked["val_loss"],
            "sliding_bpb": sliding["val_bpb"] if sliding else None, "bytes_model": artifact["bytes"],
            "artifact_sha256": artifact["sha256"]}


def active(folder: Path, tensors: dict, config: train_gpt.Config, applied: Sequence[str] = ()) -> str:
    """The proof that the run's quantizers are active, with these patches; empty where the settings ask for none."""
    proofs = []
    if config.matrix_format not in VALUE_DTYPES:
        state, _ = train_gpt.load_checkpoint(folder)
        names = [name.removeprefix("latent/") for name in state if name.startswith("latent/")]
        proofs.append(diagnose.prove_active(tensors, config, names,
                                            lambda name: patches.settings_of(applied, config, name)))
    if config.embed_format not in VALUE_DTYPES:
        proofs.append(diagnose.prove_embedding(tensors, config))
    return "; ".join(proofs)


def failure(status: int, output: Path, folder: Path, e: Exception) -> dict:
    """How a run ended that has no result: its last error line, and how far it came."""
    lines = [text for text in output.read_text(errors="replace").splitlines() if text.strip()]
    errors = [text for text in lines if text.startswith("error:")] or lines[-1:] or [repr(e)]
    try:
        step = max((r["step"] for r in read_metrics(folder) if r["type"] == "train"), default=0)
    except (OSError, ValueError):
        step = 0
    message = errors[-1].removeprefix("error: ") if status else repr(e)
    kind = "failed"
    if status == -1:
        kind = "timeout"
    elif "not finite" in errors[-1]:
        kind = "diverged"
    return {"status": kind, "message": message[:500], "exit_status": status, "steps": step}
