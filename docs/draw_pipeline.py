"""Draws docs/pipeline.svg, the README's picture of the pipeline: from text to bits per byte.

    python docs/draw_pipeline.py              # writes docs/pipeline.svg
    python docs/draw_pipeline.py look.png     # the same as a PNG

The same matplotlib writes the same bytes, so a change of the picture shows as one in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT = 900, 430  # of the picture; all lengths below are in these units, pixels at its size in the README
LATENT, STORED, PARAM = 140, 400, 740  # middles of the columns
TEXT_ROW, FORMS_ROW, FILE_ROW = 385, 206, 52  # middles of the rows
INK, QUIET, BACK = "#1f2328", "#59636e", "#bc4c00"  # text and arrows
PROGRAM, DATA, FILE = ("#ddf4ff", "#0969da"), ("#ffffff", "#818b98"), ("#dafbe1", "#1a7f37")  # fill, edge
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"  # come with matplotlib
POINT = 0.72  # points in a pixel, at 100 pixels per inch


def box(ax: Axes, x: float, y: float, width: float, height: float, colours: tuple[str, str], radius: float = 4) -> None:
    """A box around its middle (x, y), with rounded corners."""
    fill, edge = colours
    low = (x - width / 2, y - height / 2)
    style = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch(low, width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.1))


def text(ax: Axes, x: float, y: float, words: str, size: float = 12.5, colour: str = INK, font: str = SANS,
         align: str = "center", bold: bool = False) -> None:
    """Words around (x, y), or from x on with align="left"; `size` is in pixels."""
    ax.text(x, y, words, fontsize=size * POINT, color=colour, family=font, weight="bold" if bold else "normal",
            ha=align, va="center_baseline")


def program(ax: Axes, x: float, y: float, name: str, width: float) -> None:
    box(ax, x, y, width, 34, PROGRAM)
    text(ax, x, y, name, font=MONO, bold=True)


def data(ax: Axes, x: float, y: float, name: str, note: str, width: float, colours: tuple[str, str] = DATA) -> None:
    """What programs read and write: its name, and below it what it is."""
    box(ax, x, y, width, 46, colours, radius=15)
    text(ax, x, y + 8, name, bold=True)
    text(ax, x, y - 10, note, size=11, colour=QUIET)


def arrow(ax: Axes, *points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
    """A line through points, with its head at the last."""
    line = (0, (4, 3)) if dashed else "solid"
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[:-1], ys[:-1], color=colour, linewidth=1.3, linestyle=line, solid_joinstyle="round")
    how = dict(arrowstyle="-|>,head_length=0.5,head_width=0.22", color=colour, linewidth=1.3, linestyle=line, shrinkA=0,
               shrinkB=0)
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=how)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.set_axis_off()
    # White behind all of it, so that it reads on a dark page too.
    box(ax, WIDTH / 2, HEIGHT / 2, WIDTH - 2, HEIGHT - 2, ("#ffffff", "#d1d9e0"), radius=8)

    data(ax, LATENT, TEXT_ROW, "text", "yours, or packaged", 150)
    program(ax, STORED, TEXT_ROW, "data/prepare.py", 150)
    data(ax, PARAM, TEXT_ROW, "shards", "tokens, training and validation", 220)
    arrow(ax, (LATENT + 75, TEXT_ROW), (STORED - 75, TEXT_ROW))
    arrow(ax, (STORED + 75, TEXT_ROW), (PARAM - 110, TEXT_ROW))

    box(ax, 436, 219, 820, 198, PROGRAM, radius=6)
    text(ax, 42, 300, "train_gpt.py", font=MONO, align="left", bold=True)
    data(ax, LATENT, FORMS_ROW, "latent", "fp32, the optimizer's", 170)
    data(ax, STORED, FORMS_ROW, "stored", "codes + scales, the file's", 190, FILE)
    data(ax, PARAM, FORMS_ROW, "param", "bf16, the model's", 170)
    arrow(ax, (LATENT + 85, FORMS_ROW), (STORED - 95, FORMS_ROW))
    text(ax, (LATENT + STORED - 10) / 2, FORMS_ROW + 13, "quantize", size=12)
    arrow(ax, (STORED + 95, FORMS_ROW), (PARAM - 85, FORMS_ROW))
    text(ax, (STORED + PARAM + 10) / 2, FORMS_ROW + 13, "dequantize", size=12)
    arrow(ax, (PARAM + 35, TEXT_ROW - 23), (PARAM + 35, FORMS_ROW + 23))
    text(ax, PARAM + 43, 275, "batches", size=12, align="left")
    top, start, over = FORMS_ROW + 23, PARAM - 35, 262
    arrow(ax, (start, top), (start, over), (LATENT, over), (LATENT, top), colour=BACK)
    words = "straight-through: the gradient of param moves latent"
    text(ax, (LATENT + start) / 2, over + 12, words, size=12, colour=BACK)
    text(ax, 42, 140, "every step, so the model trains on what the file will hold", size=12, colour=QUIET, align="left")

    program(ax, STORED, FILE_ROW, "pack.py", 90)
    data(ax, 540, FILE_ROW, "artifact", "holds stored", 110, FILE)
    program(ax, 690, FILE_ROW, "eval_bpb.py", 114)
    data(ax, 827, FILE_ROW, "val_bpb", "bits per byte", 104)
    arrow(ax, (STORED, FORMS_ROW - 23), (STORED, FILE_ROW + 17), colour=FILE[1])
    arrow(ax, (STORED + 45, FILE_ROW), (485, FILE_ROW), colour=FILE[1])
    arrow(ax, (595, FILE_ROW), (633, FILE_ROW))
    arrow(ax, (747, FILE_ROW), (775, FILE_ROW))
    side, under = 872, 94  # around the trainer
    around = [(PARAM + 110, TEXT_ROW), (side, TEXT_ROW), (side, under), (690, under), (690, FILE_ROW + 17)]
    arrow(ax, *around, colour=QUIET, dashed=True)
    text(ax, 783, under + 12, "validation shards", size=11, colour=QUIET)

    for y, colours, radius, words in (
        (FILE_ROW + 24, PROGRAM, 3, "a program"),
        (FILE_ROW, DATA, 6, "what it reads or writes"),
        (FILE_ROW - 24, FILE, 6, "the bits of the file"),
    ):
        box(ax, 53, y, 22, 14, colours, radius)
        text(ax, 74, y, words, size=12, colour=QUIET, align="left")
    return figure


def main(argv: list[str]) -> int:
    out = Path(argv[0]) if argv else Path(__file__).parent / "pipeline.svg"
    # Without these two the ids and the date in the file would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "pipeline"}):
        metadata = {"Date": None, "Title": "From text to bits per byte"} if out.suffix == ".svg" else None
        draw().savefig(out, metadata=metadata, transparent=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
