"""One run of a matrix in a process of its own, as a machine of a cluster starts it (cluster.py).

    python ablations/worker.py ORDER.json

The order holds paths, "matrix", "runs" and "line" (of the file to write), the "id" of the run, and under "data" where
the data folders that the matrix names are on this machine.
The matrix is read again here, with this machine's code and data: an id that is not found means that they differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ablations")]

import program  # noqa: E402
import run  # noqa: E402
from matrix import Job, MatrixError, data_folders, jobs, read_matrix  # noqa: E402

import eval_bpb  # noqa: E402


def moved(job: Job, data: dict[str, str]) -> Job:
    """The job with this machine's folder of its data; its id does not depend on where the data are."""
    config = dataclasses.replace(job.config, data_path=data[job.config.data_path])
    return dataclasses.replace(job, config=config)


def main() -> int:
    program.end_with_parent()
    order = json.loads(Path(sys.argv[1]).read_text())
    try:
        matrix = read_matrix(order["matrix"])
        identity = {(path, tokenizer): eval_bpb.open_data(order["data"][path], tokenizer).identity
                    for path, tokenizer in data_folders(matrix)}
        job = next((job for job in jobs(matrix, identity) if job.id == order["id"]), None)
        if job is None:
            raise MatrixError(f"no run of {matrix.name} is {order['id']} with the code and data of this machine")
    except (MatrixError, eval_bpb.DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    line = run.execute(moved(job, order["data"]), matrix, Path(order["runs"]), [], run.Children())
    Path(order["line"]).write_text(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
