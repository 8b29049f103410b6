"""Stage train of gpu.py: how fast the trainer's own loop is, where its time goes, and how fast others are beside it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import train_gpt
from bench import gpu_step, textbook
from bench.gpu_card import alone
from bench.gpu_stage import PRESETS, Stage, flags
from tern.shards import open_data
from tern.signals import Interrupted

PROFILED, HOST_STEPS = 2, 5  # steps


def measure_training(stage: Stage) -> None:
    for batch in stage.args.batches or stage.sizes.batches:
        for preset in stage.args.presets:
            with stage.part(f"{preset}, {batch:,} tokens a step"):
                measure_batch(stage, preset, batch)
        if stage.args.against and batch == stage.sizes.batches[0]:
            with stage.part(f"against {stage.args.against}"):
                measure_other(stage, Path(stage.args.against))


def measure_batch(stage: Stage, preset: str, batch: int) -> None:
    """A preset at so many tokens a step, in micro-batches that fit: those of the smallest batch, or halves of them."""
    micro, data = stage.sizes.batches[0], stage.data(stage.config(preset).vocab_size)
    settings = dict(preset=preset) | stage.sizes.model | dict(
        data_path=data, out_dir=stage.work / "train", device=stage.device.type, iterations=10**6, warmup_steps=3,
        max_wallclock_seconds=0, checkpoint_every=0, val_loss_every=0, train_batch_tokens=batch)
    while True:
        torch.compiler.reset()  # the graphs of the model before
        run = dict(micro_batch_tokens=micro, run_id=f"{preset}_{batch}_{micro}")
        try:
            with ExitStack() as compiling:
                compiling.enter_context(alone(stage.args.lock, shared=True))
                watched_run(flags(settings | run), lambda trainer, compiled=compiling.close: measure_steps(
                    stage, f"{preset}, {batch:,}", trainer, compiled))
            return
        except torch.OutOfMemoryError as e:
            stage.missing(f"{preset}, {batch:,} tokens in micro-batches of {micro:,}", e)
            if micro == stage.config(preset).train_seq_len:
                raise
            micro //= 2
        gc.collect()
        torch.cuda.empty_cache()


def watched_run(argv: list[str], measure: Callable[[train_gpt.Trainer], Iterator[None]]) -> None:
    """Run the trainer as its command does, in this process; measure(trainer) goes on after each step, and the run ends
    with it. Raises what the run failed with."""
    usual, report = train_gpt.Trainer, train_gpt.report_end
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    measuring: list[Iterator[None]] = []
    ended: list[BaseException] = []

    class Watched(usual):  # type: ignore[misc, valid-type]
        def after_step(self, plan) -> None:
            super().after_step(plan)
            if not measuring:
                measuring.append(measure(self))
            try:
                next(measuring[0])
            except StopIteration:
                raise Interrupted(0, "measured") from None

    def note(e: BaseException, *_) -> int:
        ended.append(e)
        return 1

    train_gpt.Trainer, train_gpt.report_end = Watched, note
    try:
        train_gpt.run(argv)
    finally:
        for steps in measuring:
            steps.close()  # which gives a lock back
        train_gpt.Trainer, train_gpt.report_end = usual, report
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not isinstance(ended[0], Interrupted):
        raise ended[0].with_traceback(None)  # which would hold the model


# ---------------------------------------------------------------------------------------------------------------
# Of one run. Each yield is a step of the trainer
# ---------------------------------------------------------------------------------------------------------------


def measure_steps(stage: Stage, name: str, trainer: train_gpt.Trainer, compiled: Callable[[], None]
                  ) -> Iterator[None]:
    """Its steps, then a profile, then steps and the textbook's, turn about; compiled is called first."""
    compiled()
    tokens = trainer.config.train_batch_tokens
    count = max(stage.sizes.steps * stage.sizes.batches[0] // tokens, 3)
    with alone(stage.args.lock):
        if stage.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(max(count // 2, 2)):
            yield  # until it is warm
        marks = []
        for _ in range(count):
            start = stage.clock.mark()
            yield
            marks.append((start, stage.clock.mark()))
        times = [stage.clock.seconds(*pair) for pair in marks]
        put_rate(stage, name, trainer, times)
        with stage.part(f"{name}: host"):
            yield from measure_host(stage, name, trainer)
        with stage.part(f"{name}: profile"):
            yield from measure_profile(stage, name, trainer, statistics.median(times))
    if tokens == stage.sizes.batches[0] and trainer.preset == PRESETS[0]:
        with stage.part(f"{name}: textbook"):
            yield from measure_turns(stage, name, trainer, max(count // stage.sizes.pairs, 1))


def put_rate(stage: Stage, name: str, trainer: train_gpt.Trainer, times: list[float]) -> None:
    c, tokens, seconds = trainer.config, trainer.config.train_batch_tokens, statistics.median(times)
    micro_batches = tokens // trainer.micro_tokens
    work = gpu_step.step_work(c, tokens, micro_batches)
    figures = {"seconds": seconds, "every_step": times, "tokens_per_second": tokens / seconds,
               "micro_batches": micro_batches, "utilisation": gpu_step.utilisation(c, tokens / seconds),
               "floor_seconds": sum(w.seconds for w in work), "work": [asdict(w) for w in work],
               "compile_seconds": trainer.seconds["compile"]}
    said = ""
    if stage.cuda:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        said = f", peak memory {figures['peak_bytes'] / 2**30:.1f} GiB"
    stage.put(
        name, figures, "", f"{name} tokens a step in {micro_batches} micro-batch(es)",
        *gpu_step.floor_lines(work, tokens),
        f"measured: {1000 * seconds:.2f} ms/step, median of {len(times)} from {1000 * min(times):.2f} to "
        f"{1000 * max(times):.2f}; {tokens / seconds:,.0f} tokens/s{said}; compiled in "
        f"{figures['compile_seconds']:.0f} s",
        f"utilisation {figures['utilisation']:.1%} = {gpu_step.FORMULA}")


def measure_host(stage: Stage, name: str, trainer: train_gpt.Trainer) -> Iterator[None]:
    """Milliseconds of the host in the parts of a step: where the device waits for it, they are longer than its own."""
    parts = {"batch": (trainer.loader, "batch"), "forward": (trainer, "compiled"),
             "forward and backward": (trainer, "forward_backward"), "gradient sums": (trainer.latents, "accumulate"),
             "loss, waiting": (trainer, "known_loss"), "optimizer": (trainer.optimizer, "step"),
             "refresh": (trainer.latents, "refresh"), "report": (trainer, "report_step")}
    usual = {part: getattr(owner, method) for part, (owner, method) in parts.items()}
    seconds: dict[str, list[float]] = {part: [] for part in parts}

    def timed(function: Callable, into: list[float]) -> Callable:
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                into.append(time.perf_counter() - began)

        return call

    for part, (owner, method) in parts.items():
        setattr(owner, method, timed(usual[part], seconds[part]))
    began = time.perf_counter()
    for _ in range(HOST_STEPS):
        yield
    whole = (time.perf_counter() - began) / HOST_STEPS
    for part, (owner, method) in parts.items():
        setattr(owner, method, usual[part])
    found = {part: 1000 * sum(times) / HOST_STEPS for part, times in seconds.items()} | {"step": 1000 * whole}
    stage.put(f"{name}: host", found, "the host's ms of a step: "
              + ", ".join(f"{part} {ms:.2f}" for part, ms in found.items()))


def measure_profile(stage: Stage, name: str, trainer: train_gpt.Trainer, seconds: float) -> Iterator[None]:
    """Milliseconds of a step by kind of kernel; seconds: of a step that nobody watched."""
    parts = {"optimizer": (trainer.optimizer, "step"), "refresh": (trainer.latents, "refresh"),
             "gradient sums": (trainer.latents, "accumulate")}
    for part, (owner, method) in parts.items():
        setattr(owner, method, in_range(part, getattr(owner, method)))
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * stage.cuda) as profiler:
        for _ in range(PROFILED):
            yield
        if stage.cuda:
            torch.cuda.synchronize()
    for owner, method in parts.values():
        delattr(owner, method)
    trace = stage.work / "trace.json"
    profiler.export_chrome_trace(str(trace))
    found = gpu_step.read_profile(json.loads(trace.read_text(encoding="utf-8")), PROFILED)
    trace.unlink()
    if not found.launches:
        stage.missing(f"{name}: profile", "the trace holds no kernels; those of a CPU are in bench/speed.py")
        return
    stage.put(f"{name}: profile", asdict(found), *gpu_step.profile_lines(found, 1000 * seconds))


def in_range(name: str, function: Callable) -> Callable:
    """The function, as a range of the profiler's."""
    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


def measure_turns(stage: Stage, name: str, trainer: train_gpt.Trainer, steps: int) -> Iterator[None]:
    """So many steps of the trainer, then of the textbook, several times."""
    if not memory_comes(stage):
        stage.missing(f"{name}: textbook", "memory for a second model on the card")
        return
    with alone(stage.args.lock, shared=True):
        book = Textbook(trainer)
        for _ in range(2):
            book.step()
    rates = []
    with alone(stage.args.lock):
        for _ in range(stage.sizes.pairs):
            start = stage.clock.mark()
            for _ in range(steps):
                yield
            between = stage.clock.mark()
            for _ in range(steps):
                book.step()
            end = stage.clock.mark()
            rates.append((stage.clock.seconds(start, between) / steps, stage.clock.seconds(between, end) / steps))
    ratio = statistics.median(theirs / ours for ours, theirs in rates)
    ours, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
    stage.put(f"{name}: textbook", {"pairs": rates, "ratio": ratio},
              f"textbook: {1000 * theirs:.2f} ms/step where ours takes {1000 * ours:.2f}, turn about: {ratio:.2f} "
              f"times as long, median of {len(rates)} pairs")


def memory_comes(stage: Stage) -> bool:
    """Wait for as much free memory as this process took; whether it is there while a third of the time is left."""
    while stage.cuda and torch.cuda.mem_get_info()[0] < torch.cuda.max_memory_allocated():
        if stage.left() < stage.args.seconds / 3:
            return False
        time.sleep(1.0)
    return True


class Textbook:
    """bench/textbook.py on a trainer's batches, with formats that it has."""

    def __init__(self, trainer: train_gpt.Trainer):
        c = replace(trainer.config, scale_dtype="bf16", embed_format="bf16", smear=False,
                    key_offset=False, copy_dim=0)
        self.trainer, self.model = trainer, textbook.TextbookGPT(c).to(trainer.device)
        self.optimizer = textbook.TextbookOptimizer(self.model, c)
        self.loss = torch.compile(self.model, dynamic=False, fullgraph=True) if c.compile else self.model

    def step(self) -> None:
        t, seq_len = self.trainer, self.trainer.config.train_seq_len
        micro_batches, losses = t.config.train_batch_tokens // t.micro_tokens, []
        for micro in range(micro_batches):
            ids, targets = t.loader.batch(t.micro_tokens // seq_len, seq_len, micro, 0, 1)
            loss = self.loss(*(x.to(t.device, non_blocking=True) for x in (ids, targets))) / micro_batches
            loss.backward()
            losses.append(loss.detach())
        sum(losses).item()  # waits, as trainers do that look at their loss
        self.optimizer.step(1.0, 0.95)


# ---------------------------------------------------------------------------------------------------------------
# Another trainer
# ---------------------------------------------------------------------------------------------------------------

STEP_LINE = re.compile(r"step:(\d+)/\d+ .*?train_time:([\d.]+)ms step_avg:([\d.]+)ms")


def measure_other(stage: Stage, script: Path, steps: int = 40) -> None:
    """Run another trainer's script at pr367's settings and learn from its log how long its later steps take.

    It must take PR 367's variables and write its lines: step:N/M .. train_time:Tms step_avg:Ams. Raises RuntimeError.
    """
    vocab, shards = stage.config("pr367").vocab_size, stage.work / "their_data"
    found = open_data(stage.data(vocab))
    shards.mkdir(exist_ok=True)
    for split, paths in (("train", found.train), ("val", found.val)):
        for i, path in enumerate(paths):
            (shards / f"fineweb_{split}_{i:06d}.bin").symlink_to(path.resolve())
    settings = train_gpt.PRESETS["pr367"] | stage.sizes.model | dict(
        data_path=shards, tokenizer_path=found.tokenizer.resolve(), vocab_size=vocab, iterations=steps,
        train_log_every=5, val_loss_every=0, max_wallclock_seconds=0, warmup_steps=5, run_id="against")
    env = os.environ | {name.upper(): str(value) for name, value in settings.items()}
    points, last = [], ""
    command_line = [sys.executable, str(script.resolve())]
    with alone(stage.args.lock), subprocess.Popen(command_line, cwd=stage.work, env=env, text=True,
                                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print("|", line, end="", flush=True)
            last, match = line.strip() or last, STEP_LINE.search(line)
            if match:
                points.append(tuple(map(float, match.groups())))
            if points and points[-1][0] >= steps:  # what it does after training is not asked
                break
        process.kill()
    late = [point for point in points if point[0] >= steps // 2]
    if len(late) < 2:
        raise RuntimeError(f"{script}: its log has not two lines with step:N/M .. train_time:..ms step_avg:..ms from "
                           f"step {steps // 2} on; it ends with: {last}")
    seconds = (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0]) / 1000
    tokens = settings["train_batch_tokens"]
    stage.put(f"against {script.name}",
              {"seconds": seconds, "step_avg_ms": late[-1][2], "tokens_per_second": tokens / seconds},
              f"{script.name}: {1000 * seconds:.2f} ms/step of {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s; "
              f"its own step_avg {late[-1][2]:.2f} ms")
