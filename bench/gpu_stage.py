"""A stage of gpu.py: how large things are, on a GPU or for a try on a CPU, where results go, and the data."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import train_gpt
from bench.gpu_card import Clock
from tern import machine, source
from tern.files import folder_identity, sha256_file, write_atomic
from tern.shards import open_data
from tern.tokenizers import ByteCounter

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("pr367", "golf16mb")
AFTER_ASKING = 5.0  # seconds from asking a process to end until it is ended
AttentionShape = tuple[int, int, int, int, int]  # batch, heads, kv heads, time, head dim


@dataclass(frozen=True)
class Sizes:
    rows: int  # of a matrix product: tokens of a micro-batch
    copied: int  # bytes
    repeats: int  # timed calls of a kernel
    attention: tuple[AttentionShape, ...]
    model: dict  # settings of the models of stages train and score, over the presets'
    batches: tuple[int, ...]  # tokens per step
    steps: int  # of a measurement at the first of them
    pairs: int  # turns with the textbook
    checked: dict  # settings of the runs of stage correct, over preset tiny's
    vocab: int  # of text that is made up for them
    stride: int  # of a sliding score
    score_batches: tuple[int, ...]  # windows at a time
    score_seconds: float  # of a measurement
    run: dict  # settings of the run of stage runs
    matrix: dict  # settings of its matrix
    iterations: int  # of a run of it
    seeds: int


ON_GPU = Sizes(
    rows=65_536, copied=2**31, repeats=20, attention=((32, 12, 6, 2048, 64), (64, 8, 4, 1024, 96)), model={},
    batches=(65_536, 524_288), steps=20, pairs=5,
    checked=dict(num_layers=4, model_dim=256, num_heads=4, num_kv_heads=2, mlp_hidden=832, train_seq_len=512,
                 train_batch_tokens=16_384, group_size=128, compile=True, iterations=20, eval_stride=0),
    vocab=1024, stride=64, score_batches=(32,), score_seconds=4.0,
    run=dict(preset="cpu", max_wallclock_seconds=8.0),
    matrix=dict(preset="cpu", eval_stride=0, checkpoint_every=0), iterations=1000, seeds=8)
TOY = Sizes(
    rows=64, copied=2**20, repeats=2, attention=((2, 2, 1, 64, 16),),
    model=dict(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_hidden=80, train_seq_len=64,
               vocab_size=400, group_size=32, compile=False, threads=1),
    batches=(1024, 2048), steps=2, pairs=2,
    checked=dict(iterations=10, eval_stride=0),
    vocab=400, stride=16, score_batches=(4,), score_seconds=0.2,
    run=dict(preset="tiny", iterations=10, eval_stride=0, threads=1),
    matrix=dict(preset="tiny", eval_stride=0, checkpoint_every=0), iterations=5, seeds=1)


class Stage:
    """What a stage works with, and its result file, which is written after every figure.

    args: those of gpu.py, whose seconds are this stage's.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.out, self.work = name, args, Path(args.out), Path(args.work)
        self.device, self.cuda = torch.device(args.device, 0), args.device == "cuda"
        self.sizes, self.clock = ON_GPU if self.cuda else TOY, Clock(self.device)
        self.began = time.monotonic()
        self.result = empty_result(name) | {
            "limit": round(args.seconds, 1), "commit": commit(), "source": source_identity(), "device": args.device,
            "machine": machine.describe()}
        self.save()

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        write_result(self.out / f"{self.name}.json", self.result)

    def left(self) -> float:
        """Seconds until this stage is ended from outside."""
        return self.began + self.args.seconds - time.monotonic()

    def put(self, name: str, value: object, *lines: str) -> None:
        """A figure, and how it reads."""
        self.result["figures"][name] = value
        self.say(*lines)

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.result["lines"] += lines
        self.save()

    def missing(self, name: str, why: object) -> None:
        """What this machine, or this torch, does not have."""
        self.result["missing"].setdefault(one_line(why), []).append(name)
        self.save()

    def fail(self, name: str, why: object) -> None:
        print(f"FAILED {name}: {one_line(why)}", flush=True)
        self.result["failures"].append(f"{name}: {one_line(why)}")
        self.save()

    def check(self, name: str, error: float, bound: float) -> None:
        """A figure that is an error, and a failure where it is above its bound or not a number."""
        right = error <= bound
        self.put(name, {"error": error, "bound": bound},
                 f"{name:<60}{error:>9.1e}  {'right' if right else 'WRONG'}, at most {bound:.0e}")
        if not right:
            self.fail(name, f"error {error:.3g}, at most {bound:.3g} is allowed")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is a line of the result and not the end of the stage."""
        print(f"-- {self.name}, {name}: {self.left():.0f} s left", flush=True)
        try:
            yield
        except Exception as e:
            self.fail(name, e)
        gc.collect()
        if self.cuda:
            with suppress(RuntimeError):  # the part may have left the device unusable, for this process
                torch.cuda.empty_cache()

    def config(self, preset: str, **more) -> train_gpt.Config:
        whole = dict(seq_ramp_start=0, fit_cap=0.0)  # steps of the full length, with nothing packed beside them
        return train_gpt.Config(**(train_gpt.PRESETS[preset] | whole | self.sizes.model | more))

    def data(self, vocab: int) -> Path:
        """A folder of shards with so many pieces: the one that was given, if it has them, else one that is made up."""
        if self.args.data and vocabulary(Path(self.args.data)) == vocab:
            return Path(self.args.data).resolve()
        return make_data(self.work / f"data_{vocab}", vocab)

    def any_data(self) -> tuple[Path, int]:
        """(the folder that was given, or one that is made up; its pieces)."""
        vocab = vocabulary(Path(self.args.data)) if self.args.data else self.sizes.vocab
        return self.data(vocab), vocab

    def run(self, *words: object, status: int = 0, seconds: float = 1e6, **env: str) -> None:
        """Run a program of this project, for so long at most. Raises RuntimeError with its last line if it ends with
        another status."""
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        asked = threading.Timer(max(min(seconds, self.left()), 1.0), process.terminate)
        ended = threading.Timer(asked.interval + AFTER_ASKING, process.kill)
        for timer in (asked, ended):
            timer.start()
        said, _ = process.communicate()
        for timer in (asked, ended):
            timer.cancel()
        print(said, flush=True)
        if process.returncode != status:
            raise RuntimeError(f"status {process.returncode}: {last_word(said)}")


def empty_result(name: str) -> dict:
    """missing: why -> what is not there for that reason."""
    return {"stage": name, "status": "running", "seconds": 0.0, "figures": {}, "lines": [], "missing": {},
            "failures": []}


def one_line(e: object) -> str:
    said = " ".join(str(e).split()) or repr(e)
    if isinstance(e, BaseException):
        said = f"{type(e).__name__}: {said}"
    return said[:300]


def last_word(text: str) -> str:
    """The error that a program ended with, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def write_result(path: Path, result: dict) -> None:
    write_atomic(path, (json.dumps(result, indent=1, default=str) + "\n").encode())


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "no git"
    return done.stdout.strip() or "not a git checkout"


def source_identity() -> str:
    """Of the three programs and all that they import, as the header of a run has it."""
    return folder_identity({name: sha256_file(source.root() / name) for name in source.code_files()})[:16]


def flags(settings: dict) -> list[str]:
    """Settings as words of the trainer's command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def records(folder: Path) -> list[dict]:
    """What a run's metrics.jsonl says; the last one ends a finished run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def vocabulary(folder: Path) -> int:
    return ByteCounter(open_data(folder).tokenizer).vocab_size


def make_data(folder: Path, vocab: int) -> Path:
    """Shards of made-up text with a tokenizer of so many pieces: the same for the same number."""
    if (folder / "manifest.json").exists():
        return folder
    rng, documents = random.Random(vocab), 240 if vocab <= TOY.vocab else 4000
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(8 * vocab)]
    follow = {word: rng.choices(words, k=4) for word in words}
    text = folder.with_suffix(".jsonl")
    with open(text, "w", encoding="utf-8") as f:
        for _ in range(documents):
            word, said = rng.choice(words), []
            for _ in range(rng.randint(80, 200)):
                said.append(word)
                word = rng.choice(follow[word])
            f.write(json.dumps({"text": " ".join(said) + "."}) + "\n")
    subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), "--source", "text", "--input", str(text),
                    "--out", str(folder), "--vocab-size", str(vocab), "--val-fraction", "0.06"], check=True)
    return folder
