"""The runs of a matrix on the machines of a Ray cluster.

    pip install '.[ray]'
    ray start --head --num-cpus=0                    # on one machine; ray start --address=HEAD:6379 on the others
    python ablations/run.py MATRIX --ray auto        # or HEAD:6379

Every machine needs this project's environment (the same Python, Ray, torch and numpy), and nothing else: the code and
the data go with the first run to each machine. A corpus of more than SHIPPED bytes is not sent: it must lie in the same
folder on every machine, and so must a tokenizer outside the data folder. A run gets as many cores as the matrix has
threads, or a whole machine, and a GPU where there are any (not measured). Results and files of runs come back to where
a run on this machine would have put them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from matrix import ROOT, Job, MachineLost, Matrix, MatrixError, data_folders

try:
    import ray
except ImportError:
    raise MatrixError("--ray needs Ray: pip install '.[ray]'") from None

CODE = ("*.py", "ablations/*.py", "data/*.py")  # what a run needs of this repository
SHIPPED = 2**30  # bytes of a data folder that are sent to machines that do not have it
SAME = ("torch", "numpy")  # packages whose versions decide what a run computes


@dataclass(frozen=True)
class Folder:
    """A data folder: where it lies here, its manifest, and the zip of it as an object of Ray's, if it may be sent."""

    path: str  # as the matrix names it
    here: str
    manifest: bytes
    parcel: list  # of the reference: inside a list Ray does not fetch it before it is asked for


# ---------------------------------------------------------------------------------------------------------------
# On a machine of the cluster. These functions are sent by value, so they use nothing else of this project.
# ---------------------------------------------------------------------------------------------------------------


def unpacked(parcel: list, name: str) -> Path:
    """The folder of a zip on this machine, made when first asked for, whole or not at all."""
    store = Path(tempfile.gettempdir()) / f"ablations-{os.getuid()}"
    store.mkdir(mode=0o700, exist_ok=True)
    if (there := store / name).exists():
        return there
    making = Path(tempfile.mkdtemp(dir=store))
    zipfile.ZipFile(io.BytesIO(ray.get(parcel[0]))).extractall(making)
    try:
        making.rename(there)
    except OSError:  # another run of this machine was first
        shutil.rmtree(making)
    return there


def local_data(folder: Folder, name: str) -> str:
    manifest = Path(folder.here) / "manifest.json"
    if manifest.exists() and manifest.read_bytes() == folder.manifest:
        return folder.here
    if not folder.parcel:
        raise RuntimeError(f"{folder.path} is too large to be sent: put it at {folder.here} on {os.uname().nodename}")
    return str(unpacked(folder.parcel, name))


def run_here(job: str, key: str, code: list, matrix: bytes, folders: list[Folder], versions: dict[str, str],
             taken: dict[str, bytes], keep_latents: bool) -> tuple[dict, dict[str, bytes]]:
    """Run a job, by id; its line, and its files by name. Raises RuntimeError if it could not even begin."""
    if (mine := {name: version(name) for name in SAME}) != versions:
        raise RuntimeError(f"{os.uname().nodename} has {mine}, the machine that asks {versions}: install the same")
    root = unpacked(code, f"code-{key}")
    with tempfile.TemporaryDirectory(prefix="ablation-") as place:
        runs = Path(place)
        for name, content in taken.items():
            (runs / name).parent.mkdir(parents=True)
            (runs / name).write_bytes(content)
        (runs / "matrix.toml").write_bytes(matrix)
        order = {"matrix": str(runs / "matrix.toml"), "id": job, "runs": place, "line": str(runs / "line.json"),
                 "data": {f.path: local_data(f, f"data-{key}-{i}") for i, f in enumerate(folders)}}
        (runs / "order.json").write_text(json.dumps(order))
        command = [sys.executable, str(root / "ablations" / "worker.py"), str(runs / "order.json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)
        try:
            said, _ = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if not (runs / "line.json").exists():
            raise RuntimeError(f"{os.uname().nodename}: {(said.strip() or 'ended without a word').splitlines()[-1]}")
        line = json.loads((runs / "line.json").read_text())
        files = {str(path.relative_to(runs)): path.read_bytes() for path in (runs / job).rglob("*") if path.is_file()
                 and (keep_latents or path.name != "checkpoint.safetensors")}
    return line, files


# ---------------------------------------------------------------------------------------------------------------
# Here
# ---------------------------------------------------------------------------------------------------------------


def zipped(files: dict[str, Path]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, path in files.items():
            archive.write(path, name)
    return out.getvalue()


def folder_of(path: str) -> Folder:
    here = (ROOT / path).resolve()
    files = {file.name: file for file in sorted(here.iterdir()) if file.is_file()}
    small = sum(file.stat().st_size for file in files.values()) <= SHIPPED
    return Folder(path, str(here), files["manifest.json"].read_bytes(), [ray.put(zipped(files))] if small else [])


def by_value() -> None:
    """Send what this module defines as code: the other machines cannot import it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Cluster:
    """What run.run_all runs jobs on: `slots` of them at a time."""

    def __init__(self, matrix: Matrix, runs: Path):
        self.runs, self.stopped = runs, False
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise MatrixError("no machine of the Ray cluster has a core to give; ray start --address=... some")
        whole = min(int(node["CPU"]) for node in nodes)
        cpus = whole if matrix.timed or not matrix.threads else min(matrix.threads, whole)
        gpus = int(any(node.get("GPU") for node in nodes))
        self.slots = max(1, sum(int(min(node["CPU"] // cpus, node.get("GPU", 0) / gpus if gpus else 1e9))
                                for node in nodes))
        print(f"Ray: {len(nodes)} machines, {self.slots} runs at a time, {cpus} cores {'and a GPU ' * gpus}each")
        by_value()
        # A run whose machine is lost goes to another, as long as there are some.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(run_here)
        code = {str(path.relative_to(ROOT)): path for glob in CODE for path in sorted(ROOT.glob(glob))}
        self.code, self.key = [ray.put(zipped(code))], os.urandom(8).hex()
        self.folders = [folder_of(path) for path in dict.fromkeys(path for path, _ in data_folders(matrix))]
        self.matrix = matrix.path.read_bytes()
        self.parents = {row.init_from for row in matrix.rows} - {""}

    def run(self, job: Job) -> dict:
        """A job's line of results; its files are in runs/ID. Raises MachineLost, InterruptedError, RuntimeError."""
        taken = {job.takes: (self.runs / job.takes).read_bytes()} if job.parent else {}
        try:
            line, files = ray.get(self.remote.remote(
                job.id, self.key, self.code, self.matrix, self.folders, {name: version(name) for name in SAME}, taken,
                job.row.name in self.parents))
        except ray.exceptions.RayTaskError as e:
            raise e.cause if isinstance(e.cause, RuntimeError) else RuntimeError(str(e)) from None
        except (ray.exceptions.RayError, OSError) as e:
            if self.stopped:
                raise InterruptedError from None
            raise MachineLost(type(e).__name__) from None
        shutil.rmtree(self.runs / job.id, ignore_errors=True)
        for name, content in files.items():
            (self.runs / name).parent.mkdir(parents=True, exist_ok=True)
            (self.runs / name).write_bytes(content)
        return line

    def stop(self) -> None:
        self.stopped = True
        ray.shutdown()  # which ends this driver's tasks


@contextlib.contextmanager
def connect(address: str, matrix: Matrix, runs: Path) -> Iterator[Cluster]:
    """A Cluster at a Ray address. Raises MatrixError if nothing answers."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), 10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as e:
        raise MatrixError(f"--ray {address}: {str(e).splitlines()[0]}") from None
    try:
        yield Cluster(matrix, runs)
    finally:
        ray.shutdown()
