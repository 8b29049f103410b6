"""Shared: a small prepared data folder, and runs of the programs as a user starts them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests are small, and run beside each other

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 400
NAME = "tiny_seed1337"  # of a run's folder, as preset and seed make it
PATIENCE = 600  # seconds after which something hangs; a busy machine takes long, so nothing is concluded from less


def small_corpus(documents: int = 240, seed: int = 0) -> list[str]:
    """Text with some structure to learn: a Markov chain over invented words, with punctuation, digits and emoji."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(300)]
    follow = {w: rng.choices(words, k=4) for w in words}
    texts = []
    for i in range(documents):
        word, out = rng.choice(words), []
        for _ in range(rng.randint(80, 200)):
            out.append(word)
            word = rng.choice(follow[word])
        texts.append(" ".join(out) + f".\n\tNo. {i} 漢字 🤖\n")
    return texts


def prepared(folder: Path, texts: list[str]) -> Path:
    """A data folder of these texts with a tokenizer of VOCAB pieces."""
    from data import prepare

    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    out = folder / "shards"
    argv = ["--source", "text", "--input", str(source), "--out", str(out), "--vocab-size", str(VOCAB)]
    assert prepare.main([*argv, "--val-fraction", "0.06"]) == 0
    return out


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), small_corpus())


@pytest.fixture(autouse=True, scope="session")
def code_weighed_once() -> Iterator[None]:
    """Compressing the program takes a second or two, and every run in this process asks how many bytes that gives."""
    from tern import source

    known: dict = {}

    def weigh(sources=None, weigh=source.code_bytes) -> int:
        key = tuple((source.read_sources() if sources is None else sources).items())
        if key not in known:
            known[key] = weigh(sources)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "code_bytes", weigh)
        yield


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A program that runs in this process takes its signals: give them back."""
    held = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in held.items():
        signal.signal(signum, handler)


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without variables that are settings of the trainer or of a process group."""
    from dataclasses import fields

    from tern.processes import environment_alone
    from train_gpt import Config

    names = {f.name.upper() for f in fields(Config)} | {"PRESET"}
    return {k: v for k, v in environment_alone(os.environ).items() if k not in names} | extra


def tiny_args(data: Path, out: Path, *more: object) -> list[str]:
    base = ["--preset", "tiny", "--vocab-size", VOCAB, "--data-path", data, "--out-dir", out, "--threads", 1]
    return [str(a) for a in (*base, *more)]


def started(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=clean_env(**env), stdin=pipe, stdout=pipe,
                            stderr=pipe, text=True)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*args: object, program: str = "train_gpt.py", ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    from tern.processes import launcher

    return ended(started(*launcher(ranks), ROOT / program, *args, **env))


# The trainer, which after a step says so and waits for a line. `nohup` hides the signal of a closed terminal from all
# that it starts, and so from tests.
HELD = """
import signal, sys, train_gpt

class Held(train_gpt.Trainer):
    def after_step(self, plan):
        super().after_step(plan)
        if self.step == held_at:
            print("held", flush=True)
            sys.stdin.readline()

signal.signal(signal.SIGHUP, signal.SIG_DFL)
held_at = int(sys.argv.pop(1))
train_gpt.Trainer = Held
sys.exit(train_gpt.main())
"""


class Held:
    """A run that waits after a step: a test that acts there does so at the same place on any machine."""

    def __init__(self, step: int, argv: list[str]):
        self.process = started(sys.executable, "-c", HELD, step, *argv)

    def __enter__(self) -> Held:
        """Wait until it is there."""
        guard = threading.Timer(PATIENCE, self.process.kill)
        guard.start()
        for line in iter(self.process.stdout.readline, ""):
            if line == "held\n":
                guard.cancel()
                return self
        guard.cancel()
        raise AssertionError(f"the run did not get to its step: {self.process.stderr.read()}")

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, *signums: signal.Signals) -> subprocess.CompletedProcess:
        """Send these signals, let it go on, and wait for its end."""
        for signum in signums:
            self.process.send_signal(signum)
        return ended(self.process)  # which closes its input, so that it goes on


def hook_after_steps(monkeypatch: pytest.MonkeyPatch, function: Callable) -> None:
    """Have function(trainer) called after every step of runs in this process."""
    import train_gpt

    class Hooked(train_gpt.Trainer):
        def after_step(self, plan) -> None:
            super().after_step(plan)
            function(self)

    monkeypatch.setattr(train_gpt, "Trainer", Hooked)


def tiny_trainer(data: Path, out: Path, *more: object):
    """A trainer in this process, ready to train."""
    import train_gpt
    from tern.processes import Place

    preset, config, origin, notices = train_gpt.resolve_settings(tiny_args(data, out, *more), {})
    trainer = train_gpt.Trainer(preset, config, Place())
    trainer.set_up()
    trainer.preflight(origin, notices)
    trainer.warm_up()
    return trainer


def metrics(folder: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["type"] == kind]


def is_one_error(status: int, err: str) -> bool:
    return status == 1 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.fixture(scope="session")
def tiny_run(data_dir, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One whole run at preset tiny: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    done = run(*tiny_args(data_dir, out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out / NAME, done
