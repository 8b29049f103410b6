"""records/: the committed records hold, and make_record.py writes one that is what the runs gave."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from conftest import PATIENCE, ROOT, VOCAB, ended, run, started
from data import prepare
from records import fp32_products, make_record, rules
from records.check import CHECKS, check, final_lines
from records.claim import weigh_claim
from tern import runlog, source
from tern.machine import bf16_products
from tern.runfolder import lock_folder

RECORDS = sorted((ROOT / "records").glob("track_*/*"))
FASTER = ROOT / "records/track_cpu_10min_128kb/2026-11-22_FasterSteps"
FIRST = ROOT / "records/history/2026-11-22_FirstTernary"
FREQUENT = FASTER.with_name("2026-11-26_FrequentTokens")
# A record -> what it was tested against: the mean of the one before, or the record that ran beside it
BEATEN = {FASTER.name: "1.489313", FREQUENT.name: str(FASTER), "2026-11-27_WideMLPs": str(FASTER),
          "2026-11-28_CopyWords": str(FASTER)}


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_every_committed_record_passes_the_referee(folder, monkeypatch):
    if folder != RECORDS[-1]:  # decoding takes 6 s each; of older ones the sha256 is compared, and one is scored below
        monkeypatch.setattr("records.check.check_artifact", lambda run, names: iter(()))
    lines, failed = check(folder, against=BEATEN.get(folder.name))
    assert not failed, lines


def test_a_record_of_before_the_layout_agrees_with_itself():
    """What of the referee's rules holds for it; records/history/README.md says which do not, and why."""
    said = json.loads((FIRST / "submission.json").read_text())
    bpb = [row["val_bpb"] for row in said["seeds"]]
    assert said["val_bpb"] == statistics.mean(bpb) == pytest.approx(float(BEATEN[FASTER.name]), abs=1e-6)
    for row in said["seeds"]:
        run_of = rules.read_run(lambda name: (FIRST / name).read_bytes(), rules.seed_names(row["seed"]))
        final, log = run_of.final, run_of.log.splitlines()
        assert run_of.header.source_sha256 == said["code_sha256"] == {
            p.name: rules.sha256(p.read_bytes()) for p in FIRST.glob("*.py")}
        assert final.artifact_sha256 == row["artifact_sha256"] == rules.sha256(run_of.artifact)
        assert final.score == run_of.score and run_of.result.sliding.val_bpb == row["val_bpb"]
        assert final.roundtrip_gap == 0 and final.logits_identical and final.seconds == row["seconds"]
        for begin, end in final_lines(run_of):
            found = [line for line in log if line.startswith(begin)]
            assert len(found) == 1 and found[0].endswith(end), begin


@pytest.mark.rehearsal
def test_a_committed_artifact_scores_the_same_by_its_own_program_and_by_ours(data_dir, tmp_path):
    """On other data, as that of the record takes a while to prepare: `records/check.py --data` scores on that."""
    data, corpus = tmp_path / "shards", data_dir.parent / "corpus.jsonl"
    assert prepare.main(["--source", "text", "--input", str(corpus), "--out", str(data), "--vocab-size", "1024",
                         "--val-fraction", "0.06"]) == 0
    shutil.copy(FASTER / "train_gpt.py", tmp_path)
    words = [FASTER / "model_seed1337.tern", "--data", data, "--json"]
    in_fp32 = {} if bf16_products() else {"PYTHONPATH": fp32_products.environment(tmp_path)["PYTHONPATH"]}
    theirs = subprocess.run([sys.executable, "train_gpt.py", "eval_bpb", *map(str, words), "theirs.json"], cwd=tmp_path,
                            env={"OMP_NUM_THREADS": "1"} | in_fp32, capture_output=True, text=True, timeout=PATIENCE)
    ours = ended(started(sys.executable, ROOT / "eval_bpb.py", *words, tmp_path / "ours.json", OMP_NUM_THREADS="1"))
    assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
    results = [json.loads((tmp_path / f"{who}.json").read_text()) for who in ("theirs", "ours")]
    same = 0.0 if bf16_products() else 1e-3  # its scores of attention are rounded to bf16
    for kind in ("chunked", "sliding"):
        scores = [result[kind]["val_bpb"] for result in results]
        assert scores[1] == pytest.approx(scores[0], abs=same, rel=0) and scores[0] > 1, kind


def words_of(data_dir, tmp_path, name: str, *options: object) -> list:
    """Arguments of make_record for two seeds of a tiny record."""
    return ["--name", name, "--preset", "tiny", "--seeds", "1", "2", "--date", "2026-01-02", "--data", data_dir,
            "--out-dir", tmp_path / "runs", "--records", tmp_path, "--blurb", "A test.", *options, "--",
            "--vocab-size", VOCAB, "--threads", 1, "--eval-stride", 64, "--iterations", 5]


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """(where it was made, what make_record wrote there and said) of a record of two seeds."""
    tmp_path = tmp_path_factory.mktemp("made")
    done = run(*words_of(data_dir, tmp_path, "First"), program="records/make_record.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path, tmp_path / "track_test/2026-01-02_First", done.stdout


def test_a_record_is_written_and_proved(made, data_dir, tmp_path):
    where, folder, said = made
    s = json.loads((folder / "submission.json").read_text())
    assert {"name", "github_id", "val_bpb", "val_loss", "bytes_total", "bytes_code", "data_sha256", "code_sha256",
            "track", "date", "author", "blurb"} <= s.keys()
    bpb = [row["val_bpb"] for row in s["seeds"]]
    assert s["val_bpb"] == statistics.mean(bpb) and s["val_bpb_std"] == statistics.stdev(bpb) and bpb[0] != bpb[1]
    for value in bpb:
        assert f"{value:.8f}" in said.splitlines()[-2], "scored again"
    sources = {*source.code_files(), *source.needed_by([rules.PREPARE], source.read_file)}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "README.md", "submission.json", "train_gpt.py", "requirements.txt", "source/requirements.txt",
        *(f"source/{name}" for name in sources), *rules.seed_names(1).values(), *rules.seed_names(2).values()}
    for name in sources:
        assert (folder / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    assert f"{s['val_bpb']:.4f}" in (folder / "README.md").read_text()
    assert s["seeds"][1]["command"] == (f"python train_gpt.py --preset tiny --seed 2 --data-path {data_dir} "
                                        f"--vocab-size {VOCAB} --threads 1 --eval-stride 64 --iterations 5")
    assert not check(folder, against="9.5")[1]

    argv = words_of(data_dir, where, "First")
    again = run(*argv, program="records/make_record.py")
    assert again.returncode == 1 and "not overwritten" in again.stderr
    elsewhere = [tmp_path if word == where else word for word in argv[:-1]]  # the runs are there, the record is not
    other = run(*elsewhere, 9, program="records/make_record.py")
    assert other.returncode == 1 and "holds another run" in other.stderr


@pytest.mark.rehearsal
def test_two_checkouts_turn_about(made, data_dir, tmp_path):
    """A checkout against itself differs by nothing, a variant by something; finished runs are read, others made."""
    def play(*settings, iterations=5):
        return run("--against", ROOT, "--data", data_dir, "--preset", "tiny", "--out-dir", tmp_path, "--seeds", 3,
                   *settings, "--", "--vocab-size", VOCAB, "--threads", 1, "--eval-stride", 64,
                   "--iterations", iterations, program="records/recipes.py")

    (tmp_path / "this_seed3").mkdir()
    cut = (made[0] / "runs/First_seed1/metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (tmp_path / "this_seed3/metrics.jsonl").write_text("".join(cut) + '{"type": "fin')
    with lock_folder(tmp_path / "this_seed3"):
        assert "this_seed3: another run is at work in it" in play().stderr
    assert (tmp_path / "this_seed3/metrics.jsonl").read_text().startswith("".join(cut))
    done = play("--also", "wider=--mlp-hidden 96")
    made_now = [line.partition(":")[0] for line in done.stdout.splitlines() if "train_gpt.py" in line]
    assert made_now == ["this, seed 3", "wider, seed 3"], done.stdout + done.stderr  # the other was made before
    assert "this against other: +0.0000 bpb, n=1" in done.stdout
    assert "wider against other: +0.0000" not in done.stdout and "wider against other: " in done.stdout
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["side"], r["seed"]) for r in results] == [("other", 3), ("this", 3), ("wider", 3)]
    for r in results:
        kept = json.loads((tmp_path / f"{r['side']}_seed3/metrics.jsonl").read_text().splitlines()[-1])
        assert r["sliding"] == kept["score"]["sliding"]["val_bpb"] > 1 and r["final"] | {"type": "final"} == kept
    again = play()
    assert again.returncode == 0 and "train_gpt.py" not in again.stdout, "finished runs were made again"
    assert "another program or of other settings" in play(iterations=6).stderr
    assert "give NAME=SETTINGS" in play("--also", "this=--qk-gain 2").stderr


@pytest.mark.rehearsal
def test_a_record_beside_its_rival(made, data_dir, tmp_path):
    """The rival's own program runs in turn, the referee recomputes the pairs, and what is not the rival's is found."""
    rival, folder = made[1], tmp_path / "track_test/2026-01-02_Second"
    done = run(*words_of(data_dir, tmp_path, "Second", "--against", rival)[:-1], 7, program="records/make_record.py")
    assert done.returncode == 0, done.stdout + done.stderr
    turns = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
    assert [line.partition(":")[0] for line in turns] == ["seed 1", "seed 1 of First", "seed 2 of First", "seed 2"]
    s, before = (json.loads((x / "submission.json").read_text()) for x in (folder, rival))
    for ours, theirs, then in zip(s["seeds"], s["rival"]["seeds"], before["seeds"], strict=True):
        assert theirs["val_bpb"] == then["val_bpb"] and theirs["steps"] == 5, "the same program gives the same score"
        assert theirs["difference"] == ours["val_bpb"] - then["val_bpb"] != 0
        assert f"{theirs['difference']:+.6f}" in (folder / "README.md").read_text()
    lines, failed = check(folder, against=str(rival))
    assert not failed and any("2 pairs" in line for line in lines), lines

    metrics = folder / "rival_metrics_seed1.jsonl"
    text = metrics.read_text()
    for old, new, reason in (('"val_bpb": ', '"val_bpb": 1', "submission.json.rival"),
                             ('"seed": 1', '"seed": 3', "seed is 3, in the run beside it 1"),
                             ('"cores": ', '"cores": 9', "machine is")):
        metrics.write_text(text.replace(old, new))
        lines, failed = check(folder)
        assert failed and any(reason in line for line in lines), lines
    metrics.unlink()
    assert any("rival_metrics_seed1.jsonl is missing" in line for line in check(folder)[0])

    args = SimpleNamespace(name="Second", out_dir=tmp_path / "runs", nproc=1, data=tmp_path)
    opponent = rules.read_json((rival / "submission.json").read_bytes(), make_record.Opponent, "rival")
    with pytest.raises(rules.SubmissionError, match="with these options; delete"):
        make_record.run_again(rival, opponent, 1, args, False)
    os.utime(tmp_path / "runs/Second_against_seed2/metrics.jsonl", (0, 0))
    shutil.rmtree(tmp_path / "runs/Second_seed2")
    shutil.rmtree(folder)
    done = run(*words_of(data_dir, tmp_path, "Second", "--against", rival)[:-1], 7, program="records/make_record.py")
    assert done.returncode == 1 and "hours apart, which is no pair" in done.stderr and not folder.exists()


PRODUCTS = """
import torch
from torch.nn import functional as F
from tern.packed import packed

a, b, c = (torch.randint(-9, 9, (2, 32, 32)).bfloat16() for _ in range(3))  # sums are exact
exact = a.double() @ b.double()
for x in (torch.bmm(a, b), a @ b, F.linear(a[0], b[0].mT)):
    assert x.dtype == torch.bfloat16 and torch.equal(x, (exact if x.dim() == 3 else exact[0]).float().bfloat16()), x
x = torch.baddbmm(c, a, b, beta=0.5, alpha=2.0)
assert torch.equal(x, (0.5 * c.double() + 2 * exact).float().bfloat16())
assert torch.equal(torch.bmm(a.double(), b.double()), exact)
import torch._inductor.lowering  # finds these functions by their names, and writes into what it has
torch.bmm(a, b, out=c)
assert torch.equal(c, exact.float().bfloat16())
x = torch.compile(F.linear, backend="eager")(a[0], b[0].mT)
assert torch.equal(x, exact[0].float().bfloat16())
w = packed(torch.ones(32, 32, dtype=torch.bfloat16))
assert w is not None and torch.equal(F.linear(a[0], w)[:, 0], a[0].double().sum(1).float().bfloat16())
"""


def test_programs_of_before_multiply_in_fp32(tmp_path):
    """In a process that a program starts, too: the sums of bf16 factors, rounded once, whatever the function."""
    env = fp32_products.environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)",
             sys.executable, "-c", PRODUCTS]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.fast
def test_a_rival_whose_products_were_in_fp32_is_of_this_machine():
    """An older program's log does not say that its CPU has none of bf16; the record says how it ran."""
    run = rules.read_run(lambda name: (FREQUENT / name).read_bytes(), rules.seed_names(1337))
    rivals = {1337: (FREQUENT / rules.RIVAL.format(1337)).read_bytes()}
    cpu = {"cpu": run.header.machine["cpu"] + runlog.NO_BF16_PRODUCTS}
    here = replace(run, header=replace(run.header, machine=run.header.machine | cpu))
    plain, in_fp32 = rules.Rival("FasterSteps", "2026-11-22"), rules.Rival("FasterSteps", "2026-11-22", True)
    assert "fp32_products" not in rules.compare([run], rivals, plain)
    assert rules.compare([here], rivals, in_fp32)["fp32_products"] is True
    for ours, rival in ((run, in_fp32), (here, plain)):
        with pytest.raises(rules.SubmissionError, match="machine is"):
            rules.compare([ours], rivals, rival)


@pytest.mark.fast
@pytest.mark.parametrize(("ours", "in_turn", "holds"), [(1.33, 1.42, True), (1.455, 1.60, False), (1.33, 1.33, False)])
def test_a_claim_needs_the_record_s_seeds_and_the_pairs(ours, in_turn, holds):
    """Logs of a rival that did badly are no record, nor is a faster machine."""
    record = json.loads((FASTER / "submission.json").read_text())
    program = {"train_gpt.py": record["files"]["train_gpt.py"]["sha256"]}
    seeds = [{"val_bpb": ours + i / 1000} for i in range(3)]
    rivals = [{"seed": i, "difference": ours - in_turn + i / 1000, "code_sha256": program} for i in range(3)]
    summary = record | {"seeds": seeds, "val_bpb": ours, "val_loss": 2.5,
                        "rival": {"name": record["name"], "date": record["date"], "seeds": rivals}}
    faults, text = weigh_claim(summary, True, str(FASTER))
    assert (faults == []) == holds and "3 pairs" in text
    rivals[1]["code_sha256"] = {"train_gpt.py": "0" * 64}
    assert "another program" in weigh_claim(summary, True, str(FASTER))[0][0]


def test_every_folder_of_records_is_one_of_these():
    assert {FASTER, FREQUENT} <= set(RECORDS)
    assert all((folder / "submission.json").is_file() for folder in [*RECORDS, FIRST])
    assert not {path.name for path in (ROOT / "records").iterdir() if path.is_dir()} - {
        *(folder.parent.name for folder in RECORDS), "history", "__pycache__"}


def test_a_record_on_another_machine_than_the_track_s_is_refused(tmp_path):
    folder = tmp_path / FASTER.name
    shutil.copytree(FASTER, folder)
    for path in folder.glob("metrics_seed*.jsonl"):
        header, _, rest = path.read_text(encoding="utf-8").partition("\n")
        record = json.loads(header)
        record["machine"]["cores"] = 64
        path.write_text(json.dumps(record) + "\n" + rest, encoding="utf-8")
    lines, failed = check(folder, leave_out=CHECKS.keys() - {"files", "machine"})
    assert failed and [line for line in lines if line.startswith("FAIL  machine") and "64 cores" in line]
