"""What a submission is: the tracks and their caps, the rule for a record, its files, and how each of them is read.

bundle.py writes such a folder and check.py is its referee; what both must agree on is here, once. All of it comes from
others, so it is read as strict JSON (read_json) into the types below, and nothing of it is run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import msgspec

from tern import runlog, source

T = TypeVar("T")


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
    count_code: bool  # whether the cap covers code plus model, or the model alone
    train_seconds: float  # at most
    score_seconds: float
    cores: int = 0  # of a record's machine, at most; 0: any
    gpus: int = 8  # likewise


OFFICIAL = Track("10min_16mb", 16_000_000, True, 600.0, 600.0)
CPU = Track("cpu_10min_128kb", 128_000, False, 600.0, 600.0, cores=2, gpus=0)
TRACKS = {  # preset of train_gpt.py -> track
    "cpu": CPU,  # three of its ten minutes
    "cpu_10min_128kb": CPU,
    "golf16mb": OFFICIAL,
    "pr367": OFFICIAL,
    "tiny": Track("test", 128_000, False, 600.0, 600.0),
}
# The competition's rule for a record: so many seeds at least, and better than the last one by so many nats per token at
# this p.
RECORD_SEEDS, RECORD_NATS, RECORD_P = 3, 0.005, 0.01


# ---------------------------------------------------------------------------------------------------------------
# Reading what others wrote
# ---------------------------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse_json(data: bytes, where: str):
    """The value of UTF-8 JSON, of which every reader reads the same.

    Raises SubmissionError, also on a key that occurs twice, NaN, infinity, and a number that 64 bits do not hold: these
    msgspec's own reader of JSON would let through.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number of JSON")

    def bounded(number: int | float) -> int | float:
        if not abs(number) < 2**63:
            raise ValueError(f"{str(number)[:40]} is out of the range of 64 bits")
        return number

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse,
                          parse_int=lambda text: bounded(int(text)), parse_float=lambda text: bounded(float(text)))
    except (ValueError, RecursionError) as e:
        raise SubmissionError(f"{where}: not JSON that can be used ({e})") from None


def typed(value, kind: type[T], where: str) -> T:
    """A JSON value as the type that it must have; fields that the type does not have are left out.

    Raises SubmissionError, with the path of the first fault.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as e:
        raise SubmissionError(f"{where}: {e}") from None


def read_json(data: bytes, kind: type[T], where: str) -> T:
    return typed(parse_json(data, where), kind, where)


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
    elif ours != theirs or isinstance(ours, bool) != isinstance(theirs, bool):  # for Python True is 1
        yield f"{where} is {str(theirs)[:80]}, not {str(ours)[:80]}"


# ---------------------------------------------------------------------------------------------------------------
# A finished run: its records are those of tern/runlog.py, of which these are the parts that count here
# ---------------------------------------------------------------------------------------------------------------

SEED_FILES = {  # in a run's folder -> in a submission
    "log.txt": "train_seed{}.log", "metrics.jsonl": "metrics_seed{}.jsonl", "model.tern": "model_seed{}.tern",
    "score.json": "score_seed{}.json",
}


RIVAL = "rival_metrics_seed{}.jsonl"  # of the record that ran in turn with this one


def seed_names(seed: int) -> dict[str, str]:
    """Name in a run's folder -> name in a submission."""
    return {name: new.format(seed) for name, new in SEED_FILES.items()}


@dataclass(frozen=True)
class Score:
    """One pass over the validation tokens."""

    val_loss: float  # nats per token
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class ScoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ScoredData:
    sha256: dict[str, str]  # file -> its sha256


@dataclass(frozen=True)
class ScoredModel:
    parameters: int
    ternary_weights: int
    zero_frac: float


@dataclass(frozen=True)
class Result:
    """The JSON of eval_bpb.py."""

    artifact: ScoredFile
    data: ScoredData
    model: ScoredModel
    seq_len: int
    stride: int
    chunked: Score
    sliding: Score | None


@dataclass(frozen=True)
class Seconds:
    """Of each phase."""

    load: float
    compile: float
    train: float
    pack: float
    score: float


@dataclass(frozen=True)
class Settings:
    """Of a run's settings, those that decide what counts."""

    seed: int
    device: str
    threads: int
    eval_stride: int
    eval_batch_seqs: int
    cap_bytes: int
    cap_counts_code: bool
    init_from: str = ""


@dataclass(frozen=True)
class Machine:
    cores: int
    cpu: str
    gpu: list[str]
    python: str
    torch: str


@dataclass(frozen=True)
class Run:
    """A finished run. settings, machine and result are typed views of what header and final hold."""

    header: runlog.Header
    settings: Settings
    machine: Machine
    steps: list[runlog.Step]
    phases: list[runlog.Phase]
    final: runlog.Final
    result: Result  # of final.score
    score: dict  # score.json, which must say the same
    log: str
    artifact: bytes

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def threads(self) -> int:
        """CPU threads of the scoring process: the last bits of a score can depend on them."""
        return self.settings.threads or max(1, self.machine.cores // max(1, self.header.world_size))


def read_metrics(data: bytes, where: str) -> list[runlog.Record]:
    """The records of a metrics.jsonl, the first of them a header. Raises SubmissionError."""
    records = []
    for number, line in enumerate(data.splitlines(), 1):
        at = f"{where} line {number}"
        value = parse_json(line, f"{at}; was the run killed while it wrote? Delete its folder")
        kind = typed(value, dict, at).get("type")
        if kind not in list(runlog.RECORDS):  # a list: it may be anything, also what cannot be a key
            raise SubmissionError(f"{at}: its type must be one of {', '.join(runlog.RECORDS)}, not {str(kind)[:40]!r}")
        records.append(typed(value, runlog.RECORDS[kind], f"{at}: {kind}"))
    if not records or not isinstance(records[0], runlog.Header):
        raise SubmissionError(f"{where}: does not begin with a header; delete the run's folder")
    return records


def read_run(read: Callable[[str], bytes], names: Mapping[str, str]) -> Run:
    """The run in the files `names` (keys of SEED_FILES -> names that read takes). Raises SubmissionError."""
    where = names["metrics.jsonl"]
    records = read_metrics(read(where), where)

    def of(kind: type[T]) -> list[T]:
        return [record for record in records if isinstance(record, kind)]

    header, finals = records[0], of(runlog.Final)
    if len(of(runlog.Header)) != 1 or len(finals) != 1 or records[-1] is not finals[0]:
        raise SubmissionError(f"{where}: not one uninterrupted, finished run; run it again")
    if header.schema not in range(1, runlog.SCHEMA + 1):
        raise SubmissionError(f"{where}: of schema {header.schema}, this program reads 1 to {runlog.SCHEMA}; use a "
                              "newer one")
    final = finals[0]
    typed(final.memory, Score, f"{where}: final.memory")
    typed(final.seconds, Seconds, f"{where}: final.seconds")
    result = typed(final.score, Result, f"{where}: final.score")
    if result.sliding is None:
        raise SubmissionError(f"{where}: no sliding-window score; run it again with an --eval-stride")
    score = parse_json(read(names["score.json"]), names["score.json"])
    typed(score, Result, names["score.json"])
    return Run(header, typed(header.settings, Settings, f"{where}: header.settings"),
               typed(header.machine, Machine, f"{where}: header.machine"), of(runlog.Step), of(runlog.Phase), final,
               result, score, read(names["log.txt"]).decode(errors="replace"), read(names["model.tern"]))


# ---------------------------------------------------------------------------------------------------------------
# What a submission holds and says
# ---------------------------------------------------------------------------------------------------------------

PREPARE = "data/prepare.py"  # with what it imports it makes the shards; it is not in the one file
# Frames of the one file, which is what is around its sources, by their sha256: today's, and that of the record
# 2026-11-22_FasterSteps, whose program is in no folders.
FRAMES = {source.FRAME, "bc202da799a891a37c019df6293c250068df2739634ccb44c40d01ba720559b4"}


@dataclass(frozen=True)
class Listed:
    """A file of a submission."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Seed:
    seed: int


@dataclass(frozen=True)
class Rival:
    """The record whose program ran in turn with this one's, seed by seed, on the same machine."""

    name: str
    date: str
    fp32_products: bool = False  # its products of bf16 were computed in fp32, as ours on such a CPU (fp32_products.py)


@dataclass(frozen=True)
class Submission:
    """Of submission.json the official keys, and what finds the other files; the rest follows from them: summarize."""

    track: str
    date: str
    name: str
    author: str
    github_id: str
    blurb: str
    val_loss: float
    val_bpb: float
    bytes_total: int
    bytes_code: int
    claim: str  # "record": it beats the last record by the competition's rule; "none"
    seeds: list[Seed]
    files: dict[str, Listed]
    rival: Rival | None = None


# A seed's own settings. All the others, and SHARED, are equal in all seeds of one submission.
OWN = ("seed", "run_id", "out_dir")
SHARED = ("preset", "source_sha256", "data", "data_sha256", "machine", "world_size")


def shared(run: Run) -> dict:
    """What all seeds of a submission have in common."""
    settings = {name: value for name, value in run.header.settings.items() if name not in OWN}
    return {name: getattr(run.header, name) for name in SHARED} | {"settings": settings}


def launcher(processes: int) -> list[str]:
    """What starts a program in so many processes of one machine, for a reader to type."""
    if processes == 1:
        return ["python"]
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}"]


def command(run: Run) -> str:
    """The command that trains this seed again, for a reader, without where the run's folder was."""
    words, kept = iter(run.header.argv), []
    for word in words:
        name, has_value, _ = word.partition("=")
        if name.replace("_", "-") not in ("--out-dir", "--run-id"):
            kept.append(word)
        elif not has_value:
            next(words, None)
    return shlex.join([*launcher(run.header.world_size), "train_gpt.py", *kept])


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def read_rival(data: bytes, where: str) -> tuple[runlog.Header, runlog.Final, Result]:
    """Header, last record and score of a rival's finished run from its metrics.jsonl. Raises SubmissionError."""
    records = read_metrics(data, where)
    header, final = records[0], records[-1]
    whole = isinstance(header, runlog.Header) and isinstance(final, runlog.Final)
    if not whole or sum(isinstance(record, runlog.Header | runlog.Final) for record in records) != 2:
        raise SubmissionError(f"{where}: not one uninterrupted, finished run; run it again")
    result = typed(final.score, Result, f"{where}: final.score")
    if result.sliding is None:
        raise SubmissionError(f"{where}: no sliding-window score")
    return header, final, result


def program_of(one_file: bytes) -> dict[str, str]:
    """source_sha256 of the runs of a submission's one file."""
    return {"train_gpt.py": sha256(one_file)}


def compare(runs: list[Run], rivals: Mapping[int, bytes], record: Rival) -> dict:
    """What submission.json says of the rival's runs, which are its metrics.jsonl by seed: the paired differences.

    Raises SubmissionError unless each seed has one, made on the same machine and text within the same seconds.
    """
    rows = []
    for run in runs:
        where = RIVAL.format(run.seed)
        header, final, result = read_rival(rivals.get(run.seed, b""), where)
        ours, cpu = run.header, str(header.machine.get("cpu"))
        as_ours = {"cpu": cpu + runlog.NO_BF16_PRODUCTS} if record.fp32_products else {}  # it does not say so itself
        for what, mine, theirs in (
                ("seed", run.seed, header.settings.get("seed")), ("machine", ours.machine, header.machine | as_ours),
                ("data_sha256", ours.data_sha256, header.data_sha256),
                ("world_size", ours.world_size, header.world_size),
                ("seconds", ours.settings["max_wallclock_seconds"], header.settings.get("max_wallclock_seconds"))):
            if mine != theirs:
                raise SubmissionError(f"{where}: {what} is {theirs}, in the run beside it {mine}: they do not compare")
        rows.append({
            "seed": run.seed, "val_bpb": result.sliding.val_bpb, "val_loss": result.sliding.val_loss,
            "val_bpb_chunked": result.chunked.val_bpb, "bytes_model": final.bytes_model, "steps": final.step,
            "tokens": final.tokens_seen, "difference": run.result.sliding.val_bpb - result.sliding.val_bpb,
            "code_sha256": header.source_sha256,
        })
    differences = [row["difference"] for row in rows]
    return {key: value for key, value in asdict(record).items() if value} | {
        "seeds": rows, "difference": statistics.mean(differences), "difference_std": deviation(differences)}


def summarize(track: Track, runs: list[Run], program: bytes, sources: Mapping[str, bytes],
              rival: Rival | None = None, rivals: Mapping[int, bytes] | None = None) -> dict:
    """All that submission.json says beside name, date, author, claim and files: it follows from the other files.

    program: the one file; sources: name -> bytes of the programs that it is made of; rivals: see compare.
    """
    rows = []
    for run in runs:
        final, result = run.final, run.result
        rows.append({
            "seed": run.seed, "val_bpb": result.sliding.val_bpb, "val_loss": result.sliding.val_loss,
            "val_bpb_chunked": result.chunked.val_bpb, "roundtrip_gap": final.roundtrip_gap,
            "bytes_model": len(run.artifact), "steps": final.step, "tokens": final.tokens_seen,
            "seconds": final.seconds, "command": command(run),
            "artifact": seed_names(run.seed)["model.tern"], "artifact_sha256": final.artifact_sha256,
            "ternary_weights": result.model.ternary_weights, "parameters": result.model.parameters,
            "zero_frac": result.model.zero_frac,
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
    } | ({"rival": compare(runs, rivals or {}, rival)} if rival else {})


def over_cap(summary: Mapping) -> list[str]:
    """One line if the bytes are over the cap."""
    over = summary["bytes_total"] - summary["cap_bytes"]
    if over <= 0:
        return []
    what = "the largest model and the code" if summary["cap_counts_code"] else "the largest model"
    return [f"{summary['bytes_total']:,} bytes ({what}) are {over:,} over the cap of {summary['cap_bytes']:,} of "
            f"track {summary['track']}: store less"]


def libraries(requirements: bytes, sources: Mapping[str, bytes]) -> bytes:
    """The lines of requirements.txt, with their pins, for what the programs import. Raises SourceError."""
    imported = {name.split(".")[0] for file, text in sources.items() for name in source.imported(text, file)}
    lines = requirements.decode(errors="replace").splitlines()
    return "".join(f"{line}\n" for line in lines if re.split(r"\W", line)[0] in imported).encode()
