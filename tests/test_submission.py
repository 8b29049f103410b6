"""submission.py: the one file is the program, and every way to tamper with a submission is found for its reason."""

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
from dataclasses import replace
from pathlib import Path

import pytest

import pack
import submission
from conftest import ROOT, VOCAB
from submission import Case, SubmissionError, check, check_claim, check_files, one_file, p_value

SEED = 1337
ARTIFACT, LOG, METRICS, SCORE = (submission.SEED_FILES[name].format(SEED) for name in
                                 ("model.tern", "log.txt", "metrics.jsonl", "score.json"))


STRIP = functools.lru_cache(submission.strip)
ONE_FILE = functools.lru_cache(lambda items: one_file(dict(items)))


@pytest.fixture(scope="module")
def bundle(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "Tiny"
    assert pack.main(["bundle", str(tiny_run[0]), "--out", str(folder), "--blurb", "A test."]) == 0
    return folder


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture
def quick(monkeypatch):
    """Parse and compress the same sources once."""
    monkeypatch.setattr(submission, "strip", STRIP)
    monkeypatch.setattr(submission, "one_file", lambda sources: ONE_FILE(tuple(sources.items())))


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in pack.code_files()}


def edit(path: Path, change, line: int | None = None) -> None:
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


def forge(folder: Path) -> None:
    """Make submission.json what it would be if the folder's other files were honest."""
    case = Case(folder)
    list(check_files(case))
    reseal(folder, case.summary)


def reseal(folder: Path, change: dict | None = None) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
             if p.is_file() and p.name != "submission.json"}
    table = {name: {"bytes": len(data), "sha256": submission.sha256(data)} for name, data in files.items()}
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
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


# ---------------------------------------------------------------------------------------------------------------
# The one file
# ---------------------------------------------------------------------------------------------------------------


def test_what_bundle_writes_passes_check(bundle, data_dir, capsys):
    assert pack.main(["check", str(bundle), "--data", str(data_dir), "--against", "9.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in submission.CHECKS]
    s = json.loads((bundle / "submission.json").read_text())
    assert f"{ARTIFACT} {s['val_bpb']:.8f}" in lines[-1], "scored again by the bundle's own program"
    assert s["bytes_code"] == (bundle / "train_gpt.py").stat().st_size < s["bytes_code_source"] / 3
    assert s["bytes_total"] == s["bytes_model"] == (bundle / ARTIFACT).stat().st_size
    assert f"{s['val_bpb']:.4f}" in (bundle / "README.md").read_text()
    assert "pytest" not in (bundle / "requirements.txt").read_text()
    assert not (bundle / "source" / "__pycache__").exists()


def test_the_one_file_trains_and_scores_alone(bundle, data_dir, tmp_path):
    shutil.copy(bundle / "train_gpt.py", tmp_path)
    done = alone("train_gpt.py", "--preset", "tiny", "--vocab-size", VOCAB, "--data-path", data_dir, "--iterations", 3,
                 "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "roundtrip gap             0.00000000   (logits identical bit for bit)" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "train_gpt.py"]
    records = [json.loads(line) for line in (tmp_path / "runs/tiny_seed1337/metrics.jsonl").read_text().splitlines()]
    program = (bundle / "train_gpt.py").read_bytes()
    assert records[0]["source_sha256"] == {"train_gpt.py": submission.sha256(program)}
    assert records[-1]["bytes_code"] == len(program)

    found = alone("train_gpt.py", "pack", "inspect", bundle / ARTIFACT, cwd=tmp_path)
    assert found.returncode == 0 and "blocks.1.mlp.fc.weight" in found.stdout
    refused = alone("train_gpt.py", "pack", "check", bundle, cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.startswith("error: check is not in a submission's one file")


def test_the_bundle_prepares_the_same_data_alone(bundle, data_dir, tmp_path):
    assert {f"{name}.py" for name in submission.DATA_MODULES} == {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "data").glob("*.py")}
    shutil.copytree(bundle / "source", tmp_path / "source")
    done = alone("source/data/prepare.py", "--source", "text", "--input", data_dir.parent / "corpus.jsonl", "--out",
                 "shards", "--vocab-size", VOCAB, "--val-fraction", 0.06, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "shards/manifest.json").read_bytes() == (data_dir / "manifest.json").read_bytes()


def test_the_one_file_is_a_module_that_compiles_to_one_graph(bundle, tmp_path):
    """Dynamo skips code by the name of its file; the graphs themselves do not depend on it."""
    shutil.copy(bundle / "train_gpt.py", tmp_path)
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


def test_the_one_file_says_how_to_unpack_it(bundle, tmp_path, sources):
    shutil.copy(bundle / "train_gpt.py", tmp_path)
    text = (tmp_path / "train_gpt.py").read_text()
    command = text[text.index("python -c") : text.index('"""', 3)].replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "".join(f"{m}\n" for m in submission.strip_modules(sources).values()), done.stderr
    assert submission.unpack(text.encode()) == submission.strip_modules(sources)


def test_the_same_sources_give_the_same_bytes(bundle, sources):
    backwards = dict(reversed(sources.items()))
    assert one_file(sources) == one_file(backwards) == (bundle / "train_gpt.py").read_bytes()
    assert one_file(sources | {"pack.py": sources["pack.py"] + b"\n# more\n"}) == one_file(sources)


def test_strip_keeps_the_program():
    source = b'"""Kept."""\nx = 1  # a\nclass E(Error):\n    """Gone."""\ndef f():\n    """Gone."""\n    return "# b"\n'
    assert submission.strip(source, "x.py").splitlines() == [
        '"""Kept."""', "x = 1", "", "class E(Error):", "    pass", "", "def f():", "    return '# b'"]
    for bad in (b"def", b"\xff", b"x = (" * 9999, b"#" * (submission.MAX_SOURCE + 1)):
        with pytest.raises(SubmissionError, match="x.py: not a Python module"):
            submission.strip(bad, "x.py")


def test_another_version_of_python_or_liblzma_is_no_fault(copy, sources, monkeypatch):
    monkeypatch.setattr(submission, "FILTERS", [{"id": lzma.FILTER_LZMA2, "preset": 1}])
    (copy / "train_gpt.py").write_bytes(one_file(sources))
    monkeypatch.undo()
    forge(copy)
    lines, failed = check(copy)
    assert not failed and any("the same modules" in line for line in lines)


def test_a_bundle_of_when_the_data_program_was_one_file_passes(copy):
    for name in ("messages", "places", "textfiles"):
        (copy / f"source/data/{name}.py").unlink()
    assert failures(check(copy)[0]).keys() == {"files"}, "submission.json lists them"
    reseal(copy)
    assert not check(copy)[1]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def test_over_the_cap_writes_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    size = (tiny_run[0] / "model.tern").stat().st_size
    monkeypatch.setitem(submission.TRACKS, "tiny", replace(submission.TRACKS["tiny"], cap_bytes=size - 1200))
    assert pack.main(["bundle", str(tiny_run[0]), "--out", str(tmp_path / "out")]) == 1
    assert "are 1,200 over the cap" in capsys.readouterr().err
    monkeypatch.setitem(submission.TRACKS, "tiny", replace(submission.TRACKS["tiny"], cap_bytes=size, count_code=True))
    assert pack.main(["bundle", str(tiny_run[0]), "--out", str(tmp_path / "out")]) == 1
    assert "the largest model and the code" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_submitted(tiny_run, bundle, tmp_path, capsys, quick, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")

    def refused(*runs: Path, out: Path = tmp_path / "out") -> str:
        assert pack.main(["bundle", *map(str, runs), "--out", str(out)]) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
        return capsys.readouterr().err

    assert "not overwritten" in refused(run, out=bundle)
    assert "no metrics.jsonl" in refused(tmp_path) or "no log.txt" in refused(tmp_path)
    assert "is given twice" in refused(run, run)
    (run / "model.tern").write_bytes(b"TRNY")  # everything that check finds, bundle finds first
    assert "not an artifact" in refused(run)
    edit(run / "metrics.jsonl", lambda header: header["source_sha256"].update({"pack.py": "0" * 64}), line=0)
    assert "pack.py was changed since the run: run it again" in refused(run)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"type": ')
    assert "was the run killed while it wrote" in refused(run)
    (run / "metrics.jsonl").write_bytes(b"")
    assert "does not begin with a header" in refused(run)


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
    pack.write_artifact(folder / ARTIFACT, tensors, meta)
    forge(folder)


def edit_submission(**change):
    return lambda folder: edit(folder / "submission.json", lambda s: s.update(change))


def remove_readme(folder: Path) -> None:
    (folder / "README.md").unlink()


def readme_is_a_link(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(ROOT / "README.md")


def remove_a_key(folder: Path) -> None:
    edit(folder / "submission.json", lambda s: s.pop("val_loss"))


def wrong_type(folder: Path) -> None:
    edit(folder / "submission.json", lambda s: s.update(val_bpb="1.0"))


def edit_a_log_line(folder: Path) -> None:
    bpb = json.loads((folder / SCORE).read_text())["sliding"]["val_bpb"]
    substitute(folder / LOG, f"sliding val_bpb           {bpb:.8f}", f"sliding val_bpb           {bpb - 0.1:.8f}")
    reseal(folder)


def more_seconds(folder: Path) -> None:
    """Everywhere where the seconds of training stand."""
    seconds = json.loads((folder / METRICS).read_text().splitlines()[-1])["seconds"]
    names, total, before = submission.PHASES, sum(seconds.values()), f"train {seconds['train']:.1f}"
    assert list(names) == ["load", "compile", "train", "pack", "score"]
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


def fewer_seconds(folder: Path) -> None:
    edit(folder / METRICS, lambda final: final["seconds"].update(train=0.0), -1)
    forge(folder)


def a_gap(folder: Path) -> None:
    edit(folder / METRICS, lambda final: final.update(roundtrip_gap=1e-9), -1)
    forge(folder)


def import_socket(folder: Path) -> None:
    """In the source, and everywhere where its hash and size stand."""
    path, line = folder / "source/pack.py", "import struct\n"
    before = path.read_text()
    size = sum(p.stat().st_size for p in (folder / "source").glob("*.py"))
    substitute(path, line, line + "from socket import create_connection\n")
    after, sources = path.read_text(), {p.name: p.read_bytes() for p in (folder / "source").glob("*.py")}
    new = sum(map(len, sources.values()))
    (folder / "train_gpt.py").write_bytes(submission.one_file(sources))
    substitute(folder / LOG, before, after)
    model = (folder / ARTIFACT).stat().st_size
    for old, now in ((f"{size} bytes", f"{new} bytes"), (f"code {size:,} ", f"code {new:,} "),
                     (f"size: {model + size} ", f"size: {model + new} ")):
        substitute(folder / LOG, old, now)
    edit(folder / METRICS, lambda h: h["source_sha256"].update({"pack.py": submission.sha256(after.encode())}), 0)
    edit(folder / METRICS, lambda final: final.update(bytes_code=new), -1)
    forge(folder)


def add_a_pickle(folder: Path) -> None:
    (folder / "extra.pkl").write_bytes(b"\x80\x04N.")


def pad_the_program(folder: Path) -> None:
    with open(folder / "train_gpt.py", "ab") as f:
        f.write(b"# more\n")
    forge(folder)


def another_program(folder: Path) -> None:
    sources = {p.name: p.read_bytes() for p in (folder / "source").glob("*.py")}
    sources["eval_bpb.py"] = sources["eval_bpb.py"].replace(b"total / math.log(2)", b"total / math.log(3)")
    (folder / "train_gpt.py").write_bytes(submission.one_file(sources))
    forge(folder)


def duplicate_a_row(folder: Path) -> None:
    edit(folder / "submission.json", lambda s: s["seeds"].append(s["seeds"][0]))
    forge(folder)


def edit_the_score(folder: Path) -> None:
    edit(folder / SCORE, lambda s: s["sliding"].update(val_bpb=1.0))
    reseal(folder)


def two_log_lines(folder: Path) -> None:
    with open(folder / LOG, "a") as f:
        f.write("final_sliding_window_exact val_loss:1.00000000 val_bpb:1.00000000\n")
    reseal(folder)


def text_instead(text: str):
    return lambda folder: (folder / "submission.json").write_text(text)


TAMPERED = {  # name -> (what is done, check -> reason of each check that fails)
    "bit": (flip_a_bit, {"hashes": f"{ARTIFACT}.sha256", "sources": "checksum does not match"}),
    "bit, resealed": (flip_a_bit_and_reseal, {"sources": "checksum does not match"}),
    "artifact": (another_artifact, {"sources": "but the metrics are of"}),
    "val_bpb": (edit_submission(val_bpb=1.0), {"logs": r"submission.json.val_bpb is 1.0, not \d"}),
    "bytes_total": (edit_submission(bytes_total=99), {"bytes": "bytes_total is 99, but by the files and the rules"}),
    "cap_bytes": (edit_submission(cap_bytes=10**9), {"bytes": "cap_bytes is 1000000000, but .* test it is 128000"}),
    "bytes_code": (edit_submission(bytes_code=99), {"bytes": "bytes_code is 99"}),
    "track": (edit_submission(track="cpu_10min_128kb"), {
        "bytes": "preset 'tiny' is not one of track cpu_10min_128kb"}),
    "no track": (edit_submission(track="mine"), {"files": "there is no track 'mine'"}),
    "more keys": (edit_submission(record=True), {"logs": "a key 'record' that does not belong"}),
    "readme": (remove_readme, {"files": "README.md is missing"}),
    "link": (readme_is_a_link, {"files": "README.md is a link"}),
    "key": (remove_a_key, {"files": "submission.json has no key 'val_loss'"}),
    "type": (wrong_type, {"files": "submission.json.val_bpb must be a number, not '1.0'"}),
    "log": (edit_a_log_line, {"logs": "'sliding val_bpb .*', but metrics_seed1337.jsonl gives"}),
    "log line": (two_log_lines, {"logs": "2 lines begin with 'final_sliding_window_exact'"}),
    "seconds": (more_seconds, {"seconds": "700.0 train seconds, track test allows 600"}),
    "early": (fewer_seconds, {"seconds": "step 1 ended at .* after the 0.0 s", "logs": r"\[train\]"}),
    "gap": (a_gap, {"logs": "the file is not the model that was trained"}),
    "socket": (import_socket, {"imports": r"source/pack.py: line \d+ imports socket.create_connection"}),
    "pickle": (add_a_pickle, {"files": "extra.pkl does not belong", "hashes": "extra.pkl is not listed",
                              "imports": "extra.pkl: begins as a pickle"}),
    "padded": (pad_the_program, {"program": "before or after its sources"}),
    "program": (another_program, {"program": "its module eval_bpb is not source/eval_bpb.py"}),
    "seed": (duplicate_a_row, {"seeds": "seed 1337 occurs 2 times"}),
    "claim": (edit_submission(claim="record"), {"seeds": r"with 1 seed\(s\), it needs 3", "claim": "was not tested"}),
    "score": (edit_the_score, {"logs": "score_seed1337.json.sliding.val_bpb is 1.0, not"}),
    "not json": (text_instead("{"), {"files": "submission.json: not JSON"}),
    "nan": (text_instead('{"val_bpb": NaN}'), {"files": "NaN is not a number"}),
    "twice": (text_instead('{"val_bpb": 1, "val_bpb": 2}'), {"files": "a key occurs twice"}),
    "deep": (text_instead("[" * 100_000), {"files": "submission.json: not JSON"}),
    "list": (text_instead("[]"), {"files": "must be an object"}),
    "big": (text_instead("9" * 10_000), {"files": "submission.json: not JSON"}),
    "escape": (edit_submission(track="\x1b[2J"), {"files": r"no track '\\x1b\[2J'"}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_for_its_reason(copy, name, quick):
    tamper, expected = TAMPERED[name]
    tamper(copy)
    lines, failed = check(copy)
    found = failures(lines)
    assert failed and found.keys() >= expected.keys(), lines
    for check_name, reason in expected.items():
        assert re.search(reason, found[check_name]), found
    assert found.keys() - expected.keys() <= ({"bytes", "logs"} if name in ("artifact", "gap") else set()), found


def test_a_forgery_without_a_flaw_is_found_by_scoring_again(copy, data_dir):
    """The last digits are not in the log, so nothing on paper speaks against them."""
    bpb = json.loads((copy / SCORE).read_text())["sliding"]["val_bpb"] - 1e-10
    edit(copy / SCORE, lambda s: s["sliding"].update(val_bpb=bpb))
    edit(copy / METRICS, lambda final: final["score"]["sliding"].update(val_bpb=bpb), -1)
    forge(copy)
    found = failures(check(copy, data=data_dir)[0])
    assert found.keys() == {"score"} and "seed 1337: scored again,.sliding.val_bpb is" in found["score"]


def test_nothing_of_a_folder_runs_that_failed(copy, data_dir):
    (copy / "train_gpt.py").write_text("open('ran', 'w')")
    lines, failed = check(copy, data=data_dir)
    assert failed and lines[-1].startswith("skip  score    nothing of a folder is run")
    assert failures(lines).keys() == {"hashes", "bytes", "program"}


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
    assert pack.main(["check", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read")
    lines, failed = check(tmp_path)
    assert failed and lines[0] == "FAIL  files    submission.json is missing"


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------


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
])
def test_a_claim_is_tested(copy, tmp_path, bpb, against, reason):
    case = Case(copy)
    assert not list(check_files(case))
    row = case.summary["seeds"][0]
    case.summary = case.summary | {"val_bpb": 1.5, "val_loss": 2.7, "seeds": [row | {"val_bpb": b} for b in bpb]}
    case.found["claim"] = "record"
    if against in ("record", "other track", "other data"):
        record = {"track": "cpu" if against == "other track" else "test", "seeds": [
            {"val_bpb": b} for b in (1.503, 1.502, 1.501)], "data_sha256": {"a_val_0.bin": "x"}}
        if against != "other data":
            record["data_sha256"] = case.summary["data_sha256"]
        (tmp_path / "submission.json").write_text(json.dumps(record))
        against = str(tmp_path)
    case.against = against
    try:
        faults = list(check_claim(case))
    except ValueError as e:
        faults = [str(e)]
    assert (reason is None and not faults) or any(reason in fault for fault in faults), faults
    if not faults:
        assert "0.002778 bpb: p = " in case.notes[-1]


def test_forbidden_calls_and_imports():
    def found(text: str) -> list[str]:
        return [what.split(None, 3)[3] for what in submission.forbidden(ast.parse(text))]

    assert found("import urllib.request, os\nfrom torch import load, nn") == ["urllib.request", "torch.load"]
    assert found("def f():\n    import pickle") == ["pickle"]
    assert found("torch.load(x); model.load(x); re.compile(x); m.eval()") == ["torch.load"]
    assert found("np.load(x, allow_pickle=True); np.load(x, allow_pickle=False)") == ["np.load with allow_pickle"]
    assert found("__import__('socket'); exec(x)") == ["__import__", "exec"]
