"""What a run shows: the terminal, log.txt (the field's grammar), metrics.jsonl (typed records).

The functions take the run, a train_gpt.Trainer, and only read it; what a run does is all in train_gpt.py.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

import pack
from eval_bpb import folder_identity, sha256_file

METRICS_SCHEMA = 1


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

    def record(self, kind: str, **values) -> None:
        if not self.quiet:
            self.write("metrics.jsonl", json.dumps({"type": kind} | values, sort_keys=True))

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


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}", "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(), "gpu": gpu,
    }


def preflight(run, origin: dict[str, str], notices: list[str], sizes: dict[str, tuple[dict, int, float]]) -> None:
    """What is about to run, before it does. sizes: part of the model's file -> (format, symbols, bytes)."""
    c, log = run.config, run.log
    parameters, total = sum(p.numel() for p in run.model.parameters()), round(sum(b for *_, b in sizes.values()))
    code = sum(map(len, run.sources.values()))
    counted = total + (code if c.cap_counts_code else 0)
    why = "asked for" if c.device != "auto" else "no CUDA device found" if run.device.type == "cpu" else "found"
    accum = c.train_batch_tokens // (run.world * run.micro_tokens)
    if not run.step or run.source_changed:  # a log reproduces its run
        for name, text in run.sources.items():
            log.line(f"{'=' * 40} {name}\n{text.decode()}", console=False)
    log.record("header", schema=METRICS_SCHEMA, preset=run.preset, argv=sys.argv[1:], settings=asdict(c),
               origin=origin, machine=machine(), world_size=run.world, source_sha256=run.source_sha256,
               source=folder_identity(run.source_sha256), data_sha256=run.data.hashes, data=run.data.identity,
               parameters=parameters, resumed_at=run.step)
    log.line(f"{'=' * 20} {c.run_id} (preset {run.preset}) {'=' * 20}")
    log.line(f"machine     {json.dumps(machine(), sort_keys=True)}", console=False)
    settings = [f"{n}={v}" + (f" ({origin[n]})" if n in origin else "") for n, v in asdict(c).items()]
    log.line(textwrap.fill(", ".join(settings), 118, initial_indent="settings    ", subsequent_indent=" " * 12,
                           break_on_hyphens=False))
    for notice in notices:
        log.line(f"notice      {notice}")
    log.line(f"device      {run.device} ({why}) x {run.world} process(es), {torch.get_num_threads()} thread(s) each")
    log.line("dtype       bf16 params and activations (a param is what the file holds); fp32 latents, gradient "
             "sums, optimizer state and losses (bf16 would lose small updates)")
    log.line(f"data        {c.data_path}: {int(run.loader.ends[-1]):,} training tokens, {run.val_tokens.size:,} "
             f"validation tokens, identity {run.data.identity[:16]}")
    log.line(f"model       {c.num_layers} layers x {c.model_dim}, {c.num_heads} heads, {c.num_kv_heads} kv, "
             f"mlp {c.hidden_dim}, vocab {c.vocab_size}: {parameters:,} parameters")
    for part, (spec, count, size) in sizes.items():
        label = f" ({pack.format_label(spec)}): {count:,}" if spec else ":"
        log.line(f"              {part}{label} in {size:,.0f} bytes")
    over = counted - c.cap_bytes
    verdict = f"fits, margin {-over:,}" if over <= 0 else f"OVER by {over:,}"
    if 0 < over < 0.01 * total:
        verdict += ", which is less than predictions are off by: the final block has the true bytes"
    log.line(f"bytes       {total:,} predicted for the model, {code:,} of code"
             f"{'' if c.cap_counts_code else ' (not counted)'}; cap {c.cap_bytes:,}: {verdict}")
    log.line(f"step        {c.train_batch_tokens:,} tokens = {run.world} process(es) x {accum} micro-batch(es) x "
             f"{run.micro_tokens // c.train_seq_len} sequences of {c.train_seq_len}")
    if run.step:
        log.line(f"resume      at step {run.step}, {run.elapsed:.1f} s of training done"
                 + ("; the program was changed since" if run.source_changed else ""))


def step(run, plan, loss: float, tokens: int, zero_frac: float, churn: float, logged: bool, progress: float) -> None:
    """The log line, the record and the bar of the step that just ended."""
    c, now, rate = run.config, run.elapsed, tokens / run.step_seconds
    left = min(c.max_wallclock_seconds - now if c.max_wallclock_seconds else math.inf,
               (c.iterations - run.step) * now / run.step if c.iterations else math.inf)
    if logged:
        run.log.line(
            f"step:{run.step}/{c.iterations} train_loss:{loss:.4f} train_time:{1000 * now:.0f}ms "
            f"step_avg:{1000 * now / run.step:.2f}ms tok/s:{rate:.0f} zero_frac:{zero_frac:.4f} "
            f"churn:{churn:.5f} lr_scale:{plan.lr_scale:.3f} left:{clock(left)}", console=not run.log.on_terminal())
        run.log.record(
            "train", step=run.step, loss=loss, elapsed=now, step_seconds=run.step_seconds, tokens=tokens,
            tokens_seen=run.tokens_seen, zero_frac=None if math.isnan(zero_frac) else zero_frac,
            churn=None if math.isnan(churn) else churn, lr_scale=plan.lr_scale, momentum=plan.momentum,
            seq_len=plan.seq_len)
        run.shown = f"zero_frac {zero_frac:.3f}  churn {churn:.4f}"
    run.log.bar(f"[{'#' * int(24 * progress):<24}] step {run.step}  loss {loss:.4f}  "
                f"{1000 * run.step_seconds:.0f} ms/step  {rate:,.0f} tok/s  {run.shown}  {clock(left)} left")


def memory(run, state: list[int], gradients: list[int], codes: list[int]) -> None:
    """Bytes of state on each rank, and what the optimizer sent in a step."""
    ternary = [b for b in run.latents.banks if b.format.kind == "ternary"]
    each = sum(len(b.wire) for b in ternary) / max(sum(b.grad.numel() for b in ternary), 1)
    run.log.line(f"memory      {', '.join(f'{n:,}' for n in state)} bytes of params, gradients and optimizer state"
                 f"{' on the ranks' if run.world > 1 else ''}")
    if run.world > 1:
        run.log.line(
            f"sent/step   gradients {sum(gradients):,} bytes to their owners, codes and scales {sum(codes):,} back "
            f"({each:.3f} for a ternary weight), over all {run.world} ranks")
    run.log.record("memory", state_bytes=state, gradient_bytes=gradients, code_bytes=codes,
                   bytes_per_ternary_weight=each)


def size(run, budget: pack.Budget) -> None:
    """The lines that the competition's own trainers print of their files."""
    run.log.line(f"Ternary artifact: {budget.bytes_model} bytes = {budget.bytes_model / 1e6:.2f}MB")
    run.log.line(f"Code size: {budget.bytes_code} bytes")
    run.log.line(f"Total submission size: {budget.bytes_model + budget.bytes_code} bytes")


def result(run, in_memory, scored: dict, gap: float, same: bool, budget: pack.Budget, artifact: Path) -> None:
    """The final block. in_memory: eval_bpb.Score of the trained model; scored: the JSON of the file's; gap: theirs."""
    c, log = run.config, run.log
    chunked, sliding = scored["chunked"], scored["sliding"]
    for name, s, extra in (("final_ternary_roundtrip", chunked, ""),
                           ("final_sliding_window", sliding, f" stride:{c.eval_stride}")):
        if s:
            log.line(f"{name} val_loss:{s['val_loss']:.4f} val_bpb:{s['val_bpb']:.4f}{extra} "
                     f"eval_time:{1000 * s['seconds']:.0f}ms")
            log.line(f"{name}_exact val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}")
    parts = " + ".join(f"{n} {run.seconds[n]:.1f}" for n in ("load", "compile", "train", "pack", "score"))
    log.line(f"{'=' * 20} result {'=' * 20}")
    log.line(f"val_bpb before packing    {in_memory.val_bpb:.8f}   (in memory, chunked)")
    log.line(f"val_bpb from the file     {chunked['val_bpb']:.8f}   (fresh process, chunked)")
    verdict = "identical bit for bit" if same else "DIFFER"
    log.line(f"roundtrip gap             {gap + 0.0:.8f}   (logits {verdict})")
    if sliding:
        log.line(f"sliding val_bpb           {sliding['val_bpb']:.8f}   (stride {c.eval_stride}, window "
                 f"{c.train_seq_len}, {sliding['tokens']:,} tokens, {sliding['bytes']:,} bytes)")
    log.line(f"bytes                     model {budget.bytes_model:,} + code {budget.bytes_code:,}"
             f"{'' if c.cap_counts_code else ' (not counted)'} -> total {budget.total:,} of {c.cap_bytes:,}: "
             f"{'FITS' if budget.fits else 'OVER'}, margin {budget.margin:,}")
    log.line(f"seconds                   {parts} = {sum(run.seconds.values()):.1f}")
    log.line(f"artifact                  {artifact}  sha256 {sha256_file(artifact)[:16]}")
    log.record("final", step=run.step, tokens_seen=run.tokens_seen, memory=asdict(in_memory), score=scored,
               roundtrip_gap=gap, logits_identical=same, seconds=run.seconds, bytes_model=budget.bytes_model,
               bytes_code=budget.bytes_code, bytes_total=budget.total, cap=c.cap_bytes, fits=budget.fits,
               artifact_sha256=sha256_file(artifact), replica_sha256=run.replica_sha256)
