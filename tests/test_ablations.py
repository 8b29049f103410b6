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
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
import pack
import plan
from conftest import ROOT, tiny_args
from eval_bpb import AuditError
from train_gpt import Config, make_format, resolve_settings

sys.path.insert(0, str(ROOT / "ablations"))
import diagnose
import matrix as matrices
import report
import run as runner
import stats

# Statistics -----------------------------------------------------------------------------------------------------


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 3), st.floats(1, 3)), min_size=2, max_size=8))
def test_comparison_is_scipys(pairs):
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    if np.ptp(a - b) < 1e-9:
        return
    c = stats.compare(by_seed(a), by_seed(b))
    reference = scipy.stats.ttest_rel(a, b)
    assert c.p_t == pytest.approx(reference.pvalue, rel=1e-6, abs=1e-12)
    interval = reference.confidence_interval(0.95)
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
    flips = scipy.stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert c.p_flip == pytest.approx(flips.pvalue)


def test_seeds_are_paired_and_others_left_out():
    c = stats.compare({1: 2.0, 2: 3.0, 9: 50.0}, {2: 2.5, 1: 1.0, 7: 99.0})
    assert c.n == 2 and c.mean == pytest.approx(0.75)
    one = stats.compare({1: 2.0}, {1: 1.5, 2: 1.0})
    assert one.n == 1 and one.mean == 0.5 and math.isnan(one.p_t)
    none = stats.compare({}, {1: 1.0})
    assert none.n == 0 and math.isnan(none.mean)


def test_equal_differences_leave_no_doubt():
    shifted = stats.compare({1: 2.0, 2: 2.0}, {1: 1.0, 2: 1.0})
    assert shifted.p_t == 0 and (shifted.low, shifted.high) == (1.0, 1.0)
    same = stats.compare({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0})
    assert same.p_t == 1 and stats.verdict(same, 0.01) == "no effect beyond 0.01"


def test_holm_is_the_textbooks():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, math.nan, 0.5])[0] == 1.0
    assert math.isnan(stats.holm([0.6, math.nan])[1])


def test_many_seeds_have_a_sign_flip_test_too():
    values = np.random.default_rng(1).normal(0.6, 1.0, 24)
    reference = scipy.stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=99_999, rng=2)
    p = stats.compare(by_seed(values), by_seed(0 * values)).p_flip
    assert p == pytest.approx(reference.pvalue, abs=0.002) and p > 0


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_what_is_called_detectable_is_found_four_times_in_five(n):
    rng, sd = np.random.default_rng(0), 0.02
    effect = stats.detectable_difference(sd, n)
    assert stats.detectable_difference(100 * sd, n) == pytest.approx(100 * effect)
    samples = rng.normal(effect, sd, (20_000, n))
    found = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue < stats.ALPHA
    assert found.mean() == pytest.approx(stats.POWER, abs=0.015)


def comparison(values, holm: float) -> stats.Comparison:
    c = stats.compare(by_seed(values), by_seed([0.0] * len(values)))
    return stats.Comparison(**{**vars(c), "p_holm": holm})


def test_verdicts_follow_the_statistics():
    assert stats.verdict(comparison([-0.02, -0.021, -0.019], 0.01), 0.01) == "better"
    assert stats.verdict(comparison([0.02, 0.021, 0.019], 0.01), 0.01) == "worse"
    assert stats.verdict(comparison([0.02, 0.021, 0.019], 0.06), 0.01) == "undecided"
    assert stats.verdict(comparison([-0.002, -0.0021, -0.0019], 0.01), 0.01) == "better, by less than 0.01"
    assert stats.verdict(comparison([0.001, -0.001, 0.0005, -0.0005], 0.9), 0.01) == "no effect beyond 0.01"
    assert stats.verdict(comparison([0.03, -0.03, 0.01, -0.02], 0.9), 0.01) == "undecided", "no effect needs a bound"
    assert stats.verdict(comparison([0.03], math.nan), 0.01) == "not tested"


# Matrices -------------------------------------------------------------------------------------------------------

MATRIX = """
name = "test"
why = "a test"
base = "a"
seeds = [1, 2]
equivalence = 0.01
budget = {iterations = 5}
threads = 1
timeout = 3
[settings]
preset = "tiny"
[[row]]
name = "a"
why = "the base"
"""


def written(tmp_path, text: str):
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return path


def read(tmp_path, text: str) -> matrices.Matrix:
    return matrices.read_matrix(written(tmp_path, text))


def ids(tmp_path, text: str, data: str = "d", only=None) -> list[str]:
    m = read(tmp_path, text)
    found = matrices.jobs(m, dict.fromkeys(matrices.data_folders(m), data), only)
    return [job.id for job in found]


@pytest.mark.parametrize("bad, message", [
    ("name = 3", "name must be str"), ("seeds = []", "seeds must be"), ("seeds = [1, 1]", "seeds must be"),
    ('base = "b"', "there is no row 'b'"), ("budget = {hours = 1}", "budget must be"), ("colour = 1", "unknown key"),
    ("budget = {iterations = true}", "budget must be"), ("budget = {tokens = nan}", "budget must be"),
    ("budget = {seconds = -1}", "budget must be"), ('name = "../x"', "names a folder"), ("threads = -1", "negative"),
    ('data = {a = "x"}', "lists of arguments"), ("equivalence = 'x'", "equivalence must be"), ("[", "TOML")])
def test_a_bad_matrix_is_one_clear_error(tmp_path, bad, message):
    top, rest = MATRIX.split("[settings]")
    kept = [line for line in top.splitlines() if line.partition(" ")[0] != bad.partition(" ")[0]]
    with pytest.raises(matrices.MatrixError, match=message):
        read(tmp_path, "\n".join([bad, *kept, "[settings]"]) + rest)


@pytest.mark.parametrize("row, message", [
    ('set = {seed = 3}', "seed is the runner's"), ("set = {colour = 3}", "'colour' is no setting"),
    ("patches = [3]", "a patch must be a string"), ('set = {preset = "x"}', "no preset 'x'"),
    ('patches = ["none"]', "no patch 'none'"), ("colour = 1", "unknown"),
    ('solve = "vocab_size"', "solve must be"), ('patches = ["xsa=0"]', "last must be at least 1"),
    ('patches = ["muon=x"]', "kind must be polar, rows"), ('patches = ["swa=1.5"]', "at least 0 and below 1"),
    ('init_from = "z"', "no row 'z'"), ('grid = {group_size = 3}', "a list"),
    ('patches = ["ttt=all"]', "score_patches"), ('score_of = "a"', "score_patches"),
    ('score_of = "a"\nset = {group_size = 8}', "score_patches"),
    ('name = "a"', "matrix.toml"), ('grid = {seed = [7]}', "seed is the runner's"),
    ('grid = {init_from = ["runs/x"]}', "init_from is the runner's"), ("set = {data_path = 5}", "must be a string"),
    ('set = {preset = ["cpu"]}', "must be a string"), ('grid = {data_path = ["x"]}', "belong in set"),
    ('against = "z"', "no row 'z'"), ('against = "a"', "neither the base"),
    ('against = "b"', "nor itself"), ('score_of = "a"\nscore_patches = ["ema=0.9"]', "no technique of the scorer")])
def test_a_bad_row_is_one_clear_error(tmp_path, row, message):
    name = "" if row.startswith("name") else 'name = "b"\n'
    with pytest.raises(matrices.MatrixError, match=message):
        read(tmp_path, MATRIX + f'[[row]]\n{name}why = "x"\n{row}\n')


def test_a_setting_that_the_trainer_refuses_is_an_error(tmp_path):
    with pytest.raises(matrices.MatrixError, match="row b"):
        ids(tmp_path, MATRIX + '[[row]]\nname = "b"\nwhy = "x"\nset = {matrix_format = "octal"}\n')


def test_grids_are_rows_and_parents_come_first(tmp_path):
    grid = "grid = {group_size = [8, 16], threshold = [0.5, 0.7]}"
    m = read(tmp_path, MATRIX + f'[[row]]\nname = "b"\nwhy = "x"\n{grid}\n'
             '[[row]]\nname = "c"\nwhy = "y"\ninit_from = "d"\n[[row]]\nname = "d"\nwhy = "z"\n')
    assert [row.name for row in m.rows][1:3] == ["b group_size=8 threshold=0.5", "b group_size=8 threshold=0.7"]
    order = [(j.row.name, j.seed) for j in matrices.jobs(m, {("data/packages", ""): "d"}, ["c"])]
    assert order == [("d", 1), ("c", 1), ("d", 2), ("c", 2)]


def test_ids_know_what_matters_and_nothing_else(tmp_path):
    base = ids(tmp_path, MATRIX)
    assert len(set(base)) == 2 and base == ids(tmp_path, MATRIX)
    assert ids(tmp_path, MATRIX.replace("a test", "another").replace("threads = 1", "threads = 2")) == base
    for change in (("iterations = 5", "iterations = 6"), ("iterations = 5", "seconds = 5"), ("[1, 2]", "[3, 4]"),
                   ('preset = "tiny"', 'preset = "tiny"\nmatrix_lr = 0.03'),
                   ('why = "the base"', 'why = "the base"\npatches = ["xsa=1"]')):
        assert ids(tmp_path, MATRIX.replace(*change))[0] != base[0], change
    assert ids(tmp_path, MATRIX, data="other")[0] != base[0]


def test_two_rows_of_the_same_run_are_refused(tmp_path):
    with pytest.raises(matrices.MatrixError, match="'a' and 'b' ask for the same run"):
        ids(tmp_path, MATRIX + '[[row]]\nname = "b"\nwhy = "x"\nset = {threshold = 0.5}\n')


def test_rows_may_differ_in_their_data_alone(tmp_path, drive, monkeypatch):
    monkeypatch.setattr(runner, "prepare_data", lambda matrix: {x: x[0] for x in matrices.data_folders(matrix)})
    text = MATRIX + '[[row]]\nname = "b"\nwhy = "x"\nset = {data_path = "data/other"}\n'
    assert drive(text)[0] == 0
    path = tmp_path / "results/test/results.jsonl"
    lines = runner.read_results(path)
    assert len({line["id"] for line in lines}) == 4, "data are part of the id"
    path.write_text("".join(json.dumps(x | {"val_bpb": 1.0 if x["row"] == "a" else 2.0}) + "\n" for x in lines))
    assert drive(text, "--report")[0] == 0
    assert "| a | 2 | 1.0000 |" in table(tmp_path) and "| b | 2 | 2.0000 |" in table(tmp_path)


def test_what_only_scores_is_nobodys_parent(tmp_path):
    score = 'why = "x"\nscore_patches = ["ttt=none"]\n'
    text = MATRIX + f'[[row]]\nname = "b"\n{score}score_of = "a"\n'
    with pytest.raises(matrices.MatrixError, match="'c' starts from 'b', which trains nothing; .* 'a'"):
        read(tmp_path, text + f'[[row]]\nname = "c"\n{score}score_of = "b"\n')


def test_widths_are_solved_for_equal_bytes(tmp_path):
    text = MATRIX.replace("threads = 1", "equal_bytes = 90000") + "".join(
        f'[[row]]\nname = "{f}"\nwhy = "x"\nset = {{matrix_format = "{f}"}}\n' for f in ("int8", "binary", "bf16"))
    m = read(tmp_path, text)
    configs = {row.name: matrices.configure(m, row, 1) for row in m.rows}
    for name, c in configs.items():
        assert 0.95 * 90000 < plan.model_bytes(c) <= 90000, name
    widths = [configs[name].hidden_dim for name in ("binary", "a", "int8", "bf16")]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    gated = read(tmp_path, text + '[[row]]\nname = "gated"\nwhy = "x"\npatches = ["bigram=256,16"]\n')
    hidden = {row.name: matrices.configure(gated, row, 1).hidden_dim for row in gated.rows}
    assert 0.5 < hidden["gated"] / hidden["a"] < 0.98, "the table takes bytes"
    other = text + '[[row]]\nname = "late"\nwhy = "x"\ninit_from = "bf16"\n'
    with pytest.raises(matrices.MatrixError, match="row late: equal_bytes gives it mlp_hidden"):
        ids(tmp_path, other)
    small = read(tmp_path, text.replace("90000", "1000"))
    with pytest.raises(matrices.MatrixError, match="makes a model of 1,000 bytes"):
        matrices.configure(small, small.rows[0], 1)


# The runner -----------------------------------------------------------------------------------------------------

# A trainer in a tenth of a second: it ends as its settings say, and its score is a function of them.
STUB = """
import json, pathlib, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
folder = pathlib.Path(flags["out-dir"]) / "run"
folder.mkdir(parents=True)
score = int(flags["seed"]) + float(flags["matrix-lr"])
what = {"0.5": "crash", "0.6": "nan", "0.7": "hang"}.get(flags["matrix-lr"], "")
steps = [{"type": "train", "step": s, "elapsed": s / 10, "tokens_seen": s, "loss": 4 / s} for s in range(1, 4)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\\n" for s in steps))
if what == "crash":
    raise RuntimeError("out of luck")
if what == "nan":
    sys.exit("error: step 3: the loss is not finite")
time.sleep(60 if what == "hang" else 0.15)
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
    records = runner.read_metrics(folder)
    final = {r["type"]: r for r in records}.get("final")
    if final is None:
        raise ValueError("the run has no final record")
    return {"val_bpb": final["score"], "val_loss": 1.0, "steps": 3, "tokens": 3, "train_seconds": 0.1,
            "curve": [[r["step"], r["elapsed"], r["tokens_seen"], r["loss"]] for r in records[:-1]],
            "codes_curve": [[r["step"], 0.3, 0.1] for r in records[:-1]], "bytes_model": 1000 + len(job.row.name),
            "formats": {"matrices": {"bits": 1.6, "error": 0.4, "zero_frac": 0.3}}}


def pretend(replace, folder) -> None:
    """Let the runner use the stub. replace: setattr, or pytest's, which takes it back."""
    (folder / "stub.py").write_text(STUB)
    replace(runner, "PROGRAM", folder / "stub.py")
    replace(runner, "TIMED", folder / "timed.lock")
    replace(runner, "prepare_data", lambda matrix: dict.fromkeys(matrices.data_folders(matrix), "d"))
    replace(runner, "train_results", stub_results)

ROWS = MATRIX + "".join(f'[[row]]\nname = "{n}"\nwhy = "x"\nset = {{matrix_lr = {lr}}}\nclaim = "c | d"\n'
                        for n, lr in (("b", 0.1), ("c", 0.2), ("d", 0.3)))


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


def started(tmp_path, text: str, *more: str) -> subprocess.Popen:
    """The same in a process of its own."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), *arguments(tmp_path, text, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def table(tmp_path) -> str:
    return (tmp_path / "results/test/report.md").read_text()


def test_a_row_may_be_compared_with_another_than_the_base(tmp_path, drive):
    text = ROWS + '[[row]]\nname = "e"\nwhy = "x"\nset = {matrix_lr = 0.25}\nagainst = "d"\n'
    assert drive(text)[0] == 0
    assert "| e | 2 | 1.7500 | 0.7071 | -0.0500 (from d) | -0.0500 to -0.0500 |" in table(tmp_path)


def test_a_row_with_failures_says_so_and_claims_no_absence(tmp_path, drive):
    text = ROWS.replace("seeds = [1, 2]", "seeds = [1, 2, 3]").replace("matrix_lr = 0.1", "threshold = 0.6")
    assert drive(text)[0] == 0
    results = tmp_path / "results/test/results.jsonl"
    assert "no effect beyond 0.01 |" in table(tmp_path)
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    line = next(x for x in lines if (x["row"], x["seed"]) == ("b", 3))
    line |= {"status": "diverged", "message": "x"}
    results.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert drive(text, "--report")[0] == 0
    row = next(x for x in table(tmp_path).splitlines() if x.startswith("| b | 2"))
    assert "undecided, 1 failed" in row and "no effect" not in row
    for x in lines:
        if x["seed"] == 3:
            x |= {"status": "diverged" if x["row"] == "a" else "ok", "message": "x"}
    results.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert drive(text, "--report")[0] == 0
    row = next(x for x in table(tmp_path).splitlines() if x.startswith("| b | 3"))
    assert "undecided, 1 of a failed" in row and "no effect" not in row, "the base's failures are everybody's"


def test_a_report_names_the_rows_that_missed_their_bytes(tmp_path, drive):
    assert drive(MATRIX.replace("threads = 1", "threads = 1\nequal_bytes = 90000"))[0] == 0
    assert "model files of 90,000 bytes (missed by more than 2%: a -98.9%)." in table(tmp_path)


def test_code_that_changes_meanwhile_ends_the_matrix(tmp_path, drive, monkeypatch):
    asked = []
    original = runner.source_identity
    monkeypatch.setattr(runner, "source_identity", lambda *args: "changed" if len(asked) > 2 else original(*args))
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda *args: asked.append(args) or execute(*args))
    status, said = drive(ROWS)
    assert status == 1 and "the code changed while test ran" in said
    assert len((tmp_path / "results/test/results.jsonl").read_text().splitlines()) == 2


def test_a_last_line_without_its_end_is_kept_and_one_cut_off_run_again(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    first, results = table(tmp_path), tmp_path / "results/test/results.jsonl"
    results.write_text(results.read_text()[:-1])
    assert "8 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    whole = results.read_text()
    assert whole.endswith("\n") and len(whole.splitlines()) == 8
    *others, last = whole.splitlines()
    last = json.dumps(dict(reversed(json.loads(last).items())), indent=None, separators=(",", ":"))
    results.write_text("\n".join([*others, last]))
    assert "8 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    assert results.read_text() == "\n".join([*others, last, ""]), "written by another tool"
    results.write_text(whole[:-2])
    assert "7 of them done before" in drive(ROWS)[1] and table(tmp_path) == first
    assert len(results.read_text().splitlines()) == 8


def test_a_matrix_runs_once_and_reports(tmp_path, drive):
    status, said = drive(ROWS)
    assert status == 0, said
    assert "8 runs, 0 of them done before" in said and "left, about" in said
    first = table(tmp_path)
    assert "| b | 2 | 1.6000 | 0.7071 | +0.0600 | +0.0600 to +0.0600 | <0.001 | 0.500 |" in first
    assert "c \\| d" in first and "## Claims" in first
    assert "8 of them done before" in drive(ROWS, "--jobs", "2")[1] and table(tmp_path) == first


def test_a_kill_loses_at_most_what_was_in_flight(tmp_path, drive):
    path = tmp_path / "results/test/results.jsonl"
    kept = 0
    for moment in (1, 3):
        process = started(tmp_path, ROWS)
        deadline = time.monotonic() + 60
        while (path.read_text().count("\n") if path.exists() else 0) < kept + moment:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kept = len(runner.read_results(path))
        with open(path, "a") as f:  # as if the kill had come in the middle of a line
            f.write('{"id": "torn')
    status, said = drive(ROWS)
    assert status == 0 and f"8 runs, {kept} of them done before" in said
    killed = table(tmp_path)
    assert len(path.read_text().splitlines()) == 8
    path.unlink()
    assert drive(ROWS)[0] == 0 and table(tmp_path) == killed


def test_an_interrupt_stops_the_runs_and_says_so(tmp_path):
    process = started(tmp_path, ROWS.replace("0.1}", "0.7}"), "--only", "b")
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 60
    while not list(runs.glob("*/run")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on where it was" in err and "Traceback" not in err
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "stub.py")], capture_output=True, text=True).stdout
    assert not left, "a run outlived its runner"


def test_failures_are_results(tmp_path, drive):
    text = MATRIX.replace("[1, 2]", "[1]") + "".join(
        f'[[row]]\nname = "{n}"\nwhy = "x"\nset = {{matrix_lr = {lr}}}\n'
        for n, lr in (("crash", 0.5), ("diverges", 0.6), ("hangs", 0.7)))
    text += '[[row]]\nname = "child"\nwhy = "x"\ninit_from = "crash"\n'
    assert drive(text)[0] == 0
    lines = {line["row"]: line for line in runner.read_results(tmp_path / "results/test/results.jsonl")}
    assert {name: line["status"] for name, line in lines.items()} == {
        "a": "ok", "crash": "failed", "diverges": "diverged", "hangs": "timeout", "child": "failed"}
    assert lines["crash"]["message"] == "RuntimeError: out of luck" and lines["crash"]["steps"] == 3
    assert lines["diverges"]["message"] == "step 3: the loss is not finite"
    assert "| diverges | 1 | diverged | 3 | step 3: the loss is not finite |" in table(tmp_path)
    assert "5 of them done before" in drive(text)[1]
    assert "1 runs, 0 of them done before" in drive(text, "--retry", "--only", "crash")[1]
    assert "2 runs, 0 of them done before" in drive(text, "--retry", "--only", "child")[1], "a child whose parent fails"


def test_results_follow_what_a_row_asks_for_not_its_name(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    first = table(tmp_path)
    swapped = ROWS.replace('"b"', '"x"').replace('"c"', '"b"').replace('"x"', '"c"')
    status, said = drive(swapped)
    assert status == 0 and "8 of them done before" in said
    score = {line.split("|")[1].strip(): line.split("|")[3] for text in (first, table(tmp_path))
             for line in text.splitlines() if line.startswith(("| b |", "| c |")) and line.count("|") > 10}
    assert float(score["c"]) < float(score["b"]), "c is now what b was"
    changed = ROWS.replace("matrix_lr = 0.1", "matrix_lr = 0.15")
    assert drive(changed)[0] == 0 and "1.6500" in table(tmp_path)
    assert drive(ROWS)[0] == 0 and table(tmp_path) == first


def test_results_of_before_are_still_found(tmp_path, drive, monkeypatch):
    """A line without a setting that came later, and one of a technique that was a patch then."""
    text = MATRIX + '[[row]]\nname = "gate"\nwhy = "x"\nset = {smear = true}\n'
    text += '[[row]]\nname = "child"\nwhy = "x"\ninit_from = "gate"\n'
    assert drive(text)[0] == 0
    path = tmp_path / "results/test/results.jsonl"
    old = runner.read_results(path)
    for line in old:
        assert line["settings"].pop("smear") == (line["row"] == "gate")
        line["patches"] = ["smear"] if line["row"] == "gate" else []
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    first = table(tmp_path)
    assert drive(text, "--report")[0] == 0 and table(tmp_path) == first
    path.write_text("".join(json.dumps(line | {"patches": []}) + "\n" for line in old))
    assert drive(text, "--report")[0] == 0 and "| gate | 0 |" in table(tmp_path)


def test_a_result_without_its_parents_is_nobodys(tmp_path, drive):
    """Without knowing what it started from, a child looks like a run from scratch."""
    text = ROWS + '[[row]]\nname = "child"\nwhy = "x"\ninit_from = "b"\n'
    assert drive(text)[0] == 0
    path = tmp_path / "results/test/results.jsonl"
    lines = [line for line in runner.read_results(path) if line["row"] != "b"]
    path.write_text("".join(json.dumps(line | {"val_bpb": 9.0} if line["row"] == "child" else line) + "\n"
                            for line in lines))
    assert drive(text, "--report")[0] == 0
    assert "| a | 2 | 1.5400 |" in table(tmp_path) and "| child | 0 |" in table(tmp_path)


def test_lines_that_start_from_each_other_are_nobodys(tmp_path, drive):
    assert drive(ROWS)[0] == 0
    path = tmp_path / "results/test/results.jsonl"
    lines = runner.read_results(path)
    for line, other in ((lines[0], lines[0]), (lines[1], lines[2]), (lines[2], lines[1])):
        line["parent"] = other["id"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = drive(ROWS, "--report")
    assert status == 0 and "Traceback" not in said and "| a | 1 |" in table(tmp_path)


def test_a_parent_whose_files_are_gone_runs_again(tmp_path, drive):
    text = MATRIX + '[[row]]\nname = "child"\nwhy = "x"\nscore_of = "a"\nscore_patches = ["ttt=none"]\n'
    drive(text, "--only", "a")
    said = drive(text)[1]
    assert "4 runs, 0 of them done before" in said, "the stub writes no artifact"


def test_a_row_that_ran_again_for_its_files_keeps_its_result(tmp_path, drive, monkeypatch):
    text = MATRIX + '[[row]]\nname = "child"\nwhy = "x"\nscore_of = "a"\nscore_patches = ["ttt=none"]\n'
    monkeypatch.setattr(runner, "train_results", lambda *args: stub_results(*args) | {"artifact_sha256": "one"})
    drive(text, "--only", "a")
    path = tmp_path / "results/test/results.jsonl"
    first = path.read_text()
    monkeypatch.setattr(runner, "train_results", lambda *args: stub_results(*args) | {"artifact_sha256": "two"})
    said = drive(text)[1]
    assert path.read_text().startswith(first) and "seed 1: another model than before" in said
    assert [x["row"] for x in runner.read_results(path)] == ["a", "a", "child", "child"]


def test_a_gap_is_a_failure_unless_it_is_the_point(tiny_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.safetensors", "model.tern"):
        (folder / name).symlink_to(tiny_run[0] / name)
    records = runner.read_metrics(tiny_run[0])
    config = Config(**records[0]["settings"])
    row = matrices.Row("r", "", {}, (), (1337,), "", "", (), "mlp_hidden", "")
    job = matrices.Job(row, 1337, config, "source", "data")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert runner.train_results(folder, job)["gap"] == 0
    for change in ({"roundtrip_gap": 1e-8}, {"logits_identical": False}):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r | change) + "\n" for r in records))
        with pytest.raises(ValueError, match="not the model that was trained"):
            runner.train_results(folder, job)
    opens = matrices.Job(matrices.replace(row, patches=("unrounded_scales",)), 1337, config, "source", "data")
    assert runner.train_results(folder, opens)["logits_identical"] is False


def test_a_damaged_result_is_one_clear_error(tmp_path, drive):
    assert drive(ROWS, "--only", "a")[0] == 0
    path = tmp_path / "results/test/results.jsonl"
    good = path.read_text()
    scoreless = {k: v for k, v in json.loads(good.splitlines()[0]).items() if k not in ("val_bpb", "message")}
    for bad in (b"[]", b'{"id": 1}', b"{", b"null", b"\xff", json.dumps(scoreless).encode(),
                json.dumps(scoreless | {"status": "failed"}).encode(),
                json.dumps(json.loads(good.splitlines()[0]) | {"formats": 3}).encode()):
        path.write_bytes(bad + b"\n" + good.encode())
        status, said = drive(ROWS)
        assert status == 1 and "line 1: not a line of results" in said and "Traceback" not in said


def test_two_runners_do_not_share_a_matrix(tmp_path, drive):
    results = runner.Results(tmp_path / "results/test/results.jsonl")
    status, said = drive(ROWS)
    assert status == 1 and "another runner is at work" in said
    results.close()


def test_timed_runs_are_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TIMED", tmp_path / "lock")
    order = []

    def hold(timed: bool, name: str) -> None:
        with runner.machine_to_itself(timed):
            order.append(("in", name))
            time.sleep(0.2)
            order.append(("out", name))

    threads = [threading.Thread(target=hold, args=(timed, name)) for timed, name in ((True, "x"), (True, "y"),
                                                                                   (False, "z"))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name in "xy":
        at = order.index(("in", name))
        assert order[at + 1] == ("out", name)


def test_a_real_run_is_measured_and_proved(tiny_run, data_dir):
    folder = tiny_run[0]
    tensors, _ = pack.read_artifact(folder / "model.tern")
    config = Config(**json.loads(json.dumps(runner.read_metrics(folder)[0]["settings"])))
    assert diagnose.prove_active(tensors, config) == "ternary g32 log7: 12 matrices, 16,384 weights"
    found = diagnose.formats(folder, tensors)["matrices"]
    assert found["weights"] == 16384 and 0.3 < found["error"] < 0.6 and 0.9 < found["used"] <= 1
    assert found["zero_frac"] == pytest.approx(runner.read_metrics(folder)[-1]["score"]["model"]["zero_frac"])
    whole = pack.parse_header((folder / "model.tern").read_bytes())
    shares = pack.tensor_bytes(whole)  # codes and scales of the matrices share no stream with the int4 embedding here
    assert found["bits"] == pytest.approx(8 * sum(shares[n] for n in shares if n.startswith("blocks.")
                                                  and n.endswith(".weight")) / 16384, rel=0.01)
    assert config.embed_format == "bf16"
    assert runner.active(folder, tensors, config) == "ternary g32 log7: 12 matrices, 16,384 weights"
    assert not runner.active(folder, tensors, replace(config, matrix_format="bf16"))
    with pytest.raises(AuditError, match="tok_emb.weight is stored as bf16, not as int4"):
        runner.active(folder, tensors, replace(config, embed_format="int4"))


def test_an_embedding_is_proved_too():
    config = resolve_settings(["--preset=tiny", "--embed-format=int4"], {})[1]
    fmt = make_format(config, "embed_format")
    latent = torch.randn(config.vocab_size, config.model_dim, generator=torch.Generator().manual_seed(0))
    tensor = formats.to_pack(fmt.quantize(latent), fmt)
    said = diagnose.prove_embedding({"tok_emb.weight": tensor}, config)
    assert said.endswith(f"embedding, {latent.numel():,} weights")
    for wrong, message in (({}, "is not in the file"), ({"tok_emb.weight": formats.to_pack(
            fmt.quantize(0 * latent), fmt)}, "it holds nothing")):
        with pytest.raises(AuditError, match=message):
            diagnose.prove_embedding(wrong, config)
    with pytest.raises(AuditError, match="it is not quantized"):
        diagnose.prove_embedding({"tok_emb.weight": tensor}, replace(config, embed_format="bf16"))


def test_what_is_not_active_is_refused(tiny_run):
    tensors, _ = pack.read_artifact(tiny_run[0] / "model.tern")
    config = Config(**runner.read_metrics(tiny_run[0])[0]["settings"])
    name = "blocks.1.mlp.fc.weight"
    full = {n: pack.StoredTensor(t.shape, {"kind": "bf16"}, t.codes.astype(np.uint16), None)
            for n, t in tensors.items()}
    with pytest.raises(AuditError, match="stored as bf16"):
        diagnose.prove_active(full, config)
    with pytest.raises(AuditError, match="nothing is quantized"):
        diagnose.prove_active(full, replace(config, matrix_format="bf16"))
    with pytest.raises(AuditError, match="no matrices"):
        diagnose.prove_active({}, config)
    with pytest.raises(AuditError, match=f"{name} is not in the file"):
        diagnose.prove_active({n: t for n, t in tensors.items() if n != name}, config)
    with pytest.raises(AuditError, match=f"{name} is stored as bf16"):
        diagnose.prove_active(tensors | {name: full[name]}, config)
    t = tensors[name]
    with pytest.raises(AuditError, match="it holds nothing"):
        diagnose.prove_active(tensors | {name: pack.StoredTensor(t.shape, t.format, t.codes * 0, t.scales)}, config)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "line", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(tmp_path, drive):
    assert drive(ROWS.replace('"b"', '"b <i> & co"'))[0] == 0
    text = (tmp_path / "results/test/report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.outside and page.tags.count("svg") >= 5
    assert "b &lt;i&gt; &amp; co" in text and "<i>" not in text and "prefers-color-scheme: dark" in text
    assert "@media print" in text and "nan" not in text.replace("finance", "")


def test_the_front_is_what_nothing_beats():
    assert report.pareto([(1, 5), (2, 6), (2, 4), (3, 4), (4, 1)]) == [(1, 5), (2, 4), (4, 1)]


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e3))
def test_ticks_are_round_and_inside(low, span):
    found = report.ticks(low, low + span)
    assert 1 <= len(found) <= 8 or span < 1e-5
    assert all(low - 1e-6 <= t <= low + span + 1e-6 for t in found)


@pytest.mark.parametrize("path", sorted((ROOT / "ablations/matrices").glob("*.toml")), ids=lambda p: p.stem)
def test_every_matrix_in_the_repository_is_valid(path, monkeypatch):
    monkeypatch.setattr(matrices, "solved", lambda config, *_: config)  # which takes most of a minute, and has a test
    m = matrices.read_matrix(path)
    assert matrices.jobs(m, dict.fromkeys(matrices.data_folders(m), "d")) and m.name == path.stem


@pytest.mark.parametrize("folder", sorted((ROOT / "ablations/results").iterdir()), ids=lambda p: p.name)
def test_committed_reports_are_those_of_their_lines(folder):
    """Also after a preset has changed: a matrix that was run says what it ran."""
    m = matrices.read_matrix(ROOT / f"ablations/matrices/{folder.name}.toml")
    committed, lines = (folder / "report.md").read_text(), runner.read_results(folder / "results.jsonl")
    if m.equal_bytes:  # solving widths takes most of a minute: the settings that are not solved have to agree
        m = replace(m, equal_bytes=0)
        for job in matrices.jobs(m, dict.fromkeys(matrices.data_folders(m), "")):
            solved = {job.row.solve: 0}
            assert any(matrices.LATER | x["settings"] | solved == job.settings | solved for x in lines), job.row.name
        return
    asked = matrices.jobs(m, dict.fromkeys(matrices.data_folders(m), ""))
    assert report.markdown(m, report.summarize(m, asked, lines)) == committed


def test_a_run_whose_runner_is_gone_before_it_looks_ends_at_once(data_dir, tmp_path):
    command = [sys.executable, str(ROOT / "ablations/program.py"), "train", *tiny_args(data_dir, tmp_path)]
    env = os.environ | {runner.program.PARENT: "1"}
    done = subprocess.run(command, env=env, start_new_session=True, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_program_applies_patches_in_both_processes(data_dir, tmp_path):
    args = tiny_args(data_dir, tmp_path, "--iterations", 3, "--checkpoint-every", 0)
    command = [sys.executable, str(ROOT / "ablations/program.py"), "--patch", "bigram=64,8", "train", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical bit for bit" in done.stdout
    tensors, _ = pack.read_artifact(tmp_path / "tiny_seed1337/model.tern")
    assert "bigram_scale" in tensors
    command[2:4] = ["--patch", "blur"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no patch 'blur'")
