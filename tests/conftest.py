"""Shared: a small prepared data folder, and runs of the program as a user starts them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 400


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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    from data import prepare

    folder = tmp_path_factory.mktemp("data")
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in small_corpus()), encoding="utf-8")
    out = folder / "shards"
    argv = ["--source", "text", "--input", str(source), "--out", str(out), "--vocab-size", str(VOCAB)]
    assert prepare.main([*argv, "--val-fraction", "0.06"]) == 0
    return out


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without variables that are settings of the trainer or of a process group."""
    from dataclasses import fields

    from train_gpt import FOREIGN_ENV, Config

    names = {f.name.upper() for f in fields(Config)} | set(FOREIGN_ENV) | {"PRESET", "RANK", "WORLD_SIZE"}
    return {k: v for k, v in os.environ.items() if k not in names} | extra


def tiny_args(data: Path, out: Path, *more: object) -> list[str]:
    base = ["--preset", "tiny", "--vocab-size", VOCAB, "--data-path", data, "--out-dir", out, "--threads", 1]
    return [str(a) for a in (*base, *more)]


def start(*args: object, program: str = "train_gpt.py", ranks: int = 1, **env: str) -> subprocess.Popen:
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch, str(ROOT / program), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=clean_env(**env), **pipes)


def run(*args: object, program: str = "train_gpt.py", ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    process = start(*args, program=program, ranks=ranks, **env)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def metrics(folder: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["type"] == kind]


@pytest.fixture(scope="session")
def tiny_run(data_dir, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One whole run at preset tiny: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    done = run(*tiny_args(data_dir, out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "tiny_seed1337", done
