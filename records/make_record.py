"""Run a track's preset over several seeds and write the record folder: nothing in it is written by hand.

    python records/make_record.py --name FirstTernary --preset cpu_10min_128kb --seeds 1337 1338 1339

Each seed is a whole run of train_gpt.py in a fresh process (data/prepare.py must have been run). Then the programs,
logs and artifacts are copied to records/track_<track>/<date>_<name>/, and every stored artifact is scored once more
by the stored eval_bpb.py: the folder is kept only if that gives the recorded score again, digit for digit.
A seed whose run in runs/ is finished and was made by the same sources and settings is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only records/ is on the module path

from eval_bpb import sha256_file  # noqa: E402
from pack import code_files  # noqa: E402


@dataclass(frozen=True)
class Track:
    """The rules that a record of the track keeps."""

    name: str
    cap_bytes: int
    count_code: bool
    train_seconds: float
    score_seconds: float


OFFICIAL = Track("10min_16mb", 16_000_000, True, 600.0, 600.0)
TRACKS = {  # preset -> track
    "cpu_10min_128kb": Track("cpu_10min_128kb", 128_000, False, 600.0, 600.0),
    "golf16mb": OFFICIAL,
    "pr367": OFFICIAL,
    "tiny": Track("test", 128_000, False, 600.0, 600.0),
}


class RecordError(ValueError):
    """A record that must not be written; the message says why."""


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. Raises RecordError."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] or [{"type": "nothing"}]
    except ValueError as e:
        raise RecordError(f"{path}: a run that was killed while it wrote ({e}); delete its folder") from None


def train(seed: int, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The finished run's folder and the command that made it."""
    run_id = f"{args.name}_seed{seed}"
    folder = args.out_dir / run_id
    launch = ["python"] if args.nproc == 1 else ["torchrun", "--standalone", f"--nproc_per_node={args.nproc}"]
    options = ["--preset", args.preset, "--seed", str(seed), "--data-path", str(args.data), *args.extra]
    shown = [*launch, "train_gpt.py", *options]
    argv = [*options, "--out-dir", str(args.out_dir), "--run-id", run_id]
    sources = {p.name: sha256_file(p) for p in code_files()}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        records = read_records(metrics)
        header, final = records[0], records[-1]
        if final["type"] == "final" and header["source_sha256"] == sources and header["argv"] == argv:
            return folder, shown
        raise RecordError(f"{folder} holds another run, or one that did not finish; delete it or choose another --name")
    command = [sys.executable] if args.nproc == 1 else [sys.executable, "-m", "torch.distributed.run", *launch[1:]]
    command += [str(ROOT / "train_gpt.py"), *argv]
    print(f"seed {seed}: {shlex.join(shown)}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RecordError(f"seed {seed}: the run failed; see above and {folder / 'log.txt'}")
    return folder, shown


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.6f} ± {spread:.6f}"


def write_record(folder: Path, runs: list[tuple[int, Path, list[str]]], args: argparse.Namespace) -> dict:
    """Fill folder from finished runs; returns submission.json. Raises RecordError where runs do not belong together."""
    folder.mkdir(parents=True)
    track, rows, headers = args.track, [], []
    for seed, run, command in runs:
        records = read_records(run / "metrics.jsonl")
        header, final = records[0], records[-1]
        if final["type"] != "final" or sum(r["type"] == "header" for r in records) != 1:
            raise RecordError(f"{run}: not one uninterrupted, finished run")
        if final["roundtrip_gap"] != 0.0 or not final["logits_identical"]:
            raise RecordError(f"{run}: the file is not the model that was trained")
        total = final["bytes_model"] + (final["bytes_code"] if track.count_code else 0)
        seconds = {"train": track.train_seconds, "score": track.score_seconds}
        if total > track.cap_bytes or any(final["seconds"][k] > limit for k, limit in seconds.items()):
            raise RecordError(f"{run}: {total} bytes, {final['seconds']} seconds: against the rules of {track}")
        if "environment" in header["origin"].values():
            raise RecordError(f"{run}: settings came from the environment; unset them and pass them after --")
        score = final["score"]["sliding"]
        if not score:
            raise RecordError(f"{run}: has no sliding-window score; set --eval-stride")
        rows.append({
            "seed": seed, "val_bpb": score["val_bpb"], "val_loss": score["val_loss"],
            "val_bpb_chunked": final["score"]["chunked"]["val_bpb"], "roundtrip_gap": final["roundtrip_gap"],
            "bytes_model": final["bytes_model"], "bytes_code": final["bytes_code"], "steps": final["step"],
            "tokens": final["tokens_seen"], "seconds": final["seconds"], "command": shlex.join(command),
            "artifact": f"model_seed{seed}.tern", "artifact_sha256": final["artifact_sha256"],
            "ternary_weights": final["score"]["model"]["ternary_weights"],
            "parameters": final["score"]["model"]["parameters"], "zero_frac": final["score"]["model"]["zero_frac"],
        })
        headers.append(header)
        for source, name in (("log.txt", f"train_seed{seed}.log"), ("metrics.jsonl", f"metrics_seed{seed}.jsonl"),
                             ("model.tern", f"model_seed{seed}.tern"), ("score.json", f"score_seed{seed}.json")):
            shutil.copyfile(run / source, folder / name)
    for h in headers:  # the settings that make a seed another run of the same record
        h["settings"] |= {"seed": None, "run_id": None}
    for key in ("source_sha256", "data_sha256", "machine", "settings", "world_size"):
        if any(h[key] != headers[0][key] for h in headers):
            raise RecordError(f"the runs differ in {key}: they are not seeds of one record")
    for path in code_files():
        if sha256_file(path) != headers[0]["source_sha256"][path.name]:
            raise RecordError(f"{path.name} was changed since the runs; run them again")
        shutil.copyfile(path, folder / path.name)
    bpb = [r["val_bpb"] for r in rows]
    submission = {
        "track": track.name, "date": args.date, "name": args.name, "author": args.author,
        "github_id": args.github_id,
        "blurb": args.blurb, "val_loss": statistics.mean(r["val_loss"] for r in rows),
        "val_bpb": statistics.mean(bpb), "val_bpb_std": statistics.stdev(bpb) if len(bpb) > 1 else None,
        "bytes_total": max(r["bytes_model"] + (r["bytes_code"] if track.count_code else 0) for r in rows),
        "bytes_model": max(r["bytes_model"] for r in rows), "bytes_code": rows[0]["bytes_code"],
        "cap_bytes": track.cap_bytes, "cap_counts_code": track.count_code, "seeds": rows,
        "machine": headers[0]["machine"],
        "data_sha256": headers[0]["data_sha256"], "data_identity": headers[0]["data"],
        "code_sha256": headers[0]["source_sha256"], "settings": headers[0]["settings"],
    }
    (folder / "submission.json").write_text(json.dumps(submission, indent=1, sort_keys=True) + "\n")
    return submission


def readme(s: dict, folder: Path, args: argparse.Namespace) -> str:
    rows, machine = s["seeds"], s["machine"]
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    table = "\n".join(
        f"| {r['seed']} | {r['val_bpb']:.6f} | {r['val_bpb_chunked']:.6f} | {r['roundtrip_gap']:.8f} | "
        f"{r['bytes_model']:,} | {r['steps']:,} | {r['tokens']:,} | {r['seconds']['train']:.1f} | "
        f"{r['seconds']['score']:.1f} | {r['zero_frac']:.4f} |" for r in rows)
    count = "counted" if s["cap_counts_code"] else "reported, not counted on this track"
    return f"""# {s['name']}: {s['val_bpb']:.4f} bits per byte on track_{s['track']}

{s['blurb']}

Written by `records/make_record.py`; every number comes from the logs beside this page.

| seed | sliding val_bpb | chunked val_bpb | gap | model bytes | steps | tokens | train s | score s | zero_frac |
|---|---|---|---|---|---|---|---|---|---|
{table}

Sliding val_bpb, mean ± sample standard deviation over {len(rows)} seeds: **{summary([r['val_bpb'] for r in rows])}**
(stride {s['settings']['eval_stride']}, window {s['settings']['train_seq_len']}). Seeds change the initialisation;
the order of the data is fixed.

- Parameters: {rows[0]['parameters']:,}, of them {rows[0]['ternary_weights']:,} ternary.
- Bytes: model {s['bytes_model']:,} (the largest seed) of a cap of {s['cap_bytes']:,}; code
  {s['bytes_code']:,} ({count}).
- Machine: {machine['cores']} cores, {machine['cpu']}, {', '.join(machine['gpu']) or 'no GPU'}, Python
  {machine['python']}, torch {machine['torch']}. `score s` includes loading, both scores and the audit.
- Data: identity `{s['data_identity']}`.

Train again (the step count follows the clock, so the score varies with the machine):

    {rows[0]['command']}

Score a stored artifact again; the programs are those of this folder:

    python {where}/eval_bpb.py {where}/{rows[0]['artifact']} --data {args.data} --stride {s['settings']['eval_stride']}
"""


def verify(folder: Path, submission: dict, args: argparse.Namespace) -> None:
    """Score every stored artifact with the stored scorer. Raises RecordError if a digit differs."""
    for row in submission["seeds"]:
        out = folder / "again.json"
        settings = submission["settings"]
        command = [sys.executable, str(folder / "eval_bpb.py"), str(folder / row["artifact"]), "--data",
                   str(args.data), "--stride", str(settings["eval_stride"]), "--batch-seqs",
                   str(settings["eval_batch_seqs"]), "--json", str(out)]
        threads = settings["threads"] or max(1, submission["machine"]["cores"] // args.nproc)
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}  # as the run scored it: last bits may depend on it
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RecordError(f"seed {row['seed']}: {done.stderr.strip()}")
        again = json.loads(out.read_text())
        out.unlink()
        found = {"val_bpb": again["sliding"]["val_bpb"], "val_bpb_chunked": again["chunked"]["val_bpb"],
                 "bytes_model": again["artifact"]["bytes"], "artifact_sha256": again["artifact"]["sha256"]}
        if differ := {k: (v, row[k]) for k, v in found.items() if v != row[k]}:
            raise RecordError(f"seed {row['seed']}: scored again, and (now, recorded) differ: {differ}")
        print(f"seed {row['seed']}: {row['artifact']} scores {row['val_bpb']:.8f} again", flush=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--name", required=True, help="name of the record, one word")
    p.add_argument("--preset", choices=TRACKS, default="cpu_10min_128kb")
    p.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    p.add_argument("--date", default=datetime.date.today().isoformat())
    p.add_argument("--data", type=Path, default=Path("data/packages"))
    p.add_argument("--out-dir", type=Path, default=Path("runs"))
    p.add_argument("--records", type=Path, default=ROOT / "records")
    p.add_argument("--nproc", type=int, default=1, help="processes per run")
    p.add_argument("--author", default="")
    p.add_argument("--github-id", default="")
    p.add_argument("--blurb", default="", help="one or two sentences on what is new")
    p.add_argument("extra", nargs="*", help="more options of train_gpt.py, after --")
    args = p.parse_args(argv)
    args.track = TRACKS[args.preset]
    folder = args.records / f"track_{args.track.name}" / f"{args.date}_{args.name}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if len(set(args.seeds)) != len(args.seeds) or not args.name.isidentifier():
            raise RecordError(f"--seeds {args.seeds} must differ, and --name {args.name!r} be one word of letters")
        if folder.exists():
            raise RecordError(f"{folder} exists; records are not overwritten: choose another --name")
        runs = [(seed, *train(seed, args)) for seed in args.seeds]
        shutil.rmtree(partial, ignore_errors=True)
        submission = write_record(partial, runs, args)
        verify(partial, submission, args)
        (partial / "README.md").write_text(readme(submission, folder, args))
        partial.rename(folder)
        print(f"{folder}: val_bpb {summary([r['val_bpb'] for r in submission['seeds']])} "
              f"on {platform.machine()}, {len(runs)} seeds")
        return 0
    except (ValueError, OSError, KeyError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
