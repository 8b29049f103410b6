"""README.md: short, and what it points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *(ROOT / folder / "README.md" for folder in ("ablations", "bench", "data", "records"))]
pytestmark = pytest.mark.fast


def test_the_readme_is_short_and_begins_with_a_sentence_and_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []
    assert not [line for line in lines if "@@" in line or "to be filled" in line]
    assert lines[0].endswith(".") and lines[2].startswith("    make run") and lines[3].startswith("    make test")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_lines_that_hold_the_name(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text) + re.findall(r"^\[([^\]]*)\]: (\S+)$", text, re.MULTILINE)
    wrong = []
    for label, target in links:
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif re.fullmatch(r"L\d+", anchor):  # a line: it must define or hold what the label names
            lines = file.read_text(encoding="utf-8").splitlines()
            number = int(anchor[1:])
            line = lines[number - 1] if number <= len(lines) else ""
            if label.strip("`") not in line:
                now = [i for i, text in enumerate(lines, 1) if re.search(rf"\b{re.escape(label.strip('`'))}\b", text)]
                wrong.append(f"{target}: {label} is not on that line but on {now[:9]}")
    assert wrong == []
