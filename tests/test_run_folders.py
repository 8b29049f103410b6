"""A run's folder: finished work is never touched, one run at a time, and what happens when a file cannot be written."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import train_gpt
from conftest import (
    NAME,
    PATIENCE,
    ROOT,
    Held,
    clean_env,
    ended,
    hook_after_steps,
    is_one_error,
    metrics,
    run,
    started,
    tiny_args,
    tiny_trainer,
)
from tern.checkpoints import FILE, read_state
from tern.runfolder import RunExists, finished_run, lock_folder

SHORT = ["--iterations", "4", "--checkpoint-every", "2", "--eval-stride", "0"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def copied(tiny_run, tmp_path) -> Path:
    """A finished run's folder of one's own."""
    folder = tmp_path / NAME
    folder.mkdir()
    for path in tiny_run[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def train(capsys, *argv: object) -> tuple[int, str, str]:
    status = train_gpt.main(tiny_args(*argv))
    return status, *capsys.readouterr()


def refused(status: int, _out: str, err: str) -> bool:
    return is_one_error(status, err)


def resume(capsys, *argv: object) -> tuple[int, str, str]:
    return train(capsys, *argv, "--resume", "auto")


# -- runs that are there -------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_over_and_resuming_it_says_so(tiny_run, data_dir, tmp_path, capsys):
    folder = copied(tiny_run, tmp_path)
    before = contents(folder)
    for more in ([], ["--matrix-lr", "0.01"]):
        result = train(capsys, data_dir, tmp_path, *more)
        assert refused(*result) and "--run-id" in result[2] and NAME in result[2]
    status, out, err = resume(capsys, data_dir, tmp_path)
    assert status == 0 and "is finished" in out and out.count("\n") == 1 and not err
    result = resume(capsys, data_dir, tmp_path, "--matrix-lr", "0.01")
    assert refused(*result) and "matrix_lr=0.04 (now 0.01)" in result[2]
    assert contents(folder) == before


@pytest.mark.parametrize("left", ["model.tern", "score.json", "log"])
def test_what_is_left_of_a_run_is_not_overwritten(tiny_run, data_dir, tmp_path, capsys, left):
    folder = tmp_path / NAME
    folder.mkdir()
    for name in ("log.txt", "metrics.jsonl") if left == "log" else (left,):
        (folder / name).write_bytes((tiny_run[0] / name).read_bytes())
    before = contents(folder)
    assert refused(*train(capsys, data_dir, tmp_path)) and refused(*resume(capsys, data_dir, tmp_path))
    assert contents(folder) == before


def test_a_run_that_was_trained_and_not_scored_is_finished_by_resume(tiny_run, data_dir, tmp_path, capsys):
    """Killed while it packed or scored: what is missing is made, from the same bits."""
    folder = copied(tiny_run, tmp_path)
    (folder / "score.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["type"] == "final"
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # torn
    (folder / ".model.tern.0a0a0a0a.tmp").write_bytes(b"half")
    assert refused(*train(capsys, data_dir, tmp_path))
    assert resume(capsys, data_dir, tmp_path)[0] == 0
    assert (folder / "model.tern").read_bytes() == (tiny_run[0] / "model.tern").read_bytes()
    assert (folder / "score.json").exists() and not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("damage", [b"\n\n", b'{"type": "fin'])
def test_a_damaged_log_does_not_undo_a_finished_run(tiny_run, data_dir, tmp_path, capsys, damage):
    folder = copied(tiny_run, tmp_path)
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(damage)
    before = contents(folder)
    status, out, _ = resume(capsys, data_dir, tmp_path)
    assert status == 0 and "is finished" in out and refused(*train(capsys, data_dir, tmp_path))
    assert contents(folder) == before


def test_a_file_that_is_not_the_model_ends_no_run(tiny_run, data_dir, tmp_path, capsys, monkeypatch):
    """Found to be another model, it is told; the run is not finished, and is scored again when resumed."""
    folder = copied(tiny_run, tmp_path)
    (folder / "metrics.jsonl").write_bytes(b"")
    (folder / "score.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.metric, "same_logits", lambda *_: False)
        status, _, err = resume(capsys, data_dir, tmp_path)
    assert status == 1 and err.count("\n") == 1, err
    assert f"error: {folder / 'model.tern'} is not the model that was trained: gap +0.00000000, logits differ" in err
    status, out, _ = resume(capsys, data_dir, tmp_path)
    assert status == 0 and "is finished" not in out
    final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["logits_identical"] and final["roundtrip_gap"] == 0
    assert "is finished" in resume(capsys, data_dir, tmp_path)[1]
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"roundtrip_gap": 0.0', '"roundtrip_gap": 0.25'))
    assert finished_run(folder) is None


def test_a_run_that_finishes_while_another_starts_is_left_alone(tiny_run, data_dir, tmp_path, capsys, monkeypatch):
    before = {}

    class Late(train_gpt.Trainer):
        def set_up(self) -> None:
            before.update(contents(copied(tiny_run, tmp_path)))
            super().set_up()

    monkeypatch.setattr(train_gpt, "Trainer", Late)
    status, out, err = resume(capsys, data_dir, tmp_path)
    after = contents(tmp_path / NAME)
    del before[".lock"], after[".lock"]  # which says who looked last
    assert status == 0 and "is finished" in out and not err and after == before


# -- two at once ---------------------------------------------------------------------------------------------------


def test_two_at_once_one_runs_and_one_is_told(data_dir, tmp_path):
    argv = tiny_args(data_dir, tmp_path, *SHORT)
    with Held(1, argv) as first:
        told = run(*argv)
        assert is_one_error(told.returncode, told.stderr)
        assert f"at work in it (process {first.process.pid} on" in told.stderr
        done = first.end()
    assert done.returncode == 0, done.stderr
    kinds = [r["type"] for r in map(json.loads, (tmp_path / NAME / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("header") == kinds.count("final") == 1  # and every line is whole
    assert (tmp_path / NAME / "model.tern").exists()


def test_a_dead_process_leaves_no_lock(tmp_path):
    program = ("import pathlib, sys; from tern.runfolder import lock_folder; "
               "lock = lock_folder(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.readline()")
    process = started(sys.executable, "-c", program, tmp_path)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(RunExists, match=f"process {process.pid} on"):
        lock_folder(tmp_path)
    process.send_signal(signal.SIGKILL)
    assert ended(process).returncode == -signal.SIGKILL
    lock_folder(tmp_path).close()


# -- what else may lie in a folder ---------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_folder_that_cannot_be_made_is_one_error(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    result = train(capsys, data_dir, tmp_path / "file")
    assert refused(*result) and "--out-dir" in result[2]


@pytest.mark.fast
@pytest.mark.parametrize("name", [FILE, "model.tern", "score.json"])
def test_a_folder_in_place_of_a_file_is_found_before_training(data_dir, tmp_path, capsys, name):
    (tmp_path / NAME / name).mkdir(parents=True)
    result = resume(capsys, data_dir, tmp_path)
    assert refused(*result) and f"{name} is not a file" in result[2]


@pytest.mark.fast
def test_only_our_own_halves_are_removed(data_dir, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    mine = [".mine.tmp", ".model.tern.tmp", "model.tern.0a0a0a0a.tmp", ".notes.0a0a0a0a.tmp"]
    halves = [".model.tern.0a0a0a0a.tmp", ".score.json.0a0a0a0a.tmp", "..score.json.0a0a0a0a.tmp.0b0b0b0b.tmp",
              f".{FILE}.00ff00ff.tmp", ".details.json.0a0a0a0a.tmp", "..details.json.0a0a0a0a.tmp.0b0b0b0b.tmp",
              ".report.html.0a0a0a0a.tmp"]
    for name in mine + halves:
        (folder / name).write_text("x")
    with closing(tiny_trainer(data_dir, tmp_path).folder):
        assert all((folder / name).exists() for name in mine) and not any((folder / name).exists() for name in halves)


@pytest.mark.fast
def test_a_run_id_stays_below_the_out_dir(data_dir, tmp_path, capsys):
    for run_id in (".", "..", "/", "/tmp/x", "a/../b", "a//b"):
        status, _, err = train(capsys, data_dir, tmp_path, "--run-id", run_id)
        assert status == 2 and err.startswith("error: run_id=") and err.count("\n") == 1, run_id
    assert not os.listdir(tmp_path)


# -- files that cannot be written ----------------------------------------------------------------------------------

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this machine has no /dev/full")


@needs_full
@pytest.mark.fast
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_log_that_cannot_be_written_ends_the_run_before_it_begins(data_dir, tmp_path, capsys, name):
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    result = train(capsys, data_dir, tmp_path)
    assert refused(*result) and str(folder / name) in result[2] and "No space left" in result[2]
    assert (folder / name).is_symlink() and not (folder / FILE).exists()


def test_a_log_that_fails_later_costs_the_log_and_not_the_model(data_dir, tmp_path, capsys, monkeypatch):
    """The reader of a pipe that is the log goes away."""
    folder = tmp_path / NAME
    folder.mkdir()
    os.mkfifo(folder / "metrics.jsonl")
    reader = os.open(folder / "metrics.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    hook_after_steps(monkeypatch, lambda trainer: os.close(reader) if trainer.step == 2 else None)
    result = train(capsys, data_dir, tmp_path, *SHORT)
    assert refused(*result) and "metrics.jsonl: Broken pipe" in result[2]
    assert "model.tern and its score are there and whole" in result[2] and result[2].strip() in (
        folder / "log.txt").read_text()
    assert (folder / "model.tern").exists() and (folder / "score.json").exists() and read_state(folder)["finished"]


@pytest.mark.parametrize("always", [False, True])
def test_a_checkpoint_that_cannot_be_written_does_not_end_training(data_dir, tmp_path, monkeypatch, capsys, always):
    """Something else is in its place at step 2, and still at the end or no longer."""
    place, seen = tmp_path / NAME / FILE, []

    def after(trainer) -> None:
        seen.append(trainer.step)
        if trainer.step == 1:
            place.mkdir()
        elif trainer.step == 3 and not always:
            place.rmdir()

    hook_after_steps(monkeypatch, after)
    result = train(capsys, data_dir, tmp_path, *SHORT)
    assert seen == [1, 2, 3, 4] and "notice      step 2: cannot write" in result[1] and "training goes on" in result[1]
    if always:
        assert refused(*result) and f"cannot write {place}" in result[2]
    else:
        assert result[0] == 0 and read_state(place)["finished"]
    assert (tmp_path / NAME / "model.tern").exists()


@needs_full
@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_terminal_that_is_gone_does_not_end_a_run(data_dir, tmp_path, where):
    command = [sys.executable, str(ROOT / "train_gpt.py"), *tiny_args(data_dir, tmp_path, *SHORT)]
    if where == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" >&- <&-', "sh", *command]
    with open("/dev/full" if where == "full" else os.devnull, "w") as out:
        done = subprocess.run(command, cwd=ROOT, env=clean_env(), stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert metrics(tmp_path / NAME, "final")


# -- how a run ends ------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_an_error_that_nobody_expected_is_one_line(data_dir, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise LookupError("a\nb")

    hook_after_steps(monkeypatch, fail)
    result = train(capsys, data_dir, tmp_path)
    assert refused(*result) and "LookupError at test_run_folders.py" in result[2] and "TRACEBACK=1" in result[2]
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(LookupError):
        train_gpt.main(tiny_args(data_dir, tmp_path / "b"))


# The trainer, with a scoring program that says when it begins and then takes its time.
SLOW_TO_SCORE = """
import sys, train_gpt
train_gpt.scoring_command = lambda: ["-c", sys.argv.pop(1)]
sys.exit(train_gpt.main(sys.argv[2:]))
"""
SLOW_SCORE = """
import eval_bpb, pathlib, sys, time

def score(*_):
    with open(pathlib.Path(sys.argv[1]).parent / "pipe", "w") as pipe:  # which closes when this process is gone
        print("scoring", file=pipe, flush=True)
        time.sleep(3600)

eval_bpb.score_file = score
sys.exit(eval_bpb.main())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_while_it_is_scored_takes_the_scorer_with_it(data_dir, tmp_path, signum):
    """Or it would go on in a folder where the next run is at work."""
    folder = tmp_path / NAME
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = started(sys.executable, "-c", SLOW_TO_SCORE, SLOW_SCORE, *tiny_args(data_dir, tmp_path, *SHORT),
                      PYTHONPATH=str(ROOT))
    assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 99) == b"scoring\n"
    process.send_signal(signum)
    done = ended(process)
    if signum == signal.SIGTERM:
        assert done.returncode == 128 + signum and "packs and scores" in done.stdout and not done.stderr
    assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 99) == b"", "the scorer is gone"
    os.close(reader)
    assert not [p.name for p in folder.iterdir() if "score" in p.name]
    assert read_state(folder)["finished"]
