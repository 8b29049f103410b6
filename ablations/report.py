"""The report of a matrix: report.md and one self-contained report.html, from the lines of results.jsonl alone."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import stats
from matrix import Job, Matrix, Row, what_of

import pack

COLOURS = 8  # of the palette in STYLE; further rows are grey


class Summary:
    """A row with the lines of its runs and its comparison with the base."""

    def __init__(self, row: Row, lines: list[dict]):
        self.row = row
        self.ok = [line for line in lines if line["status"] == "ok"]
        self.failed = [line for line in lines if line["status"] != "ok"]
        self.bpb = {line["seed"]: line["val_bpb"] for line in self.ok}
        self.comparison: stats.Comparison | None = None
        self.verdict = ""

    def mean(self, key: str) -> float:
        values = [line[key] for line in self.ok if line.get(key) is not None]
        return statistics.fmean(values) if values else math.nan

    def sd(self) -> float:
        return statistics.stdev(self.bpb.values()) if len(self.bpb) > 1 else math.nan

    def format(self, key: str) -> float:
        """The mean of a diagnostic of the block matrices."""
        values = [line["formats"]["matrices"].get(key) for line in self.ok if "formats" in line]
        values = [value for value in values if value is not None]
        return statistics.fmean(values) if values else math.nan


def summarize(matrix: Matrix, asked: list[Job], lines: list[dict]) -> list[Summary]:
    """One summary per row: the base first, then by mean score; rows without one last.

    A line belongs to the row that asks for just what it did (Job.what), whatever that is called now; where rows differ
    in nothing but their data, by its name. Of several, made by other code, the newest counts.
    """
    what: dict[str, str] = {}
    for line in lines:  # what a run started from, whose line came before, is part of what it is
        if not line["parent"] or line["parent"] in what:
            what[line["id"]] = what_of(line, what.get(line["parent"], ""))
    times = Counter(job.what for job in asked)
    newest: dict[str | tuple[str, str], dict] = {}
    for line in sorted(lines, key=lambda line: line.get("finished", "")):
        if (this := what.get(line["id"])) is not None:
            newest[this] = newest[this, line["row"]] = line
    found: dict[str, list[dict]] = {row.name: [] for row in matrix.rows}
    for job in asked:
        key = job.what if times[job.what] == 1 else (job.what, job.row.name)
        if job.seed in job.row.seeds and key in newest:
            found[job.row.name].append(newest[key])
    rows = [Summary(row, found[row.name]) for row in matrix.rows]
    by_name = {s.row.name: s for s in rows}
    base = by_name[matrix.base]
    others = [s for s in rows if s is not base]
    references = [by_name[s.row.against or matrix.base] for s in others]
    compared = [stats.compare(s.bpb, r.bpb) for s, r in zip(others, references, strict=True)]
    for s, r, c, p in zip(others, references, compared, stats.holm([c.p_t for c in compared]), strict=True):
        s.comparison = replace(c, p_holm=p)
        s.verdict = stats.verdict(s.comparison, matrix.equivalence) if s.bpb else "no result"
        if s.failed and not s.bpb:
            s.verdict = s.failed[-1]["status"]
        elif s.failed or s.bpb and r.failed:  # the seeds that are left are not all that was asked
            failed = [f"{len(s.failed)} failed"] * bool(s.failed)
            failed += [f"{len(r.failed)} of {r.row.name} failed"] * bool(r.failed)
            s.verdict = ", ".join(["undecided" if s.verdict.startswith("no effect") else s.verdict, *failed])
    return [base, *sorted(others, key=lambda s: (math.isnan(s.mean("val_bpb")), s.mean("val_bpb")))]


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def probability(value: float) -> str:
    return "<0.001" if value < 0.0005 else number(value, 3)


def cells(s: Summary) -> list[str]:
    c = s.comparison
    row = [s.row.name, str(len(s.bpb)), number(s.mean("val_bpb")), number(s.sd())]
    row += ["", "", "", "", "", "base"] if c is None else [
        number(c.mean, sign=True) + f" (from {s.row.against})" * bool(s.row.against),
        f"{number(c.low, sign=True)} to {number(c.high, sign=True)}" if c.n > 1 else "",
        probability(c.p_t), probability(c.p_flip), probability(c.p_holm), s.verdict]
    size = s.mean("bytes_model")
    gaps = [abs(line["gap"]) for line in s.ok if "gap" in line]
    return [*row, number(c.detectable) if c else "", number(max(gaps), 5) if gaps else "",
            "" if math.isnan(size) else f"{size:,.0f}",
            number(s.format("bits"), 3), number(s.format("error"), 3), number(s.format("zero_frac"), 3),
            number(s.format("used"), 3)]


COLUMNS = ["row", "n", "val_bpb", "sd", "difference", "95% interval", "p (t)", "p (flips)", "p (Holm)", "verdict",
           "could have seen", "gap", "bytes", "bits/weight", "error", "zeros", "in use"]
MISSED = 0.02  # of a size in bytes
NOTE = ("Differences are row less base (or the row named there) over paired seeds, so negative is better. p (t): "
        "paired t-test; p (flips): all sign flips, at least 2/2^n; p (Holm): the t-test's after Holm's correction over "
        "the matrix, which verdicts go by. Could have seen: the true difference that so many seeds find with 80% "
        "probability at p < 0.05, before the correction. \"No effect\" needs the 90% interval within the bound. Gap: "
        "the largest, bpb from the file less in memory. Bits per weight (codes, scales), error (rms of latent less "
        "param, over the latent's), shares of zeros and of the format's codes in use (of a codebook: of the entries of "
        "all groups) are of the block matrices, in the file. A run only has a result if its file proves that the "
        "quantizers it asked for are active.")


def claims(rows: list[Summary]) -> list[list[str]]:
    out = []
    for s in rows:
        if s.row.claim:
            c = s.comparison
            measured = "" if c is None or not c.n else (
                f"{number(c.mean, sign=True)} bpb" + (f" ({number(c.low, sign=True)} to {number(c.high, sign=True)})"
                                                      if c.n > 1 else ""))
            out.append([s.row.name, s.row.claim, measured, s.verdict])
    return out


def failures(rows: list[Summary]) -> list[list[str]]:
    return [[s.row.name, str(line["seed"]), line["status"], str(line["steps"]), line["message"]]
            for s in rows for line in s.failed]


def unequal(matrix: Matrix, rows: list[Summary]) -> str:
    """Which rows' files missed the size that their widths were solved for by more than MISSED, and by how much."""
    off = {s.row.name: s.mean("bytes_model") / matrix.equal_bytes - 1 for s in rows if matrix.equal_bytes}
    missed = ", ".join(f"{name} {share:+.1%}" for name, share in off.items() if abs(share) > MISSED)
    return f" (missed by more than {MISSED:.0%}: {missed})" * bool(missed)


def sentence(matrix: Matrix, rows: list[Summary]) -> str:
    kind, amount = matrix.budget
    seconds = [line["train_seconds"] for s in rows for line in s.ok if "train_seconds" in line]
    each = f"; a run trained for {statistics.median(seconds):.0f} s in the median" if seconds else ""
    size = f" Widths are solved for model files of {matrix.equal_bytes:,} bytes{unequal(matrix, rows)}." * (
        matrix.equal_bytes > 0)
    every = [line for s in rows for line in s.ok]
    patched = [bool(x["patches"] + x["score_patches"]) for x in every]
    mixed = {"versions of code or data": {x["source"] for x, p in zip(every, patched, strict=True) if not p},
             "versions of code, patches or data": {x["source"] for x, p in zip(every, patched, strict=True) if p},
             "versions of data": {x["data"] for x in every if "data" in x},
             "kinds of machine": {json.dumps(x.get("machine"), sort_keys=True) for x in every},
             "numbers of threads": {x.get("threads") for x in every}}
    for what, found in mixed.items():
        size += f" {'Patched runs' if 'patches' in what else 'Runs'} were made by {len(found)} {what}: compare with " \
                "care." * (len(found) > 1)
    return (f"{matrix.why} Base: {matrix.base}. Budget of a run: {amount:,} {kind}{each}.{size} Equivalence bound: "
            f"{matrix.equivalence:g} bpb.")


# ---------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rows = [f"| {' | '.join(row)} |" for row in [columns, *escaped]]
    return [rows[0], f"|{'---|' * len(columns)}", *rows[1:], ""]


def markdown(matrix: Matrix, rows: list[Summary]) -> str:
    lines = [f"# {matrix.name}", "", sentence(matrix, rows), ""]
    lines += [*markdown_table(COLUMNS, [cells(s) for s in rows]), NOTE, ""]
    if table := claims(rows):
        lines += ["## Claims", "", *markdown_table(["technique", "claim", "measured here", "verdict"], table)]
    if table := failures(rows):
        lines += ["## Runs without a result", "",
                  *markdown_table(["row", "seed", "status", "steps", "message"], table)]
    lines += ["## Rows", "", *markdown_table(["row", "why"], [[s.row.name, s.row.why] for s in rows])]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; --faint: #8a8a8a; --c0: #1b1b1b; --c1: #2166ac;
  --c2: #b2182b; --c3: #1b7837; --c4: #e08214; --c5: #762a83; --c6: #01a0a0; --c7: #8c510a; --c8: #b8b8b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3c3c3c; --faint: #8f8f8f;
  --c0: #f2f2f2; --c1: #6baed6; --c2: #f4777f; --c3: #74c476; --c4: #fdae6b; --c5: #c994f2; --c6: #5fd3d3;
  --c7: #d6a86b; --c8: #5a5a5a; } }
@media print { :root { --ink: #000; --paper: #fff; --line: #bbb; } figure { break-inside: avoid; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1, h2 { font-weight: 600; } figure { margin: 1.5rem 0; } figcaption { color: var(--faint); max-width: 50rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } td.text { white-space: normal; min-width: 14rem; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 1.6; }
.front { stroke-dasharray: 4 3; }
"""


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / wanted)) if span > 0 else 1.0
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= wanted) if span > 0 else 1.0
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Chart:
    """Axes and marks as SVG text; x and y are ranges of data."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str], height: int = 380,
                 left: int = 70):
        self.width, self.height, self.left, self.bottom = 960, height, left, 46
        pad = [0.04 * (b - a) or abs(a) * 0.01 or 1.0 for a, b in (x, y)]
        self.x, self.y = (x[0] - pad[0], x[1] + pad[0]), (y[0] - pad[1], y[1] + pad[1])
        self.parts = []
        for t in ticks(*self.x):
            at = self.px(t)
            self.parts += [f'<line class="grid" x1="{at}" x2="{at}" y1="10" y2="{height - self.bottom}"/>',
                           self.text(at, height - self.bottom + 17, f"{t:g}", "middle")]
        self.parts.append(self.text((self.left + self.width) / 2, height - 8, labels[0], "middle"))
        self.y_label = labels[1]

    def grid_y(self) -> Chart:
        for t in ticks(*self.y, 5):
            at = self.py(t)
            self.parts += [f'<line class="grid" x1="{self.left}" x2="{self.width - 10}" y1="{at}" y2="{at}"/>',
                           self.text(self.left - 7, at + 4, f"{t:g}", "end")]
        self.parts.append(f'<text transform="translate(14 {self.height / 2}) rotate(-90)" text-anchor="middle">'
                          f"{html.escape(self.y_label)}</text>")
        return self

    def px(self, x: float) -> float:
        return round(self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - 10 - self.left), 1)

    def py(self, y: float) -> float:
        return round(10 + (self.y[1] - y) / (self.y[1] - self.y[0]) * (self.height - self.bottom - 10), 1)

    @staticmethod
    def text(x: float, y: float, text: str, anchor: str = "start", colour: str = "") -> str:
        style = f' style="fill: {colour}"' if colour else ""
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'

    def curve(self, points: list[tuple[float, float]], colour: str, title: str, kind: str = "curve") -> None:
        path = " ".join(f"{self.px(x)},{self.py(y)}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" style="stroke: {colour}" fill="none" points="{path}"><title>'
                          f"{html.escape(title)}</title></polyline>")

    def dot(self, x: float, y: float, colour: str, title: str, radius: float = 4) -> None:
        self.parts.append(f'<circle cx="{self.px(x)}" cy="{self.py(y)}" r="{radius}" style="fill: {colour}"><title>'
                          f"{html.escape(title)}</title></circle>")

    def svg(self, description: str) -> str:
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html.escape(description)}">'
                f"{''.join(self.parts)}</svg>")


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def differences(rows: list[Summary]) -> str:
    """Dots with intervals, one line per row."""
    compared = [s for s in rows if s.comparison and s.comparison.n]
    if not compared:
        return ""
    ends = [value for s in compared for value in (s.comparison.low, s.comparison.high, s.comparison.mean, 0.0)
            if not math.isnan(value)]
    chart = Chart((min(ends), max(ends)), (0, len(compared)), ("difference of val_bpb from the base", ""),
                  height=70 + 22 * len(compared), left=260)
    zero = chart.px(0.0)
    chart.parts.append(f'<line x1="{zero}" x2="{zero}" y1="10" y2="{chart.height - chart.bottom}" '
                       'style="stroke: var(--ink)"/>')
    for i, s in enumerate(compared):
        c, y = s.comparison, len(compared) - i - 0.5
        colour = {"better": "var(--c3)", "worse": "var(--c2)"}.get(s.verdict.partition(",")[0], "var(--faint)")
        chart.parts.append(chart.text(chart.left - 8, chart.py(y) + 4, s.row.name, "end"))
        if c.n > 1:
            chart.parts.append(f'<line x1="{chart.px(c.low)}" x2="{chart.px(c.high)}" y1="{chart.py(y)}" '
                               f'y2="{chart.py(y)}" style="stroke: {colour}; stroke-width: 2"/>')
        interval = f" ({c.low:+.4f} to {c.high:+.4f})" * (c.n > 1)
        chart.dot(c.mean, y, colour, f"{s.row.name}: {c.mean:+.4f}{interval}, {s.verdict}")
    return figure(chart.svg("differences from the base"), "Difference of each row from the base with its 95% interval; "
                  "green and red where Holm's correction leaves p below 0.05.")


def colours(rows: list[Summary]) -> dict[str, str]:
    return {s.row.name: f"var(--c{min(i, COLOURS)})" for i, s in enumerate(rows)}


def legend(rows: list[Summary]) -> str:
    shade = colours(rows)
    names = [s.row.name for s in rows if s.ok]
    return " ".join(f'<span style="color: {shade[name]}">■ {html.escape(name)}</span>' for name in names)


def mean_curve(lines: list[dict], key: str, column: int) -> list[tuple[float, float]]:
    """(step, mean over seeds) at the steps that every run logged."""
    tables = [{point[0]: point[column] for point in line[key] if point[column] is not None}
              for line in lines if line.get(key)]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, statistics.fmean(table[step] for table in tables)) for step in steps]


def curves(rows: list[Summary], key: str, column: int, label: str, caption: str, skip: float = 0.0) -> str:
    """One mean curve per row. skip: share of the run at its beginning that is left out of the range of y."""
    found = {s.row.name: mean_curve(s.ok, key, column) for s in rows}
    found = {name: points for name, points in found.items() if len(points) > 1}
    if not found:
        return ""
    last = max(points[-1][0] for points in found.values())
    shown = {name: [p for p in points if p[0] >= skip * last] for name, points in found.items()}
    values = [y for points in shown.values() for _, y in points]
    chart = Chart((skip * last, last), (min(values), max(values)), ("step", label)).grid_y()
    shade = colours(rows)
    for name, points in reversed(shown.items()):
        chart.curve(points, shade[name], name)
    return figure(chart.svg(label), caption)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both coordinates, by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def scatter(rows: list[Summary], key: str, label: str, caption: str) -> str:
    points = [(s.mean(key), s.mean("val_bpb"), s) for s in rows if s.ok and not math.isnan(s.mean(key))]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    chart = Chart((min(xs), max(xs)), (min(ys), max(ys)), (label, "val_bpb")).grid_y()
    shade = colours(rows)
    chart.curve(pareto(list(zip(xs, ys, strict=True))), "var(--faint)", "Pareto front", "curve front")
    for x, y, s in points:
        chart.dot(x, y, shade[s.row.name], f"{s.row.name}: {x:,.0f}, {y:.4f}", 5)
        right = x <= min(xs) + 0.7 * (max(xs) - min(xs))  # a label towards the middle stays on the chart
        chart.parts.append(chart.text(chart.px(x) + (8 if right else -8), chart.py(y) + 4, s.row.name,
                                      "start" if right else "end"))
    return figure(chart.svg(caption), caption)


def html_table(columns: list[str], rows: list[list[str]], text: set[int] = frozenset()) -> str:
    def cell(i: int, value: str) -> str:
        kind = "text" if i in text else "number" if value[:1] in "<+-.0123456789" and value else ""
        return f'<td class="{kind}">{html.escape(value)}</td>'

    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(cell(i, v) for i, v in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def page(matrix: Matrix, rows: list[Summary]) -> str:
    parts = [f"<h1>{html.escape(matrix.name)}</h1><p>{html.escape(sentence(matrix, rows))}</p>", differences(rows),
             html_table(COLUMNS, [cells(s) for s in rows]), f"<p>{html.escape(NOTE)}</p>"]
    if table := claims(rows):
        parts += ["<h2>Claims</h2>", html_table(["technique", "claim", "measured here", "verdict"], table, {1, 3})]
    if table := failures(rows):
        parts += ["<h2>Runs without a result</h2>",
                  html_table(["row", "seed", "status", "steps", "message"], table, {4})]
    parts += [f"<h2>Over the run</h2><p>{legend(rows)}</p>",
              curves(rows, "curve", 3, "training loss, nats",
                     "Training loss on the batch of each logged step, mean over seeds, without the first tenth.", 0.1),
              curves(rows, "codes_curve", 1, "share of zeros",
                     "Share of zeros among the codes of the block matrices."),
              curves(rows, "codes_curve", 2, "churn",
                     "Share of codes that a step changed, without the first tenth.", 0.1),
              "<h2>What it costs</h2>",
              scatter(rows, "bytes_model", "bytes of the model file",
                      "Score against bytes; the line is the Pareto front."),
              scatter(rows, "train_seconds", "seconds of training",
                      "Score against seconds of training; those of runs that shared the machine are longer for it."),
              "<h2>Rows</h2>", html_table(["row", "why"], [[s.row.name, s.row.why] for s in rows], {1})]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(matrix.name)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
            f"<body>{''.join(parts)}</body></html>\n")


def write(matrix: Matrix, asked: list[Job], lines: list[dict], folder: Path) -> list[Path]:
    """Write report.md and report.html; the files. asked: all runs of the matrix."""
    rows = summarize(matrix, asked, lines)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md", folder / "report.html"]
    for path, text in zip(paths, (markdown(matrix, rows), page(matrix, rows)), strict=True):
        pack.write_atomic(path, text.encode())
    return paths
