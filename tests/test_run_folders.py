"""A run's folder: finished work is never touched, one run at a time, and what happens when a file cannot be written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pack
import runlog
import train_gpt
from conftest import ROOT, clean_env, metrics, start, tiny_args
from eval_bpb import Place

NAME = "tiny_seed1337"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def one_error(status: int, err: str) -> bool:
    return status == 1 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def copied(tiny_run, tmp_path) -> Path:
    """A finished run's folder of one's own."""
    folder = tmp_path / NAME
    folder.mkdir()
    for path in tiny_run[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("more", [[], ["--matrix-lr", "0.01"], ["--seed", "1337"]])
def test_a_finished_run_is_not_run_over(tiny_run, data_dir, tmp_path, capsys, more):
    folder = copied(tiny_run, tmp_path)
    before = contents(folder)
    status = train_gpt.run(tiny_args(data_dir, tmp_path, *more))
    err = capsys.readouterr().err
    assert one_error(status, err) and "--run-id" in err and NAME in err
    assert contents(folder) == before


def test_resume_of_a_finished_run_says_so_and_touches_nothing(tiny_run, data_dir, tmp_path, capsys):
    folder = copied(tiny_run, tmp_path)
    before = contents(folder)
    for _ in range(2):
        assert train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto")) == 0
        out, err = capsys.readouterr()
        assert "is finished" in out and out.count("\n") == 1 and not err
    status = train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto", "--matrix-lr", "0.01"))
    err = capsys.readouterr().err
    assert one_error(status, err) and "matrix_lr=0.04 (now 0.01)" in err
    assert contents(folder) == before
    assert pack.main(["bundle", str(folder), "--out", str(tmp_path / "bundle")]) == 0  # one header, one final record


@pytest.mark.parametrize("left", ["model.tern", "score.json"])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_what_is_left_of_a_run_is_not_overwritten(tiny_run, data_dir, tmp_path, capsys, left, resume):
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / left).write_bytes((tiny_run[0] / left).read_bytes())
    before = contents(folder)
    status = train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", resume))
    assert one_error(status, capsys.readouterr().err) and contents(folder) == before


def test_a_run_that_was_trained_and_not_scored_is_finished_by_resume(tiny_run, data_dir, tmp_path, capsys):
    """Killed while it packed or scored: what is missing is made, from the same bits."""
    folder = copied(tiny_run, tmp_path)
    (folder / "score.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["type"] == "final"
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # torn
    (folder / ".model.tern.0a0a0a0a.tmp").write_bytes(b"half")
    assert one_error(train_gpt.run(tiny_args(data_dir, tmp_path)), capsys.readouterr().err)
    assert train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto")) == 0
    assert (folder / "model.tern").read_bytes() == (tiny_run[0] / "model.tern").read_bytes()
    assert (folder / "score.json").exists() and not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def test_two_at_once_one_runs_and_one_is_told(data_dir, tmp_path):
    argv = tiny_args(data_dir, tmp_path, "--iterations", 15)
    both = [start(*argv) for _ in range(2)]
    ends = [(*p.communicate(timeout=120), p.returncode) for p in both]
    assert sorted(status for *_, status in ends) == [0, 1], ends
    told = next(err for _, err, status in ends if status)
    assert one_error(1, told) and ("at work in it (process" in told or "finished run" in told)
    kinds = [r["type"] for r in map(json.loads, (tmp_path / NAME / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("header") == kinds.count("final") == 1  # and every line is whole
    assert (tmp_path / NAME / "model.tern").exists()


def test_a_dead_process_leaves_no_lock(tmp_path):
    program = "import sys, time, train_gpt, pathlib; lock = train_gpt.lock_folder(pathlib.Path(sys.argv[1])); " \
              "print('locked', flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=clean_env(),
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(train_gpt.RunExists, match=f"process {process.pid} on"):
        train_gpt.lock_folder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_gpt.lock_folder(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_one_error(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = train_gpt.run(tiny_args(data_dir, tmp_path / "file"))
    err = capsys.readouterr().err
    assert one_error(status, err) and "--out-dir" in err


# -- files that cannot be written ------------------------------------------------------------------------------------

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this machine has no /dev/full")


@needs_full
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_log_that_cannot_be_written_ends_the_run_before_it_begins(data_dir, tmp_path, capsys, name):
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    status = train_gpt.run(tiny_args(data_dir, tmp_path))
    err = capsys.readouterr().err
    assert one_error(status, err) and str(folder / name) in err and "No space left" in err
    assert (folder / name).is_symlink() and not (folder / "model.tern").exists()


@needs_full
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_disk_that_fills_later_costs_the_log_and_not_the_model(data_dir, tmp_path, name):
    trainer = ready(data_dir, tmp_path)
    trainer.log.files[name].close()
    trainer.log.files[name] = open("/dev/full", "w")
    trainer.train()
    with pytest.raises(train_gpt.TrainingError, match="No space left.*model.tern and its score are there"):
        trainer.finish()
    trainer.log.close()
    assert (trainer.folder / "model.tern").exists() and (trainer.folder / "score.json").exists()
    assert train_gpt.load_checkpoint(trainer.folder)[1]["finished"]


def ready(data_dir, tmp_path) -> train_gpt.Trainer:
    preset, config, origin, notices = train_gpt.resolve_settings(
        tiny_args(data_dir, tmp_path, "--iterations", 4, "--checkpoint-every", 2, "--eval-stride", 0), {})
    trainer = train_gpt.Trainer(preset, config, Place())
    trainer.set_up()
    trainer.preflight(origin, notices)
    trainer.warm_up()
    return trainer


@pytest.mark.parametrize("always", [False, True])
def test_a_checkpoint_that_cannot_be_written_does_not_end_training(data_dir, tmp_path, monkeypatch, always):
    real, tried = train_gpt.save_checkpoint, []

    def save(path, *rest):
        tried.append(path)
        if always or len(tried) == 1:
            raise pack.ArtifactError(f"cannot write {path}: No space left on device")
        real(path, *rest)

    monkeypatch.setattr(train_gpt, "save_checkpoint", save)
    trainer = ready(data_dir, tmp_path)
    trainer.train()
    assert trainer.step == 4 and len(tried) == 3
    if always:
        with pytest.raises(train_gpt.TrainingError, match="cannot write .*checkpoint.safetensors"):
            trainer.finish()
    else:
        trainer.finish()
    trainer.log.close()
    assert (trainer.folder / "model.tern").exists()
    assert "training goes on" in (trainer.folder / "log.txt").read_text()
    assert trainer.checkpoint_path.exists() == (not always)


@needs_full
def test_a_terminal_that_is_gone_does_not_end_a_run(data_dir, tmp_path):
    for name, where in (("full", "/dev/full"), ("closed", None)):
        argv = tiny_args(data_dir, tmp_path, "--iterations", 3, "--eval-stride", 0, "--run-id", name)
        command = [sys.executable, str(ROOT / "train_gpt.py"), *argv]
        if where is None:
            command = ["/bin/sh", "-c", 'exec "$@" >&- <&-', "sh", *command]
        with open(where or os.devnull, "w") as out:
            done = subprocess.run(command, cwd=ROOT, env=clean_env(), stdout=out, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert metrics(tmp_path / name, "final")


def test_a_log_says_once_what_it_could_not_write(tmp_path):
    log = runlog.Log(tmp_path, 0, append=False)
    log.line("ä ▁ 🤖", console=False)
    log.files["log.txt"].close()
    if os.path.exists("/dev/full"):
        log.files["log.txt"] = open("/dev/full", "w")
        with pytest.raises(OSError, match="/dev/full: No space left"):
            log.line("x", console=False)
        log.strict = False
        log.files["log.txt"] = open("/dev/full", "w")
        log.line("y", console=False)
        log.line("z", console=False)
        assert "No space left" in log.failed
    log.close()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "ä ▁ 🤖\n"


def test_a_closed_terminal_saves_the_run(data_dir, tmp_path):
    """SIGHUP, as from a lost connection, is a signal like SIGTERM."""
    process = start(*tiny_args(data_dir, tmp_path, "--iterations", 100_000, "--train-log-every", 1,
                               "--checkpoint-every", 0))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
            (tmp_path / NAME / "metrics.jsonl").exists() and metrics(tmp_path / NAME, "train")):
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, out + err
    assert train_gpt.load_checkpoint(tmp_path / NAME)[1]["step"] >= 1


def test_an_error_that_nobody_expected_is_one_line(data_dir, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise LookupError("a\nb")

    monkeypatch.setattr(train_gpt.Trainer, "train", fail)
    status = train_gpt.run(tiny_args(data_dir, tmp_path))
    err = capsys.readouterr().err
    assert one_error(status, err) and "LookupError at test_run_folders.py" in err and "TRACEBACK=1" in err
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(LookupError):
        train_gpt.run(tiny_args(data_dir, tmp_path / "b"))


# -- what else may lie in a folder -----------------------------------------------------------------------------------


def test_a_run_that_finishes_while_another_starts_is_left_alone(tiny_run, data_dir, tmp_path, capsys, monkeypatch):
    real, before = train_gpt.open_data, {}

    def meanwhile(*args):
        before.update(contents(copied(tiny_run, tmp_path)))
        return real(*args)

    monkeypatch.setattr(train_gpt, "open_data", meanwhile)
    assert train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto")) == 0
    out, err = capsys.readouterr()
    after = contents(tmp_path / NAME)
    del before[".lock"], after[".lock"]  # which says who looked last
    assert "is finished" in out and not err and after == before


@pytest.mark.parametrize("damage", [b"\n\n", b'{"type": "fin'])
def test_a_damaged_log_does_not_undo_a_finished_run(tiny_run, data_dir, tmp_path, capsys, damage):
    folder = copied(tiny_run, tmp_path)
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(damage)
    before = contents(folder)
    assert train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto")) == 0
    assert "is finished" in capsys.readouterr().out
    assert one_error(train_gpt.run(tiny_args(data_dir, tmp_path)), capsys.readouterr().err)
    assert contents(folder) == before


def test_the_log_of_a_finished_run_is_not_run_over(tiny_run, data_dir, tmp_path, capsys):
    folder = copied(tiny_run, tmp_path)
    for name in ("model.tern", "score.json", "checkpoint.safetensors"):
        (folder / name).unlink()
    before = contents(folder)
    assert one_error(train_gpt.run(tiny_args(data_dir, tmp_path)), capsys.readouterr().err)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.tern", "score.json"])
def test_a_folder_in_place_of_a_file_is_found_before_training(data_dir, tmp_path, capsys, name):
    (tmp_path / NAME / name).mkdir(parents=True)
    status = train_gpt.run(tiny_args(data_dir, tmp_path, "--resume", "auto"))
    err = capsys.readouterr().err
    assert one_error(status, err) and f"{name} is not a file" in err


def test_only_our_own_halves_are_removed(data_dir, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    mine = [".mine.tmp", ".model.tern.tmp", "model.tern.0a0a0a0a.tmp", ".notes.0a0a0a0a.tmp"]
    halves = [".model.tern.0a0a0a0a.tmp", ".score.json.0a0a0a0a.tmp", "..score.json.0a0a0a0a.tmp.0b0b0b0b.tmp",
              ".checkpoint.safetensors.00ff00ff.tmp"]
    for name in mine + halves:
        (folder / name).write_text("x")
    ready(data_dir, tmp_path).close()
    assert all((folder / name).exists() for name in mine) and not any((folder / name).exists() for name in halves)


@pytest.mark.parametrize("run_id", [".", "..", "/", "/tmp/x", "a/../b", "a//b"])
def test_a_run_id_stays_below_the_out_dir(data_dir, tmp_path, capsys, run_id):
    assert train_gpt.run(tiny_args(data_dir, tmp_path, "--run-id", run_id)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run_id=") and err.count("\n") == 1


def test_a_signal_while_scoring_ends_the_scorer_too(data_dir, tmp_path):
    process = start(*tiny_args(data_dir, tmp_path, "--iterations", 3))
    for line in process.stdout:
        if line.startswith("[pack]"):
            break
    time.sleep(0.5)  # the scoring process takes seconds to import what it needs
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "packs and scores" in out and not err
    time.sleep(6)
    assert not [p.name for p in (tmp_path / NAME).iterdir() if "score" in p.name]  # nobody goes on
