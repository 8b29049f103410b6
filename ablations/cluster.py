"""The runs of a matrix on the machines of a Ray cluster.

    pip install '.[ray]'
    ray start --head --num-cpus=0                    # on one machine; ray start --address=HEAD:6379 on the others
    python ablations/run.py MATRIX --ray auto        # or HEAD:6379

Every machine needs this project's environment (the same Python, Ray, torch and numpy), and nothing else: the code and
the data go with the first run to each machine, and stay there under the temporary folder. A corpus of more than SHIPPED
bytes is not sent: it must lie in the same folder on every machine, and so must a tokenizer outside the data folders. A
run gets as many cores as the matrix has threads; timed runs, and those of a matrix without threads, get a machine. It
gets a GPU where there are any (not measured). Results and files of runs come back to where a run on this machine would
have put them. A run whose process or machine is lost goes to another, ATTEMPTS times.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from matrix import ROOT, Job, MachineLost, Matrix, MatrixError, data_folders

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise MatrixError("--ray needs Ray: pip install '.[ray]'") from None

CODE = ("*.py", "ablations/*.py", "data/*.py")  # what a run needs of this repository
SHIPPED = 2**30  # bytes of a data folder that are sent to machines that do not have it
SAME = ("torch", "numpy")  # packages whose versions decide what a run computes
ATTEMPTS = 3


@dataclass(frozen=True)
class Parcel:
    """Files for other machines: a name that says what is in it, where they lie here, and their zip, if it is sent."""

    name: str
    here: str
    zip: list  # of the reference to it: inside a list Ray does not fetch it before it is asked for


# ---------------------------------------------------------------------------------------------------------------
# On a machine of the cluster. These functions are sent by value, so they use nothing else of this project.
# ---------------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """Hash of the names and sizes of a folder's files and of its manifest, "" without any; worker.py looks closer."""
    try:
        files = [(p.name, p.stat().st_size) for p in sorted(folder.iterdir()) if p.is_file()]
        manifest = (folder / "manifest.json").read_bytes() if ("manifest.json" in dict(files)) else b""
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(files).encode() + manifest).hexdigest()[:16] if files else ""


def unpacked(parcel: Parcel) -> Path:
    """The folder of a parcel on this machine, made when first asked for, whole or not at all."""
    store = Path(tempfile.gettempdir()) / f"ablations-{os.getuid()}"
    store.mkdir(mode=0o700, exist_ok=True)
    if not (there := store / parcel.name).exists():
        with tempfile.TemporaryDirectory(dir=store) as making:
            zipfile.ZipFile(io.BytesIO(ray.get(parcel.zip[0]))).extractall(whole := Path(making) / "whole")
            with contextlib.suppress(OSError):  # another run of this machine was first
                whole.rename(there)
    return there


def look(versions: dict[str, str], data: list[Parcel]) -> str:
    """Why this machine cannot take runs; empty if it can."""
    if (mine := {name: version(name) for name in SAME}) != versions:
        return f"it has {mine}, the machine that asks {versions}: install the same"
    missing = [p.here for p in data if not p.zip and f"data-{fingerprint(Path(p.here))}" != p.name]
    return f"{missing[0]} is too large to be sent: copy it there" if missing else ""


def run_here(order: dict, code: Parcel, data: dict[str, Parcel], matrix: bytes, taken: dict[str, bytes],
             keep_latents: bool) -> tuple[dict | None, str, dict[str, bytes]]:
    """Run a job; its line of results, or none and what was said; and its files by name."""
    root = unpacked(code)
    order = order | {"data": {path: p.here if f"data-{fingerprint(Path(p.here))}" == p.name else str(unpacked(p))
                              for path, p in data.items()}}
    with tempfile.TemporaryDirectory(prefix="ablation-") as place:
        runs = Path(place)
        for name, content in taken.items():
            (runs / name).parent.mkdir(parents=True)
            (runs / name).write_bytes(content)
        (runs / "matrix.toml").write_bytes(matrix)
        (runs / "order.json").write_text(json.dumps(order))
        process = subprocess.Popen([sys.executable, str(root / "ablations" / "worker.py"), str(runs)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {"ABLATIONS_PARENT": str(os.getpid())})
        try:
            said, _ = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if not (runs / "line.json").exists():
            return None, (said.strip() or "it ended without a word").splitlines()[-1], {}
        files = {str(path.relative_to(runs)): path.read_bytes() for path in (runs / order["id"]).rglob("*")
                 if path.is_file() and (keep_latents or path.name != "checkpoint.safetensors")}
        return json.loads((runs / "line.json").read_text()), "", files


# ---------------------------------------------------------------------------------------------------------------
# Here
# ---------------------------------------------------------------------------------------------------------------


def by_value() -> None:
    """Send what this module defines as code: the other machines cannot import it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def zipped(files: dict[str, Path]) -> bytes:
    """The same bytes for the same files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, path in files.items():
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
    return out.getvalue()


def code_parcel() -> Parcel:
    content = zipped({str(path.relative_to(ROOT)): path for glob in CODE for path in sorted(ROOT.glob(glob))})
    return Parcel(f"code-{hashlib.sha256(content).hexdigest()[:16]}", str(ROOT), [ray.put(content)])


def data_parcel(path: str) -> Parcel:
    here = (ROOT / path).resolve()
    files = {file.name: file for file in sorted(here.iterdir()) if file.is_file()}
    small = sum(file.stat().st_size for file in files.values()) <= SHIPPED
    return Parcel(f"data-{fingerprint(here)}", str(here), [ray.put(zipped(files))] if small else [])


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time."""

    node: str  # Ray's id
    name: str
    cpus: int
    gpus: int


class Cluster:
    """What run.run_all runs jobs on: `slots` of them at a time."""

    def __init__(self, matrix: Matrix, runs: Path):
        self.runs, self.stopped = runs, False
        by_value()
        self.remote = ray.remote(max_retries=0)(run_here)  # a retry by Ray itself could wait forever for a machine
        self.code, self.matrix = code_parcel(), matrix.path.read_bytes()
        folders = data_folders(matrix)
        self.data = {path: data_parcel(path) for path in dict.fromkeys(path for path, _ in folders)}
        self.tokenizers = {t: str((ROOT / t).resolve()) for _, t in folders if t}
        self.parents = {row.init_from for row in matrix.rows} - {""}
        self.changed, self.free = threading.Condition(), self.find_slots(matrix)
        self.slots, self.alive = len(self.free), len(self.free)
        machines = len({slot.node for slot in self.free})
        print(f"Ray: {machines} machines, {self.slots} runs at a time", flush=True)

    def find_slots(self, matrix: Matrix) -> list[Slot]:
        """Places on all machines that can take runs. Raises MatrixError if there are none."""
        slots, versions = [], {name: version(name) for name in SAME}
        for node in ray.nodes():
            cores, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
            if not node["Alive"] or not cores:
                continue
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                asked = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(look)
                why = ray.get(asked.remote(versions, list(self.data.values())), timeout=60)
            except ray.exceptions.RayError as e:
                why = f"it does not answer ({type(e).__name__})"
            if why:
                print(f"{node['NodeName']} is left out: {why}", file=sys.stderr)
                continue
            each = min(matrix.threads, cores) if matrix.threads and not matrix.timed else cores
            places = cores // each if not gpus else 1 if matrix.timed else min(cores // each, gpus)
            slots += [Slot(node["NodeID"], node["NodeName"], each, min(gpus, 1))] * places
        if not slots:
            raise MatrixError("no machine of the Ray cluster can take runs; ray start --address=... some")
        return slots

    def take(self) -> Slot:
        """Raises MachineLost if no machine is left, InterruptedError once stopped."""
        with self.changed:
            while not self.free and self.alive and not self.stopped:
                self.changed.wait(1)
            if self.stopped:
                raise InterruptedError
            if not self.alive:
                raise MachineLost("no machine is left")
            return self.free.pop()

    def give_back(self, slot: Slot) -> None:
        """Unless its machine is gone."""
        with self.changed:
            if any(node["NodeID"] == slot.node and node["Alive"] for node in ray.nodes()):
                self.free.append(slot)
            else:
                self.alive -= 1
            self.changed.notify_all()

    def run(self, job: Job) -> dict:
        """A job's line of results; its files are in runs/ID. Raises MachineLost, InterruptedError."""
        for attempt in range(ATTEMPTS):
            slot = self.take()
            try:
                line, said, files = self.ask(slot, job)
            except (ray.exceptions.RayError, OSError) as e:
                said, line = f"{type(e).__name__}: {str(e).strip().splitlines()[-1] if str(e).strip() else ''}", None
            finally:
                self.give_back(slot)
            if line is not None:
                break
            print(f"  {job.id} {job.row.name}, seed {job.seed}: attempt {attempt + 1} on {slot.name} ended: {said}",
                  file=sys.stderr, flush=True)
        else:
            raise MachineLost(f"{ATTEMPTS} times, the last one with: {said}")
        shutil.rmtree(self.runs / job.id, ignore_errors=True)
        for name, content in files.items():
            (self.runs / name).parent.mkdir(parents=True, exist_ok=True)
            (self.runs / name).write_bytes(content)
        return line

    def ask(self, slot: Slot, job: Job) -> tuple[dict | None, str, dict[str, bytes]]:
        taken = {job.takes: (self.runs / job.takes).read_bytes()} if job.parent else {}
        order = {"id": job.id, "row": job.row.name, "threads": slot.cpus, "tokenizers": self.tokenizers}
        where = NodeAffinitySchedulingStrategy(slot.node, soft=False)
        line = [job]  # and those that it starts from, whose data are part of its id
        while line[-1].parent:
            line.append(line[-1].parent)
        data = {each.config.data_path: self.data[each.config.data_path] for each in line}
        asked = self.remote.options(num_cpus=slot.cpus, num_gpus=slot.gpus, scheduling_strategy=where).remote(
            order, self.code, data, self.matrix, taken, job.row.name in self.parents)
        while True:
            try:
                return ray.get(asked, timeout=1)
            except ray.exceptions.GetTimeoutError:
                if self.stopped:
                    ray.cancel(asked, force=True)
                    raise InterruptedError from None

    def stop(self) -> None:
        self.stopped = True  # a signal may have come while the condition is held: waiters look every second


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
