"""records/make_record.py: a record is what the runs gave, and is refused where it cannot be proved."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from argparse import Namespace

import pytest

from conftest import ROOT, VOCAB, clean_env, run

sys.path.insert(0, str(ROOT / "records"))

import make_record


def test_a_record_is_written_and_proved(data_dir, tmp_path, monkeypatch):
    argv = ["--name", "Tiny", "--preset", "tiny", "--seeds", "1", "2", "--date", "2026-01-02", "--data", data_dir,
            "--out-dir", tmp_path / "runs", "--records", tmp_path / "records", "--blurb", "A test.", "--",
            "--vocab-size", VOCAB, "--threads", 1, "--iterations", 8]
    done = run(*argv, program="records/make_record.py")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "records/track_test/2026-01-02_Tiny"
    s = json.loads((folder / "submission.json").read_text())
    assert {"name", "github_id", "val_bpb", "val_loss", "bytes_total", "bytes_code", "data_sha256", "code_sha256",
            "track", "date", "author", "blurb"} <= s.keys()
    bpb = [row["val_bpb"] for row in s["seeds"]]
    assert s["val_bpb"] == statistics.mean(bpb) and s["val_bpb_std"] == statistics.stdev(bpb) and bpb[0] != bpb[1]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "submission.json", "train_gpt.py", "pack.py", "eval_bpb.py"]
        + [f.format(seed) for seed in (1, 2) for f in ("model_seed{}.tern", "train_seed{}.log", "score_seed{}.json",
                                                       "metrics_seed{}.jsonl")])
    assert (folder / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert f"{s['val_bpb']:.4f}" in (folder / "README.md").read_text()

    again = run(*argv, program="records/make_record.py")
    assert again.returncode == 1 and "not overwritten" in again.stderr

    monkeypatch.setattr("os.environ", clean_env())
    args = Namespace(data=data_dir, nproc=1)
    make_record.verify(folder, s, args)
    s["seeds"][1]["val_bpb"] += 1e-9
    with pytest.raises(make_record.RecordError, match="seed 2: scored again"):
        make_record.verify(folder, s, args)


@pytest.mark.parametrize(("change", "message"), [
    ({"type": "train"}, "finished run"),
    ({"roundtrip_gap": 1e-9}, "not the model"),
    ({"bytes_model": 128_001}, "against the rules"),
    ({"seconds": {"train": 601.0, "score": 1.0}}, "against the rules"),
    ({"score": {"sliding": None}}, "no sliding-window score"),
])
def test_runs_that_prove_nothing_make_no_record(tiny_run, tmp_path, change, message):
    *records, final = (tiny_run[0] / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join([*records, json.dumps(json.loads(final) | change)]))
    args = Namespace(track=make_record.TRACKS["tiny"])
    with pytest.raises(make_record.RecordError, match=message):
        make_record.write_record(tmp_path / "record", [(1, tmp_path / "run", ["x"])], args)


def test_seeds_of_different_settings_are_not_one_record(tiny_run, tmp_path):
    args, runs = Namespace(track=make_record.TRACKS["tiny"]), []
    for seed, lr in ((1, 0.04), (2, 0.05)):
        run_folder = tmp_path / str(seed)
        shutil.copytree(tiny_run[0], run_folder)
        header, *rest = (run_folder / "metrics.jsonl").read_text().splitlines()
        header = json.loads(header)
        header["settings"]["matrix_lr"] = lr
        (run_folder / "metrics.jsonl").write_text("\n".join([json.dumps(header), *rest]))
        runs.append((seed, run_folder, ["x"]))
    with pytest.raises(make_record.RecordError, match="differ in settings"):
        make_record.write_record(tmp_path / "record", runs, args)
