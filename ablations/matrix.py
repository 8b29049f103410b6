"""A matrix of experiments: a TOML file, checked, and the runs that it asks for.

    name = "rules"                      # of the folder in results/
    why = "..."                         # one line, printed in the report
    base = "absmean"                    # the row that all others are compared with
    seeds = [1, 2, 3]
    equivalence = 0.01                  # bpb: a difference below which nobody cares
    budget = {iterations = 600}         # or tokens, or seconds (such rows run one at a time)
    timeout = 3600                      # optional: seconds after which a run is given up (more if budget is in seconds)
    threads = 1                         # optional: CPU threads of a run; without it all cores, shared by --jobs
    equal_bytes = 125000                # optional: solve each row's width for a model file of so many bytes

    [data]                              # optional: folder -> arguments of data/prepare.py, to make it where missing
    "data/packages" = ["--source", "packages"]

    [settings]                          # of every row: settings of train_gpt.py
    preset = "cpu_10min_128kb"

    [[row]]
    name = "absmean"
    why = "BitNet b1.58's rule"         # one line
    claim = "..."                       # optional: what others say, for the table of claims
    set = {ternary_rule = "absmean"}    # what this row changes
    patches = ["xsa=4"]                 # optional: techniques of patches.py
    init_from = "full precision"        # optional: start from the final latents of that row's run of the same seed
    score_of = "absmean"                # optional: do not train; score that row's artifact again, with
    score_patches = ["ttt=vectors"]     #   techniques of the scorer
    against = "full precision"          # optional: the row that this one is compared with, in place of the base
    solve = "mlp_hidden"                # optional: the setting that equal_bytes solves for (default mlp_hidden)
    seeds = [1, 2]                      # optional: fewer seeds
    grid = {group_size = [32, 64]}      # optional: one row for each combination, named "name group_size=32"

Unknown keys are errors. Anything that changes what a run computes is part of its id.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

import train_gpt
from ablations import formats
from ablations import patches as techniques
from tern import source
from tern.errors import Foreseen
from tern.settings import changed, largest

ROOT = Path(__file__).resolve().parents[1]

SOLVABLE = {"mlp_hidden": 8, "num_layers": 1}  # settings that equal_bytes may solve for, and in steps of what
# Settings that the runner decides, and those that say where a run is and how it is watched.
RUNNER_SETTINGS = {"run_id", "out_dir", "resume", "threads", "seed", "iterations", "max_wallclock_seconds", "init_from",
                   "write_page"}
WATCHING = {"run_id", "out_dir", "resume", "threads", "init_from", "data_path", "tokenizer_path", "write_page"}
CADENCE = {"train_log_every", "checkpoint_every"}  # inside the clock of a timed run
NAMES = {"preset", "data_path", "tokenizer_path"}  # settings that are strings and decide which other settings there are


class MatrixError(Foreseen):
    """A matrix that cannot be run; the message says what, where and what to do."""


class MachineLost(RuntimeError):
    """A run ended with its machine and has no result; the message says how."""


# ---------------------------------------------------------------------------------------------------------------
# What a matrix is
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the matrix, with every grid resolved."""

    name: str
    why: str
    settings: dict  # of train_gpt.py, the matrix's and the row's
    patches: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    init_from: str = ""  # name of another row, or ""
    score_of: str = ""  # likewise
    score_patches: tuple[str, ...] = ()
    solve: str = "mlp_hidden"
    claim: str = ""
    against: str = ""  # name of another row, or "": the base

    @property
    def starts_from(self) -> str:
        """Name of the row whose run must come first, or ""."""
        return self.init_from or self.score_of


@dataclass(frozen=True)
class Matrix:
    name: str
    why: str
    base: str
    rows: tuple[Row, ...]
    budget: tuple[str, float]  # "iterations", "tokens" or "seconds", and how much
    equal_bytes: int  # 0: rows are as their settings say
    equivalence: float
    threads: int  # 0: the runner decides
    timeout: int  # seconds
    data: dict[str, list[str]]  # folder -> arguments of data/prepare.py
    path: Path

    @property
    def timed(self) -> bool:
        return self.budget[0] == "seconds"


@dataclass(frozen=True)
class Job:
    """One run of a row."""

    row: Row
    seed: int
    config: train_gpt.Config  # without what the runner decides
    source: str  # identity of code and data
    data: str  # identity of the data
    parent: Job | None = field(default=None, repr=False)  # whose latents or artifact this one takes

    @property
    def takes(self) -> str:
        """The file of its parent's run that it needs, from the folder of runs; empty without a parent."""
        if self.parent is None:
            return ""
        return f"{self.parent.id}/run/" + ("model.tern" if self.row.score_of else "checkpoint.safetensors")

    @property
    def settings(self) -> dict:
        """What a run computes depends on these settings; the others say where and how it is watched."""
        watching = WATCHING if self.config.max_wallclock_seconds else WATCHING | CADENCE
        return {name: value for name, value in vars(self.config).items() if name not in watching}

    @property
    def what(self) -> str:
        """Hash of what is asked for; the same as that of its line of results (what_of)."""
        parent = self.parent.what if self.parent else ""
        return what_of(self.settings, self.row.patches, self.row.score_patches, parent)

    @property
    def id(self) -> str:
        """Hash of everything that decides what the run computes: also the code and the data."""
        parts = [self.what, self.source, self.parent.id if self.parent else ""]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Results of before are found by what they are of, whatever it was called then
# ---------------------------------------------------------------------------------------------------------------

# Settings that came after the first results, with the value that changes nothing.
ADDED = {"smear": False, "shuffle": False, "key_offset": False, "int_step": 1.0, "fit_cap": 0.0, "rare_step": 0.0,
         "copy_dim": 0, "attn_window": 0, "eval_seq_len": 0}
REMOVED = {"activation_bits": 16, "codebook_decay": 0.99, "commitment": 0.0}  # that are gone: what they always are now
# Techniques that have moved into the trainer.
PATCHES_THAT_ARE_SETTINGS = {"smear": {"smear": True}, "key_offset": {"key_offset": True}, "copy=64": {"copy_dim": 64}}
# And what left it again (token_shift, of an hour of 2026-11-27).
SETTINGS_THAT_ARE_PATCHES = {"token_shift": "canon=both,1"}


def in_words_of_today(settings: Mapping, patches: Sequence[str]) -> tuple[dict, list[str]]:
    """The settings and patches that ask today for what these, of a line of results, asked for."""
    today = ADDED | dict(settings)
    for name, now in REMOVED.items():
        if today.get(name) == now:  # with another value the line is of something that cannot be asked for any more
            del today[name]
    if today.get("ternary_rule") == "elastic":
        today["ternary_rule"] = "absmean"
        for name in ("matrix_format", "embed_format"):
            if today.get(name) == "ternary":
                today[name] = "elastic"
    for patch in patches:
        today |= PATCHES_THAT_ARE_SETTINGS.get(patch, {})
    left = [patch for name, patch in SETTINGS_THAT_ARE_PATCHES.items() if today.pop(name, False)]
    return today, [patch for patch in patches if patch not in PATCHES_THAT_ARE_SETTINGS] + left


def what_of(settings: Mapping, patches: Sequence[str], score_patches: Sequence[str], parent: str) -> str:
    """Hash of what a run is of: settings, seed, patches, and the same of the run that it starts from, parent."""
    settings, patches = in_words_of_today(settings, patches)
    parts = {"settings": settings, "patches": patches, "score_patches": list(score_patches), "parent": parent}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Reading the file
# ---------------------------------------------------------------------------------------------------------------

Value = str | bool | int | float  # of a setting
Seeds = Annotated[list[int], Meta(min_length=1)]
Budget = Annotated[dict[Literal["iterations", "tokens", "seconds"], Annotated[float, Meta(gt=0, lt=1e15)]],
                   Meta(min_length=1, max_length=1)]


class MatrixTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file. Rows are read one by one, so that an error names its row."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]  # it names a folder
    why: str
    base: str
    seeds: Seeds
    equivalence: Annotated[float, Meta(ge=0, lt=1e3)]
    budget: Budget
    row: Annotated[list[dict], Meta(min_length=1)]
    equal_bytes: Annotated[int, Meta(ge=0)] = 0
    threads: Annotated[int, Meta(ge=0)] = 0
    timeout: Annotated[int, Meta(ge=1)] = 3600
    data: dict[str, list[str]] = {}
    settings: dict[str, Value] = {}


class RowTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A [[row]]."""

    name: str
    why: str
    claim: str = ""
    set: dict[str, Value] = {}
    patches: list[str] = []
    init_from: str = ""
    score_of: str = ""
    score_patches: list[str] = []
    against: str = ""
    solve: Literal["mlp_hidden", "num_layers"] = "mlp_hidden"
    seeds: Seeds | None = None
    grid: dict[str, Annotated[list[Value], Meta(min_length=1)]] = {}


def read_matrix(path: str | Path) -> Matrix:
    """The matrix of a TOML file. Raises MatrixError."""
    path = Path(path)
    try:
        table = msgspec.toml.decode(path.read_bytes(), type=MatrixTable)
    except (OSError, UnicodeDecodeError) as e:
        raise MatrixError(f"{path}: cannot be read ({e}); give a TOML file") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:  # tomllib's own: a number or a nesting without end
        raise MatrixError(f"{path}: {e}; ablations/matrix.py begins with an example") from None
    rows = []
    for i, row in enumerate(table.row):
        rows += read_row(row, table, f"{path}, row {i + 1}")
    kind, amount = next(iter(table.budget.items()))
    if amount.is_integer():
        amount = int(amount)
    matrix = Matrix(table.name, table.why, table.base, tuple(rows), (kind, amount), table.equal_bytes,
                    table.equivalence, table.threads, table.timeout, table.data, path)
    check_names(matrix)
    return matrix


def check_names(matrix: Matrix) -> None:
    """Raises MatrixError unless rows have names of their own and name each other in ways that make sense."""
    where, by_name = matrix.path, {row.name: row for row in matrix.rows}
    names = [row.name for row in matrix.rows]
    named = [matrix.base, *(name for row in matrix.rows for name in (row.starts_from, row.against) if name)]
    for name in names:
        if names.count(name) > 1:
            raise MatrixError(f"{where}: two rows are called {name!r}")
    for name in named:
        if name not in names:
            raise MatrixError(f"{where}: there is no row {name!r}; rows: {', '.join(names)}")
    for row in matrix.rows:
        parent = by_name.get(row.starts_from)
        if parent is not None and parent.score_of:
            raise MatrixError(f"{where}: {row.name!r} starts from {parent.name!r}, which trains nothing; name the row "
                              f"whose artifact that one scores, {parent.score_of!r}")
        if row.against and (matrix.base in (row.name, row.against) or row.against == row.name):
            raise MatrixError(f"{where}: {row.name!r} has against = {row.against!r}, but must name a row that is "
                              "neither the base nor itself; and the base has none")


def read_row(table: dict, matrix: MatrixTable, where: str) -> list[Row]:
    """The rows of a [[row]] table: one, or one for each combination of its grid. Raises MatrixError."""
    if isinstance(table.get("name"), str):
        where = f"{where} ({table['name']})"
    try:
        t = msgspec.convert(table, RowTable)
    except msgspec.ValidationError as e:
        raise MatrixError(f"{where}: {e}; ablations/matrix.py begins with an example") from None
    seeds = matrix.seeds if t.seeds is None else t.seeds
    if len(set(seeds)) < len(seeds):
        raise MatrixError(f"{where}: seeds must be different whole numbers, not {seeds}")
    check_patches(t, where)
    settings = matrix.settings | t.set
    check_settings(settings, t.grid, where)
    row = Row(t.name, t.why, settings, tuple(t.patches), tuple(seeds), t.init_from, t.score_of,
              tuple(t.score_patches), t.solve, t.claim, t.against)
    if not t.grid:
        return [row]
    rows = []
    for values in itertools.product(*t.grid.values()):
        chosen = dict(zip(t.grid, values, strict=True))
        name = " ".join([t.name, *(f"{setting}={value}" for setting, value in chosen.items())])
        rows.append(replace(row, name=name, settings=settings | chosen))
    return rows


def check_patches(row: RowTable, where: str) -> None:
    """Raises MatrixError unless each technique is one, and where it belongs."""
    for patch in (*row.patches, *row.score_patches):
        try:
            techniques.parse(patch)
        except ValueError as e:
            raise MatrixError(f"{where}: {e}") from None
    for patch in row.score_patches:
        if techniques.name_of(patch) not in techniques.SCORING:
            raise MatrixError(f"{where}: {patch!r} is no technique of the scorer; score_patches may be "
                              + ", ".join(sorted(techniques.SCORING)))
    misplaced = any(techniques.name_of(patch) in techniques.SCORING for patch in row.patches)
    half = bool(row.score_of) != bool(row.score_patches)
    changes = row.set or row.grid or row.patches or row.init_from
    if misplaced or half or (row.score_of and changes):
        raise MatrixError(f"{where}: a technique of the scorer belongs in score_patches of a row with score_of, which "
                          "changes nothing else")


def check_settings(settings: Mapping[str, Value], grid: Mapping[str, list[Value]], where: str) -> None:
    """Raises MatrixError unless these are settings of the trainer that are a row's to choose."""
    known = {f.name for f in fields(train_gpt.Config)} | {"preset"}
    for name in (*settings, *grid):
        if name not in known:
            raise MatrixError(f"{where}: {name!r} is no setting of train_gpt.py")
        if name in RUNNER_SETTINGS:
            raise MatrixError(f"{where}: {name} is the runner's; use seeds, budget or init_from")
    for name in NAMES:
        if name in grid:
            raise MatrixError(f"{where}: {name} belongs in set, not in grid")
        if not isinstance(settings.get(name, ""), str):
            raise MatrixError(f"{where}: {name} must be a string, not {settings[name]!r}")
    if settings.get("preset", "cpu") not in train_gpt.PRESETS:
        raise MatrixError(f"{where}: there is no preset {settings['preset']!r}")


# ---------------------------------------------------------------------------------------------------------------
# From rows to runs
# ---------------------------------------------------------------------------------------------------------------


def configure(matrix: Matrix, row: Row, seed: int) -> train_gpt.Config:
    """The settings of a run, its width solved for equal_bytes. Raises MatrixError."""
    formats.register()
    argv = [f"--preset={row.settings.get('preset', 'cpu_10min_128kb')}", f"--seed={seed}"]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in row.settings.items() if name != "preset"]
    try:
        config = train_gpt.resolve_settings(argv, {})[1]
        kind, amount = matrix.budget
        if kind == "seconds":
            config = replace(config, iterations=0, max_wallclock_seconds=float(amount))
        else:
            steps = amount if kind == "iterations" else amount / mean_batch(config)
            config = replace(config, iterations=round(steps), max_wallclock_seconds=0.0)
        train_gpt.micro_batch_tokens(config, 1)  # raises if batches do not divide
        if not matrix.equal_bytes:
            return config
        reshaping = tuple(p for p in row.patches if techniques.name_of(p) in techniques.RESHAPING)
        found = solved(replace(config, seed=0, run_id=""), row.solve, matrix.equal_bytes, reshaping)
        return replace(found, seed=seed, run_id=config.run_id)
    except (ValueError, SystemExit) as e:  # a ConfigError, or an argument that a patch does not take
        raise MatrixError(f"{matrix.path}, row {row.name}: {e}") from None


def mean_batch(config: train_gpt.Config) -> float:
    """Tokens per step over a run whose progress is the count of its steps."""
    full, small = config.train_batch_tokens, config.batch_ramp_start
    return full - (full - small) * config.batch_ramp_frac / 2 if 0 < small < full else full


def data_folders(matrix: Matrix) -> list[tuple[str, str]]:
    """(data_path, tokenizer_path) of the matrix's rows, each once."""
    found = []
    for row in matrix.rows:
        preset = train_gpt.PRESETS.get(row.settings.get("preset", "cpu_10min_128kb"), {})
        path = row.settings.get("data_path", preset.get("data_path", "data/packages"))
        found.append((path, row.settings.get("tokenizer_path", "")))
    return list(dict.fromkeys(found))


@functools.cache
def solved(config: train_gpt.Config, name: str, size: int, patches: tuple[str, ...] = ()) -> train_gpt.Config:
    """config with the setting called name as large as a model file of so many bytes allows, as predicted.

    Raises ConfigError where not even the smallest fits.
    """
    if patches:  # they change the model for good, so in a process of their own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(solved_with_patches, config, name, size, patches).result()

    def fits(value: int) -> bool:
        other = changed(config, name, value)
        return other is None or train_gpt.model_bytes(other) <= size

    now = config.hidden_dim if name == "mlp_hidden" else getattr(config, name)
    value = largest(fits, now, SOLVABLE[name])
    best = changed(config, name, value) if value else None
    if best is None:
        raise train_gpt.ConfigError(f"no {name} makes a model of {size:,} bytes; make the rest smaller")
    return best


def solved_with_patches(config: train_gpt.Config, name: str, size: int, patches: tuple[str, ...]) -> train_gpt.Config:
    formats.register()
    techniques.apply(patches)
    return solved(config, name, size)


def code_identity() -> str:
    """Hash of the programs without comments: what all rows run."""
    texts = [stripped((ROOT / name).read_bytes(), name) for name in source.code_files()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def source_identity(row: Row, data_identity: str) -> str:
    """Hash of the programs without comments, of what of this folder a row needs, and of the data."""
    names = [*source.code_files()]
    if row.patches or row.score_patches:
        names += ["ablations/hooks.py", "ablations/patches.py"]
    if uses_what_lost(row):
        names += ["ablations/hooks.py", "ablations/formats.py"]
    texts = [stripped((ROOT / name).read_bytes(), name) for name in dict.fromkeys(names)]
    return hashlib.sha256("\0".join([*texts, data_identity]).encode()).hexdigest()


stripped = functools.cache(source.strip)


def uses_what_lost(row: Row) -> bool:
    """Whether a row stores by a format or rule of formats.py; no preset does."""
    kinds = [str(row.settings.get(name, "")).rstrip("0123456789") for name in ("matrix_format", "embed_format")]
    return any(kind in formats.FORMATS for kind in kinds) or row.settings.get("ternary_rule") in formats.RULES


def jobs(matrix: Matrix, data_identity: Mapping[tuple[str, str], str], only: list[str] | None = None) -> list[Job]:
    """Every run of the matrix, seed by seed, so that an unfinished matrix has whole seeds; parents first.

    data_identity: of each (data_path, tokenizer_path) in use. only: names of the rows that are wanted (and those they
    start from). Raises MatrixError, also if two rows ask for the same.
    """
    rows = {row.name: row for row in matrix.rows}
    unknown = sorted(set(only or ()) - rows.keys())
    if unknown:
        raise MatrixError(f"{matrix.path}: there is no row {unknown[0]!r}; rows: {', '.join(rows)}")
    found: dict[tuple[str, int], Job] = {}

    def add(row: Row, seed: int, below: tuple[str, ...] = ()) -> Job:
        """The job of a row, after that of the row it starts from. below: names of rows that start from this one."""
        if row.name in below:
            raise MatrixError(f"{matrix.path}: {' starts from '.join((*below, row.name))}")
        if (row.name, seed) in found:
            return found[row.name, seed]
        parent = add(rows[row.starts_from], seed, (*below, row.name)) if row.starts_from else None
        config = parent.config if row.score_of else configure(matrix, row, seed)
        if row.init_from and matrix.equal_bytes:
            check_same_shape(matrix, row, config, parent)
        data = data_identity[config.data_path, config.tokenizer_path]
        found[row.name, seed] = Job(row, seed, config, source_identity(row, data), data, parent)
        return found[row.name, seed]

    base_first = sorted(matrix.rows, key=lambda row: row.name != matrix.base)
    for seed in sorted({seed for row in matrix.rows for seed in row.seeds}):
        for row in base_first:
            if seed in row.seeds and (only is None or row.name in only):
                add(row, seed)
    check_different(matrix, found.values())
    return list(found.values())


def check_same_shape(matrix: Matrix, row: Row, config: train_gpt.Config, parent: Job) -> None:
    """Raises MatrixError where equal_bytes makes another model of a row than of the one that it starts from."""
    for name in SOLVABLE:
        mine, theirs = getattr(config, name), getattr(parent.config, name)
        if mine != theirs:
            raise MatrixError(f"{matrix.path}, row {row.name}: equal_bytes gives it {name} {mine}, and {theirs} to the "
                              f"row that it starts from, {parent.row.name}; take equal_bytes out and set {name}")


def check_different(matrix: Matrix, found) -> None:
    """Raises MatrixError if two jobs ask for the same."""
    same: dict[tuple[str, str, str], Job] = {}
    for job in found:
        other = same.setdefault((job.what, job.config.data_path, job.config.tokenizer_path), job)
        if other is not job:
            raise MatrixError(f"{matrix.path}: the rows {other.row.name!r} and {job.row.name!r} ask for the same run")
