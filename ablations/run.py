"""Run a matrix of experiments, and report on it.

    python ablations/run.py ablations/matrices/smoke.toml            # run what is missing, then report
    python ablations/run.py MATRIX --dry-run                         # what would run, with ids and solved widths
    python ablations/run.py MATRIX --only base "weight decay"        # some rows
    python ablations/run.py MATRIX --jobs 2                          # two runs at a time, each on its own cores
    python ablations/run.py MATRIX --jobs 16 --device cuda           # sixteen at a time on one GPU
    python ablations/run.py MATRIX --ray ADDRESS                     # on the machines of a Ray cluster (cluster.py)
    python ablations/run.py MATRIX --report                          # only the report

Results are appended to ablations/results/NAME/results.jsonl, one line per run, by an id that hashes settings, code,
data and seed: a run that has a line is not run again, whatever it ended with (--retry runs failures again). Kill it at
any time: at most the runs in flight are lost. A run that crashes, diverges or hangs is a result, with a message.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import patches, report
from ablations.execute import Children, broken, execute
from ablations.matrix import (
    ROOT,
    Job,
    MachineLost,
    Matrix,
    MatrixError,
    data_folders,
    jobs,
    read_matrix,
    source_identity,
)
from ablations.results import Line, Results, read_results
from tern.command import Parser, say_error
from tern.errors import Foreseen
from tern.shards import open_data
from train_gpt import model_bytes


def prepare_data(matrix: Matrix) -> dict[tuple[str, str], str]:
    """Make the data folders that are missing; (folder, tokenizer) -> identity."""
    found = {}
    for path, tokenizer in data_folders(matrix):
        if path in matrix.data and not (ROOT / path / "manifest.json").exists():
            command = [sys.executable, str(ROOT / "data" / "prepare.py"), *matrix.data[path], "--out", path]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise MatrixError(f"{matrix.path}: {path} could not be prepared; see above")
        found[path, tokenizer] = open_data(ROOT / path, ROOT / tokenizer if tokenizer else "").identity
    return found


class Machine:
    """This machine: `slots` runs at a time, each on its own cores."""

    def __init__(self, matrix: Matrix, runs: Path, slots: int):
        self.matrix, self.runs, self.slots = matrix, runs, slots
        self.children, self.free = Children(), queue.SimpleQueue()
        for slot in range(slots):
            self.free.put(cores_of(slot, slots))

    def run(self, job: Job) -> Line:
        """A job's line of results. Raises InterruptedError once stopped."""
        cores = self.free.get()
        try:
            return execute(job, self.matrix, self.runs, cores, self.children)
        finally:
            self.free.put(cores)

    def stop(self) -> None:
        self.children.stop()


def cores_of(slot: int, slots: int) -> list[int]:
    """The cores of one of so many places; none: wherever the system puts it."""
    if slots == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    own = cores[slot * len(cores) // slots : (slot + 1) * len(cores) // slots]
    return own or [cores[slot % len(cores)]]


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------


def to_run(wanted: list[Job], lines: Mapping[str, Line], runs: Path, retry: bool) -> list[Job]:
    """The jobs without a result, and those whose files such a job needs and that are gone; parents first."""
    def finished(job: Job) -> bool:
        line = lines.get(job.id)
        return line is not None and (line.ok or not retry)

    todo = {job.id for job in wanted if not finished(job)}
    for job in reversed(wanted):  # children come after their parents
        if job.id not in todo or job.parent is None:
            continue
        before = lines.get(job.parent.id)
        if before is not None and before.ok and not (runs / job.takes).exists():
            todo.add(job.parent.id)
    return [job for job in wanted if job.id in todo]


class Runner:
    """Runs the jobs of a matrix that have no result yet, on machine, `machine.slots` at a time.

    machine: a Machine, or a cluster.Cluster, which may raise MachineLost.
    """

    def __init__(self, matrix: Matrix, wanted: list[Job], results: Results, runs: Path, machine, retry: bool):
        self.matrix, self.results, self.runs, self.machine = matrix, results, runs, machine
        self.todo = to_run(wanted, results.lines, runs, retry)
        self.parents = {row.init_from for row in matrix.rows} - {""}  # whose latents are needed later
        self.pending: dict[Future, Job] = {}
        self.lost: set[str] = set()  # ids of jobs whose machines went
        self.spent: list[float] = []  # seconds of each run
        print(f"{matrix.name}: {len(wanted)} runs, {len(wanted) - len(self.todo)} of them done before", flush=True)

    def run(self) -> int:
        """The exit status: 130 if stopped, 1 if machines were lost with their runs."""
        previous = {signum: signal.signal(signum, self.on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.machine.slots) as pool:
                while self.todo or self.pending:
                    self.start_some(pool)
                    done, _ = wait(self.pending, return_when=FIRST_COMPLETED)  # at once if nothing is under way
                    for future in done:
                        self.take(future)
        except (KeyboardInterrupt, InterruptedError):
            self.machine.stop()
            print("stopped; the same command goes on where it was", file=sys.stderr)
            return 130
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if self.lost:
            print(f"{len(self.lost)} runs were lost with their machines; the same command runs them", file=sys.stderr)
            return 1
        return 0

    def on_signal(self, signum: int, _frame) -> None:
        self.machine.stop()
        raise KeyboardInterrupt

    def start_some(self, pool: ThreadPoolExecutor) -> None:
        """Give free places to jobs whose parents have ended."""
        under_way = {job.id for job in (*self.todo, *self.pending.values())}
        ready = [job for job in self.todo if job.parent is None or job.parent.id not in under_way]
        for job in ready:
            if len(self.pending) == self.machine.slots:
                return
            self.todo.remove(job)
            if job.parent is not None and job.parent.id in self.lost:
                self.lost.add(job.id)
            elif job.parent is not None and not self.results.lines[job.parent.id].ok:
                message = f"the run it starts from, {job.parent.row.name}, has no result"
                self.results.add(broken(job, self.matrix, message))
            else:
                self.pending[pool.submit(self.work, job)] = job

    def work(self, job: Job) -> Line:
        try:
            return self.machine.run(job)
        except (InterruptedError, MachineLost):
            raise
        except Exception as e:  # whatever it is, it is this run's and not the matrix's
            return broken(job, self.matrix, e)

    def take(self, future: Future) -> None:
        """What a run that ended leaves. Raises MatrixError if the code changed meanwhile."""
        job = self.pending.pop(future)
        who = f"  {job.id} {job.row.name}, seed {job.seed}"
        if source_identity(job.row, job.data) != job.source:
            self.machine.stop()
            raise MatrixError(f"the code changed while {self.matrix.name} ran, so what was in flight is not what its "
                              "id says and was not recorded; run it from a clone that stays as it is")
        try:
            line = future.result()
        except MachineLost as e:
            self.lost.add(job.id)
            print(f"{who}: lost, {e}", file=sys.stderr, flush=True)
            return
        before = self.results.lines.get(job.id)
        if before is None or not before.artifact_sha256:
            self.results.add(line)
        elif line.ok and before.artifact_sha256 != line.artifact_sha256:  # it ran for its files alone
            print(f"{who}: another model than before; its first result stays, what starts from it takes this one",
                  file=sys.stderr, flush=True)
        if job.row.name not in self.parents:
            (self.runs / job.id / "run" / "checkpoint.safetensors").unlink(missing_ok=True)
        self.spent.append(line.seconds)
        left = len(self.todo) + len(self.pending)
        seconds = left * sum(self.spent) / len(self.spent) / self.machine.slots
        said = f"val_bpb {line.val_bpb:.5f}" if line.ok else line.message
        print(f"{who}: {line.status}, {said}, {line.seconds:.0f} s; {left} left, about {clock(seconds)}", flush=True)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


# ---------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------


def dry_run(wanted: list[Job], lines: Mapping[str, Line]) -> None:
    """List the jobs with what is known of them."""
    for job in wanted:
        c, size = job.config, ""
        if not job.row.score_of:
            size = f"{c.num_layers} x {c.model_dim}, mlp {c.hidden_dim}"
            if not any(patches.name_of(patch) in patches.RESHAPING for patch in job.row.patches):
                size += f", {model_bytes(c):,} bytes planned"
        state = lines[job.id].status if job.id in lines else "to run"
        print(f"{job.id}  {job.row.name:<32} seed {job.seed:<6} {state:<9} {size}")


def parse_args(argv: list[str] | None):
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("matrix", help="a TOML file, see matrix.py")
    p.add_argument("--only", nargs="+", help="names of rows")
    p.add_argument("--dry-run", action="store_true", help="only list what would run, once the data are there")
    p.add_argument("--report", action="store_true", help="only write the report")
    p.add_argument("--retry", action="store_true", help="run again what failed before")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (timed ones are never)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"),
                   help="of all runs, and of the report (default: what the matrix says)")
    p.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, or auto")
    p.add_argument("--results", default=str(ROOT / "ablations" / "results"), help="folder of results")
    p.add_argument("--runs", help="folder of the runs themselves (default runs/ablations/NAME)")
    args = p.parse_args(argv)
    if args.jobs < 1:
        raise MatrixError(f"--jobs {args.jobs}: at least 1 is needed")
    if args.ray and args.jobs != 1:
        raise MatrixError("--jobs is for this machine; a cluster runs as many at a time as it has cores for")
    return args


def on_device(device: str | None, wanted: list[Job]) -> list[Job]:
    """Jobs, parents first, on that device in place of the matrix's: other runs, for they give other bits."""
    made: dict[str, Job] = {}
    for job in wanted if device else []:
        parent = made[job.parent.id] if job.parent else None
        made[job.id] = replace(job, config=replace(job.config, device=device), parent=parent)
    return list(made.values()) if device else wanted


def run_matrix(args, matrix: Matrix, wanted: list[Job], folder: Path) -> int:
    """Run what has no result; the exit status."""
    runs = Path(args.runs or ROOT / "runs" / "ablations" / matrix.name).resolve()
    with contextlib.closing(Results(folder / "results.jsonl")) as results, contextlib.ExitStack() as stack:
        if args.ray:
            from ablations import cluster  # which needs Ray

            machine = stack.enter_context(cluster.connect(args.ray, matrix, runs))
        else:
            machine = Machine(matrix, runs, 1 if matrix.timed else args.jobs)
        return Runner(matrix, wanted, results, runs, machine, args.retry).run()


def main(argv: list[str] | None = None) -> int:
    status = 0
    try:
        args = parse_args(argv)
        matrix = read_matrix(args.matrix)
        folder = Path(args.results) / matrix.name
        if not args.report:
            wanted = on_device(args.device, jobs(matrix, prepare_data(matrix), args.only))
            if args.dry_run:
                dry_run(wanted, {line.id: line for line in read_results(folder / "results.jsonl")})
                return 0
            status = run_matrix(args, matrix, wanted, folder)
            if status == 130:
                return status
        asked = on_device(args.device, jobs(matrix, dict.fromkeys(data_folders(matrix), "")))
        paths = report.write(matrix, asked, read_results(folder / "results.jsonl"), folder)
        print("wrote " + ", ".join(map(str, paths)))
        return status
    except (Foreseen, OSError) as e:
        say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
