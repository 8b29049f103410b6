"""The program as a user runs it: whole runs at preset tiny, killed, interrupted, compiled."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest
import torch

import pack
import train_gpt
from conftest import metrics, run, start, tiny_args
from eval_bpb import Place, load_artifact, read_shard


def wait_for_step(folder, step: int, process) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read() + process.stderr.read())
        if (folder / "metrics.jsonl").exists() and any(r["step"] >= step for r in metrics(folder, "train")):
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


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
    assert final["memory"]["val_loss"] == final["score"]["chunked"]["val_loss"]
    first, last = metrics(folder, "train")[0], metrics(folder, "train")[-1]
    _, state = train_gpt.load_checkpoint(folder)
    assert state["position"] == state["tokens_seen"] == last["tokens_seen"] == 30 * 1024  # no token skipped or repeated
    assert last["step"] == 30 and last["loss"] < first["loss"] - 0.3


def test_a_run_with_int8_activations_has_no_gap(data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path, "--activation-bits", 8, "--group-size", 0, "--iterations", 5))
    assert done.returncode == 0, done.stderr
    assert "roundtrip gap             0.00000000   (logits identical bit for bit)" in done.stdout


def test_the_fields_log_grammar_and_the_header(tiny_run):
    folder, _ = tiny_run
    text = (folder / "log.txt").read_text()
    assert re.search(r"^step:30/30 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms", text, re.M)
    assert re.search(r"^final_ternary_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", text, re.M)
    assert re.search(r"^final_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$", text, re.M)
    assert "def newton_schulz" in text  # the log holds its source
    header = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert header["type"] == "header" and header["schema"] == 1
    assert {"settings", "machine", "source_sha256", "data", "data_sha256", "origin"} <= header.keys()
    assert header["source_sha256"].keys() == {p.name for p in pack.code_files()}


def test_the_same_seed_gives_the_same_bytes(tiny_run, data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny_seed1337/model.tern").read_bytes() == (tiny_run[0] / "model.tern").read_bytes()


def test_verify_against_the_checkpoint(tiny_run, tmp_path, capsys):
    folder, _ = tiny_run
    assert pack.main(["verify", str(folder / "model.tern"), "--against", str(folder)]) == 0
    tensors, meta = pack.read_artifact(folder / "model.tern")
    tensors["blocks.1.mlp.fc.weight"].codes[3, 4] = (tensors["blocks.1.mlp.fc.weight"].codes[3, 4] + 2) % 3 - 1
    pack.write_artifact(tmp_path / "other.tern", tensors, meta)
    assert pack.main(["verify", str(tmp_path / "other.tern"), "--against", str(folder)]) == 1
    assert "blocks.1.mlp.fc.weight" in capsys.readouterr().err


def test_sigkill_and_resume_give_the_same_artifact(tiny_run, data_dir, tmp_path):
    process = start(*tiny_args(data_dir, tmp_path))
    wait_for_step(tmp_path / "tiny_seed1337", 10, process)
    deadline = time.monotonic() + 60
    while not (tmp_path / "tiny_seed1337/checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "tiny_seed1337/model.tern").exists(), "killed too late to test anything"

    refused = run(*tiny_args(data_dir, tmp_path))
    assert refused.returncode == 1 and "--resume auto" in refused.stderr  # an unfinished run is not thrown away
    other = run(*tiny_args(data_dir, tmp_path, "--resume", "auto", "--matrix-lr", "0.5"))
    assert other.returncode == 1 and "matrix_lr=0.04 (now 0.5)" in other.stderr
    done = run(*tiny_args(data_dir, tmp_path, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "tiny_seed1337", "header")[1]["resumed_at"] in (10, 20)
    assert (tmp_path / "tiny_seed1337/model.tern").read_bytes() == (tiny_run[0] / "model.tern").read_bytes()
    mine, _ = train_gpt.load_checkpoint(tmp_path / "tiny_seed1337")
    theirs, _ = train_gpt.load_checkpoint(tiny_run[0])
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tiny_run, data_dir, tmp_path, signum):
    process = start(*tiny_args(data_dir, tmp_path, "--checkpoint-every", 0, "--train-log-every", 1))
    wait_for_step(tmp_path / "tiny_seed1337", 3, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out + err
    assert "--resume auto" in out
    _, state = train_gpt.load_checkpoint(tmp_path / "tiny_seed1337")
    assert 3 <= state["step"] < 30 and not state["finished"]
    done = run(*tiny_args(data_dir, tmp_path, "--resume", "auto", "--checkpoint-every", 0, "--train-log-every", 1))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny_seed1337/model.tern").read_bytes() == (tiny_run[0] / "model.tern").read_bytes()


def tiny_trainer(data_dir, tmp_path, *more):
    """A trainer in this process, set up and ready to train."""
    preset, config, origin, notices = train_gpt.resolve_settings(tiny_args(data_dir, tmp_path, *more), {})
    trainer = train_gpt.Trainer(preset, config, Place())
    trainer.set_up()
    trainer.preflight(origin, notices)
    return trainer


def test_a_compiler_that_changes_the_model_is_caught_and_nothing_is_lost(data_dir, tmp_path):
    trainer = tiny_trainer(data_dir, tmp_path, "--compile", 1, "--iterations", 3)
    trainer.compiled = lambda ids, targets: trainer.model(ids, targets) * 1.01  # as another function would train
    with pytest.raises(train_gpt.TrainingError, match="torch.compile changed the model"):
        trainer.train()
    _, state = train_gpt.load_checkpoint(tmp_path / "tiny_seed1337")
    assert state["step"] == 3 and state["finished"]
    trainer.compiled = lambda ids, targets: trainer.model(ids, targets) * 1.001  # as bf16 rounds at another place
    trainer.check_compiled()
    trainer.log.close()


def test_a_bad_activation_is_named(data_dir, tmp_path):
    trainer = tiny_trainer(data_dir, tmp_path)
    trainer.model.blocks[1].mlp.fc.weight.data[0, 0] = torch.inf
    trainer.warm_up()
    trainer.forward_backward(64, 1)
    assert "step 1: the output of blocks.1.mlp.fc is not finite" in str(trainer.diverged(torch.nan, 64))
    trainer.log.close()


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(data_dir, tmp_path, checkpoint_every):
    diverge = ["--tied-embed-lr", "3e37", "--lr-warmup-steps", 0, "--checkpoint-every", checkpoint_every]
    done = run(*tiny_args(data_dir, tmp_path, *diverge))
    assert done.returncode == 1
    assert re.search(r"^error: step 2: the gradient of skip_weights is not finite", done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "tiny_seed1337/model.tern").exists()
    assert done.stderr.strip() in (tmp_path / "tiny_seed1337/log.txt").read_text()
    if checkpoint_every:
        tensors, state = train_gpt.load_checkpoint(tmp_path / "tiny_seed1337")
        assert state["step"] == 1 and all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_the_wallclock_cap_is_kept(data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path, "--iterations", 10**6, "--max-wallclock-seconds", 2, "--eval-stride", 0,
                          "--val-loss-every", 20))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny_seed1337"
    assert 1.0 < metrics(folder, "final")[0]["seconds"]["train"] <= 2.2
    assert "stopping_early: wallclock_cap" in done.stdout and metrics(folder, "val")
    assert metrics(folder, "train")[-1]["lr_scale"] < 0.2  # the warmdown follows the clock


def test_ramps_run(data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path, "--seq-ramp-start", 16, "--batch-ramp-start", 512, "--micro-batch-tokens",
                          256, "--iterations", 12, "--train-log-every", 1, "--eval-stride", 0))
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "tiny_seed1337", "train")
    assert steps[0]["seq_len"] == 16 and steps[-1]["seq_len"] == 64
    assert steps[0]["tokens"] == 512 and steps[-1]["tokens"] == 1024


def test_errors_of_a_user_are_one_line(data_dir, tmp_path):
    for argv, status, message in [
        (["--preset", "tiny", "--data-path", tmp_path / "none"], 1, "python data/prepare.py"),
        (["--preset", "tiny", "--data-path", data_dir], 1, "vocab_size"),
        (["--preset", "tiny", "--seed", "x"], 2, "seed"),
        (["--preset", "tiny", "--no-such"], 2, "--no-such"),
    ]:
        done = run(*argv, "--out-dir", tmp_path)
        assert done.returncode in (status, 2) and message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "tiny_seed1337/model.tern").exists()


def test_logits_are_bit_identical_compiled_and_eager(data_dir, tmp_path):
    """Train compiled, in this process; then compare the trained model with the one from the file, both ways."""
    trainer = tiny_trainer(data_dir, tmp_path, "--compile", 1, "--warmup-steps", 1, "--iterations", 6, "--eval-stride",
                           0)
    trainer.warm_up()
    trainer.train()
    trainer.finish()
    assert trainer.compiled is not trainer.model
    trainer.log.close()
    loaded = load_artifact(trainer.folder / "model.tern")
    ids = torch.from_numpy(read_shard(next(data_dir.glob("*_val_*.bin")))[:512].astype("int64")).view(8, 64)
    with torch.inference_mode():
        eager = [m.head(m.hidden(ids)) for m in (trainer.model, loaded)]
        compiled = [torch.compile(lambda x, m=m: m.head(m.hidden(x)), fullgraph=True)(ids)
                    for m in (trainer.model, loaded)]
    assert torch.equal(*eager) and torch.equal(*compiled)
    assert not torch.equal(eager[0], torch.zeros_like(eager[0]))


def test_compiled_training_on_two_threads_is_deterministic(data_dir, tmp_path):
    for name in "ab":
        done = run(*tiny_args(data_dir, tmp_path, "--compile", 1, "--threads", 2, "--warmup-steps", 1, "--iterations",
                              12, "--eval-stride", 0, "--run-id", name))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/model.tern").read_bytes() == (tmp_path / "b/model.tern").read_bytes()
