"""What one GPU says of this project, in one command and a given time.

    python bench/gpu.py --out RESULTS --seconds 560                    # everything, in order of worth
    python bench/gpu.py --out RESULTS --seconds 300 --only machine train --against train_bitnet.py
    python bench/gpu.py --out RESULTS --seconds 300 --device cpu       # toy shapes: does every stage work?

    machine   what the card can do: matrix products at the model's shapes, attention, copies, launches
    correct   whether what it computes is right: against float64, from the file, after a kill, in groups of processes
    train     the trainer's own loop at presets pr367 and golf16mb: rate, memory, profile, beside bench/textbook.py
    score     the rate of the sliding score
    runs      a run from text to score, then a matrix of experiments with several processes on the card

Each stage is a process with a time limit of its own: a crash, a hang or a lack of memory costs that stage only. Its
figures are in RESULTS/<stage>.json as soon as they are known, RESULTS/summary.md is for people, RESULTS/log.txt is all
that was printed. docs/gpu.md says what has to be there, and how to read the results. Nothing needs a network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt
from bench import gpu_card, gpu_step
from bench.gpu_correct import check_correct
from bench.gpu_stage import (
    AFTER_ASKING,
    PRESETS,
    ROOT,
    AttentionShape,
    Stage,
    empty_result,
    flags,
    last_word,
    records,
    write_result,
)
from bench.gpu_train import measure_training
from tern import audits, command, machine, metric
from tern.files import write_atomic
from tern.shards import open_data
from tern.tokenizers import ByteCounter

VALIDATION_TOKENS, GPUS = 62_021_632, 8  # the competition's validation text and machine

# ---------------------------------------------------------------------------------------------------------------
# machine
# ---------------------------------------------------------------------------------------------------------------


def measure_machine(stage: Stage) -> None:
    with gpu_card.alone(stage.args.lock):
        measure_card(stage)


def measure_card(stage: Stage) -> None:
    with stage.part("versions"):
        found = versions(stage)
        stage.put("versions", found, *(f"{name:<14}{said}" for name, said in found.items()))
    with stage.part("copies"):
        rate = gpu_card.copy_rate(stage.clock, stage.sizes.copied, stage.sizes.repeats)
        stage.put("copy_bytes_per_second", rate, f"copies        {rate / 1e12:.3f} TB/s, bytes read and written")
    with stage.part("launches"):
        seconds = gpu_card.launch_seconds(stage.clock)
        stage.put("launch_seconds", seconds, *(f"launches      {1e6 * s:.2f} us, {how}" for how, s in seconds.items()))
    with stage.part("products"):
        measure_products(stage)
    for shape in stage.sizes.attention:
        with stage.part(f"attention {shape}"):
            measure_attention(stage, shape)


def versions(stage: Stage) -> dict[str, str]:
    """What there is here, by name."""
    found = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"}
    for name in ("triton", "numpy", "constriction", "zstandard", "sentencepiece", "safetensors", "msgspec", "scipy"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError as e:
            stage.missing(name, e)
    if stage.cuda:
        p = torch.cuda.get_device_properties(stage.device)
        found["card"] = f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.1f} GiB"
        found["cuDNN, NCCL"] = f"{torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}"
        asked = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,clocks.sm,temperature.gpu"
        command_line = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command_line, capture_output=True, text=True).stdout
            found["nvidia-smi"] = f"{' '.join(said.split())} ({asked})"
        except OSError as e:
            stage.missing("nvidia-smi", e)
    return found


def measure_products(stage: Stage) -> None:
    """TFLOP/s of the products of both presets, forward and backward, each shape once and in each precision."""
    stage.say(f"{'TFLOP/s of m x k x n':<55}" + "".join(f"{name:>21}" for name in gpu_card.PRECISIONS))
    rates: dict[str, dict[str, float]] = {}
    for preset in PRESETS:
        for name, (inputs, outputs, _) in gpu_step.products(stage.config(preset)).items():
            for direction, shape_of in gpu_card.DIRECTIONS.items():
                m, k, n = shape = shape_of(stage.sizes.rows, inputs, outputs)
                label = f"{m:>6} x{k:>6} x{n:>6}"
                if label in rates:
                    continue
                found = rates[label] = {}
                for precision in gpu_card.PRECISIONS:
                    try:
                        found[precision] = gpu_card.product_rate(stage.clock, precision, shape, stage.sizes.repeats)
                    except gpu_card.NOT_THERE as e:
                        stage.missing(f"{precision} at {m} x {k} x {n}", e)
                cells = [f"{found[p] / 1e12:>21.1f}" if p in found else f"{'-':>21}" for p in gpu_card.PRECISIONS]
                stage.put("product_flops", rates, f"{preset:<9}{name:<6}{direction:<16}{label:<24}{''.join(cells)}")


def measure_attention(stage: Stage, shape: AttentionShape) -> None:
    """Causal attention as the trainer asks for it, and by each back end of torch."""
    batch, heads, _, length, dim = shape
    forward_flops = 2.0 * batch * heads * dim * length * (length + 1)  # 2 products of 2 * dim, for half of the keys
    ways = {"the trainer's": train_gpt.attend} | {name: gpu_card.attend_by(name) for name in gpu_card.BACKENDS}
    for name, attend in ways.items():
        try:
            forward, both = gpu_card.attention_rates(stage.clock, attend, shape, stage.sizes.repeats)
        except gpu_card.NOT_THERE as e:
            stage.missing(f"attention {shape}, {name}", e)
            continue
        stage.put(f"attention {shape}, {name}", {"forward": forward, "both": both},
                  f"attention {str(shape):<24}{name:<18}{1000 * forward:>8.3f} ms forward, {1000 * both:>8.3f} with "
                  f"backward, {3.5 * forward_flops / both / 1e12:>6.1f} TFLOP/s (a backward is 2.5 forwards)")


# ---------------------------------------------------------------------------------------------------------------
# score
# ---------------------------------------------------------------------------------------------------------------


class OneByteEach:
    """A byte counter for random tokens."""

    def count(self, before, ids) -> np.ndarray:
        return np.ones(len(ids), dtype=np.int64)


def measure_scoring(stage: Stage) -> None:
    for preset in stage.args.presets:
        for batch in stage.sizes.score_batches:
            with stage.part(f"{preset}, {batch} windows at a time"):
                measure_score(stage, preset, batch)
    with stage.part("audit"):
        data = open_data(stage.any_data()[0])
        began = time.perf_counter()
        tokens = audits.audit_validation(data, ByteCounter(data.tokenizer)).tokens.size
        seconds = time.perf_counter() - began
        stage.put("audit", {"seconds": seconds, "tokens": tokens},
                  f"audit of the validation text, by the CPU, on every rank: {seconds:.2f} s for {tokens:,} tokens; "
                  f"{VALIDATION_TOKENS:,} tokens {seconds / tokens * VALIDATION_TOKENS:.0f} s, extrapolated")


def measure_score(stage: Stage, preset: str, batch: int) -> None:
    """Tokens/s of the sliding score, `batch` windows at a time; weights and tokens are random, which costs the same."""
    torch.compiler.reset()  # the graphs of the model before
    c, stride = stage.config(preset), stage.sizes.stride
    model = train_gpt.GPT(c).to(stage.device).eval()
    train_gpt.Latents(model, c)

    def rate_of(batches: int) -> float:
        """Tokens/s over so many full batches."""
        tokens = np.random.default_rng(0).integers(0, c.vocab_size, c.train_seq_len + stride * batch * batches + 1)
        score = metric.evaluate(model, tokens, OneByteEach(), c.train_seq_len, stride, batch, c.compile)
        return stride * batch * batches / score.seconds

    with gpu_card.alone(stage.args.lock, shared=True):
        rate_of(2)  # compiles
    with gpu_card.alone(stage.args.lock):
        rate = rate_of(4)
        rate = rate_of(max(round(rate * stage.sizes.score_seconds / (stride * batch)), 4))
    seconds = VALIDATION_TOKENS / rate / GPUS
    stage.put(f"{preset}, {batch} windows", {"tokens_per_second": rate, "stride": stride, "extrapolated": seconds},
              f"{preset}, window {c.train_seq_len}, stride {stride}, {batch} windows at a time: {rate:,.0f} tokens/s; "
              f"{VALIDATION_TOKENS:,} tokens on {GPUS} such devices {seconds:,.0f} s, extrapolated")


# ---------------------------------------------------------------------------------------------------------------
# runs
# ---------------------------------------------------------------------------------------------------------------

MATRIX = """name = "gpu"
why = "Several processes on one card: what a format costs in bpb"
base = "ternary"
seeds = {seeds}
equivalence = 0.01
budget = {{iterations = {iterations}}}
threads = 1

[settings]
{settings}

[[row]]
name = "ternary"
why = "the base"

[[row]]
name = "bf16"
why = "full precision"
set = {{matrix_format = "bf16"}}
"""


def measure_runs(stage: Stage) -> None:
    data, vocab = stage.any_data()
    where = dict(data_path=str(data), vocab_size=vocab, device=stage.device.type)
    with stage.part("one run"):
        own = dict(out_dir=stage.work / "runs", run_id="one")
        stage.run("train_gpt.py", *flags(stage.sizes.run | where | own))
        final = records(stage.work / "runs" / "one")[-1]
        seconds, score = final["seconds"], final["score"]["sliding"] or final["score"]["chunked"]
        stage.put("one run", final, f"one run: {final['step']:,} steps in {seconds['train']:.1f} s, "
                  f"{1000 * seconds['train'] / final['step']:.2f} ms/step; bpb from the file {score['val_bpb']:.4f}, "
                  f"gap {final['roundtrip_gap']:.8f}, {final['bytes_model']:,} bytes; "
                  + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
    with stage.part("matrix"):
        matrix = stage.work / "gpu.toml"
        settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in (stage.sizes.matrix | where).items())
        matrix.write_text(MATRIX.format(settings=settings, seeds=list(range(1, stage.sizes.seeds + 1)),
                                        iterations=stage.sizes.iterations), encoding="utf-8")
        run_matrix(stage, Path(stage.args.matrix or matrix))


def run_matrix(stage: Stage, matrix: Path) -> None:
    """As many runs of a matrix as fit the time that is left. Raises RuntimeError if none does."""
    jobs, results, printed = machine.cores(), stage.work / "results", stage.work / "matrix.txt"
    words = [sys.executable, "ablations/run.py", matrix.resolve(), "--jobs", jobs, "--results", results,
             "--runs", stage.work / "matrix"]
    began = time.monotonic()
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # for each of so many
    with open(printed, "wb") as f:
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, env=env)
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(stage.left() - 2 * AFTER_ASKING, 1.0))
        process.terminate()  # where it still runs: it stops its runs, and what is done is recorded
        status = process.wait()
    seconds, said = time.monotonic() - began, printed.read_text(encoding="utf-8", errors="replace")
    print(said, flush=True)
    lines = []
    for path in results.glob("*/results.jsonl"):
        shutil.copy(path, stage.out / "results.jsonl")
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    done = [line for line in lines if line["status"] == "ok"]
    for line in lines:
        if line not in done:
            stage.fail(f"{line['row']}, seed {line['seed']}", line["message"])
    if not done:
        raise RuntimeError(f"no run of {matrix} came to its end, status {status}: {last_word(said)}")
    of_a_run, of_a_step = (statistics.median(found) for found in zip(*(
        (line["seconds"], line["train_seconds"] / line["steps"]) for line in done), strict=True))
    rows: dict[str, list[float]] = {}
    for line in done:
        rows.setdefault(line["row"], []).append(line["val_bpb"])
    stage.put("matrix", {"jobs": jobs, "seconds": seconds, "done": len(done), "of": len(lines),
                         "seconds_of_a_run": of_a_run, "seconds_of_a_step": of_a_step, "val_bpb": rows},
              f"matrix: {len(done)} runs in {seconds:.0f} s, {jobs} at a time; one takes {of_a_run:.1f} s, its steps "
              f"{1000 * of_a_step:.2f} ms",
              *(f"  {row:<20}{statistics.mean(bpb):.4f} bpb, mean of {len(bpb)}" for row, bpb in rows.items()))


# ---------------------------------------------------------------------------------------------------------------
# All stages, each in its process
# ---------------------------------------------------------------------------------------------------------------

# What a stage does, and its share of the time; what it leaves goes to those after it.
STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {
    "machine": (measure_machine, 0.04), "correct": (check_correct, 0.20), "train": (measure_training, 0.40),
    "score": (measure_scoring, 0.13), "runs": (measure_runs, 0.23),
}


UNTIMED = ("correct", "runs")  # with --lock they run beside each other, and beside nothing that is measured


def run_here(args: argparse.Namespace) -> int:
    """One stage in this process; its result says all."""
    command.follow(os.getppid())
    for field in fields(train_gpt.Config):  # what the environment says of settings is not what is measured
        os.environ.pop(field.name.upper(), None)
    stage = Stage(args.stage, args)
    machine.writable_compiler_cache()
    if stage.cuda and not torch.cuda.is_available():
        stage.fail(stage.name, "torch finds no CUDA device; --device cpu shows whether the stages work")
    else:
        machine.prepare_device(stage.device)
        shared = gpu_card.alone(args.lock, shared=True) if stage.name in UNTIMED else nullcontext()
        with stage.part(stage.name), shared:
            STAGES[stage.name][0](stage)
    stage.result["status"] = "failed" if stage.result["failures"] else "ok"
    stage.save()
    return 0


def end_session(process: subprocess.Popen) -> None:
    """Ask a process and all in its session to end, then end them."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(AFTER_ASKING)


def supervise(words: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command in a session of its own for so long at most; how it failed, or nothing."""
    with open(log, "ab") as f:
        at = f.tell()
        process = subprocess.Popen(words, stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut off after its {seconds:.0f} s"
        finally:
            end_session(process)  # and what it left behind; also where this process is told to end
    if status == 0:
        return ""
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"ended with {how}: {last_word(log.read_bytes()[at:].decode(errors='replace'))}"


def run_all(args: argparse.Namespace) -> int:
    """The stages, one after the other; the exit status: 1 if anything failed."""
    out, began, names = Path(args.out), time.monotonic(), [name for name in STAGES if name in args.only]
    results = {}
    for i, name in enumerate(names):
        shares = [STAGES[later][1] for later in names[i:]]
        limit = max(args.seconds - (time.monotonic() - began), 1.0) * shares[0] / sum(shares)
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)  # of a time before
        words = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--seconds", f"{limit:.1f}"]
        for option in ("out", "work", "device", "data", "against", "matrix", "lock"):
            words += [f"--{option}", getattr(args, option)]
        words += ["--presets", *args.presets, *(["--batches", *map(str, args.batches)] if args.batches else [])]
        how = supervise(words, limit, out / "log.txt")
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty_result(name)
        if how:
            result["status"] = "cut off" if how.startswith("cut off") else "failed"
            result["failures"].append(f"{name}: {how}")
            write_result(path, result)
        results[name] = result
        write_atomic(out / "summary.md", summary(results).encode())
        print(f"{name:<9}{result['status']:<8}{result['seconds']:>5.0f} s of {limit:.0f}, {len(result['figures'])} "
              f"figures, {len(result['failures'])} failures", flush=True)
    print(f"read {out / 'summary.md'}")
    return int(any(result["failures"] for result in results.values()))


def summary(results: dict[str, dict]) -> str:
    """Results as a page for people."""
    text = []
    for name, result in results.items():
        if "commit" in result and not text:
            text.append(f"Commit {result['commit']}, source {result['source']}, {json.dumps(result['machine'])}\n")
            if result["device"] == "cpu":
                text.append("Toy shapes on a CPU: these figures say that the stages work, and nothing else.\n")
        text.append(f"## {name}: {result['status']}, {result['seconds']:.0f} s\n")
        text += [f"- FAILED {line}" for line in result["failures"]]
        for why, what in result["missing"].items():
            names = "; ".join(what[:4]) + (f" and {len(what) - 4} more" if len(what) > 4 else "")
            text.append(f"- not there: {names}: {why}")
        text += ["", "```text", *result["lines"], "```", ""]
    return "\n".join(["# One GPU\n", *text])


def parse_args(argv: list[str]) -> argparse.Namespace:
    p = command.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--out", required=True, help="folder of the results; made if it is not there")
    p.add_argument("--seconds", type=float, default=560.0, help="time for all stages (default 560)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy shapes")
    p.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="some stages")
    p.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="PRESET",
                   help="of stages train and score")
    p.add_argument("--batches", nargs="+", type=int, default=[], metavar="TOKENS", help="per step, of stage train")
    p.add_argument("--lock", default="", metavar="FILE",
                   help="hold this file while measuring, share it while compiling: several of these may then run side "
                   "by side")
    p.add_argument("--data", default="", metavar="DIR", help="folder of shards; without it text is made up")
    p.add_argument("--against", default="", metavar="SCRIPT", help="another trainer, to be run in stage train")
    p.add_argument("--matrix", default="", metavar="TOML", help="the matrix of stage runs, in place of its own")
    p.add_argument("--work", default="", metavar="DIR", help="where data and runs go (default: a temporary folder)")
    p.add_argument("--stage", choices=STAGES, metavar="STAGE", help="this one here, in this process; used by --only")
    return p.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        with ExitStack() as stack:
            if not args.work:
                folder = tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True)
                args.work = stack.enter_context(folder)
            for name in (args.out, args.work):
                Path(name).mkdir(parents=True, exist_ok=True)
            if args.stage:
                return run_here(args)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the stage ends too
            return run_all(args)
    except OSError as e:
        command.say_error(e)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
