"""The program as a user runs it: whole runs at preset tiny, killed, interrupted, compiled."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

import pack
import train_gpt
from conftest import (
    NAME,
    Held,
    ended,
    hook_after_steps,
    is_one_error,
    metrics,
    run,
    started,
    tiny_args,
    tiny_trainer,
)
from eval_bpb import load_artifact
from tern import metric, source
from tern.checkpoints import FILE, read_checkpoint, read_state
from tern.machine import can_compile
from tern.shards import open_data, read_shard

needs_compiler = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")


# -- what a run leaves -------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_final_block(tiny_run):
    folder, done = tiny_run
    out = done.stdout
    assert "roundtrip gap             0.00000000   (logits identical bit for bit)" in out
    for phase in ("load", "compile", "train", "pack", "score"):
        assert re.search(rf"^\[{phase}\] \d+\.\d s", out, re.M), phase
    assert re.search(r"bytes .* FITS, margin [\d,]+$", out, re.M)
    final = metrics(folder, "final")[0]
    assert final["roundtrip_gap"] == 0.0 and final["logits_identical"] is True
    assert final["bytes_model"] == (folder / "model.tern").stat().st_size
    assert final["bytes_code"] == len(source.one_file(source.read_sources()))
    assert final["memory"]["val_loss"] == final["score"]["chunked"]["val_loss"]
    first, last = metrics(folder, "train")[0], metrics(folder, "train")[-1]
    state = read_state(folder)
    assert state["position"] == state["tokens_seen"] == last["tokens_seen"] == 30 * 1024  # no token skipped or repeated
    assert last["step"] == 30 and last["loss"] < first["loss"] - 0.3


def test_the_fields_log_grammar_and_the_header(tiny_run):
    folder, _ = tiny_run
    text = (folder / "log.txt").read_text()
    assert re.search(r"^step:30/30 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms", text, re.M)
    assert re.search(r"^final_ternary_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", text, re.M)
    assert re.search(r"^final_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", text, re.M)
    header = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert header["type"] == "header" and isinstance(header["schema"], int)
    assert {"settings", "machine", "source_sha256", "data", "data_sha256", "origin"} <= header.keys()
    assert header["source_sha256"].keys() == set(source.code_files())
    for name, program in source.read_sources().items():  # the log holds its source
        assert f" {name}\n{program.decode()}" in text, name


def test_artifact_and_checkpoint_name_tokenizer_and_data(tiny_run, data_dir):
    _, meta = pack.read_artifact(tiny_run[0] / "model.tern")
    data = open_data(data_dir)
    assert meta["tokenizer"] == data.tokenizer_sha256 == read_state(tiny_run[0])["tokenizer"]
    assert data.identity.startswith(meta["data"]) and data.identity == read_state(tiny_run[0])["data"]


def test_verify_against_the_checkpoint(tiny_run, tmp_path, capsys):
    folder, _ = tiny_run
    assert pack.main(["verify", str(folder / "model.tern"), "--against", str(folder)]) == 0
    tensors, meta = pack.read_artifact(folder / "model.tern")
    codes = tensors["blocks.1.mlp.fc.weight"].codes
    codes[3, 4] = (codes[3, 4] + 2) % 3 - 1
    pack.write_artifact(tmp_path / "other.tern", tensors, meta)
    assert pack.main(["verify", str(tmp_path / "other.tern"), "--against", str(folder)]) == 1
    assert "blocks.1.mlp.fc.weight" in capsys.readouterr().err


def test_what_is_not_compiled_does_not_load_the_compiler(data_dir, tmp_path):
    """It takes 2 s, in each of the hundreds of processes that such tests start."""
    argv, score = tiny_args(data_dir, tmp_path, "--iterations", 2), [tmp_path / NAME / "model.tern", "--data", data_dir]
    program = (f"import sys, train_gpt, eval_bpb; sys.exit(train_gpt.main({argv}) "
               f"or eval_bpb.main({list(map(str, score))}) or 'torch._dynamo' in sys.modules)")
    done = ended(started(sys.executable, "-c", program))
    assert done.returncode == 0, done.stdout + done.stderr


# -- killed and resumed ------------------------------------------------------------------------------------------


def check_same_end(folder, whole) -> None:
    """Of a run that was cut and resumed, and of one that went through: every bit of the artifact and the checkpoint."""
    assert (folder / "model.tern").read_bytes() == (whole / "model.tern").read_bytes()
    mine, theirs = read_checkpoint(folder)[0], read_checkpoint(whole)[0]
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)


def test_sigkill_and_resume_give_the_same_artifact(tiny_run, data_dir, tmp_path, capsys):
    folder, argv = tmp_path / NAME, tiny_args(data_dir, tmp_path)
    with Held(13, argv) as running:
        assert running.end(signal.SIGKILL).returncode == -signal.SIGKILL
    assert read_state(folder)["step"] == 10 and not (folder / "model.tern").exists()
    assert is_one_error(train_gpt.main(argv), err := capsys.readouterr().err) and "--resume auto" in err
    other = train_gpt.main([*argv, "--resume", "auto", "--matrix-lr", "0.5"])
    assert is_one_error(other, err := capsys.readouterr().err) and "matrix_lr=0.04 (now 0.5)" in err
    done = run(*argv, "--resume", "auto")  # what it tried is not lost, and what is unfinished not thrown away
    assert done.returncode == 0, done.stderr
    assert [header["resumed_at"] for header in metrics(folder, "header")] == [0, 10]
    check_same_end(folder, tiny_run[0])


def test_each_signal_finishes_the_step_and_saves(tiny_run, data_dir, tmp_path):
    """SIGHUP is what a closed terminal sends."""
    folder = tmp_path / NAME
    argv = tiny_args(data_dir, tmp_path, "--resume", "auto", "--checkpoint-every", 0)
    for step, signum in ((3, signal.SIGTERM), (5, signal.SIGINT), (7, signal.SIGHUP)):
        with Held(step, argv) as running:
            done = running.end(signum)
        assert done.returncode == 128 + signum and "--resume auto" in done.stdout and not done.stderr, done.stderr
        state = read_state(folder)
        assert state["step"] == step and not state["finished"] and not (folder / "model.tern").exists()
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert [header["resumed_at"] for header in metrics(folder, "header")] == [0, 3, 5, 7]
    check_same_end(folder, tiny_run[0])


# -- errors of a user --------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("change", "status", "said"), [
    (["--data-path", "none"], 1, "python data/prepare.py"),
    (["--vocab-size", "1024"], 2, "--vocab-size 400"),
    (["--seed", "x"], 2, "seed='x'"),
    (["--train-batch-tokens", "960", "--micro-batch-tokens", "640"], 2, "train_batch_tokens=960"),
    (["--init-from", "none"], 1, "none: no such checkpoint"),
    (["--device", "cuda"], 2, "--device cpu"),
])
def test_errors_of_a_user_are_one_line(data_dir, tmp_path, capsys, monkeypatch, change, status, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_gpt.main(tiny_args(data_dir, tmp_path, *change)) == status
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / NAME / FILE).exists()


def test_a_model_that_copies_from_further_back_than_it_was_trained(data_dir, tmp_path):
    """Trained in windows of 64, of which attention sees 40, and scored in windows of 512, as the file says."""
    argv = ["--copy-dim", 16, "--attn-window", 40, "--eval-seq-len", 512, "--eval-stride", 256, "--iterations", 4]
    done = run(*tiny_args(data_dir, tmp_path, *argv))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "roundtrip gap             0.00000000   (logits identical bit for bit)" in done.stdout
    assert "(stride 256, window 512, " in done.stdout
    folder = tmp_path / NAME
    score = json.loads((folder / "score.json").read_text())
    assert (score["seq_len"], score["stride"]) == (512, 256)
    again = run(folder / "model.tern", "--data", data_dir, program="eval_bpb.py")
    assert "stride 128, window 512, " in again.stdout, again.stderr  # a quarter of it
    model = load_artifact(folder / "model.tern")
    tokens = read_shard(open_data(data_dir).val[0])[:257].astype(np.int64)
    ids, targets = torch.from_numpy(tokens[None, :-1]), torch.from_numpy(tokens[None, 1:])
    with torch.inference_mode():
        losses = metric.position_losses(model, ids, targets, torch.ones_like(ids, dtype=torch.bool))
        others = ids.clone()
        others[0, :20] = (ids[0, :20] + 1) % model.config.vocab_size
        changed = metric.position_losses(model, others, targets, torch.ones_like(ids, dtype=torch.bool))
    assert (losses != changed)[-64:].any()  # what attention of two layers of 40 cannot have seen


# -- compiled ----------------------------------------------------------------------------------------------------


def test_a_compiler_that_changes_the_model_is_caught_and_nothing_is_lost(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: name)  # there is a compiler
    argv = ["--compile", 1, "--iterations", 3]
    for factor in (1.001, 1.01):  # as bf16 rounds at another place; as another function would train
        monkeypatch.setattr(torch, "compile", lambda model, factor=factor, **_: lambda *batch: model(*batch) * factor)
        out = tmp_path / str(factor)
        trainer = tiny_trainer(data_dir, out, *argv)
        with closing(trainer.folder):
            wrong = pytest.raises(train_gpt.TrainingError, match="torch.compile changed the model")
            with wrong if factor > 1.002 else nullcontext():
                trainer.train()
        state = read_state(out / NAME)
        assert state["step"] == 3 and state["finished"]


COMPILED = ["--compile", 1, "--threads", 2, "--warmup-steps", 1, "--iterations", 8, "--eval-stride", 0, "--smear", 1,
            "--key-offset", 1, "--copy-dim", 16, "--attn-window", 40]


@pytest.fixture(scope="module")
def compiled_run(data_dir, tmp_path_factory) -> train_gpt.Trainer:
    """A run in this process, compiled and on two threads, from beginning to end."""
    threads, seen = torch.get_num_threads(), []
    with pytest.MonkeyPatch.context() as patch:
        hook_after_steps(patch, seen.append)
        assert train_gpt.main(tiny_args(data_dir, tmp_path_factory.mktemp("compiled"), *COMPILED)) == 0
    torch.set_num_threads(threads)
    return seen[-1]


@needs_compiler
def test_logits_are_bit_identical_compiled_and_eager(compiled_run, data_dir):
    """Of the trained model and of the one from the file, both ways."""
    models = compiled_run.model, load_artifact(compiled_run.folder.path / "model.tern")
    ids = torch.from_numpy(read_shard(next(data_dir.glob("*_val_*.bin")))[:512].astype("int64")).view(8, 64)
    with torch.inference_mode():
        eager = [m.head(m.hidden(ids)) for m in models]
        compiled = [torch.compile(lambda x, m=m: m.head(m.hidden(x)), fullgraph=True)(ids) for m in models]
    assert torch.equal(*eager) and torch.equal(*compiled)
    assert not torch.equal(eager[0], torch.zeros_like(eager[0]))


@needs_compiler
def test_compiled_training_on_two_threads_is_deterministic(compiled_run, data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path, *COMPILED, "--write-page", 1))
    assert done.returncode == 0 and "\nnotice" not in done.stdout, done.stdout + done.stderr
    mine, theirs = tmp_path / NAME, compiled_run.folder.path
    assert (mine / "model.tern").read_bytes() == (theirs / "model.tern").read_bytes()
    assert "What it is bad at" in (mine / "report.html").read_text(encoding="utf-8"), "a run ends with its page"


def test_a_run_leaves_what_is_behind_its_score(tiny_run):
    folder = tiny_run[0]
    score, details = (json.loads((folder / name).read_text()) for name in ("score.json", "details.json"))
    assert details["artifact"] == score["artifact"] and details["inspection"]["bytes"] == score["artifact"]["bytes"]
    for key, kind in (("lengths", "sliding"), ("positions", "chunked")):
        bins, whole = details["spread"][key], score[kind]
        assert sum(b["bytes"] for b in bins) == whole["bytes"] and sum(b["tokens"] for b in bins) == whole["tokens"]
        assert sum(b["nats"] for b in bins) == pytest.approx(whole["val_loss"] * whole["tokens"], rel=1e-6)
    assert not list(folder.glob(".*.tmp")), "nothing half-written"
