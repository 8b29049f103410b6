"""The runner on a Ray cluster of two workers: the same results in the same files as on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ablations import cluster
from ablations.matrix import read_matrix
from conftest import PATIENCE, ROOT, VOCAB, ended, started

MATRIX = """
name = "cluster"
why = "a test"
base = "base"
seeds = [1]
equivalence = 0.01
budget = {{iterations = {iterations}}}
threads = 1
[settings]
preset = "tiny"
vocab_size = {vocab}
data_path = "{data}"
eval_stride = 0
[[row]]
name = "base"
why = "its format must be known on every machine"
set = {{matrix_format = "five"}}
[[row]]
name = "from base"
why = "its latents are sent to the machine of the child"
init_from = "base"
[[row]]
name = "too fast"
why = "the base's artifact is sent; it fails, which is a result"
score_of = "base"
score_patches = ["ttt=all,1e9"]
"""


@pytest.fixture(scope="module")
def workers():
    """The address of a head without cores and two workers with one each."""
    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        ray_cluster.add_node(num_cpus=1)
    ray_cluster.wait_for_nodes()
    yield ray_cluster.address
    ray_cluster.shutdown()


def written(tmp_path, data_dir, iterations: int = 4) -> Path:
    path = tmp_path / "matrix.toml"
    path.write_text(MATRIX.format(vocab=VOCAB, data=data_dir, iterations=iterations))
    return path


def runner(tmp_path, data_dir, *more: str, iterations: int = 4) -> subprocess.Popen:
    path = written(tmp_path, data_dir, iterations)
    return started(sys.executable, ROOT / "ablations" / "run.py", path, *more, cwd=tmp_path)


def lines(folder) -> dict[str, dict]:
    text = (folder / "cluster" / "results.jsonl").read_text()
    return {line["row"]: line for line in map(json.loads, text.splitlines())}


def pids_of(pattern: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def wait_for(pattern: str, there: bool, process: subprocess.Popen | None = None) -> list[int]:
    """The processes whose command lines match, once there are some, or none."""
    deadline = time.monotonic() + PATIENCE
    while bool(pids_of(pattern)) != there:
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.2)
    return pids_of(pattern)


@pytest.mark.rehearsal
def test_a_cluster_measures_what_one_machine_does_though_a_machine_is_lost(tmp_path, data_dir, workers):
    found = {}
    for name, more in (("here", ["--jobs", "2"]), ("there", ["--ray", workers])):
        folders = ["--results", str(tmp_path / name), "--runs", str(tmp_path / f"runs_{name}")]
        process = runner(tmp_path, data_dir, *folders, *more)
        for pid in wait_for("^ray::run_here", True, process) if name == "there" else []:
            os.kill(pid, signal.SIGKILL)  # as when the machine runs out of memory
        done = ended(process)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = lines(tmp_path / name)
    assert "Ray: 2 machines, 2 runs at a time" in done.stdout
    assert "attempt 1 ended: WorkerCrashedError" in done.stderr
    for row, status in (("base", "ok"), ("from base", "ok"), ("too fast", "diverged")):
        here, there = found["here"][row], found["there"][row]
        assert here["status"] == there["status"] == status, there
        for key in ("id", "source", "settings", "val_bpb", "artifact_sha256", "message", "threads"):
            assert here.get(key) == there.get(key), (row, key)
        model = tmp_path / "runs_there" / there["id"] / "run" / "model.tern"
        if status == "ok":
            assert model.read_bytes() == (tmp_path / "runs_here" / there["id"] / "run" / "model.tern").read_bytes()


def test_an_interrupt_stops_the_clusters_runs(tmp_path, data_dir, workers):
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--only", "base"]
    process = runner(tmp_path, data_dir, *folders, "--ray", workers, iterations=5000)
    of_ours = "program.py train.*--iterations=5000"
    wait_for(of_ours, True, process)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 130 and "goes on where it was" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    wait_for(of_ours, False)  # no run outlives its runner


def test_what_is_shipped_is_all_that_a_run_needs(tmp_path, data_dir):
    folder = tmp_path / "there"
    shipment = cluster.load(folder, read_matrix(written(tmp_path, data_dir)))
    place = folder / shipment.places[str(data_dir)]
    assert cluster.fingerprint(place) == cluster.fingerprint(data_dir) and not shipment.large
    code = "import sys; sys.path.insert(0, '.'); import ablations.cluster as c; print(c.look({}, {}), c.__file__)"
    done = ended(started(sys.executable, "-I", "-c", code, cwd=folder))
    assert "install the same" in done.stdout and str(folder) in done.stdout, done.stderr


def test_large_data_must_be_there(tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(cluster, "SHIPPED", 1000)
    shipment = cluster.load(tmp_path / "there", read_matrix(written(tmp_path, data_dir)))
    assert shipment.places == {str(data_dir): str(data_dir)} and not (tmp_path / "there" / "shipped").exists()
    versions = {name: cluster.version(name) for name in cluster.SAME}
    assert cluster.look(versions, shipment.large) == ""
    assert "too large to be sent" in cluster.look(versions, {str(data_dir): "other"})
    assert "install the same" in cluster.look({"torch": "1"}, {})


@pytest.mark.fast
def test_folders_are_told_by_what_is_in_them(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "x.bin").write_bytes(b"12")
        (folder / "manifest.json").write_text("{}")
    assert cluster.fingerprint(first) == cluster.fingerprint(second) != ""
    (second / "manifest.json").write_text("[]")
    assert cluster.fingerprint(first) != cluster.fingerprint(second)
    assert cluster.fingerprint(tmp_path / "none") == ""


def test_no_cluster_is_one_clear_error(tmp_path, data_dir):
    done = ended(runner(tmp_path, data_dir, "--ray", "127.0.0.1:1", "--results", str(tmp_path / "r")))
    assert done.returncode == 1 and done.stderr.startswith("error: --ray 127.0.0.1:1"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    done = ended(runner(tmp_path, data_dir, "--ray", "auto", "--jobs", "2"))
    assert done.returncode == 1 and done.stderr.startswith("error: --jobs is for this machine")
