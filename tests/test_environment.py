"""What clusters, notebooks and bare machines do to a run: variables, processes that do not come, no compiler."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import eval_bpb
import train_gpt
from conftest import ROOT, clean_env, tiny_args
from eval_bpb import LaunchError, Place, process_place

GROUP = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.mark.parametrize(("env", "place"), [
    ({}, Place()),
    ({"WORLD_SIZE": ""}, Place()),
    ({"WORLD_SIZE": " "}, Place()),
    ({"WORLD_SIZE": "1"}, Place()),
    ({"RANK": "3", "LOCAL_RANK": "3"}, Place()),  # left over from something else
    ({"WORLD_SIZE": "1", "RANK": "3"}, Place()),
    (GROUP, Place(0, 2, 0, 1)),
    (GROUP | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(1, 2, 1, 2)),
])
def test_places(env, place):
    assert process_place(env) == place


@pytest.mark.parametrize(("env", "said"), [
    ({"WORLD_SIZE": "2"}, "not RANK, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "not RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
    ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5'"),
    (GROUP | {"RANK": "2"}, "RANK='2'"),
    (GROUP | {"RANK": "x"}, "RANK='x'"),
    (GROUP | {"MASTER_PORT": "port"}, "MASTER_PORT='port'"),
    (GROUP | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    (GROUP | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3'"),
    (GROUP | {"LOCAL_RANK": "5"}, "LOCAL_RANK='5'"),
])
def test_places_that_cannot_be(env, said):
    with pytest.raises(LaunchError, match="torchrun") as e:
        process_place(env)
    assert said in str(e.value)


@pytest.mark.parametrize("program", ["train", "eval"])
def test_half_a_launch_is_one_line(data_dir, tmp_path, monkeypatch, capsys, program):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if program == "train":
        status = train_gpt.run(tiny_args(data_dir, tmp_path / "runs"))
    else:
        status = eval_bpb.run(eval_bpb.parse_args(["model.tern", "--data", str(data_dir)]))
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: WORLD_SIZE=2 is set") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


JOIN = """
import os, sys, datetime, eval_bpb
eval_bpb.FIND_EACH_OTHER = datetime.timedelta(seconds=float(sys.argv[1]))
try:
    eval_bpb.join_group(eval_bpb.process_place(os.environ), "gloo")
    eval_bpb.dist.barrier()
    eval_bpb.check_agreement({"program": 1, "data": sys.argv[2:]}, eval_bpb.torch.device("cpu"))
    print("joined")
except eval_bpb.LaunchError as e:
    print(e)
eval_bpb.leave(0)
"""


def join(seconds: float, *data: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", JOIN, str(seconds), *data], cwd=ROOT, env=clean_env(**GROUP | env),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_find_each_other_or_say_so():
    port = str(free_port())
    both = [join(30, MASTER_PORT=port, RANK=str(rank)) for rank in range(2)]
    assert [p.communicate(timeout=60) for p in both] == [("joined\n", "")] * 2

    port = str(free_port())
    both = [join(30, f"copy {rank}", MASTER_PORT=port, RANK=str(rank)) for rank in range(2)]
    for process in both:
        assert process.communicate(timeout=60)[0].startswith("rank(s) 1 do not have the data of rank 0")

    alone = {rank: join(2, MASTER_PORT=str(free_port()), RANK=str(rank)) for rank in range(2)}
    for rank, process in alone.items():
        out, err = process.communicate(timeout=60)
        assert f"rank {rank} did not find the other processes of WORLD_SIZE=2" in out and "torchrun" in out
        assert out.count("\n") == 1 and not err, err

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        out, err = join(5, MASTER_PORT=port).communicate(timeout=60)
        assert out == f"MASTER_PORT={port}: another program uses this port; choose another one for all processes\n"
        assert not err


# -- compilers, caches, locales --------------------------------------------------------------------------------------


def tiny(data_dir, tmp_path, *more: object, **env: str) -> subprocess.CompletedProcess:
    argv = tiny_args(data_dir, tmp_path, "--iterations", 2, "--eval-stride", 0, *more)
    env = clean_env(**env)
    return subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *argv], cwd=ROOT, env=env, capture_output=True,
                          text=True, encoding="utf-8", timeout=200)


def test_a_compiler_that_fails_costs_speed_and_one_notice(data_dir, tmp_path):
    """As without headers, or with a cache folder full: whatever it is that the compiler meets."""
    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    fake.chmod(0o755)
    done = tiny(data_dir, tmp_path, "--compile", 1, PATH=f"{fake.parent}:{os.environ['PATH']}",
                TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stdout.splitlines() if line.startswith("notice")]
    assert len(notices) == 1 and "torch.compile failed" in notices[0] and "--compile 0" in notices[0]
    assert "roundtrip gap             0.00000000" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_a_bare_machine_is_enough(data_dir, tmp_path):
    """No compiler, no cache that can be written, an ASCII locale, no home: two notices and a whole run."""
    done = tiny(data_dir, tmp_path, "--compile", 1, PATH="/nonexistent", HOME="/nonexistent", LC_ALL="C",
                PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii",
                TORCHINDUCTOR_CACHE_DIR="/proc/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nnotice") == 2 and "no C++ compiler found" in done.stdout
    assert "roundtrip gap             0.00000000" in done.stdout
    assert "▁" in (tmp_path / "tiny_seed1337" / "log.txt").read_text(encoding="utf-8")  # the program's own text


def test_a_gpu_run_is_not_trained_uncompiled(data_dir, tmp_path):
    """On a GPU a failed compiler ends the run at once: its minutes are not to be lost. Device faked, nothing run."""
    _, config, _, _ = train_gpt.resolve_settings(tiny_args(data_dir, tmp_path), {})
    trainer = train_gpt.Trainer("tiny", config, Place())
    trainer.device = train_gpt.torch.device("cuda")
    with pytest.raises(train_gpt.TrainingError, match="--compile 0"):
        trainer.without_compiler(RuntimeError("no triton"))
    trainer.device = train_gpt.torch.device("cpu")
    with pytest.raises(train_gpt.RankLost):  # not the compiler's
        trainer.without_compiler(train_gpt.RankLost("x"))


def test_scoring_goes_on_without_a_compiler(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no\nheaders")

    class Model:
        def hidden_last(self, ids, last):
            return ids[:, -last:]

    monkeypatch.setattr(eval_bpb.torch, "compile", broken)
    fast = eval_bpb.compiled_hidden_last()
    ids = eval_bpb.torch.arange(6).view(1, 6)
    for _ in range(2):
        assert fast(Model(), ids, 2).tolist() == [[4, 5]]
    assert capsys.readouterr().err.count("torch.compile failed (no headers)") == 1


@pytest.mark.parametrize("user", ["name", "none"])
def test_the_compiler_gets_a_cache_that_it_can_write(monkeypatch, tmp_path, user):
    if user == "none":  # a user id without a name, as in many containers
        monkeypatch.setattr(eval_bpb.getpass, "getuser", lambda: {}["uid"])
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "fine"))
        assert eval_bpb.writable_compiler_cache() == "" and (tmp_path / "fine").is_dir()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(eval_bpb.tempfile, "tempdir", str(tmp_path))
    assert "cannot be written" in eval_bpb.writable_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert eval_bpb.writable_compiler_cache() == ""


def test_memory_that_is_not_there_is_said_in_words():
    for e in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        assert eval_bpb.unexpected(e).startswith("out of memory")


def test_importing_does_nothing():
    """No module touches files, processes or streams when it is imported."""
    program = "import os; before = dict(os.environ); import eval_bpb, train_gpt; assert dict(os.environ) == before"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
