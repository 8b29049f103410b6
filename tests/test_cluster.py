"""The runner on a Ray cluster of two workers: the same results in the same files as on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from conftest import ROOT, VOCAB, clean_env

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
why = "x"
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
    """A head without cores and two workers with one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


def runner(tmp_path, data_dir, *more: str, iterations: int = 4, popen: bool = False):
    (tmp_path / "matrix.toml").write_text(MATRIX.format(vocab=VOCAB, data=data_dir, iterations=iterations))
    command = [sys.executable, str(ROOT / "ablations" / "run.py"), str(tmp_path / "matrix.toml"), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": clean_env(), "cwd": tmp_path}
    return subprocess.Popen(command, **pipes) if popen else subprocess.run(command, timeout=300, **pipes)


def lines(folder) -> dict[str, dict]:
    text = (folder / "cluster" / "results.jsonl").read_text()
    return {line["row"]: line for line in map(json.loads, text.splitlines())}


def test_a_cluster_measures_what_one_machine_does(tmp_path, data_dir, workers):
    found, only = {}, ["--only", "base", "too fast"]
    for name, more in (("here", ["--jobs", "2"]), ("there", ["--ray", workers[0].address])):
        folders = ["--results", str(tmp_path / name), "--runs", str(tmp_path / f"runs_{name}")]
        done = runner(tmp_path, data_dir, *folders, *more, *only)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = lines(tmp_path / name)
    assert "Ray: 2 machines, 2 runs at a time" in done.stdout
    for row, status in (("base", "ok"), ("too fast", "failed")):
        here, there = found["here"][row], found["there"][row]
        assert here["status"] == there["status"] == status, there
        for key in ("id", "source", "settings", "val_bpb", "artifact_sha256", "message"):
            assert here.get(key) == there.get(key), (row, key)
    model = tmp_path / "runs_there" / found["there"]["base"]["id"] / "run" / "model.tern"
    assert model.read_bytes() == (tmp_path / "runs_here" / model.relative_to(tmp_path / "runs_there")).read_bytes()
    again = runner(tmp_path, data_dir, *folders, "--ray", workers[0].address, *only)
    assert "2 runs, 2 of them done before" in again.stdout


def test_a_machine_that_is_lost_loses_no_result(tmp_path, data_dir, workers):
    cluster, nodes = workers
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--only", "base", "from base"]
    process = runner(tmp_path, data_dir, *folders, "--ray", cluster.address, iterations=100, popen=True)
    deadline = time.monotonic() + 120
    while not (pids := at_work()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    for pid in pids:  # as when the machine runs out of memory
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert {row: line["status"] for row, line in lines(tmp_path / "results").items()} == {
        "base": "ok", "from base": "ok"}


def at_work() -> list[int]:
    """Processes of Ray that are running a task of ours."""
    found = subprocess.run(["pgrep", "-f", "^ray::run_here"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_what_is_sent_needs_no_module_of_ours(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "ablations"))
    import cluster

    cluster.by_value()
    sent = cluster.run_here, cluster.look, cluster.Parcel("a", "b", [])
    (tmp_path / "sent").write_bytes(ray.cloudpickle.dumps(sent))
    load = "import pickle; run, look, parcel = pickle.load(open('sent', 'rb')); print(look({}, [parcel]))"
    done = subprocess.run([sys.executable, "-I", "-c", load], capture_output=True, text=True, cwd=tmp_path)
    assert "install the same" in done.stdout, done.stderr


def test_parcels_are_told_by_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "ablations"))
    import cluster

    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "x.bin").write_bytes(b"12")
        (folder / "manifest.json").write_text("{}")
    assert cluster.fingerprint(first) == cluster.fingerprint(second) != ""
    assert cluster.zipped({"x": first / "x.bin"}) == cluster.zipped({"x": second / "x.bin"})
    (second / "manifest.json").write_text("[]")
    assert cluster.fingerprint(first) != cluster.fingerprint(second)
    assert cluster.fingerprint(tmp_path / "none") == ""
    versions = {name: cluster.version(name) for name in cluster.SAME}
    mine = cluster.Parcel(f"data-{cluster.fingerprint(first)}", str(first), [])
    assert cluster.look(versions, [mine]) == ""
    assert "too large to be sent" in cluster.look(versions, [cluster.Parcel("data-other", str(first), [])])
    assert "install the same" in cluster.look({"torch": "1"}, [])


def test_an_interrupt_stops_the_cluster_s_runs(tmp_path, data_dir, workers):
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--only", "base"]
    process = runner(tmp_path, data_dir, *folders, "--ray", workers[0].address, iterations=5000, popen=True)
    deadline = time.monotonic() + 120
    while not subprocess.run(["pgrep", "-f", "program.py train.*--iterations=5000"], capture_output=True).stdout:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on where it was" in err and "Traceback" not in err, err
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-f", "program.py train.*--iterations=5000"], capture_output=True).stdout:
        assert time.monotonic() < deadline, "a run outlived its runner"
        time.sleep(0.5)


def test_no_cluster_is_one_clear_error(tmp_path, data_dir):
    done = runner(tmp_path, data_dir, "--ray", "127.0.0.1:1", "--results", str(tmp_path / "r"))
    assert done.returncode == 1 and done.stderr.startswith("error: --ray 127.0.0.1:1"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    done = runner(tmp_path, data_dir, "--ray", "auto", "--jobs", "2")
    assert done.returncode == 1 and done.stderr.startswith("error: --jobs is for this machine")
