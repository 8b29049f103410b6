"""Run a track's preset over several seeds and write the record folder: nothing in it is written by hand.

    python records/make_record.py --name FirstTernary --preset cpu_10min_128kb --seeds 1337 1338 1339

Each seed is a whole run of train_gpt.py in a fresh process (data/prepare.py must have been run). Then bundle.py writes
records/track_<track>/<date>_<name>/, and every stored artifact is scored once more by the folder's own train_gpt.py:
the folder is kept only if it passes every check and gives the recorded score again, digit for digit. A seed whose run
in runs/ is finished and was made by the same sources and settings is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pack import read_bytes
from records import bundle
from records.rules import TRACKS, SubmissionError, launcher, read_metrics, sha256
from tern import command, processes, runlog, source


def train(seed: int, args: argparse.Namespace) -> Path:
    """The folder of the seed's finished run. Raises SubmissionError."""
    run_id = f"{args.name}_seed{seed}"
    folder = args.out_dir / run_id
    options = ["--preset", args.preset, "--seed", str(seed), "--data-path", str(args.data), *args.extra]
    argv = [*options, "--out-dir", str(args.out_dir), "--run-id", run_id]
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        records = read_metrics(read_bytes(metrics), str(metrics))
        header, final = records[0], records[-1]
        sources = {name: sha256(text) for name, text in source.read_sources().items()}
        if isinstance(final, runlog.Final) and header.source_sha256 == sources and header.argv == argv:
            return folder
        raise SubmissionError(f"{folder} holds another run, or one that did not finish; delete it or choose another "
                              "--name")
    print(f"seed {seed}: {shlex.join([*launcher(args.nproc), 'train_gpt.py', *options])}", flush=True)
    words = [*processes.launcher(args.nproc), *source.command_of("train_gpt"), *argv]
    if subprocess.run(words).returncode:
        raise SubmissionError(f"seed {seed}: the run failed; see above and {folder / 'log.txt'}")
    return folder


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    p = command.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--name", required=True, help="name of the record, one word")
    p.add_argument("--preset", choices=TRACKS, default="cpu_10min_128kb")
    p.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    p.add_argument("--date", default=datetime.date.today().isoformat())
    p.add_argument("--data", type=Path, default=Path("data/packages"))
    p.add_argument("--out-dir", type=Path, default=Path("runs"))
    p.add_argument("--records", type=Path, default=source.root() / "records")
    p.add_argument("--nproc", type=int, default=1, help="processes per run")
    bundle.add_about(p)
    p.add_argument("extra", nargs="*", help="more options of train_gpt.py, after --")
    args = p.parse_args(argv)
    folder = args.records / f"track_{TRACKS[args.preset].name}" / f"{args.date}_{args.name}"
    try:
        if len(set(args.seeds)) != len(args.seeds) or not args.name.isidentifier():
            raise SubmissionError(f"--seeds {args.seeds} must differ, and --name {args.name!r} be one word of letters")
        if folder.exists():
            raise SubmissionError(f"{folder} exists; records are not overwritten: choose another --name")
        runs = [train(seed, args) for seed in args.seeds]
        folder.parent.mkdir(parents=True, exist_ok=True)
        about = bundle.About(args.name, args.date, args.author, args.github_id, args.blurb, args.claim)
        print("\n".join(bundle.write(folder, runs, about, args.data)))
        print(f"{folder}: {len(runs)} seeds on {platform.machine()}")
        return 0
    except (ValueError, OSError) as e:  # SubmissionError, SourceError and ArtifactError are ValueErrors
        command.say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
