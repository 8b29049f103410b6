"""tern/report.py: the page of a run says what its files say, whatever is in them; tern/pages.py has its parts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_runlog import FINAL, HEADER, STEP, VALIDATION

from conftest import is_one_error
from tern import pages, report, runlog
from tern.ending import end_well
from tern.processes import Place
from tern.signals import Interrupted

HOSTILE = "<script>alert('x')</script>\"&\x00\x1b[31m\u202e\u200f\n</span>"


def tensor(name: str, shape: list[int], format: str, size: int) -> dict:
    weights = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return {"tensor": name, "shape": shape, "format": format, "weights": weights, "bytes": size,
            "bits_per_weight": 8 * size / weights, "zero_frac": 0.25}


def stream(role: str, format: str, count: int, size: int) -> dict:
    return {"role": role, "format": format, "codec": "model", "count": count, "bytes": size}


def bins(*rows: tuple[int, int, int, int, float]) -> list[dict]:
    return [{"low": low, "high": high, "count": 2, "tokens": tokens, "bytes": size, "nats": nats}
            for low, high, tokens, size, nats in rows]


def document(number: int, text: str, nats: float) -> dict:
    return {"number": number, "tokens": 2, "bytes": 6, "nats": nats, "shown": [["", 0, 0.5], [text, 6, nats - 0.5]]}


TERNARY, INT = "ternary g128 log7", "int5 g128 log7"
NAMES = ["blocks.0.mlp.fc.weight", "blocks.1.mlp.fc.weight"]
DETAILS = {
    "artifact": {"file": "model.tern", "bytes": 800, "sha256": FINAL.artifact_sha256}, "data": {},
    "inspection": {"bytes": 800, "header_bytes": 50, "weights": 2976, "bits_per_parameter": 2.15,
                   "tensors": [tensor("tok_emb.weight", [100, 10], INT, 350),
                               *(tensor(name, [40, 20], TERNARY, 200) for name in NAMES)],
                   "streams": [stream("codes", INT, 1000, 350), stream("codes", TERNARY, 1600, 400)]},
    "entropies": {"tok_emb.weight": 3.5, **dict.fromkeys(NAMES, 1.5)},
    "picture": {"tensor": NAMES[0], "shape": [40, 20], "corner": ["-0+", "+0-"], "zeros_of_rows": [0.5] * 40,
                "zeros_of_columns": [0.25] * 20},
    "spread": {"seq_len": 64, "documents_by": "sliding", "best": [document(7, "good", 1.0)],
               "worst": [document(3, HOSTILE, 40.0)],
               "lengths": bins((100, 140, 50, 100, 90.0), (150, 600, 49, 98, 60.0)),
               "positions": bins((1, 1, 9, 18, 20.0), (2, 64, 90, 180, 130.0))},
}


def run_folder(folder: Path, *more: runlog.Record, header: runlog.Header = HEADER, details: dict | None = None) -> Path:
    """A run's folder with two steps and these further records."""
    folder.mkdir(parents=True)
    kinds = {kind: name for name, kind in runlog.RECORDS.items()}
    records = [header, STEP, replace(STEP, step=100, loss=2.25, elapsed=40.0, tokens_seen=102400), VALIDATION, *more]
    lines = [json.dumps({"type": kinds[type(record)]} | asdict(record)) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if details is not None:
        (folder / "details.json").write_text(json.dumps(details))
    return folder


class Reader(HTMLParser):
    """What a page shows, which elements it has, what it asks for; raises where elements are not closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.outside, self.open = "", [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        self.outside += [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def shown(capsys, *argv: object) -> Reader:
    """The page of a command that works."""
    assert report.main(list(map(str, argv))) == 0, capsys.readouterr().err
    return Reader(Path(capsys.readouterr().out.split("  ")[0]).read_text())


# -- one run -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_page_says_what_was_trained_whether_it_fits_and_what_it_is_bad_at(tmp_path, capsys):
    page = shown(capsys, run_folder(tmp_path / "a", FINAL, details=DETAILS))
    for said in ("1.1250", "of 1,000: fits, 200 left", "logits identical bit for bit", "102,400 tokens", "2,560",
                 "2 layers, 32 wide, with 12,345 parameters", "cap 1,000", "int5 g128 log7",
                 "Worst 1: 9.618 bits per byte", "Best 1: 0.240 bits per byte", "up to 140 bytes take 1.298",
                 "longer ones 0.883", "With 1 token of context it takes 1.603", "program " + "e" * 12):
        assert said in page.text, said
    assert page.tags.count("svg") == 7 and page.tags.count("img") == 1 and not page.outside
    assert (tmp_path / "a/report.html").exists()


@pytest.mark.fast
def test_what_does_not_fit_or_is_not_the_model_is_said_so(tmp_path, capsys):
    over = replace(FINAL, bytes_total=1100, fits=False, roundtrip_gap=0.5, logits_identical=False)
    page = shown(capsys, run_folder(tmp_path / "a", over))
    assert "OVER by 100" in page.text and "the file is not the model that was trained" in page.text
    assert "no details.json" in page.text and "--details" in page.text


@pytest.mark.fast
def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, capsys):
    folder = run_folder(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"type": "train", "st')  # it is writing
    page = shown(capsys, folder / "metrics.jsonl", "--out", tmp_path / "x.html")
    assert "not finished" in page.text and page.tags.count("svg") == 2


@pytest.mark.fast
def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    again = [replace(HEADER, resumed_at=50), replace(STEP, step=60, loss=9.0)]
    seen = report.read_run(run_folder(tmp_path / "a", *again))
    assert [s.step for s in seen.steps] == [50, 60] and seen.header.resumed_at == 50
    assert [v.step for v in seen.validations] == [50]


def test_the_same_files_give_the_same_page(tmp_path, capsys):
    folder = run_folder(tmp_path / "a", FINAL, details=DETAILS)
    texts = []
    for _ in range(2):
        shown(capsys, folder)
        texts.append((folder / "report.html").read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.fast
def test_every_byte_has_its_place_against_the_cap(tmp_path):
    for counted, total in ((False, 800), (True, 1100)):
        header = replace(HEADER, settings=HEADER.settings | {"cap_counts_code": counted})
        seen = report.read_run(run_folder(tmp_path / str(counted), FINAL, header=header, details=DETAILS))
        assert [sum(size for _, size, _ in row) for row in report.bands(seen, seen.details.inspection)] == [total] * 2


# -- whatever the files hold -----------------------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path, capsys):
    """In a document, in a setting, in the run's own name."""
    header = replace(HEADER, settings=HEADER.settings | {"run_id": HOSTILE, "data_path": HOSTILE},
                     origin={"data_path": "command line"}, argv=[HOSTILE])
    page = shown(capsys, run_folder(tmp_path / "a", FINAL, header=header, details=DETAILS))
    assert "script" not in page.tags and not page.outside
    assert page.text.count("<script>alert('x')</script>") >= 4
    for hidden in "\x00\x1b\u202e\u200f":
        assert hidden not in page.text and f"<U+{ord(hidden):04X}>" in page.text, ascii(hidden)
    maths = replace(HEADER, settings=HEADER.settings | {"run_id": r"$\frac{$ <b>" + HOSTILE})
    both = shown(capsys, tmp_path / "a", run_folder(tmp_path / "b", FINAL, header=maths), "--out", tmp_path / "x.html")
    assert not {"script", "b"} & set(both.tags) and "\x00" not in both.text and r"$\frac{$ <b>" in both.text


@pytest.mark.fast
def test_the_ground_of_a_token_goes_by_its_bits_for_each_byte():
    assert [pages.heat_of(bits, size) for bits, size in ((0, 1), (8, 1), (8, 2), (8, 8), (99, 1), (3, 0))] == \
        [0, 8, 4, 1, 8, 3]
    found = Reader(pages.heated_text([("a b", 3, 12.0), ("\n", 1, 0.0)]))
    assert found.text == "a b\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n" and found.tags.count("span") == 2


@pytest.mark.fast
@pytest.mark.parametrize(("name", "content"), [
    ("metrics.jsonl", b"not json\n"), ("metrics.jsonl", b"[]\n"), ("metrics.jsonl", b""), ("metrics.jsonl", b"\xff\n"),
    ("metrics.jsonl", b'{"type": "train", "step": "one"}\n'), ("metrics.jsonl", b'{"type": []}\n'),
    ("metrics.jsonl", b"[" * 100_000 + b"\n"), ("details.json", b"{}"), ("details.json", b"\x00"),
    ("details.json", json.dumps(DETAILS | {"artifact": {"sha256": "other"}}).encode())])
def test_files_that_are_none_give_one_error_and_no_page(tmp_path, capsys, name, content):
    folder = run_folder(tmp_path / "a", FINAL, details=DETAILS)
    (folder / name).write_bytes(content)
    assert is_one_error(report.main([str(folder)]), err := capsys.readouterr().err) and name in err
    assert not (folder / "report.html").exists()


@pytest.mark.fast
def test_a_folder_without_a_run_and_a_page_that_cannot_be_written(tmp_path, capsys):
    assert is_one_error(report.main([str(tmp_path)]), capsys.readouterr().err)
    folder = run_folder(tmp_path / "a", FINAL)
    assert is_one_error(report.main([str(folder), "--out", str(tmp_path / "no/page.html")]), capsys.readouterr().err)


# -- several -------------------------------------------------------------------------------------------------------


def test_several_runs_are_side_by_side_with_what_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = replace(HEADER, settings=HEADER.settings | {"run_id": "b", "num_layers": 7, "out_dir": "elsewhere"})
    runs = [run_folder(tmp_path / "a", FINAL, details=DETAILS), run_folder(tmp_path / "b", FINAL, header=other)]
    page = shown(capsys, *runs)
    assert (tmp_path / "report.html").exists() and "num_layers27" in page.text and "out_dir" not in page.text
    assert "standard deviation" not in page.text, "of different recipes"
    assert page.tags.count("details") == 6 and not page.outside
    seeds = [run_folder(tmp_path / name, FINAL, header=replace(HEADER, settings=HEADER.settings | {"seed": seed}))
             for name, seed in (("c", 1), ("d", 2))]
    page = shown(capsys, *seeds)
    assert "standard deviation 0.0000" in page.text and f"a ({tmp_path / 'c'})" in page.text


# -- at the end of a run -------------------------------------------------------------------------------------------


def end_of(path: Path, write_page: bool = True, rank: int = 0) -> list[str]:
    """What the log says of the page."""
    said: list[str] = []
    folder = SimpleNamespace(path=path, config=SimpleNamespace(write_page=write_page),
                             log=SimpleNamespace(line=said.append))
    assert end_well(Place(rank=rank), folder) == 0, "whatever comes of the page"
    return said


def test_a_signal_ends_the_page_and_not_the_run(tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted(2, "stopped by signal 2")

    monkeypatch.setattr("tern.ending.subprocess.run", stopped)
    [line] = end_of(run_folder(tmp_path / "a", FINAL))
    assert "no report.html was written (stopped)" in line


def test_a_run_ends_with_its_page_or_with_a_line_of_why_not(tmp_path):
    folder = run_folder(tmp_path / "a", FINAL, details=DETAILS)
    assert end_of(folder, write_page=False) == [] and end_of(folder, rank=1) == []
    assert not (folder / "report.html").exists()
    assert end_of(folder) == [] and "1.1250" in (folder / "report.html").read_text()
    (folder / "metrics.jsonl").write_text("broken\n")
    [line] = end_of(folder)
    assert line.startswith("notice      no report.html was written (") and "not JSON" in line and str(folder) in line
