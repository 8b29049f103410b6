"""The report of a matrix, from the lines of results.jsonl alone: report.md with chart.png, and one self-contained
report.html."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from ablations import stats
from ablations.matrix import Job, Matrix, Row, uses_what_lost
from ablations.results import Line, what_of_lines
from tern import pages
from tern.files import write_atomic
from tern.pages import html_table, markdown_table

# ---------------------------------------------------------------------------------------------------------------
# Rows with their runs
# ---------------------------------------------------------------------------------------------------------------


class Summary:
    """A row with the lines of its runs and its comparison with the base."""

    def __init__(self, row: Row, lines: Sequence[Line]):
        self.row = row
        self.ok = [line for line in lines if line.ok]
        self.failed = [line for line in lines if not line.ok]
        self.bpb = {line.seed: line.val_bpb for line in self.ok}
        self.comparison: stats.Comparison | None = None  # of the base
        self.verdict = ""

    def mean(self, key: str) -> float:
        """Of a measurement over the runs that have it."""
        return mean([getattr(line, key) for line in self.ok])

    def sd(self) -> float:
        return statistics.stdev(self.bpb.values()) if len(self.bpb) > 1 else math.nan

    def quantizer(self, key: str) -> float:
        """The mean of a diagnostic of the block matrices."""
        return mean([getattr(line.formats["matrices"], key) for line in self.ok if "matrices" in line.formats])


def mean(values: Sequence[float | None]) -> float:
    """Of those that are known; NaN if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def lines_of_rows(matrix: Matrix, asked: Sequence[Job], lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Name of a row -> the lines of its runs.

    A line belongs to the row that asks for just what it did (Job.what), whatever that is called now; where rows differ
    in nothing but their data, by its name. Of several, made by other code, the newest counts.
    """
    what = what_of_lines(lines)
    newest: dict[str | tuple[str, str], Line] = {}
    for line in sorted(lines, key=lambda line: line.finished):
        if line.id in what:
            newest[what[line.id]] = line
            newest[what[line.id], line.row] = line
    times = Counter(job.what for job in asked)
    found: dict[str, list[Line]] = {row.name: [] for row in matrix.rows}
    for job in asked:
        key = job.what if times[job.what] == 1 else (job.what, job.row.name)
        if job.seed in job.row.seeds and key in newest:
            found[job.row.name].append(newest[key])
    return found


def summarize(matrix: Matrix, asked: Sequence[Job], lines: Sequence[Line]) -> list[Summary]:
    """One summary per row: the base first, then by mean score; rows without one last."""
    found = lines_of_rows(matrix, asked, lines)
    by_name = {row.name: Summary(row, found[row.name]) for row in matrix.rows}
    base = by_name[matrix.base]
    others = [s for s in by_name.values() if s is not base]
    references = [by_name[s.row.against or matrix.base] for s in others]
    compared = [stats.compare(s.bpb, r.bpb) for s, r in zip(others, references, strict=True)]
    corrected = stats.holm([c.p_t for c in compared])
    for s, reference, c, p in zip(others, references, compared, corrected, strict=True):
        s.comparison = replace(c, p_holm=p)
        s.verdict = verdict(s, reference, matrix.equivalence)
    return [base, *sorted(others, key=lambda s: (math.isnan(s.mean("val_bpb")), s.mean("val_bpb")))]


def verdict(s: Summary, reference: Summary, bound: float) -> str:
    """What can be said of a row; the failures of both sides belong to it: the seeds left are not all that was asked."""
    if s.failed and not s.bpb:
        return s.failed[-1].status
    if not s.bpb:
        return "no result"
    said = stats.verdict(s.comparison, bound)
    if not s.failed and not reference.failed:
        return said
    if said.startswith("no effect"):
        said = "undecided"
    if s.failed:
        said += f", {len(s.failed)} failed"
    if reference.failed:
        said += f", {len(reference.failed)} of {reference.row.name} failed"
    return said


# ---------------------------------------------------------------------------------------------------------------
# Words and tables
# ---------------------------------------------------------------------------------------------------------------

COLUMNS = ["row", "n", "val_bpb", "sd", "difference", "95% interval", "p (t)", "p (flips)", "p (Holm)", "verdict",
           "could have seen", "gap", "bytes", "bits/weight", "error", "zeros", "in use"]
PROSE = ("claim", "message", "why")  # columns of sentences
MISSED = 0.02  # of a size in bytes
NOTE = ("Differences are row less base (or the row named there) over paired seeds, so negative is better. p (t): "
        "paired t-test; p (flips): all sign flips, at least 2/2^n; p (Holm): the t-test's after Holm's correction over "
        "the matrix, which verdicts go by. Could have seen: the true difference that so many seeds find with 80% "
        "probability at p < 0.05, before the correction. \"No effect\" needs the 90% interval within the bound. Gap: "
        "the largest, bpb from the file less in memory. Bits per weight (codes, scales), error (rms of latent less "
        "param, over the latent's), shares of zeros and of the format's codes in use (of a codebook: of the entries of "
        "all groups) are of the block matrices, in the file. A run only has a result if its file proves that the "
        "quantizers it asked for are active.")


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def probability(value: float) -> str:
    return "<0.001" if value < 0.0005 else number(value, 3)


def interval(c: stats.Comparison) -> str:
    return f"{number(c.low, sign=True)} to {number(c.high, sign=True)}" if c.n > 1 else ""


def cells(s: Summary) -> list[str]:
    """A row of the table."""
    c = s.comparison
    compared = ["", "", "", "", "", "base", ""]
    if c is not None:
        difference = number(c.mean, sign=True)
        if s.row.against:
            difference += f" (from {s.row.against})"
        compared = [difference, interval(c), probability(c.p_t), probability(c.p_flip), probability(c.p_holm),
                    s.verdict, number(c.detectable)]
    gaps = [abs(line.gap) for line in s.ok if line.gap is not None]
    size, n = s.mean("bytes_model"), str(len(s.bpb))
    if c is not None and c.n != len(s.bpb):
        n += f" ({c.n} pairs)"
    return [s.row.name, n, number(s.mean("val_bpb")), number(s.sd()), *compared,
            number(max(gaps), 5) if gaps else "", "" if math.isnan(size) else f"{size:,.0f}",
            *(number(s.quantizer(key), 3) for key in ("bits", "error", "zero_frac", "used"))]


def claims(rows: Sequence[Summary]) -> list[list[str]]:
    """What others say, and what was measured here."""
    table = []
    for s in rows:
        if not s.row.claim:
            continue
        measured, c = "", s.comparison
        if c is not None and c.n:
            measured = f"{number(c.mean, sign=True)} bpb"
        if c is not None and c.n > 1:
            measured += f" ({interval(c)})"
        table.append([s.row.name, s.row.claim, measured, s.verdict])
    return table


def failures(rows: Sequence[Summary]) -> list[list[str]]:
    return [[s.row.name, str(line.seed), line.status, str(line.steps), line.message] for s in rows for line in s.failed]


def further_tables(rows: Sequence[Summary]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of those beside the main one that are not empty."""
    tables = [("Claims", ["technique", "claim", "measured here", "verdict"], claims(rows)),
              ("Runs without a result", ["row", "seed", "status", "steps", "message"], failures(rows)),
              ("Rows", ["row", "why"], [[s.row.name, s.row.why] for s in rows])]
    return [table for table in tables if table[2]]


def unequal(matrix: Matrix, rows: Sequence[Summary]) -> str:
    """Which rows' files missed the size that their widths were solved for by more than MISSED, and by how much."""
    missed = []
    for s in rows:
        off = s.mean("bytes_model") / matrix.equal_bytes - 1
        if abs(off) > MISSED:
            missed.append(f"{s.row.name} {off:+.1%}")
    return f" (missed by more than {MISSED:.0%}: {', '.join(missed)})" if missed else ""


def introduction(matrix: Matrix, rows: Sequence[Summary]) -> str:
    """One paragraph: what was asked, at what cost, and what makes runs differ that should not."""
    kind, amount = matrix.budget
    said = f"{matrix.why} Base: {matrix.base}. Budget of a run: {amount:,} {kind}"
    seconds = [line.train_seconds for s in rows for line in s.ok if line.train_seconds is not None]
    if seconds:
        said += f"; a run trained for {statistics.median(seconds):.0f} s in the median"
    said += "."
    if matrix.equal_bytes:
        said += f" Widths are solved for model files of {matrix.equal_bytes:,} bytes{unequal(matrix, rows)}."
    lines = [line for s in rows for line in s.ok]
    older = [line for s in rows if not uses_what_lost(s.row) for line in s.ok if not line.code]
    patched = [line for s in rows if not uses_what_lost(s.row) for line in s.ok if line.patches or line.score_patches]
    plain = [line for line in older if not line.patches and not line.score_patches]
    for who, what, found in (
            ("Runs", "versions of code", {line.code for line in lines if line.code}),
            ("Runs", "versions of code or data", {line.source for line in plain}),
            ("Patched runs", "versions of code, patches or data", {line.source for line in patched}),
            ("Runs", "versions of data", {line.data for line in lines if line.data}),
            ("Runs", "kinds of machine", {json.dumps(line.machine, sort_keys=True) for line in lines}),
            ("Runs", "numbers of threads", {line.threads for line in lines})):
        if len(found) > 1:
            said += f" {who} were made by {len(found)} {what}: compare with care."
    return said + f" Equivalence bound: {matrix.equivalence:g} bpb."


def markdown(matrix: Matrix, rows: Sequence[Summary], with_chart: bool) -> str:
    lines = [f"# {matrix.name}", "", introduction(matrix, rows), ""]
    if with_chart:
        lines += [f"![{DIFFERENCES}]({CHART})", ""]
    lines += [*markdown_table(COLUMNS, [cells(s) for s in rows]), NOTE, ""]
    for title, columns, table in further_tables(rows):
        lines += [f"## {title}", "", *markdown_table(columns, table)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------

CHART = "chart.png"  # beside report.md
DIFFERENCES = ("Difference of each row from the base with its 95% interval; green and red where Holm's correction "
               "leaves p below 0.05.")


def draw_differences(rows: Sequence[Summary]) -> Figure | None:
    """Dots with intervals, one line per row; None without any."""
    compared = [s for s in rows if s.comparison and s.comparison.n]
    if not compared:
        return None
    with pages.chart(height=1.0 + 0.24 * len(compared)) as (figure, axes):
        axes.axvline(0.0, color=pages.INK, linewidth=0.8)
        for y, s in enumerate(compared):
            c = s.comparison
            shade = {"better": pages.BETTER, "worse": pages.WORSE}.get(s.verdict.partition(",")[0], pages.FAINT)
            axes.plot(c.mean, y, "o", color=shade, markersize=5)
            if c.n > 1:
                axes.plot([c.low, c.high], [y, y], color=shade, linewidth=1.8)
        names = [s.row.name + (f" (from {s.row.against})" if s.row.against else "") for s in compared]
        axes.set_yticks(range(len(compared)), names)
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference of val_bpb from the base: less is better")
    return figure


def mean_curve(lines: Sequence[Line], key: str, column: int) -> list[tuple[float, float]]:
    """(step, mean over seeds) at the steps that every run logged."""
    tables = [{point[0]: point[column] for point in getattr(line, key) if point[column] is not None} for line in lines
              if getattr(line, key)]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, statistics.fmean(table[step] for table in tables)) for step in steps]


def draw_curves(rows: Sequence[Summary], key: str, column: int, label: str, skip: float = 0.0) -> Figure | None:
    """One mean curve per row; None without any. skip: share of the run at its beginning that is left out."""
    curves = {i: mean_curve(s.ok, key, column) for i, s in enumerate(rows)}
    curves = {i: points for i, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    last = max(points[-1][0] for points in curves.values())
    with pages.chart() as (figure, axes):
        for i, points in curves.items():
            shown = [point for point in points if point[0] >= skip * last]
            axes.plot(*zip(*shown, strict=True), color=pages.colour(i), label=name_in_legend(rows, i),
                      zorder=3 - i / len(rows))  # the first rows above the others
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def name_in_legend(rows: Sequence[Summary], i: int) -> str:
    """Of the rows without a colour of their own the first stands for all; "_" begins what a legend leaves out."""
    colours = len(pages.PALETTE)
    if i < colours:
        return rows[i].row.name
    return "others" if i == colours else "_"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both coordinates, by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_costs(rows: Sequence[Summary], key: str, label: str) -> Figure | None:
    """Score against a cost, one dot per row; None with less than two."""
    points = {i: (s.mean(key), s.mean("val_bpb")) for i, s in enumerate(rows) if s.ok}
    points = {i: point for i, point in points.items() if not math.isnan(point[0])}
    if len(points) < 2:
        return None
    with pages.chart(height=max(4.0, 1.0 + pages.LINE_OF_NAMES * len(points))) as (figure, axes):
        axes.plot(*zip(*pareto(list(points.values())), strict=True), "--", color=pages.FAINT, linewidth=1)
        for i, (x, y) in points.items():
            axes.plot(x, y, "o", color=pages.colour(i), markersize=5)
        axes.set_xlabel(label)
        axes.set_ylabel("val_bpb")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        pages.name_on_the_right(axes, [(x, y, rows[i].row.name) for i, (x, y) in points.items()])
    return figure


# ---------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------


def page(matrix: Matrix, rows: Sequence[Summary], differences: Figure | None) -> str:
    """report.html."""
    def shown(figure: Figure | None, caption: str) -> list[str]:
        return [] if figure is None else [pages.figure_with_caption(pages.svg_of(figure, caption), caption)]

    parts = [pages.heading(matrix.name, 1), pages.paragraph(introduction(matrix, rows)),
             *shown(differences, DIFFERENCES), html_table(COLUMNS, [cells(s) for s in rows]), pages.paragraph(NOTE)]
    for title, columns, table in further_tables(rows):
        parts += [pages.heading(title), html_table(columns, table, PROSE)]
    parts += [pages.heading("Over the run"),
              *shown(draw_curves(rows, "curve", 3, "training loss, nats", 0.1),
                     "Training loss on the batch of each logged step, mean over seeds, without the first tenth."),
              *shown(draw_curves(rows, "codes_curve", 1, "share of zeros"),
                     "Share of zeros among the codes of the block matrices."),
              *shown(draw_curves(rows, "codes_curve", 2, "churn", 0.1),
                     "Share of codes that a step changed, without the first tenth."),
              pages.heading("What it costs"),
              *shown(draw_costs(rows, "bytes_model", "bytes of the model file"),
                     "Score against bytes; the line is the Pareto front."),
              *shown(draw_costs(rows, "train_seconds", "seconds of training"),
                     "Score against seconds of training; those of runs that shared the machine are longer for it.")]
    return pages.page(matrix.name, parts)


def write(matrix: Matrix, asked: Sequence[Job], lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write report.md, its chart and report.html; the files. asked: all runs of the matrix."""
    rows = summarize(matrix, asked, lines)
    differences = draw_differences(rows)
    files = {"report.md": markdown(matrix, rows, differences is not None).encode(),
             "report.html": page(matrix, rows, differences).encode()}
    if differences is not None:
        files[CHART] = pages.png_of(differences)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]
