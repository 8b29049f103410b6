"""The pages in a browser: a run's and an experiment's, without a network, in the light, the dark and on paper."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from test_report import DETAILS, FINAL, HEADER, HOSTILE, replace, run_folder

from ablations import matrix, results
from ablations import report as ablation
from conftest import PATIENCE, ROOT
from tern import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: no page was opened")

OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic")
DARK = "--blink-settings=preferredColorScheme=0"


def opened(page: Path, *options: str) -> str:
    """What the browser said of a page in its log: the console's lines, too."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *OFFLINE,
               f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--v=0", *options,
               page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def console(said: str) -> list[str]:
    return [line for line in said.splitlines() if "CONSOLE" in line]


def screenshot(page: Path, *options: str) -> np.ndarray:
    """Grey levels in [0, 1], [height, width], of a page that says nothing to the console."""
    out = page.with_suffix(".png")
    assert console(opened(page, f"--screenshot={out}", "--window-size=1000,1800", *options)) == []
    return imread(out)[..., :3].mean(-1)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    hostile = replace(HEADER, settings=HEADER.settings | {"run_id": HOSTILE})
    runs = [run_folder(folder / "a", FINAL, details=DETAILS), run_folder(folder / "b", FINAL, header=hostile)]
    found = {"one": folder / "one.html", "two": folder / "two.html", "ablation": folder / "ablation.html"}
    assert report.main([str(runs[0]), "--out", str(found["one"])]) == 0
    assert report.main([*map(str, runs), "--out", str(found["two"])]) == 0
    m = matrix.read_matrix(ROOT / "ablations/matrices/rate.toml")
    asked = matrix.jobs(m, dict.fromkeys(matrix.data_folders(m), "d"))
    rows = ablation.summarize(m, asked, results.read_results(ROOT / "ablations/results/rate/results.jsonl"))
    found["ablation"].write_text(ablation.page(m, rows, ablation.draw_differences(rows)))
    return found


@pytest.mark.parametrize("name", ["one", "two", "ablation"])
def test_a_page_shows_itself_without_a_network(pages, name):
    light, dark = screenshot(pages[name]), screenshot(pages[name], DARK)
    assert light.std() > 0.03 and dark.std() > 0.03, "not blank"
    assert np.median(light) > 0.95 and np.median(dark) < 0.2, "the ground is that of the reader's choice"
    for shown, ground in ((light, 1.0), (dark, np.median(dark))):
        left, middle = np.abs(shown[:, :12] - ground).max(), np.abs(shown[:, 100:900] - ground)
        assert left < 0.05 and (middle > 0.5).mean() > 0.005, "text and lines can be told from the ground, in a column"


def test_the_console_would_be_heard(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('oh'); nothing()</script><img src='https://example.org/x.png'>")
    assert len(console(opened(page, "--dump-dom"))) >= 2


def test_a_page_can_be_printed(pages, tmp_path):
    out = tmp_path / "page.pdf"
    assert console(opened(pages["one"], f"--print-to-pdf={out}")) == []
    assert out.read_bytes().startswith(b"%PDF") and out.read_bytes().count(b"/Type /Page\n") >= 2
