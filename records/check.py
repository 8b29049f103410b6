"""The referee: whether a submission's folder is what it says.

    python records/check.py FOLDER [--against RECORD] [--data DATA]
    python records/check.py PUBLISHED [--against RECORD] [--json FILE]

Of a folder that records/bundle.py wrote, submission.json says nothing of its own but who, when and what is claimed:
every number in it is rules.summarize of the other files, and is computed again here. The referee believes nothing that
it reads and runs nothing of it, except with --data, and then only the train_gpt.py that it has just shown to be source/
compressed, after everything else held.

A folder of the competition in any other layout is read by records/published.py and judged by records/findings.py: a
line per finding, with file, line, severity and what to do.
"""

from __future__ import annotations

import ast
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pack
from records import findings, published, rules
from records.claim import weigh_claim
from records.rules import Blocked, Run, Submission, SubmissionError, Track, differences, seed_names, sha256
from records.static import forbidden
from tern import command, runlog, source
from tern.files import folder_identity, write_atomic

MAX_FILES, MAX_FOLDER, MAX_SEEDS = 1000, 1 << 30, 100  # files, bytes and seeds of a folder that is looked at
MAX_READ = 1 << 25  # bytes of one file: above every cap, and three times a log of 20,000 steps
# Versions of Python and liblzma differ by less than this share in the bytes of the one file that they make.
VERSIONS_DIFFER = 0.05


class Case:
    """A submission's folder as it is on disk. Its properties raise Blocked where what they need was not found."""

    def __init__(self, folder: Path, against: str | None = None, data: Path | None = None):
        self.folder, self.against, self.data = folder, against, data
        self.files: dict[str, int] = {}  # regular files: name relative to the folder -> bytes
        self.odd: list[str] = []  # anything else but folders
        # What check_files found to be well formed:
        self.json: tuple[dict, Submission] | None = None  # submission.json, as it is and as it is understood
        self.programs: dict[str, bytes] | None = None  # name -> bytes of the programs in source/
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
            raise SubmissionError(f"cannot read {folder}: {e.strerror}; give a folder that records/bundle.py wrote"
                                  ) from None

    def read(self, name: str) -> bytes:
        """The bytes of a regular file. Raises Blocked if there is none, SubmissionError if it is too large."""
        if name not in self.files:
            raise Blocked(f"{name} is missing")
        if self.files[name] > MAX_READ:
            raise SubmissionError(f"{name}: {self.files[name]:,} bytes, at most {MAX_READ:,} are read")
        return (self.folder / name).read_bytes()

    def read_source(self, name: str) -> bytes | None:
        """A file of source/, None where there is none."""
        return self.read(f"source/{name}") if f"source/{name}" in self.files else None

    @property
    def said(self) -> dict:
        """submission.json as it is."""
        if self.json is None:
            raise Blocked("submission.json cannot be used")
        return self.json[0]

    @property
    def submission(self) -> Submission:
        if self.json is None:
            raise Blocked("submission.json cannot be used")
        return self.json[1]

    @property
    def track(self) -> Track:
        for track in rules.TRACKS.values():
            if track.name == self.submission.track:
                return track
        raise Blocked("no such track")

    @property
    def numbers(self) -> list[int]:
        """The seeds, in the order of submission.json; one may occur twice."""
        return [row.seed for row in self.submission.seeds]

    @property
    def runs(self) -> list[Run]:
        """The run of each seed."""
        for number in self.numbers:
            if number not in self.by_seed:
                raise Blocked(f"the files of seed {number} cannot be used")
        return [self.by_seed[number] for number in self.numbers]

    @property
    def sources(self) -> dict[str, bytes]:
        """File name -> bytes of the readable programs and of all in source/ that they import."""
        if self.programs is None:
            raise Blocked("source/ cannot be used")
        return self.programs

    @cached_property
    def summary(self) -> dict:
        """What submission.json should say."""
        rival = self.submission.rival
        rivals = {number: self.read(rules.RIVAL.format(number)) for number in self.numbers} if rival else {}
        return rules.summarize(self.track, self.runs, self.read("train_gpt.py"), self.sources, rival, rivals)


# ---------------------------------------------------------------------------------------------------------------
# The folder: files, hashes, bytes
# ---------------------------------------------------------------------------------------------------------------


def check_files(c: Case) -> Iterator[str]:
    """Also loads what the other checks use."""
    yield from c.odd
    found = rules.parse_json(c.read("submission.json"), "submission.json")
    submission = rules.typed(found, Submission, "submission.json")
    if not 0 < len(submission.seeds) <= MAX_SEEDS:
        raise SubmissionError(f"submission.json: {len(submission.seeds)} seeds, there must be 1 to {MAX_SEEDS}")
    c.json = found, submission
    if submission.track not in [track.name for track in rules.TRACKS.values()]:
        yield f"submission.json: there is no track {submission.track!r}"
    if submission.claim not in ("none", "record"):
        yield f"submission.json: claim must be none or record, not {submission.claim!r}"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", submission.date) or not submission.name:
        yield "submission.json: date must be as 2026-01-31 and name not empty"
    expected = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "source/requirements.txt"}
    expected |= {name for number in c.numbers for name in seed_names(number).values()}
    expected |= {rules.RIVAL.format(number) for number in c.numbers} if submission.rival else set()
    try:
        expected |= {f"source/{name}" for name in load_sources(c)}
    except source.SourceError as e:
        yield f"source/{e}"
        expected |= {name for name in c.files if name.startswith("source/")}  # it is not known what it needs
    for name in sorted((expected | submission.files.keys()) - c.files.keys()):
        yield f"{name} is missing"
    for name in sorted(c.files.keys() - expected):
        yield f"{name} does not belong in a submission: remove it"
    for number in dict.fromkeys(c.numbers):
        names = seed_names(number)
        if c.files.keys() >= set(names.values()):
            try:
                c.by_seed[number] = rules.read_run(c.read, names)
            except SubmissionError as e:
                yield str(e)
    c.notes.append(f"{len(c.files)} files")


def load_sources(c: Case) -> set[str]:
    """The files that source/ must have: the programs, the one that makes the data, and what they import of source/.

    Raises SourceError.
    """
    programs = {name: c.read_source(name) for name in source.needed_by(source.PROGRAMS, c.read_source)}
    if programs.keys() >= set(source.PROGRAMS):
        c.programs = programs
    every = programs | {name: c.read_source(name) for name in source.needed_by([rules.PREPARE], c.read_source)}
    return {*source.PROGRAMS, rules.PREPARE, *every, *missing_modules(every)}


def missing_modules(files: Mapping[str, bytes]) -> Iterator[str]:
    """Files that should be there, as one of the Python files imports them from a folder that is there.

    What is in none of the files' folders is a library's. Raises SourceError.
    """
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    for file, text in files.items():
        for name in source.imported(text, file) - source.APART:
            folder = ""
            for part in name.split("."):
                path = f"{folder}/{part}".lstrip("/")
                if path not in folders:
                    if folder and f"{path}.py" not in files and not defines_names(files, f"{folder}/__init__.py"):
                        yield f"{path}.py"
                    break
                folder = path


def defines_names(files: Mapping[str, bytes], package: str) -> bool:
    """Whether a package's __init__.py is more than a docstring, so that what is imported may be a name in it."""
    return package in files and len(source.parse(files[package], package).body) > 1


def check_hashes(c: Case) -> Iterator[str]:
    listed = c.said["files"]
    for name in sorted(c.files.keys() - {"submission.json"}):
        if name not in listed:
            yield f"{name} is not listed in submission.json"
            continue
        is_now = {"bytes": c.files[name], "sha256": sha256(c.read(name))}
        yield from differences(listed[name], is_now, name)


def check_bytes(c: Case) -> Iterator[str]:
    for key, value in c.summary.items():
        said = c.said.get(key)
        if key.startswith(("bytes_", "cap_")) and said != value:
            yield (f"submission.json: {key} is {said}, but by the files and the rules of track {c.track.name} it is "
                   f"{value}")
    yield from rules.over_cap(c.summary)
    for run in c.runs:
        if rules.TRACKS.get(run.header.preset) != c.track:
            yield f"seed {run.seed}: preset {run.header.preset!r} is not one of track {c.track.name}"
    c.notes.append(f"{c.summary['bytes_total']:,} of {c.track.cap_bytes:,}")


# ---------------------------------------------------------------------------------------------------------------
# The program: the one file, its sources, what they import
# ---------------------------------------------------------------------------------------------------------------


def check_program(c: Case) -> Iterator[str]:
    if c.read("requirements.txt") != rules.libraries(c.read("source/requirements.txt"), c.sources):
        yield "requirements.txt: not the lines of source/requirements.txt for what the programs import"
    frame, packed = source.take_apart(c.read("train_gpt.py"))
    if frame not in rules.FRAMES:
        raise SubmissionError("train_gpt.py: before or after its sources it is not what records/bundle.py writes")
    if packed == source.compress(c.sources):
        return
    where = "train_gpt.py: its sources"
    found = rules.read_json(source.unpack(packed), dict[str, str], where)
    wanted, differ = source.strip_modules(c.sources), False
    if list(found) != list(wanted):
        raise SubmissionError(f"train_gpt.py: holds the modules {', '.join(found)}, source/ {', '.join(wanted)}")
    for name, text in wanted.items():
        # Parsed, because versions of Python print a program differently.
        theirs = source.strip(found[name].encode(errors="surrogatepass"), f"{where}: {name}")
        if ast.dump(ast.parse(text)) != ast.dump(ast.parse(theirs)):
            differ = True
            yield f"train_gpt.py: its module {name} is not that of source/; bundle the runs again"
    if not differ:
        c.notes.append("the same modules, written by another version of Python or liblzma")


def check_sources(c: Case) -> Iterator[str]:
    hashes = {name: sha256(data) for name, data in c.sources.items()}
    for run in c.runs:
        names, digest = seed_names(run.seed), sha256(run.artifact)
        yield from differences(run.header.source_sha256, hashes, f"seed {run.seed}: sha256 of source")
        for name, data in c.sources.items():
            if f"{runlog.source_line(name, data)}\n" not in run.log:
                yield f"{names['log.txt']}: does not hold source/{name} as what ran"
        for what, said in (("metrics", run.final.artifact_sha256), ("score", run.score["artifact"]["sha256"])):
            if said != digest:
                yield f"{names['model.tern']}: sha256 {digest[:16]}, but the {what} are of {said[:16]}"
        yield from check_artifact(run, names)


def check_artifact(run: Run, names: Mapping[str, str]) -> Iterator[str]:
    """Whether the artifact is sound, and of its run."""
    try:
        tensors, meta = pack.decode_artifact(run.artifact)
        for name, tensor in tensors.items():
            pack.check_values(name, tensor)
    except pack.ArtifactError as e:
        yield f"{names['model.tern']}: {e}"
        return
    ternary = [tensor.codes for tensor in tensors.values() if tensor.format["kind"] == "ternary"]
    weights = sum(codes.size for codes in ternary)
    counts = {"parameters": sum(tensor.codes.size for tensor in tensors.values()), "ternary_weights": weights,
              "zero_frac": sum(int((codes == 0).sum()) for codes in ternary) / weights if weights else 0.0}
    yield from differences(counts, {key: run.score["model"][key] for key in counts}, f"{names['score.json']}: model")
    named = {"tokenizer": list(run.header.data_sha256.values()), "data": [run.header.data[:16]]}
    for what, allowed in named.items():  # files of before there were such names have none
        if what in meta and meta[what] not in allowed:
            yield f"{names['model.tern']}: its {what} is not that of {names['metrics.jsonl']}"
    config, settings = meta.get("config"), run.header.settings
    if not isinstance(config, dict) or any(settings.get(key) != value for key, value in config.items()):
        yield f"{names['model.tern']}: its configuration is not that of {names['metrics.jsonl']}"


PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")


def check_imports(c: Case) -> Iterator[str]:
    for name, text in c.sources.items():
        for what in forbidden(source.parse(text, name)):
            yield f"source/{name}: {what}"
    for name in sorted(c.files):
        with open(c.folder / name, "rb") as f:
            begin = f.read(4)
        if begin.startswith(PICKLE_MAGIC) or begin in ZIP_MAGIC:
            yield f"{name}: begins as a pickle or zip file"


# ---------------------------------------------------------------------------------------------------------------
# The runs: their logs, seeds and seconds
# ---------------------------------------------------------------------------------------------------------------


def final_lines(run: Run) -> Iterator[tuple[str, str]]:
    """How the trainer's log ends: (beginning, end) of every line that states a result."""
    final, settings = run.final, run.header.settings
    *results, artifact = runlog.result_lines(final, settings, "")
    lines = [
        *runlog.size_lines(final.bytes_model, final.bytes_code),
        runlog.phase_line(runlog.Phase("train", final.seconds["train"]),
                          runlog.trained_note(final.step, final.tokens_seen)),
        *(runlog.phase_line(runlog.Phase(name, final.seconds[name])) for name in ("pack", "score")),
        *runlog.score_lines(final, settings), *results,
    ]
    for line in lines:
        words = re.match(r"[^\d-]*", line).group()  # before its first number, by which no other line begins
        yield words, line.removeprefix(words)
    begin, mark, end = artifact.partition("  sha256")
    yield begin, mark + end  # between them is a path of the machine


def check_logs(c: Case) -> Iterator[str]:
    for run in c.runs:
        names, final = seed_names(run.seed), run.final
        log, metrics = run.log.splitlines(), names["metrics.jsonl"]
        for begin, end in final_lines(run):
            lines = [line for line in log if line.startswith(begin)]
            if len(lines) != 1:
                yield f"{names['log.txt']}: {len(lines)} lines begin with {begin.strip()!r}, there must be one"
            elif not (lines[0].endswith(end) if begin.startswith("artifact ") else lines[0] == begin + end):
                yield f"{names['log.txt']}: {lines[0]!r}, but {metrics} gives {end.strip()!r}"
        yield from differences(final.score, run.score, names["score.json"])
        gap = run.result.chunked.val_bpb - final.memory["val_bpb"]
        if final.roundtrip_gap != 0 or gap != 0 or not final.logits_identical:
            yield (f"{metrics}: the file is not the model that was trained (roundtrip gap {gap}, recorded as "
                   f"{final.roundtrip_gap}; logits identical: {final.logits_identical})")
        code = recorded_code(c, run)
        counted = pack.Budget(len(run.artifact), code, run.settings.cap_bytes, run.settings.cap_counts_code)
        sizes = {"bytes_model": counted.bytes_model, "bytes_code": code, "bytes_total": counted.total,
                 "cap": counted.cap, "fits": counted.fits}
        yield from differences(sizes, {key: getattr(final, key) for key in sizes}, f"{metrics}: final")
        if run.score["artifact"]["bytes"] != len(run.artifact):
            yield f"{names['score.json']}: is of an artifact of {run.score['artifact']['bytes']} bytes"
        for what, score in (("memory", rules.typed(final.memory, rules.Score, f"{metrics}: final.memory")),
                            ("chunked", run.result.chunked), ("sliding", run.result.sliding)):
            yield from check_sums(score, run.result.chunked, f"{metrics}: {what}")
        scored_on = {name: sha for name, sha in run.header.data_sha256.items() if not fnmatch(name, "*_train_*.bin")}
        yield from differences(scored_on, run.score["data"]["sha256"], f"{names['score.json']}: data")
        identities = {"data": folder_identity(run.header.data_sha256),
                      "source": folder_identity(run.header.source_sha256)}
        yield from differences(identities, {key: getattr(run.header, key) for key in identities}, f"{metrics}: header")
    own = {field.name for field in fields(Submission)} - c.summary.keys()
    said = {key: value for key, value in c.said.items() if key not in own}

    def without_bytes(s: Mapping) -> dict:  # which check_bytes has compared
        return {key: value for key, value in s.items() if not key.startswith(("bytes_", "cap_"))}

    yield from differences(without_bytes(c.summary), without_bytes(said), "submission.json")


def check_sums(score: rules.Score, chunked: rules.Score, where: str) -> Iterator[str]:
    """A score's bits per byte are its nats of all tokens over all bytes; each pass is over the same tokens."""
    counts, others = (score.tokens, score.bytes), (chunked.tokens, chunked.bytes)
    if counts != others or not all(0 < n < 1 << 53 for n in counts):
        yield f"{where}: of (tokens, bytes) {counts}, the chunked score of {others}"
    elif not math.isclose(score.val_bpb, score.val_loss * score.tokens / score.bytes / math.log(2), rel_tol=1e-9):
        yield (f"{where}: val_bpb {score.val_bpb} is not val_loss {score.val_loss} x {score.tokens} tokens / "
               f"{score.bytes} bytes / ln 2")


def recorded_code(c: Case, run: Run) -> int:
    """The bytes of code that a run had to record. What counts is only the size of train_gpt.py in the folder.

    In schema 1 they were those of the readable sources. Since then they are those of the one file, which another
    version of Python than the one that bundled the runs makes a little larger or smaller.
    """
    if run.header.schema == 1:
        return c.summary["bytes_code_source"]
    said, here = run.final.bytes_code, c.summary["bytes_code"]
    if said == here or abs(said - here) > VERSIONS_DIFFER * here:
        return here
    c.notes.append(f"seed {run.seed} recorded {said:,} bytes of code, train_gpt.py has {here:,}: written by another "
                   "version of Python or liblzma")
    return said


def check_seeds(c: Case) -> Iterator[str]:
    numbers = c.numbers
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        yield f"submission.json: seed {number} occurs {numbers.count(number)} times"
    if c.submission.claim == "record" and len(set(numbers)) < rules.RECORD_SEEDS:
        yield f"a record is claimed with {len(set(numbers))} seed(s), it needs {rules.RECORD_SEEDS}"
    first, artifacts = c.runs[0], {}
    for number, run in c.by_seed.items():
        if run.seed != number:
            yield f"{seed_names(number)['metrics.jsonl']}: is of seed {run.seed}"
        other = artifacts.setdefault(sha256(run.artifact), number)
        if other != number:
            yield f"seeds {other} and {number} have the same artifact"
        for key, value in rules.shared(first).items():
            if rules.shared(run)[key] != value:
                yield f"seeds {first.seed} and {number} differ in {key}: they are not seeds of one record"
        if "environment" in run.header.origin.values():
            yield f"seed {number}: settings came from the environment; give them on the command line"
    bpb = [row["val_bpb"] for row in c.summary["seeds"]]
    spread = rules.deviation(bpb)
    c.notes.append(f"n = {len(bpb)}, mean {statistics.mean(bpb):.6f}, sample standard deviation "
                   + ("unknown" if spread is None else f"{spread:.6f}"))


def check_machine(c: Case) -> Iterator[str]:
    """A record of a track needs the track's machine; elsewhere another one is noted."""
    machine, track = c.runs[0].machine, c.track  # the same of all seeds
    gpus = 0 if c.runs[0].settings.device == "cpu" else len(machine.gpu)
    said = f"{machine.cores} cores, {gpus} GPUs"
    if (track.cores and machine.cores > track.cores) or gpus > track.gpus:
        rule = f"track {track.name} has at most {track.cores or 'any number of'} cores and {track.gpus} GPUs"
        if c.submission.claim == "record":
            yield f"a record is claimed on {said}: {rule} (taskset -c 0,1 leaves a run two cores, --device cpu no GPU)"
        said += f", which is more than a record may have: {rule}"
    c.notes.append(said)


def check_seconds(c: Case) -> Iterator[str]:
    limits = {"train": c.track.train_seconds, "score": c.track.score_seconds}
    for run in c.runs:
        seconds, metrics = run.final.seconds, seed_names(run.seed)["metrics.jsonl"]
        for name, limit in limits.items():
            if not 0 <= seconds[name] <= limit:
                yield f"seed {run.seed}: {seconds[name]:.1f} {name} seconds, track {c.track.name} allows {limit:.0f}"
        if run.settings.init_from:
            yield (f"seed {run.seed}: init_from={run.settings.init_from}: what was trained before is not in its "
                   "seconds")
        phases = [(phase.name, phase.seconds) for phase in run.phases]
        if sorted(phases) != sorted((name, seconds[name]) for name in runlog.PHASES):
            yield f"{metrics}: the seconds of its phases are not those of its final record"
        for step in run.steps:
            if step.elapsed > seconds["train"]:
                yield (f"{metrics}: step {step.step} ended at {step.elapsed:.1f} s, after the {seconds['train']:.1f} s "
                       "of training")
                break


# ---------------------------------------------------------------------------------------------------------------
# The claim
# ---------------------------------------------------------------------------------------------------------------


def check_claim(c: Case) -> Iterator[str]:
    faults, text = weigh_claim(c.summary, c.submission.claim == "record", c.against)
    yield from faults
    c.notes.append(text)


# ---------------------------------------------------------------------------------------------------------------
# The score, once more
# ---------------------------------------------------------------------------------------------------------------


def outcome(result: Mapping) -> dict:
    """What must be the same whenever eval_bpb scores an artifact: not times and file names."""
    scores = {name: {k: v for k, v in result[name].items() if k != "seconds"} for name in ("chunked", "sliding")}
    rest = {k: result[k] for k in ("model", "seq_len", "stride")}
    return scores | rest | {"artifact": result["artifact"]["sha256"], "data": result["data"]["sha256"]}


def check_score(c: Case) -> Iterator[str]:
    """Runs the folder's program, in an empty folder and environment."""
    if c.failed:
        raise Blocked("nothing of a folder is run that failed another check")
    for run in c.runs:
        settings, artifact = run.settings, seed_names(run.seed)["model.tern"]
        environment = {"OMP_NUM_THREADS": str(run.threads)}
        if settings.device == "cpu" or not run.machine.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with tempfile.TemporaryDirectory() as empty:
            for name in ("train_gpt.py", artifact):
                (Path(empty) / name).write_bytes(c.read(name))
            arguments = [sys.executable, "train_gpt.py", "eval_bpb", artifact, "--data", str(c.data.resolve()),
                         "--stride", str(settings.eval_stride), "--batch-seqs", str(settings.eval_batch_seqs),
                         "--json", "again.json"]
            limit = c.track.score_seconds * (1 + min(run.header.world_size, 8))  # one process, a slower machine
            try:
                done = subprocess.run(arguments, cwd=empty, env=environment, capture_output=True, text=True,
                                      errors="replace", timeout=limit)
            except subprocess.TimeoutExpired:
                yield f"seed {run.seed}: scoring again took more than {limit:.0f} s"
                continue
            if done.returncode or not (Path(empty) / "again.json").is_file():
                yield f"seed {run.seed}: scoring again failed: {(done.stderr or done.stdout).strip()[-300:]}"
                continue
            again = rules.parse_json((Path(empty) / "again.json").read_bytes(), "again.json")
        result = rules.typed(again, rules.Result, "again.json")
        if result.sliding is None:
            raise SubmissionError("again.json: no sliding-window score")
        yield from differences(outcome(run.final.score), outcome(again), f"seed {run.seed}: scored again,")
        c.notes.append(f"{artifact} {result.sliding.val_bpb:.8f}")


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------

CHECKS = {
    "files": (check_files, "required files and keys, no others, no links"),
    "hashes": (check_hashes, "bytes and sha256 of every file"),
    "bytes": (check_bytes, "byte totals by the track's rules, under the cap"),
    "program": (check_program, "train_gpt.py is source/ compressed"),
    "sources": (check_sources, "the sources are those that ran, the artifacts sound and those that were scored"),
    "logs": (check_logs, "logs, metrics, scores and submission.json agree; roundtrip gap 0"),
    "seeds": (check_seeds, "distinct seeds of the same settings, enough for the claim"),
    "claim": (check_claim, "the claim"),
    "machine": (check_machine, "the machine"),
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
        except (ValueError, OSError) as e:  # SubmissionError, SourceError and ArtifactError are ValueErrors
            faults.append(str(e))
        except (TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError) as e:
            faults.append(f"the check could not deal with what it read ({e!r})")  # what no type foresaw
        case.failed |= bool(faults)
        lines += [printable(f"{word}  {name:<9}{fault}") for fault in faults[:20]]
        if not faults:
            lines.append(printable(f"ok    {name:<9}{what}" + "".join(f"; {note}" for note in case.notes)))
    return lines, case.failed


def check_published(folder: Path, against: str | None, json_file: Path | None) -> tuple[list[str], bool]:
    """(a line per finding and one that counts them, whether any is an error) of a folder in the field's own layout."""
    case, found = findings.find(folder, against)
    if json_file is not None:
        write_atomic(json_file, findings.to_json(case, found).encode())
    counts = [sum(f.severity == severity for f in found) for severity in findings.SEVERITIES]
    lines = [printable(f.line()) for f in found]
    return [*lines, "{} errors, {} warnings, {} notes".format(*counts)], counts[0] > 0


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    p = command.Parser(description="Check a submission's folder as a referee does: one that records/bundle.py wrote, "
                       "or one of the competition in whatever layout, of which nothing is run (docs/check.md).",
                       allow_abbrev=False)
    p.add_argument("folder", type=Path, help="a submission's folder")
    p.add_argument("--against", help="the record to beat: its folder, its submission.json or its bits per byte")
    p.add_argument("--data", type=Path, help="of our own: also score every artifact again on this data, by the "
                   "folder's program")
    p.add_argument("--json", type=Path, metavar="FILE", help="of others': also write the findings to this file")
    args = p.parse_args(argv)
    try:
        ours = published.is_ours(args.folder)
        if ours and args.json:
            raise SubmissionError(f"--json {args.json}: {args.folder} is of records/bundle.py, whose checks are lines; "
                                  "leave --json out")
        if not ours and args.data:
            raise SubmissionError(f"--data {args.data}: nothing of a published folder is run; leave --data out")
        lines, failed = (check(args.folder, args.against, args.data) if ours else
                         check_published(args.folder, args.against, args.json))
        command.write_out("\n".join([*lines, ""]))
    except (ValueError, OSError) as e:
        command.say_error(e)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
