"""records/published.py, static.py and findings.py: small invented folders in the shapes of the field, what is read of
them, and each rule seen to fire and, on a sound folder, not to."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from records import findings, published, static
from records.check import main as check_main
from records.findings import ERROR, NOTE, OFFICIAL_BYTES, WARNING
from records.published import ADAPTED, BEFORE, CHUNKED, RUNNING, SLIDING, read_folder, read_log
from records.rules import SubmissionError

TOKENS = 62_021_632
PROGRAM = '''"""An invented trainer."""
import glob
import io
import os

import numpy as np
import torch


class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")


def build_luts(sp, size):
    base_bytes, has_leading_space = np.zeros(size), np.zeros(size, dtype=bool)
    for i in range(sp.vocab_size()):
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            has_leading_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.encode("utf-8"))
    return base_bytes, has_leading_space


def eval_val_sliding(model, val_tokens, seq_len, stride):
    total, context = len(val_tokens) - 1, seq_len - stride
    starts = [ws for ws in range(0, total, stride) if ws + context < total]
    return sum(model(val_tokens[ws : ws + seq_len]) for ws in starts)


def main():
    state = torch.load(io.BytesIO(open("final_model.ptz", "rb").read()), weights_only=True)
    print(glob.glob(Hyperparameters.train_files), state)


if __name__ == "__main__":
    main()
'''
LOSS = {1337: 1.9001, 42: 1.9002, 7: 1.9006}  # sliding, nats per token


def bpb(loss: float, share: float = 1.0) -> float:
    """Bits per byte of a loss on the official text; share: of the bytes that are counted."""
    return loss / math.log(2) * TOKENS / (OFFICIAL_BYTES * share)


def baseline_log(seed: int, loss: float, model: int = 15_000_000, share: float = 1.0, code: int | None = None,
                 print_code: bool = True, steps: int = 8000, seconds: float = 600.04, eval_ms: int = 80_000) -> str:
    """A log as the competition's first trainers print it: the program, a machine, settings, steps, bytes, scores."""
    code = len(PROGRAM.encode()) if code is None else code
    average = 1000 * seconds / steps
    rule = "=" * 100
    head = f"{PROGRAM}\n{rule}\nRunning Python 3.12\n{rule}\n" if print_code else ""
    return head + f"""val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./fineweb_1024_bpe.model
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{TOKENS}
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:{seed}
step:0/20000 val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.01ms
step:{steps}/20000 val_loss:{loss + 0.02:.4f} val_bpb:{bpb(loss + 0.02):.4f} train_time:{1000 * seconds:.0f}ms \
step_avg:{average:.2f}ms
stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{steps}/20000
DIAGNOSTIC post_ema val_loss:{loss + 0.01:.4f} val_bpb:{bpb(loss + 0.01, share):.4f} eval_time:2000ms
Serialized model: 67224983 bytes
Code size: {code} bytes
Total submission size: {67224983 + code} bytes
Serialized model int8+zlib: {model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: {model + code} bytes
final_int8_zlib_roundtrip val_loss:{loss + 0.03:.4f} val_bpb:{bpb(loss + 0.03, share):.4f} eval_time:2500ms
final_int8_zlib_roundtrip_exact val_loss:{loss + 0.03:.8f} val_bpb:{bpb(loss + 0.03, share):.8f}
final_int8_sliding_window val_loss:{loss:.4f} val_bpb:{bpb(loss, share):.4f} stride:64 eval_time:{eval_ms}ms
final_int8_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb(loss, share):.8f}
"""


def adapted_log(seed: int) -> str:
    """A log as later trainers print it: a rank before each line, settings one a line, test-time training last."""
    lines = f"""Hyperparameters:
  prequant_ttt_enabled: False
  seed: {seed}
  train_files: ./data/fineweb_train_*.bin
  vocab_size: 8192
train_shards: 80
val_tokens: 40540160
0/20000 val_loss: 9.0 val_bpb: 3.4
4500/20000 train_loss: 2.9907 train_time: 9.7m tok/s: 6052803
stopping_early: wallclock_cap train_time: 588139ms step: 4523/20000
pre-quantization post-ema val_loss:2.76000000 val_bpb:1.06850000 eval_time:8591ms
Code size (uncompressed): 77814 bytes
Code size (compressed): 17708 bytes
Serialized model quantized+brotli: 15935128 bytes
Total submission size quantized+brotli: 15952836 bytes
quantized_sliding_window val_loss:2.79000000 val_bpb:1.08010000 eval_time:115121ms
  ttt_chunk [1/1238] bpb=1.208830 time=0.7s
ttp: b2/782 bl:2.8299 bb:1.2438 rl:2.3184 rb:1.0680 dl:83-89 gd:1
quantized_ttt_phased val_loss:2.78000000 val_bpb:1.07620000 eval_time:264298ms
total_eval_time:390.1s
"""
    return "".join(f"[default0]:{line}\n" for line in lines.splitlines())


def submission(**changes: object) -> dict:
    values = [round(bpb(loss), 5) for loss in LOSS.values()]
    mean = sum(bpb(loss) for loss in LOSS.values()) / len(LOSS)
    said = {"name": "Invented", "author": "A. Nobody", "github_id": "nobody", "date": "2026-04-01",
            "track": "10min_16mb", "val_bpb": round(mean, 5), "val_loss": 1.9003, "seeds": list(LOSS),
            "seed_results": {str(seed): {"val_bpb": value, "steps": 8000, "step_avg_ms": 75.0, "train_time_s": 600.0}
                             for seed, value in zip(LOSS, values, strict=True)},
            "bytes_total": 15_000_000 + len(PROGRAM.encode())}
    return {key: value for key, value in (said | changes).items() if value is not None}


Files = dict[str, "str | bytes"]


def sound() -> Files:
    """A folder with nothing to find, as file name -> content."""
    files: Files = {f"train_seed{seed}.log": baseline_log(seed, loss) for seed, loss in LOSS.items()}
    files["README.md"] = f"# Invented\n\nArtifact: {15_000_000 + len(PROGRAM.encode()):,} bytes.\n"
    return files | {"train_gpt.py": PROGRAM, "submission.json": json.dumps(submission(), indent=1)}


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def found(folder: Path, *severities: str) -> list[findings.Finding]:
    return [f for f in findings.find(folder)[1] if f.severity in (severities or (ERROR, WARNING))]


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "track_10min_16mb" / "2026-04-01_Invented"


# ---------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_sound_folder_has_no_faults_and_its_score_and_bytes_are_read(place):
    folder = write(place, sound())
    assert not [f.line() for f in found(folder)]
    case, every = findings.find(folder)
    assert {seed: (score.name, score.kind) for seed, (_, score) in case.chosen.items()} == dict.fromkeys(
        LOSS, ("final_int8_sliding_window", SLIDING))
    for seed, (log, score) in case.chosen.items():
        assert score.bpb.value == round(bpb(LOSS[seed]), 8) and score.seconds == 80.0 and score.stride == 64
        lines = (folder / log.name).read_text().split("\n")
        assert f"{score.bpb.value:.8f}" in lines[score.bpb.at.line - 1]
        assert log.model().value == 15_000_000 and log.size("total").value == 15_000_000 + len(PROGRAM.encode())
        assert lines[log.model().at.line - 1].startswith("Serialized model int8+zlib"), "not the raw one"
    texts = [f.text for f in every]
    assert any(f"mean {submission()['val_bpb']}"[:12] in text for text in texts)
    assert any("cannot be said without running" in text for text in texts)
    assert any("below the cap" in text for text in texts)
    assert any("prints the program train_gpt.py as it lies here" in text for text in texts)


@pytest.mark.fast
def test_each_score_of_a_log_stands_under_its_own_name():
    log = read_log("train_seed7.log", baseline_log(7, 1.9))
    assert [(s.name, s.kind, s.bpb.digits) for s in log.finals()] == [
        ("DIAGNOSTIC post_ema", BEFORE, 4), ("final_int8_zlib_roundtrip", CHUNKED, 8),
        ("final_int8_sliding_window", SLIDING, 8)]
    assert [s.kind for s in log.scores][:2] == [RUNNING, RUNNING]
    assert (log.seed, log.val_tokens.value, log.world_size.value) == (7, TOKENS, 8)
    assert (log.steps[-1].step, log.stopped.value) == (8000, pytest.approx(600.04))


@pytest.mark.fast
def test_later_logs_with_ranks_settings_and_test_time_training_are_read():
    log = read_log("x.log", adapted_log(314))
    assert [(s.name, s.kind) for s in log.finals()] == [
        ("pre-quantization post-ema", BEFORE), ("quantized_sliding_window", SLIDING),
        ("quantized_ttt_phased", ADAPTED)]
    assert (log.seed, log.val_tokens.value, log.stopped.value) == (314, 40_540_160, 588.139)
    assert (log.model().value, log.size("code").value, log.size("total").value) == (15_935_128, 17_708, 15_952_836)
    assert log.settings["vocab_size"][0] == "8192" and log.eval_seconds.value == 390.1


@pytest.mark.fast
@pytest.mark.parametrize("text, name, value", [
    ("TTT BPB:          1.008025", "TTT", 1.008025),
    ("final_integrated_exact model_bpb:1.16 ngram_bpb:0.32101837", "ngram", 0.32101837),
    ("final step:10000 val_loss:1.3001 val_bpb:1.8756", "final", 1.8756),
    ("ttt_sliding:done val_loss=1.884390 val_bpb=1.116045 elapsed=474.4s", "ttt_sliding:done", 1.116045),
    ("val_bpb (int4 roundtrip): 1.60", "int4 roundtrip", 1.60),
    ("final_kv_eval_exact backend:none val_loss:3.6 val_bpb:1.9", "final_kv_eval backend:none", 1.9),
    ("[2026-03-26 18:45:12] [RANK 0] final val_bpb = 1.1189", "final", 1.1189),
])
def test_scores_are_read_in_the_words_of_many_authors(text, name, value):
    score = read_log("train.log", text).last()
    assert score.name.endswith(name) and score.bpb.value == value


@pytest.mark.fast
@pytest.mark.parametrize("text", [
    '    log0(f"final_int8_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")', "# final val_bpb: 1.2244",
    "ttt_chunk [1/1238] bpb=1.208830", "delta_bpb: 0.0044", "step:10/20000 val_loss:2.1 val_bpb:1.3 train_time:3ms",
    "improvement over baseline val_bpb: 1.2244",
])
def test_what_only_looks_like_a_result_is_none(text):
    assert not read_log("train.log", text).finals()


@pytest.mark.fast
def test_what_a_printed_program_says_in_its_comments_is_no_result():
    code = PROGRAM.replace('"""An invented trainer."""', '"""Was:\nfinal_roundtrip val_bpb:0.5000\n"""')
    log = read_log("x.log", baseline_log(7, 1.9).replace(PROGRAM, code))
    assert log.printed_code[1].startswith('"""Was:') and min(s.bpb.value for s in log.scores) > 1
    bare = read_log("x.log", code + "final_roundtrip val_bpb:1.2000\n")  # no line of = between them
    assert [s.bpb.value for s in bare.scores] == [1.2]


@pytest.mark.fast
@pytest.mark.parametrize("line, sizes", [
    ("model:11474336 code:73514 total:11547850 (11.55 MB)", (11_474_336, 73_514, 11_547_850)),
    ("artifact: 15546665 bytes (model:15499532 code:47133)", (15_499_532, 47_133, 15_546_665)),
    ("Compressed model: 15,888,496 bytes (zstd22)", (15_888_496, None, None)),
    ("Serialized model int6+zlib(level=9): 14121116 bytes (payload:1 raw_torch:20259003)", (14_121_116, None, None)),
    ("total_bytes=151080891", (None, None, None)),
    ("prune_trial:3 artifact_bytes:15990000 VALID", (None, None, None)),
])
def test_bytes_are_read_in_the_words_of_many_authors(line, sizes):
    log = read_log("train.log", line)
    assert tuple(n and n.value for n in map(log.size, ("model", "code", "total"))) == sizes


@pytest.mark.fast
def test_a_line_number_is_that_of_an_editor_though_bars_redraw_themselves():
    log = read_log("x.log", "a\r\nb\rc\rd\nfinal_roundtrip val_bpb:1.25\r\n")
    assert log.last().bpb.at.line == 3


@pytest.mark.fast
def test_a_log_in_utf_16_is_read(place):
    files = sound()
    files["train_seed7.log"] = str(files["train_seed7.log"]).encode("utf-16")
    assert not found(write(place, files))


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "base 85, xz": lambda code: b"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode(%r)))"
    % base64.b85encode(lzma.compress(code)),
    "base 85, raw LZMA": lambda code: b"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode(%r),3,None,[]))"
    % base64.b85encode(lzma.compress(code, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])),
    "base 64, zlib": lambda code: b"import zlib,base64\nexec(zlib.decompress(base64.b64decode(%r)))"
    % base64.b64encode(zlib.compress(code)),
    "base 64, zlib ": lambda code: b"import gzip,base64\nexec(gzip.decompress(base64.b64decode(%r)))"
    % base64.b64encode(gzip.compress(code)),
}
PADDED = PROGRAM + "".join(f"# {i * i * 7919 % 10007} {i ** 3 % 99991}\n" for i in range(400))


@pytest.mark.fast
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_program_is_weighed_as_it_lies_and_read_as_what_it_holds(packing, place):
    data = PACKINGS[packing](PADDED.encode())
    program = static.Program("train_gpt.py", data)
    assert (program.packed, program.size, program.text.decode()) == (packing.strip(), len(data), PADDED)
    files = with_logs(code=len(data), print_code=False)
    bad = PACKINGS[packing](PADDED.replace("weights_only=True", "weights_only=False").encode())
    folder = write(place, sound() | files | {"train_gpt.py": bad})
    hit = [f for f in found(folder) if f.rule == "pickle"]
    line = PADDED.split("\n").index("def main():") + 2
    assert [str(f.place) for f in hit] == [f"train_gpt.py (unpacked):{line}"]


@pytest.mark.fast
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_is_packed_is_unpacked_to_a_limit(packing):
    program = static.Program("train_gpt.py", PACKINGS[packing](b"import os\n" * 500_000))
    assert len(program.text) <= static.MAX_SOURCES and program.opened.fault


@pytest.mark.fast
def test_code_that_is_imported_is_counted_and_no_other(place):
    files = sound() | {"model/blocks.py": "import torch\n", "model/__init__.py": "", "tools.py": "import os\n" * 99}
    files["train_gpt.py"] = "from model import blocks\n" + PROGRAM
    assert set(read_folder(write(place, files)).counted) == {"train_gpt.py", "model/__init__.py", "model/blocks.py"}


# ---------------------------------------------------------------------------------------------------------------
# What is found: each of these changes the sound folder in one way
# ---------------------------------------------------------------------------------------------------------------


def with_json(**changes: object) -> Files:
    return {"submission.json": json.dumps(submission(**changes), indent=1)}


def with_seed(value: float) -> Files:
    rows = submission()["seed_results"]
    rows["42"]["val_bpb"] = value
    return with_json(seed_results=rows)


def with_logs(**options: object) -> Files:
    return {f"train_seed{seed}.log": baseline_log(seed, loss, **options) for seed, loss in LOSS.items()}


def with_program(old: str, new: str) -> Files:
    assert old in PROGRAM
    code = PROGRAM.replace(old, new)
    logs = with_logs(print_code=False, code=len(code.encode()))
    return {"train_gpt.py": code} | logs | with_json(bytes_total=15_000_000 + len(code.encode()))


TTT = '''def ttt_adapt(model, val_tokens, optimizer):
    for chunk in val_tokens:
        model(chunk).backward()
        optimizer.step()


def main():
    ttt_adapt(None, [], None)
'''
TAIL = """    starts = [ws for ws in range(0, total, stride) if min(ws + seq_len, total) - ws >= 1]
    s = max(seq_len - stride, 0)
"""
LINES = baseline_log(42, LOSS[42]).split("\n")
TOTAL_LINE = next(i for i, line in enumerate(LINES, 1) if line.startswith("Total submission size int8"))
MODEL_LINE, CODE_LINE = TOTAL_LINE - 1, TOTAL_LINE - 3
SLIDING_LINE = TOTAL_LINE + 4

FAULTS: dict[str, tuple[Files, str, str, str, str]] = {
    # files that change; severity, rule, place, words of the finding
    "a total over the cap": (
        {"train_seed42.log": baseline_log(42, LOSS[42], model=16_000_001)}, ERROR, "bytes",
        f"train_seed42.log:{TOTAL_LINE}", "over the cap of 16,000,000"),
    "a model that fits, with code that lies unpacked": (
        with_logs(model=15_999_000, code=500), WARNING, "bytes", f"train_seed1337.log:{MODEL_LINE}",
        "the log counts 500 of code"),
    "a claim over the cap": (with_json(bytes_total=16_400_000), ERROR, "bytes", "submission.json:", "over the cap"),
    "bytes that are none of the logs'": (
        with_json(bytes_total=14_000_000), WARNING, "bytes", "submission.json:", "which no log states"),
    "a run of other code": (with_logs(code=4321, print_code=False), WARNING, "code",
                            f"train_seed1337.log:{CODE_LINE - len(PROGRAM.splitlines()) - 4}", "4,321 bytes of code"),
    "a log of another program": (
        {"train_seed7.log": baseline_log(7, LOSS[7]).replace("import glob\n", "import  glob\n")}, WARNING, "code",
        "train_seed7.log:2", "another program than train_gpt.py"),
    "a claim below every log": (with_json(val_bpb=1.10999, seed_results=None), ERROR, "score", "submission.json:",
                                "below every score"),
    "a claim that no log has": (with_json(val_bpb=1.29, seed_results=None), WARNING, "score", "submission.json:",
                                "no log's score and not their mean"),
    "a claim of one seed": (with_json(val_bpb=round(bpb(LOSS[1337]), 8), seed_results=None), WARNING, "score",
                            "submission.json:", "that of one log"),
    "a claim of the score before quantization": (
        with_json(val_bpb=round(bpb(LOSS[42] + 0.01), 4), seeds=[42], seed_results=None), ERROR, "score",
        "submission.json:", "before quantization"),
    "a mean that is not that of its seeds": (with_json(val_bpb=0.1126), ERROR, "score", "submission.json:",
                                             "the mean of the 3 seeds"),
    "a seed's score that its log does not print": (with_seed(1.12001), ERROR, "score", "submission.json:",
                                                   "of seed 42 is 1.12001"),
    "kinds of scores side by side": (
        with_seed(round(bpb(LOSS[42] + 0.03), 5)), WARNING, "score", "submission.json", "different kinds"),
    "a standard deviation of nothing": (with_json(val_bpb_std=0.0123), WARNING, "score", "submission.json:",
                                        "sample standard deviation"),
    "bytes counted double": (
        with_logs(share=1.2) | with_json(val_bpb=round(sum(bpb(x, 1.2) for x in LOSS.values()) / 3, 5),
                                         seed_results=None),
        ERROR, "text", "train_seed1337.log:", "1,080,891, by which this would be"),
    "bits that are not of the loss": (
        {"train_seed7.log": baseline_log(7, LOSS[7]) + "final_mix val_loss:1.90060000 val_bpb:0.90000000\n"}, WARNING,
        "text", "train_seed7.log:", "no other score of the log makes as many"),
    "a part of the text": (
        {"train_seed7.log": baseline_log(7, LOSS[7]).replace(f"tokens:{TOKENS}", "tokens:6202163")}, WARNING, "text",
        "train_seed7.log:", "10.0% of it"),
    "a log that is missing": (with_json(seeds=[*LOSS, 99]), WARNING, "seeds", "submission.json:", "seed 99"),
    "a log of another seed than its name": (
        {"train_seed42.log": baseline_log(41, LOSS[42]), "submission.json": json.dumps(submission(
            seeds=None, seed_results=None))}, ERROR, "seeds", "train_seed42.log:", "says seed 41, its name 42"),
    "one log for two seeds": (
        {"train_seed8.log": baseline_log(7, LOSS[7])}, ERROR, "seeds", "train_seed8.log", "the same file"),
    "seeds of other settings": (
        {"train_seed7.log": baseline_log(7, LOSS[7]).replace("train_seq_len:1024", "train_seq_len:2048")}, WARNING,
        "settings", "train_seed7.log:", "train_seq_len 1024 and 2048"),
    "training that took too long": (with_logs(seconds=603.2), ERROR, "time", "train_seed", "the track allows 600"),
    "evaluation that took too long": (with_logs(eval_ms=605_000), ERROR, "time", f"train_seed1337.log:{SLIDING_LINE}",
                                      "took 605.0 s"),
    "steps that do not multiply": (
        {"train_seed7.log": baseline_log(7, LOSS[7]).replace("step_avg:75", "step_avg:69")}, WARNING, "time",
        "train_seed7.log:", "8,000 steps of 69"),
    "claimed steps that do not multiply": (
        with_json(seed_results={"7": submission()["seed_results"]["7"] | {"step_avg_ms": 60}}), WARNING, "time",
        "submission.json:", "make 480.0 s"),
    "validation shards in training": (
        with_program('"fineweb_train_*.bin"', '"fineweb_val_*.bin"'), ERROR, "data", "train_gpt.py:12",
        'fineweb_val_*.bin'),
    "validation shards in training by a switch": (
        with_program('"fineweb_train_*.bin"', '"fineweb_val_*.bin" if os.environ.get("V") else "fineweb_train_*.bin"'),
        WARNING, "data", "train_gpt.py:12", "by a switch"),
    "validation shards in training below a switch": (
        with_program('"fineweb_train_*.bin")', '"fineweb_val_*.bin" if os.environ.get("V") else "x")\n'
                     '    train_files = "fineweb_val_*.bin"'), ERROR, "data", "train_gpt.py:13", "fineweb_val_*.bin"),
    "adaptation before scoring": (with_program("def main():\n", TTT), WARNING, "adapt", "train_gpt.py:36",
                                  "def ttt_adapt"),
    "network": (with_program("import glob\n", "import requests\n"), WARNING, "network", "train_gpt.py:2",
                "`import requests`"),
    "a command that fetches": (
        with_program("    main()\n", '    os.system("pip install zstandard")\n    main()\n'), WARNING, "network",
        "train_gpt.py:42", "pip install"),
    "pickle": (with_program("weights_only=True", "weights_only=False"), WARNING, "pickle", "train_gpt.py:37",
               "torch.load("),
    "windows that score the tail again": (
        with_program("    starts = [ws for ws in range(0, total, stride) if ws + context < total]\n", TAIL), NOTE,
        "windows", "train_gpt.py:32", "score"),
    "byte tokens counted as text": (with_program("sp.is_byte(i)", "i < 3"), WARNING, "bytes/tok", "train_gpt.py:22",
                                    "is_byte"),
    "spaces counted twice": (with_program('len(piece.encode("utf-8"))', 'len(piece.encode("utf-8")) + 1'), WARNING,
                             "bytes/tok", "train_gpt.py:26", "counted twice"),
    "a program that does not parse": (with_program("import glob\n", "import glob glob\n"), WARNING, "code",
                                      "train_gpt.py", "cannot parse"),
    "a program in a log's place": ({"train_seed7.log": PROGRAM}, ERROR, "folder", "train_seed7.log",
                                   "is the program train_gpt.py"),
    "no claim": ({"submission.json": "[]"}, ERROR, "folder", "submission.json", "not an object"),
    "a number that is none": ({"submission.json": '{"val_bpb": NaN}'}, ERROR, "folder", "submission.json", "NaN"),
    "a number beyond all": ({"submission.json": '{"val_bpb": 1e999}'}, ERROR, "folder", "submission.json", "range"),
    "no score claimed": (with_json(val_bpb=None, val_loss=None), WARNING, "claim", "submission.json", "no val_bpb"),
    "a pickle": ({"model.pt": b"\x80\x02}q\x00."}, NOTE, "pickle", "model.pt", "not opened"),
    "a tokenizer in another format": ({"tokenizer.json": "{}"}, NOTE, "tokenizer", "tokenizer.json", "not audited"),
    "a tokenizer that is none": ({"mine.model": b"\x00" * 99}, WARNING, "tokenizer", "mine.model", "not a Sentence"),
}


@pytest.mark.fast
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_with_its_place(fault, place):
    """And nothing of its rule is in the sound folder, which has no errors and warnings at all."""
    files, severity, rule, where, words = FAULTS[fault]
    every = found(write(place, sound() | files), ERROR, WARNING, NOTE)
    hits = [f for f in every if (f.severity, f.rule) == (severity, rule) and words in f.text + f.do]
    assert hits, "\n".join(f.line() for f in every)
    assert str(hits[0].place).startswith(where), hits[0].line()
    before = found(write(place.parent / "sound", sound()), ERROR, WARNING, NOTE)
    assert not [f for f in before if (f.severity, f.rule) == (severity, rule) and words in f.text + f.do]


@pytest.mark.fast
def test_limits_of_time_are_not_those_of_unlimited_compute(tmp_path):
    files = sound() | with_logs(seconds=7200.0, eval_ms=900_000)
    assert not [f for f in found(write(tmp_path / "track_non_record_16mb" / "Long", files)) if f.rule == "time"]


@pytest.mark.fast
def test_a_value_in_another_folder_of_logs_supports_a_claim(place):
    """Some run their evaluation again and keep its logs beside the training's."""
    files = sound() | with_seed(1.12001)
    files["eval/seed_42.log"] = baseline_log(42, 1.9, print_code=False).replace(f"{bpb(1.9):.8f}", "1.12001234")
    assert not [f for f in found(write(place, files)) if "of seed 42 is" in f.text]


@pytest.mark.fast
def test_a_second_log_of_a_seed_is_named_and_its_bytes_count(place):
    files, more = sound(), baseline_log(7, 1.95)
    size = 15_000_000 + len(PROGRAM.encode())
    assert f"{size}" in more
    files["other_seed7.log"] = more.replace(f"{size}", "16977717")
    every = found(write(place, files), WARNING, NOTE)
    assert any("1 more log(s)" in f.text for f in every)
    assert any(f.rule == "bytes" and "16,977,717 bytes in all" in f.text for f in every if f.severity == WARNING)
    other = write(place.parent / "other", files | with_json(bytes_total=16_000_000 - 5)
                  | {"other_seed7.log": more.replace(f"{size}", "15999995")})
    assert not [f for f in found(other) if "which no log states" in f.text], "a log states it"


@pytest.mark.fast
def test_seconds_since_1970_before_each_line_are_no_part_of_it(place):
    files = sound()
    for name in list(files):
        if name.endswith(".log"):
            lines = str(files[name]).splitlines()
            files[name] = "".join(f"1776142719.{i:03d} {line}\n" for i, line in enumerate(lines))
    case, every = findings.find(write(place, files))
    assert {score.name for _, score in case.chosen.values()} == {"final_int8_sliding_window"}
    assert any(f.rule == "time" for f in every) and any(f.rule == "text" for f in every)


@pytest.mark.fast
def test_a_sound_tokenizer_passes_and_one_without_a_lone_space_does_not(data_dir, place):
    from tern.tokenizers import protobuf_fields

    model = next(data_dir.glob("*.model")).read_bytes()
    good = found(write(place, sound() | {"t.model": model}), ERROR, WARNING, NOTE)
    assert [f.severity for f in good if f.rule == "tokenizer"] == [NOTE]
    lone = "▁".encode()
    pieces = [body for number, body in protobuf_fields(model) if number == 1 and isinstance(body, bytes)]
    old = next(body for body in pieces if dict(protobuf_fields(body))[1] == lone)
    other = old.replace(lone, "\u2582".encode())  # of as many bytes
    bad = found(write(place, {"t.model": model.replace(old, other, 1)}), WARNING)
    assert [f.rule for f in bad if "standalone" in f.text] == ["tokenizer"]


# ---------------------------------------------------------------------------------------------------------------
# The rule for a record
# ---------------------------------------------------------------------------------------------------------------


def test_p_is_that_of_the_competitions_rule(place):
    """Against a number and against a published folder: 0.005 nats at p < 0.01."""
    from records.claim import p_value

    folder = write(place, sound())
    values = [round(bpb(loss), 8) for loss in LOSS.values()]
    for ahead, severity in ((0.008, NOTE), (0.004, WARNING)):
        record = bpb(1.9003 + ahead)
        line = next(f for f in findings.find(folder, str(record))[1] if f.rule == "record")
        p = p_value(values, [record], 0.005 * sum(values) / sum(LOSS.values()))
        assert line.severity == severity and f"p = {p:.3g}" in line.text
    other = sound() | {f"train_seed{s}.log": baseline_log(s, x + 0.05) for s, x in LOSS.items()}
    rival = write(place.parent / "older", other | with_json(val_bpb=None, seed_results=None))
    line = next(f for f in findings.find(folder, str(rival))[1] if f.rule == "record")
    assert line.severity == NOTE and "(n = 3)" in line.text
    (rival / "submission.json").unlink()
    assert line in findings.find(folder, str(rival))[1]


# ---------------------------------------------------------------------------------------------------------------
# The command, and what is hostile
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_command_ends_with_0_only_without_errors_and_writes_json(place, tmp_path, capsys):
    folder = write(place, sound())
    out = tmp_path / "found.json"
    assert check_main([str(folder), "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    said = json.loads(out.read_text())
    assert printed[-1].startswith("0 errors, 0 warnings, ") and len(printed) == len(said["findings"]) + 1
    assert [(row["seed"], row["bytes_model"]) for row in said["seeds"]] == [(s, 15_000_000) for s in sorted(
        LOSS, key=lambda s: f"train_seed{s}.log")]
    assert {"severity", "rule", "place", "text", "do"} == said["findings"][0].keys()
    write(place, FAULTS["a total over the cap"][0])
    assert check_main([str(folder), "--json", str(out)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("error   bytes     train_seed42.log:") and json.loads(out.read_text())["counts"]["error"]


@pytest.mark.fast
@pytest.mark.parametrize("more", [["--data", "x"], ["--against", "nan"], ["--json", "/nowhere/x.json"]])
def test_what_cannot_be_done_is_one_error(more, place, capsys):
    assert check_main([str(write(place, sound())), *more]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.fast
@pytest.mark.parametrize("files, ours", [
    ({"submission.json": '{"files": {}, "claim": "none"}'}, True),
    ({"submission.json": "{", "source/pack.py": ""}, True), (sound(), False),
    (sound() | {"source/train.py": ""}, False), ({"submission.json": "[]"}, False),
])
def test_our_own_bundles_have_a_referee_of_their_own(files, ours, place, capsys):
    check_main([str(write(place, files))])
    out = capsys.readouterr().out
    assert ("FAIL  files" in out) == ours and out.endswith(" notes\n") != ours


@pytest.mark.fast
@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_no_folder_is_one_error(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert check_main([str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.fast
def test_nothing_of_a_folder_is_run_and_no_link_is_followed(place, tmp_path):
    ran, secret = tmp_path / "ran", tmp_path / "secret.log"
    secret.write_text("final_roundtrip val_bpb:0.5\n")
    bait = f"open({str(ran)!r}, 'w').close()\n"
    files = sound() | {"train_gpt.py": bait + PROGRAM, "conftest.py": bait, "torch.py": bait, "setup.py": bait}
    folder = write(place, files)
    (folder / "train_secret.log").symlink_to(secret)
    (folder / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(folder / "train_pipe.log")
    links = [f for f in found(folder, ERROR) if f.rule == "folder"]
    assert {str(f.place) for f in links} == {"train_secret.log", "elsewhere", "train_pipe.log"}
    assert not ran.exists() and all(s.bpb.value != 0.5 for log in read_folder(folder).logs for s in log.scores)


HOSTILE: dict[str, Files] = {
    "binary": {"train_seed42.log": os.urandom(1 << 16), "submission.json": os.urandom(999), "train_gpt.py": b"\0" * 99},
    "invalid UTF-8": {"train_seed42.log": b"\xff\xfe\xff final val_bpb:1.2\n" * 9, "README.md": b"\xff" * 99,
                      "submission.json": b'{"val_bpb": "\xff"}', "train_gpt.py": b"# \xff\n"},
    "nesting": {"submission.json": "[" * 100_000, "train_gpt.py": "(" * 100_000, "a.py": "-" * 100_000 + "1",
                "b.py": "x = " + "f(" * 5000 + ")" * 5000},
    "long lines": {"train_seed42.log": "val_loss:" * 100_000 + "\n" + "[a]" * 100_000 + "\n" + "a " * 100_000
                   + "\n" + "bpb " * 100_000 + "\n" + "1" * 200_000 + " bytes\n" + "=" * 200_000},
    "huge numbers": {"train_seed42.log": "final_x val_loss:999999.9 val_bpb:999999.9\nstep:99999999/1 train_time:"
                     "9999999999999999ms step_avg:9ms\nseed:9999999999\nval_tokens: 999999999999\nArtifact: "
                     "99999999999 bytes\n", "submission.json": '{"val_bpb": 1e18, "seeds": [9007199254740993]}'},
    "odd types": {"submission.json": json.dumps({"val_bpb": {"mean": None}, "seeds": {"1": None, "2": [], "": {}},
                  "seed_results": [{"seed": 1}, 3, None], "track": [1], "bytes_total": True, "val_loss": -1.0,
                  "name": None, "val_bpb_std": "x"})},
    "zeros": {"train_seed42.log": "step:0/0 train_time:0ms step_avg:0ms\nfinal_roundtrip val_loss:0.0000 "
              "val_bpb:0.0000\nval_tokens: 000\nworld_size:0\n"},
    "names": {"train_\n\x1b[31mseed42.log": "final_roundtrip val_bpb:1.2\n", "train_gpt .py": PROGRAM},
}


@pytest.mark.fast
@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_hostile_gives_findings_and_no_traceback(what, place, capsys):
    write(place, HOSTILE[what])
    assert check_main([str(place)]) in (0, 1)
    out, err = capsys.readouterr()
    assert not err and out.endswith(" notes\n") and out.isprintable() is False and "\x1b" not in out
    assert "could not deal" not in out and "Traceback" not in out


@pytest.mark.fast
def test_a_folder_too_large_is_refused_and_a_file_too_large_is_not_read(place, monkeypatch):
    monkeypatch.setattr(published, "MAX_READ", 20_000)
    files = sound() | {"train_seed42.log": baseline_log(42, LOSS[42]) * 20}
    text = [f.text for f in found(write(place, files)) if str(f.place) == "train_seed42.log"]
    assert any("not looked at" in line for line in text)
    monkeypatch.setattr(published, "MAX_FILES", 3)
    with pytest.raises(SubmissionError, match="more than 3 files"):
        findings.find(place)
