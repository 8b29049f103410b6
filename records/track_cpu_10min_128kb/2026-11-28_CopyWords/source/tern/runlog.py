"""What a run shows: the terminal, log.txt (the field's grammar), metrics.jsonl (typed records).

A run fills the records; how they read as text is decided here, for the run that prints them and for the referee that
looks for the same lines in a log (records/check.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

SCHEMA = 2  # 1: bytes_code of a final record were those of the readable sources
NO_BF16_PRODUCTS = " without bf16 products"  # what a header says of such a CPU

# ---------------------------------------------------------------------------------------------------------------
# Records: the lines of metrics.jsonl, each with its "type" (RECORDS)
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What runs: the first line. All but the seed and its folder is the same for all seeds of a record."""

    schema: int
    preset: str
    argv: list[str]
    settings: dict
    origin: dict[str, str]  # setting that is no default -> where it came from
    machine: dict
    world_size: int
    source_sha256: dict[str, str]  # file of the program -> its sha256
    source: str  # one identity of them
    data_sha256: dict[str, str]
    data: str
    parameters: int
    resumed_at: int  # step


@dataclass(frozen=True)
class Phase:
    """A part of the run that ended: load, compile, train, pack or score."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """A training step that was logged."""

    step: int
    loss: float  # nats per token
    elapsed: float  # training seconds since the start
    step_seconds: float
    tokens: int
    tokens_seen: int
    zero_frac: float | None  # None or NaN where the matrices have no codes
    churn: float | None  # share of the codes that this step changed
    lr_scale: float
    momentum: float
    seq_len: int


@dataclass(frozen=True)
class Validation:
    """A validation inside the training time."""

    step: int
    elapsed: float
    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes that each rank holds and sends in a step."""

    state_bytes: list[int]  # params, gradients and optimizer state
    gradient_bytes: list[int]
    code_bytes: list[int]  # codes and scales
    bytes_per_ternary_weight: float  # of what is sent


@dataclass(frozen=True)
class Final:
    """How a finished run ended: the last line."""

    step: int
    tokens_seen: int
    memory: dict  # tern.metric.Score of the model in memory
    score: dict  # the JSON of eval_bpb.py
    roundtrip_gap: float  # bits per byte: from the file less in memory
    logits_identical: bool
    seconds: dict[str, float]  # phase -> seconds
    bytes_model: int
    bytes_code: int
    bytes_total: int  # what the cap covers
    cap: int
    fits: bool
    artifact_sha256: str
    replica_sha256: str = ""  # of the params


Record = Header | Phase | Step | Validation | Memory | Final
RECORDS: dict[str, type] = {
    "header": Header, "phase": Phase, "train": Step, "val": Validation, "memory": Memory, "final": Final,
}
PHASES = ("load", "compile", "train", "pack", "score")

# ---------------------------------------------------------------------------------------------------------------
# Where they go
# ---------------------------------------------------------------------------------------------------------------


class Log:
    """Rank 0's output: the terminal, log.txt and metrics.jsonl. Other ranks are quiet.

    strict: a file that cannot be written is an OSError. Otherwise what cannot be written is left out, and `failed` says
    so: a run does not end because its disk is full or its terminal is gone.
    """

    def __init__(self, folder: Path, rank: int, append: bool):
        self.quiet, self.bar_width = rank != 0, 0
        self.strict, self.failed = True, ""
        self.files: dict[str, TextIO] = {}
        if not self.quiet:
            for name in ("log.txt", "metrics.jsonl"):
                try:
                    self.files[name] = open(folder / name, "a" if append else "w", encoding="utf-8", errors="replace")
                except OSError as e:
                    raise cannot_write(folder / name, e) from None

    def write(self, name: str, text: str) -> None:
        """A line to a file, at once."""
        file = self.files.get(name)
        if file is None:
            return
        try:
            print(text, file=file, flush=True)
        except OSError as e:
            del self.files[name]
            drop(file)
            error = cannot_write(Path(file.name), e)
            if self.strict:
                raise error from None
            self.failed = self.failed or str(error)

    def line(self, text: str, console: bool = True) -> None:
        if self.quiet:
            return
        if console:
            self.clear_bar()
            self.show(text + "\n")
        self.write("log.txt", text)

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.line(text)

    def record(self, record: Record) -> None:
        if not self.quiet:
            kind = next(name for name, of in RECORDS.items() if isinstance(record, of))
            values = {"type": kind} | asdict(record)
            for name, value in values.items():
                if isinstance(value, float) and math.isnan(value):  # JSON has no NaN
                    values[name] = None
            self.write("metrics.jsonl", json.dumps(values, sort_keys=True))

    def phase(self, name: str, seconds: float, note: str = "") -> None:
        """A part of the run that ended."""
        phase = Phase(name, seconds)
        self.line(phase_line(phase, note))
        self.record(phase)

    def preflight(self, header: Header, facts: Preflight, sources: Mapping[str, bytes]) -> None:
        """What is about to run, in full in the files."""
        if not header.resumed_at or facts.source_changed:
            for name, text in sources.items():  # a log reproduces its run
                self.line(source_line(name, text), console=False)
        self.record(header)
        self.line(f"machine     {json.dumps(header.machine, sort_keys=True)}", console=False)
        self.lines(preflight_lines(header, facts))

    def show(self, text: str) -> None:
        """To the terminal, as long as there is one: a pipe may be closed by its reader, a file system be full."""
        try:
            print(text, end="", flush=True)
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # what is still in its buffer is not to fail at the end
            os.close(nowhere)

    def on_terminal(self) -> bool:
        return sys.stdout is not None and sys.stdout.isatty()

    def bar(self, text: str) -> None:
        """A line that the next one overwrites; only on a terminal."""
        if not self.quiet and self.on_terminal():
            text = text[: shutil.get_terminal_size().columns - 1]
            self.show("\r" + text.ljust(self.bar_width))
            self.bar_width = len(text)

    def clear_bar(self) -> None:
        if self.bar_width:
            self.show("\r" + " " * self.bar_width + "\r")
            self.bar_width = 0

    def close(self) -> None:
        self.clear_bar()
        for file in self.files.values():
            drop(file)
        self.files = {}


def cannot_write(path: Path, e: OSError) -> OSError:
    return OSError(f"cannot write {path}: {e.strerror or e}; make room or mend its permissions, or choose another "
                   "--out-dir or --run-id")


def drop(file: TextIO) -> None:
    """Close a file whose last words may not fit."""
    try:
        file.close()
    except OSError:
        return


# ---------------------------------------------------------------------------------------------------------------
# How they read
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preflight:
    """What is about to run, beside the header."""

    device: str
    why_device: str
    threads: int
    hidden_dim: int  # MLP width
    train_tokens: int
    val_tokens: int
    parts: Mapping[str, tuple[str, int, float]]  # part of the model's file -> (its format, symbols, predicted bytes)
    bytes_code: int
    micro_tokens: int  # tokens per forward and process
    elapsed: float  # training seconds of a run that is resumed
    source_changed: bool  # since that run's checkpoint
    notices: list[str]


def preflight_lines(h: Header, p: Preflight) -> list[str]:
    """What is about to run, before it does."""
    c = h.settings
    settings = [f"{name}={value}" + (f" ({h.origin[name]})" if name in h.origin else "") for name, value in c.items()]
    lines = [
        f"{'=' * 20} {c['run_id']} (preset {h.preset}) {'=' * 20}",
        textwrap.fill(", ".join(settings), 118, initial_indent="settings    ", subsequent_indent=" " * 12,
                      break_on_hyphens=False),
        *(f"notice      {notice}" for notice in p.notices),
        f"device      {p.device} ({p.why_device}) x {h.world_size} process(es), {p.threads} thread(s) each",
        "dtype       bf16 params and activations (a param is what the file holds); fp32 latents, gradient sums, "
        "optimizer state and losses (bf16 would lose small updates)",
        f"data        {c['data_path']}: {p.train_tokens:,} training tokens, {p.val_tokens:,} validation tokens, "
        f"identity {h.data[:16]}",
        f"model       {c['num_layers']} layers x {c['model_dim']}, {c['num_heads']} heads, {c['num_kv_heads']} kv, "
        f"mlp {p.hidden_dim}, vocab {c['vocab_size']}: {h.parameters:,} parameters",
    ]
    for part, (label, count, size) in p.parts.items():
        about = f" ({label}): {count:,}" if label else ":"
        lines.append(f"              {part}{about} in {size:,.0f} bytes")
    model = round(sum(size for *_, size in p.parts.values()))
    over = model - c["cap_bytes"] + (p.bytes_code if c["cap_counts_code"] else 0)
    verdict = f"fits, margin {-over:,}" if over <= 0 else f"OVER by {over:,}"
    if over > 0 and c.get("fit_cap"):
        verdict += ", which the embedding's step is to bring under it (fit_cap)"
    elif 0 < over < 0.01 * model:
        verdict += ", which is less than predictions are off by: the final block has the true bytes"
    lines.append(f"bytes       {model:,} predicted for the model, {p.bytes_code:,} of code{not_counted(c)}; cap "
                 f"{c['cap_bytes']:,}: {verdict}")
    micro_batches = c["train_batch_tokens"] // (h.world_size * p.micro_tokens)
    lines.append(f"step        {c['train_batch_tokens']:,} tokens = {h.world_size} process(es) x {micro_batches} "
                 f"micro-batch(es) x {p.micro_tokens // c['train_seq_len']} sequences of {c['train_seq_len']}")
    if h.resumed_at:
        changed = "; the program was changed since" if p.source_changed else ""
        lines.append(f"resume      at step {h.resumed_at}, {p.elapsed:.1f} s of training done{changed}")
    return lines


def source_line(name: str, text: bytes) -> str:
    """A file of the program in its log."""
    return f"{'=' * 40} {name}\n{text.decode(errors='replace')}"


def not_counted(settings: Mapping) -> str:
    return "" if settings["cap_counts_code"] else " (not counted)"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def seconds_left(step: int, elapsed: float, settings: Mapping) -> float:
    """Training seconds that are left, by the cap and by the count of steps, whichever ends first."""
    by_clock = by_count = math.inf
    if settings["max_wallclock_seconds"]:
        by_clock = settings["max_wallclock_seconds"] - elapsed
    if settings["iterations"]:
        by_count = (settings["iterations"] - step) * elapsed / step
    return min(by_clock, by_count)


def step_line(s: Step, settings: Mapping) -> str:
    zero_frac, churn = (math.nan if x is None else x for x in (s.zero_frac, s.churn))
    return (f"step:{s.step}/{settings['iterations']} train_loss:{s.loss:.4f} train_time:{1000 * s.elapsed:.0f}ms "
            f"step_avg:{1000 * s.elapsed / s.step:.2f}ms tok/s:{s.tokens / s.step_seconds:.0f} "
            f"zero_frac:{zero_frac:.4f} churn:{churn:.5f} lr_scale:{s.lr_scale:.3f} "
            f"left:{clock(seconds_left(s.step, s.elapsed, settings))}")


def progress_bar(s: Step, progress: float, settings: Mapping) -> str:
    """The step on a terminal; progress in [0, 1]."""
    known = s.zero_frac is not None and s.churn is not None and not math.isnan(s.churn)
    codes = f"zero_frac {s.zero_frac:.3f}  churn {s.churn:.4f}" if known else ""
    return (f"[{'#' * int(24 * progress):<24}] step {s.step}  loss {s.loss:.4f}  {1000 * s.step_seconds:.0f} ms/step  "
            f"{s.tokens / s.step_seconds:,.0f} tok/s  {codes}  "
            f"{clock(seconds_left(s.step, s.elapsed, settings))} left")


def validation_line(v: Validation, settings: Mapping) -> str:
    return (f"step:{v.step}/{settings['iterations']} val_loss:{v.val_loss:.4f} val_bpb:{v.val_bpb:.4f} "
            f"train_time:{1000 * v.elapsed:.0f}ms step_avg:{1000 * v.elapsed / v.step:.2f}ms")


def memory_lines(m: Memory) -> list[str]:
    ranks = len(m.state_bytes)
    lines = [f"memory      {', '.join(f'{n:,}' for n in m.state_bytes)} bytes of params, gradients and optimizer state"
             + (" on the ranks" if ranks > 1 else "")]
    if ranks > 1:
        lines.append(f"sent/step   gradients {sum(m.gradient_bytes):,} bytes to their owners, codes and scales "
                     f"{sum(m.code_bytes):,} back ({m.bytes_per_ternary_weight:.3f} for a ternary weight), over all "
                     f"{ranks} ranks")
    return lines


def phase_line(p: Phase, note: str = "") -> str:
    return f"[{p.name}] {p.seconds:.1f} s{note}"


def trained_note(steps: int, tokens: int) -> str:
    return f", {steps:,} steps, {tokens:,} tokens"


def size_lines(bytes_model: int, bytes_code: int) -> list[str]:
    """The lines that the competition's own trainers print of their files."""
    return [f"Ternary artifact: {bytes_model} bytes = {bytes_model / 1e6:.2f}MB", f"Code size: {bytes_code} bytes",
            f"Total submission size: {bytes_model + bytes_code} bytes"]


def score_lines(f: Final, settings: Mapping) -> list[str]:
    """The scores as the competition's trainers print them, with their seconds and then exactly."""
    lines = []
    for name, score, extra in (("final_ternary_roundtrip", f.score["chunked"], ""),
                               ("final_sliding_window", f.score["sliding"], f" stride:{settings['eval_stride']}")):
        if score:
            lines.append(f"{name} val_loss:{score['val_loss']:.4f} val_bpb:{score['val_bpb']:.4f}{extra} "
                         f"eval_time:{1000 * score['seconds']:.0f}ms")
            lines.append(f"{name}_exact val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}")
    return lines


def result_lines(f: Final, settings: Mapping, artifact: str) -> list[str]:
    """The final block. artifact: the path of the model's file, as it is named there."""
    chunked, sliding = f.score["chunked"], f.score["sliding"]
    identical = "identical bit for bit" if f.logits_identical else "DIFFER"
    lines = [
        f"val_bpb before packing    {f.memory['val_bpb']:.8f}   (in memory, chunked)",
        f"val_bpb from the file     {chunked['val_bpb']:.8f}   (fresh process, chunked)",
        f"roundtrip gap             {f.roundtrip_gap + 0.0:.8f}   (logits {identical})",
    ]
    if sliding:
        lines.append(f"sliding val_bpb           {sliding['val_bpb']:.8f}   (stride {settings['eval_stride']}, window "
                     f"{f.score['seq_len']}, {sliding['tokens']:,} tokens, {sliding['bytes']:,} bytes)")
    parts = " + ".join(f"{name} {f.seconds[name]:.1f}" for name in PHASES)
    total = sum(f.seconds[name] for name in PHASES)
    return [
        *lines,
        f"bytes                     model {f.bytes_model:,} + code {f.bytes_code:,}{not_counted(settings)} -> total "
        f"{f.bytes_total:,} of {f.cap:,}: {'FITS' if f.fits else 'OVER'}, margin {f.cap - f.bytes_total:,}",
        f"seconds                   {parts} = {total:.1f}",
        f"artifact                  {artifact}  sha256 {f.artifact_sha256[:16]}",
    ]
