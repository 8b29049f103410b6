"""One run of a matrix in a process of its own, as a machine of a cluster starts it (cluster.py).

    python ablations/worker.py FOLDER

The folder holds matrix.toml and order.json: the "id" and "row" of the run, its "threads", and where the "data" folders
and "tokenizers" that the matrix names are on this machine. The run is made in the folder, and its line of results is
line.json. The matrix is read again here, with this machine's code and data: an id that is not found means they differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ablations")]

import program  # noqa: E402

if __name__ == "__main__":
    program.end_with_parent()  # before what takes seconds to import

import run  # noqa: E402
from matrix import Job, MatrixError, data_folders, jobs, read_matrix  # noqa: E402

import eval_bpb  # noqa: E402


def moved(job: Job, order: dict) -> Job:
    """The job with this machine's folders; its id does not depend on where things are."""
    c = job.config
    config = dataclasses.replace(c, data_path=order["data"][c.data_path],
                                 tokenizer_path=order["tokenizers"].get(c.tokenizer_path, ""))
    return dataclasses.replace(job, config=config)


def main() -> int:
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    try:
        matrix = read_matrix(folder / "matrix.toml")
        identity = {(path, tokenizer): eval_bpb.open_data(
            order["data"][path], order["tokenizers"].get(tokenizer, "")).identity if path in order["data"] else ""
            for path, tokenizer in data_folders(matrix)}
        job = next((job for job in jobs(matrix, identity, [order["row"]]) if job.id == order["id"]), None)
        if job is None:
            raise MatrixError(f"no run of {matrix.name} is {order['id']} with the code and data of this machine")
    except (MatrixError, eval_bpb.DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    matrix = dataclasses.replace(matrix, threads=order["threads"])
    try:
        line = run.execute(moved(job, order), matrix, folder, [], run.Children())
    except Exception as e:  # whatever it is, it is this run's and not the machine's
        line = run.broken(job, matrix, e)
    (folder / "line.part").write_text(json.dumps(line))
    (folder / "line.part").rename(folder / "line.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
