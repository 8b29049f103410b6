"""The runs of a matrix on the machines of a Ray cluster.

    ray start --head --num-cpus=0                    # on one machine; ray start --address=HEAD:6379 on the others
    python ablations/run.py MATRIX --ray auto        # or HEAD:6379

Every machine needs this project's environment (the same Python, Ray, torch and numpy), and nothing else: Ray brings the
code and the data to each when it gets its first run (runtime_env). Data of more than SHIPPED bytes are not sent: such a
folder must lie in the same place on every machine. A run gets as many cores as the matrix has threads; timed runs, and
those of a matrix without threads, get a machine. It gets a GPU where there are any (not measured). Results and files of
runs come back to where a run on this machine would have put them. A run whose process or machine is lost goes to
another, ATTEMPTS times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ablations import formats
from ablations.execute import Children, broken, execute
from ablations.matrix import ROOT, Job, MachineLost, Matrix, MatrixError, data_folders, source_identity
from ablations.results import Line
from tern import source
from tern.shards import open_data

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise MatrixError("--ray needs Ray: install the one that requirements.txt names") from None

SHIPPED = 200 << 20  # bytes of data that are sent: Ray keeps them in the head's memory, and takes half a GiB at most
SAME = ("torch", "numpy")  # packages whose versions decide what a run computes
ATTEMPTS = 3
NODE = "ray.io/node-id"  # Ray's own label of each machine
Files = dict[str, bytes]  # name in the folder of runs -> content


# ---------------------------------------------------------------------------------------------------------------
# On a machine of the cluster
# ---------------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """Hash of the names and sizes of a folder's files and of its manifest, "" without any. run_here looks closer."""
    try:
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        manifest = (folder / "manifest.json").read_bytes() if "manifest.json" in sizes else b""
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(sizes).encode() + manifest).hexdigest()[:16] if sizes else ""


def look(versions: dict[str, str], large: dict[str, str]) -> str:
    """Why this machine cannot take runs; empty if it can. large: folder that was not sent -> its fingerprint."""
    mine = {name: version(name) for name in SAME}
    if mine != versions:
        return f"it has {mine}, the machine that asks {versions}: install the same"
    for folder, wanted in large.items():
        if fingerprint(Path(folder)) != wanted:
            return f"{folder} is too large to be sent: copy it there"
    return ""


def run_here(job: Job, matrix: Matrix, threads: int, taken: Files, keep_latents: bool) -> tuple[Line, Files]:
    """Run a job on this machine; its line of results, and its files. taken: those of its parent that it needs.

    Raises MatrixError where this machine's code or data are not those of the job.
    """
    formats.register()
    tokenizer = job.config.tokenizer_path
    data = open_data(ROOT / job.config.data_path, ROOT / tokenizer if tokenizer else "")
    if data.identity != job.data or source_identity(job.row, job.data) != job.source:
        raise MatrixError(f"the code or the data of this machine are not those that run {job.id} is of")
    with tempfile.TemporaryDirectory(prefix="ablation-") as place:
        runs = Path(place)
        write_files(runs, taken)
        try:
            line = execute(job, replace(matrix, threads=threads), runs, [], Children())
        except Exception as e:  # whatever it is, it is this run's and not the machine's
            line = broken(job, matrix, e)
        files = {str(path.relative_to(runs)): path.read_bytes() for path in (runs / job.id).rglob("*")
                 if path.is_file() and (keep_latents or path.name != "checkpoint.safetensors")}
        return line, files


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------
# Here
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shipment:
    """What was put into a folder for other machines, which get it by Ray's runtime_env and work in it."""

    places: dict[str, str]  # data folder or tokenizer, as the matrix names it -> where it is on every machine
    large: dict[str, str]  # data folder that is not sent -> its fingerprint


def load(folder: Path, matrix: Matrix) -> Shipment:
    """Fill the folder: the code that runs need, and the data, if they are not too large."""
    own = [path.relative_to(ROOT) for path in (ROOT / "ablations").glob("*.py")]
    for name in (*source.code_files(), *own):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    places, large, room = {}, {}, SHIPPED
    for data_path in {path: None for path, _ in data_folders(matrix)}:
        here = (ROOT / data_path).resolve()
        room -= sum(path.stat().st_size for path in here.iterdir() if path.is_file())
        if room >= 0:
            places[data_path] = f"shipped/{len(places)}"
            shutil.copytree(here, folder / places[data_path])
        else:
            places[data_path] = str(here)
            large[str(here)] = fingerprint(here)
    for tokenizer in {name: None for _, name in data_folders(matrix) if name}:
        places[tokenizer] = f"shipped/{len(places)}.model"
        (folder / "shipped").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / tokenizer, folder / places[tokenizer])
    return Shipment(places, large)


@dataclass(frozen=True)
class Machines:
    """Those that can take runs, and what one run gets of them."""

    ids: frozenset[str]  # Ray's
    slots: int  # runs at a time on all of them
    cpus: int
    gpus: int

    def alive(self) -> bool:
        return any(node["Alive"] for node in ray.nodes() if node["NodeID"] in self.ids)


def find_machines(matrix: Matrix, large: dict[str, str]) -> Machines:
    """Raises MatrixError if no machine can take runs."""
    versions = {name: version(name) for name in SAME}
    fit = []
    for node in ray.nodes():
        if not node["Alive"] or not resource(node, "CPU"):
            continue
        why = ask_to_look(node, versions, large)
        if not why and resource(node, "CPU") < matrix.threads:
            why = f"it has {resource(node, 'CPU')} cores, and a run takes {matrix.threads} threads"
        if why:
            print(f"{node['NodeName']} is left out: {why}", file=sys.stderr)
        else:
            fit.append(node)
    with_gpu = [node for node in fit if resource(node, "GPU")]
    if with_gpu:  # the same run on a CPU would be another one
        fit = with_gpu
    if not fit:
        raise MatrixError("no machine of the Ray cluster can take runs; ray start --address=... some")
    each = min(resource(node, "CPU") for node in fit)
    whole = matrix.timed or not matrix.threads
    if not whole:
        each = matrix.threads
    slots = 0
    for node in fit:
        places = 1 if whole else resource(node, "CPU") // each
        slots += min(places, resource(node, "GPU")) if with_gpu else places
    print(f"Ray: {len(fit)} machines, {slots} runs at a time", flush=True)
    return Machines(frozenset(node["NodeID"] for node in fit), slots, each, 1 if with_gpu else 0)


def resource(node: dict, kind: str) -> int:
    return int(node["Resources"].get(kind, 0))


def ask_to_look(node: dict, versions: dict[str, str], large: dict[str, str]) -> str:
    """Why a machine cannot take runs; empty if it can."""
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(look).remote(versions, large)
    try:
        return ray.get(asked, timeout=300)  # the first one is sent all that a run needs
    except ray.exceptions.RayError as e:
        return f"it does not answer ({last_words(e)})"


def last_words(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[-1]}" if lines else type(e).__name__


class Cluster:
    """What run.Runner runs jobs on: `slots` of them at a time, where Ray finds the cores for them."""

    def __init__(self, matrix: Matrix, runs: Path, shipment: Shipment):
        self.matrix, self.runs, self.places = matrix, runs, shipment.places
        self.machines = find_machines(matrix, shipment.large)
        self.slots = self.machines.slots
        self.stopped = False
        self.parents = {row.init_from for row in matrix.rows} - {""}  # whose latents are needed here
        # Retries are ours: one by Ray could wait forever for a machine.
        self.remote = ray.remote(max_retries=0)(run_here).options(
            num_cpus=self.machines.cpus, num_gpus=self.machines.gpus, scheduling_strategy="SPREAD",
            label_selector={NODE: f"in({', '.join(sorted(self.machines.ids))})"})

    def run(self, job: Job) -> Line:
        """A job's line of results; its files are in runs/ID. Raises MachineLost, InterruptedError."""
        said = ""
        for attempt in range(ATTEMPTS):
            try:
                line, files = self.ask(job)
            except (ray.exceptions.RayError, OSError) as e:
                if self.stopped:
                    raise InterruptedError from None
                said = last_words(e)
                print(f"  {job.id} {job.row.name}, seed {job.seed}: attempt {attempt + 1} ended: {said}",
                      file=sys.stderr, flush=True)
                continue
            shutil.rmtree(self.runs / job.id, ignore_errors=True)
            write_files(self.runs, files)
            return line
        raise MachineLost(f"{ATTEMPTS} times, the last one with: {said}")

    def ask(self, job: Job) -> tuple[Line, Files]:
        """run_here, somewhere. Raises MachineLost if no machine is left, InterruptedError once stopped."""
        taken = {job.takes: (self.runs / job.takes).read_bytes()} if job.parent else {}
        keep_latents = job.row.name in self.parents
        asked = self.remote.remote(self.moved(job), self.matrix, self.machines.cpus, taken, keep_latents)
        while True:
            done, _ = ray.wait([asked], timeout=2)
            if self.stopped:
                ray.cancel(asked, force=True)
                raise InterruptedError
            if done:
                return ray.get(asked)
            if not self.machines.alive():
                ray.cancel(asked, force=True)
                raise MachineLost("no machine is left")

    def moved(self, job: Job) -> Job:
        """The job with the places of data on other machines; its id does not depend on them."""
        c = job.config
        there = replace(c, data_path=self.places[c.data_path], tokenizer_path=self.places.get(c.tokenizer_path, ""))
        return replace(job, config=there)

    def stop(self) -> None:
        self.stopped = True


@contextlib.contextmanager
def connect(address: str, matrix: Matrix, runs: Path) -> Iterator[Cluster]:
    """A Cluster at a Ray address. Raises MatrixError if nothing answers."""
    host, _, port = address.rpartition(":")
    with tempfile.TemporaryDirectory(prefix="ablations-") as folder:
        shipment = load(Path(folder), matrix)
        try:
            if port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), 10).close()
            ray.init(address=address, runtime_env={"working_dir": folder}, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as e:
            raise MatrixError(f"--ray {address}: {str(e).splitlines()[0]}") from None
        try:
            yield Cluster(matrix, runs, shipment)
        finally:
            ray.shutdown()
