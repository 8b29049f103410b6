"""Scores of whole runs of this checkout against another one, turn about, seed by seed, on one machine.

    git worktree add /tmp/before 889f74a
    python records/recipes.py --against /tmp/before --data data/webmix --out-dir runs/webmix --seeds 1 2 3 4 5
    python records/recipes.py --against /tmp/before --also "three=--num-layers 3 --mlp-hidden 304"   # and a variant
    python records/recipes.py --against /tmp/before -- --max-wallclock-seconds 180        # settings of all sides

Step times differ between machines by two and between hours by a third, so that recipes at equal seconds compare only
in turn; every other seed the order is turned round. Each run is a fresh process of its checkout's own train_gpt.py, and
its score is what that program's fresh process made of the file on disk; a finished run is not made again, but must be
of the same program and settings; one that was cut off is made again. The folder's results.jsonl has a line for each.
make_record.py --against does the same with a record's one file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import stats
from pack import read_bytes
from records.rules import SubmissionError, read_metrics, read_rival, sha256
from tern import command, runlog, source
from tern.files import write_atomic
from tern.runfolder import lock_folder


def is_finished(metrics: Path) -> bool:
    try:
        return metrics.exists() and isinstance(read_metrics(read_bytes(metrics), str(metrics))[-1], runlog.Final)
    except SubmissionError:  # cut off before its header, or in a line
        return False


def run(side: str, checkout: Path, options: list[str], out: Path) -> tuple[runlog.Header, runlog.Final, float]:
    """(header, last line, sliding bpb) of a run, made now unless it is there. Raises SubmissionError, and
    RunExists where another process is at work on it."""
    seed = options[options.index("--seed") + 1]
    folder = out / f"{side}_seed{seed}"
    argv = [*options, "--out-dir", str(out), "--run-id", folder.name]
    metrics = folder / "metrics.jsonl"
    if not is_finished(metrics):
        with lock_folder(folder):  # keeps out who would work in it, and stays
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{side}, seed {seed}: {shlex.join([str(checkout / 'train_gpt.py'), *argv])}", flush=True)
        with open(out / f"{folder.name}.out", "w", encoding="utf-8") as lines:
            words = [sys.executable, str(checkout / "train_gpt.py"), *argv]
            if subprocess.run(words, stdout=lines, stderr=subprocess.STDOUT).returncode:
                raise SubmissionError(f"{side}, seed {seed}: the run failed; see {lines.name}")
    header, final, result = read_rival(read_bytes(metrics), str(metrics))
    if header.argv != argv or any(sha256(read_bytes(checkout / name)) != said
                                  for name, said in header.source_sha256.items()):
        raise SubmissionError(f"{folder} holds a run of another program or of other settings; delete it")
    if final.roundtrip_gap != 0:
        raise SubmissionError(f"{metrics}: a roundtrip gap of {final.roundtrip_gap}")
    return header, final, result.sliding.val_bpb


def play(sides: dict[str, tuple[Path, list[str]]], args: argparse.Namespace) -> None:
    """Make, write and compare the runs of all sides: name -> (checkout, options). Raises SubmissionError."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[int, float]] = {name: {} for name in sides}
    lines = []
    for i, seed in enumerate(args.seeds):
        headers = {}
        for name in list(sides)[:: -1 if i % 2 else 1]:
            checkout, settings = sides[name]
            options = ["--preset", args.preset, "--seed", str(seed), "--data-path", str(args.data.resolve()), *settings]
            header, final, bpb = run(name, checkout, options, args.out_dir.resolve())
            headers[name], scores[name][seed] = header, bpb
            lines.append(json.dumps({"side": name, "seed": seed, "sliding": bpb, "source_sha256": header.source_sha256,
                                     "machine": header.machine, "data_sha256": header.data_sha256,
                                     "preset": args.preset, "settings": settings, "final": asdict(final)},
                                    sort_keys=True))
            ms = 1000 * final.seconds["train"] / final.step
            print(f"seed {seed} {name:<8} sliding {bpb:.4f}  {final.step:>6} steps of {ms:.0f} ms  "
                  f"{final.bytes_total:,} bytes {'fits' if final.fits else 'OVER'}", flush=True)
        told = [json.dumps([h.machine, h.data_sha256], sort_keys=True) for h in headers.values()]
        if len(set(told)) > 1:
            raise SubmissionError(f"seed {seed}: the runs are of different machines or texts, and do not compare")
        write_atomic(args.out_dir / "results.jsonl", "".join(f"{line}\n" for line in lines).encode())
    for name in list(sides)[1:]:
        c = stats.compare(scores[name], scores["other"])
        spread = f", sd of the differences {c.sd:.4f}, 95% interval {c.low:+.4f} to {c.high:+.4f}" if c.n > 1 else ""
        print(f"{name} against other: {c.mean:+.4f} bpb{spread}, n={c.n}")


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    p = command.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--against", type=Path, required=True, metavar="CHECKOUT", help="folder of the other checkout")
    p.add_argument("--data", type=Path, default=Path("data/packages"))
    p.add_argument("--preset", default="cpu_10min_128kb")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    p.add_argument("--also", action="append", default=[], metavar="NAME=SETTINGS",
                   help="this checkout with more settings")
    p.add_argument("--out-dir", type=Path, default=Path("runs/recipes"))
    p.add_argument("extra", nargs="*", help="more options of train_gpt.py, of all sides, after --")
    args = p.parse_args(argv)
    here = source.root()
    sides = {"other": (args.against.resolve(), args.extra), "this": (here, args.extra)}
    for name, has_settings, settings in (text.partition("=") for text in args.also):
        if not has_settings or name in sides or not name.isidentifier():
            p.error(f"--also {name}: give NAME=SETTINGS with a name of its own")
        sides[name] = here, [*args.extra, *shlex.split(settings)]
    if not (args.against / "train_gpt.py").is_file():
        p.error(f"{args.against}: no train_gpt.py there; make it with: git worktree add {args.against} COMMIT")
    try:
        play(sides, args)
        return 0
    except (ValueError, OSError) as e:  # SubmissionError, ArtifactError and RunExists are ValueErrors
        command.say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
