"""A matrix on many machines through Ray: each run is a task; its line of results comes back to the runner.

    .venv/bin/pip install ray==2.60.0
    python ablations/run.py MATRIX --ray local               # a cluster of this machine alone
    python ablations/run.py MATRIX --ray ADDRESS             # of `ray start --head` on another, or ray://HOST:10001

The programs travel with the tasks. Data do not: each machine makes the folder as the matrix's [data] says, or has it,
and a run is refused where its identity differs from the runner's. Runs stay on the machine that ran them, so rows that
start from others' runs need --runs on a folder that all machines share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from matrix import Job, Matrix, MatrixError

ROOT = Path(__file__).resolve().parents[1]
LEFT_AT_HOME = ["/.git", "/.venv", "/runs", "/records", "/data/*/", "/tests", "/ablations/results"]


def connect(address: str, matrix: Matrix, runs: Path, shared: bool) -> tuple[Callable[[Job], dict], int]:
    """(run a job on the cluster and return its line, how many run at a time). Raises MatrixError."""
    try:
        import ray
    except ImportError:
        raise MatrixError("--ray: Ray is not installed; run: .venv/bin/pip install ray==2.60.0") from None
    if not shared and any(row.init_from or row.score_of for row in matrix.rows):
        raise MatrixError(f"{matrix.path}: rows take others' runs; with --ray give --runs a folder that all machines "
                          "share, and --shared-runs")
    try:
        ray.init(address=None if address == "local" else address, logging_level="warning", log_to_driver=False,
                 runtime_env={"working_dir": str(ROOT), "excludes": LEFT_AT_HOME})
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise MatrixError(f"--ray {address}: no cluster there ({e})") from None
    threads = matrix.threads or 1
    # A timed run has its machine to itself: it asks for a whole node's cores.
    cpus = min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]) if matrix.timed else threads
    task = ray.remote(num_cpus=cpus, max_retries=2)(on_a_worker)
    slots = max(int(ray.cluster_resources().get("CPU", 1) // cpus), 1)

    def submit(job: Job) -> dict:
        try:
            return ray.get(task.remote(job, matrix, str(runs) if shared else ""))
        except ray.exceptions.RayError as e:  # the machine is gone, or the task could not start
            raise MatrixError(f"{job.row.name}, seed {job.seed}: {str(e).strip().splitlines()[-1]}") from None

    return submit, slots


def on_a_worker(job: Job, matrix: Matrix, runs: str) -> dict:
    """Run a job on this machine, in the copy of the repository that came with the task."""
    here = Path.cwd()
    sys.path[:0] = [str(here), str(here / "ablations")]
    import run

    identity = run.prepare_data(matrix)[job.config.data_path]
    if identity != job.data:
        raise RuntimeError(f"{job.config.data_path} on this machine is not the runner's: prepare it again")
    return run.execute(job, matrix, Path(runs) if runs else here / "runs" / "ablations", [], run.Children())
