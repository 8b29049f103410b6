"""Look at a run: one self-contained HTML page, of the files in its folder alone.

    python tern/report.py runs/RUN                      # writes runs/RUN/report.html, as the trainer does at its end
    python tern/report.py runs/A runs/B --out both.html     # side by side, with what differs in their settings

What was trained, whether it fits, where its bytes went, when it learned, what it is bad at. RUN is a run's folder, or a
metrics.jsonl of one; of an unfinished run the page shows what there is. What is behind the score is in details.json,
which scoring leaves (eval_bpb.py --details).
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tern import command, pages, runlog
from tern.errors import Foreseen
from tern.files import write_atomic
from tern.spread import Bin, Document, Picture, Spread

T = TypeVar("T")


class ReportError(Foreseen):
    """A run that cannot be shown; the message says what, where and what to do."""


# ---------------------------------------------------------------------------------------------------------------
# A run, as its files tell it
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A row of pack.py's inspection."""

    tensor: str
    shape: list[int]
    format: str
    weights: int
    bytes: int
    bits_per_weight: float
    zero_frac: float


@dataclass(frozen=True)
class Stream:
    role: str
    format: str
    codec: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    bytes: int
    header_bytes: int
    weights: int
    bits_per_parameter: float
    tensors: list[Tensor]
    streams: list[Stream]


@dataclass(frozen=True)
class Artifact:
    sha256: str


@dataclass(frozen=True)
class Details:
    """The JSON of eval_bpb.py --details."""

    artifact: Artifact
    inspection: Inspection
    picture: Picture | None
    entropies: dict[str, float]  # tensor -> bits of a code by itself
    spread: Spread | None


@dataclass(frozen=True)
class Scored:
    """One of the two scores in eval_bpb's JSON."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Result:
    memory: Scored  # before packing
    chunked: Scored
    sliding: Scored | None

    @property
    def kind(self) -> str:
        return "sliding" if self.sliding else "chunked"

    @property
    def best(self) -> Scored:
        return self.sliding or self.chunked


@dataclass(frozen=True)
class Seen:
    """A run. final, result and details are None where there are none."""

    path: Path
    name: str
    header: runlog.Header
    steps: list[runlog.Step]
    validations: list[runlog.Validation]
    final: runlog.Final | None
    result: Result | None
    details: Details | None

    @property
    def settings(self) -> dict:
        return self.header.settings


def typed(value: Any, kind: type[T], where: str) -> T:
    """Raises ReportError unless a JSON value is one of that kind."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise ReportError(f"{where}: {e}; is it of another version? Score or train again") from None


def parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ReportError(f"{where}: not JSON ({e}); the file is damaged or not of a run") from None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ReportError(f"cannot read {path}: {e.strerror}; give a run's folder, or a metrics.jsonl of one") from None


def read_records(path: Path) -> list[runlog.Record]:
    """All but a last line that a running or killed run has not finished. Raises ReportError."""
    lines, records = read_bytes(path).splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        where = f"{path} line {number}"
        value = parsed(line, where)
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in runlog.RECORDS:
            raise ReportError(f"{where}: its type must be one of {', '.join(runlog.RECORDS)}; give a run's folder, or "
                              "a metrics.jsonl of one")
        records.append(typed(value, runlog.RECORDS[kind], where))
    if not records or not isinstance(records[0], runlog.Header):
        raise ReportError(f"{path}: does not begin with a header, so it is not that of a run")
    return records


def read_run(path: Path) -> Seen:
    """Raises ReportError."""
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    folder = path if path.is_dir() or path.name != "metrics.jsonl" else path.parent
    records = read_records(metrics)
    header: runlog.Header = None
    final: runlog.Final | None = None
    steps: dict[int, runlog.Step] = {}
    validations: dict[int, runlog.Validation] = {}
    for record in records:
        if isinstance(record, runlog.Header):  # resumed: what came after its checkpoint was done again
            header = record
            steps = {step: x for step, x in steps.items() if step <= header.resumed_at}
            validations = {step: x for step, x in validations.items() if step <= header.resumed_at}
        elif isinstance(record, runlog.Step):
            steps[record.step] = record
        elif isinstance(record, runlog.Validation):
            validations[record.step] = record
        elif isinstance(record, runlog.Final):
            final = record
    details = folder / "details.json"
    name = " ".join(pages.visible(str(header.settings.get("run_id") or path.name)).split())
    return Seen(folder, name, header, list(steps.values()),
                list(validations.values()), final,
                typed(final.score | {"memory": final.memory}, Result, f"{metrics}: final") if final else None,
                read_details(details, final) if final and details.is_file() else None)


def read_details(path: Path, final: runlog.Final) -> Details:
    """Raises ReportError, also where they are of another model than the run's."""
    details = typed(parsed(read_bytes(path), str(path)), Details, str(path))
    if details.artifact.sha256 != final.artifact_sha256:
        raise ReportError(f"{path}: of another model than the run's; score that again: python eval_bpb.py "
                          f"{path.parent / 'model.tern'} --data DATA --details {path}")
    return details


# ---------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------

OTHERS = ("run_id", "out_dir", "resume")  # settings that say where a run lies, not what it is


def speed(run: Seen) -> float | None:
    """Tokens per second of training, over all of it."""
    if not run.steps or not run.steps[-1].elapsed:
        return None
    return run.steps[-1].tokens_seen / run.steps[-1].elapsed


def machine_name(run: Seen) -> str:
    m, ranks = run.header.machine, run.header.world_size
    gpus = m.get("gpu") or []
    what = f"{len(gpus)} x {gpus[0]}" if gpus else f"{m.get('cores', '?')} cores, {m.get('cpu', '?')}"
    return what + (f", {ranks} processes" if ranks > 1 else "")


def facts(run: Seen) -> list[tuple[str, str, str, str]]:
    """The header's boxes."""
    found, final, c = [], run.final, run.settings
    if final and run.result:
        about = f"{run.result.kind}, {run.result.best.bytes:,} bytes of text"
        found.append(("bits per byte", f"{run.result.best.val_bpb:.4f}", about, ""))
        margin = final.cap - final.bytes_total
        found.append(("bytes of the cap", f"{final.bytes_total:,}", f"of {final.cap:,}: " + (
            f"fits, {margin:,} left" if final.fits else f"OVER by {-margin:,}"), "good" if final.fits else "bad"))
        exact = final.roundtrip_gap == 0 and final.logits_identical
        found.append(("roundtrip gap", f"{final.roundtrip_gap + 0.0:.6f}",
                      "logits identical bit for bit" if exact else "the file is not the model that was trained",
                      "good" if exact else "bad"))
    else:
        found.append(("bits per byte", "none yet", "the run is not finished", "bad"))
    last = run.steps[-1] if run.steps else None
    if final or last:
        step, tokens = (final.step, final.tokens_seen) if final else (last.step, last.tokens_seen)
        seconds = final.seconds["train"] if final and "train" in final.seconds else last.elapsed if last else 0.0
        found.append(("steps", f"{step:,}", f"{tokens:,} tokens in {seconds:,.0f} s", ""))
    if speed(run):
        found.append(("tokens per second", f"{speed(run):,.0f}", machine_name(run), ""))
    versions = ", ".join(f"{name} {run.header.machine[name]}" for name in ("python", "torch")
                         if name in run.header.machine)
    made_of = f"program {run.header.source[:12]}, data {run.header.data[:12]}"
    found.append(("seed", str(c.get("seed", "?")), made_of, ""))
    found.append(("machine", str(run.header.machine.get("platform", "?")), versions, ""))
    return found


def sentence(run: Seen) -> str:
    """What was trained."""
    c = run.settings
    longer = f", {c['eval_seq_len']} in scores" if c.get("eval_seq_len") else ""
    said = (f"A GPT of {c.get('num_layers', '?')} layers, {c.get('model_dim', '?')} wide, with "
            f"{run.header.parameters:,} parameters: matrices {c.get('matrix_format', '?')}, embedding "
            f"{c.get('embed_format', '?')}, vectors {c.get('vector_format', '?')}; vocabulary "
            f"{c.get('vocab_size', '?')}, windows of {c.get('train_seq_len', '?')} tokens{longer}; trained on "
            f"{c.get('data_path', '?')} (preset {run.header.preset}).")
    if run.details and run.details.inspection.weights:
        d = run.details.inspection
        said += f" In the file a parameter takes {d.bits_per_parameter:.2f} bits."
    return said


def shown_value(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else "" if value is None else str(value)


def settings_tables(run: Seen) -> list[str]:
    """What the user chose, what the preset did, and everything."""
    def table(names: Iterable[str]) -> str:
        rows = [[name, shown_value(run.settings.get(name)), run.header.origin.get(name, "default")] for name in names]
        return pages.html_table(["setting", "value", "from"], rows, prose=("value",))

    chosen = [name for name, where in run.header.origin.items() if where != "preset" and name in run.settings]
    preset = [name for name, where in run.header.origin.items() if where == "preset" and name in run.settings]
    parts = [table(sorted(chosen))] if chosen else [pages.paragraph("All settings are the preset's or defaults.")]
    if preset:
        parts.append(pages.folded(f"{len(preset)} settings of the preset {run.header.preset}", [table(sorted(preset))]))
    argv = " ".join(run.header.argv)
    parts.append(pages.folded(f"All {len(run.settings)} settings", [
        pages.paragraph(f"Arguments: {argv or 'none'}"), table(sorted(run.settings))]))
    return parts


def differing(runs: Sequence[Seen]) -> list[list[str]]:
    """Settings and facts of the machine and the program that are not the same in all runs, a row each."""
    rows = []
    for name in sorted(set().union(*(run.settings for run in runs)) - set(OTHERS)):
        values = [shown_value(run.settings.get(name, "(none)")) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    for name, of in (("preset", lambda run: run.header.preset), ("program", lambda run: run.header.source[:12]),
                     ("data", lambda run: run.header.data[:12]), ("machine", machine_name)):
        values = [of(run) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return rows


def bits_per_byte(bins: Iterable[Bin]) -> float:
    """Of all of them together."""
    bins = list(bins)
    size = sum(b.bytes for b in bins)
    return sum(b.nats for b in bins) / math.log(2) / size if size else math.nan


def weak_points(where: Spread) -> str:
    """In a sentence or two."""
    said, half = [], sum(b.bytes for b in where.lengths) / 2
    short, total = [], 0
    for b in where.lengths:  # the bins that hold about the shorter half of the text
        if total < half:
            short.append(b)
        total += b.bytes
    long = where.lengths[len(short) :]
    if short and long:
        said.append(f"Documents of up to {short[-1].high:,} bytes take {bits_per_byte(short):.3f} bits per byte, "
                    f"longer ones {bits_per_byte(long):.3f}.")
    if len(where.positions) > 1:
        first, last = where.positions[0], where.positions[-1]
        said.append(f"With {spelled(first)} of context it takes {bits_per_byte([first]):.3f}, with {spelled(last)} "
                    f"{bits_per_byte([last]):.3f}.")
    return " ".join(said)


def spelled(b: Bin) -> str:
    numbers = f"{b.low:,}" if b.low == b.high else f"{b.low:,} to {b.high:,}"
    return f"{numbers} token{'s' if b.high != 1 else ''}"


# ---------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------


def shade(i: int) -> str:
    """Of the run with this number: the first is blue, in the dark and on paper."""
    return pages.colour(i + 1)


def series(runs: Sequence[Seen], axes: Axes, x: str, y: str, skip: float = 0.0, **style: Any) -> int:
    """A line per run of a step's field over another, without the first share of its steps; how many there are."""
    drawn = 0
    for i, run in enumerate(runs):
        steps = [s for s in run.steps if getattr(s, y) is not None]
        steps = [s for s in steps if s.step >= skip * steps[-1].step]
        if len(steps) > 1:
            axes.plot([getattr(s, x) for s in steps], [getattr(s, y) for s in steps], color=shade(i),
                      label=textwrap.shorten(run.name, 40), **style)
            drawn += 1
    return drawn


def legend(runs: Sequence[Seen], axes: Axes) -> None:
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_loss(runs: Sequence[Seen]) -> Figure | None:
    """Over steps and over seconds, with the validations."""
    with pages.charts(1, 2, height=3.6) as (figure, (by_step, by_second)):
        drawn = 0
        for axes, x, label in ((by_step, "step", "step"), (by_second, "elapsed", "seconds of training")):
            drawn += series(runs, axes, x, "loss", 0.02)
            for i, run in enumerate(runs):
                if run.validations:
                    axes.plot([getattr(v, x) for v in run.validations], [v.val_loss for v in run.validations], "o",
                              color=shade(i), markersize=4)
            axes.set_xlabel(label)
        by_step.set_ylabel("loss, nats per token")
        by_second.sharey(by_step)
        legend(runs, by_step)
    return figure if drawn else None


def draw_schedules(runs: Sequence[Seen]) -> Figure | None:
    """What changed during the run, over its steps."""
    panels = [("lr_scale", "learning rates, share of full", 0.0), ("seq_len", "tokens in a sequence", 0.0),
              ("zero_frac", "share of zeros among codes", 0.0), ("churn", "share of codes a step changed", 0.02)]
    with pages.charts(2, 2, height=4.6) as (figure, axes):
        drawn = 0
        for one, (key, title, skip) in zip(axes, panels, strict=True):
            found = series(runs, one, "step", key, skip)
            drawn += found
            one.set_title(title, fontsize=9, loc="left")
            if not found:
                one.set_axis_off()
            elif key != "zero_frac":
                one.set_ylim(bottom=0)
        for one in axes[2:]:
            one.set_xlabel("step")
    return figure if drawn else None


def family(name: str) -> tuple[int | None, str]:
    """(layer, what it is) of a tensor's name; None for what is in no layer."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight)?", name)
    return (int(found[1]), found[2]) if found else (None, name.removesuffix(".weight"))


def bands(run: Seen, d: Inspection) -> list[list[tuple[str, int, str]]]:
    """Rows of (name, bytes, colour): the streams, and the tensors' layers; each sums to the submission's bytes."""
    formats = list(dict.fromkeys(t.format for t in d.tensors))
    colours = {name: pages.colour(1 + i) for i, name in enumerate(formats)}
    streams = [(f"{s.format} {s.role}", s.bytes, colours.get(s.format, pages.OTHER))
               for s in sorted(d.streams, key=lambda s: formats.index(s.format) if s.format in formats else 99)]
    groups: dict[tuple[str, str], int] = {}
    for t in d.tensors:
        layer, what = family(t.tensor)
        key = (t.format, f"block {layer}" if layer is not None else what)
        groups[key] = groups.get(key, 0) + t.bytes
    tensors = [(name, size, colours[format]) for (format, name), size in
               sorted(groups.items(), key=lambda item: formats.index(item[0][0]))]
    rest = [("header", d.header_bytes, pages.OTHER)]
    if run.settings.get("cap_counts_code") and run.final:
        rest.append(("code", run.final.bytes_code, "#8c8c8c"))
    return [streams + rest, tensors + rest]


def draw_bytes(run: Seen, d: Inspection) -> Figure:
    """Areas in proportion to bytes, against the cap."""
    rows = bands(run, d)
    total, cap = sum(size for _, size, _ in rows[0]), run.final.cap
    right = max(total, cap) * 1.005
    with pages.chart(height=2.5) as (figure, axes):
        for y, row in enumerate(rows):
            at = 0
            for name, size, fill in row:
                axes.barh(y, size, left=at, height=0.86, color=fill, alpha=0.55, edgecolor="#ffffff", linewidth=0.6)
                if size > right * 0.011 * max(len(name), 4):
                    axes.text(at + size / 2, y, f"{name}\n{size:,}", ha="center", va="center", fontsize=7.5)
                at += size
            if total < cap:
                axes.barh(y, cap - total, left=total, height=0.86, color="none", edgecolor=pages.FAINT, hatch="////",
                          linewidth=0)
        axes.axvline(cap, color=pages.WORSE, linewidth=1.6)
        axes.annotate(f"cap {cap:,}", (cap, 1.02), xycoords=("data", "axes fraction"), ha="right", fontsize=8)
        axes.set_yticks([0, 1], ["streams", "tensors"])
        axes.set_ylim(1.5, -0.5)
        axes.set_xlim(0, right)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("bytes")
    return figure


def draw_entropies(details: Details) -> Figure | None:
    """Bits of a code, by layer, a line for each kind of matrix."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for t in details.inspection.tensors:
        layer, what = family(t.tensor)
        if layer is not None and len(t.shape) == 2 and min(t.shape) > 2 and t.tensor in details.entropies:
            lines.setdefault(what, []).append((layer, details.entropies[t.tensor]))
    if not lines:
        return None
    with pages.chart(height=3.4) as (figure, axes):
        for i, (what, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=pages.colour(i), label=what)
        layers = sorted({layer for points in lines.values() for layer, _ in points})
        axes.set_xticks(layers if len(layers) < 20 else layers[::2])
        axes.set_xlabel("layer")
        axes.set_ylabel("bits of a code")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def draw_zeros(picture: Picture) -> Figure:
    with pages.charts(1, 2, height=2.6) as (figure, (left, right)):
        for axes, shares, what in ((left, picture.zeros_of_rows, "row"), (right, picture.zeros_of_columns, "column")):
            axes.plot(sorted(shares), color=pages.colour(1))
            axes.set_xlabel(f"{what}s, sorted")
            axes.set_ylim(0, max([*picture.zeros_of_rows, *picture.zeros_of_columns, 0.01]) * 1.05)
        left.set_ylabel("share of zeros")
    return figure


def draw_bins(runs: Sequence[Seen], key: str, label: str) -> Figure | None:
    """Bits per byte over a log axis; below, for one run, how the bits of the score are shared out."""
    found = [(i, getattr(run.details.spread, key)) for i, run in enumerate(runs) if run.details and run.details.spread]
    if not found or max(len(bins) for _, bins in found) < 2:
        return None
    with pages.charts(1, 2, height=3.2) as (figure, (left, right)):
        for i, bins in found:
            bins = [b for b in bins if b.bytes]
            middle = [math.sqrt(max(b.low, 1) * max(b.high, 1)) for b in bins]
            left.plot(middle, [bits_per_byte([b]) for b in bins], "o-", markersize=4, color=shade(i),
                      label=textwrap.shorten(runs[i].name, 40))
            total = sum(b.nats for b in bins)
            right.plot(middle, [b.nats / total for b in bins], "o-", markersize=4, color=shade(i))
        for axes in (left, right):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
            axes.set_ylim(bottom=0)
        left.set_ylabel("bits per byte")
        right.set_ylabel("share of all bits")
        legend(runs, left)
    return figure


CODE_COLOURS = {"-": (0, 114, 178), "0": (244, 244, 240), "+": (213, 94, 0)}


def pixels(picture: Picture) -> np.ndarray:
    """uint8 [rows, columns, 3]."""
    return np.array([[CODE_COLOURS[code] for code in row] for row in picture.corner], dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------


def shown(figure: Figure | None, caption: str) -> list[str]:
    return [] if figure is None else [pages.figure_with_caption(pages.svg_of(figure, caption), caption)]


def chapter_fit(run: Seen) -> list[str]:
    if run.details is None:
        if run.path.is_file():
            return []
        score = f"python eval_bpb.py {run.path / 'model.tern'} --data DATA --details {run.path / 'details.json'}"
        return [pages.paragraph("Where the bytes went is not known, as the folder has no details.json. Scoring writes "
                                f"it: {score}")] if run.final else []
    d = run.details.inspection
    streams = [[s.role, s.format, s.codec, f"{s.count:,}", f"{s.bytes:,}", f"{8 * s.bytes / max(s.count, 1):.4f}",
                f"{s.bytes / d.bytes:.1%}"] for s in d.streams]
    streams.append(["header", "", "", "", f"{d.header_bytes:,}", "", f"{d.header_bytes / d.bytes:.1%}"])
    tensors = [[t.tensor, " x ".join(map(str, t.shape)) or "one", t.format, f"{t.weights:,}", f"{t.bytes:,}",
                f"{t.bits_per_weight:.3f}", f"{t.zero_frac:.3f}"] for t in d.tensors]
    counted = sum(size for _, size, _ in bands(run, d)[0])
    return [*shown(draw_bytes(run, d), f"Every byte of the {counted:,} that count, by stream and by tensor, to the "
                   "scale of the cap (the line on the right)."),
            pages.html_table(["stream", "format", "codec", "symbols", "bytes", "bits per symbol", "share"], streams),
            pages.folded(f"All {len(tensors)} tensors", [pages.html_table(
                ["tensor", "shape", "format", "weights", "bytes", "bits per weight", "zeros"], tensors),
                pages.paragraph("A stream that tensors share is split among them by their number of weights.")])]


def chapter_weights(run: Seen) -> list[str]:
    if run.details is None:
        return []
    parts = shown(draw_entropies(run.details),
                  "Bits of a code by itself (its entropy), by layer: log2(3) = 1.585 where -1, 0 and +1 are equally "
                  "many, less where zeros are more or fewer than a third.")
    picture = run.details.picture
    if picture is not None:
        rows, columns = picture.shape
        size = f"{len(picture.corner)} rows and {len(picture.corner[0])} columns"
        parts += [pages.image_with_caption(pixels(picture), f"Codes of {picture.tensor} as squares of three colours",
                                           f"The first {size} of {picture.tensor} ({rows} x {columns}), the largest "
                                           "ternary matrix: blue -1, white 0, orange +1."),
                  *shown(draw_zeros(picture), f"Zeros in each row and each column of {picture.tensor}: a row (an "
                         "output) or a column (an input) of zeros alone would be dead.")]
    return parts


def bins_table(bins: Sequence[Bin], label: str, counted: str) -> str:
    rows = [[f"{b.low:,} to {b.high:,}" if b.low != b.high else f"{b.low:,}", f"{b.count:,}", f"{b.bytes:,}",
             f"{bits_per_byte([b]):.4f}" if b.bytes else ""] for b in bins]
    return pages.html_table([label, counted, "bytes", "bits per byte"], rows)


def document(d: Document, rank: str) -> list[str]:
    more = "" if len(d.shown) >= d.tokens else ", its beginning"
    bits = [(text, size, nats / math.log(2)) for text, size, nats in d.shown]
    return [pages.heading(f"{rank}: {d.nats / math.log(2) / d.bytes:.3f} bits per byte" if d.bytes else rank, 3),
            pages.paragraph(f"Document {d.number:,} of the validation text, {d.bytes:,} bytes in {d.tokens:,} "
                            f"tokens{more}."), pages.heated_text(bits)]


def chapter_weak(runs: Sequence[Seen]) -> list[str]:
    known = [run for run in runs if run.details and run.details.spread]
    if not known:
        return []
    parts = [pages.paragraph((f"{run.name}: " if len(runs) > 1 else "") + weak_points(run.details.spread))
             for run in known]
    by = {run.details.spread.documents_by for run in known}
    parts += shown(draw_bins(runs, "lengths", "bytes of the document"),
                   f"Bits per byte by the length of the document ({' and '.join(sorted(by))} windows), and the share "
                   "of the whole score that such documents are.")
    parts += shown(draw_bins(runs, "positions", "tokens of context"),
                   "Bits per byte by how much context the token had in its window (windows side by side, so that every "
                   "position occurs).")
    for run in known:
        where = run.details.spread
        tables = [bins_table(where.lengths, "bytes of the document", "documents"),
                  bins_table(where.positions, "tokens of context", "tokens")]
        documents = [part for which, found in (("Worst", where.worst), ("Best", where.best))
                     for number, d in enumerate(found, 1) for part in document(d, f"{which} {number}")]
        numbers = pages.folded("The same as numbers", tables)
        text = [pages.paragraph("The worst and the best documents, each token on a ground that is the deeper the more "
                                "bits it takes for each of its bytes."), pages.heat_legend(), *documents]
        if len(runs) > 1:
            parts.append(pages.folded(f"Numbers and documents of {run.name}", [*tables, *text]))
        else:
            parts += [numbers, *text]
    return parts


def chapter_learned(runs: Sequence[Seen]) -> list[str]:
    parts = shown(draw_loss(runs), "Training loss on the batch of each logged step, without the first 2%; dots are "
                  "validations.")
    parts += shown(draw_schedules(runs), "The schedule, and what the codes of the block matrices did under it.")
    rows = [[run.name, f"{v.step:,}", f"{v.elapsed:,.0f}", f"{v.val_loss:.4f}", f"{v.val_bpb:.4f}"]
            for run in runs for v in run.validations]
    if rows:
        parts.append(pages.folded(f"{len(rows)} validations", [
            pages.html_table(["run", "step", "seconds", "val_loss", "val_bpb"], rows)]))
    return parts or [pages.paragraph("No step was logged.")]


def final_table(run: Seen) -> list[str]:
    """Every score of a run, and its seconds."""
    if not run.final or not run.result:
        return []
    rows = [["before packing, in memory", f"{run.result.memory.val_bpb:.8f}", ""]]
    for name, score in (("from the file, chunked", run.result.chunked), ("from the file, sliding", run.result.sliding)):
        if score:
            rows.append([name, f"{score.val_bpb:.8f}", f"{score.seconds:.1f}"])
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in run.final.seconds.items())
    return [pages.html_table(["score", "bits per byte", "seconds"], rows),
            pages.paragraph(f"Seconds of each phase: {seconds}. Model {run.final.bytes_model:,} bytes, sha256 "
                            f"{run.final.artifact_sha256[:16]}; code {run.final.bytes_code:,} bytes, "
                            f"{'counted' if run.settings.get('cap_counts_code') else 'not counted'}.")]


def page_of_one(run: Seen) -> str:
    parts = [pages.heading(run.name, 1), pages.paragraph(sentence(run)), pages.boxes(facts(run))]
    chapters: list[tuple[str, list[str]]] = [
        ("What was trained", settings_tables(run)), ("Does it fit, and where did its bytes go", chapter_fit(run)),
        ("When it learned", chapter_learned([run])), ("The weights", chapter_weights(run)),
        ("What it is bad at", chapter_weak([run])), ("The score", final_table(run))]
    return pages.page(run.name, parts + in_chapters(chapters))


def in_chapters(chapters: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [part for title, found in chapters if found for part in (pages.heading(title), *found)]


def page_of_several(runs: Sequence[Seen]) -> str:
    def cells(run: Seen) -> list[str]:
        final, last = run.final, run.steps[-1] if run.steps else None
        step = final.step if final else last.step if last else 0
        return [run.name, f"{run.result.best.val_bpb:.4f}" if run.result else "not finished",
                run.result.kind if run.result else "", f"{final.bytes_total:,}" if final else "",
                f"{final.cap - final.bytes_total:,}" if final else "",
                f"{final.roundtrip_gap + 0.0:.6f}" if final else "", f"{step:,}",
                f"{speed(run):,.0f}" if speed(run) else "", machine_name(run)]

    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    scores = [run.result.best.val_bpb for run in runs if run.result]
    said = f"{len(runs)} runs side by side."
    if len(scores) > 1 and all(row[0] == "seed" for row in differing(runs)):  # of one recipe
        said += (f" Mean {statistics.fmean(scores):.4f} bits per byte, standard deviation "
                 f"{statistics.stdev(scores):.4f}.")
    rows = differing(runs)
    names = [run.name for run in runs]

    def each(chapter: Callable[[Seen], list[str]]) -> list[str]:
        return [pages.folded(run.name, parts) for run in runs if (parts := chapter(run))]

    chapters = [
        ("What differs", [pages.html_table(["setting", *names], rows, prose=names)] if rows else [
            pages.paragraph("Nothing: same settings, program, data and machine.")]),
        ("When they learned", chapter_learned(runs)), ("What they are bad at", chapter_weak(runs)),
        ("Do they fit, and where did their bytes go", each(chapter_fit)), ("The weights", each(chapter_weights))]
    columns = ["run", "bits per byte", "windows", "bytes", "left of the cap", "gap", "steps", "tokens/s", "machine"]
    parts = [pages.heading(title, 1), pages.paragraph(said), pages.html_table(columns, [cells(run) for run in runs])]
    return pages.page(title, parts + in_chapters(chapters))


def with_names_apart(runs: Sequence[Seen]) -> list[Seen]:
    """Runs of the same name, in different folders, by their folders' too."""
    names = [run.name for run in runs]
    return [replace(run, name=f"{run.name} ({run.path})") if names.count(run.name) > 1 else run for run in runs]


def page(runs: Sequence[Seen]) -> str:
    return page_of_one(runs[0]) if len(runs) == 1 else page_of_several(with_names_apart(runs))


def main(argv: list[str] | None = None) -> int:
    p = command.Parser(prog="report.py", description="Show runs as one HTML page.", allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a metrics.jsonl of one")
    p.add_argument("--out", default="", help="the page (default: report.html in the folder of the run; of several, "
                   "report.html here)")
    args = p.parse_args(argv)
    try:
        paths = [Path(run) for run in args.runs]
        folder = (paths[0] if paths[0].is_dir() else paths[0].parent) if len(paths) == 1 else Path()
        out = Path(args.out) if args.out else folder / "report.html"
        text = page([read_run(path) for path in paths])
        write_atomic(out, text.encode(errors="replace"))
        command.print_if_open(f"{out}  {len(text):,} characters")
        return 0
    except (ValueError, OSError) as e:
        command.say_error(e)
        return 1
    except Exception as e:  # a file may hold what nobody thought of: a line, as of other commands
        command.say_error(command.describe_unexpected(e))
        return 1


if __name__ == "__main__":
    command.steady_streams()
    sys.exit(main())
