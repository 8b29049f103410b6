"""records/bundle.py and records/check.py: what is submitted is the program, and every way to tamper with it is found
for its reason."""

from __future__ import annotations

import ast
import functools
import json
import lzma
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import pack
from conftest import PATIENCE, ROOT, VOCAB
from records import bundle, rules
from records.check import CHECKS, Case, check, check_files
from records.check import main as check_main
from records.claim import p_value, weigh_claim
from records.rules import SubmissionError, sha256
from records.static import forbidden
from tern import runlog, source
from tern.files import folder_identity

SEED = 1337
ARTIFACT, LOG, METRICS, SCORE = (rules.seed_names(SEED)[name] for name in
                                 ("model.tern", "log.txt", "metrics.jsonl", "score.json"))


@pytest.fixture(scope="module")
def submitted(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("submitted") / "Tiny"
    assert bundle.main([str(tiny_run[0]), "--out", str(folder), "--blurb", "A test."]) == 0
    return folder


@pytest.fixture
def copy(submitted, tmp_path) -> Path:
    return shutil.copytree(submitted, tmp_path / "copy")


CACHED = {name: functools.cache(getattr(source, name)) for name in ("strip", "imported")}


@pytest.fixture
def quick(monkeypatch):
    """Parse and compress the same sources once."""
    for name, function in CACHED.items():
        monkeypatch.setattr(source, name, function)
    monkeypatch.setattr(source, "compress", compress_once(source.compress))


@functools.cache
def compress_once(compress: Callable) -> Callable:
    cached = functools.cache(lambda items: compress(dict(items)))
    return lambda sources: cached(tuple(sources.items()))


def edit(path: Path, change: Callable, line: int | None = None) -> None:
    """Apply change(value) to a JSON file, or to a line of one."""
    lines = [path.read_text()] if line is None else path.read_text().splitlines()
    value = json.loads(lines[line or 0])
    change(value)
    lines[line or 0] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def substitute(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def sources_of(folder: Path) -> dict[str, bytes]:
    """The programs in a submission's source/."""
    case = Case(folder)
    list(check_files(case))
    return case.sources


def forge(folder: Path) -> None:
    """Make submission.json what it would be if the folder's other files were honest."""
    case = Case(folder)
    list(check_files(case))
    reseal(folder, case.summary)


def reseal(folder: Path, change: dict | None = None) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
             if p.is_file() and p.name != "submission.json"}
    table = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    edit(folder / "submission.json", lambda s: s.update((change or {}) | {"files": table}))


def failures(lines: list[str]) -> dict[str, str]:
    """Check -> its faults, of those that failed."""
    found: dict[str, str] = {}
    for line in lines:
        word, name, text = line.split(None, 2)
        if word == "FAIL":
            found[name] = found.get(name, "") + text + "\n"
    return found


def alone(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, with an environment that knows nothing of the repository."""
    command = [sys.executable, *map(str, arguments)]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------------------------
# What is submitted
# ---------------------------------------------------------------------------------------------------------------


def test_what_bundle_writes_passes_check(submitted, data_dir, capsys):
    assert check_main([str(submitted), "--data", str(data_dir), "--against", "9.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]
    s = json.loads((submitted / "submission.json").read_text())
    assert f"{ARTIFACT} {s['val_bpb']:.8f}" in lines[-1], "scored again by the folder's own program"
    assert s["bytes_code"] == (submitted / "train_gpt.py").stat().st_size < s["bytes_code_source"] / 3
    assert s["bytes_total"] == s["bytes_model"] == (submitted / ARTIFACT).stat().st_size
    assert f"Code size: {s['bytes_code']} bytes\n" in (submitted / LOG).read_text(), "one fact for run and referee"
    assert f"{s['val_bpb']:.4f}" in (submitted / "README.md").read_text()
    assert "pytest" not in (submitted / "requirements.txt").read_text()
    names = {p.relative_to(submitted / "source").as_posix() for p in (submitted / "source").rglob("*.py")}
    assert names == {*source.code_files(), *source.needed_by([rules.PREPARE], source.read_file)}
    assert names > {f"data/{p.name}" for p in (ROOT / "data").glob("*.py")}


def test_the_submission_prepares_the_same_data_alone(submitted, data_dir, tmp_path):
    shutil.copytree(submitted / "source", tmp_path / "source")
    done = alone("source/data/prepare.py", "--source", "text", "--input", data_dir.parent / "corpus.jsonl", "--out",
                 "shards", "--vocab-size", VOCAB, "--val-fraction", 0.06, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "shards/manifest.json").read_bytes() == (data_dir / "manifest.json").read_bytes()


def test_the_one_file_is_a_module_that_compiles_to_one_graph(submitted, tmp_path):
    """Dynamo skips code by the name of its file; the graphs themselves do not depend on it."""
    shutil.copy(submitted / "train_gpt.py", tmp_path)
    code = f"""
import torch, train_gpt
model = train_gpt.GPT(train_gpt.Config(**train_gpt.PRESETS["tiny"], vocab_size={VOCAB}))
compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
ids = torch.arange(64)[None]
compiled(ids, ids).backward()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
import pack
assert train_gpt.pack is pack and train_gpt.Config.__module__ == "train_gpt"
import inspect
assert "def refresh" in inspect.getsource(train_gpt.Latents.refresh)
"""
    done = alone("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_one_file_says_how_to_unpack_it(submitted, tmp_path):
    shutil.copy(submitted / "train_gpt.py", tmp_path)
    text = (tmp_path / "train_gpt.py").read_text()
    command = text[text.index("python -c") : text.index('"""', 3)].replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "".join(f"{m}\n" for m in source.strip_modules(sources_of(submitted)).values()), done.stderr


def test_another_version_of_python_or_liblzma_is_no_fault(copy, monkeypatch, request):
    """Neither for the file itself nor for the bytes of it that the run recorded. What counts is the file."""
    before = (copy / "train_gpt.py").stat().st_size
    with monkeypatch.context() as other:
        other.setattr(source, "FILTERS", [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2}])
        (copy / "train_gpt.py").write_bytes(source.one_file(sources_of(copy)))
    request.getfixturevalue("quick")
    now = (copy / "train_gpt.py").stat().st_size
    assert now > before
    forge(copy)
    lines, failed = check(copy)
    assert not failed, lines
    assert any("the same modules" in line for line in lines)
    assert any(f"recorded {before:,} bytes of code, train_gpt.py has {now:,}" in line for line in lines)
    model = (copy / ARTIFACT).stat().st_size
    counting = replace(rules.TRACKS["tiny"], count_code=True, cap_bytes=model + now - 1)
    monkeypatch.setitem(rules.TRACKS, "tiny", counting)
    forge(copy)
    assert failures(check(copy)[0]) == {"bytes": f"{model + now:,} bytes (the largest model and the code) are 1 over "
                                                 f"the cap of {model + now - 1:,} of track test: store less\n"}


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def test_over_the_cap_writes_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    size = (tiny_run[0] / "model.tern").stat().st_size
    for change, said in ((dict(cap_bytes=size - 1200), "are 1,200 over the cap"),
                         (dict(cap_bytes=size, count_code=True), "the largest model and the code")):
        monkeypatch.setitem(rules.TRACKS, "tiny", replace(rules.TRACKS["tiny"], **change))
        assert bundle.main([str(tiny_run[0]), "--out", str(tmp_path / "out")]) == 1
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def final_changes(score: dict) -> dict[str, tuple[dict, str]]:
    """Why -> (what is changed in a final record, what is said)."""
    slow = dict.fromkeys(runlog.PHASES, 601.0)
    return {
        "unfinished": ({"type": "train"}, "missing required field"),
        "gap": ({"roundtrip_gap": 1e-9}, "not the model"),
        "logits": ({"logits_identical": False}, "not the model"),
        "too large": ({"bytes_model": 128_001}, "bytes_model is 128001"),
        "slow": ({"seconds": slow}, "601.0 train seconds"),
        "a phase left out": ({"seconds": {"train": 1.0}}, "missing required field `load`"),
        "no score": ({"score": None}, "final: Expected `object`, got `null` - at `$.score`"),
        "chunked only": ({"score": score | {"sliding": None}}, "no sliding-window score"),
    }


def test_what_cannot_be_submitted(tiny_run, submitted, tmp_path, capsys, quick):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text()

    def refused(*runs: Path, out: Path = tmp_path / "out") -> str:
        assert bundle.main([*map(str, runs), "--out", str(out)]) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "not overwritten" in refused(run, out=submitted)
    assert "is not a folder" in refused(run, out=tmp_path / "no/out")
    assert "no log.txt" in refused(tmp_path)
    assert "is given twice" in refused(run, run)
    for why, (change, said) in final_changes(json.loads((run / "score.json").read_text())).items():
        edit(run / "metrics.jsonl", lambda final, change=change: final.update(change), -1)
        assert said in refused(run), why
        (run / "metrics.jsonl").write_text(metrics)
    (run / "model.tern").write_bytes(b"TRNY")  # everything that check finds, bundle finds first
    assert "not an artifact" in refused(run)
    edit(run / "metrics.jsonl", lambda header: header["source_sha256"].update({"pack.py": "0" * 64}), line=0)
    assert "pack.py was changed since the run: run it again" in refused(run)
    edit(run / "metrics.jsonl", lambda header: header.update(preset="mine"), line=0)
    edit(run / "metrics.jsonl", lambda header: header["source_sha256"].update(
        {"pack.py": sha256((ROOT / "pack.py").read_bytes())}), line=0)
    assert "preset 'mine' belongs to no track" in refused(run)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"type": ')
    assert "was the run killed while it wrote" in refused(run)
    (run / "metrics.jsonl").write_text(metrics + metrics)
    assert "not one uninterrupted, finished run" in refused(run)
    (run / "metrics.jsonl").write_text('{"type": []}\n')
    assert "its type must be one of header, " in refused(run)
    (run / "metrics.jsonl").write_bytes(b"")
    assert "does not begin with a header" in refused(run)


def test_seeds_of_different_settings_are_not_one_record(tiny_run, tmp_path, quick):
    runs = []
    for seed, lr in ((1, 0.04), (2, 0.05)):
        runs.append(shutil.copytree(tiny_run[0], tmp_path / str(seed)))
        edit(runs[-1] / "metrics.jsonl", lambda h, seed=seed, lr=lr: h["settings"].update(matrix_lr=lr, seed=seed), 0)
    with pytest.raises(SubmissionError, match="seeds 1 and 2 differ in settings"):
        bundle.write(tmp_path / "record", runs, bundle.About("Tiny", "2026-01-02"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# ---------------------------------------------------------------------------------------------------------------
# Tampered copies
# ---------------------------------------------------------------------------------------------------------------


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / ARTIFACT).read_bytes())
    data[-5] ^= 1
    (folder / ARTIFACT).write_bytes(data)


def flip_a_bit_and_reseal(folder: Path) -> None:
    flip_a_bit(folder)
    reseal(folder)


def another_artifact(folder: Path) -> None:
    tensors, meta = pack.read_artifact(folder / ARTIFACT)
    codes = tensors["blocks.1.mlp.fc.weight"].codes
    codes[0, :2] = codes[0, 1::-1] if codes[0, 0] != codes[0, 1] else 1 - abs(codes[0, :2])
    pack.write_artifact(folder / ARTIFACT, tensors, meta | {"tokenizer": "0" * 64})
    forge(folder)


def edit_submission(**change: object) -> Callable:
    return lambda folder: edit(folder / "submission.json", lambda s: s.update(change))


def other_files(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "requirements.txt").unlink()
    (folder / "requirements.txt").symlink_to(ROOT / "requirements.txt")
    (folder / "extra.pkl").write_bytes(b"\x80\x04N.")
    (folder / "source/tern/more.py").write_text("'''Nothing imports it.'''\n")


def modules_left_out(folder: Path) -> None:
    (folder / "source/tern/entropy.py").unlink()
    (folder / "source/data/places.py").unlink()
    reseal(folder)


def edit_log_lines(folder: Path) -> None:
    bpb = json.loads((folder / SCORE).read_text())["sliding"]["val_bpb"]
    substitute(folder / LOG, f"sliding val_bpb           {bpb:.8f}", f"sliding val_bpb           {bpb - 0.1:.8f}")
    with open(folder / LOG, "a") as f:
        f.write("final_sliding_window_exact val_loss:1.00000000 val_bpb:1.00000000\n")
    reseal(folder)


def more_seconds(folder: Path) -> None:
    """Everywhere where the seconds of training stand."""
    seconds = json.loads((folder / METRICS).read_text().splitlines()[-1])["seconds"]
    total, before = sum(seconds.values()), f"train {seconds['train']:.1f}"
    substitute(folder / LOG, f"[train] {seconds['train']:.1f} s", "[train] 700.0 s")
    substitute(folder / LOG, before, "train 700.0")
    substitute(folder / LOG, f"= {total:.1f}\n", f"= {total - seconds['train'] + 700:.1f}\n")
    for line, text in enumerate((folder / METRICS).read_text().splitlines()):
        record = json.loads(text)
        if record.get("name") == "train":
            edit(folder / METRICS, lambda r: r.update(seconds=700.0), line)
        if record["type"] == "final":
            edit(folder / METRICS, lambda r: r["seconds"].update(train=700.0), line)
    forge(folder)


def in_metrics(line: int, change: Callable) -> Callable:
    """A change of a record of the metrics, all else made to agree with it as far as submission.json can."""
    def tamper(folder: Path) -> None:
        edit(folder / METRICS, change, line)
        forge(folder)
    return tamper


def change_header(header: dict) -> None:
    header["settings"].update(init_from="old", num_heads=1)
    header["origin"].update(seed="environment")
    header["data_sha256"].update({"a_val_0.bin": "0" * 64})


def import_socket(folder: Path) -> None:
    """In the source, and everywhere where its hash and size stand."""
    path, line, size = folder / "source/pack.py", "import struct\n", (folder / "train_gpt.py").stat().st_size
    before = path.read_text()
    substitute(path, line, line + "from socket import create_connection\n")
    after, sources = path.read_text(), sources_of(folder)
    (folder / "train_gpt.py").write_bytes(source.one_file(sources))
    substitute(folder / LOG, before, after)
    model, new = (folder / ARTIFACT).stat().st_size, (folder / "train_gpt.py").stat().st_size
    for old, now in ((f"Code size: {size} bytes", f"Code size: {new} bytes"), (f"code {size:,} ", f"code {new:,} "),
                     (f"size: {model + size} ", f"size: {model + new} ")):
        substitute(folder / LOG, old, now)
    hashes = {name: sha256(text) for name, text in sources.items()}
    edit(folder / METRICS, lambda h: h.update(source_sha256=hashes, source=folder_identity(hashes)), 0)
    edit(folder / METRICS, lambda final: final.update(bytes_code=new), -1)
    forge(folder)


def pad_the_program(folder: Path) -> None:
    with open(folder / "train_gpt.py", "ab") as f:
        f.write(b"# more\n")
    forge(folder)


def another_program(folder: Path) -> None:
    sources = sources_of(folder)
    assert b"/ math.log(2)" in sources["tern/metric.py"]
    sources["tern/metric.py"] = sources["tern/metric.py"].replace(b"/ math.log(2)", b"/ math.log(3)")
    (folder / "train_gpt.py").write_bytes(source.one_file(sources))
    forge(folder)


def fewer_modules(folder: Path) -> None:
    sources = sources_of(folder)
    del sources["tern/signals.py"]
    (folder / "train_gpt.py").write_bytes(source.one_file(sources))
    forge(folder)


def not_python(folder: Path) -> None:
    (folder / "source/tern/metric.py").write_text("def")
    reseal(folder)


def another_seed(folder: Path) -> None:
    """The same run once more, by another name."""
    for ours, theirs in zip(rules.seed_names(SEED).values(), rules.seed_names(7).values(), strict=True):
        shutil.copy(folder / ours, folder / theirs)
    edit(folder / "submission.json", lambda s: s["seeds"].append({"seed": 7}))
    forge(folder)
    edit(folder / "submission.json", lambda s: s["seeds"][1].update(seed=7))


def other_texts(folder: Path) -> None:
    substitute(folder / "requirements.txt", "numpy==", "numpy>=")
    substitute(folder / LOG, f"{'=' * 40} tern/wire.py\n", f"{'=' * 40} tern/wire.py\nX = 1\n")
    reseal(folder)


def score_of_another_file(folder: Path) -> None:
    def change(score: dict) -> None:
        score["artifact"].update(bytes=1)
        score["data"]["sha256"].update({"text_val_000000.bin": "0" * 64})

    edit(folder / SCORE, change)
    edit(folder / METRICS, lambda final: change(final["score"]), -1)
    forge(folder)


def in_the_score(change: Callable) -> Callable:
    """A change of what was scored, wherever it stands but in the log."""
    def tamper(folder: Path) -> None:
        edit(folder / SCORE, change)
        edit(folder / METRICS, lambda final: change(final["score"]), -1)
        forge(folder)
    return tamper


def one_seed_twice(folder: Path) -> None:
    edit(folder / "submission.json", lambda s: s["seeds"].append(s["seeds"][0]))
    forge(folder)
    edit(folder / "submission.json", lambda s: s.update(claim="record"))


def edit_the_score(folder: Path) -> None:
    edit(folder / SCORE, lambda s: s["sliding"].update(val_bpb=1.0))
    reseal(folder)


TAMPERED = {  # name -> (what is done, check -> reasons of each check that fails)
    "bit": (flip_a_bit, {"hashes": [f"{ARTIFACT}.sha256"], "sources": ["checksum does not match"]}),
    "bit, resealed": (flip_a_bit_and_reseal, {"sources": ["checksum does not match"]}),
    "artifact": (another_artifact, {
        "sources": ["but the metrics are of", "but the score are of", "its tokenizer is not that of"],
        "logs": ["final.bytes_model is|is of an artifact of"]}),
    "numbers": (edit_submission(val_bpb=1.0, bytes_total=99, cap_bytes=10**9, bytes_code=98, record=True,
                                world_size=True), {
        "bytes": ["bytes_total is 99, but by the files and the rules", "bytes_code is 98",
                  "cap_bytes is 1000000000, but .* test it is 128000"],
        "logs": [r"submission.json.val_bpb is 1.0, not \d", "world_size is True, not 1",
                 "a key 'record' that does not belong"]}),
    "track": (edit_submission(track="cpu_10min_128kb"), {
        "bytes": ["preset 'tiny' is not one of track cpu_10min_128kb"]}),
    "no such": (edit_submission(track="\x1b[2J", claim="mine", date="today"), {
        "files": [r"no track '\\x1b\[2J'", "claim must be none or record, not 'mine'", "date must be as 2026-01-31"]}),
    "files": (other_files, {
        "files": ["README.md is missing", "requirements.txt is a link", "extra.pkl does not belong",
                  "source/tern/more.py does not belong"],
        "hashes": ["extra.pkl is not listed"], "imports": ["extra.pkl: begins as a pickle"]}),
    "modules": (modules_left_out, {
        "files": ["source/tern/entropy.py is missing", "source/data/places.py is missing"],
        "program": ["holds the modules"], "sources": ["has no key|does not belong there"], "bytes": [], "logs": []}),
    "not Python": (not_python, {"files": ["source/tern/metric.py: not a Python module"]}),
    "log": (edit_log_lines, {"logs": [f"'sliding val_bpb .*', but {METRICS} gives",
                                      "2 lines begin with 'final_sliding_window_exact"]}),
    "seconds": (more_seconds, {"seconds": ["700.0 train seconds, track test allows 600"]}),
    "early": (in_metrics(-1, lambda final: final["seconds"].update(train=0.0)), {
        "seconds": ["step 1 ended at .* after the 0.0 s", "the seconds of its phases"], "logs": [r"\[train\]"]}),
    "header": (in_metrics(0, change_header), {
        "seconds": ["init_from=old: what was trained before"], "seeds": ["settings came from the environment"],
        "sources": ["its configuration is not"], "logs": ["header.data is"]}),
    "final": (in_metrics(-1, lambda final: final.update(roundtrip_gap=1e-9, bytes_code=100, bytes_total=100)), {
        "logs": ["the file is not the model that was trained", "final.bytes_code is 100, not"]}),
    "old schema": (in_metrics(0, lambda header: header.update(schema=1)), {"logs": ["final.bytes_code is"]}),
    "socket": (import_socket, {"imports": [r"source/pack.py: line \d+ imports socket.create_connection"]}),
    "padded": (pad_the_program, {"program": ["before or after its sources"], "logs": []}),
    "program": (another_program, {"program": ["its module tern.metric is not that of source/"], "logs": []}),
    "fewer modules": (fewer_modules, {"program": ["holds the modules"], "logs": []}),
    "seed": (one_seed_twice, {"seeds": ["seed 1337 occurs 2 times", r"with 1 seed\(s\), it needs 3"],
                              "claim": ["was not tested"]}),
    "another seed": (another_seed, {"seeds": ["metrics_seed7.jsonl: is of seed 1337", "have the same artifact"],
                                    "logs": [r"seeds\[1\].seed is 7, not 1337"]}),
    "texts": (other_texts, {"program": ["requirements.txt: not the lines of"],
                            "sources": ["does not hold source/tern/wire.py as what ran"]}),
    "score of another": (score_of_another_file, {"logs": ["is of an artifact of 1 bytes", f"{SCORE}: data.text_val"]}),
    "nats": (in_the_score(lambda s: s["sliding"].update(val_loss=1000 * s["sliding"]["val_loss"])), {
        "logs": [f"{METRICS}: sliding: val_bpb .* is not val_loss"]}),
    "tokens": (in_the_score(lambda s: s["sliding"].update(tokens=s["sliding"]["tokens"] - 1)), {
        "logs": [f"{METRICS}: sliding: of .tokens, bytes."]}),
    "half the text": (in_the_score(lambda s: s["data"]["sha256"].pop("text_val_000000.bin")), {
        "logs": [f"{SCORE}: data"]}),
    "counts": (in_the_score(lambda s: s["model"].update(ternary_weights=1)), {
        "sources": [f"{SCORE}: model.ternary_weights is 1, not"]}),
    "score": (edit_the_score, {"logs": [f"{SCORE}.sliding.val_bpb is 1.0, not"]}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_for_its_reason(copy, name, quick):
    tamper, expected = TAMPERED[name]
    tamper(copy)
    lines, failed = check(copy)
    found = failures(lines)
    assert failed and found.keys() <= expected.keys(), lines
    for check_name, reasons in expected.items():
        for reason in reasons:
            assert re.search(reason, found.get(check_name, "")), (reason, lines)


def test_json_that_cannot_be_used(submitted, tmp_path):
    """It must read as one thing only, in whatever language it is read."""
    good = json.loads((submitted / "submission.json").read_text())
    without = {key: value for key, value in good.items() if key != "val_loss"}
    for text, said in {
        "{": "not JSON that can be used",
        "\xff": "not JSON that can be used",
        '{"val_bpb": NaN}': "NaN is not a number of JSON",
        '{"val_bpb": 1e999}': "out of the range of 64 bits",
        '{"seed": 9223372036854775808}': "9223372036854775808 is out of the range of 64 bits",
        '{"val_bpb": 1, "val_bpb": 2}': "a key occurs twice",
        "[" * 100_000: "not JSON that can be used",
        "9" * 10_000: "not JSON that can be used",
        "[]": "Expected `object`, got `array`",
        json.dumps(without): "missing required field `val_loss`",
        json.dumps(good | {"val_bpb": "1.0"}): "Expected `float`, got `str` - at `$.val_bpb`",
        json.dumps(good | {"seeds": [{"seed": True}]}): "Expected `int`, got `bool` - at `$.seeds[0].seed`",
        json.dumps(good | {"seeds": []}): "0 seeds, there must be 1 to 100",
    }.items():
        (tmp_path / "submission.json").write_text(text, encoding="latin-1")
        lines, failed = check(tmp_path)
        assert failed and lines[0].startswith("FAIL  files    submission.json: ") and said in lines[0], lines[0]
        assert len(failures(lines)) == 1 and lines[0].isprintable()


def test_a_forgery_without_a_flaw_is_found_by_scoring_again(copy, data_dir):
    """The last digits are not in the log, so nothing on paper speaks against them."""
    bpb = json.loads((copy / SCORE).read_text())["sliding"]["val_bpb"] - 1e-10
    edit(copy / SCORE, lambda s: s["sliding"].update(val_bpb=bpb))
    edit(copy / METRICS, lambda final: final["score"]["sliding"].update(val_bpb=bpb), -1)
    forge(copy)
    found = failures(check(copy, data=copy)[0])
    assert found.keys() == {"score"} and "scoring again failed: error: " in found["score"], "there is no data"
    found = failures(check(copy, data=data_dir)[0])
    assert found.keys() == {"score"} and "seed 1337: scored again,.sliding.val_bpb is" in found["score"]


def test_nothing_of_a_folder_runs_that_failed(copy, data_dir):
    (copy / "train_gpt.py").write_text("open('ran', 'w')")
    lines, failed = check(copy, data=data_dir)
    assert failed and lines[-1].startswith("skip  score    nothing of a folder is run")
    assert failures(lines).keys() == {"hashes", "bytes", "program", "logs"}


def test_whatever_the_json_holds_gives_lines(copy, quick):
    """Values replaced by others, mostly of another type: a failure with a reason, and no exception."""
    rng = random.Random(0)

    def places(value, path=()):
        yield path
        for key, item in value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(
                value, list) else ():
            yield from places(item, (*path, key))

    for file, line in (("submission.json", None), (METRICS, 0), (METRICS, 1), (METRICS, -1), (SCORE, None)):
        original = (copy / file).read_text()
        value = json.loads(original if line is None else original.splitlines()[line])
        every = list(places(value))[1:]
        for path in rng.sample(every, min(8, len(every))):
            junk = rng.choice([None, -1, 10**30, 1e300, "\x1b", [], {}, [[]], {"a": {}}])

            def change(at, path=path, junk=junk):
                for key in path[:-1]:
                    at = at[key]
                at[path[-1]] = junk

            edit(copy / file, change, line)
            lines, failed = check(copy, leave_out=("program", "imports"))  # which do not read it
            assert failed or path[0] in ("author", "github_id", "blurb", "name"), (file, path, junk)
            assert not any("could not deal with" in text for text in lines), (file, path, junk, lines)
            assert all(text.isprintable() for text in lines)
            (copy / file).write_text(original)


def test_check_of_no_folder(tmp_path, capsys):
    assert check_main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read")
    with pytest.raises(SystemExit):
        check_main(["--claim"])
    assert capsys.readouterr().err.count("\n") == 1
    lines, failed = check(tmp_path)
    assert failed and lines[0] == "FAIL  files    submission.json is missing"


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_p_values():
    t = -2 * math.sqrt(3)  # (1.1 - 1.3) / (0.1 / sqrt 3); with 2 degrees of freedom the distribution is closed
    assert p_value([1.0, 1.1, 1.2], [1.3]) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    t = -0.3 / math.sqrt(0.02 / 3)  # equal variances and numbers: Welch's test has 4 degrees of freedom
    x = t / math.sqrt(1 + t * t / 4)
    assert p_value([1.0, 1.1, 1.2], [1.3, 1.4, 1.5]) == pytest.approx(0.5 + 3 / 8 * x * (1 - x * x / 12), abs=1e-12)
    assert p_value([1.0, 1.1, 1.2], [1.5], margin=0.2) == pytest.approx(p_value([1.0, 1.1, 1.2], [1.3]), abs=1e-12)
    assert p_value([1.3, 1.4, 1.5], [1.0, 1.1, 1.2]) > 0.98, "one-sided"
    assert math.isnan(p_value([1.0], [1.3])) and p_value([1.0, 1.0], [1.3]) == 0
    assert math.isnan(p_value([1.3, 1.3], [1.3]))


@pytest.mark.fast
@pytest.mark.parametrize(("bpb", "against", "reason"), [
    ([1.490, 1.491, 1.492], "1.500", None),  # 0.009 lower: t of 0.0062 is -10.7, p 0.004
    ([1.490, 1.491, 1.492], "1.495", "which must be below 0.01"),  # 0.004 lower, of which 0.0028 are asked
    ([1.490, 1.491, 1.550], "1.600", "which must be below 0.01"),
    ([1.490, 1.491, 1.492], None, "was not tested"),
    ([1.490], "1.600", "p = nan"),
    ([1.490, 1.491, 1.492], "nan", "not a number of bits per byte"),
    ([1.490, 1.491, 1.492], "/no/such/record", "cannot read"),
    ([1.490, 1.491, 1.492], "record", None),
    ([1.490, 1.491, 1.492], "other track", "a record of track cpu"),
    ([1.490, 1.491, 1.492], "other data", "other validation data"),
    ([1.490, 1.491, 1.492], "no seeds", "has no seeds"),
])
def test_a_claim_is_tested(tmp_path, bpb, against, reason):
    summary = {"track": "test", "val_bpb": 1.5, "val_loss": 2.7, "seeds": [{"val_bpb": b} for b in bpb],
               "data_sha256": {"a_val_0.bin": "x", "a_train_0.bin": "y"}}
    record = {"track": "test", "seeds": [{"val_bpb": b} for b in (1.503, 1.502, 1.501)],
              "data_sha256": {"a_val_0.bin": "x", "a_train_0.bin": "other"}}
    changed = {"record": {}, "other track": {"track": "cpu"}, "other data": {"data_sha256": {"a_val_0.bin": "y"}},
               "no seeds": {"seeds": []}}
    if against in changed:
        (tmp_path / "submission.json").write_text(json.dumps(record | changed[against]))
        against = str(tmp_path)
    try:
        faults, text = weigh_claim(summary, True, against)
    except ValueError as e:
        faults, text = [str(e)], ""
    if reason is None:
        assert not faults and "0.002778 bpb: p = " in text
    else:
        assert any(reason in fault for fault in faults), faults


@pytest.mark.fast
def test_forbidden_calls_and_imports():
    def found(text: str) -> list[str]:
        return [what.split(None, 3)[3] for what in forbidden(ast.parse(text))]

    assert found("import urllib.request, os\nfrom torch import load, nn") == ["urllib.request", "torch.load"]
    assert found("def f():\n    import pickle") == ["pickle"]
    assert found("torch.load(x); model.load(x); re.compile(x); m.eval()") == ["torch.load"]
    assert found("np.load(x, allow_pickle=True); np.load(x, allow_pickle=False)") == ["np.load with allow_pickle"]
    assert found("__import__('socket'); exec(x)") == ["__import__", "exec"]
    assert found("import asyncio, math\nfrom multiprocessing import connection, Pool") == [
        "asyncio", "multiprocessing.connection"]
    assert found("subprocess.run(['curl', '-O', x]); subprocess.run(['ls', x])") == ["a command that fetches"]
