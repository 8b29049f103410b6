"""records/make_record.py: a record is what the runs gave, and is refused where it cannot be proved."""

from __future__ import annotations

import json
import shutil
import statistics
import sys

import pytest

from conftest import ROOT, VOCAB, run
from submission import DATA_MODULES, SEED_FILES, About, SubmissionError, check, write

sys.path.insert(0, str(ROOT / "records"))

import make_record


def test_a_record_is_written_and_proved(data_dir, tmp_path):
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
    for value in bpb:
        assert f"{value:.8f}" in done.stdout.splitlines()[-2], "scored again"
    sources = {p.name for p in make_record.code_files()}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "README.md", "submission.json", "train_gpt.py", "requirements.txt", "source/requirements.txt",
        *(f"source/{name}.py" for name in DATA_MODULES), *(f"source/{name}" for name in sources),
        *(name.format(seed) for seed in (1, 2) for name in SEED_FILES.values())}
    for name in sources:
        assert (folder / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    readme = (folder / "README.md").read_text()
    assert f"{s['val_bpb']:.4f}" in readme
    assert s["seeds"][1]["command"] == (f"python train_gpt.py --preset tiny --seed 2 --data-path {data_dir} "
                                        f"--vocab-size {VOCAB} --threads 1 --iterations 8")
    assert not check(folder, against="9.5")[1]

    again = run(*argv, program="records/make_record.py")
    assert again.returncode == 1 and "not overwritten" in again.stderr

    shutil.rmtree(folder)
    other = run(*argv[:-1], 9, program="records/make_record.py")
    assert other.returncode == 1 and "holds another run" in other.stderr


@pytest.mark.parametrize(("change", "message"), [
    ({"type": "train"}, "finished run"),
    ({"roundtrip_gap": 1e-9}, "not the model"),
    ({"logits_identical": False}, "not the model"),
    ({"bytes_model": 128_001}, "bytes_model is 128001"),
    ({"seconds": dict.fromkeys(("load", "compile", "train", "pack", "score"), 601.0)}, "601.0 train seconds"),
    ({"score": None}, "score must be an object"),
    ({"sliding": None}, "no sliding-window score"),
])
def test_runs_that_prove_nothing_make_no_record(tiny_run, tmp_path, change, message):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    *records, final = (tiny_run[0] / "metrics.jsonl").read_text().splitlines()
    final = json.loads(final)
    if "sliding" in change:
        change = {"score": final["score"] | change}
    (tmp_path / "run/metrics.jsonl").write_text("\n".join([*records, json.dumps(final | change)]))
    with pytest.raises(SubmissionError, match=message):
        write(tmp_path / "record", [tmp_path / "run"], About("Tiny", "2026-01-02"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_seeds_of_different_settings_are_not_one_record(tiny_run, tmp_path):
    runs = []
    for seed, lr in ((1, 0.04), (2, 0.05)):
        shutil.copytree(tiny_run[0], tmp_path / str(seed))
        header, *rest = (tiny_run[0] / "metrics.jsonl").read_text().splitlines()
        header = json.loads(header)
        header["settings"] |= {"matrix_lr": lr, "seed": seed}
        (tmp_path / str(seed) / "metrics.jsonl").write_text("\n".join([json.dumps(header), *rest]))
        runs.append(tmp_path / str(seed))
    with pytest.raises(SubmissionError, match="seeds 1 and 2 differ in settings"):
        write(tmp_path / "record", runs, About("Tiny", "2026-01-02"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
