"""What clusters, notebooks and bare machines do to a run: variables, processes that do not come, no compiler."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from conftest import ROOT, clean_env, ended, run, started, tiny_args, tiny_trainer
from tern import machine
from tern.command import describe_unexpected
from tern.finite import first_bad, first_bad_output
from tern.metric import evaluate
from tern.processes import LaunchError, Place, RankLost, process_place
from tern.signals import Interrupted, Signals

GROUP = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.mark.fast
def test_places():
    for env, place in (
        ({}, Place()),
        ({"WORLD_SIZE": " "}, Place()),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"RANK": "3", "LOCAL_RANK": "3"}, Place()),  # left over from something else
        ({"WORLD_SIZE": "1", "RANK": "3"}, Place()),
        (GROUP, Place(0, 2, 0, 1)),
        (GROUP | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(1, 2, 1, 2)),
    ):
        assert process_place(env) == place, env


@pytest.mark.fast
@pytest.mark.parametrize(("env", "said"), [
    ({"WORLD_SIZE": "2"}, "not RANK, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "not RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
    ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5'"),
    (GROUP | {"RANK": "2"}, "RANK='2'"),
    (GROUP | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    (GROUP | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3'"),
    (GROUP | {"LOCAL_RANK": "5"}, "LOCAL_RANK='5'"),
])
def test_places_that_cannot_be(env, said):
    with pytest.raises(LaunchError, match="torchrun") as e:
        process_place(env)
    assert said in str(e.value)


@pytest.mark.parametrize("program", ["train_gpt.py", "eval_bpb.py"])
def test_half_a_launch_is_one_line(data_dir, tmp_path, program):
    argv = tiny_args(data_dir, tmp_path / "runs") if program == "train_gpt.py" else ["model.tern", "--data", data_dir]
    done = run(*argv, program=program, WORLD_SIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("error: WORLD_SIZE=2 is set") and not done.stdout
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


JOIN = """
import os, sys, datetime, torch
import torch.distributed as dist
from tern import processes
processes.FIND_EACH_OTHER = datetime.timedelta(seconds=float(sys.argv[1]))
try:
    processes.join_group(processes.process_place(os.environ), "gloo")
    dist.barrier()
    processes.check_agreement({"program": 1, "data": sys.argv[2:]}, torch.device("cpu"))
    print("joined")
except processes.LaunchError as e:
    print(e)
processes.end_process(0)
"""


def join(seconds: float, *data: str, **env: str) -> subprocess.Popen:
    return started(sys.executable, "-c", JOIN, seconds, *data, **(GROUP | env))


def test_processes_find_each_other_or_say_so():
    """Those that can find each other have minutes for it, the others a second, after which there is nothing to wait
    for."""
    port = str(free_port())
    both = [join(300, MASTER_PORT=port, RANK=str(rank)) for rank in range(2)]
    for done in map(ended, both):
        assert (done.stdout, done.stderr) == ("joined\n", "")

    port = str(free_port())
    both = [join(300, f"copy {rank}", MASTER_PORT=port, RANK=str(rank)) for rank in range(2)]
    for done in map(ended, both):
        assert done.stdout.startswith("rank(s) 1 do not have the data of rank 0")

    alone = [join(1, MASTER_PORT=str(free_port()), RANK=str(rank)) for rank in range(2)]
    for rank, done in enumerate(map(ended, alone)):
        assert f"rank {rank} did not find the other processes of WORLD_SIZE=2" in done.stdout
        assert "torchrun" in done.stdout and done.stdout.count("\n") == 1 and not done.stderr, done.stderr

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = ended(join(5, MASTER_PORT=port))
        said = f"MASTER_PORT={port}: another program uses this port; choose another one for all processes\n"
        assert (done.stdout, done.stderr) == (said, "")


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_signal_is_noted_and_a_second_one_ends_at_once_but_for_a_launchers_repeat(monkeypatch):
    clock, killed = SimpleNamespace(now=100.0), []
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append((pid, signum)))
    signals = Signals()
    signals.note()
    assert signals.last == 0
    for signum, later, dead in ((signal.SIGTERM, 0, False), (signal.SIGTERM, 1, False), (signal.SIGINT, 1, False),
                                (signal.SIGINT, 3, True)):
        clock.now += later
        signal.raise_signal(signum)
        assert signals.last == signum and bool(killed) == dead
    assert killed == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.fast
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_ends_a_run_unless_nohup_started_it(before):
    signal.signal(signal.SIGHUP, before)
    signals = Signals()
    signals.note()
    assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (before == signal.SIG_IGN)
    assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # or the next line ends all tests
    signal.raise_signal(signal.SIGHUP)
    assert signals.last == (signal.SIGHUP if before == signal.SIG_DFL else 0)
    if signals.last:  # since the loop looked for the last time
        with pytest.raises(Interrupted, match=f"signal {int(signal.SIGHUP)} after training"):
            signals.interrupt("after training")
    else:
        signals.interrupt("after training")
    with pytest.raises(Interrupted, match=f"signal {int(signal.SIGTERM)} after training") as e:
        signal.raise_signal(signal.SIGTERM)
    assert e.value.signum == signal.SIGTERM


# -- compilers, caches, locales --------------------------------------------------------------------------------------


def tiny(data_dir, tmp_path, *more: object, **env: str) -> subprocess.CompletedProcess:
    argv = tiny_args(data_dir, tmp_path, "--iterations", 2, "--eval-stride", 0, *more)
    env = clean_env(**env)
    return subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *argv], cwd=ROOT, env=env, capture_output=True,
                          text=True, encoding="utf-8")


@pytest.mark.rehearsal
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


@pytest.mark.parametrize(("failure", "expected"), [
    (RuntimeError("no triton"), train_gpt.TrainingError),  # its minutes are not to be lost
    (RankLost("not the compiler's"), RankLost),
])
def test_a_gpu_run_is_not_trained_uncompiled(data_dir, tmp_path, monkeypatch, failure, expected):
    """Device faked, nothing run."""
    def broken(*_, **__):
        raise failure

    trainer = tiny_trainer(data_dir, tmp_path, "--compile", 0)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("shutil.which", lambda name, **_: name)  # there is a compiler
    with closing(trainer.folder):
        trainer.config = replace(trainer.config, compile=True)
        trainer.device = torch.device("cuda")
        with pytest.raises(expected, match="--compile 0" if expected != RankLost else "not the compiler's"):
            trainer.warm_up()


@pytest.mark.fast
def test_scoring_goes_on_without_a_compiler(monkeypatch, capsys):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.linspace(-1, 1, 63).view(9, 7))

        def hidden_last(self, ids, last):
            return self.table[ids[:, -last:]]

        def head(self, hidden):
            return hidden

    def broken(*_, **__):
        raise RuntimeError("no\nheaders")

    monkeypatch.setattr(torch, "compile", broken)
    stream, counter = np.arange(200) % 7, SimpleNamespace(count=lambda prev, ids: np.ones(len(ids), dtype=np.int64))
    eager, other = (evaluate(Model(), stream, counter, 16, 4, 8, compiled=compiled) for compiled in (False, True))
    assert math.isfinite(eager.val_loss) and other.val_loss == eager.val_loss
    assert capsys.readouterr().err.count("torch.compile failed (no headers)") == 1


@pytest.mark.fast
@pytest.mark.parametrize("user", ["name", "none"])
def test_the_compiler_gets_a_cache_that_it_can_write(monkeypatch, tmp_path, user):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "fine"))
    assert machine.writable_compiler_cache() == [] and (tmp_path / "fine").is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    if user == "none":  # a user id without a name, as in many containers
        monkeypatch.setattr("getpass.getuser", lambda: {}["uid"])
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (notice,) = machine.writable_compiler_cache()
    assert "cannot be written" in notice and os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert machine.writable_compiler_cache() == []


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_memory_that_is_not_there_is_said_in_words():
    for e in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        assert describe_unexpected(e).startswith("out of memory")


@pytest.mark.fast
def test_the_first_number_that_is_none_is_found():
    layers = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Threshold(0.0, torch.inf), torch.nn.Identity())
    assert first_bad_output(layers, torch.ones(3)) is None
    assert first_bad_output(layers, -torch.ones(3)) == "1"
    assert first_bad_output(torch.nn.Identity(), torch.tensor([torch.nan])) == ""
    assert not any(layer._forward_hooks for layer in layers)
    good, bad = torch.zeros(2), torch.tensor([0.0, -torch.inf])
    assert first_bad([("a", good)]) is None and first_bad([("a", good), ("b", bad), ("c", bad)]) == "b"
