"""Kill every program at random moments, and see that nothing was lost: the old state whole or the new one.

    python bench/kills.py --kills 300                       # about half an hour of one core
    python bench/kills.py --kills 40 --only train bundle

Each case starts a program as a user does, sends it SIGKILL after a random part of the time that it takes, looks at what
is there, and lets the same command run to its end, which must give what an undisturbed run gave. Only kills that met a
running program count. Prints a line per case and ends with status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pack import read_artifact
from tern.checkpoints import read_checkpoint
from tern.files import sha256_file
from tern.shards import DataError, open_data

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["train_gpt.py", "--preset", "tiny", "--vocab-size", "400", "--threads", "1"]
MATRIX = """
name = "kills"
why = "Is a result lost when the runner is killed?"
base = "base"
seeds = [1, 2]
equivalence = 0.01
budget = {{iterations = 4}}
threads = 1

[settings]
preset = "tiny"
vocab_size = 400
data_path = "{data}"
eval_stride = 0
checkpoint_every = 0

[[row]]
name = "base"
why = "the preset"

[[row]]
name = "slower"
why = "another rate"
set = {{matrix_lr = 0.02}}
"""


class Lost(Exception):
    """Something is gone or half written; the message says what."""


def start(*command: object, cwd: Path = ROOT) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])]
    return subprocess.Popen(program, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(*command: object, cwd: Path = ROOT) -> str:
    process = start(*command, cwd=cwd)
    out, _ = process.communicate(timeout=600)
    if process.returncode:
        raise Lost(f"{' '.join(map(str, command))} ended with {process.returncode}: {out[-400:]}")
    return out


def kill_after(seconds: float, *command: object, cwd: Path = ROOT) -> bool:
    """Start a program and kill it, and only it, after so long; whether it was still running."""
    process = start(*command, cwd=cwd)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    finally:
        process.stdout.close()


def tree(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder; locks aside."""
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


class Case:
    """A program, what it leaves when it is not disturbed, and how to tell that nothing was lost."""

    def __init__(self, folder: Path, corpus: Path, data: Path, rng: random.Random):
        self.folder, self.corpus, self.data, self.rng = folder, corpus, data, rng
        self.seen: Counter[str] = Counter()  # what the kills met
        self.took = 0.0  # seconds of the undisturbed program that `timed` ran
        folder.mkdir(parents=True)
        self.reference()

    def timed(self, *command: object) -> None:
        """Run a program to its end, and remember how long that takes."""
        began = time.monotonic()
        finish(*command)
        self.took = time.monotonic() - began

    def reference(self) -> None:
        """An undisturbed run."""
        raise NotImplementedError

    def once(self, seconds: float) -> bool:
        """Kill it once; whether that met a running program. Raises Lost."""
        raise NotImplementedError

    def kill(self) -> bool:
        return self.once(self.rng.uniform(0.2, 1.05) * self.took)


class PrepareNew(Case):
    """data/prepare.py into a folder that was not there."""

    def command(self, out: Path, *more: object) -> list[object]:
        return ["data/prepare.py", "--source", "text", "--input", self.corpus, "--vocab-size", 400, "--val-fraction",
                0.06, "--out", out, *more]

    def reference(self) -> None:
        self.timed(*self.command(self.folder / "reference"))
        self.whole = tree(self.folder / "reference")

    def once(self, seconds: float) -> bool:
        out = self.folder / "out"
        met = kill_after(seconds, *self.command(out))
        self.seen["nothing" if not out.exists() else "the new one"] += met
        if out.exists() and tree(out) != self.whole:
            raise Lost(f"{out} is there and not whole")
        finish(*self.command(out))
        if tree(out) != self.whole:
            raise Lost(f"{out} differs after another run")
        shutil.rmtree(out)
        if left := [p.name for p in self.folder.iterdir() if p.name != "reference"]:
            raise Lost(f"left behind: {left}")
        return met


class PrepareReplace(PrepareNew):
    """data/prepare.py over an older folder of its own."""

    where = "out"

    def reference(self) -> None:
        super().reference()
        finish(*self.command(self.folder / "old", "--shard-tokens", 20_000))
        self.old = tree(self.folder / "old")

    def place(self) -> Path:
        out = self.folder / self.where
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder / "old", out)
        return out

    def once(self, seconds: float) -> bool:
        out = self.place()
        met = kill_after(seconds, *self.command(out))
        self.look(out, met)
        finish(*self.command(out))
        if tree(out) != self.whole:
            raise Lost(f"{out} differs after another run")
        return met

    def look(self, out: Path, met: bool) -> None:
        found = tree(out) if out.exists() else None
        if found not in (self.old, self.whole):
            raise Lost(f"{out} is neither the old folder nor the new one")
        self.seen["the old one" if found == self.old else "the new one"] += met


class PrepareInPlace(PrepareReplace):
    """The same into the current directory, which cannot be renamed away under its user."""

    where = "here"

    def once(self, seconds: float) -> bool:
        out = self.place()
        met = kill_after(seconds, *self.command(Path(".")), cwd=out)
        self.look(out, met)
        finish(*self.command(Path(".")), cwd=out)
        if tree(out) != self.whole:
            raise Lost(f"{out} differs after another run")
        return met

    def look(self, out: Path, met: bool) -> None:
        found = {name: sha for name, sha in tree(out).items() if not name.startswith(".")}
        if found in (self.old, self.whole):
            self.seen["the old one" if found == self.old else "the new one"] += met
            return
        try:
            open_data(out)
        except DataError:
            self.seen["between, and said to be so"] += met
        else:
            raise Lost(f"{out} is neither the old folder nor the new one, and is opened")


class Train(Case):
    """A run of train_gpt.py, and after the kill --resume auto."""

    def command(self, *more: object) -> list[object]:
        return [*TRAIN, "--data-path", self.data, "--out-dir", self.folder, *more]

    def reference(self) -> None:
        self.timed(*self.command("--run-id", "reference"))
        self.model = sha256_file(self.folder / "reference" / "model.tern")

    def once(self, seconds: float) -> bool:
        folder = self.folder / "run"
        met = kill_after(seconds, *self.command("--run-id", "run"))
        names = [name for name in ("checkpoint.safetensors", "model.tern", "score.json") if (folder / name).exists()]
        self.seen[names[-1] if names else "nothing"] += met
        if "checkpoint.safetensors" in names:
            read_checkpoint(folder)
        if "model.tern" in names and sha256_file(folder / "model.tern") != self.model:
            raise Lost("model.tern is there and not whole")
        if "score.json" in names:
            json.loads((folder / "score.json").read_text())
        finish(*self.command("--run-id", "run", "--resume", "auto"))
        if sha256_file(folder / "model.tern") != self.model:
            raise Lost("another model after --resume auto")
        if left := [p.name for p in folder.glob(".*.tmp")]:
            raise Lost(f"left behind: {left}")
        before = tree(folder)
        finish(*self.command("--run-id", "run", "--resume", "auto"))
        if tree(folder) != before:
            raise Lost("--resume auto of a finished run touched it")
        shutil.rmtree(folder)
        return met


WRITER = """
import sys
sys.path.insert(0, {root!r})
import pack
a, b = (pack.read_artifact(path) for path in sys.argv[1:3])
print("writing", flush=True)
while True:
    pack.write_artifact(sys.argv[3], *a)
    pack.write_artifact(sys.argv[3], *b)
"""


class Pack(Case):
    """pack.write_artifact over an older artifact, again and again."""

    def reference(self) -> None:
        self.files = []
        for seed in (1, 2):
            finish(*TRAIN, "--data-path", self.data, "--out-dir", self.folder, "--run-id", seed, "--seed", seed,
                   "--iterations", 2, "--eval-stride", 0)
            self.files.append(self.folder / str(seed) / "model.tern")
        (self.folder / "writer.py").write_text(WRITER.format(root=str(ROOT)))

    def kill(self) -> bool:
        return self.once(self.rng.uniform(0.0, 2.0))

    def once(self, seconds: float) -> bool:
        path = self.folder / "model.tern"
        process = start(self.folder / "writer.py", *self.files, path)
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if not path.exists():
            self.seen["nothing"] += 1
            return True
        read_artifact(path)
        found = [i for i, file in enumerate(self.files) if file.read_bytes() == path.read_bytes()]
        if not found:
            raise Lost("the artifact is neither the old nor the new one")
        self.seen[f"artifact {found[0] + 1}"] += 1
        return True


class Bundle(Case):
    """records/bundle.py of a finished run."""

    def reference(self) -> None:
        finish(*TRAIN, "--data-path", self.data, "--out-dir", self.folder, "--run-id", "run")
        self.run = tree(self.folder / "run")
        self.timed("records/bundle.py", self.folder / "run", "--out", self.folder / "reference", "--name", "b")
        self.whole = tree(self.folder / "reference")

    def once(self, seconds: float) -> bool:
        out = self.folder / "out"
        command = ["records/bundle.py", self.folder / "run", "--out", out, "--name", "b"]
        met = kill_after(seconds, *command)
        self.seen["the new one" if out.exists() else "nothing"] += met
        if out.exists() and tree(out) != self.whole:
            raise Lost(f"{out} is there and not whole")
        if not out.exists():
            finish(*command)
        if tree(out) != self.whole or tree(self.folder / "run") != self.run:
            raise Lost(f"{out}, or the run, differs after another bundle")
        shutil.rmtree(out)
        if left := [p.name for p in self.folder.iterdir() if p.name not in ("reference", "run")]:
            raise Lost(f"left behind: {left}")
        return met


class Matrix(Case):
    """ablations/run.py: killed until all of its runs are done."""

    def command(self) -> list[object]:
        return ["ablations/run.py", self.folder / "kills.toml", "--results", self.folder / "results", "--runs",
                self.folder / "runs"]

    def reference(self) -> None:
        (self.folder / "kills.toml").write_text(MATRIX.format(data=self.data))
        finish(*self.command())
        self.expected = self.lines()
        if len(self.expected) != 4 or any(line["status"] != "ok" for line in self.expected.values()):
            raise Lost(f"the undisturbed matrix did not end well: {self.expected}")
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.folder / "results")
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        self.known: dict[str, dict] = {}

    def lines(self) -> dict[str, dict]:
        """id -> line of every whole line; what follows the last line end may be torn."""
        path = self.folder / "results" / "kills" / "results.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        return {line["id"]: line for line in map(json.loads, whole)}

    def kill(self) -> bool:
        return self.once(self.rng.uniform(3.0, 20.0))  # a run takes about six seconds, and is lost with its runner

    def once(self, seconds: float) -> bool:
        met = kill_after(seconds, *self.command())
        found = self.lines()
        if any(found.get(key) != line for key, line in self.known.items()):
            raise Lost("a line of results is gone or changed")
        for key, line in found.items():
            if line["status"] != "ok" or line["val_bpb"] != self.expected[key]["val_bpb"]:
                raise Lost(f"a run ended otherwise than undisturbed: {line['status']}, {line.get('message')}")
        self.known = found
        self.seen[f"{len(found)} of 4 lines"] += met
        if not met:
            if len(found) != 4:
                raise Lost(f"the matrix ended with {len(found)} of 4 lines")
            self.clear()
        return met


CASES = {"prepare": PrepareNew, "replace": PrepareReplace, "in_place": PrepareInPlace, "train": Train, "pack": Pack,
         "bundle": Bundle, "matrix": Matrix}


def corpus(rng: random.Random) -> Iterator[str]:
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    for number in range(300):
        yield json.dumps({"text": " ".join(rng.choices(words, k=120)) + f" No. {number}\n"}) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--kills", type=int, default=300, help="over all cases, at least")
    p.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng, lost, total = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        text, data = Path(folder) / "corpus.jsonl", Path(folder) / "data"
        text.write_text("".join(corpus(rng)))
        finish("data/prepare.py", "--source", "text", "--input", text, "--vocab-size", 400, "--val-fraction", 0.06,
               "--out", data)
        share = -(-args.kills // len(args.only))
        for name in args.only:
            began, kills = time.monotonic(), 0
            case = CASES[name](Path(folder) / name, text, data, rng)
            faults: list[str] = []
            while kills < share:
                try:
                    kills += case.kill()
                except (Lost, OSError, ValueError) as e:
                    kills += 1
                    faults.append(str(e))
                    print(f"LOST  {name}: {e}", flush=True)
                    if len(faults) > 5:
                        break
            total, lost = total + kills, lost + len(faults)
            met = ", ".join(f"{what} {count}" for what, count in sorted(case.seen.items()))
            print(f"{name:<9} {kills} kills, {len(faults)} lost; what they met: {met}; "
                  f"{time.monotonic() - began:.0f} s", flush=True)
    print(f"{total} kills, {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
