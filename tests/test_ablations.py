"""The ablation runner: statistics against libraries and definitions, matrices, kills, failures, reports."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patches import restored

import pack
from ablations import diagnose, execute, matrix, program, report, results, stats
from ablations import run as runner
from conftest import NAME, PATIENCE, ROOT, run, started, tiny_args
from tern.shards import AuditError
from train_gpt import Config, make_format, model_bytes, resolve_settings, to_pack


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Matrices register formats: not for the tests of other files."""
    with restored():
        yield


# Statistics -----------------------------------------------------------------------------------------------------


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.fast
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 3), st.floats(1, 3)), min_size=2, max_size=8))
def test_a_comparison_is_paired(pairs):
    """Against the textbook: Student's t, and all flips of signs by hand."""
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    d, n = a - b, len(a)
    if np.ptp(d) < 1e-9:
        return
    c = stats.compare(by_seed(a), by_seed(b))
    assert c.p_t == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-6, abs=1e-12)
    half = scipy.stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / n**0.5
    assert (c.low, c.high) == pytest.approx((d.mean() - half, d.mean() + half))
    tight = scipy.stats.t.ppf(0.95, n - 1) * d.std(ddof=1) / n**0.5
    assert c.equivalent == pytest.approx(abs(d.mean()) + tight)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    means = np.abs(signs @ d)
    assert c.p_flip == pytest.approx((means >= abs(d.sum()) * (1 - 1e-12)).mean())


@pytest.mark.fast
def test_seeds_are_paired_and_others_left_out():
    c = stats.compare({1: 2.0, 2: 3.0, 9: 50.0}, {2: 2.5, 1: 1.0, 7: 99.0})
    assert c.n == 2 and c.mean == pytest.approx(0.75)
    one = stats.compare({1: 2.0}, {1: 1.5, 2: 1.0})
    assert one.n == 1 and one.mean == 0.5 and math.isnan(one.p_t)
    none = stats.compare({}, {1: 1.0})
    assert none.n == 0 and math.isnan(none.mean)


@pytest.mark.fast
def test_equal_differences_leave_no_doubt():
    for more in (1.0, 0.06):  # of which the second is equal but for its last bits
        shifted = stats.compare({1: 2.0 + more, 2: 3.0 + more}, {1: 2.0, 2: 3.0})
        assert shifted.p_t == 0 and (shifted.low, shifted.high) == pytest.approx((more, more))
    same = stats.compare({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0})
    assert same.p_t == 1 and stats.verdict(same, 0.01) == "no effect beyond 0.01"


@pytest.mark.fast
def test_holm_is_the_textbooks():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, math.nan, 0.5])[0] == 1.0
    assert math.isnan(stats.holm([0.6, math.nan])[1])


@pytest.mark.fast
def test_many_seeds_have_a_sign_flip_test_too():
    values = np.random.default_rng(1).normal(0.6, 1.0, 24)
    p = stats.compare(by_seed(values), by_seed(0 * values)).p_flip
    signs = np.random.default_rng(2).choice((1, -1), (200_000, 24))
    assert p == pytest.approx((np.abs(signs @ values) >= abs(values.sum())).mean(), abs=0.002) and p > 0
    assert p == stats.compare(by_seed(values), by_seed(0 * values)).p_flip, "the seed is fixed"


@pytest.mark.fast
@pytest.mark.parametrize("n", [2, 3, 12])
def test_what_is_called_detectable_is_found_four_times_in_five(n):
    rng, sd = np.random.default_rng(0), 0.02
    effect = stats.detectable_difference(sd, n)
    assert stats.detectable_difference(100 * sd, n) == pytest.approx(100 * effect)
    samples = rng.normal(effect, sd, (20_000, n))
    found = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue < stats.ALPHA
    assert found.mean() == pytest.approx(stats.POWER, abs=0.015)


@pytest.mark.fast
def test_verdicts_follow_the_statistics():
    def said(values, holm: float) -> str:
        c = stats.compare(by_seed(values), by_seed([0.0] * len(values)))
        return stats.verdict(replace(c, p_holm=holm), 0.01)

    assert said([-0.02, -0.021, -0.019], 0.01) == "better"
    assert said([0.02, 0.021, 0.019], 0.01) == "worse"
    assert said([0.02, 0.021, 0.019], 0.06) == "undecided"
    assert said([-0.002, -0.0021, -0.0019], 0.01) == "better, by less than 0.01"
    assert said([0.001, -0.001, 0.0005, -0.0005], 0.9) == "no effect beyond 0.01"
    assert said([0.03, -0.03, 0.01, -0.02], 0.9) == "undecided", "no effect needs a bound"
    assert said([0.03], math.nan) == "not tested"


# Matrices -------------------------------------------------------------------------------------------------------

MATRIX = """
name = "test"
why = "a test"
base = "a"
seeds = [1, 2]
equivalence = 0.01
budget = {iterations = 5}
threads = 1
[settings]
preset = "tiny"
[[row]]
name = "a"
why = "the base"
"""


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return path


def read(tmp_path, text: str) -> matrix.Matrix:
    return matrix.read_matrix(written(tmp_path, text))


def jobs(m: matrix.Matrix, data: str = "d", only=None) -> list[matrix.Job]:
    return matrix.jobs(m, dict.fromkeys(matrix.data_folders(m), data), only)


def ids(tmp_path, text: str, data: str = "d", only=None) -> list[str]:
    return [job.id for job in jobs(read(tmp_path, text), data, only)]


def row(name: str, *lines: str) -> str:
    return "\n".join(["[[row]]", f'name = "{name}"', 'why = "x"', *lines, ""])


def refusal(tmp_path, text: str) -> str:
    """The one line with which a matrix is refused; it names the file."""
    with pytest.raises(matrix.MatrixError) as e:
        jobs(read(tmp_path, text))
    assert "matrix.toml" in str(e.value)
    return str(e.value)


@pytest.mark.fast
def test_a_bad_matrix_is_one_clear_error(tmp_path):
    top, rest = MATRIX.split("[settings]")
    for bad, message in (
            ("name = 3", "Expected `str`, got `int` - at `$.name`"), ("seeds = []", "length >= 1 - at `$.seeds`"),
            ("seeds = [1, 1]", "seeds must be different"), ('base = "b"', "there is no row 'b'; rows: a"),
            ("budget = {hours = 1}", "'hours' - at `key` in `$.budget`"), ("colour = 1", "unknown field `colour`"),
            ("budget = {iterations = true}", "`float`, got `bool` - at `$.budget"), ("budget = {}", "length >= 1"),
            ("budget = {tokens = nan}", "`$.budget"), ("budget = {tokens = inf}", "`$.budget"),
            ("budget = {seconds = -1}", "> 0.0"), ("budget = {seconds = 1, tokens = 1}", "length <= 1"),
            ('name = "../x"', "matching regex"), ("threads = -1", ">= 0 - at `$.threads`"),
            ('data = {a = "x"}', "Expected `array`, got `str`"), ("equivalence = 'x'", "at `$.equivalence`"),
            ("equivalence = nan", "at `$.equivalence`"), ("timeout = 0", ">= 1"), ("[", "matrix.toml: "),
            (f"x = {'1' * 5000}", "matrix.toml: "), (f"x = {'[' * 3000}", "matrix.toml: ")):
        kept = [line for line in top.splitlines() if line.partition(" ")[0] != bad.partition(" ")[0]]
        said = refusal(tmp_path, "\n".join([bad, *kept, "[settings]"]) + rest)
        assert message in said, (bad, said)
    with pytest.raises(matrix.MatrixError, match="none.toml: cannot be read"):
        matrix.read_matrix(tmp_path / "none.toml")


@pytest.mark.fast
def test_a_bad_row_is_one_clear_error(tmp_path):
    for bad, message in (
            ("set = {seed = 3}", "seed is the runner's"), ("set = {colour = 3}", "'colour' is no setting"),
            ("patches = [3]", "got `int` - at `$.patches[0]`"), ("colour = 1", "unknown field `colour`"),
            ('patches = ["none"]', "no patch 'none'"), ('solve = "vocab_size"', "'vocab_size' - at `$.solve`"),
            ('patches = ["xsa=0"]', "last must be at least 1"), ('patches = ["muon=x"]', "kind must be polar, rows"),
            ('init_from = "z"', "no row 'z'"), ("grid = {group_size = 3}", "Expected `array`"),
            ("grid = {group_size = []}", "length >= 1"), ('patches = ["ttt=all"]', "score_patches"),
            ('score_of = "a"', "score_patches"), ('score_patches = ["ttt=all"]', "score_patches"),
            ('score_of = "a"\nscore_patches = ["ttt=all"]\nset = {group_size = 8}', "changes nothing else"),
            ('score_of = "a"\nscore_patches = ["ema=0.9"]', "no technique of the scorer"),
            ("grid = {seed = [7]}", "seed is the runner's"), ('grid = {init_from = ["x"]}', "init_from is the"),
            ("set = {data_path = 5}", "must be a string"), ('set = {preset = "x"}', "no preset 'x'"),
            ("set = {preset = 1}", "must be a string"), ('grid = {data_path = ["x"]}', "belongs in set"),
            ('against = "z"', "no row 'z'"), ('against = "a"', "neither the base"), ('against = "b"', "nor itself"),
            ('set = {matrix_format = "octal"}', "matrix_format='octal'"),
            ("set = {threshold = 0.5}", "'a' and 'b' ask for the same run"),
            ('init_from = "b"', "b starts from b")):
        said = refusal(tmp_path, MATRIX + row("b", bad))
        assert message in said and "b" in said, (bad, said)
    assert "two rows are called 'a'" in refusal(tmp_path, MATRIX + row("a"))
    assert "row 2 (b): seeds must be" in refusal(tmp_path, MATRIX + row("b", "seeds = [3, 3]"))
    assert "`why`" in refusal(tmp_path, MATRIX + '[[row]]\nname = "b"\n')


@pytest.mark.fast
def test_what_only_scores_is_nobodys_parent(tmp_path):
    score = 'score_patches = ["ttt=none"]'
    text = MATRIX + row("b", score, 'score_of = "a"') + row("c", score, 'score_of = "b"')
    assert "'c' starts from 'b', which trains nothing" in refusal(tmp_path, text)


@pytest.mark.fast
def test_grids_are_rows_and_parents_come_first(tmp_path):
    grid = "grid = {group_size = [8, 16], threshold = [0.5, 0.7]}"
    m = read(tmp_path, MATRIX + row("b", grid) + row("c", 'init_from = "d"') + row("d", "set = {smear = true}"))
    assert [r.name for r in m.rows][1:3] == ["b group_size=8 threshold=0.5", "b group_size=8 threshold=0.7"]
    assert [(j.row.name, j.seed) for j in jobs(m, only=["c"])] == [("d", 1), ("c", 1), ("d", 2), ("c", 2)]


@pytest.mark.fast
def test_ids_know_what_matters_and_nothing_else(tmp_path, monkeypatch):
    base = ids(tmp_path, MATRIX)
    assert len(set(base)) == 2 and base == ids(tmp_path, MATRIX)
    assert ids(tmp_path, MATRIX.replace("a test", "another").replace("threads = 1", "threads = 2")) == base
    lsq = MATRIX.replace('preset = "tiny"', 'preset = "tiny"\nternary_rule = "lsq"')
    xsa = MATRIX.replace('why = "the base"', 'why = "the base"\npatches = ["xsa=1"]')
    for other in (MATRIX.replace("iterations = 5", "iterations = 6"), MATRIX.replace("iterations = 5", "seconds = 5"),
                  MATRIX.replace("[1, 2]", "[3, 4]"), lsq, xsa,
                  MATRIX.replace('preset = "tiny"', 'preset = "tiny"\nmatrix_lr = 0.03')):
        assert ids(tmp_path, other)[0] != base[0], other
    assert ids(tmp_path, MATRIX, data="other")[0] != base[0]
    before, stripped = [ids(tmp_path, text) for text in (MATRIX, lsq, xsa)], matrix.stripped
    for file, counts in (("formats", [False, True, False]), ("patches", [False, False, True])):
        monkeypatch.setattr(matrix, "stripped", lambda text, name, file=file: (
            "other" if name == f"ablations/{file}.py" else stripped(text, name)))
        now = [ids(tmp_path, text) for text in (MATRIX, lsq, xsa)]
        assert [a != b for a, b in zip(now, before, strict=True)] == counts, "its code counts for rows that use it"


def test_widths_are_solved_for_equal_bytes(tmp_path):
    text = MATRIX.replace("threads = 1", "equal_bytes = 90000")
    text += "".join(row(f, f'set = {{matrix_format = "{f}"}}') for f in ("int8", "binary", "bf16"))
    m = read(tmp_path, text + row("gated", 'patches = ["bigram=256,16"]'))
    configs = {r.name: matrix.configure(m, r, 1) for r in m.rows}
    for name in ("a", "int8", "binary", "bf16"):
        assert 0.95 * 90000 < model_bytes(configs[name]) <= 90000, name
    widths = [configs[name].hidden_dim for name in ("binary", "a", "int8", "bf16")]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    assert 0.5 < configs["gated"].hidden_dim / configs["a"].hidden_dim < 0.98, "the table takes bytes"
    said = refusal(tmp_path, text + row("late", 'init_from = "bf16"'))
    assert "row late: equal_bytes gives it mlp_hidden" in said
    assert "makes a model of 1,000 bytes" in refusal(tmp_path, text.replace("90000", "1000"))


# The runner -----------------------------------------------------------------------------------------------------

# A trainer in a tenth of a second: it ends as its settings say, and its score is a function of them.
STUB = """
import json, os, pathlib, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
folder = pathlib.Path(flags["out-dir"]) / "run"
folder.mkdir(parents=True)
score = int(flags["seed"]) + float(flags["matrix-lr"])
what = {"0.5": "crash", "0.6": "nan", "0.7": "wait"}.get(flags["matrix-lr"], "")
steps = [{"type": "train", "step": s, "elapsed": s / 10, "tokens_seen": s, "loss": 4 / s} for s in range(1, 4)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\\n" for s in steps))
if what == "crash":
    raise RuntimeError("out of luck")
if what == "nan":
    sys.exit("error: step 3: the loss is not finite")
runner = os.getppid()
while what == "wait" and not pathlib.Path(sys.argv[0]).with_name("go").exists():
    time.sleep(0.05)
    if os.getppid() != runner:
        sys.exit("error: the runner is gone")
final = {"type": "final", "score": score}
(folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\\n" for s in [*steps, final]))
"""

DRIVER = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import test_ablations
test_ablations.pretend(setattr, pathlib.Path(sys.argv[1]))
sys.exit(test_ablations.runner.main(sys.argv[2:]))
"""


def stub_results(folder, job) -> dict:
    *steps, final = execute.read_metrics(folder)
    if final["type"] != "final":
        raise ValueError("the run has no final record")
    return {"val_bpb": final["score"], "val_loss": 1.0, "steps": 3, "tokens": 3, "train_seconds": 0.1,
            "curve": [[r["step"], r["elapsed"], r["tokens_seen"], r["loss"]] for r in steps],
            "codes_curve": [[r["step"], 0.3, 0.1] for r in steps], "bytes_model": 1000 + len(job.row.name),
            "formats": {"matrices": {"bits": 1.6, "error": 0.4, "weights": 100, "zero_frac": 0.3}}}


def pretend(replace, folder) -> None:
    """Let the runner use the stub. replace: setattr, or pytest's, which takes it back."""
    (folder / "stub.py").write_text(STUB)
    replace(execute, "PROGRAM", folder / "stub.py")
    replace(execute, "TIMED", folder / "timed.lock")
    replace(execute, "train_results", stub_results)
    replace(runner, "prepare_data", lambda m: dict.fromkeys(matrix.data_folders(m), "d"))


ROWS = MATRIX + "".join(row(name, f"set = {{matrix_lr = {lr}}}", 'claim = "c | d"') for name, lr in (
    ("b", 0.1), ("c", 0.2), ("d", 0.3)))


def arguments(tmp_path, text: str, *more: str) -> list[str]:
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    return [str(written(tmp_path, text)), *folders, *more]


@pytest.fixture
def drive(tmp_path, monkeypatch, capsys):
    """Run a matrix in this process; (exit status, what it said)."""
    pretend(monkeypatch.setattr, tmp_path)

    def call(text: str, *more: str) -> tuple[int, str]:
        status = runner.main(arguments(tmp_path, text, *more))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def driven(tmp_path, text: str, *more: str) -> subprocess.Popen:
    """The same in a process of its own."""
    (tmp_path / "driver.py").write_text(DRIVER)
    return started(sys.executable, tmp_path / "driver.py", tmp_path, *arguments(tmp_path, text, *more))


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def table(tmp_path) -> str:
    return (tmp_path / "results/test/report.md").read_text()


def results_file(tmp_path) -> Path:
    return tmp_path / "results/test/results.jsonl"


def lines_of(tmp_path) -> list[dict]:
    return [json.loads(text) for text in results_file(tmp_path).read_text().splitlines()]


def write_lines(tmp_path, lines: list[dict]) -> None:
    results_file(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_matrix_runs_once_and_reports(tmp_path, drive):
    status, said = drive(ROWS)
    assert status == 0, said
    assert "8 runs, 0 of them done before" in said and "left, about" in said
    first = table(tmp_path)
    assert "| b | 2 | 1.6000 | 0.7071 | +0.0600 | +0.0600 to +0.0600 | <0.001 | 0.500 |" in first
    assert "c \\| d" in first and "## Claims" in first and "](chart.png)" in first
    assert "8 of them done before" in drive(ROWS, "--jobs", "2")[1] and table(tmp_path) == first


def test_all_runs_have_the_device_that_is_asked_for(tmp_path, drive, monkeypatch):
    usual, devices = runner.execute, []
    monkeypatch.setattr(runner, "execute", lambda job, *rest: devices.append(job.config.device) or usual(job, *rest))
    assert drive(ROWS, "--device", "cpu")[0] == 0 and devices == ["cpu"] * 8
    assert "8 of them done before" in drive(ROWS, "--device", "cpu", "--jobs", "2")[1]
    assert "| b | 2 |" in table(tmp_path)
    assert "8 runs, 0 of them" in drive(ROWS)[1]  # another device is another run


def test_a_row_may_be_compared_with_another_than_the_base(tmp_path, drive):
    assert drive(ROWS + row("e", "set = {matrix_lr = 0.25}", 'against = "d"'))[0] == 0
    assert "| e | 2 | 1.7500 | 0.7071 | -0.0500 (from d) | -0.0500 to -0.0500 |" in table(tmp_path)


def test_rows_may_differ_in_their_data_alone(tmp_path, drive, monkeypatch):
    monkeypatch.setattr(runner, "prepare_data", lambda m: {x: x[0] for x in matrix.data_folders(m)})
    text = MATRIX + row("b", 'set = {data_path = "data/other"}')
    assert drive(text)[0] == 0
    lines = lines_of(tmp_path)
    assert len({line["id"] for line in lines}) == 4, "data are part of the id"
    write_lines(tmp_path, [line | {"val_bpb": 1.0 if line["row"] == "a" else 2.0} for line in lines])
    assert drive(text, "--report")[0] == 0
    assert "| a | 2 | 1.0000 |" in table(tmp_path) and "| b | 2 | 2.0000 |" in table(tmp_path)


def test_a_row_with_failures_says_so_and_claims_no_absence(tmp_path, drive):
    text = ROWS.replace("seeds = [1, 2]", "seeds = [1, 2, 3]").replace("matrix_lr = 0.1", "threshold = 0.6")
    assert drive(text)[0] == 0
    assert "no effect beyond 0.01 |" in table(tmp_path)
    lines = lines_of(tmp_path)

    def of_row_b(*diverged: tuple[str, int]) -> str:
        failed = {"status": "diverged", "message": "x"}
        write_lines(tmp_path, [line | failed if (line["row"], line["seed"]) in diverged else line for line in lines])
        assert drive(text, "--report")[0] == 0
        return next(line for line in table(tmp_path).splitlines() if line.startswith("| b | "))

    assert "undecided, 1 failed" in of_row_b(("b", 3)) and "no effect" not in of_row_b(("b", 3))
    assert "undecided, 1 of a failed" in of_row_b(("a", 3)), "the base's failures are everybody's"
    assert "| b | 0 |" in of_row_b(("b", 1), ("b", 2), ("b", 3)) and "| diverged |" in table(tmp_path)


def test_a_report_names_the_rows_that_missed_their_bytes(tmp_path, drive):
    assert drive(MATRIX.replace("threads = 1", "threads = 1\nequal_bytes = 90000"))[0] == 0
    assert "model files of 90,000 bytes (missed by more than 2%: a -98.9%)." in table(tmp_path)


def test_code_that_changes_meanwhile_ends_the_matrix(tmp_path, drive, monkeypatch):
    asked = []
    identity, one_run = runner.source_identity, runner.execute

    def counted(*args):
        asked.append(args)
        return one_run(*args)

    monkeypatch.setattr(runner, "source_identity", lambda *args: "changed" if len(asked) > 2 else identity(*args))
    monkeypatch.setattr(runner, "execute", counted)
    status, said = drive(ROWS)
    assert status == 1 and "the code changed while test ran" in said
    assert len(lines_of(tmp_path)) == 2


def test_a_last_line_without_its_end_is_kept_and_one_cut_off_run_again(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    first, path = table(tmp_path), results_file(tmp_path)
    path.write_text(path.read_text()[:-1])
    assert "8 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    whole = path.read_text()
    assert whole.endswith("\n") and len(whole.splitlines()) == 8
    *others, last = whole.splitlines()
    last = json.dumps(dict(reversed(json.loads(last).items())), indent=None, separators=(",", ":"))
    path.write_text("\n".join([*others, last]))
    assert "8 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    assert path.read_text() == "\n".join([*others, last, ""]), "written by another tool"
    path.write_text(whole[:-2])
    assert "7 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    assert len(path.read_text().splitlines()) == 8


def test_a_kill_loses_at_most_what_was_in_flight(tmp_path, drive):
    text, path, runs = ROWS.replace("0.2}", "0.7}"), results_file(tmp_path), tmp_path / "runs"
    process = driven(tmp_path, text)
    wait_until(lambda: path.exists() and path.read_text().count("\n") == 2 and len(list(runs.glob("*/run"))) == 3,
               process)  # the third one waits
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with open(path, "a") as f:  # as if the kill had come in the middle of a line
        f.write('{"id": "torn')
    (tmp_path / "go").touch()
    status, said = drive(text)
    assert status == 0 and "8 runs, 2 of them done before" in said
    killed = table(tmp_path)
    assert len(lines_of(tmp_path)) == 8
    path.unlink()
    assert drive(text)[0] == 0 and table(tmp_path) == killed


def test_an_interrupt_stops_the_runs_and_says_so(tmp_path):
    process = driven(tmp_path, ROWS.replace("0.1}", "0.7}"), "--only", "b")
    wait_until(lambda: list((tmp_path / "runs").glob("*/run")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "goes on where it was" in err and "Traceback" not in err
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "stub.py")], capture_output=True, text=True).stdout
    assert not left, "a run outlived its runner"


def test_failures_are_results(tmp_path, drive):
    text = MATRIX.replace("[1, 2]", "[1]") + row("child", 'init_from = "crash"')
    text += row("crash", "set = {matrix_lr = 0.5}") + row("diverges", "set = {matrix_lr = 0.6}")
    assert drive(text)[0] == 0
    hangs = text.replace("threads = 1", "timeout = 1") + row("hangs", "set = {matrix_lr = 0.7}")
    assert drive(hangs, "--only", "hangs")[0] == 0
    lines = {line["row"]: line for line in lines_of(tmp_path)}
    assert {name: line["status"] for name, line in lines.items()} == {
        "a": "ok", "crash": "failed", "diverges": "diverged", "hangs": "timeout", "child": "failed"}
    assert lines["crash"]["message"] == "RuntimeError: out of luck" and lines["crash"]["steps"] == 3
    assert lines["diverges"]["message"] == "step 3: the loss is not finite"
    assert "| diverges | 1 | diverged | 3 | step 3: the loss is not finite |" in table(tmp_path)
    assert "4 of them done before" in drive(text)[1]
    assert "1 runs, 0 of them done before" in drive(text, "--retry", "--only", "crash")[1]
    assert "2 runs, 0 of them done before" in drive(text, "--retry", "--only", "child")[1], "a child whose parent fails"


def test_results_follow_what_a_row_asks_for_not_its_name(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    first = table(tmp_path)
    swapped = ROWS.replace('"b"', '"x"').replace('"c"', '"b"').replace('"x"', '"c"')
    status, said = drive(swapped)
    assert status == 0 and "8 of them done before" in said
    assert "| b | 2 | 1.6000 |" in first and "| c | 2 | 1.7000 |" in first
    assert "| c | 2 | 1.6000 |" in table(tmp_path) and "| b | 2 | 1.7000 |" in table(tmp_path)
    assert drive(ROWS.replace("matrix_lr = 0.1", "matrix_lr = 0.15"))[0] == 0 and "1.6500" in table(tmp_path)
    assert drive(ROWS)[0] == 0 and table(tmp_path) == first


def in_words_of_before(line: dict) -> dict:
    """A line as it was written when SmearGate was a patch, elastic a rule, and codebooks and canon had settings."""
    s = dict(line["settings"])
    patches = ["smear"] if s.pop("smear") else []
    if s["matrix_format"] == "elastic":
        s |= {"matrix_format": "ternary", "ternary_rule": "elastic"}
    s |= {"activation_bits": 16, "codebook_decay": 0.99, "commitment": 0.0, "token_shift": bool(line["patches"])}
    return line | {"settings": s, "patches": patches}


def test_results_of_before_are_still_found(tmp_path, drive):
    text = MATRIX + row("gate", "set = {smear = true}") + row("child", 'init_from = "gate"')
    text += row("elastic", 'set = {matrix_format = "elastic"}') + row("canon", 'patches = ["canon=both,1"]')
    assert drive(text)[0] == 0
    def rows() -> list[str]:  # a line without patches is no patched run, and counts as the program's
        return [line for line in table(tmp_path).splitlines() if "versions of" not in line]

    first, old = rows(), [in_words_of_before(line) for line in lines_of(tmp_path)]
    write_lines(tmp_path, old)
    assert drive(text, "--report")[0] == 0 and rows() == first
    write_lines(tmp_path, [line | {"patches": []} for line in old])
    assert drive(text, "--report")[0] == 0 and "| gate | 0 |" in table(tmp_path)
    write_lines(tmp_path, [line | {"settings": line["settings"] | {"token_shift": False}} for line in old])
    assert drive(text, "--report")[0] == 0 and "| canon | 0 |" in table(tmp_path)
    int8 = [line | {"settings": line["settings"] | {"activation_bits": 8}} for line in old]
    write_lines(tmp_path, int8)
    assert drive(text, "--report")[0] == 0 and "| a | 0 |" in table(tmp_path), "nobody asks for it any more"


def test_a_result_without_its_parents_is_nobodys(tmp_path, drive):
    """Without knowing what it started from, a child looks like a run from scratch."""
    text = ROWS + row("child", 'init_from = "b"')
    assert drive(text)[0] == 0
    lines = [line for line in lines_of(tmp_path) if line["row"] != "b"]
    write_lines(tmp_path, [line | {"val_bpb": 9.0} if line["row"] == "child" else line for line in lines])
    assert drive(text, "--report")[0] == 0
    assert "| a | 2 | 1.5400 |" in table(tmp_path) and "| child | 0 |" in table(tmp_path)


def test_lines_that_start_from_each_other_are_nobodys(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    lines = lines_of(tmp_path)
    for line, other in ((lines[0], lines[0]), (lines[1], lines[2]), (lines[2], lines[1])):
        line["parent"] = other["id"]
    write_lines(tmp_path, lines)
    status, said = drive(ROWS, "--report")
    assert status == 0 and "Traceback" not in said and "| a | 1 |" in table(tmp_path)


def test_a_parent_whose_files_are_gone_runs_again_and_keeps_its_result(tmp_path, drive, monkeypatch):
    text = MATRIX + row("child", 'score_of = "a"', 'score_patches = ["ttt=none"]')
    monkeypatch.setattr(execute, "train_results", lambda *args: stub_results(*args) | {"artifact_sha256": "one"})
    drive(text, "--only", "a")
    first = results_file(tmp_path).read_text()
    monkeypatch.setattr(execute, "train_results", lambda *args: stub_results(*args) | {"artifact_sha256": "two"})
    said = drive(text)[1]  # the stub writes no artifact
    assert "4 runs, 0 of them done before" in said and "seed 1: another model than before" in said
    assert results_file(tmp_path).read_text().startswith(first)
    assert [line["row"] for line in lines_of(tmp_path)] == ["a", "a", "child", "child"]


def test_a_gap_is_a_failure_unless_it_is_the_point(tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.safetensors", "model.tern"):
        (folder / name).symlink_to(tiny_run[0] / name)
    *records, final = execute.read_metrics(tiny_run[0])
    config = Config(**records[0]["settings"])
    job = matrix.Job(matrix.Row("r", "", {}, seeds=(1337,)), 1337, config, "source", "data")

    def measured(job: matrix.Job, **change) -> dict:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, final | change]))
        return execute.train_results(folder, job)

    assert measured(job)["gap"] == 0
    for change in ({"roundtrip_gap": 1e-8}, {"logits_identical": False}):
        with pytest.raises(ValueError, match="not the model that was trained"):
            measured(job, **change)
    opens = replace(job, row=replace(job.row, patches=("unrounded_scales",)))
    assert measured(opens, logits_identical=False)["logits_identical"] is False


def test_a_damaged_result_is_one_clear_error(tmp_path, drive):
    assert drive(ROWS, "--only", "a")[0] == 0
    path = results_file(tmp_path)
    good = path.read_text()
    line = lines_of(tmp_path)[0]
    scoreless = {key: value for key, value in line.items() if key not in ("val_bpb", "message")}
    for bad in (b"[]", b'{"id": 1}', b"{", b"null", b"\xff", json.dumps(scoreless).encode(),
                json.dumps(scoreless | {"status": "failed"}).encode(), json.dumps(line | {"status": "fine"}).encode(),
                json.dumps(line | {"formats": 3}).encode()):
        path.write_bytes(bad + b"\n" + good.encode())
        status, said = drive(ROWS)
        assert status == 1 and "line 1: not a line of results" in said and "Traceback" not in said


def test_two_runners_do_not_share_a_matrix(tmp_path, drive):
    held = results.Results(results_file(tmp_path))
    status, said = drive(ROWS)
    assert status == 1 and "another runner is at work" in said
    held.close()


@pytest.mark.fast
def test_timed_runs_are_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "TIMED", tmp_path / "lock")
    order = []

    def hold(timed: bool, name: str) -> None:
        with execute.machine_to_itself(timed):
            order.append(("in", name))
            time.sleep(0.2)
            order.append(("out", name))

    threads = [threading.Thread(target=hold, args=args) for args in ((True, "x"), (True, "y"), (False, "z"))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name in "xy":
        at = order.index(("in", name))
        assert order[at + 1] == ("out", name)


# Proofs of what ran ---------------------------------------------------------------------------------------------


def test_a_real_run_is_measured_and_proved(tiny_run):
    folder = tiny_run[0]
    records = execute.read_metrics(folder)
    tensors, _ = pack.read_artifact(folder / "model.tern")
    config = Config(**records[0]["settings"])
    proof = "ternary g32 log7: 12 matrices, 16,384 weights"
    assert diagnose.prove_active(tensors, config) == execute.active(folder, tensors, config) == proof
    found = diagnose.formats(folder, tensors)["matrices"]
    assert found["weights"] == 16384 and 0.3 < found["error"] < 0.6 and 0.9 < found["used"] <= 1
    assert found["zero_frac"] == pytest.approx(records[-1]["score"]["model"]["zero_frac"])
    shares = pack.tensor_bytes(pack.parse_header((folder / "model.tern").read_bytes()))
    matrices = [name for name in shares if diagnose.part_of(name) == "matrices"]  # which share no stream with others
    assert found["bits"] == pytest.approx(8 * sum(shares[name] for name in matrices) / 16384, rel=0.01)
    assert not execute.active(folder, tensors, replace(config, matrix_format="bf16"))
    with pytest.raises(AuditError, match="tok_emb.weight is stored as bf16, not as int4"):
        execute.active(folder, tensors, replace(config, embed_format="int4"))


@pytest.mark.fast
def test_an_embedding_is_proved_too():
    config = resolve_settings(["--preset=tiny", "--embed-format=int4"], {})[1]
    fmt = make_format(config, "embed_format")
    latent = torch.randn(config.vocab_size, config.model_dim, generator=torch.Generator().manual_seed(0))
    tensor = to_pack(fmt.quantize(latent), fmt)
    said = diagnose.prove_embedding({"tok_emb.weight": tensor}, config)
    assert said.endswith(f"embedding, {latent.numel():,} weights")
    nothing = to_pack(fmt.quantize(0 * latent), fmt)
    for wrong, message in (({}, "is not in the file"), ({"tok_emb.weight": nothing}, "it holds nothing")):
        with pytest.raises(AuditError, match=message):
            diagnose.prove_embedding(wrong, config)
    with pytest.raises(AuditError, match="it is not quantized"):
        diagnose.prove_embedding({"tok_emb.weight": tensor}, replace(config, embed_format="bf16"))


def test_what_is_not_active_is_refused(tiny_run):
    tensors, _ = pack.read_artifact(tiny_run[0] / "model.tern")
    config = Config(**execute.read_metrics(tiny_run[0])[0]["settings"])
    name = "blocks.1.mlp.fc.weight"
    t = tensors[name]
    full = pack.StoredTensor(t.shape, {"kind": "bf16"}, t.codes.astype(np.uint16), None)
    zero = pack.StoredTensor(t.shape, t.format, t.codes * 0, t.scales)
    for wrong, asked, message in (
            (tensors | {name: full}, config, f"{name} is stored as bf16, not as ternary"),
            (tensors | {name: zero}, config, "it holds nothing"), ({}, config, "no matrices"),
            (tensors, replace(config, matrix_format="bf16"), "nothing is quantized"),
            ({n: t for n, t in tensors.items() if n != name}, config, f"{name} is not in the file")):
        with pytest.raises(AuditError, match=message):
            diagnose.prove_active(wrong, asked)


def test_a_part_in_another_format_is_proved_as_such(tiny_run):
    tensors, _ = pack.read_artifact(tiny_run[0] / "model.tern")
    config = Config(**execute.read_metrics(tiny_run[0])[0]["settings"])
    mixed = {n: pack.StoredTensor(t.shape, {"kind": "bf16"}, t.codes.astype(np.uint16), None) if ".attn." in n else t
             for n, t in tensors.items()}
    said = execute.active(tiny_run[0], mixed, config, ["part_format=attn,bf16"])
    assert said == "bf16: 8 matrices, 6,144 weights; ternary g32 log7: 4 matrices, 10,240 weights"
    for file, texts in ((mixed, []), (tensors, ["part_format=attn,bf16"]), (mixed, ["part_format=mlp,bf16"])):
        with pytest.raises(AuditError, match="blocks.0.attn.c_k.weight is stored as"):
            execute.active(tiny_run[0], file, config, texts)


@pytest.mark.fast
def test_codes_are_those_of_their_formats():
    group = {"group_size": 8, "scale": "bf16"}
    assert diagnose.levels({"kind": "binary"} | group) == {-1, 1}
    assert diagnose.levels({"kind": "five"} | group) == {-2, -1, 0, 1, 2}
    assert diagnose.levels({"kind": "int", "bits": 2} | group) == {-1, 0, 1}
    assert diagnose.levels({"kind": "codebook", "entries": 4, "group_size": 8}) == {-2, -1, 0, 1}


# Reports --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(tmp_path, drive):
    assert drive(ROWS.replace('"b"', '"b <i> & co"'))[0] == 0
    path = tmp_path / "results/test/report.html"
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.outside and page.tags.count("svg") == 6
    for part in text.split("<svg ")[1:]:
        xml.etree.ElementTree.fromstring("<svg " + part[: part.index("</svg>")] + "</svg>")
    assert "b &lt;i&gt; &amp; co" in text and "<i>" not in text and "prefers-color-scheme: dark" in text
    assert "@media print" in text and "nan" not in text and "url(http" not in text
    names = ("report.html", "report.md", "chart.png")
    before = [path.with_name(name).read_bytes() for name in names]
    assert drive(ROWS.replace('"b"', '"b <i> & co"'), "--report")[0] == 0
    assert [path.with_name(name).read_bytes() for name in names] == before, "the same lines make the same report"


@pytest.mark.fast
def test_the_front_is_what_nothing_beats():
    assert report.pareto([(1, 5), (2, 6), (2, 4), (3, 4), (4, 1)]) == [(1, 5), (2, 4), (4, 1)]


def test_every_matrix_in_the_repository_is_valid(monkeypatch):
    monkeypatch.setattr(matrix, "solved", lambda config, *_: config)  # which takes most of a minute, and has a test
    for path in (ROOT / "ablations/matrices").glob("*.toml"):
        m = matrix.read_matrix(path)
        assert jobs(m) and m.name == path.stem


@pytest.mark.parametrize("folder", sorted((ROOT / "ablations/results").iterdir()), ids=lambda p: p.name)
def test_committed_reports_are_those_of_their_lines(folder):
    """Also after a preset has changed: a matrix that was run says what it ran."""
    m = matrix.read_matrix(ROOT / f"ablations/matrices/{folder.name}.toml")
    lines = results.read_results(folder / "results.jsonl")
    if not m.equal_bytes:
        rows = report.summarize(m, jobs(m), lines)
        assert report.markdown(m, rows, with_chart=len(m.rows) > 1) == (folder / "report.md").read_text()
        return
    # Solving widths takes most of a minute: the settings that are not solved have to agree.
    asked = [matrix.in_words_of_today(results.settings_of(line), line.patches)[0] for line in lines]
    for job in jobs(replace(m, equal_bytes=0)):
        solved = {job.row.solve: 0}
        assert any(one | solved == job.settings | solved for one in asked), job.row.name


# The programs with what is in ablations/ ------------------------------------------------------------------------


def test_a_run_whose_runner_is_gone_before_it_looks_ends_at_once(data_dir, tmp_path):
    command = [sys.executable, str(ROOT / "ablations/program.py"), "train", *tiny_args(data_dir, tmp_path)]
    env = os.environ | {program.PARENT: "1"}
    done = subprocess.run(command, env=env, start_new_session=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_program_does_the_same_in_both_processes(data_dir, tmp_path):
    args = tiny_args(data_dir, tmp_path, "--iterations", 3, "--checkpoint-every", 0, "--matrix-format", "codebook4")
    done = run("--patch", "bigram=64,8", "train", *args, program="ablations/program.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical bit for bit" in done.stdout
    tensors, _ = pack.read_artifact(tmp_path / NAME / "model.tern")
    assert "bigram_scale" in tensors and tensors["bigram_proj.weight"].format["kind"] == "codebook"
    done = run("--patch", "blur", "train", *args, program="ablations/program.py")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no patch 'blur'")
