"""Pages for people: tables in Markdown and HTML, charts by matplotlib, one self-contained HTML file.

Knows nothing of what it shows. The same input gives the same bytes, with one version of matplotlib: charts hold no
date, and the names inside of them are hashes with a fixed salt.
"""

from __future__ import annotations

import base64
import html
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
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
    "axes.spines.right": False, "lines.linewidth": 1.4, "axes.formatter.useoffset": False, "text.parse_math": False,
    "svg.hashsalt": "tern", "svg.fonttype": "none",  # text stays text
}
LINE_OF_NAMES = 0.16  # inches
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A text in which nothing hides and nothing turns the line around: controls, marks of direction and what is no
    character are written as their number, a line's end as an arrow too."""
    def shown(c: str) -> str:
        if c == "\n":
            return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
        if c == "\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"):
            return c
        return f"<U+{ord(c):04X}>"

    return "".join(map(shown, text))


def escaped(text: str) -> str:
    """A text as it may stand in a page."""
    return html.escape(visible(text))


# ---------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def charts(rows: int, columns: int, width: float = 9.6, height: float = 4.0) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of so many inches with rows x columns axes to draw on, row by row, in the style of these pages."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


@contextmanager
def chart(width: float = 9.6, height: float = 4.0) -> Iterator[tuple[Figure, Axes]]:
    """The same with one axes."""
    with charts(1, 1, width, height) as (figure, axes):
        yield figure, axes[0]


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


# A page's own colours, which differ in the dark and on paper.
OF_THE_PAGE = {INK: "currentColor", PALETTE[0]: "currentColor", FAINT: "var(--faint)", GRID: "var(--line)"}


def svg_of(figure: Figure, description: str) -> str:
    """The figure as an <svg> element to stand in a page, whose ink it takes; description: for those who do not see
    it."""
    out = io.StringIO()
    with matplotlib.rc_context(CHART_STYLE):
        figure.savefig(out, format="svg", metadata=NO_METADATA, transparent=True)
    text = out.getvalue()
    text = " ".join(text[text.index("<svg") :].split()).replace("> <", "><")  # one line
    text = re.sub(r' id="[a-zA-Z0-9]+_[0-9]+"', "", text)  # of groups, which nothing refers to: a page has many figures
    for fixed, name in OF_THE_PAGE.items():
        text = text.replace(f": {fixed}", f": {name}")  # in styles
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped(description)}" ', 1)


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
        return f'<td class="{kind}">{escaped(value)}</td>'

    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(map(cell, columns, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; --faint: #6a6a6a;
  --good: #1b7837; --bad: #b2182b; --heat: 213, 94, 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3c3c3c; --faint: #9a9a9a;
  --good: #6cc585; --bad: #ff8a80; --heat: 255, 130, 40; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --faint: #555; --good: #1b7837;
  --bad: #b2182b; --heat: 213, 94, 0; } figure, .boxes { break-inside: avoid; }
  h2, h3, h3 + p { break-after: avoid; }
  .wide { overflow: visible; } details > * { display: revert; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 66rem; padding: 0 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { font-weight: 600; line-height: 1.25; } h1 { margin-bottom: .5rem; }
h2 { margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
p, figcaption { max-width: 46rem; } figure { margin: 1.2rem 0; } figcaption { color: var(--faint); font-size: 14px; }
figure svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: normal; min-width: 14rem; } summary { cursor: pointer; color: var(--faint); margin: .6rem 0; }
.boxes { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.boxes div { border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem; }
.boxes dt, .boxes .more { color: var(--faint); font-size: 13px; } .boxes dd { margin: 0; font-size: 1.25rem; }
.boxes .more { display: block; } .boxes dl { margin: 0; } .good { color: var(--good); } .bad { color: var(--bad); }
img.pixels { image-rendering: pixelated; width: 100%; max-width: 30rem; border: 1px solid var(--line); }
.heat { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid var(--line);
  padding: .7rem .9rem; margin: .4rem 0 1.4rem; max-width: none; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
"""
HEAT_LEVELS, HEAT_TOP = 8, 8.0  # shades of a text, and the bits per byte from which it has the last
PAGE_STYLE += "".join(f".h{i} {{ background: rgba(var(--heat), {0.85 * i / HEAT_LEVELS:.2f}); }} "
                      for i in range(1, HEAT_LEVELS + 1))


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escaped(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{escaped(text)}</p>"


def figure_with_caption(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"


def image_with_caption(pixels: np.ndarray, description: str, caption: str) -> str:
    """pixels: uint8 [rows, columns, 3], each shown as a square."""
    out = io.BytesIO()
    imsave(out, pixels, format="png", metadata={"Software": None})
    source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return (f'<figure><img class="pixels" alt="{escaped(description)}" src="{source}">'
            f"<figcaption>{escaped(caption)}</figcaption></figure>")


def folded(summary: str, parts: Sequence[str]) -> str:
    """What is there for who asks."""
    return f"<details><summary>{escaped(summary)}</summary>{''.join(parts)}</details>"


def boxes(facts: Sequence[tuple[str, str, str, str]]) -> str:
    """(name, value, what there is to say of it, "good", "bad" or "") beside each other."""
    cells = [f'<div><dl><dt>{escaped(name)}</dt><dd class="{verdict}">{escaped(value)}'
             f'<span class="more">{escaped(more)}</span></dd></dl></div>' for name, value, more, verdict in facts]
    return f'<div class="boxes">{"".join(cells)}</div>'


def heat_of(bits: float, size: int) -> int:
    """The shade, 0 to HEAT_LEVELS, of a text of so many bytes; of none, by its bits alone."""
    return min(round(HEAT_LEVELS * bits / max(size, 1) / HEAT_TOP), HEAT_LEVELS)


def heated_text(pieces: Sequence[tuple[str, int, float]]) -> str:
    """Pieces (text, bytes, bits), each on a ground that is the deeper the more bits a byte of it takes."""
    spans = [f'<span class="h{heat_of(bits, size)}" title="{bits:.2f} bits, {size} byte{"s" if size != 1 else ""}">'
             f"{escaped(text) or '&#9656;'}</span>" for text, size, bits in pieces]
    return f'<p class="heat" dir="ltr">{"".join(spans)}</p>'


def heat_legend() -> str:
    shades = "".join(f'<span class="h{i}"> {i * HEAT_TOP / HEAT_LEVELS:.0f} </span>' for i in range(HEAT_LEVELS + 1))
    return f'<p class="heat">bits per byte {shades} and more</p>'


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML file of elements; it asks for nothing outside of itself."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style></head>'
            f"<body>{''.join(parts)}</body></html>\n")
