"""Pages for people: tables in Markdown and HTML, charts by matplotlib, one self-contained HTML file.

Knows nothing of what it shows. The same input gives the same bytes, with one version of matplotlib: charts hold no
date, and the names inside of them are hashes with a fixed salt.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

INK, FAINT, GRID = "#1b1b1b", "#767676", "#d5d5d5"
BETTER, WORSE = "#1b7837", "#b2182b"
# Of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers can tell apart; black first.
PALETTE = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OTHER = "#b8b8b8"  # for what comes after the palette

CHART_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": INK,
    "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.4, "axes.formatter.useoffset": False,
    "svg.hashsalt": "tern", "svg.fonttype": "none",  # text stays text
}
LINE_OF_NAMES = 0.16  # inches
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


# ---------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def chart(width: float = 9.6, height: float = 4.0) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches with axes to draw on, in the style of these pages."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def colour(i: int) -> str:
    return PALETTE[i] if i < len(PALETTE) else OTHER


def name_on_the_right(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the name of each (x, y, name) beside the axes, near its height, with a line to its point."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point[1])
    gap = LINE_OF_NAMES / (axes.get_figure(root=True).get_figheight() - 0.8)  # as a share of the axes' height
    steps = gap * np.arange(len(ordered))
    wanted = np.array([(y - low) / (high - low) for _, y, _ in ordered])
    heights = isotonic_regression(wanted - steps).x + steps  # the nearest that leave a gap
    heights = np.maximum(np.minimum(heights, 1.0 - steps[::-1]), steps)
    for (x, y, name), height in zip(ordered, heights, strict=True):
        axes.annotate(name, (x, y), xytext=(1.03, height), textcoords="axes fraction", va="center", fontsize=8,
                      arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.4, "relpos": (0, 0.5),
                                  "shrinkB": 3})


def svg_of(figure: Figure, description: str) -> str:
    """The figure as an <svg> element to stand in a page; description: for those who do not see it."""
    out = io.StringIO()
    with matplotlib.rc_context(CHART_STYLE):
        figure.savefig(out, format="svg", metadata=NO_METADATA)
    text = out.getvalue()
    text = " ".join(text[text.index("<svg") :].split()).replace("> <", "><")  # one line
    text = re.sub(r' id="[a-zA-Z0-9]+_[0-9]+"', "", text)  # of groups, which nothing refers to: a page has many figures
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def png_of(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, for where no SVG is shown."""
    out = io.BytesIO()
    with matplotlib.rc_context(CHART_STYLE):
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines, with an empty one at the end."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [columns, *escaped]]
    return [lines[0], f"|{'---|' * len(columns)}", *lines[1:], ""]


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Sequence[str] = ()) -> str:
    """prose: columns whose cells are sentences, which may be broken; numbers are set to the right."""
    def cell(column: str, value: str) -> str:
        kind = ""
        if column in prose:
            kind = "text"
        elif value and value[0] in "<+-.0123456789":
            kind = "number"
        return f'<td class="{kind}">{html.escape(value)}</td>'

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(map(cell, columns, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------

PAGE_STYLE = """
:root { --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; --faint: #6a6a6a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3c3c3c; --faint: #9a9a9a; } }
@media print { :root { --ink: #000; --paper: #fff; --line: #bbb; } figure { break-inside: avoid; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1, h2 { font-weight: 600; } figure { margin: 1.5rem 0; } figcaption { color: var(--faint); max-width: 50rem; }
figure svg { width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } td.text { white-space: normal; min-width: 14rem; }
"""


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def figure_with_caption(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML file of elements; it asks for nothing outside of itself."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style></head>'
            f"<body>{''.join(parts)}</body></html>\n")
