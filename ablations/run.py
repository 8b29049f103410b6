"""Run a matrix of experiments, and report on it.

    python ablations/run.py ablations/matrices/smoke.toml            # run what is missing, then report
    python ablations/run.py MATRIX --dry-run                         # what would run, with ids and solved widths
    python ablations/run.py MATRIX --only base "weight decay"        # some rows
    python ablations/run.py MATRIX --jobs 2                          # two runs at a time, each on its own cores
    python ablations/run.py MATRIX --ray ADDRESS                     # on the machines of a Ray cluster (cluster.py)
    python ablations/run.py MATRIX --report                          # only the report

Results are appended to ablations/results/NAME/results.jsonl, one line per run, by an id that hashes settings, code,
data and seed: a run that has a line is not run again, whatever it ended with (--retry runs failures again). Kill it at
any time: at most the runs in flight are lost. A run that crashes, diverges or hangs is a result, with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "ablations")) if path not in sys.path]

import diagnose  # noqa: E402
import patches  # noqa: E402
import program  # noqa: E402
import report  # noqa: E402
from matrix import (  # noqa: E402
    Job,
    MachineLost,
    Matrix,
    MatrixError,
    data_folders,
    jobs,
    read_matrix,
    source_identity,
)

import eval_bpb  # noqa: E402
import formats  # noqa: E402
import runlog  # noqa: E402
import train_gpt  # noqa: E402

PROGRAM = Path(program.__file__)
# Of this user on this machine, whatever matrix or checkout.
TIMED = Path(tempfile.gettempdir()) / f"ablations_timed_{os.getuid()}.lock"


# ---------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------


def flags(config: train_gpt.Config) -> list[str]:
    """Every setting as a flag, so that a run does not depend on presets."""
    shown = {name: int(value) if isinstance(value, bool) else value for name, value in vars(config).items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in shown.items()]


def run_environment() -> dict[str, str]:
    """The environment without what could change a setting."""
    names = {f.name.upper() for f in fields(train_gpt.Config)} | set(train_gpt.FOREIGN_ENV) | {"PRESET"}
    names |= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in names}


@contextlib.contextmanager
def machine_to_itself(timed: bool, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
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
        self.lock, self.running, self.stopped = threading.RLock(), set(), False  # a second signal may come in stop()

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


def execute(job: Job, matrix: Matrix, runs: Path, cores: list[int], children: Children) -> dict:
    """Run a job in runs/ID and return its line of results. Raises InterruptedError if the runner was stopped."""
    folder, began = runs / job.id, time.time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = matrix.threads or len(cores) or runlog.cores()
    head = [sys.executable, str(PROGRAM)]
    timeout = min(matrix.timeout + 3 * matrix.budget[1] * matrix.timed, 1e9)  # more than that cannot be waited for
    output = folder / "output.txt"
    if job.row.score_of:
        c = job.config
        command = [*head, *patch_flags(job.row.score_patches), *patch_flags(job.parent.row.patches), "eval_bpb",
                   str(runs / job.parent.id / "run" / "model.tern"), "--data", c.data_path, "--stride",
                   str(c.eval_stride), "--batch-seqs", str(c.eval_batch_seqs), "--json", str(folder / "score.json")]
        command += ["--tokenizer-path", c.tokenizer_path] if c.tokenizer_path else []
    else:
        settings = train_gpt.replace(job.config, out_dir=str(folder), run_id="run", threads=threads)
        if job.row.init_from:
            settings = train_gpt.replace(settings, init_from=str(runs / job.parent.id / "run"))
        command = [*head, *patch_flags(job.row.patches), "train", *flags(settings)]
    with machine_to_itself(matrix.timed, lambda: children.stopped):
        status = children.call(command, output, cores, threads, timeout)
    line = describe(job, matrix) | {"threads": threads, "seconds": time.time() - began}
    try:
        line |= score_results(folder) if job.row.score_of else train_results(folder / "run", job)
        line |= {"status": "ok", "message": ""}
    except (OSError, KeyError, ValueError) as e:
        line |= failure(status, output, folder / "run", e)
    return line


def patch_flags(patches: tuple[str, ...]) -> list[str]:
    return [part for patch in patches for part in ("--patch", patch)]


def describe(job: Job, matrix: Matrix) -> dict:
    """What a line says of its run, whatever came of it."""
    return {
        "id": job.id, "matrix": matrix.name, "row": job.row.name, "seed": job.seed,
        "settings": job.settings,
        "patches": list(job.row.patches), "score_patches": list(job.row.score_patches),
        "parent": job.parent.id if job.parent else "", "source": job.source, "data": job.data,
        "machine": runlog.machine(), "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def broken(job: Job, matrix: Matrix, why: object) -> dict:
    """The line of a run that never was one."""
    said = why if isinstance(why, str) else repr(why)
    return describe(job, matrix) | {"status": "failed", "message": said[:500], "steps": 0, "seconds": 0.0}


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_results(folder: Path, job: Job) -> dict:
    """What a finished run measured. Raises KeyError or ValueError if it did not finish, or not as it was told."""
    records = read_metrics(folder)
    final = {r["type"]: r for r in records}.get("final")
    if final is None:
        raise ValueError("the run has no final record")
    opens_a_gap = any(p.partition("=")[0] in patches.OPEN_A_GAP for p in job.row.patches)
    if not opens_a_gap and (final["roundtrip_gap"] or not final["logits_identical"]):
        raise ValueError(f"the file is not the model that was trained: gap {final['roundtrip_gap']:.8f} bpb")
    steps = [r for r in records if r["type"] == "train"]
    tensors, _ = eval_bpb.pack.read_artifact(folder / "model.tern")
    sliding = final["score"]["sliding"]
    return {
        "val_bpb": final["score"]["chunked"]["val_bpb"], "val_loss": final["score"]["chunked"]["val_loss"],
        "sliding_bpb": sliding["val_bpb"] if sliding else None, "gap": final["roundtrip_gap"],
        "logits_identical": final["logits_identical"], "bytes_model": final["bytes_model"], "steps": final["step"],
        "tokens": final["tokens_seen"], "train_seconds": final["seconds"]["train"],
        "curve": [[r["step"], round(r["elapsed"], 3), r["tokens_seen"], r["loss"]] for r in steps],
        "codes_curve": [[r["step"], r["zero_frac"], r["churn"]] for r in steps if r["churn"] is not None],
        "artifact_sha256": final["artifact_sha256"], "active": active(folder, tensors, job.config),
        "formats": diagnose.formats(folder, tensors),
    }


def active(folder: Path, tensors: dict, config: train_gpt.Config) -> str:
    """The proof that the run's quantizers are active; empty where the settings ask for none."""
    proofs = []
    if config.matrix_format not in formats.VALUE_DTYPES:
        state, _ = train_gpt.load_checkpoint(folder)
        names = [name.removeprefix("latent/") for name in state if name.startswith("latent/")]
        proofs.append(diagnose.prove_active(tensors, config, names))
    if config.embed_format not in formats.VALUE_DTYPES:
        proofs.append(diagnose.prove_embedding(tensors, config))
    return "; ".join(proofs)


def score_results(folder: Path) -> dict:
    scored = json.loads((folder / "score.json").read_text())
    sliding = scored["sliding"]
    return {"val_bpb": scored["chunked"]["val_bpb"], "val_loss": scored["chunked"]["val_loss"],
            "sliding_bpb": sliding["val_bpb"] if sliding else None, "bytes_model": scored["artifact"]["bytes"],
            "artifact_sha256": scored["artifact"]["sha256"]}


def failure(status: int, output: Path, folder: Path, e: Exception) -> dict:
    """How a run ended that has no result: its last error line, and how far it came."""
    lines = [text for text in output.read_text(errors="replace").splitlines() if text.strip()]
    errors = [text for text in lines if text.startswith("error:")] or lines[-1:] or [repr(e)]
    try:
        step = max((r["step"] for r in read_metrics(folder) if r["type"] == "train"), default=0)
    except (OSError, ValueError):
        step = 0
    kind = "timeout" if status == -1 else "diverged" if "not finite" in errors[-1] else "failed"
    return {"status": kind, "message": errors[-1].removeprefix("error: ")[:500] if status else repr(e)[:500],
            "exit_status": status, "steps": step}


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------


class Results:
    """results.jsonl of a matrix: one line per finished run. One runner at a time."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MatrixError(f"{path}: another runner is at work on this matrix") from None
        self.lines = {line["id"]: line for line in read_results(path)}
        self.file.seek(0)
        text = self.file.read()
        last = text[text.rfind(b"\n") + 1 :]
        try:
            if last:
                read_line(last)
                self.file.write(b"\n")  # all of it but its end
        except ValueError:  # a line that a kill cut off
            self.file.truncate(len(text) - len(last))

    def close(self) -> None:
        self.file.close()  # which lets go of the lock

    def add(self, line: dict) -> None:
        self.file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines[line["id"]] = line


# Of every line, of one with a result and of one without.
NEEDED = {"id": str, "row": str, "seed": int, "status": str, "settings": dict, "patches": list, "score_patches": list,
          "parent": str}
IF_OK, IF_NOT = {"val_bpb": float | int}, {"steps": int, "message": str}
IF_THERE = {"formats": dict, "curve": list, "codes_curve": list, "finished": str, "bytes_model": int,
            "gap": float | int, "train_seconds": float | int}


def read_line(text: bytes) -> dict:
    """A line of results. Raises ValueError if it is none."""
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("not an object")
    needed = NEEDED | (IF_OK if line.get("status") == "ok" else IF_NOT)
    needed |= {key: kind for key, kind in IF_THERE.items() if key in line}
    if wrong := [key for key, kind in needed.items() if not isinstance(line.get(key), kind)]:
        raise ValueError(f"{wrong[0]} is {line.get(wrong[0])!r}")
    return line


def read_results(path: Path) -> list[dict]:
    """The lines of a results file, the last of each id; a last line that was cut off is left out."""
    if not path.exists():
        return []
    texts = path.read_bytes().split(b"\n")
    lines = []
    for i, text in enumerate(texts):
        try:
            lines += [read_line(text)] if text else []
        except ValueError as e:
            if i < len(texts) - 1:
                raise MatrixError(f"{path}, line {i + 1}: not a line of results ({e}); remove it") from None
    return list({line["id"]: line for line in lines}.values())


def prepare_data(matrix: Matrix) -> dict[tuple[str, str], str]:
    """Make the data folders that are missing; (folder, tokenizer) -> identity."""
    found = {}
    for path, tokenizer in data_folders(matrix):
        if not (ROOT / path / "manifest.json").exists() and path in matrix.data:
            command = [sys.executable, str(ROOT / "data" / "prepare.py"), *matrix.data[path], "--out", path]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise MatrixError(f"{matrix.path}: {path} could not be prepared; see above")
        found[path, tokenizer] = eval_bpb.open_data(ROOT / path, tokenizer and ROOT / tokenizer).identity
    return found


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


def to_run(wanted: list[Job], lines: dict[str, dict], runs: Path, retry: bool) -> list[Job]:
    """The jobs without a result, and those whose files such a job needs and that are gone; parents first."""
    def finished(job: Job) -> bool:
        line = lines.get(job.id)
        return line is not None and (line["status"] == "ok" or not retry)

    todo = {job.id for job in wanted if not finished(job)}
    for job in reversed(wanted):  # children come after their parents
        if job.id in todo and job.parent and lines.get(job.parent.id, {}).get("status") == "ok":
            todo |= set() if (runs / job.takes).exists() else {job.parent.id}
    return [job for job in wanted if job.id in todo]


class Machine:
    """This machine: `slots` runs at a time, each on its own cores."""

    def __init__(self, matrix: Matrix, runs: Path, slots: int):
        self.matrix, self.runs, self.slots = matrix, runs, slots
        self.children, self.free = Children(), queue.SimpleQueue()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for slot in range(slots):
            own = cores[slot * len(cores) // slots : (slot + 1) * len(cores) // slots] if slots > 1 else []
            self.free.put(own or (cores[slot % len(cores) :][:1] if slots > 1 and cores else []))

    def run(self, job: Job) -> dict:
        """A job's line of results. Raises InterruptedError once stopped."""
        cores = self.free.get()
        try:
            return execute(job, self.matrix, self.runs, cores, self.children)
        finally:
            self.free.put(cores)

    def stop(self) -> None:
        self.children.stop()


def run_all(matrix: Matrix, wanted: list[Job], results: Results, runs: Path, machine, retry: bool) -> int:
    """Run the jobs that have no result yet; exit status: 130 if stopped, 1 if machines were lost with their runs.

    machine: what runs them, `machine.slots` at a time: a Machine, or a cluster.Cluster, which may raise MachineLost.
    """
    todo = to_run(wanted, results.lines, runs, retry)
    parents = {row.init_from for row in matrix.rows} - {""}
    print(f"{matrix.name}: {len(wanted)} runs, {len(wanted) - len(todo)} of them done before", flush=True)

    def work(job: Job) -> dict:
        try:
            return machine.run(job)
        except (InterruptedError, MachineLost):
            raise
        except Exception as e:  # whatever it is, it is this run's and not the matrix's
            return broken(job, matrix, e)

    def on_signal(signum: int, _frame) -> None:
        machine.stop()
        raise KeyboardInterrupt

    previous = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    spent: list[float] = []
    pending: dict[Future, Job] = {}
    lost: set[str] = set()
    try:
        with ThreadPoolExecutor(machine.slots) as pool:
            while todo or pending:
                under_way = {job.id for job in (*todo, *pending.values())}
                for job in [j for j in todo if not j.parent or j.parent.id not in under_way]:
                    if len(pending) < machine.slots:
                        todo.remove(job)
                        if job.parent and job.parent.id in lost:
                            lost.add(job.id)
                        elif job.parent and results.lines[job.parent.id]["status"] != "ok":
                            message = f"the run it starts from, {job.parent.row.name}, has no result"
                            results.add(broken(job, matrix, message))
                        else:
                            pending[pool.submit(work, job)] = job
                done, _ = wait(pending, return_when=FIRST_COMPLETED)  # at once if all that was left had no parent
                for future in done:
                    job = pending.pop(future)
                    if source_identity(job.row, job.data) != job.source:
                        machine.stop()
                        raise MatrixError(f"the code changed while {matrix.name} ran, so what was in flight is not "
                                          "what its id says and was not recorded; run it from a clone that stays as "
                                          "it is")
                    try:
                        line = future.result()
                    except MachineLost as e:
                        lost.add(job.id)
                        print(f"  {job.id} {job.row.name}, seed {job.seed}: lost, {e}", file=sys.stderr, flush=True)
                        continue
                    if before := results.lines.get(job.id, {}).get("artifact_sha256"):  # run for its files alone
                        if line["status"] == "ok" and before != line["artifact_sha256"]:
                            print(f"  {job.id} {job.row.name}, seed {job.seed}: another model than before; its first "
                                  "result stays, what starts from it takes this one", file=sys.stderr, flush=True)
                    else:
                        results.add(line)
                    if job.row.name not in parents:
                        (runs / job.id / "run" / "checkpoint.safetensors").unlink(missing_ok=True)
                    spent.append(line["seconds"])
                    left = (len(todo) + len(pending)) * sum(spent) / len(spent) / machine.slots
                    said = f"val_bpb {line['val_bpb']:.5f}" if line["status"] == "ok" else line["message"]
                    print(f"  {job.id} {job.row.name}, seed {job.seed}: {line['status']}, {said}, "
                          f"{line['seconds']:.0f} s; {len(todo) + len(pending)} left, about {clock(left)}", flush=True)
    except (KeyboardInterrupt, InterruptedError):
        machine.stop()
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if lost:
        print(f"{len(lost)} runs were lost with their machines; the same command runs them", file=sys.stderr)
    return int(bool(lost))


def dry_run(matrix: Matrix, wanted: list[Job], lines: dict[str, dict]) -> None:
    import plan

    for job in wanted:
        c, line = job.config, lines.get(job.id)
        size = "" if job.row.score_of else f"{c.num_layers} x {c.model_dim}, mlp {c.hidden_dim}"
        if size and not any(p.partition("=")[0] in patches.RESHAPING for p in job.row.patches):
            size += f", {plan.model_bytes(c):,} bytes planned"
        print(f"{job.id}  {job.row.name:<32} seed {job.seed:<6} {line['status'] if line else 'to run':<9} {size}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("matrix", help="a TOML file, see matrix.py")
    p.add_argument("--only", nargs="+", help="names of rows")
    p.add_argument("--dry-run", action="store_true", help="only list what would run, once the data are there")
    p.add_argument("--report", action="store_true", help="only write the report")
    p.add_argument("--retry", action="store_true", help="run again what failed before")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (timed ones are never)")
    p.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, or auto (pip install '.[ray]')")
    p.add_argument("--results", default=str(ROOT / "ablations" / "results"), help="folder of results")
    p.add_argument("--runs", help="folder of the runs themselves (default runs/ablations/NAME)")
    args, status = p.parse_args(argv), 0
    try:
        if args.jobs < 1:
            raise MatrixError(f"--jobs {args.jobs}: at least 1 is needed")
        if args.ray and args.jobs != 1:
            raise MatrixError("--jobs is for this machine; a cluster runs as many at a time as it has cores for")
        matrix = read_matrix(args.matrix)
        folder = Path(args.results) / matrix.name
        if not args.report:
            wanted = jobs(matrix, prepare_data(matrix), args.only)
            if args.dry_run:
                dry_run(matrix, wanted, {line["id"]: line for line in read_results(folder / "results.jsonl")})
                return 0
            runs = Path(args.runs or ROOT / "runs" / "ablations" / matrix.name).resolve()
            with contextlib.closing(Results(folder / "results.jsonl")) as results, contextlib.ExitStack() as stack:
                if args.ray:
                    import cluster

                    machine = stack.enter_context(cluster.connect(args.ray, matrix, runs))
                else:
                    machine = Machine(matrix, runs, 1 if matrix.timed else args.jobs)
                if (status := run_all(matrix, wanted, results, runs, machine, args.retry)) == 130:
                    return status
        asked = jobs(matrix, dict.fromkeys(data_folders(matrix), ""))
        paths = report.write(matrix, asked, read_results(folder / "results.jsonl"), folder)
        print("wrote " + ", ".join(map(str, paths)))
        return status
    except (MatrixError, eval_bpb.DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
