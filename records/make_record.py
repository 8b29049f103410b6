"""Run a track's preset over several seeds and write the record folder: nothing in it is written by hand.

    python records/make_record.py --name Wider --preset cpu_10min_128kb --seeds 1337 1338 1339 \
        --against records/track_cpu_10min_128kb/2026-11-22_FasterSteps

With --against, the program of that record runs in turn with this one, seed by seed, on the same machine: what ten
minutes are worth differs between machines by two and between hours by a third, so that only such pairs compare; what
keeps them fair on a CPU without products of bf16 is fp32_products.py. Each
seed is a whole run of train_gpt.py in a fresh process (data/prepare.py must have been run). Then bundle.py writes
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
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pack import read_bytes
from records import bundle, fp32_products
from records.rules import (
    TRACKS,
    Rival,
    SubmissionError,
    launcher,
    program_of,
    read_json,
    read_metrics,
    read_rival,
    sha256,
)
from tern import command, machine, processes, runlog, source
from train_gpt import PRESETS, Config


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


HOURS_APART = 2.0  # that the two runs of a pair may have ended; the longest run of a track takes half an hour


@dataclass(frozen=True)
class TrainedBy:
    command: str


@dataclass(frozen=True)
class Opponent:
    """Of the submission.json of a record that is run again, what it takes."""

    name: str
    date: str
    preset: str
    seeds: list[TrainedBy]


def needs_fp32(record: Path, preset: str) -> bool:
    """Whether a record's program would take torch's loops for products of bf16, which this CPU does not have."""
    own = any(b"bf16_products" in read_bytes(path) for path in (record / "source").rglob("*.py"))
    return not own and TRACKS[preset].gpus == 0 and not machine.bf16_products()


def rival_folder(seed: int, args: argparse.Namespace, fp32: bool) -> Path:
    return args.out_dir / f"{args.name}_against{'_fp32' if fp32 else ''}_seed{seed}"


def run_again(record: Path, opponent: Opponent, seed: int, args: argparse.Namespace, fp32: bool) -> bytes:
    """The metrics.jsonl of a run of a record's own program, here and now; with fp32, see fp32_products. Raises
    SubmissionError."""
    folder = rival_folder(seed, args, fp32)
    metrics, program = folder / "metrics.jsonl", record / "train_gpt.py"
    words = shlex.split(opponent.seeds[0].command)
    now = {"--seed": str(seed), "--data-path": str(args.data)}
    options = replaced(words[words.index("train_gpt.py") + 1 :], now)
    argv = [*options, "--out-dir", str(args.out_dir), "--run-id", folder.name]
    if not metrics.exists():
        print(f"seed {seed} of {opponent.name}: {shlex.join([*launcher(args.nproc), 'train_gpt.py', *options])}",
              flush=True)
        with tempfile.TemporaryDirectory() as beside:
            env = fp32_products.environment(Path(beside)) if fp32 else None
            done = subprocess.run([*processes.launcher(args.nproc), str(program.resolve()), *argv], env=env)
        if done.returncode:
            raise SubmissionError(f"seed {seed}: the run of {record} failed; see above")
    data = read_bytes(metrics)
    try:
        header, _, _ = read_rival(data, str(metrics))
    except SubmissionError as e:
        raise SubmissionError(f"{e}: delete {metrics.parent} before") from None
    if header.source_sha256 != program_of(read_bytes(program)) or header.argv != argv:
        raise SubmissionError(f"{metrics}: not of {program} with these options; delete {metrics.parent}")
    return data


def check_pair(ours: Path, theirs: Path) -> None:
    """Raises SubmissionError where two runs that are there did not end in the same hours."""
    ends = [(folder / "metrics.jsonl").stat().st_mtime for folder in (ours, theirs)]
    apart = abs(ends[0] - ends[1]) / 3600
    if apart > HOURS_APART:
        raise SubmissionError(f"{ours} and {theirs} ended {apart:.1f} hours apart, which is no pair: delete both")


def replaced(words: list[str], values: dict[str, str]) -> list[str]:
    """Options of which some, `--name value` or `--name=value`, get other values, or are added."""
    kept, rest = [], iter(words)
    for word in rest:
        name, has_value, _ = word.partition("=")
        if name.replace("_", "-") not in values:
            kept.append(word)
        elif not has_value:
            next(rest, None)
    return [*kept, *(word for pair in values.items() for word in pair)]


def train_in_turn(args: argparse.Namespace) -> tuple[list[Path], Rival | None, dict[int, bytes]]:
    """(finished runs, the rival, its metrics.jsonl by seed): every other seed the rival goes first."""
    if args.against is None:
        return [train(seed, args) for seed in args.seeds], None, {}
    where = args.against / "submission.json"
    opponent = read_json(read_bytes(where), Opponent, str(where))
    if TRACKS.get(opponent.preset) != TRACKS[args.preset] or not opponent.seeds:
        raise SubmissionError(f"{where}: preset {opponent.preset!r} is of another track than {args.preset}")
    runs, rivals, fp32 = [], {}, needs_fp32(args.against, args.preset)
    for i, seed in enumerate(args.seeds):
        if i % 2 == 0:
            runs.append(train(seed, args))
        rivals[seed] = run_again(args.against, opponent, seed, args, fp32)
        if i % 2:
            runs.append(train(seed, args))
        check_pair(runs[-1], rival_folder(seed, args, fp32))
    return runs, Rival(opponent.name, opponent.date, fp32), rivals


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    p = command.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--name", required=True, help="name of the record, one word")
    p.add_argument("--preset", choices=TRACKS, default="cpu_10min_128kb")
    p.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    p.add_argument("--date", default=datetime.date.today().isoformat())
    p.add_argument("--data", type=Path, help="default: the preset's")
    p.add_argument("--out-dir", type=Path, default=Path("runs"))
    p.add_argument("--records", type=Path, default=source.root() / "records")
    p.add_argument("--nproc", type=int, default=1, help="processes per run")
    p.add_argument("--against", type=Path, help="folder of the record to run in turn with this one")
    bundle.add_about(p)
    p.add_argument("extra", nargs="*", help="more options of train_gpt.py, after --")
    args = p.parse_args(argv)
    args.data = args.data or Path(PRESETS[args.preset].get("data_path", Config.data_path))
    folder = args.records / f"track_{TRACKS[args.preset].name}" / f"{args.date}_{args.name}"
    try:
        if len(set(args.seeds)) != len(args.seeds) or not args.name.isidentifier():
            raise SubmissionError(f"--seeds {args.seeds} must differ, and --name {args.name!r} be one word of letters")
        if folder.exists():
            raise SubmissionError(f"{folder} exists; records are not overwritten: choose another --name")
        runs, rival, rivals = train_in_turn(args)
        folder.parent.mkdir(parents=True, exist_ok=True)
        about = bundle.About(args.name, args.date, args.author, args.github_id, args.blurb, args.claim)
        print("\n".join(bundle.write(folder, runs, about, args.data, rival, rivals)))
        print(f"{folder}: {len(runs)} seeds on {platform.machine()}")
        return 0
    except (ValueError, OSError) as e:  # SubmissionError, SourceError and ArtifactError are ValueErrors
        command.say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
