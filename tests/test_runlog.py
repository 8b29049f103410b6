"""tern/runlog.py: what a run shows, and that it goes on where a file or the terminal takes no more."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from dataclasses import replace

import pytest

from tern import runlog

pytestmark = pytest.mark.fast

SETTINGS = {"run_id": "a", "iterations": 100, "max_wallclock_seconds": 60.0, "eval_stride": 32, "train_seq_len": 64,
            "cap_bytes": 1000, "cap_counts_code": False, "data_path": "d", "num_layers": 2, "model_dim": 32,
            "num_heads": 2, "num_kv_heads": 1, "vocab_size": 400, "train_batch_tokens": 1024}
HEADER = runlog.Header(runlog.SCHEMA, "tiny", ["--seed", "1"], SETTINGS, {"iterations": "preset"}, {"cores": 2}, 1,
                       {"train_gpt.py": "f" * 64}, "e" * 64, {"x_val_0.bin": "d" * 64}, "c" * 64, 12345, 0)
FACTS = runlog.Preflight("cpu", "asked for", 1, 80, 1000, 100, {"matrices codes": ("ternary", 500, 100.4),
                         "header": ("", 0, 99.0)}, 300, 512, 0.0, False, ["a notice"])
STEP = runlog.Step(50, 2.5, 20.0, 0.5, 1024, 51200, 0.25, 0.125, 0.75, 0.9, 64)
SCORE = {"val_loss": 1.5, "val_bpb": 1.25, "tokens": 99, "bytes": 198, "seconds": 2.0}
VALIDATION = runlog.Validation(50, 20.0, 1.5, 1.25, 99, 198, 2.0)
FINAL = runlog.Final(100, 102400, SCORE, {"chunked": SCORE, "sliding": SCORE | {"val_bpb": 1.125},
                                           "seq_len": 256}, 0.0, True,
                     dict(zip(runlog.PHASES, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)), 800, 300, 800, 1000, True,
                     "0123456789abcdef" * 4)


def line_of(lines: list[str], begin: str) -> str:
    found = [line for line in lines if line.startswith(begin)]
    assert len(found) == 1, lines
    return found[0]


# -- where it goes -------------------------------------------------------------------------------------------------


def test_every_record_is_a_line_of_strict_json_with_its_type(tmp_path, capsys):
    records = [HEADER, runlog.Phase("load", 1.5), STEP, replace(STEP, zero_frac=math.nan, churn=None),
               VALIDATION, runlog.Memory([10], [0], [0], 0.0), FINAL]
    log = runlog.Log(tmp_path, 0, append=False)
    for record in records:
        log.record(record)
    log.close()

    def refuse(text: str):
        raise AssertionError(f"{text} is not JSON")

    read = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r.pop("type") for r in read] == ["header", "phase", "train", "train", "val", "memory", "final"]
    assert read[3]["zero_frac"] is None and capsys.readouterr().out == ""
    again = [kind(**r) for kind, r in zip(map(type, records), read, strict=True)]
    assert again == [*records[:3], replace(STEP, zero_frac=None, churn=None), *records[4:]]


def test_lines_go_to_terminal_and_file_and_a_resumed_run_adds_to_it(tmp_path, capsys):
    for append in (False, False, True):
        log = runlog.Log(tmp_path, 0, append)
        log.lines(["ä ▁ 🤖", "shown"])
        log.line("only in the file", console=False)
        log.close()
    assert capsys.readouterr().out == "ä ▁ 🤖\nshown\n" * 3
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "ä ▁ 🤖\nshown\nonly in the file\n" * 2


def test_other_ranks_are_quiet(tmp_path, capsys):
    log = runlog.Log(tmp_path, 1, append=True)
    log.line("x")
    log.record(STEP)
    log.phase("load", 1.0)
    log.bar("x")
    log.close()
    assert capsys.readouterr().out == "" and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_file_that_fails_is_an_error_at_first_and_later_a_remark(tmp_path, capsys, name):
    """A pipe without a reader is a file that cannot be written any more."""
    for strict in (True, False):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
        log = runlog.Log(tmp_path, 0, append=False)
        log.strict = strict
        log.line("x", console=False)
        log.record(STEP)
        assert os.read(reader, 9999) and not log.failed
        os.close(reader)
        if strict:
            with pytest.raises(OSError, match=f"cannot write .*{name}: Broken pipe; make room"):
                log.phase("load", 1.0)
        else:
            for _ in range(2):
                log.phase("load", 1.0)
            assert f"cannot write {tmp_path / name}: Broken pipe" in log.failed
        log.close()
    other = tmp_path / ("metrics.jsonl" if name == "log.txt" else "log.txt")
    assert other.read_text().count("load") == 2, "what can be written is"
    assert capsys.readouterr().out == "[load] 1.0 s\n" * 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'metrics.jsonl'}: .*--run-id"):
        runlog.Log(tmp_path, 0, append=False)


def test_the_bar_is_overwritten_and_only_on_a_terminal(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", "40")
    log = runlog.Log(tmp_path, 0, append=False)
    log.bar("nobody sees it")
    assert shown.getvalue() == ""
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    log.bar("x" * 100)
    log.bar("short")
    log.line("a line")
    assert shown.getvalue() == "\r" + "x" * 39 + "\rshort" + " " * 34 + "\r" + " " * 5 + "\ra line\n"
    log.close()
    assert (tmp_path / "log.txt").read_text() == "a line\n"


# -- how it reads --------------------------------------------------------------------------------------------------


def test_before_it_runs_it_says_whether_the_model_fits():
    lines = runlog.preflight_lines(HEADER, FACTS)
    assert "iterations=100 (preset)" in " ".join(lines) and line_of(lines, "notice") == "notice      a notice"
    assert line_of(lines, "bytes") == ("bytes       199 predicted for the model, 300 of code (not counted); cap 1,000: "
                                       "fits, margin 801")
    assert "1 process(es) x 2 micro-batch(es) x 8 sequences of 64" in line_of(lines, "step")
    assert not any(line.startswith("resume") for line in lines)

    counted = replace(HEADER, settings=SETTINGS | {"cap_counts_code": True, "cap_bytes": 400}, resumed_at=7)
    lines = runlog.preflight_lines(counted, replace(FACTS, source_changed=True, elapsed=12.5))
    assert line_of(lines, "bytes").endswith("300 of code; cap 400: OVER by 99")
    assert line_of(lines, "resume") == "resume      at step 7, 12.5 s of training done; the program was changed since"
    near = replace(HEADER, settings=SETTINGS | {"cap_bytes": 198})
    lines = runlog.preflight_lines(near, FACTS)
    assert "OVER by 1, which is less than predictions are off by" in line_of(lines, "bytes")


def test_a_step_says_how_long_it_will_take_by_clock_or_count():
    line = runlog.step_line(STEP, SETTINGS)
    assert line.startswith("step:50/100 train_loss:2.5000 train_time:20000ms step_avg:400.00ms tok/s:2048 ")
    assert line.endswith("zero_frac:0.2500 churn:0.12500 lr_scale:0.750 left:0:20")  # fifty more at 400 ms
    assert runlog.step_line(STEP, SETTINGS | {"iterations": 10**6}).endswith("left:0:40")
    assert runlog.step_line(STEP, SETTINGS | {"iterations": 1000, "max_wallclock_seconds": 0}).endswith("left:6:20")
    bar = runlog.progress_bar(STEP, 0.5, SETTINGS)
    assert bar.startswith(f"[{'#' * 12}{' ' * 12}] step 50 ") and "churn 0.1250" in bar
    assert "churn" not in runlog.progress_bar(replace(STEP, zero_frac=None, churn=None), 0.5, SETTINGS)


def test_the_final_block_has_the_scores_the_bytes_and_the_seconds():
    lines = runlog.result_lines(FINAL, SETTINGS, "runs/a/model.tern")
    assert line_of(lines, "roundtrip gap") == "roundtrip gap             0.00000000   (logits identical bit for bit)"
    assert line_of(lines, "bytes").endswith(
        "model 800 + code 300 (not counted) -> total 800 of 1,000: FITS, margin 200")
    assert line_of(lines, "seconds").endswith("load 1.0 + compile 2.0 + train 3.0 + pack 4.0 + score 5.0 = 15.0")
    assert line_of(lines, "artifact").endswith("runs/a/model.tern  sha256 0123456789abcdef")
    sliding = line_of(lines, "sliding val_bpb")
    assert sliding.split()[2] == "1.12500000" and "(stride 32, window 256, 99 tokens" in sliding
    assert line_of(runlog.score_lines(FINAL, SETTINGS), "final_sliding_window_exact").endswith("val_bpb:1.12500000")

    over = replace(FINAL, fits=False, bytes_total=1100, logits_identical=False, roundtrip_gap=-0.0,
                   score={"chunked": SCORE, "sliding": None, "seq_len": 64})
    lines = runlog.result_lines(over, SETTINGS | {"cap_counts_code": True}, "m")
    assert line_of(lines, "roundtrip gap").endswith(" 0.00000000   (logits DIFFER)")
    assert line_of(lines, "bytes").endswith("model 800 + code 300 -> total 1,100 of 1,000: OVER, margin -100")
    assert not any(line.startswith("sliding") for line in lines + runlog.score_lines(over, SETTINGS))


def test_what_several_ranks_hold_and_send_is_said():
    one = runlog.memory_lines(runlog.Memory([1000], [0], [0], 0.0))
    two = runlog.memory_lines(runlog.Memory([1000, 2000], [30, 40], [5, 6], 0.215))
    assert len(one) == 1 and "1,000 bytes" in one[0] and len(two) == 2
    assert "1,000, 2,000 bytes" in two[0] and "gradients 70 bytes" in two[1] and "scales 11 back (0.215" in two[1]
